"""Recurrent layers for PyTorch, in place of ``torch.nn.LSTM``, ``GRU``, ``RNN`` and their cells."""

from . import functional, nn
from .compile import allow_compile
from .nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .patch import patched, replace, restore

from ._version import __version__

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "allow_compile",
    "functional",
    "nn",
    "patched",
    "replace",
    "restore",
]
