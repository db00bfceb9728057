"""Whole sequences on a CPU: the kernels, as code for LLVM.

One parallel region runs all steps of one direction of a layer. Hidden units fall into slices of two
vectors, and a thread owns whole slices: it packs their weights, which then stay in its cache, and
computes their gates and states. Only h (in backward: the gradient of the gates) crosses between
threads, at one barrier a step; a projection of h is a second product, with a barrier of its own.

Arrays have torch's layouts; packed weights are padded with zeros. Where so few rows are multiplied
that packing does not pay, forward takes the weights as they are.

A packed sequence differs from a padded batch in the number of rows of a step alone: `sizes`. Rows
that join late (in the order of the pass) start from the initial state, rows that leave early keep
theirs, so that one rule for "rows which the step before had, and those it had not" is enough.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from ..cells import Cell
from .arguments import Backward, Forward, Product
from .backward_kernel import BackwardWriter
from .forward_kernel import ForwardWriter
from .machine import Target


class _Writer(ForwardWriter, BackwardWriter):
    """Writes the kernels of one cell."""


def module(cell: Cell, target: Target, noisy: bool = False) -> Any:
    """Write the kernels ``forward``, ``backward`` and ``product`` of a cell.

    Noisy ones know recurrent dropout and zoneout.
    """
    result = ir.Module(f"fastrnn_{cell.name}")
    writer = _Writer(result, cell, target, noisy)
    writer.kernel("forward", Forward, writer.forward)
    writer.kernel("backward", Backward, writer.backward)
    writer.kernel("product", Product, writer.product)
    return result
