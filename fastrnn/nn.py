"""Drop-in modules: ``RNN``, ``LSTM``, ``GRU`` and their cells.

They are torch.nn's classes with another ``forward``: constructor, parameters,
initialisation, attributes, ``repr``, serialisation and the checks of the input are
inherited. Nothing here is numeric.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.modules import rnn as _torch
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from . import checks, ops, planner, sequences
from . import functional as F
from .cells import CELLS
from .options import Options, States

#: What sequence modules have beyond torch.nn's, and the values that mean nothing.
_PLAIN = {"recurrent_dropout": 0.0, "zoneout": 0.0, "weight_dropout": 0.0, "num_heads": 1}

#: Marks, on the instance, what ``replace`` turned into ours.
REPLACED = "_fastrnn_replaced"


class _Convertible:
    """To and from the torch.nn class of the same name."""

    _stock: type[torch.nn.Module]

    @classmethod
    def from_torch(cls, module: torch.nn.Module) -> Any:
        """Make a module of this class out of torch.nn's, sharing its parameters.

        Parameters
        ----------
        module : torch.nn.Module
            An instance of exactly the torch.nn class of this name; may be parametrized.

        Returns
        -------
        Module
            With the same parameters (not copies), hooks and training flag.

        Raises
        ------
        TypeError
            If `module` is of another class, or has a ``forward`` of its own.
        """
        if plain_class(module) is not cls._stock:
            raise TypeError(
                f"{cls.__name__}.from_torch expects a torch.nn.{cls._stock.__name__}, "
                f"got {type(module).__name__}"
            )
        return _as_class(module, cls)

    def to_torch(self) -> Any:
        """Make a torch.nn module out of this one, sharing its parameters.

        Returns
        -------
        torch.nn.Module
            The torch.nn class of this name, with the same parameters (not copies),
            hooks and training flag; for ONNX export, quantisation or TorchScript.

        Raises
        ------
        ValueError
            If torch has no such layer (``nonlinearity='identity'``, heads, and the kinds of dropout
            that are not torch's).
        TypeError
            If the module has a ``forward`` of its own.
        """
        if getattr(self, "nonlinearity", None) == "identity":
            raise ValueError(f"torch.nn.{self._stock.__name__} has no nonlinearity 'identity'")
        for name, plain in _PLAIN.items():
            if (value := getattr(self, name, plain)) != plain:
                raise ValueError(f"torch.nn.{self._stock.__name__} has no {name}, got {value}")
        return _as_class(self, self._stock)


def _as_class(module: Any, cls: Any) -> Any:
    """A shallow copy of a module under another class, with containers of its own."""
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
    """Look through the class that parametrizations put before a module's own.

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
    """Make the class to give a module in place of its plain one.

    Parameters
    ----------
    module : torch.nn.Module
    cls : type
        The new plain class.

    Returns
    -------
    type
        `cls`, or for a parametrized module a class derived from it, with the properties
        that compute the parametrized weights.
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
            n_states = CELLS[self._cell].n_states
            self.zoneout = checks.zoneout_rates(self._cell, zoneout, n_states)
        if weight_dropout:
            self.weight_dropout = checks.probability("weight_dropout", weight_dropout)

    # On the class, so that modules of torch.nn that became ours have them.
    recurrent_dropout: float = 0.0
    zoneout: float | Sequence[float] = 0.0
    weight_dropout: float = 0.0
    num_heads: int = 1

    @property
    def _cell(self) -> str:
        return self.mode.lower()

    def extra_repr(self) -> str:
        """What torch.nn shows, and what it does not have."""
        values = {name: getattr(self, name) for name in _PLAIN}
        shown = [f"{name}={value}" for name, value in values.items() if value != _PLAIN[name]]
        return ", ".join([super().extra_repr(), *shown])

    def flatten_parameters(self) -> None:
        """Do what torch.nn does, where the weights are those that cuDNN has."""
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
        """Run the layers over a batch of sequences; what torch.nn has is as there.

        Parameters
        ----------
        input : Tensor of shape (T, B, I), (B, T, I) if batch_first, (T, I), or PackedSequence
        hx : Tensor of shape (L * D, B, H), or a tuple of such (LSTM h and c), optional
            Initial state; without the B dimension for an unbatched input.
        lengths : integer Tensor of shape (B,), optional
            Steps of each row, from 0 to T, in any order, on the device of `input`; a number for an
            unbatched input. See ``fastrnn.functional.lstm`` for this and what follows.
        reset : bool Tensor of shape (T, B), (B, T) if batch_first, (T,) or PackedSequence, optional
            Whether a new sequence begins with x_t: the state is reset before x_t is consumed.
        reset_state : as `hx`, optional
            The state after a reset, zeros if None; its B may be 1.
        return_states : bool or 'gates', default False
            Whether to return the states of all steps too, or also the gates. Of a PackedSequence
            they are padded, with its sequences in their original order.
        bptt : int, optional
            Steps after which gradients stop.
        recompute : bool or int, default False
            Whether to keep less memory between forward and backward; a number does so in chunks of
            so many steps.

        Returns
        -------
        output : Tensor or PackedSequence
            Hidden state of the last layer at every step, both directions side by side.
        hx : Tensor, or a tuple of Tensor
            State of every layer after each sequence's last step.
        states : fastrnn.functional.States
            Only if `return_states`.

        Raises
        ------
        ValueError, RuntimeError
            If the arguments do not fit the module or each other; texts as in torch.nn.
        """
        given = {}
        if not (
            lengths is reset is reset_state is bptt is None
            and return_states is False
            and recompute is False
        ):
            given = {
                "lengths": lengths,
                "reset": reset,
                "reset_state": reset_state,
                "return_states": return_states,
                "bptt": bptt,
                "recompute": recompute,
            }
        if _is_leaf(self, input):
            return _leaf_call(self, input, hx, given)
        if not given and self._is_stock and not torch.compiler.is_compiling():
            path = self._path(input, hx)
            if self._fits(input, hx):
                return self._run_fitting(path, input, hx)
            if path == "torch" or self._is_for_torch(input, hx):
                self._check_before_torch(input, hx)
                return super().forward(input, hx)
        if isinstance(input, PackedSequence):
            return _run_packed(self, input, hx, given)

        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if hx is not None:
            _check_state_dims(self, hx, batched)
        if not batched:
            input = input.unsqueeze(batch_dim)
            hx = hx if hx is None else _map(lambda part: part.unsqueeze(1), hx)
            _add_batch(given, batch_dim)
        output, hidden, *states = _run(self, input, hx, None, given)
        if not batched:
            output = output.squeeze(batch_dim)
            hidden = _map(lambda part: part.squeeze(1), hidden)
            states = [_map_states(lambda part: part.squeeze(2), part) for part in states]
        return output, hidden, *states

    @property
    def _is_stock(self) -> bool:
        """Whether the module does nothing that torch.nn's would not."""
        noise = self.recurrent_dropout or self.zoneout or self.weight_dropout
        return not noise and self.num_heads == 1

    def _is_for_torch(self, input: Any, hx: Any) -> bool:
        """Whether torch.nn is to run a call that was planned otherwise.

        With weights that our operators do not know; and to refuse, in its words, a weight that is
        None and a state of a packed sequence that is not 3-D.
        """
        if self.mode == "RNN_IDENTITY":
            return False
        weights = self._parameters.values()  # this call's; see `_path`
        if any(weight is None for weight in weights):
            return True
        if not ops.are_known(*weights) and planner.forced_path() is None:
            return True
        is_packed = isinstance(input, PackedSequence)
        return is_packed and any(part.dim() != 3 for part in _states(hx))

    def _check_before_torch(self, input: Any, hx: Any) -> None:
        """Check what torch.nn does not: what an LSTM gets with packed sequences of equal lengths.

        oneDNN would read and write beyond the memory of what is too small.
        """
        if self.mode != "LSTM" or not isinstance(input, PackedSequence) or torch._C._is_tracing():
            return
        if sequences.is_ragged(input.batch_sizes) or any(w is None for w in self._flat_weights):
            return
        self.check_input(input.data, input.batch_sizes)
        if hx is not None and self._is_state(hx) and [p.dim() > 2 for p in hx] == [True, True]:
            count = self.num_layers * (2 if self.bidirectional else 1)
            widths = (self.proj_size or self.hidden_size, self.hidden_size)
            for k, (part, width) in enumerate(zip(hx, widths, strict=True)):
                size, text = (count, int(input.batch_sizes[0]), width), f"hidden[{k}] size {{}}"
                self.check_hidden_size(part, size, f"Expected {text}, got {{}}")

    def _path(self, input: Any, hx: Any) -> str:
        """Choose the path; what torch.nn will refuse, with its checks of the arguments, is its.

        Reads the weights of the last call: computing parametrizations twice a call would
        not be harmless, and only whether they need gradients matters here. If that differs
        (parametrized weights, the last call without gradients), the path may be the slower
        one; the weights that are computed with are always this call's.
        """
        packed = isinstance(input, PackedSequence)
        x = input.data if packed else input
        if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_nested:
            return "torch"  # mostly to be refused
        if torch._C._is_tracing():  # sizes are not to be asked for
            steps, batch = 0, 0
        elif packed:
            steps, batch = len(input.batch_sizes), int(input.batch_sizes[0])
        elif x.dim() == 3:
            steps, batch = x.shape[1::-1] if self.batch_first else x.shape[:2]
        elif x.dim() == 2:
            steps, batch = x.shape[0], 1
        else:
            return "torch"  # to be refused
        if x.is_cpu and ops.autocasts("cpu"):
            return "loop"  # torch.nn.LSTM fails on some CPUs
        state: Sequence[Tensor] = ()
        if hx is not None:
            if not self._is_state(hx):
                return "torch"  # to be refused
            state = _states(hx)
            if any(part.dtype != x.dtype for part in state):
                # torch promotes some and refuses the others
                return "loop" if self.mode == "RNN_IDENTITY" else "torch"
        return sequences.choose_path(
            self.mode.lower(),
            (steps, batch, self.input_size, self.hidden_size),
            x,
            (*self._flat_weights, *state),
            packed=packed and sequences.is_ragged(input.batch_sizes),
            projected=self.proj_size > 0,
            layers=self.num_layers,
            directions=2 if self.bidirectional else 1,
        )

    def _is_state(self, hx: Any) -> bool:
        """Whether an argument is of the kind of the state: a tensor, for an LSTM several."""
        if not isinstance(self, LSTM):
            return isinstance(hx, Tensor)
        return isinstance(hx, (tuple, list)) and all(isinstance(part, Tensor) for part in hx)

    def _fits(self, input: Any, hx: Any) -> bool:
        """Whether torch.nn's checks of the arguments would find nothing, for an ordinary call."""
        if hx is not None and not self._is_state(hx):
            return False
        weights, state = self._flat_weights, _states(hx)
        tensors = (*weights, *state)
        count = self.num_layers * (2 if self.bidirectional else 1)
        per_direction = (4 if self.bias else 2) + (self.proj_size > 0)
        if torch._C._is_tracing():  # which warns of sizes that decide something
            return False
        if not (
            type(input) is Tensor
            and input.layout == torch.strided
            and not input.is_nested
            and input.dim() == 3
            and input.shape[2] == self.input_size
            and input.shape[0] * input.shape[1] > 0
            and len(weights) == len(self._parameters) == count * per_direction
            and all(map(operator.is_, weights, self._parameters.values()))
            and all(
                t is not None and t.dtype == input.dtype and t.device == input.device
                for t in tensors
            )
            and not torch._C._is_any_autocast_enabled()
        ):
            return False
        batch = input.shape[0 if self.batch_first else 1]
        widths = (self.proj_size or self.hidden_size, self.hidden_size)
        return hx is None or [part.shape for part in state] == [
            (count, batch, width) for width in widths[: 2 if isinstance(self, LSTM) else 1]
        ]

    def _run_fitting(self, path: str, input: Tensor, hx: Any) -> Any:
        output, final = sequences.run_layers(
            path,
            self.mode.lower(),
            input,
            _states(hx),
            self._flat_weights,  # type: ignore[arg-type]
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            self.batch_first,
        )
        return output, tuple(final) if isinstance(self, LSTM) else final[0]

    @property
    def _is_paired(self) -> bool:
        """Whether the state is more than h."""
        return CELLS[self._cell].n_states > 1


def _run_packed(module: Any, packed: PackedSequence, hx: Any, given: dict[str, Any]) -> Any:
    data, batch_sizes, sorted_indices, unsorted_indices = packed
    if hx is not None:
        hx = module.permute_hidden(hx, sorted_indices)
    steps, batch = len(batch_sizes), int(batch_sizes[0])

    def sort(part: Any, dims: int) -> Any:
        # What has another batch is refused later, in words.
        fits = isinstance(part, Tensor) and part.dim() == dims and part.shape[1] == batch
        if sorted_indices is None or not fits:
            return part
        return part.index_select(1, sorted_indices)

    if given.get("reset") is not None:
        reset = given["reset"]
        if isinstance(reset, PackedSequence):
            reset, _ = pad_packed_sequence(reset, total_length=max(steps, len(reset.batch_sizes)))
        elif module.batch_first and isinstance(reset, Tensor):
            reset = reset.transpose(0, -1)
        given["reset"] = sort(reset, 2)
    if given.get("reset_state") is not None:
        given["reset_state"] = _map(lambda part: sort(part, 3), given["reset_state"])
    output, hidden, *states = _run(module, data, hx, batch_sizes, given)
    if unsorted_indices is not None:
        states = [_map_states(lambda s: s.index_select(2, unsorted_indices), s) for s in states]
    result = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
    return result, module.permute_hidden(hidden, unsorted_indices), *states


def _add_batch(given: dict[str, Any], batch_dim: int) -> None:
    """Give the options of an unbatched call a batch of one."""
    for name in ("lengths", "reset", "reset_state"):
        value = given.get(name)
        if value is None:
            continue
        if name == "lengths" and not isinstance(value, Tensor):
            given[name] = torch.tensor([value], device="cpu")
        elif name == "lengths":
            given[name] = value.reshape(1) if value.dim() == 0 else value
        elif name == "reset_state":
            given[name] = _map(lambda part: part.unsqueeze(1), value)
        elif isinstance(value, Tensor):
            given[name] = value.unsqueeze(batch_dim)


def _map_states(function: Callable[[Tensor], Tensor], states: States) -> States:
    h, *others = states
    return States(function(h), *(None if part is None else function(part) for part in others))


def _run(
    module: Any, input: Tensor, hx: Any, batch_sizes: Tensor | None, given: dict[str, Any]
) -> Any:
    """Check the arguments and call the function of ``fastrnn.functional``."""
    if torch.compiler.is_compiling():
        # What is stored on the module would leak out of the graph. The function checks too.
        weights = [getattr(module, name) for name in module._flat_weights_names]
    else:
        module._update_flat_weights()
        weights = module._flat_weights
        if hx is None:
            module.check_input(input, batch_sizes)
        else:
            module.check_forward_args(input, hx, batch_sizes)
    if module.weight_dropout and module.training:
        weights = [
            torch.dropout(weight, module.weight_dropout, True) if "weight_hh" in name else weight
            for name, weight in zip(module._flat_weights_names, weights, strict=True)
        ]
    paired = module._is_paired
    reset_state = given.get("reset_state")
    options = Options(
        batch_first=module.batch_first and batch_sizes is None,
        bidirectional=module.bidirectional,
        dropout=module.dropout,
        training=module.training,
        batch_sizes=batch_sizes,
        recurrent_dropout=module.recurrent_dropout,
        zoneout=module.zoneout,
        num_heads=module.num_heads,
    )._replace(**given)
    if reset_state is not None and not paired:
        options = options._replace(reset_state=[reset_state])
    state = hx if hx is None or paired else [hx]
    output, final, *states = sequences.sequence(module._cell, input, state, weights, options)
    return output, tuple(final) if paired else final[0], *states


def _states(hx: Any) -> Sequence[Any]:
    """The states that were given, as a sequence."""
    return () if hx is None else (hx,) if isinstance(hx, Tensor) else hx


def _check_state_dims(module: Any, hx: Any, batched: bool) -> None:
    kind, dims = ("batched 3-D", 3) if batched else ("unbatched 2-D", 2)
    if isinstance(hx, Tensor):
        if hx.dim() != dims:
            raise RuntimeError(
                f"For {kind} input, hx should also be {dims}-D but got {hx.dim()}-D tensor"
            )
        return
    if not module._is_paired:
        name = type(module).__name__
        raise TypeError(f"hx of {name} must be a tensor, got {type(hx).__name__}")
    # An LSTM's tuple of one is an IndexError, as in torch.nn, which looks at the first two.
    count = CELLS[module._cell].n_states
    found = [part.dim() for part in (hx[0], hx[1], *hx[2:count])]
    if any(count != dims for count in found):
        names = "hx and cx" if len(found) == 2 else "all parts of hx"
        raise RuntimeError(
            f"For {kind} input, {names} should also be {dims}-D "
            f"but got ({', '.join(f'{count}-D' for count in found)}) tensors"
        )


def _map(function: Callable[[Tensor], Tensor], hx: Any) -> Any:
    """Apply a function to every tensor of a state."""
    return function(hx) if isinstance(hx, Tensor) else tuple(function(part) for part in hx)


def _is_leaf(module: torch.nn.Module, input: Any) -> bool:
    """Whether torch.fx traces a model that the module is part of."""
    return isinstance(input, Proxy) and getattr(input.tracer, "root", None) is not module


def _leaf_call(
    module: torch.nn.Module, input: Any, hx: Any, given: dict[str, Any] | None = None
) -> Any:
    """Record a call of the module in a torch.fx graph, as torch.fx does for torch.nn's own."""
    tracer = input.tracer
    arguments = (input,) if hx is None else (input, hx)
    path = tracer.path_of_module(module)
    return tracer.create_proxy("call_module", path, arguments, given or {})


class LSTM(_Convertible, _Layers, torch.nn.LSTM):
    """Long short-term memory layers, in place of ``torch.nn.LSTM``.

    Parameters
    ----------
    input_size, hidden_size : int
        I and H.
    num_layers : int, default 1
    bias : bool, default True
        Whether there are ``bias_ih`` and ``bias_hh``.
    batch_first : bool, default False
        Whether input and output are (B, T, features) instead of (T, B, features).
    dropout : float, default 0.0
        Probability to zero an output of every layer but the last, in training.
    bidirectional : bool, default False
    proj_size : int, default 0
        If positive, h is projected to this size: P = proj_size instead of H.
    device, dtype : optional
        Of the parameters.
    recurrent_dropout, zoneout : optional
        See ``fastrnn.functional.lstm``.
    weight_dropout : float, default 0.0
        Probability to zero an element of ``weight_hh`` in a call, in training (Merity et al. 2018,
        arXiv:1708.02182).
    num_heads : int, default 1
        Block-diagonal recurrence: the hidden units are so many heads of consecutive ones, which do
        not see each other in the recurrent product. ``weight_hh`` has the shape
        (4H, H / num_heads); not with `proj_size`.

    Raises
    ------
    TypeError, ValueError
        For the values that torch.nn.LSTM refuses, with its texts.

    Notes
    -----
    Attributes, parameter names, initial values and `repr` are those of torch.nn.LSTM,
    of which this is a subclass. ``fastrnn.reference.lstm_step`` has the formula.

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
    """Gated recurrent unit layers, in place of ``torch.nn.GRU``.

    Parameters
    ----------
    input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype
        As for `LSTM`.
    recurrent_dropout, zoneout, weight_dropout, num_heads
        As for `LSTM`.

    Raises
    ------
    TypeError, ValueError
        For the values that torch.nn.GRU refuses, with its texts.

    Notes
    -----
    A subclass of torch.nn.GRU; ``fastrnn.reference.gru_step`` has the formula.

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
    """Elman layers, in place of ``torch.nn.RNN``.

    Parameters
    ----------
    input_size, hidden_size, num_layers : int
        As for `LSTM`.
    nonlinearity : {'tanh', 'relu', 'identity'}, default 'tanh'
        'identity', a linear network, is beyond torch.nn.RNN.
    bias, batch_first, dropout, bidirectional, device, dtype
        As for `LSTM`.
    recurrent_dropout, zoneout, weight_dropout, num_heads
        As for `LSTM`.

    Raises
    ------
    TypeError, ValueError
        For the values that torch.nn.RNN refuses, with its texts.

    Notes
    -----
    A subclass of torch.nn.RNN: h_t = phi(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh).

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
        """Do what torch.nn.RNN does, where cuDNN has the activation."""
        if self.mode != "RNN_IDENTITY":
            super().flatten_parameters()


def _without_identity(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """Arguments that torch's constructor takes, and whether they asked for 'identity'.

    ``nonlinearity`` is the fourth argument of RNN and of RNNCell.
    """
    if args[3:4] == ("identity",):
        return (*args[:3], "tanh", *args[4:]), kwargs, True
    if kwargs.get("nonlinearity") == "identity":
        return args, {**kwargs, "nonlinearity": "tanh"}, True
    return args, kwargs, False


_STEP_WEIGHTS = {"weight_ih", "weight_hh", "bias_ih", "bias_hh"}


class _Cell(_Convertible, _torch.RNNCellBase):
    """The forward of all three cells."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Run one step; arguments and results as in torch.nn.

        Parameters
        ----------
        input : Tensor of shape (B, I) or (I,)
        hx : Tensor of shape (B, H) or (H,), or for LSTMCell a pair of such, optional
            State before the step, zeros if not given.

        Returns
        -------
        Tensor, or for LSTMCell a pair
            State after the step, shaped as `hx`.

        Raises
        ------
        ValueError, RuntimeError
            If the arguments do not fit the module or each other; texts as in torch.nn.
        """
        name = self._stock.__name__
        if self._is_ordinary(input, hx):
            weights = self._parameters
            return self._aten(
                input,
                hx,
                weights["weight_ih"],
                weights["weight_hh"],
                weights["bias_ih"],
                weights["bias_hh"],
            )
        if _is_leaf(self, input):
            return _leaf_call(self, input, hx)
        if self._is_handed_over(input):
            return super().forward(input, hx)
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        paired = isinstance(self, LSTMCell)
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
        hx = state if state is None or paired else state[0]
        new = self._stateless(input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        if batched:
            return new
        return tuple(part.squeeze(0) for part in new) if paired else new.squeeze(0)

    def _is_ordinary(self, input: Any, hx: Any) -> bool:
        """Whether torch's kernel may be called without ado: a batch, a state, plain weights.

        Such a step is torch's, whatever the planner would look at, unless another path is forced.
        """
        state = hx if isinstance(self, LSTMCell) and type(hx) is tuple else (hx,)
        return (
            type(input) is Tensor
            and input.dim() == 2
            and len(state) == self._n_states
            and all(type(part) is Tensor and part.dim() == 2 for part in state)
            and self._parameters.keys() == _STEP_WEIGHTS
            and self._aten is not None
            and not ops.transformed()
            and planner.forced_path() is None
        )

    def _is_handed_over(self, input: Tensor) -> bool:
        """Whether torch.nn's own forward runs the call, checks of the arguments included."""
        if not isinstance(input, Tensor):
            return True  # to be refused
        # A batch of 1 stands for any: a step's path does not depend on it.
        sizes = (1, 1, self.input_size, self.hidden_size)
        return sequences.choose_path(self._cell_name, sizes, input, is_step=True) == "torch"

    _cell_name: Any  # key of ``reference.CELLS``
    _stateless: Any
    _aten: Any  # torch's function of one step, None for what torch has not
    _n_states = 1


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """One step of an LSTM, in place of ``torch.nn.LSTMCell``.

    Parameters
    ----------
    input_size, hidden_size : int
        I and H.
    bias : bool, default True
    device, dtype : optional
        Of the parameters.

    Examples
    --------
    >>> import torch, fastrnn
    >>> cell = fastrnn.LSTMCell(10, 20)
    >>> h, c = cell(torch.randn(3, 10))
    >>> h.shape, c.shape
    (torch.Size([3, 20]), torch.Size([3, 20]))
    """

    _stock, _cell_name = torch.nn.LSTMCell, "lstm"
    _stateless, _aten = staticmethod(F.lstm_cell), staticmethod(sequences.ATEN_STEPS["lstm"])
    _n_states = 2


class GRUCell(_Cell, torch.nn.GRUCell):
    """One step of a GRU, in place of ``torch.nn.GRUCell``.

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

    _stock, _cell_name = torch.nn.GRUCell, "gru"
    _stateless, _aten = staticmethod(F.gru_cell), staticmethod(sequences.ATEN_STEPS["gru"])


class RNNCell(_Cell, torch.nn.RNNCell):
    """One step of an Elman network, in place of ``torch.nn.RNNCell``.

    Parameters
    ----------
    input_size, hidden_size : int
        I and H.
    bias : bool, default True
    nonlinearity : {'tanh', 'relu', 'identity'}, default 'tanh'
        'identity' is beyond torch.nn.RNNCell. As there, any other value is refused at
        the first call.
    device, dtype : optional
        Of the parameters.

    Examples
    --------
    >>> import torch, fastrnn
    >>> cell = fastrnn.RNNCell(10, 20, nonlinearity="relu")
    >>> cell(torch.randn(10)).shape
    torch.Size([20])
    """

    _stock = torch.nn.RNNCell

    @property
    def _cell_name(self) -> str:
        return f"rnn_{self.nonlinearity}"

    @property
    def _aten(self) -> Any:
        return sequences.ATEN_STEPS.get(self._cell_name)

    def _stateless(self, *args: Any) -> Tensor:
        if self.nonlinearity not in F.NONLINEARITIES:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return F.rnn_cell(*args, nonlinearity=self.nonlinearity)


#: Our class for each of torch.nn's.
REPLACEMENTS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    cls._stock: cls for cls in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)
}
