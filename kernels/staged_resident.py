"""Whole sequences in one launch, as in ``resident.py``, for cells whose step is several stages.

This covers normalized cells and late products, without a projection, where a program can hold all
units and recurrent weights of a group. It keeps the states of BLOCK_B batch rows, or backward their
gradients, in float32 from the first step to the last. Tensors and arithmetic are those of
``staged.py``, except that a step needs no scratch memory.

The grid is (batch tiles, 1, groups).
"""

import triton
import triton.language as tl

from .staged import cell_backward, cell_forward, load_marks, parted, place, store_parts
from .tiles import (
    CUT,
    FRESH,
    HOLD,
    STOPS,
    add,
    as_operand,
    as_operands,
    choose,
    dropped,
    has,
    load_columns,
    load_factors,
    load_rows,
    load_states,
    load_tiles,
    load_vectors,
    load_zones,
    refresh,
    split_block,
    store_states,
    store_tiles,
    without,
    zeros_like,
    zoned,
)


@triton.jit
def _late_columns(
    r_ptr, H: tl.constexpr, CELL: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr
):
    """Load R^T for the late gates, if there are any."""
    columns = ()
    if CELL.n_late > 0:
        N_EARLY: tl.constexpr = CELL.n_gates - CELL.n_late
        columns = (load_columns(r_ptr + N_EARLY * H * H, H, CELL.n_late, BLOCK_H, PRECISION),)
    return columns


@triton.jit
def _product(
    h, columns, N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Multiply h by R^T for N gates; return one tile per gate."""
    h = as_operand(h.to(columns.dtype), PRECISION)
    block = tl.dot(h, columns, input_precision=PRECISION)
    return split_block(block, (), N, BLOCK_B, BLOCK_H)


@triton.jit
def _product_back(gates, r_rows, PRECISION: tl.constexpr):
    """Multiply the gradients of gates by R."""
    gates = as_operands(gates, r_rows[0].dtype, PRECISION)
    total = zeros_like((gates[0].to(tl.float32),))[0]
    for g in tl.static_range(len(gates)):
        total = tl.dot(gates[g], r_rows[g], total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["T", "B", "n_ahead"])
def forward_kernel(
    wx_ptr, r_ptr, b_ptr, extra_ptr, drop_ptr, marks_ptr, fresh_ptrs, zone_ptrs, running_ptrs,
    output_ptrs, before_ptrs, after_ptrs, saved_ptr, normal_ptrs, T, B, n_ahead, H: tl.constexpr,
    CELL: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    group, rows, row, of_step = place(0, T, B, n_ahead, BLOCK_B)
    inside = rows[:, None] & (tl.arange(0, BLOCK_H) < H)[None, :]
    N_GATES: tl.constexpr = CELL.n_gates
    N_SAVED: tl.constexpr = CELL.n_saved
    N_EARLY: tl.constexpr = CELL.n_gates - CELL.n_late
    r_ptr += group * (N_GATES * H * H)
    if b_ptr is not None:
        b_ptr += group * (N_GATES * H)
    if extra_ptr is not None:
        extra_ptr += group * (CELL.n_extra * H)

    columns = load_columns(r_ptr, H, N_EARLY, BLOCK_H, PRECISION)
    late_columns = _late_columns(r_ptr, H, CELL, BLOCK_H, PRECISION)
    bias = load_vectors(b_ptr, 0, H, BLOCK_H, N_GATES)
    extra = load_vectors(extra_ptr, 0, H, BLOCK_H, CELL.n_extra)
    factors = load_factors(drop_ptr, row, rows, 0, H, BLOCK_H)
    state = load_states(running_ptrs, row, H, rows, 0, H, BLOCK_H)
    mark = None
    if marks_ptr is not None:
        mark = load_marks(marks_ptr, of_step, rows)

    for step in range(T):
        # In flight during the product.
        wx = load_tiles(wx_ptr + of_step * (N_GATES * H), rows, 0, H, BLOCK_H, N_GATES)
        zones = load_zones(zone_ptrs, of_step, rows, 0, H, BLOCK_H)
        before = refresh(state, mark, fresh_ptrs, row, rows, 0, H, BLOCK_H)
        if before_ptrs is not None:
            store_states(before_ptrs, of_step, H, rows, 0, before, H, BLOCK_H)
        h = dropped(before[0], factors)
        raw = _product(h, columns, N_EARLY, BLOCK_B, BLOCK_H, PRECISION)
        if CELL.n_late > 0:
            h *= CELL.late_factor(wx, add(raw, bias))
            raw += _product(h, late_columns[0], CELL.n_late, BLOCK_B, BLOCK_H, PRECISION)
        after, saved, normal = cell_forward(wx, raw, bias, extra, before, inside, H, CELL)
        state = zoned(zones, before, after)
        if mark is not None:
            state = choose(mark, HOLD, before, state)

        store_states(output_ptrs, of_step, H, rows, 0, state, H, BLOCK_H)
        if saved_ptr is not None:
            store_states(after_ptrs, of_step, H, rows, 0, after, H, BLOCK_H)
            store_tiles(saved_ptr + of_step * (N_SAVED * H), rows, 0, saved, H, BLOCK_H)
        if normal_ptrs is not None:
            normal_rows = normal_ptrs[0] + of_step * (N_GATES * H)
            store_tiles(normal_rows, rows, 0, normal[:N_GATES], H, BLOCK_H)
            tl.store(normal_ptrs[1] + of_step[:, None], normal[N_GATES], mask=rows[:, None])
        _, _, _, of_step = place(tl.minimum(step + 1, T - 1), T, B, n_ahead, BLOCK_B)
        if marks_ptr is not None:
            mark = load_marks(marks_ptr, of_step, rows)

    store_states(running_ptrs, row, H, rows, 0, state, H, BLOCK_H)


@triton.jit
def _load_past(
    given_ptrs, before_ptrs, after_ptrs, saved_ptr, normal_ptrs, zone_ptrs, mark, of_step, rows,
    H: tl.constexpr, BLOCK_H: tl.constexpr, CELL: tl.constexpr,
):  # fmt: skip
    """Load what backward needs at a step: the gradients that arrive there, what forward saved, and
    zones.
    """
    there = rows
    if mark is not None:
        there = rows & (has(mark, HOLD) == 0)
    before = load_states(before_ptrs, of_step, H, rows, 0, H, BLOCK_H)
    given = ()
    for s in tl.static_range(len(given_ptrs)):
        if given_ptrs[s] is None:
            given += (zeros_like(before)[s],)
        else:
            given += load_tiles(given_ptrs[s] + of_step * H, there, 0, H, BLOCK_H, 1)
    after = load_states(after_ptrs, of_step, H, rows, 0, H, BLOCK_H)
    N_SAVED: tl.constexpr = CELL.n_saved
    N_GATES: tl.constexpr = CELL.n_gates
    saved = load_tiles(saved_ptr + of_step * (N_SAVED * H), rows, 0, H, BLOCK_H, N_SAVED)
    normal = ()
    if CELL.is_normalized:
        normal_rows = normal_ptrs[0] + of_step * (N_GATES * H)
        normal = load_tiles(normal_rows, rows, 0, H, BLOCK_H, N_GATES)
        normal += (tl.load(normal_ptrs[1] + of_step[:, None], mask=rows[:, None], other=0.0),)
    return given, before, after, saved, normal, load_zones(zone_ptrs, of_step, rows, 0, H, BLOCK_H)


@triton.jit(do_not_specialize=["T", "B", "n_ahead"])
def backward_kernel(
    given_ptrs, r_ptr, extra_ptr, drop_ptr, marks_ptr, zone_ptrs, before_ptrs, after_ptrs,
    saved_ptr, normal_ptrs, running_ptrs, d_fresh_ptrs, d_gates_ptr, d_raw_ptr, d_extra_ptr, T, B,
    n_ahead, H: tl.constexpr, CELL: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`given_ptrs` are the gradients of y, or None, and of any traces."""
    group, rows, row, of_step = place(T - 1, T, B, n_ahead, BLOCK_B)
    unit = tl.arange(0, BLOCK_H)
    inside = rows[:, None] & (unit < H)[None, :]
    N_GATES: tl.constexpr = CELL.n_gates
    N_GRADIENTS: tl.constexpr = N_GATES + CELL.n_apart
    N_EARLY: tl.constexpr = CELL.n_gates - CELL.n_late
    r_ptr += group * (N_GATES * H * H)
    if extra_ptr is not None:
        extra_ptr += group * (CELL.n_extra * H)

    r_rows = load_rows(r_ptr, H, N_GATES, BLOCK_H, PRECISION)
    extra = load_vectors(extra_ptr, 0, H, BLOCK_H, CELL.n_extra)
    factors = load_factors(drop_ptr, row, rows, 0, H, BLOCK_H)
    d_state = load_states(running_ptrs, row, H, rows, 0, H, BLOCK_H)
    if d_fresh_ptrs is not None:
        d_fresh = zeros_like(d_state)
    mark = None
    if marks_ptr is not None:
        mark = load_marks(marks_ptr, of_step, rows)
    given, before, after, saved, normal, zones = _load_past(
        given_ptrs, before_ptrs, after_ptrs, saved_ptr, normal_ptrs, zone_ptrs, mark, of_step, rows,
        H, BLOCK_H, CELL,
    )  # fmt: skip

    for step in range(T):
        d_state = add(d_state, given)
        d_made, kept = (), ()
        for s in tl.static_range(len(d_state)):
            zone = ()
            if len(zones) > 0:
                zone = zones[s]
            d, d_kept = parted(d_state[s], zone, mark)
            d_made += (d,)
            kept += (d_kept,)
        d_product = ()
        if CELL.n_late > 0:
            d_late = CELL.late_backward(saved, d_made)
            d_product = (dropped(_product_back(d_late, r_rows[N_EARLY:], PRECISION), factors),)
        d_rh, d_apart, d_raw, d_extra, d_before = cell_backward(
            saved, normal, after, before, d_made, d_product, extra, mark, inside, H, CELL
        )
        of_gates = of_step * (N_GRADIENTS * H)
        store_parts(d_gates_ptr + of_gates, unit, inside, d_rh + d_apart, H)
        if d_raw_ptr is not None:
            store_parts(d_raw_ptr + of_step * (N_GATES * H), unit, inside, d_raw, H)
        if d_extra_ptr is not None:
            of_extra = of_step * (len(d_extra) * H)
            store_parts(d_extra_ptr + of_extra, unit, inside, d_extra, H)
        d_h = dropped(_product_back(d_raw[:N_EARLY], r_rows, PRECISION), factors)
        d_before = add(d_before, kept)
        if d_fresh_ptrs is not None:
            d_all = add(d_before, (d_h,))
            d_fresh = choose(mark, FRESH, add(d_fresh, d_all), d_fresh)
        if mark is not None:
            d_before = without(mark, FRESH | CUT, d_before)
            d_h = without(mark, STOPS, (d_h,))[0]
        d_state = add(d_before, (d_h,))
        _, _, _, of_step = place(tl.maximum(T - 2 - step, 0), T, B, n_ahead, BLOCK_B)
        if marks_ptr is not None:
            mark = load_marks(marks_ptr, of_step, rows)
        given, before, after, saved, normal, zones = _load_past(
            given_ptrs, before_ptrs, after_ptrs, saved_ptr, normal_ptrs, zone_ptrs, mark, of_step,
            rows, H, BLOCK_H, CELL,
        )  # fmt: skip

    store_states(running_ptrs, row, H, rows, 0, d_state, H, BLOCK_H)
    if d_fresh_ptrs is not None:
        store_states(d_fresh_ptrs, row, H, rows, 0, d_fresh, H, BLOCK_H)
