"""Gated recurrent unit: r, z = sigmoid(wx + rh), n = tanh(wx_n + r * rh_n),
h' = n + z * (h - n)."""

import triton
import triton.language as tl  # noqa: F401 - the interpreter wants to see it

from ..activations import sigmoid, tanh
from .cell import Cell


@triton.jit
def gru_forward(wx, rh, state):
    r = sigmoid(wx[0] + rh[0])
    z = sigmoid(wx[1] + rh[1])
    n = tanh(wx[2] + r * rh[2])
    return (n + z * (state[0] - n),), (r, z, n, rh[2])


@triton.jit
def gru_backward(saved, state, previous, d_state):
    r, z, n, rh_n = saved
    dh = d_state[0]
    d_wx_n = dh * (1.0 - z) * (1.0 - n * n)
    d_rh = (d_wx_n * rh_n * r * (1.0 - r), dh * (previous[0] - n) * z * (1.0 - z), d_wx_n * r)
    return d_rh, (d_wx_n,), (dh * z,)


GRU = Cell("gru", 3, 1, 4, 1, gru_forward, gru_backward)
