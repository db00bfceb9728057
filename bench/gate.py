"""Check results: how far they are from torch.nn's, and how far they may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import devices
from ..cells import CELLS
from .registry import Case


class Tolerances(NamedTuple):
    """How far two correct implementations may differ, relative to the largest element.

    Attributes
    ----------
    recurrent : float
        For the output, states, and the gradients of input and states.
    summed : float
        For the gradients of weights and biases, which are sums.
    parameters : int
        How many of the results, counted from the last, are of the second kind.
    """

    recurrent: float
    summed: float
    parameters: int


def tolerances_of(case: Case, device: torch.device) -> Tolerances:
    """Derive the tolerances from the dtype and the number of terms in the sums.

    Rounding errors that accumulate at random grow with the square root of their number. The
    recurrence itself forgets (at torch's initial weights its Jacobian has a norm of about 0.6), so
    the error of outputs does not grow with T, but the gradients of weights are sums over all steps
    and rows. In float32 and float64 all sums are in that dtype. Half precision, and TF32 in cuDNN,
    multiply rounded numbers but accumulate in float32, except that torch's loop over steps
    accumulates weight gradients in half precision. The differences observed on a CPU, over all
    cells and dtypes, T up to 1024 and up to three layers, reach 53 % of these tolerances.

    Parameters
    ----------
    case : Case
    device : torch.device

    Returns
    -------
    Tolerances
    """
    eps = torch.finfo(getattr(torch, case.dtype)).eps
    terms = case.input_size + case.hidden_size
    steps = case.steps * case.num_layers
    n_recurrent, n_summed = terms, steps * case.batch + terms
    is_tf32 = (
        device.type == "cuda" and case.dtype == "float32" and devices.float32_precision() == "tf32"
    )
    if is_tf32:
        eps = torch.finfo(torch.float16).eps  # TF32 has as many mantissa bits
    if is_tf32 or case.is_half:
        n_recurrent, n_summed = 0, steps
    base = 2 + 2 * case.num_layers
    weights = 4 + (case.proj_size > 0) + len(CELLS[case.kind].extras)
    count = weights * case.num_layers * case.directions if case.mode == "training" else 0
    return Tolerances(eps * (base + n_recurrent**0.5), eps * (base + n_summed**0.5), count)


def worst_error(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerances: Tolerances
) -> tuple[float, float]:
    """Find the tensor with the largest error relative to its tolerance.

    Parameters
    ----------
    ours, theirs : sequence of Tensor
    tolerances : Tolerances

    Returns
    -------
    error, tolerance : float
        The largest difference in that tensor, relative to the largest element of theirs, and its
        tolerance. Infinite if number, shapes or dtypes differ.
    """
    if [(t.shape, t.dtype) for t in ours] != [(t.shape, t.dtype) for t in theirs]:
        return math.inf, tolerances.recurrent
    worst = (0.0, tolerances.recurrent)
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        a, b = a.detach().double(), b.detach().double()
        scale = b.abs().max().item()
        error = (a - b).abs().max().item() / (scale or 1.0)
        is_summed = k >= len(ours) - tolerances.parameters
        tolerance = tolerances.summed if is_summed else tolerances.recurrent
        # Written so that a NaN counts as the worst.
        if not error / tolerance <= worst[0] / worst[1]:
            worst = error, tolerance
        if math.isnan(error):
            break
    return worst
