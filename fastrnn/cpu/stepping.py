"""Single steps with gradients by the compiled kernels, without the records of ``layers.py``.

As in ``inference.py``, what sizes determine is made once, a `Stepping`. Of backward the kernel does
the cell's arithmetic alone: packing weights for a single product would take longer than that, so
all products are torch's.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..call import Call
from ..reference import TORCH
from . import engine, memory
from .arguments import Backward
from .inference import AT, Stack, Y, start

_AT = {field[0]: getattr(Backward, field[0]).offset // 8 for field in Backward._fields_}
_D_STATES, _INITIAL = _AT["d_states"], _AT["initial"]

#: What a step leaves for the gradients of its weights: of every row, those of all gates' input and
#: recurrent parts, x, h before the step, and the gradients of the extra weights, if there are any.
Rows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]

# Operations on a number of a gate, of which the kernel's work consists.
_FLOPS = 32


class Stepping(Stack):
    """A single step of a checked call, for tensors of its sizes in a dtype that sums have too."""

    def __init__(self, call: Call) -> None:
        super().__init__(call, is_step=True)
        cell, batch, hidden, size = call.cell, call.x.shape[0], call.hidden_size, self.y_size
        self.cell, self.n_states, self.n_gates = cell, cell.n_states, cell.n_gates
        self.has_biases = call.by_direction()[0].b_ih is not None
        self.sizes = [batch, hidden]
        self.shared = (cell.n_gates - cell.n_apart) * hidden
        self.of_gates, self.of_all = cell.n_gates * hidden, (cell.n_gates + cell.n_apart) * hidden
        # What is kept: h, apart from the result, which may be overwritten; traces; values.
        n_traces = cell.n_states - 1
        self.kept_sizes = [1 + n_traces + cell.n_saved, batch, hidden]
        traces, saved = (
            [(name, k, size * at) for k, at in enumerate(range(first, first + count))]
            for name, first, count in (
                ("traces", 1, n_traces),
                ("saved", 1 + n_traces, cell.n_saved),
            )
        )
        direction = self.layers[0][0]
        kept = [(AT[name] + k, Y, at) for name, k, at in (*traces, *saved)]
        self.ahead = direction._replace(addresses=[*direction.addresses, *kept])
        numbers = {
            "groups": 1, "steps": 1, "rows": batch, "batch": batch, "hidden": hidden,
            "size_h": hidden, "width": hidden, "width_h": hidden, "pitch": hidden,
            "d_gates_pitch": self.of_all,
        }  # fmt: skip
        self.back = array("q", bytes(ctypes.sizeof(Backward)))
        for name, number in numbers.items():
            self.back[_AT[name]] = number
        self.of_kept = [(_AT["h"], 0), *((_AT[name] + k, at) for name, k, at in (*traces, *saved))]
        self.scratch = self.layout.scratch(batch, self.layout.units, 1)
        self.flops = _FLOPS * batch * self.of_gates
        self.d_extra = TORCH.bind(cell.d_extra) if cell.d_extra else None
        addresses = self.kernels.addresses
        self.kernel_back = engine.KERNEL(addresses["backward"])
        self.region_back = addresses["backward_region"]

    def forward(
        self, x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """Return the new states, and what backward needs; see `run`."""
        x, state = x.contiguous(), [*map(Tensor.contiguous, state)]
        final, threads = [*map(Tensor.clone, state)], self.layout.threads
        kept = x.new_empty(self.kept_sizes)
        space = memory.take("work", self.size + threads * self.per_thread)
        addresses = [*map(Tensor.data_ptr, (x, kept, space, *final, *weights))]
        self._launch(self.ahead, addresses, state[0].data_ptr(), threads)
        del state, space
        return final, kept

    def backward(
        self,
        x: Tensor,
        state: Sequence[Tensor],
        weights: Sequence[Tensor],
        kept: Tensor,
        d_final: Sequence[Tensor | None],
        needs: Sequence[bool],
    ) -> tuple[list[Tensor | None], Rows]:
        """Return the gradients of x and states, as far as they are needed, and a step's rows."""
        # What unpacks saved tensors may bring them back in another layout.
        kept, *state = map(Tensor.contiguous, (kept, *state))
        d_state = [x.new_zeros(self.sizes) if part is None else _copy(part) for part in d_final]
        d_gates = x.new_empty(self.sizes[0], self.of_all)
        self._launch_back(state, weights, kept, d_state, d_gates)
        d_rh = d_wx = d_gates
        if self.of_all > self.of_gates:
            d_rh = d_gates[:, : self.of_gates]
            d_wx = torch.cat([d_gates[:, : self.shared], d_gates[:, self.of_gates :]], dim=1)
        if needs[1]:
            d_state[0].add_(d_rh.mm(weights[1]))  # a sum that begins at the other part rounds more
        d_extra = None
        if self.d_extra is not None:
            made = kept[: self.n_states].unbind()
            d_extra = torch.cat(self.d_extra(d_rh.chunk(self.n_gates, 1), made, state), 1)
        dx = d_wx.mm(weights[0]) if needs[0] else None
        return [dx, *d_state], (d_wx, d_rh, x, state[0], d_extra)

    def d_weights(self, rows: Sequence[Rows], needs: Sequence[bool]) -> list[Tensor | None]:
        """Return the gradients of the weights, as far as they are needed, of several steps."""
        found: list[Tensor | None] = [None] * len(needs)
        d_wx, d_rh, x, h, d_extra = (_joined(part) for part in zip(*rows, strict=True))
        if needs[0]:
            found[0] = d_wx.t().mm(x)
        if needs[1]:
            found[1] = d_rh.t().mm(h)
        if self.has_biases and (needs[2] or needs[3]):
            found[2] = of_wx = d_wx.sum(0)
            found[3] = of_wx.clone() if self.of_all == self.of_gates else d_rh.sum(0)
        if self.d_extra is not None:
            found[-1] = d_extra.sum(0)
        return found

    def _launch_back(
        self,
        state: Sequence[Tensor],
        weights: Sequence[Tensor],
        kept: Tensor,
        d_state: Sequence[Tensor],
        d_gates: Tensor,
    ) -> None:
        arguments, first = self.back[:], kept.data_ptr()
        for at, beyond in self.of_kept:
            arguments[at] = first + beyond
        for k, (part, d_part) in enumerate(zip(state, d_state, strict=True)):
            arguments[_INITIAL + k] = part.data_ptr()
            arguments[_D_STATES + k] = d_part.data_ptr()
        arguments[_AT["d_gates"]] = d_gates.data_ptr()
        extra = weights[-1].contiguous()
        if self.d_extra is not None:
            arguments[_AT["extra"]] = extra.data_ptr()
        threads = engine.threads(self.flops, self.layout.slices)
        space = memory.take("work", threads * self.scratch)
        arguments[_AT["scratch"]] = space.data_ptr()
        start(self.kernel_back, self.region_back, arguments, threads)


def _copy(part: Tensor) -> Tensor:
    return part.clone(memory_format=torch.contiguous_format)


def _joined(parts: Sequence[Any]) -> Any:
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(list(parts))
