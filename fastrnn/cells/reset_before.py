"""Gated recurrent unit whose reset gate comes before the recurrent product; Cho et al. 2014,
version 3 of arXiv:1406.1078.

    r, z = sigmoid(wx + W_hh h + b_hh),  n = tanh(wx + W_hn (r * h) + b_hn),
    h' = (1 - z) * n + z * h

Keras' GRU with ``reset_after=False``; gates in torch's order r, z, n.
"""

from .cell import Cell
from .functions import sigmoid, tanh
from .gru import GRU


def reset_before_forward(wx, rh, state, extra):
    of_r, of_z = rh(0, 2, 1.0)
    r, z = sigmoid(wx[0] + of_r), sigmoid(wx[1] + of_z)
    n = tanh(wx[2] + rh(2, 3, r)[0])
    return (n + z * (state[0] - n),), ()


GRU_RESET_BEFORE = Cell(
    "gru_reset_before", GRU.gates, GRU.states, reset_before_forward, product="own"
)
