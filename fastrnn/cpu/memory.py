"""Memory that nobody needs after a call, kept for the next one: new pages cost more than much else.

What a thread keeps is its own. Two kinds of it are needed at the same time, and do not share.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_MOST = 1 << 26  # bytes of a kind, 64 MiB


class _Kept(threading.local):
    def __init__(self) -> None:
        self.work = self.gradients = torch.empty(0, dtype=torch.float32, device="cpu")


_kept = _Kept()


def take(kind: str, size: int) -> Tensor:
    """At least so many bytes of a kind, 'work' or 'gradients', as float32."""
    kept: Tensor = getattr(_kept, kind)
    # In deterministic mode torch fills what it allocates, so that the use of old values shows.
    if kept.nbytes < size or torch.are_deterministic_algorithms_enabled():
        with torch.inference_mode(False):
            # In whole lines of a cache, which are whole numbers of every dtype.
            kept = torch.empty(-(-size // 64) * 16, dtype=torch.float32, device="cpu")
        if size <= _MOST:
            setattr(_kept, kind, kept)
    return kept


def work_space(*sizes: int) -> tuple[Tensor, Sequence[int]]:
    """Memory in parts of so many bytes: all of it, and the addresses, null for nothing."""
    whole = [-(-size // 64) * 64 for size in sizes]
    kept = take("work", sum(whole))
    starts = itertools.accumulate(whole[:-1], initial=kept.data_ptr())
    return kept, [at if size else 0 for at, size in zip(starts, sizes, strict=True)]


def gradients(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A matrix for the gradients of the gates, until the next one is asked for."""
    size = rows * columns * dtype.itemsize
    kept = take("gradients", size).view(dtype)
    return kept[: rows * columns].view(rows, columns)
