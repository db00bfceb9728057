"""Derivatives of ``reference.layer`` and of row-wise functions, where there are no others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .call import Call, Cotangents, Gradients, Result
from .flow import HOLD, without_unasked


def first(call: Call, given: Cotangents) -> Gradients:
    """Compute all gradients of a layer, None for an input that no result depends on."""
    keep_graph = torch.is_grad_enabled()
    with _recording():
        call = _with_leaves(call, keep_graph)
        outputs, cotangents = _pairs(reference.layer(call), given)
        state, fresh = call.state, call.flow.fresh
        inputs = [call.x, *state, *fresh, *call.weights]
        grads: Any = iter(_grad(outputs, inputs, cotangents, keep_graph))
    dx, d_state = next(grads), [next(grads) for _ in state]
    return Gradients(dx, d_state, [next(grads) for _ in fresh], list(grads))


def second(
    call: Call, given: Cotangents, cotangents: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Compute the gradients of the results of `first`.

    Parameters
    ----------
    call, given
        As for `first`.
    cotangents : sequence of Tensor or None
        Those of dx, d_state, d_fresh and d_weights, concatenated.
    wanted : sequence of bool
        Whether the gradient is needed, for dy, d_final, d_traces, x, state, fresh and weights,
        concatenated.

    Returns
    -------
    list of Tensor or None
        As long as `wanted`.
    """
    keep_graph = torch.is_grad_enabled()
    n_results = 1 + len(given.d_final) + len(given.d_traces)
    if call.flow.marks is not None and not any(wanted[:n_results]):
        marks, _ = without_unasked(call.flow.marks, given, HOLD)
        call = call._replace(flow=call.flow._replace(marks=marks))
    with _recording():
        call = _with_leaves(call, keep_graph)
        given = Cotangents(
            None if given.dy is None else _aliases([given.dy], keep_graph)[0],
            _aliases(given.d_final, keep_graph),
            _aliases(given.d_traces, keep_graph),
        )
        outputs, of_outputs = _pairs(reference.layer(call), given)
        tensors = [call.x, *call.state, *call.flow.fresh, *call.weights]
        asked = [(t, g) for t, g in zip(tensors, cotangents, strict=True) if g is not None]
        grads = _grad(outputs, [t for t, _ in asked], of_outputs, keep_graph=True)
        every = [given.dy, *given.d_final, *given.d_traces, *tensors]
        wrt = [t for t, needed in zip(every, wanted, strict=True) if needed and t is not None]
        found = iter(_grad(grads, wrt, [g for _, g in asked], keep_graph))
    return [next(found) if needed else None for needed in wanted]


def by_rows(
    function: Callable[..., Tensor], rows: Sequence[Tensor], weights: Sequence[Tensor]
) -> Tensor:
    """Call a row-wise function whose backward leaves out rows without a gradient.

    Where the gradient of a row of the result is 0, NaN in the row does not reach the gradients.

    Parameters
    ----------
    function : callable
        ``function(*rows, *weights) -> Tensor``; each row of the result depends on the
        corresponding row of each of `rows` only.
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
                # Finite rows are kept: the derivative of their gradients by d_result is not 0.
                unasked = (d_result == 0).all(-1, keepdim=True)
                rows = [
                    part.masked_fill(unasked & ~part.isfinite().all(-1, keepdim=True), 0.0)
                    for part in rows
                ]
            result = ctx.function(*rows, *leaves[ctx.count :])
            return None, None, *_grad([result], leaves, [d_result], keep_graph)


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Let autograd record even inside an operator, where torch excludes it."""
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
    """Make a leaf for each use of a tensor, because tied weights need a gradient per use."""
    return [
        t.view_as(t) if keep_graph and t.requires_grad else t.detach().requires_grad_()
        for t in tensors
    ]


def _with_leaves(call: Call, keep_graph: bool) -> Call:
    """Make a call whose tensors are leaves of a new graph."""
    groups = ([call.x], call.state, call.weights, call.flow.fresh)
    (x,), state, weights, fresh = (_aliases(tensors, keep_graph) for tensors in groups)
    return call._replace(x=x, state=state, weights=weights, flow=call.flow._replace(fresh=fresh))


def _pairs(result: Result, given: Cotangents) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and their cotangents."""
    dy, d_final, d_traces = given
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
    """``torch.autograd.grad`` that returns None where no output depends on an input."""
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
