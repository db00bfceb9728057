"""Directions of layers by the compiled kernels, with the same functions as ``operators.py``.

Tensors are on the CPU and in a dtype that the kernels multiply; states are in the exact dtype,
which is float32 for bfloat16. Everything that a kernel takes by address is allocated, checked and
kept alive here. To a kernel, directions, heads and members of an ensemble are groups, and one call
runs all groups that run at the same time.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import groups
from ..call import Weights
from ..cells import EPSILON, Cell
from . import engine, machine, operators
from .arguments import (
    BLOCK,
    MOST_SAVED,
    MOST_STATES,
    Arguments,
    Backward,
    Forward,
    Product,
    padded,
    pass_blocks,
)
from .direction import Ahead, Back, Breaks, Direction, Found, Noise
from .memory import gradients, work_space

# Elements of projected input that are kept, half of the second-level cache of one core. The number
# does not grow with the threads, so that results do not depend on them.
_CHUNK = 65536

# Rows at distances that are multiples of this many floats compete for the same cache lines: a GRU
# of (T, B, H) = (256, 16, 128) took 1.3 times as long in training, on 2 threads.
_PAGE = 512
_PAD = 24

# Packed weights are read a tenth faster, and packing takes as long as this many products of few
# rows with unpacked weights. LSTM of (T, B, I = H) = (16, 1, 256) 0.93 times as fast packed,
# (32, 1, 1024) 1.05, (128, 1, 512) 1.05, (4, 8, 512) 0.93, (8, 8, 256) 1.03.
_PACKING = 40
_UNPACKED_ROWS = 4  # rows of such a product


def _check(direction: Direction, count: int, inputs: int, states: Sequence[Tensor]) -> None:
    """Raise unless weights, states and rows have the sizes that a kernel will assume."""
    cell, w, rows, hidden = direction.cell, direction.w, direction.rows, direction.hidden
    width, size_h, heads = cell.n_gates * hidden, direction.size_h, direction.num_heads
    lead = direction.lead
    fits = w.w_ih.shape == (*lead, width, inputs)
    fits = fits and w.w_hh.shape == (*lead, width, size_h // heads)
    fits = fits and heads * w.w_hh.shape[-1] == size_h
    fits = fits and (w.w_hr is None or w.w_hr.shape == (*lead, size_h, hidden))
    for bias in (w.b_ih, w.b_hh):
        fits = fits and (bias is None or bias.shape == (*lead, width))
    fits = fits and len(w.extras) == len(cell.extras)
    for extra, part in zip(cell.extras, w.extras, strict=False):
        fits = fits and part.shape == (*lead, extra.blocks * hidden)
    for k, part in enumerate(states):
        width_of = hidden if k % cell.n_states else size_h
        fits = fits and part.shape == (*lead, rows.batch, width_of)
    sizes = rows.batch_sizes
    if sizes is None:
        fits = fits and rows.steps * rows.batch == count
    else:
        shrinking = bool((sizes[1:] <= sizes[:-1]).all())
        fits = fits and shrinking and int(sizes[-1]) > 0 and int(sizes.sum()) == count
    if not fits:
        raise RuntimeError("sizes of input, state, weights and batch_sizes do not fit each other")


class Layout(NamedTuple):
    """How a direction, or a head of it, is divided into slices.

    Attributes
    ----------
    units : int
        Hidden units per slice.
    width, width_h : int
        Columns of all gates and of h, with padding.
    exact : int
        Bytes of an exact number, and of a lane of packed weights.
    group : int
        Numbers in a lane of packed weights.
    flops, slices, steps : int
        Operations of a step, its slices, and T, which determine the number of threads.
    meets : bool
        Whether all slices of a step wait for each other, so that their products must be kept.
    """

    units: int
    width: int
    width_h: int
    exact: int
    group: int
    flops: int
    slices: int
    steps: int
    meets: bool

    @classmethod
    def of(cls, direction: Direction) -> Layout:
        """Make the layout of a direction of a layer."""
        w, dtype, target, cell = (
            direction.w,
            direction.w.w_hh.dtype,
            machine.target(),
            direction.cell,
        )
        assert target is not None
        units = target._replace(dtype=dtype).units
        gates, size_h = cell.n_gates, w.w_hh.shape[-1]
        hidden = direction.hidden // direction.num_heads
        width, width_h = (-(-count // units) * units for count in (hidden, size_h))
        width *= gates
        is_paired, exact = dtype == torch.bfloat16, max(4, dtype.itemsize)
        flops, slices = 2 * direction.rows.batch * width * size_h, width // (gates * units)
        group = 2 if is_paired else 1
        return cls(
            units, width, width_h, exact, group, flops, slices, direction.rows.steps,
            not cell.is_pointwise,
        )  # fmt: skip

    @property
    def threads(self) -> int:
        """The number of threads that share a step, under the current settings."""
        return engine.threads(self.flops, self.slices)

    def packed(self, columns: int, k: int) -> int:
        """The size of packed weights in bytes."""
        return columns * -(-k // self.group) * self.exact

    def launches(self, groups: int) -> list[engine.Launch]:
        """Choose how to run a number of groups."""
        return engine.launches(groups, self.threads, self.steps * self.flops)

    def of_means(self, batch: int, threads: int) -> tuple[int, int]:
        """The sizes in bytes of the sums of all slices, and of the means that each thread makes."""
        if not self.meets:
            return 0, 0
        of_one = self.exact * batch * 2
        return of_one * self.slices, of_one * threads

    def scratch(self, batch: int, columns: int, threads: int) -> int:
        """The size in bytes of the results of a step's products, with `columns` per slice."""
        # If threads meet, each slice of H and of P has its own part.
        slices = max(self.slices, self.width_h // self.units)
        return self.exact * batch * columns * (slices if self.meets else threads)


def _pays(rows: int, times: int) -> bool:
    """Whether packing saves more than it costs, if `rows` rows are multiplied `times` times."""
    return times * -(-rows // _UNPACKED_ROWS) > _PACKING


class Space(NamedTuple):
    """The sizes in bytes of the parts of forward's work space, named as its arguments."""

    packed_ih: int
    packed_hh: int
    packed_hr: int
    biases: int
    projected: int
    operand: int

    @classmethod
    def of(cls, direction: Direction, layout: Layout, inputs: int) -> tuple[Space, int]:
        """Return the sizes for a direction or head, and the rows whose input projection is kept."""
        rows, w, cell = direction.rows, direction.w, direction.cell
        width, exact, size_h = layout.width, layout.exact, w.w_hh.shape[-1]
        chunk = rows.batch * max(1, _CHUNK // max(1, width * rows.batch))
        packs, projects = _pays(rows.batch, rows.steps), not cell.is_normalized
        has_operand = cell.late is not None or direction.noise is not None
        space = cls(
            layout.packed(width, inputs) if projects and _pays(rows.total, 1) else 0,
            layout.packed(width, size_h) if packs else 0,
            layout.packed(layout.width_h, direction.hidden) if packs and w.w_hr is not None else 0,
            exact * 2 * width,
            exact * width * chunk if projects else 0,
            exact * 3 * rows.batch * size_h if has_operand else 0,
        )
        return space, chunk


def _contiguous(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Make tensors contiguous, as the kernels require."""
    return [part if part is None else part.contiguous() for part in tensors]


def _extra(direction: Direction) -> Tensor | None:
    return torch.cat(direction.w.extras, -1) if direction.w.extras else None


def _fresh(breaks: Breaks | None) -> Sequence[Tensor]:
    return [] if breaks is None else _contiguous(breaks.fresh)


def _dropped(h: Tensor, noise: Noise | None) -> Tensor:
    """Apply recurrent dropout to h, (B, P)."""
    return h if noise is None or noise.drop is None else h * noise.drop


# A kernel's arguments for a direction: numbers, tensors, and their distances from head to head.
_Parts = tuple[list[int], list[Tensor | None], list[int]]


def _of_noise(noise: Noise | None, raw: Sequence[Tensor | None], units: int) -> list[Any]:
    """The arguments of noise, as pairs of a tensor and its distance from head to head."""
    zones: Sequence[Any] = noise.zones if noise else ()
    masks = [
        part.contiguous() if part.dtype == torch.bool and part.numel() else None for part in zones
    ]
    shares = [part if part.dtype != torch.bool and part.numel() else None for part in zones]
    return [
        (_contiguous([noise.drop])[0] if noise else None, units),
        *((part, units) for part in padded(masks)),
        *((part, 0) for part in padded(shares)),
        *((part, units) for part in padded(raw)),
    ]


def _by_groups(
    numbers: list[int], pairs: list[Any], heads: int, members: int
) -> Iterator[tuple[Any, Any]]:
    """Yield the arguments of every head of a direction, one member after another."""
    tensors = [part for part, _ in pairs]
    yield numbers, tensors
    if heads > 1 or members > 1:
        places = [(0, 0, 0) if part is None else _place(part, by) for part, by in pairs]
        for m, k in itertools.islice(itertools.product(range(members), range(heads)), 1, None):
            yield numbers, [at + m * of_member + k * of_head for at, of_member, of_head in places]


def _place(part: Tensor, by: int) -> tuple[int, int, int]:
    """The address of a tensor, and its distances in bytes between members and between heads."""
    size = part.element_size()
    # Zoneout as a fraction is one number for all members.
    return part.data_ptr(), part.stride(0) * size if part.dim() > 1 else 0, by * size


def forward(jobs: Sequence[Ahead]) -> None:
    """Run directions of layers that differ at most in their rows; see ``operators.forward``."""
    for same in _alike(jobs):
        _forward(same)


def _alike(jobs: Sequence[Any]) -> list[Any]:
    """Group jobs with the same numbers of steps and sequences, which can run together."""
    by_sizes = itertools.groupby(jobs, lambda job: job.direction.rows[:2])
    return [list(same) for _, same in by_sizes]


def _forward(jobs: Sequence[Ahead]) -> None:
    direction = jobs[0].direction
    cell, dtype, inputs = direction.cell, jobs[0].h_rows.dtype, jobs[0].x.shape[-1]
    layout, batch, w = Layout.of(direction), direction.rows.batch, direction.w
    space, chunk = Space.of(direction, layout, inputs)
    full = None
    is_full_kept = len(jobs[0].kept.traces) >= cell.n_states
    if w.w_hr is not None and not is_full_kept:
        full = jobs[0].x.new_empty(len(jobs), *direction.lead, batch, direction.hidden)
    of_groups: list[Any] = []
    for n, job in enumerate(jobs):
        of_job = None if full is None else full[n]
        numbers, pairs = _ahead(job, chunk, of_job)
        of_groups += _by_groups(numbers, pairs, direction.num_heads, math.prod(direction.lead))

    def sizes(threads: int) -> tuple[int, ...]:
        scratch = layout.scratch(batch, cell.n_gates * layout.units, threads)
        return *space, *layout.of_means(batch, threads), scratch

    noisy = direction.noise is not None
    run = functools.partial(engine.run, cell, dtype, "forward", noisy=noisy)
    _run(run, Forward, layout.launches(len(of_groups)), of_groups, sizes)


def _run(
    run: Callable[[Arguments, int], None],
    kind: type[Arguments],
    launches: Sequence[engine.Launch],
    of_groups: Sequence[Any],
    sizes: Callable[[int], tuple[int, ...]],
) -> None:
    """Run a kernel for groups, given as numbers and tensors.

    `sizes` returns the sizes in bytes of the parts of a group's work space for a number of threads.
    """
    for first, count, threads in launches:
        parts, slots = sizes(-(-threads // count)), min(count, threads)
        work, addresses = work_space(*parts * slots)
        by_slot = [addresses[k * len(parts) : (k + 1) * len(parts)] for k in range(slots)]
        arguments = kind.of(
            threads,
            *(
                ([*numbers, *by_slot[g % slots]], [*tensors, work])
                for g, (numbers, tensors) in enumerate(of_groups[first : first + count])
            ),
        )
        run(arguments, threads)


def _ahead(job: Ahead, chunk: int, full: Tensor | None) -> tuple[list[int], list[Any]]:
    """The numbers and tensors of forward, in the order of its arguments, without work space."""
    direction, x, state, h_rows, kept = job
    cell, w, rows, breaks, noise = (
        direction.cell, direction.w, direction.rows, direction.breaks, direction.noise
    )  # fmt: skip
    hidden, size_h, heads = direction.hidden, direction.size_h, direction.num_heads
    count, inputs = x.shape[-2:]
    fresh, initial = _fresh(breaks), _contiguous(direction.initial)
    _check(direction, count, inputs, [*state, *fresh, *initial])
    units, traces, is_full_kept = hidden // heads, kept.traces, len(kept.traces) >= cell.n_states
    if w.w_hr is not None and is_full_kept:
        full = traces[-1]
    w_ih, w_hh, w_hr, b_ih, b_hh = _contiguous((w.w_ih, w.w_hh, w.w_hr, w.b_ih, w.b_hh))
    wx: Tensor | None = None
    moments_pitch = cell.n_moments * heads
    if cell.is_normalized:
        wx, b_ih = normalized_input(cell, w, heads, x, kept.normal), None
    normal: Any = kept.normal[2:] or [None, None]
    fresh_rh = None
    if fresh:
        # (B, heads, units) times (G, heads, units, units).
        by_head = _dropped(fresh[0], noise).unflatten(1, (heads, -1)).transpose(0, 1)
        columns = w_hh.view(cell.n_gates, heads, -1, w_hh.shape[1]).transpose(0, 1).flatten(1, 2)
        fresh_rh = by_head @ columns.transpose(1, 2)
    numbers = [
        rows.steps, count, rows.batch, inputs, units, w_hh.shape[-1], hidden, size_h,
        direction.reverse, h_rows.stride(-2), chunk, is_full_kept, moments_pitch,
    ]  # fmt: skip
    of_units = [
        b_ih, b_hh, _extra(direction), _dropped(initial[0], noise) if initial else None,
        *padded(state), h_rows, full, *padded(kept.saved, MOST_SAVED),
        *padded(traces[: cell.n_states - 1], MOST_STATES - 1),
    ]  # fmt: skip
    return numbers, [
        (rows.batch_sizes, 0), (x.contiguous(), 0), (w_ih, units * inputs),
        (w_hh, units * units), (w_hr, 0), *((part, units) for part in of_units),
        (None if breaks is None else breaks.marks, 0), *((part, units) for part in padded(fresh)),
        (fresh_rh, rows.batch * cell.n_gates * units), *_of_noise(noise, kept.raw, units),
        (wx, units), (normal[0], units), (normal[1], cell.n_moments),
    ]  # fmt: skip


def normalized_input(
    cell: Cell, w: Weights, heads: int, x: Tensor, normal: Sequence[Tensor]
) -> Tensor:
    """Compute the normalized input parts of all rows, with gain and bias, (N, G * H)."""
    raw, moments = normal[:2] or (x.new_empty(x.shape[0], w.w_ih.shape[0]), None)
    multiply(cell, raw, x, w.w_ih.t(), False)
    if heads == 1:
        wx, mean, scale = torch.native_layer_norm(raw, raw.shape[1:], w.extras[0], w.b_ih, EPSILON)
        if moments is not None:
            torch.cat([mean, scale], dim=1, out=moments)
        return wx
    parts = [
        torch.native_layer_norm(
            groups.gates(raw, cell.n_gates, k, heads), (raw.shape[1] // heads,),
            groups.gates(w.extras[0], cell.n_gates, k, heads),
            None if w.b_ih is None else groups.gates(w.b_ih, cell.n_gates, k, heads), EPSILON,
        )
        for k in range(heads)
    ]  # fmt: skip
    wx_of_heads, means, scales = zip(*parts, strict=True)
    if moments is not None:
        torch.cat(
            [part for pair in zip(means, scales, strict=True) for part in pair], 1, out=moments
        )
    return groups.join(wx_of_heads, cell.n_gates)


def backward(jobs: Sequence[Back]) -> list[Found]:
    """Compute the gradients of the gates; see ``operators.backward``.

    They are valid until the next call.
    """
    (direction, *_, h_rows, _), cell = jobs[0], jobs[0].direction.cell
    columns = (cell.n_gates + cell.n_apart) * direction.hidden
    columns += _PAD if columns % _PAGE == 0 else 0
    sizes = [job.h_rows.shape[:-1] for job in jobs]
    counts = list(map(math.prod, sizes))
    of_jobs = gradients(sum(counts), columns, h_rows.dtype).split(counts)
    d_gates = (part.unflatten(0, size) for part, size in zip(of_jobs, sizes, strict=True))
    return [found for same in _alike(jobs) for found in _backward(same, d_gates)]


def _backward(jobs: Sequence[Back], d_gates: Iterator[Tensor]) -> list[Found]:
    (direction, *_, h_rows, _), cell = jobs[0], jobs[0].direction.cell
    layout, batch = Layout.of(direction), direction.rows.batch
    found, of_groups = [], list[Any]()
    for job in jobs:
        result, numbers, pairs = _back(job, next(d_gates))
        found.append(result)
        of_groups += _by_groups(numbers, pairs, direction.num_heads, math.prod(direction.lead))
    size_h, heads = direction.w.w_hh.shape[-1], direction.num_heads
    units, is_projected = direction.hidden // heads, direction.w.w_hr is not None

    def sizes(threads: int) -> tuple[int, ...]:
        return (
            layout.packed(layout.width_h, cell.n_gates * units),
            layout.packed(layout.width // cell.n_gates, size_h) if is_projected else 0,
            layout.exact * threads * batch * units * cell.n_gates if heads > 1 else 0,
            *layout.of_means(batch, threads),
            layout.scratch(batch, layout.units * pass_blocks(cell), threads),
        )

    noisy = direction.noise is not None
    run = functools.partial(engine.run, cell, h_rows.dtype, "backward", noisy=noisy)
    _run(run, Backward, layout.launches(len(of_groups)), of_groups, sizes)
    for job, result in zip(jobs, found, strict=True):
        _add_fresh(job.direction, result)
    return found


def _back(job: Back, d_gates: Tensor) -> tuple[Found, list[int], list[Any]]:
    """The results of backward, and its numbers and tensors, in the order of its arguments."""
    direction, d_rows, d_state, h_rows, kept = job
    cell, w, rows, breaks, noise = (
        direction.cell, direction.w, direction.rows, direction.breaks, direction.noise
    )  # fmt: skip
    hidden, size_h, count, heads = (
        direction.hidden,
        direction.size_h,
        h_rows.shape[-2],
        direction.num_heads,
    )
    lead = direction.lead
    fresh, initial, units = _fresh(breaks), _contiguous(direction.initial), hidden // heads
    _check(direction, count, w.w_ih.shape[-1], [*d_state, *initial, *fresh])
    fits = len(kept.saved) == cell.n_saved
    fits = fits and len(kept.traces) == cell.n_states - 1 + (w.w_hr is not None)
    for part in (h_rows, *d_rows[:1]):
        fits = fits and (part is None or part.shape == (*lead, count, size_h))
    for part in (*kept.traces, *kept.saved, *kept.raw, *d_rows[1:]):
        fits = fits and (part is None or part.shape == (*lead, count, hidden))
    if not fits:
        raise RuntimeError("what was saved in forward is not of the sizes that backward needs")
    d_projected = None if w.w_hr is None else h_rows.new_empty(*lead, count, size_h)
    w_hh, w_hr = _contiguous((w.w_hh, w.w_hr))
    d_h, *d_others = d_rows
    d_h = d_h if d_h is None else _like(d_h, h_rows)
    d_others = _contiguous(d_others)
    d_fresh = [torch.zeros_like(part) for part in d_state] if fresh else []
    d_product = d_output = None
    if cell.is_normalized:
        d_product = h_rows.new_empty(heads, count, cell.n_gates * units)
    if cell.output is not None:
        d_output = h_rows.new_empty(count, hidden)
    normal: Any = kept.normal[2:] or [None, None]
    columns = cell.n_gates * hidden
    d_rh = d_gates[..., :columns]
    d_apart = d_gates[..., columns : columns + cell.n_apart * hidden]
    projected = () if d_projected is None else (d_projected, kept.traces[-1])
    found = Found(d_rh, d_apart, d_fresh, projected, d_product, d_output)
    numbers = [
        rows.steps, count, rows.batch, units, w_hh.shape[-1], hidden, size_h, direction.reverse,
        h_rows.stride(-2), d_gates.stride(-2), cell.n_moments * heads,
    ]  # fmt: skip
    of_units = [
        _extra(direction), *padded(initial), h_rows, *padded(kept.saved, MOST_SAVED),
        *padded(kept.traces[: cell.n_states - 1], MOST_STATES - 1), *padded([d_h, *d_others]),
    ]  # fmt: skip
    after_marks = [*padded(fresh), *padded(d_fresh), *padded(d_state), d_gates]
    return found, numbers, [
        (rows.batch_sizes, 0), (w_hh, units * units), (w_hr, 0),
        *((part, units) for part in of_units), (None if breaks is None else breaks.marks, 0),
        *((part, units) for part in after_marks), (d_projected, 0),
        *_of_noise(noise, kept.raw, units), (normal[0], units), (normal[1], cell.n_moments),
        (d_product, count * cell.n_gates * units), (d_output, units),
    ]  # fmt: skip


def _add_fresh(direction: Direction, found: Found) -> None:
    """Add the gradient through the recurrent product to that of the fresh h."""
    breaks, noise, cell = direction.breaks, direction.noise, direction.cell
    if breaks is None:
        return
    heads, w_hh = direction.num_heads, direction.w.w_hh
    n_early = cell.n_gates - (cell.late.n_gates if cell.late else 0)
    d_rh = found.d_rh.unflatten(1, (cell.n_gates, heads, -1)).transpose(1, 2)
    if found.d_product is not None:
        d_rh = found.d_product.unflatten(2, (cell.n_gates, -1)).transpose(0, 1)
    d_rh = d_rh.index_select(0, breaks.rows)[:, :, :n_early].flatten(2).transpose(0, 1)
    columns = (
        w_hh.view(cell.n_gates, heads, -1, w_hh.shape[1])[:n_early].transpose(0, 1).flatten(1, 2)
    )
    by_product = (d_rh @ columns).transpose(0, 1).flatten(1)
    if noise is not None and noise.drop is not None:
        by_product = by_product * noise.drop.index_select(0, breaks.sequences)
    found.d_fresh[0].index_add_(0, breaks.sequences, by_product.to(found.d_fresh[0].dtype))


def _like(part: Tensor, h_rows: Tensor) -> Tensor:
    """Give the gradients of every row the strides of h."""
    if part.stride() == h_rows.stride():
        return part
    return h_rows.new_empty_strided(part.shape, h_rows.stride()).copy_(part)


# Below this many operations torch's product is as fast.
_MIN_FLOPS = 2_000_000


def multiply(cell: Cell, c: Tensor, a: Tensor, b: Tensor, adds: bool) -> None:
    """Write a @ b, (M, K) times (K, N), to c or add it to c; see ``operators.multiply``."""
    (m, k), n, lead = a.shape[-2:], b.shape[-1], c.shape[:-2]
    is_transposed = a.stride(-1) != 1
    fits = b.stride(-1) == c.stride(-1) == a.stride(-2 if is_transposed else -1) == 1
    fits = fits and b.shape == (*lead, k, n) and c.shape == (*lead, m, n)
    flops = 2 * m * k * n
    if flops < _MIN_FLOPS or not fits or not machine.has_narrow_blas(a.dtype):
        operators.multiply(cell, c, a, b, adds)
        return
    target = machine.target()
    assert target is not None
    target, size = target._replace(dtype=a.dtype), a.dtype.itemsize
    tiles, slices, block = -(-m // target.tile_rows), -(-n // target.units), min(k, BLOCK)

    def sizes(threads: int) -> tuple[int, ...]:
        return (
            size * slices * target.units * block,
            size * tiles * target.tile_rows * block if is_transposed else 0,
            size * threads * target.tile_rows * target.units,
        )

    pitches = a.stride(-1 if is_transposed else -2), b.stride(-2), c.stride(-2)
    numbers = [m, k, n, adds, is_transposed, *pitches]
    of_groups = list(_by_groups(numbers, [(a, 0), (b, 0), (c, 0)], 1, math.prod(lead)))
    launches = engine.launches(len(of_groups), engine.threads(flops, tiles), flops)
    run = functools.partial(engine.run, cell, a.dtype, "product")
    _run(run, Product, launches, of_groups, sizes)
