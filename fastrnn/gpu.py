"""Layers on a GPU: GEMMs over all steps around the Triton kernels that walk through time.

The same functions as in ``fastrnn.cpu``, which also runs here what has no kernel: float64, packed
sequences, projections, noise, cells that are not pointwise. The input projection is one GEMM per
direction before the kernel; the gradients of weights and input are GEMMs and reductions over the
gate gradients that the backward kernel wrote. Nothing here waits for the device.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import cpu, devices, planner, products
from .call import Asked, Call, Cotangents, Gradients, Result
from .cpu.direction import Direction
from .cpu.rows import Rows
from .cpu.walk import Walk
from .flow import CUT, FRESH, HOLD, START, without_unasked
from .problem import Problem

if TYPE_CHECKING:
    from .kernels.launch import Operands


def has_kernels(call: Call) -> bool:
    """Tell whether the kernels run a layer on a GPU, from what a compiler knows of it too."""
    return _problem(call) is not None


def _problem(call: Call) -> Problem | None:
    """What the planner must know of a call; None if there are no kernels for it."""
    if call.batch_sizes is not None:
        return None
    problem = planner.problem_of(call)
    return problem if devices.kernel_gap(problem) is None else None


def _launched(run: str, call: Call, problem: Problem, *args: Any, **options: Any) -> Any:
    """Run `launch.forward` or `launch.backward` as is planned, and if this Triton does not compile
    that, as is planned then.
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


def forward(call: Call, save: int, traced: bool) -> tuple[Result, list[Tensor]]:
    """Run a layer; see ``cpu.forward``.

    What is saved, unless `save` is ``cpu.NOTHING``, are the states other than h of all steps,
    (T, B, D * H) in float32, and if it is ``cpu.ALL`` the activations, (D, T, B, S * H).
    """
    problem = _problem(call)
    if problem is None:
        return cpu.forward(call, save, traced)
    cpu.check_batch((*call.state, *call.flow.fresh), call.batch)
    operands = _operands(call)
    with _products(problem):
        wx = _input_projection(call)
        if operands.fresh:
            fresh_rh = operands.fresh[0] @ operands.r.transpose(1, 2)
            operands = operands._replace(fresh_rh=fresh_rh)
    y, states, activations, final = _launched(
        "forward",
        call,
        problem,
        wx,
        operands,
        traced=traced or save != cpu.NOTHING,
        save=save == cpu.ALL,
    )
    copy = save != cpu.NOTHING
    traces = [part.to(y.dtype, copy=copy) for part in states] if traced else []
    if call.flow.marks is not None:
        for rows in (y, *traces):
            _clear_held(rows, call.flow.marks)
    saved = [*states, *([] if activations is None else [activations])] if copy else []
    return Result(y, final, traces), saved


def _clear_held(rows: Tensor, marks: Tensor) -> None:
    """Put zeros at the steps that a row does not have: the kernels hold the state there."""
    directions, steps, batch = marks.shape
    held = ((marks & HOLD) != 0).permute(1, 2, 0).unsqueeze(-1)
    by_direction = rows.view(steps, batch, directions, rows.shape[-1] // directions)
    by_direction.masked_fill_(held, 0.0)


def fake_saved(call: Call, save: int) -> list[Tensor]:
    """Make tensors of the shapes and dtypes that `forward` saves, for a compiler."""
    if save == cpu.NOTHING:
        return []
    (steps, batch, _), hidden, cell = call.x.shape, call.hidden_size, call.cell
    columns = call.directions * hidden
    saved = [call.x.new_empty(steps, batch, columns, dtype=torch.float32) for _ in cell.states[1:]]
    if save == cpu.ALL:
        saved.append(call.x.new_empty(call.directions, steps, batch, cell.n_saved * hidden))
    return saved


def backward(call: Call, given: Cotangents, saved: Sequence[Tensor], asked: Asked) -> Gradients:
    """Compute the gradients of `forward` from y and what it saved, or from nothing."""
    problem, cell = _problem(call), call.cell
    if problem is None:
        return cpu.backward(call, given, saved[1:], asked)
    from .kernels import launch

    if not saved:
        result, rest = forward(call, cpu.ALL, False)
        saved = [result.y, *rest]
    states, activations = saved[: cell.n_states], saved[cell.n_states :]
    y = states[0]
    call, dead = call._replace(x=call.x.contiguous(), state=call.initial()), None
    if call.flow.marks is not None:
        marks, unasked = without_unasked(call.flow.marks, given, CUT)
        dead = unasked | ((marks & HOLD) != 0)
        call = call._replace(flow=call.flow._replace(marks=marks))
    parts: tuple[Tensor, ...]
    directions = _directions(call)
    with _products(problem):
        if activations or not cell.n_saved:
            parts = (activations[0] if activations else y.new_empty(0),)
        else:
            parts = _input_projection(call), _recurrent_parts(call, directions, y)
        d_gates, d_state, d_fresh = _launched(
            "backward",
            call,
            problem,
            _operands(call),
            launch.Past(y, states[1:], parts),
            (
                None if given.dy is None else given.dy.contiguous(),
                [part.contiguous() for part in given.d_final],
                [part.contiguous() for part in given.d_traces],
            ),
        )
        del parts
        dx = call.x.new_zeros(call.x.shape) if asked.x else None
        d_weights: list[Tensor] = []
        for d, direction in enumerate(directions):
            w = direction.w
            d_rh, d_apart = d_gates[d].flatten(0, 1).tensor_split([len(w.w_hh)], dim=1)
            own = [_of_direction(call, part, d) for part in states]
            walk = Walk(direction, call.x.flatten(0, 1), own, d_rh, d_apart, ())
            if dead is not None:
                walk = walk.without(dead[d].view(-1, 1))
            if d_fresh:
                d_fresh[0][d] += _d_fresh_rh(call, d_rh, d) @ w.w_hh
            if dx is not None:
                products.add_d_x(dx.view(-1, dx.shape[-1]), d_rh, d_apart, w.w_ih)
            if asked.weights and asked.groups:
                d_weights += walk.d_weights_by_group(lambda rows: rows, call.steps, asked.groups)
            elif asked.weights:
                d_weights += walk.d_weights()
    fresh = call.flow.fresh
    d_fresh = [part.to(y.dtype) for part in d_fresh] or [torch.zeros_like(part) for part in fresh]
    return Gradients(dx, d_state, d_fresh, d_weights)


def _d_fresh_rh(call: Call, d_rh: Tensor, d: int) -> Tensor:
    """The gradient of the fresh h's product in one direction, (B, G * H), from (T * B, G * H)."""
    assert call.flow.marks is not None
    is_fresh = ((call.flow.marks[d] & FRESH) != 0).unsqueeze(-1)
    # Not a product with the marks, which a NaN of another step would pass.
    found = torch.where(is_fresh, d_rh.view(*is_fresh.shape[:2], d_rh.shape[1]), 0.0)
    return found.sum(0, dtype=torch.float32).to(d_rh.dtype)


class _Marked(NamedTuple):
    """``Breaks`` by the marks themselves, (T, B, 1), for whose values nobody has to wait."""

    marks: Tensor
    first: Sequence[Tensor]
    fresh: Sequence[Tensor]

    def replace(self, before: Tensor, k: int) -> Tensor:
        """Put the fresh and the first states in their places; anything where one is held."""
        is_start, is_fresh = ((self.marks & bit) != 0 for bit in (START, FRESH))
        found = before.view(*self.marks.shape[:2], before.shape[1])
        found = torch.where(is_start, self.first[k], found)
        found = torch.where(is_fresh, self.fresh[k] if self.fresh else 0.0, found)
        return found.flatten(0, 1)


def _directions(call: Call) -> list[Direction]:
    """The directions of a layer whose initial state is given."""
    rows, marks, found = Rows(call.steps, call.batch, None), call.flow.marks, []
    for d, w in enumerate(call.by_direction()):
        first, fresh = ([part[d] for part in parts] for parts in (call.state, call.flow.fresh))
        breaks: Any = None if marks is None else _Marked(marks[d].unsqueeze(-1), first, fresh)
        found.append(Direction(call.cell, w, rows, d == 1, first, breaks))
    return found


def _operands(call: Call) -> Operands:
    """What the kernels need beside the input projection, but for the product of the fresh h."""
    from .kernels.launch import Operands

    by_direction, marks = call.by_direction(), call.flow.marks
    biases = [w.b_hh for w in by_direction if w.b_hh is not None]
    extras = [torch.cat(w.extras) for w in by_direction if w.extras]
    return Operands(
        _stacked([w.w_hh for w in by_direction]),
        _stacked(biases) if biases else None,
        _stacked(extras) if extras else None,
        [part.contiguous() for part in call.initial()],
        marks,
        [] if marks is None else [part.contiguous() for part in call.flow.fresh],
    )


def _stacked(tensors: list[Tensor]) -> Tensor:
    """One tensor with a dimension of directions in front; no copy for one direction."""
    return tensors[0].contiguous()[None] if len(tensors) == 1 else torch.stack(tensors)


_switching = threading.Lock()


@contextlib.contextmanager
def _products(problem: Problem) -> Iterator[None]:
    """Let torch's own products of float32 be as exact as the kernels'.

    torch has one switch for the whole process, so it is turned only where it must be.
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


def _input_projection(call: Call) -> Tensor:
    """x @ W_ih^T + b_ih for all steps and directions, (D, T, B, G * H)."""
    x, by_direction = call.x, call.by_direction()
    flat, width = x.reshape(-1, x.shape[-1]), by_direction[0].w_ih.shape[0]
    wx = x.new_empty(len(by_direction), flat.shape[0], width)
    for out, w in zip(wx, by_direction, strict=True):
        if w.b_ih is None:
            torch.mm(flat, w.w_ih.t(), out=out)
        else:
            torch.addmm(w.b_ih, flat, w.w_ih.t(), out=out)
    return wx.view(len(by_direction), *x.shape[:2], width)


def _recurrent_parts(call: Call, directions: Sequence[Direction], h: Tensor) -> Tensor:
    """h_{t-1} @ W_hh^T + b_hh for all steps and directions, (D, T, B, G * H)."""
    parts = []
    for d, direction in enumerate(directions):
        (before,) = direction.before([_of_direction(call, h, d)])
        parts.append(torch.nn.functional.linear(before, direction.w.w_hh, direction.w.b_hh))
    return torch.stack(parts).unflatten(1, h.shape[:2])


def _of_direction(call: Call, sequence: Tensor, d: int) -> Tensor:
    """The part of states after every step, (T * B, H), that belongs to a direction."""
    return sequence.flatten(0, 1).chunk(call.directions, dim=-1)[d]
