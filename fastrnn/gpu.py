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
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import cpu, devices, planner, products
from .call import Asked, Call, Cotangents, Gradients, Result
from .flow import CUT, FRESH, HOLD, START, without_unasked
from .kernels.configs import Choice
from .problem import Problem
from .reference import TORCH

if TYPE_CHECKING:
    from .kernels.launch import Operands


def has_kernels(call: Call) -> bool:
    """Tell whether the kernels run a layer, from what a compiler knows of it too.

    Parameters
    ----------
    call : Call
        Of one layer, on a GPU.

    Returns
    -------
    bool
    """
    return _problem(call) is not None


def _problem(call: Call) -> Problem | None:
    """What the planner must know of a call; None if there are no kernels for it."""
    if call.batch_sizes is not None:
        return None
    problem = planner.problem_of(call)
    return problem if devices.kernel_gap(problem) is None else None


def _choices(problem: Problem) -> tuple[Choice, Choice]:
    return devices.choose_kernels(problem, planner.forced_schedule())


def forward(call: Call, save: int, traced: bool) -> tuple[Result, list[Tensor]]:
    """Run a layer; see ``cpu.forward``.

    Parameters
    ----------
    call : Call
        Of one layer.
    save : int
        One of ``cpu.NOTHING``, ``cpu.STATES`` and ``cpu.ALL``.
    traced : bool

    Returns
    -------
    Result
        Without traces unless `traced`.
    saved : list of Tensor
        Empty if `save` is ``cpu.NOTHING``. The states other than h of all steps, (T, B, D * H) in
        float32; unless `save` is ``cpu.STATES``, also the activations (D, T, B, S * H). Backward
        wants y before these.
    """
    problem = _problem(call)
    if problem is None:
        return cpu.forward(call, save, traced)
    from .kernels import launch

    cpu.check_batch((*call.state, *call.flow.fresh), call.batch)
    operands = _operands(call)
    with _products(problem):
        wx = _input_projection(call)
        if operands.fresh:
            fresh_rh = operands.fresh[0] @ operands.r.transpose(1, 2)
            operands = operands._replace(fresh_rh=fresh_rh)
    y, states, activations, final = launch.forward(
        call.cell,
        _choices(problem)[0].config,
        problem.precision,
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
    """Make tensors of the shapes and dtypes that `forward` saves, for a compiler.

    Parameters
    ----------
    call : Call
    save : int

    Returns
    -------
    list of Tensor
    """
    if save == cpu.NOTHING:
        return []
    (steps, batch, _), hidden, cell = call.x.shape, call.hidden_size, call.cell
    columns = call.directions * hidden
    saved = [call.x.new_empty(steps, batch, columns, dtype=torch.float32) for _ in cell.states[1:]]
    if save == cpu.ALL:
        saved.append(call.x.new_empty(call.directions, steps, batch, cell.n_saved * hidden))
    return saved


def backward(call: Call, given: Cotangents, saved: Sequence[Tensor], asked: Asked) -> Gradients:
    """Compute the gradients of `forward`; see ``cpu.backward``.

    Parameters
    ----------
    call : Call
    given : Cotangents
    saved : sequence of Tensor
        y, or the h of a cell, then what `forward` saved; or nothing.
    asked : Asked

    Returns
    -------
    Gradients
    """
    problem, cell = _problem(call), call.cell
    if problem is None:
        return cpu.backward(call, given, saved[1:], asked)
    from .kernels import launch

    if not saved:
        result, rest = forward(call, cpu.ALL, False)
        saved = [result.y, *rest]
    y = saved[0][None] if saved[0].dim() == 2 else saved[0]
    states, activations = [y, *saved[1 : cell.n_states]], saved[cell.n_states :]
    call, dead = call._replace(x=call.x.contiguous(), state=call.initial()), None
    if call.flow.marks is not None:
        marks, unasked = without_unasked(call.flow.marks, given, CUT)
        dead = unasked | ((marks & HOLD) != 0)
        call = call._replace(flow=call.flow._replace(marks=marks))
    parts: tuple[Tensor, ...]
    with _products(problem):
        if activations or not cell.n_saved:
            parts = (activations[0] if activations else y.new_empty(0),)
        else:
            parts = _input_projection(call), _recurrent_parts(call, states)
        d_gates, d_state, d_fresh = launch.backward(
            cell,
            _choices(problem)[1].config,
            problem.precision,
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
        for d, w in enumerate(call.by_direction()):
            gates, columns = d_gates[d].flatten(0, 1), len(w.w_hh)
            if dead is not None:
                gates.masked_fill_(dead[d].view(-1, 1), 0.0)
            if d_fresh:
                d_fresh[0][d] += _d_fresh_rh(call, d_gates[d, ..., :columns], d) @ w.w_hh
            if dx is not None:
                d_x = dx.view(-1, dx.shape[-1])
                products.add_d_x(d_x, gates[:, :columns], gates[:, columns:], w.w_ih)
            if asked.weights:
                of_d = None if dead is None else dead[d]
                d_weights += _d_weights(call, states, d, of_d, gates, asked.groups)
    fresh = call.flow.fresh
    d_fresh = [part.to(y.dtype) for part in d_fresh] or [torch.zeros_like(part) for part in fresh]
    return Gradients(dx, d_state, d_fresh, d_weights)


def _d_fresh_rh(call: Call, d_rh: Tensor, d: int) -> Tensor:
    """The gradient of the fresh h's product in one direction, (B, G * H), from (T, B, G * H)."""
    assert call.flow.marks is not None
    is_fresh = ((call.flow.marks[d] & FRESH) != 0).unsqueeze(-1)
    # Not a product with the marks, which a NaN of another step would pass.
    return torch.where(is_fresh, d_rh, 0.0).sum(0, dtype=torch.float32).to(d_rh.dtype)


def _d_weights(
    call: Call, states: Sequence[Tensor], d: int, dead: Tensor | None, gates: Tensor, groups: int
) -> list[Tensor]:
    """The gradients of one direction's weights, from those of its gates, (T * B, (G + A) * H).

    `dead` marks the steps without gradients, (T, B), whose other factor may be NaN.
    """
    w = call.by_direction()[d]
    d_rh, d_apart = gates.tensor_split([len(w.w_hh)], dim=1)
    x = _without(dead, call.x).flatten(0, 1)
    if groups:
        h = _without(dead, _before(call, states, 0, d)).flatten(0, 1)
        found = products.d_weights_by_group(
            d_rh, d_apart, x, h, w=w, steps=call.steps, groups=groups
        )
    else:
        if dead is None:
            h = _of_direction(call, states[0], d).flatten(0, 1)
            d_w_hh = products.d_w_hh(d_rh, h, call.batch, call.state[0][d], d == 1)
        else:
            d_w_hh = d_rh.t() @ _without(dead, _before(call, states, 0, d)).flatten(0, 1)
        found = products.d_weights(d_rh, d_apart, x, d_w_hh, w)
    return found + _d_extras(call, states, d, dead, d_rh, groups)


def _d_extras(
    call: Call, states: Sequence[Tensor], d: int, dead: Tensor | None, d_rh: Tensor, groups: int
) -> list[Tensor]:
    """As `_d_weights`, of the extra weights."""
    if not call.cell.extras:
        return []
    (steps, batch, _), count = states[0].shape, groups or 1
    after = [_of_direction(call, part, d) for part in states]
    previous = [_before(call, states, s, d) for s in range(len(states))]
    by_gate = d_rh.view(steps, batch, d_rh.shape[1]).chunk(call.cell.n_gates, dim=-1)
    blocks = iter(
        _without(dead, part)
        .view(steps, count, batch // count, part.shape[-1])
        .sum((0, 2), dtype=torch.float32)
        for part in TORCH.bind(call.cell.d_extra)(by_gate, after, previous)
    )
    found = [
        torch.cat([next(blocks) for _ in range(extra.blocks)], dim=-1).to(d_rh.dtype)
        for extra in call.cell.extras
    ]
    return found if groups else [part[0] for part in found]


def _without(dead: Tensor | None, rows: Tensor) -> Tensor:
    """Rows (T, B, ·) with zeros where a direction has no gradient."""
    return rows if dead is None else rows.masked_fill(dead.unsqueeze(-1), 0.0)


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


def _recurrent_parts(call: Call, states: Sequence[Tensor]) -> Tensor:
    """h_{t-1} @ W_hh^T + b_hh for all steps and directions, (D, T, B, G * H)."""
    parts = [
        torch.nn.functional.linear(_before(call, states, 0, d), w.w_hh, w.b_hh)
        for d, w in enumerate(call.by_direction())
    ]
    return torch.stack(parts)


def _before(call: Call, states: Sequence[Tensor], s: int, d: int) -> Tensor:
    """A state before every step of one direction, (T, B, H); anything where it is held."""
    after, first = _of_direction(call, states[s], d), call.state[s][d]
    before = torch.cat([after[1:], first[None]] if d else [first[None], after[:-1]])
    if call.flow.marks is None:
        return before
    fresh = call.flow.fresh[s][d] if call.flow.fresh else 0.0
    is_start, is_fresh = (((call.flow.marks[d] & b) != 0).unsqueeze(-1) for b in (START, FRESH))
    return torch.where(is_fresh, fresh, torch.where(is_start, first, before))


def _of_direction(call: Call, sequence: Tensor, d: int) -> Tensor:
    """The part of states after every step that belongs to a direction."""
    return sequence.chunk(call.directions, dim=-1)[d]
