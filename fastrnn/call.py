"""A call of recurrent layers as one record, and what comes of it.

Made and checked once (``checks.py``), it goes down to the kernels as it is: the planner, every
path, gradients and transforms take it. A layer of a stack, or a head of a layer, is a call of its
own.

Shapes used in the whole package:

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
    """The weights of one direction of one layer; what a layer does not have is None."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None
    extras: tuple[Tensor, ...] = ()

    @classmethod
    def unpack(cls, flat: Sequence[Tensor], n_extras: int = 0) -> Weights:
        """Name a flat list: ih, hh[, b_ih, b_hh][, hr], as in ``torch.nn.RNNBase``, then extras.

        The four possible lengths of the first part are all different, so nothing else is needed:
        2 plain, 3 projection, 4 bias, 5 bias and projection.
        """
        count = len(flat) - n_extras
        w_ih, w_hh, *rest = flat[:count]
        w_hr = rest.pop() if len(rest) % 2 else None
        b_ih, b_hh = rest or (None, None)
        return cls(w_ih, w_hh, b_ih, b_hh, w_hr, tuple(flat[count:]))

    def blocks(self) -> tuple[Tensor, ...]:
        """The extra weights in blocks of H elements, as a cell's functions take them."""
        hidden = self.w_hh.shape[1] if self.w_hr is None else self.w_hr.shape[1]
        return tuple(block for extra in self.extras for block in extra.split(hidden))


class Known:
    """What is remembered of calls of the same sizes and numbers.

    Attributes
    ----------
    num_layers : int
    paths : dict
        Those that the planner chose, by what else it depends on.
    steps : dict
        What runs single steps with gradients, likewise.
    """

    __slots__ = ("num_layers", "paths", "steps")

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.paths: dict[Any, str] = {}
        self.steps: dict[Any, Any] = {}


class Call(NamedTuple):
    """A call of one layer or of several.

    Attributes
    ----------
    cell : Cell
    x : Tensor of shape (T, B, I), or (N, I) with `batch_sizes`
        Of a single step, (B, I).
    state : sequence of Tensor of shape (L * D, B, P) and, of the other states, (L * D, B, H)
        Initial state, zeros if empty; of a single step, (B, P) and (B, H).
    weights : sequence of Tensor
        Of all layers and in them of all directions one after another, each in the order of
        ``torch.nn.RNNBase``, then the cell's extra weights. With heads, w_hh is
        (G * H, H / heads). Those of the members of an ensemble have one more dimension in front;
        then the batch consists of that of each member, one after another.
    batch_sizes : int64 Tensor of shape (T,) on the CPU, optional
        Rows alive at each step, never increasing, as in ``PackedSequence``; only with a plain
        `flow`.
    bidirectional : bool
    flow : Flow
        With `fresh` and `noise` of all layers one after another.
    num_layers : int
    options : Options
        What surrounds the layers.
    known : Known, optional
        Of a call that ``checks.py`` made, unless a compiler or torch.jit traces it.
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
        """How many blocks the recurrent weights have on their diagonal."""
        return 1 if self.is_projected else max(1, self.hidden_size // self.weights[1].shape[-1])

    @property
    def members(self) -> int:
        """How many members an ensemble has; 0 if the call is not one of an ensemble."""
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
        # A number would be recorded by torch.jit.
        first: Any = self.batch_sizes[0]
        return first if is_traced() else int(first)

    @property
    def n_weights(self) -> int:
        """How many weights a direction of a layer has."""
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
        """The state before the first step, also where none was given; not to be written to."""
        if self.state:
            return list(self.state)
        # Without `shapes`: its properties take longer than the zeros.
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

    # As one list of tensors, for what keeps such lists: autograd and torch.func.

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """How many tensors `flat` has of state, weights, fresh states and noise."""
        return len(self.state), len(self.weights), len(self.flow.fresh), len(self.flow.noise)

    def flat(self) -> list[Tensor | None]:
        """All tensors: x, marks, sizes, then state, weights, fresh states and noise."""
        marks, fresh, noise = self.flow
        return [self.x, marks, self.batch_sizes, *self.state, *self.weights, *fresh, *noise]

    def with_flat(self, flat: Sequence[Any]) -> Call:
        """Make the same call of other tensors, in the order of `flat`."""
        x, marks, batch_sizes, *rest = flat
        state, weights, fresh, noise = split(rest, self.counts)
        flow = Flow(marks, fresh, noise)
        return self._replace(x=x, state=state, weights=weights, batch_sizes=batch_sizes, flow=flow)

    def without_tensors(self) -> Call:
        """Make the same call of nothing, to be filled in by `with_flat`."""
        nothing: Any = None
        state, weights, fresh, noise = ([nothing] * count for count in self.counts)
        flow = Flow(None, fresh, noise)
        return Call(self.cell, nothing, state, weights, None, self.bidirectional, flow)


def split(flat: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    """Cut a list into parts.

    Parameters
    ----------
    flat : sequence
    counts : sequence of int
        How many elements each part has; what is left over is left out.

    Returns
    -------
    list of list
    """
    parts = iter(flat)
    return [[next(parts) for _ in range(count)] for count in counts]


class Result(NamedTuple):
    """What a layer gives.

    Attributes
    ----------
    y : Tensor of shape (T, B, D * P), or (N, D * P)
    final : list of Tensor of shape (D, B, P) and, of the other states, (D, B, H)
        State after the last step of every row.
    traces : list of Tensor of shape (T, B, D * H), or (N, D * H)
        The states other than h after every step; empty if the cell has none, or if they were not
        asked for.
    """

    y: Tensor
    final: list[Tensor]
    traces: list[Tensor]


class Cotangents(NamedTuple):
    """Gradients of what a layer gives.

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
    """Which gradients are asked for, beside those of states.

    Attributes
    ----------
    x, weights : bool
    groups : int
        If positive, the batch consists of so many parts, one after another, each of which has its
        own gradients of the weights.
    """

    x: bool = True
    weights: bool = True
    groups: int = 0


class Gradients(NamedTuple):
    """Gradients of what a layer takes.

    Attributes
    ----------
    dx : Tensor shaped as x, or None if it was not asked for
    d_state : list of Tensor
        Of the initial state, whether it was given or not.
    d_fresh : list of Tensor
        Of the states after a reset, if they were given.
    d_weights : list of Tensor
        Empty if they were not asked for; of groups, of shape (groups, ...).
    """

    dx: Tensor | None
    d_state: list[Tensor]
    d_fresh: list[Tensor]
    d_weights: list[Tensor]
