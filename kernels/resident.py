"""Whole sequences in one launch, each program with all recurrent weights of one group on chip.

For hidden sizes that fit into one program, so that programs are independent: each keeps the states
of BLOCK_B batch rows, of all units, from the first step to the last. Forward multiplies h by R^T.
Backward runs in reverse time, multiplies the gate gradients by R and writes them; those of the
weights and the input are computed afterwards as GEMMs over all steps.

A group is a direction of a layer, or of one of its heads or ensemble members. There are D groups;
the first `n_ahead` walk forward through time, the others backward from its end.

    wx, rh         (D, T, B, G * H)  input part of the gates with b_ih; recurrent part with b_hh
    r, b           (D, G * H, H)     recurrent weights; b_hh (D, G * H) or None
    extra          (D, E * H)        weights a cell has in addition, or None
    states         (T, B, D * H)     y, the h of every step; then the other states (c) after every
                                     step, in float32
    saved          (D, T, B, S * H)  activations for backward
    past                             saved, or wx and rh with its bias, to recompute them
    d_out                            gradients of the states: of y alone, or of all
    d_gates        (D, T, B, (G + A) * H)  gradients of the recurrent parts, then of the input
                                     parts of the gates where they differ
    initial, final (D, B, H)         each state before the first step and after the last
    marks          (D, T, B)         how the state of a row flows at a step (see tiles.py), or None
    fresh          (D, B, H)         each state after a reset, or None for zeros
    fresh_rh       (D, B, G * H)     products of the fresh h with R^T
    noise: drop    (D, B, H)         factors of h in the recurrent product, or None
    and zones      (D, T, B, H)      per state, bytes: which units keep it at a step; or (1,), the
                                     share kept by all; or None

The grid is (1, batch tiles, groups). T and B are run-time values; offsets that grow with them, or
with the groups, are 64-bit.
"""

import triton
import triton.language as tl

from .tiles import (
    FRESH,
    HOLD,
    add,
    as_operand,
    as_operands,
    beyond_groups,
    cell_backward,
    choose,
    dropped,
    is_ahead,
    load_columns,
    load_factors,
    load_mark,
    load_past,
    load_rows,
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
    zeros_like,
    zoned,
)


@triton.jit(do_not_specialize=["n_ahead", "T", "B"])
def forward_kernel(
    wx_ptr, r_ptr, b_ptr, extra_ptr, initial_ptrs, marks_ptr, fresh_ptrs, fresh_rh_ptr, state_ptrs,
    saved_ptr, final_ptrs, noise_ptrs, n_ahead, T, B, H: tl.constexpr, CELL: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    drop_ptr, zone_ptrs = noise_ptrs
    i_tile, i_group = tl.program_id(1), tl.program_id(2)
    row0 = i_tile.to(tl.int64) * BLOCK_B
    row = row0 + tl.arange(0, BLOCK_B)
    row_mask = row < B
    width = tl.num_programs(2) * H
    N_GATES: tl.constexpr = CELL.n_gates
    N_SAVED: tl.constexpr = CELL.n_saved

    # Batch rows are counted in (D, B), rows of a step in (D, T, B).
    group_rows = i_group * T.to(tl.int64) * B
    row += beyond_groups(i_group, n_ahead, B)
    row0 += group_rows
    state_ptrs = shift(state_ptrs, i_group * H - group_rows * width)
    r_ptr += beyond_groups(i_group, n_ahead, N_GATES * H * H)
    if b_ptr is not None:
        b_ptr += i_group * N_GATES * H
    if extra_ptr is not None:
        extra_ptr += i_group * CELL.n_extra * H

    columns = load_columns(r_ptr, H, N_GATES, BLOCK_H, PRECISION)
    bias = load_vectors(b_ptr, 0, H, BLOCK_H, N_GATES)
    extra = load_vectors(extra_ptr, 0, H, BLOCK_H, CELL.n_extra)
    dtype = state_ptrs[0].dtype.element_ty
    factors = load_factors(drop_ptr, row, row_mask, 0, H, BLOCK_H)
    state = load_states(initial_ptrs, row, H, row_mask, 0, H, BLOCK_H)
    to_next = tl.where(is_ahead(i_group, n_ahead), B, -B).to(tl.int64)
    row0 += tl.where(is_ahead(i_group, n_ahead), 0, T - 1).to(tl.int64) * B
    rows = row0 + tl.arange(0, BLOCK_B)
    wx = load_tiles(wx_ptr + rows * (N_GATES * H), row_mask, 0, H, BLOCK_H, N_GATES)
    zones = load_zones(zone_ptrs, rows, row_mask, 0, H, BLOCK_H)
    mark = None
    if marks_ptr is not None:
        marks_ptr += row0
        mark = load_mark(marks_ptr, row_mask)

    for step in range(T):
        h = as_operand(dropped(state[0], factors).to(dtype), PRECISION)
        block = tl.dot(h, columns, input_precision=PRECISION)
        rh = recurrent_part(
            block, bias, mark, fresh_rh_ptr, row, row_mask, 0, H, N_GATES, BLOCK_B, BLOCK_H
        )
        before = refresh(state, mark, fresh_ptrs, row, row_mask, 0, H, BLOCK_H)
        state, saved = CELL.forward(wx, rh, before, extra)
        state = zoned(zones, before, state)
        if marks_ptr is not None:
            state = choose(mark, HOLD, before, state)

        store_states(state_ptrs, rows, width, row_mask, 0, state, H, BLOCK_H)
        if saved_ptr is not None:
            store_tiles(saved_ptr + rows * (N_SAVED * H), row_mask, 0, saved, H, BLOCK_H)
        rows += tl.where(step + 1 < T, to_next, 0)
        wx = load_tiles(wx_ptr + rows * (N_GATES * H), row_mask, 0, H, BLOCK_H, N_GATES)
        zones = load_zones(zone_ptrs, rows, row_mask, 0, H, BLOCK_H)
        if marks_ptr is not None:
            marks_ptr += tl.where(step + 1 < T, to_next, 0)
            mark = load_mark(marks_ptr, row_mask)

    store_states(final_ptrs, row, H, row_mask, 0, state, H, BLOCK_H)


@triton.jit(do_not_specialize=["n_ahead", "T", "B"])
def backward_kernel(
    d_out_ptrs, d_final_ptrs, r_ptr, extra_ptr, initial_ptrs, marks_ptr, fresh_ptrs, state_ptrs,
    past_ptrs, d_gates_ptr, d_initial_ptrs, d_fresh_ptrs, noise_ptrs, n_ahead, T, B,
    H: tl.constexpr, CELL: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    drop_ptr, zone_ptrs = noise_ptrs
    i_tile, i_group = tl.program_id(1), tl.program_id(2)
    row0 = i_tile.to(tl.int64) * BLOCK_B
    row = row0 + tl.arange(0, BLOCK_B)
    row_mask = row < B
    width = tl.num_programs(2) * H
    N_GATES: tl.constexpr = CELL.n_gates
    N_GRADIENTS: tl.constexpr = N_GATES + CELL.n_apart

    group_rows = i_group * T.to(tl.int64) * B
    row += beyond_groups(i_group, n_ahead, B)
    row0 += group_rows
    state_ptrs = shift(state_ptrs, i_group * H - group_rows * width)
    d_out_ptrs = shift(d_out_ptrs, i_group * H - group_rows * width)
    r_ptr += beyond_groups(i_group, n_ahead, N_GATES * H * H)
    if extra_ptr is not None:
        extra_ptr += i_group * CELL.n_extra * H

    r_rows = load_rows(r_ptr, H, N_GATES, BLOCK_H, PRECISION)
    extra = load_vectors(extra_ptr, 0, H, BLOCK_H, CELL.n_extra)
    factors = load_factors(drop_ptr, row, row_mask, 0, H, BLOCK_H)
    d_state = load_states(d_final_ptrs, row, H, row_mask, 0, H, BLOCK_H)
    to_before = tl.where(is_ahead(i_group, n_ahead), -B, B).to(tl.int64)
    row0 += tl.where(is_ahead(i_group, n_ahead), T - 1, 0).to(tl.int64) * B
    rows = row0 + tl.arange(0, BLOCK_B)
    mark = None
    if marks_ptr is not None:
        marks_ptr += row0
        mark = load_mark(marks_ptr, row_mask)
    if fresh_ptrs is not None:
        d_fresh = zeros_like(d_state)
    zones = load_zones(zone_ptrs, rows, row_mask, 0, H, BLOCK_H)
    past = load_past(
        d_out_ptrs, state_ptrs, initial_ptrs, fresh_ptrs, past_ptrs, extra, mark, zones,
        rows, rows + to_before, T == 1, row, width, row_mask, 0, H, BLOCK_H, CELL,
    )  # fmt: skip

    for step in range(T):
        d_state = add(d_state, past[0])
        d_rh, d_wx, d_previous = cell_backward(past, d_state, extra, CELL)
        if fresh_ptrs is not None:
            d_fresh = choose(mark, FRESH, add(d_fresh, d_previous), d_fresh)
        if marks_ptr is not None:
            d_rh, d_wx, d_previous = mark_gradients(mark, d_state, d_rh, d_wx, d_previous)

        gates = as_operands(d_rh, r_rows[0].dtype, PRECISION)
        dh = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
        for g in tl.static_range(N_GATES):
            dh = tl.dot(gates[g], r_rows[g], dh, input_precision=PRECISION)
        store_tiles(d_gates_ptr + rows * (N_GRADIENTS * H), row_mask, 0, d_rh + d_wx, H, BLOCK_H)
        rows += tl.where(step + 1 < T, to_before, 0)
        if marks_ptr is not None:
            marks_ptr += tl.where(step + 1 < T, to_before, 0)
            after, mark = mark, load_mark(marks_ptr, row_mask)
        zones = load_zones(zone_ptrs, rows, row_mask, 0, H, BLOCK_H)
        past = load_past(
            d_out_ptrs, state_ptrs, initial_ptrs, fresh_ptrs, past_ptrs, extra, mark, zones,
            rows, rows + to_before, step + 2 >= T, row, width, row_mask, 0, H, BLOCK_H, CELL,
        )  # fmt: skip
        dh = dropped(dh, factors)
        if marks_ptr is not None:
            dh = mark_received(after, dh)
        d_state = add(d_previous, (dh,))

    store_states(d_initial_ptrs, row, H, row_mask, 0, d_state, H, BLOCK_H)
    if fresh_ptrs is not None:
        store_states(d_fresh_ptrs, row, H, row_mask, 0, d_fresh, H, BLOCK_H)
