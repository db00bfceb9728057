"""Whatever a result does not depend on may have any value: padding, and steps before a reset.

Neither values nor gradients may read it, not even to multiply it by zero. Every case runs twice,
with numbers and with poison in those places; everything else must be the same.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn.cells import CELLS
from fastrnn.planner import use_path

MODULES = {
    "lstm": fastrnn.LSTM,
    "gru": fastrnn.GRU,
    "rnn": fastrnn.RNN,
    "layernorm_lstm": fastrnn.LayerNormLSTM,
    "layernorm_gru": fastrnn.LayerNormGRU,
    "peephole_lstm": fastrnn.PeepholeLSTM,
    "slstm": fastrnn.SLSTM,
    "gru_reset_before": fastrnn.ResetBeforeGRU,
}
PROJECTED = ("lstm", "peephole_lstm", "slstm")
HAVE_GATES = ("lstm", "gru", "layernorm_lstm", "layernorm_gru")
BUILT = {
    "plain": {},
    "stacked": {"num_layers": 2, "bidirectional": True},
    "noisy": {"zoneout": 0.2, "recurrent_dropout": 0.3, "bidirectional": True},
    "heads": {"num_heads": 2},
    "projected": {"proj_size": 2, "bidirectional": True},
}
CALLED = {
    "nothing": {},
    "states": {"return_states": True},
    "gates": {"return_states": "gates"},
    "recompute": {"recompute": True},
    "chunks": {"recompute": 2},
    "truncated": {"bptt": 2},
}
STEPS, BATCH, INPUTS, HIDDEN = 7, 3, 3, 4
NAN, INF = float("nan"), float("inf")


def make(name: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return MODULES[name](INPUTS, HIDDEN, dtype=torch.float64, **options)


def initial(module, batch: int = BATCH) -> list[Tensor]:
    count = module.num_layers * (1 + module.bidirectional)
    widths = [module.proj_size or HIDDEN] + [HIDDEN] * (CELLS[module._cell].n_states - 1)
    return [torch.rand(count, batch, width, dtype=torch.float64) + 1 for width in widths]


def run(module, x: Tensor, state: list[Tensor], path, loss, **given):
    """The loss, and the gradients of weights, input and initial state."""
    x, state = x.clone().requires_grad_(), [part.clone().requires_grad_() for part in state]
    torch.manual_seed(1)
    with use_path(path):
        y, _, *states = module(x, tuple(state) if len(state) > 1 else state[0], **given)
    rows = [y, *(part for part in (states[0] if states else ()) if part is not None)]
    value = sum(loss(part) for part in rows)
    leaves = [*module.parameters(), x, *state]
    grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return [value.detach(), *grads]


def check(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


CASES = [
    pytest.param(name, build, call, id=f"{name}-{build}-{call}")
    for name in MODULES
    for build in BUILT
    for call in CALLED
    if (call != "gates" or name in HAVE_GATES)
    and (build in ("plain", "stacked") or call in ("nothing", "gates", "chunks"))
    and (build != "projected" or name in PROJECTED)
]
PATHS = [None, "kernels", "operators", "reference"]


@pytest.mark.sweep(7)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("name", "build", "call"), CASES)
def test_padding(name, build, call, path):
    module = make(name, **BUILT[build])
    lengths = torch.tensor([STEPS, 0, 3])
    there = (torch.arange(STEPS)[:, None] < lengths)[..., None]
    x, state = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64), initial(module)

    def loss(part: Tensor) -> Tensor:
        return part.square().sum()

    given = {"lengths": lengths, **CALLED[call]}
    expected = run(module, x.where(there, 0.0), state, path, loss, **given)
    check(run(module, x.where(there, NAN), state, path, loss, **given), expected)
    if call == "nothing":
        check(run(module, x.where(there, -INF), state, path, loss, **given), expected)
        # A row without steps passes its state through and does nothing else with it.
        for part in state:
            part[:, 1] = NAN
        found = run(module, x.where(there, NAN), state, path, loss, **given)
        check(found, expected)


@pytest.mark.sweep(7)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("name", "build", "call"), CASES)
def test_before_a_reset(name, build, call, path):
    """The loss covers steps after the reset and steps before the poison."""
    module = make(name, **BUILT[build])
    reset = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    reset[4, 0] = reset[6, 0] = reset[0, 1] = True
    x, state = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64), initial(module)

    def loss(part: Tensor) -> Tensor:
        before = part[:2] if not module.bidirectional else part[:0]
        others = part[2:4].select(-2, 2)  # a row without poison
        return sum(one.square().sum() for one in (part[4:], before, others))

    given = {"reset": reset, **CALLED[call]}
    expected = run(module, x, state, path, loss, **given)
    for bad in (NAN, INF) if call == "nothing" else (NAN,):
        poisoned = x.clone()
        poisoned[2, 0] = bad
        check(run(module, poisoned, state, path, loss, **given), expected)
    # Row 1 is reset at its first step, so its initial forward state does not matter.
    for part in state:
        part[:: 1 + module.bidirectional, 1] = NAN
    check(run(module, x, state, path, loss, **given), expected)


def test_poison_that_is_asked_for_is_seen():
    """A loss that depends on the poisoned step still has NaN gradients."""
    for name in MODULES:
        module = make(name)
        x = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64)
        x[2, 0] = NAN
        reset = torch.zeros(STEPS, BATCH, dtype=torch.bool)
        reset[4, 0] = True
        for path in PATHS:
            found = run(module, x, initial(module), path, lambda y: y[3].sum(), reset=reset)
            assert found[1].isnan().any(), (name, path)


@pytest.mark.parametrize("path", ["kernels", "reference"])
@pytest.mark.parametrize("name", MODULES)
def test_second_derivatives(name, path):
    """The gradient of a penalty on a gradient, without a loss on the output."""
    module = make(name)
    x = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64)
    lengths, reset = torch.tensor([STEPS, 2, 5]), torch.zeros(STEPS, BATCH, dtype=torch.bool)
    reset[4, 0] = True
    found = []
    for bad in (0.0, NAN):
        given = x.clone()
        given[2:, 1] = given[2, 0] = bad
        given.requires_grad_()
        with use_path(path):
            y, _ = module(given, lengths=lengths, reset=reset)
        (dx,) = torch.autograd.grad(y[4:].sum(), given, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), list(module.parameters())))
    check(*found)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_gates_that_are_numbers_are_not_left_out(name):
    """At the optimum of a loss their gradient is 0, but its derivative is not."""
    module, found = make(name), []
    x = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64, requires_grad=True)
    for given in ({}, {"reset": torch.zeros(STEPS, BATCH, dtype=torch.bool)}):
        *_, states = module(x, return_states="gates", **given)
        loss = (states.gates - states.gates.detach()).square().sum()
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        found.append(torch.autograd.grad(dx.sum(), x)[0])
        cotangents = torch.randn(2, *states.gates.shape, dtype=torch.float64)
        *_, states = module(x, return_states="gates", **given)
        (both,) = torch.autograd.grad(
            states.gates, x, cotangents, is_grads_batched=True, retain_graph=True
        )
        for one, cotangent in zip(both, cotangents, strict=True):
            check([one], torch.autograd.grad(states.gates, x, cotangent, retain_graph=True))
    assert found[0].abs().max() > 0.01
    check(found[1:], found[:1])


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
def test_groups_of_a_batch(name):
    """Per-sample gradients: every sample has its own weight gradients."""
    module = make(name)
    parameters = {k: v.detach() for k, v in module.named_parameters()}
    x = torch.randn(BATCH, STEPS, INPUTS, dtype=torch.float64)
    lengths, reset = torch.tensor([STEPS, 2, 5]), torch.zeros(BATCH, STEPS, dtype=torch.bool)
    reset[0, 4] = True

    def loss(parameters, x, length, reset):
        y, _ = torch.func.functional_call(
            module, parameters, (x,), {"lengths": length, "reset": reset}
        )
        return y[4:].square().sum() + y[:2].square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))
    poisoned = x.clone()
    poisoned[1, 2:] = poisoned[0, 2] = NAN
    expected, found = (grads(parameters, one, lengths, reset) for one in (x, poisoned))
    check(found.values(), expected.values())
