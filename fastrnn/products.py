"""What follows once the gradients of all gates are known: products over all rows.

The same for every path: `d_rh` (N, G * H) is the gradient of the recurrent parts; that of the
input parts differs in the last gates only, where it is `d_apart` (N, A * H), often with A = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .call import Weights

#: Writes the product of the second and the third matrix to the first, or adds it to that.
Multiply = Callable[[Tensor, Tensor, Tensor, bool], object]


def by_torch(c: Tensor, a: Tensor, b: Tensor, adds: bool) -> None:
    """Multiply by torch's own product."""
    if c.shape != (a.shape[0], b.shape[1]):  # it would be resized
        raise RuntimeError(f"a product of {tuple(a.shape)} and {tuple(b.shape)} is not {c.shape}")
    torch.addmm(c, a, b, beta=1 if adds else 0, out=c)


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
        In and out.
    d_rh, d_apart : Tensor
    w_ih : Tensor of shape (G * H, I)
    adds : bool, default True
        False if what `dx` holds is nothing yet.
    multiply : callable, optional
    """
    shared = d_rh.shape[1] - d_apart.shape[1]
    multiply(dx, d_rh[:, :shared], w_ih[:shared], adds)
    if d_apart.shape[1]:
        multiply(dx, d_apart, w_ih[shared:], True)


def d_weights(
    d_rh: Tensor,
    d_apart: Tensor,
    x: Tensor,
    d_w_hh: Tensor,
    w: Weights,
    multiply: Multiply = by_torch,
) -> list[Tensor]:
    """Compute the gradients of the weights of a direction, but for that of a projection.

    Parameters
    ----------
    d_rh, d_apart : Tensor
    x : Tensor of shape (N, I)
    d_w_hh : Tensor of shape (G * H, P)
        Is part of the result.
    w : Weights
    multiply : callable, optional

    Returns
    -------
    list of Tensor
        In the order of `w`.
    """
    shared = d_rh.shape[1] - d_apart.shape[1]
    d_w_ih = d_rh.new_empty(w.w_ih.shape)
    multiply(d_w_ih[:shared], d_rh[:, :shared].t(), x, False)
    if d_apart.shape[1]:
        multiply(d_w_ih[shared:], d_apart.t(), x, False)
    if w.b_ih is None:
        return [d_w_ih, d_w_hh]
    d_b_hh = d_rh.sum(0)
    d_b_ih = torch.cat([d_b_hh[:shared], d_apart.sum(0)])
    return [d_w_ih, d_w_hh, d_b_ih, d_b_hh]


def d_weights_by_group(
    d_rh: Tensor,
    d_apart: Tensor,
    x: Tensor,
    h_prev: Tensor,
    projected: Sequence[Tensor] = (),
    *,
    w: Weights,
    steps: int,
    groups: int,
) -> list[Tensor]:
    """Compute the weight gradients of every group of a padded batch, without a loop.

    Parameters
    ----------
    d_rh, d_apart : Tensor
        With rows of T steps; the batch consists of the groups one after another.
    x : Tensor of shape (N, I)
    h_prev : Tensor of shape (N, P)
        h before every step.
    projected : sequence of Tensor of shape (N, P) and (N, H)
        The gradient of the projected h, and h before the projection; empty without one.
    w : Weights
    steps, groups : int

    Returns
    -------
    list of Tensor of shape (groups, ...)
        In the order of `w`.
    """

    def split(rows: Tensor) -> Tensor:
        """(groups, T * B / groups, columns)"""
        size = rows.shape[0] // (steps * groups)
        apart = rows.view(steps, groups, size, rows.shape[1])
        return apart.transpose(0, 1).reshape(groups, steps * size, rows.shape[1])

    shared = d_rh.shape[1] - d_apart.shape[1]
    d_rh, d_apart = split(d_rh), split(d_apart)
    d_wx = torch.cat([d_rh[..., :shared], d_apart], dim=-1)
    result = [d_wx.transpose(1, 2) @ split(x), d_rh.transpose(1, 2) @ split(h_prev)]
    if w.b_ih is not None:
        result += [d_wx.sum(1), d_rh.sum(1)]
    if projected:
        d_projected, h_full = map(split, projected)
        result.append(d_projected.transpose(1, 2) @ h_full)
    return result


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
        The state before the first step, which is apart from those in `h`; by default zeros.
    reverse : bool
    multiply : callable, optional

    Returns
    -------
    Tensor of shape (G * H, P)
    """
    rest = h.shape[0] - batch
    if reverse:
        later, first, before = *d_rh.tensor_split([rest]), h[batch:]
    else:
        first, later, before = *d_rh.tensor_split([batch]), h[:rest]
    product = d_rh.new_empty(d_rh.shape[1], h.shape[1])
    multiply(product, later.t(), before, False)
    if h_0 is not None:
        multiply(product, first.t(), h_0, True)
    return product
