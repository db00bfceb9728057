"""torch's FlopCounterMode counts our operators like the products of torch.nn."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from compare import call_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import fastrnn
from fastrnn import cpu, gpu
from fastrnn.planner import use_path

T, B, X, H = 7, 3, 5, 4  # steps, batch, input and hidden size
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
OPTIONS = {
    "plain": {},
    "layers": {"num_layers": 2, "bidirectional": True},
    "no_bias": {"bias": False, "bidirectional": True},
    "batch_first": {"batch_first": True},
}

by_name = pytest.mark.parametrize("name", GATES)
by_path = pytest.mark.parametrize("path", ["kernels", "reference"])


def count(run: Callable[[], Any], of: str = "") -> int:
    """Count the FLOPs of a call in operators whose names start with `of`."""
    with FlopCounterMode(display=False) as counter:
        run()
    by_operator = counter.get_flop_counts().get("Global", {})
    return sum(n for operator, n in by_operator.items() if str(operator).startswith(of))


def infer(module: torch.nn.Module, *args: Any) -> None:
    with torch.no_grad():
        module(*args)


def train(module: torch.nn.Module, *args: Any, **options: Any) -> None:
    output, _ = module(*args, **options)
    (output.data if isinstance(output, PackedSequence) else output).sum().backward()


def pair(name: str, **options: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and torch.nn's, in a dtype that oneDNN does not run as one operator."""
    options["dtype"] = torch.float64
    return getattr(fastrnn, name)(X, H, **options), getattr(torch.nn, name)(X, H, **options)


def check_equal(
    path: str,
    modules: tuple[torch.nn.Module, torch.nn.Module],
    run: Callable[[torch.nn.Module], None],
) -> None:
    ours, theirs = modules
    with use_path(path):
        found = count(partial(run, ours))
    assert found == count(partial(run, theirs)) > 0


def batch(requires_grad: bool = False) -> Tensor:
    return torch.randn(T, B, X, dtype=torch.float64, requires_grad=requires_grad)


def state(name: str, *shape: int) -> Any:
    h, c = (torch.zeros(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return (h, c) if name.startswith("LSTM") else h


@by_path
@by_name
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_layers(name: str, path: str, options: dict[str, Any]) -> None:
    modules = pair(name, **options)
    for x in (batch(), batch(requires_grad=True), batch()[:1], batch()[:, 0]):
        check_equal(path, modules, lambda module, x=x: infer(module, x))
        check_equal(path, modules, lambda module, x=x: train(module, x))


@by_path
@by_name
def test_given_state(name: str, path: str) -> None:
    x, hx = batch(), state(name, 1, B, H)
    check_equal(path, pair(name), lambda module: train(module, x, hx))


@by_path
@by_name
def test_packed(name: str, path: str) -> None:
    modules, hx = pair(name, bidirectional=True), state(name, 2, B, H)
    x = pack_padded_sequence(batch(), torch.tensor([7, 5, 2]))
    check_equal(path, modules, lambda module: infer(module, x))
    check_equal(path, modules, lambda module: train(module, x, hx))


@by_path
def test_projection(path: str) -> None:
    modules, x = pair("LSTM", proj_size=2, num_layers=2, bidirectional=True), batch()
    check_equal(path, modules, lambda module: infer(module, x))
    check_equal(path, modules, lambda module: train(module, x))


@by_path
@by_name
def test_frozen_weights(name: str, path: str) -> None:
    modules, x = pair(name, bidirectional=True), batch(requires_grad=True)
    check_equal(path, modules, lambda module: train(module.requires_grad_(False), x))


@by_path
@by_name
def test_checkpoint(name: str, path: str) -> None:
    """The second forward pass is counted."""
    x = batch(requires_grad=True)

    def run(module: torch.nn.Module) -> None:
        checkpoint(lambda x: module(x)[0], x, use_reentrant=False).sum().backward()

    check_equal(path, pair(name), run)


@by_path
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(name: str, path: str) -> None:
    modules, x, hx = pair(name), batch()[0], state(name, B, H)

    def run(module: torch.nn.Module) -> None:
        new = module(x, hx)
        (new if isinstance(new, Tensor) else new[0]).sum().backward()

    check_equal(path, modules, lambda module: infer(module, x))
    check_equal(path, modules, run)


@by_name
def test_torch_counts_by_itself(name: str) -> None:
    modules, x = pair(name), batch()
    check_equal("torch", modules, lambda module: train(module, x))
    with use_path("torch"):
        assert count(lambda: train(modules[0], x), of="fastrnn") == 0


@by_name
def test_by_hand(name: str) -> None:
    """In float32, where torch.nn's LSTM may count nothing."""
    module, width, x = getattr(fastrnn, name)(X, H), GATES[name] * H, torch.randn(T, B, X)
    forward = 2 * T * B * (X + H) * width
    to_h = 2 * (T - 1) * B * H * width  # zeros before the first step have no gradient
    with use_path("kernels"):
        assert count(lambda: infer(module, x)) == forward
        assert count(lambda: train(module, x)) == 2 * forward + to_h
        x.requires_grad_()
        assert count(lambda: train(module, x)) == 2 * forward + to_h + 2 * T * B * X * width


@by_name
def test_half_of_a_step(name: str) -> None:
    """A mode that sees only the forward or only the backward pass."""
    module, x = getattr(fastrnn, name)(X, H), torch.randn(T, B, X)
    with use_path("kernels"):
        both, forward = count(lambda: train(module, x)), count(lambda: infer(module, x))
        assert count(lambda: module(x)) == forward
        assert count(module(x)[0].sum().backward) == both - forward


@by_name
def test_recompute(name: str) -> None:
    module, x = getattr(fastrnn, name)(X, H), torch.randn(T, B, X)
    with use_path("kernels"):
        both, forward = count(lambda: train(module, x)), count(lambda: infer(module, x))
        assert count(lambda: train(module, x, recompute=True)) == both + forward
        # Every chunk, even the first, has an initial state.
        more = 2 * B * H * GATES[name] * H
        assert count(lambda: train(module, x, recompute=3)) == both + forward + more


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_recompute_on_a_gpu(cell: str) -> None:
    """Without a GPU: what forward saves decides whether backward first reruns it."""
    formula = flop_registry[torch.ops.fastrnn.layer_backward]
    width = (4 if cell == "lstm" else 3) * H
    weights, given, counts = [torch.empty(width, size) for size in (X, H)], [torch.empty(1)], []
    with FakeTensorMode():
        x, y = (torch.empty(T, B, size, device="cuda") for size in (X, H))
        for save in (cpu.ALL, cpu.STATES, cpu.NOTHING):
            kept = gpu.fake_saved(call_of(cell, x, [], weights), save)
            saved = [y, *kept] if save != cpu.NOTHING else []
            rest = (weights, None, False, None, [], [], saved, True, True, 0)
            counts.append(formula(cell, y, [], [], x, given, *rest, out_val=None))
    forward = 2 * T * B * (X + H) * width
    assert counts == [2 * forward, 3 * forward, 3 * forward]


@pytest.mark.parametrize(
    "name", ["LayerNormLSTM", "LayerNormGRU", "PeepholeLSTM", "ResetBeforeGRU", "SLSTM"]
)
def test_variants(name: str) -> None:
    """Counted as layers with as many gates, although the operator may call torch's."""
    module, x = getattr(fastrnn, name)(X, H), torch.randn(T, B, X)
    like = fastrnn.GRU(X, H) if "GRU" in name else fastrnn.LSTM(X, H)
    with use_path("kernels"):
        forward = count(lambda: infer(like, x))
        assert count(lambda: infer(module, x)) == forward
        assert count(lambda: train(module, x)) == count(lambda: train(like, x))
    with use_path("reference"):
        assert count(lambda: infer(module, x)) == forward


@by_path
@by_name
def test_heads(name: str, path: str) -> None:
    module, x = getattr(fastrnn, name)(X, H, num_heads=2), torch.randn(T, B, X)
    with use_path(path):
        assert count(lambda: infer(module, x)) == 2 * T * B * (X + H // 2) * GATES[name] * H


def test_lengths_count_as_padded() -> None:
    module, x = fastrnn.GRU(X, H), torch.randn(T, B, X)
    with use_path("kernels"):
        found = count(lambda: train(module, x, lengths=torch.tensor([7, 5, 2])))
        assert found == count(lambda: train(module, x)) > 0


def test_autocast() -> None:
    module, x = fastrnn.GRU(X, H), torch.randn(T, B, X)
    with use_path("kernels"):
        expected = count(lambda: train(module, x))
        with torch.autocast("cpu", torch.bfloat16):
            assert count(lambda: train(module, x)) == expected


@by_name
def test_without_data(name: str) -> None:
    make, x = partial(getattr(fastrnn, name), X, H), torch.randn(T, B, X)
    with use_path("kernels"):
        expected = count(lambda: train(make(), x))
        assert count(lambda: train(make(device="meta"), x.to("meta"))) == expected
        with FakeTensorMode():
            assert count(lambda: train(make(), torch.empty(T, B, X))) == expected


def test_symbolic_sizes() -> None:
    """Counting does not specialize sizes that a compiler keeps symbolic."""

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        rest = (list(weights), None, False, None, [], [])
        d_final = [x.new_zeros(1, x.shape[1], H)]
        with FlopCounterMode(display=False) as counter:
            torch.ops.fastrnn.layer("gru", x, [], *rest, cpu.NOTHING, False)
            dx, *_ = torch.ops.fastrnn.layer_backward(
                "gru", None, d_final, [], x, [], *rest, [], True, True, 0
            )
        assert isinstance(counter.get_total_flops(), torch.SymInt)
        for size, example in zip(x.shape, (T, B, X), strict=True):
            assert not statically_known_true(size == example)
        return dx

    weights = [w.detach() for w in fastrnn.GRU(X, H).parameters()]
    make_fx(run, tracing_mode="symbolic")(torch.randn(T, B, X), *weights)


def test_no_steps() -> None:
    weights = [w.detach() for w in fastrnn.GRU(X, H).parameters()]
    x, final = torch.empty(0, B, X), [torch.zeros(1, B, H)]
    rest = (weights, None, False, None, [], [], [], True, True, 0)
    backward = torch.ops.fastrnn.layer_backward
    assert count(lambda: backward("gru", None, final, [], x, [], *rest)) == 0


def test_transforms() -> None:
    module, x = fastrnn.GRU(X, H), torch.randn(T, B, X)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    @torch.func.grad
    def grad(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,))[0].sum()

    with use_path("kernels"):
        expected = count(lambda: train(module, x))
        assert count(lambda: grad(parameters, x)) == expected
        xs = torch.randn(6, T, B, X)
        of_samples = torch.func.vmap(grad, in_dims=(None, 0))
        assert count(lambda: of_samples(parameters, xs)) == 6 * expected
        ensemble = {name: torch.stack([p] * 6) for name, p in parameters.items()}
        assert count(lambda: torch.func.vmap(grad)(ensemble, xs)) == 6 * expected


def test_second_derivative_counts_by_itself() -> None:
    weights, x = list(fastrnn.GRU(X, H).parameters()), torch.randn(T, B, X, requires_grad=True)

    def run() -> None:
        y, _ = fastrnn.functional.gru(x, None, weights)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        grad.square().sum().backward()

    with use_path("reference"):
        expected = count(run)
    with use_path("kernels"):
        assert count(run, of="aten") == expected  # the whole reference
        assert count(run, of="fastrnn") > 0


def test_compiled() -> None:
    torch._dynamo.reset()
    fastrnn.allow_compile()
    module, x = fastrnn.GRU(X, H), torch.randn(T, B, X)
    with use_path("kernels"):
        both, forward = count(lambda: train(module, x)), count(lambda: infer(module, x))
    compiled = torch.compile(lambda x: module(x)[0], backend="aot_eager")
    assert count(compiled(x).sum().backward) == both - forward
    with use_path("kernels"):  # torch does not use compiled code under such a mode
        assert count(lambda: compiled(x).sum().backward()) == both
    with torch.no_grad():
        exported = torch.export.export(module, (x,)).module()
        assert count(lambda: exported(x)) == forward
    torch._dynamo.reset()


IMPORTS = {
    "counter_first": "from torch.utils.flop_counter import FlopCounterMode; import fastrnn",
    "counter_last": "import fastrnn; from torch.utils.flop_counter import FlopCounterMode",
    "without_triton": (
        "import sys; sys.modules['triton'] = None\n"
        "import fastrnn; from torch.utils.flop_counter import FlopCounterMode"
    ),
    "reloaded": (
        "import importlib, fastrnn, torch.utils.flop_counter as counter\n"
        "FlopCounterMode = importlib.reload(counter).FlopCounterMode"
    ),
}


@pytest.mark.sweep(4)
@pytest.mark.parametrize("imports", IMPORTS.values(), ids=IMPORTS.keys())
def test_any_order_of_imports(imports: str) -> None:
    code = (
        f"{imports}\n"
        "import torch\n"
        "from fastrnn.planner import use_path\n"
        f"module = fastrnn.GRU({X}, {H})\n"
        "with use_path('kernels'), FlopCounterMode(display=False) as counter:\n"
        f"    module(torch.randn({T}, {B}, {X}))\n"
        "print(counter.get_total_flops())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 2 * T * B * (X + H) * 3 * H
