"""Faults that the emulator found in compiled kernels, none of which may be planned any more."""

from __future__ import annotations

import pytest
import triton

from fastrnn.kernels import configs
from fastrnn.kernels.configs import DEVICES, PRECISIONS, Config, Shape

from .layers import Case, emulate, expected, faults

# Triton PR 9610: the fence between cp.async and a warp-group product.
IS_FENCED = tuple(map(int, triton.__version__.split("+")[0].split(".")[:3])) >= (3, 7, 1)
UNFENCED = "shared: generic write read by wgmma without fence.proxy.async"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_warp_group_products_lack_a_fence_before_triton_3_7_1(dtype):
    """cp.async writes are not ordered before wgmma reads, which use another proxy.

    This does not affect float32, which passes through registers for rounding.
    """
    config = Config("stepwise", 64, 32, 64, 4, 0, 65535)
    _, emulator = emulate(Case("lstm", 96, 50, 2, dtype, configs=(config, config)))
    assert "wgmma" in emulator.launches[0].ptx
    lacks = [text for text in faults(emulator) if UNFENCED in text]
    assert bool(lacks) != IS_FENCED


@pytest.mark.parametrize("backward", [False, True])
def test_no_warp_group_product_is_planned(backward):
    for itemsize, precision in [(2, "tf32"), *((4, precision) for precision in PRECISIONS)]:
        for hidden in (64, 96, 256, 1024, 2048):
            for batch in (1, 16, 64, 512):
                shape = Shape(4, batch, hidden, 1, itemsize, precision)
                for name in ("h100", "h200"):
                    found = configs.candidates(shape, DEVICES[name], backward=backward)
                    assert all(config.block_b <= 32 for config in found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_steps_of_many_rows_use_products_of_one_warp(dtype):
    _, emulator = emulate(Case("lstm", 96, 70, 2, dtype, schedule="stepwise"))
    for launch in emulator.launches:
        assert "wgmma" not in launch.ptx
        assert "mma.sync" in launch.ptx


@pytest.mark.parametrize("schedule", ["resident", "persistent", "stepwise"])
def test_tf32_operands_are_rounded(schedule):
    """Truncation would double the error and bias every product towards zero."""
    hidden = 32 if schedule == "resident" else 136
    case = Case("rnn_identity", hidden, 16, 2, "float32", schedule=schedule, bias=False)
    results, _ = emulate(case)
    _, exact = expected(case)
    for name in ("y", "d_h_0"):
        error = (results[name].double() - exact[name]).flatten()
        towards_zero = -error * exact[name].sign().flatten()
        # As for that many numbers with independent signs; with truncation it is 8 or more.
        assert towards_zero.mean().abs() <= 4 * error.std() / error.numel() ** 0.5
        # An operand is off by at most half a unit of 2**-10, uniformly, which has a root mean
        # square of 0.4 * 2**-11 relative to it; two are multiplied, in each of two steps.
        rms = exact[name].square().mean().sqrt()
        assert error.square().mean().sqrt() <= 1.2 * 0.4 * 2**-11 * 4**0.5 * rms
