"""Cell modules torch.nn does not provide, against their layers and explicit formulas."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from test_variants import VARIANTS, as_hx, assert_equal, gradients, states, step
from test_variants import make as make_layer
from torch.func import functional_call, grad, jvp, stack_module_state, vjp, vmap

import fastrnn
from fastrnn import reference
from fastrnn.functional import step as run_step
from fastrnn.planner import use_path

CELLS = {kind: getattr(fastrnn, f"{cls.__name__}Cell") for kind, cls in VARIANTS.items()}
PATHS = (None, "kernels", "operators", "reference")


def make(kind: str, bias: bool = True):
    """A cell module with the weights of the layer from `make_layer`, and that layer."""
    layer = make_layer(kind, bias=bias)
    cell = CELLS[kind](3, 4, bias, dtype=torch.float64)
    cell.load_state_dict({n.removesuffix("_l0"): p for n, p in layer.state_dict().items()})
    return cell, layer


def flat(state) -> list[torch.Tensor]:
    return list(state) if isinstance(state, tuple) else [state]


def arguments(layer, batch: int = 3):
    """Input and states of a step."""
    x = torch.randn(batch, 3, dtype=torch.float64, requires_grad=True)
    return x, [part.detach()[0].requires_grad_() for part in states(layer, batch)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("kind", CELLS)
def test_against_the_formula_and_the_layer(kind, bias, path):
    cell, layer = make(kind, bias)
    x, hx = arguments(layer)
    leaves = [x, *hx, *cell.parameters()]
    with use_path(path):
        ours = flat(cell(x, as_hx(hx)))
    theirs = step(kind, x, hx, dict(cell.named_parameters()))
    assert_equal(ours, theirs)
    assert_equal(gradients(ours, leaves), gradients(theirs, leaves))
    with use_path(path):
        _, final = layer(x[None], as_hx([part[None] for part in hx]))
        assert_equal(ours, [part[0] for part in flat(final)])
        with torch.no_grad():
            for _ in range(2):  # prepared the second time
                assert_equal(flat(cell(x, as_hx(hx))), ours)
                assert_equal(
                    flat(cell(x)),
                    step(kind, x, [part * 0 for part in hx], dict(cell.named_parameters())),
                )


@pytest.mark.parametrize("kind", CELLS)
def test_a_loop_is_the_layer(kind):
    cell, layer = make(kind)
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    state, outputs = None, []
    for x_t in x:
        state = cell(x_t, state)
        outputs.append(flat(state)[0])
    y, final = layer(x)
    assert_equal([torch.stack(outputs), *flat(state)], [y, *(part[0] for part in flat(final))])
    ours = torch.autograd.grad(torch.stack(outputs).square().sum(), list(cell.parameters()))
    theirs = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
    assert_equal(ours, theirs)


@pytest.mark.parametrize("kind", CELLS)
def test_one_row_without_a_batch(kind):
    cell, layer = make(kind)
    x, hx = arguments(layer, 1)
    alone = flat(cell(x[0], as_hx([part[0] for part in hx])))
    assert_equal(alone, [part[0] for part in flat(cell(x, as_hx(hx)))])
    assert_equal(flat(cell(x[0])), [part[0] for part in flat(cell(x))])
    assert [part.shape for part in flat(cell(x[:0], as_hx([part[:0] for part in hx])))] == [
        (0, 4) for _ in hx
    ]


@pytest.mark.parametrize("path", ["kernels", "reference"])
@pytest.mark.parametrize("kind", CELLS)
def test_derivatives(kind, path):
    cell, layer = make(kind)
    x, hx = arguments(layer, 2)
    weights, count = list(cell.parameters()), len(hx)

    def function(x, *rest):
        return tuple(run_step(kind, x, rest[:count], list(rest[count:])))

    with use_path(path):
        assert torch.autograd.gradcheck(function, (x, *hx, *weights), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (x, *hx, *weights), fast_mode=True)


@pytest.mark.parametrize("kind", CELLS)
def test_transforms(kind):
    cell, layer = make(kind)
    xs = torch.randn(2, 3, 3, dtype=torch.float64)
    each = [[part.detach() for part in arguments(layer)[1]] for _ in xs]
    hxs = [torch.stack(parts) for parts in zip(*each, strict=True)]
    params = {name: p.detach() for name, p in cell.named_parameters()}
    module = as_function(cell)

    mapped = vmap(lambda x, *hx: module(params, x, *hx))(xs, *hxs)
    rows = [flat(cell(x, as_hx(hx))) for x, hx in zip(xs, each, strict=True)]
    assert_equal(mapped, [torch.stack(parts) for parts in zip(*rows, strict=True)])

    members = [cell, make(kind)[0]]
    with torch.no_grad():
        for p in members[1].parameters():
            p.mul_(1.5)
    stacked, _ = stack_module_state(members)
    stacked = {name: p.detach() for name, p in stacked.items()}
    for own in (False, True):
        found = vmap(module, (0, 0 if own else None, *[0] * len(hxs)))(
            stacked, xs if own else xs[0], *hxs
        )
        rows = [
            flat(member(x if own else xs[0], as_hx(hx)))
            for member, x, hx in zip(members, xs, each, strict=True)
        ]
        assert_equal(found, [torch.stack(parts) for parts in zip(*rows, strict=True)])

    def loss(params, x, *hx):
        return sum(part.square().sum() for part in module(params, x, *hx))

    by_sample = vmap(grad(loss), (None, 0, *[0] * len(hxs)))(params, xs, *hxs)
    for k, (x, hx) in enumerate(zip(xs, each, strict=True)):
        total = sum(part.square().sum() for part in flat(cell(x, as_hx(hx))))
        expected = torch.autograd.grad(total, list(cell.parameters()))
        assert_equal([by_sample[name][k] for name in params], expected)

    _, tangents = jvp(lambda x: module(params, x, *each[0]), (xs[0],), (xs[1],))
    _, pull_back = vjp(lambda x: module(params, x, *each[0]), xs[0])
    squares = sum(part.square().sum() for part in tangents)
    assert_equal([squares], [(pull_back(tangents)[0] * xs[1]).sum()])


def as_function(cell):
    """The cell as a function of its weights, input and states, to a tuple."""
    return lambda params, x, *hx: tuple(flat(functional_call(cell, params, (x, as_hx(list(hx))))))


@pytest.mark.sweep(3)
@pytest.mark.parametrize("kind", CELLS)
def test_compile(kind):
    torch._dynamo.reset()
    cell, layer = make(kind)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    x, hx = arguments(layer)
    leaves = [x, *hx, *cell.parameters()]
    ours, theirs = flat(compiled(x, as_hx(hx))), flat(cell(x, as_hx(hx)))
    assert_equal(ours, theirs)
    assert_equal(gradients(ours, leaves), gradients(theirs, leaves))
    with torch.no_grad():
        assert_equal(flat(compiled(x[0])), flat(cell(x[0])))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", CELLS)
def test_torch_jit(kind):
    cell, layer = make(kind)
    x, hx = arguments(layer)
    traced = torch.jit.trace(cell.requires_grad_(False), (x, as_hx(hx)))
    x, hx = arguments(layer, 5)
    assert_equal(flat(traced(x, as_hx(hx))), flat(cell(x, as_hx(hx))))


@pytest.mark.parametrize("kind", CELLS)
def test_module(kind):
    cell, layer = make(kind, bias=False)
    x, hx = arguments(layer)
    expected = flat(cell(x, as_hx(hx)))
    assert isinstance(cell, torch.nn.RNNCellBase)
    assert not isinstance(cell, (torch.nn.LSTMCell, torch.nn.GRUCell))
    assert not hasattr(cell, "to_torch")
    assert repr(cell) == f"{CELLS[kind].__name__}(3, 4, bias=False)"
    assert list(cell.state_dict()) == [n.removesuffix("_l0") for n in layer.state_dict()]
    buffer = io.BytesIO()
    torch.save(cell, buffer)
    buffer.seek(0)
    empty = CELLS[kind](3, 4, False, device="meta")
    empty.load_state_dict(cell.state_dict(), assign=True)
    copies = [copy.deepcopy(cell), pickle.loads(pickle.dumps(cell)), empty]
    copies += [torch.load(buffer, weights_only=False), copy.deepcopy(cell).half().double()]
    for made in copies[:-1]:
        assert_equal(flat(made(x, as_hx(hx))), expected)
    assert {part.dtype for part in flat(copies[-1](x, as_hx(hx)))} == {torch.float64}
    graph = torch.fx.symbolic_trace(torch.nn.Sequential(cell))
    assert_equal(flat(graph(x)), flat(cell(x)))


@pytest.mark.parametrize("kind", CELLS)
def test_initial_weights(kind):
    stock_class = torch.nn.GRUCell if "gru" in kind else torch.nn.LSTMCell
    torch.manual_seed(1)
    cell = CELLS[kind](3, 50)
    torch.manual_seed(1)
    stock = stock_class(3, 50)
    for name, p in stock.named_parameters():
        assert torch.equal(p, cell.get_parameter(name))
    for again in (False, True):
        if again:
            with torch.no_grad():
                for p in cell.parameters():
                    p.fill_(7)
            cell.reset_parameters()
        for name, p in cell.named_parameters():
            if name.startswith("gain") or name == "bias_c":
                assert (p == (name != "bias_c")).all()
            else:
                assert p.abs().max() <= 50**-0.5
                assert p.std() > 0.4 * 50**-0.5


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", CELLS)
def test_half_precision_and_autocast(kind, low):
    cell, layer = make(kind)
    cell, (x, hx) = cell.float(), arguments(layer)
    x, hx = x.detach().float(), [part.detach().float() for part in hx]
    exact = flat(cell(x, as_hx(hx)))
    found = flat(copy.deepcopy(cell).to(low)(x.to(low), as_hx([part.to(low) for part in hx])))
    assert {part.dtype for part in found} == {low}
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.1, atol=0.1)
    stock = fastrnn.GRUCell if "gru" in kind else fastrnn.LSTMCell
    with torch.autocast("cpu", dtype=low):
        expected = {part.dtype for part in flat(stock(3, 4)(x))}
        found = flat(cell(x, as_hx(hx)))
        assert {part.dtype for part in found} == expected
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.1, atol=0.1)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("kind", [kind for kind in CELLS if kind != "slstm"])  # it takes a maximum
def test_complex_numbers_go_to_the_reference(kind, monkeypatch):
    calls, real = [], reference.step

    def counted(call):
        calls.append(call)
        return real(call)

    monkeypatch.setattr(reference, "step", counted)
    cell, layer = make(kind)
    x, hx = arguments(layer)
    low = torch.complex128
    found = flat(cell.to(low)(x.to(low), as_hx([part.to(low) for part in hx])))
    assert len(calls) == 1
    assert_equal([part.real for part in found], flat(make(kind)[0](x, as_hx(hx))))


@pytest.mark.parametrize("path", [None, "reference"])
@pytest.mark.parametrize("kind", CELLS)
def test_refused_arguments(kind, path):
    name, x = CELLS[kind].__name__, torch.zeros(2, 3)
    count = len(states(make_layer(kind)))
    good = [torch.zeros(2, 4)] * count
    is_paired = count > 1
    accepted = f"a tuple of {count} tensors" if is_paired else "a tensor"
    other = good[0] if is_paired else tuple(good)
    hidden = "hx[0]" if is_paired else "hidden"

    def last(part):
        return as_hx([*good[:-1], part])

    label, batch = f"hidden{count - 1}", "Input batch size 2 doesn't match"
    calls = [
        ((None,), TypeError, f"input of {name} must be a tensor, got NoneType"),
        ((x, other), TypeError, f"hx of {name} must be {accepted}, got {type(other).__name__}"),
        ((x[None],), ValueError, f"{name}: Expected input to be 1D or 2D, got 3D instead"),
        (
            (x, as_hx([part[None] for part in good])),
            ValueError,
            f"{name}: Expected {hidden} to be 1D or 2D, got 3D instead",
        ),
        ((torch.zeros(2, 5),), RuntimeError, "input has inconsistent input_size: got 5 expected 3"),
        ((x, last(torch.zeros(3, 4))), RuntimeError, f"{batch} {label} batch size 3"),
        (
            (x, last(torch.zeros(2, 5))),
            RuntimeError,
            f"{label} has inconsistent hidden_size: got 5, expected 4",
        ),
        ((x.double(),), RuntimeError, "Input and (hidden|parameter) tensors are not the same dty"),
    ]
    if is_paired:
        expected = "two" if count == 2 else count
        calls.append(((x, (good[0],)), RuntimeError, f"{kind}_cell expects {expected} hidden stat"))
    cell = CELLS[kind](3, 4)
    for given, error, message in calls:
        pattern = message.replace("[0]", r"\[0\]")
        for grad_mode in (torch.enable_grad, torch.no_grad):
            with use_path(path), grad_mode(), pytest.raises(error, match=pattern):
                cell(*given)


def test_refused_weights():
    cell, x = fastrnn.PeepholeLSTMCell(3, 4), torch.zeros(2, 3)
    weights = list(cell.parameters())
    with pytest.raises(ValueError, match=r"weight 4 must be of shape \(12,\), got \(8,\)"):
        run_step("peephole_lstm", x, None, [*weights[:4], torch.zeros(8)])
    with pytest.raises(ValueError, match="do not make whole peephole_lstm layers"):
        run_step("peephole_lstm", x, None, weights[:4])
    with pytest.raises(ValueError, match="b_ih and b_hh must be given both or neither"):
        run_step("peephole_lstm", x, None, [*weights[:3], None, weights[4]])
