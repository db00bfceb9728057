"""What every path must know about a cell, and the weights of one direction of a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

State = tuple[Tensor, ...]


class Extra(NamedTuple):
    """A weight that a cell has beyond those of torch.nn's cells.

    Attributes
    ----------
    name : str
        Begin of the parameter's name, such as ``weight_peephole``; ``_l0`` and so on follow.
    blocks : int
        Its length in multiples of H.
    init : float or None
        Its initial value; None draws it as torch.nn draws the others.
    """

    name: str
    blocks: int
    init: float | None


class Weights(NamedTuple):
    """The weights of one direction of one layer; what a layer does not have is None."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None
    extras: tuple[Tensor, ...] = ()

    @classmethod
    def unpack(cls, flat: Sequence[Tensor], n_extras: int = 0) -> Weights:
        """Name a flat list: ih, hh[, b_ih, b_hh][, hr], as in ``torch.nn.RNNBase``, then extras.

        The four possible lengths of the first part are all different, so nothing else is needed:
        2 plain, 3 projection, 4 bias, 5 bias and projection.
        """
        count = len(flat) - n_extras
        w_ih, w_hh, *rest = flat[:count]
        w_hr = rest.pop() if len(rest) % 2 else None
        b_ih, b_hh = rest or (None, None)
        return cls(w_ih, w_hh, b_ih, b_hh, w_hr, tuple(flat[count:]))


def input_part(x: Tensor, w: Weights) -> Tensor:
    """Compute the input part of the gates, with its bias; for many steps at once.

    Parameters
    ----------
    x : Tensor of shape (..., I)
    w : Weights

    Returns
    -------
    Tensor of shape (..., G * H)
    """
    return torch.nn.functional.linear(x, w.w_ih, w.b_ih)


def recurrent_part(h: Tensor, w: Weights) -> Tensor:
    """Compute the recurrent part of the gates, with its bias.

    Parameters
    ----------
    h : Tensor of shape (..., P)
    w : Weights

    Returns
    -------
    Tensor of shape (..., G * H)
    """
    return torch.nn.functional.linear(h, w.w_hh, w.b_hh)


class Cell(NamedTuple):
    """A recurrent cell.

    Attributes
    ----------
    name : str
    n_gates : int
        Blocks of H rows in ``weight_ih`` and ``weight_hh``.
    n_states : int
        h, and what else a cell carries on.
    step : callable
        ``step(wx, rh, state, *extras) -> state``: the pointwise part. `wx` and `rh` (B, G * H) are
        the input part and the recurrent part of the gates, each with its bias.
    extras : tuple of Extra
    gates : callable, optional
        ``gates(wx, rh) -> Tensor``: the activations of all gates side by side.
    product : callable, optional
        ``product(wx, h, state, weights) -> state``, for a cell whose recurrent product is not one
        of all gates; instead of `step`.
    input_part, recurrent_part : callable
        ``input_part(x, weights) -> wx`` and ``recurrent_part(h, weights) -> rh``.
    """

    name: str
    n_gates: int
    n_states: int
    step: Callable[..., State] | None
    extras: tuple[Extra, ...] = ()
    gates: Callable[[Tensor, Tensor], Tensor] | None = None
    product: Callable[[Tensor, Tensor, State, Weights], State] | None = None
    input_part: Callable[[Tensor, Weights], Tensor] = input_part
    recurrent_part: Callable[[Tensor, Weights], Tensor] = recurrent_part

    def advance(self, wx: Tensor, h: Tensor, state: State, w: Weights) -> State:
        """One step from the input part of the gates.

        Parameters
        ----------
        wx : Tensor of shape (B, G * H)
        h : Tensor of shape (B, P)
            What is multiplied by the recurrent weights: the state's, perhaps after dropout.
        state : tuple of Tensor
        w : Weights

        Returns
        -------
        tuple of Tensor
            The new state, shaped as `state`.
        """
        if self.step is None:
            assert self.product is not None
            new = self.product(wx, h, state, w)
        else:
            new = self.step(wx, self.recurrent_part(h, w), state, *w.extras)
        return (new[0] if w.w_hr is None else new[0] @ w.w_hr.t(), *new[1:])
