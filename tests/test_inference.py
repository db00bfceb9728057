"""Prepared calls in inference: bitwise equal to ordinary ones, and what must not be prepared."""

import copy
import random
import threading
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import cpu, forms
from fastrnn.planner import use_path

LAYERS, CELLS = ("LSTM", "GRU", "RNN"), ("LSTMCell", "GRUCell", "RNNCell")
VARIANTS = ("PeepholeLSTM", "SLSTM", "LayerNormLSTM", "LayerNormGRU", "ResetBeforeGRU")
needs_kernels = pytest.mark.skipif(
    cpu.kernel_gap(torch.float32) is not None, reason="no kernels here"
)


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "_prepared", {})


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prepared calls that ran, by name."""
    seen: list[str] = []
    remember = forms._remember

    def watched(key: Any, tensors: Any, n_given: int, run: Any) -> Any:
        def noted(*arguments: Any) -> Any:
            seen.append(getattr(run, "__name__", type(run).__name__))
            return run(*arguments)

        return remember(key, tensors, n_given, None if run is None else noted)

    monkeypatch.setattr(forms, "_remember", watched)
    return seen


def flat(result: Any) -> list[torch.Tensor]:
    """The tensors of a result."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in flat(part)]


def long_way(module: Any, *arguments: Any) -> list[torch.Tensor]:
    """The same call, without preparation."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("run_prepared", "step_prepared"):
            patch.setattr(forms, name, lambda *_: None)
        return flat(module(*arguments))


def assert_equal(found: Any, expected: list[torch.Tensor]) -> None:
    found = flat(found)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert ours.equal(theirs)
        assert not ours.requires_grad


def state_of(module: Any, *sizes: int) -> Any:
    """A state; its h may be projected."""
    width, name = getattr(module, "proj_size", 0) or module.hidden_size, type(module).__name__
    others = 3 if name.startswith("SLSTM") else int("LSTM" in name)
    h, *rest = (torch.randn(*sizes, n) for n in (width, *[module.hidden_size] * others))
    return (h, *(part.abs() for part in rest)) if rest else h


def random_layers(seed: int) -> tuple[Any, torch.Tensor, Any]:
    """A module, an input, perhaps strided, and a state."""
    choose = random.Random(seed)
    cls, layers, directions = (
        choose.choice((*LAYERS, *VARIANTS)),
        choose.choice((1, 1, 2, 3)),
        choose.choice((1, 2)),
    )
    options: dict[str, Any] = {"nonlinearity": "relu"} if cls == "RNN" and seed % 2 else {}
    if "LSTM" in cls and seed % 3 == 0:
        options["proj_size"] = 3
    elif seed % 3 == 1:
        options["num_heads"] = 2
    if seed % 4 == 0:
        options["zoneout"] = 0.3
        options["recurrent_dropout"] = options["weight_dropout"] = 0.5
    inputs, steps, batch = (
        choose.choice((1, 7)),
        choose.choice((1, 2, 16)),
        choose.choice((1, 3, 4)),
    )
    module = getattr(fastrnn, cls)(
        inputs, choose.choice((6, 16, 34)), layers, bias=choose.random() < 0.7,
        batch_first=choose.random() < 0.5, bidirectional=directions == 2, **options,
    ).eval()  # fmt: skip
    sizes = (batch, steps) if module.batch_first else (steps, batch)
    x = (
        torch.randn(*sizes, 2 * inputs)[..., ::2]
        if choose.random() < 0.3
        else torch.randn(*sizes, inputs)
    )
    hx = state_of(module, layers * directions, batch)
    if choose.random() < 0.3:
        hx = forms.map_state(lambda part: part.transpose(0, 1).contiguous().transpose(0, 1), hx)
    return module, x, hx


@needs_kernels
@pytest.mark.parametrize("seed", range(80))
def test_layers_as_on_the_long_way(seed, runs):
    module, x, hx = random_layers(seed)
    with torch.no_grad(), use_path("kernels"):
        for given in ((x, hx), (x,)):
            expected = long_way(module, *given)
            runs.clear()
            for _ in range(3):
                assert_equal(module(*given), expected)
            assert runs == ["run"] * 3


@needs_kernels
@pytest.mark.parametrize("cls", [*CELLS, *(f"{name}Cell" for name in VARIANTS)])
@pytest.mark.parametrize("bias", [True, False])
def test_cells_as_on_the_long_way(cls, bias, runs):
    cell = getattr(fastrnn, cls)(7, 16, bias=bias)
    for batch in (1, 4):
        x, hx = torch.randn(batch, 7), state_of(cell, batch)
        with torch.no_grad(), use_path("kernels"):
            for given in ((x, hx), (x,), (torch.randn(batch, 14)[:, ::2], hx)):
                expected = long_way(cell, *given)
                runs.clear()
                for _ in range(3):
                    assert_equal(cell(*given), expected)
                assert runs == ["step"] * 3


@needs_kernels
@pytest.mark.parametrize(
    "options",
    [{"zoneout": 0.2}, {"zoneout": [0, 0.2]}, {"recurrent_dropout": 0.5}, {"weight_dropout": 0.5}],
    ids=str,
)
def test_what_is_drawn_takes_the_long_way(options, runs):
    module = fastrnn.LSTM(3, 4, **options)
    x = torch.randn(20, 2, 3)
    with torch.no_grad(), use_path("kernels"):
        first, second = module(x)[0], module(x)[0]
        assert not first.equal(second)
        assert not runs
        module.eval()
        assert module(x)[0].equal(module(x)[0])
        assert runs == ["run"] * 2
        if "zoneout" in options:
            expected = module(x)[0]
            module.zoneout = 0.5
            assert not module(x)[0].equal(expected)


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_layers_of_torch_as_on_the_long_way(cls, batch_first, runs):
    module = getattr(fastrnn, cls)(5, 6, 2, batch_first=batch_first, bidirectional=True)
    x, hx = torch.randn(3, 3, 5), state_of(module, 4, 3)
    with torch.no_grad(), use_path("torch"):
        for given in ((x, hx), (x,)):
            assert_equal(module(*given), long_way(module, *given))
    assert len(runs) == 2


@needs_kernels
@pytest.mark.parametrize("cls", LAYERS)
def test_a_state_carried_from_call_to_call(cls, runs):
    """T single steps match one call of T steps; results are new tensors that may be written to."""
    module, x = getattr(fastrnn, cls)(7, 16), torch.randn(9, 2, 7)
    with torch.no_grad(), use_path("kernels"):
        whole, final = module(x)
        state, outputs = None, []
        for step in x.split(1):
            output, state = module(step, state)
            outputs.append(output.clone())
            output.fill_(torch.nan)
    torch.testing.assert_close(torch.cat(outputs), whole)
    for ours, theirs in zip(flat(state), flat(final), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(runs) == 10


@needs_kernels
@pytest.mark.parametrize("cls", [*LAYERS, *CELLS])
def test_inputs_are_not_written_to(cls):
    module = getattr(fastrnn, cls)(7, 16)
    sizes = (2,) if cls in CELLS else (1, 2)
    x, hx = torch.randn(*sizes, 7), state_of(module, *sizes)
    before = copy.deepcopy(flat((x, hx, list(module.parameters()))))
    with torch.no_grad(), use_path("kernels"):
        for _ in range(3):
            module(x, hx)
    for now, then in zip(flat((x, hx, list(module.parameters()))), before, strict=True):
        assert now.equal(then)


def change_in_place(module: Any, name: str) -> None:
    getattr(module, name).mul_(-2)


def change_data(module: Any, name: str) -> None:
    getattr(module, name).data = torch.randn_like(getattr(module, name))


def change_strides(module: Any, name: str) -> None:
    weight = getattr(module, name)
    weight.data = torch.randn_like(weight.t()).t()


def change_parameter(module: Any, name: str) -> None:
    setattr(module, name, torch.nn.Parameter(torch.randn_like(getattr(module, name))))


def change_entry(module: Any, name: str) -> None:
    module._parameters[name] = torch.nn.Parameter(torch.randn_like(getattr(module, name)))


def change_parametrization(module: Any, name: str) -> None:
    torch.nn.utils.parametrize.register_parametrization(module, name, torch.nn.Tanh())


def change_requires_grad(module: Any, name: str) -> None:
    getattr(module, name).requires_grad_(False)


CHANGES = [
    change_in_place, change_data, change_strides, change_parameter, change_entry,
    change_parametrization, change_requires_grad,
]  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("cls", [*LAYERS, *CELLS])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_seen(cls, change):
    module = getattr(fastrnn, cls)(6, 6)
    sizes, suffix = ((2,), "") if cls in CELLS else ((1, 2), "_l0")
    x, hx = torch.randn(*sizes, 6), state_of(module, *sizes)
    with torch.no_grad(), use_path("kernels"):
        for name in ("weight_ih", "weight_hh", "weight_hh"):
            module(x, hx)
            if name + suffix in module._parameters:
                change(module, name + suffix)
            expected = long_way(module, x, hx)
            for _ in range(2):
                assert_equal(module(x, hx), expected)


@needs_kernels
@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_first", True), ("bidirectional", True), ("num_layers", 2), ("dropout", 0.5),
        ("dropout", 2.0), ("hidden_size", 5), ("input_size", 5), ("proj_size", 2),
        ("zoneout", 0.5), ("zoneout", [0.5]), ("recurrent_dropout", 0.5), ("weight_dropout", 1.0),
        ("num_heads", 2), ("mode", "GRU"), ("training", False),
    ],
)  # fmt: skip
def test_changed_attributes_are_seen(cls, name, value):
    """Results or errors are those of a call without preparation."""
    module = getattr(fastrnn, cls)(6, 6)
    x, hx = torch.randn(1, 1, 6), state_of(module, 1, 1)

    def outcome(call: Any) -> Any:
        torch.manual_seed(0)
        try:
            return flat(call(module, x, hx))
        except Exception as error:
            return type(error), str(error)

    with torch.no_grad(), use_path("kernels"):
        module(x, hx)
        setattr(module, name, value)
        expected = outcome(long_way)
        for _ in range(2):
            found = outcome(lambda module, *given: module(*given))
            if isinstance(expected, tuple):
                assert found == expected
            else:
                assert_equal(found, expected)


@needs_kernels
@pytest.mark.parametrize("cls", [*LAYERS, *CELLS])
def test_what_is_wrong_is_refused_as_on_the_long_way(cls):
    module = getattr(fastrnn, cls)(6, 6)
    sizes = (2,) if cls in CELLS else (1, 2)
    x, hx = torch.randn(*sizes, 6), state_of(module, *sizes)
    spoilt = [
        lambda t: t.double(), lambda t: t.to("meta"), lambda t: t[..., :5], lambda t: t[..., :0],
        lambda t: t.to_sparse(), lambda t: t[0], lambda t: None, lambda t: 1.0, lambda t: [t, t, t],
        lambda t: t.expand(3, *t.shape), lambda t: t.int(),
    ]  # fmt: skip

    def outcome(call: Any, *given: Any) -> Any:
        try:
            return flat(call(*given))
        except Exception as error:
            return type(error), str(error)

    with torch.no_grad(), use_path("kernels"):
        module(x, hx)
        for spoil in spoilt:
            for given in ((spoil(x), hx), (x, forms.map_state(spoil, hx)), (x, spoil(hx[0]))):
                expected = outcome(lambda *given: long_way(module, *given), *given)
                found = outcome(module, *given)
                if isinstance(expected, tuple):
                    assert found == expected
                else:
                    assert_equal(found, expected)


class Operators(TorchDispatchMode):
    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*args, **(kwargs or {}))


class Own(torch.Tensor):
    """A subclass that torch.nn would preserve."""


def not_bare(module: Any, x: torch.Tensor, hx: Any) -> dict[str, Any]:
    """Calls under modes, transforms and the like, by name."""

    def inside(context: Any) -> Any:
        def call() -> Any:
            with context:
                return module(x, hx)

        return call

    weights = dict(module.named_parameters())
    return {
        "dispatch": inside(Operators()),
        "function": inside(Functions()),
        "device": inside(torch.device("cpu")),
        "autocast": inside(torch.autocast("cpu")),
        "grad": inside(torch.enable_grad()),
        "dual": inside(torch.autograd.forward_ad.dual_level()),
        "vmap": lambda: torch.vmap(lambda part: flat(module(part, hx))[0])(x[None])[0],
        "jvp": lambda: torch.func.jvp(lambda part: flat(module(part, hx))[0], (x,), (x,))[0],
        "trace": lambda: torch.jit.trace(module, (x, hx), check_trace=False)(x, hx),
        "functional": lambda: torch.func.functional_call(module, weights, (x, hx)),
        "subclass": lambda: module(x.as_subclass(Own), hx),
        "neg": lambda: module(torch._neg_view(-x), hx),
    }


@needs_kernels
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cls", [*LAYERS, *CELLS])
@pytest.mark.parametrize("name", [*not_bare(torch.nn.Identity(), torch.zeros(1), None)])
def test_what_looks_at_a_call_sees_the_long_way(cls, name, runs):
    module = getattr(fastrnn, cls)(6, 6)
    sizes = (2,) if cls in CELLS else (1, 2)
    x, hx = torch.randn(*sizes, 6), state_of(module, *sizes)
    with torch.no_grad(), use_path("kernels"):
        expected = flat(module(x, hx))
        assert_equal(module(x, hx), expected)
        count, call = len(runs), not_bare(module, x, hx)[name]
        found = flat(call())
        assert count == 2
        has_own = name == "functional" or (name == "grad" and cls in CELLS)
        assert len(runs) == count + has_own
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if name == "autocast" else {}
    torch.testing.assert_close(found[0].detach().to(x.dtype), expected[0], **tolerance)


@needs_kernels
def test_a_gradient_is_recorded_wherever_one_is_wanted(runs):
    module, x, h = fastrnn.GRU(6, 6), torch.randn(1, 2, 6), torch.randn(1, 2, 6)
    with use_path("kernels"):
        with torch.no_grad():
            assert not module(x, h)[0].requires_grad
        assert module(x, h)[0].requires_grad
        module.requires_grad_(False)
        assert not module(x, h)[0].requires_grad
        assert module(x, h.clone().requires_grad_())[0].requires_grad
        assert module(x.clone().requires_grad_(), h)[0].requires_grad
        with torch.inference_mode():
            y, carried = module(x, h)
            assert y.is_inference()
        assert_equal(module(x, carried), long_way(module, x, carried))
    assert len(runs) == 4, "with frozen weights too"


@needs_kernels
def test_same_tensor_twice():
    """No call is prepared if two weights are the same tensor."""
    module, x = fastrnn.LSTM(6, 6), torch.randn(1, 2, 6)
    zeros = torch.zeros(1, 2, 6)
    module.bias_ih_l0 = module.bias_hh_l0
    with torch.no_grad(), use_path("kernels"):
        expected = long_way(module, x, (zeros, zeros))
        for _ in range(2):
            assert_equal(module(x, (zeros, zeros)), expected)
    assert not forms._prepared


@needs_kernels
def test_what_is_kept_does_not_grow(monkeypatch):
    monkeypatch.setattr(forms, "_MOST_KEYS", 3)
    module = fastrnn.GRU(6, 6)
    with torch.no_grad(), use_path("kernels"):
        for steps in range(1, 9):
            module(torch.randn(steps, 1, 6))
            assert len(forms._prepared) <= 3
        for name in module._parameters:
            getattr(module, name).requires_grad_(False)
            module(torch.randn(8, 1, 6))
        for known in forms._prepared.values():
            assert len(known) <= forms._MOST_GUARDS


@needs_kernels
def test_paths_are_not_mixed_up(runs):
    module, x = fastrnn.GRU(6, 6), torch.randn(4, 2, 6)
    with torch.no_grad():
        for path, ways in (("kernels", 1), ("operators", 0), ("reference", 0), ("torch", 1)) * 2:
            runs.clear()
            with use_path(path):
                assert_equal(module(x), long_way(module, x))
            assert len(runs) == ways, path


@needs_kernels
def test_threads_share_a_module(runs):
    """Each thread has its own state and its own sizes."""
    module = fastrnn.LSTM(7, 16, 2, bidirectional=True)

    def stream(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(1 + seed % 3, 1 + seed, 7, generator=generator) for _ in range(60)]
        with torch.no_grad(), use_path("kernels"):
            state = None
            for x in inputs:
                given = x if state is None else (x, state)
                y, state = module(*given) if isinstance(given, tuple) else module(given)
                results[seed].append(y)

    results: list[list[torch.Tensor]] = [[] for _ in range(4)]
    for seed in range(4):
        stream(seed)
    expected, results = results, [[] for _ in range(4)]
    threads = [threading.Thread(target=stream, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(results, expected, strict=True):
        assert len(ours) == 60
        assert all(map(torch.equal, ours, theirs))


@needs_kernels
def test_one_tensor_as_all_states_of_many(runs):
    module, zeros = fastrnn.SLSTM(3, 4), torch.zeros(1, 2, 4)
    with torch.no_grad(), use_path("kernels"):
        for _ in range(3):
            module(torch.randn(5, 2, 3), (zeros,) * 4)
    assert runs == ["run"] * 3
    assert len(forms._prepared) == 1


@needs_kernels
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        ("GRU", {}),
        ("LSTM", {"num_heads": 8}),
        ("LayerNormLSTM", {}),
        ("LayerNormGRU", {"bidirectional": True}),
    ],
)
def test_by_several_threads(cls, options, runs):
    """Steps large enough to split between threads."""
    module, x = getattr(fastrnn, cls)(64, 256, **options), torch.randn(3, 16, 64)
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with torch.no_grad(), use_path("kernels"):
                assert_equal(module(x), long_way(module, x))
    finally:
        torch.set_num_threads(before)
    assert runs == ["run"] * 2


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_other_dtypes(runs, name, dtype):
    """Dtypes that the kernels compute in float32 have no prepared calls."""
    module, is_cell = getattr(fastrnn, name)(7, 16).to(dtype), name in CELLS
    x = torch.randn(*((2, 7) if is_cell else (4, 2, 7)), dtype=dtype)
    state = forms.map_state(lambda t: t.to(dtype), state_of(module, *([2] if is_cell else [1, 2])))
    with torch.no_grad(), use_path("kernels"):
        for hx in (None, state):
            assert_equal(module(x, hx), long_way(module, x, hx))
    assert len(runs) == (2 if cpu.machine.multiplies(dtype) else 0)


@needs_kernels
def test_one_tensor_as_both_states(runs):
    module, x, zeros = fastrnn.LSTM(7, 16), torch.randn(4, 2, 7), torch.randn(1, 2, 16)
    other = torch.randn(1, 2, 16)
    with torch.no_grad(), use_path("kernels"):
        for hx in ((zeros, zeros), (zeros, other), [zeros, zeros], (other, other)):
            assert_equal(module(x, hx), long_way(module, x, hx))
    assert runs == ["run"] * 4


@needs_kernels
@pytest.mark.parametrize("path", [None, "kernels"])
@pytest.mark.parametrize("name", LAYERS)
def test_other_weights_than_the_parameters(name, path):
    """torch.nn computes with `_flat_weights`, which may hold dropped or scaled weights."""
    module, x = getattr(fastrnn, name)(8, 16), torch.randn(5, 2, 8)
    with torch.no_grad(), use_path(path):
        module(x)
        module._flat_weights = [weight * 2 for weight in module._flat_weights]
        torch.testing.assert_close(module(x), getattr(torch.nn, name).forward(module, x))


@needs_kernels
def test_numbers_that_a_class_computes(runs):
    class BatchFirst(fastrnn.LSTM):
        batch_first = property(lambda self: True, lambda self, value: None)

    module, x = BatchFirst(8, 16), torch.randn(3, 5, 8)
    with torch.no_grad(), use_path("kernels"):
        assert module(x)[1][0].shape == (1, 3, 16)
        vars(module)["batch_first"] = False
        assert module(x)[1][0].shape == (1, 3, 16)
        del vars(module)["dropout"]
        with pytest.raises(AttributeError, match="dropout"):
            module(x)
    assert not runs


@needs_kernels
def test_a_cell_that_once_went_the_long_way(runs):
    """The reason applied only to that call, or to another module."""
    module, other, x = fastrnn.GRUCell(8, 16), fastrnn.GRUCell(8, 16), torch.randn(1, 8)
    other.weight_hh.data = other.weight_hh.data.t().contiguous().t()
    with torch.no_grad(), use_path("kernels"):
        other(x)
        with torch.autocast("cpu", torch.bfloat16):
            module(x)
        assert not runs
        assert_equal(module(x), long_way(module, x))
    assert runs == ["step"]


def test_no_more_is_remembered_than_so_much(monkeypatch):
    monkeypatch.setattr(forms, "_MOST_KEYS", 8)
    module = fastrnn.GRUCell(4, 4)
    with torch.no_grad(), use_path("torch"):
        for batch in range(1, 30):
            module(torch.randn(batch, 4))
    assert len(forms._prepared) <= 8


def test_an_unknown_nonlinearity():
    module = fastrnn.RNNCell(4, 4)
    module.nonlinearity = "foo"
    with torch.no_grad(), pytest.raises(RuntimeError, match="Unknown nonlinearity: foo"):
        module(torch.randn(2, 4))


@needs_kernels
@pytest.mark.parametrize("path", [None, "kernels", "operators"])
def test_negative_views_of_states(path):
    module, x, h = fastrnn.GRU(8, 16), torch.randn(5, 2, 8), torch.randn(1, 2, 16)
    with torch.no_grad(), use_path(path):
        assert_equal(module(x, torch._neg_view(h)), flat(module(x, -h)))


def test_hooks_and_copies():
    """Prepared calls are not stored in the module."""
    module, x = fastrnn.GRU(6, 6), torch.randn(2, 1, 6)
    seen = []
    module.register_forward_hook(lambda *given: seen.append(given))
    with torch.no_grad(), use_path("kernels"):
        expected = flat(module(x))
        assert_equal(copy.deepcopy(module)(x), expected)
    assert len(seen) == 2
    assert not any("prepared" in name for name in vars(module))
