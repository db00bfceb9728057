"""The products of a step in several launches; ``staged.py`` describes the tensors.

    r              (N, G * H, P)     recurrent weights
    w_hr           (N, P, H)         projection weights
    drop           (N, B, P)         factors of h in the recurrent product, or None

Products accumulate in the dtype of the states, float32 or float64; operands have that of the
weights.
"""

import triton
import triton.language as tl

from .staged import (
    load,
    load_marks,
    load_parts,
    load_vectors,
    load_zone,
    parted,
    passed_on,
    place,
    refreshed,
    settled,
    store,
)
from .tiles import HOLD, STOPS, add, as_operand, has


@triton.jit
def multiply(
    block, a, w_ptr, k, column, K: tl.constexpr, N: tl.constexpr, STRIDE_K: tl.constexpr,
    STRIDE_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to a block the product of a tile (rows, k) and a (k, column) part of (K, N) weights."""
    part = tl.load(
        w_ptr + (k * STRIDE_K)[:, None] + (column * STRIDE_N)[None, :],
        mask=(k < K)[:, None] & (column < N)[None, :],
        other=0.0,
    )
    if block.dtype == tl.float64:
        # triton 3.7 fails to compile some float64 dots.
        block += tl.sum(a[:, :, None] * part[None, :, :], axis=1)
    else:
        a = as_operand(a.to(part.dtype), PRECISION)
        part = as_operand(part, PRECISION)
        block = tl.dot(a, part, block, input_precision=PRECISION)
    return block


@triton.jit(do_not_specialize=["T", "B", "step", "n_ahead"])
def recurrent_kernel(
    wx_ptr, r_ptr, b_ptr, drop_ptr, marks_ptr, fresh_ptrs, running_ptrs, raw_ptr, T, B, step,
    n_ahead, H: tl.constexpr, P: tl.constexpr, CELL: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """Compute the recurrent product of all gates except late ones; if `LATE`, of those only."""
    group, rows, of_group, of_step = place(step, T, B, n_ahead, BLOCK_B)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    N_GATES: tl.constexpr = CELL.n_gates
    N_EARLY: tl.constexpr = CELL.n_gates - CELL.n_late
    WIDTH: tl.constexpr = (CELL.n_late if LATE else N_EARLY) * H
    OFFSET: tl.constexpr = N_EARLY * H if LATE else 0
    r_ptr += group * (N_GATES * H * P) + OFFSET * P
    raw_rows = raw_ptr + of_group * (N_GATES * H)
    if b_ptr is not None:
        b_ptr += group * (N_GATES * H)
    mark = load_marks(marks_ptr, of_step, rows)
    fresh_ptr = None if fresh_ptrs is None else fresh_ptrs[0]

    EXACT: tl.constexpr = running_ptrs[0].dtype.element_ty
    block = tl.zeros([BLOCK_B, BLOCK_H], EXACT)
    for first in range(0, P, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        mask = rows[:, None] & (k < P)[None, :]
        h = load(running_ptrs[0] + of_group * P, k, mask)
        h = refreshed(h, fresh_ptr, mark, of_group * P, k, mask)
        if drop_ptr is not None:
            h *= load(drop_ptr + of_group * P, k, mask)
        if LATE:
            wx = load_parts(wx_ptr + of_step * (N_GATES * H), k, mask, H, N_EARLY)
            rh = load_parts(raw_rows, k, mask, H, N_EARLY)
            if b_ptr is not None:
                rh = add(rh, load_vectors(b_ptr, k, H, N_EARLY))
            h *= CELL.late_factor(wx, rh)
        block = multiply(block, h, r_ptr, k, column, P, WIDTH, 1, P, PRECISION)
    store(raw_rows + OFFSET, column, rows[:, None] & (column < WIDTH)[None, :], block)


@triton.jit(do_not_specialize=["T", "B", "step", "n_ahead"])
def project_kernel(
    full_ptr, w_hr_ptr, marks_ptr, fresh_ptrs, zone_ptrs, running_ptrs, output_ptrs, before_ptrs,
    T, B, step, n_ahead, H: tl.constexpr, P: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the projection, and h after the step."""
    group, rows, of_group, of_step = place(step, T, B, n_ahead, BLOCK_B)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    w_hr_ptr += group * (P * H)
    EXACT: tl.constexpr = running_ptrs[0].dtype.element_ty
    block = tl.zeros([BLOCK_B, BLOCK_H], EXACT)
    for first in range(0, H, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        full = load(full_ptr + of_group * H, k, rows[:, None] & (k < H)[None, :])
        block = multiply(block, full, w_hr_ptr, k, column, H, P, 1, H, PRECISION)

    mask = rows[:, None] & (column < P)[None, :]
    mark = load_marks(marks_ptr, of_step, rows)
    fresh_ptr = None if fresh_ptrs is None else fresh_ptrs[0]
    zone_ptr = None if zone_ptrs is None else zone_ptrs[0]
    before = load(running_ptrs[0] + of_group * P, column, mask)
    before = refreshed(before, fresh_ptr, mark, of_group * P, column, mask)
    if before_ptrs is not None:
        store(before_ptrs[0] + of_step * P, column, mask, before)
    h = settled(block, before, load_zone(zone_ptr, of_step * P, column, mask), mark)
    store(running_ptrs[0] + of_group * P, column, mask, h)
    store(output_ptrs[0] + of_step * P, column, mask, h)


@triton.jit(do_not_specialize=["T", "B", "step", "n_ahead"])
def receive_kernel(
    d_raw_ptr, r_ptr, dy_ptr, drop_ptr, marks_ptr, zone_ptrs, running_ptrs, d_fresh_ptrs, d_h_ptr,
    d_projected_ptr, T, B, step, n_ahead, H: tl.constexpr, P: tl.constexpr,
    CELL: tl.constexpr, WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of h through the recurrent product of the following step, whose
    gradients have rows of `WIDTH`, and the part of it that goes to the cell. Steps count from the
    last; at step T the gradient is that of the initial state.
    """
    group, rows, of_group, of_step = place(T - 1 - step, T, B, n_ahead, BLOCK_B)
    _, _, _, of_later = place(T - step, T, B, n_ahead, BLOCK_B)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = rows[:, None] & (column < P)[None, :]
    K: tl.constexpr = (CELL.n_gates - CELL.n_late) * H
    r_ptr += group * (CELL.n_gates * H * P)
    EXACT: tl.constexpr = running_ptrs[0].dtype.element_ty
    block = tl.zeros([BLOCK_B, BLOCK_H], EXACT)
    for first in range(0, tl.where(step == 0, 0, K), BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        d_raw = load(d_raw_ptr + of_later * WIDTH, k, rows[:, None] & (k < K)[None, :])
        block = multiply(block, d_raw, r_ptr, k, column, K, P, P, 1, PRECISION)

    if drop_ptr is not None:
        block *= load(drop_ptr + of_group * P, column, mask)
    d_fresh_ptr = None if d_fresh_ptrs is None else d_fresh_ptrs[0]
    later = load_marks(marks_ptr, of_later, rows & (step > 0))
    if later is not None:
        if d_fresh_ptr is not None:
            passed_on(block, d_fresh_ptr, later, of_group * P, column, mask)
        block = tl.where(has(later, STOPS)[:, None], 0.0, block)
    d = block + load(running_ptrs[0] + of_group * P, column, mask)
    if step < T:
        mark = load_marks(marks_ptr, of_step, rows)
        there = mask
        if mark is not None:
            there = mask & (has(mark, HOLD) == 0)[:, None]
        if dy_ptr is not None:
            d += load(dy_ptr + of_step * P, column, there)
        zone_ptr = None if zone_ptrs is None else zone_ptrs[0]
        d_h, d = parted(d, load_zone(zone_ptr, of_step * P, column, mask), mark)
        d = passed_on(d, d_fresh_ptr, mark, of_group * P, column, mask)
        store(d_h_ptr + of_group * P, column, mask, d_h)
        if d_projected_ptr is not None:
            store(d_projected_ptr + of_step * P, column, mask, d_h)
    store(running_ptrs[0] + of_group * P, column, mask, d)


@triton.jit(do_not_specialize=["T", "B", "step", "n_ahead"])
def through_kernel(
    d_h_ptr, w_ptr, saved_ptr, out_ptr, T, B, step, n_ahead, H: tl.constexpr,
    P: tl.constexpr, CELL: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """Compute the gradient through the projection or, if `LATE`, through the late product."""
    group, rows, of_group, of_step = place(T - 1 - step, T, B, n_ahead, BLOCK_B)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    N_EARLY: tl.constexpr = CELL.n_gates - CELL.n_late
    N_SAVED: tl.constexpr = CELL.n_saved
    w_ptr += group * (CELL.n_gates * H * H) + N_EARLY * H * H if LATE else group * (P * H)
    EXACT: tl.constexpr = d_h_ptr.dtype.element_ty
    block = tl.zeros([BLOCK_B, BLOCK_H], EXACT)
    for first in range(0, P, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        mask = rows[:, None] & (k < P)[None, :]
        d = (load(d_h_ptr + of_group * P, k, mask),)
        if LATE:
            saved_rows = saved_ptr + of_step * (N_SAVED * H)
            d = CELL.late_backward(load_parts(saved_rows, k, mask, H, N_SAVED), d)
        for n in tl.static_range(len(d)):
            of_gate = w_ptr + n * H * H
            block = multiply(block, d[n], of_gate, k, column, P, H, H, 1, PRECISION)
    store(out_ptr + of_group * H, column, rows[:, None] & (column < H)[None, :], block)
