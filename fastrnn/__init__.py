"""Recurrent layers for PyTorch, in place of ``torch.nn.LSTM``, ``GRU``, ``RNN`` and their cells."""

from . import functional, nn
from ._version import __version__
from .compile import allow_compile
from .nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .patch import patched, replace, restore

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "__version__",
    "allow_compile",
    "functional",
    "nn",
    "patched",
    "replace",
    "restore",
]
