"""A layer on a CPU, in both directions of the pass and for both directions of a layer.

Each direction runs by the compiled kernels (``native.py``) or, where there are none, by our loop
of torch operators (``operators.py``, also on devices that have no backend of their own); both save
the same tensors. The input gradient and the weight gradients are products over all rows afterwards.

Half precision that the kernels do not multiply is computed in float32 and rounded once, at the
results; where they do, the states of a step are float32. A batch with rows that are not there is
packed for the walk through time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import gradients, products, reference
from ..call import Asked, Call, Cotangents, Gradients, Result
from ..flow import CUT, HOLD, Flow, without_unasked
from . import machine, operators
from .direction import Breaks, Direction, breaks
from .rows import Rows, select
from .walk import Walk

# What forward keeps for backward: nothing, the states of every step, or the activations too. Here
# the states alone are not kept: backward begins with another forward then.
NOTHING, STATES, ALL = range(3)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Name the dtype in which a layer is computed and its activations are saved."""
    if x.is_cpu and machine.multiplies(x.dtype) and machine.kernel_gap(x.dtype) is None:
        return x.dtype
    return machine.exact_dtype(x.dtype)


def saves_nothing(call: Call) -> bool:
    """Tell whether a layer is for the differentiable loop, which begins backward anew.

    That is for cells and noise that neither kernels nor the loop of ``operators.py`` know, and for
    marks on other devices, whose values must not be waited for.
    """
    flow = call.flow
    return (
        not call.cell.is_pointwise
        or len(flow.noise) > 0
        or (flow.marks is not None and not call.x.is_cpu)
    )


def check_batch(state: Sequence[Tensor], batch: int) -> None:
    """Raise unless states (D, B, H) have `batch` rows, which compiled code knows only when run."""
    for part in state:
        if part.shape[1] != batch:
            raise RuntimeError(f"Expected hidden states of {batch} rows, got {part.shape[1]}")


def fake_saved(call: Call, save: int) -> list[Tensor]:
    """Make tensors of the shapes and dtypes that `forward` saves; they are not written.

    Empty unless `save` is `ALL`: h (N, D * P), apart from y, which the caller may overwrite; then
    for each direction the values that the cell hands to backward, the other states and, if h is
    projected, h before that, (N, H) each. With marks, rows that are not there are missing, and as
    many at the end mean nothing.
    """
    if save != ALL or saves_nothing(call):
        return []
    n_more = call.cell.n_saved + call.cell.n_states - 1 + call.is_projected
    # Apart: pieces of 32 MiB and more are given back to the system at once, and new pages cost an
    # LSTM of (T, B, H) = (1024, 16, 128) a sixth of its time in training, by 2 threads.
    widths = [call.directions * call.size_h] + [call.hidden_size] * n_more * call.directions
    count, dtype = math.prod(call.x.shape[:-1]), compute_dtype(call.x)
    return [call.x.new_empty(count, width, dtype=dtype) for width in widths]


def _as(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in a dtype."""
    return [t if t.dtype == dtype else t.to(dtype) for t in tensors]


def _in(dtype: torch.dtype, call: Call) -> Call:
    """The call in a dtype."""
    if {part.dtype for part in (*call.tensors, *call.flow.noise)} == {dtype}:
        return call
    marks, *others = call.flow
    flow = Flow(marks, *(_as(part, dtype) for part in others))
    state, weights = _as(call.state, dtype), _as(call.weights, dtype)
    return call._replace(x=call.x.to(dtype), state=state, weights=weights, flow=flow)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies that kernels may write."""
    return [part.clone(memory_format=torch.contiguous_format) for part in tensors]


def _columns(rows: Tensor, d: int, directions: int) -> Tensor:
    """Those of a direction."""
    if directions == 1:
        return rows
    width = rows.shape[1] // directions
    return rows[:, d * width : (d + 1) * width]


def _first(rows: Tensor, count: int) -> Tensor:
    return rows if rows.shape[0] == count else rows[:count]


class _Problem:
    """A layer in the compute dtype, packed if not all rows are there."""

    def __init__(self, call: Call) -> None:
        check_batch((*call.state, *call.flow.fresh), call.batch)
        self.rows, self.selection = select(call.flow.marks, Rows.of(call))
        self.dtype = compute_dtype(call.x)
        self.exact = machine.exact_dtype(self.dtype)
        computed = _in(self.dtype, call)
        self.x = self.selection.rows(computed.x.flatten(0, -2))
        self.initial = [self.selection.sequences(part) for part in computed.state]
        self.shapes = call.shapes
        self.directions = [
            Direction(
                call.cell,
                w,
                self.rows,
                d == 1,
                [part[d] for part in self.initial],
                self._breaks(computed.flow, d),
            )
            for d, w in enumerate(computed.by_direction())
        ]
        self.backend = _backend(call.x)

    def _breaks(self, flow: Flow, d: int) -> Breaks | None:
        if flow.marks is None:
            return None
        fresh = [self.selection.sequences(part) for part in flow.fresh]
        fresh = fresh or self._zeros(self.dtype)
        marks = self.selection.rows(flow.marks[d].reshape(-1)).contiguous()
        return breaks(marks, [part[d] for part in fresh], self.rows)

    def first_states(self) -> list[Tensor]:
        """States before the first step, to be overwritten."""
        return _copies(_as(self.initial, self.exact)) or self._zeros(self.exact)

    def _zeros(self, dtype: torch.dtype) -> list[Tensor]:
        sizes = [(count, self.rows.batch, width) for count, _, width in self.shapes()]
        return [self.x.new_zeros(size, dtype=dtype) for size in sizes]


def _backend(x: Tensor) -> ModuleType:
    if not x.is_cpu or machine.kernel_gap(x.dtype) is not None:
        return operators
    from . import native

    return native


def forward(call: Call, save: int, traced: bool) -> tuple[Result, list[Tensor]]:
    """Run a layer; `save` says what to keep for backward, which `fake_saved` describes.

    The result has traces only if it is `traced`.
    """
    dtype = call.x.dtype
    if saves_nothing(call):
        with torch.no_grad():
            y, final, traces = reference.layer(_in(machine.exact_dtype(dtype), call))
        return Result(y.to(dtype), _as(final, dtype), _as(traces if traced else [], dtype)), []
    problem = _Problem(call)
    selection, count, directions = problem.selection, problem.rows.total, call.directions
    is_packed = selection.chosen is not None
    final = problem.first_states()
    shape = call.x.shape[:-1]
    y = call.x.new_empty(*shape, directions * call.size_h)
    others = call.cell.states[1:] if traced else ()
    traces = [call.x.new_zeros(*shape, directions * call.hidden_size) for _ in others]
    y_rows = y.view(-1, y.shape[-1])
    saved = fake_saved(call, save)
    if saved:
        h_rows = saved[0]
    elif is_packed or problem.dtype != dtype:
        h_rows = torch.empty_like(y_rows, dtype=problem.dtype)
    else:
        h_rows = y_rows
    for d, direction in enumerate(problem.directions if problem.rows.steps else ()):
        of_cell, of_states = _of_direction(call, saved, d)
        if not of_states:
            of_states = [h_rows.new_empty(count, call.hidden_size) for _ in traces]
        of_cell, of_states = ([_first(p, count) for p in parts] for parts in (of_cell, of_states))
        problem.backend.forward(
            direction,
            problem.x,
            [part[d] for part in final],
            _columns(_first(h_rows, count), d, directions),
            of_states,
            of_cell,
        )
        for trace, part in zip(traces, of_states, strict=False):
            to = _columns(trace.view(-1, trace.shape[-1]), d, directions)
            selection.put_rows(to, part.to(dtype))
    if h_rows is not y_rows:
        if is_packed:
            y_rows.zero_()
        selection.put_rows(y_rows, _first(h_rows, count).to(dtype))
    final = _as(final, dtype)
    if is_packed:
        selected, final = final, _copies(call.initial())
        for whole, part in zip(final, selected, strict=True):
            selection.put_sequences(whole, part)
    return Result(y, final, traces), saved


def prepared(call: Call, *, is_step: bool = False) -> Any:
    """Make what runs all layers of a call in inference, or a step, without a record of the call.

    It takes input, states and weights like those of the call, and returns output and final states.
    None if the kernels do not take these as they are.
    """
    cell, x, options = call.cell, call.x, call.options
    if options.training and options.dropout and call.num_layers > 1:
        return None
    if cell.extras or compute_dtype(x) != x.dtype or not x.numel() or _backend(x) is operators:
        return None
    if any(part.layout != torch.strided for part in call.tensors):
        return None
    if not all(weight.is_contiguous() for weight in call.weights):
        return None
    from . import inference

    stack = inference.Stack(call, is_step=is_step)
    return stack.step if is_step else stack.run


def _of_direction(
    call: Call, saved: Sequence[Tensor], d: int
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """What was saved beside h: for the cell, and the states."""
    count = (len(saved) - 1) // call.directions if saved else 0
    of_d = saved[1 + d * count : 1 + (d + 1) * count]
    return of_d[: call.cell.n_saved], of_d[call.cell.n_saved :]


def backward(call: Call, given: Cotangents, saved: Sequence[Tensor], asked: Asked) -> Gradients:
    """Compute the gradients of `forward` from what it saved; if that is nothing, run it again."""
    if saves_nothing(call):
        return _by_reference(call, given, asked)
    saved = saved or forward(call, ALL, False)[1]
    found = _backward(call, given, saved, asked)
    marks = call.flow.marks
    if marks is None or _are_finite(found):
        return found
    marks, unasked = without_unasked(marks, given, CUT)
    if not bool(unasked.any()):
        return found
    call = call._replace(flow=call.flow._replace(marks=marks))
    return _backward(call, given, saved, asked, unasked)


def _are_finite(found: Gradients) -> bool:
    """Whether gradients are numbers; all of them are if those of the weights are."""
    dx, d_state, d_fresh, d_weights = found
    tensors = d_weights or [*d_state, *d_fresh, *([] if dx is None else [dx])]
    total: Any = sum(part.sum(dtype=torch.float64) for part in tensors)
    return bool(total.isfinite())


def _backward(
    call: Call,
    given: Cotangents,
    saved: Sequence[Tensor],
    asked: Asked,
    unasked: Tensor | None = None,
) -> Gradients:
    """`backward` from what was saved, perhaps without some steps."""
    problem = _Problem(call)
    dtype, selection, directions = problem.dtype, problem.selection, call.directions
    d_state = _copies([selection.sequences(part) for part in _as(given.d_final, problem.exact)])
    # What unpacks saved tensors may bring them back in another layout.
    saved = [_first(part.contiguous(), problem.rows.total) for part in _as(saved, dtype)]
    d_rows = [
        None if part is None else selection.rows(part.flatten(0, -2)).to(dtype)
        for part in (given.dy, *given.d_traces)
    ]
    # The first direction writes all of it; where there are no steps there are no rows.
    dx = problem.x.new_empty(problem.x.shape) if asked.x else None
    d_fresh = [torch.zeros_like(part, dtype=problem.exact) for part in call.flow.fresh]
    d_weights: list[Tensor] = []
    multiply = functools.partial(problem.backend.multiply, call.cell)
    if asked.weights and not problem.rows.steps:
        groups = (asked.groups,) if asked.groups else ()
        d_weights = [part.new_zeros(*groups, *part.shape) for part in call.weights]
    for d, direction in enumerate(problem.directions if problem.rows.steps else ()):
        h = _columns(saved[0], d, directions)
        of_cell, of_states = _of_direction(call, saved, d)
        d_rh, d_apart, d_of_fresh, projected = problem.backend.backward(
            direction,
            [None if part is None else _columns(part, d, directions) for part in d_rows],
            [part[d] for part in d_state],
            h,
            of_states,
            of_cell,
        )
        for whole, part in zip(d_fresh, d_of_fresh, strict=False):
            selection.put_sequences(whole[d : d + 1], part[None])
        walk = Walk(direction, problem.x, (h, *of_states), d_rh, d_apart, projected, multiply)
        if unasked is not None:
            walk = walk.without(selection.rows(unasked[d].reshape(-1)).unsqueeze(1))
        if dx is not None:
            w_ih = direction.w.w_ih
            products.add_d_x(dx, d_rh, d_apart, w_ih, adds=d > 0, multiply=multiply)
        if asked.weights and asked.groups:
            pad = functools.partial(selection.padded, count=call.steps * call.batch)
            d_weights += walk.d_weights_by_group(pad, call.steps, asked.groups)
        elif asked.weights:
            d_weights += walk.d_weights()
    if dx is not None:
        dx = selection.padded(dx, math.prod(call.x.shape[:-1])).view(call.x.shape)
        dx = dx.to(call.x.dtype)
    if selection.order is not None:
        # The gradient of the state of a sequence without steps is that of its final state.
        of_all = [part.to(problem.exact, copy=True) for part in given.d_final]
        for whole, part in zip(of_all, d_state, strict=True):
            selection.put_sequences(whole, part)
        d_state = of_all
    return Gradients(dx, *(_as(part, call.x.dtype) for part in (d_state, d_fresh, d_weights)))


def _by_reference(call: Call, given: Cotangents, asked: Asked) -> Gradients:
    """`backward` by the reference, of every group apart."""
    if asked.groups:
        size = call.batch // asked.groups
        parts = [
            _by_reference(*_of_sequences(call, given, g * size, size), asked._replace(groups=0))
            for g in range(asked.groups)
        ]
        dxs, states, fresh, weights = zip(*parts, strict=True)
        return Gradients(
            torch.cat(dxs, 1) if asked.x else None,
            [torch.cat(same, 1) for same in zip(*states, strict=True)],
            [torch.cat(same, 1) for same in zip(*fresh, strict=True)],
            [torch.stack(same) for same in zip(*weights, strict=True)],
        )
    if call.flow.marks is not None:
        # A step that is not asked for is as good as none.
        marks, _ = without_unasked(call.flow.marks, given, HOLD)
        call = call._replace(flow=call.flow._replace(marks=marks))
    dtype, dy = machine.exact_dtype(call.x.dtype), given.dy
    dy = dy if dy is None else dy.to(dtype)
    given = Cotangents(dy, _as(given.d_final, dtype), _as(given.d_traces, dtype))
    found = gradients.first(_in(dtype, call), given)
    (dx,) = _filled([found.dx], [call.x])
    d_state = _filled(found.d_state, call.state)
    d_fresh = _filled(found.d_fresh, call.flow.fresh)
    d_weights = _filled(found.d_weights, call.weights)
    return Gradients(dx if asked.x else None, d_state, d_fresh, d_weights if asked.weights else [])


def _filled(grads: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients in the dtypes of the inputs, zeros where there are none."""
    return [
        torch.zeros_like(t) if g is None else g.to(t.dtype)
        for g, t in zip(grads, inputs, strict=True)
    ]


def _of_sequences(call: Call, given: Cotangents, first: int, count: int) -> tuple[Call, Cotangents]:
    """The call of some sequences of a padded batch."""

    def of(tensors: Sequence[Tensor], dim: int = 1) -> list[Tensor]:
        return [t.narrow(dim, first, count) if t.numel() else t for t in tensors]

    marks, fresh, noise = call.flow
    marks = marks if marks is None else marks.narrow(2, first, count)
    flow = Flow(marks, of(fresh), [*of(noise[:1]), *of(noise[1:], 2)])
    call = call._replace(x=call.x.narrow(1, first, count), state=of(call.state), flow=flow)
    dy = given.dy if given.dy is None else given.dy.narrow(1, first, count)
    return call, Cotangents(dy, of(given.d_final), of(given.d_traces))
