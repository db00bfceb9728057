"""Long short-term memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .cell import Cell, State


def lstm_gates(wx: Tensor, rh: Tensor) -> Tensor:
    """Compute i, f, g, o, side by side.

    Parameters
    ----------
    wx, rh : Tensor of shape (..., 4H)
        As for `lstm_step`, with any dimensions before.

    Returns
    -------
    Tensor of shape (..., 4H)
    """
    i, f, g, o = (wx + rh).chunk(4, dim=-1)
    return torch.cat([torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)], dim=-1)


def lstm_step(wx: Tensor, rh: Tensor, state: State) -> State:
    """Long short-term memory; Hochreiter & Schmidhuber 1997, forget gate of Gers et al. 2000.

    i, f, o = sigmoid(wx + rh),  g = tanh(wx + rh),  c' = f * c + i * g,  h' = o * tanh(c')

    Parameters
    ----------
    wx, rh : Tensor of shape (B, 4H)
        Input part and recurrent part of the gates, each with its bias.
    state : tuple of Tensor of shape (B, H)
        h and c before the step.

    Returns
    -------
    tuple of Tensor
        The state after it.
    """
    i, f, g, o = lstm_gates(wx, rh).chunk(4, dim=-1)
    c = f * state[1] + i * g
    return o * torch.tanh(c), c


LSTM = Cell("lstm", 4, 2, lstm_step, gates=lstm_gates)
