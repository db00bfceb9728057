"""Single steps with gradients by the kernels: prepared steps against the other paths."""

import gc
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn import cpu, forms, stepping
from fastrnn import functional as F
from fastrnn.planner import Problem, plan, use_path

needs_kernels = pytest.mark.skipif(
    cpu.kernel_gap(torch.float32) is not None, reason="no kernels for this CPU"
)
pytestmark = needs_kernels

STOCK = ["LSTMCell", "GRUCell", "RNNCell"]
KINDS = [
    *STOCK, "PeepholeLSTMCell", "SLSTMCell", "LayerNormLSTMCell", "LayerNormGRUCell",
    "ResetBeforeGRUCell",
]  # fmt: skip
SIZES = [(1, 1, 1), (3, 5, 7), (2, 33, 40), (70, 20, 17)]


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "_prepared", {})


def make(kind: str, inputs: int = 5, hidden: int = 7, dtype: Any = torch.float64, **options: Any):
    torch.manual_seed(3)
    return getattr(fastrnn, kind)(inputs, hidden, dtype=dtype, **options)


def flat(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else list(state)


def state_of(module: Any, batch: int, seed: int = 4) -> Any:
    generator, (weight, *_) = torch.Generator().manual_seed(seed), module.parameters()
    parts = [
        torch.rand(batch, module.hidden_size, generator=generator, dtype=weight.dtype)
        for _ in range(module._n_states)
    ]
    return tuple(parts) if len(parts) > 1 else parts[0]


def inputs_of(module: Any, steps: int, batch: int, seed: int = 5) -> Tensor:
    generator, (weight, *_) = torch.Generator().manual_seed(seed), module.parameters()
    return torch.randn(steps, batch, module.input_size, generator=generator, dtype=weight.dtype)


def leaf(part: Tensor) -> Tensor:
    return part.detach().clone().requires_grad_()


def chain(module: Any, x: Tensor, state: Any) -> tuple[Tensor, list[Tensor]]:
    """A loss that depends on every output and final state of a loop over steps; all outputs."""
    total, outputs = torch.zeros((), dtype=x.dtype), []
    for k, part in enumerate(x):
        state = module(part, state)
        outputs += flat(state)
        total = total + ((k + 1) * flat(state)[0]).sin().sum()
    for k, part in enumerate(flat(state)):
        total = total + (part * (k + 2)).cos().sum()
    return total, outputs


def results(module: Any, path: str | None, x: Tensor, state: Any, **kind: Any) -> list[Tensor]:
    """Outputs, then all gradients."""
    x = leaf(x)
    state = tuple(map(leaf, state)) if isinstance(state, tuple) else leaf(state)
    with use_path(path):
        total, outputs = chain(module, x, state)
        wrt = [x, *flat(state), *module.parameters()]
        return [*outputs, *torch.autograd.grad(total, wrt, **kind)]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def names_of(output: Tensor) -> str:
    return type(output.grad_fn).__name__


@pytest.mark.sweep(9)
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_reference(kind, dtype, bias, steps):
    # Normalizing one unit gives 0 with a slope of 316, which leaves few correct digits.
    for batch, inputs, hidden in SIZES[kind == "LayerNormLSTMCell" :]:
        module = make(kind, inputs, hidden, dtype, bias=bias)
        x, state = inputs_of(module, steps, batch), state_of(module, batch)
        found, expected = (results(module, path, x, state) for path in ("kernels", "reference"))
        for mine, theirs in zip(found, expected, strict=True):
            # The error of a sum follows its largest terms.
            scale = float(theirs.detach().abs().max().clamp(min=1))
            tolerance = 64 * torch.finfo(dtype).eps
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * scale)


def _double(state: Any) -> Any:
    return tuple(part.double() for part in state) if isinstance(state, tuple) else state.double()


@pytest.mark.parametrize("kind", STOCK)
def test_against_torch(kind):
    ours, stock = make(kind), getattr(torch.nn, kind)(5, 7, dtype=torch.float64)
    stock.load_state_dict(ours.state_dict())
    x, state = inputs_of(ours, 5, 3), state_of(ours, 3)
    expected = results(stock, None, x, state)
    assert_close(results(ours, "kernels", x, state), expected)
    assert_close(results(ours, None, x, state), expected)


@pytest.mark.sweep(5)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind, dtype):
    module = make(kind, dtype=dtype)
    x, state = inputs_of(module, 3, 2), state_of(module, 2)
    found = results(module, "kernels", x, state)
    assert {part.dtype for part in found} == {dtype}
    expected = results(module.double(), "reference", x.double(), _double(state))
    for mine, theirs in zip(found, expected, strict=True):
        scale = float(theirs.detach().abs().max().clamp(min=1))
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=16 * eps * scale)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("kind", KINDS)
def test_the_short_way_is_taken(kind):
    module, x = make(kind), inputs_of(make(kind), 2, 3)
    with use_path("kernels"):
        first = module(x[0])
        second = module(x[1], first)
    for state in (first, second):
        for part in flat(state):
            assert names_of(part) == "_StepBackward"
            assert not part._is_view()


@pytest.mark.parametrize("kind", KINDS)
def test_strides_and_one_tensor_as_all_states(kind):
    module = make(kind)
    x, h = inputs_of(module, 1, 3), flat(state_of(module, 3))[0]

    def run(path: str, turn: Any) -> list[Tensor]:
        given, part = leaf(x), leaf(h)
        own = turn(part)
        state = (own,) * module._n_states if module._n_states > 1 else own
        with use_path(path):
            new = flat(module(turn(given[0]), state))
            total = sum((k + 1) * part.sin().sum() for k, part in enumerate(new))
            return [*new, *torch.autograd.grad(total, [given, part, *module.parameters()])]

    for turn in (
        lambda t: t,
        lambda t: t.t().contiguous().t(),
        lambda t: t[:, :1].expand(t.shape),
        lambda t: torch.stack([t, t], -1)[..., 1],
    ):
        assert_close(run("kernels", turn), run("reference", turn))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_frozen_has_no_gradient(kind):
    module = make(kind)
    x, state = inputs_of(module, 3, 2), state_of(module, 2)
    every = dict(module.named_parameters())
    for frozen in ([], *([name] for name in every), list(every)):
        for name, part in every.items():
            part.requires_grad_(name not in frozen)
        grads = []
        for path in ("kernels", "reference"):
            given = leaf(x)
            with use_path(path):
                chain(module, given, state)[0].backward()
            grads.append([given.grad, *(part.grad for part in every.values())])
            module.zero_grad()
        for mine, theirs in zip(*grads, strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.testing.assert_close(mine, theirs) is None


@pytest.mark.sweep(3)
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind):
    module = make(kind, 2, 3)
    state = state_of(module, 2)
    leaves = [leaf(inputs_of(module, 2, 2)), *map(leaf, flat(state))]
    weights = [*module.parameters()]

    def run(x: Tensor, *parts: Tensor) -> Tensor:
        given = parts[: module._n_states]
        return chain(module, x, given if len(given) > 1 else given[0])[0]

    with use_path("kernels"):
        assert torch.autograd.gradgradcheck(run, (*leaves, *weights))
        grads = torch.autograd.grad(run(*leaves), [*leaves, *weights], create_graph=True)
    with use_path("reference"):
        expected = torch.autograd.grad(run(*leaves), [*leaves, *weights])
    assert_close(list(grads), list(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_may_be_used_again_and_in_part(kind):
    module = make(kind)
    x, state = inputs_of(module, 4, 2), state_of(module, 2)
    expected = results(module, "reference", x, state)[-len([*module.parameters()]) :]
    weights, given = [*module.parameters()], leaf(x)
    with use_path("kernels"):
        total, _ = chain(module, given, state)
        # Weight gradients are not requested here, so later requests must not see leftovers.
        (first,) = torch.autograd.grad(total, [given], retain_graph=True)
        for _ in range(2):
            found = torch.autograd.grad(total, weights, retain_graph=True)
            assert_close(list(found), expected)
        (one,) = torch.autograd.grad(total, weights[:1], retain_graph=True)
        torch.testing.assert_close(one, expected[0])
        batched = torch.autograd.grad(
            total, [given, *weights], torch.ones(2, dtype=x.dtype), is_grads_batched=True,
            retain_graph=True,
        )  # fmt: skip
        assert_close([part[1] for part in batched], [first, *expected])
        total.backward()
        assert_close([part.grad for part in weights], expected)
        with pytest.raises(RuntimeError, match="second time"):
            total.backward()


def test_weights_that_change_between_steps_or_passes():
    for change in (False, True):
        grads = []
        for path in ("kernels", "reference"):
            module = make("LSTMCell")
            x, state = inputs_of(module, 3, 2), state_of(module, 2)
            with use_path(path):
                for _ in range(3):
                    total, _ = chain(module, x, tuple(map(leaf, state)))
                    total.backward()
                    if change:
                        with torch.no_grad():
                            for part in module.parameters():
                                part.sub_(part.grad, alpha=0.1)
            grads.append([part.grad for part in module.parameters()])
        assert_close(*grads)


def test_weights_that_are_made_of_others():
    """An in-place change gives a weight a new graph node while the old one is still in use."""
    module = make("GRUCell")
    x, state = inputs_of(module, 2, 2), state_of(module, 2)
    grads = []
    for path in ("kernels", "reference"):
        factor = torch.full((), 2.0, dtype=x.dtype, requires_grad=True)
        own = [part.detach() * factor for part in module.parameters()]
        with use_path(path):
            before = F.gru_cell(x[0], leaf(state), *own)
            own[1].mul_(factor)
            F.gru_cell(x[1], leaf(state), *own).sum().backward()
        assert before.requires_grad
        grads.append([factor.grad])
    assert_close(*grads)


@pytest.mark.parametrize("kind", KINDS)
def test_changes_in_place(kind):
    module = make(kind)
    x, state = inputs_of(module, 1, 2)[0], state_of(module, 2)
    with use_path("kernels"):
        # Results may be overwritten or detached, as with torch.nn.
        new = flat(module(x, state))
        for part in new:
            part.mul_(2.0)
        sum(part.sum() for part in new).backward()
        found = [part.grad.clone() for part in module.parameters()]
        module.zero_grad()
        sum(2.0 * part.sum() for part in flat(module(x, state))).backward()
        assert_close(found, [part.grad for part in module.parameters()])
        for part in flat(module(x, state)):
            part.detach_()
        for changed in (x, flat(state)[0], module.weight_ih):
            new = flat(module(x, state))
            with torch.no_grad():
                changed.mul_(1.0)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                sum(part.sum() for part in new).backward()


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tensor_hooks(kind):
    module = make(kind)
    x, state = inputs_of(module, 3, 2), state_of(module, 2)
    expected, packed = results(module, "kernels", x, state), []

    def pack(part: Tensor) -> Tensor:
        packed.append(part)
        return part.t().contiguous() if part.dim() == 2 else part.clone()

    def unpack(part: Tensor) -> Tensor:
        return part.t() if part.dim() == 2 else part

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        found = results(module, "kernels", x, state)
    assert packed
    assert_close(found, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    module = make("LSTMCell")
    x, state = inputs_of(module, 4, 2), state_of(module, 2)

    def part(rows: Tensor, *state: Tensor) -> Any:
        for row in rows:
            state = module(row, state)
        return state

    grads = []
    for checkpointed in (True, False):
        h = tuple(map(leaf, state))
        with use_path("kernels"):
            for rows in x.split(2):
                if checkpointed:
                    run = torch.utils.checkpoint.checkpoint
                    h = run(part, rows, *h, use_reentrant=reentrant)
                else:
                    h = part(rows, *h)
            sum(p.sin().sum() for p in h).backward()
        grads.append([p.grad for p in module.parameters()])
        module.zero_grad()
    assert_close(*grads)


def test_threads_share_a_module():
    module = make("LSTMCell")
    x, state = inputs_of(module, 6, 2), state_of(module, 2)
    expected, found = results(module, "kernels", x, state), dict[int, list[list[Tensor]]]()

    def work(k: int) -> None:
        found[k] = [results(module, "kernels", x, state) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for of_thread in found.values():
        for one in of_thread:
            assert_close(one, expected)


def test_nothing_is_kept_once_the_graph_is_gone():
    module = make("LSTMCell")
    x, state = inputs_of(module, 3, 2), tuple(map(leaf, state_of(module, 2)))
    with use_path("kernels"):
        total, outputs = chain(module, x, state)
        ((_, run),) = [entry for entries in forms._prepared.values() for entry in entries][:1]
        assert isinstance(run, stepping._Prepared)
        (shared,) = run.shared.values()
        total.backward()
        assert not shared.rows
        del total, outputs, shared
        gc.collect()
        assert not run.shared


def test_the_plan_of_steps():
    sizes = {"input_size": 512, "hidden_size": 512, "training": True, "is_step": True}
    alone, chained = (Problem("lstm", 1, 4, chained=chained, **sizes) for chained in (False, True))
    assert plan(alone).path == "torch"
    assert plan(chained).path == "kernels"
    assert plan(chained._replace(cell="rnn_tanh", hidden_size=32, input_size=32)).path == "torch"


def test_a_loop_goes_to_the_kernels_from_its_second_step():
    module = make("LSTMCell", 512, 512, torch.float32)
    x = inputs_of(module, 2, 1)
    first = module(x[0])
    second = module(x[1], first)
    assert names_of(first[0]) != "_StepBackward"
    assert names_of(second[0]) == "_StepBackward"
    functional = F.lstm_cell(x[1], first, *module.parameters())
    assert names_of(functional[0]) == "_StepBackward"
