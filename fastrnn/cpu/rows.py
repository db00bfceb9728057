"""How the rows of a batch of sequences are divided into steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..call import Call
from ..flow import HOLD


def _arange(stop: int) -> Tensor:
    # The default device may be a different one.
    return torch.arange(stop, device="cpu")


class Rows(NamedTuple):
    """How N rows are divided into T steps, all of one size (padded) or shrinking (packed).

    The rows of one step are contiguous, and row b of every step belongs to sequence b.
    """

    steps: int
    batch: int
    batch_sizes: Tensor | None  # None if padded

    @classmethod
    def of(cls, call: Call) -> Rows:
        """Describe the input of a layer, or of one member of an ensemble."""
        sizes = call.batch_sizes
        sizes = sizes if sizes is None else sizes.to(torch.int64).contiguous()
        return cls(call.steps, call.batch // max(1, call.members), sizes)

    @property
    def total(self) -> int:
        """N."""
        if self.batch_sizes is None:
            return self.steps * self.batch
        return int(self.batch_sizes.sum())

    @property
    def sizes(self) -> list[int]:
        """Rows of every step."""
        if self.batch_sizes is None:
            return [self.batch] * self.steps
        return self.batch_sizes.tolist()

    def sequence(self) -> Tensor:
        """The index of the sequence of every row."""
        if self.batch_sizes is None:
            return _arange(self.batch).repeat(self.steps)
        return _arange(self.total) - self._offsets()[self._step()]

    def _offsets(self) -> Tensor:
        assert self.batch_sizes is not None
        return self.batch_sizes.cumsum(0) - self.batch_sizes

    def _step(self) -> Tensor:
        assert self.batch_sizes is not None
        return torch.repeat_interleave(_arange(self.steps), self.batch_sizes)

    def previous(self, rows: Tensor, initial: Tensor, reverse: bool) -> Tensor:
        """For every row, the value one step earlier in the direction of the pass."""
        if self.batch_sizes is None:
            count = rows.shape[-2] - self.batch
            parts = rows[..., self.batch :, :], initial
            return torch.cat(parts if reverse else (initial, rows[..., :count, :]), -2)
        sizes, offsets, step, row = self.batch_sizes, self._offsets(), self._step(), self.sequence()
        if reverse:
            alive = row < torch.cat([sizes[1:], sizes.new_zeros(1)])[step]
            source = offsets[(step + 1).clamp(max=len(sizes) - 1)]
        else:
            alive, source = step > 0, offsets[(step - 1).clamp(min=0)]
        index = torch.where(alive, source + row, len(step) + row)
        return torch.cat([rows, initial]).index_select(0, index.to(rows.device))


class Selection(NamedTuple):
    """The rows and sequences of a padded batch that exist, in the order in which they are packed.

    Both are None if all of them exist, in which case the order is unchanged.
    """

    chosen: Tensor | None = None
    order: Tensor | None = None

    def rows(self, padded: Tensor) -> Tensor:
        """Select from (T * B, ·)."""
        return padded if self.chosen is None else padded.index_select(0, self.chosen)

    def sequences(self, state: Tensor) -> Tensor:
        """Select from (D, B, ·)."""
        return state if self.order is None else state.index_select(1, self.order)

    def padded(self, rows: Tensor, count: int) -> Tensor:
        """Scatter rows to a padded batch of `count` rows, with zeros elsewhere."""
        if self.chosen is None:
            return rows
        whole = rows.new_zeros(count, rows.shape[1])
        return whole.index_copy_(0, self.chosen, rows)

    def put_rows(self, padded: Tensor, rows: Tensor) -> None:
        """Copy selected rows back to their places."""
        if self.chosen is None:
            padded.copy_(rows)
        else:
            padded.index_copy_(0, self.chosen, rows)

    def put_sequences(self, state: Tensor, selected: Tensor) -> None:
        """Copy selected states back to their places."""
        if self.order is None:
            state.copy_(selected)
        else:
            state.index_copy_(1, self.order, selected)


def select(marks: Tensor | None, rows: Rows) -> tuple[Rows, Selection]:
    """Pack a padded batch without the rows that its marks, (D, T, B), hold."""
    if marks is None:
        return rows, Selection()
    lengths = ((marks[0] & HOLD) == 0).sum(0)
    if not rows.batch or int(lengths.min()) == rows.steps:
        return rows, Selection()
    lengths, order = lengths.sort(descending=True, stable=True)
    alive = _arange(rows.steps)[:, None] < lengths
    sizes = alive.sum(1)
    steps, batch = int((sizes > 0).sum()), int((lengths > 0).sum())
    step, sequence = alive.nonzero(as_tuple=True)
    index = step * rows.batch + order[sequence]
    return Rows(steps, batch, sizes[:steps].contiguous()), Selection(index, order[:batch])
