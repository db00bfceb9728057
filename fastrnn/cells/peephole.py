"""Long short-term memory with peephole connections.

The formula is that of Gers & Schmidhuber 2000, "Recurrent nets that time and count":

    i, f = sigmoid(wx + rh + p * c),  g = tanh(wx + rh),  c' = f * c + i * g,
    o = sigmoid(wx + rh + p * c'),  h' = o * tanh(c')

p is ``weight_peephole`` (3H,), for i, f and o; it connects the gates of each unit to its own cell
state only.
"""

from .cell import Cell, Extra
from .functions import sigmoid, tanh, zeros_like


def peephole_forward(wx, rh, state, extra):
    p_i, p_f, p_o = extra
    i = sigmoid(wx[0] + rh[0] + p_i * state[1])
    f = sigmoid(wx[1] + rh[1] + p_f * state[1])
    g = tanh(wx[2] + rh[2])
    c = f * state[1] + i * g
    o = sigmoid(wx[3] + rh[3] + p_o * c)
    return (o * tanh(c), c), (i, f, g, o)


def peephole_backward(saved, state, previous, d_state, extra):
    i, f, g, o = saved
    p_i, p_f, p_o = extra
    dh, dc = d_state
    tanh_c = tanh(state[1])
    d_o = dh * tanh_c * o * (1.0 - o)
    dc = dc + dh * o * (1.0 - tanh_c * tanh_c) + d_o * p_o
    d_i = dc * g * i * (1.0 - i)
    d_f = dc * previous[1] * f * (1.0 - f)
    d_c = dc * f + d_i * p_i + d_f * p_f
    return (d_i, d_f, dc * i * (1.0 - g * g), d_o), (), (zeros_like(dh), d_c)


def peephole_d_extra(d_rh, state, previous):
    return d_rh[0] * previous[1], d_rh[1] * previous[1], d_rh[3] * state[1]


PEEPHOLE_LSTM = Cell(
    "peephole_lstm",
    ("i", "f", "g", "o"),
    ("h", "c"),
    peephole_forward,
    peephole_backward,
    n_saved=4,
    extras=(Extra("weight_peephole", 3, None),),
    d_extra=peephole_d_extra,
)
