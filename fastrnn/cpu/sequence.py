"""Whole sequences on a CPU: the kernels, as code for LLVM.

One parallel region runs all steps of one direction of a layer. Hidden units fall into slices of two
vectors, and a thread owns whole slices: it packs their weights, which then stay in its cache, and
computes their gates and states. Only h (in backward: the gradient of the gates) crosses between
threads, at one barrier a step.

Arrays have torch's layouts; packed weights are padded with zeros.

A packed sequence differs from a padded batch in the number of rows of a step alone: `sizes`. Rows
that join late (in the order of the pass) start from the initial state, rows that leave early keep
theirs, so that one rule for "rows which the step before had, and those it had not" is enough.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from llvmlite import ir

from ..cells import Cell
from ..flow import CUT, FRESH
from .activations import VECTORS
from .arguments import Backward, Forward
from .machine import Target
from .tiles import Writer
from .vector import ADDRESS, INT, Code, Value, Variable, where


def module(cell: Cell, target: Target) -> Any:
    """Write the kernels ``forward`` and ``backward`` of a cell."""
    result = ir.Module(f"fastrnn_{cell.name}")
    writer = _Writer(result, cell, target)
    writer.kernel("forward", Forward, writer.forward)
    writer.kernel("backward", Backward, writer.backward)
    return result


class _Step(NamedTuple):
    """A step of a walk: its rows and those of the steps before and after it in its order."""

    number: Value  # in the order of the walk
    row: Value  # the first
    rows: Value  # how many
    before: Value
    rows_before: Value
    after: Value
    rows_after: Value


class _Writer(Writer):
    """Writes the kernels of one cell."""

    def __init__(self, module: Any, cell: Cell, target: Target) -> None:
        super().__init__(module, target)
        self.cell = cell
        self.advance, self.pull_back = VECTORS.bind(cell.forward), VECTORS.bind(cell.backward)
        self.width = cell.n_gates * self.units  # columns of a slice
        self.multiply = self.tile()
        self.transpose = self._transpose()

    def _transpose(self) -> Any:
        """``transpose(w, k, units, panel)``: panel[i, u] = w[u, i], zero from `units` on."""
        code = self.function("transpose", [ADDRESS, INT, INT, ADDRESS])
        w, k, units, panel = code.parameters
        block = 16  # floats in a cache line
        with (
            code.loop(k, step=block) as first,
            code.loop(self.units) as u,
            code.loop((first + block).at_most(k), start=first) as i,
        ):
            value = Variable(code.number(0.0))
            with code.when(u < units):
                value.set(code.load_float(w + (u * k + i)))
            code.store_float(panel + (i * self.units + u), value.get())
        return code.finish()

    def _product(
        self, code: Code, rows: Value, a: Value, pitch: Value, panels: Sequence[Value], k: Value,
        c: Value,
    ) -> None:  # fmt: skip
        """c = a @ panel for any number of rows, the results of the panels side by side in c."""
        width = code.integer(len(panels) * self.units)
        for n, panel in enumerate(panels):
            with code.loop(rows, step=self.tile_rows) as row:
                height = (rows - row).at_most(self.tile_rows)
                to = c + (row * width + n * self.units)
                code.call(self.multiply, height, a + row * pitch, pitch, panel, k, to, width)

    def _clear(self, code: Code, to: Value, count: Value) -> None:
        """Store zeros, a multiple of a vector."""
        with code.loop(count, step=self.lanes) as k:
            code.store(to + k, code.zeros())

    # The walk over the steps.

    def _rows(self, code: Code, a: Any, count: Value, descending: Value) -> Value:
        """How many rows the step has that comes after `count` others; none beyond the last."""
        rows = Variable(code.integer(0))
        with code.when(count < a.steps):
            rows.set(a.batch)
            with code.when(a.sizes.is_given):
                step = where(descending, a.steps - 1 - count, count)
                rows.set(code.load_int(a.sizes, step))
        return rows.get()

    @contextlib.contextmanager
    def _walk(self, code: Code, a: Any, descending: Value, beyond: int = 0) -> Iterator[_Step]:
        """Repeat the block for every step, up or down the rows, then for `beyond` empty ones."""
        zero = code.integer(0)
        row = Variable(where(descending, a.rows, zero))
        rows = Variable(self._rows(code, a, zero, descending))
        before, rows_before = Variable(zero), Variable(zero)
        with code.loop(a.steps + beyond) as count:
            row.set(row.get() - where(descending, rows.get(), zero))
            first, size = row.get(), rows.get()
            rows_after = self._rows(code, a, count + 1, descending)
            after = where(descending, first - rows_after, first + size)
            yield _Step(count, first, size, before.get(), rows_before.get(), after, rows_after)
            before.set(first)
            rows_before.set(size)
            row.set(where(descending, first, first + size))
            rows.set(rows_after)

    def _slices(self, a: Any, thread: Value, threads: Value) -> tuple[Value, Value]:
        """The slices of a thread."""
        return self.share((a.hidden + (self.units - 1)) // self.units, thread, threads)

    def _has_mark(self, code: Code, a: Any, row: Value, bits: int, is_row: Value) -> Value:
        """Whether a row, if it is one, has one of the marks."""
        mark = Variable(code.integer(0))
        with code.when(is_row & a.marks.is_given):
            mark.set(code.load_byte(a.marks, row) & code.integer(bits))
        return mark.get() != 0

    def _saved(self, a: Any, row: Value, column: Value) -> list[Value]:
        """Where the saved vectors of a row are."""
        return [first + (row * a.hidden + column) for first in a.saved[: self.cell.n_saved]]

    def _extra(self, code: Code, a: Any, column: Value, valid: Value) -> list[Value]:
        """The vectors of the extra weights."""
        blocks = range(self.cell.n_extra)
        return [code.load(a.extra + (a.hidden * k + column), valid) for k in blocks]

    # Forward.

    def forward(self, code: Code, a: Any, thread: Value, threads: Value) -> None:
        """Write the body of the forward kernel."""
        first, last = self._slices(a, thread, threads)
        scratch = a.scratch + thread * a.batch * self.width
        descending = a.reverse != 0
        with code.loop(last, start=first) as j:
            self._pack(code, a, j)
        left = Variable(code.integer(0))  # steps whose input is projected
        base = Variable(code.integer(0))  # the first row of those
        with self._walk(code, a, descending) as step:
            with code.when(left.get() == 0):
                steps, rows = self._chunk(code, a, step, descending)
                left.set(steps)
                base.set(where(descending, step.row + step.rows - rows, step.row))
                with code.loop(last, start=first) as j:
                    self._project(code, a, j, base.get(), rows)
            left.set(left.get() - 1)
            with code.loop(last, start=first) as j:
                self._recur(code, a, j, step, scratch)
                with code.loop(step.rows) as b:
                    self._forward_row(code, a, j, b, step.row + b, base.get(), scratch)
            self.wait(code, threads)

    def _panels(self, a: Any, j: Value) -> tuple[list[Value], list[Value], Value]:
        """Addresses of the panels of W_ih and W_hh by gate, and of the biases of a slice."""
        biases = self.width + self.cell.n_apart * self.units
        w_ih = a.packed + j * ((a.inputs + a.hidden) * self.width + biases)
        w_hh = w_ih + a.inputs * self.width
        gates = [g * self.units for g in range(self.cell.n_gates)]
        return (
            [w_ih + a.inputs * g for g in gates],
            [w_hh + a.hidden * g for g in gates],
            w_hh + a.hidden * self.width,
        )

    def _pack(self, code: Code, a: Any, j: Value) -> None:
        """Pack the weights of a slice. Biases that may be added up are."""
        w_ih, w_hh, bias = self._panels(a, j)
        units = (a.hidden - j * self.units).at_most(self.units)
        shared = self.cell.n_gates - self.cell.n_apart
        for g in range(self.cell.n_gates):
            unit = a.hidden * g + j * self.units
            code.call(self.transpose, a.w_ih + unit * a.inputs, a.inputs, units, w_ih[g])
            code.call(self.transpose, a.w_hh + unit * a.hidden, a.hidden, units, w_hh[g])
            for v, column, valid in self.vectors(code, a.hidden, j):
                b_ih, b_hh = (
                    code.load(b + (a.hidden * g + column), where(b.is_given, valid, 0))
                    for b in (a.b_ih, a.b_hh)
                )
                at = bias + (g * self.units + v * self.lanes)
                code.store(at, b_ih + b_hh if g < shared else b_ih)
                if g >= shared:
                    code.store(at + self.cell.n_apart * self.units, b_hh)

    def _chunk(self, code: Code, a: Any, step: _Step, descending: Value) -> tuple[Value, Value]:
        """How many steps from this one on fit into a chunk, and how many rows they have."""
        steps, rows = Variable(code.integer(1)), Variable(step.rows)
        following = Variable(step.rows_after)
        with code.repeat(
            lambda: (
                (step.number + steps.get() < a.steps) & (rows.get() + following.get() <= a.chunk)
            )
        ):
            rows.set(rows.get() + following.get())
            steps.set(steps.get() + 1)
            following.set(self._rows(code, a, step.number + steps.get(), descending))
        return steps.get(), rows.get()

    def _project(self, code: Code, a: Any, j: Value, row: Value, rows: Value) -> None:
        """Multiply rows of the input with the weights of a slice and add the biases."""
        w_ih, _, bias = self._panels(a, j)
        to = a.projected + j * a.chunk * self.width
        self._product(code, rows, a.x + row * a.inputs, a.inputs, w_ih, a.inputs, to)
        with code.loop(rows) as i, code.loop(self.width, step=self.lanes) as k:
            at = to + (i * self.width + k)
            code.store(at, code.load(at) + code.load(bias + k))

    def _recur(self, code: Code, a: Any, j: Value, step: _Step, scratch: Value) -> None:
        """Multiply h of the step before, or h_0 of rows that it had not."""
        _, w_hh, _ = self._panels(a, j)
        known = step.rows.at_most(step.rows_before)
        with code.loop(2) as part:
            joins = part != 0
            start = where(joins, known, code.integer(0))
            stop = where(joins, step.rows, known)
            h = where(joins, a.h_0, a.h + step.before * a.pitch)
            pitch = where(joins, a.hidden, a.pitch)
            to = scratch + start * self.width
            is_known = (part == 0) | a.h_0.is_given
            with code.when(is_known):
                self._product(code, stop - start, h + start * pitch, pitch, w_hh, a.hidden, to)
            with code.when(is_known == 0):
                self._clear(code, to, (stop - start) * self.width)

    def _forward_row(
        self, code: Code, a: Any, j: Value, b: Value, at: Value, base: Value, scratch: Value
    ) -> None:
        """The pointwise part for row b of a step, row `at` of all."""
        cell = self.cell
        _, _, bias = self._panels(a, j)
        wx_row = a.projected + (j * a.chunk + (at - base)) * self.width
        rh_row = scratch + b * self.width
        is_fresh = self._has_mark(code, a, at, FRESH, code.always)
        for v, column, valid in self.vectors(code, a.hidden, j):
            with code.when(valid > 0):
                of_gate = [g * self.units + v * self.lanes for g in range(cell.n_gates)]
                own = b * a.hidden + column
                states = [address + own for address in a.states[: cell.n_states]]
                wx = [code.load(wx_row + k) for k in of_gate]
                old_rh = [Variable(code.load(rh_row + k)) for k in of_gate]
                old = [Variable(code.load(s, valid)) for s in states]
                with code.when(is_fresh):
                    fresh = a.fresh_rh + (b * (a.hidden * cell.n_gates) + column)
                    for g, part in enumerate(old_rh):
                        part.set(code.load(fresh + a.hidden * g, valid))
                    for address, part in zip(a.fresh, old, strict=False):
                        part.set(code.load(address + own, valid))
                rh = [part.get() for part in old_rh]
                for g in range(cell.n_gates - cell.n_apart, cell.n_gates):
                    rh[g] = rh[g] + code.load(bias + (of_gate[g] + cell.n_apart * self.units))
                extra = self._extra(code, a, column, valid)
                new, saved = self.advance(wx, rh, [part.get() for part in old], extra)
                for address, value in zip(states, new, strict=True):
                    code.store(address, value, valid)
                code.store(a.h + (at * a.pitch + column), new[0], valid)
                with code.when(a.traces[0].is_given):
                    for address, value in zip(a.traces, new[1:], strict=False):
                        code.store(address + (at * a.hidden + column), value, valid)
                with code.when(a.saved[0].is_given):
                    for address, value in zip(self._saved(a, at, column), saved, strict=True):
                        code.store(address, value, valid)

    # Backward.

    def backward(self, code: Code, a: Any, thread: Value, threads: Value) -> None:
        """Write the body of the backward kernel.

        It walks the other way, and one step further, in which all rows receive their d_h_0.
        """
        first, last = self._slices(a, thread, threads)
        depth = a.hidden * self.cell.n_gates
        scratch = a.scratch + thread * a.batch * self.units
        descending = a.reverse == 0
        with code.loop(last, start=first) as j:
            panel = a.packed + j * (depth * self.units)
            self.copy_panel(code, a.w_hh, a.hidden, depth, a.hidden, j, panel)
        with self._walk(code, a, descending, beyond=1) as step:
            self.wait(code, threads)
            with code.loop(last, start=first) as j, code.loop(3) as part:
                # Rows that both steps have, rows that begin in this walk, rows that end in it.
                known = step.rows.at_most(step.rows_before)
                begins, ends = part == 1, part == 2
                start = where(ends, step.rows, where(begins, known, code.integer(0)))
                stop = where(ends, step.rows_before, where(begins, step.rows, known))
                panel = a.packed + j * (depth * self.units)
                to = scratch + start * self.units
                with code.when(begins):
                    self._clear(code, to, (stop - start) * self.units)
                with code.when(part != 1):
                    pitch = a.d_gates_pitch
                    d_rh = a.d_gates + (step.before + start) * pitch
                    self._product(code, stop - start, d_rh, pitch, [panel], depth, to)
                with code.loop(stop, start=start) as b:
                    # What passed by the product, unless it ended at a mark.
                    row = step.before + b
                    stops = self._has_mark(code, a, row, FRESH | CUT, part != 1)
                    to = scratch + b * self.units
                    with code.when(stops):
                        self._clear(code, to, code.integer(self.units))
                    self._backward_row(code, a, j, b, step, to, ends)

    def _backward_row(
        self, code: Code, a: Any, j: Value, b: Value, step: _Step, passed: Value, ends: Value
    ) -> None:
        """The pointwise part for row b of a step, or the end of a sequence that lacks it."""
        cell, at = self.cell, step.row + b
        is_fresh = self._has_mark(code, a, at, FRESH, ends == 0)
        is_cut = self._has_mark(code, a, at, FRESH | CUT, ends == 0)
        for v, column, valid in self.vectors(code, a.hidden, j):
            with code.when(valid > 0):
                own = b * a.hidden + column
                d_state = [address + own for address in a.d_states[: cell.n_states]]
                d = [code.load(address, valid) for address in d_state]
                d[0] = d[0] + code.load(passed + v * self.lanes)
                with code.when(ends):
                    code.store(d_state[0], d[0], valid)
                with code.when(ends == 0):
                    for k, address in enumerate(a.d_rows[: cell.n_states]):
                        # Not a load without lanes: from a null address that takes long.
                        of_step = Variable(code.zeros())
                        with code.when(address.is_given):
                            of_step.set(code.load(address + (at * a.pitch + column), valid))
                        d[k] = d[k] + of_step.get()
                    d_rh, d_apart, d_previous = self.pull_back(
                        [code.load(address, valid) for address in self._saved(a, at, column)],
                        [code.load(s, valid) for s in self._states(a, at, column)],
                        self._previous(code, a, b, step, column, valid, is_fresh),
                        d,
                        self._extra(code, a, column, valid),
                    )
                    to = a.d_gates + (at * a.d_gates_pitch + column)
                    for k, value in enumerate((*d_rh, *d_apart)):
                        code.store(to + a.hidden * k, value, valid)
                    for address, given, fresh in zip(d_state, d_previous, a.d_fresh, strict=False):
                        passes = Variable(given)
                        with code.when(is_cut):
                            with code.when(is_fresh):
                                total = code.load(fresh + own, valid) + given
                                code.store(fresh + own, total, valid)
                            passes.set(code.zeros())
                        code.store(address, passes.get(), valid)

    def _states(self, a: Any, row: Value, column: Value) -> list[Value]:
        """Where the states after a row are."""
        traces = a.traces[: self.cell.n_states - 1]
        return [a.h + (row * a.pitch + column), *(t + (row * a.hidden + column) for t in traces)]

    def _previous(
        self, code: Code, a: Any, b: Value, step: _Step, column: Value, valid: Value,
        is_fresh: Value,
    ) -> list[Value]:  # fmt: skip
        """The states before row b of a step: its walk is the other one, and meets them next."""
        own, is_inside = b * a.hidden + column, b < step.rows_after
        earlier = self._states(a, step.after + b, column)
        known = where(is_inside | a.initial[0].is_given | is_fresh, valid, 0)
        return [
            code.load(where(is_fresh, fresh + own, where(is_inside, before, initial + own)), known)
            for before, initial, fresh in zip(earlier, a.initial, a.fresh, strict=False)
        ]
