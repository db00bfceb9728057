"""Layers on compiled kernels: correct, free of races, and identical in every order of events."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fastrnn.cells import CELLS
from fastrnn.kernels.configs import Config

from .driver import Schedule
from .layers import GPUS, HAVE_MAXIMUM, POINTWISE, Case, check, emulate, faults, stable

# In addition to the first schedule, which every case runs: stores that reach memory late, a program
# or a warp that gets little time, one program far ahead.
ORDERS = (
    Schedule(1, "starve-cta", "lazy"),
    Schedule(2, "starve-warp", "random"),
    Schedule(3, "bursts", "lazy"),
    Schedule(4, "one", "at once"),
)
FORMATS = {
    "bf16": ("bfloat16", "tf32"),
    "fp16": ("float16", "tf32"),
    "tf32": ("float32", "tf32"),
    "tf32x3": ("float32", "tf32x3"),
    "ieee": ("float32", "ieee"),
}
# Schedule and format, where kernels exist.
KINDS = [
    *itertools.product(("resident", "stepwise"), FORMATS),
    *itertools.product(("persistent",), ("bf16", "fp16", "tf32")),
]
UNSAVED = [name for name in POINTWISE if not CELLS[name].n_saved]
NAMES = ("a100", "h100", "rtx5090")  # sm_80, sm_90, sm_120
FLOWS = ("", "marked", "fresh")
# 16-bit rows aligned to 16, 4, 2 and 8 bytes; 32-bit rows to 16, 8, 4 and 16.
UNITS = (40, 50, 33, 36)


def launched(case: Case, block_b: int = 16, num_warps: int = 4, kept: float = 1) -> Case:
    """Return the case on persistent kernels that keep part of the weights in registers.

    `kept` is the maximum share, so that some chunks may be left for shared memory. Whether they
    would spill in the registers of a GPU does not matter here.
    """
    tiles = case.device.processors // (-(-case.units // 16) * case.groups)
    configs = []
    for backward in (False, True):
        columns = case.units * (case.shape.n_gates if backward else 1)
        block_k = 64 // case.shape.itemsize
        if block_k > 16 and columns % (num_warps * block_k):
            block_k //= 2
        config = Config("persistent", block_b, 16, block_k, num_warps, 0, tiles)
        chunks = case.chunks(config, backward)
        configs.append(config._replace(in_registers=int(kept * chunks)))
    return replace(case, configs=(configs[0], configs[1]))


def cases_of_everything() -> Iterator[Case]:
    """Generate every cell with every schedule and format, varying the other options in turn."""
    for (c, cell), (k, (schedule, name)) in itertools.product(
        enumerate(POINTWISE), enumerate(KINDS)
    ):
        n = c * len(KINDS) + k
        is_unstable = cell in HAVE_MAXIMUM and name in ("bf16", "fp16", "tf32")
        case = Case(
            cell,
            {"resident": 16 if name == "ieee" else 24, "stepwise": 24}.get(schedule, UNITS[n % 4]),
            2 if is_unstable else (1, 17, 5)[n % 3],  # see `stable`
            (3, 2)[n % 2],
            *FORMATS[name],
            directions=1 + (c + k) % 2,
            bias=n % 5 > 0,
            recompute=n % 4 == 0,
            flow=FLOWS[(c + k) % 3],
            gpu=NAMES[(c + n) % 3],
            schedule=schedule,
        )
        if schedule == "persistent":
            block_b = 32 if case.batch > 16 and n % 2 else 16
            case = launched(case, block_b, (4, 8)[(c + k) % 2], (0, 0.5, 1)[n % 3])
        yield case


def cases_of_features() -> Iterator[Case]:
    """Generate further options of a call."""
    for schedule, cell, hidden in (("resident", "lstm", 21), ("stepwise", "gru", 45)):
        # Unaligned rows; a second tile of one row.
        yield Case(cell, hidden, 17, 4, directions=2, gpu="a100", schedule=schedule)
        yield Case(cell, hidden, 17, 2, "float32", schedule=schedule)
        yield Case("rnn_tanh", 24, 1, 1, schedule=schedule)
        yield Case(cell, 24, 6, 5, flow="marked", schedule=schedule)
        yield Case("lstm", 24, 18, 4, flow="fresh", directions=2, schedule=schedule)
    yield Case("slstm", 24, 5, 4, flow="fresh", gpu="a100", schedule="stepwise")
    yield Case("lstm", 24, 5, 3, training=False, gpu="a100", schedule="resident")
    yield Case("lstm", 136, 33, 2, schedule="stepwise")
    yield Case("rnn_tanh", 136, 33, 2, "float32", gpu="a100", schedule="stepwise")


def cases_of_exchanges() -> Iterator[Case]:
    """Generate variants of persistent kernels' code, and of the paths through it."""
    # Batches of one row, of one more than one or two tiles, of less than a pair at the end; one
    # step or a few, even and odd; units that do not fill a program, a chunk or a word.
    lstm = Case(schedule="persistent")
    for hidden, batch, steps, block_b, num_warps, kept, fields in (
        (1, 1, 1, 16, 4, 1, {"dtype": "float16"}),
        (1, 17, 5, 32, 8, 0, {}),
        (17, 3, 1, 16, 8, 0, {"directions": 2}),
        (72, 17, 5, 32, 4, 0.5, {"flow": "fresh", "directions": 2}),
        (50, 40, 2, 32, 8, 1, {"flow": "marked", "gpu": "rtx5090"}),
        (33, 66, 3, 32, 4, 0, {"directions": 2, "processors": 12}),
        (37, 40, 5, 16, 8, 0.5, {"flow": "fresh", "processors": 3, "gpu": "a100"}),
        (129, 17, 3, 16, 4, 0.5, {"gpu": "a100"}),
        (144, 3, 3, 16, 8, 0.5, {}),
    ):
        case = replace(lstm, hidden=hidden, batch=batch, steps=steps, **fields)
        yield launched(case, block_b, num_warps, kept)
    gru = replace(lstm, cell="gru")
    for hidden, batch, steps, block_b, num_warps, kept, fields in (
        (50, 66, 2, 32, 8, 0, {"recompute": True, "flow": "fresh", "dtype": "float16"}),
        (40, 33, 3, 32, 4, 1, {"processors": 3}),
        (33, 17, 5, 32, 8, 1, {"dtype": "float32", "flow": "marked"}),
        (129, 5, 2, 16, 8, 0.5, {"dtype": "float32", "gpu": "a100"}),
        (36, 40, 1, 32, 4, 0.5, {"dtype": "float32", "directions": 2}),
        (40, 5, 3, 16, 4, 1, {"dtype": "float16", "training": False}),
    ):
        case = replace(gru, hidden=hidden, batch=batch, steps=steps, **fields)
        yield launched(case, block_b, num_warps, kept)
    tanh = replace(lstm, cell="rnn_tanh", dtype="float32")
    for hidden, batch, steps, block_b, num_warps, kept, fields in (
        (1, 2, 3, 16, 8, 1, {}),
        (129, 40, 2, 32, 8, 0.5, {"directions": 2, "processors": 36}),
        (272, 3, 3, 16, 4, 0.5, {"dtype": "bfloat16", "gpu": "rtx5090"}),
        (256, 2, 2, 16, 8, 1, {"gpu": "a100"}),
    ):
        case = replace(tanh, hidden=hidden, batch=batch, steps=steps, **fields)
        yield launched(case, block_b, num_warps, kept)
    yield launched(replace(lstm, cell="slstm", hidden=24, batch=5, flow="fresh"), 16, 8, 0.5)
    yield Case("peephole_lstm", 36, 17, 3, flow="fresh", gpu="rtx5090", schedule="persistent")


def cases_of_groups() -> Iterator[Case]:
    """Generate heads, ensembles and noise."""
    for schedule, gpu in (("resident", "h100"), ("stepwise", "a100"), ("persistent", "rtx5090")):
        for cell, fields in (
            ("lstm", {"hidden": 48, "heads": 2, "flow": "fresh", "directions": 2}),
            ("gru", {"hidden": 66, "heads": 3, "batch": 17, "dtype": "float32"}),
            ("lstm", {"hidden": 24, "members": 2, "directions": 2}),
            ("gru", {"hidden": 34, "members": 3, "batch": 3, "heads": 2, "dtype": "float16"}),
            ("lstm", {"hidden": 40, "noise": "drop", "batch": 17, "directions": 2}),
            ("gru", {"hidden": 33, "noise": "drop", "flow": "marked", "recompute": True}),
            ("lstm", {"hidden": 24, "noise": "drop units", "flow": "fresh", "heads": 2}),
            ("gru", {"hidden": 36, "noise": "share", "flow": "marked", "dtype": "float32"}),
            ("rnn_tanh", {"hidden": 40, "noise": "drop share", "directions": 2}),
            ("peephole_lstm", {"hidden": 24, "noise": "units", "dtype": "float32"}),
        ):
            case = replace(Case(cell, batch=5, steps=3, schedule=schedule, gpu=gpu), **fields)
            if schedule == "persistent":
                block_b = 32 if case.batch > 16 and not case.flow else 16
                case = launched(case, block_b, 8 if case.heads > 1 else 4, 0.5)
            yield case


def cases_of_candidates() -> Iterator[Case]:
    """Generate all candidates for some shapes."""
    for case in (
        Case("lstm", 64, 33, 3),
        Case("gru", 66, 17, 2, "float32", gpu="a100"),
        Case("rnn_tanh", 129, 17, 3, "float16", directions=2, gpu="rtx5090"),
        Case("rnn_tanh", 64, 17, 2, "float32", "tf32x3", gpu="a100"),
        Case("gru", 33, 17, 2, "float32", "ieee"),
    ):
        for configs in case.candidates():
            yield replace(case, configs=configs)


CASES = [
    pytest.param(case, number, id=str(case).replace(",", "").replace(" ", "-"))
    for number, case in enumerate(
        [
            *cases_of_everything(),
            *cases_of_features(),
            *cases_of_exchanges(),
            *cases_of_groups(),
            *cases_of_candidates(),
        ]
    )
]


@pytest.mark.sweep(13)
@pytest.mark.parametrize(("case", "number"), CASES)
def test_layer(case, number):
    case = stable(case)
    results, first = emulate(case)
    check(case, results)
    again, second = emulate(case, ORDERS[number % len(ORDERS)])
    for emulator in (first, second):
        assert_launched(case, emulator)
        assert faults(emulator) == []
    for name, part in results.items():
        assert torch.equal(part, again[name]), f"{name} depends on the order of things"


def assert_launched(case, emulator):
    """Check that the kernels that ran are those of the case."""
    launches = emulator.launches
    assert {launch.kernel for launch in launches} == {
        "forward_kernel", *(["backward_kernel"] if case.training else [])
    }  # fmt: skip
    for launch in launches:
        is_backward = launch.kernel == "backward_kernel"
        config = case.configs[is_backward] if case.configs else None
        schedule = config.schedule if config else case.schedule
        if schedule == "stepwise":
            assert sum(one.kernel == launch.kernel for one in launches) == case.steps
        assert f".target sm_{case.device.capability}" in launch.ptx
        assert launch.grid[2] == case.groups
        if config:
            assert launch.program.threads == 32 * config.num_warps
            assert launch.grid[0] == -(-case.units // config.block_h)
        assert ("ld.relaxed" in launch.ptx) == (schedule == "persistent")
        names = "/".join(launch.tensors)
        assert ("marks_ptr" in names) == bool(case.flow)
        assert ("fresh_ptrs" in names) == (case.flow == "fresh")
        assert ("noise_ptrs[0]" in names) == ("drop" in case.noise)
        has_zones = "noise_ptrs[1]" in names
        assert has_zones == any(kind in case.noise for kind in ("units", "share"))
        if is_backward:
            is_again = case.recompute and case.cell not in UNSAVED
            assert ("past_ptrs[1]" in names) == (is_again or has_zones)


def test_cases_are_of_every_kind():
    """Each schedule and format on every GPU, with every flow and in both directions."""
    cases = list(cases_of_everything())
    assert len(cases) == len(POINTWISE) * len(KINDS)
    for name, facts in (("gpu", NAMES), ("directions", (1, 2)), ("flow", FLOWS)):
        found = {(c.schedule, c.dtype, c.precision, getattr(c, name)) for c in cases}
        kinds = [(schedule, *FORMATS[name]) for schedule, name in KINDS]
        assert found == {(*kind, fact) for kind, fact in itertools.product(kinds, facts)}


def test_exchanges_are_of_every_kind():
    """Persistent kernels with one and two tiles, 4 and 8 warps, and every placement of weights."""
    cases = [c for c in [*cases_of_everything(), *cases_of_exchanges()] if c.configs]
    for backward in (False, True):
        found = set()
        for case in cases:
            config, chunks = case.configs[backward], case.chunks(case.configs[backward], backward)
            kept = config.in_registers
            place = "registers" if kept == chunks else "both" if kept else "shared memory"
            found.add((config.block_b, config.num_warps, place))
        places = ("registers", "both", "shared memory")
        assert found == set(itertools.product((16, 32), (4, 8), places))


def test_launch_after_launch():
    """As many programs at a time as a GPU with three processors holds."""
    _, emulator = emulate(launched(Case("gru", 40, 33, 3, schedule="persistent", processors=3)))
    assert [launch.grid for launch in emulator.launches] == [(3, 1, 1)] * 6


@pytest.mark.sweep(2)
@pytest.mark.parametrize("gpu", NAMES)
def test_planned(gpu):
    """With no schedule requested."""
    case = Case("gru", 40, 20, 3, gpu=gpu)
    assert GPUS[gpu].capability in (80, 90, 120)
    results, emulator = emulate(case)
    check(case, results)
    assert faults(emulator) == []
