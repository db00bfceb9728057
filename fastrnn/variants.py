"""Layers whose cells torch.nn does not provide, with torch.nn's interface.

Constructor, parameter names, forward and state are those of ``torch.nn.LSTM`` and ``GRU``.
Additional weights follow the same naming scheme (``gain_c_l0``, ``gain_c_l0_reverse``) and come
last in each direction. The modules are instances of ``RNNBase``, but not of ``torch.nn.LSTM`` or
``GRU``, because they compute something else.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .cells import CELLS, Cell, Extra
from .forms import map_state
from .nn import _Layers

__all__ = ["SLSTM", "LayerNormGRU", "LayerNormLSTM", "PeepholeLSTM", "ResetBeforeGRU"]


def begin(weight: Tensor, extra: Extra, hidden_size: int) -> None:
    """Set an extra weight to its fixed initial value, or draw it as torch.nn does.

    Parameters
    ----------
    weight : Tensor
    extra : Extra
    hidden_size : int
    """
    if extra.init is not None:
        torch.nn.init.constant_(weight, extra.init)
    elif hidden_size > 0:
        bound = 1 / math.sqrt(hidden_size)
        torch.nn.init.uniform_(weight, -bound, bound)


def refusal(name: str, cell: Cell, hx: Any) -> str:
    """Word the error for a state of the wrong type.

    Parameters
    ----------
    name : str
        Name of the module.
    cell : Cell
    hx : object
        The state that was passed.

    Returns
    -------
    str
    """
    accepted = f"a tuple of {cell.n_states} tensors" if cell.n_states > 1 else "a tensor"
    return f"hx of {name} must be {accepted}, got {type(hx).__name__}"


class _Variant(_Layers):
    """A sequence module for any cell with the gates of an LSTM or a GRU."""

    _cell: Any  # key of ``CELLS``

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # RNNBase derives the number of gates from the name, and accepts no other names.
        super().__init__({3: "GRU", 4: "LSTM"}[CELLS[self._cell].n_gates], *args, **kwargs)
        if self.proj_size and not self._is_paired:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        self.mode = self._cell.upper()
        parameters = dict(self._parameters)
        like: Any = self.weight_ih_l0
        self._parameters.clear()
        self._flat_weights_names.clear()
        for names in self._all_weights:
            suffix = names[0].removeprefix("weight_ih")
            for extra in self._definition.extras:
                names.append(extra.name + suffix)
                values = like.new_empty(extra.blocks * self.hidden_size)
                parameters[names[-1]] = Parameter(values)
            # Registered in the order in which the functions take them.
            for name in names:
                self.register_parameter(name, parameters[name])
            self._flat_weights_names.extend(names)
        self._init_flat_weights()
        self._reset_extras()

    @property
    def _is_stock(self) -> bool:
        return False

    def reset_parameters(self) -> None:
        """Draw the weights as torch.nn does, except those with a fixed initial value."""
        super().reset_parameters()
        self._reset_extras()

    def _reset_extras(self) -> None:
        for name, weight in self._parameters.items():
            for extra in self._definition.extras:
                if weight is not None and name.startswith(f"{extra.name}_l"):
                    begin(weight, extra, self.hidden_size)

    def flatten_parameters(self) -> None:
        """Do nothing: cuDNN does not support these cells."""

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        """Check the input and the type of the state, whose shape is checked later."""
        self.check_input(input, batch_sizes)
        if isinstance(hidden, Tensor) is self._is_paired:
            raise TypeError(refusal(type(self).__name__, self._definition, hidden))

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        """Permute the sequences of every state."""
        if permutation is None:
            return hx
        return map_state(lambda part: part.index_select(1, permutation), hx)


class LayerNormLSTM(_Variant):
    """LSTM layers with layer normalization.

    Parameters
    ----------
    input_size, hidden_size : int
        I and H.
    num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype
        As for `fastrnn.LSTM`.
    recurrent_dropout, zoneout, weight_dropout, num_heads
        As for `fastrnn.LSTM`.

    Raises
    ------
    TypeError, ValueError
        For the values that torch.nn.LSTM rejects, with its messages.

    Notes
    -----
    For the formula, that of Ba, Kiros & Hinton 2016, see ``fastrnn.cells.layernorm``. In addition
    to the weights of torch.nn.LSTM there are ``gain_ih`` and ``gain_hh`` (4H,), and ``gain_c`` and
    ``bias_c`` (H,). With `num_heads`, each head is normalized separately.

    Examples
    --------
    >>> import torch, fastrnn
    >>> lstm = fastrnn.LayerNormLSTM(10, 20, bidirectional=True)
    >>> y, (h, c) = lstm(torch.randn(5, 3, 10))
    >>> y.shape, h.shape, lstm.gain_ih_l0_reverse.shape
    (torch.Size([5, 3, 40]), torch.Size([2, 3, 20]), torch.Size([80]))
    """

    _cell = "layernorm_lstm"


class LayerNormGRU(_Variant):
    """GRU layers with layer normalization.

    Parameters
    ----------
    input_size, hidden_size : int
        I and H.
    num_layers, bias, batch_first, dropout, bidirectional, device, dtype
        As for `fastrnn.LSTM`.
    recurrent_dropout, zoneout, weight_dropout, num_heads
        As for `fastrnn.LSTM`.

    Raises
    ------
    TypeError, ValueError
        For the values that torch.nn.GRU rejects, with its messages.

    Notes
    -----
    For the formula see ``fastrnn.cells.layernorm``. In addition to the weights of torch.nn.GRU
    there are ``gain_ih`` and ``gain_hh`` (3H,). With `num_heads`, each head is normalized
    separately.

    Examples
    --------
    >>> import torch, fastrnn
    >>> gru = fastrnn.LayerNormGRU(10, 20, zoneout=0.1)
    >>> y, h = gru(torch.randn(5, 3, 10), lengths=torch.tensor([5, 0, 2]))
    >>> y.shape, h.shape
    (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))
    """

    _cell = "layernorm_gru"


class ResetBeforeGRU(_Variant):
    """GRU layers that apply the reset gate before the recurrent product, as Keras' older GRU does.

    Parameters
    ----------
    input_size, hidden_size : int
        I and H.
    num_layers, bias, batch_first, dropout, bidirectional, device, dtype
        As for `fastrnn.LSTM`.
    recurrent_dropout, zoneout, weight_dropout, num_heads
        As for `fastrnn.LSTM`.

    Raises
    ------
    TypeError, ValueError
        For the values that torch.nn.GRU rejects, with its messages.

    Notes
    -----
    For the formula see ``fastrnn.cells.reset_before``. `fastrnn.GRU` applies the reset gate after
    the product, as do torch.nn.GRU, cuDNN and, by default, Keras. The weights are those of
    torch.nn.GRU.

    Examples
    --------
    >>> import torch, fastrnn
    >>> gru = fastrnn.ResetBeforeGRU(10, 20)
    >>> y, h = gru(torch.randn(5, 3, 10))
    >>> y.shape, h.shape
    (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))
    """

    _cell = "gru_reset_before"


class PeepholeLSTM(_Variant):
    """LSTM layers with peephole connections from the cell state to the gates.

    Parameters
    ----------
    input_size, hidden_size : int
        I and H.
    num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype
        As for `fastrnn.LSTM`.
    recurrent_dropout, zoneout, weight_dropout, num_heads
        As for `fastrnn.LSTM`.

    Raises
    ------
    TypeError, ValueError
        For the values that torch.nn.LSTM rejects, with its messages.

    Notes
    -----
    For the formula, that of Gers & Schmidhuber 2000, see ``fastrnn.cells.peephole``. In addition to
    the weights of torch.nn.LSTM there is ``weight_peephole`` (3H,), for i, f and o.

    Examples
    --------
    >>> import torch, fastrnn
    >>> lstm = fastrnn.PeepholeLSTM(10, 20)
    >>> y, (h, c) = lstm(torch.randn(5, 3, 10))
    >>> y.shape, c.shape, lstm.weight_peephole_l0.shape
    (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]), torch.Size([60]))
    """

    _cell = "peephole_lstm"


class SLSTM(_Variant):
    """The sLSTM layers of xLSTM, with exponential input gates and a normalizer state.

    Parameters
    ----------
    input_size, hidden_size : int
        I and H.
    num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype
        As for `fastrnn.LSTM`.
    recurrent_dropout, zoneout, weight_dropout, num_heads
        As for `fastrnn.LSTM`; a single number for `zoneout` applies to h only, because c, n and m
        are meaningful only together.

    Raises
    ------
    TypeError, ValueError
        For the values that torch.nn.LSTM rejects, with its messages.

    Notes
    -----
    For the formula, that of Beck et al. 2024, see ``fastrnn.cells.slstm``. Gates are in the order
    i, f, z, o. There are four states, h, c, n and m; ``hx`` has a tensor for each of them, as has
    ``fastrnn.functional.States``.

    Examples
    --------
    >>> import torch, fastrnn
    >>> slstm = fastrnn.SLSTM(10, 20, num_heads=4)
    >>> y, (h, c, n, m) = slstm(torch.randn(5, 3, 10))
    >>> y.shape, m.shape, slstm.weight_hh_l0.shape
    (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]), torch.Size([80, 5]))
    """

    _cell = "slstm"
