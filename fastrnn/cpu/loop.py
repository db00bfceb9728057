"""One direction of a layer, forward and backward through time, written with torch operators.

One loop for every cell, in each direction of the pass:

* the input projection of all steps is one GEMM into a buffer that the steps then
  finish in place, so a step is one GEMM and the cell's pointwise part;
* backward first computes, for all steps at once, the factors by which dh and dc
  become gate gradients (the Jacobian of the pointwise part is diagonal), so that
  a step backward is a few multiplications and one GEMM.

It runs on every device and in every dtype, and serves where there is no kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..cells import CELLS, Weights
from ..flow import CUT, FRESH
from .rows import Breaks, Rows


class CpuCell(NamedTuple):
    """The pointwise part of a cell, working in place on rows of the shared buffers.

    forward(gates, extra, h, c, w_hh_t, b_hh) -> h'
        Finish one step. `gates` (n, G*H) holds the input projection and is left holding
        the activations; `extra` (n, H) receives what else backward needs; c is updated.
    factors(gates, extra, h_prev, c_prev, h) -> (d_rh, d_apart, carry)
        For all rows: d_rh (N, G*H), to be multiplied by dh (dc for the LSTM's first three
        gates) step by step; d_apart the part in which the gradient of the input projection
        differs from it (GRU's n gate); `carry` what passes dh or dc on to the step before.
    backward(d_rh, d_apart, carry, dh, dc, w_hh) -> dh_prev
        One step; finishes the gradients in place, updates dc.
    """

    n_extra: int
    folds_b_hh: int  # how many gates add b_hh to the input projection
    forward: Callable[..., Tensor]
    factors: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., Tensor]


def _lstm_forward(gates, cells, h, c, w_hh_t, b_hh):
    hidden = c.shape[1]
    gates.addmm_(h, w_hh_t)
    gates[:, : 2 * hidden].sigmoid_()
    gates[:, 2 * hidden : 3 * hidden].tanh_()
    gates[:, 3 * hidden :].sigmoid_()
    i, f, g, o = gates.chunk(4, dim=1)
    c.mul_(f).addcmul_(i, g)
    cells.copy_(c)
    return torch.tanh(c).mul_(o)


def _lstm_factors(gates, cells, h_prev, c_prev, h):
    i, f, g, o = gates.chunk(4, dim=1)
    tanh_c = cells.tanh()
    d_rh = torch.cat(
        [g * i * (1 - i), c_prev * f * (1 - f), i * (1 - g * g), tanh_c * o * (1 - o)], dim=1
    )
    carry = torch.cat([o * (1 - tanh_c * tanh_c), f], dim=1)  # dh -> dc, dc -> dc_prev
    return d_rh, d_rh[:, :0], carry


def _lstm_backward(d_rh, d_apart, carry, dh, dc, w_hh):
    through_c, f = carry.chunk(2, dim=1)
    dc.addcmul_(dh, through_c)
    gates = d_rh.unflatten(1, (4, -1))
    gates[:, :3].mul_(dc.unsqueeze(1))
    gates[:, 3].mul_(dh)
    dc.mul_(f)
    return d_rh @ w_hh


def _gru_forward(gates, rh_n, h, c, w_hh_t, b_hh):
    hidden = h.shape[1]
    r, z = gates[:, : 2 * hidden].addmm_(h, w_hh_t[:, : 2 * hidden]).sigmoid_().chunk(2, dim=1)
    n = gates[:, 2 * hidden :]
    torch.mm(h, w_hh_t[:, 2 * hidden :], out=rh_n)
    if b_hh is not None:
        rh_n.add_(b_hh[2 * hidden :])
    return torch.lerp(n.addcmul_(r, rh_n).tanh_(), h, z)


def _gru_factors(gates, rh_n, h_prev, c_prev, h):
    r, z, n = gates.chunk(3, dim=1)
    d_n = (1 - z) * (1 - n * n)
    d_rh = torch.cat([d_n * rh_n * r * (1 - r), (h_prev - n) * z * (1 - z), d_n * r], dim=1)
    return d_rh, d_n, z


def _gru_backward(d_rh, d_apart, carry, dh, dc, w_hh):
    d_rh.unflatten(1, (3, -1)).mul_(dh.unsqueeze(1))
    d_apart.mul_(dh)
    return torch.addcmul(d_rh @ w_hh, dh, carry)


def _rnn_cell(
    phi_: Callable[[Tensor], Tensor],
    slope: Callable[[Tensor], Tensor],
    times_: Callable[[Tensor, Tensor], Tensor] = Tensor.mul_,
) -> CpuCell:
    """An Elman cell from the activation (in place) and its slope as a function of h.

    `times_` multiplies the slope by dh in place.
    """

    def forward(gates, extra, h, c, w_hh_t, b_hh):
        return phi_(gates.addmm_(h, w_hh_t))

    def factors(gates, extra, h_prev, c_prev, h):
        d_rh = slope(h)
        return d_rh, d_rh[:, :0], d_rh[:, :0]

    def backward(d_rh, d_apart, carry, dh, dc, w_hh):
        return times_(d_rh, dh) @ w_hh

    return CpuCell(0, 1, forward, factors, backward)


CPU_CELLS = {
    "lstm": CpuCell(1, 4, _lstm_forward, _lstm_factors, _lstm_backward),
    "gru": CpuCell(1, 2, _gru_forward, _gru_factors, _gru_backward),
    "rnn_tanh": _rnn_cell(torch.tanh_, lambda h: 1 - h * h),
    "rnn_relu": _rnn_cell(torch.relu_, lambda h: (h > 0).to(h.dtype)),
    "rnn_identity": _rnn_cell(lambda pre: pre, torch.empty_like, Tensor.copy_),
}


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
    """Run one direction of a layer.

    Parameters
    ----------
    cell : str
        Key of `CPU_CELLS`.
    x : Tensor of shape (N, I)
    w : Weights
    rows : Rows
    reverse : bool
    is_given : bool
        Whether the initial state is other than zeros.
    state : sequence of Tensor of shape (B, P) and (B, H)
        Initial state; overwritten by the final state.
    h_rows : Tensor of shape (N, P)
        Receives h.
    saved : sequence of Tensor
        Empty, or for an LSTM or GRU what receives the gate activations (N, G * H) and the cell
        states or the recurrent part of the n gate (N, H).
    breaks : Breaks, optional
    """
    pointwise = CPU_CELLS[cell]
    hidden = w.w_hh.shape[0] // CELLS[cell].n_gates
    if not saved:
        saved = [
            x.new_empty(x.shape[0], width)
            for width in (w.w_ih.shape[0], pointwise.n_extra * hidden)
        ]
    gates, extra = saved
    _project_input(x, w, pointwise.folds_b_hh * hidden, gates)
    h, c = state[0], state[-1]
    w_hh_t = w.w_hh.t()
    fresh = None if breaks is None else (breaks.marks & FRESH != 0)[:, None]
    buffers = (part.split(rows.sizes) for part in (gates, extra, h_rows))
    marks = [None] * rows.steps if fresh is None else fresh.split(rows.sizes)
    steps = list(zip(*buffers, marks, rows.sizes, strict=True))
    for gates_t, extra_t, h_row_t, fresh_t, n in reversed(steps) if reverse else steps:
        h_t = h[:n]
        if breaks is not None:
            for part, new in zip(state, breaks.fresh, strict=True):
                torch.where(fresh_t, new[:n], part[:n], out=part[:n])
        new = pointwise.forward(gates_t, extra_t, h_t, c[:n], w_hh_t, w.b_hh)
        if w.w_hr is not None:
            new = new @ w.w_hr.t()
        h_row_t.copy_(new)
        h_t.copy_(new)


def _project_input(x: Tensor, w: Weights, folded: int, out: Tensor) -> None:
    """x @ W_ih^T for all rows, with b_ih and the first `folded` entries of b_hh."""
    if w.b_ih is None or w.b_hh is None:
        torch.mm(x, w.w_ih.t(), out=out)
        return
    bias = w.b_ih.clone()
    bias[:folded] += w.b_hh[:folded]
    torch.addmm(bias, x, w.w_ih.t(), out=out)


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
) -> tuple[Tensor, Tensor, list[Tensor], Sequence[Tensor]]:
    """Compute the gradients of the gates of `forward`.

    Parameters
    ----------
    cell : str
    dy : Tensor of shape (N, P), optional
        Gradient of h at every row.
    d_traces : sequence of Tensor of shape (N, H)
        That of c, or empty.
    d_state : sequence of Tensor
        Gradient of the final state; overwritten by that of the initial state.
    w, rows, reverse
        As for `forward`.
    initial : sequence of Tensor
        State before the first step; empty for zeros.
    h_rows : Tensor of shape (N, P)
    saved : sequence of Tensor
        As `forward` left it.
    breaks : Breaks, optional

    Returns
    -------
    d_rh : Tensor of shape (N, G * H)
        Gradient of the recurrent part of every gate.
    d_apart : Tensor of shape (N, A * H)
        Gradient of the input part of the last A gates, in which it differs from that.
    d_fresh : list of Tensor
        Gradient of the states after a reset; empty without breaks.
    projected : sequence of Tensor
        The factors of the gradient of a projection: that of the projected h, and h before it.
    """
    pointwise = CPU_CELLS[cell]
    empty = h_rows[:, :0]
    gates, extra = saved or (empty, empty)
    initial = initial or [torch.zeros_like(part) for part in d_state]
    h_prev = rows.previous(h_rows, initial[0], reverse)
    c_prev = rows.previous(extra, initial[1], reverse) if len(initial) == 2 else h_prev
    d_fresh, marks = [], [(None, None)] * rows.steps
    if breaks is not None:
        breaks.replace(h_prev, 0)
        if len(initial) == 2:
            breaks.replace(c_prev, 1)
        d_fresh = [torch.zeros_like(part) for part in d_state]
        is_fresh, ends = (((breaks.marks & bits) != 0)[:, None] for bits in (FRESH, FRESH | CUT))
        marks = list(zip(is_fresh.split(rows.sizes), ends.split(rows.sizes), strict=True))
    d_rh, d_apart, carry = pointwise.factors(gates, extra, h_prev, c_prev, h_rows)
    # The gradient of the projected h of every row, for the gradient of the projection.
    d_projected = empty if w.w_hr is None else torch.empty_like(h_rows)
    dh, dc = d_state[0], d_state[-1]
    every_dy, every_dc = empty if dy is None else dy, d_traces[0] if d_traces else empty
    parts = (d_rh, d_apart, carry, every_dy, every_dc, d_projected)
    buffers = (part.split(rows.sizes) for part in parts)
    steps = list(zip(*buffers, marks, rows.sizes, strict=True))
    for d_rh_t, d_apart_t, carry_t, dy_t, dc_t, d_projected_t, (is_fresh_t, ends_t), n in (
        steps if reverse else reversed(steps)
    ):
        dh_t = dh[:n]
        if dy is not None:
            dh_t.add_(dy_t)
        if d_traces:
            dc[:n].add_(dc_t)
        d_hidden = dh_t
        if w.w_hr is not None:
            d_hidden = d_projected_t.copy_(dh_t) @ w.w_hr
        dh_t.copy_(pointwise.backward(d_rh_t, d_apart_t, carry_t, d_hidden, dc[:n], w.w_hh))
        for part, d_new in zip(d_state, d_fresh, strict=False):
            # Not by products: what does not pass may be infinite.
            d_new[:n] += part[:n].masked_fill(~is_fresh_t, 0.0)
            part[:n].masked_fill_(ends_t, 0.0)
    if w.w_hr is None:
        return d_rh, d_apart, d_fresh, ()
    h_full = gates[:, -w.w_hr.shape[1] :] * extra.tanh()
    return d_rh, d_apart, d_fresh, (d_projected, h_full)
