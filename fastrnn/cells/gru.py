"""Gated recurrent unit (Cho et al. 2014).

The reset gate is applied after the recurrent product, as in version 1 of arXiv:1406.1078, cuDNN
and torch.nn.GRU.

    r, z = sigmoid(wx + rh),  n = tanh(wx + r * rh),  h' = (1 - z) * n + z * h
"""

from .cell import Cell
from .functions import sigmoid, tanh


def gru_gates(wx, rh):
    r = sigmoid(wx[0] + rh[0])
    return r, sigmoid(wx[1] + rh[1]), tanh(wx[2] + r * rh[2])


def gru_forward(wx, rh, state, extra):
    r, z, n = gru_gates(wx, rh)
    return (n + z * (state[0] - n),), (r, z, n, rh[2])


def gru_backward(saved, state, previous, d_state, extra):
    r, z, n, rh_n = saved
    dh = d_state[0]
    d_wx_n = dh * (1.0 - z) * (1.0 - n * n)
    d_rh = (d_wx_n * rh_n * r * (1.0 - r), dh * (previous[0] - n) * z * (1.0 - z), d_wx_n * r)
    return d_rh, (d_wx_n,), (dh * z,)


GRU = Cell(
    "gru",
    ("r", "z", "n"),
    ("h",),
    gru_forward,
    gru_backward,
    n_saved=4,
    n_apart=1,
    activations=gru_gates,
)
