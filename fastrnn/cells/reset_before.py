"""Gated recurrent unit that applies the reset gate before the recurrent product.

The formula is that of Cho et al. 2014, version 3 of arXiv:1406.1078:

    r, z = sigmoid(wx + W_hh h + b_hh),  n = tanh(wx + W_hn (r * h) + b_hn),
    h' = (1 - z) * n + z * h

This is Keras' GRU with ``reset_after=False``, but with torch's gate order r, z, n.
"""

from .cell import Cell, Late
from .functions import sigmoid, tanh
from .gru import GRU


def reset_before_factor(wx, rh):
    return sigmoid(wx[0] + rh[0])


def reset_before_forward(wx, rh, state, extra):
    r, z, n = reset_before_factor(wx, rh), sigmoid(wx[1] + rh[1]), tanh(wx[2] + rh[2])
    return (n + z * (state[0] - n),), (r, z, n)


def reset_before_late(saved, d_state):
    _, z, n = saved
    return (d_state[0] * (1.0 - z) * (1.0 - n * n),)


def reset_before_backward(saved, state, previous, d_state, extra):
    r, z, n, d_product = saved
    dh, h = d_state[0], previous[0]
    d_r = d_product * h * r * (1.0 - r)
    d_z = dh * (h - n) * z * (1.0 - z)
    (d_n,) = reset_before_late((r, z, n), d_state)
    return (d_r, d_z, d_n), (), (dh * z + d_product * r,)


GRU_RESET_BEFORE = Cell(
    "gru_reset_before",
    GRU.gates,
    GRU.states,
    reset_before_forward,
    reset_before_backward,
    n_saved=3,
    late=Late(1, reset_before_factor, reset_before_late, saved=0),
)
