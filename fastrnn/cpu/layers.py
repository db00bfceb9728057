"""Forward and backward of a layer on a CPU.

Each direction of a layer is run by the compiled kernels (``native.py``) or, where there are none,
by our loop of torch operators (``operators.py``, also on devices without their own backend); both
save the same tensors. The gradients of input and weights are products over all rows afterwards.

Half-precision formats that the kernels cannot multiply are computed in float32, and only the
results are rounded; in those that they can, the states of a step are float32. A batch with missing
rows is packed for the walk through time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import gradients, groups, products, reference
from ..call import Asked, Call, Cotangents, Gradients, Result, split
from ..flow import CUT, HOLD, Flow, is_given, without_unasked
from . import machine, operators
from .direction import Ahead, Back, Breaks, Direction, Found, Kept, Noise, breaks
from .rows import Rows, select
from .walk import Split, Walk

# What forward saves for backward: nothing, the states of every step, or the activations too. This
# backend treats STATES like NOTHING: backward starts with another forward.
NOTHING, STATES, ALL = range(3)


def compute_dtype(call: Call) -> torch.dtype:
    """Name the dtype in which a layer is computed and its activations are saved."""
    x, is_paired = call.x, call.hidden_size // call.num_heads % 2 == 0
    # Half precision is multiplied in pairs, and in heads gate by gate: units must be even.
    is_simple = call.cell.is_pointwise and (call.num_heads == 1 or is_paired)
    if x.is_cpu and is_simple and machine.multiplies(x.dtype) and _has_kernels(x):
        return x.dtype
    return machine.exact_dtype(x.dtype)


def _has_kernels(x: Tensor) -> bool:
    return x.is_cpu and machine.kernel_gap(x.dtype) is None


def saves_nothing(call: Call) -> bool:
    """Tell whether a layer is run by the reference, whose backward starts with another forward.

    This is so where there are no kernels and ``operators.py`` does not support the layer, and for
    marks on other devices, whose values cannot be read without a sync.
    """
    flow = call.flow
    if not call.x.is_cpu and flow.marks is not None:
        return True
    if _has_kernels(call.x):
        return False
    return not call.cell.is_pointwise or len(flow.noise) > 0 or call.num_heads > 1


def check_batch(state: Sequence[Tensor], batch: int) -> None:
    """Raise unless states (D, B, H) have `batch` rows, which compiled code checks at run time."""
    for part in state:
        if part.shape[1] != batch:
            raise RuntimeError(f"Expected hidden states of {batch} rows, got {part.shape[1]}")


def _raw(call: Call) -> list[bool]:
    """Which states are saved as they were before zoneout, for each direction of a layer.

    Those to which zoneout applies and that backward reads; it reads h only if no values are saved.
    """
    cell, zones = call.cell, call.flow.noise[1:]
    return [is_given(zone) and (k > 0 or not cell.n_saved) for k, zone in enumerate(zones)]


def fake_saved(call: Call, save: int) -> list[Tensor]:
    """Make uninitialized tensors of the shapes and dtypes that `forward` saves.

    The list is empty unless `save` is `ALL`. Its elements are h (N, D * P), a copy of y, which the
    caller may overwrite, and for each direction the parts of a ``Kept``. With marks, only existing
    rows are stored, and as many rows at the end as are missing are unused. In an ensemble they are
    (M, N, ·), member by member.
    """
    if save != ALL or saves_nothing(call):
        return []
    # Separate tensors, because blocks of 32 MiB and more are returned to the system at once, and
    # new pages cost an LSTM of (T, B, H) = (1024, 16, 128) a sixth of its training time on 2
    # threads.
    widths = [width for part in _widths(call) for width in part]
    widths = [call.directions * call.size_h, *widths * call.directions]
    count, dtype = math.prod(call.x.shape[:-1]), compute_dtype(call)
    lead = (call.members, count // call.members) if call.members else (count,)
    return [call.x.new_empty(*lead, width, dtype=dtype) for width in widths]


def _widths(call: Call) -> list[list[int]]:
    """The widths of the parts of ``Kept`` for a direction: saved, traces, raw, normal."""
    cell, hidden, heads = call.cell, call.hidden_size, call.num_heads
    of_gates = cell.n_gates * hidden
    return [
        [hidden] * cell.n_saved,
        [hidden] * (cell.n_states - 1 + call.is_projected),
        [hidden] * sum(_raw(call)),
        [of_gates, 2 * heads, of_gates, cell.n_moments * heads] if cell.is_normalized else [],
    ]


def _kept(call: Call, saved: Sequence[Tensor], d: int, count: int) -> Kept:
    """What was saved for the rows of a direction, besides h."""
    if not saved:
        return Kept()
    counts = [len(part) for part in _widths(call)]
    if len(saved) != 1 + sum(counts) * call.directions:
        raise RuntimeError(f"backward needs other than the {len(saved)} tensors that were saved")
    of_d = saved[1 + d * sum(counts) : 1 + (d + 1) * sum(counts)]
    of_cell, traces, raw, normal = split([_first(part, count) for part in of_d], counts)
    rest = iter(raw)
    return Kept(of_cell, traces, [next(rest) if is_raw else None for is_raw in _raw(call)], normal)


def _as(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Convert tensors to a dtype, except masks."""
    return [t if t.dtype in (dtype, torch.bool) else t.to(dtype) for t in tensors]


def _in(dtype: torch.dtype, call: Call) -> Call:
    """Convert a call to a dtype."""
    if {part.dtype for part in (*call.tensors, *call.flow.noise)} == {dtype}:
        return call
    marks, *others = call.flow
    flow = Flow(marks, *(_as(part, dtype) for part in others))
    state, weights = _as(call.state, dtype), _as(call.weights, dtype)
    return call._replace(x=call.x.to(dtype), state=state, weights=weights, flow=flow)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Make copies that kernels may write to."""
    return [part.clone(memory_format=torch.contiguous_format) for part in tensors]


def _columns(rows: Tensor, d: int, directions: int) -> Tensor:
    """The columns of a direction."""
    if directions == 1:
        return rows
    width = rows.shape[-1] // directions
    return rows[..., d * width : (d + 1) * width]


def _first(rows: Tensor, count: int) -> Tensor:
    return rows if rows.shape[-2] == count else rows[..., :count, :]


def _runs_together(call: Call) -> bool:
    """Whether the members of an ensemble run as one problem, differing only in values.

    They do not with marks, because the rows of each member are packed differently, nor with
    normalized products, which are computed one member at a time.
    """
    return call.flow.marks is None and not call.cell.is_normalized and _has_kernels(call.x)


class _Problem:
    """A layer in the compute dtype, packed if rows are missing.

    In an ensemble, all rows and the states of a direction have a leading dimension of members,
    which in the tensors of the call are parts of the batch.
    """

    def __init__(self, call: Call) -> None:
        check_batch((*call.state, *call.flow.fresh), call.batch)
        self.call = call
        self.lead = (call.members,) if call.members else ()
        self.rows, self.selection = select(call.flow.marks, Rows.of(call))
        self.dtype = compute_dtype(call)
        self.exact = machine.exact_dtype(self.dtype)
        computed = _in(self.dtype, call)
        self.x = self.of_rows(computed.x)
        self.initial = [self.selection.sequences(part) for part in computed.state]
        self.shapes = call.shapes
        self.directions = [
            Direction(
                call.cell,
                w,
                self.rows,
                d == 1,
                self.of_direction(self.initial, d),
                self._breaks(computed.flow, d),
                self._noise(computed.flow, d),
            )
            for d, w in enumerate(computed.by_direction())
        ]

    def of_rows(self, padded: Tensor) -> Tensor:
        """Select the existing rows of (T, B, ·) or (N, ·)."""
        if not self.lead:
            return self.selection.rows(padded.flatten(0, -2))
        by_member = padded.unflatten(1, (*self.lead, self.rows.batch)).transpose(0, 1)
        return by_member.flatten(1, 2)

    def put_rows(self, padded: Tensor, rows: Tensor) -> None:
        """Copy rows back to their places in (T, B, ·) or (N, ·)."""
        if not self.lead:
            self.selection.put_rows(padded.view(-1, padded.shape[-1]), rows)
            return
        by_member = padded.unflatten(1, (*self.lead, self.rows.batch)).transpose(0, 1)
        by_member.copy_(rows.unflatten(1, self.rows[:2]))

    def of_direction(self, states: Sequence[Tensor], d: int) -> list[Tensor]:
        """Views of the states of a direction."""
        own = [part[d] for part in states]
        if not self.lead:
            return own
        return [part.unflatten(0, (*self.lead, self.rows.batch)) for part in own]

    def _breaks(self, flow: Flow, d: int) -> Breaks | None:
        if flow.marks is None:
            return None
        fresh = [self.selection.sequences(part) for part in flow.fresh]
        fresh = fresh or self._zeros(self.dtype)
        marks = self.selection.rows(flow.marks[d].reshape(-1)).contiguous()
        return breaks(marks, [part[d] for part in fresh], self.rows)

    def _noise(self, flow: Flow, d: int) -> Noise | None:
        if not flow.noise:
            return None
        drop, *zones = flow.noise
        dropped = None
        if is_given(drop):
            (dropped,) = self.of_direction([self.selection.sequences(drop)], d)
        return Noise(dropped, [z if z.dim() == 1 else self.of_rows(z[d]) for z in zones])

    def first_states(self) -> list[Tensor]:
        """Copy the states before the first step, to be overwritten."""
        return _copies(_as(self.initial, self.exact)) or self._zeros(self.exact)

    def _zeros(self, dtype: torch.dtype) -> list[Tensor]:
        batch = math.prod(self.lead) * self.rows.batch
        sizes = [(count, batch, width) for count, _, width in self.shapes()]
        return [self.x.new_zeros(size, dtype=dtype) for size in sizes]


def _backend(x: Tensor) -> ModuleType:
    if not _has_kernels(x):
        return operators
    from . import native

    return native


class _Ahead(_Problem):
    """A layer prepared for its forward walks."""

    def __init__(self, call: Call, saved: Sequence[Tensor], traced: bool) -> None:
        super().__init__(call)
        dtype, count, directions = call.x.dtype, self.rows.total, call.directions
        self.final, shape = self.first_states(), call.x.shape[:-1]
        self.y = call.x.new_empty(*shape, directions * call.size_h)
        others = call.cell.states[1:] if traced else ()
        self.traces = [call.x.new_zeros(*shape, directions * call.hidden_size) for _ in others]
        self.is_y = False  # whether h is written directly to y
        if saved:
            self.h_rows = saved[0]
        elif self.lead or self.selection.chosen is not None or self.dtype != dtype:
            rows = self.rows.total if self.lead else math.prod(shape)
            self.h_rows = self.y.new_empty(*self.lead, rows, self.y.shape[-1], dtype=self.dtype)
        else:
            self.h_rows, self.is_y = self.y.view(-1, self.y.shape[-1]), True
        self.jobs = []
        for d, direction in enumerate(self.directions if self.rows.steps else ()):
            kept = _kept(call, saved, d, count)
            if not kept.traces:
                sizes = (*self.lead, count, call.hidden_size)
                traces = [self.h_rows.new_empty(sizes) for _ in others]
                kept = kept._replace(traces=traces)
            h = _columns(_first(self.h_rows, count), d, directions)
            state = self.of_direction(self.final, d)
            self.jobs.append(Ahead(direction, self.x, state, h, kept))

    def result(self) -> Result:
        """The results of the layer, once its jobs are done."""
        call, selection, count = self.call, self.selection, self.rows.total
        dtype, is_packed = call.x.dtype, selection.chosen is not None
        for d, job in enumerate(self.jobs):
            for trace, part in zip(self.traces, job.kept.traces, strict=False):
                self.put_rows(_columns(trace, d, call.directions), part.to(dtype))
        if not self.is_y:
            if is_packed:
                self.y.zero_()
            self.put_rows(self.y, _first(self.h_rows, count).to(dtype))
        final = _as(self.final, dtype)
        if is_packed:
            selected, final = final, _copies(call.initial())
            for whole, part in zip(final, selected, strict=True):
                selection.put_sequences(whole, part)
        return Result(self.y, final, self.traces)


def forward(call: Call, save: int, traced: bool) -> tuple[Result, list[Tensor]]:
    """Run a layer; `save` says what to save for backward, in the form that `fake_saved` describes.

    The result has traces only if `traced`.
    """
    if saves_nothing(call):
        dtype = call.x.dtype
        with torch.no_grad():
            y, final, traces = reference.layer(_in(machine.exact_dtype(dtype), call))
        return Result(y.to(dtype), _as(final, dtype), _as(traces if traced else [], dtype)), []
    saved = fake_saved(call, save)
    is_one = not call.members or _runs_together(call)
    layers = [
        _Ahead(call if is_one else groups.of_member(call, m), of_one, traced)
        for m, of_one in enumerate([saved] if is_one else _by_member(saved, call.members))
    ]
    if jobs := [job for layer in layers for job in layer.jobs]:
        _backend(call.x).forward(jobs)
    results = [layer.result() for layer in layers]
    return results[0] if is_one else groups.joined(results), saved


def _by_member(tensors: Sequence[Tensor], members: int) -> list[list[Tensor]]:
    """Split tensors (M, ·) into a list for each member."""
    return [[part[m] for part in tensors] for m in range(members)]


def prepared(call: Call, *, is_step: bool = False) -> Any:
    """Make a function that runs all layers of a call, or a step, in inference without a record.

    It takes input, states and weights like those of the call, and returns output and final states.
    Returns None if the kernels cannot use these tensors directly.
    """
    options = call.options
    if (options.training and options.dropout and call.num_layers > 1) or not _is_simple(call):
        return None
    from . import inference

    stack = inference.Stack(call, is_step=is_step)
    return stack.step if is_step else stack.run


def _is_simple(call: Call) -> bool:
    """Whether the kernels can use the tensors of a call directly, each by one address."""
    x = call.x
    if not x.numel() or not _has_kernels(x) or compute_dtype(call) != x.dtype:
        return False
    # Noise may be constant, but not drawn.
    if call.flow.marks is not None or any(part.numel() > 1 for part in call.flow.noise):
        return False
    return all(part.layout == torch.strided for part in call.tensors) and all(
        weight.is_contiguous() for weight in call.weights
    )


def trains_steps(dtype: torch.dtype) -> bool:
    """Whether `prepared_step` supports a dtype: those in which sums are computed as well."""
    return machine.exact_dtype(dtype) == dtype


def prepared_step(call: Call) -> Any:
    """`prepared` for a step with gradients, a ``stepping.Stepping``."""
    if not trains_steps(call.x.dtype) or not _is_simple(call):
        return None
    from .stepping import Stepping

    return Stepping(call)


def backward(call: Call, given: Cotangents, saved: Sequence[Tensor], asked: Asked) -> Gradients:
    """Compute the gradients of `forward` from what it saved, or rerun it if it saved nothing."""
    if saves_nothing(call):
        return _by_reference(call, given, asked)
    saved = saved or forward(call, ALL, False)[1]
    count = call.members
    if not count or _runs_together(call):
        return _of_layers([call], [given], [saved], asked)[0]
    asked_of_one = asked._replace(groups=asked.groups // count)
    if asked_of_one.groups == 1:
        asked_of_one = asked_of_one._replace(groups=0)
    found = _of_layers(
        [groups.of_member(call, m) for m in range(count)],
        [_part_of(given, m, count) for m in range(count)],
        _by_member(saved, count),
        asked_of_one,
    )
    return _joined(found, torch.cat if asked_of_one.groups else torch.stack)


def _of_layers(
    calls: Sequence[Call],
    given: Sequence[Cotangents],
    saved: Sequence[Sequence[Tensor]],
    asked: Asked,
) -> list[Gradients]:
    """Compute the gradients of layers of the same sizes."""
    every = list(zip(calls, given, saved, strict=True))
    found = _backward([(*each, None) for each in every], asked)
    if calls[0].flow.marks is None or all(map(_are_finite, found)):
        return found
    again = []
    for call, of_call, kept in every:
        marks, unasked = without_unasked(call.flow.marks, of_call, CUT)  # type: ignore[arg-type]
        call = call._replace(flow=call.flow._replace(marks=marks))
        again.append((call, of_call, kept, unasked))
    if not any(bool(unasked.any()) for *_, unasked in again):
        return found
    return _backward(again, asked)


def _are_finite(found: Gradients) -> bool:
    """Whether all gradients are finite, which they are if those of the weights are."""
    dx, d_state, d_fresh, d_weights = found
    tensors = d_weights or [*d_state, *d_fresh, *([] if dx is None else [dx])]
    total: Any = sum(part.sum(dtype=torch.float64) for part in tensors)
    return bool(total.isfinite())


_Past = tuple[Call, Cotangents, Sequence[Tensor], Tensor | None]


def _backward(layers: Sequence[_Past], asked: Asked) -> list[Gradients]:
    """Compute `backward` of layers from what was saved, without the steps that are unasked."""
    problems = [_Back(call, given, saved) for call, given, saved, _ in layers]
    jobs = [job for problem in problems for job in problem.jobs]
    found = iter(_backend(layers[0][0].x).backward(jobs) if jobs else ())
    return [
        problem.gradients([next(found) for _ in problem.jobs], asked, unasked)
        for problem, (*_, unasked) in zip(problems, layers, strict=True)
    ]


class _Back(_Problem):
    """A layer prepared for its backward walks."""

    def __init__(self, call: Call, given: Cotangents, saved: Sequence[Tensor]) -> None:
        super().__init__(call)
        self.given, count, directions = given, self.rows.total, call.directions
        selection, dtype = self.selection, self.dtype
        of_final = _as(given.d_final, self.exact)
        self.d_state = _copies([selection.sequences(part) for part in of_final])
        # Hooks on saved tensors may return them in another layout.
        saved = [part.contiguous() for part in _as(saved, dtype)]
        d_rows = [
            None if part is None else self.of_rows(part).to(dtype)
            for part in (given.dy, *given.d_traces)
        ]
        h_rows = _first(saved[0], count)
        self.jobs = [
            Back(
                direction,
                [None if part is None else _columns(part, d, directions) for part in d_rows],
                self.of_direction(self.d_state, d),
                _columns(h_rows, d, directions),
                _kept(call, saved, d, count),
            )
            for d, direction in enumerate(self.directions if self.rows.steps else ())
        ]

    def gradients(self, found: Sequence[Found], asked: Asked, unasked: Tensor | None) -> Gradients:
        """The gradients of the layer, from the results of its jobs."""
        call, selection, given = self.call, self.selection, self.given
        # The first direction overwrites all of it; without steps there are no rows.
        dx = self.x.new_empty(self.x.shape) if asked.x else None
        d_fresh = [torch.zeros_like(part, dtype=self.exact) for part in call.flow.fresh]
        d_weights: list[Tensor] = []
        multiply = functools.partial(_backend(call.x).multiply, call.cell)
        if asked.weights and not self.jobs:
            shapes = [part.shape[len(self.lead) :] for part in call.weights]
            lead = (asked.groups,) if asked.groups else self.lead
            d_weights = [self.x.new_zeros(*lead, *shape) for shape in shapes]
        for d, (job, of_job) in enumerate(zip(self.jobs, found, strict=True)):
            for whole, part in zip(d_fresh, of_job.d_fresh, strict=False):
                selection.put_sequences(whole[d : d + 1], part[None])
            states = (job.h_rows, *job.kept.traces)
            walk = Walk(job.direction, self.x, states, job.kept, of_job, multiply)
            if unasked is not None:
                walk = walk.without(selection.rows(unasked[d].reshape(-1)).unsqueeze(1))
            of_input = walk.of_input()
            if dx is not None:
                w_ih = job.direction.w.w_ih
                products.add_d_x(dx, *of_input[:2], w_ih, adds=d > 0, multiply=multiply)
            if asked.weights:
                d_weights += walk.d_weights(of_input, self._split(asked.groups))
        if dx is not None:
            dx = self._padded(dx).to(call.x.dtype)
        d_state = self.d_state
        if selection.order is not None:
            # The gradient of the state of a sequence without steps is that of its final state.
            of_all = [part.to(self.exact, copy=True) for part in given.d_final]
            for whole, part in zip(of_all, d_state, strict=True):
                selection.put_sequences(whole, part)
            d_state = of_all
        return Gradients(dx, *(_as(part, call.x.dtype) for part in (d_state, d_fresh, d_weights)))

    def _padded(self, rows: Tensor) -> Tensor:
        """The inverse of `of_rows`, zeros where there are no rows."""
        x = self.call.x
        if not self.lead:
            return self.selection.padded(rows, math.prod(x.shape[:-1])).view(x.shape)
        return rows.unflatten(1, self.rows[:2]).transpose(0, 1).reshape(x.shape)

    def _split(self, count: int) -> Split | None:
        """Make a function that splits rows into those of `count` groups of sequences."""
        if not count or self.lead == (count,):
            return None
        members, steps = max(1, self.call.members), self.call.steps
        count, batch = count // members, self.call.batch // count

        def split(rows: Tensor) -> Tensor:
            if not self.lead:
                rows = self.selection.padded(rows, steps * count * batch)
            apart = rows.view(members, steps, count, batch, rows.shape[-1])
            return apart.transpose(1, 2).reshape(members * count, steps * batch, rows.shape[-1])

        return split


def _part_of(given: Cotangents, part: int, parts: int) -> Cotangents:
    """The cotangents of one of several equal parts of a padded batch."""

    def of(tensors: Sequence[Tensor]) -> list[Any]:
        return [groups.piece(tensor, part, parts) for tensor in tensors]

    return Cotangents(groups.piece(given.dy, part, parts), of(given.d_final), of(given.d_traces))


def _joined(parts: Sequence[Gradients], join: Callable[..., Tensor]) -> Gradients:
    """Join the gradients of equal parts of a batch, those of the weights by `join`."""
    dx, d_state, d_fresh, d_weights = zip(*parts, strict=True)
    return Gradients(
        None if dx[0] is None else torch.cat(dx, 1),
        [torch.cat(same, 1) for same in zip(*d_state, strict=True)],
        [torch.cat(same, 1) for same in zip(*d_fresh, strict=True)],
        [join(same) for same in zip(*d_weights, strict=True)],
    )


def _by_reference(call: Call, given: Cotangents, asked: Asked) -> Gradients:
    """Compute `backward` by the reference, separately for every group."""
    if asked.groups:
        count, of_all = asked.groups, asked._replace(groups=0)
        parts = []
        for g in range(count):
            part = groups.part_of_batch(call, g, count)
            if call.members:  # each member has one or several of the groups
                own = g * call.members // count
                part = part._replace(weights=[weight[own] for weight in call.weights])
            parts.append(_by_reference(part, _part_of(given, g, count), of_all))
        return _joined(parts, torch.stack)
    if call.flow.marks is not None:
        # A step that no gradient reaches counts as missing.
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
    """Convert gradients to the dtypes of the inputs, with zeros for None."""
    return [
        torch.zeros_like(t) if g is None else g.to(t.dtype)
        for g, t in zip(grads, inputs, strict=True)
    ]
