"""Run a layer in chunks of steps, so that backward needs the memory of one chunk only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import flow as flows
from .call import Call, Result
from .flow import Flow


def layer(of_chunk: Callable[[Call], Result], steps: int, call: Call) -> Result:
    """Run an unpacked layer, calling `of_chunk` for each direction and each chunk of `steps`."""
    x, flow, count = call.x, call.flow, call.n_weights
    sequences, finals = [], []
    initial = call.initial()
    for d in range(call.directions):
        of_d = slice(d, d + 1)
        walk = _Walk(x.shape[0], d == 1, flow.marks)
        state = [part[of_d] for part in initial]
        _, fresh, noise = flow.some(of_d)
        of_direction = call._replace(
            weights=call.weights[d * count : (d + 1) * count], bidirectional=False
        )
        outputs = []
        for start in range(0, x.shape[0], steps):
            of_t = slice(start, start + steps)
            marks = None if flow.marks is None else walk.take(flow.marks[d], of_t)[None]
            zones = [z if z.dim() == 1 else walk.take(z[0], of_t)[None] for z in noise[1:]]
            flow_t = Flow(marks, fresh, [*noise[:1], *zones])
            y, state, traces = of_chunk(
                of_direction._replace(x=walk.take(x, of_t), state=state, flow=flow_t)
            )
            outputs.append((y, *traces))
        # Reordering twice restores the original order.
        whole = slice(0, x.shape[0])
        sequences.append([walk.take(torch.cat(p), whole) for p in zip(*outputs, strict=True)])
        finals.append(state)
    y, *traces = (torch.cat(parts, dim=-1) for parts in zip(*sequences, strict=True))
    return Result(y, [torch.cat(parts) for parts in zip(*finals, strict=True)], traces)


class _Walk:
    """The order in which a direction visits the steps of each row, with padding last."""

    def __init__(self, steps: int, reverse: bool, marks: Tensor | None) -> None:
        self.steps, self.reverse, self.order = steps, reverse, None
        if reverse and marks is not None:
            time = torch.arange(steps, device=marks.device)[:, None]
            held = marks[0] & flows.HOLD != 0
            self.order = torch.where(held, time, steps - held.sum(0) - 1 - time)

    def take(self, part: Tensor, of_t: slice) -> Tensor:
        """Take a slice of steps, in the order of the direction, from a tensor (T, B, ...)."""
        if not self.reverse:
            return part[of_t]
        if self.order is None:
            stop = min(of_t.stop, self.steps)
            return part[self.steps - stop : self.steps - of_t.start].flip(0)
        index = self.order[of_t]
        index = index.view(*index.shape, *[1] * (part.dim() - 2))
        return part.gather(0, index.expand(-1, -1, *part.shape[2:]))
