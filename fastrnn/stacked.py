"""A layer in the form that the GPU kernels take: with a leading dimension of groups.

A group is one head of one member of an ensemble in one direction. There are D * M * K groups, for D
directions, M members and K heads, ordered by (direction, member, head), so those that walk forward
come first. Each has b rows of the batch and u hidden units. With one member and one head nothing
here is copied. The products over all steps are batched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .call import Call
from .cells import Cell
from .flow import FRESH, START
from .reference import TORCH


class Groups(NamedTuple):
    """The groups of a layer.

    Attributes
    ----------
    directions, members, heads : int
        D, M and K; without an ensemble M is 1.
    batch, hidden : int
        b and u.
    is_ensemble : bool
        Whether weights have a dimension of members.
    """

    directions: int
    members: int
    heads: int
    batch: int
    hidden: int
    is_ensemble: bool

    @classmethod
    def of(cls, call: Call) -> Groups:
        """Describe the groups of a call."""
        members, heads = max(1, call.members), call.num_heads
        sizes = call.batch // members, call.hidden_size // heads
        return cls(call.directions, members, heads, *sizes, call.members > 0)

    @property
    def ahead(self) -> int:
        """The number of groups that walk forward."""
        return self.members * self.heads

    @property
    def n_groups(self) -> int:
        """The number of groups."""
        return self.directions * self.ahead

    @property
    def is_single(self) -> bool:
        """Whether there is one group per direction."""
        return self.members == self.heads == 1

    def weights(self, of_directions: Sequence[Tensor], blocks: int) -> list[Tensor]:
        """(M * K, blocks * u, ...) of each direction, from (blocks * H, ...)."""
        if self.is_single and not self.is_ensemble:
            return [part[None] for part in of_directions]
        found = []
        for part in of_directions:
            rest = part.shape[1 + self.is_ensemble :]
            units = part.shape[self.is_ensemble] // (blocks * self.heads)
            part = part.reshape(self.members, blocks, self.heads, units, *rest)
            found.append(part.transpose(1, 2).reshape(self.ahead, blocks * units, *rest))
        return found

    def weight(self, of_directions: Sequence[Tensor], blocks: int) -> Tensor:
        """(groups, blocks * u, ...), from (blocks * H, ...) of each direction."""
        found = self.weights(of_directions, blocks)
        return found[0].contiguous() if len(found) == 1 else torch.cat(found)

    def as_weight(self, found: Tensor, parts: int, blocks: int) -> list[Tensor]:
        """Invert `weight`, from (groups, parts of a member, blocks * u, ...).

        The results have a leading dimension of `parts`, if that is not 0, or else of members if
        there is an ensemble.
        """
        each, rest = max(1, parts // self.members), found.shape[3:]
        units = found.shape[2] // blocks
        sizes = self.directions, self.members, self.heads, each, blocks, units
        found = found.reshape(*sizes, *rest).movedim((3, 4), (2, 3))
        rows = blocks * self.heads * units
        found = found.reshape(self.directions, self.members * each, rows, *rest)
        of_directions = found if parts or self.is_ensemble else found[:, 0]
        # Autograd forbids in-place changes of views from operators with several results.
        return [part.detach() for part in of_directions]

    def state(self, part: Tensor) -> Tensor:
        """(groups, b, u), from (D, B, H)."""
        if self.is_single:
            return part.contiguous()
        units = part.shape[2] // self.heads
        sizes = self.directions, self.members, self.batch, self.heads, units
        part = part.reshape(sizes).transpose(2, 3)
        return part.reshape(self.n_groups, self.batch, units).contiguous()

    def as_state(self, found: Tensor) -> Tensor:
        """Invert `state`; the result is not a view."""
        if self.is_single:
            return found
        units = found.shape[2]
        sizes = self.directions, self.members, self.heads, self.batch, units
        found = found.view(sizes).transpose(2, 3)
        part = found.new_empty(self.directions, self.members * self.batch, self.heads * units)
        part.view(found.shape).copy_(found)
        return part

    def sequence(self, part: Tensor) -> Tensor:
        """(T, b, groups * u), from (T, B, D * H)."""
        if self.members == 1:  # the order of columns is that of groups
            return part.contiguous()
        width = part.shape[2] // self.directions
        sizes = part.shape[0], self.members, self.batch, self.directions, width
        part = part.reshape(sizes).permute(0, 2, 3, 1, 4)
        return part.reshape(sizes[0], self.batch, width * self.directions * self.members)

    def as_sequence(self, found: Tensor) -> Tensor:
        """Invert `sequence`; the result is not a view."""
        if self.members == 1:
            return found
        steps, width = found.shape[0], found.shape[2] // (self.directions * self.members)
        found = found.view(steps, self.batch, self.directions, self.members, width)
        found = found.permute(0, 3, 1, 2, 4)
        part = found.new_empty(steps, self.members * self.batch, self.directions * width)
        part.view(found.shape).copy_(found)
        return part

    def rows(self, x: Tensor) -> Tensor:
        """(M, T * b, I), from (T, B, I)."""
        steps, _, inputs = x.shape
        x = x.reshape(steps, self.members, self.batch, inputs).transpose(0, 1)
        return x.reshape(self.members, steps * self.batch, inputs)

    def as_rows(self, found: Tensor, steps: int) -> Tensor:
        """Invert `rows`."""
        found = found.view(self.members, steps, self.batch, found.shape[2]).transpose(0, 1)
        return found.reshape(steps, self.members * self.batch, found.shape[3])

    def marks(self, marks: Tensor) -> Tensor:
        """(groups, T, b), from (D, T, B)."""
        if self.is_single:
            return marks
        steps = marks.shape[1]
        marks = marks.reshape(self.directions, steps, self.members, self.batch).transpose(1, 2)
        marks = marks.unsqueeze(2).expand(-1, -1, self.heads, -1, -1)
        return marks.reshape(self.n_groups, steps, self.batch).contiguous()

    def mask(self, mask: Tensor) -> Tensor:
        """(groups, T, b, u), from (D, T, B, H)."""
        if self.is_single:
            return mask.contiguous()
        steps = mask.shape[1]
        units = mask.shape[3] // self.heads
        sizes = self.directions, steps, self.members, self.batch, self.heads, units
        mask = mask.reshape(sizes).permute(0, 2, 4, 1, 3, 5)
        return mask.reshape(self.n_groups, steps, self.batch, units).contiguous()

    def by_group(self, part: Tensor) -> Tensor:
        """View the result of `sequence` as (groups, T, b, u)."""
        steps, batch, width = part.shape
        return part.view(steps, batch, self.n_groups, width // self.n_groups).permute(2, 0, 1, 3)


def add_product(out: Tensor, rows: Tensor, w: Tensor, b: Tensor | None) -> None:
    """Write ``rows @ w.T + b`` of several groups, (groups, N, R)."""
    if b is None:
        torch.bmm(rows, w.mT, out=out)
    elif len(out) == 1:  # addmm adds the bias in its epilogue
        torch.addmm(b[0], rows[0], w[0].t(), out=out[0])
    else:
        torch.baddbmm(b[:, None], rows, w.mT, out=out)


def input_part(groups: Groups, x: Tensor, w_ih: Sequence[Tensor], b_ih: Sequence[Tensor]) -> Tensor:
    """x @ W_ih^T + b_ih for all steps and groups, (groups, T, b, G * u).

    The weights are those that `Groups.weights` returns; `b_ih` may be empty.
    """
    rows, width, heads = groups.rows(x), w_ih[0].shape[1], groups.heads
    wx = x.new_empty(groups.n_groups, rows.shape[1], width)
    for d, w in enumerate(w_ih):
        b = b_ih[d] if b_ih else None
        own = wx[d * groups.ahead : (d + 1) * groups.ahead]
        if heads == 1:
            add_product(own, rows, w, b)
            continue
        for m, row in enumerate(rows):  # all heads of a member share the input
            of = slice(m * heads, (m + 1) * heads)
            shared = row.expand(heads, -1, -1)
            add_product(own[of], shared, w[of], None if b is None else b[of])
    return wx.view(groups.n_groups, x.shape[0], groups.batch, width)


class Walked(NamedTuple):
    """The operands and states of a layer that has been run.

    Attributes
    ----------
    cell : Cell
    groups : Groups
    initial, fresh : sequence of Tensor of shape (groups, b, u)
    marks : uint8 Tensor of shape (groups, T, b), optional
    drop : Tensor of shape (groups, b, u), optional
        Factors of h in the recurrent product.
    states : sequence of Tensor of shape (T, b, groups * u)
        The states after every step, h first.
    """

    cell: Cell
    groups: Groups
    initial: Sequence[Tensor]
    fresh: Sequence[Tensor]
    marks: Tensor | None
    drop: Tensor | None
    states: Sequence[Tensor]

    def before(self, k: int) -> Tensor:
        """Copy state number `k` before every step, (groups, T, b, u)."""
        after, first, ahead = (
            self.groups.by_group(self.states[k]),
            self.initial[k],
            self.groups.ahead,
        )
        found = after.new_empty(after.shape)
        found[:ahead, 0], found[:ahead, 1:] = first[:ahead], after[:ahead, :-1]
        found[ahead:, -1], found[ahead:, :-1] = first[ahead:], after[ahead:, 1:]
        if self.marks is not None:
            # Computed from the marks on the device, without a sync.
            is_start, is_fresh = ((self.marks & bit).unsqueeze(-1) != 0 for bit in (START, FRESH))
            found = torch.where(is_start, first.unsqueeze(1).to(found.dtype), found)
            fresh = self.fresh[k].unsqueeze(1).to(found.dtype) if self.fresh else 0.0
            found = torch.where(is_fresh, fresh, found)
        return found

    def operand(self) -> Tensor:
        """The operand of the recurrent weights, (groups, T, b, u)."""
        h = self.before(0)
        return h if self.drop is None else h.mul_(self.drop.unsqueeze(1))

    def recurrent_part(self, r: Tensor, b: Tensor | None) -> Tensor:
        """The recurrent part of the gates at all steps, with its bias, (groups, T, b, G * u)."""
        h = self.operand()
        found = h.new_empty(*h.shape[:3], r.shape[1])
        add_product(found.flatten(1, 2), h.flatten(1, 2), r, b)
        return found


class Found(NamedTuple):
    """The gate gradients, and the products that turn them into those of weights and input.

    Attributes
    ----------
    walked : Walked
    d_gates : Tensor of shape (groups, T, b, (G + A) * u)
        As the kernels write them.
    left_out : bool Tensor of shape (groups, T, b), optional
        Steps to ignore, whatever their values; `d_gates` is zero there.
    parts : int
        Number of parts of the batch with their own weight gradients, ordered by member; 0 for one
        part per member.
    """

    walked: Walked
    d_gates: Tensor
    left_out: Tensor | None
    parts: int

    @property
    def d_rh(self) -> Tensor:
        """The gradient of the recurrent parts."""
        return self.d_gates[..., : self.walked.cell.n_gates * self.walked.groups.hidden]

    def _of_inputs(self) -> list[tuple[slice, slice]]:
        """The matching columns of `d_gates` and rows of W_ih.

        There are two pairs if the input parts of the last gates have their own gradients.
        """
        cell, u = self.walked.cell, self.walked.groups.hidden
        shared, gates = (cell.n_gates - cell.n_apart) * u, cell.n_gates * u
        found = [(slice(0, shared), slice(0, shared))]
        if cell.n_apart:
            found.append((slice(gates, None), slice(shared, gates)))
        return found

    def _joined(self, d: int, columns: slice) -> Tensor:
        """Concatenate columns of all heads of a direction, (M, T, b, K * columns)."""
        directions, members, heads, batch, *_ = self.walked.groups
        by_direction = self.d_gates.view(directions, members, heads, *self.d_gates.shape[1:])
        own = by_direction[d, ..., columns].permute(0, 2, 3, 1, 4)
        return own.reshape(members, own.shape[1], batch, heads * own.shape[-1])

    def d_x(self, x: Tensor, w_ih: Sequence[Tensor]) -> Tensor:
        """The gradient of the input x, from the weights that `Groups.weights` returns."""
        groups = self.walked.groups
        members, heads = groups.members, groups.heads
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
        found = (
            dx.view(1, x.shape[0] * x.shape[1], x.shape[2])
            if members == 1
            else torch.zeros_like(groups.rows(x))
        )
        for d, w in enumerate(w_ih):
            by_head = w.view(members, heads, *w.shape[1:])
            for columns, rows in self._of_inputs():
                own = by_head[:, :, rows]
                own = own.reshape(members, heads * own.shape[2], own.shape[3])
                found.baddbmm_(self._joined(d, columns).flatten(1, 2), own)
        return dx if members == 1 else groups.as_rows(found, x.shape[0])

    def d_weights(self, x: Tensor, after: Sequence[Tensor], has_bias: bool) -> list[list[Tensor]]:
        """The gradients of w_ih, w_hh, the biases and the extra weights, each for all directions.

        `x` is (M, T * b, I); `after` are the states that the cell computed at every step,
        (groups, T, b, u), needed for cells with `d_extra`.
        """
        cell, groups = self.walked.cell, self.walked.groups
        found = [self._d_w_ih(x), self._d_w_hh()]
        if has_bias:
            d_b_hh = self._by_part(self.d_rh).sum(2)
            (shared, _), *apart = self._of_inputs()
            others = [self._by_part(self.d_gates[..., columns]).sum(2) for columns, _ in apart]
            found += [torch.cat([d_b_hh[..., shared], *others], dim=-1), d_b_hh]
        results = [groups.as_weight(part, self.parts, cell.n_gates) for part in found]
        if cell.d_extra is not None:
            d_extra = self._by_part(self._d_extra(after)).sum(2).to(self.d_gates.dtype)
            blocks = d_extra.split([extra.blocks * groups.hidden for extra in cell.extras], dim=-1)
            results += [
                groups.as_weight(part, self.parts, extra.blocks)
                for part, extra in zip(blocks, cell.extras, strict=True)
            ]
        return results

    def _by_part(self, rows: Tensor) -> Tensor:
        """(N, parts of a member, T * rows of a part, columns), from (N, T, b, columns)."""
        count, steps, batch, width = rows.shape
        each = max(1, self.parts // self.walked.groups.members)
        rows = rows.reshape(count, steps, each, batch // each, width).transpose(1, 2)
        return rows.reshape(count, each, steps * (batch // each), width)

    def _d_w_ih(self, x: Tensor) -> Tensor:
        """(groups, parts of a member, G * u, I)."""
        directions, members, heads, batch, *_ = self.walked.groups
        steps, inputs = self.d_gates.shape[1], x.shape[2]
        of_directions = []
        for d in range(directions):
            own = x
            if self.left_out is not None:
                left_out = self.left_out.view(directions, members, heads, steps * batch)[d, :, 0]
                own = x.masked_fill(left_out.unsqueeze(-1), 0.0)
            own = self._by_part(own.view(members, steps, batch, inputs))
            of_rows = []
            for columns, _ in self._of_inputs():
                rows = self._by_part(self._joined(d, columns))
                product = torch.bmm(rows.flatten(0, 1).mT, own.flatten(0, 1))
                product = product.view(*own.shape[:2], heads, product.shape[1] // heads, inputs)
                of_rows.append(product.transpose(1, 2))
            of_directions.append(of_rows[0] if len(of_rows) == 1 else torch.cat(of_rows, dim=3))
        found = of_directions[0] if directions == 1 else torch.cat(of_directions)
        return found.reshape(directions * members * heads, *found.shape[2:])

    def _d_w_hh(self) -> Tensor:
        """(groups, parts of a member, G * u, u)."""
        walked, groups, d_rh = self.walked, self.walked.groups, self.d_rh
        if walked.marks is None and walked.drop is None and not self.parts:
            # To avoid a copy of h: all steps but the first, then the first.
            h = groups.by_group(walked.states[0]).flatten(1, 2)
            rows, batch, ahead = d_rh.flatten(1, 2), groups.batch, groups.ahead
            rest = h.shape[1] - batch
            found = d_rh.new_empty(groups.n_groups, d_rh.shape[3], groups.hidden)
            for of, later, first, before in (
                (slice(0, ahead), rows[:, batch:], rows[:, :batch], h[:, :rest]),
                (slice(ahead, groups.n_groups), rows[:, :rest], rows[:, rest:], h[:, batch:]),
            )[: groups.directions]:
                torch.bmm(later[of].mT, before[of], out=found[of])
                found[of].baddbmm_(first[of].mT, walked.initial[0][of])
            return found.unsqueeze(1)
        h = walked.operand()
        if self.left_out is not None:
            h.masked_fill_(self.left_out.unsqueeze(-1), 0.0)
        rows, h = self._by_part(d_rh), self._by_part(h)
        found = torch.bmm(rows.flatten(0, 1).mT, h.flatten(0, 1))
        return found.view(*rows.shape[:2], *found.shape[1:])

    def _d_extra(self, after: Sequence[Tensor]) -> Tensor:
        """The gradients of the extra weights for every row and step."""
        cell = self.walked.cell
        before = [self.walked.before(k) for k in range(cell.n_states)]
        d_extra = TORCH.bind(cell.d_extra)(self.d_rh.chunk(cell.n_gates, dim=-1), after, before)
        found = torch.cat(d_extra, dim=-1)
        return found if self.left_out is None else found.masked_fill_(self.left_out[..., None], 0.0)
