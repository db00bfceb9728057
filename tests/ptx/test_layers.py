"""Layers on the kernels as they are compiled: right, free of races, the same in every order."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastrnn.cells import CELLS
from fastrnn.kernels import configs
from fastrnn.kernels.configs import DEVICES

from .driver import Schedule
from .layers import HAVE_MAXIMUM, POINTWISE, Case, check, emulate, faults, stable

# Beside the first, which every case runs: stores that arrive late in memory, a program or a warp
# that gets little time, one program far ahead.
SCHEDULES = (
    Schedule(1, "starve-cta", "lazy"),
    Schedule(2, "starve-warp", "random"),
    Schedule(3, "bursts", "lazy"),
    Schedule(4, "one", "at once"),
)
MODES = {
    "resident": {"schedule": "resident"},
    "flag": {"schedule": "persistent", "protocol": "flag"},
    "counter": {"schedule": "persistent", "protocol": "counter"},
    "stepwise": {"schedule": "stepwise"},
}
FORMATS = {
    "bf16": ("bfloat16", "tf32"),
    "fp16": ("float16", "tf32"),
    "tf32": ("float32", "tf32"),
    "tf32x3": ("float32", "tf32x3"),
    "ieee": ("float32", "ieee"),
}
UNSAVED = [name for name in POINTWISE if not CELLS[name].n_saved]
GPUS = ("a100", "h100")  # sm_80 and sm_90


def cases_of_everything():
    """Every cell by every schedule, protocol and format; the rest, which costs little, in turn."""
    for (c, cell), (m, mode), (f, name) in itertools.product(
        *(enumerate(names) for names in (POINTWISE, MODES, FORMATS))
    ):
        exact, exchanged = name == "ieee", mode in ("flag", "counter")
        if cell == "gru" and exact and exchanged:
            continue  # see `test_what_is_not_planned`
        hidden = (60 if exact else 40) if exchanged else 16 if exact else 24
        rows = 17 if (c + f) % 3 == 0 else 5
        if cell in HAVE_MAXIMUM and name in ("bf16", "fp16", "tf32"):
            rows = 2  # see `stable`
        yield Case(
            cell,
            hidden,
            2
            if cell in HAVE_MAXIMUM and name in ("bf16", "fp16", "tf32")
            else rows,  # see `stable`
            3,
            *FORMATS[name],
            directions=1 + (c // 2 + m + f) % 2,
            bias=(c + m + f) % 5 > 0,
            recompute=(c + 2 * m + f) % 4 == 0,
            gpu=GPUS[(c + m + f) % 2],
            **MODES[mode],
        )


def cases_of_features():
    """What a call may ask for beyond that, by every schedule and protocol."""
    resident, flag, counter, stepwise = MODES.values()
    for mode, cell, hidden in (
        (resident, "lstm", 21),
        (flag, "gru", 37),
        (counter, "lstm", 33),
        (stepwise, "gru", 45),
    ):
        # Rows that start anywhere; a second tile of one row.
        yield Case(cell, hidden, 17, 4, directions=2, gpu="a100", **mode)
        yield Case(cell, hidden, 17, 2, "float32", **mode)
        # One step; and many: mailboxes are used again from the third on, their laps from the fifth.
        few = 40 if mode["schedule"] == "persistent" else 24
        yield Case("rnn_tanh", few, 1, 1, **mode)
        yield Case("rnn_tanh", few, 3, 9, "float32", gpu="a100", **mode)
        yield Case(cell, 24, 6, 5, flow="marked", **mode)
        yield Case("lstm", 24, 18, 4, flow="fresh", directions=2, **mode)
    yield Case("slstm", 24, 5, 4, flow="fresh", **flag)
    yield Case("slstm", 24, 5, 4, flow="fresh", gpu="a100", **stepwise)
    yield Case("lstm", 24, 5, 4, recompute=True, flow="fresh", **counter)
    yield Case("gru", 40, 5, 3, "float16", training=False, **flag)
    yield Case("lstm", 24, 5, 3, training=False, gpu="a100", **resident)
    yield Case("gru", 24, 5, 4, recompute=True, flow="marked", gpu="a100", **resident)
    # As many programs as a GPU of three or six processors holds: launch after launch.
    yield Case("gru", 40, 33, 3, processors=3, **flag)
    yield Case("rnn_tanh", 48, 40, 3, "float32", directions=2, processors=6, **counter)
    # More than one block of columns of h, and of dh.
    yield Case("lstm", 129, 4, 3, gpu="a100", **flag)
    yield Case("rnn_tanh", 136, 4, 3, "float32", **counter)
    yield Case("lstm", 136, 33, 2, **stepwise)
    yield Case("rnn_tanh", 136, 33, 2, "float32", gpu="a100", **stepwise)


CASES = [
    pytest.param(case, number, id=str(case).replace(" ", "-"))
    for number, case in enumerate([*cases_of_everything(), *cases_of_features()])
]


@pytest.mark.parametrize(("case", "number"), CASES)
def test_layer(case, number):
    case = stable(case)
    results, first = emulate(case)
    check(case, results)
    again, second = emulate(case, SCHEDULES[number % len(SCHEDULES)])
    for emulator in (first, second):
        assert_launched(case, emulator)
        assert faults(emulator) == []
    for name, part in results.items():
        assert torch.equal(part, again[name]), f"{name} depends on the order of things"


def assert_launched(case, emulator):
    """What ran is what the case says."""
    launches = emulator.launches
    assert {launch.kernel for launch in launches} == {
        "forward_kernel", *(["backward_kernel"] if case.training else [])
    }  # fmt: skip
    exchanged = case.schedule == "persistent"
    if case.schedule == "stepwise":
        assert len(launches) == case.steps * (1 + case.training)
    capability = {"a100": 80, "h100": 90}[case.gpu]
    for launch in launches:
        assert f".target sm_{capability}" in launch.ptx
        assert launch.grid[2] == case.directions
        assert (launch.grid[0] > 1) or not exchanged
        assert ("ld.volatile.global" in launch.ptx) == (exchanged and case.protocol == "flag")
        assert (".acquire" in launch.ptx) == (exchanged and case.protocol == "counter")
        names = "/".join(launch.tensors)
        assert ("marks_ptr" in names) == bool(case.flow)
        assert ("fresh_ptrs" in names) == (case.flow == "fresh")
        if launch.kernel == "backward_kernel":
            assert ("past_ptrs[1]" in names) == (case.recompute and case.cell not in UNSAVED)


def test_cases_are_of_every_kind():
    """Each schedule and format on both GPUs, in both directions; launches one after another."""
    cases = list(cases_of_everything())
    for facts in (GPUS, (1, 2)):
        name = "gpu" if facts is GPUS else "directions"
        found = {(c.schedule, c.protocol, c.dtype, c.precision, getattr(c, name)) for c in cases}
        assert found == {
            (where["schedule"], where.get("protocol"), *which, fact)
            for where, which, fact in itertools.product(MODES.values(), FORMATS.values(), facts)
        }
    assert len(cases) == len(POINTWISE) * len(MODES) * len(FORMATS) - 2
    _, emulator = emulate(Case("gru", 40, 33, 3, processors=3, **MODES["flag"]))
    assert [launch.grid for launch in emulator.launches] == [(3, 1, 1)] * 4


def test_what_is_not_planned():
    """No tile of a GRU in exact float32 leaves room for an exchange."""
    for gpu, hidden in itertools.product(GPUS, range(17, 400)):
        shape = configs.Shape(3, 5, hidden, 1, 4, "ieee")
        assert None in [
            configs.choose(shape, DEVICES[gpu], backward=backward, schedule="persistent")
            for backward in (False, True)
        ]


@pytest.mark.parametrize("gpu", GPUS)
def test_planned(gpu):
    """Without a schedule that is asked for."""
    case = Case("gru", 40, 20, 3, gpu=gpu)
    results, emulator = emulate(case)
    check(case, results)
    assert faults(emulator) == []
