"""The weight gradients of a direction, from the results of a backward walk through time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import groups, products
from ..reference import TORCH
from .direction import Direction, Found, Kept

#: Splits a matrix of rows into those of every group of sequences, (groups, rows, columns).
Split = Callable[[Tensor], Tensor]


class OfInput(NamedTuple):
    """Gradients of the product of the input with its weights.

    Attributes
    ----------
    d_shared, d_apart : Tensor
        Gradients of the gates whose two parts have the same gradient, then of the others, if any.
    d_gain : Tensor, optional
        Gradient of the gain, if the product is normalized.
    """

    d_shared: Tensor
    d_apart: Tensor
    d_gain: Tensor | None = None


class Walk(NamedTuple):
    """The operands and results of a direction whose backward walk has been run.

    Attributes
    ----------
    direction : Direction
    x : Tensor of shape (N, I)
    states : sequence of Tensor of shape (N, P) and (N, H)
        The states after every row, h first.
    kept : Kept
    found : Found
    multiply : callable
        A ``products.Multiply``.
    left_out : bool Tensor of shape (N, 1), optional
        Rows to ignore, whatever they hold.
    """

    direction: Direction
    x: Tensor
    states: Sequence[Tensor]
    kept: Kept
    found: Found
    multiply: products.Multiply = products.by_torch
    left_out: Tensor | None = None

    def without(self, left_out: Tensor) -> Walk:
        """Ignore rows, zeroing the gradients of their gates in place."""
        found = self.found
        for part in (found.d_rh, found.d_apart, found.d_product, found.d_output):
            if part is not None:
                part.masked_fill_(left_out, 0.0)
        projected = [part.masked_fill(left_out, 0.0) for part in found.projected]
        return self._replace(found=found._replace(projected=projected), left_out=left_out)

    def of_input(self) -> OfInput:
        """The gradients of the input's product, from which those of input and weights follow."""
        cell, heads, (d_rh, d_apart, *_) = self.direction.cell, self.direction.num_heads, self.found
        shared = d_rh.shape[-1] - d_apart.shape[-1]
        if not cell.is_normalized:
            return OfInput(d_rh[..., :shared], d_apart)
        d_wx = torch.cat([d_rh[:, :shared], d_apart], dim=1)
        raw, moments = (self._left(part) for part in self.kept.normal[:2])
        gain, found = self.direction.w.extras[0], []
        for k in range(heads):
            of_head = (groups.gates(part, cell.n_gates, k, heads) for part in (d_wx, raw, gain))
            d_out, normalized, own_gain = of_head
            mean, scale = moments[:, 2 * k : 2 * k + 2].t().contiguous().unsqueeze(-1)
            found.append(
                torch.ops.aten.native_layer_norm_backward(
                    d_out, normalized, normalized.shape[1:], mean, scale, own_gain, None,
                    [True, True, False],
                )[:2]
            )  # fmt: skip
        d_raw, d_gain = (groups.join(parts, cell.n_gates) for parts in zip(*found, strict=True))
        return OfInput(d_raw, d_raw[:, :0], d_gain)

    def d_weights(self, of_input: OfInput, split: Split | None = None) -> list[Tensor]:
        """The gradients in the order of the weights; with `split`, per group of sequences."""
        w, found, x = self.direction.w, self.found, self._left(self.x)
        d_weights = [
            self._stacked([(of_input.d_shared, x), (of_input.d_apart, x)], split),
            self._d_w_hh(split),
        ]
        if w.b_ih is not None:
            d_weights += self._d_biases(split)
        if found.projected:
            d_weights.append(self._stacked([tuple(found.projected)], split))
        if w.extras:
            d_weights += self._d_extras(of_input, split)
        return d_weights

    def _stacked(self, pairs: Sequence[Sequence[Tensor]], split: Split | None) -> Tensor:
        """Stack the products a^T b of several pairs of matrices."""
        pairs = [pair for pair in pairs if pair[0].shape[-1]]
        if split is not None:
            return torch.cat([split(a).transpose(1, 2) @ split(b) for a, b in pairs], dim=1)
        sizes = [a.shape[-1] for a, _ in pairs]
        found = self.x.new_empty(*self.direction.lead, sum(sizes), pairs[0][1].shape[-1])
        for to, (a, b) in zip(found.split(sizes, -2), pairs, strict=True):
            self.multiply(to, a.mT, b, False)
        return found

    def _d_w_hh(self, split: Split | None) -> Tensor:
        direction, found, rows = self.direction, self.found, self.direction.rows
        cell, heads = direction.cell, direction.num_heads
        is_plain = direction.breaks is None and rows.batch_sizes is None
        if is_plain and cell.is_pointwise and heads == 1 and split is None:
            h, h_0 = self.states[0], direction.initial[0] if direction.initial else None
            if direction.noise is not None and direction.noise.drop is not None:
                drop = direction.noise.drop
                h = (h.unflatten(-2, rows[:2]) * drop.unsqueeze(-3)).flatten(-3, -2)
                h_0 = h_0 if h_0 is None else h_0 * drop
            return products.d_w_hh(found.d_rh, h, rows.batch, h_0, direction.reverse, self.multiply)
        h, late = self._h_before(), None
        if cell.late is not None:
            late = h * self.kept.saved[cell.late.saved]
            late = late if self.left_out is None else late.masked_fill_(self.left_out, 0.0)
        if heads > 1:
            return self._d_w_hh_of_heads(h, late, split)
        d_rh = found.d_rh if found.d_product is None else found.d_product[0]
        if late is None:
            return self._stacked([(d_rh, h)], split)
        assert cell.late is not None
        first = d_rh.shape[-1] - cell.late.n_gates * direction.hidden
        return self._stacked([(d_rh[..., :first], h), (d_rh[..., first:], late)], split)

    def _d_w_hh_of_heads(self, h: Tensor, late: Tensor | None, split: Split | None) -> Tensor:
        """Compute the diagonal blocks gate by gate, which avoids copies of the gate gradients."""
        cell, heads, d_product = self.direction.cell, self.direction.num_heads, self.found.d_product
        n_early = cell.n_gates - (cell.late.n_gates if cell.late else 0)
        by_gate: Sequence[Tensor] = self.found.d_rh.chunk(cell.n_gates, dim=-1)
        is_one = split is None and not self.direction.lead
        if d_product is not None:
            # (heads, N, G * units), where the others are (N, G, heads, units).
            by_gate = [part.transpose(0, 1).flatten(1) for part in d_product.chunk(cell.n_gates, 2)]

        def by_head(rows: Tensor) -> Tensor:
            rows = rows if split is None else split(rows)
            rows = rows[None] if is_one else rows
            return rows.unflatten(-1, (heads, -1)).transpose(1, 2)

        early = by_head(h)
        factors = [early] * n_early + [early if late is None else by_head(late)] * (
            cell.n_gates - n_early
        )
        blocks = [by_head(part).mT @ factor for part, factor in zip(by_gate, factors, strict=True)]
        found = torch.stack(blocks, dim=1).flatten(1, 3)
        return found[0] if is_one else found

    def _d_biases(self, split: Split | None) -> list[Tensor]:
        d_rh, d_apart, *_ = self.found
        of_rh, of_apart = (self._sum(part, split) for part in (d_rh, d_apart))
        shared = d_rh.shape[-1] - d_apart.shape[-1]
        return [torch.cat([of_rh[..., :shared], of_apart], dim=-1), of_rh]

    @staticmethod
    def _sum(rows: Tensor, split: Split | None) -> Tensor:
        return rows.sum(-2) if split is None else split(rows).sum(1)

    def _left(self, rows: Tensor) -> Tensor:
        """Zero the rows that are left out."""
        return rows if self.left_out is None else rows.masked_fill(self.left_out, 0.0)

    def _h_before(self) -> Tensor:
        """The operand of the recurrent product of every row."""
        direction = self.direction
        (h,) = direction.before(self.states[:1])
        if direction.noise is not None and direction.noise.drop is not None:
            drop = direction.noise.drop
            if direction.rows.batch_sizes is None:
                h.unflatten(-2, direction.rows[:2]).mul_(drop.unsqueeze(-3))
            else:
                h.mul_(drop.index_select(0, direction.rows.sequence()))
        return h if self.left_out is None else h.masked_fill_(self.left_out, 0.0)

    def _d_extras(self, of_input: OfInput, split: Split | None) -> list[Tensor]:
        """The gradients of the extra weights."""
        w, cell = self.direction.w, self.direction.cell
        found, sizes = [], [part.shape[-1] for part in w.extras]
        if cell.is_normalized:
            d_gain = of_input.d_gain
            if split is not None or d_gain is None:
                d_gain = self._sum(self._d_gain_rows(), split)
            found.append(d_gain.to(self.x.dtype))
            sizes = sizes[1:]
        rows = self._d_extra_rows()
        if not rows:
            return found
        blocks = self._sum(torch.cat(rows, dim=-1), split)
        return [*found, *blocks.to(self.x.dtype).split(sizes, dim=-1)]

    def _d_gain_rows(self) -> Tensor:
        """The gradient of the gain of the input's product, for every row."""
        cell, heads = self.direction.cell, self.direction.num_heads
        d_rh, d_apart, *_ = self.found
        raw, moments = (self._left(part) for part in self.kept.normal[:2])
        mean, scale = moments.unflatten(1, (heads, 2)).unsqueeze(-1).unbind(2)
        by_head = raw.unflatten(1, (cell.n_gates, heads, -1))
        normal = ((by_head - mean.unsqueeze(1)) * scale.unsqueeze(1)).flatten(1)
        return torch.cat([d_rh[:, : raw.shape[1] - d_apart.shape[1]], d_apart], dim=1) * normal

    def _d_extra_rows(self) -> list[Tensor]:
        """The gradients of the other extra weights, for every row."""
        cell, kept, found = self.direction.cell, self.kept, self.found
        rows = []
        if cell.is_normalized:
            rows.append(found.d_rh * self._left(kept.normal[2]))
        if cell.output is not None and found.d_output is not None:
            moments = kept.normal[3].unflatten(1, (self.direction.num_heads, 3)).unsqueeze(-1)
            state = self._made()[-1].unflatten(1, (self.direction.num_heads, -1))
            normal = ((state - moments[:, :, 1]) * moments[:, :, 2]).flatten(1)
            rows += [found.d_output * self._left(normal), found.d_output]
        if cell.d_extra is not None:
            d_rh = found.d_rh.chunk(cell.n_gates, dim=-1)
            states = self._made()
            before = self.direction.before(self.states[: cell.n_states])
            rows += map(self._left, TORCH.bind(cell.d_extra)(d_rh, states, before))
        return rows

    def _made(self) -> list[Tensor]:
        """The states of every row, before zoneout where that was saved."""
        states = list(self.states[: self.direction.cell.n_states])
        for k, raw in enumerate(self.kept.raw):
            states[k] = states[k] if raw is None else raw
        return states
