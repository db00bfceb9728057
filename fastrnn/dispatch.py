"""The operators as functions of records, calling a backend directly if nothing intercepts them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import cpu, gpu
from .call import Asked, Call, Cotangents, Gradients, Result
from .context import is_plain


def backend(x: Tensor) -> Any:
    """The backend for a device; the CPU's loop of torch operators serves all others too."""
    return gpu if x.is_cuda else cpu


def arguments(call: Call) -> tuple[Any, ...]:
    """The operators' arguments for a record."""
    marks, fresh, noise = call.flow
    tensors = (call.x, list(call.state), list(call.weights), call.batch_sizes)
    return call.cell.name, *tensors, call.bidirectional, marks, list(fresh), list(noise)


def forward(call: Call, save: int, traced: bool) -> tuple[Result, list[Tensor]]:
    """``fastrnn::layer``: see ``cpu.forward``."""
    if is_plain(*call.tensors):
        return backend(call.x).forward(call, save, traced)
    *result, saved = torch.ops.fastrnn.layer(*arguments(call), save, traced)
    return Result(*result), saved


def backward(call: Call, given: Cotangents, saved: Sequence[Tensor], asked: Asked) -> Gradients:
    """``fastrnn::layer_backward``: see ``cpu.backward``."""
    if is_plain(*call.tensors, given.dy, *given.d_final, *given.d_traces, *saved):
        return backend(call.x).backward(call, given, saved, asked)
    return by_operator(call, given, saved, asked)


def by_operator(call: Call, given: Cotangents, saved: Sequence[Tensor], asked: Asked) -> Gradients:
    """``fastrnn::layer_backward``, through torch's dispatcher."""
    name, *others = arguments(call)
    d_final, d_traces = list(given.d_final), list(given.d_traces)
    found = torch.ops.fastrnn.layer_backward(
        name, given.dy, d_final, d_traces, *others, list(saved), *asked
    )
    return Gradients(*found)
