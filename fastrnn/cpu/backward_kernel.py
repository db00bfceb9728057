"""The backward kernel of a cell."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..flow import CUT, FRESH
from .activations import VECTORS
from .arguments import pass_blocks
from .steps import Step, StepWriter, Vector
from .vector import Code, Value, Variable, where


class _Row(NamedTuple):
    """Row b of a step, in a slice."""

    j: Value
    b: Value
    at: Value  # its index among all rows
    passed: Value  # address of the gradient that the recurrent product passed to it
    thread: Value
    ends: Value  # whether the step has no such row: here the sequence has ended already


class BackwardWriter(StepWriter):
    """Writes backward: the gradients of the gates of all rows."""

    def backward(self, code: Code, a: Any, thread: Value, threads: Value) -> None:
        """Write the body of the backward kernel.

        It walks in the opposite order, and one step beyond, in which the rows receive their d_h_0.
        If there is no work space for packed weights, it omits that step, and d_h_0 lacks the
        gradient through the recurrent product.
        """
        cell, of = self.cell, (thread, threads)
        first, last = self._slices(a, thread, threads)
        first_h, last_h = self.slices(a.size_h, thread, threads)
        is_projected, passes = a.w_hr.is_given, a.packed_hh.is_given
        with code.when(passes), code.loop(last_h, start=first_h) as j:
            self._pack_gates(code, a, j)
        with code.when(is_projected), code.loop(last, start=first) as j:
            panel = self._packed(a.packed_hr, j, a.size_h)
            self.copy_panel(code, a.w_hr, a.hidden, a.size_h, a.hidden, j, panel)
        with self._walk(code, a, a.reverse == 0, where(passes, code.integer(1), 0)) as step:
            self.wait(code, threads)
            if not cell.is_normalized:
                self._gather(code, a, step, thread)
            with code.when(is_projected):
                with code.loop(last_h, start=first_h) as j:
                    self._project_back(code, a, j, step, thread)
                self.wait(code, threads)
            with code.loop(last, start=first) as j:
                scratch = self._scratch(a, j, thread, self._pass_width)
                with self._parts(code, step) as (begins, ends, start, stop):
                    with code.either(is_projected) as (projected, plain):
                        with projected:
                            d_h = a.d_projected + (step.row + start) * a.size_h
                            panel = self._packed(a.packed_hr, j, a.size_h)
                            rows = where(ends, 0, stop - start)
                            to = scratch + start * self._pass_width
                            self._by_panel(
                                code, rows, d_h, a.size_h, panel, a.size_h, to,
                                code.integer(self._pass_width),
                            )  # fmt: skip
                        with plain:
                            self._pass(code, a, j, step, scratch, (begins, start, stop), thread)
                    if not self.meets:
                        self._backward_rows(code, a, j, step, (ends, start, stop), thread)
            if self.meets:
                self._finish_step_back(code, a, step, of)

    @property
    def _pass_width(self) -> int:
        """Columns that a step keeps in a slice: the gradient through the product, and others.

        The others are the gradient through the late product, or those of the parts of h. The latter
        are not recomputed, because the compiler might round them differently, and their sums
        cancel.
        """
        return self.units * pass_blocks(self.cell)

    def _finish_step_back(self, code: Code, a: Any, step: Step, of: tuple[Value, Value]) -> None:
        """Write the rest of a step whose threads wait for results of all slices."""
        cell, (thread, threads) = self.cell, of
        first, last = self._slices(a, thread, threads)
        if cell.late:
            with self._rows_of_step(code, a, step, of) as row:
                self._late_row(code, a, row)
            self.wait(code, threads)
            with code.loop(last, start=first) as j:
                self._pass_late(code, a, j, step, thread)
        if cell.output:
            with self._rows_of_step(code, a, step, of) as row:
                self._output_row_back(code, a, row)
            self.wait(code, threads)
            with code.loop(step.rows) as b:
                self._add_means(code, a, b, thread, 1)
            self.wait(code, threads)  # until all threads have read the sums
        with (
            code.loop(last, start=first) as j,
            self._parts(code, step) as (_, ends, start, stop),
        ):
            self._backward_rows(code, a, j, step, (ends, start, stop), thread)
        if cell.is_normalized:
            self.wait(code, threads)
            with code.loop(step.rows) as b:
                self._add_means(code, a, b, thread, cell.n_gates)
            with self._rows_of_step(code, a, step, of) as row:
                self._normalize_back(code, a, row)

    # Products.

    def _pack_gates(self, code: Code, a: Any, j: Value) -> None:
        """Pack a slice of the columns of W_hh: of all gates at once or, in heads, gate by gate."""
        n_gates = self.cell.n_gates
        is_head = a.width != a.hidden
        depth = where(is_head, a.hidden, a.hidden * n_gates)
        with code.loop(where(is_head, code.integer(n_gates), 1)) as g:
            panel = self._packed(a.packed_hh, j, a.hidden * n_gates)
            panel = panel + self.factors.depth(g * depth) * self.units
            rows = a.w_hh + g * a.width * a.size_h
            self.copy_panel(code, rows, a.size_h, depth, a.size_h, j, panel)

    def _packed(self, panels: Value, j: Value, k: Value) -> Value:
        """The address of the packed columns of a slice."""
        return panels + j * self.factors.depth(k) * self.units

    def _gathered(self, a: Any, thread: Value) -> Value:
        return a.gathered + thread * a.batch * a.hidden * self.cell.n_gates

    def _gather(self, code: Code, a: Any, step: Step, thread: Value) -> None:
        """Copy the gradients of a head's gates in the step before next to each other."""
        depth = a.hidden * self.cell.n_gates
        with code.when(a.width != a.hidden), code.loop(step.rows_before) as b:
            row = a.d_gates + (step.before + b) * a.d_gates_pitch
            to = self._gathered(a, thread) + b * depth
            for g in range(self.n_early):
                with code.loop(a.hidden, step=self.lanes) as k:
                    valid = a.hidden - k
                    code.store(
                        to + (a.hidden * g + k), code.load(row + (a.width * g + k), valid), valid
                    )

    def _pass(
        self, code: Code, a: Any, j: Value, step: Step, scratch: Value,
        part: tuple[Value, Value, Value], thread: Value,
    ) -> None:  # fmt: skip
        """Compute the gradient of h through the recurrent product, unless a mark cuts it."""
        begins, start, stop = part
        whole, width = a.hidden * self.cell.n_gates, code.integer(self._pass_width)
        panel, depth = self._packed(a.packed_hh, j, whole), a.hidden * self.n_early
        to = scratch + start * self._pass_width
        with code.when(begins):
            self._clear(code, to, (stop - start) * self._pass_width)
        with code.when(begins == 0):
            if self.cell.is_normalized:
                d_rh, pitch = a.d_product + (step.before + start) * whole, whole
            else:
                is_head = a.width != a.hidden
                d_rh = a.d_gates + (step.before + start) * a.d_gates_pitch
                d_rh = where(is_head, self._gathered(a, thread) + start * whole, d_rh)
                pitch = where(is_head, whole, a.d_gates_pitch)
            self._by_panel(code, stop - start, d_rh, pitch, panel, depth, to, width)
            with code.loop(stop, start=start) as b:
                stops = self._has_mark(code, a, step.before + b, FRESH | CUT, code.always)
                with code.when(stops):
                    self._clear(code, scratch + b * self._pass_width, code.integer(self.units))

    def _pass_late(self, code: Code, a: Any, j: Value, step: Step, thread: Value) -> None:
        """Compute the gradient of h in this step through the product of the last gates."""
        whole, scratch = a.hidden * self.cell.n_gates, self._scratch(a, j, thread, self._pass_width)
        panel = self._packed(a.packed_hh, j, whole)
        panel = panel + self.factors.depth(a.hidden * self.n_early) * self.units
        d_late = a.d_gates + (step.row * a.d_gates_pitch + a.width * self.n_early)
        self._by_panel(
            code, step.rows, d_late, a.d_gates_pitch, panel, a.hidden, scratch + self.units,
            code.integer(self._pass_width),
        )  # fmt: skip

    def _received(self, code: Code, a: Any, b: Value, vector: Vector, address: Value) -> Value:
        """Load the gradient of h from that of the operand of the recurrent product."""
        found = Variable(code.load(address + vector.v * self.lanes))
        if self.noisy:
            with code.when(a.drop.is_given):
                drop = code.load(a.drop + (b * a.width_h + vector.column), vector.valid)
                found.set(found.get() * drop)
        return found.get()

    def _project_back(self, code: Code, a: Any, j: Value, step: Step, thread: Value) -> None:
        """Compute the gradient of the projected h of a step, and of the initial one."""
        scratch = self._scratch(a, j, thread, self._pass_width)
        with self._parts(code, step) as (begins, ends, start, stop):
            self._pass(code, a, j, step, scratch, (begins, start, stop), thread)
            with code.loop(stop, start=start) as b:
                for vector in map(Vector._make, self.vectors(a.size_h, j)):
                    with code.when(vector.valid > 0):
                        self._project_back_vector(code, a, step, b, vector, scratch, ends)

    def _project_back_vector(
        self, code: Code, a: Any, step: Step, b: Value, vector: Vector, scratch: Value, ends: Value
    ) -> None:
        _, column, valid = vector
        at, own = step.row + b, b * a.width_h + column
        d = self._received(code, a, b, vector, scratch + b * self._pass_width)
        d = d + code.load(a.d_states[0] + own, valid)
        with code.either(ends) as (is_end, is_step):
            with is_end:
                code.store(a.d_states[0] + own, d, valid)
            with is_step:
                d = d + self._d_row(code, a, 0, at, column, valid)
                of_step, kept = self._split(code, a, 0, at, column, valid, d)
                code.store(a.d_projected + (at * a.size_h + column), of_step, valid)
                self._put_d_previous(code, a, 0, at, own, valid, kept)

    # Rows.

    def _d_row(self, code: Code, a: Any, k: int, at: Value, column: Value, valid: Value) -> Value:
        """Load the given gradient of a state of a row."""
        # Not a masked load without lanes, which is slow for a null address.
        found, pitch = Variable(code.zeros()), a.width if k else a.pitch
        with code.when(a.d_rows[k].is_given):
            found.set(code.load(a.d_rows[k] + (at * pitch + column), valid))
        return found.get()

    def _split(
        self, code: Code, a: Any, k: int, at: Value, column: Value, valid: Value, d: Value
    ) -> tuple[Value, Value]:
        """Split a state's gradient into those of the state before zoneout and of the old state."""
        zero = code.zeros()
        if not self.noisy:
            return d, zero
        return (
            self._zoned(code, a, k, at, column, valid, zero, d),
            self._zoned(code, a, k, at, column, valid, d, zero),
        )

    def _put_d_previous(
        self, code: Code, a: Any, k: int, at: Value, own: Value, valid: Value, d: Value
    ) -> None:
        """Store the gradient of a state before a row, unless a mark cuts it."""
        passes = Variable(d)
        with code.when(self._has_mark(code, a, at, FRESH | CUT, code.always)):
            with code.when(self._has_mark(code, a, at, FRESH, code.always)):
                fresh = a.d_fresh[k] + own
                code.store(fresh, code.load(fresh, valid) + d, valid)
            passes.set(code.zeros())
        code.store(a.d_states[k] + own, passes.get(), valid)

    @contextlib.contextmanager
    def _rows_of_step(
        self, code: Code, a: Any, step: Step, of: tuple[Value, Value]
    ) -> Iterator[_Row]:
        """Repeat the block for the rows of a step, in every slice of a thread."""
        part, (first, last) = (code.always == 0, code.integer(0), step.rows), self._slices(a, *of)
        with (
            code.loop(last, start=first) as j,
            self._each_row(code, a, j, step, part, of[0]) as row,
        ):
            yield row

    @contextlib.contextmanager
    def _each_row(
        self, code: Code, a: Any, j: Value, step: Step, part: tuple[Value, Value, Value],
        thread: Value,
    ) -> Iterator[_Row]:  # fmt: skip
        ends, start, stop = part
        scratch = self._scratch(a, j, thread, self._pass_width)
        with code.loop(stop, start=start) as b:
            yield _Row(j, b, step.row + b, scratch + b * self._pass_width, thread, ends)

    def _backward_rows(
        self, code: Code, a: Any, j: Value, step: Step, part: tuple[Value, Value, Value],
        thread: Value,
    ) -> None:  # fmt: skip
        with self._each_row(code, a, j, step, part, thread) as row:
            sums = [Variable(code.zeros()) for _ in range(2)] if self.cell.is_normalized else []
            for vector in map(Vector._make, self.vectors(a.hidden, j)):
                with code.when(vector.valid > 0):
                    self._backward_vector(code, a, step, row, vector, sums)
            if sums:
                with code.when(row.ends == 0):
                    self._put_sums(code, a, j, row.b, *(part.get() for part in sums))

    def _d_h(self, code: Code, a: Any, row: _Row, vector: Vector) -> Value:
        """Compute the gradient of h, without the one given for the row."""
        _, column, valid = vector
        # For a projected h the passed gradient is complete, and dropout follows the projection.
        found = Variable(code.load(row.passed + vector.v * self.lanes))
        with code.when(a.w_hr.is_given == 0):
            d = self._received(code, a, row.b, vector, row.passed)
            found.set(d + code.load(a.d_states[0] + (row.b * a.width + column), valid))
        return found.get()

    def _d_h_of_step(self, code: Code, a: Any, row: _Row, vector: Vector) -> tuple[Value, Value]:
        """Compute the gradient of h of a row, split as by `_split`."""
        d, (_, column, valid) = self._d_h(code, a, row, vector), vector
        of_step, kept = Variable(d), Variable(code.zeros())
        with code.when(a.w_hr.is_given == 0):
            d = d + self._d_row(code, a, 0, row.at, column, valid)
            for to, part in zip(
                (of_step, kept), self._split(code, a, 0, row.at, column, valid, d), strict=True
            ):
                to.set(part)
        return of_step.get(), kept.get()

    def _backward_vector(
        self, code: Code, a: Any, step: Step, row: _Row, vector: Vector, sums: Sequence[Variable]
    ) -> None:
        """Write the pointwise part for a vector of a row, or of a sequence that has ended."""
        cell, (_, column, valid) = self.cell, vector
        with code.either(row.ends) as (is_end, is_step):
            with is_end, code.when(a.w_hr.is_given == 0):
                d = self._d_h(code, a, row, vector)
                code.store(a.d_states[0] + (row.b * a.width + column), d, valid)
            with is_step:
                of_h, kept_h = self._d_h_of_step(code, a, row, vector)
                d_made, kept = [of_h], [kept_h]
                for k in range(1, cell.n_states):
                    of_k = code.load(a.d_states[k] + (row.b * a.width + column), valid)
                    of_k = of_k + self._d_row(code, a, k, row.at, column, valid)
                    of_step, rest = self._split(code, a, k, row.at, column, valid, of_k)
                    d_made.append(of_step)
                    kept.append(rest)
                self._step_vector(code, a, step, row, vector, (d_made, kept), sums)

    def _step_vector(
        self, code: Code, a: Any, step: Step, row: _Row, vector: Vector,
        d_states: tuple[list[Value], list[Value]], sums: Sequence[Variable],
    ) -> None:  # fmt: skip
        """Write the pointwise part for a vector of a row of a step."""
        cell, (_, column, valid), (d, old) = self.cell, vector, d_states
        saved = [code.load(address, valid) for address in self._saved(a, row.at, column)]
        if cell.late:
            late = self._received(code, a, row.b, vector, row.passed + self.units)
            saved.append(late)
        states = [
            code.load(s, where(a.w_hr.is_given, 0, valid) if k == 0 else valid)
            for k, s in enumerate(self._made(code, a, row.at, column))
        ]
        if cell.output:
            kept = row.passed + vector.v * self.lanes
            d[0], d_normal = code.load(kept + self.units), code.load(kept + 2 * self.units)
            normal, scale = self._normal_state(code, a, row.at, states[-1])
            means = self._means(a, row.b, row.thread)
            of_one, of_normal = (code.splat(code.load_number(means + k)) for k in (0, 1))
            d[-1] = d[-1] + scale * (d_normal - of_one - normal * of_normal)
        d_rh, d_apart, d_previous = self.pull_back(
            saved, states, self._previous(code, a, row.b, step, column, valid), d,
            self._extra(code, a, column, valid),
        )  # fmt: skip
        to = a.d_gates + (row.at * a.d_gates_pitch + column)
        for k, value in enumerate((*d_rh, *d_apart)):
            if not self.n_early <= k < cell.n_gates:  # these are stored, and threads may read them
                code.store(to + a.width * k, value, valid)
        if sums:
            gains = self._gains(code, a, column, valid)
            for d_gate, gain, normal in zip(
                d_rh, gains, self._normals(code, a, row.at, column, valid), strict=True
            ):
                d_normal = d_gate * gain
                sums[0].set(sums[0].get() + d_normal)
                sums[1].set(sums[1].get() + d_normal * normal)
        for k, (part, rest) in enumerate(zip(d_previous, old, strict=True)):
            total = part + rest if self.noisy else part
            own = row.b * a.width + column
            with code.when(code.always if k else a.w_hr.is_given == 0):
                self._put_d_previous(code, a, k, row.at, own, valid, total)

    def _late_row(self, code: Code, a: Any, row: _Row) -> None:
        """Compute the gradients of the last gates, the operand of this step's late product."""
        assert self.cell.late is not None
        for vector in map(Vector._make, self.vectors(a.hidden, row.j)):
            _, column, valid = vector
            with code.when(valid > 0):
                d, _ = self._d_h_of_step(code, a, row, vector)
                saved = [code.load(address, valid) for address in self._saved(a, row.at, column)]
                found = VECTORS.bind(self.cell.late.backward)(saved, (d,))
                to = a.d_gates + (row.at * a.d_gates_pitch + column)
                for k, value in enumerate(found, self.n_early):
                    code.store(to + a.width * k, value, valid)

    # Normalized states and products.

    def _normal_state(self, code: Code, a: Any, at: Value, state: Value) -> tuple[Value, Value]:
        """Compute the normalized state of a row; return it with 1 / deviation."""
        moments = a.moments + at * a.moments_pitch
        mean, scale = (code.splat(code.load_number(moments + k)) for k in (1, 2))
        return (state - mean) * scale, scale

    def _output_row_back(self, code: Code, a: Any, row: _Row) -> None:
        """Keep the gradients of the parts of h, and store the sums for that of the state."""
        output = self.cell.output
        assert output is not None
        pull_back, sums = VECTORS.bind(output.backward), [Variable(code.zeros()) for _ in range(2)]
        for vector in map(Vector._make, self.vectors(a.hidden, row.j)):
            _, column, valid = vector
            with code.when(valid > 0):
                d, _ = self._d_h_of_step(code, a, row, vector)
                state = code.load(self._made(code, a, row.at, column)[-1], valid)
                normal, _ = self._normal_state(code, a, row.at, state)
                part = code.load(self._saved(a, row.at, column)[output.saved], valid)
                extra = self._extra(code, a, column, valid)
                d_part, d_normal, d_extra = pull_back(part, normal, d, extra)
                kept = row.passed + vector.v * self.lanes
                code.store(kept + self.units, d_part)
                code.store(kept + 2 * self.units, d_normal)
                sums[0].set(sums[0].get() + d_normal)
                sums[1].set(sums[1].get() + d_normal * normal)
                # The other blocks follow from the last one and the normalized state.
                code.store(a.d_output + (row.at * a.width + column), d_extra[-1], valid)
        self._put_sums(code, a, row.j, row.b, *(part.get() for part in sums))

    def _normals(self, code: Code, a: Any, at: Value, column: Value, valid: Value) -> list[Value]:
        """Load the normalized recurrent products of a row."""
        n_gates = self.cell.n_gates
        rows = a.normal + (at * (a.width * n_gates) + column)
        return [code.load(rows + a.width * g, valid) for g in range(n_gates)]

    def _normalize_back(self, code: Code, a: Any, row: _Row) -> None:
        """Compute the gradients of the recurrent products of a row before normalization."""
        n_gates, means = self.cell.n_gates, self._means(a, row.b, row.thread)
        of_one, of_normal = (code.splat(code.load_number(means + k)) for k in (0, 1))
        scale = code.splat(code.load_number(a.moments + row.at * a.moments_pitch))
        for vector in map(Vector._make, self.vectors(a.hidden, row.j)):
            _, column, valid = vector
            with code.when(valid > 0):
                of_gates = a.d_gates + (row.at * a.d_gates_pitch + column)
                to = a.d_product + (row.at * (a.hidden * n_gates) + column)
                normals = self._normals(code, a, row.at, column, valid)
                pairs = zip(self._gains(code, a, column, valid), normals, strict=True)
                for g, (gain, normal) in enumerate(pairs):
                    d = code.load(of_gates + a.width * g, valid) * gain
                    code.store(to + a.hidden * g, scale * (d - of_one - normal * of_normal), valid)

    # States.

    def _states(self, a: Any, row: Value, column: Value) -> list[Value]:
        """The addresses of the states after a row."""
        traces = a.traces[: self.cell.n_states - 1]
        return [a.h + (row * a.pitch + column), *(t + (row * a.width + column) for t in traces)]

    def _made(self, code: Code, a: Any, row: Value, column: Value) -> list[Value]:
        """The addresses of the states of a row before zoneout."""
        states = self._states(a, row, column)
        if not self.noisy:
            return states
        own = [raw + (row * a.width + column) for raw in a.raw]
        return [
            where(raw.is_given, at, state)
            for raw, at, state in zip(a.raw, own, states, strict=False)
        ]

    def _previous(
        self, code: Code, a: Any, b: Value, step: Step, column: Value, valid: Value
    ) -> list[Value]:
        """Load the states before row b of a step, which the backward walk visits next."""
        own, is_inside = b * a.width + column, b < step.rows_after
        is_fresh = self._has_mark(code, a, step.row + b, FRESH, code.always)
        earlier = self._states(a, step.after + b, column)
        is_known = is_inside | a.initial[0].is_given | is_fresh
        found = []
        for k, (before, initial, fresh) in enumerate(
            zip(earlier, a.initial, a.fresh, strict=False)
        ):
            # No cell that supports projection reads the previous h.
            known = where(is_known & (a.w_hr.is_given == 0) if k == 0 else is_known, valid, 0)
            value = Variable(code.zeros())
            with code.either(is_inside & (is_fresh == 0)) as (of_row, of_state):
                with of_row:
                    value.set(code.load(before, known))
                with of_state:
                    value.set(code.load(where(is_fresh, fresh, initial) + own, known))
            found.append(value.get())
        return found
