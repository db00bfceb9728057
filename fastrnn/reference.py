"""Recurrent cells and one loop over them, in plain differentiable PyTorch.

This is the definition of what every other path computes: the oracle of the tests (run in
float64), and the path that second derivatives take. It is written to be read, not to be fast.

Shapes used in the whole package:

    T  time steps           B  batch            N  rows: T * B, or sum(lengths) if packed
    I  input features       H  hidden units     P  size of h: H, or proj_size for a projected LSTM
    G  gates of a cell      D  directions, 1 or 2

Gate order is PyTorch's: LSTM ``i, f, g, o``; GRU ``r, z, n``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .cells import CELLS, State, Weights
from .flow import CUT, FRESH, HOLD, PLAIN, Flow


class Result(NamedTuple):
    """What a layer gives.

    Attributes
    ----------
    y : Tensor of shape (T, B, D * P), or (N, D * P)
    final : list of Tensor of shape (D, B, P) and, for LSTM, (D, B, H)
        State after the last step of every row.
    traces : list of Tensor of shape (T, B, D * H), or (N, D * H)
        The states other than h after every step; empty if the cell has none, or if they were not
        asked for.
    """

    y: Tensor
    final: list[Tensor]
    traces: list[Tensor]


def cell_step(cell: str, x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor]) -> State:
    """One step of a cell from its input: the two affine maps, then the pointwise part.

    Parameters
    ----------
    cell : str
        Key of ``CELLS``.
    x : Tensor of shape (B, I)
    state : sequence of Tensor of shape (B, P) and, for LSTM, (B, H)
    weights : sequence of Tensor
        One direction, in the order of ``torch.nn.RNNBase``.

    Returns
    -------
    tuple of Tensor
        The new state, shaped as `state`.
    """
    w = Weights.unpack(weights, len(CELLS[cell].extras))
    wx = CELLS[cell].input_part(x, w)
    return CELLS[cell].advance(wx, state[0], tuple(state), w)


def zero_state(
    cell: str, x: Tensor, batch: int, weights: Sequence[Tensor], directions: int
) -> list[Tensor]:
    """Make the initial state of zeros of one layer.

    Parameters
    ----------
    cell : str
        Key of ``CELLS``.
    x : Tensor
        Gives dtype and device.
    batch : int
    weights : sequence of Tensor
        Of the layer, as for `layer`.
    directions : int

    Returns
    -------
    list of Tensor of shape (D, B, P) and, for LSTM, (D, B, H)
    """
    hidden = weights[0].shape[0] // CELLS[cell].n_gates
    widths = [weights[1].shape[1]] + [hidden] * (CELLS[cell].n_states - 1)
    return [x.new_zeros(directions, batch, width) for width in widths]


def layer(
    cell: str,
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
    bidirectional: bool = False,
    flow: Flow = PLAIN,
) -> Result:
    """One layer over a whole sequence, in one or both directions.

    Parameters
    ----------
    cell : str
        Key of ``CELLS``.
    x : Tensor of shape (T, B, I), or (N, I) with `batch_sizes`
    state : sequence of Tensor of shape (D, B, P) and, for LSTM, (D, B, H)
        Initial state, zeros if empty.
    weights : sequence of Tensor
        All directions one after another, each in the order of ``torch.nn.RNNBase``.
    batch_sizes : Tensor of shape (T,), optional
        Rows alive at each step, never increasing, as in ``PackedSequence``; only with a plain
        `flow`.
    bidirectional : bool, default False
    flow : Flow, optional

    Returns
    -------
    Result
    """
    sizes = [x.shape[1]] * x.shape[0] if batch_sizes is None else batch_sizes.tolist()
    directions = 2 if bidirectional else 1
    state = state or zero_state(cell, x, sizes[0], weights, directions)
    per_direction = len(weights) // directions
    sequences, finals = [], []
    for d in range(directions):
        flat = weights[d * per_direction : (d + 1) * per_direction]
        w = Weights.unpack(flat, len(CELLS[cell].extras))
        own = x
        if flow.marks is not None:
            # What a row does not have may be anything; as a factor it would reach the gradients.
            own = x.masked_fill(((flow.marks[d] & HOLD) != 0).unsqueeze(-1), 0.0)
        wx = CELLS[cell].input_part(own, w).flatten(0, -2).split(sizes)
        s = tuple(part[d] for part in state)
        outputs: list[State] = []
        for t in reversed(range(len(sizes))) if d else range(len(sizes)):
            n = sizes[t]
            new = _step(cell, wx[t], tuple(part[:n] for part in s), w, flow, d, t)
            s = new if n == sizes[0] else _with_rest(new, s)
            outputs.append(_without_held(new, flow, d, t))
        sequence = outputs[::-1] if d else outputs
        sequences.append([torch.cat(parts) for parts in zip(*sequence, strict=True)])
        finals.append(s)
    # The last operation makes no view: autograd forbids to overwrite one that an operator returns.
    y, *traces = (
        torch.cat([part.unflatten(0, x.shape[:-1]) for part in parts], dim=-1)
        for parts in zip(*sequences, strict=True)
    )
    return Result(y, [torch.stack(parts) for parts in zip(*finals, strict=True)], traces)


def _step(cell: str, wx: Tensor, state: State, w: Weights, flow: Flow, d: int, t: int) -> State:
    """One step of a direction, as the marks want it."""
    before = state
    if flow.marks is not None:
        mark = flow.marks[d, t].unsqueeze(-1)
        cut, fresh, held = ((mark & bit) != 0 for bit in (CUT, FRESH, HOLD))
        # A state that is held is no factor of anything here: it too may be anything.
        replaced = [part[d].masked_fill(held, 0.0) for part in flow.fresh]
        replaced = replaced or [torch.zeros_like(part) for part in state]
        state = tuple(
            torch.where(fresh | held, new, torch.where(cut, old.detach(), old))
            for new, old in zip(replaced, state, strict=True)
        )
    drop, *zones = flow.noise or (None,)
    h = state[0] if drop is None or not drop.numel() else state[0] * drop[d]
    new = CELLS[cell].advance(wx, h, state, w)
    if zones:
        new = tuple(
            after if not zone.numel() else torch.lerp(after, before, zone[d, t])
            for zone, before, after in zip(zones, state, new, strict=True)
        )
    if not torch.compiler.is_compiling() and is_watched():
        _watching.record.append(new)  # type: ignore[union-attr]
    if flow.marks is None:
        return new
    return tuple(torch.where(held, a, b) for a, b in zip(before, new, strict=True))


class _Watching(threading.local):
    record: list[State] | None = None


_watching = _Watching()


@contextlib.contextmanager
def watch(record: list[State]) -> Iterator[None]:
    """Keep the states of every step of `layer`, in this thread, as they are in autograd's graph.

    Parameters
    ----------
    record : list
        Each step appends its new state, a tuple of Tensor of shape (B, P) and (B, H): of one call
        after another, in it of one direction after another, in the order of the walk.
    """
    before, _watching.record = _watching.record, record
    try:
        yield
    finally:
        _watching.record = before


def is_watched() -> bool:
    """Tell whether `watch` keeps the states of this thread's calls.

    Returns
    -------
    bool
    """
    return _watching.record is not None


def _with_rest(new: State, old: State) -> State:
    """New states with those of the rows that a step does not have."""
    return tuple(torch.cat([a, b[a.shape[0] :]]) for a, b in zip(new, old, strict=True))


def _without_held(state: State, flow: Flow, d: int, t: int) -> State:
    """The states of a step with zeros for the rows that do not have it."""
    if flow.marks is None:
        return state
    held = (flow.marks[d, t].unsqueeze(-1) & HOLD) != 0
    return tuple(part.masked_fill(held, 0.0) for part in state)


def stack(
    cell: str,
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    num_layers: int,
    *,
    batch_sizes: Tensor | None = None,
    bidirectional: bool = False,
    flow: Flow = PLAIN,
    dropout: Callable[[Tensor], Tensor] = lambda y: y,
    layer: Callable[..., Result] = layer,
) -> tuple[list[Result], list[Tensor]]:
    """Several layers, `dropout` between them: what a whole ``torch.nn.LSTM`` computes.

    Parameters
    ----------
    cell, x
        As for `layer`.
    state, weights : sequence of Tensor
        As for `layer`, of all layers one after another.
    num_layers : int
    batch_sizes, bidirectional
        As for `layer`.
    flow : Flow, optional
        With `fresh` and `noise` of all layers one after another.
    dropout : callable
        Applied to the output of every layer but the last.
    layer : callable
        Another path's function in place of the `layer` of this file.

    Returns
    -------
    results : list of Result
        Of every layer; the output of the last one is that of the stack.
    final : list of Tensor
        Shaped as `state`.
    """
    directions = 2 if bidirectional else 1
    per_layer = len(weights) // num_layers
    results: list[Result] = []
    for k in range(num_layers):
        of_k = slice(k * directions, (k + 1) * directions)
        w = weights[k * per_layer : (k + 1) * per_layer]
        own = flow
        if num_layers > 1 and flow is not PLAIN:
            fresh, noise = ([part[of_k] for part in parts] for parts in (flow.fresh, flow.noise))
            own = Flow(flow.marks, fresh, noise)
        s = [part[of_k] for part in state] if num_layers > 1 else state
        y = x if k == 0 else dropout(results[-1].y)
        results.append(layer(cell, y, s, w, batch_sizes, bidirectional, own))
    if num_layers == 1:
        return results, results[0].final
    return results, [torch.cat(parts) for parts in zip(*(r.final for r in results), strict=True)]
