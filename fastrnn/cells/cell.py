"""What every engine must know about a cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


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
    backward : callable, optional
        ``backward(saved, state, previous, d_state, extra) -> (d_rh, d_wx_apart, d_previous)``:
        from the states after and before the step and the gradients of the former, on which the
        results depend linearly, to those of the recurrent parts, of the input parts of the last
        `n_apart` gates, and of the states before, as far as they do not pass by `rh`. None for a
        cell that is not pointwise.
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
    product : {'plain', 'normalised', 'own'}
        Whether the two products are plain; or normalised over all gates before the bias is added,
        with the first two extra weights as gains; or `forward` asks for the recurrent parts itself,
        by ``rh(first, last, factor)``: those of the gates from `first` to `last`, with h times
        `factor`.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    n_saved: int = 0
    n_apart: int = 0
    extras: tuple[Extra, ...] = ()
    d_extra: Callable[..., Any] | None = None
    activations: Callable[..., Any] | None = None
    product: str = "plain"

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
    def is_pointwise(self) -> bool:
        """Whether kernels can run it."""
        return self.backward is not None
