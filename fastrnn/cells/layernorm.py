"""Long short-term memory and gated recurrent unit with layer normalization.

The LSTM follows Ba, Kiros & Hinton 2016, arXiv:1607.06450, equations 20 to 22:

    wx = gain_ih * N(W_ih x) + b_ih,  rh = gain_hh * N(W_hh h) + b_hh,
    i, f, o = sigmoid(wx + rh),  g = tanh(wx + rh),
    c' = f * c + i * g,  h' = o * tanh(gain_c * N(c') + bias_c)

N(v) is (v - mean(v)) / sqrt(var(v) + 1e-5), over all 4H elements of a product, and over the H
elements of c'. The sum of b_ih and b_hh takes the place of the paper's two offsets and its bias.
haste uses the same formula, with a single bias.

The GRU is that of ``gru.py`` with wx and rh normalized in this way, over all 3H elements of a
product, as in haste. Ba, Kiros & Hinton (supplement) normalize the 2H elements of r and z
separately from the H elements of n.
"""

from .cell import Cell, Extra, Output
from .functions import tanh, zeros_like
from .gru import GRU, gru_backward, gru_forward, gru_gates
from .lstm import LSTM, lstm_gates


def layernorm_lstm_forward(wx, rh, state, extra):
    i, f, g, o = lstm_gates(wx, rh)
    return (o, f * state[1] + i * g), (i, f, g, o)


def layernorm_lstm_backward(saved, state, previous, d_state, extra):
    i, f, g, o = saved
    d_o, dc = d_state
    d_rh = (
        dc * g * i * (1.0 - i),
        dc * previous[1] * f * (1.0 - f),
        dc * i * (1.0 - g * g),
        d_o * o * (1.0 - o),
    )
    return d_rh, (), (zeros_like(dc), dc * f)


def layernorm_lstm_output(o, normal, extra):
    return o * tanh(extra[8] * normal + extra[9])


def layernorm_lstm_output_backward(o, normal, dh, extra):
    shown = tanh(extra[8] * normal + extra[9])
    d_shown = dh * o * (1.0 - shown * shown)
    return dh * shown, d_shown * extra[8], (d_shown * normal, d_shown)


LAYERNORM_LSTM = Cell(
    "layernorm_lstm",
    LSTM.gates,
    LSTM.states,
    layernorm_lstm_forward,
    layernorm_lstm_backward,
    n_saved=4,
    extras=(
        Extra("gain_ih", 4, 1.0),
        Extra("gain_hh", 4, 1.0),
        Extra("gain_c", 1, 1.0),
        Extra("bias_c", 1, 0.0),
    ),
    activations=lstm_gates,
    is_normalized=True,
    output=Output(layernorm_lstm_output, layernorm_lstm_output_backward, saved=3, n_extra=2),
)
LAYERNORM_GRU = Cell(
    "layernorm_gru",
    GRU.gates,
    GRU.states,
    gru_forward,
    gru_backward,
    n_saved=GRU.n_saved,
    n_apart=GRU.n_apart,
    extras=(Extra("gain_ih", 3, 1.0), Extra("gain_hh", 3, 1.0)),
    activations=gru_gates,
    is_normalized=True,
)
