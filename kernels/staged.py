"""A step in several launches, for cells that need more than one product per step, or all units of a
row between two products: normalized cells, late products, projections. Where a program can hold all
units and weights of a group, ``staged_resident.py`` uses the same tensors and functions.

Forward, a step is the recurrent product, a second product if the cell has a late one, the cell, and
the projection. Backward, it is the product that brings gradients back through the recurrent
product, the one through the projection or the late product, and the cell. The products are in
``staged_products.py``, the cells here. Between launches the states, and backward their gradients,
are kept in memory in float32. In a float64 layer, everything documented here as float32 is float64.
A program of a normalized cell holds all units of its rows, so that statistics are sums over tiles.

A group (N) is a head of an ensemble member in a direction: it has its own rows, weights and units.
Groups from `n_ahead` on walk through time from its end.

    wx, raw        (N, T, B, G * H), (N, B, G * H)  input part of the gates with b_ih; recurrent
                                     product of a step, in float32
    b, extra       (N, G * H), (N, E * H)  b_hh, and weights a cell has in addition, or None
    marks          (N, T, B)         how the state of a row flows (see tiles.py), or None
    fresh          (N, B, W)         each state after a reset, or None for zeros
    zones          (N, T, B, W)      which units of a state keep their old value, one byte each; or
                                     (1,), the share kept by all, in float32; or None
    running        (N, B, W)         each state, in float32; backward, its gradient
    outputs        (N, T, B, W)      y, then the other states, in float32, after every step
    befores        (N, T, B, W)      each state before the step, in float32 except for h
    afters         (N, T, B, H)      each state as the cell computed it, same dtypes: before zones
    saved          (N, T, B, S * H)  activations for backward
    normal         (N, T, B, G * H), (N, T, B)  the normalized products, and 1 / their deviation
    d_gates        (N, T, B, (G + A) * H)  gradients of the recurrent parts, then of the input
                                     parts of the gates where they differ
    d_raw          (N, T, B, G * H)  gradients of the products before normalization, or None
    d_extra        (N, T, B, X * H)  gradients of extra weights for each row, or None

W is P for h and H for the other states. The grid is (batch tiles, slices, groups). T and B are
run-time values; offsets that grow with them are 64-bit.
"""

import triton
import triton.language as tl

from ..cells import EPSILON
from .activations import zeros_like
from .tiles import CUT, FRESH, HOLD, add, has, mix, without

_EPSILON = tl.constexpr(EPSILON)


@triton.jit
def place(step, T, B, n_ahead, BLOCK_B: tl.constexpr):
    """Return a program's group, which of its rows exist, and the row numbers in (N, B) and, at a
    step, in (N, T, B).
    """
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    t = tl.where(tl.program_id(2) < n_ahead, step, T - 1 - step)
    group = tl.program_id(2).to(tl.int64)
    return group, row < B, group * B + row, (group * T + t) * B + row


@triton.jit
def widened(tile):
    """Convert half precision to float32."""
    if tile.dtype != tl.float64:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def load(row_ptrs, unit, mask):
    """Load a tile, converting half precision to float32."""
    return widened(tl.load(row_ptrs[:, None] + unit[None, :], mask=mask, other=0.0))


@triton.jit
def store(row_ptrs, unit, mask, tile):
    """Store a tile, rounded to the dtype of the memory."""
    rounded = tile.to(row_ptrs.dtype.element_ty)
    tl.store(row_ptrs[:, None] + unit[None, :], rounded, mask=mask)


@triton.jit
def load_parts(row_ptrs, unit, mask, H: tl.constexpr, N: tl.constexpr):
    """Load N tiles that lie H columns apart."""
    parts = ()
    for n in tl.static_range(N):
        parts += (load(row_ptrs + n * H, unit, mask),)
    return parts


@triton.jit
def load_vectors(ptr, unit, H: tl.constexpr, N: tl.constexpr):
    """Load N parts of a vector that lie H apart, as rows of tiles; an empty tuple for None."""
    vectors = ()
    if ptr is not None:
        vectors = load_parts(ptr + tl.arange(0, 1), unit, (unit < H)[None, :], H, N)
    return vectors


@triton.jit
def store_parts(row_ptrs, unit, mask, parts, H: tl.constexpr):
    """Store tiles H columns apart."""
    for n in tl.static_range(len(parts)):
        store(row_ptrs + n * H, unit, mask, parts[n])


@triton.jit
def load_marks(marks_ptr, of_step, rows):
    """Load the marks of a step; None if there are none."""
    mark = None
    if marks_ptr is not None:
        mark = tl.load(marks_ptr + of_step, mask=rows, other=0)
    return mark


@triton.jit
def refreshed(state, fresh_ptr, mark, row_offsets, unit, mask):
    """Replace a state where it is fresh."""
    if mark is not None:
        is_fresh = has(mark, FRESH)[:, None]
        state = tl.where(is_fresh, 0.0, state)
        if fresh_ptr is not None:
            state += load(fresh_ptr + row_offsets, unit, mask & is_fresh)
    return state


@triton.jit
def load_zone(zone_ptr, row_offsets, unit, mask):
    """Load what a state keeps at a step, as ``tiles.load_zones`` does; an empty tuple for None."""
    zone = ()
    if zone_ptr is not None:
        if zone_ptr.dtype.element_ty == tl.uint8:
            ptrs = zone_ptr + row_offsets[:, None] + unit[None, :]
            zone = (tl.load(ptrs, mask=mask, other=0) != 0,)
        else:
            zone = (widened(tl.load(zone_ptr)),)
    return zone


@triton.jit
def settled(new, before, zone, mark):
    """Return a state after a step: mixed with the old one by its zone; the old one if held."""
    if len(zone) > 0:
        new = mix(zone[0], before, new)
    if mark is not None:
        new = tl.where(has(mark, HOLD)[:, None], before, new)
    return new


@triton.jit
def parted(d, zone, mark):
    """Split a state's gradient after a step: for the cell's result, and for the old value."""
    own, kept = d, zeros_like(d)
    if len(zone) > 0:
        own, kept = mix(zone[0], kept, own), mix(zone[0], own, kept)
    if mark is not None:
        held = has(mark, HOLD)[:, None]
        own, kept = tl.where(held, 0.0, own), tl.where(held, d, kept)
    return own, kept


@triton.jit
def passed_on(d_before, d_fresh_ptr, mark, row_offsets, unit, mask):
    """Return what a state's gradient before a step passes on to the previous step."""
    if mark is not None:
        if d_fresh_ptr is not None:
            where = mask & has(mark, FRESH)[:, None]
            found = load(d_fresh_ptr + row_offsets, unit, where)
            store(d_fresh_ptr + row_offsets, unit, where, found + d_before)
        d_before = tl.where(has(mark, FRESH | CUT)[:, None], 0.0, d_before)
    return d_before


@triton.jit
def multiplied(tiles, others):
    """Multiply tiles by others, or by rows of tiles."""
    products = ()
    for n in tl.static_range(len(tiles)):
        products += (tiles[n] * others[n],)
    return products


@triton.jit
def sum_of(tiles, inside):
    """Add up tiles, with zeros outside."""
    total = tiles[0]
    for n in tl.static_range(1, len(tiles)):
        total += tiles[n]
    return tl.where(inside, total, 0.0)


@triton.jit
def mean_of(tiles, inside, H: tl.constexpr):
    """Return the mean over all units of tiles, which have H units inside each."""
    return (tl.sum(sum_of(tiles, inside), axis=1) / (len(tiles) * H))[:, None]


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def means_of(tiles, others, inside, H: tl.constexpr):
    """Return the means of both with a single reduction."""
    sums = sum_of(tiles, inside), sum_of(others, inside)
    mean, other = tl.reduce(sums, 1, _add_pairs)
    return (mean / (len(tiles) * H))[:, None], (other / (len(tiles) * H))[:, None]


@triton.jit
def normalized(tiles, inside, H: tl.constexpr):
    """Normalize tiles jointly over all their units; also return 1 / their deviation."""
    mean = mean_of(tiles, inside, H)
    centered = ()
    for n in tl.static_range(len(tiles)):
        centered += (tl.where(inside, tiles[n] - mean, 0.0),)
    scale = tl.rsqrt(mean_of(multiplied(centered, centered), inside, H) + _EPSILON)
    normal = ()
    for n in tl.static_range(len(tiles)):
        normal += (centered[n] * scale,)
    return normal, scale


@triton.jit
def normalized_back(d_normal, normal, scale, inside, H: tl.constexpr):
    """Return the gradients of the inputs of `normalized` from those of its result."""
    mean, along = means_of(d_normal, multiplied(d_normal, normal), inside, H)
    found = ()
    for n in tl.static_range(len(normal)):
        found += (tl.where(inside, scale * (d_normal[n] - mean - normal[n] * along), 0.0),)
    return found


@triton.jit
def cell_forward(wx, raw, bias, extra, before, inside, H: tl.constexpr, CELL: tl.constexpr):
    """Run a step of a cell with all units, from its products. Return the states, the activations,
    and the normalized products followed by 1 / their deviation.
    """
    N_GATES: tl.constexpr = CELL.n_gates
    rh, normal = raw, ()
    if CELL.is_normalized:
        rh, scale = normalized(raw, inside, H)
        normal = rh + (scale,)
        rh = multiplied(rh, extra[N_GATES : 2 * N_GATES])
    after, saved = CELL.forward(wx, add(rh, bias), before, extra)
    if CELL.output_forward is not None:
        shown, _ = normalized(after[len(after) - 1 :], inside, H)
        after = (CELL.output_forward(after[0], shown[0], extra),) + after[1:]
    return after, saved, normal


@triton.jit
def cell_backward(
    saved, normal, after, before, d_state, d_product, extra, mark, inside, H: tl.constexpr,
    CELL: tl.constexpr,
):  # fmt: skip
    """Go back through `cell_forward`; `d_product` is the gradient of the late product's operand, or
    empty.

    Returns the gradients of the recurrent parts, of the input parts that differ, of the products,
    of extra weights, and of the states before, except for what goes through the products.
    """
    N_GATES: tl.constexpr = CELL.n_gates
    d_extra = ()
    if CELL.output_backward is not None:
        part: tl.constexpr = CELL.output_saved
        shown, scale = normalized(after[len(after) - 1 :], inside, H)
        d_part, d_shown, d_extra = CELL.output_backward(saved[part], shown[0], d_state[0], extra)
        last = normalized_back((d_shown,), shown, scale, inside, H)
        last = add(last, d_state[len(d_state) - 1 :])
        d_state = (d_part,) + d_state[1 : len(d_state) - 1] + last
    d_rh, d_apart, d_before = CELL.backward(saved + d_product, after, before, d_state, extra)
    if CELL.d_extra is not None:
        d_extra = CELL.d_extra(d_rh, after, before)
    if mark is not None:
        d_rh, d_apart = without(mark, HOLD, d_rh), without(mark, HOLD, d_apart)
        d_extra, d_before = without(mark, HOLD, d_extra), without(mark, HOLD, d_before)
    d_raw = d_rh
    if CELL.is_normalized:
        d_normal = multiplied(d_rh, extra[N_GATES : 2 * N_GATES])
        d_raw = normalized_back(d_normal, normal[:N_GATES], normal[N_GATES], inside, H)
        if mark is not None:
            d_raw = without(mark, HOLD, d_raw)
    return d_rh, d_apart, d_raw, d_extra, d_before


@triton.jit(do_not_specialize=["T", "B", "step", "n_ahead"])
def forward_kernel(
    wx_ptr, raw_ptr, b_ptr, extra_ptr, marks_ptr, fresh_ptrs, zone_ptrs, running_ptrs, output_ptrs,
    full_ptr, before_ptrs, after_ptrs, saved_ptr, normal_ptrs, T, B, step, n_ahead,
    H: tl.constexpr, CELL: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Run the cell. With a projection, `full_ptr` receives the unprojected h, (N, B, H), and the
    launch after this one completes h.
    """
    group, rows, of_group, of_step = place(step, T, B, n_ahead, BLOCK_B)
    unit = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = rows[:, None] & (unit < H)[None, :]
    N_GATES: tl.constexpr = CELL.n_gates
    FIRST: tl.constexpr = 0 if full_ptr is None else 1

    raw = load_parts(raw_ptr + of_group * (N_GATES * H), unit, mask, H, N_GATES)
    wx = load_parts(wx_ptr + of_step * (N_GATES * H), unit, mask, H, N_GATES)
    N_EXTRA: tl.constexpr = CELL.n_extra
    if extra_ptr is not None:
        extra_ptr += group * (N_EXTRA * H)
    extra = load_vectors(extra_ptr, unit, H, N_EXTRA)
    if b_ptr is not None:
        b_ptr += group * (N_GATES * H)
    bias = load_vectors(b_ptr, unit, H, N_GATES)

    mark = load_marks(marks_ptr, of_step, rows)
    before = ()
    for s in tl.static_range(len(running_ptrs)):
        if s < FIRST:
            before += (zeros_like(raw[0]),)  # has another size, and cells do not use it
        else:
            state = load(running_ptrs[s] + of_group * H, unit, mask)
            fresh_ptr = None if fresh_ptrs is None else fresh_ptrs[s]
            before += (refreshed(state, fresh_ptr, mark, of_group * H, unit, mask),)
    after, saved, normal = cell_forward(wx, raw, bias, extra, before, mask, H, CELL)

    if normal_ptrs is not None:
        of_gates = of_step * (N_GATES * H)
        store_parts(normal_ptrs[0] + of_gates, unit, mask, normal[:N_GATES], H)
        tl.store(normal_ptrs[1] + of_step[:, None], normal[N_GATES], mask=rows[:, None])
    if saved_ptr is not None:
        store_parts(saved_ptr + of_step * (CELL.n_saved * H), unit, mask, saved, H)
    if full_ptr is not None:
        store(full_ptr + of_group * H, unit, mask, after[0])
    for s in tl.static_range(len(running_ptrs)):
        if after_ptrs is not None:
            store(after_ptrs[s] + of_step * H, unit, mask, after[s])
        if s >= FIRST:
            if before_ptrs is not None:
                store(before_ptrs[s] + of_step * H, unit, mask, before[s])
            zone_ptr = None if zone_ptrs is None else zone_ptrs[s]
            zone = load_zone(zone_ptr, of_step * H, unit, mask)
            state = settled(after[s], before[s], zone, mark)
            store(running_ptrs[s] + of_group * H, unit, mask, state)
            if s < len(output_ptrs):
                store(output_ptrs[s] + of_step * H, unit, mask, state)


@triton.jit(do_not_specialize=["T", "B", "step", "n_ahead"])
def backward_kernel(
    d_h_ptr, d_product_ptr, d_trace_ptrs, extra_ptr, drop_ptr, marks_ptr, zone_ptrs, before_ptrs,
    after_ptrs, saved_ptr, normal_ptrs, running_ptrs, d_fresh_ptrs, d_gates_ptr, d_raw_ptr,
    d_extra_ptr, T, B, step, n_ahead, H: tl.constexpr, CELL: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, PROJECTED: tl.constexpr,
):  # fmt: skip
    """Go back through the cell. `d_h_ptr` is the gradient of the h that the cell computed,
    `d_product_ptr` that of the late product's operand, both (N, B, H) in float32. Steps count from
    the last.
    """
    group, rows, of_group, of_step = place(T - 1 - step, T, B, n_ahead, BLOCK_B)
    unit = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = rows[:, None] & (unit < H)[None, :]
    N_GATES: tl.constexpr = CELL.n_gates
    FIRST: tl.constexpr = 1 if PROJECTED else 0

    N_EXTRA: tl.constexpr = CELL.n_extra
    if extra_ptr is not None:
        extra_ptr += group * (N_EXTRA * H)
    extra = load_vectors(extra_ptr, unit, H, N_EXTRA)
    mark = load_marks(marks_ptr, of_step, rows)
    d_state = (load(d_h_ptr + of_group * H, unit, mask),)
    kept = ()
    if not PROJECTED:  # `receive_kernel` left the kept part of h's gradient there
        kept += (load(running_ptrs[0] + of_group * H, unit, mask),)
    for s in tl.static_range(1, len(running_ptrs)):
        d = load(running_ptrs[s] + of_group * H, unit, mask)
        if s <= len(d_trace_ptrs):
            there = mask
            if mark is not None:
                there = mask & (has(mark, HOLD) == 0)[:, None]
            d += load(d_trace_ptrs[s - 1] + of_step * H, unit, there)
        zone_ptr = None if zone_ptrs is None else zone_ptrs[s]
        d, d_kept = parted(d, load_zone(zone_ptr, of_step * H, unit, mask), mark)
        d_state += (d,)
        kept += (d_kept,)

    before, after = (), ()
    for s in tl.static_range(len(running_ptrs)):
        after += (load(after_ptrs[s] + of_step * H, unit, mask),)
        if s < FIRST:
            before += (zeros_like(after[0]),)
        else:
            before += (load(before_ptrs[s] + of_step * H, unit, mask),)
    saved = load_parts(saved_ptr + of_step * (CELL.n_saved * H), unit, mask, H, CELL.n_saved)
    normal = ()
    if CELL.is_normalized:
        normal = load_parts(normal_ptrs[0] + of_step * (N_GATES * H), unit, mask, H, N_GATES)
        normal += (tl.load(normal_ptrs[1] + of_step[:, None], mask=rows[:, None], other=0.0),)
    d_product = ()
    if CELL.late_backward is not None:
        d = load(d_product_ptr + of_group * H, unit, mask)
        if drop_ptr is not None:
            d *= load(drop_ptr + of_group * H, unit, mask)
        d_product = (d,)
    d_rh, d_apart, d_raw, d_extra, d_before = cell_backward(
        saved, normal, after, before, d_state, d_product, extra, mark, mask, H, CELL
    )

    of_gates = of_step * ((N_GATES + CELL.n_apart) * H)
    store_parts(d_gates_ptr + of_gates, unit, mask, d_rh + d_apart, H)
    if d_extra_ptr is not None:
        store_parts(d_extra_ptr + of_step * (len(d_extra) * H), unit, mask, d_extra, H)
    if d_raw_ptr is not None:
        store_parts(d_raw_ptr + of_step * (N_GATES * H), unit, mask, d_raw, H)
    for s in tl.static_range(FIRST, len(running_ptrs)):
        d = d_before[s]
        if s > 0:  # for h, `receive_kernel` has passed on the kept part already
            d += kept[s - FIRST]
        d_fresh_ptr = None if d_fresh_ptrs is None else d_fresh_ptrs[s]
        d = passed_on(d, d_fresh_ptr, mark, of_group * H, unit, mask)
        if s == 0:
            d += kept[0]
        store(running_ptrs[s] + of_group * H, unit, mask, d)
