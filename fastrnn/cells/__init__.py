"""The registry of cells: each has a file and an entry here; nothing here imports an engine."""

from .cell import EPSILON, Cell, Extra, Late, Output
from .engine import Engine, reached
from .gru import GRU
from .layernorm import LAYERNORM_GRU, LAYERNORM_LSTM
from .lstm import LSTM
from .peephole import PEEPHOLE_LSTM
from .reset_before import GRU_RESET_BEFORE
from .rnn import RNN_IDENTITY, RNN_RELU, RNN_TANH
from .slstm import SLSTM

CELLS = {
    cell.name: cell
    for cell in (
        LSTM,
        GRU,
        RNN_TANH,
        RNN_RELU,
        RNN_IDENTITY,
        LAYERNORM_LSTM,
        LAYERNORM_GRU,
        GRU_RESET_BEFORE,
        PEEPHOLE_LSTM,
        SLSTM,
    )
}

__all__ = ["CELLS", "EPSILON", "Cell", "Engine", "Extra", "Late", "Output", "reached"]
