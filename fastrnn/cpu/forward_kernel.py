"""The forward kernel of a cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..flow import FRESH
from .activations import VECTORS
from .steps import Matrix, Step, StepWriter, Vector
from .vector import Code, Value, Variable, where


class ForwardWriter(StepWriter):
    """Writes forward: the products of every step, and the cell's arithmetic on their results."""

    def forward(self, code: Code, a: Any, thread: Value, threads: Value) -> None:
        """Write the body of the forward kernel."""
        cell, n_gates = self.cell, self.cell.n_gates
        first, last = self._slices(a, thread, threads)
        descending = a.reverse != 0
        w_ih = Matrix(a.w_ih, a.packed_ih, n_gates, a.hidden, a.width, a.inputs)
        w_hh = Matrix(a.w_hh, a.packed_hh, n_gates, a.hidden, a.width, a.size_h)
        w_hr = Matrix(a.w_hr, a.packed_hr, 1, a.size_h, a.size_h, a.hidden)
        with code.loop(last, start=first) as j:
            self._add_biases(code, a, j)
            if not cell.is_normalized:
                self._pack(code, w_ih, j)
            self._pack(code, w_hh, j)
        first_h, last_h = self.slices(a.size_h, thread, threads)
        with code.when(a.w_hr.is_given), code.loop(last_h, start=first_h) as j:
            self._pack(code, w_hr, j)
        left = Variable(code.integer(0))  # remaining steps of the chunk of projected input
        base = Variable(code.integer(0))  # the first row of the chunk
        with self._walk(code, a, descending) as step:
            if not cell.is_normalized:
                with code.when(left.get() == 0):
                    steps, rows = self._chunk(code, a, step, descending)
                    left.set(steps)
                    base.set(where(descending, step.row + step.rows - rows, step.row))
                    with code.loop(last, start=first) as j:
                        x, to = a.x + base.get() * a.inputs, a.projected + j * a.chunk * self.width
                        self._product(code, rows, x, a.inputs, w_ih, j, to)
                left.set(left.get() - 1)
            with code.loop(last, start=first) as j:
                scratch = self._scratch(a, j, thread, self.width)
                self._recur(code, a, j, step, w_hh, scratch)
                if cell.is_normalized:
                    with code.loop(step.rows) as b:
                        self._put_product_moments(code, a, j, b, scratch)
                if cell.late:
                    with code.loop(step.rows) as b:
                        self._factor_row(code, a, j, b, step, base.get(), scratch)
                if not self.meets:
                    with code.loop(step.rows) as b:
                        self._forward_row(code, a, j, b, step, base.get(), scratch, thread)
            if self.meets:
                self._finish_step(code, a, step, w_hh, base.get(), (thread, threads))
            with code.when(a.w_hr.is_given):
                self.wait(code, threads)
                with code.loop(last_h, start=first_h) as j:
                    self._project(code, a, j, step, w_hr, self._scratch(a, j, thread, self.width))
            self.wait(code, threads)

    def _finish_step(
        self, code: Code, a: Any, step: Step, w_hh: Matrix, base: Value, of: tuple[Value, Value]
    ) -> None:
        """Write the rest of a step whose threads wait for results of all slices."""
        cell, (thread, threads) = self.cell, of
        first, last = self._slices(a, thread, threads)
        self.wait(code, threads)
        if cell.is_normalized:
            with code.loop(step.rows) as b:
                self._add_moments(code, a, b, thread, cell.n_gates)
            if cell.output:
                self.wait(code, threads)  # until all threads have read the sums
        with code.loop(last, start=first) as j:
            scratch = self._scratch(a, j, thread, self.width)
            if cell.late:
                late = range(self.n_early, cell.n_gates)
                operand = self._operand(a)
                self._product(code, step.rows, operand, a.hidden, w_hh, j, scratch, late)
            with code.loop(step.rows) as b:
                self._forward_row(code, a, j, b, step, base, scratch, thread)
        if cell.output:
            self.wait(code, threads)
            with code.loop(step.rows) as b:
                self._add_moments(code, a, b, thread, 1)
            with code.loop(last, start=first) as j, code.loop(step.rows) as b:
                scratch = self._scratch(a, j, thread, self.width)
                self._output_row(code, a, j, b, step, scratch, thread)

    @property
    def _n_apart(self) -> int:
        """The number of gates, the last ones, whose b_ih and b_hh cannot be added up in advance."""
        return self.cell.n_gates if self.cell.is_normalized else self.cell.n_apart

    def _bias(self, a: Any, j: Value) -> Value:
        """The address of the biases of a slice: of all gates, then b_hh of the last gates."""
        return a.biases + j * (self.width + self._n_apart * self.units)

    def _add_biases(self, code: Code, a: Any, j: Value) -> None:
        """Store the biases of a slice in order, with b_ih and b_hh added up where possible."""
        bias, shared = self._bias(a, j), self.cell.n_gates - self._n_apart
        for g in range(self.cell.n_gates):
            for v, column, valid in self.vectors(a.hidden, j):
                b_ih, b_hh = (
                    code.load(b + (a.width * g + column), where(b.is_given, valid, 0))
                    for b in (a.b_ih, a.b_hh)
                )
                at = bias + (g * self.units + v * self.lanes)
                code.store(at, b_ih + b_hh if g < shared else b_ih)
                if g >= shared:
                    code.store(at + self._n_apart * self.units, b_hh)

    def _chunk(self, code: Code, a: Any, step: Step, descending: Value) -> tuple[Value, Value]:
        """Count the steps from this one on that fit into a chunk, and their rows."""
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
        """Multiply h of the step before, h_0 for rows that it did not have, or fresh h."""
        known, early = step.rows.at_most(step.rows_before), range(self.n_early)
        before, pitch_before = a.h + step.before * a.pitch, a.pitch
        if self.noisy:
            has_drop = a.drop.is_given
            before = where(has_drop, self._dropped(code, a, step, -1), before)
            pitch_before = where(has_drop, a.size_h, a.pitch)
        with code.loop(2) as turn:
            joins = turn != 0
            start = where(joins, known, code.integer(0))
            stop = where(joins, step.rows, known)
            h, pitch = where(joins, a.h_0, before), where(joins, a.width_h, pitch_before)
            to = scratch + start * self.width
            is_known = (turn == 0) | a.h_0.is_given
            with code.when(is_known):
                h = h + start * pitch
                self._product(code, stop - start, h, pitch, w_hh, j, to, early)
            with code.when(is_known == 0):
                self._clear(code, to, (stop - start) * self.width)
        with code.when(a.marks.is_given), code.loop(step.rows) as b:
            is_fresh = self._has_mark(code, a, step.row + b, FRESH, code.always)
            for v, column, valid in self.vectors(a.hidden, j):
                fresh = a.fresh_rh + (b * (a.hidden * self.cell.n_gates) + column)
                row = scratch + (b * self.width + v * self.lanes)
                with code.when(is_fresh & (valid > 0)):
                    for g in early:
                        code.store(row + g * self.units, code.load(fresh + a.hidden * g, valid))

    def _dropped(self, code: Code, a: Any, step: Step, beyond: int) -> Value:
        """The address of h after dropout, of a step or of the step before it."""
        turn = (step.number + (beyond + 2)) & code.integer(1)
        return a.operand + turn * (a.batch * a.size_h)

    def _put_product_moments(self, code: Code, a: Any, j: Value, b: Value, scratch: Value) -> None:
        """Store the moments of a recurrent product."""
        row = scratch + b * self.width
        vectors = [
            (code.load(row + (g * self.units + v * self.lanes), valid), valid)
            for g in range(self.cell.n_gates)
            for v, _, valid in self.vectors(a.hidden, j)
        ]
        self._put_moments(code, a, j, b, vectors)

    def _inputs_of(
        self, code: Code, a: Any, j: Value, at: Value, base: Value, v: int, column: Value,
        valid: Value,
    ) -> list[Value]:  # fmt: skip
        """Load the input parts of the gates of a row."""
        if self.cell.is_normalized:
            wx_row = a.wx + (at * (a.width * self.cell.n_gates) + column)
            return [code.load(wx_row + a.width * g, valid) for g in range(self.cell.n_gates)]
        wx_row, bias = a.projected + (j * a.chunk + (at - base)) * self.width, self._bias(a, j)
        of_gate = [g * self.units + v * self.lanes for g in range(self.cell.n_gates)]
        return [code.load(wx_row + k) + code.load(bias + k) for k in of_gate]

    def _recurrents_of(
        self, code: Code, a: Any, j: Value, at: Value, b: Value, vector: Vector, row: Value,
        thread: Value,
    ) -> list[Value]:  # fmt: skip
        """Compute the recurrent parts of the gates of a row from the products."""
        cell, bias, (v, column, valid) = self.cell, self._bias(a, j), vector
        rh = [code.load(row + (g * self.units + v * self.lanes)) for g in range(cell.n_gates)]
        if cell.is_normalized:
            means = self._means(a, b, thread)
            mean, scale = (code.splat(code.load_number(means + k)) for k in (0, 1))
            rh = [(part - mean) * scale for part in rh]
            with code.when(a.normal.is_given):
                to = a.normal + (at * (a.width * cell.n_gates) + column)
                for g, part in enumerate(rh):
                    code.store(to + a.width * g, part, valid)
                with code.when(column == 0):
                    code.store_number(a.moments + at * a.moments_pitch, code.load_number(means + 1))
            gains = self._gains(code, a, column, valid)
            rh = [part * gain for part, gain in zip(rh, gains, strict=True)]
        for k, g in enumerate(range(cell.n_gates - self._n_apart, cell.n_gates)):
            of_b_hh = (cell.n_gates + k) * self.units + v * self.lanes
            rh[g] = rh[g] + code.load(bias + of_b_hh)
        return rh

    def _old_states(
        self, code: Code, a: Any, b: Value, at: Value, column: Value, valid: Value
    ) -> list[Value]:
        """Load the states of a row before a step."""
        cell, own = self.cell, b * a.width + column
        # Nothing here depends on a projected h.
        counts = [where(a.w_hr.is_given, 0, valid), *[valid] * (cell.n_states - 1)]
        states = zip(a.states, counts, strict=False)
        old = [Variable(code.load(address + own, count)) for address, count in states]
        with code.when(self._has_mark(code, a, at, FRESH, code.always)):
            for address, part, count in zip(a.fresh, old, counts, strict=False):
                part.set(code.load(address + own, count))
        return [part.get() for part in old]

    def _factor_row(
        self, code: Code, a: Any, j: Value, b: Value, step: Step, base: Value, scratch: Value
    ) -> None:
        """Compute the operand of the last gates' product for row b of a step."""
        at, row = step.row + b, scratch + b * self.width
        for v, column, valid in self.vectors(a.hidden, j):
            with code.when(valid > 0):
                wx = self._inputs_of(code, a, j, at, base, v, column, valid)[: self.n_early]
                parts = [row + (g * self.units + v * self.lanes) for g in range(self.n_early)]
                rh = [code.load(part) for part in parts]
                h = self._old_states(code, a, b, at, column, valid)[0]
                h = self._dropout(code, a, b, column, valid, h)
                assert self.cell.late is not None
                factor = VECTORS.bind(self.cell.late.factor)(wx, rh)
                code.store(self._operand(a) + (b * a.hidden + column), factor * h, valid)

    def _operand(self, a: Any) -> Value:
        """The address of the operand of the last gates' product, behind h after dropout."""
        return a.operand + a.batch * a.size_h * 2

    def _dropout(
        self, code: Code, a: Any, b: Value, column: Value, valid: Value, h: Value
    ) -> Value:
        """Apply recurrent dropout to h."""
        if not self.noisy:
            return h
        result = Variable(h)
        with code.when(a.drop.is_given):
            result.set(h * code.load(a.drop + (b * a.width_h + column), valid))
        return result.get()

    def _forward_row(
        self, code: Code, a: Any, j: Value, b: Value, step: Step, base: Value, scratch: Value,
        thread: Value,
    ) -> None:  # fmt: skip
        """Write the pointwise part for row b of a step."""
        cell, at, row = self.cell, step.row + b, scratch + b * self.width
        normalized = []
        for v, column, valid in self.vectors(a.hidden, j):
            state = Variable(code.zeros())
            normalized.append((state, valid))
            with code.when(valid > 0):
                own = b * a.width + column
                wx = self._inputs_of(code, a, j, at, base, v, column, valid)
                vector = Vector(v, column, valid)
                rh = self._recurrents_of(code, a, j, at, b, vector, row, thread)
                old = self._old_states(code, a, b, at, column, valid)
                extra = self._extra(code, a, column, valid)
                new, saved = self.advance(wx, rh, old, extra)
                self._put_raw(code, a, at, column, valid, new)
                if cell.output:
                    code.store(row + v * self.lanes, new[0])
                    code.store(row + (self.units + v * self.lanes), new[-1])
                    state.set(where(code.are_valid(valid), new[-1], code.zeros()))
                else:
                    self._put_h(code, a, b, step, column, valid, old[0], new[0])
                for k in range(1, cell.n_states):
                    value = self._zoned(code, a, k, at, column, valid, old[k], new[k])
                    code.store(a.states[k] + own, value, valid)
                    with code.when(a.traces[k - 1].is_given):
                        code.store(a.traces[k - 1] + (at * a.width + column), value, valid)
                with code.when(a.saved[0].is_given):
                    for address, value in zip(self._saved(a, at, column), saved, strict=True):
                        code.store(address, value, valid)
        if cell.output:
            self._put_moments(code, a, j, b, [(part.get(), valid) for part, valid in normalized])

    def _put_raw(
        self, code: Code, a: Any, at: Value, column: Value, valid: Value, new: Sequence[Value]
    ) -> None:
        """Store the states before zoneout, where it applies."""
        if self.noisy:
            for address, value in zip(a.raw, new, strict=False):
                with code.when(address.is_given):
                    code.store(address + (at * a.width + column), value, valid)

    def _output_row(
        self, code: Code, a: Any, j: Value, b: Value, step: Step, scratch: Value, thread: Value
    ) -> None:
        """Compute h of row b of a step from the normalized state."""
        assert self.cell.output is not None
        at, row, means = step.row + b, scratch + b * self.width, self._means(a, b, thread)
        mean, scale = (code.load_number(means + k) for k in (0, 1))
        with code.when((j == 0) & a.normal.is_given):
            to = a.moments + at * a.moments_pitch
            code.store_number(to + 1, mean)
            code.store_number(to + 2, scale)
        for v, column, valid in self.vectors(a.hidden, j):
            with code.when(valid > 0):
                part, state = (code.load(row + (k * self.units + v * self.lanes)) for k in (0, 1))
                normal = (state - code.splat(mean)) * code.splat(scale)
                old = self._old_states(code, a, b, at, column, valid)[0]
                extra = self._extra(code, a, column, valid)
                h = VECTORS.bind(self.cell.output.forward)(part, normal, extra)
                self._put_h(code, a, b, step, column, valid, old, h)

    def _put_h(
        self, code: Code, a: Any, b: Value, step: Step, column: Value, valid: Value, old: Value,
        new: Value,
    ) -> None:  # fmt: skip
        """Store the h that the cell computed, as the operand of a projection if there is one."""
        with code.either(a.w_hr.is_given) as (projected, plain):
            with projected:
                code.store(self._full(a, step, b) + column, new, valid)
            with plain:
                self._store_h(code, a, b, step, column, valid, old, new)

    def _store_h(
        self, code: Code, a: Any, b: Value, step: Step, column: Value, valid: Value, old: Value,
        new: Value,
    ) -> None:  # fmt: skip
        """Store the h of a row, and the operand of the next step's product."""
        at = step.row + b
        h = self._zoned(code, a, 0, at, column, valid, old, new)
        code.store(a.states[0] + (b * a.width_h + column), h, valid)
        code.store(a.h + (at * a.pitch + column), h, valid)
        if self.noisy:
            with code.when(a.drop.is_given):
                dropped = self._dropout(code, a, b, column, valid, h)
                code.store(
                    self._dropped(code, a, step, 0) + (b * a.size_h + column), dropped, valid
                )

    def _full(self, a: Any, step: Step, b: Value) -> Value:
        """The address of h of row b of a step before its projection."""
        return a.full + (step.row * a.is_full_kept + b) * a.width

    def _project(
        self, code: Code, a: Any, j: Value, step: Step, w_hr: Matrix, scratch: Value
    ) -> None:
        """Project the h of a step."""
        full = self._full(a, step, code.integer(0))
        self._product(code, step.rows, full, a.width, w_hr, j, scratch)
        with code.loop(step.rows) as b:
            for v, column, valid in self.vectors(a.size_h, j):
                with code.when(valid > 0):
                    h = code.load(scratch + (b * self.units + v * self.lanes))
                    old = code.zeros()
                    if self.noisy:
                        old = self._old_h(code, a, b, step.row + b, column, valid)
                    self._store_h(code, a, b, step, column, valid, old, h)

    def _old_h(self, code: Code, a: Any, b: Value, at: Value, column: Value, valid: Value) -> Value:
        """Load the projected h of a row before a step."""
        own = b * a.width_h + column
        old = Variable(code.load(a.states[0] + own, valid))
        with code.when(self._has_mark(code, a, at, FRESH, code.always)):
            old.set(code.load(a.fresh[0] + own, valid))
        return old.get()
