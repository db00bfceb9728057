"""Long short-term memory.

The formula is that of Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000:

    i, f, o = sigmoid(wx + rh),  g = tanh(wx + rh),  c' = f * c + i * g,  h' = o * tanh(c')
"""

from .cell import Cell
from .functions import sigmoid, tanh, zeros_like


def lstm_gates(wx, rh):
    i, f, o = sigmoid(wx[0] + rh[0]), sigmoid(wx[1] + rh[1]), sigmoid(wx[3] + rh[3])
    return i, f, tanh(wx[2] + rh[2]), o


def lstm_forward(wx, rh, state, extra):
    i, f, g, o = lstm_gates(wx, rh)
    c = f * state[1] + i * g
    return (o * tanh(c), c), (i, f, g, o)


def lstm_backward(saved, state, previous, d_state, extra):
    i, f, g, o = saved
    dh, dc = d_state
    tanh_c = tanh(state[1])
    dc = dc + dh * o * (1.0 - tanh_c * tanh_c)
    d_rh = (
        dc * g * i * (1.0 - i),
        dc * previous[1] * f * (1.0 - f),
        dc * i * (1.0 - g * g),
        dh * tanh_c * o * (1.0 - o),
    )
    return d_rh, (), (zeros_like(dh), dc * f)


LSTM = Cell(
    "lstm",
    ("i", "f", "g", "o"),
    ("h", "c"),
    lstm_forward,
    lstm_backward,
    n_saved=4,
    activations=lstm_gates,
)
