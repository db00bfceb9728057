"""The Triton kernels in the interpreter: every cell, schedule and size against the oracle.

The persistent ones, in Gluon, are tested in tests/ptx.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_harness import (
    MODES,
    Layer,
    as_on_a_device,
    by_kernels,
    check,
    check_nan,
    draw,
    operands_of,
    same_bits,
    tiled,
)
from minimal_gated_unit import MGU

from fastrnn.cells import CELLS
from fastrnn.kernels import activations, configs, launch, tiles

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="runs in Triton's interpreter"
)

POINTWISE = [cell for cell in CELLS.values() if cell.is_pointwise]
LSTM, GRU, TANH, RELU, IDENTITY, PEEPHOLE, SLSTM = POINTWISE


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def named(name):
    """Test ids of cells, dtypes and strings."""
    return getattr(name, "name", None) or str(name).removeprefix("torch.")


@pytest.mark.sweep(3)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", POINTWISE, ids=named)
def test_every_cell(cell, mode, directions):
    layer = Layer(cell, directions=directions)
    check(layer, tiled(mode, layer.hidden))


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("layer", "config"),
    [
        pytest.param(layer, config, id=f"{config.schedule}-{number}")
        for number, (layer, config) in enumerate(
            [
                (Layer(LSTM, 1, 1, 1), tiled("resident", 1)),
                (Layer(GRU, 5, 1, 1), tiled("stepwise", 1)),
                (Layer(TANH, 2, 1, 1, 2), tiled("resident", 1)),
                (Layer(GRU, 1, 7, 17), tiled("stepwise", 17)),
                # Several tiles of the batch, the last of one row.
                (Layer(RELU, 2, 17, 5), tiled("resident", 5, block_b=8)),
                (Layer(LSTM, 2, 5, 9), tiled("stepwise", 9, 3, block_k=4)),
                (Layer(TANH, 2, 33, 17, 2), tiled("stepwise", 17, 3, block_b=32, block_k=8)),
                # Blocks of columns that end before, at and after the end of a slice.
                (Layer(IDENTITY, 9, 3, 9), tiled("stepwise", 9, 3)),
                (Layer(GRU, 5, 3, 17, 2), tiled("stepwise", 17, 3, block_k=4)),
                (Layer(LSTM, 3, 1, 33), tiled("stepwise", 33, 3, block_k=16)),
                (Layer(LSTM, 2, 7, 129), tiled("resident", 129, block_b=8)),
                (Layer(GRU, 2, 7, 129), tiled("stepwise", 129, 3, block_b=8, block_k=64)),
                # Several launches.
                (Layer(LSTM, 2, 9, 7), tiled("resident", 7, tiles=1)),
                (Layer(TANH, 2, 9, 7, 2), tiled("resident", 7, tiles=2)),
            ]
        )
    ],
)
def test_sizes(layer, config):
    check(layer, config)


@pytest.mark.parametrize(("forward", "backward"), [MODES, MODES[::-1]])
def test_backward_by_another_schedule(forward, backward):
    layer = Layer(LSTM, hidden=9)
    check(layer, tiled(forward, 9), tiled(backward, 9, 3, block_b=2))


# No bfloat16: the interpreter multiplies its bits as integers. Compiled: tests/ptx.
@pytest.mark.parametrize(
    ("cell", "mode"),
    [
        *((cell, mode) for cell in (LSTM, GRU) for mode in MODES),
        *((cell, "resident") for cell in (RELU, PEEPHOLE, SLSTM)),
    ],
    ids=named,
)
def test_half_precision(cell, mode):
    layer = Layer(cell, steps=4, dtype=torch.float16)
    check(layer, tiled(mode, layer.hidden))


@pytest.mark.parametrize("missing", ["bias", "state", "dy"])
@pytest.mark.parametrize(
    ("cell", "mode"), [*((TANH, mode) for mode in MODES), (SLSTM, "stepwise")], ids=named
)
def test_without(cell, mode, missing):
    """No bias, a zero state, no gradient of the output."""
    layer = Layer(cell, **{missing: False})
    check(layer, tiled(mode, layer.hidden))


@pytest.mark.parametrize(
    ("cell", "mode"),
    [
        *((cell, mode) for cell in (GRU, LSTM, PEEPHOLE, SLSTM) for mode in MODES),
        (TANH, "resident"),
    ],
    ids=named,
)
def test_activations_computed_again(cell, mode):
    layer = Layer(cell, directions=2 if mode == "resident" else 1)
    check(layer, tiled(mode, layer.hidden), save=False)


@pytest.mark.parametrize("mode", MODES)
def test_forward_for_inference(mode):
    """Only what is requested is returned, bitwise equal to training."""
    layer = Layer(LSTM, dtype=torch.float16)
    numbers, config = draw(layer), tiled(mode, layer.hidden)
    trained = by_kernels(layer, numbers, config)
    with as_on_a_device():
        y, traces, saved, final = launch.forward(
            LSTM, config, "ieee", numbers.wx, operands_of(numbers)
        )
    assert traces == []
    assert saved is None
    for mine, name in zip((y, *final), ("y", "h_n", "c_n"), strict=True):
        assert same_bits(mine, trained[name])


@pytest.mark.parametrize("mode", MODES)
def test_backward_twice_is_the_same(mode):
    layer = Layer(GRU, directions=2)
    numbers, config = draw(layer), tiled(mode, layer.hidden)
    operands = operands_of(numbers)
    with as_on_a_device():
        y, traces, saved, _ = launch.forward(
            GRU, config, "ieee", numbers.wx, operands, traced=True, save=True
        )
        given = operands, launch.Past(y, traces, (saved,)), (numbers.dy, numbers.d_final, ())
        first, again = (launch.backward(GRU, config, "ieee", *given) for _ in range(2))
    assert same_bits(first[0], again[0])
    assert same_bits(first[1][0], again[1][0])


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_new_cell(mode, directions):
    layer = Layer(MGU, directions=directions, batch=5 if directions == 1 else 3)
    check(layer, tiled(mode, layer.hidden), save=directions == 1)


def test_new_cell_in_half_precision():
    layer = Layer(MGU, dtype=torch.float16)
    check(layer, tiled("resident", layer.hidden))


@pytest.mark.parametrize("cell", [GRU, IDENTITY], ids=named)
@pytest.mark.parametrize("mode", MODES)
def test_nan(mode, cell):
    layer = Layer(cell, batch=4)
    check_nan(layer, 0x7FC00000, tiled(mode, layer.hidden))


@triton.jit
def activation_kernel(x_ptr, y_ptr, activation: tl.constexpr, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(y_ptr + at, activation(tl.load(x_ptr + at)))


@triton.jit
def maximum_kernel(x_ptr, y_ptr, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(y_ptr + at, activations.maximum(tl.load(x_ptr + at), tl.load(y_ptr + at)))


@triton.jit
def operand_kernel(x_ptr, y_ptr, precision: tl.constexpr, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(y_ptr + at, tiles.as_operand(tl.load(x_ptr + at), precision))


def activated(activation, x):
    y = np.empty_like(x)
    with as_on_a_device():
        activation_kernel[(1,)](torch.from_numpy(x), out := torch.from_numpy(y), activation, len(x))
    return out.numpy()


def ulps(y, exact):
    """Error in units in the last place of float32; 0 is correct for a subnormal number."""
    tiny = np.finfo(np.float32).tiny
    unit = np.spacing(np.maximum(np.abs(exact), tiny).astype(np.float32))
    return np.where((y == 0) & (np.abs(exact) < tiny), 0, np.abs(y - exact) / unit)


MAGNITUDES = np.concatenate(
    [
        np.geomspace(1e-45, 1e4, 4090),
        np.array([0.25, np.nextafter(np.float32(0.25), np.float32(0)), 9, 17, 88.5, 0]),
    ]
).astype(np.float32)


def test_tanh():
    x = np.concatenate([MAGNITUDES, -MAGNITUDES])
    y = activated(activations.tanh, x)
    assert ulps(y, np.tanh(x.astype(np.float64))).max() <= 4
    assert (np.sign(y) == np.sign(x)).all()
    assert (np.abs(y) <= 1).all()
    assert (np.abs(y)[np.abs(x) > 9.5] == 1).all()


def test_sigmoid():
    x = np.concatenate([MAGNITUDES, -MAGNITUDES])
    y = activated(activations.sigmoid, x)
    with np.errstate(over="ignore"):
        exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    assert ulps(y, exact).max() <= 4
    assert ((y >= 0) & (y <= 1)).all()
    assert (y[x > 18] == 1).all()
    assert (y[x < -104] == 0).all()


def test_log_sigmoid():
    x = np.concatenate([MAGNITUDES, -MAGNITUDES])
    y = activated(activations.log_sigmoid, x)
    exact = -np.logaddexp(0, -x.astype(np.float64))
    assert ulps(y, exact).max() <= 4
    assert (y <= 0).all()
    y = activated(activations.log_sigmoid, np.array([np.inf, -np.inf, np.nan, 1], np.float32))
    assert y[:2].tolist() == [0, -np.inf]
    assert np.isnan(y[2])


def test_maximum():
    pairs = [(1, 2), (2, 1), (-np.inf, -1), (np.nan, 1), (1, np.nan), (-1, -2), (0, np.inf), (3, 3)]
    x, y = torch.tensor(pairs).T.contiguous()
    expected = torch.maximum(x, y)
    with as_on_a_device():
        maximum_kernel[(1,)](x, y, len(x))
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("activation", "least"), [(activations.tanh, -1), (activations.sigmoid, 0)]
)
def test_activations_of_what_is_not_finite(activation, least):
    y = activated(activation, np.array([np.inf, -np.inf, np.nan, -np.nan], np.float32))
    assert y[:2].tolist() == [1, least]
    assert np.isnan(y[2:]).all()


def test_operands_of_tf32_are_rounded():
    """To nearest, ties away from zero; not truncated."""
    generator = np.random.default_rng(0)
    x = generator.integers(-(2**31), 2**31, 4096).astype(np.int32).view(np.float32)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1 + 2**-11, -1 - 2**-11, 1 + 2**-11 - 2**-23]
    x[: len(special)] = special
    x[100:103] = np.array([-1, 0x7FFFFFFF, 0x7F800001], np.int32).view(np.float32)
    y = {name: torch.empty(len(x)) for name in configs.PRECISIONS}
    with as_on_a_device():
        for precision, out in y.items():
            operand_kernel[(1,)](torch.from_numpy(x), out, precision, len(x))
    assert same_bits(y["ieee"], torch.from_numpy(x))
    assert same_bits(y["tf32x3"], torch.from_numpy(x))
    found = y["tf32"].numpy()
    assert not (found[~np.isnan(found)].view(np.int32) & 0x1FFF).any()
    assert (np.isnan(found) == np.isnan(x)).all()
    # A NaN stays NaN without the bits that tensor cores ignore.
    left = (found.view(np.int32) & ~0x1FFF).view(np.float32)
    assert (np.isnan(left) == np.isnan(x)).all()
    finite = np.isfinite(x)
    exact = x[finite].astype(np.float64)
    unit = 2.0 ** (np.maximum(np.frexp(exact)[1], -125) - 11)
    with np.errstate(over="ignore"):  # the largest become infinity
        rounded = np.trunc(exact / unit + np.copysign(0.5, exact)) * unit
        assert (found[finite] == rounded.astype(np.float32)).all()
