"""Gated recurrent unit whose reset gate comes before the recurrent product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .cell import Cell, State, Weights


def gru_reset_before(wx: Tensor, h: Tensor, state: State, w: Weights) -> State:
    """Gated recurrent unit; Cho et al. 2014, version 3 of arXiv:1406.1078.

    r, z = sigmoid(wx + W_hh h + b_hh),  n = tanh(wx_n + W_hn (r * h) + b_hn),
    h' = (1 - z) * n + z * h

    Keras' GRU with ``reset_after=False``; gates in torch's order r, z, n.

    Parameters
    ----------
    wx : Tensor of shape (B, 3H)
        Input part of the gates, with its bias.
    h : Tensor of shape (B, H)
        What is multiplied by the recurrent weights.
    state : tuple of Tensor of shape (B, H)
        h before the step.
    w : Weights

    Returns
    -------
    tuple of Tensor
        The state after it.
    """
    hidden = h.shape[-1]
    of_rz, of_n = slice(2 * hidden), slice(2 * hidden, None)

    def recurrent_part(h: Tensor, gates: slice) -> Tensor:
        return linear(h, w.w_hh[gates], None if w.b_hh is None else w.b_hh[gates])

    r, z = torch.sigmoid(wx[..., of_rz] + recurrent_part(h, of_rz)).chunk(2, dim=-1)
    n = torch.tanh(wx[..., of_n] + recurrent_part(r * h, of_n))
    return ((1 - z) * n + z * state[0],)


GRU_RESET_BEFORE = Cell("gru_reset_before", 3, 1, None, product=gru_reset_before)
