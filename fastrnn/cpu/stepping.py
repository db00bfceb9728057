"""Single steps with gradients by the compiled kernels, without the records of ``layers.py``.

As in ``inference.py``, everything that depends only on sizes is prepared once, in a `Stepping`. In
backward the kernel does only the cell's arithmetic. Packing weights for a single product would take
longer than the product, so torch computes the products. If a product comes between two parts of the
arithmetic, as a late product does, torch computes both parts too.
"""

from __future__ import annotations

import ctypes
import itertools
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import Call, Weights
from ..reference import TORCH
from . import engine, memory
from .arguments import Backward, pass_blocks
from .direction import Direction, Found, Kept
from .inference import AT, OF_LAYER, WORK, Stack, Y, start
from .rows import Rows
from .walk import Walk

_AT = {field[0]: getattr(Backward, field[0]).offset // 8 for field in Backward._fields_}
_D_STATES, _INITIAL = _AT["d_states"], _AT["initial"]

# Estimated operations per gate element in the backward kernel.
_FLOPS = 32


class StepRows(NamedTuple):
    """What a step stores for its weight gradients, for every row of the batch.

    Attributes
    ----------
    d_wx, d_rh : Tensor of shape (B, G * H)
        Gradients of the input part and the recurrent part of every gate.
    x, h : Tensor of shape (B, I) and (B, H)
        The input, and h before the step.
    late : Tensor of shape (B, H), optional
        Operand of the last gates' product.
    d_extra : Tensor of shape (B, E * H), optional
        Gradients of the extra weights.
    """

    d_wx: Tensor
    d_rh: Tensor
    x: Tensor
    h: Tensor
    late: Tensor | None = None
    d_extra: Tensor | None = None


class Stepping(Stack):
    """A single step, prepared for tensors of the same sizes, in float32 or float64."""

    def __init__(self, call: Call) -> None:
        super().__init__(call, is_step=True)
        cell, batch, hidden = call.cell, call.x.shape[0], call.hidden_size
        self.n_states, self.has_biases = cell.n_states, call.by_direction()[0].b_ih is not None
        self.sizes = [batch, hidden]
        self.shared = (cell.n_gates - cell.n_apart) * hidden
        self.early = (cell.n_gates - (cell.late.n_gates if cell.late else 0)) * hidden
        self.of_gates, self.of_all = cell.n_gates * hidden, (cell.n_gates + cell.n_apart) * hidden
        # What is kept: a copy of h, because the result may be overwritten; traces; saved values;
        # and, for normalized products, all that ``Kept.normal`` lists.
        normal = [self.of_gates, 2, self.of_gates, cell.n_moments] if cell.is_normalized else []
        self.widths = [hidden] * (cell.n_states + cell.n_saved) + normal
        starts = itertools.accumulate((batch * width for width in self.widths), initial=0)
        names = [("h", 0), *(("traces", k) for k in range(cell.n_states - 1))]
        names += [("saved", k) for k in range(cell.n_saved)]
        names += [("", 0), ("", 0), ("normal", 0), ("moments", 0)] if normal else []
        itemsize = call.x.element_size()
        places = [
            (*name, at * itemsize) for name, at in zip(names, starts, strict=False) if name[0]
        ]
        layer, pitch = self.layers[0], cell.n_moments
        self.ahead = layer._replace(
            arguments=layer.arguments[:],
            addresses=[*layer.addresses, *((AT[name] + k, Y, at) for name, k, at in places)],
        )
        self.ahead.arguments[AT["moments_pitch"]] = pitch
        numbers = {
            "groups": 1, "steps": 1, "rows": batch, "batch": batch, "hidden": hidden,
            "size_h": hidden, "width": hidden, "width_h": hidden, "pitch": hidden,
            "d_gates_pitch": self.of_all, "moments_pitch": pitch,
        }  # fmt: skip
        self.back = array("q", bytes(ctypes.sizeof(Backward)))
        for name, number in numbers.items():
            self.back[_AT[name]] = number
        self.of_kept = [(_AT[name] + k, at) for name, k, at in places]
        self.flops = _FLOPS * batch * self.of_gates
        addresses = self.kernels.addresses
        self.kernel_back = engine.KERNEL(addresses["backward"])
        self.region_back = addresses["backward_region"]
        self.d_extra = TORCH.bind(cell.d_extra) if cell.d_extra else None

    def forward(
        self, x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """Return the new states, and the tensor to keep for backward; see `run`."""
        x, state = x.contiguous(), [*map(Tensor.contiguous, state)]
        final = [*map(Tensor.clone, state)]
        kept = x.new_empty(self.sizes[0] * sum(self.widths))
        space = memory.take("work", self.size)
        addresses = [*OF_LAYER, *map(Tensor.data_ptr, (*final, *weights))]
        addresses[: WORK + 1] = map(Tensor.data_ptr, (x, kept, space))
        normal = self._views(kept)[-4:-2] if self.is_normalized else ()
        self._launch(self.ahead, x, weights, addresses, state[0].data_ptr(), normal)
        del state, space
        return final, kept

    def _views(self, kept: Tensor) -> list[Tensor]:
        """Split the kept tensor into its parts, (B, width)."""
        batch = self.sizes[0]
        parts = kept.split([batch * width for width in self.widths])
        return [part.view(batch, -1) for part in parts]

    def backward(
        self,
        x: Tensor,
        state: Sequence[Tensor],
        weights: Sequence[Tensor],
        kept: Tensor,
        d_final: Sequence[Tensor | None],
        needs: Sequence[bool],
    ) -> tuple[list[Tensor | None], StepRows | Walk]:
        """Return the gradients of x and states that are needed, and the step's rows.

        For a normalized cell the rows are a walk of one step.
        """
        # Hooks on saved tensors may return them in another layout.
        kept, *state = map(Tensor.contiguous, (kept, *state))
        d_state = [x.new_zeros(self.sizes) if part is None else _copy(part) for part in d_final]
        if self.cell.late is not None:
            found, d_state = self._back_by_torch(state, weights, kept, d_state)
        else:
            found = self._launch_back(state, weights, kept, d_state)
        rows: StepRows | Walk
        if self.is_normalized:
            rows = self._walk(x, state, weights, kept, found)
            d_input = rows.of_input().d_shared if needs[0] else found.d_rh
        else:
            rows = self._rows(x, state, kept, found)
            d_input = rows.d_wx
        if needs[1]:
            d_product = found.d_rh if found.d_product is None else found.d_product[0]
            # Adding in the other order would round more.
            d_state[0].add_(d_product[:, : self.early].mm(weights[1][: self.early]))
        dx = d_input.mm(weights[0]) if needs[0] else None
        return [dx, *d_state], rows

    def _rows(self, x: Tensor, state: Sequence[Tensor], kept: Tensor, found: Found) -> StepRows:
        cell, (d_rh, d_apart, *_) = self.cell, found
        d_wx, late, d_extra = d_rh, None, None
        if cell.n_apart:
            d_wx = torch.cat([d_rh[:, : self.shared], d_apart], dim=1)
        if cell.late is not None:
            late = self._views(kept)[self.n_states + cell.late.saved] * state[0]
        if self.d_extra is not None:
            made = self._views(kept)[: self.n_states]
            d_extra = torch.cat(self.d_extra(d_rh.chunk(cell.n_gates, 1), made, state), 1)
        return StepRows(d_wx, d_rh, x, state[0], late, d_extra)

    def _walk(
        self,
        x: Tensor,
        state: Sequence[Tensor],
        weights: Sequence[Tensor],
        kept: Tensor,
        found: Found,
    ) -> Walk:
        views, w = self._views(kept), Weights.unpack(weights, self.n_extras)
        rows = Rows(1, x.shape[0], None)
        direction = Direction(self.cell, w, rows, False, state, None)
        return Walk(direction, x, views[: self.n_states], Kept(normal=views[-4:]), found)

    def d_weights(
        self, rows: Sequence[StepRows | Walk], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Return the weight gradients of several steps, None for those that are not needed."""
        if self.is_normalized:
            walk = _joined_walks(rows)
            found = walk.d_weights(walk.of_input())
            return [part if need else None for part, need in zip(found, needs, strict=True)]
        return self._d_weights(StepRows(*map(_joined, zip(*rows, strict=True))), needs)

    def _d_weights(self, rows: StepRows, needs: Sequence[bool]) -> list[Tensor | None]:
        d_wx, d_rh, x, h, late, d_extra = rows
        found: list[Tensor | None] = [None] * len(needs)
        if needs[0]:
            found[0] = d_wx.t().mm(x)
        if needs[1]:
            of_early, of_late = d_rh.tensor_split([self.early], dim=1)
            parts = [of_early.t().mm(h)] + ([] if late is None else [of_late.t().mm(late)])
            found[1] = _joined(parts)
        if self.has_biases and (needs[2] or needs[3]):
            found[2] = of_wx = d_wx.sum(0)
            found[3] = of_wx.clone() if self.of_all == self.of_gates else d_rh.sum(0)
        if d_extra is not None:
            found[-1] = d_extra.sum(0)
        return found

    def _launch_back(
        self,
        state: Sequence[Tensor],
        weights: Sequence[Tensor],
        kept: Tensor,
        d_state: Sequence[Tensor],
    ) -> Found:
        arguments, first = self.back[:], kept.data_ptr()
        cell, (batch, hidden) = self.cell, self.sizes
        for at, beyond in self.of_kept:
            arguments[at] = first + beyond
        for k, (part, d_part) in enumerate(zip(state, d_state, strict=True)):
            arguments[_INITIAL + k] = part.data_ptr()
            arguments[_D_STATES + k] = d_part.data_ptr()
        d_gates = kept.new_empty(batch, self.of_all)
        arguments[_AT["d_gates"]] = d_gates.data_ptr()
        d_product = d_output = None
        if cell.is_normalized:
            d_product = kept.new_empty(1, batch, self.of_gates)
            arguments[_AT["d_product"]] = d_product.data_ptr()
        if cell.output is not None:
            d_output = kept.new_empty(batch, hidden)
            arguments[_AT["d_output"]] = d_output.data_ptr()
        extra = torch.cat(list(weights[-self.n_extras :])) if self.n_extras else None
        arguments[_AT["extra"]] = 0 if extra is None else extra.data_ptr()
        layout, threads = self.layout, engine.threads(self.flops, self.layout.slices)
        scratch = layout.scratch(batch, layout.units * pass_blocks(cell), threads)
        space, addresses = memory.work_space(scratch, *layout.of_means(batch, threads))
        for name, address in zip(("scratch", "sums", "means"), addresses, strict=True):
            arguments[_AT[name]] = address
        start(self.kernel_back, self.region_back, arguments, threads)
        del space, extra
        d_rh, d_apart = d_gates[:, : self.of_gates], d_gates[:, self.of_gates :]
        return Found(d_rh, d_apart, [], (), d_product, d_output)

    def _back_by_torch(
        self,
        state: Sequence[Tensor],
        weights: Sequence[Tensor],
        kept: Tensor,
        d_state: Sequence[Tensor],
    ) -> tuple[Found, list[Tensor]]:
        """`_launch_back` for a cell with a late product; also returns the states' gradients."""
        cell, parts = self.cell, self._views(kept)
        assert cell.late is not None
        made, saved = parts[: self.n_states], parts[self.n_states :]
        d_late = torch.cat(TORCH.bind(cell.late.backward)(saved, d_state), 1)
        d_product = d_late.mm(weights[1][self.early :])
        d_rh, d_apart, d_before = TORCH.bind(cell.backward)(
            (*saved, d_product), made, state, d_state, ()
        )
        d_gates = torch.cat([*d_rh, *d_apart], 1)
        return Found(d_gates[:, : self.of_gates], d_gates[:, self.of_gates :], []), [*d_before]


def _copy(part: Tensor) -> Tensor:
    return part.clone(memory_format=torch.contiguous_format)


def _joined(parts: Sequence[Any], dim: int = 0) -> Any:
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(list(parts), dim)


def _joined_walks(walks: Sequence[Any]) -> Walk:
    """Join walks into one, as if all their rows belonged to one step."""
    first: Walk = walks[0]
    if len(walks) == 1:
        return first

    def joined(lists: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        return [_joined(parts) for parts in zip(*lists, strict=True)]

    x = _joined([walk.x for walk in walks])
    founds = [walk.found for walk in walks]
    d_rh, d_apart, d_output = (
        _joined([getattr(found, name) for found in founds])
        for name in ("d_rh", "d_apart", "d_output")
    )
    d_product = _joined([found.d_product for found in founds], 1)
    direction = first.direction._replace(
        rows=Rows(1, x.shape[0], None), initial=joined([walk.direction.initial for walk in walks])
    )
    return Walk(
        direction, x, joined([walk.states for walk in walks]),
        Kept(normal=joined([walk.kept.normal for walk in walks])),
        Found(d_rh, d_apart, [], (), d_product, d_output),
    )  # fmt: skip
