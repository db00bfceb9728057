"""The pointwise parts of the cells, on vectors of hidden units.

As in ``fastrnn.kernels.cells``, a cell is two functions; here they are plain Python that writes
code (see ``vector.py``), and a cell is one entry of `CELLS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .vector import Value, fma, sigmoid, tanh

Values = Sequence[Value]


class Cell(NamedTuple):
    """A recurrent cell.

    Attributes
    ----------
    n_gates : int
        Blocks of H rows in the weights, in torch's order.
    n_states : int
        h, and for an LSTM c.
    n_saved : int
        Vectors that forward hands to backward: the gates, then one more. 0 if h is enough.
    n_apart : int
        How many gates, the last ones, have a recurrent part whose gradient is not that of the
        input part.
    forward : callable
        ``forward(wx, rh, state) -> (state, saved)``; `wx` and `rh` are the input part and the
        recurrent part of each gate, with their biases.
    backward : callable
        ``backward(saved, state, previous, d_state) -> (d_rh, d_wx_apart, d_previous)`` with the
        states after and before the step; of `state` only h is given. `d_previous` is what
        passes by the recurrent product, None where nothing does.
    """

    n_gates: int
    n_states: int
    n_saved: int
    n_apart: int
    forward: Callable[[Values, Values, Values], tuple[Values, Values]]
    backward: Callable[
        [Values, Values, Values, Values], tuple[Values, Values, Sequence[Value | None]]
    ]


def _lstm_forward(wx: Values, rh: Values, state: Values) -> tuple[Values, Values]:
    i = sigmoid(wx[0] + rh[0])
    f = sigmoid(wx[1] + rh[1])
    g = tanh(wx[2] + rh[2])
    o = sigmoid(wx[3] + rh[3])
    c = fma(f, state[1], i * g)
    return (o * tanh(c), c), (i, f, g, o, c)


def _lstm_backward(saved, state, previous, d_state):
    i, f, g, o, c = saved
    dh, dc = d_state
    tanh_c = tanh(c)
    dc = fma(dh * o, 1.0 - tanh_c * tanh_c, dc)
    d_rh = (
        dc * g * i * (1.0 - i),
        dc * previous[1] * f * (1.0 - f),
        dc * i * (1.0 - g * g),
        dh * tanh_c * o * (1.0 - o),
    )
    return d_rh, (), (None, dc * f)


def _gru_forward(wx: Values, rh: Values, state: Values) -> tuple[Values, Values]:
    r = sigmoid(wx[0] + rh[0])
    z = sigmoid(wx[1] + rh[1])
    n = tanh(fma(r, rh[2], wx[2]))
    return (fma(z, state[0] - n, n),), (r, z, n, rh[2])


def _gru_backward(saved, state, previous, d_state):
    r, z, n, rh_n = saved
    dh = d_state[0]
    d_wx_n = dh * (1.0 - z) * (1.0 - n * n)
    d_rh = (d_wx_n * rh_n * r * (1.0 - r), dh * (previous[0] - n) * z * (1.0 - z), d_wx_n * r)
    return d_rh, (d_wx_n,), (dh * z,)


def _elman(phi: Callable[[Value], Value], backward: Callable[[Value, Value], Value]) -> Cell:
    """A cell h' = phi(wx + rh); `backward` takes h' and dh'."""
    return Cell(
        1, 1, 0, 0,
        lambda wx, rh, state: ((phi(wx[0] + rh[0]),), ()),
        lambda saved, state, previous, d_state: ((backward(state[0], d_state[0]),), (), (None,)),
    )  # fmt: skip


CELLS = {
    "lstm": Cell(4, 2, 5, 0, _lstm_forward, _lstm_backward),
    "gru": Cell(3, 1, 4, 1, _gru_forward, _gru_backward),
    "rnn_tanh": _elman(tanh, lambda h, dh: dh * (1.0 - h * h)),
    # As in torch.relu, a NaN is passed on, and so is its gradient.
    "rnn_relu": _elman(
        lambda pre: pre.same(0.0).where(pre, pre < 0.0),
        lambda h, dh: dh.same(0.0).where(dh, h <= 0.0),
    ),
    "rnn_identity": _elman(lambda pre: pre, lambda h, dh: dh),
}
