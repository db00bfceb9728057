"""What a schedule knows about a cell."""

from typing import Any, NamedTuple


class Cell(NamedTuple):
    """A recurrent cell as two functions on tiles of shape (BLOCK_B, BLOCK_H) in float32.

    Every argument is a tuple of tiles, and so is every result.

    Attributes
    ----------
    name : str
    n_gates : int
        Blocks of H rows in the weights, in torch's order.
    n_states : int
        Tiles carried from step to step, h first.
    n_saved : int
        Activations that forward hands to backward.
    n_apart : int
        How many gates, the last ones, multiply or add their recurrent part apart from their
        input part, so that the two have gradients of their own.
    forward : callable
        ``forward(wx, rh, state) -> (state, saved)``; `wx` and `rh` are the input part and the
        recurrent part of each gate, with their biases.
    backward : callable
        ``backward(saved, state, previous, d_state) -> (d_rh, d_wx_apart, d_previous)`` with the
        states after and before the step. `d_previous` is what passes by the recurrent product,
        zero where nothing does.
    """

    name: str
    n_gates: int
    n_states: int
    n_saved: int
    n_apart: int
    forward: Any
    backward: Any
