"""Layers on a GPU: GEMMs over all steps around the Triton kernels that walk through time.

The same functions as in ``cpu/layers.py``, which also runs here what has no kernel: float64,
packed sequences, projections, noise, rarer cells. The input projection is one GEMM per direction
before the kernel; the gradients of weights and input are GEMMs and reductions over the gate
gradients that the backward kernel wrote. Nothing here waits for the device.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import cpu, planner, products
from .cells import CELLS, Weights
from .flow import CUT, FRESH, HOLD, START, Flow, without_unasked
from .kernels.configs import Choice, Device
from .reference import zero_state


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
    cell: str, x: Tensor, weights: Sequence[Tensor], batch_sizes: Tensor | None, flow: Flow
) -> bool:
    """Tell whether the kernels run a layer, from what a compiler knows of it too.

    Parameters
    ----------
    cell, x, weights, batch_sizes, flow
        As for ``reference.layer``; `x` on a GPU.

    Returns
    -------
    bool
    """
    return _in_kernels(_problem(cell, x, weights, batch_sizes, False, flow))


def _in_kernels(problem: planner.Problem) -> bool:
    return not problem.packed and planner.kernel_gap(problem) is None


def _problem(
    cell: str,
    x: Tensor,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bidirectional: bool,
    flow: Flow,
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
        marked=flow.marks is not None,
        noisy=len(flow.noise) > 0,
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
    flow: Flow,
    save: int,
    traced: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Run a layer; see ``cpu.layer_forward``.

    Returns
    -------
    y : Tensor of shape (T, B, D * H)
    final : list of Tensor of shape (D, B, H)
    traces : list of Tensor of shape (T, B, D * H)
        Empty unless `traced`.
    saved : list of Tensor
        Empty if `save` is ``cpu.NOTHING``. The cell states of all steps, (T, B, D * H) in
        float32; unless `save` is ``cpu.STATES``, also the activations (D, T, B, S * H). Backward
        wants y before these.
    """
    problem = _problem(cell, x, weights, batch_sizes, bidirectional, flow)
    if not _in_kernels(problem):
        arguments = (x, state, weights, batch_sizes, bidirectional, flow)
        return cpu.layer_forward(cell, *arguments, save, traced)
    from .kernels import launch
    from .kernels.cells import CELLS as KERNELS

    by_direction = _by_direction(weights, problem.directions)
    cpu.check_batch((*state, *flow.fresh), problem.batch)
    initial = state or zero_state(cell, x, problem.batch, weights, problem.directions)
    r = _stacked([w.w_hh for w in by_direction])
    fresh = _fresh(flow)
    with _products(problem):
        wx = _input_projection(x, by_direction)
        fresh_rh = fresh[0] @ r.transpose(1, 2) if fresh else None
    y, trace, activations, final = launch.forward(
        KERNELS[cell],
        wx,
        r,
        _stacked(b_hh) if (b_hh := [w.b_hh for w in by_direction if w.b_hh is not None]) else None,
        [part.contiguous() for part in initial],
        _choices(problem)[0].config,
        problem.precision,
        marks=flow.marks,
        fresh=fresh,
        fresh_rh=fresh_rh,
        traced=traced or save != cpu.NOTHING,
        save=save == cpu.ALL,
    )
    traces = [part.to(x.dtype, copy=save != cpu.NOTHING) for part in trace] if traced else []
    for rows in (y, *traces):
        _clear_held(rows, flow)
    if save == cpu.NOTHING:
        return y, final, traces, []
    return y, final, traces, [*trace, activations] if activations is not None else trace


def _fresh(flow: Flow) -> list[Tensor]:
    """The states after a reset as the kernels take them; empty for zeros, and without a reset."""
    return [] if flow.marks is None else [part.contiguous() for part in flow.fresh]


def _clear_held(rows: Tensor, flow: Flow) -> None:
    """Put zeros at the steps that a row does not have: the kernels hold the state there."""
    if flow.marks is not None:
        directions, steps, batch = flow.marks.shape
        held = ((flow.marks & HOLD) != 0).permute(1, 2, 0).unsqueeze(-1)
        by_direction = rows.view(steps, batch, directions, rows.shape[-1] // directions)
        by_direction.masked_fill_(held, 0.0)


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
    d_traces: Sequence[Tensor],
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bidirectional: bool,
    flow: Flow,
    saved: Sequence[Tensor],
    needs_x: bool,
    needs_weights: bool,
    groups: int = 0,
) -> tuple[Tensor | None, list[Tensor], list[Tensor], list[Tensor]]:
    """Compute the gradients of `layer_forward`; see ``cpu.layer_backward``.

    `saved` is y, or the h of a cell, then what `layer_forward` saved; or it is empty.

    Returns
    -------
    dx : Tensor shaped as `x`, or None unless `needs_x`
    d_state : list of Tensor
    d_fresh : list of Tensor
    d_weights : list of Tensor
        Empty unless `needs_weights`; with `groups`, of shape (groups, ...).
    """
    problem = _problem(cell, x, weights, batch_sizes, bidirectional, flow)
    arguments = (x, state, weights, batch_sizes, bidirectional, flow)
    if not _in_kernels(problem):
        return cpu.layer_backward(
            cell, dy, d_final, d_traces, *arguments, saved[1:], needs_x, needs_weights, groups
        )
    from .kernels import launch
    from .kernels.cells import CELLS as KERNELS

    if not saved:
        y, _, _, activations = layer_forward(cell, *arguments, cpu.ALL, False)
        saved = [y, *activations]
    kernel, (y, *saved) = KERNELS[cell], saved
    y = y[None] if y.dim() == 2 else y
    by_direction = _by_direction(weights, problem.directions)
    initial = state or zero_state(cell, x, problem.batch, weights, problem.directions)
    traces, activations = saved[: kernel.n_states - 1], saved[kernel.n_states - 1 :]
    dead = None
    if flow.marks is not None:
        marks, unasked = without_unasked(flow.marks, dy, d_traces, d_final, CUT)
        dead, flow = unasked | ((marks & HOLD) != 0), flow._replace(marks=marks)
    past: Tensor | tuple[Tensor, Tensor]
    with _products(problem):
        if activations or not kernel.n_saved:
            past = activations[0] if activations else y.new_empty(0)
        else:
            rh = _recurrent_parts(y, initial[0], by_direction, flow)
            past = _input_projection(x, by_direction), rh
        d_gates, d_initial, d_fresh = launch.backward(
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
            d_traces=[part.contiguous() for part in d_traces],
            marks=flow.marks,
            fresh=_fresh(flow),
        )
        del past
        columns = kernel.n_gates * problem.hidden_size
        flat = x.reshape(-1, x.shape[-1])
        dx = x.new_zeros(flat.shape) if needs_x else None
        d_weights: list[Tensor] = []
        for d, w in enumerate(by_direction):
            own_x, gates = flat, d_gates[d].flatten(0, 1)
            if dead is not None:
                own_x = _without(dead[d], flat)
                gates.masked_fill_(dead[d].view(-1, 1), 0.0)
            d_rh, d_apart = gates[:, :columns], gates[:, columns:]
            if d_fresh:
                d_fresh[0][d] += _d_fresh_rh(d_gates[d, ..., :columns], flow, d) @ w.w_hh
            if dx is not None:
                products.add_d_x(dx, d_rh, d_apart, w.w_ih)
            if needs_weights and groups:
                before = _h_before(y, initial[0], flow, d).flatten(0, 1)
                before = before if dead is None else _without(dead[d], before)
                d_weights += products.d_weights_by_group(
                    d_rh, d_apart, own_x, before, w=w, steps=problem.steps, groups=groups
                )
            elif needs_weights:
                d_w_hh = _d_w_hh(d_rh, y, initial[0], flow, d, dead)
                d_weights += products.d_weights(d_rh, d_apart, own_x, d_w_hh, w)
    d_fresh = [part.to(x.dtype) for part in d_fresh] or [torch.zeros_like(p) for p in flow.fresh]
    return None if dx is None else dx.view(x.shape), d_initial, d_fresh, d_weights


def _d_fresh_rh(d_rh: Tensor, flow: Flow, d: int) -> Tensor:
    """The gradient of the fresh h's product in one direction, (B, G * H), from (T, B, G * H)."""
    assert flow.marks is not None
    is_fresh = ((flow.marks[d] & FRESH) != 0).unsqueeze(-1)
    # Not a product with the marks, which a NaN of another step would pass.
    return torch.where(is_fresh, d_rh, 0.0).sum(0, dtype=torch.float32).to(d_rh.dtype)


def _without(dead: Tensor, rows: Tensor) -> Tensor:
    """Rows (T * B, ·) with zeros where a direction has no gradient: a factor that may be NaN."""
    return rows.masked_fill(dead.view(-1, 1), 0.0)


def _d_w_hh(
    d_rh: Tensor, y: Tensor, h_0: Tensor, flow: Flow, d: int, dead: Tensor | None
) -> Tensor:
    """The gradient of one direction's recurrent weights, from (T * B, G * H)."""
    if dead is not None:
        return d_rh.t() @ _without(dead[d], _h_before(y, h_0, flow, d).flatten(0, 1))
    h = _of_direction(y, h_0, d).flatten(0, 1)
    return products.d_w_hh(d_rh, h, y.shape[1], h_0[d], d == 1)


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


def _recurrent_parts(y: Tensor, h_0: Tensor, by_direction: list[Weights], flow: Flow) -> Tensor:
    """h_{t-1} @ W_hh^T + b_hh for all steps and directions, (D, T, B, G * H)."""
    parts = [
        torch.nn.functional.linear(_h_before(y, h_0, flow, d), w.w_hh, w.b_hh)
        for d, w in enumerate(by_direction)
    ]
    return torch.stack(parts)


def _h_before(y: Tensor, h_0: Tensor, flow: Flow, d: int) -> Tensor:
    """h before every step of one direction, (T, B, H); anything where the state is held."""
    h, first = _of_direction(y, h_0, d), h_0[d : d + 1]
    before = torch.cat([h[1:], first] if d else [first, h[:-1]])
    if flow.marks is None:
        return before
    is_start, is_fresh = (((flow.marks[d] & bit) != 0).unsqueeze(-1) for bit in (START, FRESH))
    before = torch.where(is_start, first, before)
    return torch.where(is_fresh, flow.fresh[0][d] if flow.fresh else 0.0, before)


def _of_direction(y: Tensor, h_0: Tensor, d: int) -> Tensor:
    """The part of y that a direction wrote."""
    return y[..., d * h_0.shape[-1] : (d + 1) * h_0.shape[-1]]
