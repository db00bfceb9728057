"""Uses of autograd beyond one backward pass in training, for layers and cells."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compare import CELLS, FORMS, KINDS, LAYERS, Call, assert_same, check, on_paths, pair
from torch.func import functional_call, grad
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastrnn.planner import use_path

F64 = {"dtype": torch.float64}


def pair64(kind: str, *sizes: int, **options: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    if kind in LAYERS:
        options = {"num_layers": 2, "bidirectional": True, **options}
    return pair(kind, *sizes, dtype=torch.float64, **options)


@on_paths(KINDS)
def test_eval_mode(kind: str, path: str | None) -> None:
    dropout = {"dropout": 0.5} if kind in LAYERS else {}
    ours, stock = pair64(kind, **dropout)
    check(ours.eval(), stock.eval(), Call(ours, **F64), [path])


@on_paths(KINDS)
def test_retain_graph(kind: str, path: str | None) -> None:
    ours, _ = pair(kind)
    with use_path(path):
        results, leaves = Call(ours).forward(ours)
        loss = sum(t.square().sum() for t in results.values())
        wanted = [*leaves, *ours.parameters()]
        once, again = (torch.autograd.grad(loss, wanted, retain_graph=True) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(once, again, strict=True))


@on_paths(KINDS)
def test_accumulation(kind: str, path: str | None) -> None:
    """Two backward passes accumulate into .grad, from two calls with the same weights."""
    ours, stock = pair64(kind)
    grads = []
    for module, chosen in ((ours, path), (stock, None)):
        with use_path(chosen):
            for seed in (1, 2):
                results, _ = Call(module, seed=seed, **F64).forward(module)
                sum(t.square().sum() for t in results.values()).backward()
        grads.append({name: p.grad for name, p in module.named_parameters()})
    assert_same(*grads)


@pytest.mark.sweep(3)
@on_paths(KINDS)
def test_second_derivatives(kind: str, path: str | None) -> None:
    for form in FORMS if kind in LAYERS else FORMS[:2]:
        for hx in (True, False):
            ours, stock = pair64(kind)
            check(ours, stock, Call(ours, form, hx=hx, **F64), [path], (form, hx), order=2)


@pytest.mark.sweep(3)
@on_paths(KINDS)
@pytest.mark.parametrize("order", [1, 2])
def test_numerical_derivatives(kind: str, path: str | None, order: int) -> None:
    hidden_size = 3 if kind == "lstm_proj" else 2
    ours, _ = pair(kind, 2, hidden_size, **F64)
    call = Call(ours, steps=2, batch=1, **F64)
    names, weights = zip(*ours.named_parameters(), strict=True)
    leaves = [call.x, *call.hx, *weights]

    def function(x: torch.Tensor, *rest: torch.Tensor) -> list[torch.Tensor]:
        hx, params = rest[: len(call.hx)], rest[len(call.hx) :]
        args = (x, hx if len(hx) > 1 else hx[0])
        result = functional_call(ours, dict(zip(names, params, strict=True)), args)
        return tree_leaves(result)

    inputs = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    check_of_order = {1: torch.autograd.gradcheck, 2: torch.autograd.gradgradcheck}[order]
    with use_path(path):
        assert check_of_order(function, inputs)


@on_paths(LAYERS)
def test_tied_directions(kind: str, path: str | None) -> None:
    """One Parameter under two names has the sum of both gradients, for every order."""
    ours, stock = pair64(kind, num_layers=1)
    for module in (ours, stock):
        for name in [name for name in module._flat_weights_names if "reverse" in name]:
            setattr(module, name, getattr(module, name.removesuffix("_reverse")))
        names = [name for name, _ in module.named_parameters()]
        assert not any("reverse" in name for name in names)
    check(ours, stock, Call(ours, **F64), [path], order=3)


@pytest.mark.sweep(3)
@on_paths(KINDS)
def test_frozen_subsets(kind: str, path: str | None) -> None:
    for frozen in ("bias_hh", "weight", "weight_ih", ""):
        ours, stock = pair64(kind)
        for module in (ours, stock):
            for name, p in module.named_parameters():
                p.requires_grad_(not name.startswith(frozen))
        check(ours, stock, Call(ours, **F64), [path], f"frozen {frozen}")
        with use_path(path):
            results, leaves = Call(ours, **F64).forward(ours)
        torch.autograd.backward(sum(t.sum() for t in results.values()))
        assert leaves[0].grad is not None
        for name, p in ours.named_parameters():
            assert (p.grad is None) == name.startswith(frozen)


@on_paths(KINDS)
def test_detached_inputs(kind: str, path: str | None) -> None:
    """Only the parameters require gradients."""
    ours, stock = pair64(kind)
    grads = []
    for module, chosen in ((ours, path), (stock, None)):
        call = Call(module, layout=torch.Tensor.detach, **F64)
        with use_path(chosen):
            grads.append(call.run(module))
    assert_same(*grads)
    assert not grads[0]["d_input"].any()


@pytest.mark.sweep(3)
@on_paths(KINDS)
def test_partial_loss(kind: str, path: str | None) -> None:
    """The loss, and so the second derivatives, do not use some of the results."""
    for used in ("output",), ("h_n",), ("c_n",), ("output", "c_n"):
        ours, stock = pair64(kind)
        call = Call(ours, **F64)
        if all(name in call.forward(ours)[0] for name in used):
            check(ours, stock, call, [path], used, used=used, order=2)


@on_paths(KINDS)
def test_expanded_cotangents(kind: str, path: str | None) -> None:
    """The gradient of a sum has stride 0 and must not be written to."""
    ours, stock = pair64(kind)
    grads = []
    for module, chosen in ((ours, path), (stock, None)):
        with use_path(chosen):
            results, leaves = Call(module, **F64).forward(module)
            loss = sum(t.sum() for t in results.values())
            wanted = [*leaves, *module.parameters()]
            pairs = zip(map(str, range(99)), torch.autograd.grad(loss, wanted), strict=False)
            grads.append(dict(pairs))
    assert_same(*grads)


@on_paths(KINDS)
def test_functional_grad(kind: str, path: str | None) -> None:
    """torch.func.grad agrees with autograd."""
    ours, _ = pair64(kind)
    call = Call(ours, steps=64, **F64)
    params = {name: p.detach() for name, p in ours.named_parameters()}
    hx = tuple(call.hx) if len(call.hx) > 1 else call.hx[0]

    def loss(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        results = functional_call(ours, params, (x, hx))
        return sum(t.square().sum() for t in tree_leaves(results))

    with use_path(path):
        by_func, dx = grad(loss, argnums=(0, 1))(params, call.x)
        leaf = call.x.clone().requires_grad_()
        expected = torch.autograd.grad(
            loss(dict(ours.named_parameters()), leaf), [leaf, *ours.parameters()]
        )
    names = ["x", *params]
    assert_same({"x": dx, **by_func}, dict(zip(names, expected, strict=True)))


class Watched(TorchDispatchMode):
    """Observe every operation, so that ours run as operators of torch.library."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_operators(kind: str) -> None:
    ours, _ = pair64(kind)
    with use_path("kernels"):
        expected = Call(ours, **F64).run(ours, order=3)
        with Watched():
            assert_same(Call(ours, **F64).run(ours, order=3), expected)


@on_paths(KINDS)
def test_first_gradients_may_be_overwritten(kind: str, path: str | None) -> None:
    ours, _ = pair(kind)
    with use_path(path):
        results, leaves = Call(ours).forward(ours)
        loss = sum(t.square().sum() for t in results.values())
        grads = torch.autograd.grad(loss, [*leaves, *ours.parameters()], create_graph=True)
        for part in grads:
            part.mul_(2)
        assert all(part.requires_grad for part in grads)


@pytest.fixture
def collector_at_rest() -> Iterator[None]:
    """Disable automatic garbage collection, and exclude existing objects from it."""
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def differentiate(module: Any, leaves: Any, args: Any, options: Any) -> list[torch.Tensor]:
    """A module's results, and first and second derivatives."""
    used = [t for t in tree_leaves(module(*args, **options)) if isinstance(t, torch.Tensor)]
    found = list(used)
    for create_graph in (True, False):
        loss = sum(t.square().sum() for t in used if t.requires_grad)
        used = torch.autograd.grad(loss, leaves, create_graph=create_graph, materialize_grads=True)
        found += used
    return found


def left_over(*args: Any) -> int:
    """How many objects `differentiate` leaves to the garbage collector."""
    differentiate(*args)
    gc.collect()
    for _ in range(3):
        differentiate(*args)
    return gc.collect()


def ways(kind: str) -> dict[str, dict[str, Any]]:
    """Options of a call, by a name for messages."""
    if kind in CELLS:
        return {"plain": {}}
    return {
        "plain": {},
        "lengths": {"lengths": torch.tensor([4, 0, 2])},
        "reset": {"reset": torch.arange(12).view(4, 3) % 5 == 1, "return_states": True},
        "recompute": {"recompute": True},
        "chunks": {"recompute": 2},
    }


@pytest.mark.sweep(3)
@on_paths(KINDS)
@pytest.mark.usefixtures("collector_at_rest")
def test_no_garbage(kind: str, path: str | None) -> None:
    """No more reference cycles than torch.nn leaves behind."""
    ours, stock = pair(kind)
    x = Call(ours).x.requires_grad_()
    of_ours, of_stock = [x, *ours.parameters()], [x, *stock.parameters()]
    with use_path(path):
        counts = {
            name: left_over(ours, of_ours, (x,), options) for name, options in ways(kind).items()
        }
        if kind in LAYERS:
            packed = pack_sequence(list(x.detach().unbind(1)))
            counts["packed"] = left_over(ours, of_ours[1:], (packed,), {})
    allowed = left_over(stock, of_stock, (x,), {})
    assert all(count <= allowed for count in counts.values()), (counts, allowed)


@on_paths(KINDS)
@pytest.mark.usefixtures("collector_at_rest")
def test_tensors_die_with_their_last_name(kind: str, path: str | None) -> None:
    """Results, gradients and saved tensors do not wait for the garbage collector."""
    ours, _ = pair(kind)
    made: list[weakref.ref[torch.Tensor]] = []

    def pack(part: torch.Tensor) -> torch.Tensor:
        alias = part.detach()  # an output saved as is would refer to itself
        made.append(weakref.ref(alias))
        return alias

    for name, options in ways(kind).items():
        x = Call(ours).x.requires_grad_()
        with use_path(path), torch.autograd.graph.saved_tensors_hooks(pack, lambda part: part):
            found = differentiate(ours, [x, *ours.parameters()], (x,), options)
        made += [weakref.ref(t) for t in (x, *found)]
        del found, x
        alive = [t.shape for t in (ref() for ref in made) if t is not None]
        assert not alive, name
