"""Stateless recurrent layers and cells: weights are arguments.

The modules in ``fastrnn.nn`` hold parameters and call these functions. Arguments are checked
here before our own paths run; torch's kernels check dtypes and devices themselves. Error
messages are torch's where torch has one for the case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .checks import checked, checked_step
from .options import Options, States
from .paths import run, run_step

__all__ = [
    "Options",
    "States",
    "gru",
    "gru_cell",
    "lstm",
    "lstm_cell",
    "rnn",
    "rnn_cell",
    "sequence",
    "step",
]

NONLINEARITIES = ("tanh", "relu", "identity")


def sequence(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    options: Options = Options(),  # noqa: B008
) -> tuple[Any, ...]:
    """Check the arguments, plan, and run all layers of any cell.

    Parameters
    ----------
    cell : str
        Key of ``fastrnn.cells.CELLS``.
    input : Tensor
    hx : sequence of Tensor, or None
        Initial state, zeros if None: for each of the cell's states a tensor of shape
        (L * D, B, P) or (L * D, B, H).
    weights : sequence of Tensor
        As for `lstm`, with the cell's extra weights at the end of each direction.
    options : Options

    Returns
    -------
    output : Tensor
    final : sequence of Tensor
        Shaped as `hx`.
    states : States
        Only if ``options.return_states``.

    Raises
    ------
    ValueError, RuntimeError
        As for `lstm`.
    """
    return run(checked(cell, input, hx, weights, options))


def step(
    cell: str, input: Tensor, hx: Sequence[Tensor] | None, weights: Sequence[Tensor | None]
) -> Sequence[Tensor]:
    """Check the arguments, plan, and run one step of any cell.

    Parameters
    ----------
    cell : str
        Key of ``fastrnn.cells.CELLS``.
    input : Tensor of shape (B, I)
    hx : sequence of Tensor of shape (B, H), or None
        Each state before the step, zeros if None.
    weights : sequence of Tensor
        In the order of `lstm_cell`, with None for a missing bias, followed by the cell's extra
        weights.

    Returns
    -------
    sequence of Tensor of shape (B, H)
        Each state after the step.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As for `lstm_cell`.
    """
    return run_step(checked_step(cell, input, hx, weights))


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
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_state: Sequence[Tensor] | None = None,
    return_states: bool | str = False,
    bptt: int | None = None,
    recompute: bool | int = False,
    recurrent_dropout: float = 0.0,
    zoneout: float | Sequence[float] = 0.0,
    num_heads: int = 1,
) -> Any:
    """Run a long short-term memory network over a batch of sequences.

    Parameters
    ----------
    input : Tensor of shape (T, B, I), (B, T, I) or (N, I)
        (T, B, I), or (B, T, I) if `batch_first`; (N, I), the data of a packed sequence, if
        `batch_sizes` is given.
    hx : (h_0, c_0) of shapes (L * D, B, P) and (L * D, B, H), or None
        Initial state, zeros if None. L is the number of layers and D of directions; P is H, or the
        projected size.
    weights : sequence of Tensor
        In the order of the parameters of ``torch.nn.LSTM``, for each direction of each layer:
        ``weight_ih`` (4H, I) and ``weight_hh`` (4H, P), then the optional biases ``bias_ih`` and
        ``bias_hh`` (4H,), then, if h is projected, ``weight_hr`` (P, H). Gates are in the order
        i, f, g, o. The number of layers follows from the length of the sequence.
    batch_first : bool, default False
        Whether `input` and `output` are (B, T, features). Not with `batch_sizes`.
    bidirectional : bool, default False
        Whether each layer runs in both directions: D = 2 instead of 1.
    dropout : float, default 0.0
        Probability of zeroing an element of the output of each layer but the last, if `training`.
        The masks are drawn from torch's generator, as in torch.nn.
    training : bool, default False
        Whether dropout, recurrent dropout and zoneout are in training mode.
    batch_sizes : int64 Tensor of shape (T,) on the CPU, optional
        Number of sequences at each step, non-increasing, as in ``PackedSequence``.
    lengths : integer Tensor of shape (B,), optional
        Number of steps of each sequence, from 0 to T, in any order, on the device of `input` or on
        the CPU. Past its last step the output of a sequence is 0. Its final state is the one after
        its last step, or the initial state if it has no steps, and the reverse direction starts at
        its last step. Lengths on a GPU are not copied to the host, so one that is out of range
        does not raise an error: it sets the results of that sequence to NaN.
    reset : bool Tensor of shape (T, B), or (B, T) if `batch_first`, optional
        True where a new sequence starts at x_t: the state is reset before x_t is consumed. Neither
        values nor gradients cross the boundary between t - 1 and t, in either direction.
    reset_state : (h, c) of shapes (L * D, B, P) and (L * D, B, H), optional
        State after a reset, zeros if None. B may be 1 for a state that all sequences share, such
        as a learned one.
    return_states : bool or 'gates', default False
        Whether to return the states of all steps as well, or states and gates. All of them are
        differentiable.
    bptt : int, optional
        Truncated backpropagation through time: states carry over, but gradients are cut after
        every `bptt` steps, counted from the first step, in both directions.
    recompute : bool or int, default False
        Whether to store less between forward and backward. With True, no gates are kept: a layer
        keeps its input only, and on a GPU its output and cell states. Backward recomputes the
        rest, on a GPU with one more product over all steps, on a CPU with another forward pass. A
        number does this in chunks of that many steps, so that backward also needs memory for one
        chunk only.
    recurrent_dropout : float, default 0.0
        Probability of zeroing an element of h in the recurrent product, if `training`, with one
        mask for all steps of a sequence (Gal and Ghahramani 2016, arXiv:1512.05287), drawn from
        torch's generator.
    zoneout : float or (float, float), default 0.0
        Probability that an element of h (and of c, for an LSTM) keeps its previous value at a step
        (Krueger et al. 2017, arXiv:1606.01305). If not `training`, the expected value is used.
    num_heads : int, default 1
        Number of heads. With more than one the recurrent weights are block-diagonal: the units are
        split into this many heads, and ``weight_hh``, of shape (4H, H / num_heads), connects only
        units of the same head.

    Returns
    -------
    output : Tensor of shape (T, B, D * P), (B, T, D * P) or (N, D * P)
    (h_n, c_n) : tuple of Tensor, shaped as `hx`
        State after the last step of each sequence, in new tensors that may be written to.
    states : States
        Only if `return_states`.

    Raises
    ------
    TypeError
        If a weight is not a tensor.
    ValueError
        If the weights or the options are inconsistent.
    RuntimeError
        If the shape, dtype or device of `input` or `hx` does not fit the weights, or T is 0.

    Notes
    -----
    For the formula and its source see ``fastrnn.cells.lstm``.

    Examples
    --------
    >>> import torch, fastrnn
    >>> m = torch.nn.LSTM(4, 8, num_layers=2)
    >>> x = torch.randn(5, 3, 4)
    >>> y, (h, c) = fastrnn.functional.lstm(x, None, list(m.parameters()))
    >>> bool(torch.allclose(y, m(x)[0], atol=1e-6))
    True
    """
    options = Options(
        batch_first, bidirectional, dropout, training, batch_sizes, lengths, reset, reset_state,
        return_states, bptt, recompute, recurrent_dropout, zoneout, num_heads,
    )  # fmt: skip
    output, (h, c), *states = sequence("lstm", input, hx, weights, options)
    return output, (h, c), *states


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
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_state: Tensor | None = None,
    return_states: bool | str = False,
    bptt: int | None = None,
    recompute: bool | int = False,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    num_heads: int = 1,
) -> Any:
    """Run a gated recurrent unit network over a batch of sequences.

    Parameters
    ----------
    input : Tensor of shape (T, B, I), (B, T, I) or (N, I)
        As for `lstm`.
    hx : Tensor of shape (L * D, B, H), or None
        Initial state, zeros if None.
    weights : sequence of Tensor
        As for `lstm`, with 3H rows, gates in the order r, z, n, and no ``weight_hr``.
    batch_first, bidirectional, dropout, training, batch_sizes, lengths, reset, reset_state
        As for `lstm`; `reset_state` is one tensor.
    return_states, bptt, recompute, recurrent_dropout, zoneout, num_heads
        As for `lstm`.

    Returns
    -------
    output : Tensor of shape (T, B, D * H), (B, T, D * H) or (N, D * H)
    h_n : Tensor of shape (L * D, B, H)
    states : States
        Only if `return_states`.

    Raises
    ------
    ValueError, RuntimeError
        As for `lstm`.

    Notes
    -----
    For the formula and its source see ``fastrnn.cells.gru``.

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
    options = Options(
        batch_first, bidirectional, dropout, training, batch_sizes, lengths, reset,
        _in_list(reset_state), return_states, bptt, recompute, recurrent_dropout, zoneout,
        num_heads,
    )  # fmt: skip
    output, (h,), *states = sequence("gru", input, _in_list(hx), weights, options)
    return output, h, *states


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
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_state: Tensor | None = None,
    return_states: bool | str = False,
    bptt: int | None = None,
    recompute: bool | int = False,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    num_heads: int = 1,
) -> Any:
    """Run an Elman network over a batch of sequences: ``h' = phi(W_ih x + b_ih + W_hh h + b_hh)``.

    Parameters
    ----------
    input : Tensor of shape (T, B, I), (B, T, I) or (N, I)
        As for `lstm`.
    hx : Tensor of shape (L * D, B, H), or None
        Initial state, zeros if None.
    weights : sequence of Tensor
        As for `lstm`, with H rows and no ``weight_hr``.
    nonlinearity : {'tanh', 'relu', 'identity'}, default 'tanh'
        phi; 'identity' makes the network linear, which torch does not support.
    batch_first, bidirectional, dropout, training, batch_sizes, lengths, reset, reset_state
        As for `lstm`; `reset_state` is one tensor.
    return_states, bptt, recompute, recurrent_dropout, zoneout, num_heads
        As for `lstm`.

    Returns
    -------
    output : Tensor of shape (T, B, D * H), (B, T, D * H) or (N, D * H)
    h_n : Tensor of shape (L * D, B, H)
    states : States
        Only if `return_states`.

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
    options = Options(
        batch_first, bidirectional, dropout, training, batch_sizes, lengths, reset,
        _in_list(reset_state), return_states, bptt, recompute, recurrent_dropout, zoneout,
        num_heads,
    )  # fmt: skip
    output, (h,), *states = sequence(
        _rnn_cell_name(nonlinearity), input, _in_list(hx), weights, options
    )
    return output, h, *states


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
    TypeError
        If a weight is not a tensor.
    ValueError
        If only one bias is given, or the shapes of the weights are inconsistent.
    RuntimeError
        If `input` or `hx` does not fit the weights, or dtypes or devices differ.

    Examples
    --------
    >>> import torch, fastrnn
    >>> m = torch.nn.LSTMCell(4, 8)
    >>> h, c = fastrnn.functional.lstm_cell(torch.randn(3, 4), None, *m.parameters())
    >>> h.shape, c.shape
    (torch.Size([3, 8]), torch.Size([3, 8]))
    """
    h, c = step("lstm", input, hx, (w_ih, w_hh, b_ih, b_hh))
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
    return step("gru", input, _in_list(hx), (w_ih, w_hh, b_ih, b_hh))[0]


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
        As for `rnn`.

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
    name = _rnn_cell_name(nonlinearity)
    return step(name, input, _in_list(hx), (w_ih, w_hh, b_ih, b_hh))[0]


def _rnn_cell_name(nonlinearity: str) -> str:
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(
            f"nonlinearity must be one of {', '.join(NONLINEARITIES)}, got {nonlinearity!r}"
        )
    return f"rnn_{nonlinearity}"


def _in_list(state: Tensor | None) -> list[Tensor] | None:
    return None if state is None else [state]
