"""Whole calls in inference by the compiled kernels, without the records of ``layers.py``.

A short call takes longer in Python than in a kernel. What sizes determine is made once, a `Stack`;
a call allocates its results and fills in addresses.
"""

from __future__ import annotations

import ctypes
import itertools
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..call import Call
from . import engine, machine, memory, native
from .arguments import Forward
from .direction import Direction
from .rows import Rows

# Where the arguments are, in words.
AT = {field[0]: getattr(Forward, field[0]).offset // 8 for field in Forward._fields_}
_H_0, _STATES = AT["h_0"], AT["states"]
# The addresses of a call; the others are those of its states, then of its weights.
_X, Y, _WORK, _OTHERS = range(4)

_address, _contiguous = Tensor.data_ptr, Tensor.contiguous


class _Direction(NamedTuple):
    """The arguments of one direction.

    Attributes
    ----------
    arguments : array
        Those of the kernel, but for addresses.
    addresses : list of (int, int, int)
        Which argument is which address of the call, and how many bytes beyond it.
    h_0 : int
        How many bytes beyond the initial h of the call its own is.
    size : int
        Bytes of the work space, without what each thread has for itself, which comes last.
    """

    arguments: array[int]
    addresses: list[tuple[int, int, int]]
    h_0: int
    size: int


def _direction(
    call: Call, direction: Direction, layout: native.Layout, inputs: int, n: int
) -> _Direction:
    """Prepare direction number `n` of all, with the numbers of ``native.forward``."""
    cell, hidden, size_h, w = call.cell, call.hidden_size, call.size_h, direction.w
    rows, bytes_of, is_projected = direction.rows, call.x.element_size(), w.w_hr is not None
    space, chunk = native.Space.of(direction, layout, inputs)
    numbers = {
        "groups": 1, "steps": rows.steps, "rows": rows.total, "batch": rows.batch, "inputs": inputs,
        "hidden": hidden, "size_h": size_h, "width": hidden, "width_h": size_h,
        "reverse": direction.reverse, "pitch": call.directions * size_h, "chunk": chunk,
    }  # fmt: skip
    arguments = array("q", bytes(ctypes.sizeof(Forward)))
    for name, number in numbers.items():
        arguments[AT[name]] = number
    of_full = bytes_of * rows.batch * hidden * is_projected
    of_thread = layout.scratch(rows.batch, cell.n_gates * layout.units, 1)
    parts = {"full": of_full, **space._asdict(), "scratch": of_thread}
    ends = itertools.accumulate(-(-size // 64) * 64 for size in parts.values())
    starts = dict(zip(parts, [0, *ends], strict=False))
    work = [(AT[name], _WORK, starts[name]) for name, size in parts.items() if size]
    sizes = [n * rows.batch * width for width in _widths(call)]
    states = [(_STATES + k, _OTHERS + k, size * layout.exact) for k, size in enumerate(sizes)]
    first = _OTHERS + cell.n_states + n * call.n_weights
    names = ["w_ih", "w_hh"] + ["b_ih", "b_hh"] * (w.b_ih is not None) + ["w_hr"] * is_projected
    names += ["extra"] * len(cell.extras)
    weights = [(AT[name], k, 0) for k, name in enumerate(names, first)]
    others = [(AT["x"], _X, 0), (AT["h"], Y, n % call.directions * size_h * bytes_of)]
    of_all = [*others, *work, *states, *weights]
    return _Direction(arguments, of_all, sizes[0] * bytes_of, starts["scratch"])


def _widths(call: Call) -> list[int]:
    """Of the states."""
    return [call.size_h] + [call.hidden_size] * (call.cell.n_states - 1)


class Stack:
    """The layers of a checked call, or a single step, for tensors of its sizes.

    It is never written to, so that threads may share it.
    """

    def __init__(self, call: Call, *, is_step: bool = False) -> None:
        cell, x, directions = call.cell, call.x, call.directions
        batch_first = call.options.batch_first
        steps, batch = (1, x.shape[0]) if is_step else (call.steps, call.batch)
        width, count = directions * call.size_h, call.num_layers * directions
        # One sequence, or one step, lies in memory alike in both orders.
        self.is_swapped = batch_first and steps > 1 and batch > 1
        self.y_sizes = [steps, batch, width]
        if batch_first and not self.is_swapped:
            self.y_sizes = [batch, steps, width]
        self.y_size = x.element_size() * batch * width
        self.state_sizes = [[batch, n] if is_step else [count, batch, n] for n in _widths(call)]
        inputs = [x.shape[-1], *[width] * (call.num_layers - 1)]
        rows, of_weights = Rows(steps, batch, None), call.by_direction()
        self.layers = []
        for k, size in enumerate(inputs):
            layer = []
            for d in range(directions):
                n = k * directions + d
                direction = Direction(cell, of_weights[n], rows, d == 1, [], None)
                self.layout = native.Layout.of(direction)
                layer.append(_direction(call, direction, self.layout, size, n))
            self.layers.append(layer)
        self.size = max(direction.size for layer in self.layers for direction in layer)
        self.per_thread = self.layout.exact * batch * cell.n_gates * self.layout.units
        self.dtype, self.exact = x.dtype, machine.exact_dtype(x.dtype)
        self.kernels = engine.kernels(cell, x.dtype)  # which keeps their code in memory
        addresses = self.kernels.addresses
        self.kernel, self.region = engine.KERNEL(addresses["forward"]), addresses["forward_region"]

    def run(
        self, x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the output and the final state, from zeros if `state` is empty.

        The caller has made sure that the tensors differ from those that this was made for in
        nothing but values, and x and states in strides; and that nobody wants to know of what is
        done with them.
        """
        x = (x.transpose(0, 1) if self.is_swapped else x).contiguous()
        state = [*map(_contiguous, state)]
        final, threads = self._final(x, state), self.layout.threads
        h_0 = state[0].data_ptr() if state else 0
        space = memory.take("work", self.size + threads * self.per_thread)
        addresses = [0, 0, *map(_address, (space, *final, *weights))]
        for layer in self.layers:
            y = x.new_empty(*self.y_sizes)
            addresses[:_WORK] = x.data_ptr(), y.data_ptr()
            for direction in layer:
                self._launch(direction, addresses, h_0, threads)
            x = y
        # Kernels know tensors by address; a compiler that traces Python would free them sooner.
        del state, space
        return y.transpose(0, 1) if self.is_swapped else y, self._rounded(final)

    def step(
        self, x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the new h, and all new states, of a single step; see `run`."""
        x, state = x.contiguous(), [*map(_contiguous, state)]
        final, threads = self._final(x, state), self.layout.threads
        h_0 = state[0].data_ptr() if state else 0
        size = self.size + threads * self.per_thread
        space = memory.take("work", size + self.y_size)
        work, *others = map(_address, (space, *final, *weights))
        addresses = [x.data_ptr(), work + size, work, *others]  # the output is the new h once more
        self._launch(self.layers[0][0], addresses, h_0, threads)
        del state, space
        final = self._rounded(final)
        return final[0], final

    def _final(self, x: Tensor, state: Sequence[Tensor]) -> list[Tensor]:
        """The initial states, to be overwritten by the final ones."""
        if state and self.exact is self.dtype:
            return [*map(Tensor.clone, state)]
        if state:
            return [part.to(self.exact) for part in state]
        return [x.new_zeros(sizes, dtype=self.exact) for sizes in self.state_sizes]

    def _rounded(self, final: list[Tensor]) -> list[Tensor]:
        if self.exact is self.dtype:
            return final
        return [part.to(self.dtype) for part in final]

    def _launch(
        self, direction: _Direction, addresses: Sequence[int], h_0: int, threads: int
    ) -> None:
        """Run the kernel; the lock of the interpreter is free meanwhile."""
        arguments = direction.arguments[:]
        for at, k, beyond in direction.addresses:
            arguments[at] = addresses[k] + beyond
        if h_0:
            arguments[_H_0] = h_0 + direction.h_0
        start(self.kernel, self.region, arguments, threads)


def start(kernel: Any, region: int, arguments: array[int], threads: int) -> None:
    """Run a kernel, or its region, which several threads share."""
    address, _ = arguments.buffer_info()
    library = engine.openmp() if threads > 1 else None
    if library is None:
        kernel(address, 0, 1)
    else:
        library.GOMP_parallel(region, address, threads, 0)
