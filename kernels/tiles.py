"""Tiles in and out of memory, and the products with the recurrent weights that a tile needs.

`row_ptrs` point to column 0 of each row of the batch tile, `unit` are hidden units. What grows
with T and B is in the row pointers, in 64 bits; offsets inside a row have 32.
"""

import triton
import triton.language as tl

from . import activations


@triton.jit
def shift(ptrs, offset):
    """Move every pointer of a tuple."""
    moved = ()
    for n in tl.static_range(len(ptrs)):
        moved += (ptrs[n] + offset,)
    return moved


@triton.jit
def load_states(ptrs, rows, width, row_mask, unit0, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Load the tile of every state from sequences of rows of `width` columns."""
    tiles = ()
    for s in tl.static_range(len(ptrs)):
        tiles += load_tiles(ptrs[s] + rows * width, row_mask, unit0, H, BLOCK_H, 1)
    return tiles


@triton.jit
def store_states(
    ptrs,
    rows,
    width,
    row_mask,
    unit0,
    tiles,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Store the tile of every state."""
    for s in tl.static_range(len(ptrs)):
        store_tiles(ptrs[s] + rows * width, row_mask, unit0, (tiles[s],), H, BLOCK_H)


# Groups are the directions of a layer, or of each of its heads or of the members of an ensemble. Of
# the directions alone the first walks forward and the second from the end of time, and nobody says
# so: `n_ahead` is None, and costs plain layers nothing. Otherwise it is the number of those, the
# first, that walk forward.


@triton.jit
def is_ahead(i_group, n_ahead):
    """Whether a group walks forward through time."""
    if n_ahead is None:
        return i_group == 0
    else:
        return i_group < n_ahead


@triton.jit
def beyond_groups(i_group, n_ahead, size):
    """How far the elements of a group, so many in each, lie behind those of the first one."""
    if n_ahead is None:
        return i_group * size
    else:
        return i_group.to(tl.int64) * size


# Marks say of each row how its state flows at a step: bits, as flow.py of the package makes them.
# HOLD: the row has no such step; FRESH: its state is replaced before it; CUT: no gradient passes
# from it to the state before it; START: it is the row's first.
HOLD, FRESH, CUT, START = (tl.constexpr(bit) for bit in (1, 2, 4, 8))
# With any of these, the step before has no part in the recurrent product.
STOPS = tl.constexpr(HOLD.value | FRESH.value | CUT.value)


@triton.jit
def load_mark(marks_ptr, row_mask):
    """Load the marks of a step, from that of the tile's first row on."""
    return tl.load(marks_ptr + tl.arange(0, row_mask.shape[0]), mask=row_mask, other=0)


@triton.jit
def has(mark, BITS: tl.constexpr):
    """Whether rows have one of some marks."""
    return (mark & BITS) != 0


@triton.jit
def _along(condition):
    if len(condition.shape) == 1:
        condition = condition[:, None]
    return condition


@triton.jit
def choose(mark, BITS: tl.constexpr, tiles, others):
    """Tiles for the rows that have one of some marks, others for the rest."""
    chosen = ()
    for n in tl.static_range(len(tiles)):
        chosen += (tl.where(_along(has(mark, BITS)), tiles[n], others[n]),)
    return chosen


@triton.jit
def without(mark, BITS: tl.constexpr, tiles):
    """Put zeros, whatever was there, in the rows that have one of some marks."""
    kept = ()
    for n in tl.static_range(len(tiles)):
        kept += (tl.where(_along(has(mark, BITS)), 0.0, tiles[n]),)
    return kept


@triton.jit
def zeros_like(tiles):
    """Make zeros of the shapes of tiles."""
    zeros = ()
    for n in tl.static_range(len(tiles)):
        zeros += (activations.zeros_like(tiles[n]),)
    return zeros


@triton.jit
def add(tiles, others):
    """Add to the first tiles as many others."""
    sums = ()
    for n in tl.static_range(len(tiles)):
        if n < len(others):
            sums += (tiles[n] + others[n],)
        else:
            sums += (tiles[n],)
    return sums


# Three or four tiles that lie H columns apart are moved as one: each thread then has 16 bytes of a
# row, and there is one trip through shared memory between this layout and that of the products.


@triton.jit
def _block_of_tiles(
    row_ptrs, row_mask, unit0, H: tl.constexpr, BLOCK_H: tl.constexpr, N: tl.constexpr
):
    """Pointers and mask of N tiles side by side, in columns n * BLOCK_H."""
    column = tl.arange(0, 4 * BLOCK_H)
    n = column // BLOCK_H
    unit = unit0 + column % BLOCK_H
    mask = row_mask[:, None] & ((unit < H) & (n < N))[None, :]
    return row_ptrs[:, None] + (n * H + unit)[None, :], mask


@triton.jit
def load_tiles(row_ptrs, row_mask, unit0, H: tl.constexpr, BLOCK_H: tl.constexpr, N: tl.constexpr):
    """Load N tiles that lie H columns apart, as float32."""
    if N == 3 or N == 4:
        ptrs, mask = _block_of_tiles(row_ptrs, row_mask, unit0, H, BLOCK_H, N)
        block = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        block = tl.reshape(block, [row_mask.shape[0], 2, 2, BLOCK_H])
        even, odd = tl.split(tl.permute(block, (0, 3, 1, 2)))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        return (a, b, c, d)[:N]
    else:
        unit = unit0 + tl.arange(0, BLOCK_H)
        mask = row_mask[:, None] & (unit < H)[None, :]
        tiles = ()
        for n in tl.static_range(N):
            ptrs = row_ptrs[:, None] + (n * H + unit)[None, :]
            tiles += (tl.load(ptrs, mask=mask, other=0.0).to(tl.float32),)
        return tiles


@triton.jit
def store_tiles(row_ptrs, row_mask, unit0, tiles, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Store tiles H columns apart, rounded to the dtype of the memory."""
    dtype = row_ptrs.dtype.element_ty
    if len(tiles) == 4:
        even = tl.join(tiles[0].to(dtype), tiles[2].to(dtype))
        odd = tl.join(tiles[1].to(dtype), tiles[3].to(dtype))
        block = tl.permute(tl.join(even, odd), (0, 2, 3, 1))
        ptrs, mask = _block_of_tiles(row_ptrs, row_mask, unit0, H, BLOCK_H, 4)
        tl.store(ptrs, tl.reshape(block, [row_mask.shape[0], 4 * BLOCK_H]), mask=mask)
    else:
        unit = unit0 + tl.arange(0, BLOCK_H)
        mask = row_mask[:, None] & (unit < H)[None, :]
        for n in tl.static_range(len(tiles)):
            ptrs = row_ptrs[:, None] + (n * H + unit)[None, :]
            tl.store(ptrs, tiles[n].to(dtype), mask=mask)


# Noise: recurrent dropout multiplies h by factors, of each row and unit, before the recurrent
# product. By zoneout a state keeps its old value, in units drawn for every step (bytes), or in
# equal shares everywhere (one number, of evaluation).


@triton.jit
def load_factors(drop_ptr, row, row_mask, unit0, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Load the factors of recurrent dropout for a tile of h; nothing from None."""
    factors = ()
    if drop_ptr is not None:
        factors = load_tiles(drop_ptr + row * H, row_mask, unit0, H, BLOCK_H, 1)
    return factors


@triton.jit
def dropped(h, factors):
    """h after recurrent dropout, or a gradient on its way back through it."""
    if len(factors) > 0:
        h = h * factors[0]
    return h


@triton.jit
def load_zones(zone_ptrs, rows, row_mask, unit0, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Load what each state keeps at a step, of rows counted in (D, T, B): a condition or a share.

    A state that has no zoneout has an empty tuple; without any there is nothing.
    """
    zones = ()
    if zone_ptrs is not None:
        unit = unit0 + tl.arange(0, BLOCK_H)
        mask = row_mask[:, None] & (unit < H)[None, :]
        for s in tl.static_range(len(zone_ptrs)):
            if zone_ptrs[s] is None:
                zones += ((),)
            elif zone_ptrs[s].dtype.element_ty == tl.uint8:
                ptrs = zone_ptrs[s] + (rows * H)[:, None] + unit[None, :]
                zones += ((tl.load(ptrs, mask=mask, other=0) != 0,),)
            else:
                zones += ((tl.load(zone_ptrs[s]).to(tl.float32),),)
    return zones


@triton.jit
def mix(zone, old, new):
    """What a state, or a gradient, is where its old value is kept by a condition or a share."""
    if zone.dtype == tl.int1:
        return tl.where(zone, old, new)
    else:
        return zone * old + (1.0 - zone) * new


@triton.jit
def zoned(zones, before, after):
    """The states after a step of which some part is what it was before."""
    if len(zones) > 0:
        states = ()
        for s in tl.static_range(len(after)):
            if len(zones[s]) > 0:
                states += (mix(zones[s][0], before[s], after[s]),)
            else:
                states += (after[s],)
        after = states
    return after


@triton.jit
def cell_backward(past, d_state, extra, CELL: tl.constexpr):
    """Go back through a cell, and by it where zoneout kept a state."""
    _, saved, state, previous, zones = past
    d_new = d_state
    if len(zones) > 0:
        d_new = zoned(zones, zeros_like(d_state), d_state)
    d_rh, d_wx, d_previous = CELL.backward(saved, state, previous, d_new, extra)
    if len(zones) > 0:
        d_all = ()
        for s in tl.static_range(len(d_state)):
            if len(zones[s]) > 0:
                kept = mix(zones[s][0], d_state[s], activations.zeros_like(d_state[s]))
                d_all += (d_previous[s] + kept,)
            else:
                d_all += (d_previous[s],)
        d_previous = d_all
    return d_rh, d_wx, d_previous


@triton.jit
def load_past(
    d_out_ptrs,
    state_ptrs,
    initial_ptrs,
    fresh_ptrs,
    past_ptrs,
    extra,
    mark,
    zones,
    rows,
    rows_before,
    is_first,
    row,
    width,
    row_mask,
    unit0,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CELL: tl.constexpr,
):
    """Load what backward needs of a step: gradients that arrive there, activations, the states that
    the cell made and those before it; `zones` are handed on. `past_ptrs` is one pointer to the
    activations, or two to the parts of the gates from which they are computed. With zoneout there
    must be two: the states after a step are not what the cell made.
    """
    out_mask = row_mask
    if mark is not None:
        out_mask = row_mask & (has(mark, HOLD) == 0)
    d_out = load_states(d_out_ptrs, rows, width, out_mask, unit0, H, BLOCK_H)
    if len(past_ptrs) == 1:
        state = load_states(state_ptrs, rows, width, row_mask, unit0, H, BLOCK_H)
    previous = ()
    for s in tl.static_range(len(state_ptrs)):
        if mark is None:
            base = tl.where(is_first, initial_ptrs[s], state_ptrs[s])
            offsets = tl.where(is_first, row * H, rows_before * width)
            previous += load_tiles(base + offsets, row_mask, unit0, H, BLOCK_H, 1)
        else:
            row_ptrs = tl.where(
                is_first | has(mark, START),
                initial_ptrs[s] + row * H,
                state_ptrs[s] + rows_before * width,
            )
            if fresh_ptrs is None:
                mask = row_mask & (has(mark, FRESH) == 0)
            else:
                mask = row_mask
                row_ptrs = tl.where(has(mark, FRESH), fresh_ptrs[s] + row * H, row_ptrs)
            previous += load_tiles(row_ptrs, mask, unit0, H, BLOCK_H, 1)
    N: tl.constexpr = CELL.n_saved if len(past_ptrs) == 1 else CELL.n_gates
    saved = load_tiles(past_ptrs[0] + rows * (N * H), row_mask, unit0, H, BLOCK_H, N)
    if len(past_ptrs) == 2:
        rh = load_tiles(past_ptrs[1] + rows * (N * H), row_mask, unit0, H, BLOCK_H, N)
        state, saved = CELL.forward(saved, rh, previous, extra)
    return d_out, saved, state, previous, zones


@triton.jit
def mark_gradients(mark, d_state, d_rh, d_wx, d_previous):
    """What is left of a step's gradients where it is held, and where what was before is cut off.

    Not of the part of the state's gradient that goes through the recurrent product, which arrives
    later: see `mark_received`.
    """
    d_previous = without(mark, FRESH | CUT, d_previous)
    d_previous = choose(mark, HOLD, d_state, d_previous)
    return without(mark, HOLD, d_rh), without(mark, HOLD, d_wx), d_previous


@triton.jit
def mark_received(mark, dh):
    """What is left of the product of a step's gradients for the step before it."""
    return without(mark, STOPS, (dh,))[0]


# A dot wants many columns, so all gates of a slice go through it side by side, as a block of 1, 2
# or 4 gates: 3 gates are 4 of which one is empty, which takes the matrix units no longer than two
# products that share their left operand. The columns are interleaved so that the tensor cores'
# layout, in which a thread holds two adjacent columns of every eight, leaves all gates of a unit
# in one thread: they come apart in registers.


@triton.jit
def block_pointers(r_ptr, unit0, H: tl.constexpr, N_GATES: tl.constexpr, BLOCK_H: tl.constexpr):
    """Row pointers into R, and their mask, for the columns of R^T of a block of gates."""
    tl.static_assert(N_GATES <= 4)
    WIDTH: tl.constexpr = N_GATES + (N_GATES == 3)
    n = tl.arange(0, WIDTH * BLOCK_H)
    if WIDTH == 4:
        gate = n % 2 * 2 + n // (2 * BLOCK_H)
        unit = unit0 + n % (2 * BLOCK_H) // 2
    else:
        gate = n % WIDTH
        unit = unit0 + n // WIDTH
    return r_ptr + (gate * H + unit) * H, (unit < H) & (gate < N_GATES)


@triton.jit
def load_vectors(ptr, unit0, H: tl.constexpr, BLOCK_H: tl.constexpr, N: tl.constexpr):
    """Load N parts of a vector that lie H apart, as rows of tiles; nothing from None."""
    unit = unit0 + tl.arange(0, BLOCK_H)
    vectors = ()
    if ptr is not None:
        for n in tl.static_range(N):
            vector = tl.load(ptr + n * H + unit, mask=unit < H, other=0.0).to(tl.float32)
            vectors += (vector[None, :],)
    return vectors


@triton.jit
def split_block(block, bias, N_GATES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """Take a block apart into gates and add their biases: the recurrent part of a step."""
    if N_GATES > 2:
        pairs = tl.permute(tl.reshape(block, [BLOCK_B, 2, BLOCK_H, 2]), (0, 2, 1, 3))
        first, second = tl.split(pairs)
        a, b = tl.split(first)
        c, d = tl.split(second)
        gates = (a, b, c, d)
    elif N_GATES == 2:
        a, b = tl.split(tl.reshape(block, [BLOCK_B, BLOCK_H, 2]))
        gates = (a, b)
    else:
        gates = (block,)
    rh = ()
    for g in tl.static_range(N_GATES):
        if len(bias) == 0:
            rh += (gates[g],)
        else:
            rh += (gates[g] + bias[g],)
    return rh


@triton.jit
def recurrent_part(
    block,
    bias,
    mark,
    fresh_rh_ptr,
    row,
    row_mask,
    unit0,
    H: tl.constexpr,
    N_GATES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Take a block apart into the recurrent parts of a step, replaced where the state is fresh."""
    if mark is not None:
        block = without(mark, FRESH, (block,))[0]
    rh = split_block(block, bias, N_GATES, BLOCK_B, BLOCK_H)
    if fresh_rh_ptr is not None:
        # Seldom any: what is masked costs no trip to memory.
        mask = row_mask & has(mark, FRESH)
        fresh_rows = fresh_rh_ptr + row * (N_GATES * H)
        rh = add(rh, load_tiles(fresh_rows, mask, unit0, H, BLOCK_H, N_GATES))
    return rh


@triton.jit
def refresh(state, mark, fresh_ptrs, row, row_mask, unit0, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Replace the state before a step where it is fresh."""
    if mark is not None:
        state = without(mark, FRESH, state)
    if fresh_ptrs is not None:
        mask = row_mask & has(mark, FRESH)
        state = add(state, load_states(fresh_ptrs, row, H, mask, unit0, H, BLOCK_H))
    return state


@triton.jit
def as_operand(x, PRECISION: tl.constexpr):
    """What a product takes of a tile: of float32 by TF32 rounded to its 11 bits, half away from 0.

    Tensor cores leave the other bits out, which would cut off instead, always towards 0.
    """
    if PRECISION == "tf32" and x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        # A NaN stays one, whichever of its bits are set.
        bits = tl.where(x != x, bits | 0x400000, (bits + 0x1000) & -0x2000)
        return bits.to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def as_operands(tiles, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """What products in a dtype take of a tuple of tiles."""
    operands = ()
    for n in tl.static_range(len(tiles)):
        operands += (as_operand(tiles[n].to(dtype), PRECISION),)
    return operands


@triton.jit
def load_columns(
    r_ptr,
    H: tl.constexpr,
    N_GATES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Load R^T for all gates, as the right operand of products of h."""
    ptrs, mask = block_pointers(r_ptr, 0, H, N_GATES, BLOCK_H)
    k = tl.arange(0, BLOCK_H)
    inside = mask[None, :] & (k < H)[:, None]
    return as_operand(tl.load(ptrs[None, :] + k[:, None], mask=inside, other=0.0), PRECISION)


@triton.jit
def load_rows(
    r_ptr,
    H: tl.constexpr,
    N_GATES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Load R, gate by gate, as right operands of products of the gates' gradients."""
    unit = tl.arange(0, BLOCK_H)
    mask = (unit < H)[:, None] & (unit < H)[None, :]
    rows = ()
    for gate in tl.static_range(N_GATES):
        ptrs = r_ptr + ((gate * H + unit) * H)[:, None] + unit[None, :]
        rows += (as_operand(tl.load(ptrs, mask=mask, other=0.0), PRECISION),)
    return rows
