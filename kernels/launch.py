"""Allocate and launch: the one file here that knows torch.

Tensors come in as torch has them and leave as the kernels wrote them; projections and weight
gradients, which are plain GEMMs, are the caller's. Nothing waits for the device, so that a
CUDA graph can record a launch.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from . import configs, exchange, persistent, stepwise
from .cells import Cell
from .configs import Config
from .tiles import STOPS


class _Debug(threading.local):
    spin_limit = 0


_debug = _Debug()


@contextlib.contextmanager
def bounded_spin(polls: int) -> Iterator[None]:
    """Let no program wait for another for more than so many polls, in this thread.

    Every launch inside then waits for its end and raises if a program gave up, which without
    this would hang. For debugging; slow.

    Parameters
    ----------
    polls : int
        At least 1.

    Raises
    ------
    ValueError
        If `polls` is not positive.
    RuntimeError
        From the launch in which a program gave up.
    """
    if polls < 1:
        raise ValueError(f"polls must be at least 1, got {polls}")
    before, _debug.spin_limit = _debug.spin_limit, polls
    try:
        yield
    finally:
        _debug.spin_limit = before


def forward(
    cell: Cell,
    wx: Tensor,
    r: Tensor,
    b: Tensor | None,
    initial: Sequence[Tensor],
    config: Config,
    precision: str,
    *,
    marks: Tensor | None = None,
    fresh: Sequence[Tensor] = (),
    fresh_rh: Tensor | None = None,
    traced: bool = False,
    save: bool = False,
) -> tuple[Tensor, list[Tensor], Tensor | None, list[Tensor]]:
    """Run a layer forward from its input projection.

    Parameters
    ----------
    cell : Cell
    wx : Tensor of shape (D, T, B, G * H), contiguous
    r : Tensor of shape (D, G * H, H), contiguous
    b : Tensor of shape (D, G * H), contiguous, or None
    initial : sequence of Tensor of shape (D, B, H), contiguous
    config : Config
    precision : {'ieee', 'tf32', 'tf32x3'}
        Of products of float32.
    marks : uint8 Tensor of shape (D, T, B), contiguous, or None
        How the state flows; see ``tiles.py``.
    fresh : sequence of Tensor of shape (D, B, H), contiguous
        The state where it is fresh, only with `marks`; zeros if empty.
    fresh_rh : Tensor of shape (D, B, G * H), contiguous, or None
        Product of the fresh h with the recurrent weights, without bias.
    traced, save : bool
        Whether to keep the other states of every step, and the activations.

    Returns
    -------
    y : Tensor of shape (T, B, D * H)
        With what is held at the steps that a row does not have; so are the traces.
    traces : list of Tensor of shape (T, B, D * H)
        float32; empty unless `traced`.
    saved : Tensor of shape (D, T, B, S * H), or None unless `save`
    final : list of Tensor of shape (D, B, H)
    """
    directions, steps, batch, _ = wx.shape
    hidden = r.shape[-1]
    y = wx.new_empty(steps, batch, directions * hidden)
    traces = [torch.empty_like(y, dtype=torch.float32) for _ in initial[1:]] if traced else []
    saved = wx.new_empty(directions, steps, batch, cell.n_saved * hidden) if save else None
    constants = {
        "H": hidden,
        "FORWARD": cell.forward,
        "N_GATES": cell.n_gates,
        "N_SAVED": cell.n_saved,
        "BLOCK_B": config.block_b,
        "BLOCK_H": config.block_h,
        "BLOCK_K": config.block_k,
        "PRECISION": precision,
        **_options(config),
    }
    shared = {
        "wx_ptr": wx,
        "r_ptr": r,
        "b_ptr": b,
        "marks_ptr": marks,
        "fresh_ptrs": tuple(fresh) or None,
        "fresh_rh_ptr": fresh_rh,
        "saved_ptr": saved,
        "T": steps,
        "B": batch,
    }
    if config.schedule == "stepwise":
        running = [part.to(torch.float32, copy=True) for part in initial]
        with torch.cuda.device_of(wx):
            grid = _grid(config, batch, hidden, directions)
            for step in range(steps):
                stepwise.forward_kernel[grid](
                    **shared,
                    initial_ptr=initial[0],
                    running_ptrs=tuple(running),
                    state_ptrs=(y, *traces),
                    step=step,
                    **constants,
                )
        return y, traces, saved, [part.to(wx.dtype) for part in running]
    final = [torch.empty_like(part) for part in initial]
    if config.protocol == configs.FLAG:
        y.view(_integer(y.dtype)).fill_(exchange.MISSING.value)
    for grid, exchanged in _launches(config, wx, batch, hidden, directions):
        persistent.forward_kernel[grid](
            **shared,
            initial_ptrs=tuple(initial),
            state_ptrs=(y, *traces),
            final_ptrs=tuple(final),
            **exchanged,
            **constants,
        )
    return y, traces, saved, final


def backward(
    cell: Cell,
    dy: Tensor | None,
    d_final: Sequence[Tensor],
    r: Tensor,
    initial: Sequence[Tensor],
    y: Tensor,
    traces: Sequence[Tensor],
    past: Tensor | tuple[Tensor, Tensor],
    config: Config,
    precision: str,
    *,
    d_traces: Sequence[Tensor] = (),
    marks: Tensor | None = None,
    fresh: Sequence[Tensor] = (),
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run a layer backward to the gradients of its gates and of its initial state.

    Parameters
    ----------
    cell, r, initial, config, precision, marks, fresh
        As for `forward`.
    dy : Tensor of shape (T, B, D * H), contiguous, or None
    d_final : sequence of Tensor of shape (D, B, H), contiguous
    y, traces
        What `forward` returned.
    past : Tensor or (Tensor, Tensor)
        The activations that `forward` saved, or the gates from which to compute them again: wx
        and rh with their biases, of shape (D, T, B, G * H).
    d_traces : sequence of Tensor of shape (T, B, D * H), contiguous
        Gradients of the traces, in the dtype of y; empty for none.

    Returns
    -------
    d_gates : Tensor of shape (D, T, B, (G + A) * H)
    d_initial : list of Tensor of shape (D, B, H)
    d_fresh : list of Tensor of shape (D, B, H)
        float32, what does not pass through the recurrent product; empty if `fresh` is.
    """
    steps, batch, _ = y.shape
    directions, _, hidden = r.shape
    saved, wx, rh = (past, None, None) if isinstance(past, Tensor) else (None, *past)
    d_gates = y.new_empty(directions, steps, batch, (cell.n_gates + cell.n_apart) * hidden)
    constants = {
        "H": hidden,
        "FORWARD": cell.forward,
        "BACKWARD": cell.backward,
        "N_GATES": cell.n_gates,
        "N_SAVED": cell.n_saved,
        "N_APART": cell.n_apart,
        "BLOCK_B": config.block_b,
        "BLOCK_H": config.block_h,
        "PRECISION": precision,
        **_options(config),
    }
    # The kernels choose between a state's first value and its trace by a pointer to one dtype.
    initial = _wide(initial)
    d_fresh = [torch.zeros_like(part, dtype=torch.float32) for part in fresh]
    shared = {
        "dy_ptr": dy,
        "d_trace_ptrs": tuple(d_traces) or None,
        "r_ptr": r,
        "initial_ptrs": tuple(initial),
        "marks_ptr": marks,
        "fresh_ptrs": tuple(_wide(fresh)) or None,
        "state_ptrs": (y, *traces),
        "saved_ptr": saved,
        "wx_ptr": wx,
        "rh_ptr": rh,
        "d_gates_ptr": d_gates,
        "d_fresh_ptrs": tuple(d_fresh) or None,
        "T": steps,
        "B": batch,
    }
    if config.schedule == "stepwise":
        running = [part.to(torch.float32, copy=True) for part in d_final]
        with torch.cuda.device_of(y):
            grid = _grid(config, batch, hidden, directions)
            for step in range(steps):
                stepwise.backward_kernel[grid](
                    **shared,
                    running_ptrs=tuple(running),
                    step=step,
                    BLOCK_K=config.block_k,
                    **constants,
                )
        for d in range(directions):
            first = -1 if d else 0
            dh = d_gates[d, first, :, : cell.n_gates * hidden] @ r[d]
            if marks is not None:
                stops = (marks[d, first] & STOPS.value) > 0
                dh.masked_fill_(stops[:, None], 0.0)
            running[0][d] += dh
        return d_gates, [part.to(y.dtype) for part in running], d_fresh
    d_initial = [torch.empty_like(part, dtype=y.dtype) for part in initial]
    for grid, exchanged in _launches(config, y, batch, hidden, directions):
        slices = grid[0]
        mail = None
        if config.protocol != configs.LOCAL:
            words = exchange.mailbox_words(math.prod(grid[1:]), slices, *config[2:4])
            mail = y.new_zeros(words, dtype=torch.int32)
        persistent.backward_kernel[grid](
            **shared,
            d_final_ptrs=tuple(d_final),
            d_initial_ptrs=tuple(d_initial),
            mail_ptr=mail,
            SLICES=slices,
            BLOCK_N=max(config.block_k, config.block_h),  # or mailboxes would not be filled
            BLOCK_S=configs.block_s(config, slices),
            **exchanged,
            **constants,
        )
    return d_gates, d_initial, d_fresh


def _wide(states: Sequence[Tensor]) -> list[Tensor]:
    return [part.float() if k else part for k, part in enumerate(states)]


def _grid(config: Config, batch: int, hidden: int, directions: int) -> tuple[int, int, int]:
    return triton.cdiv(hidden, config.block_h), triton.cdiv(batch, config.block_b), directions


def _options(config: Config) -> dict[str, int]:
    """Compiler options. Without a limit of registers ptxas takes 128 and spills a few."""
    options = {"num_warps": config.num_warps}
    return options if torch.version.hip else {**options, "maxnreg": 255}


def _integer(dtype: torch.dtype) -> torch.dtype:
    return torch.int16 if dtype.itemsize == 2 else torch.int32


def _launches(
    config: Config, like: Tensor, batch: int, hidden: int, directions: int
) -> Iterator[tuple[tuple[int, int, int], dict[str, Any]]]:
    """The grid of each launch of an on-chip schedule and the arguments of its exchange.

    In debug mode, raises after a launch in which a wait gave up.
    """
    slices, tiles, _ = _grid(config, batch, hidden, directions)
    limit = _debug.spin_limit
    for first in range(0, tiles, config.tiles):
        grid = slices, min(config.tiles, tiles - first), directions
        counter = error = None
        if config.protocol == configs.COUNTER:
            words = exchange.counter_words(grid[1] * directions)
            counter = like.new_zeros(words, dtype=torch.int32)
        if limit:
            error = like.new_zeros(1, dtype=torch.int32)
        with torch.cuda.device_of(like):
            yield (
                grid,
                {
                    "first_tile": first,
                    "counter_ptr": counter,
                    "error_ptr": error,
                    "PROTOCOL": config.protocol,
                    "SPIN_LIMIT": limit,
                    "launch_cooperative_grid": config.protocol != configs.LOCAL,
                },
            )
        if error is not None and (step := int(error.item())):
            raise RuntimeError(
                f"a program waited in vain at step {step - 1}: {limit} polls, {config}, grid {grid}"
            )
