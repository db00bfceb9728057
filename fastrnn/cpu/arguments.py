"""What the kernels are called with, as both sides see it."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

_INT, _ADDRESS = ctypes.c_int64, ctypes.c_void_p


class Arguments(ctypes.Structure):
    """Numbers, and addresses of tensors that live as long as this does."""

    tensors: list[Tensor]

    @classmethod
    def of(cls, **fields: Any) -> Any:
        """Make the arguments from numbers and from tensors, of which None is the null address."""
        tensors = {name: part for name, part in fields.items() if isinstance(part, Tensor)}
        fields.update((name, part.data_ptr()) for name, part in tensors.items())
        made = cls(**fields)
        made.tensors = list(tensors.values())
        return made


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
        ("sizes", _ADDRESS),  # rows of each step, int64; null: all have `batch`
        ("x", _ADDRESS),
        ("w_ih", _ADDRESS),
        ("w_hh", _ADDRESS),
        ("b_ih", _ADDRESS),  # may be null, like b_hh
        ("b_hh", _ADDRESS),
        ("h_0", _ADDRESS),  # null: zeros
        ("h_n", _ADDRESS),  # in: h_0
        ("c", _ADDRESS),  # in: c_0, out: c_n; null unless the cell has one
        ("h", _ADDRESS),
        ("gates", _ADDRESS),  # to be saved; may be null
        ("extra", _ADDRESS),  # what is saved beyond the gates
        ("marks", _ADDRESS),  # of every row, bytes; may be null
        ("fresh_h", _ADDRESS),  # states after a reset
        ("fresh_c", _ADDRESS),
        ("fresh_rh", _ADDRESS),  # fresh_h times W_hh^T, (B, G * H)
        ("packed", _ADDRESS),  # work space
        ("projected", _ADDRESS),
        ("scratch", _ADDRESS),
    ]


class Backward(Arguments):
    """Arguments of the backward kernel."""

    _fields_ = [
        ("steps", _INT),
        ("rows", _INT),
        ("batch", _INT),
        ("hidden", _INT),
        ("reverse", _INT),
        ("pitch", _INT),  # from row to row of h, dy
        ("sizes", _ADDRESS),
        ("w_hh", _ADDRESS),
        ("h_0", _ADDRESS),  # null, like c_0: zeros
        ("c_0", _ADDRESS),
        ("h", _ADDRESS),
        ("gates", _ADDRESS),
        ("extra", _ADDRESS),
        ("dy", _ADDRESS),  # may be null
        ("dc", _ADDRESS),  # of c at every row, from row to row like h; may be null
        ("marks", _ADDRESS),  # as in Forward
        ("fresh_h", _ADDRESS),
        ("fresh_c", _ADDRESS),
        ("d_fresh_h", _ADDRESS),  # receives what passes by other ways than the recurrent product
        ("d_fresh_c", _ADDRESS),
        ("d_h", _ADDRESS),  # in: of h_n, out: of h_0
        ("d_c", _ADDRESS),
        ("d_gates", _ADDRESS),  # of a row: d_rh, then d_wx of the gates apart, (G + n_apart) * H
        ("d_gates_pitch", _INT),
        ("packed", _ADDRESS),
        ("scratch", _ADDRESS),
    ]
