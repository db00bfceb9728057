"""The compiled kernels of the CPU: every cell, width and number of threads against float64."""

from __future__ import annotations

import ctypes
import functools
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn import cpu, gradients, reference
from fastrnn.call import Asked, Call, Cotangents, Weights
from fastrnn.cells import CELLS as EVERY_CELL
from fastrnn.cpu import ALL, layers, machine, operators
from fastrnn.cpu.direction import Direction
from fastrnn.cpu.rows import Rows
from fastrnn.flow import PLAIN, Flow, make_marks

pytest.importorskip("llvmlite")
if machine.target() is None:
    pytest.skip("no kernels for this CPU", allow_module_level=True)

import llvmlite.binding as llvm
from llvmlite import ir

from fastrnn.cpu import activations, engine, native, vector
from fastrnn.planner import use_path

ROOT = Path(__file__).resolve().parent.parent
EPS = torch.finfo(torch.float32).eps
SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 65)
CELLS = {name: cell for name, cell in EVERY_CELL.items() if cell.is_pointwise}


def random_state(name: str, *shape: int) -> list[Tensor]:
    """A state as steps leave it: of an sLSTM, n >= 1, or 0 with nothing in c.

    By an empty one whose m is large, derivatives grow as exp(m - i), and so do their errors;
    test_variants.py has those in float64.
    """
    state = [torch.randn(shape) for _ in CELLS[name].states]
    if name == "slstm":
        is_empty = torch.rand(shape) < 0.25
        state[2] = (1.0 + state[2].abs()).masked_fill(is_empty, 0.0)
        state[1] = state[1].masked_fill(is_empty, 0.0)
        state[3] = state[3].masked_fill(is_empty, -5.0)
    return state


def random_flow(name: str, rng: random.Random, steps: int, batch: int, *shape: int) -> Flow:
    """Lengths, resets and truncation, each of them or not."""
    lengths, reset, bptt = (rng.random() < 0.5 for _ in range(3))
    marks = make_marks(
        steps,
        batch,
        shape[0],
        torch.device("cpu"),
        torch.tensor([rng.randint(0, steps) for _ in range(batch)]) if lengths else None,
        torch.rand(steps, batch) < 0.3 if reset else None,
        rng.randint(1, steps) if bptt else None,
    )
    fresh = random_state(name, *shape) if marks is not None and rng.random() < 0.5 else []
    return Flow(marks, fresh)


def draw(name: str, seed: int) -> tuple[Call, Cotangents]:
    """Draw a call of a layer and gradients of its results."""
    rng, cell = random.Random(f"{name}{seed}"), CELLS[name]
    torch.manual_seed(seed)
    inputs, hidden, batch = rng.choice(SIZES), rng.choice(SIZES), rng.choice((1, 2, 3, 5, 7, 13))
    bidirectional, biased, packed, flows = (rng.random() < 0.5 for _ in range(4))
    given = packed or rng.random() < 0.5
    directions = 2 if bidirectional else 1
    lengths = sorted((rng.randint(1, 6) for _ in range(batch)), reverse=True)
    sizes = torch.tensor([sum(n > t for n in lengths) for t in range(lengths[0])])
    rows = (int(sizes.sum()),) if packed else (lengths[0], batch)
    width, of_state = cell.n_gates * hidden, (directions, batch, hidden)
    shapes = [(width, inputs), (width, hidden), *[(width,), (width,)] * biased]
    shapes += [(extra.blocks * hidden,) for extra in cell.extras]
    state = random_state(name, *of_state)
    call = Call(
        cell,
        torch.randn(*rows, inputs),
        state if given else [],
        [torch.randn(shape) * shape[-1] ** -0.5 for _ in range(directions) for shape in shapes],
        sizes if packed else None,
        bidirectional,
        random_flow(name, rng, lengths[0], batch, *of_state) if flows and not packed else PLAIN,
    )
    dy = torch.randn(*rows, directions * hidden) if rng.random() < 0.8 else None
    d_traces = [torch.randn(*rows, directions * hidden) for _ in state[1:]]
    d_final = [torch.randn_like(part) for part in state]
    return call, Cotangents(dy, d_final, d_traces if rng.random() < 0.5 else [])


def convert(value, dtype: torch.dtype):
    """A call or cotangents, in another dtype."""
    if isinstance(value, Flow):
        return Flow(*(convert(part, dtype) for part in value))
    if isinstance(value, (Call, Cotangents)):
        return type(value)(*(convert(part, dtype) for part in value))
    if type(value) in (list, tuple):
        return [convert(part, dtype) for part in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def run(call: Call, given: Cotangents) -> list[Tensor]:
    """All results of a layer, and all gradients; nobody asks for that of a state not given."""
    result, saved = cpu.forward(call, ALL, True)
    fakes = cpu.fake_saved(call, ALL)
    assert [(t.shape, t.dtype) for t in saved] == [(t.shape, t.dtype) for t in fakes]
    dx, d_state, d_fresh, d_weights = cpu.backward(call, given, saved, Asked())
    d_state = d_state if call.state else []
    return [result.y, *result.final, *result.traces, dx, *d_state, *d_fresh, *d_weights]


def exact(call: Call, given: Cotangents) -> list[Tensor]:
    """The same by the definition, in float64."""
    call, given = convert(call, torch.float64), convert(given, torch.float64)
    result, found = reference.layer(call), gradients.first(call, given)
    inputs = [call.x, *call.state, *call.flow.fresh, *call.weights]
    grads = [found.dx, *found.d_state, *found.d_fresh, *found.d_weights]
    filled = [
        torch.zeros_like(t) if grad is None else grad for grad, t in zip(grads, inputs, strict=True)
    ]
    return [result.y, *result.final, *result.traces, *filled]


@functools.cache
def exact_of(name: str, seed: int) -> list[Tensor]:
    """Of what `draw` draws."""
    return exact(*draw(name, seed))


@pytest.fixture
def with_threads(monkeypatch):
    def force(count: int) -> None:
        monkeypatch.setattr(engine, "threads", lambda flops: count)

    return force


@pytest.fixture
def by_operators(monkeypatch):
    """A function that runs another one without kernels."""

    def run_by_operators(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(layers, "_backend", lambda x, projected: operators)
            return function(*args)

    return run_by_operators


@pytest.mark.parametrize("target", [machine.NEON, machine.AVX2, machine.AVX512], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_against_float64(monkeypatch, with_threads, by_operators, cell, target):
    """LLVM splits vectors that the CPU at hand has not, so every width can be tested on any."""
    monkeypatch.setattr(machine, "target", lambda: target)
    squares = torch.zeros(2)
    for seed in range(40):
        with_threads(seed % 4 + 1)
        drawn = draw(cell, seed)
        results = zip(run(*drawn), by_operators(run, *drawn), exact_of(cell, seed), strict=True)
        for k, (a, b, right) in enumerate(results):
            assert a.shape == b.shape == right.shape
            if not right.numel():
                continue
            unit = EPS * max(1.0, right.abs().max().item())
            errors = torch.stack([(t.double() - right) / unit for t in (a, b)]).flatten(1)
            assert errors.abs().max() < 16, (seed, k)
            squares += errors.pow(2).mean(1)
    assert squares[0] <= 1.25**2 * squares[1], "larger errors than those of torch's operators"


@pytest.mark.parametrize("is_projected", [False, True], ids=["plain", "projected"])
@pytest.mark.parametrize("cell", CELLS)
def test_operators_in_float64(cell, is_projected):
    """Projections too, of which there are no kernels."""
    if is_projected and cell not in ("lstm", "peephole_lstm", "slstm"):
        pytest.skip("never projected")
    for seed in range(6):
        call, given = (convert(part, torch.float64) for part in draw(cell, seed))
        if is_projected:
            call, given = projected(call, given)
        for a, b in zip(run(call, given), exact(call, given), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def projected(call: Call, given: Cotangents) -> tuple[Call, Cotangents]:
    """The call with a projection of h to half its size."""
    size, weights = (call.hidden_size + 1) // 2, []
    for w in call.by_direction():
        w_hr = torch.randn(size, call.hidden_size, dtype=call.x.dtype)
        flat = [w.w_ih, torch.randn(w.w_ih.shape[0], size).to(w_hr), w.b_ih, w.b_hh, w_hr]
        weights += [part for part in flat if part is not None] + list(w.extras)

    def cut(tensors):
        return [tensors[0][..., :size], *tensors[1:]] if tensors else tensors

    flow = call.flow._replace(fresh=cut(call.flow.fresh))
    dy = given.dy
    if dy is not None:
        dy = dy.unflatten(-1, (call.directions, -1))[..., :size].flatten(-2)
    call = call._replace(state=cut(call.state), weights=weights, flow=flow)
    return call, given._replace(dy=dy, d_final=cut(given.d_final))


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_groups(cell):
    """Of each part of the batch, as if it were a call of its own."""
    call, given = draw(cell, 1)
    call = call._replace(batch_sizes=None, flow=PLAIN, x=torch.randn(5, 6, call.x.shape[-1]))
    state = random_state(cell, call.directions, 6, call.hidden_size)
    lengths = torch.tensor([5, 2, 0, 4, 5, 1])
    marks = make_marks(5, 6, call.directions, torch.device("cpu"), lengths)
    dy = torch.randn(5, 6, call.directions * call.hidden_size)
    for flow in (PLAIN, Flow(marks)):
        of_all = call._replace(state=state, flow=flow)
        found = cpu.backward(of_all, Cotangents(dy, state), [], Asked(groups=3))
        for g in range(3):
            part = slice(2 * g, 2 * g + 2)
            own = of_all._replace(
                x=call.x[:, part],
                state=[s[:, part] for s in state],
                flow=flow._replace(marks=None if flow.marks is None else marks[:, :, part]),
            )
            given = Cotangents(dy[:, part], own.state)
            alone = cpu.backward(own, given, [], Asked())
            torch.testing.assert_close([d[g] for d in found.d_weights], alone.d_weights)
            torch.testing.assert_close(found.dx[:, part], alone.dx)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(cell, dtype):
    call, given = (convert(part, dtype) for part in draw(cell, 3))
    wide = run(convert(call, torch.float32), convert(given, torch.float32))
    for mine, right in zip(run(call, given), wide, strict=True):
        assert mine.dtype == dtype
        assert torch.equal(mine, right.to(dtype))


def test_nothing_is_returned_or_saved_that_nobody_asks_for():
    call, given = draw("lstm", 0)
    result, saved = cpu.forward(call, cpu.NOTHING, False)
    assert not saved
    assert not result.traces
    found = cpu.backward(call, given, [], Asked(x=False, weights=False))
    assert found.dx is None
    assert not found.d_weights
    everything = cpu.backward(call, given, [], Asked())
    torch.testing.assert_close(found.d_state, everything.d_state)


@pytest.mark.parametrize("cell", CELLS)
def test_results_do_not_depend_on_the_number_of_threads(with_threads, cell):
    for seed in range(5):
        drawn = draw(cell, seed)
        results = []
        for count in (1, 2, 3, 8):  # 8 are more than there are cores, and than slices
            with_threads(count)
            results.append(run(*drawn))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_many_steps_on_many_threads(with_threads):
    """A wait that is missing shows up in a long walk with narrow slices."""
    weights = [torch.randn(3 * 129, n) * 0.1 for n in (33, 129)]
    call = Call(CELLS["gru"], torch.randn(500, 3, 33), [], weights)
    given = Cotangents(torch.randn(500, 3, 129), [torch.randn(1, 3, 129)])
    with_threads(1)
    alone = run(call, given)
    for count in (2, 5):
        with_threads(count)
        for _ in range(5):
            together = run(call, given)
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def activation(function):
    """Compile a function of the cells to run over a tensor."""
    target = machine.target()
    module = ir.Module("activation")
    parameters = [vector.ADDRESS, vector.ADDRESS, vector.INT]
    code = vector.Code(module, "activation", parameters, target.lanes)
    x, y, count = code.parameters
    with code.loop(count, step=target.lanes) as k:
        code.store(y + k, function(code.load(x + k, count - k)), count - k)
    code.finish()
    for_ = engine.target_machine()
    owner = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), for_)
    owner.finalize_object()
    address = owner.get_function_address("activation")
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(address)

    def apply(values: Tensor) -> Tensor:
        result = torch.full((len(values) + 1,), 7.0)
        call(values.data_ptr(), result.data_ptr(), len(values))
        assert result[-1] == 7, "stored beyond the end"
        assert owner
        return result[:-1]

    return apply


EXACT = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "log_sigmoid": torch.nn.functional.logsigmoid,
}


@pytest.mark.parametrize("name", EXACT)
def test_activations_to_the_last_digits(name):
    apply = activation(getattr(activations, name))
    values = torch.cat(
        [torch.linspace(-90, 90, 100_001), torch.logspace(-30, 1, 50_001), torch.randn(99_999)]
    )
    values = torch.cat([values, -values])
    if name == "exp":
        values = -values.abs()
    exact = EXACT[name](values.double())
    # Relative, down to what is lost in 1 - sigmoid below the smallest normal number.
    error = (apply(values).double() - exact).abs() / (exact.abs() * EPS).clamp_min(2.0**-126)
    inside = values.abs() < 87
    assert error[inside].max() < 2.1
    beyond = (apply(values)[~inside].double() - exact[~inside]).abs()
    assert (beyond / exact[~inside].abs().clamp_min(1.0)).max() < 2e-38
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
    special = special[1:] if name == "exp" else special
    mine, right = apply(special), EXACT[name](special)
    torch.testing.assert_close(mine, right, rtol=EPS, atol=2e-38, equal_nan=True)
    if name == "tanh":
        assert torch.equal(mine.signbit()[-2:], special.signbit()[-2:])
    if name == "exp":
        assert (mine[-2:] == 1).all()


@pytest.mark.parametrize("name", ["relu", "maximum"])
def test_what_is_not_a_number_stays_so(name):
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), -2.0, -0.0, 0.0, 3.0])
    if name == "relu":
        torch.testing.assert_close(
            activation(activations.relu)(values), torch.relu(values), equal_nan=True
        )
        return
    for other in values.tolist():
        for swapped in (False, True):

            def of_two(x, other=other, swapped=swapped):
                pair = (x, x.code.splat(x.code.number(other)))
                return activations.maximum(*(pair[::-1] if swapped else pair))

            right = torch.maximum(values, torch.full_like(values, other))
            torch.testing.assert_close(activation(of_two)(values), right, equal_nan=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_what_is_not_finite_goes_where_it_goes_in_torch(name, bad):
    for options in [{}, {"nonlinearity": "relu"}] if name == "RNN" else [{}]:
        ours = getattr(fastrnn, name)(5, 9, **options)
        stock = ours.to_torch()
        x = torch.randn(6, 3, 5)
        x[2, 1, 3] = bad
        x.requires_grad_()
        with use_path("kernels"):
            y, _ = ours(x)
        z, _ = stock(x)
        torch.testing.assert_close(y, z, equal_nan=True)
        dx, dz = (torch.autograd.grad(out.sum(), x)[0] for out in (y, z))
        torch.testing.assert_close(dx, dz, equal_nan=True)


GUARDED = """
import ctypes, mmap, sys
import torch
from fastrnn import cpu
from fastrnn.call import Asked, Call, Cotangents
from fastrnn.flow import Flow
sys.path.insert(0, "tests")
import test_cpu_kernels as tests

libc = ctypes.CDLL(None, use_errno=True)
kept = []

def guarded(value):
    '''A copy whose tensors end where a page ends behind which nothing may be touched.'''
    if isinstance(value, (Call, Cotangents, Flow)):
        return type(value)(*map(guarded, value))
    if type(value) in (list, tuple):
        return [guarded(part) for part in value]
    if not isinstance(value, torch.Tensor) or not value.numel():
        return value
    size = -(-value.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, size + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    assert libc.mprotect(ctypes.c_void_p(start + size), mmap.PAGESIZE, 0) == 0
    kept.append(pages)
    offset = size - value.nbytes
    flat = torch.frombuffer(pages, dtype=value.dtype, count=value.numel(), offset=offset)
    return flat.view(value.shape).copy_(value)

for name in tests.CELLS:
    for seed in range(30):
        call, given = map(guarded, tests.draw(name, seed))
        _, saved = cpu.forward(call, cpu.ALL, False)
        cpu.backward(call, given, guarded(saved), Asked())
print("all inside")
"""


def test_nothing_beyond_the_arguments_is_touched():
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "all inside\n", done.stderr


def test_nothing_beyond_the_columns_is_written(with_threads):
    with_threads(2)
    for hidden in (1, 7, 17, 33):
        canvas = torch.full((4 * 3, hidden + 5), 7.0)
        weights = Weights.unpack([torch.randn(3 * hidden, 6), torch.randn(3 * hidden, hidden)])
        x = torch.randn(12, 6)
        direction = Direction(CELLS["gru"], weights, Rows(4, 3, None), False, [], None)
        state = [torch.zeros(3, hidden)]
        h = canvas[:, 2 : 2 + hidden]
        native.forward(direction, x, state, h, [], [])
        assert (canvas[:, :2] == 7).all()
        assert (canvas[:, 2 + hidden :] == 7).all()
        assert torch.equal(h[-3:], state[0])


def small_call() -> Call:
    weights = [torch.randn(12, 4), torch.randn(12, 3), torch.randn(9)]
    state = [torch.randn(1, 3, 3), torch.randn(1, 3, 3)]
    sizes = torch.tensor([3, 2])
    return Call(CELLS["peephole_lstm"], torch.randn(5, 4), state, weights, sizes)


def weights_of(*shapes: tuple[int, ...]) -> dict[str, list[Tensor]]:
    return {"weights": [torch.randn(shape) for shape in shapes]}


@pytest.mark.parametrize(
    "change",
    [
        {"batch_sizes": torch.tensor([3, 1])},
        {"batch_sizes": torch.tensor([3, 3])},
        {"batch_sizes": torch.tensor([3, 2, 0])},
        {"batch_sizes": torch.tensor([2, 3]), "state": [torch.randn(1, 2, 3)] * 2},
        {"state": [torch.randn(1, 3, 5)] * 2},
        {"state": [torch.randn(1, 3, 3), torch.randn(1, 3, 2)]},
        weights_of((8, 4), (8, 3), (9,)),
        weights_of((12, 4), (12, 3), (12,), (11,), (9,)),
        weights_of((12, 5), (12, 3), (9,)),
        weights_of((12, 4), (12, 3), (8,)),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change):
    call = small_call()._replace(**change)
    with pytest.raises(RuntimeError, match="do not fit"):
        cpu.forward(call, ALL, False)
    with pytest.raises(RuntimeError):
        cpu.backward(
            call, Cotangents(None, call.state), cpu.forward(small_call(), ALL, False)[1], Asked()
        )


def test_tensors_of_backward_that_do_not_fit_are_refused():
    call = small_call()
    result, saved = cpu.forward(call, ALL, False)
    given = Cotangents(result.y, result.final)
    for broken in (
        saved[:-1],
        [saved[0], saved[1][:-1], *saved[2:]],
        [*saved[:2], saved[2][:, :-1], *saved[3:]],
        [*saved[:-1], saved[-1][:, :-1]],
        [saved[0][:, :-1], *saved[1:]],
        [t[:, :-1] for t in saved],
    ):
        with pytest.raises(RuntimeError):
            cpu.backward(call, given, broken, Asked())
    for broken in (
        given._replace(dy=result.y[:, :-1]),
        given._replace(dy=result.y[:-1]),
        given._replace(d_traces=[result.y[:, :-1]]),
        given._replace(d_final=[result.final[0], result.final[1][..., :-1]]),
    ):
        with pytest.raises(RuntimeError):
            cpu.backward(call, broken, saved, Asked())


@pytest.mark.parametrize("sizes", [torch.full((1,), 3).expand(5), torch.full((5, 2), 3)[:, 1]])
def test_batch_sizes_of_any_layout(sizes):
    weights = [torch.randn(27, 4), torch.randn(27, 9)]
    call = Call(CELLS["gru"], torch.randn(15, 4), [], weights, sizes)
    right = cpu.forward(call._replace(batch_sizes=sizes.contiguous()), ALL, False)[0]
    assert torch.equal(cpu.forward(call, ALL, False)[0].y, right.y)


@pytest.mark.parametrize("cell", CELLS)
def test_saved_tensors_of_any_layout(cell):
    """As hooks that move them elsewhere may bring them back."""
    call, given = draw(cell, 4)
    _, saved = cpu.forward(call, ALL, False)
    expected = cpu.backward(call, given, saved, Asked())
    moved = cpu.backward(call, given, [t.t().contiguous().t() for t in saved], Asked())
    torch.testing.assert_close(moved, expected)


def test_the_default_dtype_does_not_matter():
    gru, x = fastrnn.GRU(8, 16), torch.randn(9, 3, 8)
    with use_path("kernels"):
        expected = torch.autograd.grad(gru(x)[0].sum(), gru.weight_hh_l0)
        y, _ = gru(x)
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.equal(*torch.autograd.grad(y.sum(), gru.weight_hh_l0), *expected)
        finally:
            torch.set_default_dtype(torch.float32)


def test_negated_views():
    gru, x = fastrnn.GRU(8, 16), torch.randn(9, 3, 8)
    with torch.no_grad(), use_path("kernels"):
        assert torch.equal(gru(torch._neg_view(x))[0], gru(-x)[0])


def test_gradients_under_compiled_autograd():
    """Dynamo then traces Python that hands out addresses, and frees what it thinks is not used."""
    gru, x = fastrnn.GRU(8, 16), torch.randn(20, 3, 8)
    expected = torch.autograd.grad(gru(x)[0].square().sum(), list(gru.parameters()))
    compiler = torch.compile(backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch._dynamo.compiled_autograd._enable(compiler):
            gru(x)[0].square().sum().backward()
    torch.testing.assert_close(tuple(p.grad for p in gru.parameters()), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_a_trace_takes_other_batches(name):
    module = getattr(fastrnn, name)(8, 16).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, torch.randn(20, 2, 8))
        x = torch.randn(11, 3, 8)
        torch.testing.assert_close(traced(x)[0], module(x)[0])


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_recompute_in_another_autocast_region(name):
    function = getattr(fastrnn.functional, name.lower())
    module, x = getattr(fastrnn, name)(8, 16), torch.randn(9, 3, 8)
    weights = list(module.parameters())

    def gradients(recompute: bool) -> tuple[Tensor, ...]:
        with use_path("kernels"):
            y, _ = function(x, None, weights, recompute=recompute)
        with torch.autocast("cpu", torch.bfloat16):
            return torch.autograd.grad(y.sum(), weights)

    torch.testing.assert_close(gradients(True), gradients(False))


# What other CPUs would run.

OTHERS = [
    ("x86_64-unknown-linux-gnu", "x86-64-v3", machine.AVX2, "ymm"),
    ("x86_64-unknown-linux-gnu", "znver4", machine.AVX512, "zmm"),
    ("x86_64-unknown-linux-gnu", "sapphirerapids", machine.AVX512, "zmm"),
    ("aarch64-unknown-linux-gnu", "neoverse-n1", machine.NEON, ".4s"),
    ("aarch64-unknown-linux-gnu", "neoverse-v2", machine.NEON, ".4s"),
]


@pytest.mark.parametrize(("triple", "cpu", "target", "sign"), OTHERS)
@pytest.mark.parametrize("cell", ["lstm", "rnn_tanh", "peephole_lstm", "slstm"])
def test_products_of_other_cpus_stay_in_registers(triple, cpu, target, sign, cell):
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        of = llvm.Target.from_triple(triple)
    except RuntimeError:
        pytest.skip(f"LLVM without {triple}")
    for_ = of.create_target_machine(cpu=cpu, opt=3)
    assembly = for_.emit_assembly(engine.optimized(CELLS[cell], target, for_))
    blocks = re.split(r"^\.LBB\w+:", assembly, flags=re.MULTILINE)
    in_full_tile = {2 * target.tile_rows, 24}  # and as often in a turn of the loop
    products = [b for b in blocks if len(re.findall("vfmadd|fmla", b)) in in_full_tile]
    assert products
    for block in products:
        assert sign in block
        assert not re.search(r"\(%rsp|\[sp", block), "a spill"
