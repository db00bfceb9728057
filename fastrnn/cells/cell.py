"""What every engine must know about a cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

#: Added to a variance before a state or a product is divided by its root.
EPSILON = 1e-5


class Extra(NamedTuple):
    """A weight that a cell has beyond those of torch.nn's cells.

    Attributes
    ----------
    name : str
        Begin of the parameter's name, such as ``weight_peephole``; ``_l0`` and so on follow.
    blocks : int
        Its length in multiples of H.
    init : float or None
        Its initial value; None draws it as torch.nn draws the others.
    """

    name: str
    blocks: int
    init: float | None


class Late(NamedTuple):
    """A second product of a step: the last gates see h times a factor that the others make.

    Attributes
    ----------
    n_gates : int
        How many gates, the last ones, `forward` gets from this product.
    factor : callable
        ``factor(wx, rh) -> factor``, one value, from the parts of the other gates.
    backward : callable
        ``backward(saved, d_state) -> d_rh`` of the last gates, whose product with their weights is
        the gradient of the factor times h, which `Cell.backward` finds at the end of `saved`.
    saved : int
        Which of the saved values the factor is.
    """

    n_gates: int
    factor: Callable[..., Any]
    backward: Callable[..., Any]
    saved: int


class Output(NamedTuple):
    """How h follows where a state is normalised over all hidden units first.

    `Cell.forward` gives in place of h what is combined with the normalised state, the last one,
    and `Cell.backward` takes the gradient of that.

    Attributes
    ----------
    forward : callable
        ``forward(part, normal, extra) -> h``.
    backward : callable
        ``backward(part, normal, d_h, extra) -> (d_part, d_normal, d_extra)``, the latter those of
        the last blocks of the extra weights.
    saved : int
        Which of the saved values the part is.
    n_extra : int
        How many blocks of extra weights it has gradients of.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    saved: int
    n_extra: int


class Cell(NamedTuple):
    """A recurrent cell: facts, and arithmetic on one hidden unit that every engine takes.

    Every argument of the functions is a tuple, and so is every result. They are written with
    operators and the names of ``functions.py``, without closures, default values, and globals other
    than functions of this kind; ``Engine.bind`` gives them to an engine. Engines fill vectors and
    tiles up with zeros, of which `forward` makes numbers, and `backward` zeros.

    Attributes
    ----------
    name : str
    gates, states : tuple of str
        Names of the gates, in the order of the blocks of H rows in the weights, and of the states,
        h first.
    forward : callable
        ``forward(wx, rh, state, extra) -> (state, saved)``; `wx` and `rh` are the input part and
        the recurrent part of each gate, with their biases; `extra` the blocks of the extra weights.
    backward : callable
        ``backward(saved, state, previous, d_state, extra) -> (d_rh, d_wx_apart, d_previous)``:
        from the states after and before the step and the gradients of the former, on which the
        results depend linearly, to those of the recurrent parts, of the input parts of the last
        `n_apart` gates, and of the states before, as far as they do not pass by `rh`.
    n_saved : int
        How many values `forward` hands to `backward`.
    n_apart : int
        How many gates, the last ones, multiply or add their recurrent part apart from their input
        part, so that the two have gradients of their own.
    extras : tuple of Extra
    d_extra : callable, optional
        ``d_extra(d_rh, state, previous) -> d_extra``: the gradients of the blocks of the extra
        weights, of one step and row.
    activations : callable, optional
        ``activations(wx, rh) -> gates``, for cells whose gates depend on nothing else.
    is_normalised : bool
        Whether both products are normalised, ``(v - mean(v)) / sqrt(var(v) + EPSILON)`` over all
        gates, and multiplied by the first two extra weights before the biases are added.
    late : Late, optional
    output : Output, optional
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    n_saved: int = 0
    n_apart: int = 0
    extras: tuple[Extra, ...] = ()
    d_extra: Callable[..., Any] | None = None
    activations: Callable[..., Any] | None = None
    is_normalised: bool = False
    late: Late | None = None
    output: Output | None = None

    @property
    def n_gates(self) -> int:
        """How many gates there are."""
        return len(self.gates)

    @property
    def n_states(self) -> int:
        """How many states there are."""
        return len(self.states)

    @property
    def n_extra(self) -> int:
        """How many blocks of extra weights there are."""
        return sum(extra.blocks for extra in self.extras)

    @property
    def n_moments(self) -> int:
        """How many moments of a step backward needs: 1 / deviation of the recurrent product; then,
        where a state is normalised too, mean and 1 / deviation of that.
        """
        return 1 if self.output is None else 3

    @property
    def is_pointwise(self) -> bool:
        """Whether a step is one product, and then arithmetic on each hidden unit by itself."""
        return not self.is_normalised and self.late is None
