"""The cell modules against torch.nn's: errors, results and gradients."""

from typing import Any

import pytest
import torch
from compare import (
    CELL_CLASSES,
    CELLS,
    Call,
    assert_same,
    check,
    on_paths,
    outcome,
    pair,
    paths_of,
    stock_class,
)
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_leaves

from fastrnn.planner import use_path

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def x(*shape: int, **options: Any) -> torch.Tensor:
    return torch.zeros(shape, **options)


def state(module: Any, *shape: int, **options: Any) -> Any:
    part = torch.zeros(shape, **options)
    return (part, part) if isinstance(module, torch.nn.LSTMCell) else part


# Cells are (5, 4); good arguments are x(3, 5) and state(m, 3, 4).
BAD_CALLS = {
    "none": lambda m: m(None),
    "list": lambda m: m([x(3, 5)]),
    "3d": lambda m: m(x(1, 3, 5)),
    "0d": lambda m: m(x()),
    "size": lambda m: m(x(3, 7)),
    "size_unbatched": lambda m: m(x(7)),
    "hx_3d": lambda m: m(x(3, 5), state(m, 1, 3, 4)),
    "hx_0d": lambda m: m(x(3, 5), state(m)),
    "hx_1d": lambda m: m(x(3, 5), state(m, 4)),
    "hx_batch": lambda m: m(x(3, 5), state(m, 2, 4)),
    "hx_size": lambda m: m(x(3, 5), state(m, 3, 9)),
    "hx_size_unbatched": lambda m: m(x(5), state(m, 9)),
    "hx_2d_unbatched": lambda m: m(x(5), state(m, 1, 4)),
    "hx_2d_unbatched_batch": lambda m: m(x(5), state(m, 3, 4)),
    "hx_empty": lambda m: m(x(3, 5), ()),
    "hx_of_one": lambda m: m(x(3, 5), (x(3, 4),)),
    "hx_of_three": lambda m: m(x(3, 5), (x(3, 4),) * 3),
    "cx_batch": lambda m: m(x(3, 5), (x(3, 4), x(2, 4))),
    "cx_size": lambda m: m(x(3, 5), (x(3, 4), x(3, 9))),
    "cx_3d": lambda m: m(x(3, 5), (x(3, 4), x(3, 4, 1))),
    "nonlinearity": lambda m: (
        setattr(m, "nonlinearity", "gelu"),
        m(x(3, 5)),
        1 / isinstance(m, torch.nn.RNNCell),  # the others ignore it
    ),
}
# torch.nn does not check these and fails deeper down.
LOW_LEVEL_BAD_CALLS = {
    "no_arguments": lambda m: m(),
    "too_many_arguments": lambda m: m(x(3, 5), None, None),
    "dtype": lambda m: m(x(3, 5, dtype=torch.float64)),
    "dtype_int": lambda m: m(x(3, 5, dtype=torch.int64)),
    "hx_dtype": lambda m: m(x(3, 5), state(m, 3, 4, dtype=torch.float64)),
    "hx_device": lambda m: m(x(3, 5), state(m, 3, 4, device="meta")),
    "input_device": lambda m: m(x(3, 5, device="meta")),
    "hx_1d_of_batch": lambda m: m(x(4, 5), state(m, 4)),
    "hx_tensor_for_pair": lambda m: m(
        x(3, 5), x(3, 4) if isinstance(m, torch.nn.LSTMCell) else (x(3, 4), x(3, 4))
    ),
}


def errors_of(call: Any, cls: type) -> list[tuple[type, str]]:
    return [outcome(lambda of=of: call(of(5, 4))) for of in (cls, stock_class(cls))]


@pytest.mark.parametrize("path", [None, "kernels"], ids=["planned", "kernels"])
@pytest.mark.parametrize("cls", CELL_CLASSES)
@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_call(call: Any, cls: type, path: str | None) -> None:
    with use_path(path):
        mine, theirs = errors_of(call, cls)
    assert mine == theirs


@pytest.mark.parametrize("path", [None, "kernels"], ids=["planned", "kernels"])
@pytest.mark.parametrize("cls", CELL_CLASSES)
@pytest.mark.parametrize("call", LOW_LEVEL_BAD_CALLS.values(), ids=LOW_LEVEL_BAD_CALLS)
def test_bad_call_that_torch_does_not_explain(call: Any, cls: type, path: str | None) -> None:
    with use_path(path):
        (mine, text), (theirs, _) = errors_of(call, cls)
    assert mine in (theirs, RuntimeError)
    assert "got 4, expected 4" not in text
    assert "ambiguous" not in text


@pytest.mark.sweep(7)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["batched", "unbatched"])
@pytest.mark.parametrize("kind", CELLS)
def test_results(kind: str, form: str, dtype: torch.dtype) -> None:
    sizes = [(1, 1, 1), (3, 5, 4), (7, 127, 129), (129, 7, 1), (0, 5, 4)]
    for batch, input_size, hidden_size in sizes:
        for bias in (True, False):
            for hx in (True, False):
                ours, stock = pair(kind, input_size, hidden_size, bias=bias, dtype=dtype)
                call = Call(ours, form, batch=batch, hx=hx, dtype=dtype)
                sizes_of = (batch, input_size, bias, hx)
                check(ours, stock, call, paths_of(kind), sizes_of, terms=batch)


@on_paths(CELLS)
def test_strides(kind: str, path: str | None) -> None:
    ours, stock = pair(kind)
    for module in (ours, stock):
        for p in module.parameters():
            p.data = torch.stack([p.data, p.data], dim=-1)[..., 0].detach()
    call = Call(ours, layout=lambda t: t.t().contiguous().t())
    check(ours, stock, call, [path])
    check(ours, stock, Call(ours, layout=lambda t: t[:, :1].expand(t.shape)), [path])


@on_paths(["lstm_cell"])
@pytest.mark.parametrize("form", ["batched", "unbatched"])
def test_state_as_list(kind: str, path: str | None, form: str) -> None:
    ours, _ = pair(kind)
    call = Call(ours, form)
    with use_path(path):
        of_tuple, of_list = (ours(call.x, sequence(call.hx)) for sequence in (tuple, list))
    assert isinstance(of_list, tuple)
    assert all(a.equal(b) for a, b in zip(of_tuple, of_list, strict=True))


@on_paths([kind for kind in CELLS if "identity" not in kind])
@pytest.mark.parametrize("form", ["batched", "unbatched"])
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no_hx"])
def test_meta(kind: str, path: str | None, form: str, hx: bool) -> None:
    ours, stock = pair(kind, device="meta")
    call = Call(ours, form, hx=hx)
    call.x, call.hx = call.x.to("meta"), hx and [part.to("meta") for part in call.hx]
    theirs = call.forward(stock)[0]
    with use_path(path):
        mine = call.forward(ours)[0]
    for name, tensor in mine.items():
        assert tensor.is_meta
        assert (tensor.shape, tensor.dtype) == (theirs[name].shape, theirs[name].dtype)


@on_paths(CELLS)
def test_unrolled(kind: str, path: str | None) -> None:
    """A cell in a user's own loop, with gradients through time."""
    ours, stock = pair(kind, 3, 3, dtype=torch.float64)

    def run(module: Any) -> dict[str, torch.Tensor]:
        call = Call(module, dtype=torch.float64)
        state = tuple(part.clone().requires_grad_() for part in call.hx)
        leaves = [*state, *module.parameters()]
        for _ in range(4):
            new = module(call.x + state[0], state if len(state) > 1 else state[0])
            state = new if isinstance(new, tuple) else (new,)
        grads = torch.autograd.grad(state[0].square().sum(), leaves)
        return {str(k): tensor.detach() for k, tensor in enumerate((*state, *grads))}

    with use_path(path):
        mine = run(ours)
    assert_same(mine, run(stock))


# torch has no batching rule for the LSTM's fused step.
VMAPPED = [
    (kind, use)
    for kind in CELLS
    for use in ("inputs", "ensemble", "sample_gradients")
    if kind != "lstm_cell" or use == "sample_gradients"
]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("kind", "use"), VMAPPED)
def test_vmap(kind: str, use: str) -> None:
    ours, stock = pair(kind, dtype=torch.float64)
    call = Call(ours, dtype=torch.float64)
    xs = call.random([2, 3, 5])
    states = [call.random([2, 3, 4]) for _ in call.hx]
    ensemble = {name: call.random([2, *p.shape]) for name, p in stock.named_parameters()}

    def results(module: Any) -> dict[str, torch.Tensor]:
        def run(params: Any, x: torch.Tensor, *parts: torch.Tensor) -> Any:
            return functional_call(module, params, (x, parts if len(parts) > 1 else parts[0]))

        def loss(params: Any, x: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
            return sum(t.square().sum() for t in tree_leaves(run(params, x, *parts)))

        params = {name: p.detach() for name, p in module.named_parameters()}
        shared = (None, 0, *[0] * len(states))
        if use == "ensemble":
            values = vmap(run)(ensemble, xs, *states)
        else:
            function = run if use == "inputs" else grad(loss)
            values = vmap(function, shared)(params, xs, *states)
        return {str(k): tensor for k, tensor in enumerate(tree_leaves(values))}

    assert_same(results(ours), results(stock))
