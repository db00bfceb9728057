"""Long short-term memory: i, f, o = sigmoid(wx + rh), g = tanh(wx + rh),
c' = f * c + i * g, h' = o * tanh(c')."""

import triton
import triton.language as tl

from ..activations import sigmoid, tanh
from .cell import Cell


@triton.jit
def lstm_forward(wx, rh, state):
    i = sigmoid(wx[0] + rh[0])
    f = sigmoid(wx[1] + rh[1])
    g = tanh(wx[2] + rh[2])
    o = sigmoid(wx[3] + rh[3])
    c = f * state[1] + i * g
    return (o * tanh(c), c), (i, f, g, o)


@triton.jit
def lstm_backward(saved, state, previous, d_state):
    i, f, g, o = saved
    dh, dc = d_state
    tanh_c = tanh(state[1])
    dc += dh * o * (1.0 - tanh_c * tanh_c)
    d_rh = (
        dc * g * i * (1.0 - i),
        dc * previous[1] * f * (1.0 - f),
        dc * i * (1.0 - g * g),
        dh * tanh_c * o * (1.0 - o),
    )
    return d_rh, (), (tl.zeros_like(dh), dc * f)


LSTM = Cell("lstm", 4, 2, 4, 0, lstm_forward, lstm_backward)
