"""What `lstm`, `gru` and `rnn` can be told, and what they return beyond torch.nn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class States(NamedTuple):
    """Every state of every layer, as ``return_states`` asks for.

    Attributes
    ----------
    h : Tensor of shape (T, L * D, B, P)
        ``h[t]`` is what ``h_n`` would be after step t (for the reverse direction, of a sequence
        that begins at t); zeros at steps that a row does not have.
    c : Tensor of shape (T, L * D, B, H), or None
        The same of the cell state, for an LSTM.
    gates : Tensor of shape (T, L * D, B, G * H), or None
        With ``return_states='gates'``, the activations: i, f, g, o of an LSTM, r, z, n of a GRU.
    n, m : Tensor of shape (T, L * D, B, H), or None
        As `c`, of an sLSTM.
    """

    h: Tensor
    c: Tensor | None = None
    gates: Tensor | None = None
    n: Tensor | None = None
    m: Tensor | None = None


class Options(NamedTuple):
    """The keyword arguments of `lstm`, `gru` and `rnn`, which describes them."""

    batch_first: bool = False
    bidirectional: bool = False
    dropout: float = 0.0
    training: bool = False
    batch_sizes: Tensor | None = None
    lengths: Tensor | None = None
    reset: Tensor | None = None
    reset_state: Sequence[Tensor] | None = None
    return_states: bool | str = False
    bptt: int | None = None
    recompute: bool | int = False
    recurrent_dropout: float = 0.0
    zoneout: float | Sequence[float] = 0.0
    num_heads: int = 1

    def zones(self, n_states: int) -> list[float]:
        """The zoneout of every state; a number is for h and, if that is all the rest, for c."""
        if isinstance(self.zoneout, Sequence):
            return list(self.zoneout)
        count = n_states if n_states <= 2 else 1
        return [self.zoneout] * count + [0.0] * (n_states - count)

    @property
    def is_noisy(self) -> bool:
        """Whether there is recurrent dropout or zoneout."""
        if self.training and self.recurrent_dropout:
            return True
        return any(self.zoneout) if isinstance(self.zoneout, Sequence) else bool(self.zoneout)

    @property
    def is_marked(self) -> bool:
        """Whether there are lengths, resets, truncated gradients, or all states are asked for."""
        is_plain = self.lengths is self.reset is self.bptt is None
        return not is_plain or bool(self.return_states)
