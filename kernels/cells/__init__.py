"""The registry of cells: one file and one line here for each."""

from .cell import Cell
from .gru import GRU
from .lstm import LSTM
from .rnn import RNN_IDENTITY, RNN_RELU, RNN_TANH

CELLS = {cell.name: cell for cell in (LSTM, GRU, RNN_TANH, RNN_RELU, RNN_IDENTITY)}

__all__ = ["CELLS", "Cell"]
