"""One launch per step: the recurrent product together with the pointwise part.

For hidden sizes whose weights do not fit on chip, and for devices on which programs cannot wait for
each other. The layouts are those of ``resident.py``; the states (and, backward, their gradients)
are carried from launch to launch in float32, in `running_ptrs` of shape (D, B, H). The grid is
(slices, batch tiles, groups).
"""

import triton
import triton.language as tl

from .tiles import (
    FRESH,
    HOLD,
    add,
    as_operand,
    beyond_groups,
    block_pointers,
    cell_backward,
    choose,
    dropped,
    has,
    is_ahead,
    load_factors,
    load_mark,
    load_past,
    load_states,
    load_tiles,
    load_vectors,
    load_zones,
    mark_gradients,
    mark_received,
    recurrent_part,
    refresh,
    shift,
    store_states,
    store_tiles,
    zoned,
)


@triton.jit(do_not_specialize=["n_ahead", "T", "B", "step"])
def forward_kernel(
    wx_ptr, r_ptr, b_ptr, extra_ptr, initial_ptr, marks_ptr, fresh_ptrs, fresh_rh_ptr, running_ptrs,
    state_ptrs, saved_ptr, noise_ptrs, n_ahead, T, B, step, H: tl.constexpr,
    CELL: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    drop_ptr, zone_ptrs = noise_ptrs
    i_slice, i_tile, i_group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    unit0 = i_slice * BLOCK_H
    row0 = i_tile.to(tl.int64) * BLOCK_B
    row = row0 + tl.arange(0, BLOCK_B)
    row_mask = row < B
    width = tl.num_programs(2) * H
    N_GATES: tl.constexpr = CELL.n_gates
    N_SAVED: tl.constexpr = CELL.n_saved

    group_rows = i_group * T.to(tl.int64) * B
    r_ptr += beyond_groups(i_group, n_ahead, N_GATES * H * H)
    if b_ptr is not None:
        b_ptr += i_group * N_GATES * H
    if extra_ptr is not None:
        extra_ptr += i_group * CELL.n_extra * H
    state_ptrs = shift(state_ptrs, i_group * H)
    initial_ptr += i_group * B.to(tl.int64) * H
    running_ptrs = shift(running_ptrs, i_group * B.to(tl.int64) * H)
    if fresh_ptrs is not None:
        fresh_ptrs = shift(fresh_ptrs, i_group * B.to(tl.int64) * H)
        fresh_rh_ptr += i_group * B.to(tl.int64) * (N_GATES * H)
    if drop_ptr is not None:
        drop_ptr += i_group * B.to(tl.int64) * H
    t = tl.where(is_ahead(i_group, n_ahead), step, T - 1 - step).to(tl.int64)
    rows = row + t * B
    rows_before = rows + tl.where(is_ahead(i_group, n_ahead), -B, B)
    h_ptr = tl.where(step == 0, initial_ptr, state_ptrs[0])
    h_row_ptrs = h_ptr + tl.where(step == 0, row * H, rows_before * width)

    r_ptrs, inside = block_pointers(r_ptr, unit0, H, N_GATES, BLOCK_H)
    block = tl.zeros([BLOCK_B, (N_GATES + (N_GATES == 3)) * BLOCK_H], tl.float32)
    for first in range(0, H, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        h = tl.load(
            h_row_ptrs[:, None] + k[None, :], mask=row_mask[:, None] & (k < H)[None, :], other=0.0
        )
        columns = tl.load(
            r_ptrs[None, :] + k[:, None], mask=inside[None, :] & (k < H)[:, None], other=0.0
        )
        if drop_ptr is not None:
            factors = tl.load(
                drop_ptr + (row * H)[:, None] + k[None, :],
                mask=row_mask[:, None] & (k < H)[None, :],
                other=0.0,
            )
            h = (h.to(tl.float32) * factors.to(tl.float32)).to(h.dtype)
        h, columns = as_operand(h, PRECISION), as_operand(columns, PRECISION)
        block = tl.dot(h, columns, block, input_precision=PRECISION)

    bias = load_vectors(b_ptr, unit0, H, BLOCK_H, N_GATES)
    extra = load_vectors(extra_ptr, unit0, H, BLOCK_H, CELL.n_extra)
    mark = None
    if marks_ptr is not None:
        mark = load_mark(marks_ptr + group_rows + row0 + t * B, row_mask)
    rh = recurrent_part(
        block, bias, mark, fresh_rh_ptr, row, row_mask, unit0, H, N_GATES, BLOCK_B, BLOCK_H
    )
    wx_rows = (wx_ptr + group_rows * (N_GATES * H)) + rows * (N_GATES * H)
    wx = load_tiles(wx_rows, row_mask, unit0, H, BLOCK_H, N_GATES)
    state = load_states(running_ptrs, row, H, row_mask, unit0, H, BLOCK_H)
    before = refresh(state, mark, fresh_ptrs, row, row_mask, unit0, H, BLOCK_H)
    state, saved = CELL.forward(wx, rh, before, extra)
    zones = load_zones(zone_ptrs, group_rows + rows, row_mask, unit0, H, BLOCK_H)
    state = zoned(zones, before, state)
    if marks_ptr is not None:
        state = choose(mark, HOLD, before, state)
    store_states(running_ptrs, row, H, row_mask, unit0, state, H, BLOCK_H)
    store_states(state_ptrs, rows, width, row_mask, unit0, state, H, BLOCK_H)
    if saved_ptr is not None:
        saved_rows = saved_ptr + (group_rows + rows) * (N_SAVED * H)
        store_tiles(saved_rows, row_mask, unit0, saved, H, BLOCK_H)


@triton.jit(do_not_specialize=["n_ahead", "T", "B", "step"])
def backward_kernel(
    d_out_ptrs, r_ptr, extra_ptr, initial_ptrs, marks_ptr, fresh_ptrs, state_ptrs, past_ptrs,
    running_ptrs, d_gates_ptr, d_fresh_ptrs, noise_ptrs, n_ahead, T, B, step,
    H: tl.constexpr, CELL: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    drop_ptr, zone_ptrs = noise_ptrs
    i_slice, i_tile, i_group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    unit0 = i_slice * BLOCK_H
    row0 = i_tile.to(tl.int64) * BLOCK_B
    row = row0 + tl.arange(0, BLOCK_B)
    row_mask = row < B
    width = tl.num_programs(2) * H
    N_GATES: tl.constexpr = CELL.n_gates
    N_PAST: tl.constexpr = CELL.n_saved if len(past_ptrs) == 1 else N_GATES
    N_GRADIENTS: tl.constexpr = N_GATES + CELL.n_apart

    group_rows = i_group * T.to(tl.int64) * B
    r_ptr += beyond_groups(i_group, n_ahead, N_GATES * H * H)
    if extra_ptr is not None:
        extra_ptr += i_group * CELL.n_extra * H
    initial_ptrs = shift(initial_ptrs, i_group * B.to(tl.int64) * H)
    running_ptrs = shift(running_ptrs, i_group * B.to(tl.int64) * H)
    state_ptrs = shift(state_ptrs, i_group * H)
    d_out_ptrs = shift(d_out_ptrs, i_group * H)
    if fresh_ptrs is not None:
        fresh_ptrs = shift(fresh_ptrs, i_group * B.to(tl.int64) * H)
        d_fresh_ptrs = shift(d_fresh_ptrs, i_group * B.to(tl.int64) * H)
    if drop_ptr is not None:
        drop_ptr += i_group * B.to(tl.int64) * H
    past_ptrs = shift(past_ptrs, group_rows * (N_PAST * H))
    d_gates_ptr += group_rows * (N_GRADIENTS * H)
    t = tl.where(is_ahead(i_group, n_ahead), T - 1 - step, step).to(tl.int64)
    to_before = tl.where(is_ahead(i_group, n_ahead), -B, B)
    rows = row + t * B

    d_state = load_states(running_ptrs, row, H, row_mask, unit0, H, BLOCK_H)
    dh = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    unit = unit0 + tl.arange(0, BLOCK_H)
    d_row_ptrs = d_gates_ptr + (rows - to_before) * (N_GRADIENTS * H)
    for first in range(0, tl.where(step == 0, 0, N_GATES * H), BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = k < N_GATES * H
        d_gates = tl.load(
            d_row_ptrs[:, None] + k[None, :], mask=row_mask[:, None] & inside[None, :], other=0.0
        )
        r_rows = tl.load(
            r_ptr + (k * H)[:, None] + unit[None, :],
            mask=inside[:, None] & (unit < H)[None, :],
            other=0.0,
        )
        d_gates, r_rows = as_operand(d_gates, PRECISION), as_operand(r_rows, PRECISION)
        dh = tl.dot(d_gates, r_rows, dh, input_precision=PRECISION)

    dh = dropped(dh, load_factors(drop_ptr, row, row_mask, unit0, H, BLOCK_H))
    mark = None
    if marks_ptr is not None:
        marks_ptr += group_rows + row0 + t * B
        mark = load_mark(marks_ptr, row_mask)
        to_after = tl.where(step == 0, 0, -to_before)  # at step 0, dh is 0 whatever the mark
        dh = mark_received(load_mark(marks_ptr + to_after, row_mask), dh)
    extra = load_vectors(extra_ptr, unit0, H, BLOCK_H, CELL.n_extra)
    zones = load_zones(zone_ptrs, group_rows + rows, row_mask, unit0, H, BLOCK_H)
    past = load_past(
        d_out_ptrs, state_ptrs, initial_ptrs, fresh_ptrs, past_ptrs, extra, mark, zones,
        rows, rows + to_before, step == T - 1, row, width, row_mask, unit0, H, BLOCK_H, CELL,
    )  # fmt: skip
    d_state = add(add(d_state, (dh,)), past[0])
    d_rh, d_wx, d_previous = cell_backward(past, d_state, extra, CELL)
    if fresh_ptrs is not None:
        mask = row_mask & has(mark, FRESH)
        d_fresh = load_states(d_fresh_ptrs, row, H, mask, unit0, H, BLOCK_H)
        d_fresh = add(d_fresh, d_previous)
        store_states(d_fresh_ptrs, row, H, mask, unit0, d_fresh, H, BLOCK_H)
    if marks_ptr is not None:
        d_rh, d_wx, d_previous = mark_gradients(mark, d_state, d_rh, d_wx, d_previous)
    store_states(running_ptrs, row, H, row_mask, unit0, d_previous, H, BLOCK_H)
    store_tiles(d_gates_ptr + rows * (N_GRADIENTS * H), row_mask, unit0, d_rh + d_wx, H, BLOCK_H)
