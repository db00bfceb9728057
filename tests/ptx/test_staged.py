"""Steps in several launches on the kernels as they are compiled: right, and free of races."""

from __future__ import annotations

import pytest
import torch
from staged_harness import PROBLEMS, Layer, assert_right, draw, run

from fastrnn.kernels.configs import Config

from .driver import Emulator, Schedule
from .layers import faults

EVERYTHING = {"lengths": True, "resets": True, "bptt": 2, "fresh": True, "drop": True}


def check(layer: Layer, config: Config, capability: int, schedule: Schedule) -> None:
    numbers = draw(layer)
    emulator = Emulator(capability, schedule)
    with emulator, emulator.watching():
        results = run(*numbers, config=config)
    assert_right(layer, results)
    assert not faults(emulator)


@pytest.mark.parametrize(("cell", "size_h"), PROBLEMS)
def test_every_cell(cell, size_h):
    config = Config("staged", 16, 32, 64, 4, 0, 65535)
    layer = Layer(cell, 2, 3, 20, size_h and 12, dtype=torch.bfloat16)
    check(layer, config, 90, Schedule())
    layer = layer._replace(dtype=torch.float32, directions=2, zones="masks", **EVERYTHING)
    config = Config("staged", 16, 32, 32, 8, 0, 65535)
    check(layer, config, 80, Schedule(1, "starve-warp", "lazy"))
