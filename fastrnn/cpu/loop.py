"""Whole-sequence forward and backward through time, written with torch operators.

One loop for every cell, in each direction of the pass:

* the input projection of all steps is one GEMM into a buffer that the steps then
  finish in place, so a step is one GEMM and the cell's pointwise part;
* backward first computes, for all steps at once, the factors by which dh and dc
  become gate gradients (the Jacobian of the pointwise part is diagonal), so that
  a step backward is a few multiplications and one GEMM;
* each weight gradient is one GEMM over all N rows afterwards.

A padded batch and a packed sequence run through the same code: both are N rows,
split into steps that hold `sizes[t]` rows each (the rows of one step lie together,
row b of every step belongs to sequence b). See ``reference.py`` for the shapes.

Half precision is computed in float32 and rounded once, at the results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import CELLS, Weights, zero_state

# What forward keeps for backward: nothing, the states of every step, or the activations too. Here
# the states alone are not kept: backward begins with another forward then.
NOTHING, STATES, ALL = range(3)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a layer of `dtype` is computed and its activations are saved."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class CpuCell(NamedTuple):
    """The pointwise part of a cell, working in place on rows of the shared buffers.

    forward(gates, extra, h, c, w_hh_t, b_hh) -> h'
        Finish one step. `gates` (n, G*H) holds the input projection and is left holding
        the activations; `extra` (n, H) receives what else backward needs; c is updated.
    factors(gates, extra, h_prev, c_prev, h) -> (d_rh, d_wx_n, carry)
        For all rows: d_rh (N, G*H), to be multiplied by dh (dc for the LSTM's first three
        gates) step by step; d_wx_n the part in which the gradient of the input projection
        differs from it (GRU's n gate); `carry` what passes dh or dc on to the step before.
    backward(d_rh, d_wx_n, carry, dh, dc, w_hh) -> dh_prev
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


def _lstm_backward(d_rh, d_wx_n, carry, dh, dc, w_hh):
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


def _gru_backward(d_rh, d_wx_n, carry, dh, dc, w_hh):
    d_rh.unflatten(1, (3, -1)).mul_(dh.unsqueeze(1))
    d_wx_n.mul_(dh)
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

    def backward(d_rh, d_wx_n, carry, dh, dc, w_hh):
        return times_(d_rh, dh) @ w_hh

    return CpuCell(0, 1, forward, factors, backward)


CPU_CELLS = {
    "lstm": CpuCell(1, 4, _lstm_forward, _lstm_factors, _lstm_backward),
    "gru": CpuCell(1, 2, _gru_forward, _gru_factors, _gru_backward),
    "rnn_tanh": _rnn_cell(torch.tanh_, lambda h: 1 - h * h),
    "rnn_relu": _rnn_cell(torch.relu_, lambda h: (h > 0).to(h.dtype)),
    "rnn_identity": _rnn_cell(lambda pre: pre, torch.empty_like, Tensor.copy_),
}


class Rows(NamedTuple):
    """How N rows fall into T steps: all of one size (padded) or shrinking (packed)."""

    sizes: list[int]
    batch: int
    packed: bool

    @classmethod
    def of(cls, x: Tensor, batch_sizes: Tensor | None) -> Rows:
        if batch_sizes is None:
            return cls([x.shape[1]] * x.shape[0], x.shape[1], False)
        sizes = batch_sizes.tolist()
        return cls(sizes, sizes[0], True)

    def previous(self, rows: Tensor, initial: Tensor, reverse: bool) -> Tensor:
        """For every row, the value one step earlier in the direction of the pass."""
        if not self.packed:
            count = rows.shape[0] - self.batch
            parts = (rows[self.batch :], initial) if reverse else (initial, rows[:count])
            return torch.cat(parts)
        sizes = torch.tensor(self.sizes)
        offsets = sizes.cumsum(0) - sizes
        step = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        row = torch.arange(len(step)) - offsets[step]
        if reverse:
            alive = row < torch.cat([sizes[1:], sizes.new_zeros(1)])[step]
            source = offsets[(step + 1).clamp(max=len(sizes) - 1)]
        else:
            alive, source = step > 0, offsets[(step - 1).clamp(min=0)]
        index = torch.where(alive, source + row, len(step) + row)
        return torch.cat([rows, initial]).index_select(0, index.to(rows.device))


def check_batch(state: Sequence[Tensor], batch: int) -> None:
    """Raise unless states have `batch` rows, which compiled code finds out only when it runs."""
    for part in state:
        if part.shape[1] != batch:
            raise RuntimeError(f"Expected hidden states of {batch} rows, got {part.shape[1]}")


def _directions(
    cell: str,
    x: Tensor,
    batch: int,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    bidirectional: bool,
) -> tuple[list[Weights], list[Tensor], int]:
    """Weights by direction, the initial state (zeros if not given) and H, in the compute dtype."""
    directions = 2 if bidirectional else 1
    per_direction = len(weights) // directions
    dtype = compute_dtype(x.dtype)
    flat = [w.to(dtype) for w in weights]
    by_direction = [
        Weights.unpack(flat[d * per_direction : (d + 1) * per_direction]) for d in range(directions)
    ]
    initial = state or zero_state(cell, x, batch, weights, directions)
    check_batch(initial, batch)
    hidden = weights[0].shape[0] // CELLS[cell].n_gates
    return by_direction, [part.to(dtype) for part in initial], hidden


def layer_forward(
    cell: str,
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bidirectional: bool,
    save: int,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run a layer; see ``reference.layer`` for the arguments.

    Returns
    -------
    y : Tensor of shape (T, B, D * P), or (N, D * P)
    final : list of Tensor
    saved : list of Tensor
        Empty unless `save` is `ALL`. In the compute dtype: h (N, D * P), apart from y, which the
        caller may overwrite; then for each direction of an LSTM or GRU the gate activations
        (N, G * H) and the cell states or the recurrent part of the n gate (N, H).
    """
    rows = Rows.of(x, batch_sizes)
    pointwise = CPU_CELLS[cell]
    by_direction, initial, hidden = _directions(cell, x, rows.batch, state, weights, bidirectional)
    dtype, size_h = initial[0].dtype, initial[0].shape[-1]
    final = [part.clone(memory_format=torch.contiguous_format) for part in initial]
    flat = x.flatten(0, -2).to(dtype)
    y = x.new_empty(*x.shape[:-1], len(by_direction) * size_h)
    y_rows = y.view(flat.shape[0], y.shape[-1])
    h_rows = torch.empty_like(y_rows, dtype=dtype) if save == ALL or dtype != x.dtype else y_rows
    saved = [h_rows] if save == ALL else []
    for d, w in enumerate(by_direction):
        gates = _input_projection(flat, w, pointwise.folds_b_hh * hidden)
        extra = flat.new_empty(flat.shape[0], pointwise.n_extra * hidden)
        h_of_d = h_rows[:, d * size_h : (d + 1) * size_h]
        h, c = final[0][d], final[-1][d]
        w_hh_t = w.w_hh.t()
        buffers = (part.split(rows.sizes) for part in (gates, extra, h_of_d))
        steps = list(zip(*buffers, rows.sizes, strict=True))
        for gates_t, extra_t, h_row_t, n in reversed(steps) if d else steps:
            h_t = h[:n]
            new = pointwise.forward(gates_t, extra_t, h_t, c[:n], w_hh_t, w.b_hh)
            if w.w_hr is not None:
                new = new @ w.w_hr.t()
            h_row_t.copy_(new)
            h_t.copy_(new)
        if save == ALL and pointwise.n_extra:
            saved += [gates, extra]
    if h_rows is not y_rows:
        y_rows.copy_(h_rows)
    return y, [part.to(x.dtype) for part in final], saved


def _input_projection(x: Tensor, w: Weights, folded: int) -> Tensor:
    """x @ W_ih^T for all rows, with b_ih and the first `folded` entries of b_hh."""
    if w.b_ih is None or w.b_hh is None:
        return x @ w.w_ih.t()
    bias = w.b_ih.clone()
    bias[:folded] += w.b_hh[:folded]
    return torch.addmm(bias, x, w.w_ih.t())


def layer_backward(
    cell: str,
    dy: Tensor | None,
    d_final: Sequence[Tensor],
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bidirectional: bool,
    saved: Sequence[Tensor],
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Gradients of `layer_forward`, from what it saved.

    Returns
    -------
    dx : Tensor shaped as `x`, or None unless `needs_x`
    d_state : list of Tensor
        Gradient of the initial state, whether it was given or not.
    d_weights : list of Tensor
        Empty unless `needs_weights`.
    """
    rows = Rows.of(x, batch_sizes)
    pointwise = CPU_CELLS[cell]
    by_direction, initial, hidden = _directions(cell, x, rows.batch, state, weights, bidirectional)
    dtype = initial[0].dtype
    d_state = [part.to(dtype, copy=True).contiguous() for part in d_final]
    flat = x.flatten(0, -2).to(dtype)
    h_rows, *activations = saved
    size_h = initial[0].shape[-1]
    dy = None if dy is None else dy.flatten(0, -2).to(dtype)
    dx = flat.new_zeros(x.shape) if needs_x else None
    d_weights: list[Tensor] = []
    for d, w in enumerate(by_direction):
        reverse = d == 1
        of_d = slice(d * size_h, (d + 1) * size_h)
        h, empty = h_rows[:, of_d], h_rows[:, :0]
        gates, extra = activations[2 * d : 2 * d + 2] or (empty, empty)
        h_prev = rows.previous(h, initial[0][d], reverse)
        c_prev = rows.previous(extra, initial[1][d], reverse) if len(initial) == 2 else h_prev
        d_rh, d_wx_n, carry = pointwise.factors(gates, extra, h_prev, c_prev, h)
        # The gradient of the projected h of every row, for the gradient of the projection.
        d_projected = empty if w.w_hr is None else torch.empty_like(h)
        dy_d = empty if dy is None else dy[:, of_d]
        dh, dc = d_state[0][d], d_state[-1][d]
        buffers = (part.split(rows.sizes) for part in (d_rh, d_wx_n, carry, dy_d, d_projected))
        steps = list(zip(*buffers, rows.sizes, strict=True))
        for d_rh_t, d_wx_n_t, carry_t, dy_t, d_projected_t, n in (
            steps if reverse else reversed(steps)
        ):
            dh_t = dh[:n]
            if dy is not None:
                dh_t.add_(dy_t)
            d_hidden = dh_t
            if w.w_hr is not None:
                d_hidden = d_projected_t.copy_(dh_t) @ w.w_hr
            dh_t.copy_(pointwise.backward(d_rh_t, d_wx_n_t, carry_t, d_hidden, dc[:n], w.w_hh))
        if needs_weights:
            d_w_hh, d_b_hh = d_rh.t() @ h_prev, d_rh.sum(0)
        d_wx = d_rh
        if d_wx_n.shape[1]:
            d_wx[:, -hidden:] = d_wx_n
        if dx is not None:
            dx.view(flat.shape).addmm_(d_wx, w.w_ih)
        if needs_weights:
            d_weights += [d_wx.t() @ flat, d_w_hh]
            if w.b_ih is not None:
                d_weights += [d_wx.sum(0), d_b_hh]
            if w.w_hr is not None:
                h_full = gates[:, 3 * hidden :] * extra.tanh()
                d_weights.append(d_projected.t() @ h_full)
    return (
        None if dx is None else dx.to(x.dtype),
        [part.to(x.dtype) for part in d_state],
        [part.to(x.dtype) for part in d_weights],
    )
