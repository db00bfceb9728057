"""A layer on a CPU, in both directions of the pass and for both directions of a layer.

Each direction runs by the compiled kernels (``native.py``) or, where there are none, by the loop
of torch operators (``loop.py``, also on devices that have no backend of their own); both save the
same tensors. The input gradient and the weight gradients are products over all rows afterwards.

Half precision is computed in float32 and rounded once, at the results.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .. import products
from ..reference import Weights, zero_state
from . import loop, machine
from .rows import Rows

# What forward keeps for backward: nothing, the states of every step, or the activations too. Here
# the states alone are not kept: backward begins with another forward then.
NOTHING, STATES, ALL = range(3)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Name the dtype in which a layer of `dtype` is computed and its activations are saved.

    Parameters
    ----------
    dtype : torch.dtype

    Returns
    -------
    torch.dtype
    """
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def check_batch(state: Sequence[Tensor], batch: int) -> None:
    """Raise unless states have `batch` rows, which compiled code finds out only when it runs.

    Parameters
    ----------
    state : sequence of Tensor of shape (D, B, H)
    batch : int

    Raises
    ------
    RuntimeError
        If one has another number of rows.
    """
    for part in state:
        if part.shape[1] != batch:
            raise RuntimeError(f"Expected hidden states of {batch} rows, got {part.shape[1]}")


def _backend(x: Tensor, projected: bool) -> ModuleType:
    if not x.is_cpu or machine.kernel_gap(x.dtype, projected) is not None:
        return loop
    from . import native

    return native


def _directions(
    cell: str,
    x: Tensor,
    batch: int,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    bidirectional: bool,
) -> tuple[list[Weights], Sequence[Tensor]]:
    """Weights by direction and the initial state as it is given, in the compute dtype."""
    directions = 2 if bidirectional else 1
    per_direction = len(weights) // directions
    dtype = compute_dtype(x.dtype)
    flat = _as(weights, dtype)
    by_direction = [
        Weights.unpack(flat[d * per_direction : (d + 1) * per_direction]) for d in range(directions)
    ]
    check_batch(state, batch)
    return by_direction, _as(state, dtype)


def _as(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """The tensors in a dtype that all of them have, or none."""
    return tensors if all(t.dtype == dtype for t in tensors) else [t.to(dtype) for t in tensors]


def layer_forward(
    cell: str,
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bidirectional: bool,
    save: int,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run a layer.

    Parameters
    ----------
    cell, x, state, weights, batch_sizes, bidirectional
        As for ``reference.layer``.
    save : int
        What to keep for backward.

    Returns
    -------
    y : Tensor of shape (T, B, D * P), or (N, D * P)
    final : list of Tensor
    saved : list of Tensor
        Empty unless `save` is `ALL`. In the compute dtype: h (N, D * P), apart from y, which the
        caller may overwrite; then for each direction of an LSTM or GRU the gate activations
        (N, G * H) and the cell states or the recurrent part of the n gate (N, H).
    """
    rows = Rows.of(x, batch_sizes)
    by_direction, initial = _directions(cell, x, rows.batch, state, weights, bidirectional)
    dtype, size_h = compute_dtype(x.dtype), weights[1].shape[1]
    flat = x.flatten(0, -2).to(dtype)
    if state:
        final = [part.clone(memory_format=torch.contiguous_format) for part in initial]
    else:
        final = zero_state(cell, flat, rows.batch, weights, len(by_direction))
    y = x.new_empty(*x.shape[:-1], len(by_direction) * size_h)
    y_rows = y.view(flat.shape[0], y.shape[-1])
    h_rows = torch.empty_like(y_rows, dtype=dtype) if save == ALL or dtype != x.dtype else y_rows
    saved = [h_rows] if save == ALL else []
    backend = _backend(x, by_direction[0].w_hr is not None)
    for d, w in enumerate(by_direction):
        of_d = slice(d * size_h, (d + 1) * size_h)
        state_d = [part[d] for part in final]
        saved += backend.forward(
            cell, flat, w, rows, d == 1, bool(state), state_d, h_rows[:, of_d], save == ALL
        )
    if h_rows is not y_rows:
        y_rows.copy_(h_rows)
    return y, list(_as(final, x.dtype)), saved


def layer_backward(
    cell: str,
    dy: Tensor | None,
    d_final: Sequence[Tensor],
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bidirectional: bool,
    saved: Sequence[Tensor],
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Compute the gradients of `layer_forward`, from what it saved.

    Parameters
    ----------
    cell : str
    dy : Tensor shaped as y, optional
    d_final : sequence of Tensor
    x, state, weights, batch_sizes, bidirectional
        As for `layer_forward`.
    saved : sequence of Tensor
    needs_x, needs_weights : bool

    Returns
    -------
    dx : Tensor shaped as `x`, or None unless `needs_x`
    d_state : list of Tensor
        Gradient of the initial state, whether it was given or not.
    d_weights : list of Tensor
        Empty unless `needs_weights`.
    """
    rows = Rows.of(x, batch_sizes)
    by_direction, initial = _directions(cell, x, rows.batch, state, weights, bidirectional)
    dtype, size_h = compute_dtype(x.dtype), weights[1].shape[1]
    d_state = [part.to(dtype, copy=True).contiguous() for part in d_final]
    flat = x.flatten(0, -2).to(dtype)
    # What unpacks saved tensors may bring them back in another layout.
    h_rows, *activations = (part.to(dtype).contiguous() for part in saved)
    dy = None if dy is None else dy.flatten(0, -2).to(dtype)
    dx = flat.new_zeros(x.shape) if needs_x else None
    d_weights: list[Tensor] = []
    backend = _backend(x, by_direction[0].w_hr is not None)
    for d, w in enumerate(by_direction):
        of_d = slice(d * size_h, (d + 1) * size_h)
        h, initial_d = h_rows[:, of_d], [part[d] for part in initial]
        d_rh, d_apart, d_w_hr = backend.backward(
            cell,
            None if dy is None else dy[:, of_d],
            [part[d] for part in d_state],
            w,
            rows,
            d == 1,
            initial_d,
            h,
            activations[2 * d : 2 * d + 2],
        )
        if dx is not None:
            products.add_d_x(dx.view(flat.shape), d_rh, d_apart, w.w_ih)
        if needs_weights:
            if batch_sizes is None:
                h_0 = initial_d[0] if state else None
                d_w_hh = products.d_w_hh(d_rh, h, rows.batch, h_0, d == 1)
            else:
                d_w_hh = d_rh.t() @ rows.previous(h, initial_d[0], d == 1)
            d_weights += products.d_weights(d_rh, d_apart, flat, d_w_hh, w)
            if d_w_hr is not None:
                d_weights.append(d_w_hr)
    return (
        None if dx is None else dx.to(x.dtype),
        list(_as(d_state, x.dtype)),
        list(_as(d_weights, x.dtype)) if d_weights else [],
    )
