"""Whole sequences in one launch, the recurrent weights held on chip.

A group of SLICES programs holds the weights of one direction for one tile of the batch: program j
keeps all gates of its BLOCK_H hidden units, and the states of these units, from the first step to
the last. Every step it needs h of all units, which it gets from the others by a protocol of
``exchange.py``. With one slice, the *resident* schedule, nothing is exchanged.

Forward multiplies h by its columns of R^T and publishes its slice of the new h. Backward runs in
reverse time and needs dh = dgates @ R; program j multiplies the gradients of its own gates by the
rows of R that it holds and sends every other program the part that this adds to its dh. It writes
gate gradients only; those of the weights and the input are GEMMs over all steps, afterwards.

    wx, rh         (D, T, B, G * H)  input part of the gates with b_ih; recurrent part with b_hh
    r, b           (D, G * H, H)     recurrent weights; b_hh (D, G * H) or None
    extra          (D, E * H)        what weights a cell has beyond these, or None
    states         (T, B, D * H)     y, the h of every step, where it is also exchanged; then
                                     the other states (c) after every step, in float32
    saved          (D, T, B, S * H)  activations for backward
    past                             saved, or wx and rh with its bias, to compute them again
    d_out                            gradients of the states: of y alone, or of all
    d_gates        (D, T, B, (G + A) * H)  gradients of the recurrent parts, then of the input
                                     parts of the gates in which the two differ
    initial, final (D, B, H)         each state before the first step and after the last
    marks          (D, T, B)         how the state of a row flows at a step (see tiles.py), or None
    fresh          (D, B, H)         each state after a reset, or None for zeros
    fresh_rh       (D, B, G * H)     products of the fresh h with R^T

The second direction of a layer walks through time from its end. The grid is (slices, batch tiles,
directions), all of it on the device at once; further batch tiles are further launches. T and B are
not compiled in; offsets that grow with them have 64 bits.
"""

import triton
import triton.language as tl

from .exchange import (
    collect_partials,
    counter_of,
    load_state,
    mailboxes_of,
    publish_state,
    receive_state,
    send_partial,
)
from .tiles import (
    FRESH,
    HOLD,
    add,
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
    multiply_columns,
    multiply_rows,
    recurrent_part,
    refresh,
    shift,
    store_states,
    store_tiles,
    zeros_like,
)


@triton.jit(do_not_specialize=["T", "B", "first_tile"])
def forward_kernel(
    wx_ptr,
    r_ptr,
    b_ptr,
    extra_ptr,
    initial_ptrs,
    marks_ptr,
    fresh_ptrs,
    fresh_rh_ptr,
    state_ptrs,
    saved_ptr,
    final_ptrs,
    exchange_ptrs,
    T,
    B,
    first_tile,
    H: tl.constexpr,
    CELL: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROTOCOL: tl.constexpr,
    PRECISION: tl.constexpr,
    SPIN_LIMIT: tl.constexpr,
):
    i_slice, i_tile, i_direction = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slices, tiles, directions = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    unit0 = i_slice * BLOCK_H
    row0 = (first_tile + i_tile).to(tl.int64) * BLOCK_B
    row = row0 + tl.arange(0, BLOCK_B)
    row_mask = row < B
    width = directions * H
    N_GATES: tl.constexpr = CELL.n_gates
    N_SAVED: tl.constexpr = CELL.n_saved
    counter_ptr, error_ptr = exchange_ptrs

    # Move every pointer to this program's direction.
    direction_rows = i_direction * T.to(tl.int64) * B
    r_ptr += i_direction * N_GATES * H * H
    if b_ptr is not None:
        b_ptr += i_direction * N_GATES * H
    if extra_ptr is not None:
        extra_ptr += i_direction * CELL.n_extra * H
    wx_ptr += direction_rows * (N_GATES * H)
    initial_ptrs = shift(initial_ptrs, i_direction * B.to(tl.int64) * H)
    final_ptrs = shift(final_ptrs, i_direction * B.to(tl.int64) * H)
    state_ptrs = shift(state_ptrs, i_direction * H)
    if fresh_ptrs is not None:
        fresh_ptrs = shift(fresh_ptrs, i_direction * B.to(tl.int64) * H)
        fresh_rh_ptr += i_direction * B.to(tl.int64) * (N_GATES * H)
    if saved_ptr is not None:
        saved_ptr += direction_rows * (N_SAVED * H)
    if PROTOCOL == "counter":
        counter_ptr = counter_of(counter_ptr, i_direction * tiles + i_tile)

    columns = load_columns(r_ptr, unit0, H, N_GATES, BLOCK_H, BLOCK_K, PRECISION)
    bias = load_vectors(b_ptr, unit0, H, BLOCK_H, N_GATES)
    extra = load_vectors(extra_ptr, unit0, H, BLOCK_H, CELL.n_extra)
    dtype = state_ptrs[0].dtype.element_ty
    state = load_states(initial_ptrs, row, H, row_mask, unit0, H, BLOCK_H)
    if PROTOCOL == "local":
        h = (state[0].to(dtype),)
    else:
        h = load_state(initial_ptrs[0] + row * H, row_mask, H, BLOCK_K, False)
    to_next = tl.where(i_direction == 0, B, -B).to(tl.int64)
    rows = row + tl.where(i_direction == 0, 0, T - 1).to(tl.int64) * B
    wx = load_tiles(wx_ptr + rows * (N_GATES * H), row_mask, unit0, H, BLOCK_H, N_GATES)
    mark = None
    if marks_ptr is not None:
        marks_ptr += direction_rows + row0 + tl.where(i_direction == 0, 0, T - 1).to(tl.int64) * B
        mark = load_mark(marks_ptr, row_mask)

    for step in range(T):
        block = multiply_columns(h, columns, BLOCK_B, PRECISION)
        rh = recurrent_part(
            block, bias, mark, fresh_rh_ptr, row, row_mask, unit0, H, N_GATES, BLOCK_B, BLOCK_H
        )
        before = refresh(state, mark, fresh_ptrs, row, row_mask, unit0, H, BLOCK_H)
        state, saved = CELL.forward(wx, rh, before, extra)
        if marks_ptr is not None:
            state = choose(mark, HOLD, before, state)

        new = state[0].to(dtype)
        row_ptrs = state_ptrs[0] + rows * width
        publish_state(row_ptrs, row_mask, unit0, new, counter_ptr, H, PROTOCOL)
        # What does not need the others goes before the wait for them.
        store_states(state_ptrs, rows, width, row_mask, unit0, state, H, BLOCK_H, 1)
        if saved_ptr is not None:
            store_tiles(saved_ptr + rows * (N_SAVED * H), row_mask, unit0, saved, H, BLOCK_H)
        rows += tl.where(step + 1 < T, to_next, 0)
        wx = load_tiles(wx_ptr + rows * (N_GATES * H), row_mask, unit0, H, BLOCK_H, N_GATES)
        if marks_ptr is not None:
            marks_ptr += tl.where(step + 1 < T, to_next, 0)
            mark = load_mark(marks_ptr, row_mask)
        if PROTOCOL == "local":
            h = (new,)
        else:
            h = receive_state(
                row_ptrs,
                row_mask,
                counter_ptr,
                slices * (step + 1),
                step,
                error_ptr,
                H,
                BLOCK_K,
                PROTOCOL,
                SPIN_LIMIT,
            )

    store_states(final_ptrs, row, H, row_mask, unit0, state, H, BLOCK_H, 0)


@triton.jit(do_not_specialize=["T", "B", "first_tile"])
def backward_kernel(
    d_out_ptrs,
    d_final_ptrs,
    r_ptr,
    extra_ptr,
    initial_ptrs,
    marks_ptr,
    fresh_ptrs,
    state_ptrs,
    past_ptrs,
    d_gates_ptr,
    d_initial_ptrs,
    d_fresh_ptrs,
    exchange_ptrs,
    T,
    B,
    first_tile,
    H: tl.constexpr,
    CELL: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PROTOCOL: tl.constexpr,
    PRECISION: tl.constexpr,
    SPIN_LIMIT: tl.constexpr,
):
    i_slice, i_tile, i_direction = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles, directions = tl.num_programs(1), tl.num_programs(2)
    unit0 = i_slice * BLOCK_H
    row0 = (first_tile + i_tile).to(tl.int64) * BLOCK_B
    row = row0 + tl.arange(0, BLOCK_B)
    row_mask = row < B
    width = directions * H
    SLICES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    N_GATES: tl.constexpr = CELL.n_gates
    N_PAST: tl.constexpr = CELL.n_saved if len(past_ptrs) == 1 else N_GATES
    N_GRADIENTS: tl.constexpr = N_GATES + CELL.n_apart
    counter_ptr, error_ptr, mail_ptr = exchange_ptrs

    direction_rows = i_direction * T.to(tl.int64) * B
    r_ptr += i_direction * N_GATES * H * H
    if extra_ptr is not None:
        extra_ptr += i_direction * CELL.n_extra * H
    initial_ptrs = shift(initial_ptrs, i_direction * B.to(tl.int64) * H)
    d_final_ptrs = shift(d_final_ptrs, i_direction * B.to(tl.int64) * H)
    d_initial_ptrs = shift(d_initial_ptrs, i_direction * B.to(tl.int64) * H)
    state_ptrs = shift(state_ptrs, i_direction * H)
    d_out_ptrs = shift(d_out_ptrs, i_direction * H)
    if fresh_ptrs is not None:
        fresh_ptrs = shift(fresh_ptrs, i_direction * B.to(tl.int64) * H)
        d_fresh_ptrs = shift(d_fresh_ptrs, i_direction * B.to(tl.int64) * H)
    past_ptrs = shift(past_ptrs, direction_rows * (N_PAST * H))
    d_gates_ptr += direction_rows * (N_GRADIENTS * H)
    group = i_direction * tiles + i_tile
    if PROTOCOL == "counter":
        counter_ptr = counter_of(counter_ptr, group)
    if PROTOCOL != "local":
        mail_ptr = mailboxes_of(mail_ptr, group, SLICES, BLOCK_B, BLOCK_H)

    r_rows = load_rows(r_ptr, unit0, H, N_GATES, BLOCK_H, BLOCK_N, PRECISION)
    extra = load_vectors(extra_ptr, unit0, H, BLOCK_H, CELL.n_extra)
    d_state = load_states(d_final_ptrs, row, H, row_mask, unit0, H, BLOCK_H)
    to_before = tl.where(i_direction == 0, -B, B).to(tl.int64)
    rows = row + tl.where(i_direction == 0, T - 1, 0).to(tl.int64) * B
    mark = None
    if marks_ptr is not None:
        marks_ptr += direction_rows + row0 + tl.where(i_direction == 0, T - 1, 0).to(tl.int64) * B
        mark = load_mark(marks_ptr, row_mask)
    if fresh_ptrs is not None:
        d_fresh = zeros_like(d_state)
    past = load_past(
        d_out_ptrs, state_ptrs, initial_ptrs, fresh_ptrs, past_ptrs, extra, mark,
        rows, rows + to_before, T == 1, row, width, row_mask, unit0, H, BLOCK_H, CELL,
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
        for n in tl.static_range((H + BLOCK_N - 1) // BLOCK_N):
            partial = multiply_rows(gates, r_rows, n, BLOCK_N, PRECISION)
            if PROTOCOL != "local":
                send_partial(
                    mail_ptr, partial, n * BLOCK_N, i_slice, step,
                    SLICES, BLOCK_B, BLOCK_H, PROTOCOL,
                )  # fmt: skip
        # What does not need the others goes before the wait for them.
        store_tiles(
            d_gates_ptr + rows * (N_GRADIENTS * H), row_mask, unit0, d_rh + d_wx, H, BLOCK_H
        )
        rows += tl.where(step + 1 < T, to_before, 0)
        if marks_ptr is not None:
            marks_ptr += tl.where(step + 1 < T, to_before, 0)
            after, mark = mark, load_mark(marks_ptr, row_mask)
        past = load_past(
            d_out_ptrs, state_ptrs, initial_ptrs, fresh_ptrs, past_ptrs, extra, mark,
            rows, rows + to_before, step + 2 >= T, row, width, row_mask, unit0, H, BLOCK_H, CELL,
        )  # fmt: skip
        if PROTOCOL == "local":
            dh = partial
        else:
            dh = collect_partials(
                mail_ptr, counter_ptr, i_slice, step, error_ptr,
                SLICES, BLOCK_S, BLOCK_B, BLOCK_H, PROTOCOL, SPIN_LIMIT,
            )  # fmt: skip
        if marks_ptr is not None:
            dh = mark_received(after, dh)
        d_state = add(d_previous, (dh,))

    store_states(d_initial_ptrs, row, H, row_mask, unit0, d_state, H, BLOCK_H, 0)
    if fresh_ptrs is not None:
        store_states(d_fresh_ptrs, row, H, row_mask, unit0, d_fresh, H, BLOCK_H, 0)
