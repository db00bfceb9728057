"""The sequence modules against torch.nn's: interface, errors, results and gradients."""

import contextlib
import itertools
import warnings
from typing import Any

import pytest
import torch
from compare import (
    CELL_CLASSES,
    CLASSES,
    FORMS,
    KINDS,
    LAYERS,
    PATHS,
    Call,
    assert_same,
    check,
    on_paths,
    oracle_of,
    outcome,
    pair,
    paths_of,
    stock_class,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn import autocast, cpu
from fastrnn.planner import use_path

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def both(cls: type) -> tuple[type, type]:
    return cls, stock_class(cls)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def test_uninitialised_memory_is_poisoned() -> None:
    assert torch.empty(5).isnan().all()
    assert torch.zeros(2).new_empty(5).isnan().all()


# Interface.

CONSTRUCTIONS = {
    "defaults": ((), {}),
    "layers": ((3,), {}),
    "no_bias": ((), {"bias": False}),
    "all": ((2,), {"batch_first": True, "dropout": 0.25, "bidirectional": True}),
    "float64": ((), {"dtype": torch.float64}),
    "meta": ((), {"device": "meta"}),
}
POSITIONAL = {
    fastrnn.LSTM: (2, False, True, 0.5, True, 3, "cpu", torch.float64),
    fastrnn.GRU: (2, False, True, 0.5, True, 0, "cpu", torch.float64),
    fastrnn.RNN: (2, "relu", False, True, 0.5, True, 0, "cpu", torch.float64),
    fastrnn.LSTMCell: (False, "cpu", torch.float64),
    fastrnn.GRUCell: (False, "cpu", torch.float64),
    fastrnn.RNNCell: (False, "relu", "cpu", torch.float64),
}


def constructions() -> list[Any]:
    cases = []
    for cls, positional in POSITIONAL.items():
        cases.append(pytest.param(cls, positional, {}, id=f"{cls.__name__}-positional"))
        for name, (args, kwargs) in CONSTRUCTIONS.items():
            if cls in CLASSES or name in ("defaults", "no_bias", "float64", "meta"):
                cases.append(pytest.param(cls, args, kwargs, id=f"{cls.__name__}-{name}"))
    cases.append(pytest.param(fastrnn.LSTM, (), {"proj_size": 3}, id="LSTM-proj"))
    cases.append(pytest.param(fastrnn.RNN, (), {"nonlinearity": "relu"}, id="RNN-relu"))
    return cases


@pytest.mark.parametrize(("cls", "args", "kwargs"), constructions())
def test_construction(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    modules = []
    for of in both(cls):
        torch.manual_seed(7)
        modules.append(of(6, 5, *args, **kwargs))
    ours, stock = modules
    assert isinstance(ours, type(stock))
    assert (repr(ours), str(ours)) == (repr(stock), str(stock))
    assert list(vars(ours)) == list(vars(stock))
    plain = {k for k, v in vars(stock).items() if isinstance(v, (bool, int, float, str))}
    assert {k: vars(ours)[k] for k in plain} == {k: vars(stock)[k] for k in plain}
    state, of_stock = ours.state_dict(), stock.state_dict()
    assert list(state) == list(of_stock)
    for name, value in state.items():
        assert (value.shape, value.dtype) == (of_stock[name].shape, of_stock[name].dtype)
        assert value.device == of_stock[name].device
        assert value.is_meta or value.equal(of_stock[name])
    torch.manual_seed(8)
    ours.reset_parameters()
    torch.manual_seed(8)
    stock.reset_parameters()
    assert all(
        a.is_meta or a.equal(b) for a, b in zip(ours.parameters(), stock.parameters(), strict=True)
    )


@pytest.mark.parametrize("cls", CLASSES + CELL_CLASSES)
def test_class(cls: type) -> None:
    stock = stock_class(cls)
    assert issubclass(cls, stock)
    assert cls.__name__ == cls.__qualname__ == stock.__name__
    assert getattr(fastrnn, cls.__name__) is getattr(fastrnn.nn, cls.__name__) is cls
    assert cls.__doc__


@pytest.mark.parametrize("cls", CLASSES)
def test_lists_of_weights(cls: type) -> None:
    ours = cls(3, 4, 2, bidirectional=True)
    stock = stock_class(cls)(3, 4, 2, bidirectional=True)
    assert ours._flat_weights_names == stock._flat_weights_names
    assert ours._all_weights == stock._all_weights
    flat = [w for weights in ours.all_weights for w in weights]
    assert all(
        a is b is c for a, b, c in zip(ours.parameters(), ours._flat_weights, flat, strict=True)
    )


def identity_spellings() -> list[Any]:
    return [
        pytest.param(fastrnn.RNN(3, 4, 2, "identity"), id="RNN-positional"),
        pytest.param(fastrnn.RNN(3, 4, num_layers=2, nonlinearity="identity"), id="RNN-keyword"),
        pytest.param(fastrnn.RNNCell(3, 4, True, "identity"), id="RNNCell-positional"),
        pytest.param(fastrnn.RNNCell(3, 4, nonlinearity="identity"), id="RNNCell-keyword"),
    ]


@pytest.mark.parametrize("module", identity_spellings())
def test_identity_construction(module: torch.nn.Module) -> None:
    assert module.nonlinearity == "identity"
    assert "tanh" not in repr(module)
    stock = stock_class(type(module))(*([3, 4, 2] if isinstance(module, fastrnn.RNN) else [3, 4]))
    assert list(module.state_dict()) == list(stock.state_dict())


# Errors: the same call must raise the same exception, with the same text.

BAD_CONSTRUCTIONS = {
    "no_arguments": ((), {}),
    "one_argument": ((3,), {}),
    "too_many": ((3, 4, 1, True, False, 0.0, False, 0, None, None, None, 1), {}),
    "unknown_keyword": ((3, 4), {"layers": 2}),
    "dropout_above": ((3, 4), {"dropout": 1.5}),
    "dropout_below": ((3, 4), {"dropout": -0.1}),
    "dropout_bool": ((3, 4), {"dropout": True}),
    "dropout_text": ((3, 4), {"dropout": "half"}),
    "bias_int": ((3, 4), {"bias": 1}),
    "batch_first_int": ((3, 4), {"batch_first": 0}),
    "input_size_float": ((3.0, 4), {}),
    "input_size_zero": ((0, 4), {}),
    "input_size_negative": ((-1, 4), {}),
    "hidden_size_float": ((3, 4.0), {}),
    "hidden_size_zero": ((3, 0), {}),
    "hidden_size_negative": ((3, -4), {}),
    "num_layers_zero": ((3, 4, 0), {}),
    "num_layers_negative": ((3, 4, -1), {}),
    "num_layers_float": ((3, 4, 1.5), {}),
    "proj_size_negative": ((3, 4), {"proj_size": -1}),
    "proj_size_zero": ((3, 4), {"proj_size": 0}),
    "proj_size_equal": ((3, 4), {"proj_size": 4}),
    "proj_size_above": ((3, 4), {"proj_size": 5}),
    "nonlinearity": ((3, 4), {"nonlinearity": "gelu"}),
    "nonlinearity_none": ((3, 4), {"nonlinearity": None}),
    "nonlinearity_positional": ((3, 4, 1, "gelu"), {}),
    "dtype_int": ((3, 4), {"dtype": torch.int32}),
}


def accepted_or_error(cls: type, args: Any, kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return repr(cls(*args, **kwargs))
        except Exception as error:
            return type(error), str(error)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(("args", "kwargs"), BAD_CONSTRUCTIONS.values(), ids=BAD_CONSTRUCTIONS)
def test_bad_construction(cls: type, args: Any, kwargs: Any) -> None:
    mine, theirs = (accepted_or_error(of, args, kwargs) for of in both(cls))
    assert mine == theirs


@pytest.mark.parametrize("cls", CLASSES)
def test_dropout_of_one_layer_warns(cls: type) -> None:
    caught = []
    for of in both(cls):
        with pytest.warns(UserWarning, match="dropout option adds dropout") as record:
            of(3, 4, dropout=0.5)
        caught.append([(w.category, str(w.message)) for w in record])
    assert caught[0] == caught[1]


def x(*shape: int, **options: Any) -> torch.Tensor:
    return torch.zeros(shape, **options)


def packed(*shape: int, enforce_sorted: bool = True, **options: Any) -> Any:
    lengths = [4, 2, 1] if enforce_sorted else [1, 2, 4]
    return pack_padded_sequence(x(*shape, **options), lengths, enforce_sorted=enforce_sorted)


def state(module: Any, *shape: int, **options: Any) -> Any:
    """A state of one shape, in the structure that the module takes."""
    part = torch.zeros(*shape, **options)
    return (part, part) if isinstance(module, torch.nn.LSTM) else part


# Modules are (5, 4, 2 layers); good arguments are x(T, 3, 5) and state(m, 2, 3, 4).
BAD_CALLS = {
    "none": lambda m: m(None),
    "list": lambda m: m([x(4, 3, 5)]),
    "4d": lambda m: m(x(1, 4, 3, 5)),
    "1d": lambda m: m(x(5)),
    "0d": lambda m: m(x()),
    "size": lambda m: m(x(4, 3, 7)),
    "size_unbatched": lambda m: m(x(4, 7)),
    "dtype": lambda m: m(x(4, 3, 5, dtype=torch.float64)),
    "dtype_int": lambda m: m(x(4, 3, 5, dtype=torch.int64)),
    "dtype_of_weights": lambda m: m.double()(x(4, 3, 5)),
    "no_steps": lambda m: m(x(0, 3, 5)),
    "no_steps_unbatched": lambda m: m(x(0, 5)),
    "hx_2d": lambda m: m(x(4, 3, 5), state(m, 2, 4)),
    "hx_4d": lambda m: m(x(4, 3, 5), state(m, 1, 2, 3, 4)),
    "hx_3d_unbatched": lambda m: m(x(4, 5), state(m, 2, 1, 4)),
    "hx_1d_unbatched": lambda m: m(x(4, 5), state(m, 4)),
    "hx_batch": lambda m: m(x(4, 3, 5), state(m, 2, 2, 4)),
    "hx_layers": lambda m: m(x(4, 3, 5), state(m, 1, 3, 4)),
    "hx_size": lambda m: m(x(4, 3, 5), state(m, 2, 3, 9)),
    "hx_size_unbatched": lambda m: m(x(4, 5), state(m, 2, 9)),
    "hx_other_structure": lambda m: m(
        x(4, 3, 5), x(2, 3, 4) if isinstance(m, torch.nn.LSTM) else (x(2, 3, 4), x(2, 3, 4))
    ),
    "hx_empty": lambda m: m(x(4, 3, 5), ()),
    "hx_of_one": lambda m: m(x(4, 3, 5), (x(2, 3, 4),)),
    "hx_of_three": lambda m: m(x(4, 3, 5), (x(2, 3, m.proj_size or 4), *[x(2, 3, 4)] * 2)),
    "hx_mixed_dims": lambda m: m(x(4, 3, 5), (x(2, 3, m.proj_size or 4), x(2, 4))),
    "cx_size": lambda m: m(x(4, 3, 5), (x(2, 3, m.proj_size or 4), x(2, 3, 9))),
    "hx_device": lambda m: m(x(4, 3, 5), state(m, 2, 3, m.proj_size or 4, device="meta")),
    "input_device": lambda m: m(x(4, 3, 5, device="meta")),
    "packed_hx_unsorted": lambda m: m(
        packed(4, 3, 5, enforce_sorted=False), state(m, 2, 2, m.proj_size or 4)
    ),
}
# Some torch.nn classes do not check these and fail deeper down.
LOW_LEVEL_BAD_CALLS = {
    "no_arguments": lambda m: m(),
    "too_many_arguments": lambda m: m(x(4, 3, 5), None, None),
    "hx_dtype": lambda m: m(x(4, 3, 5), state(m, 2, 3, m.proj_size or 4, dtype=torch.float64)),
    "weight_dtype": lambda m: (
        setattr(m, "weight_hh_l0", torch.nn.Parameter(m.weight_hh_l0.detach().double())),
        m(x(4, 3, 5)),
    ),
    "packed_size": lambda m: m(packed(4, 3, 7)),
    "packed_hx_2d": lambda m: m(packed(4, 3, 5), state(m, 2, 4)),
    "packed_hx_batch": lambda m: m(packed(4, 3, 5), state(m, 2, 2, 4)),
}
MODELS = {name: LAYERS[name] for name in ("lstm", "lstm_proj", "gru", "rnn_tanh")}


def errors_of(call: Any, kind: str) -> list[tuple[type, str]]:
    cls, options = MODELS[kind]
    return [outcome(lambda of=of: call(of(5, 4, 2, **options))) for of in both(cls)]


@pytest.mark.parametrize("path", [None, "kernels"], ids=["planned", "kernels"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_call(call: Any, kind: str, path: str | None) -> None:
    with use_path(path):
        mine, theirs = errors_of(call, kind)
    assert mine == theirs


@pytest.mark.parametrize("path", [None, "kernels"], ids=["planned", "kernels"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("call", LOW_LEVEL_BAD_CALLS.values(), ids=LOW_LEVEL_BAD_CALLS)
def test_bad_call_that_torch_does_not_explain(call: Any, kind: str, path: str | None) -> None:
    with use_path(path):
        (mine, _), (theirs, _) = errors_of(call, kind)
    assert mine in (theirs, RuntimeError)


@pytest.mark.parametrize("kind", MODELS)
def test_bad_dtype_of_packed_input(kind: str) -> None:
    """torch.nn.LSTM alone does not check this; ours may raise what the others raise."""
    call = lambda m: m(packed(4, 3, 5, dtype=torch.float64))  # noqa: E731
    mine, theirs = errors_of(call, kind)
    assert mine in (theirs, errors_of(call, "gru")[1])


# Results and gradients.


@pytest.mark.sweep(5)
@pytest.mark.parametrize("num_layers", [1, 2, 3], ids="{}layers".format)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_options(kind: str, form: str, num_layers: int) -> None:
    for bias, batch_first, bidirectional, hx in itertools.product((True, False), repeat=4):
        options = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
        dropout = 0.4 if num_layers > 1 else 0.0
        ours, stock = pair(kind, num_layers=num_layers, dropout=dropout, **options)
        paths = paths_of(kind) if num_layers == 2 else ("kernels",)
        check(ours, stock, Call(ours, form, hx=hx), paths, {**options, "hx": hx})


@pytest.mark.sweep(5)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_dtypes(kind: str, form: str, dtype: torch.dtype) -> None:
    ours, stock = pair(kind, num_layers=2, bidirectional=True, dtype=dtype)
    check(ours, stock, Call(ours, form, steps=9, dtype=dtype), paths_of(kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_half_precision_is_rounded_once(kind: str, form: str, dtype: torch.dtype) -> None:
    """If computed in float32, only results are rounded, by at most half a unit."""
    ours, stock = pair(kind, bidirectional=True, dtype=dtype)
    call = Call(ours, form, steps=17, dtype=dtype)
    exact = call.forward(oracle_of(stock), torch.float64)[0]
    with use_path("operators" if cpu.machine.multiplies(dtype) else "kernels"):
        mine = call.forward(ours)[0]
    for name, tensor in mine.items():
        bound = 0.51 * torch.finfo(dtype).eps * exact[name].abs() + 1e-6
        assert ((tensor.double() - exact[name]).abs() <= bound).all(), name


# (T, B, I, H).
SIZES = [(1, 1, 1, 1), (7, 1, 127, 129), (129, 7, 1, 7), (127, 7, 7, 1), (1, 129, 7, 127)]


@pytest.mark.parametrize("sizes", SIZES, ids="T{0[0]}-B{0[1]}-I{0[2]}-H{0[3]}".format)
@pytest.mark.parametrize("kind", LAYERS)
def test_odd_sizes(kind: str, sizes: tuple[int, int, int, int]) -> None:
    steps, batch, input_size, hidden_size = sizes
    hidden_size = max(hidden_size, 3) if kind == "lstm_proj" else hidden_size
    ours, stock = pair(kind, input_size, hidden_size, bidirectional=True)
    call = Call(ours, steps=steps, batch=batch)
    check(ours, stock, call, paths_of(kind), terms=steps * batch)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "rnn_identity"])
def test_empty_batch(kind: str, dtype: torch.dtype) -> None:
    ours, stock = pair(kind, num_layers=2, bidirectional=True, dtype=dtype)
    check(ours, stock, Call(ours, batch=0, dtype=dtype), PATHS)


@on_paths(["rnn_identity"])
def test_empty_batch_of_identity(kind: str, path: str | None) -> None:
    ours, stock = pair(kind)
    with use_path(path):
        results = Call(ours, batch=0).run(ours)
    assert results["output"].shape == (4, 0, 4)
    assert results["h_n"].shape == (1, 0, 4)
    assert all(
        results[f"d_{name}"].equal(torch.zeros_like(p)) for name, p in stock.named_parameters()
    )


LAYOUTS = {
    "strided": lambda t: torch.stack([t, t.detach()], dim=-1)[..., 0],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda t: t[..., :1].expand(t.shape),
    "offset": lambda t: torch.cat([t.detach()[:1], t])[1:],
}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("form", ["batched", "unbatched"])
@pytest.mark.parametrize("kind", LAYERS)
def test_strides(kind: str, form: str, layout: Any) -> None:
    for batch_first in (False, True):
        ours, stock = pair(kind, num_layers=2, bidirectional=True, batch_first=batch_first)
        for module in (ours, stock):
            for p in module.parameters():
                p.data = torch.stack([p.data, p.data], dim=-1)[..., 0].detach()
                assert not p.is_contiguous()
        check(ours, stock, Call(ours, form, layout=layout), paths_of(kind))


@pytest.mark.sweep(3)
@on_paths(["lstm", "lstm_proj", "gru", "rnn_tanh"])
@pytest.mark.parametrize("form", ["batched", "unbatched", "packed"])
def test_meta(kind: str, path: str | None, form: str) -> None:
    ours, stock = pair(kind, num_layers=2, bidirectional=True, device="meta")
    call = Call(ours, form)
    call.x, call.hx = call.x.to("meta"), [part.to("meta") for part in call.hx]
    theirs = call.forward(stock)[0]
    with use_path(path):
        mine = call.forward(ours)[0]
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.is_meta
        assert (tensor.shape, tensor.dtype) == (theirs[name].shape, theirs[name].dtype)


@pytest.mark.parametrize("form", FORMS)
def test_complex(form: str) -> None:
    """Of torch's own kernels, only RNN supports complex numbers."""
    ours, stock = pair("rnn_tanh", num_layers=2, dtype=torch.complex64)
    call = Call(ours, form, dtype=torch.complex64)
    with torch.no_grad():  # torch cannot differentiate the packing of complex numbers
        mine, theirs = (call.forward(module)[0] for module in (ours, stock))
    assert all(mine[name].equal(theirs[name]) for name in theirs)


@on_paths(LAYERS)
def test_packed_keeps_indices(kind: str, path: str | None) -> None:
    ours, _ = pair(kind, num_layers=2)
    for form in ("packed", "packed_unsorted"):
        call = Call(ours, form)
        input = call.wrap(call.x)
        with use_path(path):
            output, _ = ours(input)
        assert isinstance(output, torch.nn.utils.rnn.PackedSequence)
        assert output.batch_sizes.equal(input.batch_sizes)
        assert output.sorted_indices is input.sorted_indices
        assert output.unsorted_indices is input.unsorted_indices
        assert (input.sorted_indices is None) == (form == "packed")


@on_paths(["lstm", "lstm_proj"])
@pytest.mark.parametrize("form", FORMS)
def test_state_as_list(kind: str, path: str | None, form: str) -> None:
    ours, _ = pair(kind)
    call = Call(ours, form)
    with use_path(path):
        (y, (h, c)), (y2, hc2) = (
            ours(call.wrap(call.x), sequence(call.hx)) for sequence in (tuple, list)
        )
    assert isinstance(hc2, tuple)
    y, y2 = (getattr(result, "data", result) for result in (y, y2))
    assert all(a.equal(b) for a, b in zip((y, h, c), (y2, *hc2), strict=True))


@pytest.mark.parametrize("steps", [4, 64])
def test_states_that_torch_promotes_or_refuses(steps: int) -> None:
    """The outcome is the same for every length, though lengths take different paths."""
    ours, stock = pair("lstm", dtype=torch.float64)
    call = Call(ours, steps=steps, dtype=torch.float64)
    h, c = call.hx
    assert_same(*({"c_n": module(call.x, (h, c.float()))[1][1]} for module in (ours, stock)))
    mine, theirs = (outcome(lambda m=m: m(call.x, torch.stack([h, c]))) for m in (ours, stock))
    assert mine == theirs


@on_paths(LAYERS)
def test_dropout(kind: str, path: str | None) -> None:
    ours, _ = pair(kind, num_layers=2, dropout=0.5)
    call = Call(ours)
    with use_path(path), torch.no_grad():
        train, again = (call.forward(ours)[0]["output"] for _ in range(2))
        evaluated = call.forward(ours.eval())[0]["output"]
        ours.dropout = 0.0
        without = call.forward(ours.train())[0]["output"]
        ours.dropout = 1.0
        call.forward(ours)
    assert train.equal(again)
    assert evaluated.equal(without)
    assert not torch.allclose(train, evaluated)


@on_paths(LAYERS)
def test_inference_equals_training(kind: str, path: str | None) -> None:
    ours, stock = pair(kind, num_layers=2, bidirectional=True, dtype=torch.float64)
    call = Call(ours, dtype=torch.float64)
    theirs = call.forward(stock)[0]
    for context in (torch.no_grad, torch.inference_mode):
        with use_path(path), context():
            mine = call.forward(ours)[0]
        assert not any(tensor.requires_grad for tensor in mine.values())
        assert_same(mine, {name: tensor.detach() for name, tensor in theirs.items()})


@on_paths(LAYERS)
@pytest.mark.parametrize("form", FORMS)
def test_final_states_are_fresh(kind: str, path: str | None, form: str) -> None:
    """Programs may reset states in place before running backward."""
    for steps, num_layers in ((1, 1), (4, 1), (4, 2)):
        ours, _ = pair(kind, num_layers=num_layers)
        call = Call(ours, form, steps=steps)
        grads = []
        for reset in (False, True):
            with use_path(path):
                results, leaves = call.forward(ours)
                storages = [t.untyped_storage().data_ptr() for t in (*results.values(), *leaves)]
                assert len(set(storages)) == len(storages)
                if reset:
                    for name in results.keys() - {"output"}:
                        results[name].zero_()
                wanted = [leaves[0], *ours.parameters()]
                grads.append(torch.autograd.grad(results["output"].sum(), wanted))
        assert all(a.equal(b) for a, b in zip(*grads, strict=True))


# Autocast. oneDNN's dense LSTM fails under autocast on some machines, so torch.nn runs without
# oneDNN here.

AUTOCAST = [
    pytest.param(low, given, id=f"{dtype_name(low)}-from-{dtype_name(given)}")
    for low in (torch.bfloat16, torch.float16)
    for given in (torch.float32, low, torch.float64)
]


@pytest.mark.sweep(5)
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no_hx"])
@pytest.mark.parametrize(("low", "given"), AUTOCAST)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "identity" not in kind])
def test_autocast(
    kind: str, low: torch.dtype, given: torch.dtype, hx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    wide = torch.float64 if given is torch.float64 else torch.float32
    for form in ("batched",) if "cell" in kind else ("batched", "packed"):
        ours, stock = pair(kind, dtype=wide)
        call = Call(ours, form, dtype=given, hx=hx)
        exact = call.run(oracle_of(stock), torch.float64)
        with torch.autocast("cpu", dtype=low):
            theirs = call.run(stock)
            for path in PATHS:
                with use_path(path):
                    mine = call.run(ours)
                for name, tensor in mine.items():
                    assert tensor.dtype == theirs[name].dtype, (name, path, form)
                    # Products are rounded to the low dtype, whatever the dtype of the result.
                    errors = [(t[name].double() - exact[name]).abs().max() for t in (mine, theirs)]
                    unit = torch.finfo(low).eps
                    bound = 2 * errors[1] + unit * exact[name].abs().max()
                    assert errors[0] <= bound, (name, path, form)


def call_in_autocast(module: torch.nn.Module, x: torch.Tensor, hx: list[torch.Tensor]) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return module(x, hx[0] if len(hx) == 1 else tuple(hx))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "identity" not in kind])
@pytest.mark.parametrize("narrow", [{0}, {1}, {0, 1}], ids=["h", "c", "h_c"])
def test_autocast_of_carried_state(
    kind: str, narrow: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A carried state may have two dtypes, like that of a projected LSTM."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    modules = pair(kind)
    call = Call(modules[0], steps=64)
    hx = [part.bfloat16() if k in narrow else part for k, part in enumerate(call.hx)]
    mine, theirs = (
        [part.dtype for part in tree_leaves(call_in_autocast(module, call.x, hx))]
        for module in modules
    )
    assert mine == theirs


@pytest.mark.parametrize("wide", ["weight", "hx"])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
def test_autocast_does_not_narrow_float64(
    kind: str, wide: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    for module in pair(kind):
        call = Call(module, steps=64)
        hx = [part.double() if wide == "hx" else part for part in call.hx]
        if wide == "weight":
            module.weight_hh_l0.data = module.weight_hh_l0.data.double()
        with pytest.raises(RuntimeError, match="same dtype"):
            call_in_autocast(module, call.x, hx)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["lstm", "lstm_proj", "gru", "rnn_tanh"])
def test_autocast_as_this_machine_has_it(
    kind: str, low: torch.dtype, state: torch.dtype | None, grad: bool
) -> None:
    """With oneDNN, results have torch.nn's dtypes; where torch.nn fails, ours still runs."""
    ours, stock = pair(kind)
    # The last batch is empty, so it never reaches oneDNN.
    for form, rows in (("batched", 3), ("unbatched", 3), ("packed", 3), ("batched", 0)):
        call = Call(ours, form, steps=20, batch=rows, hx=state is not None)
        hx = [part.to(state) for part in call.hx or ()]
        arguments = (call.wrap(call.x), *([tuple(hx) if len(hx) > 1 else hx[0]] if hx else []))

        def dtypes(module: Any, arguments: Any = arguments) -> list[torch.dtype]:
            with torch.autocast("cpu", dtype=low), torch.set_grad_enabled(grad):
                y, final = module(*arguments)
            return [part.dtype for part in (getattr(y, "data", y), *tree_leaves(final))]

        mine = dtypes(ours)
        with contextlib.suppress(RuntimeError):
            assert mine == dtypes(stock), (form, rows)


def test_autocast_is_tried_out_of_sight() -> None:
    """Modes that observe operations do not see the probe of what this machine supports."""
    from torch.utils.flop_counter import FlopCounterMode

    autocast._try_one_operation.cache_clear()
    with FlopCounterMode(display=False) as counter:
        autocast.is_one_operation(torch.bfloat16, torch.float32)
    assert autocast._try_one_operation.cache_info().misses == 1
    assert counter.get_total_flops() == 0


@on_paths(["rnn_identity", "rnn_identity_cell"])
def test_autocast_of_identity(kind: str, path: str | None) -> None:
    ours, _ = pair(kind)
    with use_path(path), torch.autocast("cpu", dtype=torch.bfloat16):
        results = Call(ours).forward(ours)[0]
    assert all(tensor.dtype == torch.bfloat16 for tensor in results.values())


# Random combinations of options.


@given(data=st.data())
def test_any_options(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(LAYERS)), "kind")
    form = data.draw(st.sampled_from(FORMS), "form")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    steps, batch, input_size, num_layers = (
        data.draw(st.integers(1, high), name)
        for name, high in (("T", 9), ("B", 5), ("I", 9), ("layers", 3))
    )
    hidden_size = data.draw(st.integers(3 if kind == "lstm_proj" else 1, 9), "H")
    flags = ("bias", "batch_first", "bidirectional")
    options = {name: data.draw(st.booleans(), name) for name in flags}
    dropout = data.draw(st.sampled_from([0.0, 0.3]), "dropout") if num_layers > 1 else 0.0
    ours, stock = pair(
        kind,
        input_size,
        hidden_size,
        num_layers=num_layers,
        dropout=dropout,
        dtype=dtype,
        **options,
    )
    training = data.draw(st.booleans(), "training")
    used = data.draw(st.sets(st.sampled_from(["output", "h_n"]), min_size=1), "used")
    hx = data.draw(st.booleans(), "hx")
    call = Call(ours, form, steps=steps, batch=batch, hx=hx, dtype=dtype)
    modules = ours.train(training), stock.train(training)
    check(*modules, call, paths_of(kind), used=sorted(used))


# Other tools.


class Encoder(torch.nn.Module):
    def __init__(self, library: Any) -> None:
        super().__init__()
        self.lstm = library.LSTM(3, 4)
        self.cell = library.GRUCell(4, 5)

    def forward(self, x: torch.Tensor, hx: Any) -> Any:
        y, hx = self.lstm(x, hx)
        return self.cell(y[-1]), hx


def test_fx_takes_modules_as_leaves() -> None:
    ours, stock = Encoder(fastrnn), Encoder(torch.nn)
    traced = torch.fx.symbolic_trace(ours)
    assert traced.code == torch.fx.symbolic_trace(stock).code
    arguments = torch.randn(5, 2, 3), (torch.randn(1, 2, 4), torch.randn(1, 2, 4))
    assert traced(*arguments)[0].equal(ours(*arguments)[0])
    for module in (fastrnn.GRU(3, 4), torch.nn.GRU(3, 4)):
        with pytest.raises(torch.fx.proxy.TraceError):
            torch.fx.symbolic_trace(module)


@pytest.mark.parametrize("hx", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_jit_trace(kind: str, hx: bool) -> None:
    """At a length and batch for which calls would use our loop; warnings of ours are errors."""
    module = pair(kind)[0]
    call = Call(module, steps=64)
    arguments: tuple[Any, ...] = (call.x,)
    if hx:
        arguments += (tuple(call.hx) if len(call.hx) > 1 else call.hx[0],)
    traced = torch.jit.trace(module, arguments)
    torch.testing.assert_close(traced(*arguments), module(*arguments))
    other = Call(module, steps=9, batch=2)
    if not hx:
        torch.testing.assert_close(traced(other.x), module(other.x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.jit.trace(module, arguments, check_trace=False)


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if "identity" not in kind])
def test_jit_trace_of_packed_sequences(kind: str) -> None:
    class Packed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = pair(kind, batch_first=False)[0]

        def forward(self, data: torch.Tensor, batch_sizes: torch.Tensor) -> torch.Tensor:
            return self.layers(PackedSequence(data, batch_sizes))[0].data

    module = Packed()
    x = torch.randn(8, 3, module.layers.input_size)
    packed = pack_padded_sequence(x, torch.tensor([8, 5, 2]))
    traced = torch.jit.trace(module, packed[:2])
    torch.testing.assert_close(traced(*packed[:2]), module(*packed[:2]))


def test_names_of_a_subclass_do_not_collide() -> None:
    class Mine(fastrnn.GRU):
        def _run(self) -> int:
            return 1

        def _check(self) -> int:
            return 2

    module = Mine(3, 4)
    assert module(torch.randn(64, 2, 3))[0].shape == (64, 2, 4)


def test_mode_decides_the_activation_on_every_path() -> None:
    """As in torch.nn.RNN, which reads `nonlinearity` only in its constructor."""
    rnn = fastrnn.RNN(3, 4, dtype=torch.float64)
    rnn.nonlinearity = "relu"
    input = torch.randn(64, 2, 3, dtype=torch.float64)
    results = [rnn(input)[0]]
    for path in ("torch", "kernels"):
        with use_path(path):
            results.append(rnn(input)[0])
    assert_same({"a": results[0], "b": results[2]}, {"a": results[1], "b": results[1]})


def test_identity_is_not_flattened_for_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN has no such mode, which moving a module to a GPU would request."""
    called = []
    monkeypatch.setattr(torch.nn.RNN, "flatten_parameters", lambda self: called.append(self.mode))
    for nonlinearity in ("tanh", "identity"):
        fastrnn.RNN(3, 4, nonlinearity=nonlinearity).double()
    assert set(called) == {"RNN_TANH"}


def test_attributes_that_were_changed_afterwards():
    """Like torch.nn, we use the current values of attributes."""
    lstm = fastrnn.LSTM(4, 6, 2, bidirectional=True)
    lstm.num_layers = 1
    x = torch.randn(40, 3, 4)
    torch.testing.assert_close(lstm(x)[0], lstm.to_torch()(x)[0])


# What torch.nn rejects, and features that only torch.nn supports.


def arguments_of_any_kind(cls: type) -> list[tuple[Any, ...]]:
    """Valid inputs and states, and ones that are wrong in some way."""
    x, h = torch.randn(20, 3, 5), torch.randn(1, 3, 4)
    packed = pack_padded_sequence(x, [20, 20, 3])
    unsorted = pack_padded_sequence(x, [3, 20, 20], enforce_sorted=False)
    inputs = [x, x[:, 0], x[0, 0], x[None], x.double(), x.long(), x[..., :2], x[:0], None, 3, [1.0]]
    inputs += [x.numpy(), packed, unsorted, x.to_mkldnn(), x.to_sparse()]
    states = [None, h, h[0], h[0, 0], 0, "x", (h,), (h, h), [h, h], (h, h, h), (None, None), (h, 1)]
    states += [
        (),
        (h[0], h[0]),
        (h, h[0]),
        h.double(),
        (h.double(), h),
        h.numpy(),
        h[:, :2],
        h[..., :2],
    ]
    # torch.nn does not check a packed LSTM's state, and some would corrupt memory.
    few = [None, (h, h), [h, h], (h[0], h[0]), 0, "x"] if cls is fastrnn.LSTM else states
    return [
        (one, state)
        for one in inputs
        for state in (few if isinstance(one, PackedSequence) else states)
    ]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_arguments_of_any_kind(cls: type, grad: bool) -> None:
    ours, stock = (each(5, 4) for each in both(cls))
    for arguments in arguments_of_any_kind(cls):
        with torch.set_grad_enabled(grad):
            mine, theirs = (result(module, arguments) for module in (ours, stock))
        assert mine == theirs, arguments


def result(module: Any, arguments: Any) -> Any:
    """Type, shape and dtype of each result, or the type and first line of the error."""
    try:
        found = tree_leaves(module(*arguments))
    except Exception as error:  # of any type; ours must raise the same
        return type(error), str(error).partition("\n")[0]
    return [(type(part), part.shape, part.dtype) for part in found if part is not None]


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
@pytest.mark.parametrize("steps", [2, 60])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_weight_that_is_none(cls: type, steps: int, name: str) -> None:
    x = torch.randn(steps, 3, 5)
    modules = [each(5, 4) for each in both(cls)]
    for module in modules:
        setattr(module, name, None)
    mine, theirs = (outcome(lambda m=module: m(x)) for module in modules)
    assert mine == theirs
    if name == "weight_ih_l0":  # torch.nn reads its dtype
        return
    assert mine[0] is TypeError
    with pytest.raises(TypeError, match="expected Tensor as element"):
        modules[0](x, lengths=torch.tensor([steps, 1, 0]))


def test_identity_with_a_weight_that_is_none() -> None:
    rnn = fastrnn.RNN(5, 4, nonlinearity="identity")
    rnn.bias_hh_l0 = None
    with pytest.raises(TypeError, match="expected Tensor as element 3 in argument 2"):
        rnn(torch.randn(20, 3, 5))


@pytest.mark.parametrize("steps", [3, 60])
def test_packed_sequences_of_wrong_sizes(steps: int) -> None:
    """torch.nn.LSTM passes them to oneDNN, which reads and writes out of bounds."""
    lstm = fastrnn.LSTM(5, 4)
    packed = pack_padded_sequence(torch.randn(steps, 3, 5), [steps] * 3)
    for rows, width in ((2, 4), (1, 4), (3, 2)):
        h, c = torch.zeros(1, 3, 4), torch.zeros(1, rows, width)
        with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(1, 3, 4\), got"):
            lstm(packed, (h, c))
    h = torch.zeros(1, 1, 100, 4)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 3, 4\), got"):
        lstm(packed, (h, h))
    for width in (2, 7, 100):
        wrong = pack_padded_sequence(torch.randn(steps, 3, width), [steps] * 3)
        with pytest.raises(RuntimeError, match=f"Expected 5, got {width}"):
            lstm(wrong)


class Named(torch.Tensor):
    """A subclass with torch.Tensor's default of returning results in the same subclass."""


@pytest.mark.parametrize("of", ["input", "weights"])
@pytest.mark.parametrize("cls", CLASSES)
def test_subclasses_of_tensor(cls: type, of: str) -> None:
    """They run on torch's own kernels, even where ours would otherwise run."""
    ours, stock = (each(5, 4) for each in both(cls))
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(60, 3, 5)
    if of == "input":
        x = x.as_subclass(Named)
    else:
        for module in (ours, stock):
            for name, value in list(module.named_parameters()):
                setattr(module, name, torch.nn.Parameter(value.detach().as_subclass(Named)))
    results = [tree_leaves(module(x)) for module in (ours, stock)]
    for a, b in zip(*results, strict=True):
        assert type(a) is type(b) is Named
        assert torch.equal(a, b)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cls", [fastrnn.GRU, fastrnn.RNN])
def test_expanded_weights(cls: type, batch_first: bool) -> None:
    """torch's older per-sample gradients, which replace weights by a tensor subclass."""
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    modules = [each(5, 4, batch_first=batch_first) for each in both(cls)]
    modules[1].load_state_dict(modules[0].state_dict())
    x = torch.randn(3, 60, 5) if batch_first else torch.randn(60, 3, 5)
    for module in modules:
        call = call_for_per_sample_grads(module, batch_size=3, batch_first=batch_first)
        call(x)[0].sum().backward()
    for a, b in zip(*(module.parameters() for module in modules), strict=True):
        torch.testing.assert_close(a.grad_sample, b.grad_sample)
