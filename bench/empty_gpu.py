"""An empty exchange on a GPU: the programs of a persistent kernel only hand h around.

The protocol is that of the kernels (``kernels/exchange.py``), and so are the tiles: 16 rows of 512
units in 32 programs, in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .. import devices
from ..kernels import exchange
from ..kernels.exchange import counter_of, publish_state, receive_state

_ROWS, _UNITS, _HIDDEN = 16, 16, 512


@triton.jit
def empty_kernel(
    state_ptr,
    counter_ptr,
    error_ptr,
    steps,
    H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PROTOCOL: tl.constexpr,
):
    """Publish a slice of h, wait for those of all others, and publish what they sent."""
    unit0 = tl.program_id(0) * BLOCK_H
    row = tl.arange(0, BLOCK_B)
    if PROTOCOL == "counter":
        counter_ptr = counter_of(counter_ptr, 0)
    new = tl.zeros([BLOCK_B, BLOCK_H], state_ptr.dtype.element_ty)
    for step in range(steps):
        row_ptrs = state_ptr + (step * BLOCK_B + row) * H
        publish_state(row_ptrs, row >= 0, unit0, new, counter_ptr, H, PROTOCOL)
        h = receive_state(
            row_ptrs,
            row >= 0,
            counter_ptr,
            tl.num_programs(0) * (step + 1),
            step,
            error_ptr,
            H,
            H,
            PROTOCOL,
            0,
        )
        # The next step depends on what came, as in a layer: it hands on one more.
        new = (tl.zeros(new.shape, tl.float32) + tl.max(h[0], 1)[:, None] + 1).to(new.dtype)


def loop(device: torch.device, steps: int) -> Callable[[], None] | None:
    """Make a call that hands h around so many times.

    Parameters
    ----------
    device : torch.device
        A GPU.
    steps : int

    Returns
    -------
    callable or None
        None for a device whose programs may not wait for each other.
    """
    facts = devices.gpu(device.index)
    if facts is None or facts.target != "cuda":
        return None
    state = torch.empty(steps, _ROWS, _HIDDEN, dtype=torch.bfloat16, device=device)
    counter = torch.zeros(exchange.counter_words(1), dtype=torch.int32, device=device)
    error = torch.zeros(1, dtype=torch.int32, device=device)

    def call() -> None:
        # What a layer does before each launch.
        state.view(torch.int16).fill_(exchange.MISSING.value)
        counter.zero_()
        with torch.cuda.device_of(state):
            empty_kernel[(_HIDDEN // _UNITS,)](
                state,
                counter,
                error,
                steps,
                H=_HIDDEN,
                BLOCK_B=_ROWS,
                BLOCK_H=_UNITS,
                PROTOCOL=facts.protocol,
                num_warps=8,
                launch_cooperative_grid=True,
            )

    return call
