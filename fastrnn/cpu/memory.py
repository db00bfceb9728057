"""Temporary memory that is kept from call to call, because page faults on new memory are expensive.

Each thread has its own. There are two buffers, because both are needed at the same time.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_MOST = 1 << 26  # bytes of the largest buffer that is kept, 64 MiB


class _Kept(threading.local):
    def __init__(self) -> None:
        self.work = self.gradients = torch.empty(0, dtype=torch.float32, device="cpu")


_kept = _Kept()


def take(kind: str, size: int) -> Tensor:
    """Return at least `size` bytes of a kind, 'work' or 'gradients', as float32."""
    kept: Tensor = getattr(_kept, kind)
    # In deterministic mode torch fills new memory, which exposes reads of uninitialized values.
    if kept.nbytes < size or torch.are_deterministic_algorithms_enabled():
        with torch.inference_mode(False):
            # Whole cache lines, which are divisible by the size of every dtype.
            kept = torch.empty(-(-size // 64) * 16, dtype=torch.float32, device="cpu")
        if size <= _MOST:
            setattr(_kept, kind, kept)
    return kept


def work_space(*sizes: int) -> tuple[Tensor, Sequence[int]]:
    """Return memory for parts of the given sizes in bytes, and their addresses, null for size 0."""
    whole = [-(-size // 64) * 64 for size in sizes]
    kept = take("work", sum(whole))
    starts = itertools.accumulate(whole[:-1], initial=kept.data_ptr())
    return kept, [at if size else 0 for at, size in zip(starts, sizes, strict=True)]


def gradients(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return a matrix for the gradients of the gates, which is valid until the next call."""
    size = rows * columns * dtype.itemsize
    kept = take("gradients", size).view(dtype)
    return kept[: rows * columns].view(rows, columns)
