"""Stateless recurrent layers and cells: weights in, results out.

The modules of ``fastrnn.nn`` keep parameters and call these functions. Arguments are
checked here before our own paths run; torch's own kernels check dtypes and devices
themselves. The texts of the errors are torch's where torch has one.
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
        The initial state, a tensor of shape (L * D, B, ·) for each that the cell has.
    weights : sequence of Tensor
        As for `lstm`, with the cell's extra weights last in each direction.
    options : Options

    Returns
    -------
    output : Tensor
    final : sequence of Tensor
        Shaped as `hx`.
    states : States
        Only if asked for.

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
        As for `lstm_cell`, in its order, None for a bias that there is not; then the cell's extra
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
    lengths : integer Tensor of shape (B,), optional
        Steps of each row, from 0 to T, in any order, on the device of `input`. Beyond them the
        output is 0, the final state is that after a row's last step (the initial one if it has
        none), and the reverse direction begins at each row's own end. Nothing waits for the
        device; so on a GPU a length out of range is not an error, but makes the row NaN.
    reset : bool Tensor of shape (T, B), or (B, T) if `batch_first`, optional
        Whether a new sequence begins with x_t: the state is reset before x_t is consumed. Neither
        values nor gradients pass from the steps before to those from t on; nor, in the reverse
        direction, from those to the steps before.
    reset_state : (h, c) of shapes (L * D, B, P) and (L * D, B, H), optional
        The state after a reset, zeros if None; B may be 1, for a state that all rows share, such
        as a learned one.
    return_states : bool or 'gates', default False
        Whether to return the states of all steps too, or also the gates; gradients pass through
        all of them.
    bptt : int, optional
        Truncated backpropagation through time: gradients stop after every `bptt` steps, counted
        from the first, states go on. In both directions.
    recompute : bool or int, default False
        Whether to keep less memory between forward and backward. True keeps, on a GPU of each
        layer its output and cell states, without the gates, on a CPU the output; backward computes
        the rest again, on a GPU with one more product over all steps, on a CPU with another
        forward. A number does this in chunks of so many steps, so that backward too needs no more
        than what one chunk takes.
    recurrent_dropout : float, default 0.0
        Probability to zero an element of h in the recurrent product, when `training`; one mask for
        all steps of a sequence (Gal and Ghahramani 2016, arXiv:1512.05287), drawn from torch's
        generator.
    zoneout : float or (float, float), default 0.0
        Probability that an element of h (and of c, for an LSTM) keeps its old value at a step
        (Krueger et al. 2017, arXiv:1606.01305); when not `training` the mean of both.
    num_heads : int, default 1
        If more, the recurrent weights are block-diagonal: the units fall into so many heads, and
        ``weight_hh``, then of shape (4H, H / num_heads), connects those of the same head.

    Returns
    -------
    output : Tensor of shape (T, B, D * P), (B, T, D * P) or (N, D * P)
    (h_n, c_n) : tuple of Tensor, shaped as `hx`
        State after each row's last step; fresh tensors that may be written to.
    states : States
        Only if `return_states`.

    Raises
    ------
    TypeError
        If a weight is not a tensor.
    ValueError
        If a weight, or an option, does not fit the others.
    RuntimeError
        If `input` or `hx` does not fit the weights, in shape, dtype or device, or T is 0.

    Notes
    -----
    See ``fastrnn.cells.lstm`` for the formula and its source.

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
    See ``fastrnn.cells.gru`` for the formula and its source.

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
