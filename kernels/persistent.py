"""Whole sequences in one launch, with the recurrent weights distributed over a group of programs.

Program j of a group holds all gates of UNITS hidden units, and the states of these units, from the
first step to the last, for one or two tiles of TILE_ROWS batch rows; with two, it computes one
while the data published for the other is in flight. At each step every program needs the results
of all: forward h of all units, backward the gradients of all gates. They are exchanged through
memory, word by word (see ``words.py``), and loaded directly as operands of the product, which is
split over the warps by columns (see ``fragments.py``): R stays in registers as far as it fits, and
only the partial sums go through shared memory, with one barrier. Work that does not depend on the
other programs is done before waiting for them.

Forward multiplies h by the rows of R of the program's own units. Backward, in reverse time,
multiplies the gradients of all gates by the columns of R of its own units. It writes gate gradients
only; those of the weights and the input are computed afterwards as GEMMs over all steps.

The arguments are those of ``resident.py``; y, or d_gates backward, is filled with MISSING first.
With recurrent dropout the programs exchange not y but the product's operand, h times its factors,
which then precedes y in the states. The grid is (slices of UNITS units, tiles or pairs of tiles,
groups), all co-resident on the device; further tiles need further launches. Written in Gluon,
Triton's language with explicit layouts, which neither Triton's interpreter nor AMD's compiler
supports.

These functions take no records; values that belong together are passed as tuples:

    context   the pointers of a pass; vectors over the units, such as biases; the operands, which
              are the weights and error_ptr; units and rows of a tile [UNITS, TILE_ROWS], as a
              column and a row; the offsets at which it is published; T, rows from one step to the
              next, columns of y
    place     of a tile: its first batch row; rows remaining from there on; its mask, also in the
              publishing layout; the columns of its operand, see `columns_of`; the factors of its h
    tile      what a tile carries from step to step, beginning with the row that it published
    flow      marks and zones of a step
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .fragments import (
    TILE_ROWS,
    UNITS,
    keep,
    kept,
    left_operand,
    named_rows,
    product_layout,
    publishing_layout,
    right_operand,
    shared_sums_layout,
    state_layout,
    sums_layout,
    weights_layout,
)
from .tiles import (
    FRESH,
    HOLD,
    START,
    add,
    as_operand,
    beyond_groups,
    cell_backward,
    choose,
    dropped,
    has,
    is_ahead,
    mark_gradients,
    mark_received,
    shift,
    without,
    zeros_like,
    zoned,
)
from .words import MISSING, load_chunks, publish, settle


class Pass(NamedTuple):
    """Compile-time constants of a pass, in addition to its cell."""

    H: int
    K: int  # columns of the operands
    GROUP: int  # chunks of them that are loaded at once: at most 32 registers per thread
    IN_REGISTERS: int  # chunks of the weights kept in registers
    PRECISION: str
    SPIN_LIMIT: int


@gluon.constexpr_function
def pass_of(H, K, CHUNKS, CHUNK_BYTES, IN_REGISTERS, PRECISION, SPIN_LIMIT):
    """Make a `Pass`: load at most `CHUNKS` at once; a warp's row of each has `CHUNK_BYTES`."""
    return Pass(H, K, min(CHUNKS, 256 // CHUNK_BYTES), IN_REGISTERS, PRECISION, SPIN_LIMIT)


# The program-wide barrier; its name differs between triton 3.7 and 3.6.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def load_tiles(ptr, offsets, mask, H: gl.constexpr, N: gl.constexpr):
    """Load N tiles that lie H columns apart, as float32."""
    tiles = ()
    for n in gl.static_range(N):
        tiles += (gl.load(ptr + (offsets + n * H), mask=mask, other=0.0).to(gl.float32),)
    return tiles


@gluon.jit
def load_each(ptrs, at, offsets, mask):
    """Load one tile at each of several pointers, offset by `at` elements, as float32."""
    tiles = ()
    for n in gl.static_range(len(ptrs)):
        tiles += (gl.load(ptrs[n] + at + offsets, mask=mask, other=0.0).to(gl.float32),)
    return tiles


@gluon.jit
def store_each(ptrs, at, offsets, mask, tiles):
    """Store each of several tiles, rounded to the dtype of its memory."""
    for n in gl.static_range(len(ptrs)):
        gl.store(ptrs[n] + at + offsets, tiles[n].to(ptrs[n].dtype.element_ty), mask=mask)


@gluon.jit
def load_mark(marks_ptr, at, row, left):
    """Load the marks of a tile's rows at a step, as a row vector; an empty tuple for None."""
    if marks_ptr is None:
        return ()
    else:
        return (gl.load(marks_ptr + at + row, mask=row < left, other=0),)


@gluon.jit
def load_zones(zone_ptrs, at, unit, row, mask, H: gl.constexpr):
    """Load what each state keeps at a step; see ``tiles.load_zones``."""
    zones = ()
    if zone_ptrs is not None:
        for s in gl.static_range(len(zone_ptrs)):
            if zone_ptrs[s] is None:
                zones += ((),)
            elif zone_ptrs[s].dtype.element_ty == gl.uint8:
                ptrs = zone_ptrs[s] + at * H + (unit + row * H)
                zones += ((gl.load(ptrs, mask=mask, other=0) != 0,),)
            else:
                zones += ((gl.load(zone_ptrs[s]).to(gl.float32),),)
    return zones


@gluon.jit
def load_factors(drop_ptr, row0, unit, row, mask, H: gl.constexpr):
    """Load the recurrent-dropout factors for a tile of h; an empty tuple for None."""
    factors = ()
    if drop_ptr is not None:
        factors = load_each((drop_ptr,), row0 * H, unit + row * H, mask)
    return factors


@gluon.jit
def load_vectors(ptr, i_group, unit, H: gl.constexpr, N: gl.constexpr):
    """Load N parts of a group's vector, H apart, as columns of tiles; an empty tuple for None."""
    vectors = ()
    if ptr is not None:
        ptr += i_group * N * H
        for n in gl.static_range(N):
            vectors += (gl.load(ptr + n * H + unit, mask=unit < H, other=0.0).to(gl.float32),)
    return vectors


@gluon.jit
def load_weights(
    r_ptr, unit0, H: gl.constexpr, K: gl.constexpr, IS_BACKWARD: gl.constexpr, TILES: gl.constexpr,
    W: gl.constexpr, BLOCK_K: gl.constexpr, IN_REGISTERS: gl.constexpr, PRECISION: gl.constexpr,
):  # fmt: skip
    """Load a program's part of R as operands: TILES tiles of all K columns, chunk by chunk.

    The first IN_REGISTERS chunks of a tile stay in registers, the others in shared memory.
    """
    VECTOR: gl.constexpr = 128 // r_ptr.dtype.element_ty.primitive_bitwidth
    # Backward, columns of R are rows of the operand, so units are contiguous in memory.
    ACROSS: gl.constexpr = gl.BlockedLayout(
        [1, 1, VECTOR], [1, 2 * VECTOR, 16 // VECTOR], [W, 1, 1], [2, 1, 0]
    )
    LAYOUT: gl.constexpr = ACROSS if IS_BACKWARD else weights_layout(W, BLOCK_K)
    ROWS: gl.constexpr = BLOCK_K if IS_BACKWARD else UNITS
    COLUMNS: gl.constexpr = UNITS if IS_BACKWARD else BLOCK_K
    warp = gl.arange(0, W, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    column = column[None, None, :]
    weights = ()
    for t in gl.static_range(TILES):
        for first in gl.static_range(0, K, W * BLOCK_K):
            k = first + warp * BLOCK_K + (row if IS_BACKWARD else column)
            unit = unit0 + (column if IS_BACKWARD else row)
            offsets = k * H + unit if IS_BACKWARD else (t * H + unit) * H + k
            r = gl.load(r_ptr + offsets, mask=(k < K) & (unit < H), other=0.0)
            r = as_operand(r, PRECISION)
            if IS_BACKWARD:
                r = gl.convert_layout(gl.permute(r, (0, 2, 1)), weights_layout(W, BLOCK_K))
            r = left_operand(r, W, BLOCK_K)
            if first < IN_REGISTERS * W * BLOCK_K:
                weights += (r,)
            else:
                weights += (keep(r, W, BLOCK_K),)
    return weights


@gluon.jit
def columns_of(stride, left, K: gl.constexpr, W: gl.constexpr, BLOCK_K: gl.constexpr):
    """Return the element offsets in the first chunk of rows `stride` apart, and the number of
    columns from each element on.

    There are `left` rows. Rows beyond repeat the last one, which is certain to be published.
    """
    LAYOUT: gl.constexpr = state_layout(W, BLOCK_K)
    warp = gl.arange(0, W, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    row = gl.arange(0, TILE_ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    row = gl.minimum(row, left - 1)[None, :, None]
    k = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    k = warp * BLOCK_K + k
    return row * stride + k, K - k + 0 * row


@gluon.jit
def multiply(
    chunks, row_ptr, columns, operands, buffers, number, GROUP: gl.constexpr, PASS: gl.constexpr
):
    """Multiply the weights by what all programs publish in a row, as soon as it arrives.

    `chunks` are the first GROUP of that row, already loaded once. For each tile of weights there is
    a buffer, which receives the warps' partial sums. `number`, 1 + the awaited step, is what a wait
    that gives up writes to `error_ptr`.
    """
    offsets, left = columns
    weights, error_ptr = operands
    PRECISION: gl.constexpr = PASS.PRECISION
    dtype: gl.constexpr = row_ptr.dtype.element_ty
    W: gl.constexpr = offsets.shape[0]
    BLOCK_K: gl.constexpr = offsets.shape[2]
    STRIDE: gl.constexpr = W * BLOCK_K
    TILES: gl.constexpr = len(buffers)
    CHUNKS: gl.constexpr = len(weights) // TILES
    totals = ()
    waiting = chunks
    for first in gl.static_range(0, CHUNKS, GROUP):
        chunks = waiting
        sums = ()
        for _t in gl.static_range(TILES):
            sums += (gl.zeros([W, UNITS, TILE_ROWS], gl.float32, product_layout(W)),)
        for c in gl.static_range(first, min(first + GROUP, CHUNKS)):
            here = row_ptr + (offsets + c * STRIDE)
            chunks = settle(
                chunks, here, left - c * STRIDE, error_ptr, number, PASS.H, PASS.K, PASS.SPIN_LIMIT
            )
            if c == first and first + GROUP < CHUNKS:
                # Only now that one chunk is there are the next ones most probably there as well.
                there = row_ptr + (offsets + (first + GROUP) * STRIDE)
                after = left - (first + GROUP) * STRIDE
                waiting = load_chunks(
                    there, after, min(GROUP, CHUNKS - first - GROUP), PASS.H, PASS.K
                )
            operand = as_operand(chunks[0].to(dtype, bitcast=True), PRECISION)
            operand = right_operand(operand, W, BLOCK_K)
            chunks = chunks[1:]
            before = sums
            sums = ()
            for t in gl.static_range(TILES):
                r = weights[t * CHUNKS + c]
                if c >= PASS.IN_REGISTERS:
                    r = kept(r, W, BLOCK_K)
                sums += (mma_v2(r, operand, before[t], input_precision="tf32"),)
        if first == 0:
            totals = sums
        else:
            totals = add(totals, sums)
    for t in gl.static_range(TILES):
        buffers[t].store(named_rows(totals[t], W))


@gluon.jit
def reduce(buffers):
    """Add up the warps' partial sums in each buffer, after the only barrier of a step."""
    W: gl.constexpr = gl.num_warps()
    sums = ()
    for t in gl.static_range(len(buffers)):
        sums += (gl.sum(buffers[t].load(sums_layout(W)), 0),)
    return sums


@gluon.jit
def buffers_of(SUMS: gl.constexpr):
    """Allocate shared memory for the partial sums of SUMS tiles."""
    W: gl.constexpr = gl.num_warps()
    SHAPE: gl.constexpr = [W, UNITS, TILE_ROWS]
    buffers = ()
    for _ in gl.static_range(SUMS):
        buffers += (gl.allocate_shared_memory(gl.float32, SHAPE, shared_sums_layout(W)),)
    return buffers


@gluon.jit
def load_published(row_ptr, columns, PASS: gl.constexpr):
    """Load the first chunks of what all programs publish in a row, whether present or not."""
    offsets, left = columns
    return load_chunks(row_ptr + offsets, left, PASS.GROUP, PASS.H, PASS.K)


@gluon.jit
def through_time(
    STEP: gl.constexpr, tiles, places, buffers, steps, context, CELL: gl.constexpr,
    PASS: gl.constexpr,
):  # fmt: skip
    """Advance one or two tiles, which have published a step, through further steps.

    What a tile waits for is loaded as early as it can be there: immediately for a single tile; with
    two, while the other one computes. A step leaves partial sums in shared memory that other warps
    may still be reading when the next step begins, so consecutive steps, or the two tiles of a
    step, alternate between two sets of buffers. Returns the tiles, and the chunks that the first
    one waits for.
    """
    even, odd = buffers
    chunks = load_published(tiles[0][0], places[0][4], PASS)
    if len(tiles) == 1:
        tile, place = tiles[0], places[0]
        for _ in range(steps // 2):
            tile, chunks = STEP(tile, chunks, place, (), even, context, CELL, PASS)
            tile, chunks = STEP(tile, chunks, place, (), odd, context, CELL, PASS)
        if steps % 2 == 1:
            tile, chunks = STEP(tile, chunks, place, (), even, context, CELL, PASS)
        return (tile,), chunks
    else:
        a, b = tiles
        for _ in range(steps):
            other = b[0], places[1][4]
            a, chunks = STEP(a, chunks, places[0], other, even, context, CELL, PASS)
            other = a[0], places[0][4]
            b, chunks = STEP(b, chunks, places[1], other, odd, context, CELL, PASS)
        return (a, b), chunks


@gluon.jit
def publish_state(state, wx, flow, sums, at, place, context, H: gl.constexpr, CELL: gl.constexpr):
    """Complete a step from the products of the state before it, and publish the new h."""
    row0, _, mask, publish_mask, _, factors = place
    pointers, vectors, _, unit, row, publish_offsets, size = context
    _, fresh_rh_ptr, _, _, fresh_ptrs, state_ptrs, _ = pointers
    marks, zones = flow
    bias, extra = vectors
    _, _, width = size
    G: gl.constexpr = CELL.n_gates
    dtype: gl.constexpr = state_ptrs[0].dtype.element_ty

    if len(marks) > 0:
        sums = without(marks[0], FRESH, sums)
        state = without(marks[0], FRESH, state)
    rh = add(sums, bias)
    if fresh_ptrs is not None:
        # Rarely any: masked loads cost no memory access.
        is_fresh = mask & has(marks[0], FRESH)
        offsets = unit + row * (G * H)
        rh = add(rh, load_tiles(fresh_rh_ptr + row0 * (G * H), offsets, is_fresh, H, G))
        state = add(state, load_each(fresh_ptrs, row0 * H, unit + row * H, is_fresh))
    before = state
    state, saved = CELL.forward(wx, rh, before, extra)
    state = zoned(zones, before, state)
    if len(marks) > 0:
        state = choose(marks[0], HOLD, before, state)

    row_ptr = state_ptrs[0] + at * width
    publish(row_ptr + publish_offsets, dropped(state[0], factors).to(dtype), publish_mask, H)
    return row_ptr, state, saved


@gluon.jit
def store_rest(state, saved, at, place, context, H: gl.constexpr, CELL: gl.constexpr):
    """Store the results that no program waits for."""
    _, _, mask, _, _, _ = place
    pointers, _, _, unit, row, _, size = context
    _, _, _, _, _, state_ptrs, saved_ptr = pointers
    _, _, width = size
    N: gl.constexpr = CELL.n_saved
    REST: gl.constexpr = 1 + len(state) - len(state_ptrs)  # includes y if it was not published
    store_each(state_ptrs[1:], at * width, unit + row * width, mask, state[REST:])
    if saved_ptr is not None:
        for n in gl.static_range(N):
            ptr = saved_ptr + at * (N * H) + (unit + row * (N * H) + n * H)
            gl.store(ptr, saved[n].to(saved_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def load_ahead(at, step, place, context, H: gl.constexpr, CELL: gl.constexpr):
    """Load wx, marks and zones of the next step, if there is one."""
    _, left, mask, _, _, _ = place
    pointers, _, _, unit, row, _, size = context
    wx_ptr, _, marks_ptr, zone_ptrs, _, _, _ = pointers
    T, to_next, _ = size
    G: gl.constexpr = CELL.n_gates
    at += gl.where(step < T, to_next, 0)
    wx = load_tiles(wx_ptr + at * (G * H), unit + row * (G * H), mask, H, G)
    zones = load_zones(zone_ptrs, at, unit, row, mask, H)
    return wx, (load_mark(marks_ptr, at, row, left), zones), at


@gluon.jit
def forward_step(
    tile, chunks, place, other, buffers, context, CELL: gl.constexpr, PASS: gl.constexpr
):
    row_ptr, state, wx, flow, at, step = tile
    _, _, _, _, columns, _ = place
    _, _, operands, _, _, _, _ = context
    H: gl.constexpr = PASS.H
    multiply(chunks, row_ptr, columns, operands, buffers, step, PASS.GROUP, PASS)
    # Before the barrier; otherwise the compiler sinks it below the next, independent wait.
    if len(other) > 0:
        chunks = load_published(other[0], other[1], PASS)
    next_wx, next_flow, after = load_ahead(at, step + 1, place, context, H, CELL)
    sums = reduce(buffers)
    row_ptr, state, saved = publish_state(state, wx, flow, sums, at, place, context, H, CELL)
    if len(other) == 0:
        chunks = load_published(row_ptr, columns, PASS)
    store_rest(state, saved, at, place, context, H, CELL)
    return (row_ptr, state, next_wx, next_flow, after, step + 1), chunks


@gluon.jit
def places_of(unit0, stride, W: gl.constexpr, ITEMSIZE: gl.constexpr):
    """Return units and rows of a program's tile, as a column and a row of tiles; then units, rows
    and offsets in the publishing layout.
    """
    TILE: gl.constexpr = gl.SliceLayout(0, sums_layout(W))
    PUBLISH: gl.constexpr = publishing_layout(W, ITEMSIZE)
    unit = unit0 + gl.arange(0, UNITS, layout=gl.SliceLayout(1, TILE))[:, None]
    row = gl.arange(0, TILE_ROWS, layout=gl.SliceLayout(0, TILE))[None, :]
    its_unit = unit0 + gl.arange(0, UNITS, layout=gl.SliceLayout(1, PUBLISH))[:, None]
    its_row = gl.arange(0, TILE_ROWS, layout=gl.SliceLayout(0, PUBLISH))[None, :]
    return unit, row, its_unit, its_row, its_unit + its_row * stride


@gluon.jit(do_not_specialize=["n_ahead", "T", "B", "first_tile"])
def forward_kernel(
    wx_ptr, r_ptr, b_ptr, extra_ptr, initial_ptrs, marks_ptr, fresh_ptrs, fresh_rh_ptr, state_ptrs,
    saved_ptr, final_ptrs, noise_ptrs, error_ptr, n_ahead, T, B, first_tile,
    H: gl.constexpr, CELL: gl.constexpr, BLOCK_B: gl.constexpr, BLOCK_K: gl.constexpr,
    IN_REGISTERS: gl.constexpr, PRECISION: gl.constexpr, SPIN_LIMIT: gl.constexpr,
):  # fmt: skip
    W: gl.constexpr = gl.num_warps()
    G: gl.constexpr = CELL.n_gates
    CHUNKS: gl.constexpr = (H + W * BLOCK_K - 1) // (W * BLOCK_K)
    dtype: gl.constexpr = r_ptr.dtype.element_ty
    ITEMSIZE: gl.constexpr = dtype.primitive_bitwidth // 8
    integer: gl.constexpr = gl.int16 if ITEMSIZE == 2 else gl.int32
    PASS: gl.constexpr = pass_of(
        H, H, CHUNKS, BLOCK_K * ITEMSIZE, IN_REGISTERS, PRECISION, SPIN_LIMIT
    )
    drop_ptr, zone_ptrs = noise_ptrs
    i_slice, i_tile, i_group = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    unit0 = i_slice * UNITS
    width = gl.num_programs(2) * H

    # Batch rows are counted in (D, B), rows of a step in (D, T, B).
    rows = i_group * B.to(gl.int64)
    state_ptrs = shift(state_ptrs, i_group * H - rows * T * width)

    r_ptr += beyond_groups(i_group, n_ahead, G * H * H)
    weights = load_weights(r_ptr, unit0, H, H, False, G, W, BLOCK_K, IN_REGISTERS, PRECISION)
    unit, row, its_unit, its_row, its_offsets = places_of(unit0, width, W, ITEMSIZE)
    bias = load_vectors(b_ptr, i_group, unit, H, G)
    extra = load_vectors(extra_ptr, i_group, unit, H, CELL.n_extra)
    to_next = gl.where(is_ahead(i_group, n_ahead), B, -B).to(gl.int64)
    pointers = wx_ptr, fresh_rh_ptr, marks_ptr, zone_ptrs, fresh_ptrs, state_ptrs, saved_ptr
    operands, size = (weights, error_ptr), (T, to_next, width)
    context = pointers, (bias, extra), operands, unit, row, its_offsets, size
    buffers = buffers_of(G), buffers_of(G)
    tiles = ()
    places = ()
    for n in gl.static_range(BLOCK_B // TILE_ROWS):
        first = (first_tile + i_tile).to(gl.int64) * BLOCK_B + n * TILE_ROWS
        left = (B - first).to(gl.int32)
        row0, mask = rows + first, (unit < H) & (row < left)
        columns = columns_of(width, left, H, W, BLOCK_K)
        factors = load_factors(drop_ptr, row0, unit, row, mask, H)
        place = row0, left, mask, (its_unit < H) & (its_row < left), columns, factors
        at = rows * T + first + gl.where(is_ahead(i_group, n_ahead), 0, T - 1).to(gl.int64) * B
        state = load_each(initial_ptrs, row0 * H, unit + row * H, mask)
        wx = load_tiles(wx_ptr + at * (G * H), unit + row * (G * H), mask, H, G)
        zones = load_zones(zone_ptrs, at, unit, row, mask, H)
        flow = load_mark(marks_ptr, at, row, left), zones
        # The initial h is present from the start: if it has the bits of MISSING, change the NaN.
        offsets, beyond = columns_of(H, left, H, W, BLOCK_K)
        chunks = ()
        for c in gl.static_range(CHUNKS):
            h_ptr = initial_ptrs[0] + row0 * H + (offsets + c * W * BLOCK_K)
            h = gl.load(h_ptr, mask=beyond > c * W * BLOCK_K, other=0.0)
            if drop_ptr is not None:
                its_ptr = drop_ptr + row0 * H + (offsets + c * W * BLOCK_K)
                its = gl.load(its_ptr, mask=beyond > c * W * BLOCK_K, other=0.0)
                h = h.to(gl.float32) * its.to(gl.float32)
            h = h.to(dtype).to(integer, bitcast=True)
            chunks += (gl.where(h == MISSING, -2, h).to(integer),)
        multiply(chunks, state_ptrs[0], columns, operands, buffers[1], 0, CHUNKS, PASS)
        sums = reduce(buffers[1])
        _barrier()  # before others overwrite the sums
        row_ptr, state, saved = publish_state(state, wx, flow, sums, at, place, context, H, CELL)
        store_rest(state, saved, at, place, context, H, CELL)
        wx, flow, at = load_ahead(at, 1, place, context, H, CELL)
        tiles += ((row_ptr, state, wx, flow, at, 1),)
        places += (place,)
    tiles, _ = through_time(forward_step, tiles, places, buffers, T - 1, context, CELL, PASS)
    for n in gl.static_range(len(tiles)):
        row0, _, mask, _, _, _ = places[n]
        store_each(final_ptrs, row0 * H, unit + row * H, mask, tiles[n][1])


@gluon.jit
def load_past(marks, at, step, place, context, H: gl.constexpr, CELL: gl.constexpr):
    """Load what backward needs at a step; see ``tiles.load_past``."""
    row0, _, mask, _, _, _ = place
    pointers, extra, _, unit, row, _, size = context
    d_out_ptrs, initial_ptrs, fresh_ptrs, state_ptrs, past_ptrs, _, zone_ptrs, _ = pointers
    T, to_before, width = size
    is_first = step + 1 >= T
    out_mask = mask
    if len(marks) > 0:
        out_mask = mask & (has(marks[0], HOLD) == 0)
    d_out = load_each(d_out_ptrs, at * width, unit + row * width, out_mask)
    is_initial = mask & is_first
    is_before = mask & (is_first == 0)
    if len(marks) > 0:
        is_fresh = mask & has(marks[0], FRESH)
        is_initial = mask & (is_first | has(marks[0], START)) & (is_fresh == 0)
        is_before = mask & (is_initial == 0) & (is_fresh == 0)
    before = (at + to_before) * width
    previous = load_each(initial_ptrs, row0 * H, unit + row * H, is_initial)
    previous = add(previous, load_each(state_ptrs, before, unit + row * width, is_before))
    if fresh_ptrs is not None:
        previous = add(previous, load_each(fresh_ptrs, row0 * H, unit + row * H, is_fresh))
    if len(past_ptrs) == 1:
        state = load_each(state_ptrs, at * width, unit + row * width, mask)
    N: gl.constexpr = CELL.n_saved if len(past_ptrs) == 1 else CELL.n_gates
    saved = load_tiles(past_ptrs[0] + at * (N * H), unit + row * (N * H), mask, H, N)
    if len(past_ptrs) == 2:
        rh = load_tiles(past_ptrs[1] + at * (N * H), unit + row * (N * H), mask, H, N)
        state, saved = CELL.forward(saved, rh, previous, extra)
    return d_out, saved, state, previous, load_zones(zone_ptrs, at, unit, row, mask, H)


@gluon.jit
def load_past_ahead(at, step, place, context, H: gl.constexpr, CELL: gl.constexpr):
    """Load what backward needs at the next step, if there is one, and its marks."""
    _, left, _, _, _, _ = place
    pointers, _, _, _, row, _, size = context
    _, _, _, _, _, marks_ptr, _, _ = pointers
    T, to_before, _ = size
    at += gl.where(step < T, to_before, 0)
    marks = load_mark(marks_ptr, at, row, left)
    return load_past(marks, at, step, place, context, H, CELL), marks, at


@gluon.jit
def receive_gradients(buffers, d_state, marks, place):
    """Add to a state's gradient that from the step after it, whose marks are given."""
    _, _, _, _, _, factors = place
    (dh,) = reduce(buffers)
    dh = dropped(dh, factors)
    if len(marks) > 0:
        dh = mark_received(marks[0], dh)
    return add(d_state, (dh,))


@gluon.jit
def publish_gradients(
    d_state, past, marks, d_fresh, at, place, context, H: gl.constexpr, CELL: gl.constexpr
):
    """Go back through a step and publish gate gradients; `d_state` does not include `d_out`."""
    _, _, mask, publish_mask, _, _ = place
    pointers, extra, _, unit, row, publish_offsets, _ = context
    _, _, fresh_ptrs, _, _, _, _, d_gates_ptr = pointers
    G: gl.constexpr = CELL.n_gates
    A: gl.constexpr = CELL.n_apart
    N: gl.constexpr = G + A
    dtype: gl.constexpr = d_gates_ptr.dtype.element_ty

    d_state = add(d_state, past[0])
    d_rh, d_wx, d_previous = cell_backward(past, d_state, extra, CELL)
    if fresh_ptrs is not None:
        d_fresh = choose(marks[0], FRESH, add(d_fresh, d_previous), d_fresh)
    if len(marks) > 0:
        d_rh, d_wx, d_previous = mark_gradients(marks[0], d_state, d_rh, d_wx, d_previous)
    row_ptr = d_gates_ptr + at * (N * H)
    for g in gl.static_range(G):
        publish(row_ptr + (publish_offsets + g * H), d_rh[g].to(dtype), publish_mask, H)
    for g in gl.static_range(A):
        ptr = row_ptr + (unit + row * (N * H) + (G + g) * H)
        gl.store(ptr, d_wx[g].to(dtype), mask=mask)
    return row_ptr, d_previous, marks, d_fresh


@gluon.jit
def backward_step(
    tile, chunks, place, other, buffers, context, CELL: gl.constexpr, PASS: gl.constexpr
):
    row_ptr, d_state, published_marks, d_fresh, past, marks, at, step = tile
    _, _, _, _, columns, _ = place
    _, _, operands, _, _, _, _ = context
    H: gl.constexpr = PASS.H
    multiply(chunks, row_ptr, columns, operands, buffers, step, PASS.GROUP, PASS)
    # Before the barrier; otherwise the compiler sinks it below the next, independent wait.
    if len(other) > 0:
        chunks = load_published(other[0], other[1], PASS)
    next_past, next_marks, after = load_past_ahead(at, step + 1, place, context, H, CELL)
    d_state = receive_gradients(buffers, d_state, published_marks, place)
    row_ptr, d_state, marks, d_fresh = publish_gradients(
        d_state, past, marks, d_fresh, at, place, context, H, CELL
    )
    if len(other) == 0:
        chunks = load_published(row_ptr, columns, PASS)
    return (row_ptr, d_state, marks, d_fresh, next_past, next_marks, after, step + 1), chunks


@gluon.jit(do_not_specialize=["n_ahead", "T", "B", "first_tile"])
def backward_kernel(
    d_out_ptrs, d_final_ptrs, r_ptr, extra_ptr, initial_ptrs, marks_ptr, fresh_ptrs, state_ptrs,
    past_ptrs, d_gates_ptr, d_initial_ptrs, d_fresh_ptrs, noise_ptrs, error_ptr, n_ahead,
    T, B, first_tile, H: gl.constexpr, CELL: gl.constexpr, BLOCK_B: gl.constexpr,
    BLOCK_K: gl.constexpr, IN_REGISTERS: gl.constexpr, PRECISION: gl.constexpr,
    SPIN_LIMIT: gl.constexpr,
):  # fmt: skip
    W: gl.constexpr = gl.num_warps()
    G: gl.constexpr = CELL.n_gates
    N: gl.constexpr = G + CELL.n_apart
    CHUNKS: gl.constexpr = (G * H + W * BLOCK_K - 1) // (W * BLOCK_K)
    dtype: gl.constexpr = r_ptr.dtype.element_ty
    ITEMSIZE: gl.constexpr = dtype.primitive_bitwidth // 8
    # Load one gate's chunks at a time: the gates are read in the order in which they are published.
    PASS: gl.constexpr = pass_of(
        H, G * H, (CHUNKS + G - 1) // G, BLOCK_K * ITEMSIZE, IN_REGISTERS, PRECISION, SPIN_LIMIT
    )
    drop_ptr, zone_ptrs = noise_ptrs
    i_slice, i_tile, i_group = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    unit0 = i_slice * UNITS
    width = gl.num_programs(2) * H

    rows = i_group * B.to(gl.int64)
    state_ptrs = shift(state_ptrs, i_group * H - rows * T * width)
    d_out_ptrs = shift(d_out_ptrs, i_group * H - rows * T * width)

    r_ptr += beyond_groups(i_group, n_ahead, G * H * H)
    weights = load_weights(r_ptr, unit0, H, G * H, True, 1, W, BLOCK_K, IN_REGISTERS, PRECISION)
    unit, row, its_unit, its_row, its_offsets = places_of(unit0, N * H, W, ITEMSIZE)
    extra = load_vectors(extra_ptr, i_group, unit, H, CELL.n_extra)
    to_before = gl.where(is_ahead(i_group, n_ahead), -B, B).to(gl.int64)
    pointers = (
        d_out_ptrs, initial_ptrs, fresh_ptrs, state_ptrs, past_ptrs, marks_ptr, zone_ptrs,
        d_gates_ptr,
    )  # fmt: skip
    operands, size = (weights, error_ptr), (T, to_before, width)
    context = pointers, extra, operands, unit, row, its_offsets, size
    buffers = buffers_of(1), buffers_of(1)
    tiles = ()
    places = ()
    for n in gl.static_range(BLOCK_B // TILE_ROWS):
        first = (first_tile + i_tile).to(gl.int64) * BLOCK_B + n * TILE_ROWS
        left = (B - first).to(gl.int32)
        row0, mask = rows + first, (unit < H) & (row < left)
        columns = columns_of(N * H, left, G * H, W, BLOCK_K)
        factors = load_factors(drop_ptr, row0, unit, row, mask, H)
        place = row0, left, mask, (its_unit < H) & (its_row < left), columns, factors
        at = rows * T + first + gl.where(is_ahead(i_group, n_ahead), T - 1, 0).to(gl.int64) * B
        d_state = load_each(d_final_ptrs, row0 * H, unit + row * H, mask)
        marks = load_mark(marks_ptr, at, row, left)
        past = load_past(marks, at, 0, place, context, H, CELL)
        d_fresh = ()
        if fresh_ptrs is not None:
            d_fresh = zeros_like(d_state)
        # The last step receives nothing: no step follows it.
        row_ptr, d_state, published_marks, d_fresh = publish_gradients(
            d_state, past, marks, d_fresh, at, place, context, H, CELL
        )
        past, marks, at = load_past_ahead(at, 1, place, context, H, CELL)
        tiles += ((row_ptr, d_state, published_marks, d_fresh, past, marks, at, 1),)
        places += (place,)
    _barrier()  # else the compiler inserts one into every step, for what came before
    tiles, chunks = through_time(backward_step, tiles, places, buffers, T - 1, context, CELL, PASS)
    for n in gl.static_range(len(tiles)):
        row_ptr, d_state, published_marks, d_fresh, _, _, _, _ = tiles[n]
        row0, _, mask, _, columns, _ = places[n]
        if n > 0:
            chunks = load_published(row_ptr, columns, PASS)
        _barrier()  # others may still read the sums of the previous step
        multiply(chunks, row_ptr, columns, operands, buffers[0], T, PASS.GROUP, PASS)
        d_state = receive_gradients(buffers[0], d_state, published_marks, places[n])
        store_each(d_initial_ptrs, row0 * H, unit + row * H, mask, d_state)
        if fresh_ptrs is not None:
            store_each(d_fresh_ptrs, row0 * H, unit + row * H, mask, d_fresh)
