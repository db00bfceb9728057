"""How the state flows between steps, if not simply from each step to the next.

Lengths, resets and truncated backpropagation through time are encoded in one small tensor, with a
mark for each direction, step and row, which every path reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Bits of a mark. HOLD: the row does not have this step; its state is kept and the output is 0.
#: FRESH: the state is replaced before the step. CUT: no gradient flows from this step to the state
#: before it. START: the row's first step in the order of the direction.
HOLD, FRESH, CUT, START = 1, 2, 4, 8


class Flow(NamedTuple):
    """The arguments of a layer besides input, state and weights.

    Attributes
    ----------
    marks : uint8 Tensor of shape (D, T, B), optional
    fresh : sequence of Tensor of shape (D, B, P) and (D, B, H)
        State after a reset; zeros if empty.
    noise : sequence of Tensor
        Empty, or first the dropout factors of h in the recurrent product, (D, B, P), then the
        zoneout of each state: a bool mask of the units that keep their previous value,
        (D, T, B, P) and (D, T, B, H), or the fraction of it that all units keep, (1,). A tensor of
        shape (0,) stands for none.
    """

    marks: Tensor | None = None
    fresh: Sequence[Tensor] = ()
    noise: Sequence[Tensor] = ()

    def some(self, which: slice) -> Flow:
        """Make the flow of a slice of the directions, with the same marks.

        Parameters
        ----------
        which : slice

        Returns
        -------
        Flow
        """
        fresh = [part[which] for part in self.fresh]
        # A tensor of one dimension is shared by all directions.
        noise = [part if part.dim() == 1 else part[which] for part in self.noise]
        return Flow(self.marks, fresh, noise)


PLAIN = Flow()


def is_given(noise: Tensor) -> bool:
    """Tell whether a noise tensor is more than a placeholder for none.

    Parameters
    ----------
    noise : Tensor

    Returns
    -------
    bool
    """
    return noise.dim() != 1 or noise.shape[0] != 0


def make_marks(
    steps: int,
    batch: int,
    directions: int,
    device: torch.device,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    bptt: int | None = None,
) -> Tensor | None:
    """Make the marks of a batch of sequences.

    Parameters
    ----------
    steps, batch, directions : int
    device : torch.device
    lengths : integer Tensor of shape (B,), optional
        Number of steps of each row, from 0 to T.
    reset : bool Tensor of shape (T, B), optional
        Whether a new sequence starts at a step. Nothing crosses this boundary, in either direction.
    bptt : int, optional
        Steps after which gradients are cut, counted from the first step, in both directions.

    Returns
    -------
    Tensor of shape (D, T, B), or None if there is nothing to mark
    """
    if lengths is None and reset is None and bptt is None:
        return None
    marks = torch.zeros(steps, batch, dtype=torch.uint8, device=device)
    time = torch.arange(steps, device=device)[:, None]
    if reset is not None:
        marks = marks | reset.to(torch.uint8) * FRESH
    if bptt is not None:
        marks = marks | ((time % bptt == 0) & (time > 0)).to(torch.uint8) * CUT
    last = time == steps - 1
    if lengths is not None:
        held = time >= lengths
        marks = marks.masked_fill(held, 0)
        last = time == lengths - 1
    # The reverse direction crosses the boundary before step t when it enters step t - 1.
    # (Not by concatenation, for which torch.export would specialize on whether T is 2.)
    behind = marks.roll(-1, 0).masked_fill(time == steps - 1, 0)
    both = [marks | (time == 0).to(torch.uint8) * START, behind | last.to(torch.uint8) * START]
    if lengths is not None:
        both = [part.masked_fill(held, HOLD) for part in both]
    return torch.stack(both[:directions])


def without_unasked(marks: Tensor, given: Any, bit: int) -> tuple[Tensor, Tensor]:
    """Find the steps that no gradient reaches, and mark them for backward.

    Nothing after a reset depends on what came before. Even if values before it are NaN, the
    gradients of later steps must be finite; but 0 times NaN is NaN, so backward has to skip the
    steps that no gradient reaches.

    Parameters
    ----------
    marks : uint8 Tensor of shape (D, T, B)
    given : fastrnn.call.Cotangents
        Gradients of the output, the final states, and the states of all steps.
    bit : int
        The bit that marks such a step, in place of FRESH and CUT.

    Returns
    -------
    marks : uint8 Tensor of shape (D, T, B)
    unasked : bool Tensor of shape (D, T, B)
        Those steps, without those past the end of a row.
    """
    dy, d_final, d_traces = given
    directions = marks.shape[0]
    held, fresh = (marks & HOLD) != 0, (marks & FRESH) != 0
    asked, at_end = torch.zeros_like(held), torch.zeros_like(held[:, 0])
    for part in d_traces if dy is None else (dy, *d_traces):
        asked = asked | (part.unflatten(-1, (directions, -1)) != 0).any(-1).permute(2, 0, 1)
    for part in d_final:
        at_end = at_end | (part != 0).any(-1)
    unasked = []
    for d in range(directions):
        # In the order in which backward visits the steps; a fresh step ends a sequence.
        is_asked, is_fresh = (part[d] if d else part[d].flip(0) for part in (asked & ~held, fresh))
        count = is_asked.cumsum(0) + at_end[d]
        before = torch.cat([torch.zeros_like(count[:1]), count[:-1]])
        in_others = before.masked_fill(~is_fresh.roll(1, 0), 0).cummax(0).values
        is_none = count == in_others
        unasked.append(is_none if d else is_none.flip(0))
    found = torch.stack(unasked) & ~held
    return torch.where(found, marks & START | bit, marks), found
