"""The options of `lstm`, `gru` and `rnn`, and the result that torch.nn does not return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class States(NamedTuple):
    """Every state of every layer, returned on request by ``return_states``.

    Attributes
    ----------
    h : Tensor of shape (T, L * D, B, P)
        ``h[t]`` is what ``h_n`` would be if the sequences ended after step t or, for the reverse
        direction, started at step t. It is zero past the end of a sequence.
    c : Tensor of shape (T, L * D, B, H), or None
        The cell state, likewise, for an LSTM.
    gates : Tensor of shape (T, L * D, B, G * H), or None
        With ``return_states='gates'``, the gate activations: i, f, g, o of an LSTM, r, z, n of a
        GRU.
    n, m : Tensor of shape (T, L * D, B, H), or None
        The other states of an sLSTM.
    """

    h: Tensor
    c: Tensor | None = None
    gates: Tensor | None = None
    n: Tensor | None = None
    m: Tensor | None = None


class Options(NamedTuple):
    """The keyword arguments of `lstm`, `gru` and `rnn`, documented there."""

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
        """The zoneout of every state; a single number applies to h and, in an LSTM, to c."""
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
        """Whether there are lengths, resets, truncated gradients or requests for all states."""
        is_plain = self.lengths is self.reset is self.bptt is None
        return not is_plain or bool(self.return_states)
