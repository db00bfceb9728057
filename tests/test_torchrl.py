"""Rollouts with resets, against a loop over cells that zeroes the state and torchrl's modules.

``is_init`` in torchrl, ``done`` in CleanRL and ``episode_starts`` in Stable-Baselines3 all mark the
first step of an episode, like ``reset``.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn

STEPS, BATCH, INPUT, HIDDEN = 33, 5, 4, 24


def rollout(dtype: torch.dtype, layers: int, n_states: int, rate: float) -> tuple[Any, ...]:
    """Observations and the cotangent of the output, initial state, and where episodes begin."""
    x, towards = torch.randn(STEPS, BATCH, INPUT), torch.randn(STEPS, BATCH, HIDDEN)
    state = torch.randn(n_states, layers, BATCH, HIDDEN)
    x, towards, state = (part.to(dtype).requires_grad_() for part in (x, towards, state))
    return x, towards, state, torch.rand(STEPS, BATCH) < rate


def by_cells(module: Any, x: Tensor, state: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """A loop over the steps, with torch.nn's cells."""
    cells = []
    for n in range(module.num_layers):
        cell_class = getattr(torch.nn, f"{type(module).__name__}Cell")
        cell = cell_class(module.weight_ih_l0.shape[1], HIDDEN)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(cell, name, getattr(module, f"{name}_l{n}"))
        cells.append(cell)
    state = list(zip(*(part.unbind(0) for part in state.unbind(0)), strict=True))
    outputs = []
    for h, start in zip(x, starts, strict=True):
        for n, cell in enumerate(cells):
            before = tuple(torch.where(start[:, None], 0.0, part) for part in state[n])
            after = cell(h, before if len(before) > 1 else before[0])
            state[n] = after if isinstance(after, tuple) else (after,)
            h = state[n][0]
        outputs.append(h)
    final = torch.stack([torch.stack(parts) for parts in zip(*state, strict=True)])
    return torch.stack(outputs), final


def by_one_call(module: Any, x: Tensor, state: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    hx = tuple(state) if len(state) > 1 else state[0]
    output, final = module(x, hx, reset=starts)
    return output, torch.stack(final) if len(state) > 1 else final[None]


def assert_near(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Equal up to the rounding of sums in a different order."""
    for a, b in zip(ours, theirs, strict=True):
        bound = 64 * torch.finfo(b.dtype).eps * max(1.0, b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=0, atol=bound)


CASES = [(fastrnn.LSTM, 2), (fastrnn.GRU, 1), (fastrnn.RNN, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("layer_class", "n_states"), CASES)
def test_loop_over_cells(
    layer_class: Any, n_states: int, layers: int, rate: float, dtype: torch.dtype
) -> None:
    module = layer_class(INPUT, HIDDEN, layers).to(dtype)
    x, towards, state, starts = rollout(dtype, layers, n_states, rate)
    results = []
    for way in (by_one_call, by_cells):
        output, final = way(module, x, state, starts)
        inputs = [x, state, *module.parameters()]
        loss = (output * towards).sum() + final.square().sum()
        results.append([output, final, *torch.autograd.grad(loss, inputs)])
    assert_near(*results)


@pytest.mark.skipif(not importlib.util.find_spec("torchrl"), reason="needs torchrl")
@pytest.mark.parametrize("python_based", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("layer_class", "n_states"), CASES[:2])
def test_torchrl(
    layer_class: Any, n_states: int, layers: int, dtype: torch.dtype, python_based: bool
) -> None:
    """torchrl's default, which splits the rollout into episodes, and its loop over cells."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensordict import TensorDict
        from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode

    module = layer_class(INPUT, HIDDEN, layers).to(dtype)
    x, towards, state, starts = rollout(dtype, layers, n_states, 0.1)
    assert starts[1:].any()
    keys = [f"state_{k}" for k in range(n_states)]
    theirs = (LSTMModule if n_states > 1 else GRUModule)(
        input_size=INPUT,
        hidden_size=HIDDEN,
        num_layers=layers,
        python_based=python_based,
        in_keys=["x", *keys],
        out_keys=["y", *[("next", key) for key in keys]],
    ).to(dtype)
    recurrent = theirs.lstm if n_states > 1 else theirs.gru
    recurrent.load_state_dict(module.state_dict())
    # torchrl takes states for all steps, (B, T, L, H), and reads those where episodes begin.
    at_start = state.permute(0, 2, 1, 3)[:, :, None] * ~starts[0][:, None, None, None]
    stored = torch.cat(
        [at_start, at_start.new_zeros(1).expand(n_states, BATCH, STEPS - 1, layers, HIDDEN)], dim=2
    )
    data = TensorDict(
        {
            "x": x.transpose(0, 1),
            "is_init": starts.t()[..., None],
            **dict(zip(keys, stored, strict=True)),
        },
        batch_size=(BATCH, STEPS),
    )
    with set_recurrent_mode(True):
        data = theirs(data)
    output = data["y"].transpose(0, 1)
    final = torch.stack([data["next", key][:, -1].transpose(0, 1) for key in keys])
    ours = by_one_call(module, x, state, starts)
    results = []
    for (y, last), model in ((ours, module), ((output, final), recurrent)):
        loss = (y * towards).sum() + last.square().sum()
        results.append([y, last, *torch.autograd.grad(loss, [x, state, *model.parameters()])])
    assert_near(*results)
