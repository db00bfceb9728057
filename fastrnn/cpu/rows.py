"""How the rows of a batch of sequences fall into steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """How N rows fall into T steps: all of one size (padded) or shrinking (packed).

    The rows of one step lie together, and row b of every step belongs to sequence b.
    """

    steps: int
    batch: int
    batch_sizes: Tensor | None  # None if padded

    @classmethod
    def of(cls, x: Tensor, batch_sizes: Tensor | None) -> Rows:
        """Of the input of a layer, as in ``reference.layer``."""
        if batch_sizes is None:
            return cls(x.shape[0], x.shape[1], None)
        sizes = batch_sizes.to(torch.int64).contiguous()
        return cls(len(sizes), int(sizes[0]), sizes)

    @property
    def sizes(self) -> list[int]:
        """Rows of every step."""
        if self.batch_sizes is None:
            return [self.batch] * self.steps
        return self.batch_sizes.tolist()

    def previous(self, rows: Tensor, initial: Tensor, reverse: bool) -> Tensor:
        """For every row, the value one step earlier in the direction of the pass."""
        if self.batch_sizes is None:
            count = rows.shape[0] - self.batch
            parts = (rows[self.batch :], initial) if reverse else (initial, rows[:count])
            return torch.cat(parts)
        sizes = self.batch_sizes
        offsets = sizes.cumsum(0) - sizes
        step = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        row = torch.arange(len(step)) - offsets[step]
        if reverse:
            alive = row < torch.cat([sizes[1:], sizes.new_zeros(1)])[step]
            source = offsets[(step + 1).clamp(max=len(sizes) - 1)]
        else:
            alive, source = step > 0, offsets[(step - 1).clamp(min=0)]
        index = torch.where(alive, source + row, len(step) + row)
        return torch.cat([rows, initial]).index_select(0, index.to(rows.device))
