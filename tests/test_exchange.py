"""How programs wait for each other: many schedules, and what happens when they do not wait."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from cooperative import Deadlock, cooperative
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import (
    MODES,
    Layer,
    assert_right,
    by_kernels,
    by_reference,
    check,
    draw,
    same_bits,
    tiled,
    whole,
)
from triton.runtime.errors import InterpreterError

from fastrnn.cells import CELLS
from fastrnn.kernels import exchange, launch

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="runs in Triton's interpreter"
)

POINTWISE = {name: cell for name, cell in CELLS.items() if cell.is_pointwise}
GRU, TANH, IDENTITY = (CELLS[name] for name in ("gru", "rnn_tanh", "rnn_identity"))
PROTOCOLS = ("flag", "counter")
SEEDS = range(20)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_same(results, others, what=""):
    assert results.keys() == others.keys()
    for name, tensor in results.items():
        assert same_bits(tensor, others[name]), f"{name} {what}"


# The interleaving itself.


@triton.jit
def message_kernel(data_ptr, flag_ptr, seen_ptr, sem: tl.constexpr):
    at = tl.arange(0, 8)
    if tl.program_id(0) == 0:
        tl.store(data_ptr + at, at + 1)
        tl.atomic_add(flag_ptr, 1, sem=sem)
    else:
        while tl.atomic_add(flag_ptr, 0, sem="acquire") == 0:
            tl.debug_barrier()
        tl.store(seen_ptr + at, tl.load(data_ptr + at))


@pytest.mark.parametrize("sem", ["release", "relaxed"])
def test_stores_arrive_late_and_in_parts_unless_released(sem):
    arrived = set()
    for seed in SEEDS:
        data, flag, seen = (torch.zeros(n, dtype=torch.int32) for n in (8, 1, 8))
        with cooperative(seed):
            message_kernel[(2,)](data, flag, seen, sem)
        assert data.tolist() == [*range(1, 9)]
        arrived.add(int((seen == data).sum()))
    if sem == "release":
        assert arrived == {8}
    else:
        assert len(arrived) > 3


@triton.jit
def access_kernel(x_ptr, first, is_store: tl.constexpr):
    ptrs = x_ptr + first + tl.arange(0, 4)
    if is_store:
        tl.store(ptrs, 1.0)
    else:
        tl.load(ptrs)


@pytest.mark.parametrize("is_store", [False, True])
def test_access_outside_of_the_arguments(is_store):
    x = torch.zeros(8)
    with cooperative(0):
        for first in (0, 4):
            access_kernel[(1,)](x, first, is_store)
        for first in (-1, 5, 1 << 40):
            with pytest.raises(InterpreterError, match="outside of its arguments"):
                access_kernel[(1,)](x, first, is_store)


# Every schedule gives the same.


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("cell", POINTWISE)
def test_schedules_of_two_programs(cell, protocol):
    layer = Layer(CELLS[cell], steps=5)
    numbers, config = draw(layer), tiled(protocol, layer.hidden)
    first = check(layer, config)
    # The exchange knows nothing of a cell: fewer of those that take the interpreter long.
    for seed in SEEDS[1 : None if layer.cell.n_states + layer.cell.n_extra <= 2 else 4]:
        assert_same(by_kernels(layer, numbers, config, seed=seed), first, f"seed {seed}")


@pytest.mark.parametrize(("cell", "protocol"), [("gru", "flag"), ("lstm", "counter")])
def test_schedules_of_several_groups(cell, protocol):
    layer = Layer(CELLS[cell], steps=5, hidden=9, directions=2)
    numbers, config = draw(layer), tiled(protocol, layer.hidden, 3)
    first = check(layer, config)
    assert_same(by_kernels(layer, numbers, config, seed=1), first)


@settings(max_examples=10)
@given(
    layer=st.builds(
        Layer,
        cell=st.sampled_from([*POINTWISE.values()]),
        steps=st.integers(1, 5),
        batch=st.integers(1, 5),
        hidden=st.integers(2, 20),
        directions=st.sampled_from([1, 2]),
        bias=st.booleans(),
        state=st.booleans(),
        dy=st.booleans(),
    ),
    protocol=st.sampled_from(PROTOCOLS),
    slices=st.integers(2, 4),
    block_b=st.sampled_from([2, 4, 8]),
    block_k=st.sampled_from([0, 4, 8]),
    save=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_layer_on_any_schedule(layer, protocol, slices, block_b, block_k, save, seed):
    config = tiled(protocol, layer.hidden, slices, block_b=block_b, block_k=block_k)
    check(layer, config, seed=seed, save=save)


# Exchanges that are broken in one place give wrong numbers under some schedule.


@triton.jit
def receive_at_once(
    row_ptrs, row_mask, counter_ptr, arrivals, step, error_ptr,
    hidden: tl.constexpr, block_k: tl.constexpr, protocol: tl.constexpr, limit: tl.constexpr,
):  # fmt: skip
    return exchange.load_state(row_ptrs, row_mask, hidden, block_k, True)


@triton.jit
def only_first_incomplete(h):
    return exchange._any(exchange._bits(h[0]) == exchange.MISSING)


@triton.jit
def all_incomplete(h):
    """Whether there is a block of which nothing has come yet."""
    missing = False
    for n in tl.static_range(len(h)):
        here = (exchange._bits(h[n]) != exchange.MISSING).to(tl.int32)
        missing = missing | (tl.max(tl.ravel(here), 0) == 0)
    return missing


@triton.jit
def publish_after_arrival(
    row_ptrs, row_mask, unit0, h, counter_ptr, hidden: tl.constexpr, protocol: tl.constexpr
):
    exchange._arrive(counter_ptr)
    unit = unit0 + tl.arange(0, h.shape[1])
    mask = row_mask[:, None] & (unit < hidden)[None, :]
    tl.store(row_ptrs[:, None] + unit[None, :], h, mask=mask)


@triton.jit
def arrive_relaxed(counter_ptr):
    tl.atomic_add(counter_ptr, 1, sem="relaxed", scope="gpu")


@triton.jit
def await_nothing(counter_ptr, target, step, error_ptr, limit: tl.constexpr):
    tl.debug_barrier()


await_all = exchange._await


@triton.jit
def await_all_but_one(counter_ptr, target, step, error_ptr, limit: tl.constexpr):
    await_all(counter_ptr, target - 1, step, error_ptr, limit)


@triton.jit
def never(condition):
    return False


@triton.jit
def one_lap(step):
    return step * 0 + 1


@triton.jit
def laps_from_zero(step):
    return step >> 1 & 1


@triton.jit
def lap_of_every_step(step):
    return 1 - (step & 1)


@pytest.mark.parametrize(
    ("kernel", "protocol", "name", "broken"),
    [
        pytest.param(*row, id=f"{row[0]}-{row[1]}-{row[3].__name__}")
        for row in [
            ("forward", "flag", "persistent.receive_state", receive_at_once),
            ("forward", "flag", "exchange._incomplete", only_first_incomplete),
            ("forward", "flag", "exchange._incomplete", all_incomplete),
            ("forward", "counter", "persistent.receive_state", receive_at_once),
            ("forward", "counter", "persistent.publish_state", publish_after_arrival),
            ("forward", "counter", "exchange._arrive", arrive_relaxed),
            ("forward", "counter", "exchange._await", await_nothing),
            ("forward", "counter", "exchange._await", await_all_but_one),
            ("backward", "flag", "exchange._any", never),
            ("backward", "flag", "exchange._lap", one_lap),
            ("backward", "flag", "exchange._lap", laps_from_zero),
            ("backward", "flag", "exchange._lap", lap_of_every_step),
            ("backward", "counter", "exchange._arrive", arrive_relaxed),
            ("backward", "counter", "exchange._await", await_nothing),
            ("backward", "counter", "exchange._await", await_all_but_one),
        ]
    ],
)
def test_broken_exchange_is_wrong(monkeypatch, kernel, protocol, name, broken):
    layer = Layer(TANH, steps=5, batch=4, hidden=8)
    configs = [tiled("stepwise", 8), tiled("stepwise", 8)]
    configs[kernel == "backward"] = tiled(protocol, 8, block_k=4)
    monkeypatch.setattr("cooperative.MAX_SWITCHES", 1000)
    monkeypatch.setattr(f"fastrnn.kernels.{name}", broken)
    assert any(is_wrong(layer, *configs, seed=seed) for seed in SEEDS)


def is_wrong(layer, *configs, seed):
    try:
        results = by_kernels(layer, draw(layer), *configs, seed=seed)
    except Deadlock:
        return True
    try:
        assert_right(layer, results)
    except AssertionError:
        return True
    return False


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
def silent(request, monkeypatch):
    """A layer and configurations with an exchange in which programs wait in vain."""
    kernel, protocol, name, broken = request.param
    monkeypatch.setattr(f"fastrnn.kernels.{name}", broken)
    layer = Layer(TANH, steps=1)
    configs = [tiled("stepwise", 7), tiled("stepwise", 7)]
    configs[kernel == "backward"] = tiled(protocol, 7)
    return layer, draw(layer), *configs


def test_deadlock_is_reported(monkeypatch, silent):
    monkeypatch.setattr("cooperative.MAX_SWITCHES", 100)
    with pytest.raises(Deadlock, match="wait in vain"):
        by_kernels(*silent)


def test_bounded_spin_ends_the_wait(silent):
    message = r"waited in vain at step 0: 9 polls, Config\(.*, grid \(2, 1, 1\)"
    with launch.bounded_spin(9), pytest.raises(RuntimeError, match=message):
        by_kernels(*silent)


@triton.jit
def await_too_many_once(counter_ptr, target, step, error_ptr, limit: tl.constexpr):
    await_all(counter_ptr, target + tl.where(step == 2, 100, 0), step, error_ptr, limit)


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_bounded_spin_names_the_step(monkeypatch, kernel):
    monkeypatch.setattr("fastrnn.kernels.exchange._await", await_too_many_once)
    layer = Layer(IDENTITY, steps=4)
    configs = [tiled("stepwise", 7), tiled("stepwise", 7)]
    configs[kernel == "backward"] = tiled("counter", 7)
    # So many that the other steps do not give up.
    with launch.bounded_spin(200), pytest.raises(RuntimeError, match="at step 2: 200 polls"):
        by_kernels(layer, draw(layer), *configs)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_bounded_spin_changes_nothing(protocol):
    layer = Layer(GRU)
    numbers, config = draw(layer), tiled(protocol, 7)
    unbounded = by_kernels(layer, numbers, config)
    with launch.bounded_spin(10_000):
        assert_same(by_kernels(layer, numbers, config), unbounded)


def test_bounded_spin_refuses_no_polls():
    with pytest.raises(ValueError, match="at least 1, got 0"), launch.bounded_spin(0):
        pass


# NaN and infinity go through the exchange as any other number.


def fill(tensor, bits):
    """Overwrite a view with a bit pattern."""
    integer = {2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]
    tensor.view(integer).fill_(bits)


NANS = {"quiet": 0x7FC00000, "ones": -1}


@pytest.mark.parametrize(
    ("cell", "mode", "dtype", "bits"),
    [
        *(("gru", mode, torch.float32, "quiet") for mode in MODES),
        *(("rnn_identity", mode, torch.float32, "ones") for mode in MODES),
        ("lstm", "flag", torch.float32, "ones"),
        ("rnn_identity", "flag", torch.float16, "ones"),
        ("rnn_identity", "flag", torch.bfloat16, "ones"),
    ],
    ids=str,
)
def test_nan(cell, mode, dtype, bits):
    """NaN in wx of row 1, h_0 of row 2 and dy of row 3 stays in these rows."""
    layer = Layer(CELLS[cell], batch=4, dtype=dtype)
    clean, config = draw(layer), tiled(mode, layer.hidden)
    dirty = clean._replace(
        x=clean.x.clone(),
        wx=clean.wx.clone(),
        initial=[part.clone() for part in clean.initial],
        dy=clean.dy.clone(),
    )
    fill(dirty.x[1, 1], NANS[bits])
    fill(dirty.wx[:, 1, 1], NANS[bits])
    fill(dirty.initial[0][:, 2], NANS[bits])
    fill(dirty.dy[1, 3], NANS[bits])
    right = by_kernels(layer, clean, config)
    results = by_kernels(layer, dirty, config)
    for name, tensor in results.items():
        assert same_bits(tensor[..., 0, :], right[name][..., 0, :]), name
    expected = by_reference(layer, dirty, torch.float64)
    for name, tensor in whole(layer, dirty, results).items():
        assert tensor.isnan().equal(expected[name].isnan()), name


@triton.jit
def publish_as_it_is(
    row_ptrs, row_mask, unit0, h, counter_ptr, hidden: tl.constexpr, protocol: tl.constexpr
):
    unit = unit0 + tl.arange(0, h.shape[1])
    mask = row_mask[:, None] & (unit < hidden)[None, :]
    tl.store(row_ptrs[:, None] + unit[None, :], h, mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nan_that_says_missing_would_hang(monkeypatch, dtype):
    """The test above would find an exchange that does not store it as another one."""
    monkeypatch.setattr("cooperative.MAX_SWITCHES", 500)
    monkeypatch.setattr("fastrnn.kernels.persistent.publish_state", publish_as_it_is)
    layer = Layer(IDENTITY, dtype=dtype)
    numbers, config = draw(layer), tiled("flag", layer.hidden)
    by_kernels(layer, numbers, config)
    numbers = numbers._replace(wx=numbers.wx.clone())
    fill(numbers.wx[:, 1, 1], NANS["ones"])
    with pytest.raises(Deadlock):
        by_kernels(layer, numbers, config)


@pytest.mark.parametrize("mode", MODES)
def test_infinity(mode):
    """The tag of a mailbox makes a NaN of infinity, until it is taken off."""
    layer = Layer(IDENTITY, steps=2, batch=3, hidden=8)
    numbers = draw(layer)
    numbers = numbers._replace(dy=numbers.dy.clone())
    numbers.dy[1, 0, 2] = np.inf
    numbers.dy[1, 1, 5] = -np.inf
    d_gates = by_kernels(layer, numbers, tiled(mode, layer.hidden))["d_gates"][0]
    last = numbers.dy[1] + numbers.d_final[0][0]
    first = numbers.dy[0] + last @ numbers.weights[0].w_hh
    assert first[:2].isinf().all()
    torch.testing.assert_close(d_gates, torch.stack([first, last]))


@triton.jit
def tag_kernel(x_ptr, bits_ptr, lap, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(bits_ptr + at, exchange._tagged(tl.load(x_ptr + at), lap))


@pytest.mark.parametrize("lap", [0, 1])
def test_tag_takes_the_lowest_bit(lap):
    """What is left is rounded to the nearest, half to even, as arithmetic would."""
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -3e-45, 1.0, np.finfo(np.float32).max]
    generator = np.random.default_rng(0)
    x = generator.integers(-(2**31), 2**31, 4096).astype(np.int32).view(np.float32)
    x[: len(special)] = special
    x[100] = np.array(NANS["ones"], np.int32).view(np.float32)
    bits = torch.zeros(len(x), dtype=torch.int32)
    with cooperative(0):
        tag_kernel[(1,)](torch.from_numpy(x), bits, lap, len(x))
    bits = bits.numpy()
    assert (bits & 1 == lap).all()
    received = (bits & -2).view(np.float32)
    assert (np.isnan(received) == np.isnan(x)).all()
    finite = np.isfinite(x)
    exact = x[finite].astype(np.float64)
    unit = 2.0 ** (np.maximum(np.frexp(exact)[1], -125) - 23)
    with np.errstate(over="ignore"):  # the largest float becomes infinity
        rounded = (np.rint(exact / unit) * unit).astype(np.float32)
    assert (received[finite] == rounded).all()
    assert (received[np.isinf(x)] == x[np.isinf(x)]).all()
