"""Elman networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .cell import Cell, State


def rnn_step(phi: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, State], State]:
    """Make the step of an Elman network (Elman 1990): h' = phi(wx + rh).

    Parameters
    ----------
    phi : callable
        The activation.

    Returns
    -------
    callable
        Takes wx and rh of shape (B, H) and a state of one such tensor, as `gru_step` does.
    """
    return lambda wx, rh, state: (phi(wx + rh),)


RNN_TANH = Cell("rnn_tanh", 1, 1, rnn_step(torch.tanh))
RNN_RELU = Cell("rnn_relu", 1, 1, rnn_step(torch.relu))
RNN_IDENTITY = Cell("rnn_identity", 1, 1, rnn_step(lambda pre: pre))
