"""The backward kernel of a cell."""

from __future__ import annotations

from typing import Any

from ..flow import CUT, FRESH
from .steps import Step, StepWriter
from .vector import Code, Value, Variable, where


class BackwardWriter(StepWriter):
    """Writes backward: the gradients of the gates of all rows."""

    def backward(self, code: Code, a: Any, thread: Value, threads: Value) -> None:
        """Write the body of the backward kernel.

        It walks the other way, and one step further, in which all rows receive their d_h_0.
        """
        first, last = self._slices(a, thread, threads)
        first_h, last_h = self.slices(a.size_h, thread, threads)
        depth = a.hidden * self.cell.n_gates
        scratch = a.scratch + thread * a.batch * self.units
        is_projected = a.w_hr.is_given
        with code.loop(last_h, start=first_h) as j:
            panel = self._packed(a.packed_hh, j, depth)
            self.copy_panel(code, a.w_hh, a.size_h, depth, a.size_h, j, panel)
        with code.when(is_projected), code.loop(last, start=first) as j:
            panel = self._packed(a.packed_hr, j, a.size_h)
            self.copy_panel(code, a.w_hr, a.hidden, a.size_h, a.hidden, j, panel)
        with self._walk(code, a, a.reverse == 0, beyond=1) as step:
            self.wait(code, threads)
            with code.when(is_projected):
                with code.loop(last_h, start=first_h) as j:
                    self._project_back(code, a, j, step, scratch)
                self.wait(code, threads)
            with (
                code.loop(last, start=first) as j,
                self._parts(code, step) as (begins, ends, start, stop),
            ):
                with code.either(is_projected) as (projected, plain):
                    with projected:
                        d_h = a.d_projected + (step.row + start) * a.size_h
                        panel = self._packed(a.packed_hr, j, a.size_h)
                        rows, width = where(ends, 0, stop - start), code.integer(self.units)
                        to = scratch + start * self.units
                        self._by_panel(code, rows, d_h, a.size_h, panel, a.size_h, to, width)
                    with plain:
                        self._pass(code, a, j, step, scratch, begins, start, stop)
                with code.loop(stop, start=start) as b:
                    passed = scratch + b * self.units
                    self._backward_row(code, a, j, b, step, passed, ends)

    def _packed(self, panels: Value, j: Value, k: Value) -> Value:
        """Where the columns of a slice are packed."""
        return panels + j * self.factors.depth(k) * self.units

    def _pass(
        self, code: Code, a: Any, j: Value, step: Step, scratch: Value, begins: Value,
        start: Value, stop: Value,
    ) -> None:  # fmt: skip
        """What passes to rows by the recurrent product, unless it ended at a mark."""
        depth, pitch = a.hidden * self.cell.n_gates, a.d_gates_pitch
        panel, width = self._packed(a.packed_hh, j, depth), code.integer(self.units)
        to = scratch + start * self.units
        with code.when(begins):
            self._clear(code, to, (stop - start) * self.units)
        with code.when(begins == 0):
            d_rh = a.d_gates + (step.before + start) * pitch
            self._by_panel(code, stop - start, d_rh, pitch, panel, depth, to, width)
            with code.loop(stop, start=start) as b:
                stops = self._has_mark(code, a, step.before + b, FRESH | CUT, code.always)
                with code.when(stops):
                    self._clear(code, scratch + b * self.units, width)

    def _project_back(self, code: Code, a: Any, j: Value, step: Step, scratch: Value) -> None:
        """The gradient of the projected h of a step, and of the initial one."""
        with self._parts(code, step) as (begins, ends, start, stop):
            self._pass(code, a, j, step, scratch, begins, start, stop)
            with code.loop(stop, start=start) as b:
                for v, column, valid in self.vectors(a.size_h, j):
                    with code.when(valid > 0):
                        d = Variable(code.load(scratch + (b * self.units + v * self.lanes)))
                        state, at = a.d_states[0] + (b * a.size_h + column), step.row + b
                        with code.when(begins):
                            d.set(d.get() + code.load(state, valid))
                        with code.either(ends) as (is_end, is_step):
                            with is_end:
                                code.store(state, d.get(), valid)
                            with is_step:
                                of_step = self._d_row(code, a, 0, at, column, valid)
                                to = a.d_projected + (at * a.size_h + column)
                                code.store(to, d.get() + of_step, valid)

    def _d_row(self, code: Code, a: Any, k: int, at: Value, column: Value, valid: Value) -> Value:
        """The gradient of a state of a row, as it was given."""
        # Not a load without lanes: from a null address that takes long.
        found, pitch = Variable(code.zeros()), a.hidden if k else a.pitch
        with code.when(a.d_rows[k].is_given):
            found.set(code.load(a.d_rows[k] + (at * pitch + column), valid))
        return found.get()

    def _backward_row(
        self, code: Code, a: Any, j: Value, b: Value, step: Step, passed: Value, ends: Value
    ) -> None:
        """The pointwise part for row b of a step, or the end of a sequence that lacks it."""
        cell, at, is_plain = self.cell, step.row + b, a.w_hr.is_given == 0
        is_fresh = self._has_mark(code, a, at, FRESH, ends == 0)
        is_cut = self._has_mark(code, a, at, FRESH | CUT, ends == 0)
        for v, column, valid in self.vectors(a.hidden, j):
            with code.when(valid > 0):
                own = b * a.hidden + column
                d_state = [address + own for address in a.d_states[: cell.n_states]]
                # Of a projected h all is in what passed.
                of_h = where(is_plain, valid, 0)
                d = [code.load(d_state[0], of_h) + code.load(passed + v * self.lanes)]
                d += [code.load(address, valid) for address in d_state[1:]]
                with code.when(ends & is_plain):
                    code.store(d_state[0], d[0], valid)
                with code.when(ends == 0):
                    for k in range(cell.n_states):
                        of_step = Variable(code.zeros())
                        with code.when(is_plain if k == 0 else code.always):
                            of_step.set(self._d_row(code, a, k, at, column, valid))
                        d[k] = d[k] + of_step.get()
                    d_rh, d_apart, d_previous = self.pull_back(
                        [code.load(address, valid) for address in self._saved(a, at, column)],
                        [
                            code.load(s, of_h if k == 0 else valid)
                            for k, s in enumerate(self._states(a, at, column))
                        ],
                        self._previous(code, a, b, step, column, valid, is_fresh),
                        d,
                        self._extra(code, a, column, valid),
                    )
                    to = a.d_gates + (at * a.d_gates_pitch + column)
                    for k, value in enumerate((*d_rh, *d_apart)):
                        code.store(to + a.hidden * k, value, valid)
                    gradients = zip(d_state, d_previous, a.d_fresh, strict=False)
                    for k, (address, given, fresh) in enumerate(gradients):
                        with code.when(code.always if k else is_plain):
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
        self, code: Code, a: Any, b: Value, step: Step, column: Value, valid: Value,
        is_fresh: Value,
    ) -> list[Value]:  # fmt: skip
        """The states before row b of a step: its walk is the other one, and meets them next."""
        own, is_inside = b * a.hidden + column, b < step.rows_after
        earlier = self._states(a, step.after + b, column)
        is_known = is_inside | a.initial[0].is_given | is_fresh
        found = []
        for k, (before, initial, fresh) in enumerate(
            zip(earlier, a.initial, a.fresh, strict=False)
        ):
            # No cell that may be projected looks at the h before.
            known = where(is_known & (a.w_hr.is_given == 0) if k == 0 else is_known, valid, 0)
            value = Variable(code.zeros())
            with code.either(is_inside & (is_fresh == 0)) as (of_row, of_state):
                with of_row:
                    value.set(code.load(before, known))
                with of_state:
                    value.set(code.load(where(is_fresh, fresh, initial) + own, known))
            found.append(value.get())
        return found
