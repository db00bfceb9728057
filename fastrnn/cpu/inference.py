"""Whole inference calls by the compiled kernels, without the records of ``layers.py``.

A short call spends more time in Python than in the kernel. Everything that depends only on sizes is
prepared once, in a `Stack`; a call only allocates its results and fills in addresses.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import Call, Weights
from . import engine, machine, memory, native
from .arguments import Forward
from .direction import Direction, Noise
from .rows import Rows

# Offsets of the arguments, in words.
AT = {field[0]: getattr(Forward, field[0]).offset // 8 for field in Forward._fields_}
_WORDS = ctypes.sizeof(Forward) // 8
# Indices into the addresses of a layer: its input, output and work space, and what torch computes
# in advance for each of two directions; then the final states and the weights.
_X, Y, WORK, _WX, _EXTRA, *_, _OTHERS = range(8)
_BY_DIRECTION = _EXTRA + 1 - _WX
OF_LAYER = (0,) * _OTHERS

_address, _contiguous = Tensor.data_ptr, Tensor.contiguous


class _Layer(NamedTuple):
    """The arguments of the directions of a layer, head by head.

    Attributes
    ----------
    arguments : array
        The arguments of the kernel, without addresses.
    addresses : list of (int, int, int)
        For each address: index of the argument, index of the call's address, and offset in bytes.
    h_0 : list of (int, int)
        For each initial h: index of the argument, and offset in bytes from that of the call.
    weights : list of slice
        The weights of each direction among those of the call.
    size : int
        Size of the work space in bytes.
    """

    arguments: array[int]
    addresses: list[tuple[int, int, int]]
    h_0: list[tuple[int, int]]
    weights: list[slice]
    size: int

    def joined(self, other: _Layer) -> _Layer:
        """Append another direction."""
        count = len(self.arguments)
        addresses = [
            (at + count, k, beyond + self.size * (k == WORK)) for at, k, beyond in other.addresses
        ]
        return _Layer(
            self.arguments + other.arguments,
            self.addresses + addresses,
            self.h_0 + [(at + count, beyond) for at, beyond in other.h_0],
            self.weights + other.weights,
            self.size + other.size,
        )


def _direction(
    call: Call, direction: Direction, layout: native.Layout, inputs: int, n: int
) -> _Layer:
    """Prepare direction `n` among all, with the same numbers as ``native.forward``."""
    heads, bytes_of = direction.num_heads, call.x.element_size()
    space, chunk = native.Space.of(direction, layout, inputs)
    of_one = array("q", bytes(ctypes.sizeof(Forward)))
    for name, number in _numbers(call, direction, inputs).items():
        of_one[AT[name]] = number
    of_one[AT["chunk"]] = chunk
    for k, zone in enumerate(direction.noise.zones if direction.noise else ()):
        of_one[AT["shares"] + k] = zone.data_ptr() if zone.numel() else 0
    places, size = _work(call, direction, layout, space)
    places += _tensors(call, direction, layout, inputs, n)
    addresses = [
        (at + k * _WORDS, address, beyond + k * by)
        for k in range(heads)
        for at, address, beyond, by in places
    ]
    of_h = n * direction.rows.batch * call.size_h
    units = call.hidden_size // heads
    h_0 = [(AT["h_0"] + k * _WORDS, (of_h + k * units) * bytes_of) for k in range(heads)]
    weights = slice(n * call.n_weights, (n + 1) * call.n_weights)
    return _Layer(of_one * heads, addresses, h_0, [weights], size * heads)


def _numbers(call: Call, direction: Direction, inputs: int) -> dict[str, int]:
    """The numbers of a kernel's arguments."""
    rows = direction.rows
    return {
        "groups": 1, "steps": rows.steps, "rows": rows.total, "batch": rows.batch, "inputs": inputs,
        "hidden": call.hidden_size // direction.num_heads, "size_h": direction.w.w_hh.shape[1],
        "width": call.hidden_size, "width_h": call.size_h, "reverse": direction.reverse,
        "pitch": call.directions * call.size_h,
    }  # fmt: skip


# Index of the argument, index of the address, offset in bytes, and distance from head to head.
_Places = list[tuple[int, int, int, int]]


def _work(
    call: Call, direction: Direction, layout: native.Layout, space: native.Space
) -> tuple[_Places, int]:
    """The parts of the work space of a head, and its size in bytes."""
    batch, threads = direction.rows.batch, layout.threads
    is_projected = direction.w.w_hr is not None
    sums, means = layout.of_means(batch, threads)
    parts = {
        "full": call.x.element_size() * batch * call.hidden_size * is_projected,
        **space._asdict(), "sums": sums, "means": means,
        "scratch": layout.scratch(batch, call.cell.n_gates * layout.units, threads),
    }  # fmt: skip
    ends = itertools.accumulate(-(-size // 64) * 64 for size in parts.values())
    *starts, size = 0, *ends
    pairs = zip(parts.items(), starts, strict=True)
    return [(AT[name], WORK, at, size) for (name, count), at in pairs if count], size


def _tensors(
    call: Call, direction: Direction, layout: native.Layout, inputs: int, n: int
) -> _Places:
    """The tensors of direction `n`."""
    cell, w, bytes_of = call.cell, direction.w, call.x.element_size()
    units, own_h = call.hidden_size // direction.num_heads, w.w_hh.shape[1]
    in_y = n % call.directions * call.size_h
    places = [(AT["x"], _X, 0, 0), (AT["h"], Y, in_y * bytes_of, units * bytes_of)]
    for k, width in enumerate(_widths(call)):
        of_n = n * direction.rows.batch * width
        places.append((AT["states"] + k, _OTHERS + k, of_n * layout.exact, units * layout.exact))
    by_head = {"w_ih": units * inputs, "w_hh": units * own_h}
    names = ["w_ih", "w_hh", *["b_ih", "b_hh"] * (w.b_ih is not None)]
    names += ["w_hr"] * (w.w_hr is not None) + ["extra"] * (len(cell.extras) == 1)
    first = _OTHERS + cell.n_states + n * call.n_weights
    of_weights = {name: (k, by_head.get(name, units)) for k, name in enumerate(names, first)}
    if len(cell.extras) > 1:
        of_weights["extra"] = _EXTRA + n % call.directions * _BY_DIRECTION, units
    if cell.is_normalized:
        of_weights["wx"] = _WX + n % call.directions * _BY_DIRECTION, units
        of_weights.pop("b_ih", None)  # already included in wx
    return places + [(AT[name], k, 0, by * bytes_of) for name, (k, by) in of_weights.items()]


def _widths(call: Call) -> list[int]:
    """The widths of the states."""
    return [call.size_h] + [call.hidden_size] * (call.cell.n_states - 1)


class Stack:
    """The layers of a checked call, or a single step, prepared for tensors of the same sizes.

    It is immutable, so threads may share it.
    """

    def __init__(self, call: Call, *, is_step: bool = False) -> None:
        cell, x, directions = call.cell, call.x, call.directions
        batch_first = call.options.batch_first
        steps, batch = (1, x.shape[0]) if is_step else (call.steps, call.batch)
        width, count = directions * call.size_h, call.num_layers * directions
        # With one sequence or one step, both orders have the same memory layout.
        self.is_swapped = batch_first and steps > 1 and batch > 1
        self.y_sizes = [steps, batch, width]
        if batch_first and not self.is_swapped:
            self.y_sizes = [batch, steps, width]
        self.y_size = x.element_size() * batch * width
        self.state_sizes = [[batch, n] if is_step else [count, batch, n] for n in _widths(call)]
        inputs = [x.shape[-1], *[width] * (call.num_layers - 1)]
        rows, of_weights = Rows(steps, batch, None), call.by_direction()
        self.noise = Noise(None, call.flow.noise[1:]) if call.flow.noise else None
        self.layers = []
        for k, size in enumerate(inputs):
            parts = []
            for d in range(directions):
                n = k * directions + d
                direction = Direction(cell, of_weights[n], rows, d == 1, [], None, self.noise)
                self.layout = native.Layout.of(direction)
                parts.append(_direction(call, direction, self.layout, size, n))
            self.layers.append(functools.reduce(_Layer.joined, parts))
        self.cell, self.heads, self.groups = cell, call.num_heads, directions * call.num_heads
        # Threads per group, for which the work space has room.
        self.threads = self.layout.threads
        self.is_normalized, self.n_extras = cell.is_normalized, len(cell.extras)
        self.size = max(layer.size for layer in self.layers)
        self.dtype, self.exact = x.dtype, machine.exact_dtype(x.dtype)
        # A reference, which keeps the code alive.
        self.kernels = engine.kernels(cell, x.dtype, noisy=self.noise is not None)
        addresses = self.kernels.addresses
        self.kernel, self.region = engine.KERNEL(addresses["forward"]), addresses["forward_region"]

    def run(
        self, x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the output and the final state, from zeros if `state` is empty.

        The caller guarantees that the tensors differ from those of the prepared call only in
        values, and x and states in strides; and that nothing intercepts operations on them.
        """
        x = (x.transpose(0, 1) if self.is_swapped else x).contiguous()
        state = [*map(_contiguous, state)]
        final = self._final(x, state)
        h_0 = state[0].data_ptr() if state else 0
        space = memory.take("work", self.size)
        addresses = [*OF_LAYER, *map(_address, (*final, *weights))]
        addresses[WORK] = space.data_ptr()
        for layer in self.layers:
            y = x.new_empty(*self.y_sizes)
            addresses[:WORK] = x.data_ptr(), y.data_ptr()
            self._launch(layer, x, weights, addresses, h_0)
            x = y
        # Kernels use tensors by address; a compiler that traces Python might free them earlier.
        del state, space
        return y.transpose(0, 1) if self.is_swapped else y, self._rounded(final)

    def step(
        self, x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the new h, and all new states, of a single step; see `run`."""
        x, state = x.contiguous(), [*map(_contiguous, state)]
        final = self._final(x, state)
        h_0 = state[0].data_ptr() if state else 0
        space = memory.take("work", self.size + self.y_size)
        addresses = [*OF_LAYER, *map(_address, (*final, *weights))]
        addresses[WORK] = work = space.data_ptr()
        addresses[:WORK] = x.data_ptr(), work + self.size  # the output is a copy of the new h
        self._launch(self.layers[0], x, weights, addresses, h_0)
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
        self,
        layer: _Layer,
        x: Tensor,
        weights: Sequence[Tensor],
        addresses: list[int],
        h_0: int,
        normal: Sequence[Tensor] = (),
    ) -> None:
        """Run the kernel, with the GIL released."""
        arguments, held = layer.arguments[:], []
        if self.n_extras > 1 or self.is_normalized:
            for d, own_weights in enumerate(layer.weights):
                own = Weights.unpack(weights[own_weights], self.n_extras)
                held.append(torch.cat(own.extras))
                addresses[_EXTRA + d * _BY_DIRECTION] = held[-1].data_ptr()
                if self.is_normalized:
                    rows = x.flatten(0, -2)
                    held.append(native.normalized_input(self.cell, own, self.heads, rows, normal))
                    addresses[_WX + d * _BY_DIRECTION] = held[-1].data_ptr()
        for at, k, beyond in layer.addresses:
            arguments[at] = addresses[k] + beyond
        if h_0:
            for at, beyond in layer.h_0:
                arguments[at] = h_0 + beyond
        if self.groups == 1:
            start(self.kernel, self.region, arguments, min(self.threads, self.layout.threads))
        else:
            self._launch_groups(arguments)
        del held

    def _launch_groups(self, arguments: array[int]) -> None:
        """Run the kernel for the heads of all directions, which do not wait for each other."""
        for first, count, threads in self.layout.launches(self.groups):
            of_launch = arguments[first * _WORDS : (first + count) * _WORDS]
            threads = min(threads, count * self.threads)
            for k in range(count):
                of_launch[k * _WORDS : k * _WORDS + 2] = array("q", (count, threads))
            start(self.kernel, self.region, of_launch, threads)


def start(kernel: Any, region: int, arguments: array[int], threads: int) -> None:
    """Run a kernel or, with several threads, its parallel region."""
    address, _ = arguments.buffer_info()
    library = engine.openmp() if threads > 1 else None
    if library is None:
        kernel(address, 0, 1)
    else:
        library.GOMP_parallel(region, address, threads, 0)
