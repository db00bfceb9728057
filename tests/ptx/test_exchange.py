"""How programs wait for each other: when what they wait for never comes, is NaN, or has no end."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
import triton
import triton.language as tl
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

import fastrnn
from fastrnn import devices
from fastrnn.bench import empty_gpu
from fastrnn.cells import CELLS
from fastrnn.flow import make_marks
from fastrnn.kernels import exchange, launch, persistent
from fastrnn.kernels.configs import DEVICES, Config, block_s
from fastrnn.planner import use_path

from .driver import EmulationError, Emulator
from .layers import faults

LSTM, GRU, TANH, IDENTITY = (CELLS[name] for name in ("lstm", "gru", "rnn_tanh", "rnn_identity"))
PROTOCOLS = ("flag", "counter")
HIDDEN = 20  # two programs
MISSING = exchange.MISSING.value
STEPWISE = Config("stepwise", "local", 16, 16, 32, 4, 99)


def exchanged(protocol):
    return STEPWISE._replace(schedule="persistent", protocol=protocol)


@pytest.fixture(autouse=True)
def emulator():
    with Emulator() as emulator, emulator.watching():
        yield emulator


@pytest.fixture
def replace(monkeypatch):
    """Replace a function of the kernels, which are then compiled again."""

    def replace(name, function):
        monkeypatch.setattr(f"fastrnn.kernels.{name}", function)
        for part in (*vars(exchange).values(), *vars(persistent).values()):
            if isinstance(part, triton.JITFunction):
                monkeypatch.setattr(part, "hash", None)
                monkeypatch.setattr(part, "device_caches", defaultdict(part.create_binder))

    return replace


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_new_cell(emulator, protocol):
    """One that no file of the package knows."""
    check(Layer(MGU, hidden=HIDDEN, dtype=torch.bfloat16), exchanged(protocol))
    assert faults(emulator) == []


# Nothing hangs.


@triton.jit
def publish_nothing(
    row_ptrs, row_mask, unit0, h, counter_ptr, hidden: tl.constexpr, protocol: tl.constexpr
):
    tl.debug_barrier()


@triton.jit
def send_nothing(
    mail_ptr, partial, first, producer, step,
    slices: tl.constexpr, block_b: tl.constexpr, block_h: tl.constexpr, protocol: tl.constexpr,
):  # fmt: skip
    tl.debug_barrier()


@triton.jit
def arrive_never(counter_ptr):
    tl.debug_barrier()


SILENT = [
    ("forward", "flag", "persistent.publish_state", publish_nothing),
    ("forward", "counter", "exchange._arrive", arrive_never),
    ("backward", "flag", "persistent.send_partial", send_nothing),
    ("backward", "counter", "exchange._arrive", arrive_never),
]


@pytest.fixture(params=SILENT, ids=lambda row: f"{row[0]}-{row[1]}")
def silent(request, replace):
    """A layer and configurations with an exchange in which programs wait in vain."""
    kernel, protocol, name, broken = request.param
    replace(name, broken)
    layer = Layer(TANH, steps=1, hidden=HIDDEN)
    configs = [STEPWISE, STEPWISE]
    configs[kernel == "backward"] = exchanged(protocol)
    return layer, draw(layer), *configs


def test_a_wait_in_vain_is_reported(silent):
    with pytest.raises(EmulationError, match=r"(?i)kernel: hang\n(.|\n)*exchange\.py(.|\n)*warp 0"):
        by_kernels(*silent)


def test_bounded_spin_ends_the_wait(silent):
    message = r"waited in vain at step 0: 9 polls, Config\(.*, grid \(2, 1, 1\)"
    with launch.bounded_spin(9), pytest.raises(RuntimeError, match=message):
        by_kernels(*silent)


await_all = exchange._await


@triton.jit
def await_too_many_once(counter_ptr, target, step, error_ptr, limit: tl.constexpr):
    await_all(counter_ptr, target + tl.where(step == 2, 100, 0), step, error_ptr, limit)


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_bounded_spin_names_the_step(replace, kernel):
    replace("exchange._await", await_too_many_once)
    layer = Layer(IDENTITY, steps=4, hidden=HIDDEN)
    configs = [STEPWISE, STEPWISE]
    configs[kernel == "backward"] = exchanged("counter")
    # So many that the other steps do not give up.
    with launch.bounded_spin(2000), pytest.raises(RuntimeError, match="at step 2: 2000 polls"):
        by_kernels(layer, draw(layer), *configs)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_bounded_spin_changes_nothing(protocol):
    layer = Layer(TANH, hidden=HIDDEN)
    numbers, config = draw(layer), exchanged(protocol)
    unbounded = by_kernels(layer, numbers, config)
    with launch.bounded_spin(100_000):
        bounded = by_kernels(layer, numbers, config)
    for name, tensor in unbounded.items():
        assert same_bits(tensor, bounded[name]), name


def test_bounded_spin_refuses_no_polls():
    with pytest.raises(ValueError, match="at least 1, got 0"), launch.bounded_spin(0):
        pass


# NaN and infinity go through the exchange as any other number.


@pytest.mark.parametrize(
    ("cell", "protocol", "dtype"),
    [
        *((IDENTITY, protocol, torch.float32) for protocol in PROTOCOLS),
        (GRU, "counter", torch.bfloat16),
        (LSTM, "flag", torch.bfloat16),
        (IDENTITY, "flag", torch.float16),
    ],
    ids=lambda value: getattr(value, "name", None) or str(value).removeprefix("torch."),
)
def test_nan(cell, protocol, dtype):
    check_nan(Layer(cell, batch=4, hidden=HIDDEN, dtype=dtype), MISSING, exchanged(protocol))


@triton.jit
def publish_as_it_is(
    row_ptrs, row_mask, unit0, h, counter_ptr, hidden: tl.constexpr, protocol: tl.constexpr
):
    unit = unit0 + tl.arange(0, h.shape[1])
    mask = row_mask[:, None] & (unit < hidden)[None, :]
    tl.store(row_ptrs[:, None] + unit[None, :], h, mask=mask)


def test_nan_that_says_missing(replace):
    """Arithmetic makes another one, but a row holds its h at the steps that it does not have."""
    layer = Layer(IDENTITY, hidden=HIDDEN)
    numbers = convert(draw(layer), torch.float32)
    fill(numbers.initial[0][:, 1], MISSING)
    marks = make_marks(3, 3, 1, numbers.x.device, torch.tensor([3, 0, 3]), None, None)
    operands = operands_of(numbers)._replace(marks=marks)

    def run():
        y, *_ = launch.forward(IDENTITY, exchanged("flag"), "ieee", numbers.wx, operands)
        return y

    assert run().isnan().any(-1).tolist() == [[False, True, False]] * 3
    replace("persistent.publish_state", publish_as_it_is)
    with pytest.raises(EmulationError, match=r"(?i)hang"):
        run()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_infinity(protocol):
    """The tag of a mailbox makes a NaN of infinity, until it is taken off."""
    layer = Layer(IDENTITY, steps=2, hidden=HIDDEN)
    numbers = draw(layer)
    numbers = numbers._replace(dy=numbers.dy.clone())
    numbers.dy[1, 0, 2] = torch.inf
    numbers.dy[1, 1, 15] = -torch.inf
    d_gates = by_kernels(layer, numbers, STEPWISE, exchanged(protocol))["d_gates"][0]
    last = numbers.dy[1] + numbers.d_final[0][0]
    first = numbers.dy[0] + last @ numbers.weights[0].w_hh
    assert first[:2].isinf().all()
    torch.testing.assert_close(d_gates, torch.stack([first, last]))


@pytest.mark.parametrize(("cell", "protocol"), [("lstm", "flag"), ("gru", "counter")])
def test_nan_does_not_pass_a_reset(cell, protocol):
    x = torch.randn(4, 3, 5, dtype=torch.bfloat16, requires_grad=True)
    reset = torch.zeros(4, 3, dtype=torch.bool)
    reset[2:, 0] = True
    with torch.no_grad():
        x[2, 0] = torch.nan
    module = getattr(fastrnn, cell.upper())(5, 24, dtype=x.dtype)
    found = []
    with as_on_a_gpu(DEVICES["h100"]._replace(protocol=protocol)):
        for path in ("persistent", "reference"):
            with use_path(path):
                y, _ = module(x, reset=reset)
                found.append([y, *torch.autograd.grad(y.sum(), [x, *module.parameters()])])
    for ours, expected in zip(*found, strict=True):
        assert ours.isnan().equal(expected.isnan())
    assert found[0][0].isnan().any(-1).nonzero().tolist() == [[2, 0]]


# Mailboxes, and what surrounds the exchange.


@pytest.mark.parametrize(("block_h", "block_k", "hidden"), [(64, 32, 136), (32, 16, 40)])
def test_every_mailbox_is_filled(emulator, block_h, block_k, hidden):
    """Also where the last slice reaches beyond the last block of a product."""
    config = Config("persistent", "flag", 16, block_h, block_k, 4, 9)
    assert -(-hidden // block_k) * block_k < -(-hidden // block_h) * block_h
    layer = Layer(IDENTITY, steps=2, batch=2, hidden=hidden, dtype=torch.bfloat16)
    check(layer, STEPWISE, config)
    assert faults(emulator) == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_mailboxes_are_read_in_more_than_one_go(emulator, protocol):
    config = exchanged(protocol)._replace(block_b=64, num_warps=1)
    assert block_s(config, 3) == 2
    check(Layer(IDENTITY, batch=5, hidden=40, dtype=torch.bfloat16), STEPWISE, config)
    assert faults(emulator) == []


def test_forward_for_inference():
    """What is not asked for is not returned, and the rest is the same in every bit."""
    layer = Layer(LSTM, hidden=HIDDEN, dtype=torch.bfloat16)
    numbers, config = draw(layer), exchanged("flag")
    trained = by_kernels(layer, numbers, config)
    y, traces, saved, final = launch.forward(LSTM, config, "ieee", numbers.wx, operands_of(numbers))
    assert traces == []
    assert saved is None
    for mine, name in zip((y, *final), ("y", "h_n", "c_n"), strict=True):
        assert same_bits(mine, trained[name])


def test_layers_by_the_persistent_schedule(emulator):
    with as_on_a_gpu(precision="tf32x3"):
        check_layers("persistent")
    assert [run.grid[0] > 1 for run in emulator.launches] == [True] * 4


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_empty_batch(cell):
    with as_on_a_gpu(precision="tf32x3"):
        check_empty_batch(cell, "persistent")


def test_gradients_have_the_dtypes_that_compilers_expect():
    with as_on_a_gpu():
        check_dtypes("persistent")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_empty_exchange_of_the_benchmark(monkeypatch, emulator, protocol):
    facts = DEVICES["h100"]._replace(protocol=protocol)
    monkeypatch.setattr(devices, "gpu", lambda index: facts)
    monkeypatch.setattr(empty_gpu, "_HIDDEN", 64)
    states = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: states.append(empty(*a, **k)) or states[-1])
    empty_gpu.loop(torch.device("cpu"), 5)()
    (state,) = states
    assert state.shape == (5, 16, 64)
    # Each step hands on one more than what it got.
    assert torch.equal(state.float(), torch.arange(5.0).view(5, 1, 1).expand(5, 16, 64))
    assert faults(emulator) == []
