"""Gated recurrent unit."""

from __future__ import annotations

import torch
from torch import Tensor

from .cell import Cell, State


def gru_gates(wx: Tensor, rh: Tensor) -> Tensor:
    """Compute r, z, n, side by side.

    Parameters
    ----------
    wx, rh : Tensor of shape (..., 3H)
        As for `gru_step`, with any dimensions before.

    Returns
    -------
    Tensor of shape (..., 3H)
    """
    wx_r, wx_z, wx_n = wx.chunk(3, dim=-1)
    rh_r, rh_z, rh_n = rh.chunk(3, dim=-1)
    r, z = torch.sigmoid(wx_r + rh_r), torch.sigmoid(wx_z + rh_z)
    return torch.cat([r, z, torch.tanh(wx_n + r * rh_n)], dim=-1)


def gru_step(wx: Tensor, rh: Tensor, state: State) -> State:
    """Gated recurrent unit; Cho et al. 2014, with the reset gate applied after the recurrent
    product (version 1 of arXiv:1406.1078, also cuDNN's and torch.nn.GRU's form).

    r, z = sigmoid(wx + rh),  n = tanh(wx_n + r * rh_n),  h' = (1 - z) * n + z * h

    Parameters
    ----------
    wx, rh : Tensor of shape (B, 3H)
        Input part and recurrent part of the gates, each with its bias.
    state : tuple of Tensor of shape (B, H)
        h before the step.

    Returns
    -------
    tuple of Tensor
        The state after it.
    """
    _, z, n = gru_gates(wx, rh).chunk(3, dim=-1)
    return ((1 - z) * n + z * state[0],)


GRU = Cell("gru", 3, 1, gru_step, gates=gru_gates)
