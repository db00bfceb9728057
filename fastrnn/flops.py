"""FLOP formulas of the operators for torch's FlopCounterMode.

As for torch's own operators, matrix products count two operations per multiply-add, and pointwise
operations count nothing. A layer thus has the same count as torch.nn's, except where torch runs a
single oneDNN operator, which counts nothing. Two counts differ from autograd's, because they follow
what the operators do:

* backward counts all weight gradients if one weight needs its gradient, and always that of a given
  initial state;
* backward counts a forward as well if it starts with one, as with ``recompute``.

The count depends on shapes only, so the steps that ``lengths`` excludes are included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ._imports import when_imported
from .cells import CELLS


def register() -> None:
    """Register the formulas of the operators, at once or when FlopCounterMode is imported.

    It is not imported here, because it imports triton, which takes longer than all of fastrnn.
    """
    when_imported("torch.utils.flop_counter", _register_with)


def _register_with(counter: ModuleType) -> None:
    # get_raw: formulas get tensors instead of their shapes.
    for name, formula in (("layer", _layer), ("layer_backward", _layer_backward)):
        counter.register_flop_formula(getattr(torch.ops.fastrnn, name), get_raw=True)(formula)


def _products(rows: int, weights: Sequence[Tensor]) -> int:
    """The operations of multiplying a number of rows by every matrix among the weights.

    In an ensemble, whose weights have one more dimension, the rows are divided among the members.
    """
    dims = weights[0].dim()
    return 2 * rows * sum(math.prod(w.shape[-2:]) for w in weights if w.dim() == dims)


def _rows(x: Tensor) -> int:
    # Not numel() of the sizes, which would specialize symbolic ones.
    return math.prod(x.shape[:-1])


# The formulas take the operators' arguments and, as `out_val`, their results.


def _layer(cell, x, state, weights, *rest, out_val):
    return _products(_rows(x), weights)


def _layer_backward(
    cell, dy, d_final, d_traces, x, state, weights, batch_sizes, bidirectional, marks, fresh, noise,
    saved, needs_x, needs_weights, groups, *, out_val,
):  # fmt: skip
    per_direction = len(weights) // (2 if bidirectional else 1)
    of_x, of_h = weights[::per_direction], weights[1::per_direction]
    forward = _products(_rows(x), weights)
    # From the gradient of each product to that of the operand of the weights.
    total = forward if needs_x else forward - _products(_rows(x), of_x)
    if not state:  # implicit zeros have no gradient
        total -= _products(torch.sym_min(x.shape[0], 1) * x.shape[1], of_h)
    if needs_weights:
        total += forward
    # On a GPU the output is saved too. Without saved activations, backward starts with a forward.
    if len(saved) - x.is_cuda < CELLS[cell].n_states:
        total += forward
    return total
