"""One direction of a layer by the compiled kernels: the functions of ``operators.py`` once more.

Tensors are on the CPU and in a dtype that the kernels multiply; states are exact: in float32 where
that is bfloat16. Everything that a kernel takes by address is allocated, checked and kept alive
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cells import Cell
from . import engine, machine, operators
from .arguments import BLOCK, MOST_SAVED, MOST_STATES, Backward, Forward, Product, padded
from .direction import Breaks, Direction
from .memory import gradients, work_space

# Numbers of projected input that all threads keep, half of a second-level cache for one of them.
# Not more for more threads, so that results do not depend on their number.
_CHUNK = 65536

# Rows whose distance is a multiple of so many floats compete for the same lines of a cache: a GRU
# of (T, B, H) = (256, 16, 128) took 1.3 times as long in training, by 2 threads.
_PAGE = 512
_PAD = 24

# Packed weights are read a tenth faster, and packing them takes as long as so many products of few
# rows with the weights as they are. LSTM of (T, B, I = H) = (16, 1, 256) 0.93 times as fast packed,
# (32, 1, 1024) 1.05, (128, 1, 512) 1.05, (4, 8, 512) 0.93, (8, 8, 256) 1.03.
_PACKING = 40
_UNPACKED_ROWS = 4  # of such a product


def _check(direction: Direction, count: int, inputs: int, states: Sequence[Tensor]) -> None:
    """Raise unless weights, states and rows are of the sizes that a kernel will assume."""
    cell, w, rows, hidden = direction.cell, direction.w, direction.rows, direction.hidden
    width, size_h = cell.n_gates * hidden, w.w_hh.shape[1]
    fits = w.w_ih.shape == (width, inputs) and w.w_hh.shape == (width, size_h)
    fits = fits and (size_h == hidden if w.w_hr is None else w.w_hr.shape == (size_h, hidden))
    for bias in (w.b_ih, w.b_hh):
        fits = fits and (bias is None or bias.shape == (width,))
    fits = fits and len(w.extras) == len(cell.extras)
    for extra, part in zip(cell.extras, w.extras, strict=False):
        fits = fits and part.shape == (extra.blocks * hidden,)
    for k, part in enumerate(states):
        fits = fits and part.shape == (rows.batch, hidden if k % cell.n_states else size_h)
    sizes = rows.batch_sizes
    if sizes is None:
        fits = fits and rows.steps * rows.batch == count
    else:
        shrinking = bool((sizes[1:] <= sizes[:-1]).all())
        fits = fits and shrinking and int(sizes[-1]) > 0 and int(sizes.sum()) == count
    if not fits:
        raise RuntimeError("sizes of input, state, weights and batch_sizes do not fit each other")


class Layout(NamedTuple):
    """How a direction is cut into slices.

    Attributes
    ----------
    units : int
        Hidden units of a slice.
    width, width_h : int
        Columns of all gates and of h, with the padding.
    exact : int
        Bytes of an exact number, and of a lane of packed weights.
    group : int
        Numbers in such a lane.
    flops, slices : int
        What the number of threads follows from: operations of a step, and its parts.
    """

    units: int
    width: int
    width_h: int
    exact: int
    group: int
    flops: int
    slices: int

    @classmethod
    def of(cls, direction: Direction) -> Layout:
        """Of a direction of a layer."""
        w, dtype, target = direction.w, direction.w.w_hh.dtype, machine.target()
        assert target is not None
        units = target._replace(dtype=dtype).units
        gates, size_h = direction.cell.n_gates, w.w_hh.shape[1]
        width, width_h = (-(-count // units) * units for count in (direction.hidden, size_h))
        width *= gates
        is_paired, exact = dtype == torch.bfloat16, max(4, dtype.itemsize)
        flops, slices = 2 * direction.rows.batch * width * size_h, width // (gates * units)
        return cls(units, width, width_h, exact, 2 if is_paired else 1, flops, slices)

    @property
    def threads(self) -> int:
        """How many share a step, now."""
        return engine.threads(self.flops, self.slices)

    def packed(self, columns: int, k: int) -> int:
        """Bytes of packed weights."""
        return columns * -(-k // self.group) * self.exact


def _pays(rows: int, times: int) -> bool:
    """Whether packing saves more than it costs, where so many rows are multiplied several times."""
    return times * -(-rows // _UNPACKED_ROWS) > _PACKING


class Space(NamedTuple):
    """Bytes of the parts of forward's work space, as its arguments name them, 0 for none."""

    packed_ih: int
    packed_hh: int
    packed_hr: int
    biases: int
    projected: int
    scratch: int  # of a thread

    @classmethod
    def of(cls, direction: Direction, layout: Layout, inputs: int) -> tuple[Space, int]:
        """Of a direction; with the rows whose input projection is kept."""
        rows, w, width, exact = direction.rows, direction.w, layout.width, layout.exact
        chunk = rows.batch * max(1, _CHUNK // max(1, width * rows.batch))
        packs, size_h = _pays(rows.batch, rows.steps), w.w_hh.shape[1]
        packs_hr, own = packs and w.w_hr is not None, direction.cell.n_gates * layout.units
        space = cls(
            layout.packed(width, inputs) if _pays(rows.total, 1) else 0,
            layout.packed(width, size_h) if packs else 0,
            layout.packed(layout.width_h, direction.hidden) if packs_hr else 0,
            exact * 2 * width,
            exact * width * chunk,
            exact * rows.batch * own,
        )
        return space, chunk


def _contiguous(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Tensors as a kernel reads them."""
    return [part if part is None else part.contiguous() for part in tensors]


def _extra(direction: Direction) -> Tensor | None:
    return torch.cat(direction.w.extras) if direction.w.extras else None


def _fresh(breaks: Breaks | None) -> Sequence[Tensor]:
    return [] if breaks is None else _contiguous(breaks.fresh)


def forward(
    direction: Direction,
    x: Tensor,
    state: Sequence[Tensor],
    h_rows: Tensor,
    traces: Sequence[Tensor],
    saved: Sequence[Tensor],
) -> None:
    """Run one direction; see ``operators.forward``."""
    cell, w, rows, breaks = direction.cell, direction.w, direction.rows, direction.breaks
    hidden, size_h, (count, inputs) = direction.hidden, w.w_hh.shape[1], x.shape
    fresh, initial = _fresh(breaks), _contiguous(direction.initial)
    _check(direction, count, inputs, [*state, *fresh, *initial])
    layout = Layout.of(direction)
    space, chunk = Space.of(direction, layout, inputs)
    threads = layout.threads
    work, addresses = work_space(*space[:-1], threads * space.scratch)
    is_full_kept, full = len(traces) >= cell.n_states, None
    if w.w_hr is not None:
        full = traces[-1] if is_full_kept else x.new_empty(rows.batch, hidden)
    weights = _contiguous((w.w_ih, w.w_hh, w.w_hr, w.b_ih, w.b_hh))
    fresh_rh = fresh[0] @ w.w_hh.t() if fresh else None
    arguments = Forward.of(
        (
            rows.steps, count, rows.batch, inputs, hidden, size_h, direction.reverse,
            h_rows.stride(0), chunk, is_full_kept, *addresses,
        ),
        (
            rows.batch_sizes, x.contiguous(), *weights, _extra(direction),
            initial[0] if initial else None, *padded(state), h_rows, full,
            *padded(saved, MOST_SAVED), *padded(traces[: cell.n_states - 1], MOST_STATES - 1),
            None if breaks is None else breaks.marks, *padded(fresh), fresh_rh,
            work,
        ),
    )  # fmt: skip
    engine.run(cell, x.dtype, "forward", arguments, threads)


def backward(
    direction: Direction,
    d_rows: Sequence[Tensor | None],
    d_state: Sequence[Tensor],
    h_rows: Tensor,
    traces: Sequence[Tensor],
    saved: Sequence[Tensor],
) -> tuple[Tensor, Tensor, list[Tensor], Sequence[Tensor]]:
    """Compute the gradients of the gates; see ``operators.backward``."""
    cell, w, rows, breaks = direction.cell, direction.w, direction.rows, direction.breaks
    hidden, size_h, count = direction.hidden, w.w_hh.shape[1], h_rows.shape[0]
    fresh, initial = _fresh(breaks), _contiguous(direction.initial)
    _check(direction, count, w.w_ih.shape[1], [*d_state, *initial, *fresh])
    fits = len(saved) == cell.n_saved
    fits = fits and len(traces) == cell.n_states - 1 + (w.w_hr is not None)
    for part in (h_rows, *d_rows[:1]):
        fits = fits and (part is None or part.shape == (count, size_h))
    for part in (*traces, *saved, *d_rows[1:]):
        fits = fits and (part is None or part.shape == (count, hidden))
    if not fits:
        raise RuntimeError("what was saved in forward is not of the sizes that backward needs")
    layout = Layout.of(direction)
    columns = (cell.n_gates + cell.n_apart) * hidden
    d_gates = gradients(count, columns + (_PAD if columns % _PAGE == 0 else 0), h_rows.dtype)
    d_projected = None if w.w_hr is None else h_rows.new_empty(count, size_h)
    threads = layout.threads
    work, addresses = work_space(
        layout.packed(layout.width_h, cell.n_gates * hidden),
        0 if w.w_hr is None else layout.packed(layout.width // cell.n_gates, size_h),
        layout.exact * threads * rows.batch * layout.units,
    )
    w_hh, w_hr = _contiguous((w.w_hh, w.w_hr))
    d_h, *d_others = d_rows
    d_h = d_h if d_h is None else _like(d_h, h_rows)
    d_others = _contiguous(d_others)
    d_fresh = [torch.zeros_like(part) for part in d_state] if fresh else []
    arguments = Backward.of(
        (
            rows.steps, count, rows.batch, hidden, size_h, direction.reverse, h_rows.stride(0),
            d_gates.shape[1], *addresses,
        ),
        (
            rows.batch_sizes, w_hh, w_hr, _extra(direction), *padded(initial),
            h_rows, *padded(saved, MOST_SAVED),
            *padded(traces[: cell.n_states - 1], MOST_STATES - 1), *padded([d_h, *d_others]),
            None if breaks is None else breaks.marks, *padded(fresh), *padded(d_fresh),
            *padded(d_state), d_gates, d_projected, work,
        ),
    )  # fmt: skip
    engine.run(cell, h_rows.dtype, "backward", arguments, threads)
    d_rh, d_apart = d_gates[:, : cell.n_gates * hidden], d_gates[:, cell.n_gates * hidden : columns]
    if breaks is not None:
        by_product = d_rh.index_select(0, breaks.rows) @ w_hh
        d_fresh[0].index_add_(0, breaks.sequences, by_product.to(d_fresh[0].dtype))
    return d_rh, d_apart, d_fresh, () if d_projected is None else (d_projected, traces[-1])


def _like(part: Tensor, h_rows: Tensor) -> Tensor:
    """Gradients of every row with the strides of h."""
    if part.stride() == h_rows.stride():
        return part
    return h_rows.new_empty_strided(part.shape, h_rows.stride()).copy_(part)


# Below so many operations torch's product is as fast.
_MIN_FLOPS = 2_000_000


def multiply(cell: Cell, c: Tensor, a: Tensor, b: Tensor, adds: bool) -> None:
    """Write a @ b, of (M, K) and (K, N), to c or add it; see ``operators.multiply``."""
    (m, k), n = a.shape, b.shape[1]
    is_transposed = a.stride(1) != 1
    fits = b.stride(1) == c.stride(1) == a.stride(0 if is_transposed else 1) == 1
    fits = fits and b.shape[0] == k and c.shape == (m, n)
    flops = 2 * m * k * n
    if flops < _MIN_FLOPS or not fits or not machine.has_narrow_blas(a.dtype):
        operators.multiply(cell, c, a, b, adds)
        return
    target = machine.target()
    assert target is not None
    target, size = target._replace(dtype=a.dtype), a.dtype.itemsize
    tiles, slices, block = -(-m // target.tile_rows), -(-n // target.units), min(k, BLOCK)
    threads = engine.threads(flops, tiles)
    work, addresses = work_space(
        size * slices * target.units * block,
        size * tiles * target.tile_rows * block if is_transposed else 0,
        size * threads * target.tile_rows * target.units,
    )
    pitches = a.stride(1 if is_transposed else 0), b.stride(0), c.stride(0)
    arguments = Product.of((m, k, n, adds, is_transposed, *pitches, *addresses), (a, b, c, work))
    engine.run(cell, a.dtype, "product", arguments, threads)
