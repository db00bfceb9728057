"""The record of a call of recurrent layers, and the records of its results and gradients.

A `Call` is created and checked once (``checks.py``) and passed down to the kernels unchanged: the
planner, every path, gradients and transforms take it. Each layer of a stack, and each head of a
layer, is also described by a `Call`.

Shapes used throughout the package:

    T  time steps           B  batch            N  rows: T * B, or sum(lengths) if packed
    I  input features       H  hidden units     P  size of h: H, or proj_size for a projected LSTM
    G  gates of a cell      D  directions, 1 or 2

Gate order is PyTorch's: LSTM ``i, f, g, o``; GRU ``r, z, n``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .cells import Cell
from .context import is_traced, untraced
from .flow import PLAIN, Flow
from .options import Options

_NO_OPTIONS = Options()


class Weights(NamedTuple):
    """The weights of one direction of one layer, None for those it does not have."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None
    extras: tuple[Tensor, ...] = ()

    @classmethod
    def unpack(cls, flat: Sequence[Tensor], n_extras: int = 0) -> Weights:
        """Unpack a list: ih, hh[, b_ih, b_hh][, hr], as in ``torch.nn.RNNBase``, then extras.

        The length of the first part determines what it contains: 2 plain, 3 projection, 4 biases,
        5 biases and projection.
        """
        count = len(flat) - n_extras
        w_ih, w_hh, *rest = flat[:count]
        w_hr = rest.pop() if len(rest) % 2 else None
        b_ih, b_hh = rest or (None, None)
        return cls(w_ih, w_hh, b_ih, b_hh, w_hr, tuple(flat[count:]))

    def blocks(self) -> tuple[Tensor, ...]:
        """Split the extra weights into blocks of H elements, as a cell's functions take them."""
        hidden = self.w_hh.shape[1] if self.w_hr is None else self.w_hr.shape[1]
        return tuple(block for extra in self.extras for block in extra.split(hidden))


class Known:
    """What is cached for calls with the same sizes and numeric arguments.

    Attributes
    ----------
    num_layers : int
    paths : dict
        Paths that the planner chose, keyed by everything else the choice depends on.
    steps : dict
        Functions that run single steps with gradients, keyed in the same way.
    """

    __slots__ = ("num_layers", "paths", "steps")

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.paths: dict[Any, str] = {}
        self.steps: dict[Any, Any] = {}


class Call(NamedTuple):
    """A call of one or several layers.

    Attributes
    ----------
    cell : Cell
    x : Tensor of shape (T, B, I), or (N, I) with `batch_sizes`
        (B, I) for a single step.
    state : sequence of Tensor of shape (L * D, B, P) and, for the other states, (L * D, B, H)
        Initial state, zeros if empty; (B, P) and (B, H) for a single step.
    weights : sequence of Tensor
        For each direction of each layer, the weights in the order of ``torch.nn.RNNBase``, then
        the cell's extra weights. With heads, w_hh is (G * H, H / heads). In an ensemble the weights
        have a leading dimension of members, and the batch is the concatenation of the members'
        batches.
    batch_sizes : int64 Tensor of shape (T,) on the CPU, optional
        Number of rows at each step, non-increasing, as in ``PackedSequence``; only with a plain
        `flow`.
    bidirectional : bool
    flow : Flow
        Its `fresh` and `noise` cover all layers, one after another.
    num_layers : int
    options : Options
        The options that are applied around the layers.
    known : Known, optional
        Set on calls that ``checks.py`` made, unless a compiler or torch.jit traces them.
    """

    cell: Cell
    x: Tensor
    state: Sequence[Tensor]
    weights: Sequence[Tensor]
    batch_sizes: Tensor | None = None
    bidirectional: bool = False
    flow: Flow = PLAIN
    num_layers: int = 1
    options: Options = _NO_OPTIONS
    known: Known | None = None

    @property
    def directions(self) -> int:
        """D."""
        return 2 if self.bidirectional else 1

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.weights[0].shape[-2] // len(self.cell.gates)

    @property
    def size_h(self) -> int:
        """P."""
        return self.weights[1].shape[-1] if self.is_projected else self.hidden_size

    @property
    @untraced
    def num_heads(self) -> int:
        """The number of diagonal blocks of the recurrent weights."""
        return 1 if self.is_projected else max(1, self.hidden_size // self.weights[1].shape[-1])

    @property
    def members(self) -> int:
        """The number of members of the ensemble; 0 if the call is not one of an ensemble."""
        return self.weights[0].shape[0] if self.weights[0].dim() == 3 else 0

    @property
    def steps(self) -> int:
        """T."""
        return self.x.shape[0] if self.batch_sizes is None else self.batch_sizes.shape[0]

    @property
    def batch(self) -> int:
        """B."""
        if self.batch_sizes is None:
            return self.x.shape[1]
        # torch.jit would record a number as a constant.
        first: Any = self.batch_sizes[0]
        return first if is_traced() else int(first)

    @property
    def n_weights(self) -> int:
        """The number of weights of one direction of a layer."""
        return len(self.weights) // (self.num_layers * (2 if self.bidirectional else 1))

    @property
    def is_projected(self) -> bool:
        """Whether h is projected."""
        return (self.n_weights - len(self.cell.extras)) % 2 > 0

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that may need a gradient."""
        return [self.x, *self.state, *self.weights, *self.flow.fresh]

    def shapes(self) -> list[tuple[int, int, int]]:
        """Shapes of the states."""
        count, batch = self.num_layers * self.directions, self.batch
        of_others = (count, batch, self.hidden_size)
        return [(count, batch, self.size_h)] + [of_others] * (len(self.cell.states) - 1)

    def initial(self) -> list[Tensor]:
        """The state before the first step, zeros if none was given; not to be written to."""
        if self.state:
            return list(self.state)
        # Not by `shapes`, whose properties take longer than creating the zeros.
        count, batch = self.num_layers * (2 if self.bidirectional else 1), self.batch
        h = other = self.x.new_zeros(count, batch, self.size_h)
        n_others = len(self.cell.states) - 1
        if n_others and self.is_projected:
            other = self.x.new_zeros(count, batch, self.hidden_size)
        return [h] + [other] * n_others

    def by_direction(self) -> list[Weights]:
        """The weights of every direction of every layer."""
        count, n_extras = self.n_weights, len(self.cell.extras)
        return [
            Weights.unpack(self.weights[start : start + count], n_extras)
            for start in range(0, len(self.weights), count)
        ]

    def layer(self, k: int, x: Tensor) -> Call:
        """Make the call of layer `k`, whose input is `x`."""
        if self.num_layers == 1:
            return self if x is self.x else self._replace(x=x)
        of_k = slice(k * self.directions, (k + 1) * self.directions)
        count = self.directions * self.n_weights
        flow = self.flow if self.flow is PLAIN else self.flow.some(of_k)
        state, weights = [s[of_k] for s in self.state], self.weights[k * count : (k + 1) * count]
        return self._replace(x=x, state=state, weights=weights, flow=flow, num_layers=1)

    # As one list of tensors, as autograd and torch.func keep them.

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """The numbers of state, weight, fresh-state and noise tensors in `flat`."""
        return len(self.state), len(self.weights), len(self.flow.fresh), len(self.flow.noise)

    def flat(self) -> list[Tensor | None]:
        """All tensors: x, marks, sizes, then state, weights, fresh states and noise."""
        marks, fresh, noise = self.flow
        return [self.x, marks, self.batch_sizes, *self.state, *self.weights, *fresh, *noise]

    def with_flat(self, flat: Sequence[Any]) -> Call:
        """Make the same call with other tensors, in the order of `flat`."""
        x, marks, batch_sizes, *rest = flat
        state, weights, fresh, noise = split(rest, self.counts)
        flow = Flow(marks, fresh, noise)
        return self._replace(x=x, state=state, weights=weights, batch_sizes=batch_sizes, flow=flow)

    def without_tensors(self) -> Call:
        """Make the same call without tensors, to be filled in by `with_flat`."""
        nothing: Any = None
        state, weights, fresh, noise = ([nothing] * count for count in self.counts)
        flow = Flow(None, fresh, noise)
        return Call(self.cell, nothing, state, weights, None, self.bidirectional, flow)


def split(flat: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    """Split a list into parts.

    Parameters
    ----------
    flat : sequence
    counts : sequence of int
        Number of elements of each part; remaining elements are dropped.

    Returns
    -------
    list of list
    """
    parts = iter(flat)
    return [[next(parts) for _ in range(count)] for count in counts]


class Result(NamedTuple):
    """The results of a layer.

    Attributes
    ----------
    y : Tensor of shape (T, B, D * P), or (N, D * P)
    final : list of Tensor of shape (D, B, P) and, for the other states, (D, B, H)
        State after the last step of every row.
    traces : list of Tensor of shape (T, B, D * H), or (N, D * H)
        The states other than h after every step; empty if the cell has none, or if they were not
        requested.
    """

    y: Tensor
    final: list[Tensor]
    traces: list[Tensor]


class Cotangents(NamedTuple):
    """Gradients with respect to the results of a layer.

    Attributes
    ----------
    dy : Tensor shaped as y, or None
        None if nothing depends on the output.
    d_final : sequence of Tensor
    d_traces : sequence of Tensor
        Empty if there are none.
    """

    dy: Tensor | None
    d_final: Sequence[Tensor]
    d_traces: Sequence[Tensor] = ()


class Asked(NamedTuple):
    """The gradients that are requested, besides those of states.

    Attributes
    ----------
    x, weights : bool
    groups : int
        If positive, the batch is the concatenation of this many parts, each with its own weight
        gradients.
    """

    x: bool = True
    weights: bool = True
    groups: int = 0


class Gradients(NamedTuple):
    """Gradients with respect to the arguments of a layer.

    Attributes
    ----------
    dx : Tensor shaped as x, or None if it was not requested
    d_state : list of Tensor
        Gradients of the initial state, whether it was given or not.
    d_fresh : list of Tensor
        Gradients of the states after a reset, if they were given.
    d_weights : list of Tensor
        Empty if they were not requested; of shape (groups, ...) with groups.
    """

    dx: Tensor | None
    d_state: list[Tensor]
    d_fresh: list[Tensor]
    d_weights: list[Tensor]
