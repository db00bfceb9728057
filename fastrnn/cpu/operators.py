"""Our loop of torch operators: one direction of a layer, forward and backward through time.

There is one loop for all pointwise cells, forward and backward:

* Forward, one GEMM computes the input projection of all steps into a buffer, to which each step
  adds its recurrent product, so a step is one GEMM and the cell's arithmetic.
* The backward of a cell is linear in the gradients of its states, and for each unit depends only on
  those of that unit. So the factors are computed first, for all steps at once, from gradients of 1;
  a step backward is then one multiplication per state and one GEMM.

It runs on every device and in every dtype, and is used where there is no kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import products
from ..call import Weights
from ..cells import Cell
from ..flow import CUT, FRESH
from ..reference import TORCH
from .direction import Ahead, Back, Direction, Found, Kept

# Rows at distances that are multiples of a page compete for the same cache lines.
_PAD = 24


class _Sum:
    """The input part of a gate with the recurrent part already added."""

    def __init__(self, total: Tensor) -> None:
        self.total = total

    def __add__(self, rh: None) -> Tensor:
        return self.total

    __radd__ = __add__


def forward(jobs: Sequence[Ahead]) -> None:
    """Run directions of layers with pointwise cells, without noise and heads."""
    for job in jobs:
        _forward(*job)


def _forward(
    direction: Direction, x: Tensor, state: Sequence[Tensor], h_rows: Tensor, kept: Kept
) -> None:
    cell, w, rows, breaks = direction.cell, direction.w, direction.rows, direction.breaks
    saved, traces = kept.saved, kept.traces
    shared = cell.n_gates - cell.n_apart
    split = shared * direction.hidden
    advance, extra = TORCH.bind(cell.forward), w.blocks()
    gates = x.new_empty(x.shape[0], w.w_hh.shape[0])
    _project_input(x, w, split, gates)
    of_shared, of_apart = w.w_hh.t().tensor_split([split], dim=1)
    b_apart = None if w.b_hh is None else w.b_hh[split:]
    totals = gates[:, :split].split(rows.sizes)
    wx = [part.split(rows.sizes) for part in gates.chunk(cell.n_gates, dim=1)]
    wx[:shared] = [[_Sum(part) for part in parts] for parts in wx[:shared]]
    rh: list[Tensor | None] = [None] * cell.n_gates
    saved_rows = [part.split(rows.sizes) for part in saved]
    fresh_rows: Sequence[Any] = [None] * rows.steps
    if breaks is not None:
        fresh_rows = ((breaks.marks & FRESH) != 0)[:, None].split(rows.sizes)
    of_steps = zip(*saved_rows, strict=True) if saved else [()] * rows.steps
    steps = list(zip(totals, zip(*wx, strict=True), of_steps, fresh_rows, strict=True))
    every: list[Sequence[Tensor]] = []
    current: Sequence[Tensor] = state
    for total, wx_t, saved_t, fresh_t in reversed(steps) if direction.reverse else steps:
        n = total.shape[0]
        old = current if n == rows.batch else [part[:n] for part in current]
        if breaks is not None:
            pairs = zip(breaks.fresh, old, strict=True)
            old = [torch.where(fresh_t, new[:n], part) for new, part in pairs]
        total.addmm_(old[0], of_shared)
        if cell.n_apart:
            rh[shared:] = _affine(old[0], of_apart, b_apart).chunk(cell.n_apart, dim=1)
        new, values = advance(wx_t, rh, old, extra)
        if saved_t:
            torch._foreach_copy_(saved_t, values)
        full = new[0]
        if w.w_hr is not None:
            new = (full @ w.w_hr.t(), *new[1:])
        every.append((*new, full)[: 1 + len(traces)])
        # Not in place: `every` holds these tensors.
        current = new if n == rows.batch else _with_rest(new, current)
    if direction.reverse:
        every.reverse()
    for to, parts in zip((h_rows, *traces), zip(*every, strict=True), strict=True):
        torch.cat(parts, out=to)
    for to, part in zip(state, current, strict=True):
        to.copy_(part)


def _affine(rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return rows @ matrix if bias is None else torch.addmm(bias, rows, matrix)


def _with_rest(new: Sequence[Tensor], old: Sequence[Tensor]) -> list[Tensor]:
    """Append the old states of the rows that a step does not have to the new states."""
    return [torch.cat([a, b[a.shape[0] :]]) for a, b in zip(new, old, strict=True)]


def _project_input(x: Tensor, w: Weights, folded: int, out: Tensor) -> None:
    """Compute x @ W_ih^T for all rows, with b_ih and the first `folded` entries of b_hh."""
    if w.b_ih is None or w.b_hh is None:
        torch.mm(x, w.w_ih.t(), out=out)
        return
    bias = w.b_ih.clone()
    bias[:folded] += w.b_hh[:folded]
    torch.addmm(bias, x, w.w_ih.t(), out=out)


def backward(jobs: Sequence[Back]) -> list[Found]:
    """Compute the gradients of the gates of `forward`."""
    return [_backward(*job) for job in jobs]


def _backward(
    direction: Direction,
    d_rows: Sequence[Tensor | None],
    d_state: Sequence[Tensor],
    h_rows: Tensor,
    kept: Kept,
) -> Found:
    cell, w, rows, breaks = direction.cell, direction.w, direction.rows, direction.breaks
    saved, traces = kept.saved, kept.traces
    hidden, sizes = direction.hidden, rows.sizes
    states = [h_rows, *traces[: cell.n_states - 1]]
    factors = _factors(direction, states, saved)
    # Each step multiplies its first factors in place, which thus become its results.
    blocks = factors[0].unflatten(1, (-1, hidden))
    d_rh, d_apart, _ = factors[0].split(
        [cell.n_gates * hidden, cell.n_apart * hidden, cell.n_states * hidden], dim=1
    )
    of_steps = [part.unflatten(1, (-1, hidden)).split(sizes) for part in factors]
    d_rh_of_steps = d_rh.split(sizes)
    d_previous = [part.split(sizes) for part in blocks[:, -cell.n_states :].unbind(1)]
    given = [(k, part.split(sizes)) for k, part in enumerate(d_rows) if part is not None]
    # The gradient of the projected h of every row, for the gradient of the projection.
    d_projected = h_rows[:, :0] if w.w_hr is None else torch.empty_like(h_rows)
    d_projected_of_steps = d_projected.split(sizes)
    d_fresh: list[Tensor] = []
    if breaks is not None:
        d_fresh = [torch.zeros_like(part) for part in d_state]
        is_fresh, ends = (
            ((breaks.marks & bits) != 0)[:, None].split(sizes) for bits in (FRESH, FRESH | CUT)
        )
    current: Sequence[Tensor] = d_state
    for t in range(rows.steps) if direction.reverse else reversed(range(rows.steps)):
        n = sizes[t]
        d = [part[:n] for part in current]
        for k, parts in given:
            d[k].add_(parts[t])
        if w.w_hr is not None:
            d[0] = d_projected_of_steps[t].copy_(d[0]) @ w.w_hr
        result, *others = (parts[t] for parts in of_steps)
        result.mul_(d[0].unsqueeze(1))
        for factor, part in zip(others, d[1:], strict=True):
            result.addcmul_(factor, part.unsqueeze(1))
        new = [parts[t] for parts in d_previous]
        by_product = d_rh_of_steps[t] @ w.w_hh
        new[0] = new[0].add_(by_product) if w.w_hr is None else by_product
        for d_new, part in zip(d_fresh, new, strict=False):
            # Not by products with a mask: the masked values may be infinite.
            d_new[:n] += part.masked_fill(~is_fresh[t], 0.0)
            part.masked_fill_(ends[t], 0.0)
        current = new if n == rows.batch else _with_rest(new, current)
    for to, part in zip(d_state, current, strict=True):
        to.copy_(part)
    projected = (d_projected, traces[-1]) if w.w_hr is not None else ()
    return Found(d_rh, d_apart, d_fresh, projected)


def multiply(cell: Cell, c: Tensor, a: Tensor, b: Tensor, adds: bool) -> None:
    """Write a @ b to c, or add it to c, for the gradients of a layer with this cell."""
    products.by_torch(c, a, b, adds)


def _factors(
    direction: Direction, states: Sequence[Tensor], saved: Sequence[Tensor]
) -> list[Tensor]:
    """The factors of each state's gradient in the gradients of the gates and previous states.

    For each of the S states, (N, (G + A + S) * H).
    """
    cell = direction.cell
    pull_back, extra = TORCH.bind(cell.backward), direction.w.blocks()
    previous = direction.before(states)
    zero, one = (
        states[0].new_full((), number).expand(len(states[0]), direction.hidden) for number in (0, 1)
    )
    found = []
    width = (cell.n_gates + cell.n_apart + cell.n_states) * direction.hidden
    for k in range(cell.n_states):
        d_states = [one if j == k else zero for j in range(cell.n_states)]
        groups = pull_back(saved, states, previous, d_states, extra)
        parts = [part for group in groups for part in group]
        found.append(torch.cat([*parts, parts[0][:, :_PAD]], dim=1)[:, :width])
    return found
