"""Products over all rows that turn gate gradients into those of input and weights.

They are the same for every path: `d_rh` (N, G * H) is the gradient of the recurrent parts. That of
the input parts differs from it only in the last A gates, where it is `d_apart` (N, A * H); A is
often 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Writes the product of the second and third matrix to the first, or adds it to the first. All may
#: have a leading dimension of the members of an ensemble.
Multiply = Callable[[Tensor, Tensor, Tensor, bool], object]


def by_torch(c: Tensor, a: Tensor, b: Tensor, adds: bool) -> None:
    """Multiply with torch's operators."""
    if c.shape != (*a.shape[:-1], b.shape[-1]):  # torch would resize it
        raise RuntimeError(f"a product of {tuple(a.shape)} and {tuple(b.shape)} is not {c.shape}")
    multiply: Any = torch.addmm if c.dim() == 2 else torch.baddbmm
    multiply(c, a, b, beta=1 if adds else 0, out=c)


def add_d_x(
    dx: Tensor,
    d_rh: Tensor,
    d_apart: Tensor,
    w_ih: Tensor,
    *,
    adds: bool = True,
    multiply: Multiply = by_torch,
) -> None:
    """Add the gradient of the input.

    Parameters
    ----------
    dx : Tensor of shape (N, I)
        Updated in place.
    d_rh, d_apart : Tensor
    w_ih : Tensor of shape (G * H, I)
    adds : bool, default True
        False if `dx` is uninitialized and must be overwritten.
    multiply : callable, optional
    """
    shared = w_ih.shape[-2] - d_apart.shape[-1]
    multiply(dx, d_rh[..., :shared], w_ih[..., :shared, :], adds)
    if d_apart.shape[-1]:
        multiply(dx, d_apart, w_ih[..., shared:, :], True)


def d_w_hh(
    d_rh: Tensor,
    h: Tensor,
    batch: int,
    h_0: Tensor | None,
    reverse: bool,
    multiply: Multiply = by_torch,
) -> Tensor:
    """Sum ``d_rh[t].T @ h[t - 1]`` over the steps of a padded batch.

    Parameters
    ----------
    d_rh : Tensor of shape (N, G * H)
    h : Tensor of shape (N, P)
    batch : int
    h_0 : Tensor of shape (B, P), optional
        The state before the first step, which `h` does not include; zeros if None.
    reverse : bool
    multiply : callable, optional

    Returns
    -------
    Tensor of shape (G * H, P)
    """
    rest = h.shape[-2] - batch
    if reverse:
        later, first, before = *d_rh.tensor_split([rest], -2), h[..., batch:, :]
    else:
        first, later, before = *d_rh.tensor_split([batch], -2), h[..., :rest, :]
    product = d_rh.new_empty(*d_rh.shape[:-2], d_rh.shape[-1], h.shape[-1])
    multiply(product, later.mT, before, False)
    if h_0 is not None:
        multiply(product, first.mT, h_0, True)
    return product
