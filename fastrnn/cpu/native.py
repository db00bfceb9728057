"""One direction of a layer by the compiled kernels: the functions of ``loop.py`` once more.

Tensors are float32 on the CPU; there is no projection. Everything that a kernel takes by address
is allocated, checked and kept alive here.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ..cells import CELLS, Weights
from . import engine, machine
from .arguments import Backward, Forward
from .loop import CPU_CELLS
from .rows import Breaks, Rows

# Floats of projected input that all threads keep, half of a second-level cache for one of them. Not
# more for more threads, so that results do not depend on their number.
_CHUNK = 65536

# Rows whose distance is a multiple of so many floats compete for the same lines of a cache.
_PAGE = 1024
_PAD = 24


def _check(
    width: int, inputs: int, count: int, w: Weights, rows: Rows, states: Sequence[Tensor]
) -> None:
    """Raise unless weights, states and rows are of the sizes that a kernel will assume."""
    hidden = w.w_hh.shape[1]
    fits = w.w_ih.shape == (width, inputs) and w.w_hh.shape == (width, hidden)
    for bias in (w.b_ih, w.b_hh):
        fits = fits and (bias is None or bias.shape == (width,))
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


def _work_space(sizes: Sequence[int]) -> Sequence[Tensor]:
    """Memory that nobody needs after the call, in parts of so many floats."""
    total, kept = sum(sizes), _kept.floats
    # In deterministic mode torch fills what it allocates, so that the use of old values shows.
    if kept.numel() < total or torch.are_deterministic_algorithms_enabled():
        with torch.inference_mode(False):
            kept = torch.empty(total, dtype=torch.float32, device="cpu")
        if total <= _MAX_KEPT:
            _kept.floats = kept
    return kept[:total].split(list(sizes))


def _layout(hidden: int, gates: int, batch: int) -> tuple[int, int, int]:
    """Hidden units of a slice, columns of all gates with the padding, and threads to use."""
    target = machine.target()
    assert target is not None
    width = -(-hidden // target.units) * target.units * gates
    return target.units, width, engine.threads(2 * batch * width * hidden)


def forward(
    cell: str,
    x: Tensor,
    w: Weights,
    rows: Rows,
    reverse: bool,
    is_given: bool,
    state: Sequence[Tensor],
    h_rows: Tensor,
    saved: Sequence[Tensor],
    breaks: Breaks | None,
) -> None:
    """Run one direction; see ``loop.forward``.

    Parameters
    ----------
    cell, x, w, rows, reverse, is_given, state, h_rows, saved, breaks
        As there.

    Raises
    ------
    RuntimeError
        If the sizes do not fit each other.
    """
    facts, hidden = CELLS[cell], w.w_hh.shape[1]
    gates, (count, inputs) = facts.n_gates, x.shape
    fresh = () if breaks is None else [part.contiguous() for part in breaks.fresh]
    _check(gates * hidden, inputs, count, w, rows, [*state, *fresh])
    x, weights = x.contiguous(), [None if t is None else t.contiguous() for t in w[:4]]
    h_0 = state[0].clone() if is_given else None
    units, width, threads = _layout(hidden, gates, rows.batch)
    chunk = rows.batch * max(1, _CHUNK // max(1, width * rows.batch))
    sizes = (width * (inputs + hidden + 2), width * chunk, threads * rows.batch * gates * units)
    packed, projected, scratch = _work_space(sizes)
    w_ih, w_hh, b_ih, b_hh = weights
    arguments = Forward.of(
        steps=rows.steps,
        rows=count,
        batch=rows.batch,
        inputs=inputs,
        hidden=hidden,
        reverse=reverse,
        pitch=h_rows.stride(0),
        chunk=chunk,
        sizes=rows.batch_sizes,
        x=x,
        w_ih=w_ih,
        w_hh=w_hh,
        b_ih=b_ih,
        b_hh=b_hh,
        h_0=h_0,
        h_n=state[0],
        c=state[1] if facts.n_states == 2 else None,
        h=h_rows,
        gates=saved[0] if saved else None,
        extra=saved[1] if saved else None,
        **_break_arguments(breaks, fresh),
        fresh_rh=fresh[0] @ w.w_hh.t() if fresh else None,
        packed=packed,
        projected=projected,
        scratch=scratch,
    )
    engine.run(cell, "forward", arguments, threads)


def _break_arguments(breaks: Breaks | None, fresh: Sequence[Tensor]) -> dict[str, Tensor | None]:
    if breaks is None:
        return {}
    fresh_h, fresh_c = [*fresh, None][:2]
    return {"marks": breaks.marks, "fresh_h": fresh_h, "fresh_c": fresh_c}


def backward(
    cell: str,
    dy: Tensor | None,
    d_traces: Sequence[Tensor],
    d_state: Sequence[Tensor],
    w: Weights,
    rows: Rows,
    reverse: bool,
    initial: Sequence[Tensor],
    h_rows: Tensor,
    saved: Sequence[Tensor],
    breaks: Breaks | None,
) -> tuple[Tensor, Tensor, list[Tensor], tuple[()]]:
    """Compute the gradients of the gates; see ``loop.backward``.

    Parameters
    ----------
    cell, dy, d_traces, d_state, w, rows, reverse, initial, h_rows, saved, breaks
        As there.

    Returns
    -------
    d_rh : Tensor
    d_apart : Tensor
    d_fresh : list of Tensor
    tuple
        Empty: there is no projection.

    Raises
    ------
    RuntimeError
        If the sizes do not fit each other.
    """
    facts, hidden, count = CELLS[cell], w.w_hh.shape[1], h_rows.shape[0]
    gates = facts.n_gates
    fresh = () if breaks is None else [part.contiguous() for part in breaks.fresh]
    _check(gates * hidden, w.w_ih.shape[1], count, w, rows, [*d_state, *initial, *fresh])
    shapes = [(count, gates * hidden), (count, hidden)][: 2 * CPU_CELLS[cell].n_extra]
    if [part.shape for part in saved] != shapes:
        raise RuntimeError("what was saved in forward is not of the sizes that backward needs")
    w_hh, initial = w.w_hh.contiguous(), [part.contiguous() for part in initial]
    h_0, c_0 = [*initial, None, None][:2]
    d_rows = [part if part is None else _like(part, h_rows) for part in (dy, *d_traces)]
    dy, dc = [*d_rows, None][:2]
    d_fresh = [torch.zeros_like(part) for part in fresh]
    d_fresh_h, d_fresh_c = [*d_fresh, None, None][:2]
    units, width, threads = _layout(hidden, gates, rows.batch)
    # d_rh of all gates, then d_wx of those whose two parts are not added up.
    columns = (gates + gates - CPU_CELLS[cell].folds_b_hh) * hidden
    d_gates = h_rows.new_empty(count, columns + (_PAD if columns % _PAGE == 0 else 0))
    packed, scratch = _work_space((width * hidden, threads * rows.batch * units))
    arguments = Backward.of(
        steps=rows.steps,
        rows=count,
        batch=rows.batch,
        hidden=hidden,
        reverse=reverse,
        pitch=h_rows.stride(0),
        sizes=rows.batch_sizes,
        w_hh=w_hh,
        h_0=h_0,
        c_0=c_0,
        h=h_rows,
        gates=saved[0] if saved else None,
        extra=saved[1] if saved else None,
        dy=dy,
        dc=dc,
        **_break_arguments(breaks, fresh),
        d_fresh_h=d_fresh_h,
        d_fresh_c=d_fresh_c,
        d_h=d_state[0],
        d_c=d_state[1] if facts.n_states == 2 else None,
        d_gates=d_gates,
        d_gates_pitch=d_gates.shape[1],
        packed=packed,
        scratch=scratch,
    )
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
