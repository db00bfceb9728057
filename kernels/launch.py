"""Allocate and launch the kernels of the layers whose step is one product.

Tensors arrive in torch's layout and are returned as the kernels wrote them; projections and weight
gradients, which are plain GEMMs, are left to the caller. Nothing synchronizes with the device, so
that a CUDA graph can capture a launch.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import PTXASError

from ..cells import Cell
from . import resident, stepwise
from .activations import ENGINE, NVIDIA_ENGINE, bound
from .configs import Config
from .tiles import STOPS


class UncompiledError(RuntimeError):
    """This version of Triton cannot compile a persistent kernel; Gluon is still changing."""

    @classmethod
    def of(cls, failure: Exception) -> UncompiledError:
        """Make the error from what the compiler raised."""
        why = str(failure).strip().splitlines() or [""]
        return cls(
            f"triton {triton.__version__} does not compile our persistent kernels "
            f"({type(failure).__name__}: {why[-1][:200]})"
        )


class _Debug(threading.local):
    spin_limit = 0


_debug = _Debug()


@contextlib.contextmanager
def bounded_spin(polls: int) -> Iterator[None]:
    """Limit, in this thread, how many polls a program may wait for another.

    Every launch in the context then synchronizes and raises if a program gave up; without the
    limit it would hang. For debugging; slow.

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


class Operands(NamedTuple):
    """What a layer computes with, apart from the input projection; every tensor is contiguous.

    D counts groups: directions, times heads, times members of an ensemble. H and B are those of a
    single group.

    Attributes
    ----------
    r : Tensor of shape (D, G * H, H)
    b : Tensor of shape (D, G * H), or None
    extra : Tensor of shape (D, E * H), or None
        The blocks of the cell's extra weights.
    initial : sequence of Tensor of shape (D, B, H)
    marks : uint8 Tensor of shape (D, T, B), or None
        How the state flows; see ``tiles.py``.
    fresh : sequence of Tensor of shape (D, B, H)
        The state after a reset, only with `marks`; zeros if empty.
    fresh_rh : Tensor of shape (D, B, G * H), or None
        Product of the fresh h with the recurrent weights, without bias; not used by `backward`.
    drop : Tensor of shape (D, B, H), or None
        Factors of h in the recurrent product.
    zones : sequence of (Tensor or None)
        Empty, or for each state what it keeps: uint8 (D, T, B, H), the units kept at each step; or
        (1,), the share kept by all; or None.
    n_ahead : int
        How many groups walk forward through time; these come first.
    """

    r: Tensor
    b: Tensor | None
    extra: Tensor | None
    initial: Sequence[Tensor]
    marks: Tensor | None = None
    fresh: Sequence[Tensor] = ()
    fresh_rh: Tensor | None = None
    drop: Tensor | None = None
    zones: Sequence[Tensor | None] = ()
    n_ahead: int = 1


class Past(NamedTuple):
    """What `backward` needs to know about the steps.

    Attributes
    ----------
    y, traces : Tensor, sequence of Tensor
        As `forward` returned them.
    gates : tuple of Tensor
        The activations that `forward` saved; or the parts of the gates from which to recompute
        them, wx and rh with their biases, of shape (D, T, B, G * H). Zones require the latter.
    """

    y: Tensor
    traces: Sequence[Tensor]
    gates: tuple[Tensor, ...]


def forward(
    cell: Cell,
    config: Config,
    precision: str,
    wx: Tensor,
    operands: Operands,
    *,
    traced: bool = False,
    save: bool = False,
) -> tuple[Tensor, list[Tensor], Tensor | None, list[Tensor]]:
    """Run a layer forward from its input projection.

    Parameters
    ----------
    cell : Cell
    config : Config
    precision : {'ieee', 'tf32', 'tf32x3'}
        Of float32 products.
    wx : Tensor of shape (D, T, B, G * H), contiguous
    operands : Operands
    traced, save : bool
        Whether to keep the other states of all steps, and the activations.

    Returns
    -------
    y : Tensor of shape (T, B, D * H)
        At steps that a row does not have, it holds the held state; the same goes for the traces.
    traces : list of Tensor of shape (T, B, D * H)
        float32; empty unless `traced`.
    saved : Tensor of shape (D, T, B, S * H), or None unless `save`
    final : list of Tensor of shape (D, B, H)
    """
    initial = operands.initial
    groups, steps, batch, _ = wx.shape
    hidden = operands.r.shape[-1]
    y = wx.new_empty(steps, batch, groups * hidden)
    traces = [torch.empty_like(y, dtype=torch.float32) for _ in initial[1:]] if traced else []
    saved = wx.new_empty(groups, steps, batch, cell.n_saved * hidden) if save else None
    arguments = {
        **_arguments(cell, config, precision, operands, steps),
        "wx_ptr": wx,
        "b_ptr": operands.b,
        "fresh_ptrs": tuple(operands.fresh) or None,
        "fresh_rh_ptr": operands.fresh_rh,
        "state_ptrs": (y, *traces),
        "saved_ptr": saved,
    }
    if config.schedule == "stepwise":
        running = [part.to(torch.float32, copy=True) for part in initial]
        arguments |= {"initial_ptr": initial[0], "running_ptrs": tuple(running)}
        _step_by_step(stepwise.forward_kernel, config, operands, arguments)
        return y, traces, saved, [part.to(wx.dtype) for part in running]
    final = [torch.empty_like(part, dtype=wx.dtype) for part in initial]
    arguments |= {"initial_ptrs": tuple(initial), "final_ptrs": tuple(final)}
    published = y
    if config.schedule == "persistent" and operands.drop is not None:
        published = torch.empty_like(y)
        arguments["state_ptrs"] = published, y, *traces
    _all_at_once("forward_kernel", config, operands, arguments, published)
    return y, traces, saved, final


def backward(
    cell: Cell,
    config: Config,
    precision: str,
    operands: Operands,
    past: Past,
    given: tuple[Tensor | None, Sequence[Tensor], Sequence[Tensor]],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run a layer backward to the gradients of its gates and of its initial state.

    Parameters
    ----------
    cell, config, precision, operands
        As for `forward`.
    past : Past
    given : (Tensor or None, sequence of Tensor, sequence of Tensor)
        Gradients, contiguous: of y, or None; of the final states; of the traces, in the dtype of y,
        empty if there are none.

    Returns
    -------
    d_gates : Tensor of shape (D, T, B, (G + A) * H)
    d_initial : list of Tensor of shape (D, B, H)
    d_fresh : list of Tensor of shape (D, B, H)
        float32, the part that does not pass through the recurrent product; empty if `fresh` is.
    """
    (dy, d_final, d_traces), (y, traces, gates) = given, past
    steps, batch, _ = y.shape
    groups, _, hidden = operands.r.shape
    dy = torch.zeros_like(y) if dy is None else dy
    d_gates = y.new_empty(groups, steps, batch, (cell.n_gates + cell.n_apart) * hidden)
    d_fresh = [torch.zeros_like(part, dtype=torch.float32) for part in operands.fresh]
    arguments = {
        **_arguments(cell, config, precision, operands, steps),
        "d_out_ptrs": (dy, *d_traces),
        # The kernels select a state's initial value or its trace by pointer: one dtype for both.
        "initial_ptrs": _wide(operands.initial),
        "fresh_ptrs": _wide(operands.fresh) or None,
        "state_ptrs": (y, *traces),
        "past_ptrs": gates,
        "d_gates_ptr": d_gates,
        "d_fresh_ptrs": tuple(d_fresh) or None,
    }
    if config.schedule == "stepwise":
        running = [part.to(torch.float32, copy=True) for part in d_final]
        arguments |= {"running_ptrs": tuple(running)}
        _step_by_step(stepwise.backward_kernel, config, operands, arguments)
        ahead = operands.n_ahead
        for of, first in ((slice(0, ahead), 0), (slice(ahead, groups), -1)):
            dh = d_gates[of, first, :, : cell.n_gates * hidden] @ operands.r[of]
            if operands.drop is not None:
                dh *= operands.drop[of]
            if operands.marks is not None:
                stops = (operands.marks[of, first] & STOPS.value) > 0
                dh.masked_fill_(stops[..., None], 0.0)
            running[0][of] += dh
        return d_gates, [part.to(y.dtype) for part in running], d_fresh
    d_initial = [torch.empty_like(part, dtype=y.dtype) for part in operands.initial]
    arguments |= {
        "d_final_ptrs": tuple(d_final),
        "d_initial_ptrs": tuple(d_initial),
    }
    _all_at_once("backward_kernel", config, operands, arguments, d_gates)
    return d_gates, d_initial, d_fresh


def _arguments(
    cell: Cell, config: Config, precision: str, operands: Operands, steps: int
) -> dict[str, Any]:
    """Collect the arguments common to all kernels."""
    # Only directions: the second, if any, walks from the end.
    is_plain = operands.n_ahead == 1 and len(operands.r) <= 2
    return {
        "r_ptr": operands.r,
        "extra_ptr": operands.extra,
        "marks_ptr": operands.marks,
        "noise_ptrs": (operands.drop, tuple(operands.zones) or None),
        "n_ahead": None if is_plain else operands.n_ahead,
        "T": steps,
        "B": operands.initial[0].shape[1],
        "H": operands.r.shape[-1],
        "CELL": bound(cell, NVIDIA_ENGINE if config.schedule == "persistent" else ENGINE),
        "BLOCK_B": config.block_b,
        "PRECISION": precision,
        "num_warps": config.num_warps,
        # Without a register limit ptxas uses 128 and spills a few.
        **({} if torch.version.hip else {"maxnreg": 255}),
    }


def _wide(states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(part.float() if k else part for k, part in enumerate(states))


def _integer(dtype: torch.dtype) -> torch.dtype:
    return torch.int16 if dtype.itemsize == 2 else torch.int32


def _grid(config: Config, operands: Operands) -> tuple[int, int, int]:
    groups, _, hidden = operands.r.shape
    tiles = triton.cdiv(operands.initial[0].shape[1], config.block_b)
    return triton.cdiv(hidden, config.block_h), tiles, groups


def _step_by_step(
    kernel: Any, config: Config, operands: Operands, arguments: dict[str, Any]
) -> None:
    arguments |= {"BLOCK_H": config.block_h, "BLOCK_K": config.block_k}
    with torch.cuda.device_of(operands.r):
        grid = _grid(config, operands)
        for step in range(arguments["T"]):
            kernel[grid](**arguments, step=step)


def _all_at_once(
    name: str, config: Config, operands: Operands, arguments: dict[str, Any], published: Tensor
) -> None:
    """Launch a kernel of an on-chip schedule for all steps.

    `published` is the tensor through which programs of a persistent kernel exchange data. With a
    limit on polls, raises after a launch in which a program gave up.
    """
    like, limit = operands.r, _debug.spin_limit
    slices, tiles, groups = _grid(config, operands)
    if config.schedule == "resident":
        with torch.cuda.device_of(like):
            kernel = getattr(resident, name)
            kernel[slices, tiles, groups](**arguments, BLOCK_H=config.block_h)
        return
    published.view(_integer(published.dtype)).fill_(-1)  # words.MISSING
    kernel = _persistent(name)
    error = like.new_zeros(1, dtype=torch.int32) if limit else None
    for first in range(0, tiles, config.tiles):
        grid = slices, min(config.tiles, tiles - first), groups
        with torch.cuda.device_of(like), _compiling():
            kernel[grid](
                **arguments,
                error_ptr=error,
                first_tile=first,
                BLOCK_K=config.block_k,
                IN_REGISTERS=config.in_registers,
                SPIN_LIMIT=limit,
                launch_cooperative_grid=True,
            )
        if error is not None and (step := int(error.item())):
            raise RuntimeError(
                f"a program waited in vain at step {step - 1}: {limit} polls, {config}, grid {grid}"
            )


def _persistent(name: str) -> Any:
    """Return a persistent kernel; its module is imported late because it imports Gluon."""
    try:
        from . import persistent
    except (ImportError, AttributeError) as failure:
        raise UncompiledError.of(failure) from failure
    return getattr(persistent, name)


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Turn a failure to compile, but no other error of a launch, into `UncompiledError`."""
    try:
        yield
    except (triton.CompilationError, PTXASError) as failure:
        raise UncompiledError.of(failure) from failure
    except RuntimeError as failure:
        if "PassManager" not in str(failure):
            raise
        raise UncompiledError.of(failure) from failure
