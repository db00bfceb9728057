"""A layer on a CPU, in both directions of the pass and for both directions of a layer.

Each direction runs by the compiled kernels (``native.py``) or, where there are none, by the loop
of torch operators (``loop.py``, also on devices that have no backend of their own); both save the
same tensors. The input gradient and the weight gradients are products over all rows afterwards.

Half precision is computed in float32 and rounded once, at the results. A batch with rows that are
not there is packed for the walk through time.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import gradients, products, reference
from ..cells import Weights
from ..flow import CUT, HOLD, Flow, without_unasked
from ..reference import zero_state
from . import loop, machine
from .rows import Breaks, Rows, breaks, select

# What forward keeps for backward: nothing, the states of every step, or the activations too. Here
# the states alone are not kept: backward begins with another forward then.
NOTHING, STATES, ALL = range(3)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Name the dtype in which a layer of `dtype` is computed and its activations are saved.

    Parameters
    ----------
    dtype : torch.dtype

    Returns
    -------
    torch.dtype
    """
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def saves_nothing(cell: str, x: Tensor, flow: Flow) -> bool:
    """Tell whether a layer is for the differentiable loop, which begins backward anew.

    Parameters
    ----------
    cell, x, flow
        As for ``reference.layer``.

    Returns
    -------
    bool
        True for cells and noise that neither kernels nor the loop of ``loop.py`` know, and for
        marks on other devices, whose values must not be waited for.
    """
    return (
        cell not in loop.CPU_CELLS
        or len(flow.noise) > 0
        or (flow.marks is not None and not x.is_cpu)
    )


def check_batch(state: Sequence[Tensor], batch: int) -> None:
    """Raise unless states have `batch` rows, which compiled code finds out only when it runs.

    Parameters
    ----------
    state : sequence of Tensor of shape (D, B, H)
    batch : int

    Raises
    ------
    RuntimeError
        If one has another number of rows.
    """
    for part in state:
        if part.shape[1] != batch:
            raise RuntimeError(f"Expected hidden states of {batch} rows, got {part.shape[1]}")


def _backend(x: Tensor, projected: bool) -> ModuleType:
    if not x.is_cpu or machine.kernel_gap(x.dtype, projected) is not None:
        return loop
    from . import native

    return native


class _Problem:
    """A layer in the compute dtype, packed if not all rows are there."""

    def __init__(
        self,
        cell: str,
        x: Tensor,
        state: Sequence[Tensor],
        weights: Sequence[Tensor],
        batch_sizes: Tensor | None,
        bidirectional: bool,
        flow: Flow,
    ) -> None:
        directions = 2 if bidirectional else 1
        per_direction = len(weights) // directions
        self.dtype, self.size_h = compute_dtype(x.dtype), weights[1].shape[1]
        padded = Rows.of(x, batch_sizes)
        check_batch((*state, *flow.fresh), padded.batch)
        self.rows, self.selection = select(flow.marks, padded)
        flat = _as(weights, self.dtype)
        self.weights = [
            Weights.unpack(flat[d * per_direction : (d + 1) * per_direction])
            for d in range(directions)
        ]
        self.x = self.selection.rows(x.flatten(0, -2)).to(self.dtype)
        self.given = _as(state, self.dtype)
        self.initial = [self.selection.sequences(part) for part in self.given]
        self.breaks: list[Breaks | None] = [None] * directions
        if flow.marks is not None:
            fresh = _as(flow.fresh, self.dtype)
            fresh = [self.selection.sequences(part) for part in fresh]
            if not fresh:
                fresh = zero_state(cell, self.x, self.rows.batch, weights, directions)
            for d in range(directions):
                marks = self.selection.rows(flow.marks[d].reshape(-1)).contiguous()
                self.breaks[d] = breaks(marks, [part[d] for part in fresh], self.rows)
        self.backend = _backend(x, self.weights[0].w_hr is not None)

    def columns(self, d: int) -> slice:
        """Those of h of a direction."""
        return slice(d * self.size_h, (d + 1) * self.size_h)


def _as(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """The tensors in a dtype that all of them have, or none."""
    return tensors if all(t.dtype == dtype for t in tensors) else [t.to(dtype) for t in tensors]


def layer_forward(
    cell: str,
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bidirectional: bool,
    flow: Flow,
    save: int,
    traced: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Run a layer.

    Parameters
    ----------
    cell, x, state, weights, batch_sizes, bidirectional, flow
        As for ``reference.layer``.
    save : int
        What to keep for backward.
    traced : bool
        Whether to return the states other than h after every step.

    Returns
    -------
    y : Tensor of shape (T, B, D * P), or (N, D * P)
    final : list of Tensor
    traces : list of Tensor
        As in ``reference.Result``.
    saved : list of Tensor
        Empty unless `save` is `ALL`. In the compute dtype: h (N, D * P), apart from y, which the
        caller may overwrite; then for each direction of an LSTM or GRU the gate activations
        (N, G * H) and the cell states or the recurrent part of the n gate (N, H). With marks, rows
        that are not there are missing, and as many at the end mean nothing.
    """
    if saves_nothing(cell, x, flow):
        with torch.no_grad():
            arguments = (x, state, weights, batch_sizes, bidirectional, flow)
            result = _in_compute_dtype(reference.layer, cell, arguments)
        y, final, traces = result
        back = (list(_as(part, x.dtype)) for part in ([y], final, traces if traced else []))
        (y,), final, traces = back
        return y, final, traces, []
    problem = _Problem(cell, x, state, weights, batch_sizes, bidirectional, flow)
    rows, dtype, selection = problem.rows, problem.dtype, problem.selection
    directions = len(problem.weights)
    if state:
        final = [part.clone(memory_format=torch.contiguous_format) for part in problem.initial]
    else:
        final = zero_state(cell, problem.x, rows.batch, weights, directions)
    is_packed = selection.chosen is not None
    y = x.new_empty(*x.shape[:-1], directions * problem.size_h)
    y_rows = y.view(-1, y.shape[-1])
    if save == ALL or dtype != x.dtype or is_packed:
        h_rows = torch.empty_like(y_rows, dtype=dtype)
    else:
        h_rows = y_rows
    saved = [h_rows] if save == ALL else []
    hidden = weights[1].shape[0] // reference.CELLS[cell].n_gates
    n_traces = reference.CELLS[cell].n_states - 1 if traced else 0
    traces = [x.new_zeros(*x.shape[:-1], directions * hidden) for _ in range(n_traces)]
    for d, w in enumerate(problem.weights):
        kept: list[Tensor] = []
        if loop.CPU_CELLS[cell].n_extra and (save == ALL or traces):
            kept = [h_rows.new_empty(h_rows.shape[0], w.w_hh.shape[0])]
            kept.append(h_rows.new_empty(h_rows.shape[0], hidden))
        saved += kept if save == ALL else []
        if rows.steps == 0:
            continue
        problem.backend.forward(
            cell,
            problem.x,
            w,
            rows,
            d == 1,
            bool(state),
            [part[d] for part in final],
            h_rows[: rows.total, problem.columns(d)],
            [part[: rows.total] for part in kept],
            problem.breaks[d],
        )
        for trace in traces:
            of_d = slice(d * hidden, (d + 1) * hidden)
            selection.put_rows(
                trace.view(-1, trace.shape[-1])[:, of_d], kept[1][: rows.total].to(x.dtype)
            )
    if h_rows is not y_rows:
        if is_packed:
            y_rows.zero_()
        selection.put_rows(y_rows, h_rows[: rows.total].to(x.dtype))
    final = list(_as(final, x.dtype))
    if is_packed:
        selected = final
        final = [part.clone(memory_format=torch.contiguous_format) for part in state]
        if not state:
            final = zero_state(cell, x, x.shape[1], weights, directions)
        for whole, part in zip(final, selected, strict=True):
            selection.put_sequences(whole, part)
    return y, final, traces, saved


def layer_backward(
    cell: str,
    dy: Tensor | None,
    d_final: Sequence[Tensor],
    d_traces: Sequence[Tensor],
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bidirectional: bool,
    flow: Flow,
    saved: Sequence[Tensor],
    needs_x: bool,
    needs_weights: bool,
    groups: int = 0,
) -> tuple[Tensor | None, list[Tensor], list[Tensor], list[Tensor]]:
    """Compute the gradients of `layer_forward`, from what it saved.

    Parameters
    ----------
    cell : str
    dy : Tensor shaped as y, optional
    d_final : sequence of Tensor
    d_traces : sequence of Tensor
        Empty if there are none.
    x, state, weights, batch_sizes, bidirectional, flow
        As for `layer_forward`.
    saved : sequence of Tensor
        If empty, another forward comes first.
    needs_x, needs_weights : bool
    groups : int, default 0
        If positive, the batch consists of so many parts, one after another, each of which has its
        own weight gradients.

    Returns
    -------
    dx : Tensor shaped as `x`, or None unless `needs_x`
    d_state : list of Tensor
        Gradient of the initial state, whether it was given or not.
    d_fresh : list of Tensor
        Gradient of the states after a reset, if they were given.
    d_weights : list of Tensor
        Empty unless `needs_weights`; with `groups`, of shape (groups, ...).
    """
    if saves_nothing(cell, x, flow):
        return _reference_backward(
            cell, dy, d_final, d_traces, x, state, weights, batch_sizes, bidirectional, flow,
            needs_x, needs_weights, groups,
        )  # fmt: skip
    arguments = (x, state, weights, batch_sizes, bidirectional, flow)
    saved = saved or layer_forward(cell, *arguments, ALL, False)[3]
    options = (saved, needs_x, needs_weights, groups)
    found = _backward(cell, dy, d_final, d_traces, *arguments, *options)
    if flow.marks is None or _are_finite(found):
        return found
    marks, unasked = without_unasked(flow.marks, dy, d_traces, d_final, CUT)
    if not bool(unasked.any()):
        return found
    arguments = (*arguments[:-1], flow._replace(marks=marks))
    return _backward(cell, dy, d_final, d_traces, *arguments, *options, unasked)


def _are_finite(found: tuple[Tensor | None, list[Tensor], list[Tensor], list[Tensor]]) -> bool:
    """Whether gradients are numbers; all of them are if those of the weights are."""
    dx, d_state, d_fresh, d_weights = found
    tensors = d_weights or [*d_state, *d_fresh, *([] if dx is None else [dx])]
    total: Any = sum(part.sum(dtype=torch.float64) for part in tensors)
    return bool(total.isfinite())


def _backward(
    cell, dy, d_final, d_traces, x, state, weights, batch_sizes, bidirectional, flow, saved,
    needs_x, needs_weights, groups, unasked=None,
):  # fmt: skip
    """`layer_backward` from what was saved, perhaps without some steps."""
    problem = _Problem(cell, x, state, weights, batch_sizes, bidirectional, flow)
    rows, dtype, selection = problem.rows, problem.dtype, problem.selection
    count = rows.total
    d_selected = [selection.sequences(part.to(dtype)) for part in d_final]
    d_state = [part.clone(memory_format=torch.contiguous_format) for part in d_selected]
    # What unpacks saved tensors may bring them back in another layout.
    h_rows, *activations = (part.to(dtype).contiguous()[:count] for part in saved)
    dy = None if dy is None else selection.rows(dy.flatten(0, -2)).to(dtype)
    d_traces = [selection.rows(part.flatten(0, -2)).to(dtype) for part in d_traces]
    dx = problem.x.new_zeros(problem.x.shape) if needs_x else None
    d_fresh = [torch.zeros_like(part, dtype=dtype) for part in flow.fresh]
    d_weights: list[Tensor] = []
    hidden = weights[1].shape[0] // reference.CELLS[cell].n_gates
    for d, w in enumerate(problem.weights):
        h, initial_d = h_rows[:, problem.columns(d)], [part[d] for part in problem.initial]
        found = problem.breaks[d]
        if rows.steps == 0:
            d_weights += [
                part.new_zeros(*_leading(groups), *part.shape) for part in w[:5] if part is not None
            ]
            continue
        d_rh, d_apart, d_of_fresh, projected = problem.backend.backward(
            cell,
            None if dy is None else dy[:, problem.columns(d)],
            [part[:, d * hidden : (d + 1) * hidden] for part in d_traces],
            [part[d] for part in d_state],
            w,
            rows,
            d == 1,
            initial_d,
            h,
            activations[2 * d : 2 * d + 2],
            found,
        )
        for whole, part in zip(d_fresh, d_of_fresh, strict=False):
            selection.put_sequences(whole[d : d + 1], part[None])
        own_x, left_out = problem.x, None
        if unasked is not None:
            left_out = selection.rows(unasked[d].reshape(-1)).unsqueeze(1)
            own_x, *projected = (
                part.masked_fill(left_out, 0.0) for part in (problem.x, *projected)
            )
            for part in (d_rh, d_apart):
                part.masked_fill_(left_out, 0.0)
        if dx is not None:
            products.add_d_x(dx, d_rh, d_apart, w.w_ih)
        if not needs_weights:
            continue
        if groups or found is not None or rows.batch_sizes is not None:
            h_0 = initial_d[0] if state else h.new_zeros(rows.batch, problem.size_h)
            h_prev = rows.previous(h, h_0, d == 1)
            h_prev = h_prev if found is None else found.replace(h_prev, 0)
            h_prev = h_prev if left_out is None else h_prev.masked_fill_(left_out, 0.0)
            if groups:
                d_weights += _by_group(
                    groups, x, problem, w, (d_rh, d_apart, own_x, h_prev, *projected)
                )
                continue
            d_w_hh = d_rh.t() @ h_prev
        else:
            d_w_hh = products.d_w_hh(d_rh, h, rows.batch, initial_d[0] if state else None, d == 1)
        d_weights += products.d_weights(d_rh, d_apart, own_x, d_w_hh, w)
        if projected:
            d_weights.append(projected[0].t() @ projected[1])
    if dx is not None:
        whole = dx
        if selection.chosen is not None:
            whole = dx.new_zeros(x.shape).view(-1, x.shape[-1])
            selection.put_rows(whole, dx)
        dx = whole.view(x.shape).to(x.dtype)
    if selection.order is not None:
        # The gradient of the state of a sequence without steps is that of its final state.
        of_all = [part.to(dtype, copy=True) for part in d_final]
        for whole, part in zip(of_all, d_state, strict=True):
            selection.put_sequences(whole, part)
        d_state = of_all
    return (
        dx,
        list(_as(d_state, x.dtype)),
        list(_as(d_fresh, x.dtype)) if d_fresh else [],
        list(_as(d_weights, x.dtype)) if d_weights else [],
    )


def _leading(groups: int) -> tuple[int, ...]:
    return (groups,) if groups else ()


def _by_group(
    groups: int, x: Tensor, problem: _Problem, w: Weights, factors: Sequence[Tensor]
) -> list[Tensor]:
    """The weight gradients of every group of sequences."""
    if problem.selection.chosen is not None:
        padded = [part.new_zeros(x.shape[0] * x.shape[1], part.shape[1]) for part in factors]
        for whole, part in zip(padded, factors, strict=True):
            problem.selection.put_rows(whole, part)
        factors = padded
    return products.d_weights_by_group(*factors, w=w, steps=x.shape[0], groups=groups)


def _in_compute_dtype(function, cell, arguments):
    """Call a function of the reference in the compute dtype."""
    x, state, weights, batch_sizes, bidirectional, flow = arguments
    dtype = compute_dtype(x.dtype)
    state, weights, fresh, noise = (_as(p, dtype) for p in (state, weights, flow.fresh, flow.noise))
    flow = Flow(flow.marks, fresh, noise)
    return function(cell, x.to(dtype), state, weights, batch_sizes, bidirectional, flow)


def _reference_backward(
    cell, dy, d_final, d_traces, x, state, weights, batch_sizes, bidirectional, flow, needs_x,
    needs_weights, groups,
):  # fmt: skip
    """`layer_backward` by the reference, of every group apart."""
    if flow.marks is not None and not groups:
        # A step that is not asked for is as good as none.
        marks, _ = without_unasked(flow.marks, dy, d_traces, d_final, HOLD)
        flow = flow._replace(marks=marks)
    dtype = compute_dtype(x.dtype)
    dy = None if dy is None else dy.to(dtype)
    d_final, d_traces = _as(d_final, dtype), _as(d_traces, dtype)

    def backward(cell, *arguments):
        found = gradients.first(cell, dy, d_final, d_traces, *arguments)
        return [[found[0]], *found[1:]]

    if not groups:
        arguments = (x, state, weights, batch_sizes, bidirectional, flow)
        inputs = ([x], state, flow.fresh, weights)
        found = _in_compute_dtype(backward, cell, arguments)
        (dx,), d_state, d_fresh, d_weights = (
            [
                torch.zeros_like(t) if g is None else g.to(t.dtype)
                for g, t in zip(*pair, strict=True)
            ]
            for pair in zip(found, inputs, strict=True)
        )
        return dx if needs_x else None, d_state, d_fresh, d_weights if needs_weights else []
    parts = []
    for dy_g, d_final_g, d_traces_g, x_g, state_g, flow_g in _groups(
        groups, (dy, d_final, d_traces), x, state, flow
    ):
        part = _reference_backward(
            cell, dy_g, d_final_g, d_traces_g, x_g, state_g, weights, batch_sizes, bidirectional,
            flow_g, needs_x, needs_weights, 0,
        )  # fmt: skip
        parts.append(part)
    dxs, *others = zip(*parts, strict=True)
    d_state, d_fresh = (
        [torch.cat(same, 1) for same in zip(*lists, strict=True)] for lists in others[:2]
    )
    d_weights = [torch.stack(same) for same in zip(*others[2], strict=True)]
    return torch.cat(dxs, 1) if needs_x else None, d_state, d_fresh, d_weights


def _groups(groups, d_results, x, state, flow):
    """The arguments of backward for every group of sequences."""
    size = x.shape[1] // groups
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)

        def of(tensors, part=part):
            return [t if not t.numel() else t[:, part] for t in tensors]

        marks = None if flow.marks is None else flow.marks[:, :, part]
        drop, zones = (
            of(flow.noise[:1]),
            [z if not z.numel() else z[:, :, part] for z in flow.noise[1:]],
        )
        dy, d_final, d_traces = d_results
        dy_g = None if dy is None else dy[:, part]
        flow_g = Flow(marks, of(flow.fresh), [*drop, *zones])
        yield dy_g, of(d_final), of(d_traces), x[:, part], of(state), flow_g
