"""What the kernels are called with, as both sides see it."""

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


#: States that a cell has at most, and values that it hands to backward.
MOST_STATES = max(cell.n_states for cell in CELLS.values())
MOST_SAVED = max(cell.n_saved for cell in CELLS.values())
# One for each state of a cell, h first, for each state but h, and for each value for backward;
# those a cell has not are null.
_STATES, _ROWS = Exact * MOST_STATES, Elements * MOST_STATES
_TRACES, _SAVED = Elements * (MOST_STATES - 1), Elements * MOST_SAVED


class Flags(ctypes.c_void_p):
    """The address of bytes that are 0 or not."""


class Arguments(ctypes.Structure):
    """Numbers, then addresses of tensors that live as long as this does."""

    tensors: Sequence[Tensor | None]

    @classmethod
    def of(cls, threads: int, *groups: tuple[Sequence[int], Sequence[Tensor | int | None]]) -> Any:
        """Make those of several groups, which lie one after another, for so many threads.

        Each is numbers and tensors, the values of all fields but the first two in their order; None
        is the null address, and an address stands for itself. Not by name, which takes ctypes
        longer than a short sequence takes the kernel.
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
    """Tensors of a cell, with None for those it has not, up to a count."""
    return [*tensors, *[None] * (count - len(tensors))]


# How the states of a step are not those that the cell has made; null for all but noisy kernels.
_NOISE: list[Any] = [
    ("drop", Elements),  # factors of h in the recurrent product, (B, P); may be null
    ("zones", Flags * MOST_STATES),  # of every row, which units keep the old value; may be null
    ("shares", Elements * MOST_STATES),  # of the old value, a number for all; may be null
    ("raw", Elements * MOST_STATES),  # states of every row without that; may be null
]
# Of cells whose products are normalised; null for others.
_NORMAL: list[Any] = [
    ("wx", Exact),  # normalised input parts of every row, (N, G * width)
    ("normal", Exact),  # normalised recurrent products of every row, (N, G * width); may be null
    # Of every row and head: 1 / deviation of the product; mean and 1 / deviation of the state.
    ("moments", Exact),
]


class Forward(Arguments):
    """Arguments of the forward kernel; addresses that may be null are marked.

    What is as wide as a layer is, in a layer of heads, that of all heads, and the addresses are
    those of the first unit of a head.
    """

    _fields_ = [
        ("groups", _INT),  # how many of these there are from the first one on
        ("threads", _INT),  # among which work space and groups are shared out
        ("steps", _INT),
        ("rows", _INT),  # of all steps
        ("batch", _INT),
        ("inputs", _INT),
        ("hidden", _INT),
        ("size_h", _INT),
        ("width", _INT),  # H of the layer: from row to row, from gate to gate of the weights
        ("width_h", _INT),  # P of the layer: from row to row of initial, fresh and final h
        ("reverse", _INT),
        ("pitch", _INT),  # from row to row of h
        ("chunk", _INT),  # rows, at least a batch, whose input projection is kept
        ("is_full_kept", _INT),  # whether `full` has all rows, not those of one step
        ("moments_pitch", _INT),
        # Work space, in one piece of memory. Of weights that are multiplied as they are, null.
        ("packed_ih", Panels),
        ("packed_hh", Panels),
        ("packed_hr", Panels),
        ("biases", Exact),
        ("projected", Exact),
        ("operand", Elements),  # h times factors, of two steps and the batch
        ("sums", Exact),  # of every slice and row, two
        ("means", Exact),  # of every thread and row, two
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
        ("marks", _ADDRESS),  # of every row, bytes; may be null
        ("fresh", _ROWS),  # after a reset
        ("fresh_rh", Elements),  # fresh h times W_hh^T, (B, G * H)
        *_NOISE,
        *_NORMAL,
        ("work", _ADDRESS),  # the piece of memory
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
        ("pitch", _INT),  # from row to row of h and of its gradients; of the others it is `width`
        ("d_gates_pitch", _INT),
        ("moments_pitch", _INT),
        ("packed_hh", Panels),  # null: of a single step, whose recurrent product is left out
        ("packed_hr", Panels),
        ("gathered", Elements),  # of every thread, the gradients of a head's gates
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
        ("d_rows", _ROWS),  # of the states of every row; may be null
        ("marks", _ADDRESS),  # as in Forward
        ("fresh", _ROWS),
        ("d_fresh", _STATES),  # receives what passes by other ways than the recurrent product
        ("d_states", _STATES),  # in: of the final, out: of the initial ones
        ("d_gates", Elements),  # of a row: d_rh, then d_wx of the gates apart, (G + n_apart) * H
        ("d_projected", Elements),  # receives the gradient of the projected h of every row
        *_NOISE,
        *_NORMAL[1:],
        ("d_product", Exact),  # receives the gradient of what is normalised, (N, G * hidden)
        ("d_output", Exact),  # receives that of the last extra weights of every row, (N, width)
        ("work", _ADDRESS),
    ]


def pass_blocks(cell: Cell) -> int:
    """How many numbers backward keeps of a unit at a step, beside what it hands on.

    What the recurrent product passes to it; what a late product does; or the gradients of the two
    that h is made of.
    """
    if cell.output is not None:
        return 3
    return 1 if cell.late is None else 2


#: Numbers of the inner dimension of a product that are packed at a time: panels of them stay in a
#: second-level cache.
BLOCK = 256


class Product(Arguments):
    """Arguments of ``c = a @ b``, of (M, N), (M, K) and (K, N)."""

    _fields_ = [
        ("groups", _INT),
        ("threads", _INT),
        ("m", _INT),
        ("k", _INT),
        ("n", _INT),
        ("adds", _INT),  # whether c is added to, and not written
        ("is_transposed", _INT),  # whether a is given as (K, M)
        ("a_pitch", _INT),  # from row to row, as it is given
        ("b_pitch", _INT),
        ("c_pitch", _INT),
        ("panels", Panels),  # work space, as the next two
        ("packed", Elements),
        ("scratch", Exact),
        ("a", Elements),
        ("b", Elements),
        ("c", Elements),
        ("work", _ADDRESS),
    ]
