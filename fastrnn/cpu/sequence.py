"""The kernels for whole sequences on a CPU, as code for LLVM.

One parallel region runs all steps of one direction of a layer. Hidden units are divided into slices
of two vectors, and a thread owns whole slices: it packs their weights, which then stay in its
cache, and computes their gates and states. Threads exchange only h (in backward the gradients of
the gates), at one barrier per step; a projection of h is a second product, with its own barrier.

Arrays have torch's layouts; packed weights are padded with zeros. If too few rows are multiplied
for packing to pay off, forward uses the weights unpacked.

A packed sequence differs from a padded batch only in the number of rows of each step, `sizes`. Rows
that join late (in the order of the pass) start from the initial state, and rows that leave early
keep theirs, so it is enough to tell rows that the step before had from those that it did not have.
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

    Noisy kernels support recurrent dropout and zoneout.
    """
    result = ir.Module(f"fastrnn_{cell.name}")
    writer = _Writer(result, cell, target, noisy)
    writer.kernel("forward", Forward, writer.forward)
    writer.kernel("backward", Backward, writer.backward)
    writer.kernel("product", Product, writer.product)
    return result
