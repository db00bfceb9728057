"""Kernels cross-compiled for GPUs keep their budgets: the table, and a few compiled here."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

from fastrnn import planner
from fastrnn.bench import compile_budget, sass
from fastrnn.bench.compile_budget import Measured
from fastrnn.bench.compiled import Variant, launched, problem, read_table
from fastrnn.kernels import configs
from fastrnn.problem import Problem

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "bench" / "results" / "compile_budget.csv"

# cell, run, dtype, precision, hidden size, device: every kernel, every vendor's GPU generations.
SAMPLE = [
    ("lstm", "training", "bfloat16", "tf32", 64, "b200"),
    ("lstm", "training", "bfloat16", "tf32", 64, "mi300x"),
    ("lstm", "training fresh", "bfloat16", "tf32", 256, "h100"),
    ("gru", "training", "float32", "tf32", 256, "h100"),
    ("gru", "backward", "bfloat16", "tf32", 64, "a100"),
    ("gru", "backward", "float32", "ieee", 64, "mi300x"),
    ("gru", "backward fresh", "bfloat16", "tf32", 64, "h100"),
    ("rnn_tanh", "training", "float32", "ieee", 64, "b200"),
    ("rnn_tanh", "training", "float32", "tf32", 1024, "a100"),
    ("rnn_tanh", "backward", "bfloat16", "tf32", 256, "b200"),
    ("peephole_lstm", "backward", "bfloat16", "tf32", 64, "h100"),
    ("slstm", "training", "bfloat16", "tf32", 256, "h100"),
    ("slstm", "backward", "bfloat16", "tf32", 256, "h100"),
    ("lstm", "backward noisy", "bfloat16", "tf32", 512, "h100"),
    ("gru", "training fresh noisy", "bfloat16", "tf32", 64, "h100"),
    ("layernorm_gru", "training recurrent", "bfloat16", "tf32", 129, "h100"),
    ("layernorm_lstm", "training cell", "bfloat16", "tf32", 1024, "b200"),
    ("layernorm_lstm", "backward fresh noisy cell", "bfloat16", "tf32", 4096, "h100"),
    ("gru_reset_before", "training late", "bfloat16", "tf32", 1024, "mi300x"),
    ("gru_reset_before", "backward through", "bfloat16", "tf32", 1024, "a100"),
    ("lstm", "training projected project", "float32", "tf32x3", 256, "h100"),
    ("lstm", "backward receive", "float64", "ieee", 256, "h100"),
    ("lstm", "backward cell", "float64", "ieee", 256, "h100"),
]
# cell, run, hidden size, device, batch: persistent kernels, of one tile of rows and of two.
PERSISTENT = [
    ("lstm", "training", 128, "a100", 16),
    ("lstm", "training", 512, "h100", 64),
    ("lstm", "training", 1024, "b200", 16),
    ("lstm", "backward", 128, "rtx5090", 64),
    ("lstm", "backward", 512, "a100", 16),
    ("lstm", "backward", 1024, "h100", 64),
    ("gru", "training", 128, "b200", 64),
    ("gru", "training", 512, "rtx5090", 16),
    ("gru", "training", 1024, "a100", 64),
    ("gru", "backward", 128, "h100", 16),
    ("gru", "backward", 512, "b200", 64),
    ("gru", "backward", 1024, "rtx5090", 16),
]

# Measurements of a kernel that keeps its budgets.
GOOD = Measured(
    *(200, 0, 100_000, 2, 64, 0, 80, 2, "16", "1 2"),
    **{"alone": 2000, "full": 2500, "executed_barriers": 2, "chain": 4, "l2_bytes": 33000},
    shared_bytes=math.nan,
    triton="3.7.1",
)


def parsed(fields: type, row: dict[str, str]) -> object:
    """A Variant or a Measured from a row of the table."""
    kinds = get_type_hints(fields)
    # An empty number means not simulated.
    texts = {name: "nan" if kinds[name] is float and not row[name] else row[name] for name in kinds}
    return fields(**{name: kind(texts[name]) for name, kind in kinds.items()})


@pytest.fixture(scope="module")
def table() -> dict[Variant, Measured]:
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {parsed(Variant, row): parsed(Measured, row) for row in rows}
    assert len(found) == len(rows)
    return found


def test_table_has_what_is_chosen(table):
    """If not, run ``python -m fastrnn.bench.compile_budget`` (--missing if no kernel changed)."""
    planned = compile_budget.plan()
    assert list(table) == list(planned)


def test_table_keeps_the_budgets(table):
    broken = {
        variant: faults
        for variant, measured in table.items()
        if (faults := compile_budget.broken(variant, measured))
    }
    assert not broken


def bound_of_shared_memory(variant: Variant) -> int:
    return configs.shared_memory(variant.config, variant.shape(1), backward=variant.is_backward)


def test_shared_memory_is_foreseen(table):
    """The expected size is an upper bound of what the compiler allocates."""
    for variant, measured in table.items():
        if variant.schedule in ("resident", "persistent"):
            assert measured.shared_memory <= bound_of_shared_memory(variant), variant


def test_only_what_is_missing_of_a_file_that_is_missing(monkeypatch, tmp_path):
    config = configs.Config("persistent", 16, 16, 16, 8, 2, 1)
    planned = [problem(*facts).of(config) for facts in SAMPLE[3:5]]
    use = compile_budget.Use((1, 16), 1.25)
    monkeypatch.setattr(compile_budget, "plan", lambda *_, **__: dict.fromkeys(planned, use))
    asked = []

    def measure_all(variants, jobs):
        asked.append(list(variants))
        yield from [GOOD] * len(variants)

    monkeypatch.setattr(compile_budget, "measure_all", measure_all)
    command = ["--missing", "--out", str(tmp_path / "new.csv")]
    for missing in (planned, []):
        assert compile_budget.main(command) == 0
        assert asked.pop() == missing
    rows = read_table(tmp_path / "new.csv", len(Variant._fields))
    assert list(rows) == [tuple(map(str, variant)) for variant in planned]


def test_each_fault_is_found():
    variant = Variant(
        "lstm", "training", "bfloat16", "tf32", 512, "h100", "persistent", 32, 16, 32, 8, 1
    )
    # Written and read: partial sums of four gates, and the second of two weight chunks.
    moved = 2 * 4 * (2 * 8 * 1024 + 16 * 256 * 2)
    good = GOOD._replace(shared_bytes=moved)
    broken = compile_budget.broken
    assert broken(variant, good) == []
    bad = good._replace(spilled=8, shared_memory=300_000, matrix=0, barriers=3, ldsm=1)
    bad = bad._replace(exchange_loads="8 16")
    faults = list(compile_budget.FAULTS)
    faults.remove("narrow loads")
    assert broken(variant, bad) == faults
    assert broken(variant, good._replace(shared_bytes=moved + 1)) == ["round trip"]
    assert broken(variant, good._replace(shared_bytes=math.nan)) == []
    assert broken(variant._replace(block_k=16), good._replace(exchange_loads="8")) == []
    marked = variant._replace(run="training marked")
    assert broken(marked, good._replace(spilled=8)) == ["spills"]
    odd = variant._replace(hidden_size=509)
    assert broken(odd, good._replace(exchange_loads="2")) == []

    resident = variant._replace(hidden_size=64, schedule="resident", block_b=16, block_h=64)
    alone = good._replace(ldsm=32, barriers=9, turn=1, exchange_loads="", other_loads="16")
    assert broken(resident, alone) == []
    assert broken(resident, alone._replace(other_loads="8")) == ["narrow loads"]
    exact = resident._replace(dtype="float32", precision="ieee")
    assert broken(exact, alone._replace(matrix=0)) == []
    marked = resident._replace(run="backward marked")
    assert broken(marked, alone._replace(spilled=16)) == []
    assert broken(marked, alone._replace(spilled=24)) == ["spills"]
    odd = resident._replace(hidden_size=63)
    assert broken(odd, alone._replace(other_loads="2")) == []
    noisy = resident._replace(run="backward noisy")
    assert broken(noisy, alone._replace(spilled=64)) == []
    assert broken(noisy, alone._replace(spilled=72)) == ["spills"]

    some = problem("layernorm_lstm", "backward", "bfloat16", "tf32", 4096, "h100")
    config = configs.Config("staged", 16, 32, 64, 4, 0, 1)
    receive, cell = some.launches(config)
    assert broken(receive, alone._replace(spilled=8)) == ["spills"]
    assert broken(receive, alone._replace(matrix=0)) == ["no matrix instructions"]
    assert broken(cell, alone._replace(matrix=0, spilled=640)) == []
    assert broken(cell, alone._replace(spilled=648)) == ["spills"]
    _, shorter = some._replace(hidden_size=2048).launches(config)
    assert broken(shorter, alone._replace(spilled=8)) == ["spills"]
    receive, _ = some._replace(dtype="float64", precision="ieee").launches(config)
    assert broken(receive, alone._replace(matrix=0)) == []


@pytest.mark.parametrize("way", ["training", "backward"])
@pytest.mark.parametrize(
    "kind", ["layernorm_lstm", "gru_reset_before", "lstm projected", "layernorm_gru projected"]
)
def test_launches_of_a_step_are_known(kind, way):
    cell, _, option = kind.partition(" ")
    some = problem(cell, f"{way} {option}".strip(), "bfloat16", "tf32", 9, "h100")
    variants = some.launches(configs.Config("staged", 16, 32, 64, 4, 0, 1))
    assert [variant.launch for variant in variants] == [*launched(variants[0])]


def test_the_longest_rows_are_in_the_table_and_no_longer_ones_are_planned(table):
    for dtype, longest in (("bfloat16", 4096), ("float64", 2048)):
        found = [
            variant.hidden_size
            for variant in table
            if variant.cell == "layernorm_lstm" and variant.dtype == dtype
        ]
        assert max(found) == longest
        facts = "layernorm_lstm", 9, 9, longest, longest, getattr(torch, dtype), "cuda"
        fits = Problem(*facts, gpu=configs.DEVICES["h100"])
        too_long = fits._replace(hidden_size=longest + 1)
        assert planner.plan(fits).path == "kernels"
        plan = planner.plan(too_long)
        assert plan.path == "operators"
        assert f"normalize at most {longest} hidden units" in plan.reason


def persistent(cell: str, run: str, hidden: int, device: str, batch: int) -> Variant:
    some = problem(cell, run, "bfloat16", "tf32", hidden, device)
    choice = configs.choose(
        some.shape(batch), some.gpu, backward=some.is_backward, schedule="persistent"
    )
    assert choice is not None
    return some.of(choice.config)


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory) -> dict[Variant, Measured]:
    """What the tests need, compiled in another process: this one may run with TRITON_INTERPRET."""
    for name in ("ptxas", "cuobjdump", "nvdisasm"):
        try:
            sass.tool(name)
        except FileNotFoundError as error:
            pytest.skip(str(error))
    planned = compile_budget.plan(quick=True)
    wanted = [
        item.callspec.params["facts"]
        for item in request.session.items
        if item.path == request.path and "compiled" in item.fixturenames
    ]
    variants = [
        persistent(*facts) if facts in PERSISTENT else next(v for v in planned if v[:6] == facts)
        for facts in wanted
    ]
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


@pytest.mark.long
@pytest.mark.xdist_group("compiled")
@pytest.mark.parametrize("facts", SAMPLE, ids=lambda facts: "-".join(map(str, facts)))
def test_sample_keeps_the_budgets(compiled, facts):
    variant, measured = next((v, m) for v, m in compiled.items() if v[:6] == facts)
    assert compile_budget.broken(variant, measured) == [], measured
    assert measured.registers > 0
    assert bool(measured.exchange_loads) == (variant.schedule == "persistent")


@pytest.mark.sweep(7)
@pytest.mark.xdist_group("compiled")
@pytest.mark.parametrize("facts", PERSISTENT, ids=lambda facts: "-".join(map(str, facts)))
def test_persistent_kernels_keep_the_budgets(compiled, facts):
    """No spills, one barrier per tile and step, no shared memory between L2 and products."""
    variant = persistent(*facts)
    measured = compiled[variant]
    assert compile_budget.broken(variant, measured) == [], measured
    assert measured.turn == measured.barriers == 2
    assert measured.shared_memory <= bound_of_shared_memory(variant)
    if variant.device in ("a100", "h100"):
        assert measured.executed_barriers == variant.tiles
        assert measured.l2_bytes >= variant.block_b * variant.columns * 2  # everything published


def test_what_is_compiled_is_found_by_the_source_of_the_cell():
    """Triton's disk cache must be keyed by the functions a cell calls."""
    code = """
import triton
from triton.compiler import ASTSource
from fastrnn.cells import CELLS, Engine
from fastrnn.kernels import activations, resident
cells = [activations.bound(cell) for cell in CELLS.values() if cell.is_pointwise]
names = {**activations.ENGINE.names, "tanh": activations.ENGINE.names["sigmoid"]}
other = Engine(names, compile=triton.jit).bind(CELLS["lstm"].forward)
cells.append(cells[0]._replace(forward=other))
sources = [ASTSource(resident.forward_kernel, {}, {"CELL": cell}) for cell in cells]
assert len({source.hash() for source in sources}) == len(cells)
"""
    environ = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, check=True)


def test_the_empty_exchange_compiles():
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from fastrnn.bench.empty_gpu import empty_kernel
constants = {"H": 512, "BLOCK_K": 32}
signature = {"state_ptr": "*bf16", "steps": "i32", **dict.fromkeys(constants, "constexpr")}
source = GluonASTSource(empty_kernel, signature, constants, {(0,): [["tt.divisibility", 16]]})
triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
"""
    environ = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, check=True)
