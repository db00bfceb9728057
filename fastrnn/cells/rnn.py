"""Elman networks (Elman 1990).

The derivative of the activation phi is a function of h':

    h' = phi(wx + rh)
"""

from .cell import Cell
from .functions import relu, tanh, where, zeros_like


def tanh_forward(wx, rh, state, extra):
    return (tanh(wx[0] + rh[0]),), ()


def tanh_backward(saved, state, previous, d_state, extra):
    return (d_state[0] * (1.0 - state[0] * state[0]),), (), (zeros_like(state[0]),)


def relu_forward(wx, rh, state, extra):
    return (relu(wx[0] + rh[0]),), ()


def relu_backward(saved, state, previous, d_state, extra):
    # NaN lets the gradient pass, as in torch.relu.
    return (where(state[0] <= 0.0, 0.0, d_state[0]),), (), (zeros_like(state[0]),)


def identity_forward(wx, rh, state, extra):
    return (wx[0] + rh[0],), ()


def identity_backward(saved, state, previous, d_state, extra):
    return (d_state[0],), (), (zeros_like(state[0]),)


RNN_TANH = Cell("rnn_tanh", ("h",), ("h",), tanh_forward, tanh_backward)
RNN_RELU = Cell("rnn_relu", ("h",), ("h",), relu_forward, relu_backward)
RNN_IDENTITY = Cell("rnn_identity", ("h",), ("h",), identity_forward, identity_backward)
