"""Block-diagonal recurrence: heads whose states do not meet inside a layer.

Unit u of head k sees, in the recurrent product, the units of head k only, so a layer of heads is as
many small layers over the same input. Here the tensors of a layer are cut into those of its heads,
and their results are put together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .cells import CELLS
from .flow import PLAIN, Flow
from .reference import Result


def columns(part: Tensor, head: int, num_heads: int) -> Tensor:
    """Cut the units of a head out of a tensor that has all units in its last dimension.

    Parameters
    ----------
    part : Tensor of shape (..., H)
        One dimension stands for something that is not there.
    head, num_heads : int

    Returns
    -------
    Tensor of shape (..., H / num_heads)
    """
    return part if part.dim() == 1 else part.chunk(num_heads, dim=-1)[head]


def rows(cell: str, weights: Sequence[Tensor], head: int, num_heads: int) -> list[Tensor]:
    """Cut the rows of a head out of weights, each of which has some blocks of H rows.

    Parameters
    ----------
    cell : str
    weights : sequence of Tensor of shape (blocks * H, ...)
        The first is ``weight_ih``.
    head, num_heads : int

    Returns
    -------
    list of Tensor of shape (blocks * H / num_heads, ...)
    """
    units = weights[0].shape[0] // CELLS[cell].n_gates // num_heads
    return [
        weight.unflatten(0, (-1, num_heads, units))[:, head].flatten(0, 1) for weight in weights
    ]


def join(parts: Sequence[Tensor], blocks: int) -> Tensor:
    """Put the results of all heads together.

    Parameters
    ----------
    parts : sequence of Tensor of shape (..., blocks * H / num_heads)
    blocks : int
        How many times there are the units of a head side by side: directions, or gates.

    Returns
    -------
    Tensor of shape (..., blocks * H)
    """
    return torch.stack([part.unflatten(-1, (blocks, -1)) for part in parts], dim=-2).flatten(-3)


def of_head(flow: Flow, head: int, num_heads: int) -> Flow:
    """Cut what a layer is told about the flow of its state.

    Parameters
    ----------
    flow : Flow
    head, num_heads : int

    Returns
    -------
    Flow
    """
    fresh, noise = (
        [columns(part, head, num_heads) for part in parts] for parts in (flow.fresh, flow.noise)
    )
    return Flow(flow.marks, fresh, noise)


def layer(
    of_one: Callable[..., Result],
    num_heads: int,
    cell: str,
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
    bidirectional: bool = False,
    flow: Flow = PLAIN,
) -> Result:
    """Run a layer of heads, a call for each.

    Parameters
    ----------
    of_one : callable
        As ``reference.layer``.
    num_heads : int
    cell, x, state, weights, batch_sizes, bidirectional, flow
        As for ``reference.layer``, with ``weight_hh`` of shape (G * H, H / num_heads).

    Returns
    -------
    Result
    """
    results = [
        of_one(
            cell,
            x,
            [columns(part, k, num_heads) for part in state],
            rows(cell, weights, k, num_heads),
            batch_sizes,
            bidirectional,
            of_head(flow, k, num_heads),
        )
        for k in range(num_heads)
    ]
    ys, finals, traces = zip(*results, strict=True)
    directions = 2 if bidirectional else 1
    return Result(
        join(ys, directions),
        [torch.cat(parts, dim=-1) for parts in zip(*finals, strict=True)],
        [join(parts, directions) for parts in zip(*traces, strict=True)],
    )
