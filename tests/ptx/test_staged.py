"""Steps with more than one product on compiled kernels: correct, and free of races."""

from __future__ import annotations

import pytest
import torch
from staged_harness import CELLS_OF_THIS_KIND, PROBLEMS, Layer, assert_right, draw, run

from fastrnn.bench.compiled import compile_variant, problem, resources
from fastrnn.kernels import configs
from fastrnn.kernels.configs import Config

from .driver import Emulator, Schedule
from .layers import Case, check, emulate, faults

EVERYTHING = {"lengths": True, "resets": True, "bptt": 2, "fresh": True, "drop": True}


def check_layer(
    layer: Layer, config: Config, capability: int, schedule: Schedule, precision: str = "ieee"
) -> Emulator:
    numbers = draw(layer)
    emulator = Emulator(capability, schedule)
    with emulator, emulator.watching():
        results = run(*numbers, config=config, precision=precision)
    assert_right(layer, results)
    assert not faults(emulator)
    return emulator


@pytest.mark.sweep(3)
@pytest.mark.parametrize(("cell", "size_h"), PROBLEMS)
def test_every_cell(cell, size_h):
    config = Config("staged", 16, 32, 64, 4, 0, 65535)
    layer = Layer(cell, 2, 3, 20, size_h and 12, dtype=torch.bfloat16)
    check_layer(layer, config, 90, Schedule())
    layer = layer._replace(dtype=torch.float32, directions=2, zones="masks", **EVERYTHING)
    config = Config("staged", 16, 32, 32, 8, 0, 65535)
    check_layer(layer, config, 80, Schedule(1, "starve-warp", "lazy"))


@pytest.mark.parametrize("cell", CELLS_OF_THIS_KIND)
def test_all_steps_in_one_launch(cell):
    """With marks and noise and several groups; and as a user calls it."""
    layer = Layer(cell, 3, 3, 20, directions=2, zones="masks", **EVERYTHING)
    config = Config("resident", 16, 32, 32, 8, 0, 65535)
    emulator = check_layer(layer, config, 80, Schedule(1, "starve-warp", "lazy"))
    assert len(emulator.launches) == 2
    dtype = "float16" if cell == "gru_reset_before" else "bfloat16"
    for case in (
        Case(cell, 33, 3, 2, dtype, directions=2, flow="marked"),
        Case(cell, 16, 17, 2, "float32", "tf32", noise="drop share", gpu="a100"),
    ):
        results, emulator = emulate(case)
        check(case, results)
        assert not faults(emulator)
        assert [launch.grid[1] for launch in emulator.launches] == [1, 1]


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("cell", "run", "dtype", "precision", "hidden", "device"),
    [
        ("layernorm_lstm", "training", "bfloat16", "tf32", 128, "h100"),
        ("layernorm_lstm", "backward", "bfloat16", "tf32", 128, "h100"),
        ("layernorm_lstm", "backward fresh noisy", "bfloat16", "tf32", 63, "h100"),
        ("layernorm_lstm", "training fresh", "float32", "tf32", 64, "a100"),
        ("layernorm_gru", "backward", "bfloat16", "tf32", 128, "b200"),
        ("layernorm_gru", "training fresh noisy", "float32", "tf32x3", 32, "h100"),
        ("gru_reset_before", "training fresh noisy", "bfloat16", "tf32", 128, "h100"),
        ("gru_reset_before", "backward fresh noisy", "float32", "ieee", 32, "rtx5090"),
    ],
)
def test_what_is_planned_in_one_launch_fits(cell, run, dtype, precision, hidden, device):
    """Hardly anything spills, and shared memory is as predicted."""
    variant = problem(cell, f"{run} cell", dtype, precision, hidden, device)
    shape, backward = variant.shape(16), variant.is_backward
    choice = configs.choose(shape, variant.gpu, backward=backward, schedule="resident")
    compiled = compile_variant(variant.of(choice.config))
    _, spilled = resources(compiled.asm["cubin"])
    assert spilled <= 48
    taken = configs.shared_memory(choice.config, shape, backward=backward)
    assert compiled.metadata.shared <= taken <= variant.gpu.shared_memory
