"""Block-diagonal recurrence: heads whose states do not meet inside a layer.

Unit u of head k sees, in the recurrent product, the units of head k only, so a layer of heads is as
many small layers over the same input. Here the tensors of a layer are cut into those of its heads,
and their results are put together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .call import Call, Result
from .cells import Cell
from .flow import Flow


def columns(part: Tensor, head: int, num_heads: int) -> Tensor:
    """Cut the units of a head out of (..., H).

    A tensor of one dimension, which stands for no noise, is left as it is.
    """
    return part if part.dim() == 1 else part.chunk(num_heads, dim=-1)[head]


def rows(cell: Cell, weights: Sequence[Tensor], head: int, num_heads: int) -> list[Tensor]:
    """Cut the rows of a head out of weights (blocks * H, ...), of which ``weight_ih`` is first."""
    units = weights[0].shape[0] // cell.n_gates // num_heads
    return [
        weight.unflatten(0, (-1, num_heads, units))[:, head].flatten(0, 1) for weight in weights
    ]


def join(parts: Sequence[Tensor], blocks: int) -> Tensor:
    """Put the results of all heads, (..., blocks * H / num_heads), together.

    The units of a head are there `blocks` times side by side: for each direction, or each gate.
    """
    return torch.stack([part.unflatten(-1, (blocks, -1)) for part in parts], dim=-2).flatten(-3)


def of_head(call: Call, head: int) -> Call:
    """Make the call of a head of a layer whose ``weight_hh`` is (G * H, H / num_heads)."""
    count = call.options.num_heads
    fresh, noise = ([columns(part, head, count) for part in parts] for parts in call.flow[1:])
    return call._replace(
        state=[columns(part, head, count) for part in call.state],
        weights=rows(call.cell, call.weights, head, count),
        flow=Flow(call.flow.marks, fresh, noise),
        options=call.options._replace(num_heads=1),
    )


def layer(of_one: Callable[[Call], Result], call: Call) -> Result:
    """Run a layer of heads, a call for each."""
    results = [of_one(of_head(call, k)) for k in range(call.options.num_heads)]
    ys, finals, traces = zip(*results, strict=True)
    return Result(
        join(ys, call.directions),
        [torch.cat(parts, dim=-1) for parts in zip(*finals, strict=True)],
        [join(parts, call.directions) for parts in zip(*traces, strict=True)],
    )
