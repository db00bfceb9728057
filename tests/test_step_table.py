"""The table of simulated times: reproducible, and complete for the choice of kernels."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from fastrnn.bench import compile_budget, compiled, sass, step_table
from fastrnn.bench.step_table import Result
from fastrnn.cells import CELLS
from fastrnn.kernels import configs
from fastrnn.kernels.configs import Shape, Simulated

ROOT = Path(__file__).resolve().parent.parent
H100 = configs.DEVICES["h100"]
PINNED = re.search(r"^triton==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)

# Rows that are simulated again: every schedule and GPU, both runs, little code each.
SAMPLE = [
    (80, "forward", 3, "half", "persistent", 16, 8, 128),
    (80, "backward", 4, "half", "resident", 16, 8, 32),
    (90, "forward", 1, "tf32", "persistent", 32, 8, 64),
    (90, "backward", 4, "half", "persistent", 16, 4, 64),
    (90, "backward", 3, "half", "stepwise", 16, 4, 512),
    (90, "forward", 1, "ieee", "stepwise", 32, 8, 128),
]


@pytest.fixture(scope="module")
def rows() -> list[list[str]]:
    with configs.STEPS.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == Simulated._fields
    return rows


def named(planned) -> dict[tuple[str, ...], compiled.Variant]:
    return {tuple(map(str, step_table.key(variant))): variant for variant in planned}


def test_table_has_every_candidate(rows):
    """If not, run ``python -m fastrnn.bench.compile_budget --steps``; add --missing if no kernel in
    the table changed."""
    assert [tuple(row[: step_table.N_KEY]) for row in rows] == list(named(step_table.plan()))
    for row in rows:
        alone, full = map(int, row[step_table.N_KEY :])
        assert alone > 500
        assert 0.9 * alone < full < 10 * alone, row


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize("backward", [False, True])
def test_every_persistent_candidate_has_a_time(cell, backward):
    n_gates = CELLS[cell].n_gates
    for hidden in range(1, 2049, 7):
        for batch in (1, 64, 300):
            for itemsize in (2, 4):
                shape = Shape(n_gates, batch, hidden, 1, itemsize, "tf32")
                for config in configs.candidates(shape, H100, backward=backward):
                    us = configs.step_us(config, shape, H100, backward=backward)
                    assert math.isfinite(us), (config, shape)


@pytest.mark.parametrize("name", ["a100", "h100", "b200"])
@pytest.mark.parametrize("hidden", [64, 100, 256, 1000, 2048])
def test_the_fastest_is_chosen(name, hidden):
    device = configs.DEVICES[name]
    for batch in (1, 32, 256):
        for backward in (False, True):
            shape = Shape(4, batch, hidden, 1, 2, "tf32")
            candidates = list(configs.candidates(shape, device, backward=backward))
            times = [configs.step_us(c, shape, device, backward=backward) for c in candidates]
            chosen = configs.choose(shape, device, backward=backward)
            assert chosen is not None
            assert chosen == (candidates[times.index(min(times))], min(times))


@pytest.mark.long
def test_rows_are_what_is_simulated(rows):
    """Simulated in another process: this one may run with TRITON_INTERPRET."""
    assert PINNED
    if triton.__version__ != PINNED[1]:
        pytest.skip(f"the table is of triton {PINNED[1]}, this is {triton.__version__}")
    for name in ("ptxas", "cuobjdump", "nvdisasm"):
        try:
            sass.tool(name)
        except FileNotFoundError as error:
            pytest.skip(str(error))
    planned = named(step_table.plan())
    variants = [planned[tuple(map(str, key))] for key in SAMPLE]
    code = (
        "import json, sys; from fastrnn.bench import step_table; "
        "from fastrnn.bench.compiled import Variant\n"
        "variants = [Variant(*fields) for fields in json.loads(sys.argv[1])]\n"
        "print(json.dumps([step_table.simulate(variant) for variant in variants]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(variants)],
        stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    known = {tuple(row[: step_table.N_KEY]): row[step_table.N_KEY :] for row in rows}
    for key, result in zip(SAMPLE, json.loads(done.stdout), strict=True):
        alone, full, spilled, _, error = result
        assert (spilled, error) == (0, "")
        assert known[tuple(map(str, key))] == [str(alone), str(full)], key


@pytest.fixture
def simulated(monkeypatch):
    """Replace simulation by fixed results; a list of the variants requested."""
    asked = []

    def results(function, variants, jobs):
        assert function is step_table.simulate
        assert jobs == 2
        for variant in variants:
            asked.append(variant)
            if variant.schedule == "resident":
                yield Result(1000, 1100, 8, 0.5)
            elif variant.schedule == "stepwise":
                yield Result(math.nan, math.nan, 0, 0.5, "ValueError('no loop')")
            else:
                yield Result(1234, 2000 + len(asked), 0, 0.5)

    monkeypatch.setattr(compiled, "in_processes", results)
    return asked


def test_what_spills_or_fails_is_left_out(simulated, tmp_path, capsys):
    path = tmp_path / "steps.csv"
    assert compile_budget.main(["--steps", "--out", str(path)]) == 1
    planned = step_table.plan()
    assert set(simulated) == set(planned)
    sizes = [variant.columns for variant in simulated]
    assert sizes == sorted(sizes, reverse=True), "what takes longest first"
    rows = compiled.read_table(path, step_table.N_KEY)
    good = [variant for variant in planned if variant.schedule == "persistent"]
    assert list(rows) == list(named(good))
    assert {row[-2] for row in rows.values()} == {"1234"}
    text = capsys.readouterr().out
    assert f"left out: {' '.join(map(str, planned[-1]))} ValueError('no loop')" in text
    assert "8 bytes of stack" in text

    # Simulate only missing variants, and keep the rows of other devices.
    before = path.read_bytes()
    simulated.clear()
    assert step_table.write(path, ("a100",), only_missing=True)
    assert {variant.device for variant in simulated} == {"a100"}
    assert {variant.schedule for variant in simulated} == {"resident", "stepwise"}
    assert path.read_bytes() == before
    step_table.write(path, ("a100",))
    again = compiled.read_table(path, step_table.N_KEY)
    assert list(again) == list(rows)
    assert any(again[key] != rows[key] for key in rows if key[0] == "80")
    assert all(again[key] == rows[key] for key in rows if key[0] == "90")


def test_rows_are_kept_as_they_come(simulated, tmp_path, monkeypatch):
    path = tmp_path / "steps.csv"
    full = compiled.in_processes

    def interrupted(*args):
        for n, result in enumerate(full(*args)):
            if n == 300:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(compiled, "in_processes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step_table.write(path)
    kept = compiled.read_table(path, step_table.N_KEY)
    good = [variant for variant in simulated[:300] if variant.schedule == "persistent"]
    assert set(kept) == set(named(good))


def test_a_device_of_which_nothing_is_simulated(tmp_path, capsys):
    with pytest.raises(SystemExit):
        compile_budget.main(["--steps", "--devices", "b200"])
    assert "nothing is simulated for b200" in capsys.readouterr().err


def test_turns_that_the_compiler_made_one():
    ptx = """
    mma.sync.aligned a;
$L__BB0_1:                              // =>This Inner Loop Header: Depth=1
    mma.sync.aligned a;
    fma.rn.f32 b;
    add.s32 c;
    @%p1 bra $L__BB0_1;
$L__BB0_2:
    bra.uni $L__BB0_3;
$L__BB0_3:
    ret;
"""

    def code(*names: str) -> list[sass.Instruction]:
        found = [sass.Instruction(0, "", name, "", 1, 7, 7, (), "", None) for name in names]
        return [*found, found[0]._replace(name="BRA", predicate="@P0", goal=1)]

    assert compiled.unrolled(ptx, code("FFMA", "HMMA", "FFMA", "IADD3")) == 1
    assert compiled.unrolled(ptx, code("FFMA", *["HMMA", "FFMA", "IADD3"] * 4)) == 4
    assert compiled.unrolled(ptx.replace("bra $L__BB0_1", "bra $L__BB0_3"), code("FFMA")) == 1
