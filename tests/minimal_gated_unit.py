"""A cell unknown to the package; Zhou et al. 2016, arXiv:1603.09420, with the gate
applied after the recurrent product.

    f = sigmoid(wx + rh),  n = tanh(wx + f * rh),  h' = h + f * (n - h)
"""

from fastrnn.cells import Cell
from fastrnn.cells.functions import sigmoid, tanh


def mgu_forward(wx, rh, state, extra):
    f = sigmoid(wx[0] + rh[0])
    n = tanh(wx[1] + f * rh[1])
    return (state[0] + f * (n - state[0]),), (f, n, rh[1])


def mgu_backward(saved, state, previous, d_state, extra):
    f, n, rh_n = saved
    dh = d_state[0]
    d_wx_n = dh * f * (1.0 - n * n)
    df = dh * (n - previous[0]) + d_wx_n * rh_n
    return (df * f * (1.0 - f), d_wx_n * f), (d_wx_n,), (dh * (1.0 - f),)


MGU = Cell("mgu", ("f", "n"), ("h",), mgu_forward, mgu_backward, n_saved=3, n_apart=1)
