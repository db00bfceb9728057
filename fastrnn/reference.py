"""The reference implementation: one loop over the steps, in plain differentiable PyTorch.

It defines what every other path computes. Run in float64 it is the oracle of the tests, and second
derivatives use it. It is written for clarity, not speed. Shapes are those of ``call.py``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import groups
from .call import Call, Result, Weights
from .cells import CELLS, EPSILON, Cell, Engine
from .flow import CUT, FRESH, HOLD, Flow, is_given

State = tuple[Tensor, ...]


def _normalize(v: Tensor) -> Tensor:
    """Normalize the last dimension.

    ``torch.nn.functional.layer_norm`` is not used: its third derivatives are wrong (torch 2.13).
    """
    centered = v - v.mean(dim=-1, keepdim=True)
    variance = centered.square().mean(dim=-1, keepdim=True)
    return centered * torch.rsqrt(variance + EPSILON)


#: The engine that computes cells on tensors.
TORCH = Engine(
    {
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "relu": torch.relu,
        "exp": torch.exp,
        "log_sigmoid": torch.nn.functional.logsigmoid,
        "maximum": torch.maximum,
        "where": torch.where,
        "zeros_like": torch.zeros_like,
    }
)


for _cell in CELLS.values():  # now, because a compiler cannot trace the creation of functions
    for _function in (_cell.forward, _cell.activations, *(_cell.late or ()), *(_cell.output or ())):
        if callable(_function):
            TORCH.bind(_function)


def _product(v: Tensor, matrix: Tensor, bias: Tensor | None, gain: Tensor | None = None) -> Tensor:
    """The input or recurrent part of the gates, with its bias: (..., G * H) from (..., I or P).

    With a gain, it is normalized over all gates before the bias is added.
    """
    if gain is None:
        return torch.nn.functional.linear(v, matrix, bias)
    normal = _normalize(torch.nn.functional.linear(v, matrix)) * gain
    return normal if bias is None else normal + bias


class Steps:
    """The steps of one direction of a layer.

    Parameters
    ----------
    cell : Cell
    w : Weights
    """

    def __init__(self, cell: Cell, w: Weights) -> None:
        self.cell, self.w, self.extra = cell, w, w.blocks()
        gains: Any = w.extras[:2] if cell.is_normalized else (None, None)
        self.gain_ih, self.gain_hh = gains
        self.forward = TORCH.bind(cell.forward)

    def input_part(self, x: Tensor) -> Tensor:
        """The input part of the gates of any number of steps, (..., G * H), from (..., I)."""
        return _product(x, self.w.w_ih, self.w.b_ih, self.gain_ih)

    def recurrent_part(self, h: Tensor) -> Tensor:
        """The recurrent part of the gates, (..., G * H), from (..., P)."""
        return _product(h, self.w.w_hh, self.w.b_hh, self.gain_hh)

    def advance(self, wx: Tensor, h: Tensor, state: State) -> State:
        """Compute the new state from the input part of the gates, (B, G * H).

        `h` is the operand of the recurrent weights: that of the state, possibly after dropout.
        """
        cell = self.cell
        of_gates = wx.chunk(cell.n_gates, dim=-1)
        rh = self._late_parts(of_gates, h) if cell.late else self.recurrent_part(h)
        new, _ = self.forward(of_gates, rh.chunk(cell.n_gates, dim=-1), state, self.extra)
        if cell.output is not None:
            shown = TORCH.bind(cell.output.forward)
            new = (shown(new[0], _normalize(new[-1]), self.extra), *new[1:])
        return (new[0] if self.w.w_hr is None else new[0] @ self.w.w_hr.t(), *new[1:])

    def _late_parts(self, wx: Sequence[Tensor], h: Tensor) -> Tensor:
        """The recurrent part if the last gates take h times a factor."""
        late: Any = self.cell.late
        n_early, hidden = self.cell.n_gates - late.n_gates, wx[0].shape[-1]
        sizes = [n_early * hidden, late.n_gates * hidden]
        first, last = self.w.w_hh.split(sizes)
        b_first, b_last = (None, None) if self.w.b_hh is None else self.w.b_hh.split(sizes)
        early = _product(h, first, b_first)
        factor = TORCH.bind(late.factor)(wx, early.chunk(n_early, dim=-1))
        return torch.cat([early, _product(factor * h, last, b_last)], dim=-1)


def step(call: Call) -> State:
    """Run one step of a cell: the two affine maps, then the pointwise part."""
    steps = Steps(call.cell, call.by_direction()[0])
    return steps.advance(steps.input_part(call.x), call.state[0], tuple(call.state))


def layer(call: Call) -> Result:
    """Run one layer over a whole sequence, in one or both directions."""
    if call.members:
        return groups.members(layer, call)
    if call.num_heads > 1:
        return groups.heads(layer, call)
    x, flow = call.x, call.flow
    sizes = [x.shape[1]] * x.shape[0] if call.batch_sizes is None else call.batch_sizes.tolist()
    state = call.initial()
    sequences, finals = [], []
    for d, w in enumerate(call.by_direction()):
        steps = Steps(call.cell, w)
        own = x
        if flow.marks is not None:
            # Padding may hold anything, such as NaN, which would reach the weight gradients.
            own = x.masked_fill(((flow.marks[d] & HOLD) != 0).unsqueeze(-1), 0.0)
        wx = steps.input_part(own).flatten(0, -2).split(sizes)
        s = tuple(part[d] for part in state)
        outputs: list[State] = []
        for t in reversed(range(len(sizes))) if d else range(len(sizes)):
            n = sizes[t]
            new = _step(steps, wx[t], tuple(part[:n] for part in s), flow, d, t)
            s = new if n == sizes[0] else _with_rest(new, s)
            outputs.append(_without_held(new, flow, d, t))
        sequence = outputs[::-1] if d else outputs
        sequences.append([torch.cat(parts) for parts in zip(*sequence, strict=True)])
        finals.append(s)
    # The last operation makes no view: autograd forbids in-place changes of views from operators.
    y, *traces = (
        torch.cat([part.unflatten(0, x.shape[:-1]) for part in parts], dim=-1)
        for parts in zip(*sequences, strict=True)
    )
    return Result(y, [torch.stack(parts) for parts in zip(*finals, strict=True)], traces)


def _step(steps: Steps, wx: Tensor, state: State, flow: Flow, d: int, t: int) -> State:
    """Run one step of a direction, following the marks."""
    before = state
    if flow.marks is not None:
        mark = flow.marks[d, t].unsqueeze(-1)
        cut, fresh, held = ((mark & bit) != 0 for bit in (CUT, FRESH, HOLD))
        # Held states may hold anything too, so they are replaced before the product.
        replaced = [part[d].masked_fill(held, 0.0) for part in flow.fresh]
        replaced = replaced or [torch.zeros_like(part) for part in state]
        state = tuple(
            torch.where(fresh | held, new, torch.where(cut, old.detach(), old))
            for new, old in zip(replaced, state, strict=True)
        )
    drop, *zones = flow.noise or (None,)
    h = state[0] if drop is None or not is_given(drop) else state[0] * drop[d]
    new = steps.advance(wx, h, state)
    if zones:
        triples = zip(zones, state, new, strict=True)
        new = tuple(_zoned(zone, d, t, before, after) for zone, before, after in triples)
    if not torch.compiler.is_compiling() and is_watched():
        _watching.record.append(new)  # type: ignore[union-attr]
    if flow.marks is None:
        return new
    return tuple(torch.where(held, a, b) for a, b in zip(before, new, strict=True))


def _zoned(zone: Tensor, d: int, t: int, before: Tensor, after: Tensor) -> Tensor:
    """Apply zoneout: mix the states before and after the step."""
    if not is_given(zone):
        return after
    if zone.dim() == 1:  # one fraction for all units
        return torch.lerp(after, before, zone)
    return torch.where(zone[d, t], before, after)


class _Watching(threading.local):
    record: list[State] | None = None


_watching = _Watching()


@contextlib.contextmanager
def watch(record: list[State]) -> Iterator[None]:
    """Record the states of every step of `layer` in this thread, as nodes of autograd's graph.

    Parameters
    ----------
    record : list
        Each step appends its new state, a tuple of Tensor of shape (B, P) and (B, H), ordered by
        call, then by direction, then in the order in which the direction visits the steps.
    """
    before, _watching.record = _watching.record, record
    try:
        yield
    finally:
        _watching.record = before


def is_watched() -> bool:
    """Tell whether `watch` is active in this thread."""
    return _watching.record is not None


def _with_rest(new: State, old: State) -> State:
    """Append the old states of the rows that a step does not have to the new states."""
    return tuple(torch.cat([a, b[a.shape[0] :]]) for a, b in zip(new, old, strict=True))


def _without_held(state: State, flow: Flow, d: int, t: int) -> State:
    """Zero the states of the rows that do not have the step."""
    if flow.marks is None:
        return state
    held = (flow.marks[d, t].unsqueeze(-1) & HOLD) != 0
    return tuple(part.masked_fill(held, 0.0) for part in state)


def stack(
    call: Call, layer: Callable[[Call], Result] = layer
) -> tuple[list[Tensor], list[Result], list[Tensor]]:
    """Run several layers with dropout between them, as a whole ``torch.nn.LSTM`` does.

    `layer` runs one layer; by default it is that of this file. Returns the inputs and the results
    of all layers, and the final state, shaped as the initial one.
    """
    inputs, results = [call.x], [layer(call.layer(0, call.x))]
    if call.num_layers == 1:
        return inputs, results, results[0].final
    for k in range(1, call.num_layers):
        options = call.options
        inputs.append(torch.dropout(results[-1].y, options.dropout, options.training))
        results.append(layer(call.layer(k, inputs[-1])))
    final = [torch.cat(parts) for parts in zip(*(r.final for r in results), strict=True)]
    return inputs, results, final
