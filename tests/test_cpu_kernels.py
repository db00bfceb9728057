"""The compiled CPU kernels: every cell, dtype, vector width and thread count against float64.

Their building blocks are tested in test_cpu_code.py.
"""

from __future__ import annotations

import random
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compare import Call as CallOfModule
from compare import oracle_of, pair
from cpu_calls import (
    CELLS,
    convert,
    draw,
    drawn,
    exact,
    exact_of,
    operators_of,
    random_state,
    run,
)
from torch import Tensor

import fastrnn
from fastrnn import cells, cpu
from fastrnn import functional as F
from fastrnn.call import Asked, Call, Cotangents, Weights
from fastrnn.cpu import ALL, NOTHING, machine
from fastrnn.cpu.direction import Ahead, Direction, Kept
from fastrnn.cpu.rows import Rows
from fastrnn.flow import PLAIN, Flow, make_marks

pytest.importorskip("llvmlite")
if machine.target() is None:
    pytest.skip("no kernels for this CPU", allow_module_level=True)

from fastrnn.cpu import engine, native
from fastrnn.planner import use_path

ROOT = Path(__file__).resolve().parent.parent
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
multiplies_pairs = pytest.mark.skipif(
    not machine.multiplies(BF16), reason="this CPU does not multiply pairs of bfloat16"
)
DTYPES = [F32, F64, pytest.param(BF16, marks=multiplies_pairs)]


@pytest.fixture
def with_threads(monkeypatch):
    def force(count: int) -> None:
        monkeypatch.setattr(engine, "threads", lambda *sizes: count)
        monkeypatch.setattr(engine, "_available", lambda: count)

    return force


@pytest.fixture
def packing(monkeypatch):
    """A function that chooses from a seed which weights forward packs."""

    def choose(seed: int) -> None:
        rng = random.Random(seed)
        monkeypatch.setattr(native, "_pays", lambda rows, times: rng.random() < 0.5)

    return choose


def errors(found: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Errors in units in the last place of the largest number, or of 1 if that is larger."""
    unit = torch.finfo(dtype).eps * max(1.0, right.abs().max().item())
    return (found.double() - right) / unit


def largest(cell: str, seed: int, k: int) -> float:
    """The largest error allowed, in units; in normalized cells it depends on torch's own error."""
    of_torch = operators_of(cell, seed, F32)[k], exact_of(cell, seed, F32)[k]
    return 16 if CELLS[cell].is_pointwise else 16 + 4 * errors(*of_torch, F32).abs().max().item()


@pytest.mark.sweep(11)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(
    "target", [machine.NEON, machine.AVX2, machine.AVX512], ids=lambda target: target.name
)
@pytest.mark.parametrize("cell", CELLS)
def test_against_float64(monkeypatch, with_threads, packing, cell, target, dtype):
    """LLVM splits vectors that this CPU lacks, so every width can be tested on any CPU.

    In float64 the exact results have errors as large as ours may be, so twice the squared error is
    allowed, with the bound in units taken from float32.
    """
    monkeypatch.setattr(machine, "target", lambda: target)
    squares, allowed = 0.0, 0.0
    for seed in range(12):
        with_threads(seed % 4 + 1)
        packing(seed)
        found = run(*drawn(cell, seed, dtype))
        for k, (mine, right) in enumerate(zip(found, exact_of(cell, seed, dtype), strict=True)):
            assert (mine.shape, mine.dtype) == (right.shape, dtype)
            if mine.numel():
                units = errors(mine, right, dtype)
                assert units.abs().max() < largest(cell, seed, k), (seed, k)
                squares += units.square().mean().item()
        of_torch = zip(operators_of(cell, seed, F32), exact_of(cell, seed, F32), strict=True)
        for theirs, right in of_torch:
            if theirs.numel():
                allowed += errors(theirs, right, F32).square().mean().item()
    allowed *= 2 if dtype == F64 else 1
    assert squares <= 1.25**2 * allowed, "larger errors than those of torch's operators"


def has_kinks(cell: str) -> bool:
    """Whether derivatives depend on signs, which rounding may change."""
    return cell == "rnn_relu"


@pytest.mark.sweep(7)
@multiplies_pairs
@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_against_float64(with_threads, packing, cell):
    """Besides the results, h and the gradients of the gates are rounded at every step."""
    squares, allowed = 0.0, 0.0
    for seed in range(12):
        with_threads(seed % 4 + 1)
        packing(seed)
        call, given = drawn(cell, seed, BF16)
        if cell == "slstm":  # c, n and m have a kink where m switches; h has none
            of_others = [torch.zeros_like(part) for part in given.d_final[1:]]
            given = Cotangents(given.dy, [given.d_final[0], *of_others])
        found = run(call, given)
        with cpu.kernels_allowed(False):
            of_torch = run(call, given)
        results = zip(found, of_torch, exact(call, given), strict=True)
        for k, (mine, theirs, right) in enumerate(results):
            assert (mine.shape, mine.dtype) == (right.shape, BF16)
            if not mine.numel() or (has_kinks(cell) and k > 1):
                continue
            units = errors(mine, right, BF16)
            assert units.abs().max() < 4, (seed, k)
            squares += units.square().mean().item()
            allowed += errors(theirs, right, BF16).square().mean().item()
    assert squares <= 3**2 * allowed


@multiplies_pairs
@pytest.mark.parametrize("steps", [1, 5, 40])
@pytest.mark.parametrize("kind", ["lstm", "lstm_proj", "gru", "rnn_tanh"])
def test_bfloat16_beside_torch(packing, kind, steps):
    """Errors of outputs and gradients are at most twice torch.nn's plus one rounding."""
    for seed, (batch, inputs, hidden) in enumerate([(1, 7, 9), (3, 33, 48), (13, 64, 65)]):
        packing(seed)
        ours, stock = pair(kind, inputs, hidden, dtype=BF16, bidirectional=seed == 1)
        call = CallOfModule(ours, steps=steps, batch=batch, dtype=BF16, seed=seed)
        right = call.run(oracle_of(stock), F64)
        theirs = call.run(stock)
        with use_path("kernels"):
            mine = call.run(ours)
        for name, of_name in right.items():
            rms, of_torch = (
                errors(part[name], of_name, BF16).square().mean().sqrt() for part in (mine, theirs)
            )
            assert rms <= 2 * of_torch + 0.3, (name, seed)


@pytest.mark.parametrize("cell", CELLS)
def test_operators_against_float64(cell):
    """The loop of torch operators, used where there is no kernel."""
    for dtype in (F32, F64):
        for seed in range(8):
            results = zip(operators_of(cell, seed, dtype), exact_of(cell, seed, dtype), strict=True)
            for theirs, right in results:
                assert theirs.dtype == dtype
                if theirs.numel() and CELLS[cell].is_pointwise:
                    assert errors(theirs, right, dtype).abs().max() < 16, seed


def test_what_is_packed(monkeypatch):
    """Weights are packed if they are multiplied often, by many rows."""
    found = []
    monkeypatch.setattr(engine, "run", lambda *args, **options: found.append(args[3]))
    for batch, steps in ((4, 40), (1, 100), (64, 200)):
        weights = [torch.randn(36, 8), torch.randn(36, 5), torch.randn(5, 9)]
        call = Call(CELLS["lstm"], torch.randn(steps, batch, 8), [], weights)
        cpu.forward(call, NOTHING, False)
    packed = [[bool(part) for part in (a.packed_ih, a.packed_hh, a.packed_hr)] for a in found]
    assert packed == [[False] * 3, [False, True, True], [True] * 3]


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_groups(cell):
    """Gradients of each part of the batch, as if it were a separate call."""
    call, given = draw(cell, 1)
    weights = [part[0] for part in call.weights] if call.members else call.weights
    call = call._replace(batch_sizes=None, flow=PLAIN, x=torch.randn(5, 6, call.x.shape[-1]))
    call = call._replace(weights=weights)
    state = random_state(cell, (call.directions, 6), call.hidden_size, call.size_h)
    lengths = torch.tensor([5, 2, 0, 4, 5, 1])
    marks = make_marks(5, 6, call.directions, torch.device("cpu"), lengths)
    dy = torch.randn(5, 6, call.directions * call.size_h)
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


@pytest.mark.sweep(7)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_that_is_not_multiplied_is_rounded_once(monkeypatch, cell, dtype):
    without_pairs = machine.target()._replace(pairs="")
    monkeypatch.setattr(machine, "target", lambda: without_pairs)
    for seed in (1, 3):
        call, given = drawn(cell, seed, dtype)
        wide = run(convert(call, F32), convert(given, F32))
        for mine, right in zip(run(call, given), wide, strict=True):
            assert mine.dtype == dtype
            assert torch.equal(mine, right.to(dtype))


@pytest.mark.sweep(7)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_results_do_not_depend_on_what_is_kept(cell, dtype):
    """Forward keeps h before its projection for one step or for all steps."""
    for seed in range(8):
        call, _ = drawn(cell, seed, dtype)
        whole, _ = cpu.forward(call, ALL, True)
        for save, traced in ((NOTHING, False), (NOTHING, True), (ALL, False)):
            result, _ = cpu.forward(call, save, traced)
            expected = [whole.y, *whole.final, *(whole.traces if traced else [])]
            found = [result.y, *result.final, *result.traces]
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


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


@pytest.mark.sweep(7)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["as it is", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_results_do_not_depend_on_the_number_of_threads(
    monkeypatch, with_threads, cell, packed, dtype
):
    monkeypatch.setattr(native, "_pays", lambda rows, times: packed)
    for seed in range(3):
        results = []
        for count in (1, 2, 3, 8):  # 8 exceeds the cores and the slices
            with_threads(count)
            results.append(run(*drawn(cell, seed, dtype)))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.long
@pytest.mark.parametrize(("name", "size_h"), [("gru", 129), ("lstm", 70)])
def test_many_steps_on_many_threads(with_threads, name, size_h):
    """A missing wait shows up in a long sequence with narrow slices."""
    cell = CELLS[name]
    shapes = [(cell.n_gates * 129, n) for n in (33, size_h)] + [(size_h, 129)] * (size_h < 129)
    weights = [torch.randn(shape) * 0.1 for shape in shapes]
    call = Call(cell, torch.randn(500, 3, 33), [], weights)
    d_final = random_state(name, (1, 3), 129, size_h)
    given = Cotangents(torch.randn(500, 3, size_h), d_final)
    with_threads(1)
    alone = run(call, given)
    for count in (2, 5):
        with_threads(count)
        for _ in range(5):
            together = run(call, given)
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    ("groups", "available", "found"),
    [
        (1, 4, [(0, 1, 3)]),
        (2, 1, [(0, 2, 1)]),
        (2, 4, [(0, 2, 4)]),
        (3, 4, [(0, 3, 3)]),
        (8, 4, [(0, 8, 4)]),
        (9, 4, [(0, 8, 4), (8, 1, 3)]),
    ],
)
def test_groups_are_shared_out(monkeypatch, groups, available, found):
    monkeypatch.setattr(engine, "_available", lambda: available)
    assert engine.launches(groups, 3, 1 << 30) == found


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_groups_with_little_to_do_have_one_thread(monkeypatch, groups):
    monkeypatch.setattr(engine, "_available", lambda: 4)
    assert engine.launches(groups, 1, 1000) == [(0, groups, 1)]


@pytest.mark.parametrize("members", [(), (1,), (3,)])
@pytest.mark.parametrize("threads", [1, 2])
def test_products_of_members(monkeypatch, with_threads, threads, members):
    """Strided matrices, one of them transposed; the result is overwritten or added to."""
    with_threads(threads)
    monkeypatch.setattr(native, "_MIN_FLOPS", 0)
    monkeypatch.setattr(machine, "has_narrow_blas", lambda dtype: True)
    m, k, n = 37, 300, 21
    a, b = torch.randn(*members, k, m + 3)[..., :m].mT, torch.randn(*members, k, n + 5)[..., :n]
    for adds in (False, True):
        c = torch.randn(*members, m, n)
        exact = a.double() @ b.double() + (c.double() if adds else 0.0)
        native.multiply(CELLS["lstm"], c, a, b, adds)
        torch.testing.assert_close(c.double(), exact, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("given", [1, 2])
def test_fewer_threads_than_were_planned(monkeypatch, with_threads, given):
    """The OpenMP runtime may provide fewer because of limits or other programs."""
    library = engine.openmp()
    if library is None:
        pytest.skip("no OpenMP runtime")
    cell = CELLS["layernorm_lstm"]
    shapes = [(4 * 66, 5), (4 * 66, 22), (4 * 66,), (4 * 66,), (66,), (66,)]  # three heads
    weights = [torch.randn(shape) * 0.1 for shape in (*shapes, *shapes)]
    call = Call(cell, torch.randn(9, 3, 5), [], weights, None, True)
    state = random_state("layernorm_lstm", (2, 3), 66, 66)
    given_gradients = Cotangents(torch.randn(9, 3, 132), state)
    with_threads(1)
    alone = run(call, given_gradients)

    def fewer(function, data, threads, flags):
        library.GOMP_parallel(function, data, min(given, threads), flags)

    with_threads(12)
    monkeypatch.setattr(engine, "openmp", lambda: SimpleNamespace(GOMP_parallel=fewer))
    together = run(call, given_gradients)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


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
import ctypes, itertools, mmap, sys
import torch
from fastrnn import cells, cpu
from fastrnn import functional as F
from fastrnn.cpu import engine, native
sys.path.insert(0, "tests")
import cpu_calls

libc = ctypes.CDLL(None, use_errno=True)
kept = []

def room(size):
    '''Bytes that end where a page ends behind which nothing may be touched, all 0xff: NaN.'''
    whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, whole + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    assert libc.mprotect(ctypes.c_void_p(start + whole), mmap.PAGESIZE, 0) == 0
    kept.append(pages)
    return torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=whole - size).fill_(255)

def span(part):
    '''All memory from the first number of a tensor to its last one, as bytes.'''
    count = 1 + sum((n - 1) * stride for n, stride in zip(part.shape, part.stride()))
    return part.as_strided((count,), (1,)).view(torch.uint8)

def work_space(*sizes):
    parts = [room(size) if size else None for size in sizes]
    return torch.empty(0), [0 if part is None else part.data_ptr() for part in parts]

def views(numbers, pairs, heads, members):
    '''The arguments of heads and members as tensors.'''
    for m, k in itertools.product(range(members), range(heads)):
        tensors = []
        for part, by in pairs:
            if members > 1 and part is not None and part.dim() > 1:
                part = part[m]
            is_row = part is not None and part.dim() == 2 and by < part.shape[1]
            if k and part is not None:
                part = part[:, k * by :] if is_row else part.flatten()[k * by :]
            tensors.append(part)
        yield numbers, tensors

def one_by_one(groups, threads, flops):
    return [engine.Launch(group, 1, threads) for group in range(groups)]

def run(cell, dtype, name, arguments, threads, noisy):
    '''Run a kernel on copies of its tensors, and copy back what it has written.'''
    values = (ctypes.c_int64 * (ctypes.sizeof(arguments) // 8)).from_buffer(arguments)
    moved = []
    for k, part in enumerate(arguments.tensors, len(values) - len(arguments.tensors)):
        if part is not None and part.numel():
            old = span(part)
            moved.append((old, old.clone(), room(old.numel()).copy_(old)))
            values[k] = moved[-1][2].data_ptr()
    real[0](cell, dtype, name, arguments, threads, noisy=noisy)
    for old, before, after in moved:
        if not torch.equal(before, after):
            old.copy_(after)
    kept.clear()

real = engine.run, native.work_space, native._by_groups
engine.launches = one_by_one
dtype = getattr(torch, sys.argv[1])
for name in cpu_calls.CELLS:
    for seed in range(12):
        native._pays = lambda rows, times: seed % 2 == 0
        call, given = cpu_calls.drawn(name, seed, dtype)
        found = []
        guarded = run, work_space, views
        for engine.run, native.work_space, native._by_groups in (real, guarded):
            y = cpu.forward(call, cpu.NOTHING, False)[0].y
            found.append([y, *cpu_calls.run(call, given)])
        equal = (torch.equal(a, b) for a, b in zip(*found))
        assert all(equal), (name, seed)
print("all inside")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no mprotect")
@pytest.mark.sweep(2)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_nothing_beyond_the_arguments_is_touched(dtype):
    """Guards tensors, results and work space; initial contents of work space must not matter."""
    if not machine.multiplies(getattr(torch, dtype)):
        pytest.skip(f"does not multiply {dtype}")
    command = [sys.executable, "-c", GUARDED, dtype]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "all inside\n", done.stderr


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_nothing_beyond_the_columns_is_written(with_threads, packing, name, dtype):
    """h may be columns of a wider tensor; the LSTM here has a projection."""
    with_threads(2)
    cell, exact_dtype = CELLS[name], F64 if dtype == F64 else F32
    for seed, hidden in enumerate((2, 7, 17, 33)):
        packing(seed)
        size_h = hidden if name == "gru" else hidden // 2
        canvas = torch.full((4 * 3, size_h + 5), 7.0, dtype=dtype)
        width = cell.n_gates * hidden
        shapes = [(width, 6), (width, size_h), *[(size_h, hidden)] * (size_h < hidden)]
        weights = Weights.unpack([torch.randn(shape, dtype=dtype) for shape in shapes])
        direction = Direction(cell, weights, Rows(4, 3, None), False, [], None)
        state = [torch.zeros(3, size_h, dtype=exact_dtype)]
        state += [torch.zeros(3, hidden, dtype=exact_dtype) for _ in cell.states[1:]]
        h = canvas[:, 2 : 2 + size_h]
        x = torch.randn(12, 6, dtype=dtype)
        native.forward([Ahead(direction, x, state, h, Kept())])
        assert (canvas[:, :2] == 7).all()
        assert (canvas[:, 2 + size_h :] == 7).all()
        assert torch.equal(h[-3:], state[0].to(dtype))


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
    """Hooks that move saved tensors may return them in another layout."""
    call, given = draw(cell, 4)
    _, saved = cpu.forward(call, ALL, False)
    expected = cpu.backward(call, given, saved, Asked())
    moved = cpu.backward(call, given, [t.mT.contiguous().mT for t in saved], Asked())
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
    """Dynamo then traces Python that passes addresses, and frees tensors it considers unused."""
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


@pytest.mark.parametrize("cell", ["lstm", "layernorm_lstm"])
def test_a_projection_to_more_than_the_hidden_size(cell):
    """The projection has more slices than the gates, and their sums need separate space."""
    generator, size_h, hidden = torch.Generator().manual_seed(0), 100, 8

    def random(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).requires_grad_()

    extras = [random(extra.blocks * hidden) for extra in cells.CELLS[cell].extras]
    weights = [random(4 * hidden, 3), random(4 * hidden, size_h), random(size_h, hidden), *extras]
    x = random(4, 2, 3)
    found = []
    for path in ("kernels", "reference"):
        with use_path(path):
            y, (h, c) = F.sequence(cell, x, None, weights)
            total = y.sin().sum() + h.sum() + c.sum()
            found.append([y, h, c, *torch.autograd.grad(total, [x, *weights])])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)
