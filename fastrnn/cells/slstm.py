"""sLSTM, the scalar-memory cell of xLSTM."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .cell import Cell, State


def slstm_step(wx: Tensor, rh: Tensor, state: State) -> State:
    """Scalar-memory LSTM, sLSTM; Beck et al. 2024 (xLSTM), arXiv:2405.04517, equations 8 to 17.

    i~, f~, z~, o~ = wx + rh,  m' = max(i~, log sigmoid(f~) + m),
    i = exp(i~ - m'),  f = exp(log sigmoid(f~) + m - m'),
    c' = f * c + i * tanh(z~),  n' = f * n + i,  h' = sigmoid(o~) * c' / n'

    Of the paper's two forget gates this is the sigmoid, as in FlashRNN. m only keeps exp in range:
    c exp(m) and n exp(m) are what the cell holds, and h does not depend on m. A state without
    memory, n = 0, has nothing to rescale, so m' is i~ there; then n' = 1, and from then on n' >= 1.

    Parameters
    ----------
    wx, rh : Tensor of shape (B, 4H)
        Input part and recurrent part of the gates i, f, z, o, each with its bias.
    state : tuple of Tensor of shape (B, H)
        h, c, n and m before the step.

    Returns
    -------
    tuple of Tensor
        The state after it.
    """
    i, f, z, o = (wx + rh).chunk(4, dim=-1)
    _, c, n, m = state
    kept = torch.nn.functional.logsigmoid(f) + m
    m = torch.where(n == 0, i, torch.maximum(i, kept))
    # Above 0 only where n = 0; what is multiplied by infinity there would be NaN, not 0.
    f = torch.exp((kept - m).clamp(max=math.log(torch.finfo(m.dtype).max) - 1))
    i = torch.exp(i - m)
    c, n = f * c + i * torch.tanh(z), f * n + i
    return torch.sigmoid(o) * c / n, c, n, m


SLSTM = Cell("slstm", 4, 4, slstm_step)
