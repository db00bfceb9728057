"""Beam search, for the examples that write a sequence symbol by symbol.

A decoder gives the probability of each next symbol, and of the whole sequence their product:

    log p(y_1 ... y_T) = sum over t of log p(y_t | y_1 ... y_{t-1})

The best sequence cannot be found by trying all of them. Greedy search appends the best symbol and
never comes back to another; beam search (Lowerre 1976, "The Harpy speech recognition system")
keeps the `width` best beginnings, appends every symbol to each of them, and of all those keeps the
`width` best again. One that has ended stays, as it is, for as long as it is among the best. As
probabilities only fall with length, the search is over once all that are kept have ended. Width 1
is greedy search, and a width for all sequences there are finds the best one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Found = tuple[list[int], float]  # symbols without the end, log probability


def chosen(state: Any, which: Tensor) -> Any:
    """The state of some of the sequences of a batch, which is dimension 1 of every tensor."""
    if isinstance(state, Tensor):
        return state.index_select(1, which)
    return tuple(chosen(part, which) for part in state)


@torch.no_grad()
def beam_search(
    decode: Callable[..., Any], state: Any, first: Tensor, end: int, width: int, longest: int
) -> list[list[Found]]:
    """The best sequences for each input of a batch, at most `width` of them, the best first.

    ``decode(symbols, state)`` takes a symbol (1, N) for each of N sequences, and a tensor or tuple
    (of tensors or tuples) with the N sequences in dimension 1; it returns logits (1, N, symbols),
    the next state and maybe more. `first` is the symbol that each input's sequences begin with,
    left out of what is found. One that has no `end` after `longest` symbols is taken as it is.
    """
    inputs = len(first)
    row = torch.arange(inputs, device=first.device)[:, None]
    scores = torch.zeros(inputs, 1, device=first.device)  # of all beginnings that are kept
    written = first.new_empty(inputs, 1, 0)
    ended = torch.zeros(inputs, 1, dtype=torch.bool, device=first.device)
    symbols = first[:, None]
    while written.shape[2] < longest and not ended.all():
        logits, state, *_ = decode(symbols.view(1, -1), state)
        steps = logits[0].log_softmax(1).unflatten(0, symbols.shape)
        steps[ended] = -torch.inf  # nothing is appended to what has ended,
        steps[..., end][ended] = 0.0  # except another end, at no cost
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
