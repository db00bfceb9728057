"""What the kernels are called with, as both sides see it."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..cells import CELLS

_INT, _ADDRESS = ctypes.c_int64, ctypes.c_void_p
#: States that a cell has at most, and values that it hands to backward.
MOST_STATES = max(cell.n_states for cell in CELLS.values())
MOST_SAVED = max(cell.n_saved for cell in CELLS.values())
# One for each state of a cell, h first, for each state but h, and for each value for backward;
# those a cell has not are null.
_STATES, _TRACES = _ADDRESS * MOST_STATES, _ADDRESS * (MOST_STATES - 1)
_SAVED = _ADDRESS * MOST_SAVED


class Arguments(ctypes.Structure):
    """Numbers, then addresses of tensors that live as long as this does."""

    tensors: Sequence[Tensor | None]

    @classmethod
    def of(cls, numbers: Sequence[int], tensors: Sequence[Tensor | None]) -> Any:
        """Make them from the values of all fields, in their order; None is the null address.

        Not by name, which takes ctypes longer than a short sequence takes the kernel.
        """
        addresses = [0 if part is None else part.data_ptr() for part in tensors]
        values = array("q", [*numbers, *addresses])
        if len(values) * values.itemsize != ctypes.sizeof(cls):
            raise TypeError(f"{cls.__name__} has {ctypes.sizeof(cls) // 8} values")
        made = cls.from_buffer(values)
        made.tensors = tensors
        return made


def padded(tensors: Sequence[Tensor | None], count: int = MOST_STATES) -> list[Tensor | None]:
    """Tensors of a cell, with None for those it has not, up to a count."""
    return [*tensors, *[None] * (count - len(tensors))]


class Forward(Arguments):
    """Arguments of the forward kernel; addresses that may be null are marked."""

    _fields_ = [
        ("steps", _INT),
        ("rows", _INT),  # of all steps
        ("batch", _INT),
        ("inputs", _INT),
        ("hidden", _INT),
        ("reverse", _INT),
        ("pitch", _INT),  # from row to row of h
        ("chunk", _INT),  # rows, at least a batch, whose input projection is kept
        ("projected", _ADDRESS),  # in the tensor of `packed`, like `scratch`
        ("scratch", _ADDRESS),
        ("sizes", _ADDRESS),  # rows of each step, int64; null: all have `batch`
        ("x", _ADDRESS),
        ("w_ih", _ADDRESS),
        ("w_hh", _ADDRESS),
        ("b_ih", _ADDRESS),  # may be null, like b_hh
        ("b_hh", _ADDRESS),
        ("extra", _ADDRESS),  # blocks of extra weights
        ("h_0", _ADDRESS),  # null: zeros
        ("states", _STATES),  # in: initial, out: final
        ("h", _ADDRESS),
        ("saved", _SAVED),  # values of every row, for backward; may be null
        ("traces", _TRACES),  # states of every row; may be null
        ("marks", _ADDRESS),  # of every row, bytes; may be null
        ("fresh", _STATES),  # after a reset
        ("fresh_rh", _ADDRESS),  # fresh h times W_hh^T, (B, G * H)
        ("packed", _ADDRESS),  # work space
    ]


class Backward(Arguments):
    """Arguments of the backward kernel."""

    _fields_ = [
        ("steps", _INT),
        ("rows", _INT),
        ("batch", _INT),
        ("hidden", _INT),
        ("reverse", _INT),
        ("pitch", _INT),  # from row to row of h and d_rows
        ("d_gates_pitch", _INT),
        ("scratch", _ADDRESS),  # in the tensor of `packed`
        ("sizes", _ADDRESS),
        ("w_hh", _ADDRESS),
        ("extra", _ADDRESS),
        ("initial", _STATES),  # null: zeros
        ("h", _ADDRESS),
        ("saved", _SAVED),
        ("traces", _TRACES),
        ("d_rows", _STATES),  # of the states of every row; may be null
        ("marks", _ADDRESS),  # as in Forward
        ("fresh", _STATES),
        ("d_fresh", _STATES),  # receives what passes by other ways than the recurrent product
        ("d_states", _STATES),  # in: of the final, out: of the initial ones
        ("d_gates", _ADDRESS),  # of a row: d_rh, then d_wx of the gates apart, (G + n_apart) * H
        ("packed", _ADDRESS),
    ]
