"""One direction of a layer, as the kernels, the loop of operators and ``walk.py`` take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..call import Weights
from ..cells import Cell
from ..flow import CUT, FRESH, is_given
from .rows import Rows


class Breaks(NamedTuple):
    """The steps at which the state or its gradient does not carry over, in one direction.

    Attributes
    ----------
    marks : uint8 Tensor of shape (N,)
        FRESH and CUT, as in ``fastrnn.flow``.
    fresh : sequence of Tensor of shape (B, P) and (B, H)
        The states after a reset.
    rows : int64 Tensor of shape (R,)
        Indices of the rows with FRESH.
    sequences : int64 Tensor of shape (R,)
        The sequences of these rows.
    """

    marks: Tensor
    fresh: Sequence[Tensor]
    rows: Tensor
    sequences: Tensor

    def replace(self, before: Tensor, k: int) -> Tensor:
        """Overwrite state number `k` before every fresh step by the fresh state, in place."""
        return before.index_copy_(0, self.rows, self.fresh[k].index_select(0, self.sequences))


def breaks(marks: Tensor, fresh: Sequence[Tensor], rows: Rows) -> Breaks | None:
    """Make the breaks of a direction from its marks (N,) and fresh states; None without marks."""
    if not bool((marks & (FRESH | CUT)).any()):
        return None
    is_fresh = ((marks & FRESH) != 0).nonzero().squeeze(1)
    return Breaks(marks, fresh, is_fresh, rows.sequence()[is_fresh])


class Noise(NamedTuple):
    """Recurrent dropout and zoneout of one direction of a layer.

    Attributes
    ----------
    drop : Tensor of shape (B, P), optional
        Factors of h in the recurrent product.
    zones : sequence of Tensor
        For every state, as in ``fastrnn.flow.Flow``: bool (N, P) or (N, H), (1,), or (0,).
    """

    drop: Tensor | None
    zones: Sequence[Tensor]

    def changes(self, k: int) -> bool:
        """Whether zoneout applies to state number `k`."""
        return is_given(self.zones[k])


class Kept(NamedTuple):
    """What forward saves for backward for every row, besides h; each part may be empty.

    Attributes
    ----------
    saved : sequence of Tensor of shape (N, H)
        The values that the cell saves for backward.
    traces : sequence of Tensor of shape (N, H)
        The states other than h; if h is projected, then h before the projection.
    raw : sequence of Tensor of shape (N, H), or None
        States before zoneout, where it applies and backward reads them.
    normal : sequence of Tensor
        For cells with normalized products: the input's product (N, G * H), its mean and
        1 / deviation for every head (N, 2 * heads), the normalized recurrent product (N, G * H),
        and the ``Cell.n_moments`` moments of every head (N, heads or 3 * heads).
    """

    saved: Sequence[Tensor] = ()
    traces: Sequence[Tensor] = ()
    raw: Sequence[Tensor | None] = ()
    normal: Sequence[Tensor] = ()


class Found(NamedTuple):
    """The results of a backward walk through time.

    Attributes
    ----------
    d_rh : Tensor of shape (N, G * H)
        Gradient of the recurrent part of every gate.
    d_apart : Tensor of shape (N, A * H)
        Gradient of the input part of the last A gates, where it differs from `d_rh`.
    d_fresh : list of Tensor
        Gradient of the states after a reset; empty without breaks.
    projected : sequence of Tensor
        The factors of the gradient of W_hr: the gradient of the projected h, and h before the
        projection.
    d_product : Tensor of shape (heads, N, G * H / heads), optional
        Gradient of the recurrent product before normalization.
    d_output : Tensor of shape (N, H), optional
        Gradient of the last extra weights, for every row.
    """

    d_rh: Tensor
    d_apart: Tensor
    d_fresh: list[Tensor]
    projected: Sequence[Tensor] = ()
    d_product: Tensor | None = None
    d_output: Tensor | None = None


class Direction(NamedTuple):
    """One direction of a layer on a CPU, in the compute dtype.

    In an ensemble whose members run together, all tensors of this and the other records here have a
    leading dimension of members, except zoneout given as one number.

    Attributes
    ----------
    cell : Cell
    w : Weights
    rows : Rows
    reverse : bool
    initial : sequence of Tensor of shape (B, P) and (B, H)
        State before the first step; empty for zeros.
    breaks : Breaks, or an object with its `replace`, optional
    noise : Noise, optional
    """

    cell: Cell
    w: Weights
    rows: Rows
    reverse: bool
    initial: Sequence[Tensor]
    breaks: Breaks | None
    noise: Noise | None = None

    @property
    def lead(self) -> tuple[int, ...]:
        """The dimension of the members of an ensemble, () without one."""
        return tuple(self.w.w_hh.shape[:-2])

    @property
    def num_heads(self) -> int:
        """The number of diagonal blocks of W_hh."""
        return 1 if self.w.w_hr is not None else max(1, self.hidden // self.w.w_hh.shape[-1])

    @property
    def size_h(self) -> int:
        """P."""
        return self.hidden if self.w.w_hr is None else self.w.w_hh.shape[-1]

    @property
    def hidden(self) -> int:
        """H."""
        return self.w.w_hh.shape[-2] // self.cell.n_gates

    def before(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Copy the states before every row, h first, from those after every row."""
        found = []
        for k, part in enumerate(states):
            sizes = *self.lead, self.rows.batch, part.shape[-1]
            first = self.initial[k] if self.initial else part.new_zeros(sizes)
            before = self.rows.previous(part, first, self.reverse)
            found.append(before if self.breaks is None else self.breaks.replace(before, k))
        return found


class Ahead(NamedTuple):
    """A forward walk of one direction through time.

    Attributes
    ----------
    direction : Direction
    x : Tensor of shape (N, I)
    state : sequence of Tensor of shape (B, P) and (B, H)
        Initial state; overwritten by the final state.
    h_rows : Tensor of shape (N, P)
        Receives h.
    kept : Kept
        Receives the rest: if nothing is saved for backward, at most the other states.
    """

    direction: Direction
    x: Tensor
    state: Sequence[Tensor]
    h_rows: Tensor
    kept: Kept


class Back(NamedTuple):
    """A backward walk of one direction through time.

    Attributes
    ----------
    direction : Direction
    d_rows : sequence of Tensor of shape (N, P) and (N, H), or None
        Gradients of the states of every row, h first; None and missing ones are zero.
    d_state : sequence of Tensor
        Gradient of the final state; overwritten by that of the initial state.
    h_rows, kept : Tensor, Kept
        As the forward walk wrote them.
    """

    direction: Direction
    d_rows: Sequence[Tensor | None]
    d_state: Sequence[Tensor]
    h_rows: Tensor
    kept: Kept
