"""Weights are ordinary tensors, read at every call, however they were changed."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import KINDS, LAYERS, Call, assert_same, check, on_paths, pair
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize, prune

from fastrnn.planner import use_path

Module = torch.nn.Module
SAMPLE = ["lstm", "lstm_proj", "gru", "rnn_tanh", "rnn_identity", "lstm_cell", "gru_cell"]


def name_of_weight(module: Any) -> str:
    return "weight_hh" if isinstance(module, torch.nn.RNNCellBase) else "weight_hh_l0"


def weight_norm(module: Module) -> None:
    parametrizations.weight_norm(module, name_of_weight(module))


def old_weight_norm(module: Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(module, name_of_weight(module))


def spectral_norm(module: Module) -> None:
    parametrizations.spectral_norm(module, name_of_weight(module))


def old_spectral_norm(module: Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.spectral_norm(module, name_of_weight(module))


class Skew(Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.roll(1, 0)


def custom_parametrization(module: Module) -> None:
    for name in [name for name, _ in module.named_parameters()]:
        parametrize.register_parametrization(module, name, Skew())


def pruned(module: Module) -> None:
    prune.l1_unstructured(module, name_of_weight(module), amount=0.5)


def weight_drop(module: Module) -> None:
    """As in AWD-LSTM: before every call, a newly dropped weight that is not a parameter."""
    name = name_of_weight(module)
    module.register_parameter("raw", module._parameters.pop(name))
    module.register_forward_pre_hook(
        lambda m, args: setattr(m, name, torch.dropout(m.raw, 0.5, True))
    )


def data_assigned(module: Module) -> None:
    for p in module.parameters():
        p.data = p.data.flip(0)


def written_in_place(module: Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(0.5)


def optimizer_step(module: Module) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    results, _ = Call(module, dtype=torch.float64).forward(module)
    sum(t.sin().sum() for t in results.values()).backward()
    optimizer.step()
    optimizer.zero_grad()


def parameter_replaced(module: Module) -> None:
    name = name_of_weight(module)
    setattr(module, name, torch.nn.Parameter(getattr(module, name).detach() * 2))


def tied_to_each_other(module: Module) -> None:
    suffix = name_of_weight(module).removeprefix("weight_hh")
    setattr(module, f"bias_hh{suffix}", getattr(module, f"bias_ih{suffix}"))


def state_assigned(module: Module) -> None:
    module.load_state_dict({k: v * 2 for k, v in module.state_dict().items()}, assign=True)


def state_loaded(module: Module) -> None:
    module.load_state_dict({k: v * 2 for k, v in module.state_dict().items()})


def flattened(module: Any) -> None:
    if not isinstance(module, torch.nn.RNNCellBase):
        module.flatten_parameters()


def hooked(module: Module) -> None:
    module.register_forward_hook(
        lambda m, args, result: torch.utils._pytree.tree_map_only(Tensor, torch.sin, result)
    )


CHANGES = {
    change.__name__: change
    for change in (
        weight_norm,
        old_weight_norm,
        spectral_norm,
        old_spectral_norm,
        custom_parametrization,
        pruned,
        weight_drop,
        data_assigned,
        written_in_place,
        optimizer_step,
        parameter_replaced,
        tied_to_each_other,
        state_assigned,
        state_loaded,
        flattened,
        hooked,
    )
}


@pytest.mark.sweep(5)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@on_paths(SAMPLE)
def test_change(kind: str, path: str | None, change: Callable[[Module], None]) -> None:
    ours, stock = pair(kind, dtype=torch.float64)
    call, runs = Call(ours, dtype=torch.float64), []
    for module, chosen in ((stock, None), (ours, path)):
        with use_path(chosen):
            before = call.run(module)  # nothing from this call may be reused
            torch.manual_seed(3)
            change(module)
            runs.append([call.run(module), call.run(module.eval())])
    for theirs, mine in zip(*runs, strict=True):
        assert_same(mine, theirs)
    unchanged = torch.allclose(runs[1][0]["h_n"], before["h_n"])
    assert unchanged == (change in (weight_norm, old_weight_norm, flattened))


@on_paths(SAMPLE)
def test_parametrization_removed(kind: str, path: str | None) -> None:
    ours, _ = pair(kind, dtype=torch.float64)
    cls, name, call = type(ours), name_of_weight(ours), Call(ours, dtype=torch.float64)
    with use_path(path):
        before = call.forward(ours)[0]
        parametrizations.weight_norm(ours, name)
        assert isinstance(ours, cls)
        parametrize.remove_parametrizations(ours, name)
        assert type(ours) is cls
        assert_same(call.forward(ours)[0], before)


@on_paths(SAMPLE)
def test_functional_call(kind: str, path: str | None) -> None:
    ours, stock = pair(kind, dtype=torch.float64)
    call = Call(ours, dtype=torch.float64)
    hx = tuple(call.hx) if len(call.hx) > 1 else call.hx[0]

    def run(module: Module) -> dict[str, Tensor]:
        leaves = {n: (p.detach() * 2).requires_grad_() for n, p in module.named_parameters()}
        result = torch.func.functional_call(module, leaves, (call.x, hx))
        results = torch.utils._pytree.tree_leaves(result)
        grads = torch.autograd.grad(sum(t.sum() for t in results), list(leaves.values()))
        return {str(k): tensor.detach() for k, tensor in enumerate((*results, *grads))}

    with use_path(path):
        mine = run(ours)
    assert_same(mine, run(stock))


@on_paths(SAMPLE)
def test_from_meta(kind: str, path: str | None) -> None:
    source, stock = pair(kind, dtype=torch.float64)
    ours, _ = pair(kind, dtype=torch.float64, device="meta")
    ours.to_empty(device="cpu")
    assert all(p.isnan().all() for p in ours.parameters())
    ours.load_state_dict(source.state_dict())
    check(ours, stock, Call(ours, dtype=torch.float64), [path])


@on_paths(SAMPLE)
def test_deepcopy(kind: str, path: str | None) -> None:
    ours, stock = pair(kind, dtype=torch.float64)
    twin = copy.deepcopy(ours)
    assert type(twin) is type(ours)
    assert vars(twin).keys() == vars(ours).keys()
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in ours.parameters()}
    written_in_place(ours)  # must not affect the copy
    check(twin, stock, Call(stock, dtype=torch.float64), [path])


CONVERSIONS = {
    "double": (torch.float64, lambda m: m.double()),
    "half": (torch.float16, lambda m: m.half()),
    "bfloat16": (torch.bfloat16, lambda m: m.bfloat16()),
    "to": (torch.float64, lambda m: m.to(dtype=torch.float64, device="cpu")),
    "there_and_back": (torch.float32, lambda m: m.half().float()),
}


@pytest.mark.parametrize(("dtype", "convert"), CONVERSIONS.values(), ids=CONVERSIONS)
@on_paths(SAMPLE)
def test_conversion(
    kind: str, path: str | None, dtype: torch.dtype, convert: Callable[[Module], Module]
) -> None:
    ours, stock = pair(kind)
    assert convert(ours) is ours
    check(ours, convert(stock), Call(ours, dtype=dtype), [path])


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_are_exchanged(kind: str) -> None:
    ours, stock = pair(kind, dtype=torch.float64)
    other, _ = pair(kind, dtype=torch.float64)
    stock.reset_parameters()
    ours.load_state_dict(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    other.load_state_dict(ours.state_dict(), assign=True)
    for module in (ours, other):
        check(module, stock, Call(ours, dtype=torch.float64), [None])
    missing = {k: v for k, v in ours.state_dict().items() if not k.startswith("weight_hh")}
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict(missing)


@on_paths(LAYERS)
def test_training_a_little(kind: str, path: str | None) -> None:
    """Ten steps of Adam end at the same weights as with torch.nn."""
    ours, stock = pair(kind, dtype=torch.float64)
    for module, chosen in ((ours, path), (stock, None)):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        for seed in range(10):
            with use_path(chosen):
                results, _ = Call(module, seed=seed, dtype=torch.float64).forward(module)
                sum(t.square().sum() for t in results.values()).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(ours.state_dict(), stock.state_dict(), rtol=1e-9, atol=1e-9)
