"""Stateless recurrent layers and cells: weights in, results out.

The modules of ``fastrnn.nn`` keep parameters and call these functions. Arguments are
checked here before our own paths run; torch's own kernels check dtypes and devices
themselves. The texts of the errors are torch's where torch has one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import _VF, Tensor

from . import ops, planner, reference
from .reference import CELLS

ATEN_LAYERS: dict[str, Callable[..., Any]] = {
    "lstm": _VF.lstm,
    "gru": _VF.gru,
    "rnn_tanh": _VF.rnn_tanh,
    "rnn_relu": _VF.rnn_relu,
}
ATEN_STEPS: dict[str, Callable[..., Any]] = {
    "lstm": _VF.lstm_cell,
    "gru": _VF.gru_cell,
    "rnn_tanh": _VF.rnn_tanh_cell,
    "rnn_relu": _VF.rnn_relu_cell,
}
NONLINEARITIES = ("tanh", "relu", "identity")


def lstm(
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    *,
    batch_first: bool = False,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run a long short-term memory network over a batch of sequences.

    Parameters
    ----------
    input : Tensor of shape (T, B, I), (B, T, I) or (N, I)
        Time first, unless `batch_first`; N rows of a packed sequence with `batch_sizes`.
    hx : (h_0, c_0) of shapes (L * D, B, P) and (L * D, B, H), or None
        Initial state, zeros if None; L layers, D directions.
    weights : sequence of Tensor
        For each layer, and in it for each direction: ``weight_ih`` (4H, I) and
        ``weight_hh`` (4H, P), then, if there are biases, ``bias_ih`` and ``bias_hh``
        (4H,), then, if h is projected, ``weight_hr`` (P, H). Gates are in the order
        i, f, g, o. This is the order of ``torch.nn.LSTM``'s parameters; the number of
        layers follows from the length.
    batch_first : bool, default False
        Whether `input` and `output` are (B, T, features); not with `batch_sizes`.
    bidirectional : bool, default False
    dropout : float, default 0.0
        Probability to zero an element of the output of each layer but the last; only
        when `training`. Drawn from torch's generator, as torch.nn draws it.
    training : bool, default False
    batch_sizes : int64 Tensor of shape (T,) on the CPU, optional
        Rows at each step, never increasing, as in ``PackedSequence``.
    recompute : bool, default False
        Whether to keep less memory between forward and backward: on a GPU of each layer its
        output and cell states, without the gates, on a CPU nothing. Backward computes these again:
        on a GPU with one more product over all steps, on a CPU with another forward.

    Returns
    -------
    output : Tensor of shape (T, B, D * P), (B, T, D * P) or (N, D * P)
    (h_n, c_n) : tuple of Tensor, shaped as `hx`
        State after each row's last step; fresh tensors that may be written to.

    Raises
    ------
    ValueError
        If a weight, or an option, does not fit the others.
    RuntimeError
        If `input` or `hx` does not fit the weights, in shape, dtype or device, or T is 0.

    Notes
    -----
    See ``fastrnn.reference.lstm_step`` for the formula and its source.

    Examples
    --------
    >>> import torch, fastrnn
    >>> m = torch.nn.LSTM(4, 8, num_layers=2)
    >>> x = torch.randn(5, 3, 4)
    >>> y, (h, c) = fastrnn.functional.lstm(x, None, list(m.parameters()))
    >>> bool(torch.allclose(y, m(x)[0], atol=1e-6))
    True
    """
    state = None if hx is None else list(hx)
    output, (h, c) = _sequence(
        "lstm",
        input,
        state,
        weights,
        batch_first,
        bidirectional,
        dropout,
        training,
        batch_sizes,
        recompute,
    )
    return output, (h, c)


def gru(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    batch_first: bool = False,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run a gated recurrent unit network over a batch of sequences.

    Parameters
    ----------
    input : Tensor of shape (T, B, I), (B, T, I) or (N, I)
        As for `lstm`.
    hx : Tensor of shape (L * D, B, H), or None
        Initial state, zeros if None.
    weights : sequence of Tensor
        As for `lstm`, with 3H rows, gates in the order r, z, n, and no ``weight_hr``.
    batch_first, bidirectional, dropout, training, batch_sizes, recompute
        As for `lstm`.

    Returns
    -------
    output : Tensor of shape (T, B, D * H), (B, T, D * H) or (N, D * H)
    h_n : Tensor of shape (L * D, B, H)

    Raises
    ------
    ValueError, RuntimeError
        As for `lstm`.

    Notes
    -----
    See ``fastrnn.reference.gru_step`` for the formula and its source.

    Examples
    --------
    >>> import torch, fastrnn
    >>> m = torch.nn.GRU(4, 8, bidirectional=True)
    >>> y, h = fastrnn.functional.gru(
    ...     torch.randn(5, 3, 4), None, list(m.parameters()), bidirectional=True
    ... )
    >>> y.shape, h.shape
    (torch.Size([5, 3, 16]), torch.Size([2, 3, 8]))
    """
    state = None if hx is None else [hx]
    output, (h,) = _sequence(
        "gru",
        input,
        state,
        weights,
        batch_first,
        bidirectional,
        dropout,
        training,
        batch_sizes,
        recompute,
    )
    return output, h


def rnn(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    batch_first: bool = False,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run an Elman network, h' = phi(W_ih x + b_ih + W_hh h + b_hh), over a batch of sequences.

    Parameters
    ----------
    input : Tensor of shape (T, B, I), (B, T, I) or (N, I)
        As for `lstm`.
    hx : Tensor of shape (L * D, B, H), or None
        Initial state, zeros if None.
    weights : sequence of Tensor
        As for `lstm`, with H rows and no ``weight_hr``.
    nonlinearity : {'tanh', 'relu', 'identity'}, default 'tanh'
        phi; 'identity' gives a linear network, which torch does not have.
    batch_first, bidirectional, dropout, training, batch_sizes, recompute
        As for `lstm`.

    Returns
    -------
    output : Tensor of shape (T, B, D * H), (B, T, D * H) or (N, D * H)
    h_n : Tensor of shape (L * D, B, H)

    Raises
    ------
    ValueError, RuntimeError
        As for `lstm`; ValueError for an unknown `nonlinearity`.

    Examples
    --------
    >>> import torch, fastrnn
    >>> m = torch.nn.RNN(4, 8, nonlinearity="relu")
    >>> x = torch.randn(5, 3, 4)
    >>> y, h = fastrnn.functional.rnn(x, None, list(m.parameters()), nonlinearity="relu")
    >>> bool(torch.allclose(y, m(x)[0], atol=1e-6))
    True
    """
    state = None if hx is None else [hx]
    output, (h,) = _sequence(
        _rnn_cell_name(nonlinearity),
        input,
        state,
        weights,
        batch_first,
        bidirectional,
        dropout,
        training,
        batch_sizes,
        recompute,
    )
    return output, h


def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one step of a long short-term memory cell.

    Parameters
    ----------
    input : Tensor of shape (B, I)
    hx : (h, c), both of shape (B, H), or None
        State before the step, zeros if None.
    w_ih, w_hh : Tensor of shape (4H, I) and (4H, H)
    b_ih, b_hh : Tensor of shape (4H,), optional
        Both or neither.

    Returns
    -------
    tuple of Tensor of shape (B, H)
        The state (h, c) after the step.

    Raises
    ------
    ValueError
        If only one bias is given, or the weights do not make a cell.
    RuntimeError
        If the input or the state does not fit them, or dtypes or devices differ.

    Examples
    --------
    >>> import torch, fastrnn
    >>> m = torch.nn.LSTMCell(4, 8)
    >>> h, c = fastrnn.functional.lstm_cell(torch.randn(3, 4), None, *m.parameters())
    >>> h.shape, c.shape
    (torch.Size([3, 8]), torch.Size([3, 8]))
    """
    state = None if hx is None else list(hx)
    h, c = _step("lstm", input, state, w_ih, w_hh, b_ih, b_hh)
    return h, c


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """Run one step of a gated recurrent unit.

    Parameters
    ----------
    input : Tensor of shape (B, I)
    hx : Tensor of shape (B, H), or None
        State before the step, zeros if None.
    w_ih, w_hh : Tensor of shape (3H, I) and (3H, H)
    b_ih, b_hh : Tensor of shape (3H,), optional
        Both or neither.

    Returns
    -------
    Tensor of shape (B, H)

    Raises
    ------
    ValueError, RuntimeError
        As for `lstm_cell`.

    Examples
    --------
    >>> import torch, fastrnn
    >>> m = torch.nn.GRUCell(4, 8)
    >>> fastrnn.functional.gru_cell(torch.randn(3, 4), None, *m.parameters()).shape
    torch.Size([3, 8])
    """
    return _step("gru", input, None if hx is None else [hx], w_ih, w_hh, b_ih, b_hh)[0]


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
) -> Tensor:
    """Run one step of an Elman cell.

    Parameters
    ----------
    input : Tensor of shape (B, I)
    hx : Tensor of shape (B, H), or None
        State before the step, zeros if None.
    w_ih, w_hh : Tensor of shape (H, I) and (H, H)
    b_ih, b_hh : Tensor of shape (H,), optional
        Both or neither.
    nonlinearity : {'tanh', 'relu', 'identity'}, default 'tanh'

    Returns
    -------
    Tensor of shape (B, H)

    Raises
    ------
    ValueError, RuntimeError
        As for `lstm_cell`; ValueError for an unknown `nonlinearity`.

    Examples
    --------
    >>> import torch, fastrnn
    >>> m = torch.nn.RNNCell(4, 8)
    >>> fastrnn.functional.rnn_cell(torch.randn(3, 4), None, *m.parameters()).shape
    torch.Size([3, 8])
    """
    state = None if hx is None else [hx]
    return _step(_rnn_cell_name(nonlinearity), input, state, w_ih, w_hh, b_ih, b_hh)[0]


def _rnn_cell_name(nonlinearity: str) -> str:
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(
            f"nonlinearity must be one of {', '.join(NONLINEARITIES)}, got {nonlinearity!r}"
        )
    return f"rnn_{nonlinearity}"


def _sequence(
    cell: str,
    input: Tensor,
    state: list[Tensor] | None,
    weights: Sequence[Tensor],
    batch_first: bool,
    bidirectional: bool,
    dropout: float,
    training: bool,
    batch_sizes: Tensor | None,
    recompute: bool,
) -> tuple[Tensor, Sequence[Tensor]]:
    """Check the arguments, plan, and run all layers; returns the output and the final states."""
    directions = 2 if bidirectional else 1
    weights = list(weights)
    per_direction = _check_weights(cell, weights, directions)
    num_layers = len(weights) // (directions * per_direction)
    hidden, size_h = weights[0].shape[0] // CELLS[cell].n_gates, weights[1].shape[1]
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be in [0, 1], got {dropout}")
    steps, batch = _check_input(input, weights[0].shape[1], batch_first, batch_sizes)
    widths = (size_h, hidden)[: CELLS[cell].n_states]
    shapes = [(num_layers * directions, batch, width) for width in widths]
    if state is not None:
        _check_state(cell, state, shapes)

    dtypes = ops.autocast_dtypes(cell, input, state or (), weights[:per_direction])
    if dtypes is not None:
        compute, of_h = dtypes
        with torch.autocast(input.device.type, enabled=False):
            output, final = _sequence(
                cell,
                input.to(compute),
                None if state is None else [part.to(compute) for part in state],
                [w.to(compute) for w in weights],
                batch_first,
                bidirectional,
                dropout,
                training,
                batch_sizes,
                recompute,
            )
        return output.to(of_h), [final[0].to(of_h), *final[1:]]

    path = choose_path(
        cell,
        (steps, batch, input.shape[-1], hidden),
        input,
        (*weights, *(state or ())),
        packed=batch_sizes is not None and is_ragged(batch_sizes),
        projected=size_h != hidden,
        layers=num_layers,
        directions=directions,
    )
    if recompute and path == "torch" and ops.differentiated(input, *weights, *(state or ())):
        path = "loop"  # torch's kernels keep everything
    if path != "torch":
        _check_alike(input, state or (), weights)
    return run_layers(
        path,
        cell,
        input,
        state or [],
        weights,
        per_direction > 3,
        num_layers,
        dropout,
        training,
        bidirectional,
        batch_first,
        batch_sizes,
        recompute,
    )


def run_layers(
    path: str,
    cell: str,
    input: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Sequence[Tensor]]:
    """Run all layers on a path, without checking the arguments.

    Parameters
    ----------
    path : str
        One of ``fastrnn.planner.PATHS``.
    cell : str
        Key of ``fastrnn.reference.CELLS``.
    input, state, weights, has_biases, num_layers, dropout, training, bidirectional, batch_first
        As torch's own functions have them; `state` is a sequence, empty for zeros.
    batch_sizes, recompute
        As for `lstm`.

    Returns
    -------
    output : Tensor
    final : sequence of Tensor
    """
    if not state and (path == "torch" or batch_sizes is not None):
        batch = input.shape[0 if batch_first else 1] if batch_sizes is None else int(batch_sizes[0])
        directions = 2 if bidirectional else 1
        state = reference.zero_state(cell, input, batch, weights, num_layers * directions)
    if path == "torch":
        hx = state if cell == "lstm" else state[0]
        options = (has_biases, num_layers, dropout, training, bidirectional)
        if batch_sizes is None:
            output, *final = ATEN_LAYERS[cell](input, hx, weights, *options, batch_first)
        else:
            output, *final = ATEN_LAYERS[cell](input, batch_sizes, hx, weights, *options)
        return output, final
    output, final = reference.stack(
        cell,
        input.transpose(0, 1) if batch_first else input,
        state,
        weights,
        num_layers,
        batch_sizes=batch_sizes,
        bidirectional=bidirectional,
        dropout=lambda y: torch.dropout(y, dropout, training),
        layer=partial(ops.layer, recompute=recompute) if path == "loop" else reference.layer,
    )
    return output.transpose(0, 1) if batch_first else output, final


def _step(
    cell: str,
    input: Tensor,
    state: list[Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> Sequence[Tensor]:
    """Plan, check the arguments of a cell, and run one step; returns the new states."""
    if (b_ih is None) != (b_hh is None):
        raise ValueError("b_ih and b_hh must be given both or neither")
    if input.dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {input.dim()}")
    weights = [w_ih, w_hh] if b_ih is None or b_hh is None else [w_ih, w_hh, b_ih, b_hh]
    _check_weights(cell, weights, 1)
    batch, hidden = input.shape[0], w_hh.shape[-1]
    if state is None:
        state = [input.new_zeros(batch, hidden)] * CELLS[cell].n_states
    _check_count(f"{cell}_cell", cell, state)
    path = choose_path(cell, (1, batch, input.shape[1], hidden), input, is_step=True)
    if path == "torch":
        return _aten_step(cell, input, state, weights)
    sizes = (batch, hidden, w_ih.shape[-1])
    if any((*part.shape, input.shape[1]) != sizes for part in state):
        # Refused in ATen's words.
        _aten_step(cell if cell in ATEN_STEPS else "rnn_tanh", input, state, weights)
        raise RuntimeError(f"hidden states must be of shape {(batch, hidden)}")

    step = ops.cell_step if path == "loop" else reference.cell_step
    dtypes = ops.autocast_dtypes(cell, input, state, weights)
    if dtypes is None:
        _check_alike(input, state, weights)
        return step(cell, input, state, weights)
    tensors = [t.to(dtypes[0]) for t in (*state, *weights)]
    state, weights = tensors[: len(state)], tensors[len(state) :]
    with torch.autocast(input.device.type, enabled=False):
        return step(cell, input.to(dtypes[0]), state, weights)


def _aten_step(
    cell: str, input: Tensor, state: list[Tensor], weights: list[Tensor]
) -> Sequence[Tensor]:
    """One step by ATen, which checks the arguments itself and knows autocast."""
    if cell == "lstm":
        return ATEN_STEPS[cell](input, state, *weights)
    return [ATEN_STEPS[cell](input, state[0], *weights)]


def choose_path(
    cell: str,
    sizes: tuple[int, int, int, int],
    input: Tensor,
    others: Sequence[Tensor | None] = (),
    *,
    packed: bool = False,
    projected: bool = False,
    is_step: bool = False,
    layers: int = 1,
    directions: int = 1,
) -> str:
    """Ask the planner for the path of one call.

    Parameters
    ----------
    cell : str
        Key of ``fastrnn.reference.CELLS``.
    sizes : (T, B, I, H)
    input : Tensor
    others : sequence of Tensor or None
        Weights and initial state: what else may need a gradient.
    packed, projected, is_step, layers, directions
        As for ``fastrnn.planner.Problem``.

    Returns
    -------
    str
        One of ``fastrnn.planner.PATHS``.
    """
    if torch.compiler.is_compiling():
        return planner.compiled_path(cell, input.dtype, is_step, ops.transformed())
    if torch._C._is_tracing():  # by torch.jit: sizes are tensors then
        return "torch" if cell in ATEN_LAYERS else "reference"
    return planner.path(
        cell,
        *sizes,
        input.dtype,
        ops.device_type(input),
        not is_step and ops.differentiated(input, *others),
        packed,
        projected,
        is_step,
        ops.transformed(),
        layers,
        directions,
        *((None, "tf32") if input.is_cpu else ops.gpu.facts(input)),
    )


def _check_weights(cell: str, weights: Sequence[Tensor], directions: int) -> int:
    """Raise unless the weights make whole layers; returns how many a direction has."""
    if [w.dim() for w in weights[:2]] != [2, 2]:
        raise ValueError(
            f"the weights of a {cell} layer begin with w_ih and w_hh, both 2-D; got "
            f"{len(weights)} weights of shapes {[tuple(w.shape) for w in weights[:2]]}"
        )
    biased = len(weights) > 2 and weights[2].dim() == 1
    at_hr = 4 if biased else 2
    width = weights[0].shape[0]
    # Not divmod, which sizes that torch.jit traces do not have.
    hidden, rest = width // CELLS[cell].n_gates, width % CELLS[cell].n_gates
    size_h = weights[1].shape[-1] if cell == "lstm" else hidden
    projected = size_h != hidden
    per_direction = at_hr + projected
    if rest or len(weights) % (directions * per_direction):
        raise ValueError(
            f"{len(weights)} weights, the first of shape {tuple(weights[0].shape)}, do not make "
            f"whole {cell} layers with {directions} direction(s) and {per_direction} weights each"
        )
    for start in range(0, len(weights), per_direction):
        first_layer = start < directions * per_direction
        size_in = weights[0].shape[1] if first_layer else size_h * directions
        expected = [(width, size_in), (width, size_h)] + [(width,), (width,)] * biased
        expected += [(size_h, hidden)] * projected
        for k, shape in enumerate(expected):
            if weights[start + k].shape != shape:
                raise ValueError(
                    f"weight {start + k} must be of shape {shape}, "
                    f"got {tuple(weights[start + k].shape)}"
                )
    return per_direction


def _check_input(
    input: Tensor, input_size: int, batch_first: bool, batch_sizes: Tensor | None
) -> tuple[int, int]:
    """Raise unless the input fits; returns T and B."""
    dims = 3 if batch_sizes is None else 2
    if input.dim() != dims:
        raise RuntimeError(f"input must have {dims} dimensions, got {input.dim()}")
    if input.shape[-1] != input_size:
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {input_size}, got {input.shape[-1]}"
        )
    if batch_sizes is not None:
        if batch_first:
            raise ValueError("batch_first cannot be used with batch_sizes")
        steps, batch = _check_batch_sizes(batch_sizes, input.shape[0])
    else:
        steps, batch = input.shape[:2]
        if batch_first:
            steps, batch = batch, steps
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    return steps, batch


def _check_batch_sizes(batch_sizes: Tensor, rows: int) -> tuple[int, int]:
    """Raise unless these are the sizes of T steps with `rows` rows in all; returns T and B."""
    if (batch_sizes.dim(), batch_sizes.device.type, batch_sizes.dtype) != (1, "cpu", torch.int64):
        raise ValueError(
            "batch_sizes must be a 1-D int64 tensor on the CPU, got "
            f"{batch_sizes.dim()}-D {batch_sizes.dtype} on {batch_sizes.device}"
        )
    if torch.compiler.is_compiling():
        return batch_sizes.shape[0], int(batch_sizes[0])
    sizes = batch_sizes.tolist()
    shrinking = all(a >= b for a, b in itertools.pairwise(sizes))
    if sizes and (not shrinking or sizes[-1] < 1 or sum(sizes) != rows):
        raise ValueError(
            f"batch_sizes must be positive, must not grow and must add up to the {rows} rows "
            f"of the input, got {sizes if len(sizes) <= 8 else [*sizes[:8], '...']}"
        )
    return len(sizes), sizes[0] if sizes else 0


def is_ragged(batch_sizes: Tensor) -> bool:
    """Tell whether the sequences of a packed batch differ in length.

    Parameters
    ----------
    batch_sizes : Tensor of shape (T,)

    Returns
    -------
    bool
        False also while a compiler traces, which must not ask for values.
    """
    return not torch.compiler.is_compiling() and bool(batch_sizes[0] != batch_sizes[-1])


def _check_state(
    cell: str, state: Sequence[Tensor], shapes: Sequence[tuple[int, int, int]]
) -> None:
    _check_count(cell, cell, state)
    for k, (part, shape) in enumerate(zip(state, shapes, strict=True)):
        if torch.compiler.is_compiling() and part.dim() == 3:
            # The batch of a packed sequence is known only when the graph runs, and checked then.
            torch._check(part.shape[1] == shape[1])
        if part.shape != shape:
            which = f"hidden[{k}]" if len(state) > 1 else "hidden"
            raise RuntimeError(f"Expected {which} size {shape}, got {list(part.shape)}")


def _check_count(name: str, cell: str, state: Sequence[Tensor]) -> None:
    # Only of the LSTM does the caller choose how many there are.
    if len(state) != CELLS[cell].n_states:
        raise RuntimeError(f"{name} expects two hidden states")


def _check_alike(input: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Raise unless all tensors share the device and dtype of the input."""
    for kind, tensors in (("hidden", state), ("parameter", weights)):
        for other in tensors:
            if other.device != input.device:
                raise RuntimeError(
                    f"Input and {kind} tensors are not at the same device, "
                    f"found input tensor at {input.device} and {kind} tensor at {other.device}"
                )
            if other.dtype != input.dtype:
                raise RuntimeError(
                    f"Input and {kind} tensors are not the same dtype, "
                    f"found input tensor with {input.dtype} and {kind} tensor with {other.dtype}"
                )
