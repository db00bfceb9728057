"""An empty exchange on a GPU: the programs of a persistent kernel only exchange h.

It works as in those kernels (``kernels/words.py``), on similar tiles: 16 rows of 512 units in 32
programs of 8 warps, in bfloat16. Each warp waits for its part of all columns, and no program
publishes before all of its warps have received theirs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .. import devices
from ..kernels import configs
from ..kernels.fragments import TILE_ROWS, UNITS, sums_layout
from ..kernels.persistent import columns_of, places_of
from ..kernels.words import MISSING, load_chunks, publish, settle

_ROWS, _UNITS, _HIDDEN = TILE_ROWS.value, UNITS.value, 512
_BLOCK_K, _WARPS = 32, 8


@gluon.jit
def hand_on(row_ptr, new, buffer, columns, publish_offsets, publish_mask, H: gl.constexpr):
    """Publish a slice of h, wait for those of all others, and return one more than was received."""
    offsets, left = columns
    W: gl.constexpr = offsets.shape[0]
    STRIDE: gl.constexpr = W * offsets.shape[2]
    CHUNKS: gl.constexpr = (H + STRIDE - 1) // STRIDE
    TILE: gl.constexpr = new.type.layout
    publish(row_ptr + publish_offsets, new, publish_mask, H)
    chunks = load_chunks(row_ptr + offsets, left, CHUNKS, H, H)
    most = gl.zeros(offsets.shape, gl.float32, offsets.type.layout)
    for c in gl.static_range(CHUNKS):
        here = row_ptr + (offsets + c * STRIDE)
        chunks = settle(chunks, here, left - c * STRIDE, None, 0, H, H, 0)
        h = chunks[0].to(row_ptr.dtype.element_ty, bitcast=True)
        most = gl.maximum(most, h.to(gl.float32))
        chunks = chunks[1:]
    # The maximum over a warp's columns of each row, then over all of them, after one barrier.
    buffer.store(gl.max(most, 2))
    row = gl.max(buffer.load(gl.SliceLayout(1, sums_layout(W))), 0)
    row = gl.convert_layout(row, gl.SliceLayout(0, TILE), assert_trivial=True)
    return (gl.zeros(new.shape, gl.float32, TILE) + row[None, :] + 1.0).to(new.dtype)


@gluon.jit(do_not_specialize=["steps"])
def empty_kernel(state_ptr, steps, H: gl.constexpr, BLOCK_K: gl.constexpr):
    """Exchange h repeatedly: at step t it is t, for every unit and row."""
    W: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = state_ptr.dtype.element_ty
    TILE: gl.constexpr = gl.SliceLayout(0, sums_layout(W))
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    SIZE: gl.constexpr = TILE_ROWS * H
    _, _, unit, row, offsets = places_of(
        gl.program_id(0) * UNITS, H, W, dtype.primitive_bitwidth // 8
    )
    mask = (unit < H) & (row < TILE_ROWS)
    columns = columns_of(H, TILE_ROWS, H, W, BLOCK_K)
    # Two buffers, used alternately, so that none is overwritten while still being read.
    even = gl.allocate_shared_memory(gl.float32, [W, TILE_ROWS], PLAIN)
    odd = gl.allocate_shared_memory(gl.float32, [W, TILE_ROWS], PLAIN)
    new = gl.zeros([UNITS, TILE_ROWS], dtype, TILE)
    for _ in range(steps // 2):
        new = hand_on(state_ptr, new, even, columns, offsets, mask, H)
        new = hand_on(state_ptr + SIZE, new, odd, columns, offsets, mask, H)
        state_ptr += 2 * SIZE
    if steps % 2 == 1:
        hand_on(state_ptr, new, even, columns, offsets, mask, H)


def loop(device: torch.device, steps: int) -> Callable[[], None] | None:
    """Make a call that exchanges h so many times.

    Parameters
    ----------
    device : torch.device
        A GPU.
    steps : int

    Returns
    -------
    callable or None
        None if the device has no persistent kernel.
    """
    facts = devices.gpu(device.index)
    shape = configs.Shape(1, _ROWS, _HIDDEN, 1, 2, "tf32")
    if facts is None or configs.persistent_gap(shape, facts) is not None:
        return None
    state = torch.empty(steps, _ROWS, _HIDDEN, dtype=torch.bfloat16, device=device)

    def call() -> None:
        # As a layer does before each launch.
        state.view(torch.int16).fill_(MISSING.value)
        with torch.cuda.device_of(state):
            empty_kernel[(_HIDDEN // _UNITS,)](
                state,
                steps,
                H=_HIDDEN,
                BLOCK_K=_BLOCK_K,
                num_warps=_WARPS,
                launch_cooperative_grid=True,
            )

    return call
