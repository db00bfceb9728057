"""Kernels compiled for GPUs that are not there keep their budgets: the file, and a few afresh."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from fastrnn.bench import compile_budget
from fastrnn.bench.compile_budget import Measured, Variant
from fastrnn.cells import CELLS
from fastrnn.kernels import configs

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "bench" / "results" / "compile_budget.csv"

# cell, run, dtype, precision, hidden size, device: every kernel, code of every vendor's generation.
SAMPLE = [
    ("lstm", "training", "bfloat16", "tf32", 256, "a100"),
    ("lstm", "training", "bfloat16", "tf32", 64, "b200"),
    ("lstm", "backward", "bfloat16", "tf32", 256, "h100"),
    ("lstm", "training fresh", "bfloat16", "tf32", 256, "h100"),
    ("gru", "backward fresh", "bfloat16", "tf32", 64, "h100"),
    ("lstm", "training", "bfloat16", "tf32", 64, "mi300x"),
    ("gru", "training", "float32", "tf32", 256, "h100"),
    ("gru", "backward", "bfloat16", "tf32", 64, "a100"),
    ("gru", "backward", "float32", "ieee", 64, "mi300x"),
    ("rnn_tanh", "training", "float32", "ieee", 64, "b200"),
    ("rnn_tanh", "backward", "bfloat16", "tf32", 256, "b200"),
    ("rnn_tanh", "training", "float32", "tf32", 1024, "a100"),
    ("peephole_lstm", "backward", "bfloat16", "tf32", 64, "h100"),
    ("slstm", "training", "bfloat16", "tf32", 256, "h100"),
    ("slstm", "backward", "bfloat16", "tf32", 256, "h100"),
]


def parsed(fields: type, row: dict[str, str]) -> object:
    """A Variant or a Measured from a row of the file."""
    kinds = get_type_hints(fields)
    return fields(**{name: kind(row[name]) for name, kind in kinds.items()})


@pytest.fixture(scope="module")
def table() -> dict[Variant, Measured]:
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {parsed(Variant, row): parsed(Measured, row) for row in rows}
    assert len(found) == len(rows)
    return found


def test_table_has_what_is_chosen(table):
    """If not: ``python -m fastrnn.bench.compile_budget``, with --missing if no kernel changed."""
    planned = compile_budget.plan()
    assert list(table) == list(planned)


def test_table_keeps_the_budgets(table):
    broken = {
        variant: faults
        for variant, measured in table.items()
        if (faults := compile_budget.broken(variant, measured))
    }
    assert not broken


def test_shared_memory_is_foreseen(table):
    """The model's number is an upper bound of the compiler's."""
    for variant, measured in table.items():
        if variant.schedule != "stepwise":
            itemsize = 2 if variant.dtype == "bfloat16" else 4
            shape = configs.Shape.of(
                CELLS[variant.cell], 1, variant.hidden_size, 1, itemsize, variant.precision
            )
            config = configs.Config(*variant[6:], tiles=1)
            backward = variant.run.startswith(("backward", "recompute"))
            bound = configs.shared_memory(config, shape, backward=backward)
            assert measured.shared_memory <= bound, variant


def test_each_fault_is_found():
    variant = Variant(
        "lstm", "training", "bfloat16", "tf32", 256, "h100", "persistent", "flag", 16, 16, 256, 8
    )
    good = Measured(200, 0, 100_000, 16, 32, 8, 9, "16", "8", "3.6.0")
    assert compile_budget.broken(variant, good) == []
    bad = Measured(255, 8, 300_000, 0, 32, 8, 9, "2 16", "4", "3.6.0")
    assert compile_budget.broken(variant, bad) == list(compile_budget.FAULTS)
    exact = variant._replace(dtype="float32", precision="ieee")
    assert compile_budget.broken(exact, good._replace(matrix=0, other_loads="16")) == []
    marked = variant._replace(run="training marked")
    assert compile_budget.broken(marked, good._replace(spilled=16)) == []
    assert compile_budget.broken(marked, good._replace(spilled=24)) == ["spills"]
    odd = variant._replace(hidden_size=129)
    assert compile_budget.broken(odd, good._replace(exchange_loads="2", other_loads="2")) == []


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[Variant, Measured]:
    """The sample, compiled by another process: with TRITON_INTERPRET, this one cannot."""
    missing = [
        name for name in ("ptxas", "cuobjdump") if not (compile_budget.TOOLS / name).exists()
    ]
    if missing:
        pytest.skip(f"triton came without {', '.join(missing)}")
    variants = []
    for problem in SAMPLE:
        devices = (problem[-1],)
        variants.append(
            next(v for v in compile_budget.plan(devices, quick=True) if v[:6] == problem)
        )
    code = (
        "import json, sys; from fastrnn.bench.compile_budget import Variant, measure_all\n"
        "variants = [Variant(*fields) for fields in json.loads(sys.argv[1])]\n"
        "print(json.dumps(list(measure_all(variants, jobs=2))))"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(variants)],
        stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=env,
    )  # fmt: skip
    return {v: Measured(*m) for v, m in zip(variants, json.loads(done.stdout), strict=True)}


@pytest.mark.parametrize("problem", SAMPLE, ids=lambda problem: "-".join(map(str, problem)))
def test_sample_keeps_the_budgets(compiled, problem):
    variant, measured = next((v, m) for v, m in compiled.items() if v[:6] == problem)
    assert compile_budget.broken(variant, measured) == [], measured
    assert measured.registers > 0
    if variant.schedule == "persistent":
        assert measured.exchange_loads


def test_what_is_compiled_is_found_by_the_source_of_the_cell():
    """Triton's cache on disk must know what a cell calls."""
    code = """
import triton
from triton.compiler import ASTSource
from fastrnn.cells import CELLS, Engine
from fastrnn.kernels import activations, persistent
cells = [activations.bound(cell) for cell in CELLS.values() if cell.is_pointwise]
names = {**activations.ENGINE.names, "tanh": activations.sigmoid}
other = Engine(names, compile=triton.jit).bind(CELLS["lstm"].forward)
cells.append(cells[0]._replace(forward=other))
sources = [ASTSource(persistent.forward_kernel, {}, {"CELL": cell}) for cell in cells]
assert len({source.hash() for source in sources}) == len(cells)
"""
    environ = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, check=True)


def test_cells_compile_in_gluon():
    """No kernel is written in it; one could take the cells as they are."""
    pytest.importorskip("triton.experimental.gluon")
    environ = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "gluon_cells.py"],
        stdout=subprocess.PIPE, text=True, check=True, env=environ,
    )  # fmt: skip
    stores = {name: int(count) for name, count in map(str.split, done.stdout.splitlines())}
    # States, activations, gradients of gates and of states.
    assert stores == {
        name: 2 * cell.n_states + cell.n_saved + cell.n_gates + cell.n_apart
        for name, cell in CELLS.items()
        if cell.is_pointwise
    }


@pytest.mark.parametrize("protocol", ["flag", "counter"])
def test_the_empty_exchange_compiles(protocol):
    code = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastrnn.bench.empty_gpu import empty_kernel
constants = {{"H": 512, "BLOCK_B": 16, "BLOCK_H": 16, "PROTOCOL": {protocol!r}}}
signature = {{"state_ptr": "*bf16", "counter_ptr": "*i32", "error_ptr": "*i32", "steps": "i32"}}
signature |= dict.fromkeys(constants, "constexpr")
source = ASTSource(empty_kernel, signature, constants)
triton.compile(source, target=GPUTarget("cuda", 90, 32), options={{"num_warps": 8}})
"""
    environ = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, check=True)
