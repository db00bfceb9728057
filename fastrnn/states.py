"""The states of all steps and the gates, for ``return_states``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import flow as flows
from . import gradients, groups
from .call import Call, Result, Weights
from .context import is_plain
from .options import States
from .reference import TORCH, Steps


def states_of(call: Call, inputs: Sequence[Tensor], results: Sequence[Result]) -> States:
    """Assemble the states of all steps from the inputs and results of all layers."""
    h, *others = (
        torch.cat(
            [part.unflatten(-1, (call.directions, -1)).transpose(1, 2) for part in parts], dim=1
        )
        for parts in zip(*([r.y, *r.traces] for r in results), strict=True)
    )
    gates = _gates(call, inputs, h) if call.options.return_states == "gates" else None
    return States(h, others[0] if others else None, gates, *others[1:])


def _gates(call: Call, inputs: Sequence[Tensor], h: Tensor) -> Tensor:
    """Recompute the gate activations of all steps from the states, differentiably."""
    cell, flow, h_0 = call.cell, call.flow, call.initial()[0]
    count, num_heads = call.n_weights, call.num_heads

    def of_rows(*tensors: Tensor) -> Tensor:
        # In half precision the derivative of a normalization would overflow.
        exact = torch.promote_types(tensors[0].dtype, torch.float32)
        x, before, *weights = (part.to(exact) for part in tensors)
        steps = Steps(cell, Weights.unpack(weights, len(cell.extras)))
        wx, rh = (
            part.chunk(cell.n_gates, dim=-1)
            for part in (steps.input_part(x), steps.recurrent_part(before))
        )
        return torch.cat(TORCH.bind(cell.activations)(wx, rh), dim=-1).to(tensors[0].dtype)

    parts = []
    for n in range(len(call.weights) // count):
        d = n % call.directions
        own, first = h[:, n], h_0[n : n + 1]
        before = torch.cat([own[1:], first] if d else [first, own[:-1]])
        if flow.marks is not None:
            mark = flow.marks[d, :, :, None]
            before = torch.where(mark & flows.START != 0, first, before)
            before = torch.where(mark & flows.CUT != 0, before.detach(), before)
            fresh = flow.fresh[0][n] if flow.fresh else torch.zeros_like(first)
            before = torch.where(mark & flows.FRESH != 0, fresh, before)
        x = inputs[n // call.directions]
        if flow.noise and flows.is_given(flow.noise[0]):
            before = before * flow.noise[0][n]
        if flow.marks is not None:
            held = mark & flows.HOLD != 0
            x, before = x.masked_fill(held, 0.0), before.masked_fill(held, 0.0)
        of_n = call.weights[n * count : (n + 1) * count]
        of_heads = []
        for k in range(num_heads):
            own_rows = groups.rows(cell, of_n, k, num_heads) if num_heads > 1 else of_n
            own_before = groups.columns(before, k, num_heads)
            if flow.marks is not None and is_plain(x, *call.weights):
                of_heads.append(gradients.by_rows(of_rows, (x, own_before), own_rows))
            else:
                of_heads.append(of_rows(x, own_before, *own_rows))
        gates = groups.join(of_heads, cell.n_gates) if num_heads > 1 else of_heads[0]
        if flow.marks is not None:
            gates = gates.masked_fill(held, 0.0)
        parts.append(gates)
    return torch.stack(parts, dim=1)
