"""Layers made of independent parts: heads, and members of an ensemble.

The recurrent product connects only units of the same head, so a layer with heads is a set of
smaller layers over the same input. The members of an ensemble share only their sizes. This module
splits the tensors of a layer into those of its parts, and joins the results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .call import Call, Result
from .cells import Cell
from .flow import Flow


def columns(part: Tensor, head: int, num_heads: int) -> Tensor:
    """Take the units of a head from (..., H).

    A tensor of one dimension, which is noise common to all units, is returned unchanged.
    """
    return part if part.dim() == 1 else part.chunk(num_heads, dim=-1)[head]


def gates(part: Tensor, blocks: int, head: int, num_heads: int) -> Tensor:
    """Take the units of a head from (..., blocks * H)."""
    return part.unflatten(-1, (blocks, num_heads, -1))[..., head, :].flatten(-2)


def rows(cell: Cell, weights: Sequence[Tensor], head: int, num_heads: int) -> list[Tensor]:
    """Take the rows of a head from weights (blocks * H, ...), of which ``weight_ih`` is first."""
    units = weights[0].shape[0] // cell.n_gates // num_heads
    return [
        weight.unflatten(0, (-1, num_heads, units))[:, head].flatten(0, 1) for weight in weights
    ]


def join(parts: Sequence[Tensor], blocks: int) -> Tensor:
    """Join the results of all heads, (..., blocks * H / num_heads).

    Each result holds `blocks` blocks of a head's units: one per direction, or one per gate.
    """
    if len(parts) == 1:
        return parts[0]
    return torch.stack([part.unflatten(-1, (blocks, -1)) for part in parts], dim=-2).flatten(-3)


def of_head(call: Call, head: int) -> Call:
    """Make the call of a head of a layer whose ``weight_hh`` is (G * H, H / num_heads)."""
    count = call.num_heads
    fresh, noise = ([columns(part, head, count) for part in parts] for parts in call.flow[1:])
    return call._replace(
        state=[columns(part, head, count) for part in call.state],
        weights=rows(call.cell, call.weights, head, count),
        flow=Flow(call.flow.marks, fresh, noise),
    )


def heads(of_one: Callable[[Call], Result], call: Call) -> Result:
    """Run a layer with heads, by one call per head."""
    results = [of_one(of_head(call, k)) for k in range(call.num_heads)]
    ys, finals, traces = zip(*results, strict=True)
    return Result(
        join(ys, call.directions),
        [torch.cat(parts, dim=-1) for parts in zip(*finals, strict=True)],
        [join(parts, call.directions) for parts in zip(*traces, strict=True)],
    )


def of_member(call: Call, member: int) -> Call:
    """Make the call of a member of an ensemble."""
    weights = [weight[member] for weight in call.weights]
    return part_of_batch(call, member, call.members)._replace(weights=weights)


def part_of_batch(call: Call, part: int, parts: int) -> Call:
    """Make the call of one of several equal parts of a padded batch."""

    def of(tensors: Sequence[Any], dim: int = 1) -> list[Any]:
        return [piece(tensor, part, parts, dim) for tensor in tensors]

    marks, fresh, noise = call.flow
    (marks,) = of([marks], 2)
    flow = Flow(marks, of(fresh), [*of(noise[:1]), *of(noise[1:], 2)])
    x, *state = of([call.x, *call.state])
    return call._replace(x=x, state=state, flow=flow)


def piece(tensor: Tensor | None, part: int, parts: int, dim: int = 1) -> Tensor | None:
    """Take a part of the batch, dimension `dim`, from a tensor, if it has that dimension."""
    if tensor is None or tensor.dim() <= dim:
        return tensor
    return tensor.unflatten(dim, (parts, -1)).select(dim, part)


def members(of_one: Callable[[Call], Result], call: Call) -> Result:
    """Run an ensemble, by one call per member."""
    return joined([of_one(of_member(call, m)) for m in range(call.members)])


def joined(results: Sequence[Result]) -> Result:
    """Join the results of the parts of a batch."""
    y, final, traces = zip(*results, strict=True)
    return Result(
        torch.cat(y, dim=1),
        [torch.cat(parts, dim=1) for parts in zip(*final, strict=True)],
        [torch.cat(parts, dim=1) for parts in zip(*traces, strict=True)],
    )
