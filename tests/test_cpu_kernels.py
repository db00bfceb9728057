"""The compiled kernels of the CPU: every cell, width and number of threads against float64."""

from __future__ import annotations

import ctypes
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
from fastrnn.cpu import ALL, layers, loop, machine

pytest.importorskip("llvmlite")
if machine.target() is None:
    pytest.skip("no kernels for this CPU", allow_module_level=True)

import llvmlite.binding as llvm
from llvmlite import ir

from fastrnn.cpu import engine, native, vector
from fastrnn.cpu.cells import CELLS
from fastrnn.flow import PLAIN
from fastrnn.planner import use_path

ROOT = Path(__file__).resolve().parent.parent
EPS = torch.finfo(torch.float32).eps
SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 65)


def draw(cell: str, seed: int) -> tuple[dict, list[Tensor]]:
    """Draw the arguments of a layer and gradients of its results."""
    rng = random.Random(f"{cell}{seed}")
    torch.manual_seed(seed)
    inputs, hidden, batch = rng.choice(SIZES), rng.choice(SIZES), rng.choice((1, 2, 3, 5, 7, 13))
    bidirectional, biased, packed = (rng.random() < 0.5 for _ in range(3))
    given = packed or rng.random() < 0.5
    directions = 2 if bidirectional else 1
    lengths = sorted((rng.randint(1, 6) for _ in range(batch)), reverse=True)
    sizes = torch.tensor([sum(n > t for n in lengths) for t in range(lengths[0])])
    rows = (int(sizes.sum()),) if packed else (lengths[0], batch)
    width = CELLS[cell].n_gates * hidden
    scale = hidden**-0.5
    shapes = [(width, inputs), (width, hidden), *[(width,), (width,)] * biased]
    state = [torch.randn(directions, batch, hidden) for _ in range(CELLS[cell].n_states)]
    arguments = {
        "cell": cell,
        "x": torch.randn(*rows, inputs),
        "state": state if given else [],
        "weights": [torch.randn(shape) * scale for _ in range(directions) for shape in shapes],
        "batch_sizes": sizes if packed else None,
        "bidirectional": bidirectional,
    }
    dy = torch.randn(*rows, directions * hidden) if rng.random() < 0.8 else None
    return arguments, [dy, [torch.randn_like(part) for part in state]]


def run(arguments: dict, gradients: list, dtype: torch.dtype) -> list[Tensor]:
    """All results of a layer, and all gradients."""

    def convert(value):
        if isinstance(value, list):
            return [convert(part) for part in value]
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    inputs = {name: convert(value) for name, value in arguments.items()}
    y, final, _, saved = layers.layer_forward(**inputs, flow=PLAIN, save=ALL, traced=False)
    dy, d_final = (convert(part) for part in gradients)
    dx, d_state, _, d_weights = layers.layer_backward(
        dy=dy, d_final=d_final, d_traces=[], flow=PLAIN, saved=saved, needs_x=True,
        needs_weights=True, **inputs
    )  # fmt: skip
    return [y, *final, dx, *d_state, *d_weights]


@pytest.fixture
def with_threads(monkeypatch):
    def force(count: int) -> None:
        monkeypatch.setattr(engine, "threads", lambda flops: count)

    return force


@pytest.fixture
def by_the_loop(monkeypatch):
    """A function that runs another one without kernels."""

    def run_by_the_loop(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(layers, "_backend", lambda x, projected: loop)
            return function(*args)

    return run_by_the_loop


@pytest.mark.parametrize("target", [machine.NEON, machine.AVX2, machine.AVX512], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_against_float64(monkeypatch, with_threads, by_the_loop, cell, target):
    """LLVM splits vectors that the CPU at hand has not, so every width can be tested on any."""
    monkeypatch.setattr(machine, "target", lambda: target)
    squares = torch.zeros(2)
    for seed in range(40):
        with_threads(seed % 4 + 1)
        arguments, gradients = draw(cell, seed)
        ours = run(arguments, gradients, torch.float32)
        loops = by_the_loop(run, arguments, gradients, torch.float32)
        exact = by_the_loop(run, arguments, gradients, torch.float64)
        for k, (a, b, right) in enumerate(zip(ours, loops, exact, strict=True)):
            assert a.shape == right.shape
            if not right.numel():
                continue
            unit = EPS * max(1.0, right.abs().max().item())
            errors = torch.stack([(t.double() - right) / unit for t in (a, b)]).flatten(1)
            assert errors.abs().max() < 16, (seed, k)
            squares += errors.pow(2).mean(1)
    assert squares[0] <= 1.25**2 * squares[1], "larger errors than the loop's"


@pytest.mark.parametrize("cell", CELLS)
def test_results_do_not_depend_on_the_number_of_threads(with_threads, cell):
    for seed in range(5):
        arguments, gradients = draw(cell, seed)
        results = []
        for count in (1, 2, 3, 8):  # 8 are more than there are cores, and than slices
            with_threads(count)
            results.append(run(arguments, gradients, torch.float32))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_many_steps_on_many_threads(with_threads):
    """A wait that is missing shows up in a long walk with narrow slices."""
    arguments, gradients = draw("gru", 0)
    arguments.update(x=torch.randn(500, 3, 33), state=[], batch_sizes=None, bidirectional=False)
    arguments["weights"] = [torch.randn(3 * 129, n) * 0.1 for n in (33, 129)]
    gradients = [torch.randn(500, 3, 129), [torch.randn(1, 3, 129)]]
    with_threads(1)
    alone = run(arguments, gradients, torch.float32)
    for count in (2, 5):
        with_threads(count)
        for _ in range(5):
            together = run(arguments, gradients, torch.float32)
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def activation(function):
    """Compile one of the activations to run over a tensor."""
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


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_activations_to_the_last_digits(name):
    apply = activation(getattr(vector, name))
    values = torch.cat(
        [torch.linspace(-90, 90, 100_001), torch.logspace(-30, 1, 50_001), torch.randn(99_999)]
    )
    values = torch.cat([values, -values])
    exact = getattr(torch, name)(values.double())
    # Relative, down to what is lost in 1 - sigmoid below the smallest normal number.
    error = (apply(values).double() - exact).abs() / (exact.abs() * EPS).clamp_min(2.0**-126)
    inside = values.abs() < 87
    assert error[inside].max() < 2.1
    assert (apply(values)[~inside].double() - exact[~inside]).abs().max() < 2e-38
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
    assert (
        torch.equal(
            apply(special).view(torch.int32)[[0, 1, 3, 4]],
            getattr(torch, name)(special).view(torch.int32)[[0, 1, 3, 4]],
        )
        or name == "sigmoid"
    )
    assert apply(special)[2].isnan()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_what_is_not_finite_goes_where_it_goes_in_torch(name, bad):
    for options in [{}, {"nonlinearity": "relu"}] if name == "RNN" else [{}]:
        ours = getattr(fastrnn, name)(5, 9, **options)
        stock = ours.to_torch()
        x = torch.randn(6, 3, 5)
        x[2, 1, 3] = bad
        x.requires_grad_()
        with use_path("loop"):
            y, _ = ours(x)
        z, _ = stock(x)
        torch.testing.assert_close(y, z, equal_nan=True)
        dx, dz = (torch.autograd.grad(out.sum(), x)[0] for out in (y, z))
        torch.testing.assert_close(dx, dz, equal_nan=True)


GUARDED = """
import ctypes, mmap, sys
import torch
from fastrnn.cpu import ALL, layers, machine
from fastrnn.flow import PLAIN
sys.path.insert(0, "tests")
import test_cpu_kernels as tests

libc = ctypes.CDLL(None, use_errno=True)
kept = []

def guarded(t):
    '''A copy that ends where a page ends behind which nothing may be touched.'''
    size = -(-t.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, size + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    assert libc.mprotect(ctypes.c_void_p(start + size), mmap.PAGESIZE, 0) == 0
    kept.append(pages)
    flat = torch.frombuffer(pages, dtype=t.dtype, count=t.numel(), offset=size - t.nbytes)
    return flat.view(t.shape).copy_(t)

for cell in tests.CELLS:
    for seed in range(30):
        arguments, (dy, d_final) = tests.draw(cell, seed)
        for name in ("state", "weights"):
            arguments[name] = [guarded(t) for t in arguments[name]]
        arguments["x"] = guarded(arguments["x"])
        gradients = [None if dy is None else guarded(dy), [guarded(t) for t in d_final]]
        y, final, _, saved = layers.layer_forward(**arguments, flow=PLAIN, save=ALL, traced=False)
        saved = [guarded(t) for t in saved]
        layers.layer_backward(dy=gradients[0], d_final=gradients[1], d_traces=[], flow=PLAIN,
                              saved=saved, needs_x=True, needs_weights=True, **arguments)
print("all inside")
"""


def test_nothing_beyond_the_arguments_is_touched():
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "all inside\n", done.stderr


def test_nothing_beyond_the_columns_is_written(with_threads):
    with_threads(2)
    for hidden in (1, 7, 17, 33):
        canvas = torch.full((4 * 3, hidden + 5), 7.0)
        weights = fastrnn.reference.Weights.unpack(
            [torch.randn(3 * hidden, 6), torch.randn(3 * hidden, hidden)]
        )
        x = torch.randn(12, 6)
        rows = layers.Rows.of(x.view(4, 3, 6), None)
        state = [torch.zeros(3, hidden)]
        h = canvas[:, 2 : 2 + hidden]
        native.forward("gru", x, weights, rows, False, False, state, h, [], None)
        assert (canvas[:, :2] == 7).all()
        assert (canvas[:, 2 + hidden :] == 7).all()
        assert torch.equal(h[-3:], state[0])


def small_arguments() -> dict:
    return {
        "cell": "gru",
        "x": torch.randn(5, 4),
        "state": [torch.randn(1, 3, 3)],
        "weights": [torch.randn(9, 4), torch.randn(9, 3)],
        "batch_sizes": torch.tensor([3, 2]),
        "bidirectional": False,
    }


@pytest.mark.parametrize(
    "change",
    [
        {"batch_sizes": torch.tensor([3, 1])},
        {"batch_sizes": torch.tensor([3, 3])},
        {"batch_sizes": torch.tensor([3, 2, 0])},
        {"batch_sizes": torch.tensor([2, 3]), "state": [torch.randn(1, 2, 3)]},
        {"state": [torch.randn(1, 3, 5)]},
        {"weights": [torch.randn(6, 4), torch.randn(6, 3)]},
        {"weights": [torch.randn(9, 4), torch.randn(9, 3), torch.randn(9), torch.randn(8)]},
        {"weights": [torch.randn(9, 5), torch.randn(9, 3)]},
    ],
)
def test_sizes_that_do_not_fit_are_refused(change):
    with pytest.raises(RuntimeError, match="do not fit"):
        torch.ops.fastrnn.layer(*{**small_arguments(), **change}.values(), *PLAIN, ALL, False)


def test_saved_tensors_that_do_not_fit_are_refused():
    arguments = small_arguments()
    y, final, _, saved = torch.ops.fastrnn.layer(*arguments.values(), *PLAIN, ALL, False)
    cell, *inputs = arguments.values()
    for broken in (saved[:-1], [saved[0], saved[1][:-1], saved[2]], [t[:, :-1] for t in saved]):
        with pytest.raises(RuntimeError):
            torch.ops.fastrnn.layer_backward(
                cell, y, final, [], *inputs, *PLAIN, broken, True, True, 0
            )


@pytest.mark.parametrize("sizes", [torch.full((1,), 3).expand(5), torch.full((5, 2), 3)[:, 1]])
def test_batch_sizes_of_any_layout(sizes):
    weights = [torch.randn(27, 4), torch.randn(27, 9)]
    x = torch.randn(15, 4)
    with use_path("loop"):
        ours, _ = fastrnn.functional.gru(x, None, weights, batch_sizes=sizes)
        right, _ = fastrnn.functional.gru(x, None, weights, batch_sizes=sizes.contiguous())
    assert torch.equal(ours, right)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_saved_tensors_of_any_layout(name):
    """As hooks that move them elsewhere may bring them back."""
    module = getattr(fastrnn, name)(8, 16, bidirectional=True)
    x = torch.randn(9, 3, 8)

    def gradients() -> tuple[Tensor, ...]:
        with use_path("loop"):
            y, _ = module(x)
        return torch.autograd.grad(y.square().sum(), list(module.parameters()))

    def pack(t: Tensor) -> Tensor:
        return t.t().contiguous() if t.dim() == 2 else t

    def unpack(t: Tensor) -> Tensor:
        return t.t() if t.dim() == 2 else t

    expected = gradients()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        moved = gradients()
    torch.testing.assert_close(moved, expected)


def test_the_default_dtype_does_not_matter():
    gru, x = fastrnn.GRU(8, 16), torch.randn(9, 3, 8)
    with use_path("loop"):
        expected = torch.autograd.grad(gru(x)[0].sum(), gru.weight_hh_l0)
        y, _ = gru(x)
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.equal(*torch.autograd.grad(y.sum(), gru.weight_hh_l0), *expected)
        finally:
            torch.set_default_dtype(torch.float32)


def test_negated_views():
    gru, x = fastrnn.GRU(8, 16), torch.randn(9, 3, 8)
    with torch.no_grad(), use_path("loop"):
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
        with use_path("loop"):
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
@pytest.mark.parametrize("cell", ["lstm", "rnn_tanh"])
def test_products_of_other_cpus_stay_in_registers(triple, cpu, target, sign, cell):
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        of = llvm.Target.from_triple(triple)
    except RuntimeError:
        pytest.skip(f"LLVM without {triple}")
    for_ = of.create_target_machine(cpu=cpu, opt=3)
    assembly = for_.emit_assembly(engine.optimized(cell, target, for_))
    blocks = re.split(r"^\.LBB\w+:", assembly, flags=re.MULTILINE)
    in_full_tile = {2 * target.tile_rows, 24}  # and as often in a turn of the loop
    products = [b for b in blocks if len(re.findall("vfmadd|fmla", b)) in in_full_tile]
    assert products
    for block in products:
        assert sign in block
        assert not re.search(r"\(%rsp|\[sp", block), "a spill"
