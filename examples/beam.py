"""Beam search, for the examples that generate a sequence symbol by symbol.

A decoder gives the probability of each next symbol, and their product is that of the sequence:

    log p(y_1 ... y_T) = sum over t of log p(y_t | y_1 ... y_{t-1})

There are too many sequences to try them all. Greedy search appends the best symbol and never
reconsiders it; beam search (Lowerre 1976, "The Harpy speech recognition system") keeps the `width`
best prefixes, extends each of them by every symbol, and again keeps the `width` best of the
results. A finished sequence stays unchanged for as long as it is among the best. Since
probabilities only fall with length, the search is over once all kept sequences have finished. Width
1 is greedy search, and a width of the number of all sequences finds the best one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Found = tuple[list[int], float]  # symbols without the end symbol, log probability


def chosen(state: Any, which: Tensor) -> Any:
    """Select the state of some sequences of a batch, which is dimension 1 of every tensor."""
    if isinstance(state, Tensor):
        return state.index_select(1, which)
    return tuple(chosen(part, which) for part in state)


@torch.no_grad()
def beam_search(
    decode: Callable[..., Any], state: Any, first: Tensor, end: int, width: int, longest: int
) -> list[list[Found]]:
    """Return the best sequences for each input of a batch, at most `width`, in descending order.

    ``decode(symbols, state)`` takes a symbol (1, N) for each of N sequences, and a tensor or tuple
    (of tensors or tuples) with the N sequences in dimension 1; it returns logits (1, N, symbols),
    the next state and possibly more. `first` is the start symbol of each input's sequences, which
    the results do not include. A sequence without an `end` after `longest` symbols is cut there.
    """
    inputs = len(first)
    row = torch.arange(inputs, device=first.device)[:, None]
    scores = torch.zeros(inputs, 1, device=first.device)  # of all prefixes that are kept
    written = first.new_empty(inputs, 1, 0)
    ended = torch.zeros(inputs, 1, dtype=torch.bool, device=first.device)
    symbols = first[:, None]
    while written.shape[2] < longest and not ended.all():
        logits, state, *_ = decode(symbols.view(1, -1), state)
        steps = logits[0].log_softmax(1).unflatten(0, symbols.shape)
        steps[ended] = -torch.inf  # nothing can follow a finished sequence,
        steps[..., end][ended] = 0.0  # except another end symbol, at no cost
        kept, size = steps.shape[1:]
        candidates = (scores[:, :, None] + steps).flatten(1)
        scores, best = candidates.topk(min(width, kept * size), 1)
        parent, symbols = best // size, best % size
        written = torch.cat([written[row, parent], symbols[:, :, None]], 2)
        ended = ended[row, parent] | (symbols == end)
        state = chosen(state, (row * kept + parent).flatten())
    return [
        [
            (one[: one.index(end)] if end in one else one, score)
            for one, score in zip(sequences, of, strict=True)
            if score > -torch.inf
        ]
        for sequences, of in zip(written.tolist(), scores.tolist(), strict=True)
    ]
