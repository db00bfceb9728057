"""torch.func: vmap, per-sample gradients, ensembles, Jacobians, Hessians; forward mode."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn import ops
from fastrnn.planner import use_path

MODULES = {
    "lstm": (fastrnn.LSTM, {}),
    "lstm_proj": (fastrnn.LSTM, {"proj_size": 2}),
    "lstm_deep": (fastrnn.LSTM, {"bidirectional": True, "num_layers": 2}),
    "gru": (fastrnn.GRU, {}),
    "gru_deep": (fastrnn.GRU, {"bidirectional": True, "num_layers": 2}),
    "rnn": (fastrnn.RNN, {}),
    "rnn_identity": (fastrnn.RNN, {"nonlinearity": "identity"}),
}


@pytest.fixture(params=MODULES)
def module(request):
    cls, options = MODULES[request.param]
    torch.manual_seed(0)
    return cls(3, 4, dtype=torch.float64, **options)


@pytest.fixture
def reset():
    return torch.rand(5, 6, generator=torch.Generator().manual_seed(1)) < 0.3


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def loss(module, params, x, **options):
    y, hx = functional_call(module, params, (x,), options)
    return sum((part**2).sum() for part in (y, *tree_leaves(hx)))


def check(ours, exact):
    ours, exact = tree_leaves(ours), tree_leaves(exact)
    assert len(ours) == len(exact)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def eager_gradients(module, x, **options):
    return torch.autograd.grad(loss(module, {}, x, **options), list(module.parameters()))


def stacked(rows):
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def test_over_inputs_is_one_call_of_a_larger_batch(module, monkeypatch):
    calls = []
    kernel = fastrnn.cpu.forward

    def count(call, *rest):
        calls.append(call.batch)
        return kernel(call, *rest)

    monkeypatch.setattr(fastrnn.cpu, "forward", count)
    x = normal(4, 5, 2, 3)
    y = vmap(lambda x: module(x)[0])(x)
    assert calls == [4 * 2] * module.num_layers
    check(y, torch.stack([module(part)[0] for part in x]))
    check(vmap(vmap(lambda x: module(x)[0]))(x[None]), y[None])
    check(
        vmap(lambda x: module(x)[0], in_dims=2)(x), torch.stack([module(p)[0] for p in x.unbind(2)])
    )


def test_over_states_lengths_and_resets(module, reset):
    x, lengths = normal(5, 6, 3), torch.tensor([[5, 3, 0, 1, 2, 5], [1, 1, 4, 5, 0, 2]])

    def run(x, lengths, reset):
        y, hx, states = module(x, lengths=lengths, reset=reset, return_states=True, bptt=2)
        return y, *tree_leaves(hx), states.h

    ours = vmap(run, in_dims=(None, 0, None))(x, lengths, reset)
    check(ours, stacked([run(x, part, reset) for part in lengths]))
    ours = vmap(run, in_dims=(None, None, 2))(x, lengths[0], torch.stack([reset, ~reset], dim=2))
    check(ours, stacked([run(x, lengths[0], part) for part in (reset, ~reset)]))


@pytest.mark.parametrize("with_options", [False, True])
def test_per_sample_gradients(module, reset, with_options):
    params, x = dict(module.named_parameters()), normal(5, 6, 3)
    lengths = torch.tensor([5, 3, 0, 1, 2, 5])

    def options(b):
        if not with_options:
            return {}
        return {
            "lengths": torch.tensor([5, 3, 0, 1, 2, 5])[b : b + 1],
            "reset": reset[:, b : b + 1],
        }

    def one(params, x, lengths, reset):
        given = {"lengths": lengths[None], "reset": reset[:, None]} if with_options else {}
        return loss(module, params, x[:, None], **given)

    ours = vmap(grad(one), in_dims=(None, 1, 0, 1))(params, x, lengths, reset)
    each = [eager_gradients(module, x[:, b : b + 1], **options(b)) for b in range(6)]
    check(ours, stacked(each))


def test_ensembles(module):
    cls, x = type(module), normal(5, 2, 3)
    names = ("bidirectional", "num_layers", "proj_size")
    options = {k: getattr(module, k) for k in names if getattr(module, k)}
    if module.mode == "RNN_IDENTITY":
        options["nonlinearity"] = "identity"
    models = [cls(3, 4, dtype=torch.float64, **options) for _ in range(3)]
    params, _ = stack_module_state(models)
    y = vmap(lambda params, x: functional_call(module, params, (x,))[0], (0, None))(params, x)
    check(y, torch.stack([model(x)[0] for model in models]))
    ours = vmap(grad(lambda params, x: loss(module, params, x)), (0, None))(params, x)
    check(ours, stacked([eager_gradients(model, x) for model in models]))
    xs = normal(3, 5, 2, 3)
    y = vmap(lambda params, x: functional_call(module, params, (x,))[0])(params, xs)
    check(y, torch.stack([model(x)[0] for model, x in zip(models, xs, strict=True)]))


def test_results_of_ensembles_may_be_written_to():
    models = [fastrnn.LSTM(3, 4, bidirectional=True, dtype=torch.float64) for _ in range(3)]
    params, _ = stack_module_state(models)
    x = normal(5, 2, 3).requires_grad_()
    run = vmap(lambda params, x: functional_call(models[0], params, (x,)), (0, None))
    y, (h, _) = run(params, x)
    y.mul_(2.0)
    h.add_(1.0)
    results = [model(x) for model in models]
    right = sum((2.0 * y).sum() + (h + 1.0).square().sum() for y, (h, _) in results)
    found = torch.autograd.grad(y.sum() + h.square().sum(), [x, *params.values()])
    exact = torch.autograd.grad(right, [x, *(p for model in models for p in model.parameters())])
    of_members = [torch.stack(exact[k :: len(params)]) for k in range(1, 1 + len(params))]
    check(found, (exact[0], *of_members))


@pytest.mark.parametrize("path", ["kernels", "operators"])
@pytest.mark.parametrize("cls", [fastrnn.GRU, fastrnn.LayerNormGRU, fastrnn.ResetBeforeGRU])
def test_per_sample_gradients_of_ensembles(cls, path):
    """Each member has several parts of the batch, each with its own weight gradients."""
    models = [cls(3, 4, num_heads=2, dtype=torch.float64) for _ in range(2)]
    params, _ = stack_module_state(models)
    params = {name: part.detach() for name, part in params.items()}
    xs = normal(2, 3, 4, 5, 3)
    one = grad(lambda params, x: loss(models[0], params, x))
    right = [
        [eager_gradients(model, x) for x in own] for model, own in zip(models, xs, strict=True)
    ]
    with use_path(path):
        check(vmap(vmap(one, (None, 0)))(params, xs), stacked([stacked(each) for each in right]))
        of_members = vmap(vmap(one, (0, None)), (None, 0))(params, xs[0])
    right = [stacked([eager_gradients(model, x) for model in models]) for x in xs[0]]
    check(of_members, stacked(right))


def test_jacobians(module):
    x = normal(4, 1, 3)

    def run(x):
        return module(x)[0]

    exact = torch.autograd.functional.jacobian(run, x)
    check(jacrev(run)(x), exact)
    check(jacfwd(run)(x), exact)


def test_hessians_and_their_products(module):
    params, x = dict(module.named_parameters()), normal(3, 2, 3)
    v = {k: torch.randn_like(p) for k, p in params.items()}

    def of(params):
        return loss(module, params, x)

    first = torch.autograd.grad(of(params), list(params.values()), create_graph=True)
    dot = sum((a * b).sum() for a, b in zip(first, v.values(), strict=True))
    exact = torch.autograd.grad(dot, list(params.values()))
    check(jvp(grad(of), (params,), (v,))[1], exact)
    check(vjp(grad(of), params)[1](v), exact)
    check(grad(lambda p: sum((a * v[k]).sum() for k, a in grad(of)(p).items()))(params), exact)

    def of_x(x):
        return loss(module, params, x)

    x = x[:2, :1]
    exact = torch.autograd.functional.hessian(of_x, x)
    for transform in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f))):
        check(transform(of_x)(x), exact)


def test_gradients_of_per_sample_gradients(module):
    """As in per-sample gradient penalties and meta-learning."""
    params, x = dict(module.named_parameters()), normal(3, 4, 3)

    def penalty(params, x):
        return sum((g**2).sum() for g in grad(lambda p: loss(module, p, x))(params).values())

    def total(params):
        return vmap(penalty, in_dims=(None, 1))(params, x[:, :, None]).sum()

    ours = grad(total)(params)
    exact = 0.0
    for b in range(4):
        grads = torch.autograd.grad(
            loss(module, {}, x[:, b : b + 1]), list(module.parameters()), create_graph=True
        )
        exact = exact + sum((g**2).sum() for g in grads)
    check(ours, torch.autograd.grad(exact, list(module.parameters())))
    each = vmap(grad(penalty), in_dims=(None, 1))(params, x[:, :, None])
    check({k: g.sum(0) for k, g in each.items()}, ours)


def test_forward_mode_without_transforms(module):
    x, v = normal(4, 2, 3), normal(4, 2, 3)
    with forward_ad.dual_level():
        y, _ = module(forward_ad.make_dual(x, v))
        _, tangent = forward_ad.unpack_dual(y)
    check(tangent, jvp(lambda x: module(x)[0], (x,), (v,))[1])
    step = 1e-6
    central = (module(x + step * v)[0] - module(x - step * v)[0]) / (2 * step)
    torch.testing.assert_close(tangent, central, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cls", [fastrnn.LSTMCell, fastrnn.GRUCell, fastrnn.RNNCell])
def test_cells(cls):
    cell = cls(3, 4, dtype=torch.float64)
    params, x = dict(cell.named_parameters()), normal(5, 3)
    state = (normal(5, 4), normal(5, 4)) if cls is fastrnn.LSTMCell else normal(5, 4)

    def run(params, x, hx):
        return sum((part**2).sum() for part in tree_leaves(functional_call(cell, params, (x, hx))))

    ours = vmap(grad(run), in_dims=(None, 0, 0))(params, x, state)
    each = []
    for b in range(5):
        hx = tuple(s[b] for s in state) if isinstance(state, tuple) else state[b]
        each.append(torch.autograd.grad(run({}, x[b], hx), list(cell.parameters())))
    check(ours, stacked(each))
    check(jacfwd(run, 1)(params, x, state), jacrev(run, 1)(params, x, state))


def test_cells_by_torch_outside_of_transforms():
    """Ordinary calls are not routed through torch."""
    assert ops.transform() is None
    with forward_ad.dual_level():
        assert ops.transform() == "forward"
    assert vmap(lambda x: x * (ops.transform() == "func"))(torch.ones(2)).all()


def test_a_call_of_which_nothing_is_mapped():
    """It runs once, and its result is not mapped either."""
    module, context, rows = fastrnn.GRU(8, 16), torch.randn(20, 2, 8), torch.randn(5, 3)
    mapped, once = torch.func.vmap(lambda row: (row + 1, module(context)[0]), out_dims=(0, None))(
        rows
    )
    assert mapped.shape == rows.shape
    torch.testing.assert_close(once, module(context)[0])
