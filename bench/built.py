"""Prepare a case for a provider, from the weights and inputs of torch.nn's module."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import nn, planner, variants
from .registry import VARIANTS, Case

CLASSES = {
    "lstm": "LSTM",
    "gru": "GRU",
    "rnn": "RNN",
    "peephole_lstm": "PeepholeLSTM",
    "slstm": "SLSTM",
    "layernorm_lstm": "LayerNormLSTM",
    "layernorm_gru": "LayerNormGRU",
    "gru_reset_before": "ResetBeforeGRU",
    "lstm_cell": "LSTMCell",
    "gru_cell": "GRUCell",
    "rnn_cell": "RNNCell",
}

Tensors = Sequence[Tensor]


def _same(tensors: Tensors) -> Tensors:
    return tensors


class Built(NamedTuple):
    """A case, ready to be called.

    Attributes
    ----------
    run : callable
        Takes `inputs`; returns the output and the final state, in torch.nn's shapes.
    inputs : sequence of Tensor
        x and, if the case has one, a state, in the layout that the provider expects.
    parameters : sequence of Tensor
    to_torch : callable
        Converts gradients of `inputs`, then `parameters`, into those of torch.nn's.
    gradients : callable
        Like ``torch.autograd.grad``, for results of `run`.
    has_threads : bool, default False
        Whether it runs on its own threads instead of torch's.
    """

    run: Callable[..., list[Tensor]]
    inputs: Tensors
    parameters: Tensors
    to_torch: Callable[[Tensors], Tensors] = _same
    gradients: Callable[..., Tensors] = torch.autograd.grad
    has_threads: bool = False


@contextlib.contextmanager
def forced(path: str) -> Iterator[None]:
    """Force a path for everything that runs inside, including backward.

    ``planner.use_path`` and ``launch.bounded_spin`` apply to their own thread only, and autograd
    uses other threads for GPUs.

    Parameters
    ----------
    path : str
    """
    with planner.use_path(path), torch.autograd.set_multithreading_enabled(False):
        yield


def make_baseline(case: Case, device: torch.device) -> tuple[torch.nn.Module, list[Tensor]]:
    """Make the module whose weights all providers share, and its inputs; the same ones each time.

    It is torch.nn's module, or ours where torch.nn has none.

    Parameters
    ----------
    case : Case
    device : torch.device

    Returns
    -------
    module : torch.nn.Module
        For an ensemble, a list of modules.
    inputs : list of Tensor
        x and, for a cell module, a state, as a loop over steps would pass it; layers are mostly
        called without one.
    """
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    library = ours_of(case) if case.is_beyond_torch else torch.nn
    module = make_module(library, case, device)
    if case.members:
        others = [make_module(library, case, device) for _ in range(case.members - 1)]
        module = torch.nn.ModuleList([module, *others])
    with torch.no_grad():
        for weight in module.parameters():
            # Uniform, with the variance of torch's own 1 / sqrt(H). Gains too: with layer norm's
            # usual gains around 1 the recurrence would not forget a rounding error.
            weight.copy_(random(*weight.shape, scale=(3 * case.hidden_size) ** -0.5))
    rows: tuple[int, ...] = (case.steps, case.batch)
    if case.is_step or case.ragged:
        rows = (sum(case.lengths),)
    inputs = [random(*rows, case.input_size)]
    if case.is_step:
        n_states = 2 if case.cell == "lstm_cell" else 1
        inputs += [random(case.batch, case.hidden_size) for _ in range(n_states)]
    return module, inputs


def make_module(library: Any, case: Case, device: torch.device) -> torch.nn.Module:
    """Make the module of a case from a library with torch.nn's names and arguments.

    Parameters
    ----------
    library : module
    case : Case
        For an ensemble, that of a member.
    device : torch.device

    Returns
    -------
    torch.nn.Module
    """
    options: dict[str, Any] = {} if case.is_step else {
        "num_layers": case.num_layers,
        "bidirectional": case.bidirectional,
        # Arguments that not every library supports.
        **({"proj_size": case.proj_size} if case.proj_size else {}),
        **({"recurrent_dropout": case.recurrent_dropout} if case.recurrent_dropout else {}),
        **({"zoneout": case.zoneout} if case.zoneout else {}),
        **({"num_heads": case.num_heads} if case.num_heads > 1 else {}),
    }  # fmt: skip
    module: torch.nn.Module = getattr(library, CLASSES[case.cell])(
        case.input_size,
        case.hidden_size,
        **options,
        device=device,
        dtype=getattr(torch, case.dtype),
    )
    return module.train(case.mode == "training")


def ours_of(case: Case) -> Any:
    """Return the module of our package that defines the class for a case.

    Parameters
    ----------
    case : Case

    Returns
    -------
    module
    """
    return variants if case.cell in VARIANTS else nn


def named_weights(case: Case, baseline: torch.nn.Module) -> dict[str, Tensor]:
    """Name the weights of a case; those of ensemble members are stacked.

    Parameters
    ----------
    case : Case
    baseline : torch.nn.Module

    Returns
    -------
    dict of str to Tensor
    """
    if not case.members:
        return dict(baseline.named_parameters())
    assert isinstance(baseline, torch.nn.ModuleList)
    return torch.func.stack_module_state(list(baseline))[0]


def flat(result: Any) -> list[Tensor]:
    """List the tensors of nested tuples, in which some may be None."""
    if result is None:
        return []
    return [result] if isinstance(result, Tensor) else [t for part in result for t in flat(part)]
