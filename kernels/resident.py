"""Whole sequences in one launch, each program with all recurrent weights of one direction on chip.

For hidden sizes that fit into one program, which needs nothing of others: it keeps the states of
BLOCK_B rows of the batch, of all units, from the first step to the last. Forward multiplies h by
R^T. Backward runs in reverse time, multiplies the gradients of the gates by R and writes them;
those of the weights and the input are GEMMs over all steps, afterwards.

    wx, rh         (D, T, B, G * H)  input part of the gates with b_ih; recurrent part with b_hh
    r, b           (D, G * H, H)     recurrent weights; b_hh (D, G * H) or None
    extra          (D, E * H)        what weights a cell has beyond these, or None
    states         (T, B, D * H)     y, the h of every step; then the other states (c) after every
                                     step, in float32
    saved          (D, T, B, S * H)  activations for backward
    past                             saved, or wx and rh with its bias, to compute them again
    d_out                            gradients of the states: of y alone, or of all
    d_gates        (D, T, B, (G + A) * H)  gradients of the recurrent parts, then of the input
                                     parts of the gates in which the two differ
    initial, final (D, B, H)         each state before the first step and after the last
    marks          (D, T, B)         how the state of a row flows at a step (see tiles.py), or None
    fresh          (D, B, H)         each state after a reset, or None for zeros
    fresh_rh       (D, B, G * H)     products of the fresh h with R^T

The second direction of a layer walks through time from its end. The grid is (1, batch tiles,
directions). T and B are not compiled in; offsets that grow with them have 64 bits.
"""

import triton
import triton.language as tl

from .tiles import (
    FRESH,
    HOLD,
    add,
    as_operand,
    as_operands,
    choose,
    load_columns,
    load_mark,
    load_past,
    load_rows,
    load_states,
    load_tiles,
    load_vectors,
    mark_gradients,
    mark_received,
    recurrent_part,
    refresh,
    shift,
    store_states,
    store_tiles,
    zeros_like,
)


@triton.jit(do_not_specialize=["T", "B"])
def forward_kernel(
    wx_ptr, r_ptr, b_ptr, extra_ptr, initial_ptrs, marks_ptr, fresh_ptrs, fresh_rh_ptr, state_ptrs,
    saved_ptr, final_ptrs, T, B, H: tl.constexpr, CELL: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_tile, i_direction = tl.program_id(1), tl.program_id(2)
    row0 = i_tile.to(tl.int64) * BLOCK_B
    row = row0 + tl.arange(0, BLOCK_B)
    row_mask = row < B
    width = tl.num_programs(2) * H
    N_GATES: tl.constexpr = CELL.n_gates
    N_SAVED: tl.constexpr = CELL.n_saved

    # Rows of the batch are counted in (D, B), and those of a step in (D, T, B).
    direction_rows = i_direction * T.to(tl.int64) * B
    row += i_direction * B
    row0 += direction_rows
    state_ptrs = shift(state_ptrs, i_direction * H - direction_rows * width)
    r_ptr += i_direction * N_GATES * H * H
    if b_ptr is not None:
        b_ptr += i_direction * N_GATES * H
    if extra_ptr is not None:
        extra_ptr += i_direction * CELL.n_extra * H

    columns = load_columns(r_ptr, H, N_GATES, BLOCK_H, PRECISION)
    bias = load_vectors(b_ptr, 0, H, BLOCK_H, N_GATES)
    extra = load_vectors(extra_ptr, 0, H, BLOCK_H, CELL.n_extra)
    dtype = state_ptrs[0].dtype.element_ty
    state = load_states(initial_ptrs, row, H, row_mask, 0, H, BLOCK_H)
    to_next = tl.where(i_direction == 0, B, -B).to(tl.int64)
    row0 += tl.where(i_direction == 0, 0, T - 1).to(tl.int64) * B
    rows = row0 + tl.arange(0, BLOCK_B)
    wx = load_tiles(wx_ptr + rows * (N_GATES * H), row_mask, 0, H, BLOCK_H, N_GATES)
    mark = None
    if marks_ptr is not None:
        marks_ptr += row0
        mark = load_mark(marks_ptr, row_mask)

    for step in range(T):
        h = as_operand(state[0].to(dtype), PRECISION)
        block = tl.dot(h, columns, input_precision=PRECISION)
        rh = recurrent_part(
            block, bias, mark, fresh_rh_ptr, row, row_mask, 0, H, N_GATES, BLOCK_B, BLOCK_H
        )
        before = refresh(state, mark, fresh_ptrs, row, row_mask, 0, H, BLOCK_H)
        state, saved = CELL.forward(wx, rh, before, extra)
        if marks_ptr is not None:
            state = choose(mark, HOLD, before, state)

        store_states(state_ptrs, rows, width, row_mask, 0, state, H, BLOCK_H)
        if saved_ptr is not None:
            store_tiles(saved_ptr + rows * (N_SAVED * H), row_mask, 0, saved, H, BLOCK_H)
        rows += tl.where(step + 1 < T, to_next, 0)
        wx = load_tiles(wx_ptr + rows * (N_GATES * H), row_mask, 0, H, BLOCK_H, N_GATES)
        if marks_ptr is not None:
            marks_ptr += tl.where(step + 1 < T, to_next, 0)
            mark = load_mark(marks_ptr, row_mask)

    store_states(final_ptrs, row, H, row_mask, 0, state, H, BLOCK_H)


@triton.jit(do_not_specialize=["T", "B"])
def backward_kernel(
    d_out_ptrs, d_final_ptrs, r_ptr, extra_ptr, initial_ptrs, marks_ptr, fresh_ptrs, state_ptrs,
    past_ptrs, d_gates_ptr, d_initial_ptrs, d_fresh_ptrs, T, B, H: tl.constexpr, CELL: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_tile, i_direction = tl.program_id(1), tl.program_id(2)
    row0 = i_tile.to(tl.int64) * BLOCK_B
    row = row0 + tl.arange(0, BLOCK_B)
    row_mask = row < B
    width = tl.num_programs(2) * H
    N_GATES: tl.constexpr = CELL.n_gates
    N_GRADIENTS: tl.constexpr = N_GATES + CELL.n_apart

    direction_rows = i_direction * T.to(tl.int64) * B
    row += i_direction * B
    row0 += direction_rows
    state_ptrs = shift(state_ptrs, i_direction * H - direction_rows * width)
    d_out_ptrs = shift(d_out_ptrs, i_direction * H - direction_rows * width)
    r_ptr += i_direction * N_GATES * H * H
    if extra_ptr is not None:
        extra_ptr += i_direction * CELL.n_extra * H

    r_rows = load_rows(r_ptr, H, N_GATES, BLOCK_H, PRECISION)
    extra = load_vectors(extra_ptr, 0, H, BLOCK_H, CELL.n_extra)
    d_state = load_states(d_final_ptrs, row, H, row_mask, 0, H, BLOCK_H)
    to_before = tl.where(i_direction == 0, -B, B).to(tl.int64)
    row0 += tl.where(i_direction == 0, T - 1, 0).to(tl.int64) * B
    rows = row0 + tl.arange(0, BLOCK_B)
    mark = None
    if marks_ptr is not None:
        marks_ptr += row0
        mark = load_mark(marks_ptr, row_mask)
    if fresh_ptrs is not None:
        d_fresh = zeros_like(d_state)
    past = load_past(
        d_out_ptrs, state_ptrs, initial_ptrs, fresh_ptrs, past_ptrs, extra, mark,
        rows, rows + to_before, T == 1, row, width, row_mask, 0, H, BLOCK_H, CELL,
    )  # fmt: skip

    for step in range(T):
        d_out, saved, state, previous = past
        d_state = add(d_state, d_out)
        d_rh, d_wx, d_previous = CELL.backward(saved, state, previous, d_state, extra)
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
        past = load_past(
            d_out_ptrs, state_ptrs, initial_ptrs, fresh_ptrs, past_ptrs, extra, mark,
            rows, rows + to_before, step + 2 >= T, row, width, row_mask, 0, H, BLOCK_H, CELL,
        )  # fmt: skip
        if marks_ptr is not None:
            dh = mark_received(after, dh)
        d_state = add(d_previous, (dh,))

    store_states(d_initial_ptrs, row, H, row_mask, 0, d_state, H, BLOCK_H)
    if fresh_ptrs is not None:
        store_states(d_fresh_ptrs, row, H, row_mask, 0, d_fresh, H, BLOCK_H)
