"""Drop-in replacements for PyTorch's ``LSTM``, ``GRU``, ``RNN`` and their cells, and variants."""

from . import convert, functional, nn
from ._version import __version__
from .compile import allow_compile
from .diagnose import diagnose
from .nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .patch import patched, replace, restore, to_torch
from .variant_cells import (
    LayerNormGRUCell,
    LayerNormLSTMCell,
    PeepholeLSTMCell,
    ResetBeforeGRUCell,
    SLSTMCell,
)
from .variants import SLSTM, LayerNormGRU, LayerNormLSTM, PeepholeLSTM, ResetBeforeGRU

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "SLSTM",
    "GRUCell",
    "LSTMCell",
    "LayerNormGRU",
    "LayerNormGRUCell",
    "LayerNormLSTM",
    "LayerNormLSTMCell",
    "PeepholeLSTM",
    "PeepholeLSTMCell",
    "RNNCell",
    "ResetBeforeGRU",
    "ResetBeforeGRUCell",
    "SLSTMCell",
    "__version__",
    "allow_compile",
    "convert",
    "diagnose",
    "functional",
    "nn",
    "patched",
    "replace",
    "restore",
    "to_torch",
]
