"""replace(), restore(), to_torch() and patched()."""

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compare import CELL_CLASSES, CLASSES, assert_same, stock_class
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fastrnn

OURS = CLASSES + CELL_CLASSES
STOCK = tuple(stock_class(cls) for cls in OURS)


class Subclass(nn.LSTM):
    pass


class Model(nn.Module):
    """All six modules, some of them nested, and unrelated modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(5, 4)
        self.encoder = nn.ModuleDict(
            {
                "lstm": nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True, dropout=0.5),
                "gru": nn.GRU(6, 4, batch_first=True),
            }
        )
        self.rnn = nn.RNN(4, 4, nonlinearity="relu", batch_first=True)
        self.cells = nn.ModuleList([nn.LSTMCell(4, 4), nn.GRUCell(4, 4), nn.RNNCell(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.rnn(self.encoder["gru"](self.encoder["lstm"](self.embedding(x))[0])[0])[0]
        h, c = self.cells[0](y[:, -1])
        return self.cells[2](self.cells[1](h, c))


NAMES = {
    "encoder.lstm": "LSTM",
    "encoder.gru": "GRU",
    "rnn": "RNN",
    "cells.0": "LSTMCell",
    "cells.1": "GRUCell",
    "cells.2": "RNNCell",
}
ALL_SWAPPED = {name: f"torch.nn.{cls} -> fastrnn.{cls}" for name, cls in NAMES.items()}
ALL_BACK = {name: f"fastrnn.{cls} -> torch.nn.{cls}" for name, cls in NAMES.items()}
BACK = [fastrnn.restore, fastrnn.to_torch]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What must not change: the identity of everything in the modules except their class."""
    return {
        f"{name}.{key}": id(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }


def types(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def run(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(3)  # for the input and dropout
    y = model(torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True))
    grads = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    return {"y": y.detach(), **{str(k): grad for k, grad in enumerate(grads)}}


@pytest.fixture
def model() -> nn.Module:
    return Model().double()


@pytest.fixture
def ours() -> nn.Module:
    with fastrnn.patched():
        return Model().double()


# replace() and restore().


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_replace_and_restore(model: nn.Module, training: bool) -> None:
    model.train(training)
    before, state, classes = run(model), snapshot(model), types(model)
    report = fastrnn.replace(model)
    assert report.swapped == ALL_SWAPPED
    assert report.kept == {}
    for name, cls in NAMES.items():
        assert type(model.get_submodule(name)) is getattr(fastrnn, cls)
    assert all(module.training == training for module in model.modules())
    marked = snapshot(model)
    assert {key: marked[key] for key in state} == state
    for path in (None, "kernels"):
        with fastrnn.planner.use_path(path):
            assert_same(run(model), before)
    undone = fastrnn.restore(model)
    assert undone.swapped == ALL_BACK
    assert undone.kept == {}
    assert types(model) == classes
    assert snapshot(model) == state
    assert_same(run(model), before)


def test_report_text(model: nn.Module) -> None:
    report = fastrnn.replace(model, include="cells.*", exclude="cells.1")
    assert str(report).splitlines() == [
        "swapped 2, kept 4",
        "  cells.0: torch.nn.LSTMCell -> fastrnn.LSTMCell",
        "  cells.2: torch.nn.RNNCell -> fastrnn.RNNCell",
        "  encoder.lstm: kept, not included",
        "  encoder.gru: kept, not included",
        "  rnn: kept, not included",
        "  cells.1: kept, excluded",
    ]


SELECTIONS: dict[str, tuple[Any, Any, set[str]]] = {
    "nothing_given": (None, None, set(NAMES)),
    "pattern": ("encoder.*", None, {"encoder.lstm", "encoder.gru"}),
    "exact_name": ("rnn", None, {"rnn"}),
    "no_partial_match": ("encoder", None, set()),
    "case": ("RNN", None, set()),
    "class": (nn.GRU, None, {"encoder.gru"}),
    "base_class": (nn.RNNBase, None, {"encoder.lstm", "encoder.gru", "rnn"}),
    "several": (["rnn", nn.LSTM], None, {"rnn", "encoder.lstm"}),
    "generator": ((name for name in ("rnn", "cells.2")), None, {"rnn", "cells.2"}),
    "none_at_all": ([], None, set()),
    "exclude_pattern": (None, "*.?", set(NAMES) - {"cells.0", "cells.1", "cells.2"}),
    "exclude_class": (None, (nn.LSTM, nn.RNNCellBase), {"encoder.gru", "rnn"}),
    "exclude_nothing": (None, [], set(NAMES)),
    "both": ("encoder.*", nn.LSTM, {"encoder.gru"}),
}


@pytest.mark.parametrize(
    ("include", "exclude", "expected"), SELECTIONS.values(), ids=SELECTIONS.keys()
)
def test_selection(model: nn.Module, include: Any, exclude: Any, expected: set[str]) -> None:
    report = fastrnn.replace(model, include, exclude)
    assert set(report.swapped) == expected
    assert set(report.kept) == set(NAMES) - expected
    assert set(report.kept.values()) <= {"not included", "excluded"}
    for name, cls in NAMES.items():
        library = fastrnn if name in expected else nn
        assert type(model.get_submodule(name)) is getattr(library, cls)


@pytest.mark.parametrize("function", [fastrnn.replace, fastrnn.to_torch])
@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_bad_selector(model: nn.Module, argument: str, function: Callable[..., Any]) -> None:
    classes = types(model)
    for value in (["rnn", 3], [model.rnn], [None]):
        expected = f"{argument} takes name patterns and classes, got {type(value[-1]).__name__}"
        with pytest.raises(TypeError, match=f"^{expected}$"):
            function(model, **{argument: value})
    with pytest.raises(TypeError):
        function(model, **{argument: 3})
    assert types(model) == classes


@pytest.mark.parametrize("function", [fastrnn.replace, *BACK])
def test_bad_model(function: Callable[..., Any]) -> None:
    for value in (None, nn.LSTM, {"lstm": nn.LSTM(1, 1)}):
        expected = f"model must be a torch.nn.Module, got {type(value).__name__}"
        with pytest.raises(TypeError) as caught:
            function(value)
        assert str(caught.value) == expected


@pytest.mark.parametrize("back", BACK)
@pytest.mark.parametrize("cls", OURS)
def test_root(cls: type, back: Callable[..., Any]) -> None:
    module = stock_class(cls)(2, 3)
    assert set(fastrnn.replace(module, include="rnn").kept) == {""}
    report = fastrnn.replace(module)
    assert type(module) is cls
    assert f"  (root): torch.nn.{cls.__name__} -> fastrnn.{cls.__name__}" in str(report)
    assert back(module).swapped.keys() == {""}
    assert type(module) is stock_class(cls)


def test_subclass_is_kept() -> None:
    model = nn.ModuleDict({"a": Subclass(2, 3), "b": nn.LSTM(2, 3)})
    report = fastrnn.replace(model)
    assert report.kept == {"a": "Subclass is a subclass that may compute something else"}
    assert list(report.swapped) == ["b"]
    assert type(model["a"]) is Subclass


def test_overridden_forward_is_kept() -> None:
    model = nn.Sequential(nn.GRU(2, 3))
    model[0].forward = lambda x: x
    report = fastrnn.replace(model)
    assert (report.swapped, report.kept) == ({}, {"0": "its forward is overridden on the instance"})
    assert type(model[0]) is nn.GRU


def test_scripted_is_kept() -> None:
    scripted, linear = torch.jit.script(nn.LSTM(2, 3)), torch.jit.script(nn.Linear(2, 3))
    report = fastrnn.replace(nn.ModuleDict({"lstm": scripted, "linear": linear}))
    assert (report.swapped, report.kept) == ({}, {"lstm": "compiled by TorchScript"})


def test_replace_twice(model: nn.Module) -> None:
    fastrnn.replace(model, include="rnn")
    report = fastrnn.replace(model)
    assert set(report.swapped) == set(NAMES) - {"rnn"}
    assert report.kept == {}
    assert set(fastrnn.restore(model).swapped) == set(NAMES)
    report = fastrnn.restore(model)
    assert (report.swapped, report.kept) == ({}, {})


def test_built_as_ours_stays_ours() -> None:
    modules = {"ours": fastrnn.GRU(2, 3), "variant": fastrnn.SLSTM(2, 3), "stock": nn.GRU(2, 3)}
    model = nn.ModuleDict(modules)
    assert list(fastrnn.replace(model).swapped) == ["stock"]
    report = fastrnn.restore(model)
    assert list(report.swapped) == ["stock"]
    assert report.kept == {"ours": "built as ours", "variant": "built as ours"}
    assert [type(m) for m in model.values()] == [fastrnn.GRU, fastrnn.SLSTM, nn.GRU]


def test_restore_leaves_what_was_converted_by_hand() -> None:
    model = nn.Sequential(nn.GRU(2, 3), nn.LSTM(2, 3))
    fastrnn.replace(model)
    model[0] = model[0].to_torch()
    assert list(fastrnn.restore(model).swapped) == ["1"]
    assert [type(m) for m in model] == [nn.GRU, nn.LSTM]


def test_restore_leaves_what_got_another_class() -> None:
    """As done by FSDP2's fully_shard."""
    model = nn.Sequential(nn.GRU(2, 3))
    fastrnn.replace(model)
    model[0].__class__ = type("FSDPGRU", (fastrnn.GRU,), {})
    report = fastrnn.restore(model)
    assert report.kept == {"0": "its class was changed again, to FSDPGRU"}
    assert not report.swapped


@pytest.mark.parametrize("back", BACK)
def test_option_that_was_set_later_is_not_dropped(back: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.GRU(2, 3))
    fastrnn.replace(model)
    model[0].zoneout = 0.1
    assert back(model).kept == {"0": "torch.nn.GRU has no zoneout, got 0.1"}
    model[0].zoneout = 0.0
    assert list(back(model).swapped) == ["0"]
    assert vars(model[0]).keys() == vars(nn.GRU(2, 3)).keys()


@pytest.mark.parametrize("back", BACK)
def test_shared_module(back: Callable[..., Any]) -> None:
    shared = nn.GRU(3, 3)
    model = nn.Sequential(shared, nn.Identity(), shared)
    report = fastrnn.replace(model)
    assert list(report.swapped) == ["0"]
    assert model[0] is model[2] is shared
    assert type(shared) is fastrnn.GRU
    assert list(back(model).swapped) == ["0"]
    assert type(model[2]) is nn.GRU


@pytest.mark.parametrize("name", ["a", "b"])
def test_shared_module_is_selected_by_any_name(name: str) -> None:
    gru = nn.GRU(2, 2)
    model = nn.ModuleDict({"a": gru, "b": gru})
    assert fastrnn.replace(model, exclude=name).kept == {"a": "excluded"}
    assert list(fastrnn.replace(model, include=name).swapped) == ["a"]


def test_converted_back_and_forth_is_built_as_ours() -> None:
    model = nn.Sequential(nn.GRU(2, 3))
    fastrnn.replace(model)
    model[0] = fastrnn.GRU.from_torch(model[0].to_torch())
    assert fastrnn.restore(model).kept == {"0": "built as ours"}


def test_shared_parameters() -> None:
    model = nn.Sequential(nn.GRU(3, 3), nn.GRU(3, 3))
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    fastrnn.replace(model)
    assert model[1].weight_hh_l0 is model[0].weight_hh_l0 is model[1]._flat_weights[1]


@pytest.mark.parametrize("back", BACK)
@pytest.mark.parametrize("cls", OURS)
def test_parametrized(cls: type, back: Callable[..., Any]) -> None:
    stock, ours = stock_class(cls), cls
    name = "weight_hh" if cls in CELL_CLASSES else "weight_hh_l0"
    module = parametrizations.weight_norm(stock(3, 3).double(), name)
    own = type(module)
    x = torch.randn(4, 3, dtype=torch.float64)

    def results() -> dict[str, Tensor]:
        parts = torch.utils._pytree.tree_leaves(module(x))
        grads = torch.autograd.grad(sum(t.sum() for t in parts), list(module.parameters()))
        return {str(k): t.detach() for k, t in enumerate((*parts, *grads))}

    before = results()
    assert list(fastrnn.replace(module).swapped) == [""]
    assert isinstance(module, ours)
    assert parametrize.is_parametrized(module, name)
    assert type(module).__name__ == own.__name__
    assert_same(results(), before)
    with torch.no_grad():
        module(x)  # torch keeps the weights of the last call, and cannot copy graphs
    twin = copy.deepcopy(module)
    for restored in (module, twin):
        assert list(back(restored).swapped) == [""]
        assert type(restored).__bases__ == own.__bases__ == (stock,)
        assert not isinstance(restored, ours)
    assert_same(results(), before)
    fastrnn.replace(module)
    parametrize.remove_parametrizations(module, name)
    assert type(module) is ours
    back(module)
    assert type(module) is stock


def test_parametrized_after_replace(model: nn.Module) -> None:
    fastrnn.replace(model)
    parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    before = run(model)
    fastrnn.restore(model)
    assert not isinstance(model.rnn, fastrnn.RNN)
    assert parametrize.is_parametrized(model.rnn)
    assert_same(run(model), before)


def test_optimizer_goes_on(model: nn.Module) -> None:
    twin = copy.deepcopy(model)
    for m, replaced in ((model, True), (twin, False)):
        optimizer = torch.optim.Adam(m.parameters(), lr=0.01)
        for step in range(4):
            if replaced and step > 0:
                (fastrnn.replace, fastrnn.to_torch)[step % 2](m)
            torch.manual_seed(step)
            m(torch.randn(3, 6, 5, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-9, atol=1e-9)


def test_hooks_fire(model: nn.Module) -> None:
    fired: list[str] = []
    for name in NAMES:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, name=name: fired.append(f"{name} before"))
        module.register_forward_hook(lambda *_, name=name: fired.append(f"{name} after"))
        module.register_full_backward_hook(lambda *_, name=name: fired.append(f"{name} backward"))
    run(model)
    expected = fired.copy()
    assert len(expected) == 3 * len(NAMES)
    for change in (fastrnn.replace, fastrnn.restore, fastrnn.replace, fastrnn.to_torch):
        change(model)
        fired.clear()
        run(model)
        assert fired == expected


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_restore_of_a_copy(model: nn.Module, duplicate: Callable[..., Any]) -> None:
    classes, before = types(model), run(model)
    keys = {name: vars(module).keys() for name, module in model.named_modules()}
    built = {name: set(names) for name, names in keys.items()}
    fastrnn.replace(model)
    twin = duplicate(model)
    assert set(fastrnn.restore(twin).swapped) == set(NAMES)
    assert types(twin) == classes
    assert {name: set(vars(module)) for name, module in twin.named_modules()} == built
    assert_same(run(twin), before)
    assert all(type(model.get_submodule(n)) is getattr(fastrnn, c) for n, c in NAMES.items())


def test_state_dict_of_replaced(model: nn.Module) -> None:
    before = model.state_dict()
    fastrnn.replace(model)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(before[name].data_ptr() == after[name].data_ptr() for name in before)
    Model().double().load_state_dict(after)


# to_torch(), where it differs from restore().


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_to_torch_and_replace(ours: nn.Module, training: bool) -> None:
    ours.train(training)
    before, state, classes = run(ours), snapshot(ours), types(ours)
    report = fastrnn.to_torch(ours)
    assert (report.swapped, report.kept) == (ALL_BACK, {})
    assert types(ours) == types(Model())
    assert snapshot(ours) == state
    assert_same(run(ours), before)
    assert (fastrnn.to_torch(ours).swapped, fastrnn.to_torch(ours).kept) == ({}, {})
    assert fastrnn.replace(ours).swapped == ALL_SWAPPED
    assert types(ours) == classes
    assert_same(run(ours), before)


def test_to_torch_takes_what_replace_swapped_and_what_was_built_as_ours() -> None:
    model = nn.Sequential(nn.GRU(2, 3), fastrnn.GRU(3, 3), nn.GRU(3, 3))
    fastrnn.replace(model, include="0")
    assert list(fastrnn.to_torch(model).swapped) == ["0", "1"]
    assert list(fastrnn.replace(model).swapped) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("encoder.*", fastrnn.LSTM, {"encoder.gru"}),
        ([nn.GRU, fastrnn.RNNCell], None, {"encoder.gru", "cells.2"}),
        (None, nn.RNNBase, {"cells.0", "cells.1", "cells.2"}),
    ],
)
def test_to_torch_selection(
    ours: nn.Module, include: Any, exclude: Any, expected: set[str]
) -> None:
    report = fastrnn.to_torch(ours, include, exclude)
    assert report.swapped.keys() == expected
    assert report.kept.keys() == set(NAMES) - expected
    assert set(report.kept.values()) <= {"not included", "excluded"}
    for name, cls in NAMES.items():
        library = nn if name in expected else fastrnn
        assert type(ours.get_submodule(name)) is getattr(library, cls)


class OwnGRU(fastrnn.GRU):
    pass


def test_to_torch_says_what_it_keeps() -> None:
    model = nn.ModuleDict(
        {
            "identity": fastrnn.RNN(2, 4, nonlinearity="identity"),
            "identity_cell": fastrnn.RNNCell(2, 4, nonlinearity="identity"),
            "recurrent_dropout": fastrnn.GRU(2, 4, recurrent_dropout=0.1),
            "zoneout": fastrnn.LSTM(2, 4, zoneout=(0.1, 0.2)),
            "weight_dropout": fastrnn.LSTM(2, 4, weight_dropout=0.1),
            "heads": fastrnn.GRU(2, 4, num_heads=2),
            "variant": fastrnn.LayerNormLSTM(2, 4),
            "subclass": OwnGRU(2, 4),
            "overridden": fastrnn.GRU(2, 4),
            "linear": nn.Linear(2, 4),
            "stock": nn.GRU(2, 4),
            "plain": fastrnn.GRU(2, 4),
        }
    )
    model["overridden"].forward = lambda x: x
    state, classes = snapshot(model), types(model)
    report = fastrnn.to_torch(model)
    assert report.swapped == {"plain": "fastrnn.GRU -> torch.nn.GRU"}
    assert report.kept == {
        "identity": "torch.nn.RNN has no nonlinearity 'identity'",
        "identity_cell": "torch.nn.RNNCell has no nonlinearity 'identity'",
        "recurrent_dropout": "torch.nn.GRU has no recurrent_dropout, got 0.1",
        "zoneout": "torch.nn.LSTM has no zoneout, got (0.1, 0.2)",
        "weight_dropout": "torch.nn.LSTM has no weight_dropout, got 0.1",
        "heads": "torch.nn.GRU has no num_heads, got 2",
        "variant": "torch.nn has no LayerNormLSTM",
        "subclass": "OwnGRU is a subclass that may compute something else",
        "overridden": "its forward is overridden on the instance",
    }
    assert types(model) == {**classes, "plain": nn.GRU}
    assert snapshot(model) == state


def test_to_torch_after_noise_was_switched_off() -> None:
    """In eval mode these kinds of dropout do nothing."""
    lstm = fastrnn.LSTM(2, 3, recurrent_dropout=0.1, weight_dropout=0.2).eval()
    x = torch.randn(5, 4, 2)
    before = lstm(x)[0]
    lstm.recurrent_dropout = lstm.weight_dropout = 0.0
    assert not fastrnn.to_torch(lstm).kept
    assert vars(lstm).keys() == vars(nn.LSTM(2, 3)).keys()
    torch.testing.assert_close(lstm(x)[0], before)


def test_converted_model_is_all_of_torch(ours: nn.Module) -> None:
    """Its file loads without fastrnn, and its layers take only the arguments of torch.nn."""
    assert b"fastrnn" in pickle.dumps(ours)
    fastrnn.replace(ours)
    fastrnn.to_torch(ours)
    assert b"fastrnn" not in pickle.dumps(ours)
    with pytest.raises(TypeError, match="unexpected keyword argument 'lengths'"):
        ours.rnn(torch.zeros(2, 3, 4, dtype=torch.float64), lengths=torch.tensor([1, 2]))


def test_script(ours: nn.Module) -> None:
    with pytest.raises(torch.jit.frontend.NotSupportedError):
        torch.jit.script(ours)
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    before = ours.eval()(x)
    fastrnn.to_torch(ours)
    torch.testing.assert_close(torch.jit.script(ours)(x), before)


@pytest.mark.filterwarnings("ignore")  # from all of torch.ao.quantization
def test_quantize_dynamic() -> None:
    model = nn.ModuleDict({"lstm": fastrnn.LSTM(4, 8), "cell": fastrnn.LSTMCell(8, 8)})
    fastrnn.to_torch(model)
    quantized = torch.ao.quantization.quantize_dynamic(model)
    dynamic = torch.ao.nn.quantized.dynamic
    assert [type(m) for m in quantized.values()] == [dynamic.LSTM, dynamic.LSTMCell]
    assert [type(m) for m in model.values()] == [nn.LSTM, nn.LSTMCell]


def test_compiled_model(ours: nn.Module) -> None:
    """It is recompiled for the other class."""
    torch._dynamo.reset()
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    compiled = torch.compile(ours.eval(), backend="eager")
    before = compiled(x)
    for change in (fastrnn.to_torch, fastrnn.replace):
        assert len(change(compiled).swapped) == len(NAMES)
        torch.testing.assert_close(compiled(x), before)


@pytest.mark.filterwarnings("ignore")
def test_opacus() -> None:
    validators = pytest.importorskip("opacus.validators")
    model = nn.Sequential(fastrnn.LSTM(2, 3), fastrnn.GRU(3, 3))
    assert validators.ModuleValidator.is_valid(model)
    fastrnn.to_torch(model)
    fixed = validators.ModuleValidator.fix(model)
    assert [type(m).__name__ for m in fixed] == ["DPLSTM", "DPGRU"]
    assert not model.load_state_dict(fixed.state_dict(), strict=False).missing_keys


# patched().


def bindings() -> dict[str, type]:
    return {
        f"{place}.{cls.__name__}": getattr(sys.modules[place], cls.__name__)
        for place in ("torch.nn", "torch.nn.modules", "torch.nn.modules.rnn")
        for cls in OURS
    }


@pytest.fixture
def stock_bindings() -> Iterator[dict[str, type]]:
    before = bindings()
    assert set(before.values()) == set(STOCK)
    yield before
    assert bindings() == before


def test_patched(stock_bindings: dict[str, type]) -> None:
    imported_earlier = nn.LSTM
    with fastrnn.patched():
        bound = bindings()
        assert bound.keys() == stock_bindings.keys()
        assert all(getattr(fastrnn, cls.__name__) is cls for cls in bound.values())
        built = Model().double()
        from torch.nn import GRU  # like a program imported inside

        assert GRU is fastrnn.GRU
        assert type(imported_earlier(2, 3)) is imported_earlier is not nn.LSTM

        class Own(nn.LSTM):
            pass

    assert bindings() == stock_bindings
    assert all(type(built.get_submodule(n)) is getattr(fastrnn, c) for n, c in NAMES.items())
    assert issubclass(Own, fastrnn.LSTM)
    torch.manual_seed(1)
    stock = Model().double()
    stock.load_state_dict(built.state_dict())
    assert_same(run(built), run(stock))


def test_patched_is_undone_after_an_exception(stock_bindings: dict[str, type]) -> None:
    with pytest.raises(KeyError, match="inside"), fastrnn.patched():
        raise KeyError("inside")
    assert bindings() == stock_bindings


def test_patched_nested(stock_bindings: dict[str, type]) -> None:
    with fastrnn.patched():
        outer = bindings()
        with fastrnn.patched():
            assert bindings() == outer
        assert bindings() == outer
    assert bindings() == stock_bindings


def test_patched_blocks_overlap(stock_bindings: dict[str, type]) -> None:
    """Blocks of two threads need not end in the order in which they began."""
    first, second = fastrnn.patched(), fastrnn.patched()
    first.__enter__()
    inside = bindings()
    second.__enter__()
    first.__exit__(None, None, None)
    assert bindings() == inside
    second.__exit__(None, None, None)
    assert bindings() == stock_bindings


def test_patched_as_decorator(stock_bindings: dict[str, type]) -> None:
    @fastrnn.patched()
    def build() -> nn.Module:
        return nn.GRU(2, 3)

    assert type(build()) is fastrnn.GRU
    assert bindings() == stock_bindings
    assert type(build()) is fastrnn.GRU


def test_patched_restores_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other code may have rebound the name before."""
    monkeypatch.setattr(nn, "LSTM", Subclass)
    with fastrnn.patched():
        assert nn.LSTM is fastrnn.LSTM
    assert nn.LSTM is Subclass
    assert nn.modules.LSTM is not Subclass


def test_replace_and_patched_together(model: nn.Module) -> None:
    with fastrnn.patched():
        report = fastrnn.replace(model)
        assert set(report.swapped) == set(NAMES)
        fastrnn.restore(model)
    assert not any(isinstance(module, OURS) for module in model.modules())
