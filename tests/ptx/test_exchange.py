"""How programs wait for each other, if the awaited data never arrive, are NaN, or are far apart."""

from __future__ import annotations

import dataclasses
import functools
import mmap

import numpy as np
import pytest
import torch
from gpu_stand_in import as_on_a_gpu, check_dtypes, check_empty_batch, check_layers
from kernel_harness import (
    Layer,
    by_kernels,
    check,
    check_nan,
    convert,
    draw,
    fill,
    operands_of,
    same_bits,
)
from minimal_gated_unit import MGU
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

import fastrnn
from fastrnn import devices
from fastrnn.bench import empty_gpu
from fastrnn.cells import CELLS
from fastrnn.flow import make_marks
from fastrnn.kernels import launch, persistent, words
from fastrnn.kernels.activations import bound
from fastrnn.kernels.configs import DEVICES, Config
from fastrnn.planner import use_path

from .driver import EmulationError, Emulator, Schedule
from .layers import Case, emulate, faults

# Linux's MAP_NORESERVE: no memory is reserved for pages that may never be touched.
NORESERVE = 0x4000
LSTM, GRU, TANH, IDENTITY = (CELLS[name] for name in ("lstm", "gru", "rnn_tanh", "rnn_identity"))
HIDDEN = 20  # two programs
MISSING = words.MISSING.value
STEPWISE = Config("stepwise", 16, 16, 32, 4, 0, 99)
ONE_TILE = Config("persistent", 16, 16, 16, 4, 1, 99)
TWO_TILES = ONE_TILE._replace(block_b=32)
EIGHT_WARPS = ONE_TILE._replace(num_warps=8, in_registers=0)
# 32-bit words, words of two halves, and words whose halves arrive separately.
SIZES = [(torch.float32, HIDDEN), (torch.bfloat16, HIDDEN), (torch.float16, HIDDEN + 1)]
WORDS = pytest.mark.parametrize(("dtype", "hidden"), SIZES, ids=["float32", "pairs", "halves"])


@pytest.fixture(autouse=True)
def emulator():
    with Emulator() as emulator, emulator.watching():
        yield emulator


@pytest.mark.parametrize("config", [ONE_TILE, EIGHT_WARPS], ids=["4", "8"])
def test_new_cell(emulator, config):
    """A cell that is not part of the package."""
    check(Layer(MGU, hidden=HIDDEN, dtype=torch.bfloat16), config)
    assert faults(emulator) == []


# Waits that cannot succeed.


@gluon.jit
def publish_nothing(pointers, tile, mask, hidden: gl.constexpr):
    pass


@pytest.fixture(params=["forward", "backward"])
def silent(request, replace):
    """Return a layer and configurations where one program waits in vain, at the first of two steps.

    Backward also waits at the second, for the gradient of the initial state.
    """
    replace("persistent.publish", publish_nothing)
    layer = Layer(TANH, steps=2, hidden=HIDDEN, dtype=torch.bfloat16)
    configs = [STEPWISE, STEPWISE]
    configs[request.param == "backward"] = ONE_TILE
    return layer, draw(layer), *configs


def test_a_wait_in_vain_is_reported(silent):
    with pytest.raises(EmulationError, match=r"(?i)kernel: hang\n(.|\n)*words\.py(.|\n)*warp 0"):
        by_kernels(*silent)


def test_bounded_spin_ends_the_wait(silent):
    message = r"waited in vain at step [01]: 9 polls, Config\(.*, grid \(2, 1, 1\)"
    with launch.bounded_spin(9), pytest.raises(RuntimeError, match=message):
        by_kernels(*silent)


publish = words.publish


@gluon.jit
def publish_positive(pointers, tile, mask, hidden: gl.constexpr):
    publish(pointers, tile, mask & (tile.to(gl.float32) > 0), hidden)


@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize("schedule", [Schedule(), Schedule(1, "starve-cta", "lazy")], ids=str)
def test_bounded_spin_names_the_step(emulator, replace, missing, schedule):
    """The step whose data never arrive, including the first."""
    emulator.schedule = schedule
    replace("persistent.publish", publish_positive)
    numbers = draw(Layer(IDENTITY, steps=missing + 2, hidden=HIDDEN, dtype=torch.bfloat16))
    operands = operands_of(numbers)
    operands = operands._replace(
        r=operands.r.abs(), b=None, initial=[part.abs() for part in operands.initial]
    )
    wx = torch.ones_like(numbers.wx)
    wx[:, missing, 1, 18:] = -100  # a word
    match = rf"at step {missing}: 2000 polls"
    with launch.bounded_spin(2000), pytest.raises(RuntimeError, match=match):
        launch.forward(IDENTITY, ONE_TILE, "tf32", wx, operands)


@WORDS
def test_bounded_spin_changes_nothing(dtype, hidden):
    layer = Layer(TANH, hidden=hidden, dtype=dtype)
    numbers = draw(layer)
    unbounded = by_kernels(layer, numbers, ONE_TILE)
    with launch.bounded_spin(100_000):
        bounded = by_kernels(layer, numbers, ONE_TILE)
    for name, tensor in unbounded.items():
        assert same_bits(tensor, bounded[name]), name


def test_bounded_spin_refuses_no_polls():
    with pytest.raises(ValueError, match="at least 1, got 0"), launch.bounded_spin(0):
        pass


# NaN and infinity are exchanged like any other number.


@pytest.mark.sweep(3)
@pytest.mark.parametrize("bits", [MISSING, 0x7FFF], ids=["missing", "other"])
@pytest.mark.parametrize(
    ("cell", "dtype", "hidden", "config"),
    [
        (IDENTITY, torch.float32, HIDDEN, ONE_TILE),
        (GRU, torch.bfloat16, HIDDEN, EIGHT_WARPS),
        (LSTM, torch.bfloat16, HIDDEN, TWO_TILES),
        (IDENTITY, torch.float16, HIDDEN + 1, ONE_TILE),
    ],
    ids=lambda value: getattr(value, "name", None) or str(value).removeprefix("torch."),
)
def test_nan(cell, dtype, hidden, config, bits):
    if dtype == torch.float32 and bits > 0:
        bits = 0x7FFFFFFF
    check_nan(Layer(cell, batch=4, hidden=hidden, dtype=dtype), bits, config)


@gluon.jit
def publish_as_it_is(pointers, tile, mask, hidden: gl.constexpr):
    gl.store(pointers, tile, mask=mask)


@WORDS
def test_nan_that_says_missing(replace, dtype, hidden):
    """Arithmetic produces another NaN, but a row keeps its h at the steps that it does not have."""
    layer = Layer(IDENTITY, hidden=hidden, dtype=dtype)
    numbers = convert(draw(layer), dtype)
    fill(numbers.initial[0][:, 1], MISSING)
    marks = make_marks(3, 3, 1, numbers.x.device, torch.tensor([3, 0, 3]), None, None)
    operands = operands_of(numbers)._replace(marks=marks)

    def run():
        y, _, _, final = launch.forward(IDENTITY, ONE_TILE, "tf32", numbers.wx, operands)
        return [*y, final[0][0]]

    for state in run():
        assert state.isnan().any(-1).tolist() == [False, True, False]
    if dtype == torch.float32:  # a cast to 16 bits changes the NaN
        replace("persistent.publish", publish_as_it_is)
        with pytest.raises(EmulationError, match=r"(?i)hang"):
            run()


@WORDS
def test_infinity(dtype, hidden):
    layer = Layer(IDENTITY, steps=2, hidden=hidden, dtype=dtype)
    numbers = draw(layer)
    numbers = numbers._replace(dy=numbers.dy.clone(), wx=numbers.wx.clone())
    numbers.dy[1, 0, 2] = numbers.wx[0, 0, 0, 3] = torch.inf
    numbers.dy[1, 1, 15] = numbers.wx[0, 0, 1, 17] = -torch.inf
    found, expected = (by_kernels(layer, numbers, config) for config in (ONE_TILE, STEPWISE))
    for name in ("y", "d_gates"):
        assert found[name].isinf().any()
        torch.testing.assert_close(found[name], expected[name], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_nan_does_not_pass_a_reset(cell):
    x = torch.randn(4, 3, 5, dtype=torch.bfloat16, requires_grad=True)
    reset = torch.zeros(4, 3, dtype=torch.bool)
    reset[2:, 0] = True
    with torch.no_grad():
        x[2, 0] = torch.nan
    module = getattr(fastrnn, cell.upper())(5, 24, dtype=x.dtype)
    found = []
    with as_on_a_gpu():
        for path in ("persistent", "reference"):
            with use_path(path):
                y, _ = module(x, reset=reset)
                found.append([y, *torch.autograd.grad(y.sum(), [x, *module.parameters()])])
    for ours, expected in zip(*found, strict=True):
        assert ours.isnan().equal(expected.isnan())
    assert found[0][0].isnan().any(-1).nonzero().tolist() == [[2, 0]]


# Contents and location of memory.


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_what_nobody_wrote_is_noticed(monkeypatch, emulator, kernel):
    """Noise not overwritten with MISSING would be taken for words that have arrived."""
    layer = Layer(TANH, hidden=HIDDEN, dtype=torch.bfloat16)
    configs = [STEPWISE, STEPWISE]
    configs[kernel == "backward"] = ONE_TILE
    check(layer, *configs)
    assert faults(emulator) == []
    monkeypatch.setattr(torch.Tensor, "fill_", lambda tensor, value: tensor)
    by_kernels(layer, draw(layer), *configs)
    assert any("uninitialized" in text for text in faults(emulator))


@pytest.fixture
def sparse(emulator):
    """Make large tensors that take memory only where touched, with values in a corner."""
    pages = functools.partial(
        mmap.mmap, -1, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    )

    def make(shape, values=None):
        size = torch.Size(shape).numel() * 2
        tensor = torch.frombuffer(pages(size), dtype=torch.bfloat16).view(shape)
        # The emulator's write map has as many bytes; nothing else is needed.
        written = np.frombuffer(pages(size), np.uint8)
        if values is not None:
            corner = tuple(slice(0, n) for n in values.shape)
            tensor[corner] = values
            written.reshape(*shape, 2)[corner] = 1
        emulator._unwritten[tensor.data_ptr()] = tensor, written
        return tensor

    return make


def test_steps_may_be_far_apart(emulator, sparse):
    """Offsets beyond 2**31 elements, as with 100,000 steps of a large batch, need 64 bits.

    Runs the first tile of a batch so large that steps are that far apart.
    """
    rows, steps = 16, 3
    batch = 2**31 // HIDDEN + 3
    layer = Layer(IDENTITY, steps, rows, HIDDEN, dtype=torch.bfloat16)
    numbers = draw(layer)
    operands = operands_of(numbers)
    missing = torch.full((steps, rows, HIDDEN), MISSING, dtype=torch.int16).view(torch.bfloat16)
    y, d_gates, wx, dy = (
        sparse((steps, batch, HIDDEN), part)
        for part in (missing, missing, numbers.wx[0], numbers.dy)
    )
    h_0, d_h_n, h_n, d_h_0 = (
        sparse((batch, HIDDEN), part)
        for part in (operands.initial[0][0], numbers.d_final[0][0], None, None)
    )
    assert y.stride(0) > 2**31
    common = {
        "r_ptr": operands.r, "extra_ptr": None, "initial_ptrs": (h_0,), "marks_ptr": None,
        "fresh_ptrs": None, "state_ptrs": (y,), "error_ptr": None, "noise_ptrs": (None, None),
        "n_ahead": None, "T": steps, "B": batch, "first_tile": 0, "H": HIDDEN,
        "CELL": bound(IDENTITY), "BLOCK_B": 16, "BLOCK_K": 16, "IN_REGISTERS": 1,
        "PRECISION": "tf32", "SPIN_LIMIT": 0, "num_warps": 4, "maxnreg": 255,
        "launch_cooperative_grid": True,
    }  # fmt: skip
    persistent.forward_kernel[2, 1, 1](
        **common, wx_ptr=wx, b_ptr=operands.b, fresh_rh_ptr=None, saved_ptr=None,
        final_ptrs=(h_n,),
    )  # fmt: skip
    persistent.backward_kernel[2, 1, 1](
        **common, d_out_ptrs=(dy,), d_final_ptrs=(d_h_n,), past_ptrs=(wx, wx),
        d_gates_ptr=d_gates, d_initial_ptrs=(d_h_0,), d_fresh_ptrs=None,
    )  # fmt: skip
    assert faults(emulator) == []
    near = by_kernels(layer, numbers, ONE_TILE)
    for far, name in ((y, "y"), (d_gates, "d_gates"), (h_n, "h_n"), (d_h_0, "d_h_0")):
        part = far[:, :rows] if far.ndim == 3 else far[:rows]
        assert same_bits(part.reshape(near[name].shape), near[name]), name


def test_forward_for_inference():
    """Outputs that are not requested are not returned, and the rest is bitwise identical."""
    layer = Layer(LSTM, hidden=HIDDEN, dtype=torch.bfloat16)
    numbers = draw(layer)
    trained = by_kernels(layer, numbers, ONE_TILE)
    operands = operands_of(numbers)
    y, traces, saved, final = launch.forward(LSTM, ONE_TILE, "ieee", numbers.wx, operands)
    assert traces == []
    assert saved is None
    for mine, name in zip((y, *final), ("y", "h_n", "c_n"), strict=True):
        assert same_bits(mine, trained[name])


def test_layers_by_the_persistent_schedule(emulator):
    with as_on_a_gpu(precision="tf32"):
        check_layers("persistent", atol=2e-3)
    assert [run.grid[0] > 1 for run in emulator.launches] == [True] * 4


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_empty_batch(cell):
    with as_on_a_gpu(precision="tf32"):
        check_empty_batch(cell, "persistent")


def test_gradients_have_the_dtypes_that_compilers_expect():
    with as_on_a_gpu():
        check_dtypes("persistent")


def test_the_empty_exchange_of_the_benchmark(monkeypatch, emulator):
    monkeypatch.setattr(devices, "gpu", lambda index: DEVICES["h100"])
    monkeypatch.setattr(empty_gpu, "_HIDDEN", 64)
    states = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: states.append(empty(*a, **k)) or states[-1])
    empty_gpu.loop(torch.device("cpu"), 5)()
    (state,) = states
    assert state.shape == (5, 16, 64)
    # Each step passes on one more than it received.
    assert torch.equal(state.float(), torch.arange(5.0).view(5, 1, 1).expand(5, 16, 64))
    assert faults(emulator) == []


# The cost of a step.


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("dtype", "hidden", "block_b", "num_warps", "kept"),
    [
        ("bfloat16", 72, 16, 4, 0),
        ("bfloat16", 72, 32, 4, 9),
        ("bfloat16", 72, 16, 8, 9),
        ("bfloat16", 72, 32, 8, 0),
        ("float32", 72, 16, 4, 0),
        ("float32", 72, 32, 8, 9),
        ("float16", 33, 16, 8, 0),
    ],
)
def test_a_step_has_one_barrier_and_no_bank_conflicts(dtype, hidden, block_b, num_warps, kept):
    """For each tile. Anything beyond precedes the steps: it does not grow with their number."""
    config = Config("persistent", block_b, 16, 16, num_warps, kept, 9)
    case = Case("lstm", hidden, block_b, 5, dtype, schedule="persistent", configs=(config, config))
    tiles, counted = block_b // 16, {}
    for steps in (5, 8):
        _, emulator = emulate(dataclasses.replace(case, steps=steps), statistics=True)
        for run in emulator.launches:
            barriers = [i for i, text in enumerate(run.program.text) if "bar.sync" in text]
            executed = int(run.outcome.statistics.first_warp[barriers].sum())
            conflicts = sum(line.count - line.fewest for line in run.conflicts())
            counted[run.kernel, steps] = executed, conflicts
            assert run.wavefronts()
    for backward, kernel in enumerate(("forward_kernel", "backward_kernel")):
        (few, conflicts), (more, more_conflicts) = counted[kernel, 5], counted[kernel, 8]
        assert more - few == 3 * tiles
        # Backward, each chunk of weights is converted to another layout.
        assert few - 5 * tiles <= 3 + backward * case.chunks(config, backward=True)
        assert conflicts == more_conflicts
