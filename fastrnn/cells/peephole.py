"""Long short-term memory with peephole connections."""

from __future__ import annotations

import torch
from torch import Tensor

from .cell import Cell, Extra, State


def peephole_lstm_step(wx: Tensor, rh: Tensor, state: State, weight_peephole: Tensor) -> State:
    """Peephole LSTM; Gers & Schmidhuber 2000, "Recurrent nets that time and count".

    i, f = sigmoid(wx + rh + p * c),  g = tanh(wx + rh),  c' = f * c + i * g,
    o = sigmoid(wx + rh + p * c'),  h' = o * tanh(c')

    Parameters
    ----------
    wx, rh : Tensor of shape (B, 4H)
        Input part and recurrent part of the gates i, f, g, o, each with its bias.
    state : tuple of Tensor of shape (B, H)
        h and c before the step.
    weight_peephole : Tensor of shape (3H,)
        p of i, f and o: of each unit's gates its own cell's only.

    Returns
    -------
    tuple of Tensor
        The state after it.
    """
    i, f, g, o = (wx + rh).chunk(4, dim=-1)
    p_i, p_f, p_o = weight_peephole.chunk(3)
    i, f = torch.sigmoid(i + p_i * state[1]), torch.sigmoid(f + p_f * state[1])
    c = f * state[1] + i * torch.tanh(g)
    return torch.sigmoid(o + p_o * c) * torch.tanh(c), c


PEEPHOLE_LSTM = Cell(
    "peephole_lstm", 4, 2, peephole_lstm_step, (Extra("weight_peephole", 3, None),)
)
