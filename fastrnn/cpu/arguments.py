"""The arguments of the kernels, shared by the callers and the code generators."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..cells import CELLS, Cell

_INT, _ADDRESS = ctypes.c_int64, ctypes.c_void_p


class Elements(ctypes.c_void_p):
    """The address of numbers in the dtype of the layer."""


class Exact(ctypes.c_void_p):
    """The address of numbers in the dtype of sums and states."""


class Panels(ctypes.c_void_p):
    """The address of packed weights."""


#: The largest number of states of a cell, and of values that it saves for backward.
MOST_STATES = max(cell.n_states for cell in CELLS.values())
MOST_SAVED = max(cell.n_saved for cell in CELLS.values())
# One address for each state of a cell, h first; for each state but h; and for each saved value.
# Those that a cell does not have are null.
_STATES, _ROWS = Exact * MOST_STATES, Elements * MOST_STATES
_TRACES, _SAVED = Elements * (MOST_STATES - 1), Elements * MOST_SAVED


class Flags(ctypes.c_void_p):
    """The address of bytes that are zero or nonzero."""


class Arguments(ctypes.Structure):
    """Numbers, then addresses of tensors, which the structure keeps alive."""

    tensors: Sequence[Tensor | None]

    @classmethod
    def of(cls, threads: int, *groups: tuple[Sequence[int], Sequence[Tensor | int | None]]) -> Any:
        """Make the arguments of several groups, contiguous in memory, for a number of threads.

        Each group is given as numbers and tensors: the values of all fields but the first two, in
        order. None stands for the null address; addresses may be given as integers. Fields are not
        set by name, because in ctypes that takes longer than the kernel of a short sequence.
        """
        values: array[int] = array("q")
        kept: list[Any] = []
        for numbers, tensors in groups:
            values.extend((len(groups), threads))
            values.extend(numbers)
            values.extend(
                [
                    part if isinstance(part, int) else 0 if part is None else part.data_ptr()
                    for part in tensors
                ]
            )
            kept += tensors
        if len(values) * values.itemsize != ctypes.sizeof(cls) * len(groups):
            raise TypeError(f"{cls.__name__} has {ctypes.sizeof(cls) // 8} values")
        made = cls.from_buffer(values)
        made.tensors = kept
        return made


def padded(tensors: Sequence[Tensor | None], count: int = MOST_STATES) -> list[Tensor | None]:
    """Pad the tensors of a cell with None to `count`."""
    return [*tensors, *[None] * (count - len(tensors))]


# Recurrent dropout and zoneout; null except for noisy kernels.
_NOISE: list[Any] = [
    ("drop", Elements),  # factors of h in the recurrent product, (B, P); may be null
    ("zones", Flags * MOST_STATES),  # for every row, units that keep the old value; may be null
    ("shares", Elements * MOST_STATES),  # fraction of the old value, one number; may be null
    ("raw", Elements * MOST_STATES),  # states of every row before zoneout; may be null
]
# For cells whose products are normalized; null for others.
_NORMAL: list[Any] = [
    ("wx", Exact),  # normalized input parts of every row, (N, G * width)
    ("normal", Exact),  # normalized recurrent products of every row, (N, G * width); may be null
    # For every row and head: 1 / deviation of the product; mean and 1 / deviation of the state.
    ("moments", Exact),
]


class Forward(Arguments):
    """Arguments of the forward kernel; addresses that may be null are marked.

    In a layer with heads, rows as wide as the layer span all heads, and addresses point to the
    first unit of a head.
    """

    _fields_ = [
        ("groups", _INT),  # number of these structures, starting with the first
        ("threads", _INT),  # that share the work space and the groups
        ("steps", _INT),
        ("rows", _INT),  # of all steps
        ("batch", _INT),
        ("inputs", _INT),
        ("hidden", _INT),
        ("size_h", _INT),
        ("width", _INT),  # H of the layer: row pitch, and gate pitch of the weights
        ("width_h", _INT),  # P of the layer: row pitch of initial, fresh and final h
        ("reverse", _INT),
        ("pitch", _INT),  # row pitch of h
        ("chunk", _INT),  # rows, at least a batch, whose input projection is kept
        ("is_full_kept", _INT),  # whether `full` has all rows, not only those of one step
        ("moments_pitch", _INT),
        # Work space, in one block of memory. Panels are null for weights that are not packed.
        ("packed_ih", Panels),
        ("packed_hh", Panels),
        ("packed_hr", Panels),
        ("biases", Exact),
        ("projected", Exact),
        ("operand", Elements),  # h times factors, for two steps and the batch
        ("sums", Exact),  # two for every slice and row
        ("means", Exact),  # two for every thread and row
        ("scratch", Exact),
        ("sizes", _ADDRESS),  # rows of each step, int64; null: all have `batch`
        ("x", Elements),
        ("w_ih", Elements),
        ("w_hh", Elements),
        ("w_hr", Elements),  # may be null
        ("b_ih", Elements),  # may be null, like b_hh
        ("b_hh", Elements),
        ("extra", Elements),  # blocks of extra weights
        ("h_0", Elements),  # null: zeros
        ("states", _STATES),  # in: initial, out: final
        ("h", Elements),
        ("full", Elements),  # h before its projection
        ("saved", _SAVED),  # values of every row, for backward; may be null
        ("traces", _TRACES),  # states of every row; may be null
        ("marks", _ADDRESS),  # a byte for every row; may be null
        ("fresh", _ROWS),  # states after a reset
        ("fresh_rh", Elements),  # fresh h times W_hh^T, (B, G * H)
        *_NOISE,
        *_NORMAL,
        ("work", _ADDRESS),  # the block of memory
    ]


class Backward(Arguments):
    """Arguments of the backward kernel."""

    _fields_ = [
        ("groups", _INT),
        ("threads", _INT),
        ("steps", _INT),
        ("rows", _INT),
        ("batch", _INT),
        ("hidden", _INT),
        ("size_h", _INT),
        ("width", _INT),  # as in Forward
        ("width_h", _INT),
        ("reverse", _INT),
        ("pitch", _INT),  # row pitch of h and of its gradients; that of the others is `width`
        ("d_gates_pitch", _INT),
        ("moments_pitch", _INT),
        ("packed_hh", Panels),  # null for a single step, whose recurrent product is left out
        ("packed_hr", Panels),
        ("gathered", Elements),  # for every thread, the gradients of a head's gates
        ("sums", Exact),  # as in Forward
        ("means", Exact),
        ("scratch", Exact),
        ("sizes", _ADDRESS),
        ("w_hh", Elements),
        ("w_hr", Elements),
        ("extra", Elements),
        ("initial", _ROWS),  # null: zeros
        ("h", Elements),
        ("saved", _SAVED),
        ("traces", _TRACES),
        ("d_rows", _ROWS),  # gradients of the states of every row; may be null
        ("marks", _ADDRESS),  # as in Forward
        ("fresh", _ROWS),
        ("d_fresh", _STATES),  # out: gradients, without those through the recurrent product
        ("d_states", _STATES),  # in: gradients of the final, out: of the initial states
        ("d_gates", Elements),  # of a row: d_rh, then d_wx of the last n_apart gates
        ("d_projected", Elements),  # out: the gradient of the projected h of every row
        *_NOISE,
        *_NORMAL[1:],
        ("d_product", Exact),  # out: the gradient of the normalized product, (N, G * hidden)
        ("d_output", Exact),  # out: that of the last extra weights of every row, (N, width)
        ("work", _ADDRESS),
    ]


def pass_blocks(cell: Cell) -> int:
    """Return how many numbers backward keeps for a unit at a step, besides its results.

    These are the gradient through the recurrent product and, depending on the cell, that through a
    late product, or those of the two parts of h.
    """
    if cell.output is not None:
        return 3
    return 1 if cell.late is None else 2


#: Block size of the inner dimension in packed products: panels of this depth stay in the
#: second-level cache.
BLOCK = 256


class Product(Arguments):
    """Arguments of ``c = a @ b``, with shapes (M, N), (M, K) and (K, N)."""

    _fields_ = [
        ("groups", _INT),
        ("threads", _INT),
        ("m", _INT),
        ("k", _INT),
        ("n", _INT),
        ("adds", _INT),  # whether to add to c instead of overwriting it
        ("is_transposed", _INT),  # whether a is given as (K, M)
        ("a_pitch", _INT),  # row pitch of a as it is given
        ("b_pitch", _INT),
        ("c_pitch", _INT),
        ("panels", Panels),  # work space, like the next two
        ("packed", Elements),
        ("scratch", Exact),
        ("a", Elements),
        ("b", Elements),
        ("c", Elements),
        ("work", _ADDRESS),
    ]
