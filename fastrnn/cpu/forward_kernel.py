"""The forward kernel of a cell."""

from __future__ import annotations

from typing import Any

from ..flow import FRESH
from .steps import Matrix, Step, StepWriter
from .vector import Code, Value, Variable, where


class ForwardWriter(StepWriter):
    """Writes forward: every step's products, and the cell's arithmetic on their results."""

    def forward(self, code: Code, a: Any, thread: Value, threads: Value) -> None:
        """Write the body of the forward kernel."""
        first, last = self._slices(a, thread, threads)
        scratch = a.scratch + thread * a.batch * self.width
        descending = a.reverse != 0
        w_ih = Matrix(a.w_ih, a.packed_ih, self.cell.n_gates, a.hidden, a.inputs)
        w_hh = Matrix(a.w_hh, a.packed_hh, self.cell.n_gates, a.hidden, a.size_h)
        w_hr = Matrix(a.w_hr, a.packed_hr, 1, a.size_h, a.hidden)
        with code.loop(last, start=first) as j:
            self._add_biases(code, a, j)
            self._pack(code, w_ih, j)
            self._pack(code, w_hh, j)
        first_h, last_h = self.slices(a.size_h, thread, threads)
        with code.when(a.w_hr.is_given), code.loop(last_h, start=first_h) as j:
            self._pack(code, w_hr, j)
        left = Variable(code.integer(0))  # steps whose input is projected
        base = Variable(code.integer(0))  # the first row of those
        with self._walk(code, a, descending) as step:
            with code.when(left.get() == 0):
                steps, rows = self._chunk(code, a, step, descending)
                left.set(steps)
                base.set(where(descending, step.row + step.rows - rows, step.row))
                with code.loop(last, start=first) as j:
                    x, to = a.x + base.get() * a.inputs, a.projected + j * a.chunk * self.width
                    self._product(code, rows, x, a.inputs, w_ih, j, to)
            left.set(left.get() - 1)
            with code.loop(last, start=first) as j:
                self._recur(code, a, j, step, w_hh, scratch)
                with code.loop(step.rows) as b:
                    self._forward_row(code, a, j, b, step, base.get(), scratch)
            with code.when(a.w_hr.is_given):
                self.wait(code, threads)
                with code.loop(last_h, start=first_h) as j:
                    self._project(code, a, j, step, w_hr, scratch)
            self.wait(code, threads)

    def _bias(self, a: Any, j: Value) -> Value:
        """Where the biases of a slice are: of all gates, then b_hh of the gates apart."""
        return a.biases + j * (self.width + self.cell.n_apart * self.units)

    def _add_biases(self, code: Code, a: Any, j: Value) -> None:
        """Add up the biases of a slice that may be, and put all in order."""
        bias, shared = self._bias(a, j), self.cell.n_gates - self.cell.n_apart
        for g in range(self.cell.n_gates):
            for v, column, valid in self.vectors(a.hidden, j):
                b_ih, b_hh = (
                    code.load(b + (a.hidden * g + column), where(b.is_given, valid, 0))
                    for b in (a.b_ih, a.b_hh)
                )
                at = bias + (g * self.units + v * self.lanes)
                code.store(at, b_ih + b_hh if g < shared else b_ih)
                if g >= shared:
                    code.store(at + self.cell.n_apart * self.units, b_hh)

    def _chunk(self, code: Code, a: Any, step: Step, descending: Value) -> tuple[Value, Value]:
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

    def _recur(
        self, code: Code, a: Any, j: Value, step: Step, w_hh: Matrix, scratch: Value
    ) -> None:
        """Multiply h of the step before, or h_0 of rows that it had not."""
        known = step.rows.at_most(step.rows_before)
        with code.loop(2) as part:
            joins = part != 0
            start = where(joins, known, code.integer(0))
            stop = where(joins, step.rows, known)
            h = where(joins, a.h_0, a.h + step.before * a.pitch)
            pitch = where(joins, a.size_h, a.pitch)
            to = scratch + start * self.width
            is_known = (part == 0) | a.h_0.is_given
            with code.when(is_known):
                self._product(code, stop - start, h + start * pitch, pitch, w_hh, j, to)
            with code.when(is_known == 0):
                self._clear(code, to, (stop - start) * self.width)

    def _forward_row(
        self, code: Code, a: Any, j: Value, b: Value, step: Step, base: Value, scratch: Value
    ) -> None:
        """The pointwise part for row b of a step."""
        cell, bias, at = self.cell, self._bias(a, j), step.row + b
        wx_row = a.projected + (j * a.chunk + (at - base)) * self.width
        rh_row = scratch + b * self.width
        is_fresh = self._has_mark(code, a, at, FRESH, code.always)
        is_projected = a.w_hr.is_given
        for v, column, valid in self.vectors(a.hidden, j):
            with code.when(valid > 0):
                of_gate = [g * self.units + v * self.lanes for g in range(cell.n_gates)]
                own = b * a.hidden + column
                states = [address + own for address in a.states[: cell.n_states]]
                # No cell that may be projected looks at the h before.
                of_state = [where(is_projected, 0, valid), *[valid] * (cell.n_states - 1)]
                wx = [code.load(wx_row + k) + code.load(bias + k) for k in of_gate]
                old_rh = [Variable(code.load(rh_row + k)) for k in of_gate]
                old = [
                    Variable(code.load(address, count))
                    for address, count in zip(states, of_state, strict=True)
                ]
                with code.when(is_fresh):
                    fresh = a.fresh_rh + (b * (a.hidden * cell.n_gates) + column)
                    for g, part in enumerate(old_rh):
                        part.set(code.load(fresh + a.hidden * g, valid))
                    for address, part, count in zip(a.fresh, old, of_state, strict=False):
                        part.set(code.load(address + own, count))
                rh = [part.get() for part in old_rh]
                for g in range(cell.n_gates - cell.n_apart, cell.n_gates):
                    rh[g] = rh[g] + code.load(bias + (of_gate[g] + cell.n_apart * self.units))
                extra = self._extra(code, a, column, valid)
                new, saved = self.advance(wx, rh, [part.get() for part in old], extra)
                with code.either(is_projected) as (projected, plain):
                    with projected:
                        code.store(self._full(a, step, b) + column, new[0], valid)
                    with plain:
                        code.store(states[0], new[0], valid)
                        code.store(a.h + (at * a.pitch + column), new[0], valid)
                for address, value in zip(states[1:], new[1:], strict=True):
                    code.store(address, value, valid)
                with code.when(a.traces[0].is_given):
                    for address, value in zip(a.traces, new[1:], strict=False):
                        code.store(address + (at * a.hidden + column), value, valid)
                with code.when(a.saved[0].is_given):
                    for address, value in zip(self._saved(a, at, column), saved, strict=True):
                        code.store(address, value, valid)

    def _full(self, a: Any, step: Step, b: Value) -> Value:
        """Where h of row b of a step is before its projection."""
        return a.full + (step.row * a.is_full_kept + b) * a.hidden

    def _project(
        self, code: Code, a: Any, j: Value, step: Step, w_hr: Matrix, scratch: Value
    ) -> None:
        """Project h of a step."""
        full = self._full(a, step, code.integer(0))
        self._product(code, step.rows, full, a.hidden, w_hr, j, scratch)
        with code.loop(step.rows) as b:
            for v, column, valid in self.vectors(a.size_h, j):
                with code.when(valid > 0):
                    h = code.load(scratch + (b * self.units + v * self.lanes))
                    code.store(a.h + ((step.row + b) * a.pitch + column), h, valid)
                    code.store(a.states[0] + (b * a.size_h + column), h, valid)
