"""The operators: against the oracle, opcheck, autograd of every order, compilers."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
from compare import call_of
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import reference
from fastrnn.cells import CELLS
from fastrnn.cpu import ALL, NOTHING, STATES
from fastrnn.flow import PLAIN
from fastrnn.planner import use_path

layer_op = torch.ops.fastrnn.layer
BATCH_SIZES = torch.tensor([3, 3, 2, 1, 1])
CONFIGS = [
    pytest.param(cell, directions, bias, packed, projected, id="-".join(parts))
    for cell, directions, bias, packed, projected in itertools.product(
        CELLS, (1, 2), (False, True), (False, True), (False, True)
    )
    if cell == "lstm" or not projected
    for parts in [
        [cell, f"d{directions}", "bias" * bias, "packed" * packed, "projected" * projected]
    ]
]


def make(cell, directions, *, bias=True, packed=False, projected=False, dtype=torch.float64):
    """Random x, state, weights and batch_sizes; T=5, B=3, I=3, H=4, P=2."""
    n_gates, inputs, hidden = CELLS[cell].n_gates, 3, 4
    size_h = 2 if projected else hidden
    shapes = [(n_gates * hidden, inputs), (n_gates * hidden, size_h)]
    shapes += [(n_gates * hidden,)] * 2 * bias + [(size_h, hidden)] * projected
    shapes += [(extra.blocks * hidden,) for extra in CELLS[cell].extras]

    def leaf(*shape):
        return (torch.randn(*shape, dtype=dtype) * 0.5).requires_grad_()

    x = leaf(10, inputs) if packed else leaf(5, 3, inputs)
    state = [leaf(directions, 3, size_h)]
    state += [leaf(directions, 3, hidden) for _ in range(CELLS[cell].n_states - 1)]
    # The divisor of an sLSTM is at least 1.
    state[2:3] = [(part.detach().abs() + 1).requires_grad_() for part in state[2:3]]
    weights = [leaf(*shape) for _ in range(directions) for shape in shapes]
    return x, state, weights, BATCH_SIZES if packed else None


def gradients(outputs, leaves, *, create_graph=False):
    """Gradients for fixed cotangents; those with create_graph can be differentiated again."""
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
    return torch.autograd.grad(outputs, leaves, cotangents, create_graph=create_graph)


@pytest.mark.parametrize(("cell", "directions", "bias", "packed", "projected"), CONFIGS)
def test_layer_first_and_second_derivatives(cell, directions, bias, packed, projected):
    x, state, weights, sizes = make(cell, directions, bias=bias, packed=packed, projected=projected)
    leaves = [x, *state, *weights]
    results = []
    for function in (fastrnn.ops.layer, reference.layer):
        y, final, _ = function(call_of(cell, x, state, weights, sizes, directions == 2))
        first = gradients([y, *final], leaves, create_graph=True)
        squares = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(squares, leaves, allow_unused=True)
        results.append([y, *final, *first, *second])
    for ours, exact in zip(*results, strict=True):
        exact = torch.zeros_like(ours) if exact is None else exact
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.sweep(7)
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell):
    x, state, weights, _ = make(cell, 2, dtype=torch.float32)
    torch.library.opcheck(layer_op, (cell, x, state, weights, None, True, *PLAIN, ALL, False))
    torch.library.opcheck(layer_op, (cell, x, [], weights, None, True, *PLAIN, NOTHING, False))
    one, own = [part[:1].detach().requires_grad_() for part in state], weights[: len(weights) // 2]
    step = (cell, x[:1].detach(), one, own, None, False)
    torch.library.opcheck(layer_op, (*step, *PLAIN, ALL, False))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_opcheck_packed_and_half(cell):
    x, state, weights, sizes = make(cell, 1, packed=True, projected=cell == "lstm")
    torch.library.opcheck(layer_op, (cell, x, state, weights, sizes, False, *PLAIN, ALL, False))
    x, state, weights, _ = make(cell, 1, dtype=torch.bfloat16)
    torch.library.opcheck(layer_op, (cell, x, state, weights, None, False, *PLAIN, ALL, False))


@pytest.mark.sweep(7)
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck_strided(cell):
    """Results have the strides that the fake kernels promise, for any strides of the input."""
    x, state, weights, _ = make(cell, 1, dtype=torch.float32)
    turned = x.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0)[:, :1].requires_grad_()
    state = [part.detach().expand(1, 3, 4)[:, :1].requires_grad_() for part in state]
    torch.library.opcheck(layer_op, (cell, turned, state, weights, None, False, *PLAIN, ALL, False))
    step = x[:, 0].detach().t().contiguous().t()[None].requires_grad_()
    one = [part.detach().new_zeros(4, 5).t()[None].requires_grad_() for part in state]
    torch.library.opcheck(layer_op, (cell, step, one, weights, None, False, *PLAIN, ALL, False))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("packed", [False, True])
def test_results_may_be_overwritten_before_backward(cell, packed):
    x, state, weights, sizes = make(cell, 2, packed=packed)
    leaves, grads = [x, *state, *weights], []
    for spoil in (False, True):
        y, final, _ = fastrnn.ops.layer(call_of(cell, x, state, weights, sizes, True))
        # The products are new tensors, so y and final may change afterwards.
        loss = sum((t * 1).square().sum() for t in (y, *final))
        if spoil:
            for t in (y, *final):
                t.zero_()
        grads.append(torch.autograd.grad(loss, leaves))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cell", CELLS)
def test_new_state_may_be_overwritten_before_backward(cell):
    x, state, weights, _ = make(cell, 1)
    inputs = (x[0].detach(), [part[0] for part in state], weights)
    grads = []
    for spoil in (False, True):
        new = fastrnn.ops.cell_step(call_of(cell, *inputs))
        loss = sum((t * 1).square().sum() for t in new)
        assert not any(t._is_view() for t in new), "views cannot be detached in place"
        if spoil:
            for t in new:
                t.zero_()
        grads.append(torch.autograd.grad(loss, [*state, *weights]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cell", CELLS)
def test_batched_gradients(cell):
    """Many cotangents at once: vmap over the backward operator."""
    x, state, weights, _ = make(cell, 2)
    leaves = [x, *state, *weights]
    y, *_ = fastrnn.ops.layer(call_of(cell, x, state, weights, None, True))
    cotangents = torch.randn(3, *y.shape, dtype=y.dtype)
    batched = torch.autograd.grad(y, leaves, cotangents, retain_graph=True, is_grads_batched=True)
    singly = [torch.autograd.grad(y, leaves, c, retain_graph=True) for c in cotangents]
    for ours, each in zip(batched, zip(*singly, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(each))


@pytest.mark.parametrize("nonlinearity", ["tanh", "identity"])
def test_forward_mode(nonlinearity):
    """Tangents are not lost on the path that a training call of this length takes."""
    rnn = fastrnn.RNN(3, 4, nonlinearity=nonlinearity).double()
    x = torch.randn(60, 2, 3, dtype=torch.float64, requires_grad=True)
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        dual = rnn(forward_ad.make_dual(x, tangent))[0]
        ours = forward_ad.unpack_dual(dual).tangent
    cotangent = torch.randn_like(ours)
    (dx,) = torch.autograd.grad(rnn(x)[0], x, cotangent)
    torch.testing.assert_close((ours * cotangent).sum(), (dx * tangent).sum())


def test_forward_mode_of_the_backward_pass_alone():
    gru = fastrnn.GRU(3, 4).double()
    x = torch.randn(64, 2, 3, dtype=torch.float64, requires_grad=True)
    y = gru(x)[0]
    value, tangent = torch.randn_like(y), torch.randn_like(y)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(value, tangent)
        (dx,) = torch.autograd.grad(y, x, dual, retain_graph=True)
        ours = forward_ad.unpack_dual(dx).tangent
    torch.testing.assert_close(ours, torch.autograd.grad(y, x, tangent)[0])


@pytest.mark.parametrize("cell", CELLS)
def test_vmap_of_the_backward_pass(cell):
    x, state, weights, _ = make(cell, 1)
    y, *_ = fastrnn.ops.layer(call_of(cell, x, state, weights))
    cotangents = torch.randn(3, *y.shape, dtype=y.dtype)

    def pull_back(cotangent):
        return torch.autograd.grad(y, x, cotangent, retain_graph=True)[0]

    mapped = torch.func.vmap(pull_back)(cotangents)
    torch.testing.assert_close(mapped, torch.stack([pull_back(c) for c in cotangents]))


@pytest.mark.parametrize("nonlinearity", ["tanh", "identity"])
@pytest.mark.parametrize("path", [None, "kernels"])
def test_complex_gradients(nonlinearity, path):
    """The loop's formulas are for real numbers; complex numbers use autograd."""
    rnn = fastrnn.RNN(3, 4, nonlinearity=nonlinearity, dtype=torch.complex128)
    x = torch.randn(5, 2, 3, dtype=torch.complex128)
    grads = []
    for chosen in (path, "reference"):
        with fastrnn.planner.use_path(chosen):
            loss = rnn(x)[0].abs().sum()
        grads.append(torch.autograd.grad(loss, list(rnn.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.sweep(7)
@pytest.mark.parametrize("cell", CELLS)
def test_third_derivative(cell):
    x, _, weights, _ = make(cell, 1)

    def second(w_hh):
        y, *_ = fastrnn.ops.layer(call_of(cell, x.detach(), [], [weights[0], w_hh, *weights[2:]]))
        (g,) = torch.autograd.grad(y.pow(3).sum(), w_hh, create_graph=True)
        return g

    assert torch.autograd.gradgradcheck(second, (weights[1],))


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_gradient_without_saved_activations(cell):
    """Backward recomputes the activations that forward did not save."""
    x, state, weights, _ = make(cell, 1)
    results = [
        gradients(
            [layer_op(cell, x, state, weights, None, False, *PLAIN, save, False)[0]], [x, *weights]
        )
        for save in (ALL, STATES, NOTHING)
    ]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results, strict=True))


def test_unneeded_gradients_are_not_computed():
    x, _, weights, _ = make("gru", 1)
    with use_path("operators"):
        y = fastrnn.ops.layer(call_of("gru", x, [], [w.detach() for w in weights]))[0]
        node = y.grad_fn
        with torch.autograd.profiler.profile() as profile:
            y.sum().backward()
    assert node is not None
    shapes = [event.name for event in profile.function_events if event.name == "aten::mm"]
    per_step = x.shape[0]
    assert len(shapes) == per_step, "one product a step and none for the weights"
    assert all(w.grad is None for w in weights)


def test_saved_tensors_survive_two_backwards():
    x, state, weights, _ = make("gru", 2)
    y, *_ = fastrnn.ops.layer(call_of("gru", x, state, weights, None, True))
    once = torch.autograd.grad(y.sum(), [x, *weights], retain_graph=True)
    twice = torch.autograd.grad(y.sum(), [x, *weights])
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", CELLS)
def test_half_precision_is_rounded_once(cell, dtype):
    x, state, weights, _ = make(cell, 1, dtype=dtype)
    with use_path("operators"):  # kernels may round more, where the CPU multiplies the dtype
        y, final, _ = fastrnn.ops.layer(call_of(cell, x, state, weights))
    wide = [[t.detach().double() for t in ts] for ts in ([x], state, weights)]
    exact, *_ = reference.layer(call_of(cell, wide[0][0], wide[1], wide[2]))
    assert y.dtype == final[0].dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=1e-6)


class Net(torch.nn.Module):
    def __init__(self, cls, **options):
        super().__init__()
        self.rnn = cls(3, 4, num_layers=2, bidirectional=True, **options)
        self.head = torch.nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0]).relu()


@pytest.fixture
def compiling():
    torch._dynamo.reset()
    fastrnn.allow_compile()
    yield
    torch._dynamo.reset()


@pytest.fixture
def not_opted_in(monkeypatch):
    """Emulate a process that has not called ``allow_compile``."""
    from torch._dynamo.variables.builder import VariableBuilder

    wrapped = VariableBuilder.wrap_module
    monkeypatch.setattr(VariableBuilder, "wrap_module", getattr(wrapped, "__wrapped__", wrapped))
    fastrnn.compile._trace_forward(fastrnn.compile._eval_frame._FrameAction.SKIP)
    torch._dynamo.reset()
    yield
    if hasattr(wrapped, "_fastrnn"):
        fastrnn.compile._trace_forward(fastrnn.compile._eval_frame._FrameAction.DEFAULT)
    torch._dynamo.reset()


@pytest.mark.sweep(2)
@pytest.mark.parametrize("cls", [fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN])
def test_compile_fullgraph_with_dynamic_shapes(cls, compiling):
    net = Net(cls)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=counter)
    frames = 0
    for steps, batch in ((5, 2), (7, 3), (9, 4)):
        x = torch.randn(steps, batch, 3)
        with fastrnn.planner.use_path("kernels"):
            eager = net(x)
        grads = torch.autograd.grad(eager.sum(), list(net.parameters()))
        out = compiled(x)
        torch.testing.assert_close(out, eager)
        compiled_grads = torch.autograd.grad(out.sum(), list(net.parameters()))
        for a, b in zip(compiled_grads, grads, strict=True):
            torch.testing.assert_close(a, b)
        frames = frames or counter.frame_count
    assert counter.frame_count == frames > 0, "new sizes must not compile again"


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("cls", [fastrnn.LSTM, fastrnn.RNN])
def test_inductor_with_strided_input(cls, compiling):
    """Code generated around the operators relies on their strides, also of gradients."""
    net = Net(cls)
    x = torch.randn(3, 1, 6).permute(2, 1, 0).requires_grad_()
    with fastrnn.planner.use_path("kernels"):
        expected = net(x)
    leaves = [x, *net.parameters()]
    out = torch.compile(net, fullgraph=True)(x)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(y.square().sum(), leaves) for y in (out, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cls", [fastrnn.LSTMCell, fastrnn.GRUCell, fastrnn.RNNCell])
def test_compile_cell_fullgraph(cls):
    torch._dynamo.reset()
    cell, x = cls(3, 4), torch.randn(2, 3)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), cell(x))


@pytest.mark.parametrize("wrong", [0, 1])
def test_operator_refuses_a_state_of_another_batch(wrong):
    x, state, weights, batch_sizes = make("lstm", 1, packed=True)
    state[wrong] = torch.cat([state[wrong]] * 2, dim=1)
    with pytest.raises(RuntimeError, match="Expected hidden states of 3 rows, got 6"):
        layer_op("lstm", x, state, weights, batch_sizes, False, *PLAIN, ALL, False)


def test_compile_packed(compiling):
    gru = fastrnn.GRU(3, 4)
    packed = pack_padded_sequence(
        torch.randn(5, 3, 3), torch.tensor([5, 2, 3]), enforce_sorted=False
    )
    output, h_n = torch.compile(gru, fullgraph=True, backend="aot_eager")(packed)
    expected, h_expected = gru(packed)
    torch.testing.assert_close(output.data, expected.data)
    torch.testing.assert_close(h_n, h_expected)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("cls", [fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN])
def test_compile_packed_with_a_state(cls, compiling):
    module = cls(3, 4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")

    def state(batch):
        parts = torch.randn(2, 1, batch, 4)
        return tuple(parts) if cls is fastrnn.LSTM else parts[0]

    for lengths in ([5, 2, 3], [7, 7, 1, 4]):
        x, hx = torch.randn(max(lengths), len(lengths), 3), state(len(lengths))
        packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
        (output, final), (expected, final_expected) = compiled(packed, hx), module(packed, hx)
        torch.testing.assert_close(output.data, expected.data)
        torch.testing.assert_close(final, final_expected)
    with pytest.raises(RuntimeError, match="Expected hidden states of 2 rows, got 3"):
        compiled(pack_padded_sequence(x[:, :2], torch.tensor([5, 3])), state(3))


@pytest.mark.sweep(5)
@pytest.mark.parametrize("opted_in", [False, True])
@pytest.mark.parametrize("name", [*fastrnn.__all__[:6]])
def test_compile_a_transform(name, opted_in, request):
    from torch.func import functional_call, grad

    request.getfixturevalue("compiling" if opted_in else "not_opted_in")
    module, x = getattr(fastrnn, name)(3, 4), torch.randn(64, 3)
    params = {name: p.detach() for name, p in module.named_parameters()}

    def loss(params):
        result = functional_call(module, params, (x,))
        return result[0].square().sum() if isinstance(result, tuple) else result.square().sum()

    compiled = torch.compile(grad(loss), backend="aot_eager")(params)
    torch.testing.assert_close(compiled, grad(loss)(params))


def test_allow_compile_leaves_stock_modules_alone(compiling):
    fastrnn.allow_compile()  # a second call has no effect
    stock = torch.compile(torch.nn.GRU(3, 4), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        stock(torch.randn(5, 2, 3))


def test_compile_without_opting_in_is_as_with_torch(not_opted_in):
    """The graph breaks at the module, which then runs uncompiled."""
    x = torch.randn(64, 2, 3)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(Net(fastrnn.GRU), fullgraph=True, backend="aot_eager")(x)
    graphs = {}
    for cls in (fastrnn.GRU, torch.nn.GRU, fastrnn.LSTM, torch.nn.LSTM):
        torch._dynamo.reset()
        net = Net(cls)
        counter = CompileCounterWithBackend("aot_eager")
        torch.testing.assert_close(torch.compile(net, backend=counter)(x), net(x))
        graphs[cls] = [[node.target for node in graph.graph.nodes] for graph in counter.graphs]
    assert graphs[fastrnn.GRU] == graphs[torch.nn.GRU]
    assert graphs[fastrnn.LSTM] == graphs[torch.nn.LSTM]


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_operator_under_autocast(cell, low, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # oneDNN fuses the LSTM
    x, state, weights, _ = make(cell, 1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=low):
        y, final, _ = fastrnn.ops.layer(call_of(cell, x, state, weights))
        new = fastrnn.ops.cell_step(call_of(cell, x[0], [part[0] for part in state], weights))
    expected = low if cell == "rnn_tanh" else torch.float32
    assert {t.dtype for t in (y, *final, *new)} == {expected}
    gradients([y, *final], [x, *weights])


@pytest.mark.parametrize("nonlinearity", ["tanh", "identity"])
def test_functorch_grad_and_functional_call(nonlinearity):
    from torch.func import functional_call, grad

    rnn = fastrnn.RNN(3, 4, nonlinearity=nonlinearity).double()
    x = torch.randn(64, 2, 3, dtype=torch.float64)
    params = {k: v.detach() for k, v in rnn.named_parameters()}

    def loss(params):
        return functional_call(rnn, params, x)[0].square().sum()

    transformed = grad(loss)(params)
    exact = torch.autograd.grad(rnn(x)[0].square().sum(), list(rnn.parameters()))
    for a, b in zip(transformed.values(), exact, strict=True):
        torch.testing.assert_close(a, b)
