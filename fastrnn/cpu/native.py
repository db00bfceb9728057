"""One direction of a layer by the compiled kernels: the functions of ``operators.py`` once more.

Tensors are float32 on the CPU; there is no projection. Everything that a kernel takes by address
is allocated, checked and kept alive here.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import engine, machine
from .arguments import MOST_SAVED, MOST_STATES, Backward, Forward, padded
from .direction import Breaks, Direction

# Floats of projected input that all threads keep, half of a second-level cache for one of them. Not
# more for more threads, so that results do not depend on their number.
_CHUNK = 65536

# Rows whose distance is a multiple of so many floats compete for the same lines of a cache: a GRU
# of (T, B, H) = (256, 16, 128) took 1.3 times as long in training, by 2 threads.
_PAGE = 512
_PAD = 24


def _check(direction: Direction, count: int, inputs: int, states: Sequence[Tensor]) -> None:
    """Raise unless weights, states and rows are of the sizes that a kernel will assume."""
    cell, w, rows = direction.cell, direction.w, direction.rows
    hidden = w.w_hh.shape[1]
    width = cell.n_gates * hidden
    fits = w.w_ih.shape == (width, inputs) and w.w_hh.shape == (width, hidden)
    for bias in (w.b_ih, w.b_hh):
        fits = fits and (bias is None or bias.shape == (width,))
    fits = fits and len(w.extras) == len(cell.extras)
    for extra, part in zip(cell.extras, w.extras, strict=False):
        fits = fits and part.shape == (extra.blocks * hidden,)
    for part in states:
        fits = fits and part.shape == (rows.batch, hidden)
    sizes = rows.batch_sizes
    if sizes is None:
        fits = fits and rows.steps * rows.batch == count
    else:
        shrinking = bool((sizes[1:] <= sizes[:-1]).all())
        fits = fits and shrinking and int(sizes[-1]) > 0 and int(sizes.sum()) == count
    if not fits:
        raise RuntimeError("sizes of input, state, weights and batch_sizes do not fit each other")


class _Kept(threading.local):
    """The work space of a thread's last calls: new pages cost more than packing weights there."""

    floats = torch.empty(0, dtype=torch.float32, device="cpu")


_kept = _Kept()
_MAX_KEPT = 1 << 24  # floats, 64 MiB


def _work_space(*sizes: int) -> list[Any]:
    """Memory that nobody needs after the call, in parts of so many floats.

    The first part is all of it, as a tensor; the others are addresses.
    """
    total, kept = sum(sizes), _kept.floats
    # In deterministic mode torch fills what it allocates, so that the use of old values shows.
    if kept.numel() < total or torch.are_deterministic_algorithms_enabled():
        with torch.inference_mode(False):
            kept = torch.empty(total, dtype=torch.float32, device="cpu")
        if total <= _MAX_KEPT:
            _kept.floats = kept
    first = kept.data_ptr()
    return [kept, *(first + 4 * end for end in itertools.accumulate(sizes[:-1]))]


def _layout(hidden: int, gates: int, batch: int) -> tuple[int, int, int]:
    """Hidden units of a slice, columns of all gates with the padding, and threads to use."""
    target = machine.target()
    assert target is not None
    width = -(-hidden // target.units) * target.units * gates
    return target.units, width, engine.threads(2 * batch * width * hidden)


def _extra(direction: Direction) -> Tensor | None:
    return torch.cat(direction.w.extras) if direction.w.extras else None


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [part.contiguous() for part in tensors]


def _fresh(breaks: Breaks | None) -> list[Tensor]:
    return [] if breaks is None else _contiguous(breaks.fresh)


def forward(
    direction: Direction,
    x: Tensor,
    state: Sequence[Tensor],
    h_rows: Tensor,
    traces: Sequence[Tensor],
    saved: Sequence[Tensor],
) -> None:
    """Run one direction; see ``operators.forward``."""
    cell, w, rows, breaks = direction.cell, direction.w, direction.rows, direction.breaks
    gates, hidden, (count, inputs) = cell.n_gates, w.w_hh.shape[1], x.shape
    fresh, initial = _fresh(breaks), _contiguous(direction.initial)
    _check(direction, count, inputs, [*state, *fresh, *initial])
    units, width, threads = _layout(hidden, gates, rows.batch)
    chunk = rows.batch * max(1, _CHUNK // max(1, width * rows.batch))
    packed, projected, scratch = _work_space(
        width * (inputs + hidden + 2), width * chunk, threads * rows.batch * gates * units
    )
    w_ih, w_hh = w.w_ih.contiguous(), w.w_hh.contiguous()
    b_ih, b_hh = (None if part is None else part.contiguous() for part in (w.b_ih, w.b_hh))
    marks = None if breaks is None else breaks.marks
    fresh_rh = fresh[0] @ w_hh.t() if fresh else None
    arguments = Forward.of(
        (
            rows.steps, count, rows.batch, inputs, hidden, direction.reverse, h_rows.stride(0),
            chunk, projected, scratch,
        ),
        (
            rows.batch_sizes, x.contiguous(), w_ih, w_hh, b_ih, b_hh, _extra(direction),
            initial[0] if initial else None, *padded(state), h_rows, *padded(saved, MOST_SAVED),
            *padded(traces, MOST_STATES - 1), marks, *padded(fresh), fresh_rh, packed,
        ),
    )  # fmt: skip
    engine.run(cell, "forward", arguments, threads)


def backward(
    direction: Direction,
    d_rows: Sequence[Tensor | None],
    d_state: Sequence[Tensor],
    h_rows: Tensor,
    traces: Sequence[Tensor],
    saved: Sequence[Tensor],
) -> tuple[Tensor, Tensor, list[Tensor], tuple[()]]:
    """Compute the gradients of the gates; see ``operators.backward``. There is no projection."""
    cell, w, rows, breaks = direction.cell, direction.w, direction.rows, direction.breaks
    gates, hidden, count = cell.n_gates, w.w_hh.shape[1], h_rows.shape[0]
    fresh, initial = _fresh(breaks), _contiguous(direction.initial)
    _check(direction, count, w.w_ih.shape[1], [*d_state, *initial, *fresh])
    fits = len(saved) == cell.n_saved and len(traces) == cell.n_states - 1
    for part in (h_rows, *traces, *saved, *d_rows):
        fits = fits and (part is None or part.shape == (count, hidden))
    if not fits:
        raise RuntimeError("what was saved in forward is not of the sizes that backward needs")
    w_hh, d_fresh = w.w_hh.contiguous(), [torch.zeros_like(part) for part in fresh]
    units, width, threads = _layout(hidden, gates, rows.batch)
    columns = (gates + cell.n_apart) * hidden
    d_gates = h_rows.new_empty(count, columns + (_PAD if columns % _PAGE == 0 else 0))
    packed, scratch = _work_space(width * hidden, threads * rows.batch * units)
    d_rows = [part if part is None else _like(part, h_rows) for part in d_rows]
    marks = None if breaks is None else breaks.marks
    arguments = Backward.of(
        (
            rows.steps, count, rows.batch, hidden, direction.reverse, h_rows.stride(0),
            d_gates.shape[1], scratch,
        ),
        (
            rows.batch_sizes, w_hh, _extra(direction), *padded(initial), h_rows,
            *padded(saved, MOST_SAVED), *padded(traces, MOST_STATES - 1), *padded(d_rows), marks,
            *padded(fresh), *padded(d_fresh), *padded(d_state), d_gates, packed,
        ),
    )  # fmt: skip
    engine.run(cell, "backward", arguments, threads)
    d_rh, d_apart = d_gates[:, : gates * hidden], d_gates[:, gates * hidden : columns]
    if breaks is not None:
        by_product = d_rh.index_select(0, breaks.rows) @ w_hh
        d_fresh[0].index_add_(0, breaks.sequences, by_product)
    return d_rh, d_apart, d_fresh, ()


def _like(part: Tensor, h_rows: Tensor) -> Tensor:
    """Gradients of every row with the strides of h."""
    if part.stride() == h_rows.stride():
        return part
    return h_rows.new_empty_strided(part.shape, h_rows.stride()).copy_(part)
