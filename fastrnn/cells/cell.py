"""The definition of a cell that every engine uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

#: Added to the variance in layer normalization.
EPSILON = 1e-5


class Extra(NamedTuple):
    """A weight that a cell has beyond those of torch.nn's cells.

    Attributes
    ----------
    name : str
        Prefix of the parameter's name, such as ``weight_peephole``, before ``_l0`` and so on.
    blocks : int
        Length in multiples of H.
    init : float or None
        Initial value; if None, it is drawn like torch.nn's weights.
    """

    name: str
    blocks: int
    init: float | None


class Late(NamedTuple):
    """A second product in a step: the last gates take h times a factor computed from the others.

    Attributes
    ----------
    n_gates : int
        Number of gates, the last ones, whose recurrent part is this product.
    factor : callable
        ``factor(wx, rh) -> factor``, one value, from the parts of the other gates.
    backward : callable
        ``backward(saved, d_state) -> d_rh`` of the last gates. Its product with their weights is
        the gradient of (factor times h), which is appended to `saved` for `Cell.backward`.
    saved : int
        Index of the factor in the saved values.
    """

    n_gates: int
    factor: Callable[..., Any]
    backward: Callable[..., Any]
    saved: int


class Output(NamedTuple):
    """The computation of h in a cell that normalizes its last state over all hidden units.

    Instead of h, `Cell.forward` returns the part that is combined with the normalized state, and
    `Cell.backward` takes the gradient of that part.

    Attributes
    ----------
    forward : callable
        ``forward(part, normal, extra) -> h``.
    backward : callable
        ``backward(part, normal, d_h, extra) -> (d_part, d_normal, d_extra)``, where `d_extra` are
        the gradients of the last blocks of the extra weights.
    saved : int
        Index of the part in the saved values.
    n_extra : int
        Number of blocks in `d_extra`.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    saved: int
    n_extra: int


class Cell(NamedTuple):
    """A recurrent cell: its properties, and its arithmetic on one hidden unit for every engine.

    Every argument and result of the functions is a tuple. They are written with operators and the
    names of ``functions.py``, without closures, default values, or globals other than functions of
    this kind; ``Engine.bind`` binds them to an engine. Engines pad vectors and tiles with zeros,
    for which `forward` must return finite values, and `backward` zeros.

    Attributes
    ----------
    name : str
    gates, states : tuple of str
        Names of the gates, in the order of the blocks of H rows in the weights, and of the states,
        h first.
    forward : callable
        ``forward(wx, rh, state, extra) -> (state, saved)``, where `wx` and `rh` are the input part
        and the recurrent part of each gate, with biases, and `extra` are the blocks of the extra
        weights.
    backward : callable
        ``backward(saved, state, previous, d_state, extra) -> (d_rh, d_wx_apart, d_previous)``,
        where `state` and `previous` are the states after and before the step, and `d_state` is the
        gradient of `state`, in which the results are linear. The results are the gradients of the
        recurrent parts, of the input parts of the last `n_apart` gates, and of `previous`, except
        the contribution through `rh`.
    n_saved : int
        Number of values that `forward` saves for `backward`.
    n_apart : int
        Number of gates, the last ones, that do not simply add their input and recurrent parts, so
        that the two have different gradients.
    extras : tuple of Extra
    d_extra : callable, optional
        ``d_extra(d_rh, state, previous) -> d_extra``, the gradients of the blocks of the extra
        weights for one step and row.
    activations : callable, optional
        ``activations(wx, rh) -> gates``, for cells whose gates depend on nothing else.
    is_normalized : bool
        Whether both products are normalized over all gates,
        ``(v - mean(v)) / sqrt(var(v) + EPSILON)``, and multiplied by the first two extra weights
        before the biases are added.
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
    is_normalized: bool = False
    late: Late | None = None
    output: Output | None = None

    @property
    def n_gates(self) -> int:
        """The number of gates."""
        return len(self.gates)

    @property
    def n_states(self) -> int:
        """The number of states."""
        return len(self.states)

    @property
    def n_extra(self) -> int:
        """The number of blocks of extra weights."""
        return sum(extra.blocks for extra in self.extras)

    @property
    def n_moments(self) -> int:
        """The number of moments per step that backward needs.

        These are 1 / deviation of the recurrent product and, if a state is normalized too, its
        mean and 1 / deviation.
        """
        return 1 if self.output is None else 3

    @property
    def is_pointwise(self) -> bool:
        """Whether a step is one product followed by arithmetic on each hidden unit separately."""
        return not self.is_normalized and self.late is None
