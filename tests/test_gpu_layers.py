"""Layers around the kernels, in the interpreter: CPU tensors with the plans of an H100."""

from __future__ import annotations

import pytest
import torch
from gpu_stand_in import as_on_a_gpu, check_dtypes, check_empty_batch, check_layers
from kernel_harness import MODES, as_on_a_device
from test_ops import make

import fastrnn
from fastrnn import gpu, ops, planner, reference
from fastrnn.call import Call
from fastrnn.cells import CELLS
from fastrnn.cpu import ALL, NOTHING, STATES
from fastrnn.flow import Flow, make_marks
from fastrnn.planner import use_path

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here; test_gpu.py runs them"
)

POINTWISE = [name for name, cell in CELLS.items() if cell.is_pointwise]
FLOAT32 = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _as_on_a_gpu():
    # The interpreter multiplies in float32 regardless of the precision.
    with as_on_a_gpu(precision="tf32x3"), as_on_a_device():
        yield


@pytest.fixture
def _in_tf32(_as_on_a_gpu):
    """The interpreter rounds operands to TF32; larger sizes fit resident kernels in it."""
    with as_on_a_gpu(precision="tf32"):
        yield


def gradients(outputs, leaves):
    """Gradients for the same random cotangents in every dtype."""
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outputs]
    return torch.autograd.grad(outputs, leaves, cotangents)


def in_float64(cell, tensors, directions):
    """Outputs and gradients from the reference; `tensors` are x, state and weights."""
    x, *_ = tensors
    leaves = [
        [t.detach().double().requires_grad_() for t in group] for group in ([x], *tensors[1:])
    ]
    (x,), state, weights = leaves
    y, final, _ = reference.layer(Call(CELLS[cell], x, state, weights, None, directions == 2))
    return [y, *final], gradients([y, *final], [t for group in leaves for t in group])


def check(actual, exact):
    for ours, truth in zip(actual, exact, strict=True):
        assert ours.dtype == torch.float32
        scale = max(1.0, truth.abs().max().item())
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=64 * FLOAT32 * scale)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", POINTWISE)
def test_outputs_and_gradients(cell, directions, bias, recompute):
    x, state, weights, _ = make(cell, directions, bias=bias, dtype=torch.float32)
    exact, exact_grads = in_float64(cell, (x, state, weights), directions)
    y, final, _ = ops.layer(
        Call(CELLS[cell], x, state, weights, None, directions == 2), recompute=recompute
    )
    check([y, *final], exact)
    check(gradients([y, *final], [x, *state, *weights]), exact_grads)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_marks_and_traces(cell, recompute):
    x, state, weights, _ = make(cell, 2, dtype=torch.float32)
    fresh = [torch.randn_like(part).requires_grad_() for part in state]
    marks = make_marks(5, 3, 2, x.device, torch.tensor([5, 0, 3]), torch.rand(5, 3) < 0.4, 2)
    ours, exact = [], []
    for found, layer, dtype, options in (
        (ours, ops.layer, torch.float32, {"traced": True, "recompute": recompute}),
        (exact, reference.layer, torch.float64, {}),
    ):
        a, b, c, d = (
            [t.detach().to(dtype).requires_grad_() for t in group]
            for group in ([x], state, weights, fresh)
        )
        y, final, traces = layer(Call(CELLS[cell], *a, b, c, None, True, Flow(marks, d)), **options)
        outputs = [y, *final, *traces]
        found += [*outputs, *gradients(outputs, [*a, *b, *c, *d])]
    check(ours, exact)


@pytest.mark.usefixtures("_in_tf32")
@pytest.mark.parametrize("schedule", MODES)
def test_use_path_takes_a_schedule(schedule):
    check_layers(schedule, atol=2e-3)


def test_a_schedule_that_cannot_run_is_refused():
    with (
        use_path("resident"),
        pytest.raises(
            ValueError, match=r"no resident schedule for lstm, B=1, H=4000, torch\.float32"
        ),
    ):
        fastrnn.LSTM(1, 4000)(torch.randn(1, 1, 1))


@pytest.mark.parametrize("cls", [fastrnn.LSTMCell, fastrnn.GRUCell, fastrnn.RNNCell])
def test_cell_modules(cls):
    cell, x = cls(3, 5), torch.randn(4, 3, requires_grad=True)
    results = []
    for path in ("kernels", "reference"):
        with use_path(path):
            new = cell(x)
            h = new[-1] if isinstance(new, tuple) else new
            grads = torch.autograd.grad(h.square().sum(), [x, *cell.parameters()])
        results.append([h, *grads])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("batch_sizes", [[3, 3, 1], [2, 2]], ids=str)
def test_packed_sequences_and_float64_run_without_kernels(batch_sizes):
    sizes = torch.tensor(batch_sizes)
    weights = make("lstm", 1, dtype=torch.float64)[2]
    x = torch.randn(int(sizes.sum()), 3, dtype=torch.float64, requires_grad=True)
    state = [x.new_zeros(1, batch_sizes[0], 4)] * 2
    results = []
    for layer in (ops.layer, reference.layer):
        for recompute in (False, True)[: 1 + (layer is ops.layer)]:
            options = {"recompute": True} if recompute else {}
            y, final, _ = layer(Call(CELLS["lstm"], x, state, weights, sizes), **options)
            results.append([y, *final, *gradients([y, *final], [x, *weights])])
    for ours in results[:-1]:
        for a, b in zip(ours, results[-1], strict=True):
            torch.testing.assert_close(a, b)


def test_projection_runs_without_kernels():
    lstm, x = fastrnn.LSTM(3, 6, proj_size=2), torch.randn(5, 2, 3)
    with use_path("reference"):
        expected, _ = lstm(x)
    with use_path("kernels"):
        y, _ = lstm(x)
        y.sum().backward()
    torch.testing.assert_close(y, expected)


@pytest.mark.usefixtures("_in_tf32")
@pytest.mark.parametrize("schedule", MODES)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_empty_batch(cell, schedule):
    check_empty_batch(cell, schedule)


def test_strides_of_inputs_do_not_matter():
    x, state, weights, _ = make("gru", 2, dtype=torch.float32)
    expected, *_ = ops.layer(Call(CELLS["gru"], x, state, weights, None, True))
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    weights = [w.t().contiguous().t() if w.dim() == 2 else w for w in weights]
    state = [s.transpose(1, 2).contiguous().transpose(1, 2) for s in state]
    y, *_ = ops.layer(Call(CELLS["gru"], x, state, weights, None, True))
    torch.testing.assert_close(y, expected, rtol=0, atol=2 * FLOAT32)
    dy = torch.ones(1, 1, 1).expand(y.shape)  # strides of 0
    grads = torch.autograd.grad(y, [x, *weights], dy, retain_graph=True)
    again = torch.autograd.grad(y, [x, *weights], dy.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


@pytest.mark.parametrize("save", [NOTHING, STATES, ALL])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", POINTWISE)
def test_fake_tensors_are_those_of_the_kernels(cell, directions, save):
    x, state, weights, _ = make(cell, directions, dtype=torch.float32)
    with torch.no_grad():
        call = Call(CELLS[cell], x, state, weights, None, directions == 2)
        _, saved = gpu.forward(call, save, False)
    fake = gpu.fake_saved(call, save)
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in saved]


def test_recompute_keeps_less():
    x, state, weights, _ = make("lstm", 1, dtype=torch.float32)
    kept = {}
    for save in (NOTHING, STATES, ALL):
        with torch.no_grad():
            _, saved = gpu.forward(Call(CELLS["lstm"], x, state, weights), save, False)
        kept[save] = sum(t.numel() for t in saved)
    rows, hidden = x.shape[0] * x.shape[1], 4
    assert kept == {NOTHING: 0, STATES: rows * hidden, ALL: 5 * rows * hidden}


def test_second_derivatives():
    x, state, weights, _ = make("gru", 1, dtype=torch.float32)
    results = []
    for layer in (ops.layer, reference.layer):
        y, *_ = layer(Call(CELLS["gru"], x, state, weights))
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), [x, *weights]))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_torchs_own_products_are_as_exact_and_the_switch_is_restored(precision, monkeypatch):
    matmul = torch.backends.cuda.matmul
    before, seen = matmul.fp32_precision, []
    problem_of = planner.problem_of
    monkeypatch.setattr(
        planner, "problem_of", lambda call: problem_of(call)._replace(precision=precision)
    )
    monkeypatch.setattr(
        torch,
        "addmm",
        lambda *a, addmm=torch.addmm, **k: seen.append(matmul.fp32_precision) or addmm(*a, **k),
    )
    x, state, weights, _ = make("gru", 1, dtype=torch.float32)
    with torch.no_grad(), use_path("stepwise"):
        gpu.forward(Call(CELLS["gru"], x, state, weights), NOTHING, False)
    assert set(seen) <= ({"tf32"} if precision == "tf32" else {"ieee", "none"})
    assert seen
    assert matmul.fp32_precision == before


def test_float32_precision_follows_torchs_switches():
    cudnn, matmul = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = cudnn.fp32_precision, matmul.fp32_precision
    found = {}
    try:
        for rnn in ("tf32", "ieee"):
            for product in ("tf32", "ieee"):
                cudnn.fp32_precision, matmul.fp32_precision = rnn, product
                found[rnn, product] = fastrnn.devices.float32_precision()
    finally:
        cudnn.fp32_precision, matmul.fp32_precision = before
    assert found == {
        ("tf32", "tf32"): "tf32",
        ("tf32", "ieee"): "tf32",
        ("ieee", "tf32"): "tf32x3",
        ("ieee", "ieee"): "ieee",
    }


@pytest.mark.parametrize("schedule", MODES)
def test_gradients_have_the_dtypes_that_compilers_expect(schedule):
    check_dtypes(schedule)
