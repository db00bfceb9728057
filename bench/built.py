"""A case made ready for a provider, from the weights of torch.nn's module and its inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import planner
from .registry import Case

_CLASSES = {
    "lstm": "LSTM",
    "gru": "GRU",
    "rnn": "RNN",
    "peephole_lstm": "PeepholeLSTM",
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
        x and a state, if the case has one, in the layout that the provider wants.
    parameters : sequence of Tensor
    to_torch : callable
        Turns gradients of `inputs`, then `parameters`, into those of torch.nn's.
    gradients : callable
        As ``torch.autograd.grad``, of results of `run`.
    has_threads : bool, default False
        Whether it runs on threads of its own and not on torch's.
    """

    run: Callable[..., list[Tensor]]
    inputs: Tensors
    parameters: Tensors
    to_torch: Callable[[Tensors], Tensors] = _same
    gradients: Callable[..., Tensors] = torch.autograd.grad
    has_threads: bool = False


@contextlib.contextmanager
def forced(path: str) -> Iterator[None]:
    """Force a path on what runs inside, backward too.

    What ``planner.use_path`` and ``launch.bounded_spin`` ask for holds in their own thread, and
    autograd has others for GPUs.

    Parameters
    ----------
    path : str
    """
    with planner.use_path(path), torch.autograd.set_multithreading_enabled(False):
        yield


def make_baseline(case: Case, device: torch.device) -> tuple[torch.nn.Module, list[Tensor]]:
    """Make torch.nn's module of a case and its inputs, the same ones each time.

    Parameters
    ----------
    case : Case
    device : torch.device

    Returns
    -------
    module : torch.nn.Module
    inputs : list of Tensor
        x and, for a cell module, a state: a loop over steps passes one; a layer is most often
        called without.
    """
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    module = make_module(torch.nn, case, device)
    with torch.no_grad():
        for weight in module.parameters():
            # Of torch's own spread, uniform in 1 / sqrt(H).
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
    """Make the module of a case by a library with torch.nn's names and arguments.

    Parameters
    ----------
    library : module
    case : Case
    device : torch.device

    Returns
    -------
    torch.nn.Module
    """
    options = {} if case.is_step else {
        "num_layers": case.num_layers,
        "bidirectional": case.bidirectional,
        **({"proj_size": case.proj_size} if case.proj_size else {}),  # which a GRU has not
    }  # fmt: skip
    return getattr(library, _CLASSES[case.cell])(
        case.input_size,
        case.hidden_size,
        **options,
        device=device,
        dtype=getattr(torch, case.dtype),
    )


def flat(result: Any) -> list[Tensor]:
    """List the tensors of nested tuples, in which some may be None."""
    if result is None:
        return []
    return [result] if isinstance(result, Tensor) else [t for part in result for t in flat(part)]
