"""Layers on a GPU: GEMMs over all steps around the Triton kernels that walk through time.

The functions are those of ``fastrnn.cpu``, which also runs, on the GPU, packed sequences, for which
there is no kernel. Layers whose step needs more than one product are in ``gpu_staged.py``.
Directions, heads and members of an ensemble are groups (``stacked.py``), which share one launch.
GEMMs before the kernel compute the input projection; GEMMs and reductions over the gate gradients
that the backward kernel wrote compute the gradients of weights and input. Nothing here
synchronizes with the device.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import cpu, devices, gpu_staged, planner
from .call import Asked, Call, Cotangents, Gradients, Result
from .flow import CUT, FRESH, HOLD, is_given, without_unasked
from .problem import Problem
from .reference import TORCH
from .stacked import Found, Groups, Walked, input_part

if TYPE_CHECKING:
    from .kernels.configs import Config
    from .kernels.launch import Operands


def has_kernels(call: Call) -> bool:
    """Tell whether the kernels run a layer on a GPU; a compiler may call this on fake tensors."""
    return _problem(call) is not None


def _problem(call: Call) -> Problem | None:
    """Describe a call for the planner; None if there are no kernels for it."""
    if call.batch_sizes is not None:
        return None
    problem = planner.problem_of(call)
    return problem if devices.kernel_gap(problem) is None else None


def _launched(run: str, call: Call, problem: Problem, *args: Any, **options: Any) -> Any:
    """Run `launch.forward` or `launch.backward` as planned.

    If this Triton cannot compile the kernel, note that and plan again.
    """
    from .kernels import launch

    choice = devices.choose_kernels(problem, planner.forced.schedule)[run == "backward"]
    try:
        return getattr(launch, run)(call.cell, choice.config, problem.precision, *args, **options)
    except launch.UncompiledError as error:
        assert problem.gpu is not None
        devices.note_gap(str(error))
        problem = problem._replace(gpu=problem.gpu._replace(gap=str(error)))
        return _launched(run, call, problem, *args, **options)


def _configs(problem: Problem) -> list[Config]:
    """The launch configurations of the forward and the backward kernel."""
    choices = devices.choose_kernels(problem, planner.forced.schedule)
    return [choice.config for choice in choices]


def forward(call: Call, save: int, traced: bool) -> tuple[Result, list[Tensor]]:
    """Run a layer; see ``cpu.forward``.

    Unless `save` is ``cpu.NOTHING``, the states other than h of all steps are saved, in float32,
    and with ``cpu.ALL`` also the activations; for the shapes see `fake_saved`. With zoneout, the
    input part of the gates is saved in place of the activations: the states after a step then
    differ from those that the cell computed, which backward recomputes.
    """
    problem = _problem(call)
    if problem is None:
        return cpu.forward(call, save, traced)
    cpu.check_batch((*call.state, *call.flow.fresh), call.batch)
    if devices.is_staged(problem):
        (config, _), precision = _configs(problem), problem.precision
        with _products(problem):
            return gpu_staged.forward(call, config, precision, save, traced)
    groups = Groups.of(call)
    operands = _operands(call, groups, call.flow.marks)
    with _products(problem):
        wx = _input_part(call, groups)
        if operands.fresh:
            h = operands.fresh[0] if operands.drop is None else operands.fresh[0] * operands.drop
            operands = operands._replace(fresh_rh=h @ operands.r.mT)
    y, states, activations, final = _launched(
        "forward",
        call,
        problem,
        wx,
        operands,
        traced=traced or save != cpu.NOTHING,
        save=save == cpu.ALL and not operands.zones,
    )
    copy = save != cpu.NOTHING
    traces = [part.to(y.dtype, copy=copy) for part in states] if traced else []
    if operands.marks is not None:
        for rows in (y, *traces):
            _clear_held(rows, operands.marks)
    saved = [*states, *([] if activations is None else [activations])] if copy else []
    if save == cpu.ALL and operands.zones:
        saved.append(wx)
    y, *traces = map(groups.as_sequence, (y, *traces))
    return Result(y, [groups.as_state(part) for part in final], traces), saved


def _clear_held(rows: Tensor, marks: Tensor) -> None:
    """Zero the steps that a row does not have, where the kernels write the held state."""
    groups, steps, batch = marks.shape
    held = ((marks & HOLD) != 0).permute(1, 2, 0).unsqueeze(-1)
    by_group = rows.view(steps, batch, groups, rows.shape[-1] // groups)
    by_group.masked_fill_(held, 0.0)


def fake_saved(call: Call, save: int) -> list[Tensor]:
    """Make tensors of the shapes and dtypes that `forward` saves, for a compiler."""
    if save == cpu.NOTHING:
        return []
    problem = _problem(call)
    if problem is not None and devices.is_staged(problem):
        return gpu_staged.fake_saved(call, save)
    groups, cell, steps = Groups.of(call), call.cell, call.x.shape[0]
    sizes = steps, groups.batch, groups.n_groups * groups.hidden
    saved = [call.x.new_empty(sizes, dtype=torch.float32) for _ in cell.states[1:]]
    if save == cpu.ALL:
        width = cell.n_gates if any(map(is_given, call.flow.noise[1:])) else cell.n_saved
        shape = groups.n_groups, steps, groups.batch, width * groups.hidden
        saved.append(call.x.new_empty(shape))
    return saved


def backward(call: Call, given: Cotangents, saved: Sequence[Tensor], asked: Asked) -> Gradients:
    """Compute the gradients of `forward` from y and what it saved, or from nothing."""
    problem, cell = _problem(call), call.cell
    if problem is None:
        return cpu.backward(call, given, saved[1:], asked)
    if devices.is_staged(problem):
        past = saved[1:] or forward(call, cpu.ALL, False)[1]
        with _products(problem):
            config, precision = _configs(problem)[1], problem.precision
            return gpu_staged.backward(call, config, precision, given, past, asked)
    from .kernels import launch

    if not saved:
        result, rest = forward(call, cpu.ALL, False)
        saved = [result.y, *rest]
    groups, marks, left_out = Groups.of(call), call.flow.marks, None
    if marks is not None:
        marks, unasked = without_unasked(marks, given, CUT)
        left_out = groups.marks(unasked | ((marks & HOLD) != 0))
    operands = _operands(call, groups, marks)
    states = [groups.sequence(saved[0]), *saved[1 : cell.n_states]]
    walked = Walked(
        cell, groups, operands.initial, operands.fresh, operands.marks, operands.drop, states
    )
    dy, d_final, d_traces = given
    with _products(problem):
        parts: tuple[Tensor, ...] = tuple(saved[cell.n_states :])
        if operands.zones or (cell.n_saved and not parts):
            wx = parts[0] if parts else _input_part(call, groups)
            parts = wx, walked.recurrent_part(operands.r, operands.b)
        d_gates, d_state, d_fresh = _launched(
            "backward",
            call,
            problem,
            operands,
            launch.Past(states[0], states[1:], parts or (states[0].new_empty(0),)),
            (
                None if dy is None else groups.sequence(dy),
                [groups.state(part) for part in d_final],
                [groups.sequence(part) for part in d_traces],
            ),
        )
        after: Sequence[Tensor] = ()
        if asked.weights and cell.d_extra is not None:
            after = _states_made(walked, operands, parts)
        del parts
        if left_out is not None:
            d_gates.masked_fill_(left_out.unsqueeze(-1), 0.0)
        found = Found(walked, d_gates, left_out, asked.groups)
        if d_fresh:
            d_h = _d_fresh_rh(found.d_rh, operands.marks) @ operands.r
            d_fresh[0] += d_h if operands.drop is None else d_h * operands.drop
        dx = None
        if asked.x:
            dx = found.d_x(
                call.x, groups.weights([w.w_ih for w in call.by_direction()], cell.n_gates)
            )
        d_weights: list[Tensor] = []
        if asked.weights:
            has_bias = operands.b is not None
            of_kinds = found.d_weights(groups.rows(call.x), after, has_bias)
            d_weights = [part for of_one in zip(*of_kinds, strict=True) for part in of_one]
    d_state = [groups.as_state(part) for part in d_state]
    d_fresh = [groups.as_state(part.to(states[0].dtype)) for part in d_fresh]
    d_fresh = d_fresh or [torch.zeros_like(part) for part in call.flow.fresh]
    return Gradients(dx, d_state, d_fresh, d_weights)


def _states_made(walked: Walked, operands: Operands, parts: Sequence[Tensor]) -> list[Tensor]:
    """The states that the cell computed at all steps, (groups, T, b, u), before zoneout."""
    if not operands.zones:
        return [walked.groups.by_group(part) for part in walked.states]
    cell = walked.cell
    gates = [part.float().chunk(cell.n_gates, dim=-1) for part in parts]
    before = [walked.before(k) for k in range(cell.n_states)]
    assert operands.extra is not None
    extra = operands.extra[:, None, None].chunk(cell.n_extra, dim=-1)
    return list(TORCH.bind(cell.forward)(*gates, before, extra)[0])


def _d_fresh_rh(d_rh: Tensor, marks: Tensor | None) -> Tensor:
    """The gradient of the product of the fresh h, (groups, b, G * u), from those of all steps."""
    assert marks is not None
    is_fresh = ((marks & FRESH) != 0).unsqueeze(-1)
    # Not by a product with the marks, which would propagate NaN from other steps.
    return torch.where(is_fresh, d_rh, 0.0).sum(1, dtype=torch.float32).to(d_rh.dtype)


def _operands(call: Call, groups: Groups, marks: Tensor | None) -> Operands:
    """The operands of the kernels besides the input projection, without the fresh h's product."""
    from .kernels.launch import Operands

    by_direction, cell = call.by_direction(), call.cell
    biases = [w.b_hh for w in by_direction if w.b_hh is not None]
    extras = [torch.cat(w.extras, dim=-1) for w in by_direction if w.extras]
    drop, *zones = call.flow.noise or (None,)
    has_zones = any(map(is_given, zones))
    return Operands(
        groups.weight([w.w_hh for w in by_direction], cell.n_gates),
        groups.weight(biases, cell.n_gates) if biases else None,
        groups.weight(extras, cell.n_extra) if extras else None,
        [groups.state(part) for part in call.initial()],
        None if marks is None else groups.marks(marks),
        [] if marks is None else [groups.state(part) for part in call.flow.fresh],
        drop=None if drop is None or not is_given(drop) else groups.state(drop),
        zones=[_zone(groups, part) for part in zones] if has_zones else [],
        n_ahead=groups.ahead,
    )


def _zone(groups: Groups, part: Tensor) -> Tensor | None:
    """Zoneout of a state in the form that the kernels take."""
    if not is_given(part):
        return None
    return part if part.dim() == 1 else groups.mask(part).view(torch.uint8)


def _input_part(call: Call, groups: Groups) -> Tensor:
    """x @ W_ih^T + b_ih for all steps, (groups, T, b, G * u)."""
    by_direction, n_gates = call.by_direction(), call.cell.n_gates
    biases = [w.b_ih for w in by_direction if w.b_ih is not None]
    w_ih, b_ih = (
        groups.weights(parts, n_gates) for parts in ([w.w_ih for w in by_direction], biases)
    )
    return input_part(groups, call.x, w_ih, b_ih)


_switching = threading.Lock()


@contextlib.contextmanager
def _products(problem: Problem) -> Iterator[None]:
    """Give torch's float32 products the same precision as the kernels'.

    Torch's setting is process-wide, so it is changed only if necessary.
    """
    matmul = torch.backends.cuda.matmul
    wanted = {"tf32": ("tf32",)}.get(problem.precision, ("ieee", "none"))
    if problem.dtype != torch.float32 or matmul.fp32_precision in wanted:
        yield
        return
    with _switching:
        before, matmul.fp32_precision = matmul.fp32_precision, wanted[0]
        try:
            yield
        finally:
            matmul.fp32_precision = before
