"""Drop-in modules: ``RNN``, ``LSTM``, ``GRU`` and their cells.

They subclass torch.nn's classes and replace ``forward``; constructor, parameters,
initialization, attributes, ``repr``, serialization and input checks are inherited.
No arithmetic happens here.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import rnn as _torch
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from . import checks, context, forms, paths, planner
from . import functional as F
from .cells import CELLS, Cell
from .options import Options

#: Attributes that torch.nn's sequence modules lack, and the values that disable them.
_PLAIN = {"recurrent_dropout": 0.0, "zoneout": 0.0, "weight_dropout": 0.0, "num_heads": 1}

#: Arguments of a call that torch.nn lacks; None and False disable them.
_BEYOND_TORCH = ("lengths", "reset", "reset_state", "return_states", "bptt", "recompute")

#: Cells by the ``mode`` of a module.
_OF_MODE = {name.upper(): cell for name, cell in CELLS.items()}

#: Attribute that marks an instance whose class ``replace`` changed to ours.
REPLACED = "_fastrnn_replaced"


class _Convertible:
    """Conversion to and from the torch.nn class of the same name."""

    _stock: type[torch.nn.Module]

    @classmethod
    def from_torch(cls, module: torch.nn.Module) -> Any:
        """Make a module of this class from a torch.nn module, sharing its parameters.

        Parameters
        ----------
        module : torch.nn.Module
            An instance of the torch.nn class of the same name, not of a subclass; may be
            parametrized.

        Returns
        -------
        Module
            A new module with the same parameters (not copies), hooks and training flag.

        Raises
        ------
        TypeError
            If `module` is of another class, or its ``forward`` is overridden on the instance.
        """
        if plain_class(module) is not cls._stock:
            raise TypeError(
                f"{cls.__name__}.from_torch expects a torch.nn.{cls._stock.__name__}, "
                f"got {type(module).__name__}"
            )
        return _as_class(module, cls)

    def to_torch(self) -> Any:
        """Make a torch.nn module from this one, sharing its parameters.

        Returns
        -------
        torch.nn.Module
            An instance of the torch.nn class of the same name, with the same parameters (not
            copies), hooks and training flag; for ONNX export, quantization or TorchScript.

        Raises
        ------
        ValueError
            If torch.nn has no equivalent layer: ``nonlinearity='identity'``, ``num_heads`` above 1,
            recurrent dropout, zoneout or weight dropout.
        TypeError
            If the module's ``forward`` is overridden on the instance.
        """
        if getattr(self, "nonlinearity", None) == "identity":
            raise ValueError(f"torch.nn.{self._stock.__name__} has no nonlinearity 'identity'")
        for name, plain in _PLAIN.items():
            if (value := getattr(self, name, plain)) != plain:
                raise ValueError(f"torch.nn.{self._stock.__name__} has no {name}, got {value}")
        return _as_class(self, self._stock)


def _as_class(module: Any, cls: Any) -> Any:
    """Copy a module shallowly, with its own containers, and give the copy another class."""
    if "forward" in vars(module):
        raise TypeError("the forward of the module is overridden on the instance")
    cls = class_like(module, cls)
    clone = cls.__new__(cls)
    clone.__dict__.update(
        {
            k: copy.copy(v) if isinstance(v, (dict, list, set)) else v
            for k, v in vars(module).items()
            if k != REPLACED
        }
    )
    return clone


def plain_class(module: torch.nn.Module) -> type[torch.nn.Module]:
    """Return a module's class, without the subclass that parametrizations insert.

    Parameters
    ----------
    module : torch.nn.Module

    Returns
    -------
    type
    """
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) else cls


def class_like(module: torch.nn.Module, cls: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """Make the class that replaces a module's plain class.

    Parameters
    ----------
    module : torch.nn.Module
    cls : type
        The new plain class.

    Returns
    -------
    type
        `cls`, or, for a parametrized module, a subclass of it with the properties that
        compute the parametrized weights.
    """
    if not parametrize.is_parametrized(module):
        return cls
    own = type(module)
    body = {k: v for k, v in vars(own).items() if k not in ("__dict__", "__weakref__")}
    return type(own.__name__, (cls,), body)


class _Layers(_torch.RNNBase):
    """The forward of all sequence modules."""

    def __init__(
        self,
        *args: Any,
        recurrent_dropout: float = 0.0,
        zoneout: float | Sequence[float] = 0.0,
        weight_dropout: float = 0.0,
        num_heads: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if num_heads != 1:
            units = checks.heads(num_heads, self.hidden_size, self.proj_size)
            self.num_heads = num_heads
            for name, weight in list(self._parameters.items()):
                if "weight_hh" in name and weight is not None:
                    setattr(self, name, torch.nn.Parameter(weight.detach()[:, :units].clone()))
            self._init_flat_weights()
        if recurrent_dropout:
            self.recurrent_dropout = checks.probability("recurrent_dropout", recurrent_dropout)
        if zoneout:
            self.zoneout = checks.zoneout_rates(CELLS[self._cell], zoneout)
        if weight_dropout:
            self.weight_dropout = checks.probability("weight_dropout", weight_dropout)

    # On the class, so that torch.nn modules whose class became ours have them.
    recurrent_dropout: float = 0.0
    zoneout: float | Sequence[float] = 0.0
    weight_dropout: float = 0.0
    num_heads: int = 1

    @property
    def _cell(self) -> str:
        return self.mode.lower()

    @property
    def _definition(self) -> Cell:
        return _OF_MODE[self.mode]

    def extra_repr(self) -> str:
        """Return what torch.nn shows, and the attributes that torch.nn lacks."""
        values = {name: getattr(self, name) for name in _PLAIN}
        shown = [f"{name}={value}" for name, value in values.items() if value != _PLAIN[name]]
        return ", ".join([super().extra_repr(), *shown])

    def flatten_parameters(self) -> None:
        """Do what torch.nn does, if the weights have the layout that cuDNN expects."""
        if self.num_heads == 1:
            super().flatten_parameters()

    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        reset: Any = None,
        reset_state: Any = None,
        return_states: bool | str = False,
        bptt: int | None = None,
        recompute: bool | int = False,
    ) -> Any:
        """Run the layers over a batch of sequences.

        `input`, `hx` and the results are as in torch.nn; the keyword arguments are described in
        full in ``fastrnn.functional.lstm``.

        Parameters
        ----------
        input : Tensor of shape (T, B, I), (B, T, I) if batch_first, (T, I), or PackedSequence
        hx : Tensor of shape (L * D, B, H), or a tuple of such tensors (LSTM: h and c), optional
            Initial state, zeros if None; without the B dimension for unbatched input.
        lengths : integer Tensor of shape (B,), optional
            Number of steps of each sequence, from 0 to T, in any order, on the device of `input`;
            a number for unbatched input.
        reset : bool Tensor of shape (T, B), (B, T) if batch_first, (T,) or PackedSequence, optional
            True where a new sequence starts at x_t: the state is reset before x_t is consumed.
        reset_state : as `hx`, optional
            State after a reset, zeros if None; its B may be 1.
        return_states : bool or 'gates', default False
            Whether to return the states of all steps as well, or states and gates. For a
            PackedSequence they are padded, with the sequences in their original order.
        bptt : int, optional
            Number of steps after which gradients are truncated.
        recompute : bool or int, default False
            Whether to store less between forward and backward and recompute the rest; a number
            does so in chunks of that many steps.

        Returns
        -------
        output : Tensor or PackedSequence
            Hidden state of the last layer at every step, both directions concatenated.
        hx : Tensor, or a tuple of Tensor
            State of every layer after the last step of each sequence.
        states : fastrnn.functional.States
            Only if `return_states`.

        Raises
        ------
        ValueError, RuntimeError
            If the arguments do not fit the module or each other, with torch.nn's messages.
        """
        if lengths is reset is reset_state is bptt is None and return_states is recompute is False:
            result = forms.run_prepared(self, input, hx)
            if result is not None:
                return result
        options = Options(
            self.batch_first, self.bidirectional, self.dropout, self.training, None,
            lengths, reset, reset_state, return_states, bptt, recompute,
            self.recurrent_dropout, self.zoneout, self.num_heads,
        )  # fmt: skip
        if self._is_ordinary(input, hx):
            weights: Any = self._flat_weights
            return forms.run(self, weights, input, hx, options)
        beyond = [(name, getattr(options, name)) for name in _BEYOND_TORCH]
        given = {name: value for name, value in beyond if value is not None and value is not False}
        if forms.is_leaf(self, input):
            return forms.leaf_call(self, input, hx, given)
        if not given and self._is_for_torch(input, hx):
            self._check_before_torch(input, hx)
            return super().forward(input, hx)
        if isinstance(input, PackedSequence):
            return forms.run_packed(self, input, hx, options)

        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if hx is not None:
            forms.check_state_dims(self, hx, batched)
        if not batched:
            input = input.unsqueeze(batch_dim)
            hx = hx if hx is None else forms.map_state(lambda part: part.unsqueeze(1), hx)
            options = forms.with_batch(options, batch_dim)
        output, hidden, *states = forms.run_checked(self, input, hx, options)
        if not batched:
            output = output.squeeze(batch_dim)
            hidden = forms.map_state(lambda part: part.squeeze(1), hidden)
            states = [forms.map_states(lambda part: part.squeeze(2), part) for part in states]
        return output, hidden, *states

    @property
    def _is_stock(self) -> bool:
        """Whether torch.nn's module computes the same."""
        noise = self.recurrent_dropout or self.zoneout or self.weight_dropout
        return not noise and self.num_heads == 1

    def _is_ordinary(self, input: Any, hx: Any) -> bool:
        """Whether our checks find everything torch.nn's would, with the same messages."""
        if torch.compiler.is_compiling() or torch._C._is_tracing():
            return False
        if type(input) is not Tensor or input.dim() != 3 or input.layout != torch.strided:
            return False
        if input.shape[2] != self.input_size:
            return False
        # Read once: computing parametrizations twice in a call may have side effects.
        parameters, weights, dtype = self._parameters.values(), self._flat_weights, input.dtype
        if len(parameters) != len(weights) or not all(map(operator.is_, parameters, weights)):
            return False
        if len(self._all_weights) != self.num_layers * (2 if self.bidirectional else 1):
            return False
        if weights[0] is None or weights[0].dtype != dtype:
            return False
        if hx is not None:
            count = len(self._definition.states)
            state = hx if count > 1 else (hx,)
            if type(state) not in (tuple, list) or len(state) != count:
                return False
            width = self.proj_size or self.hidden_size
            for part in state:
                if not isinstance(part, Tensor) or part.dim() != 3:
                    return False
                if part.dtype != dtype or part.shape[2] != width:
                    return False
                width = self.hidden_size
        return not torch._C._is_any_autocast_enabled()

    def _is_for_torch(self, input: Any, hx: Any) -> bool:
        """Whether torch.nn must run a call, whatever the planner says.

        It runs weights that our operators cannot handle, and raises its own errors for what it
        does not support: other types of input and state, a weight that is None.
        """
        if not self._is_stock or torch.compiler.is_compiling():
            return False
        is_packed = isinstance(input, PackedSequence)
        x = input.data if is_packed else input
        if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_nested:
            return True
        if not is_packed and x.dim() not in (2, 3):
            return True
        if not context.autocasts(x.device.type):
            if hx is not None and not self._is_state(hx):
                return True
            if self.mode != "RNN_IDENTITY" and any(
                part.dtype != x.dtype for part in forms.states_in(hx)
            ):
                return True  # torch promotes some and rejects the others
        if self.mode == "RNN_IDENTITY":
            return False
        weights = self._parameters.values()
        if any(weight is None for weight in weights):
            return True
        if len(self._all_weights) != self.num_layers * (2 if self.bidirectional else 1):
            return True  # torch goes by the attributes
        if not context.are_known(*weights) and planner.forced.path is None:
            return True
        return is_packed and any(part.dim() != 3 for part in forms.states_in(hx))

    def _check_before_torch(self, input: Any, hx: Any) -> None:
        """Check the sizes that torch.nn does not: those of an LSTM on packed, equal-length input.

        oneDNN would read and write out of bounds if a tensor were too small.
        """
        if self.mode != "LSTM" or not isinstance(input, PackedSequence) or context.is_traced():
            return
        if context.is_ragged(input.batch_sizes) or any(w is None for w in self._flat_weights):
            return
        self.check_input(input.data, input.batch_sizes)
        if hx is not None and self._is_state(hx) and [p.dim() > 2 for p in hx] == [True, True]:
            count = self.num_layers * (2 if self.bidirectional else 1)
            widths = (self.proj_size or self.hidden_size, self.hidden_size)
            for k, (part, width) in enumerate(zip(hx, widths, strict=True)):
                size, text = (count, int(input.batch_sizes[0]), width), f"hidden[{k}] size {{}}"
                self.check_hidden_size(part, size, f"Expected {text}, got {{}}")

    def _is_state(self, hx: Any) -> bool:
        """Whether an argument has the type of the state: a tensor, or a sequence of tensors."""
        if not self._is_paired:
            return isinstance(hx, Tensor)
        return isinstance(hx, (tuple, list)) and all(isinstance(part, Tensor) for part in hx)

    @property
    def _is_paired(self) -> bool:
        """Whether the state has parts other than h."""
        return len(self._definition.states) > 1


class LSTM(_Convertible, _Layers, torch.nn.LSTM):
    """Long short-term memory layers, a drop-in replacement for ``torch.nn.LSTM``.

    Parameters
    ----------
    input_size, hidden_size : int
        I and H.
    num_layers : int, default 1
        L.
    bias : bool, default True
        Whether the layers have ``bias_ih`` and ``bias_hh``.
    batch_first : bool, default False
        Whether input and output are (B, T, features) instead of (T, B, features).
    dropout : float, default 0.0
        Probability of zeroing an element of the output of every layer but the last, in training.
    bidirectional : bool, default False
        Whether each layer runs in both directions: D = 2 instead of 1.
    proj_size : int, default 0
        If positive, h is projected to this size: P = proj_size instead of H.
    device, dtype : optional
        Device and dtype of the parameters.
    recurrent_dropout, zoneout : optional
        See ``fastrnn.functional.lstm``.
    weight_dropout : float, default 0.0
        Probability of zeroing an element of ``weight_hh``, drawn once per call, in training
        (Merity et al. 2018, arXiv:1708.02182).
    num_heads : int, default 1
        Block-diagonal recurrence: the hidden units are split into this many heads of consecutive
        units, and the recurrent product connects only units of the same head. ``weight_hh`` has
        the shape (4H, H / num_heads). Not with `proj_size`.

    Raises
    ------
    TypeError, ValueError
        For the values that torch.nn.LSTM rejects, with its messages.

    Notes
    -----
    A subclass of torch.nn.LSTM with its attributes, parameter names, initial values and ``repr``.
    For the formula see ``fastrnn.cells.lstm``.

    Examples
    --------
    >>> import torch, fastrnn
    >>> lstm = fastrnn.LSTM(10, 20, num_layers=2, bidirectional=True)
    >>> y, (h, c) = lstm(torch.randn(5, 3, 10))
    >>> y.shape, h.shape, c.shape
    (torch.Size([5, 3, 40]), torch.Size([4, 3, 20]), torch.Size([4, 3, 20]))
    """

    _stock = torch.nn.LSTM


class GRU(_Convertible, _Layers, torch.nn.GRU):
    """Gated recurrent unit layers, a drop-in replacement for ``torch.nn.GRU``.

    Parameters
    ----------
    input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype
        As for `LSTM`.
    recurrent_dropout, zoneout, weight_dropout, num_heads
        As for `LSTM`.

    Raises
    ------
    TypeError, ValueError
        For the values that torch.nn.GRU rejects, with its messages.

    Notes
    -----
    A subclass of torch.nn.GRU. For the formula see ``fastrnn.cells.gru``.

    Examples
    --------
    >>> import torch, fastrnn
    >>> gru = fastrnn.GRU(10, 20, batch_first=True)
    >>> y, h = gru(torch.randn(3, 5, 10))
    >>> y.shape, h.shape
    (torch.Size([3, 5, 20]), torch.Size([1, 3, 20]))
    """

    _stock = torch.nn.GRU


class RNN(_Convertible, _Layers, torch.nn.RNN):
    """Elman layers, a drop-in replacement for ``torch.nn.RNN``.

    Parameters
    ----------
    input_size, hidden_size, num_layers : int
        As for `LSTM`.
    nonlinearity : {'tanh', 'relu', 'identity'}, default 'tanh'
        phi; 'identity' makes the network linear, which torch.nn.RNN does not support.
    bias, batch_first, dropout, bidirectional, device, dtype
        As for `LSTM`.
    recurrent_dropout, zoneout, weight_dropout, num_heads
        As for `LSTM`.

    Raises
    ------
    TypeError, ValueError
        For the values that torch.nn.RNN rejects, with its messages.

    Notes
    -----
    A subclass of torch.nn.RNN: ``h_t = phi(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)``.

    Examples
    --------
    >>> import torch, fastrnn
    >>> rnn = fastrnn.RNN(10, 20, nonlinearity="identity")
    >>> y, h = rnn(torch.randn(5, 3, 10))
    >>> bool((y[-1] == h[0]).all())
    True
    """

    _stock = torch.nn.RNN

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        args, kwargs, identity = _without_identity(args, kwargs)
        super().__init__(*args, **kwargs)
        if identity:
            self.nonlinearity, self.mode = "identity", "RNN_IDENTITY"

    def flatten_parameters(self) -> None:
        """Do what torch.nn.RNN does, if cuDNN supports the activation."""
        if self.mode != "RNN_IDENTITY":
            super().flatten_parameters()


def _without_identity(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """Return arguments for torch's constructor, and whether they asked for 'identity'.

    ``nonlinearity`` is the fourth argument of RNN and of RNNCell.
    """
    if args[3:4] == ("identity",):
        return (*args[:3], "tanh", *args[4:]), kwargs, True
    if kwargs.get("nonlinearity") == "identity":
        return args, {**kwargs, "nonlinearity": "tanh"}, True
    return args, kwargs, False


class _Cell(_torch.RNNCellBase):
    """The forward of all cell modules."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Run one step, with arguments and results as in torch.nn.

        Parameters
        ----------
        input : Tensor of shape (B, I) or (I,)
        hx : Tensor of shape (B, H) or (H,), or a tuple of such tensors, optional
            State before the step, zeros if None; of an LSTMCell the tuple (h, c).

        Returns
        -------
        Tensor, or a tuple of Tensor
            State after the step, shaped as `hx`.

        Raises
        ------
        ValueError, RuntimeError
            If the arguments do not fit the module or each other, with torch.nn's messages.
        """
        new = forms.step_prepared(self, input, hx)
        if new is not None:
            return new
        given = hx
        if hx is None and type(input) is Tensor and input.dim() == 2:
            given = self._zeros(input)
        is_by_torch = planner.forced.path is None and self._aten is not None
        if is_by_torch and self._is_ordinary(input, given):
            weights = self._parameters
            return self._aten(
                input,
                given,
                weights["weight_ih"],
                weights["weight_hh"],
                weights["bias_ih"],
                weights["bias_hh"],
            )
        if forms.is_leaf(self, input):
            return forms.leaf_call(self, input, hx)
        paired, name = self._n_states > 1, self._title
        is_other = hx is not None and isinstance(hx, Tensor) is paired
        if is_other or not isinstance(input, Tensor):
            return self._of_other_kinds(input, hx)
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        state = None if hx is None else (hx if paired else (hx,))
        for k, part in enumerate(() if state is None else state):
            if part.dim() not in (1, 2):
                which = f"hx[{k}]" if paired else "hidden"
                raise ValueError(
                    f"{name}: Expected {which} to be 1D or 2D, got {part.dim()}D instead"
                )
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
            state = None if state is None else [part.unsqueeze(0) for part in state]
        own = [getattr(self, weight) for weight in self._weight_names]
        new = F.step(self._cell_name, input, state, own)
        if not batched:
            new = [part.squeeze(0) for part in new]
        return tuple(new) if paired else new[0]

    def _of_other_kinds(self, input: Any, hx: Any) -> Any:
        """Do what torch.nn does for input and state of other types: in most cases, raise."""
        return super().forward(input, hx)

    def _zeros(self, input: Tensor) -> Any:
        """The initial state of a batch."""
        zeros = input.new_zeros(input.shape[0], self.hidden_size)
        return zeros if self._n_states == 1 else (zeros,) * self._n_states

    def _is_ordinary(self, input: Any, hx: Any) -> bool:
        """Whether a kernel can be called directly: batched input, a state, plain weights.

        Torch runs such a step without asking the planner, unless a path is forced or, in
        inference, our kernels run it.
        """
        state = hx if self._n_states > 1 and type(hx) is tuple else (hx,)
        return (
            type(input) is Tensor
            and input.dim() == 2
            and len(state) == self._n_states
            and all(type(part) is Tensor and part.dim() == 2 for part in state)
            and tuple(self._parameters) == self._weight_names
            and not context.transformed()
        )

    _title: str  # the name of the class in messages
    _cell_name: Any  # key of ``fastrnn.cells.CELLS``
    _aten: Any = None  # torch's function for one step, None if it has none
    _n_states: Any = 1
    _weight_names: Any = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class LSTMCell(_Convertible, _Cell, torch.nn.LSTMCell):
    """One step of an LSTM, a drop-in replacement for ``torch.nn.LSTMCell``.

    Parameters
    ----------
    input_size, hidden_size : int
        I and H.
    bias : bool, default True
        Whether the cell has ``bias_ih`` and ``bias_hh``.
    device, dtype : optional
        Device and dtype of the parameters.

    Examples
    --------
    >>> import torch, fastrnn
    >>> cell = fastrnn.LSTMCell(10, 20)
    >>> h, c = cell(torch.randn(3, 10))
    >>> h.shape, c.shape
    (torch.Size([3, 20]), torch.Size([3, 20]))
    """

    _stock, _title, _cell_name = torch.nn.LSTMCell, "LSTMCell", "lstm"
    _aten, _n_states = staticmethod(paths.ATEN_STEPS["lstm"]), 2


class GRUCell(_Convertible, _Cell, torch.nn.GRUCell):
    """One step of a GRU, a drop-in replacement for ``torch.nn.GRUCell``.

    Parameters
    ----------
    input_size, hidden_size, bias, device, dtype
        As for `LSTMCell`.

    Examples
    --------
    >>> import torch, fastrnn
    >>> cell = fastrnn.GRUCell(10, 20)
    >>> cell(torch.randn(3, 10), torch.zeros(3, 20)).shape
    torch.Size([3, 20])
    """

    _stock, _title, _cell_name = torch.nn.GRUCell, "GRUCell", "gru"
    _aten = staticmethod(paths.ATEN_STEPS["gru"])


class RNNCell(_Convertible, _Cell, torch.nn.RNNCell):
    """One step of an Elman network, a drop-in replacement for ``torch.nn.RNNCell``.

    Parameters
    ----------
    input_size, hidden_size, bias
        As for `LSTMCell`.
    nonlinearity : {'tanh', 'relu', 'identity'}, default 'tanh'
        torch.nn.RNNCell does not support 'identity'. As in torch.nn, any other value raises an
        error at the first call.
    device, dtype : optional
        As for `LSTMCell`.

    Examples
    --------
    >>> import torch, fastrnn
    >>> cell = fastrnn.RNNCell(10, 20, nonlinearity="relu")
    >>> cell(torch.randn(10)).shape
    torch.Size([20])
    """

    _stock, _title = torch.nn.RNNCell, "RNNCell"

    @property
    def _cell_name(self) -> str:
        if self.nonlinearity not in F.NONLINEARITIES:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return f"rnn_{self.nonlinearity}"

    @property
    def _aten(self) -> Any:
        return paths.ATEN_STEPS.get(f"rnn_{self.nonlinearity}")


#: Our class for each torch.nn class.
REPLACEMENTS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    cls._stock: cls for cls in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)
}
