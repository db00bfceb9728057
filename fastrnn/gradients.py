"""Derivatives of ``reference.layer`` and of functions of rows, for what has no others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .flow import HOLD, Flow, without_unasked


def first(
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
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """Compute the gradients of a layer.

    Parameters
    ----------
    cell, x, state, weights, batch_sizes, bidirectional, flow
        As for ``reference.layer``.
    dy : Tensor shaped as y, or None
        None for a cell, whose output is its state.
    d_final, d_traces : sequence of Tensor
        Of the final states and, unless empty, the traces.

    Returns
    -------
    dx, d_state, d_fresh, d_weights
        None where the results do not depend on an input.
    """
    keep_graph = torch.is_grad_enabled()
    with _recording():
        groups = ((x,), state, weights, flow.fresh)
        (x,), state, weights, fresh = (_aliases(tensors, keep_graph) for tensors in groups)
        flow = flow._replace(fresh=fresh)
        result = reference.layer(cell, x, state, weights, batch_sizes, bidirectional, flow)
        outputs, cotangents = _pairs(result, dy, d_final, d_traces)
        inputs = [x, *state, *fresh, *weights]
        grads = iter(_grad(outputs, inputs, cotangents, keep_graph))
    return next(grads), [next(grads) for _ in state], [next(grads) for _ in fresh], list(grads)


def second(
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
    cotangents: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Compute the gradients of what `first` computes.

    Parameters
    ----------
    cell, dy, d_final, d_traces, x, state, weights, batch_sizes, bidirectional, flow
        As for `first`.
    cotangents : sequence of Tensor or None
        Of dx, d_state, d_fresh and d_weights, one after another.
    wanted : sequence of bool
        For dy, d_final, d_traces, x, state, fresh and weights, one after another.

    Returns
    -------
    list of Tensor or None
        As long as `wanted`.
    """
    keep_graph = torch.is_grad_enabled()
    n_results = 1 + len(d_final) + len(d_traces)
    if flow.marks is not None and not any(wanted[:n_results]):
        marks, _ = without_unasked(flow.marks, dy, d_traces, d_final, HOLD)
        flow = flow._replace(marks=marks)
    with _recording():
        groups = ((x,), state, weights, flow.fresh, d_final, d_traces)
        (x,), state, weights, fresh, d_final, d_traces = (
            _aliases(tensors, keep_graph) for tensors in groups
        )
        dy = None if dy is None else _aliases([dy], keep_graph)[0]
        flow = flow._replace(fresh=fresh)
        result = reference.layer(cell, x, state, weights, batch_sizes, bidirectional, flow)
        outputs, given = _pairs(result, dy, d_final, d_traces)
        tensors = [x, *state, *fresh, *weights]
        asked = [(t, g) for t, g in zip(tensors, cotangents, strict=True) if g is not None]
        grads = _grad(outputs, [t for t, _ in asked], given, keep_graph=True)
        every = [dy, *d_final, *d_traces, *tensors]
        wrt = [t for t, needed in zip(every, wanted, strict=True) if needed and t is not None]
        found = iter(_grad(grads, wrt, [g for _, g in asked], keep_graph))
    return [next(found) if needed else None for needed in wanted]


def by_rows(
    function: Callable[..., Tensor], rows: Sequence[Tensor], weights: Sequence[Tensor]
) -> Tensor:
    """Call a function of rows whose backward leaves out those that it is not asked for.

    Parameters
    ----------
    function : callable
        ``function(*rows, *weights) -> Tensor``, every row of which depends on the same one of each
        of `rows`; if that is not a number, gradients are numbers where its own is 0.
    rows : sequence of Tensor of shape (..., ·)
    weights : sequence of Tensor

    Returns
    -------
    Tensor of shape (..., ·)
    """
    return _ByRows.apply(function, len(rows), *rows, *weights)


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Any, count: int, *tensors: Tensor) -> Tensor:
        ctx.function, ctx.count = function, count
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    def backward(ctx: Any, d_result: Tensor) -> Any:
        keep_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            leaves = _aliases(ctx.saved_tensors, keep_graph)
            rows = leaves[: ctx.count]
            if not torch._C._functorch.is_legacy_batchedtensor(d_result):
                # No row that is a number: its gradient's derivative by d_result is not 0.
                unasked = (d_result == 0).all(-1, keepdim=True)
                rows = [
                    part.masked_fill(unasked & ~part.isfinite().all(-1, keepdim=True), 0.0)
                    for part in rows
                ]
            result = ctx.function(*rows, *leaves[ctx.count :])
            return None, None, *_grad([result], leaves, [d_result], keep_graph)


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Let autograd record, also inside of an operator, where torch has taken it out."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch.enable_grad(), torch._C._ForceDispatchKeyGuard(included, excluded):
        yield


_AUTOGRAD_KEYS = tuple(
    getattr(torch._C.DispatchKey, name)
    for name in (
        "AutogradCPU",
        "AutogradCUDA",
        "AutogradOther",
        "AutogradFunctionality",
        "ADInplaceOrView",
    )
    if hasattr(torch._C.DispatchKey, name)
)


def _aliases(tensors: Sequence[Tensor], keep_graph: bool) -> list[Tensor]:
    """One leaf for each use of a tensor: weights may be tied, every use has a gradient."""
    return [
        t.view_as(t) if keep_graph and t.requires_grad else t.detach().requires_grad_()
        for t in tensors
    ]


def _pairs(
    result: reference.Result,
    dy: Tensor | None,
    d_final: Sequence[Tensor],
    d_traces: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and their cotangents; a cell has no gradient of y, which is its state."""
    outputs, cotangents = list(result.final), list(d_final)
    if dy is not None:
        outputs, cotangents = [result.y, *outputs], [dy, *cotangents]
    traces = result.traces if d_traces else []
    return outputs + traces, cotangents + list(d_traces)


def _grad(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    keep_graph: bool,
) -> Sequence[Tensor | None]:
    """``torch.autograd.grad`` that gives None where an output does not depend on an input."""
    pairs = [
        (output, cotangent)
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if output is not None and output.requires_grad
    ]
    if not inputs or not pairs:
        return [None] * len(inputs)
    outputs, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(
        outputs, inputs, cotangents, create_graph=keep_graph, allow_unused=True
    )
