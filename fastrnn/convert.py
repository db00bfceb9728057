"""Convert weights between our modules and Keras, haste and FlashRNN.

The modules may be fastrnn's or torch.nn's. Weights are loaded into the existing parameters, and
extracted as copies. Settings that are not weights, such as dropout rates and non-default
activations, are not converted.

An array is a tensor, or anything that numpy reads as real numbers, such as a list of lists.

A weight with a parametrization, such as those in ``torch.nn.utils.parametrizations``, is assigned
through it; it is an error if the parametrization cannot represent the values, as is the case for
`spectral_norm` and most values. A weight that a hook computes, as with ``torch.nn.utils.prune``,
cannot be loaded: load the weights first. An error leaves all parameters unchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import RNNBase
from torch.nn.utils import parametrize

__all__ = ["from_flashrnn", "from_haste", "from_keras", "to_flashrnn", "to_haste", "to_keras"]

# For each of their gates the index of ours, by the mode of the module. Each of these permutations
# is its own inverse.
_RNNS = {"RNN_TANH": [0], "RNN_RELU": [0], "RNN_IDENTITY": [0]}
_GRU = [1, 0, 2]  # z, r, n
_KERAS = {"LSTM": [0, 1, 2, 3], "GRU": _GRU, "GRU_RESET_BEFORE": _GRU, **_RNNS}
_LSTM = [0, 2, 1, 3]  # i, g, f, o
_HASTE = {"LSTM": _LSTM, "GRU": _GRU, "LAYERNORM_LSTM": _LSTM, "LAYERNORM_GRU": _GRU}
_FLASHRNN = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "SLSTM": 4}  # gates


def from_keras(module: RNNBase, weights: Sequence[Sequence[Any]]) -> None:
    """Load the weights of Keras layers into a module.

    Parameters
    ----------
    module : LSTM, GRU, ResetBeforeGRU or RNN
        For Keras' LSTM, GRU with and without ``reset_after``, and SimpleRNN.
    weights : sequence of sequence of array
        For each layer the result of its ``get_weights()``: ``kernel`` (I, G * H),
        ``recurrent_kernel`` (H, G * H) and, if there is a bias, ``bias`` (G * H,) or, for a GRU
        with ``reset_after``, (2, 3H). For a ``Bidirectional`` layer these are the arrays of the
        forward layer followed by those of the backward layer.

    Raises
    ------
    TypeError
        If Keras has no such layer, or a value is not an array of real numbers.
    ValueError
        If the number or shapes of the arrays do not fit the module, or a weight of the module
        cannot be loaded.

    Examples
    --------
    >>> import numpy, fastrnn
    >>> from fastrnn.convert import from_keras
    >>> gru = fastrnn.GRU(3, 4)
    >>> kernel, recurrent = numpy.zeros((3, 12)), numpy.zeros((4, 12))
    >>> from_keras(gru, [[kernel, recurrent, numpy.ones((2, 12))]])
    >>> gru.bias_hh_l0.sum().item()
    12.0
    """
    order = _KERAS[_mode(module, "Keras", _KERAS)]
    _refuse(module, "Keras", proj_size=0, num_heads=1)
    directions, count = _directions(module), 3 if module.bias else 2
    if len(weights) != module.num_layers:
        raise ValueError(
            f"weights must have a list for each of the {module.num_layers} layers, "
            f"got {len(weights)}"
        )
    ours: dict[str, Tensor] = {}
    for k, arrays in enumerate(weights):
        if len(arrays) != directions * count:
            raise ValueError(
                f"weights[{k}] must have {directions * count} arrays, {count} for each of "
                f"{directions} direction(s), got {len(arrays)}"
            )
        for d in range(directions):
            kernel, recurrent, *bias = (
                _tensor(f"weights[{k}][{i}]", arrays[i]) for i in range(d * count, (d + 1) * count)
            )
            values = {"weight_ih": _transposed(kernel), "weight_hh": _transposed(recurrent)}
            if bias and module.mode == "GRU":
                values["bias_ih"], values["bias_hh"] = _rows(f"the bias of weights[{k}]", bias[0])
            elif bias:
                values["bias_ih"], values["bias_hh"] = bias[0], torch.zeros_like(bias[0])
            ours.update(_ours(module, _suffix(k, d), values, order))
    _load(module, ours)


def to_keras(module: RNNBase) -> list[list[Any]]:
    """Convert the weights of a module to those of Keras layers.

    Parameters
    ----------
    module : LSTM, GRU, ResetBeforeGRU or RNN

    Returns
    -------
    list of list of numpy.ndarray
        For each layer the argument of its ``set_weights()``; see `from_keras`. The arrays of a
        bfloat16 module are float32, which is exact, because numpy has no bfloat16.

    Raises
    ------
    TypeError, ValueError
        If Keras has no such layer, or a weight is None or on the meta device.

    Examples
    --------
    >>> import fastrnn
    >>> from fastrnn.convert import to_keras
    >>> [array.shape for array in to_keras(fastrnn.LSTM(3, 4))[0]]
    [(3, 16), (4, 16), (16,)]
    """
    order = _KERAS[_mode(module, "Keras", _KERAS)]
    _refuse(module, "Keras", proj_size=0, num_heads=1)
    layers = []
    for k in range(module.num_layers):
        arrays = []
        for d in range(_directions(module)):
            own = {
                name: value.float() if value.dtype == torch.bfloat16 else value
                for name, value in _values(module, _suffix(k, d), order).items()
            }
            arrays += [own["weight_ih"].t(), own["weight_hh"].t()]
            if module.mode == "GRU" and module.bias:
                arrays.append(torch.stack([own["bias_ih"], own["bias_hh"]]))
            elif module.bias:
                arrays.append(own["bias_ih"] + own["bias_hh"])
        layers.append([array.contiguous().numpy() for array in arrays])
    return layers


def from_haste(module: RNNBase, state_dict: Mapping[str, Any]) -> None:
    """Load the weights of a haste_pytorch layer into a module.

    Parameters
    ----------
    module : LSTM, GRU, LayerNormLSTM or LayerNormGRU
        With one layer, one direction and biases, like haste's layers.
    state_dict : mapping of str to array
        The state dict of haste's layer of the same name: ``kernel`` (I, G * H),
        ``recurrent_kernel`` (H, G * H) and ``bias`` (G * H,); for a GRU also ``recurrent_bias``
        (3H,); with layer normalization also ``gamma`` (2, G * H), and for an LSTM ``gamma_h`` and
        ``beta_h`` (H,).

    Raises
    ------
    TypeError
        If haste has no such layer, or a value is not an array of real numbers.
    ValueError
        If names or shapes do not fit the module, or a weight of the module cannot be loaded.

    Examples
    --------
    >>> import fastrnn
    >>> from fastrnn.convert import from_haste, to_haste
    >>> a, b = fastrnn.LayerNormGRU(3, 4), fastrnn.LayerNormGRU(3, 4)
    >>> from_haste(a, to_haste(b))
    >>> bool((a.weight_hh_l0 == b.weight_hh_l0).all())
    True
    """
    order = _HASTE[_mode(module, "haste", _HASTE)]
    _refuse(module, "haste", proj_size=0, num_heads=1, num_layers=1, bidirectional=False, bias=True)
    given = {name: _tensor(name, value) for name, value in state_dict.items()}
    if given.keys() != (expected := _haste_names(module)):
        raise ValueError(
            f"state_dict must have {', '.join(sorted(expected))}, got {', '.join(sorted(given))}"
        )
    values = {
        "weight_ih": _transposed(given["kernel"]),
        "weight_hh": _transposed(given["recurrent_kernel"]),
        "bias_ih": given["bias"],
        "bias_hh": given.get("recurrent_bias", torch.zeros_like(given["bias"])),
    }
    if "gamma" in given:
        values["gain_ih"], values["gain_hh"] = _rows("gamma", given["gamma"])
    if "gamma_h" in given:
        values["gain_c"], values["bias_c"] = given["gamma_h"], given["beta_h"]
    _load(module, _ours(module, "_l0", values, order))


def to_haste(module: RNNBase) -> dict[str, Tensor]:
    """Convert the weights of a module to those of a haste_pytorch layer.

    Parameters
    ----------
    module : LSTM, GRU, LayerNormLSTM or LayerNormGRU
        With one layer, one direction and biases.

    Returns
    -------
    dict of str to Tensor
        The argument of ``load_state_dict`` of haste's layer of the same name; see `from_haste`.

    Raises
    ------
    TypeError, ValueError
        If haste has no such layer, or a weight is None or on the meta device.

    Examples
    --------
    >>> import fastrnn
    >>> from fastrnn.convert import to_haste
    >>> {name: tuple(value.shape) for name, value in to_haste(fastrnn.LSTM(3, 4)).items()}
    {'kernel': (3, 16), 'recurrent_kernel': (4, 16), 'bias': (16,)}
    """
    order = _HASTE[_mode(module, "haste", _HASTE)]
    _refuse(module, "haste", proj_size=0, num_heads=1, num_layers=1, bidirectional=False, bias=True)
    own, names = _values(module, "_l0", order), _haste_names(module)
    values = {
        "kernel": own["weight_ih"].t().contiguous(),
        "recurrent_kernel": own["weight_hh"].t().contiguous(),
        "bias": own["bias_ih"],
    }
    if "recurrent_bias" in names:
        values["recurrent_bias"] = own["bias_hh"]
    else:
        values["bias"] = own["bias_ih"] + own["bias_hh"]
    if "gamma" in names:
        values["gamma"] = torch.stack([own["gain_ih"], own["gain_hh"]])
    if "gamma_h" in names:
        values["gamma_h"], values["beta_h"] = own["gain_c"], own["bias_c"]
    return values


def _haste_names(module: Any) -> set[str]:
    names = {"kernel", "recurrent_kernel", "bias"}
    if "GRU" in module.mode:
        names |= {"recurrent_bias"}
    if "LAYERNORM" in module.mode:
        names |= {"gamma"} if "GRU" in module.mode else {"gamma", "gamma_h", "beta_h"}
    return names


def from_flashrnn(module: RNNBase, r: Any, b: Any, weight_ih: Any = None) -> None:
    """Load FlashRNN's parameters into a module.

    Parameters
    ----------
    module : LSTM, GRU, RNN or SLSTM
        For FlashRNN's functions 'lstm', 'gru', 'elman' and 'slstm'; with one layer, one direction,
        biases, and ``num_heads`` equal to FlashRNN's number N of heads.
    r : array of shape (G, N, H / N, H / N)
        The recurrent weights R, for each gate and head a matrix (unit, previous unit). FlashRNN
        orders the gates of a GRU n, r, z here.
    b : array of shape (G, N, H / N), or (4, N, H / N) for a GRU
        The bias; for a GRU those of the recurrent part of n, of r, of z, and of the input part
        of n.
    weight_ih : array of shape (G * H, I), optional
        The weight from which the caller of FlashRNN computes ``Wx``, by ``linear(x, weight_ih)``
        and ``view(B, T, G, N, H / N)``. If None, the module keeps its own.

    Raises
    ------
    TypeError
        If FlashRNN has no such function, or a value is not an array of real numbers.
    ValueError
        If the shapes do not fit the module, or a weight of the module cannot be loaded.

    Examples
    --------
    >>> import torch, fastrnn
    >>> from fastrnn.convert import from_flashrnn
    >>> slstm = fastrnn.SLSTM(3, 6, num_heads=2)
    >>> from_flashrnn(slstm, torch.zeros(4, 2, 3, 3), torch.ones(4, 2, 3))
    >>> slstm.bias_ih_l0.sum().item()
    24.0
    """
    mode = _mode(module, "FlashRNN", _FLASHRNN)
    _refuse(module, "FlashRNN", proj_size=0, num_layers=1, bidirectional=False, bias=True)
    r, b, is_gru = _tensor("r", r), _tensor("b", b), mode == "GRU"
    count, heads, units = _shape_of_heads(module)
    _expect("r", r, (count, heads, units, units))
    _expect("b", b, (count + is_gru, heads, units))
    if is_gru:
        of_ih, of_hh = b[[1, 2, 3]], torch.cat([torch.zeros_like(b[:2]), b[:1]])
        r = r[[1, 2, 0]]
    else:
        of_ih, of_hh = b, torch.zeros_like(b)
    values = {"weight_hh": r.flatten(0, 2), "bias_ih": of_ih.flatten(), "bias_hh": of_hh.flatten()}
    if weight_ih is not None:
        values["weight_ih"] = _tensor("weight_ih", weight_ih)
    _load(module, {f"{name}_l0": value for name, value in values.items()})


def to_flashrnn(module: RNNBase) -> tuple[Tensor, Tensor]:
    """Convert the weights of a module to FlashRNN's parameters.

    Parameters
    ----------
    module : LSTM, GRU, RNN or SLSTM
        With one layer, one direction and biases.

    Returns
    -------
    r : Tensor
    b : Tensor
        See `from_flashrnn`. Where FlashRNN has one bias, it is the sum of the module's two. The
        input weight is the module's ``weight_ih``, unchanged.

    Raises
    ------
    TypeError, ValueError
        If FlashRNN has no such function, or a weight is None or on the meta device.

    Examples
    --------
    >>> import fastrnn
    >>> from fastrnn.convert import to_flashrnn
    >>> r, b = to_flashrnn(fastrnn.GRU(3, 6, num_heads=2))
    >>> r.shape, b.shape
    (torch.Size([3, 2, 3, 3]), torch.Size([4, 2, 3]))
    """
    mode = _mode(module, "FlashRNN", _FLASHRNN)
    _refuse(module, "FlashRNN", proj_size=0, num_layers=1, bidirectional=False, bias=True)
    count, heads, units = _shape_of_heads(module)
    own = _values(module, "_l0", list(range(count)))
    r, b_ih, b_hh = (
        own[name].unflatten(0, (count, heads, units))
        for name in ("weight_hh", "bias_ih", "bias_hh")
    )
    if mode != "GRU":
        return r, b_ih + b_hh
    return r[[2, 0, 1]], torch.cat([b_hh[2:], b_ih[:2] + b_hh[:2], b_ih[2:]])


def _tensor(name: str, value: Any) -> Tensor:
    """Read an array; if it is not a tensor, as float64, which is exact for narrower types."""
    if isinstance(value, Tensor):
        if value.is_complex():
            raise TypeError(f"{name} must be of real numbers, got {value.dtype}")
        return _present(name, value).detach()
    import numpy  # here, because fastrnn and torch do not require it

    try:
        # A copy that torch can read: writable, in native byte order, contiguous.
        array = numpy.asarray(value).astype(numpy.float64, order="C", casting="same_kind")
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be a tensor or an array of real numbers, got "
            f"{type(value).__name__}: {error}"
        ) from error
    return torch.from_numpy(array)


def _present(name: str, value: Tensor | None) -> Tensor:
    if value is None or value.is_meta:
        what = "None" if value is None else "a tensor on the meta device"
        raise ValueError(f"{name} must be a tensor with values, got {what}")
    return value


def _transposed(value: Tensor) -> Tensor:
    """Transpose a matrix; `_expect` rejects the shape of anything else later."""
    return value.t() if value.dim() == 2 else value


def _mode(module: RNNBase, library: str, accepted: Iterable[str]) -> str:
    mode = getattr(module, "mode", type(module).__name__)
    if mode not in accepted:
        raise TypeError(f"for {library} a module must be one of {', '.join(accepted)}, got {mode}")
    return mode


def _shape_of_heads(module: RNNBase) -> tuple[int, int, int]:
    """The numbers of gates, of heads, and of hidden units per head."""
    heads = getattr(module, "num_heads", 1)
    return _FLASHRNN[module.mode], heads, module.hidden_size // heads


def _refuse(module: RNNBase, library: str, **accepted: Any) -> None:
    """Raise if a module has a setting that a library does not support."""
    for name, value in accepted.items():
        if (found := getattr(module, name, value)) != value:
            raise ValueError(f"{name} must be {value} for {library}, got {found}")


def _directions(module: RNNBase) -> int:
    return 2 if module.bidirectional else 1


def _suffix(layer: int, direction: int) -> str:
    return f"_l{layer}{'_reverse' if direction else ''}"


def _expect(name: str, value: Tensor, shape: Iterable[int]) -> None:
    if value.shape != (accepted := tuple(shape)):
        raise ValueError(f"{name} must be of shape {accepted}, got {tuple(value.shape)}")


def _rows(name: str, value: Tensor) -> tuple[Tensor, Tensor]:
    """Split a tensor into its two rows, for the input part and the recurrent part."""
    if value.dim() != 2 or value.shape[0] != 2:
        raise ValueError(f"{name} must have two rows, got shape {tuple(value.shape)}")
    return value[0], value[1]


def _in_order(value: Tensor, order: list[int], hidden: int) -> Tensor:
    """Permute the blocks of H rows of a tensor with one for each gate; return others unchanged."""
    if value.dim() == 0 or value.shape[0] != len(order) * hidden:
        return value
    return value.unflatten(0, (len(order), hidden))[order].flatten(0, 1)


def _values(module: RNNBase, suffix: str, order: list[int]) -> dict[str, Tensor]:
    """Copy the parameters of a direction, keyed by their names without suffix."""
    names = next(names for names in module._all_weights if names[0] == f"weight_ih{suffix}")
    for hook in module._forward_pre_hooks.values():
        # torch.nn.utils.weight_norm and prune recompute a weight before each call.
        if getattr(hook, "name", getattr(hook, "_tensor_name", None)) in names:
            hook(module, ())
    return {
        name.removesuffix(suffix): _in_order(
            _present(name, getattr(module, name)).detach().to("cpu", copy=True),
            order,
            module.hidden_size,
        )
        for name in names
    }


def _ours(
    module: RNNBase, suffix: str, values: Mapping[str, Tensor], order: list[int]
) -> dict[str, Tensor]:
    """The values of a direction, with our names and gate order."""
    return {
        name + suffix: _in_order(value, order, module.hidden_size) for name, value in values.items()
    }


@torch.no_grad()
def _load(module: RNNBase, values: Mapping[str, Tensor]) -> None:
    """Copy values into the parameters, or raise before changing any if one does not fit."""
    todo = []
    for name, value in values.items():
        is_parametrized = parametrize.is_parametrized(module, name)
        own: Any = module.get_submodule(f"parametrizations.{name}") if is_parametrized else None
        # Tried on a copy: some parametrizations change their state with each call.
        trial = copy.deepcopy(own)
        current = _present(name, trial() if is_parametrized else getattr(module, name))
        _expect(f"{name}, after conversion,", value, current.shape)
        # Converted before anything is changed, because conversion may fail, and because a value
        # may share memory with the module.
        value = torch.empty_like(current, memory_format=torch.contiguous_format).copy_(value)
        if is_parametrized:
            _try(name, trial, value)
            todo.append((own.right_inverse, value))
        elif isinstance(current, torch.nn.Parameter):
            todo.append((current.copy_, value))
        else:
            raise ValueError(
                f"{name} must be a parameter, but a hook computes it from others: load before "
                "weight_norm, spectral_norm or prune, or after their removal"
            )
    for put, value in todo:
        put(value)


def _try(name: str, parametrizations: Any, value: Tensor) -> None:
    """Raise if parametrizations cannot represent a value."""
    try:
        parametrizations.right_inverse(value.clone())
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{name} has a parametrization without an inverse: {error}") from error
    # Observed rounding: at most 6 eps, with orthogonal, or half an eps in half precision.
    wide = torch.promote_types(value.dtype, torch.float32)
    allowed = 16 * torch.finfo(wide).eps + torch.finfo(value.dtype).eps
    given, found = value.to(wide), parametrizations().to(wide)
    if not (found - given).norm() <= allowed * given.norm():  # also false for NaN
        kinds = ", ".join(type(part).__name__.lstrip("_") for part in parametrizations)
        raise ValueError(f"{name} must have values that its parametrization can represent: {kinds}")
