"""Long short-term memory and gated recurrent unit with layer normalisation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from .cell import Cell, Extra, State, Weights
from .gru import gru_gates, gru_step
from .lstm import lstm_gates

EPS = 1e-5


def _normalise(v: Tensor, gain: Tensor) -> Tensor:
    """Normalise over the last dimension.

    Not ``torch.nn.functional.layer_norm``, whose third derivatives are wrong (torch 2.13).
    """
    centred = v - v.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return centred * torch.rsqrt(variance + EPS) * gain


def _normalised(matrix: str, bias: str, gain: int) -> Callable[[Tensor, Weights], Tensor]:
    """Make a product that is normalised over all gates before its bias is added."""

    def part(x: Tensor, w: Weights) -> Tensor:
        normal = _normalise(linear(x, getattr(w, matrix)), w.extras[gain])
        return normal if getattr(w, bias) is None else normal + getattr(w, bias)

    return part


def layernorm_lstm_step(
    wx: Tensor,
    rh: Tensor,
    state: State,
    gain_ih: Tensor,
    gain_hh: Tensor,
    gain_c: Tensor,
    bias_c: Tensor,
) -> State:
    """Layer-normalised LSTM; Ba, Kiros & Hinton 2016, arXiv:1607.06450, equations 20 to 22.

    wx = gain_ih * N(W_ih x) + b_ih,  rh = gain_hh * N(W_hh h) + b_hh,
    i, f, o = sigmoid(wx + rh),  g = tanh(wx + rh),
    c' = f * c + i * g,  h' = o * tanh(gain_c * N(c') + bias_c)

    N(v) is (v - mean(v)) / sqrt(var(v) + 1e-5) over all 4H elements of a product, and over the H
    of c'. The paper's two offsets and its bias are one sum, of which b_ih and b_hh are the parts.
    haste has the same formula, with one bias for both.

    Parameters
    ----------
    wx, rh : Tensor of shape (B, 4H)
        Input part and recurrent part of the gates, normalised, each with its bias.
    state : tuple of Tensor of shape (B, H)
        h and c before the step.
    gain_ih, gain_hh : Tensor of shape (4H,)
        Not used here: in `wx` and `rh` already.
    gain_c, bias_c : Tensor of shape (H,)

    Returns
    -------
    tuple of Tensor
        The state after it.
    """
    i, f, g, o = lstm_gates(wx, rh).chunk(4, dim=-1)
    c = f * state[1] + i * g
    return o * torch.tanh(_normalise(c, gain_c) + bias_c), c


def layernorm_gru_step(
    wx: Tensor, rh: Tensor, state: State, gain_ih: Tensor, gain_hh: Tensor
) -> State:
    """Layer-normalised GRU, as in haste.

    wx = gain_ih * N(W_ih x) + b_ih,  rh = gain_hh * N(W_hh h) + b_hh,
    r, z = sigmoid(wx + rh),  n = tanh(wx_n + r * rh_n),  h' = (1 - z) * n + z * h

    N is that of `layernorm_lstm_step`, over all 3H elements of a product. Ba, Kiros & Hinton 2016
    (arXiv:1607.06450, supplement) normalise the 2H of r and z and the H of n apart.

    Parameters
    ----------
    wx, rh : Tensor of shape (B, 3H)
        Input part and recurrent part of the gates, normalised, each with its bias.
    state : tuple of Tensor of shape (B, H)
        h before the step.
    gain_ih, gain_hh : Tensor of shape (3H,)
        Not used here: in `wx` and `rh` already.

    Returns
    -------
    tuple of Tensor
        The state after it.
    """
    return gru_step(wx, rh, state)


_GAINS = Extra("gain_ih", 4, 1.0), Extra("gain_hh", 4, 1.0)
_input_part = _normalised("w_ih", "b_ih", 0)
_recurrent_part = _normalised("w_hh", "b_hh", 1)

LAYERNORM_LSTM = Cell(
    "layernorm_lstm",
    4,
    2,
    layernorm_lstm_step,
    (*_GAINS, Extra("gain_c", 1, 1.0), Extra("bias_c", 1, 0.0)),
    lstm_gates,
    input_part=_input_part,
    recurrent_part=_recurrent_part,
)
LAYERNORM_GRU = Cell(
    "layernorm_gru",
    3,
    1,
    layernorm_gru_step,
    tuple(gain._replace(blocks=3) for gain in _GAINS),
    gru_gates,
    input_part=_input_part,
    recurrent_part=_recurrent_part,
)
