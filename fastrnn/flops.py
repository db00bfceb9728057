"""What torch's FlopCounterMode counts for the operators.

As for torch's own: products of matrices, two operations for a multiplication and its addition, and
nothing pointwise. So a layer counts what torch.nn's does where that is not one operator of oneDNN,
which counts nothing. Two things are as the operators do them, not as autograd would:

* backward counts all of the weights if one of them needs its gradient, and the gradient of an
  initial state that was given;
* backward counts a forward too if it begins with one, as with ``recompute``.

Shapes are all there is to count from. The steps that ``lengths`` leaves out count like the others.
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

    It is not imported here, because it imports triton, which takes longer than all of ours.
    """
    when_imported("torch.utils.flop_counter", _register_with)


def _register_with(counter: ModuleType) -> None:
    # Raw, that is with tensors in place of their shapes.
    for name, formula in (("layer", _layer), ("layer_backward", _layer_backward)):
        counter.register_flop_formula(getattr(torch.ops.fastrnn, name), get_raw=True)(formula)


def _products(rows: int, weights: Sequence[Tensor]) -> int:
    """The operations of so many rows times every matrix among the weights.

    A member of an ensemble, whose weights have one more dimension, has its share of the rows.
    """
    dims = weights[0].dim()
    return 2 * rows * sum(math.prod(w.shape[-2:]) for w in weights if w.dim() == dims)


def _rows(x: Tensor) -> int:
    # Not numel() of the sizes, which would fix symbolic ones.
    return math.prod(x.shape[:-1])


# The formulas, with the operators' arguments and, as `out_val`, their results.


def _layer(cell, x, state, weights, *rest, out_val):
    return _products(_rows(x), weights)


def _layer_backward(
    cell, dy, d_final, d_traces, x, state, weights, batch_sizes, bidirectional, marks, fresh, noise,
    saved, needs_x, needs_weights, groups, *, out_val,
):  # fmt: skip
    per_direction = len(weights) // (2 if bidirectional else 1)
    of_x, of_h = weights[::per_direction], weights[1::per_direction]
    forward = _products(_rows(x), weights)
    # From the gradient of each product back to what was multiplied by the weights.
    total = forward if needs_x else forward - _products(_rows(x), of_x)
    if not state:  # nobody wants the gradient of zeros
        total -= _products(torch.sym_min(x.shape[0], 1) * x.shape[1], of_h)
    if needs_weights:
        total += forward
    # On a GPU the output is saved too. Without the activations, a forward comes first.
    if len(saved) - x.is_cuda < CELLS[cell].n_states:
        total += forward
    return total
