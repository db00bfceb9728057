"""Layers on a GPU: GEMMs over all steps around the Triton kernels that walk through time.

The same functions as in ``cpu/layers.py``, which also runs here what has no kernel: float64,
sequences of different lengths, projections. The input projection is one GEMM per direction before
the kernel; the gradients of weights and input are GEMMs and reductions over the gate gradients that
the backward kernel wrote. Nothing here waits for the device.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import cpu, planner, products
from .kernels.configs import Choice, Device
from .reference import CELLS, Weights, zero_state


def facts(x: Tensor) -> tuple[Device | None, str]:
    """Tell the planner about the device and the precision of a tensor that is not on a CPU.

    Parameters
    ----------
    x : Tensor

    Returns
    -------
    (Device or None, str)
        The fields `gpu` and `precision` of ``planner.Problem``.
    """
    if not x.is_cuda:
        return None, "tf32"
    # Of other dtypes there is nothing to choose.
    precision = planner.float32_precision() if x.dtype == torch.float32 else "tf32"
    return planner.gpu(x.device.index), precision


def has_kernels(
    cell: str, x: Tensor, weights: Sequence[Tensor], batch_sizes: Tensor | None
) -> bool:
    """Tell whether the kernels run a layer, from what a compiler knows of it too.

    Parameters
    ----------
    cell, x, weights, batch_sizes
        As for ``reference.layer``; `x` on a GPU.

    Returns
    -------
    bool
    """
    return planner.kernel_gap(_problem(cell, x, weights, batch_sizes, False)) is None


def _problem(
    cell: str,
    x: Tensor,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bidirectional: bool,
) -> planner.Problem:
    hidden = weights[0].shape[0] // CELLS[cell].n_gates
    device, precision = facts(x)
    return planner.Problem(
        cell,
        steps=x.shape[0],
        batch=x.shape[-2],
        input_size=x.shape[-1],
        hidden_size=hidden,
        dtype=x.dtype,
        device=x.device.type,
        packed=batch_sizes is not None,
        projected=weights[1].shape[1] != hidden,
        directions=2 if bidirectional else 1,
        gpu=device,
        precision=precision,
    )


def _choices(problem: planner.Problem) -> tuple[Choice, Choice]:
    return planner.choose_kernels(problem, planner.forced_schedule())


def layer_forward(
    cell: str,
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bidirectional: bool,
    save: int,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run a layer; see ``cpu.layer_forward``.

    Returns
    -------
    y : Tensor of shape (T, B, D * H)
    final : list of Tensor of shape (D, B, H)
    saved : list of Tensor
        Empty if `save` is ``cpu.NOTHING``. The cell states of all steps, (T, B, D * H) in
        float32; unless `save` is ``cpu.STATES``, also the activations (D, T, B, S * H). Backward
        wants y before these.
    """
    problem = _problem(cell, x, weights, batch_sizes, bidirectional)
    if planner.kernel_gap(problem) is not None:
        return cpu.layer_forward(cell, x, state, weights, batch_sizes, bidirectional, save)
    from .kernels import launch
    from .kernels.cells import CELLS as KERNELS

    by_direction = _by_direction(weights, problem.directions)
    cpu.check_batch(state, problem.batch)
    initial = state or zero_state(cell, x, problem.batch, weights, problem.directions)
    with _products(problem):
        wx = _input_projection(x, by_direction)
    y, traces, activations, final = launch.forward(
        KERNELS[cell],
        wx,
        _stacked([w.w_hh for w in by_direction]),
        _stacked(b_hh) if (b_hh := [w.b_hh for w in by_direction if w.b_hh is not None]) else None,
        [part.contiguous() for part in initial],
        _choices(problem)[0].config,
        problem.precision,
        traced=save != cpu.NOTHING,
        save=save == cpu.ALL,
    )
    return y, final, [*traces, activations] if activations is not None else traces


def fake_saved(cell: str, x: Tensor, hidden: int, directions: int, save: int) -> list[Tensor]:
    """Make tensors of the shapes and dtypes that `layer_forward` saves, for a compiler.

    Parameters
    ----------
    cell, x
        As for `layer_forward`.
    hidden, directions : int
    save : int

    Returns
    -------
    list of Tensor
    """
    from .kernels.cells import CELLS as KERNELS

    if save == cpu.NOTHING:
        return []
    steps, batch, _ = x.shape
    trace = x.new_empty(steps, batch, directions * hidden, dtype=torch.float32)
    saved = [trace] * (CELLS[cell].n_states - 1)
    if save == cpu.ALL:
        width = KERNELS[cell].n_saved * hidden
        saved.append(x.new_empty(directions, steps, batch, width))
    return saved


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
    """Compute the gradients of `layer_forward`; see ``cpu.layer_backward``.

    `saved` is y, or the h of a cell, then what `layer_forward` saved.

    Returns
    -------
    dx : Tensor shaped as `x`, or None unless `needs_x`
    d_state : list of Tensor
    d_weights : list of Tensor
        Empty unless `needs_weights`.
    """
    y, *saved = saved
    problem = _problem(cell, x, weights, batch_sizes, bidirectional)
    if planner.kernel_gap(problem) is not None:
        arguments = (x, state, weights, batch_sizes, bidirectional)
        saved = saved or cpu.layer_forward(cell, *arguments, cpu.ALL)[2]
        return cpu.layer_backward(cell, dy, d_final, *arguments, saved, needs_x, needs_weights)
    from .kernels import launch
    from .kernels.cells import CELLS as KERNELS

    kernel = KERNELS[cell]
    y = y[None] if y.dim() == 2 else y
    by_direction = _by_direction(weights, problem.directions)
    initial = state or zero_state(cell, x, problem.batch, weights, problem.directions)
    traces, activations = saved[: kernel.n_states - 1], saved[kernel.n_states - 1 :]
    past: Tensor | tuple[Tensor, Tensor]
    with _products(problem):
        if activations or not kernel.n_saved:
            past = activations[0] if activations else y.new_empty(0)
        else:
            past = _input_projection(x, by_direction), _recurrent_parts(y, initial[0], by_direction)
        d_gates, d_initial = launch.backward(
            kernel,
            None if dy is None else dy.contiguous(),
            [part.contiguous() for part in d_final],
            _stacked([w.w_hh for w in by_direction]),
            [part.contiguous() for part in initial],
            y,
            traces,
            past,
            _choices(problem)[1].config,
            problem.precision,
        )
        del past
        columns = kernel.n_gates * problem.hidden_size
        flat = x.reshape(-1, x.shape[-1])
        dx = x.new_zeros(flat.shape) if needs_x else None
        d_weights: list[Tensor] = []
        for d, w in enumerate(by_direction):
            gates = d_gates[d].flatten(0, 1)
            d_rh, d_apart = gates[:, :columns], gates[:, columns:]
            if dx is not None:
                products.add_d_x(dx, d_rh, d_apart, w.w_ih)
            if needs_weights:
                h = y[..., d * problem.hidden_size : (d + 1) * problem.hidden_size].flatten(0, 1)
                d_w_hh = products.d_w_hh(d_rh, h, problem.batch, initial[0][d], d == 1)
                d_weights += products.d_weights(d_rh, d_apart, flat, d_w_hh, w)
    return None if dx is None else dx.view(x.shape), d_initial, d_weights


def _by_direction(weights: Sequence[Tensor], directions: int) -> list[Weights]:
    count = len(weights) // directions
    return [Weights.unpack(weights[d * count : (d + 1) * count]) for d in range(directions)]


def _stacked(tensors: list[Tensor]) -> Tensor:
    """One tensor with a dimension of directions in front; no copy for one direction."""
    return tensors[0].contiguous()[None] if len(tensors) == 1 else torch.stack(tensors)


_switching = threading.Lock()


@contextlib.contextmanager
def _products(problem: planner.Problem) -> Iterator[None]:
    """Let torch's own products of float32 be as exact as the kernels'.

    torch has one switch for the whole process, so it is turned only where it must be.
    """
    matmul = torch.backends.cuda.matmul
    wanted = {"tf32": ("tf32",)}.get(problem.precision, ("ieee", "none"))
    if problem.dtype != torch.float32 or matmul.fp32_precision in wanted:
        yield
        return
    with _switching:
        before, matmul.fp32_precision = matmul.fp32_precision, wanted[0]
        try:
            yield
        finally:
            matmul.fp32_precision = before


def _input_projection(x: Tensor, by_direction: list[Weights]) -> Tensor:
    """x @ W_ih^T + b_ih for all steps and directions, (D, T, B, G * H)."""
    flat = x.reshape(-1, x.shape[-1])
    width = by_direction[0].w_ih.shape[0]
    wx = x.new_empty(len(by_direction), flat.shape[0], width)
    for out, w in zip(wx, by_direction, strict=True):
        if w.b_ih is None:
            torch.mm(flat, w.w_ih.t(), out=out)
        else:
            torch.addmm(w.b_ih, flat, w.w_ih.t(), out=out)
    return wx.view(len(by_direction), *x.shape[:2], width)


def _recurrent_parts(y: Tensor, h_0: Tensor, by_direction: list[Weights]) -> Tensor:
    """h_{t-1} @ W_hh^T + b_hh for all steps and directions, (D, T, B, G * H)."""
    hidden = h_0.shape[-1]
    parts = []
    for d, w in enumerate(by_direction):
        h = y[..., d * hidden : (d + 1) * hidden]
        before = torch.cat([h[1:], h_0[d : d + 1]] if d else [h_0[d : d + 1], h[:-1]])
        parts.append(torch.nn.functional.linear(before, w.w_hh, w.b_hh))
    return torch.stack(parts)
