"""Pickling and saving whole modules, and conversion to and from torch.nn."""

import collections
import copy
import io
import pickle
from typing import Any

import pytest
import torch
from compare import (
    CELL_CLASSES,
    CLASSES,
    KINDS,
    Call,
    assert_same,
    check,
    pair,
    stock_class,
)

import fastrnn


def same_results(a: Any, b: Any) -> None:
    call = Call(a, dtype=torch.float64)
    assert_same(call.run(a), call.run(b))


def saved(module: torch.nn.Module, **options: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, **options)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def assert_round_trip(ours: torch.nn.Module, loaded: torch.nn.Module) -> None:
    assert type(loaded) is type(ours)
    assert vars(loaded).keys() == vars(ours).keys()
    assert repr(loaded) == repr(ours)
    assert loaded.training == ours.training
    same_results(loaded, ours)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(kind: str, protocol: int) -> None:
    ours = pair(kind, dtype=torch.float64)[0].eval()
    assert_round_trip(ours, pickle.loads(pickle.dumps(ours, protocol)))


def test_save_and_load(kind: str) -> None:
    ours, _ = pair(kind, dtype=torch.float64)
    assert_round_trip(ours, saved(ours, weights_only=False))


def test_load_weights_only(kind: str) -> None:
    """Allowing the class is enough, as for torch.nn."""
    ours, _ = pair(kind, dtype=torch.float64)
    with pytest.raises(pickle.UnpicklingError, match=f"fastrnn.nn.{type(ours).__name__}"):
        saved(ours, weights_only=True)
    with torch.serialization.safe_globals([type(ours)]):
        assert_round_trip(ours, saved(ours, weights_only=True))


def test_weights_only_of_stock(kind: str) -> None:
    """A state saved from torch.nn loads into our module."""
    ours, stock = pair(kind, dtype=torch.float64)
    buffer = io.BytesIO()
    torch.save(stock.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert isinstance(state, collections.OrderedDict)
    ours.reset_parameters()
    ours.load_state_dict(state)
    same_results(ours, stock)


def test_copy_of_loaded_follows_its_weights(kind: str) -> None:
    ours, stock = pair(kind, dtype=torch.float64)
    loaded = copy.deepcopy(pickle.loads(pickle.dumps(ours)))
    for module in (loaded, stock):
        for p in module.parameters():
            p.data = p.data * 2
    check(loaded, stock, Call(stock, dtype=torch.float64), [None, "kernels"])


# Conversion.

CONVERTIBLE = [kind for kind in KINDS if "identity" not in kind]


@pytest.mark.parametrize("kind", CONVERTIBLE)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_conversion(kind: str, training: bool) -> None:
    _, stock = pair(kind, dtype=torch.float64)
    stock.train(training)
    fired = []
    stock.register_forward_hook(lambda *_: fired.append("forward"))
    stock.register_forward_pre_hook(lambda *_: fired.append("before"))
    ours_class = KINDS[kind][0]
    keys = list(vars(stock))
    ours = ours_class.from_torch(stock)
    back = ours.to_torch()
    assert [type(m) for m in (stock, ours, back)] == [type(back), ours_class, type(stock)]
    for module in (ours, back):
        assert list(vars(module)) == keys
        assert module.training == training
        pairs = zip(module.named_parameters(), stock.named_parameters(), strict=True)
        assert all(a == b and p is q for (a, p), (b, q) in pairs)
    for module in (ours, back, stock):
        fired.clear()
        Call(module, dtype=torch.float64).forward(module)
        assert fired == ["before", "forward"]
    same_results(ours, stock)
    same_results(back, stock)


@pytest.mark.parametrize("kind", CONVERTIBLE)
def test_conversion_shares_parameters_but_no_containers(kind: str) -> None:
    _, stock = pair(kind, dtype=torch.float64)
    ours = KINDS[kind][0].from_torch(stock)
    stock.register_buffer("extra", torch.zeros(1))
    stock.register_forward_hook(lambda *_: None)
    stock.eval()
    assert "extra" not in ours.state_dict()
    assert not ours._forward_hooks
    assert ours.training
    name = next(name for name, _ in stock.named_parameters())
    kept = getattr(ours, name)
    setattr(stock, name, torch.nn.Parameter(kept.detach() * 2))
    assert getattr(ours, name) is kept
    if hasattr(ours, "_flat_weights"):
        assert ours._flat_weights[0] is kept
    with torch.no_grad():
        for p in ours.parameters():
            p.mul_(2)
    setattr(stock, name, kept)
    same_results(ours, stock)


@pytest.mark.parametrize("kind", CONVERTIBLE)
def test_conversion_of_parametrized(kind: str) -> None:
    _, stock = pair(kind, dtype=torch.float64)
    name = "weight_hh" if hasattr(stock, "weight_hh") else "weight_hh_l0"
    torch.nn.utils.parametrizations.weight_norm(stock, name)
    ours = KINDS[kind][0].from_torch(stock)
    back = ours.to_torch()
    assert isinstance(ours, KINDS[kind][0])
    assert not isinstance(back, KINDS[kind][0])
    with torch.no_grad():
        for p in stock.parameters():
            p.mul_(2)
    for module in (ours, back):
        assert torch.nn.utils.parametrize.is_parametrized(module, name)
        pairs = zip(module.named_parameters(), stock.named_parameters(), strict=True)
        assert all(a == b and p is q for (a, p), (b, q) in pairs)
        same_results(module, stock)


@pytest.mark.parametrize("cls", CLASSES + CELL_CLASSES)
def test_from_torch_of_other_class(cls: type) -> None:
    class Subclass(stock_class(cls)):
        pass

    others = [
        c(2, 3) for c in map(stock_class, CLASSES + CELL_CLASSES) if c is not stock_class(cls)
    ]
    for other in (*others, torch.nn.Linear(2, 3), Subclass(2, 3), cls(2, 3)):
        name = type(other).__name__
        expected = f"{cls.__name__}.from_torch expects a torch.nn.{cls.__name__}, got {name}"
        with pytest.raises(TypeError) as caught:
            cls.from_torch(other)
        assert str(caught.value) == expected


@pytest.mark.parametrize("cls", [fastrnn.RNN, fastrnn.RNNCell])
def test_to_torch_of_identity(cls: type) -> None:
    with pytest.raises(
        ValueError, match=f"^torch.nn.{cls.__name__} has no nonlinearity 'identity'$"
    ):
        cls(2, 3, nonlinearity="identity").to_torch()


@pytest.mark.parametrize("kind", ["gru", "gru_cell"])
def test_conversion_of_overridden_forward(kind: str) -> None:
    """The copy would call a function bound to the original."""
    ours, stock = pair(kind)
    for module, convert in ((ours, ours.to_torch), (stock, lambda: type(ours).from_torch(stock))):
        module.forward = module.forward
        with pytest.raises(TypeError, match="forward of the module is overridden"):
            convert()
