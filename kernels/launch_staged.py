"""Allocate and launch the kernels of ``staged.py``, several launches per step, and those of
``staged_resident.py``, one launch for all steps.

Every tensor here has a leading dimension of groups, N. What is documented as float32 is float64 in
a float64 layer. Nothing synchronizes with the device, so that a CUDA graph can capture it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..cells import Cell
from . import staged, staged_products, staged_resident
from .activations import bound
from .configs import Config


def _exact(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and states: float64 for float64 inputs, else float32."""
    return torch.promote_types(dtype, torch.float32)


class Operands(NamedTuple):
    """What a layer computes with, apart from the input part; every tensor is contiguous.

    W is P for h, where P equals H without a projection, and H for the other states.

    Attributes
    ----------
    r : Tensor of shape (N, G * H, P)
    b : Tensor of shape (N, G * H), or None
    extra : Tensor of shape (N, E * H), or None
        The blocks of the cell's extra weights.
    w_hr : Tensor of shape (N, P, H), or None
    initial : sequence of Tensor of shape (N, B, W)
    marks : uint8 Tensor of shape (N, T, B), or None
        How the state flows; see ``tiles.py``.
    fresh : sequence of Tensor of shape (N, B, W)
        The state after a reset, only with `marks`; zeros if empty.
    drop : Tensor of shape (N, B, P), or None
        Factors of h in the recurrent product.
    zones : sequence of Tensor or None
        For each state: a uint8 Tensor of shape (N, T, B, W), nonzero where a unit keeps its old
        value; or in float32 the share kept by all, (1,). Empty if there are none.
    n_ahead : int
        How many groups walk forward through time; these come first.
    """

    r: Tensor
    b: Tensor | None
    extra: Tensor | None
    w_hr: Tensor | None
    initial: Sequence[Tensor]
    marks: Tensor | None
    fresh: Sequence[Tensor]
    drop: Tensor | None
    zones: Sequence[Tensor | None]
    n_ahead: int

    @property
    def hidden(self) -> int:
        """H."""
        return self.r.shape[2] if self.w_hr is None else self.w_hr.shape[2]


class Past(NamedTuple):
    """What `forward` saves for `backward`.

    Attributes
    ----------
    befores : list of Tensor of shape (N, T, B, W)
        Each state before the step; float32 except for h.
    afters : list of Tensor of shape (N, T, B, H)
        Each state as the cell computed it, before a projection and zones.
    activations : Tensor of shape (N, T, B, S * H)
    normal : list of Tensor
        The normalized recurrent products (N, T, B, G * H) and, in float32, the reciprocals of their
        standard deviations (N, T, B); empty if the cell does not normalize.
    """

    befores: list[Tensor]
    afters: list[Tensor]
    activations: Tensor
    normal: list[Tensor]

    @classmethod
    def empty(cls, cell: Cell, wx: Tensor, size_h: int) -> Past:
        """Allocate the tensors for a layer with this input part."""
        *rows, width = wx.shape
        hidden = width // cell.n_gates

        def tensor(*last: int, dtype: torch.dtype = wx.dtype) -> Tensor:
            return wx.new_empty(*rows, *last, dtype=dtype)

        others, exact = cell.n_states - 1, _exact(wx.dtype)
        return cls(
            [tensor(size_h), *(tensor(hidden, dtype=exact) for _ in range(others))],
            [tensor(hidden), *(tensor(hidden, dtype=exact) for _ in range(others))],
            tensor(cell.n_saved * hidden),
            [tensor(width), tensor(dtype=exact)] if cell.is_normalized else [],
        )

    def flat(self) -> list[Tensor]:
        """Return all tensors as one list."""
        return [*self.befores, *self.afters, self.activations, *self.normal]

    @classmethod
    def of_flat(cls, cell: Cell, flat: Sequence[Tensor]) -> Past:
        """Rebuild the record from that list."""
        n = cell.n_states
        return cls([*flat[:n]], [*flat[n : 2 * n]], flat[2 * n], [*flat[2 * n + 1 :]])


class Found(NamedTuple):
    """What `backward` computes.

    Attributes
    ----------
    d_gates : Tensor of shape (N, T, B, (G + A) * H)
        Gradients of the recurrent parts, then of the input parts of those gates where they differ.
    d_raw : Tensor of shape (N, T, B, G * H), or None
        Gradients of the recurrent products before normalization.
    d_extra : Tensor of shape (N, T, B, X * H), or None
        Gradients of the last X blocks of extra weights, for each row.
    d_projected : Tensor of shape (N, T, B, P), or None
        Gradients of the projected h.
    d_initial, d_fresh : list of Tensor of shape (N, B, W)
        float32; `d_fresh` is empty if there are no fresh states.
    """

    d_gates: Tensor
    d_raw: Tensor | None
    d_extra: Tensor | None
    d_projected: Tensor | None
    d_initial: list[Tensor]
    d_fresh: list[Tensor]


def forward(
    cell: Cell,
    config: Config,
    precision: str,
    wx: Tensor,
    operands: Operands,
    *,
    traced: bool = False,
    save: bool = False,
) -> tuple[Tensor, list[Tensor], Past | None, list[Tensor]]:
    """Run a layer forward from its input part.

    Parameters
    ----------
    cell : Cell
    config : Config
    precision : {'ieee', 'tf32', 'tf32x3'}
        Of float32 products.
    wx : Tensor of shape (N, T, B, G * H), contiguous
    operands : Operands
    traced, save : bool
        Whether to keep the other states of all steps, and what `backward` needs.

    Returns
    -------
    y : Tensor of shape (N, T, B, P)
        At steps that a row does not have, it holds the held state; the same goes for the traces.
    traces : list of Tensor of shape (N, T, B, H)
        In the accumulation dtype; empty unless `traced`.
    past : Past, or None unless `save`
    final : list of Tensor of shape (N, B, W)
        In the accumulation dtype.
    """
    (groups, steps, batch, width), exact = wx.shape, _exact(wx.dtype)
    size_h, hidden = operands.r.shape[2], operands.hidden
    projected = operands.w_hr is not None
    y = wx.new_empty(groups, steps, batch, size_h)
    of_others = groups, steps, batch, hidden
    traces = [wx.new_empty(of_others, dtype=exact) for _ in operands.initial[1:] if traced]
    past = Past.empty(cell, wx, size_h) if save else None
    running = [part.to(exact, copy=True) for part in operands.initial]
    arguments = {
        "wx_ptr": wx,
        "r_ptr": operands.r,
        "w_hr_ptr": operands.w_hr,
        "b_ptr": operands.b,
        "extra_ptr": operands.extra,
        "drop_ptr": operands.drop,
        "fresh_ptrs": tuple(operands.fresh) or None,
        "running_ptrs": tuple(running),
        "output_ptrs": (y, *traces),
        "before_ptrs": tuple(past.befores) if past else None,
        "after_ptrs": tuple(past.afters) if past else None,
        "saved_ptr": past.activations if past else None,
        "normal_ptrs": tuple(past.normal) or None if past else None,
    }
    if config.schedule == "resident":
        launch, _ = _launchers(cell, config, precision, operands, arguments, steps)
        launch(staged_resident.forward_kernel, hidden)
        return y, traces, past, running
    arguments |= {
        "raw_ptr": wx.new_empty(groups, batch, width, dtype=exact),
        "full_ptr": wx.new_empty(groups, batch, hidden) if projected else None,
    }
    product, row = _launchers(cell, config, precision, operands, arguments, steps)
    n_late = cell.late.n_gates if cell.late else 0
    for step in range(steps):
        product(staged_products.recurrent_kernel, width - n_late * hidden, step, LATE=False)
        if n_late:
            product(staged_products.recurrent_kernel, n_late * hidden, step, LATE=True)
        row(staged.forward_kernel, hidden, step)
        if projected:
            product(staged_products.project_kernel, size_h, step)
    return y, traces, past, running


def backward(
    cell: Cell,
    config: Config,
    precision: str,
    operands: Operands,
    past: Past,
    given: tuple[Tensor | None, Sequence[Tensor], Sequence[Tensor]],
) -> Found:
    """Run a layer backward to the gradients of its gates and states.

    Parameters
    ----------
    cell, config, precision, operands
        As for `forward`.
    past : Past
    given : (Tensor or None, sequence of Tensor, sequence of Tensor)
        Gradients, contiguous: of y, or None; of the final states; of the traces, empty if there are
        none.

    Returns
    -------
    Found
    """
    dy, d_final, d_traces = given
    rows, dtype, hidden = past.activations.shape[:3], past.activations.dtype, operands.hidden
    (groups, steps, batch), exact = rows, _exact(dtype)
    size_h, projected = operands.r.shape[2], operands.w_hr is not None

    def sequence(blocks: int) -> Tensor:
        return operands.r.new_empty(*rows, blocks * hidden, dtype=dtype)

    def scratch(columns: int) -> Tensor:
        return operands.r.new_empty(groups, batch, columns, dtype=exact)

    d_gates = sequence(cell.n_gates + cell.n_apart)
    d_raw = sequence(cell.n_gates) if cell.is_normalized else None
    n_extra = _n_row_extra(cell)
    d_extra = sequence(n_extra) if n_extra else None
    d_projected = torch.empty_like(past.befores[0]) if projected else None
    running = [part.to(exact, copy=True) for part in d_final]
    d_fresh = [torch.zeros_like(part, dtype=exact) for part in operands.fresh]
    arguments: dict[str, Any] = {
        "r_ptr": operands.r,
        "extra_ptr": operands.extra,
        "drop_ptr": operands.drop,
        "running_ptrs": tuple(running),
        "d_fresh_ptrs": tuple(d_fresh) or None,
        "before_ptrs": tuple(past.befores),
        "after_ptrs": tuple(past.afters),
        "saved_ptr": past.activations,
        "normal_ptrs": tuple(past.normal) or None,
        "d_gates_ptr": d_gates,
        "d_extra_ptr": d_extra,
    }
    found = Found(d_gates, d_raw, d_extra, d_projected, running, d_fresh)
    if config.schedule == "resident":
        arguments |= {"given_ptrs": (dy, *d_traces), "d_raw_ptr": d_raw}
        launch, _ = _launchers(cell, config, precision, operands, arguments, steps)
        launch(staged_resident.backward_kernel, hidden)
        return found
    d_h = scratch(size_h)
    through = scratch(hidden) if projected or cell.late else None
    product_rows = d_gates if d_raw is None else d_raw
    arguments |= {
        "w_ptr": operands.w_hr if projected else operands.r,
        "dy_ptr": dy,
        "d_trace_ptrs": tuple(d_traces),
        "d_projected_ptr": d_projected,
        "out_ptr": through,
        "d_product_ptr": through if cell.late else None,
        "PROJECTED": projected,
        "LATE": cell.late is not None,
        "WIDTH": product_rows.shape[-1],
    }
    product, row = _launchers(cell, config, precision, operands, arguments, steps)
    receive = functools.partial(
        product, staged_products.receive_kernel, size_h, d_raw_ptr=product_rows, d_h_ptr=d_h
    )
    for step in range(steps):
        receive(step)
        if through is not None:
            product(staged_products.through_kernel, hidden, step, d_h_ptr=d_h)
        d_of_cell = through if projected else d_h
        row(staged.backward_kernel, hidden, step, d_h_ptr=d_of_cell, d_raw_ptr=d_raw)
    receive(steps)
    return found


def _launchers(
    cell: Cell,
    config: Config,
    precision: str,
    operands: Operands,
    arguments: dict[str, Any],
    steps: int,
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return the launchers of a layer's kernels: the first for products or for all steps, with the
    configured tile, the second for cells.

    They take a kernel, its number of columns, the step, and further arguments.
    """
    groups, batch, size_h = operands.initial[0].shape
    arguments = {
        "marks_ptr": operands.marks,
        "zone_ptrs": tuple(operands.zones) or None,
        "T": steps,
        "B": batch,
        "n_ahead": operands.n_ahead,
        "H": operands.hidden,
        "P": size_h,
        "CELL": bound(cell),
        "PRECISION": precision,
        "BLOCK_K": config.block_k,
        **arguments,
    }

    def launcher(block_b: int, block_h: int, num_warps: int) -> Callable[..., None]:
        options = {"num_warps": num_warps}
        if not torch.version.hip:  # as in launch.py; the most registers available to so many warps
            options["maxnreg"] = min(255, 2048 // num_warps)

        def launch(kernel: Any, columns: int, step: int = 0, **more: Any) -> None:
            given = {**arguments, **more, "step": step, "BLOCK_B": block_b, "BLOCK_H": block_h}
            grid = triton.cdiv(batch, block_b), triton.cdiv(columns, block_h), groups
            with torch.cuda.device_of(operands.r):
                kernel[grid](**{name: given[name] for name in kernel.arg_names}, **options)

        return launch

    return (
        launcher(config.block_b, config.block_h, config.num_warps),
        launcher(*row_tile(cell, operands.hidden)),
    )


def _n_row_extra(cell: Cell) -> int:
    """Count the blocks of extra weights, which come last, with a separate gradient for each row."""
    if cell.output is not None:
        return cell.output.n_extra
    return 0 if cell.d_extra is None else cell.n_extra


def row_tile(cell: Cell, hidden: int) -> tuple[int, int, int]:
    """Return rows, units and warps of a cell's program: all units, if the cell normalizes them.

    8 warps can use all registers of a multiprocessor. With more warps, latency is hidden better;
    with fewer, each thread has less overhead per unit, such as addresses. The largest tiles need
    every register.
    """
    units = triton.next_power_of_2(hidden)
    if not cell.is_normalized:
        units = min(units, 128)
    rows = max(1, 512 // units)
    return rows, units, 8 if units > 2048 else min(16, max(4, units // 128))
