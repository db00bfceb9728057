"""Cell modules for the layers in ``variants.py``: single steps, with torch.nn's interface.

Constructor, parameter names, forward and state are those of ``torch.nn.LSTMCell`` and
``GRUCell``. Additional weights come last. The modules are instances of ``RNNCellBase``, but not
of ``torch.nn.LSTMCell`` or ``GRUCell``, because they compute something else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .cells import CELLS
from .nn import _Cell
from .variants import begin, refusal

__all__ = [
    "LayerNormGRUCell",
    "LayerNormLSTMCell",
    "PeepholeLSTMCell",
    "ResetBeforeGRUCell",
    "SLSTMCell",
]


class _VariantCell(_Cell):
    """A cell module for any cell."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        cell, like = CELLS[self._cell_name], {"device": device, "dtype": dtype}
        super().__init__(input_size, hidden_size, bias, cell.n_gates, **like)
        for extra in cell.extras:
            weight = Parameter(torch.empty(extra.blocks * hidden_size, **like))
            self.register_parameter(extra.name, weight)
        self._reset_extras()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cell = CELLS[cls._cell_name]
        cls._n_states = cell.n_states
        cls._weight_names = (*_Cell._weight_names, *(extra.name for extra in cell.extras))

    def reset_parameters(self) -> None:
        """Draw the weights as torch.nn does, except those with a fixed initial value."""
        super().reset_parameters()
        self._reset_extras()

    def _reset_extras(self) -> None:
        for extra in CELLS[self._cell_name].extras:
            weight = self._parameters.get(extra.name)
            if weight is not None:  # torch.nn's constructor calls this before there are extras
                begin(weight, extra, self.hidden_size)

    def _of_other_kinds(self, input: Any, hx: Any) -> Any:
        if not isinstance(input, Tensor):
            kind = type(input).__name__
            raise TypeError(f"input of {self._title} must be a tensor, got {kind}")
        raise TypeError(refusal(self._title, CELLS[self._cell_name], hx))


class LayerNormLSTMCell(_VariantCell):
    """One step of an LSTM with layer normalization.

    Parameters
    ----------
    input_size, hidden_size : int
        I and H.
    bias : bool, default True
        Whether the cell has ``bias_ih`` and ``bias_hh``.
    device, dtype : optional
        Device and dtype of the parameters.

    Notes
    -----
    One step of `fastrnn.LayerNormLSTM`. In addition to the weights of torch.nn.LSTMCell there are
    ``gain_ih`` and ``gain_hh`` (4H,), and ``gain_c`` and ``bias_c`` (H,).

    Examples
    --------
    >>> import torch, fastrnn
    >>> cell = fastrnn.LayerNormLSTMCell(10, 20)
    >>> h, c = cell(torch.randn(3, 10))
    >>> h.shape, c.shape, cell.gain_c.shape
    (torch.Size([3, 20]), torch.Size([3, 20]), torch.Size([20]))
    """

    _title, _cell_name = "LayerNormLSTMCell", "layernorm_lstm"


class LayerNormGRUCell(_VariantCell):
    """One step of a GRU with layer normalization.

    Parameters
    ----------
    input_size, hidden_size, bias, device, dtype
        As for `LayerNormLSTMCell`.

    Notes
    -----
    One step of `fastrnn.LayerNormGRU`. In addition to the weights of torch.nn.GRUCell there are
    ``gain_ih`` and ``gain_hh`` (3H,).

    Examples
    --------
    >>> import torch, fastrnn
    >>> cell = fastrnn.LayerNormGRUCell(10, 20)
    >>> cell(torch.randn(3, 10), torch.zeros(3, 20)).shape
    torch.Size([3, 20])
    """

    _title, _cell_name = "LayerNormGRUCell", "layernorm_gru"


class ResetBeforeGRUCell(_VariantCell):
    """One step of a GRU that applies the reset gate before the recurrent product.

    Parameters
    ----------
    input_size, hidden_size, bias, device, dtype
        As for `LayerNormLSTMCell`.

    Notes
    -----
    One step of `fastrnn.ResetBeforeGRU`. The weights are those of torch.nn.GRUCell.

    Examples
    --------
    >>> import torch, fastrnn
    >>> cell = fastrnn.ResetBeforeGRUCell(10, 20)
    >>> cell(torch.randn(10)).shape
    torch.Size([20])
    """

    _title, _cell_name = "ResetBeforeGRUCell", "gru_reset_before"


class PeepholeLSTMCell(_VariantCell):
    """One step of an LSTM with peephole connections from the cell state to the gates.

    Parameters
    ----------
    input_size, hidden_size, bias, device, dtype
        As for `LayerNormLSTMCell`.

    Notes
    -----
    One step of `fastrnn.PeepholeLSTM`. In addition to the weights of torch.nn.LSTMCell there is
    ``weight_peephole`` (3H,), for i, f and o.

    Examples
    --------
    >>> import torch, fastrnn
    >>> cell = fastrnn.PeepholeLSTMCell(10, 20)
    >>> h, c = cell(torch.randn(3, 10))
    >>> h.shape, c.shape, cell.weight_peephole.shape
    (torch.Size([3, 20]), torch.Size([3, 20]), torch.Size([60]))
    """

    _title, _cell_name = "PeepholeLSTMCell", "peephole_lstm"


class SLSTMCell(_VariantCell):
    """One step of the sLSTM of xLSTM.

    Parameters
    ----------
    input_size, hidden_size, bias, device, dtype
        As for `LayerNormLSTMCell`.

    Notes
    -----
    One step of `fastrnn.SLSTM`. The state has four parts, h, c, n and m.

    Examples
    --------
    >>> import torch, fastrnn
    >>> cell = fastrnn.SLSTMCell(10, 20)
    >>> state = cell(torch.randn(3, 10))
    >>> h, c, n, m = cell(torch.randn(3, 10), state)
    >>> h.shape, m.shape
    (torch.Size([3, 20]), torch.Size([3, 20]))
    """

    _title, _cell_name = "SLSTMCell", "slstm"
