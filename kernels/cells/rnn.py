"""Elman networks, h' = phi(wx + rh), whose derivative is a function of h'."""

import triton
import triton.language as tl

from ..activations import tanh
from .cell import Cell


@triton.jit
def tanh_forward(wx, rh, state):
    return (tanh(wx[0] + rh[0]),), ()


@triton.jit
def tanh_backward(saved, state, previous, d_state):
    return (d_state[0] * (1.0 - state[0] * state[0]),), (), (tl.zeros_like(state[0]),)


@triton.jit
def relu_forward(wx, rh, state):
    pre = wx[0] + rh[0]
    return (tl.where(pre < 0, 0.0, pre),), ()  # NaN is passed on, as torch.relu does


@triton.jit
def relu_backward(saved, state, previous, d_state):
    # A NaN lets the gradient pass, as in torch.relu.
    return (tl.where(state[0] <= 0, 0.0, d_state[0]),), (), (tl.zeros_like(state[0]),)


@triton.jit
def identity_forward(wx, rh, state):
    return (wx[0] + rh[0],), ()


@triton.jit
def identity_backward(saved, state, previous, d_state):
    return (d_state[0],), (), (tl.zeros_like(state[0]),)


RNN_TANH = Cell("rnn_tanh", 1, 1, 0, 0, tanh_forward, tanh_backward)
RNN_RELU = Cell("rnn_relu", 1, 1, 0, 0, relu_forward, relu_backward)
RNN_IDENTITY = Cell("rnn_identity", 1, 1, 0, 0, identity_forward, identity_backward)
