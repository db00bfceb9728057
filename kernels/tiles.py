"""Move tiles in and out of memory, and prepare the recurrent weights for a tile's products.

`row_ptrs` point to column 0 of each row of the batch tile, `unit` are hidden units. Offsets that
grow with T and B are 64-bit and part of the row pointers; offsets within a row are 32-bit.
"""

import triton
import triton.language as tl

from . import activations


@triton.jit
def shift(ptrs, offset):
    """Offset every pointer of a tuple."""
    moved = ()
    for n in tl.static_range(len(ptrs)):
        moved += (ptrs[n] + offset,)
    return moved


@triton.jit
def load_states(ptrs, rows, width, row_mask, unit0, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Load the tile of every state from sequences with rows of `width` columns."""
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


# Groups are directions of a layer, or of its heads or ensemble members. With directions only, the
# first walks forward and the second from the end of time; `n_ahead` is then None, which costs plain
# layers nothing. Otherwise it is the number of groups that walk forward; these come first.


@triton.jit
def is_ahead(i_group, n_ahead):
    """Return whether a group walks forward through time."""
    if n_ahead is None:
        return i_group == 0
    else:
        return i_group < n_ahead


@triton.jit
def beyond_groups(i_group, n_ahead, size):
    """Return the offset of a group's elements, `size` in each group, from those of the first."""
    if n_ahead is None:
        return i_group * size
    else:
        return i_group.to(tl.int64) * size


# Marks tell for each row how its state flows at a step. They are bits, set by fastrnn/flow.py.
# HOLD: the row has no such step; FRESH: its state is replaced before the step; CUT: no gradient
# flows from the step to the state before it; START: it is the row's first step.
HOLD, FRESH, CUT, START = (tl.constexpr(bit) for bit in (1, 2, 4, 8))
# With any of these, no gradient of the recurrent product reaches the step before.
STOPS = tl.constexpr(HOLD.value | FRESH.value | CUT.value)


@triton.jit
def load_mark(marks_ptr, row_mask):
    """Load the marks of a step; the pointer is at the tile's first row."""
    return tl.load(marks_ptr + tl.arange(0, row_mask.shape[0]), mask=row_mask, other=0)


@triton.jit
def has(mark, BITS: tl.constexpr):
    """Return whether each row has any of some marks."""
    return (mark & BITS) != 0


@triton.jit
def _along(condition):
    if len(condition.shape) == 1:
        condition = condition[:, None]
    return condition


@triton.jit
def choose(mark, BITS: tl.constexpr, tiles, others):
    """Select tiles for the rows that have any of some marks, others for the rest."""
    chosen = ()
    for n in tl.static_range(len(tiles)):
        chosen += (tl.where(_along(has(mark, BITS)), tiles[n], others[n]),)
    return chosen


@triton.jit
def without(mark, BITS: tl.constexpr, tiles):
    """Set the rows that have any of some marks to zero, whatever they contained."""
    kept = ()
    for n in tl.static_range(len(tiles)):
        kept += (tl.where(_along(has(mark, BITS)), 0.0, tiles[n]),)
    return kept


@triton.jit
def zeros_like(tiles):
    """Return zeros with the shapes of tiles."""
    zeros = ()
    for n in tl.static_range(len(tiles)):
        zeros += (activations.zeros_like(tiles[n]),)
    return zeros


@triton.jit
def add(tiles, others):
    """Add `others` to as many of the first tiles."""
    sums = ()
    for n in tl.static_range(len(tiles)):
        if n < len(others):
            sums += (tiles[n] + others[n],)
        else:
            sums += (tiles[n],)
    return sums


# Three or four tiles that lie H columns apart are moved as one block: each thread then accesses 16
# bytes of a row, and one pass through shared memory converts to the layout of the products.


@triton.jit
def _block_of_tiles(
    row_ptrs, row_mask, unit0, H: tl.constexpr, BLOCK_H: tl.constexpr, N: tl.constexpr
):
    """Return pointers and mask for N tiles side by side, in columns n * BLOCK_H."""
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


# Noise. Recurrent dropout multiplies h by factors for each row and unit before the recurrent
# product. With zoneout a state keeps its old value, either in units drawn at every step (bytes) or
# by the same share everywhere (one number, in evaluation).


@triton.jit
def load_factors(drop_ptr, row, row_mask, unit0, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Load the recurrent-dropout factors for a tile of h; an empty tuple for None."""
    factors = ()
    if drop_ptr is not None:
        factors = load_tiles(drop_ptr + row * H, row_mask, unit0, H, BLOCK_H, 1)
    return factors


@triton.jit
def dropped(h, factors):
    """Apply recurrent dropout to h, or to a gradient on its way back."""
    if len(factors) > 0:
        h = h * factors[0]
    return h


@triton.jit
def load_zones(zone_ptrs, rows, row_mask, unit0, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Load what each state keeps at a step, for rows counted in (D, T, B): a condition or a share.

    A state without zoneout has an empty tuple; with no zoneout at all, the result is empty.
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
    """Mix the old and new value of a state or gradient, by a condition or a share of the old."""
    if zone.dtype == tl.int1:
        return tl.where(zone, old, new)
    else:
        return zone * old + (1.0 - zone) * new


@triton.jit
def zoned(zones, before, after):
    """Return the states after a step, with the parts kept by zoneout taken from before."""
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
    """Go back through a cell, and around it where zoneout kept a state."""
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
    """Load what backward needs at a step: the gradients that arrive there, activations, the states
    that the cell computed and those before it; `zones` are returned unchanged. `past_ptrs` is one
    pointer to the activations, or two to the parts of the gates from which they are recomputed.
    Zoneout requires two, since the states after a step are then not what the cell computed.
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
    """Correct a step's gradients in rows that are held and where the flow from before is cut.

    Does not cover the part of the state's gradient that goes through the recurrent product, which
    arrives later: see `mark_received`.
    """
    d_previous = without(mark, FRESH | CUT, d_previous)
    d_previous = choose(mark, HOLD, d_state, d_previous)
    return without(mark, HOLD, d_rh), without(mark, HOLD, d_wx), d_previous


@triton.jit
def mark_received(mark, dh):
    """Zero the gradient from the recurrent product where it does not reach the step before."""
    return without(mark, STOPS, (dh,))[0]


# A dot needs many columns, so all gates of a slice go through it side by side, as a block of 1, 2
# or 4 gates: 3 gates are padded to 4, which takes the matrix units no longer than two products that
# share their left operand. The columns are interleaved so that the tensor cores' layout, in which a
# thread holds two adjacent columns of every eight, keeps all gates of a unit in one thread:
# splitting the block into gates then stays within registers.


@triton.jit
def block_pointers(r_ptr, unit0, H: tl.constexpr, N_GATES: tl.constexpr, BLOCK_H: tl.constexpr):
    """Return row pointers into R, and their mask, for the columns of R^T of a block of gates."""
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
    """Load N parts of a vector that lie H apart, as rows of tiles; an empty tuple for None."""
    unit = unit0 + tl.arange(0, BLOCK_H)
    vectors = ()
    if ptr is not None:
        for n in tl.static_range(N):
            vector = tl.load(ptr + n * H + unit, mask=unit < H, other=0.0).to(tl.float32)
            vectors += (vector[None, :],)
    return vectors


@triton.jit
def split_block(block, bias, N_GATES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """Split a block into gates and add their biases: the recurrent part of a step."""
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
    """Split a block into the recurrent parts of a step, replaced where the state is fresh."""
    if mark is not None:
        block = without(mark, FRESH, (block,))[0]
    rh = split_block(block, bias, N_GATES, BLOCK_B, BLOCK_H)
    if fresh_rh_ptr is not None:
        # Rarely any: masked loads cost no memory access.
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
    """Return a tile as a product's operand: for TF32, round float32 to 11 bits, half away from 0.

    Tensor cores ignore the remaining bits, which would truncate towards 0.
    """
    if PRECISION == "tf32" and x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        # A NaN stays a NaN, whichever of its bits are set.
        bits = tl.where(x != x, bits | 0x400000, (bits + 0x1000) & -0x2000)
        return bits.to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def as_operands(tiles, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Convert a tuple of tiles to operands of products in a dtype."""
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
    """Load R^T for all gates, as the right operand of products with h."""
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
    """Load R, gate by gate, as right operands of products with the gates' gradients."""
    unit = tl.arange(0, BLOCK_H)
    mask = (unit < H)[:, None] & (unit < H)[None, :]
    rows = ()
    for gate in tl.static_range(N_GATES):
        ptrs = r_ptr + ((gate * H + unit) * H)[:, None] + unit[None, :]
        rows += (as_operand(tl.load(ptrs, mask=mask, other=0.0), PRECISION),)
    return rows
