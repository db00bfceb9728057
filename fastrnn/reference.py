"""Recurrent cells and one loop over them, in plain differentiable PyTorch.

This is the definition of what every other path computes: the oracle of the tests
and of ``fastrnn verify`` (run in float64), and the path that second derivatives
take. It is written to be read, not to be fast.

Shapes used in the whole package:

    T  time steps           B  batch            N  rows: T * B, or sum(lengths) if packed
    I  input features       H  hidden units     P  size of h: H, or proj_size for a projected LSTM
    G  gates of a cell      D  directions, 1 or 2

Gate order is PyTorch's: LSTM ``i, f, g, o``; GRU ``r, z, n``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

State = tuple[Tensor, ...]


class Weights(NamedTuple):
    """The weights of one direction of one layer; what a layer does not have is None."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None

    @classmethod
    def unpack(cls, flat: Sequence[Tensor]) -> Weights:
        """Name a flat list in the order of ``torch.nn.RNNBase``: ih, hh[, b_ih, b_hh][, hr].

        The four possible lengths are all different, so nothing else is needed:
        2 plain, 3 projection, 4 bias, 5 bias and projection.
        """
        w_ih, w_hh, *rest = flat
        w_hr = rest.pop() if len(rest) % 2 else None
        b_ih, b_hh = rest or (None, None)
        return cls(w_ih, w_hh, b_ih, b_hh, w_hr)


def lstm_step(wx: Tensor, rh: Tensor, state: State) -> State:
    """Long short-term memory; Hochreiter & Schmidhuber 1997, forget gate of Gers et al. 2000.

    i, f, o = sigmoid(wx + rh),  g = tanh(wx + rh),  c' = f * c + i * g,  h' = o * tanh(c')

    Parameters
    ----------
    wx, rh : Tensor of shape (B, 4H)
        Input part and recurrent part of the gates, each with its bias.
    state : tuple of Tensor of shape (B, H)
        h and c before the step.

    Returns
    -------
    tuple of Tensor
        The state after it.
    """
    i, f, g, o = (wx + rh).chunk(4, dim=-1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru_step(wx: Tensor, rh: Tensor, state: State) -> State:
    """Gated recurrent unit; Cho et al. 2014, with the reset gate applied after the recurrent
    product (version 1 of arXiv:1406.1078, also cuDNN's and torch.nn.GRU's form).

    r, z = sigmoid(wx + rh),  n = tanh(wx_n + r * rh_n),  h' = (1 - z) * n + z * h

    Parameters
    ----------
    wx, rh : Tensor of shape (B, 3H)
        Input part and recurrent part of the gates, each with its bias.
    state : tuple of Tensor of shape (B, H)
        h before the step.

    Returns
    -------
    tuple of Tensor
        The state after it.
    """
    wx_r, wx_z, wx_n = wx.chunk(3, dim=-1)
    rh_r, rh_z, rh_n = rh.chunk(3, dim=-1)
    z = torch.sigmoid(wx_z + rh_z)
    n = torch.tanh(wx_n + torch.sigmoid(wx_r + rh_r) * rh_n)
    return ((1 - z) * n + z * state[0],)


def rnn_step(phi: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, State], State]:
    """Make the step of an Elman network (Elman 1990): h' = phi(wx + rh).

    Parameters
    ----------
    phi : callable
        The activation.

    Returns
    -------
    callable
        Takes wx and rh of shape (B, H) and a state of one such tensor, as `gru_step` does.
    """
    return lambda wx, rh, state: (phi(wx + rh),)


class Cell(NamedTuple):
    """What every path must know about a cell."""

    name: str
    n_gates: int
    n_states: int
    step: Callable[[Tensor, Tensor, State], State]


CELLS = {
    cell.name: cell
    for cell in (
        Cell("lstm", 4, 2, lstm_step),
        Cell("gru", 3, 1, gru_step),
        Cell("rnn_tanh", 1, 1, rnn_step(torch.tanh)),
        Cell("rnn_relu", 1, 1, rnn_step(torch.relu)),
        Cell("rnn_identity", 1, 1, rnn_step(lambda pre: pre)),
    )
}


def cell_step(cell: str, x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor]) -> State:
    """One step of a cell from its input: the two affine maps, then the pointwise part.

    Parameters
    ----------
    cell : str
        Key of ``CELLS``.
    x : Tensor of shape (B, I)
    state : sequence of Tensor of shape (B, P) and, for LSTM, (B, H)
    weights : sequence of Tensor
        One direction, in the order of ``torch.nn.RNNBase``.

    Returns
    -------
    tuple of Tensor
        The new state, shaped as `state`.
    """
    w = Weights.unpack(weights)
    wx = torch.nn.functional.linear(x, w.w_ih, w.b_ih)
    rh = torch.nn.functional.linear(state[0], w.w_hh, w.b_hh)
    h, *rest = CELLS[cell].step(wx, rh, tuple(state))
    return (h if w.w_hr is None else h @ w.w_hr.t(), *rest)


def zero_state(
    cell: str, x: Tensor, batch: int, weights: Sequence[Tensor], directions: int
) -> list[Tensor]:
    """Make the initial state of zeros of one layer.

    Parameters
    ----------
    cell : str
        Key of ``CELLS``.
    x : Tensor
        Gives dtype and device.
    batch : int
    weights : sequence of Tensor
        Of the layer, as for `layer`.
    directions : int

    Returns
    -------
    list of Tensor of shape (D, B, P) and, for LSTM, (D, B, H)
    """
    widths = weights[1].shape[1], weights[0].shape[0] // CELLS[cell].n_gates
    return [x.new_zeros(directions, batch, width) for width in widths[: CELLS[cell].n_states]]


def layer(
    cell: str,
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
    bidirectional: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """One layer over a whole sequence, in one or both directions.

    Parameters
    ----------
    cell : str
        Key of ``CELLS``.
    x : Tensor of shape (T, B, I), or (N, I) with `batch_sizes`
    state : sequence of Tensor of shape (D, B, P) and, for LSTM, (D, B, H)
        Initial state, zeros if empty.
    weights : sequence of Tensor
        All directions one after another, each in the order of ``torch.nn.RNNBase``.
    batch_sizes : Tensor of shape (T,), optional
        Rows alive at each step, never increasing, as in ``PackedSequence``.
    bidirectional : bool, default False

    Returns
    -------
    y : Tensor of shape (T, B, D * P), or (N, D * P)
    final : list of Tensor
        State after the last step of every row, shaped as `state`.
    """
    sizes = [x.shape[1]] * x.shape[0] if batch_sizes is None else batch_sizes.tolist()
    steps = x.flatten(0, -2).split(sizes)
    directions = 2 if bidirectional else 1
    state = state or zero_state(cell, x, sizes[0], weights, directions)
    per_direction = len(weights) // directions
    ys, finals = [], []
    for d in range(directions):
        w = weights[d * per_direction : (d + 1) * per_direction]
        s = tuple(part[d] for part in state)
        outputs: list[Tensor] = []
        for x_t in reversed(steps) if d else steps:
            n = x_t.shape[0]
            new = cell_step(cell, x_t, tuple(part[:n] for part in s), w)
            s = tuple(torch.cat([a, b[n:]]) for a, b in zip(new, s, strict=True))
            outputs.append(new[0])
        ys.append(torch.cat(outputs[::-1] if d else outputs))
        finals.append(s)
    y = torch.cat(ys, dim=-1).unflatten(0, x.shape[:-1])
    return y, [torch.stack(parts) for parts in zip(*finals, strict=True)]


def stack(
    cell: str,
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    num_layers: int,
    *,
    batch_sizes: Tensor | None = None,
    bidirectional: bool = False,
    dropout: Callable[[Tensor], Tensor] = lambda y: y,
    layer: Callable[..., tuple[Tensor, list[Tensor]]] = layer,
) -> tuple[Tensor, list[Tensor]]:
    """Several layers, `dropout` between them: what a whole ``torch.nn.LSTM`` computes.

    Parameters
    ----------
    cell, x
        As for `layer`.
    state, weights : sequence of Tensor
        As for `layer`, of all layers one after another.
    num_layers : int
    batch_sizes, bidirectional
        As for `layer`.
    dropout : callable
        Applied to the output of every layer but the last.
    layer : callable
        Another path's function in place of the `layer` of this file.

    Returns
    -------
    y : Tensor
        Output of the last layer.
    final : list of Tensor
        Shaped as `state`.
    """
    if num_layers == 1:
        return layer(cell, x, state, weights, batch_sizes, bidirectional)
    directions = 2 if bidirectional else 1
    per_layer = len(weights) // num_layers
    finals = []
    for k in range(num_layers):
        s = [part[k * directions : (k + 1) * directions] for part in state]
        w = weights[k * per_layer : (k + 1) * per_layer]
        x, final = layer(cell, x if k == 0 else dropout(x), s, w, batch_sizes, bidirectional)
        finals.append(final)
    return x, [torch.cat(parts) for parts in zip(*finals, strict=True)]
