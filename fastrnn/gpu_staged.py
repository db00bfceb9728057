"""GPU layers whose step needs more than one product: normalized, with late product or projection.

As in ``gpu.py``, GEMMs around the kernels compute the products over all steps, and every tensor is
first split into groups. Groups are the first dimension of the kernels' tensors, of size N; W is the
width of a state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import cpu
from .call import Asked, Call, Cotangents, Gradients, Result, Weights
from .cells import EPSILON, Cell
from .flow import CUT, HOLD, is_given, without_unasked
from .stacked import Groups, input_part

if TYPE_CHECKING:
    from .kernels.configs import Config
    from .kernels.launch_staged import Found, Operands, Past


def _weights(call: Call, groups: Groups) -> Weights:
    """The weights of all groups, (N, ...), with all extra weights in one tensor."""
    by_direction, cell = call.by_direction(), call.cell

    def of(name: str, blocks: int = cell.n_gates) -> Tensor | None:
        parts = [getattr(w, name) for w in by_direction]
        return None if parts[0] is None else groups.weight(parts, blocks)

    extras = [
        groups.weight([w.extras[k] for w in by_direction], extra.blocks)
        for k, extra in enumerate(cell.extras)
    ]
    w_ih = groups.weight([w.w_ih for w in by_direction], cell.n_gates)
    w_hh = groups.weight([w.w_hh for w in by_direction], cell.n_gates)
    extra = (torch.cat(extras, dim=1),) if extras else ()
    return Weights(w_ih, w_hh, of("b_ih"), of("b_hh"), of("w_hr", 1), extra)


def _of_group(w: Weights, g: int) -> Weights:
    b_ih, b_hh, w_hr = (None if part is None else part[g] for part in w[2:5])
    return Weights(w.w_ih[g], w.w_hh[g], b_ih, b_hh, w_hr, tuple(part[g] for part in w.extras))


def _operands(call: Call, groups: Groups, w: Weights) -> Operands:
    from .kernels.launch_staged import Operands

    marks, fresh, noise = call.flow
    drop, *zones = noise or (None,)
    return Operands(
        *(w.w_hh, w.b_hh, w.extras[0] if w.extras else None, w.w_hr),
        [groups.state(part) for part in call.initial()],
        None if marks is None else groups.marks(marks),
        [] if marks is None else [groups.state(part) for part in fresh],
        None if drop is None or not is_given(drop) else groups.state(drop),
        [_zone(zone, groups) for zone in zones] if any(map(is_given, zones)) else [],
        groups.ahead,
    )


def _zone(zone: Tensor, groups: Groups) -> Tensor | None:
    """Zoneout of a state in the form that the kernels take."""
    if not is_given(zone):
        return None
    return zone if zone.dim() == 1 else groups.mask(zone).view(torch.uint8)


def _steps(groups: Groups, part: Tensor) -> Tensor:
    """(N, T, b, W), from (T, B, D * K * W)."""
    return groups.by_group(groups.sequence(part)).contiguous()


def _sequence(groups: Groups, part: Tensor) -> Tensor:
    """(T, B, D * K * W), from (N, T, b, W); no view."""
    return groups.as_sequence(part.permute(1, 2, 0, 3).flatten(2).detach())


def _normalized(rows: Tensor, gain: Tensor | None, bias: Tensor | None) -> Sequence[Tensor]:
    """Normalize rows (R, G * u); return them with their means and reciprocal deviations."""
    return torch.native_layer_norm(rows, rows.shape[1:], gain, bias, EPSILON)


def _input_part(call: Call, groups: Groups, w: Weights) -> Tensor:
    """The input part of the gates of all steps, (N, T, b, G * u)."""
    by_direction = list(w.w_ih.split(groups.ahead))
    is_normalized = call.cell.is_normalized
    biases = [] if w.b_ih is None or is_normalized else list(w.b_ih.split(groups.ahead))
    wx = input_part(groups, call.x, by_direction, biases)
    if is_normalized:
        width = wx.shape[-1]
        for g, part in enumerate(wx.flatten(1, 2)):
            bias = None if w.b_ih is None else w.b_ih[g]
            part.copy_(_normalized(part, w.extras[0][g, :width], bias)[0])
    return wx


def forward(
    call: Call, config: Config, precision: str, save: int, traced: bool
) -> tuple[Result, list[Tensor]]:
    """Run a layer; see ``cpu.forward``.

    With `save` ``cpu.ALL``, a ``Past`` of all groups is saved; otherwise nothing, and backward
    starts with another forward.
    """
    from .kernels import launch_staged

    groups = Groups.of(call)
    w, dtype = _weights(call, groups), call.x.dtype
    operands = _operands(call, groups, w)
    y, traces, past, final = launch_staged.forward(
        *(call.cell, config, precision, _input_part(call, groups, w), operands),
        traced=traced,
        save=save == cpu.ALL,
    )
    if operands.marks is not None:  # the kernels hold the state there
        held = ((operands.marks & HOLD) != 0).unsqueeze(-1)
        for part in (y, *traces):
            part.masked_fill_(held, 0.0)
    y, *traces = (_sequence(groups, part).to(dtype) for part in (y, *traces))
    final = [groups.as_state(part.to(dtype)) for part in final]
    return Result(y, final, traces), [] if past is None else past.flat()


def fake_saved(call: Call, save: int) -> list[Tensor]:
    """Make tensors of the shapes and dtypes that `forward` saves, for a compiler."""
    if save != cpu.ALL:
        return []
    from .kernels.launch_staged import Past

    groups, cell = Groups.of(call), call.cell
    sizes = groups.n_groups, call.x.shape[0], groups.batch, cell.n_gates * groups.hidden
    return Past.empty(cell, call.x.new_empty(sizes), call.weights[1].shape[-1]).flat()


def backward(
    call: Call,
    config: Config,
    precision: str,
    given: Cotangents,
    saved: Sequence[Tensor],
    asked: Asked,
) -> Gradients:
    """Compute the gradients of `forward` from what it saved."""
    from .kernels import launch_staged

    groups, dtype, dead = Groups.of(call), call.x.dtype, None
    if call.flow.marks is not None:
        marks, unasked = without_unasked(call.flow.marks, given, CUT)
        dead = groups.marks(unasked | ((marks & HOLD) != 0)).unsqueeze(-1)
        call = call._replace(flow=call.flow._replace(marks=marks))
    w = _weights(call, groups)
    operands = _operands(call, groups, w)
    past = launch_staged.Past.of_flat(call.cell, [part.contiguous() for part in saved])
    found = launch_staged.backward(
        *(call.cell, config, precision, operands, past),
        (
            None if given.dy is None else _steps(groups, given.dy),
            [groups.state(part) for part in given.d_final],
            [_steps(groups, part) for part in given.d_traces],
        ),
    )
    x = groups.rows(call.x).unflatten(1, (call.steps, groups.batch))
    dx = torch.zeros_like(x) if asked.x else None
    parts = max(1, asked.groups // groups.members)
    of_groups = []
    for g in range(groups.n_groups):
        member = g // groups.heads % groups.members
        rows = _Rows(parts, None if dead is None else dead[g])
        of_x = rows.alive(x[member]), None if dx is None else dx[member]
        of_groups.append(_of_one(call.cell, _of_group(w, g), rows, of_x, g, operands, past, found))
    d_state, d_fresh = (
        [groups.as_state(part.to(dtype)) for part in parts]
        for parts in (found.d_initial, found.d_fresh)
    )
    d_fresh = d_fresh or [torch.zeros_like(part) for part in call.flow.fresh]
    d_weights = _joined(call, groups, asked, of_groups) if asked.weights else []
    dx = None if dx is None else groups.as_rows(dx.flatten(1, 2), call.steps)
    return Gradients(dx, d_state, d_fresh, d_weights)


class _Rows(NamedTuple):
    """Reductions of the rows of all steps of a group, (T, B, W), to gradients of weights.

    Attributes
    ----------
    parts : int
        Number of consecutive parts of the batch, each with its own gradients.
    dead : bool Tensor of shape (T, B, 1), optional
        Rows to ignore, whatever they hold.
    """

    parts: int
    dead: Tensor | None

    def alive(self, rows: Tensor) -> Tensor:
        """Zero the dead rows."""
        return rows if self.dead is None else rows.masked_fill(self.dead, 0.0)

    def split(self, rows: Tensor) -> Tensor:
        """(parts, T * B / parts, W)"""
        return rows.unflatten(1, (self.parts, -1)).transpose(0, 1).flatten(1, 2)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """The sum of the outer products of rows, (parts, W of a, W of b)."""
        return self.split(a).transpose(1, 2) @ self.split(b)

    def total(self, rows: Tensor) -> Tensor:
        """(parts, W)"""
        exact = torch.promote_types(rows.dtype, torch.float32)
        return self.split(rows).sum(1, dtype=exact).to(rows.dtype)


def _of_one(
    cell: Cell,
    w: Weights,
    rows: _Rows,
    of_x: tuple[Tensor, Tensor | None],
    g: int,
    operands: Operands,
    past: Past,
    found: Found,
) -> list[Tensor]:
    """Add the gradient of the input of a group, and return those of its weights, (parts, ...).

    `of_x` is the input, with dead rows zeroed, and its gradient, updated in place, (T, B, I).
    """
    x, dx = of_x
    width, hidden = w.w_hh.shape[0], operands.hidden
    d_rh, d_apart = rows.alive(found.d_gates[g]).tensor_split([width], dim=-1)
    d_wx = torch.cat([d_rh[..., : width - d_apart.shape[-1]], d_apart], dim=-1)
    d_raw = d_rh if found.d_raw is None else rows.alive(found.d_raw[g])
    d_extra = []
    d_input = d_wx
    if cell.is_normalized:
        raw = x.flatten(0, 1) @ w.w_ih.t()
        normal, mean, scale = _normalized(raw, None, None)
        d_input = torch.ops.aten.native_layer_norm_backward(
            *(d_wx.flatten(0, 1), raw, [width], mean, scale, w.extras[0][:width], None),
            [True, False, False],
        )[0].view_as(d_wx)
        d_extra += [rows.total(d_wx * normal.view_as(d_wx))]
        d_extra += [rows.total(d_rh * rows.alive(past.normal[0][g]))]
    if found.d_extra is not None:
        d_extra += [rows.total(rows.alive(found.d_extra[g]))]
    if dx is not None:
        dx.flatten(0, 1).addmm_(d_input.flatten(0, 1), w.w_ih)

    h = rows.alive(past.befores[0][g])
    if operands.drop is not None:
        h = (h * operands.drop[g]).to(h.dtype)
    if cell.late is None:
        d_w_hh = rows.product(d_raw, h)
    else:
        n = cell.late.saved * hidden
        factor = rows.alive(past.activations[g][..., n : n + hidden])
        early, late = d_raw.tensor_split([width - cell.late.n_gates * hidden], dim=-1)
        d_w_hh = torch.cat([rows.product(early, h), rows.product(late, factor * h)], dim=1)
    d_weights = [rows.product(d_input, x), d_w_hh]
    if w.b_ih is not None:
        d_weights += [rows.total(d_wx), rows.total(d_rh)]
    if found.d_projected is not None:
        projected = rows.alive(found.d_projected[g])
        d_weights.append(rows.product(projected, rows.alive(past.afters[0][g])))
    if d_extra:
        sizes = [extra.blocks * hidden for extra in cell.extras]
        d_weights += torch.cat(d_extra, dim=1).split(sizes, dim=1)
    return d_weights


def _joined(
    call: Call, groups: Groups, asked: Asked, of_groups: Sequence[Sequence[Tensor]]
) -> list[Tensor]:
    """Join the gradients of the weights of all groups, in the order of the call's weights."""
    cell = call.cell
    blocks = [cell.n_gates] * (call.n_weights - len(cell.extras) - call.is_projected)
    blocks += [1] * call.is_projected + [extra.blocks for extra in cell.extras]
    of_kinds = [
        groups.as_weight(torch.stack(parts), asked.groups, n)
        for parts, n in zip(zip(*of_groups, strict=True), blocks, strict=True)
    ]
    return [part for of_one in zip(*of_kinds, strict=True) for part in of_one]
