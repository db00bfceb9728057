"""One direction of a layer, as a CPU's kernels, torch's operators and ``walk.py`` take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..call import Weights
from ..cells import Cell
from ..flow import CUT, FRESH
from .rows import Rows


class Breaks(NamedTuple):
    """Where the state of one direction does not simply pass from step to step.

    Attributes
    ----------
    marks : uint8 Tensor of shape (N,)
        FRESH and CUT, as in ``fastrnn.flow``.
    fresh : sequence of Tensor of shape (B, P) and (B, H)
        The states after a reset.
    rows : int64 Tensor of shape (R,)
        Those with FRESH.
    sequences : int64 Tensor of shape (R,)
        Theirs.
    """

    marks: Tensor
    fresh: Sequence[Tensor]
    rows: Tensor
    sequences: Tensor

    def replace(self, before: Tensor, k: int) -> Tensor:
        """Put fresh states in place of state number `k` before every step, in place."""
        return before.index_copy_(0, self.rows, self.fresh[k].index_select(0, self.sequences))


def breaks(marks: Tensor, fresh: Sequence[Tensor], rows: Rows) -> Breaks | None:
    """Make the breaks of a direction from its marks (N,) and fresh states, None without any."""
    if not bool((marks & (FRESH | CUT)).any()):
        return None
    is_fresh = ((marks & FRESH) != 0).nonzero().squeeze(1)
    return Breaks(marks, fresh, is_fresh, rows.sequence()[is_fresh])


class Direction(NamedTuple):
    """One direction of a layer, on a CPU in the compute dtype.

    Attributes
    ----------
    cell : Cell
    w : Weights
    rows : Rows
    reverse : bool
    initial : sequence of Tensor of shape (B, P) and (B, H)
        State before the first step; empty for zeros.
    breaks : Breaks, or what replaces states as they do, optional
    """

    cell: Cell
    w: Weights
    rows: Rows
    reverse: bool
    initial: Sequence[Tensor]
    breaks: Breaks | None

    @property
    def hidden(self) -> int:
        """H."""
        return self.w.w_hh.shape[0] // self.cell.n_gates

    def before(self, states: Sequence[Tensor]) -> list[Tensor]:
        """The states before every row, from those after it, h first; in memory of their own."""
        found = []
        for k, part in enumerate(states):
            first = (
                self.initial[k] if self.initial else part.new_zeros(self.rows.batch, part.shape[1])
            )
            before = self.rows.previous(part, first, self.reverse)
            found.append(before if self.breaks is None else self.breaks.replace(before, k))
        return found
