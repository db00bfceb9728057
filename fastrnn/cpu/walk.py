"""The gradients of the weights of a direction, from what a walk back through time has found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import products
from ..reference import TORCH
from .direction import Direction


class Walk(NamedTuple):
    """What there is once the gradients of the gates of all rows are known.

    Attributes
    ----------
    direction : Direction
    x : Tensor of shape (N, I)
    states : sequence of Tensor of shape (N, P) and (N, H)
        After every row, h first.
    d_rh, d_apart : Tensor
    projected : sequence of Tensor
        As ``operators.backward`` returns them.
    multiply : callable
        As ``products`` calls it.
    left_out : bool Tensor of shape (N, 1), optional
        Rows that count for nothing, whatever they are.
    """

    direction: Direction
    x: Tensor
    states: Sequence[Tensor]
    d_rh: Tensor
    d_apart: Tensor
    projected: Sequence[Tensor]
    multiply: products.Multiply = products.by_torch
    left_out: Tensor | None = None

    def without(self, left_out: Tensor) -> Walk:
        """Leave rows out, of the gradients of the gates in place."""
        for part in (self.d_rh, self.d_apart):
            part.masked_fill_(left_out, 0.0)
        projected = [part.masked_fill(left_out, 0.0) for part in self.projected]
        return self._replace(projected=projected, left_out=left_out)

    def d_weights(self) -> list[Tensor]:
        """The gradients, in the order of the weights."""
        direction, d_rh = self.direction, self.d_rh
        if direction.breaks is None and direction.rows.batch_sizes is None:
            h_0 = direction.initial[0] if direction.initial else None
            batch = direction.rows.batch
            d_w_hh = products.d_w_hh(
                d_rh, self.states[0], batch, h_0, direction.reverse, self.multiply
            )
        else:
            d_w_hh = self._product(d_rh.t(), self._h_before())
        found = products.d_weights(
            d_rh, self.d_apart, self._own_x(), d_w_hh, direction.w, self.multiply
        )
        if self.projected:
            found.append(self._product(self.projected[0].t(), self.projected[1]))
        if direction.w.extras:
            found += self._as_extras(self._d_extra().sum(0))
        return found

    def d_weights_by_group(
        self, pad: Callable[[Tensor], Tensor], steps: int, groups: int
    ) -> list[Tensor]:
        """Those of every group of sequences; `pad` makes the rows those of a padded batch."""
        d_rh, d_apart, x, h = map(pad, (self.d_rh, self.d_apart, self._own_x(), self._h_before()))
        w, projected = self.direction.w, [pad(part) for part in self.projected]
        found = products.d_weights_by_group(
            d_rh, d_apart, x, h, projected, w=w, steps=steps, groups=groups
        )
        if w.extras:
            d_extra = pad(self._d_extra())
            size = d_extra.shape[0] // (steps * groups)
            apart = d_extra.view(steps, groups, size, d_extra.shape[1])
            found += self._as_extras(apart.sum((0, 2)))
        return found

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        product = a.new_empty(a.shape[0], b.shape[1])
        self.multiply(product, a, b, False)
        return product

    def _own_x(self) -> Tensor:
        return self.x if self.left_out is None else self.x.masked_fill(self.left_out, 0.0)

    def _h_before(self) -> Tensor:
        (h,) = self.direction.before(self.states[:1])
        return h if self.left_out is None else h.masked_fill_(self.left_out, 0.0)

    def _d_extra(self) -> Tensor:
        """The gradients of the extra weights of every row, (N, n_extra * H)."""
        cell = self.direction.cell
        states = self.states[: cell.n_states]
        d_rh = self.d_rh.chunk(cell.n_gates, dim=1)
        blocks = TORCH.bind(cell.d_extra)(d_rh, states, self.direction.before(states))
        rows = torch.cat(blocks, dim=1)
        return rows if self.left_out is None else rows.masked_fill_(self.left_out, 0.0)

    def _as_extras(self, blocks: Tensor) -> Sequence[Tensor]:
        return blocks.to(self.d_rh.dtype).split(
            [part.shape[0] for part in self.direction.w.extras], dim=-1
        )
