# Two commands on a fresh machine: `make bench` and `make test`. They need python >= 3.10 and a
# package index; everything else goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.NOTPARALLEL:
.PHONY: bench test test-all lint verify docs emulate gallery gpu clean

bench: $(VENV)/bench.stamp
	$(BIN)/python -m fastrnn bench --quick

# Before every commit: what takes longest, and most cases of sweeps, are in test-all only.
test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n auto --dist loadgroup $(ALL)
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -n auto --dist loadgroup $(ALL) tests/ptx

test-all: ALL := --all
test-all: test

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

verify: $(VENV)/verify.stamp
	$(BIN)/python -m fastrnn verify --cases 500

# A static site in build/site, with every link checked.
docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Every planned kernel in the emulator of tests/ptx, under 20 schedules: some hours on two cores.
emulate: $(VENV)/test.stamp
	TRITON_INTERPRET=0 PYTHONPATH=tests $(BIN)/python -m ptx.sweep

# The examples beside torch.nn, their pictures and tables: twenty minutes on two cores.
gallery: $(VENV)/examples.stamp
	$(BIN)/python examples/gallery.py

# On a machine with a GPU. Without make or a network: python -m fastrnn.bench.on_gpu
gpu: $(VENV)/test.stamp
	$(BIN)/python -m fastrnn.bench.on_gpu

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "python >= 3.10 is needed")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# One stamp for each extra: reinstalled when the requirements change.
$(VENV)/%.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable '.[$*]'
	touch $@
