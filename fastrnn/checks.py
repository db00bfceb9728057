"""Checks of arguments, with torch's texts where torch has one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .cells import CELLS
from .options import Options


@ops.untraced
def check_weights(cell: str, weights: Sequence[Tensor], directions: int, num_heads: int = 1) -> int:
    """Raise unless the weights make whole layers; returns how many a direction has."""
    for k, weight in enumerate(weights):
        if not isinstance(weight, Tensor):
            kind = type(weight).__name__
            raise TypeError(f"expected Tensor as element {k} in argument 2, but got {kind}")
    if [w.dim() for w in weights[:2]] != [2, 2]:
        raise ValueError(
            f"the weights of a {cell} layer begin with w_ih and w_hh, both 2-D; got "
            f"{len(weights)} weights of shapes {[tuple(w.shape) for w in weights[:2]]}"
        )
    extras = CELLS[cell].extras
    width = weights[0].shape[0]
    hidden, rest = divmod(width, CELLS[cell].n_gates)
    size_h = weights[1].shape[-1] if CELLS[cell].n_states > 1 and num_heads == 1 else hidden
    projected = size_h != hidden
    vectors = sum(w.dim() == 1 for w in weights)
    biased = vectors * (2 + projected) > (len(weights) - vectors) * len(extras)
    width_hh = heads(num_heads, hidden) if num_heads != 1 else size_h
    per_direction = 2 + 2 * biased + projected + len(extras)
    if rest or len(weights) % (directions * per_direction):
        raise ValueError(
            f"{len(weights)} weights, the first of shape {tuple(weights[0].shape)}, do not make "
            f"whole {cell} layers with {directions} direction(s) and {per_direction} weights each"
        )
    for start in range(0, len(weights), per_direction):
        first_layer = start < directions * per_direction
        size_in = weights[0].shape[1] if first_layer else size_h * directions
        expected = [(width, size_in), (width, width_hh)] + [(width,), (width,)] * biased
        expected += [(size_h, hidden)] * projected + [(e.blocks * hidden,) for e in extras]
        for k, shape in enumerate(expected):
            if weights[start + k].shape != shape:
                raise ValueError(
                    f"weight {start + k} must be of shape {shape}, "
                    f"got {tuple(weights[start + k].shape)}"
                )
    return per_direction


def heads(num_heads: int, hidden_size: int, proj_size: int = 0) -> int:
    """Return the hidden units of a head, or raise if the heads do not make a layer.

    Parameters
    ----------
    num_heads, hidden_size : int
    proj_size : int, default 0

    Returns
    -------
    int

    Raises
    ------
    ValueError
        If `num_heads` does not divide `hidden_size`, or h is projected.
    """
    if not isinstance(num_heads, int) or num_heads < 1 or hidden_size % num_heads:
        raise ValueError(
            f"num_heads must be a divisor of hidden_size, which is {hidden_size}, got {num_heads!r}"
        )
    if proj_size and num_heads > 1:
        raise ValueError(f"num_heads={num_heads} cannot be used with proj_size={proj_size}")
    return hidden_size // num_heads


def probability(name: str, value: float) -> float:
    """Return a probability, or raise if it is none.

    Parameters
    ----------
    name : str
        For the error.
    value : float

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If it is not between 0 and 1.
    """
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")
    return value


def zoneout_rates(
    cell: str, zoneout: float | Sequence[float], n_states: int
) -> float | Sequence[float]:
    """Return the zoneout of a cell, or raise if it is none.

    Parameters
    ----------
    cell : str
        For the error.
    zoneout : float or sequence of float
    n_states : int

    Returns
    -------
    float or sequence of float

    Raises
    ------
    ValueError
        If it is not a probability, or one for each state.
    """
    if not isinstance(zoneout, (tuple, list)):
        return probability("zoneout", zoneout)  # type: ignore[arg-type]
    if len(zoneout) != n_states:
        raise ValueError(
            f"zoneout of {cell} must be a number or {n_states} numbers, got {len(zoneout)}"
        )
    for zone in zoneout:
        probability("zoneout", zone)
    return zoneout if any(zoneout) else 0.0


@ops.untraced
def check_options(cell: str, options: Options, input: Tensor, steps: int, batch: int) -> None:
    """Raise unless the options that torch does not have are of the right kinds and shapes."""
    probability("dropout", options.dropout)
    probability("recurrent_dropout", options.recurrent_dropout)
    zoneout_rates(cell, options.zoneout, CELLS[cell].n_states)
    for name in ("bptt", "recompute"):
        value = getattr(options, name)
        if (name == "recompute" and isinstance(value, bool)) or (name == "bptt" and value is None):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            accepted = "True, False or " if name == "recompute" else "None or "
            raise ValueError(f"{name} must be {accepted}a number of steps from 1 on, got {value!r}")
    if options.return_states not in (False, True, "gates"):
        raise ValueError(
            f"return_states must be False, True or 'gates', got {options.return_states!r}"
        )
    if options.return_states == "gates" and CELLS[cell].gates is None:
        raise ValueError(f"return_states='gates' is for cells that have some, not for {cell}")
    lengths, reset = options.lengths, options.reset
    if lengths is not None:
        _check_lengths(options, lengths, input, steps, batch)
    if reset is not None:
        shape = (batch, steps) if options.batch_first else (steps, batch)
        if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
            kind = reset.dtype if isinstance(reset, Tensor) else type(reset).__name__
            raise ValueError(f"reset must be a tensor of torch.bool, got {kind}")
        if reset.shape != shape:
            raise ValueError(f"reset must be of shape {shape}, got {tuple(reset.shape)}")
        if reset.device != input.device:
            raise ValueError(f"reset must be on {input.device} like input, is on {reset.device}")


def _check_lengths(
    options: Options, lengths: Tensor, input: Tensor, steps: int, batch: int
) -> None:
    if options.batch_sizes is not None:
        raise ValueError("lengths cannot be used with a packed sequence, which has its own")
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int64, torch.int32):
        kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise ValueError(f"lengths must be a tensor of torch.int64 or torch.int32, got {kind}")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must be of shape {(batch,)}, got {tuple(lengths.shape)}")
    if lengths.device != input.device and not lengths.is_cpu:
        raise ValueError(f"lengths must be on {input.device} like input, is on {lengths.device}")
    if can_look(lengths) and batch:
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > steps:
            wrong = low if low < 0 else high
            raise ValueError(f"lengths must be from 0 to the {steps} steps of input, got {wrong}")


def reset_states(
    cell: str, options: Options, shapes: Sequence[tuple[int, int, int]]
) -> list[Tensor]:
    """The states after a reset, for every row; empty for zeros."""
    if options.reset_state is None:
        return []
    _check_reset_state(cell, options, shapes)
    return [part.expand(*shape) for part, shape in zip(options.reset_state, shapes, strict=True)]


@ops.untraced
def _check_reset_state(cell: str, options: Options, shapes: Sequence[tuple[int, int, int]]) -> None:
    if options.reset is None:
        raise ValueError("reset_state was given without reset")
    if isinstance(options.reset_state, Tensor):
        raise ValueError(f"reset_state of {cell} must be a tuple of {len(shapes)}, got a tensor")
    state: Any = options.reset_state
    check_count(cell, cell, state)
    for k, part in enumerate(state):
        if not isinstance(part, Tensor):
            raise ValueError(f"reset_state[{k}] must be a tensor, got {type(part).__name__}")
    for k, (part, (count, batch, width)) in enumerate(zip(state, shapes, strict=True)):
        if part.shape not in ((count, batch, width), (count, 1, width)):
            raise ValueError(
                f"reset_state[{k}] must be of shape {(count, batch, width)} or "
                f"{(count, 1, width)}, got {tuple(part.shape)}"
            )


def check_input(
    input: Tensor, input_size: int, batch_first: bool, batch_sizes: Tensor | None
) -> tuple[int, int]:
    """Raise unless the input fits; returns T and B."""
    steps, batch = _check_input(input, input_size, batch_first, batch_sizes)
    if batch_sizes is None:  # again, for the tracer to see
        steps, batch = input.shape[1::-1] if batch_first else input.shape[:2]
    return steps, batch


@ops.untraced
def _check_input(
    input: Tensor, input_size: int, batch_first: bool, batch_sizes: Tensor | None
) -> tuple[int, int]:
    dims = 3 if batch_sizes is None else 2
    if input.dim() != dims:
        raise RuntimeError(f"input must have {dims} dimensions, got {input.dim()}")
    if input.shape[-1] != input_size:
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {input_size}, got {input.shape[-1]}"
        )
    if batch_sizes is not None:
        if batch_first:
            raise ValueError("batch_first cannot be used with batch_sizes")
        steps, batch = _check_batch_sizes(batch_sizes, input.shape[0])
    else:
        steps, batch = input.shape[:2]
        if batch_first:
            steps, batch = batch, steps
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    return steps, batch


def _check_batch_sizes(batch_sizes: Tensor, rows: int) -> tuple[int, int]:
    """Raise unless these are the sizes of T steps with `rows` rows in all; returns T and B."""
    if (batch_sizes.dim(), batch_sizes.device.type, batch_sizes.dtype) != (1, "cpu", torch.int64):
        raise ValueError(
            "batch_sizes must be a 1-D int64 tensor on the CPU, got "
            f"{batch_sizes.dim()}-D {batch_sizes.dtype} on {batch_sizes.device}"
        )
    if torch.compiler.is_compiling():
        return batch_sizes.shape[0], int(batch_sizes[0])
    sizes = batch_sizes.tolist()
    shrinking = all(a >= b for a, b in itertools.pairwise(sizes))
    if sizes and (not shrinking or sizes[-1] < 1 or sum(sizes) != rows):
        raise ValueError(
            f"batch_sizes must be positive, must not grow and must add up to the {rows} rows "
            f"of the input, got {sizes if len(sizes) <= 8 else [*sizes[:8], '...']}"
        )
    return len(sizes), sizes[0] if sizes else 0


@ops.untraced
def check_state(cell: str, state: Sequence[Tensor], shapes: Sequence[tuple[int, int, int]]) -> None:
    check_count(cell, cell, state)
    for k, (part, shape) in enumerate(zip(state, shapes, strict=True)):
        if torch.compiler.is_compiling() and part.dim() == 3:
            # The batch of a packed sequence is known only when the graph runs, and checked then.
            torch._check(part.shape[1] == shape[1])
        if part.shape != shape:
            which = f"hidden[{k}]" if len(state) > 1 else "hidden"
            raise RuntimeError(f"Expected {which} size {shape}, got {list(part.shape)}")


@ops.untraced
def is_step(input: Tensor, state: Sequence[Tensor], w_ih: Tensor, w_hh: Tensor) -> bool:
    """Tell whether input and states of a cell have the sizes of its weights."""
    sizes = (input.shape[0], w_hh.shape[-1], w_ih.shape[-1])
    return all((*part.shape, input.shape[1]) == sizes for part in state)


def check_count(name: str, cell: str, state: Sequence[Tensor]) -> None:
    # Of cells with one state the caller does not choose how many there are.
    if len(state) != (count := CELLS[cell].n_states):
        raise RuntimeError(f"{name} expects {'two' if count == 2 else count} hidden states")


def check_alike(input: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Raise unless all tensors share the device and dtype of the input."""
    for kind, tensors in (("hidden", state), ("parameter", weights)):
        for other in tensors:
            if other.device != input.device:
                raise RuntimeError(
                    f"Input and {kind} tensors are not at the same device, "
                    f"found input tensor at {input.device} and {kind} tensor at {other.device}"
                )
            if other.dtype != input.dtype:
                raise RuntimeError(
                    f"Input and {kind} tensors are not the same dtype, "
                    f"found input tensor with {input.dtype} and {kind} tensor with {other.dtype}"
                )


def can_look(tensor: Tensor) -> bool:
    """Tell whether the values of a tensor may decide something, now and without waiting.

    Parameters
    ----------
    tensor : Tensor

    Returns
    -------
    bool
    """
    is_recorded = torch.compiler.is_compiling() or ops.is_traced() or ops.transformed()
    return tensor.is_cpu and not is_recorded
