"""Whole sequences on a CPU: the kernels, as code for LLVM.

One parallel region runs all steps of one direction of a layer. Hidden units fall into slices of two
vectors, and a thread owns whole slices: it packs their weights, which then stay in its cache, and
computes their gates and states. Only h (in backward: the gradient of the gates) crosses between
threads, at one barrier a step.

All products are of one kind, `tile`: a few rows of a matrix times a packed panel, K x 2 vectors,
with the results in registers. Arrays have torch's layouts; packed weights are padded with zeros.

A packed sequence differs from a padded batch in the number of rows of a step alone: `sizes`. Rows
that join late (in the order of the pass) start from the initial state, rows that leave early keep
theirs, so that one rule for "rows which the step before had, and those it had not" is enough.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from .cells import CELLS, Cell
from .machine import Target
from .vector import ADDRESS, INT, Code, Value, Variable

_INT, _ADDRESS = ctypes.c_int64, ctypes.c_void_p


class Forward(ctypes.Structure):
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
        ("h_0", _ADDRESS),
        ("h_n", _ADDRESS),  # in: h_0
        ("c", _ADDRESS),  # in: c_0, out: c_n; null unless the cell has one
        ("h", _ADDRESS),
        ("gates", _ADDRESS),  # to be saved; may be null
        ("extra", _ADDRESS),  # what is saved beyond the gates
        ("packed", _ADDRESS),  # work space
        ("projected", _ADDRESS),
        ("scratch", _ADDRESS),
    ]


class Backward(ctypes.Structure):
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
        ("h_0", _ADDRESS),
        ("c_0", _ADDRESS),
        ("h", _ADDRESS),
        ("gates", _ADDRESS),
        ("extra", _ADDRESS),
        ("dy", _ADDRESS),  # may be null
        ("d_h", _ADDRESS),  # in: of h_n, out: of h_0
        ("d_c", _ADDRESS),
        ("d_gates", _ADDRESS),  # (N, (G + n_apart) * H): d_rh, then d_wx of the gates apart
        ("packed", _ADDRESS),
        ("scratch", _ADDRESS),
    ]


def module(cell: str, target: Target, name: str) -> Any:
    """Write the kernels ``forward`` and ``backward`` of a cell.

    Parameters
    ----------
    cell : str
        Key of ``cells.CELLS``.
    target : Target
    name : str
        Of the module.

    Returns
    -------
    llvmlite.ir.Module
    """
    result = ir.Module(name)
    writer = _Writer(result, CELLS[cell], target)
    writer.entry("forward", Forward, writer.forward)
    writer.entry("backward", Backward, writer.backward)
    return result


class _Writer:
    """Writes the kernels of one cell for one target into a module."""

    def __init__(self, module: Any, cell: Cell, target: Target) -> None:
        self.module, self.cell = module, cell
        self.lanes, self.units, self.tile_rows = target.lanes, target.units, target.tile_rows
        self.tile = self._tile()
        self.transpose = self._transpose()

    def _code(self, name: str, parameters: Sequence[Any]) -> Code:
        code = Code(self.module, name, parameters, self.lanes)
        if name not in ("forward", "backward"):
            code.function.linkage = "internal"
        return code

    def entry(self, name: str, structure: type[ctypes.Structure], body: Any) -> None:
        """Write a kernel and ``<name>_region``, which asks the OpenMP runtime who it is.

        Both take the arguments by address; a kernel also its number among the threads and theirs.
        """
        code = self._code(name, [ADDRESS, INT, INT])
        arguments, thread, threads = code.parameters
        body(code, code.fields(arguments, structure), thread, threads)
        kernel = code.finish()

        region = Code(self.module, f"{name}_region", [ADDRESS], self.lanes)
        who = [self._runtime(region, name) for name in ("omp_get_thread_num", "omp_get_num_threads")]
        region.call(kernel, *region.parameters, *who)
        region.finish()

    def _runtime(self, code: Code, name: str) -> Value:
        """Call a function of the OpenMP runtime that takes nothing and returns an int."""
        of = ir.FunctionType(ir.IntType(32), [])
        function = self.module.globals.get(name) or ir.Function(self.module, of, name)
        return Value(code, code.build.zext(code.build.call(function, []), INT))

    # Products.

    def _tile(self) -> Any:
        """``tile(rows, a, pitch, panel, k, c, c_pitch)``: c = a @ panel for up to `tile_rows` rows.

        The panel is (k, 2 vectors); `a` has `pitch` elements from row to row.
        """
        parameters = [INT, ADDRESS, INT, ADDRESS, INT, ADDRESS, INT]
        sizes = {rows: self._tile_of(rows, parameters[1:]) for rows in range(1, self.tile_rows + 1)}
        code = self._code("tile", parameters)
        rows, *rest = code.parameters
        end = code.function.append_basic_block("end")
        switch = code.build.switch(rows.value, end)
        for count, function in sizes.items():
            block = code.function.append_basic_block(f"rows{count}")
            switch.add_case(INT(count), block)
            code.build.position_at_end(block)
            code.call(function, *rest)
            code.build.branch(end)
        code.build.position_at_end(end)
        return code.finish()

    def _tile_of(self, rows: int, parameters: Sequence[Any]) -> Any:
        code = self._code(f"tile{rows}", parameters)
        a, pitch, panel, k, c, c_pitch = code.parameters
        # Few rows are few chains of dependent sums: several k at a time keep the adders busy.
        phases = max(1, -(-4 // rows))
        sums = [[Variable(code.zeros()) for _ in range(2)] for _ in range(rows * phases)]
        row_of = [a + pitch * row for row in range(rows)]

        def multiply(k_: Value, phase: int) -> None:
            columns = [code.load(panel + (k_ * self.units + v * self.lanes)) for v in range(2)]
            for row in range(rows):
                factor = code.splat(code.load_float(row_of[row] + k_))
                for column, total in zip(columns, sums[phase * rows + row], strict=True):
                    total.set(code.intrinsic("fma", factor, column, total.get()))

        whole = k // phases * phases if phases > 1 else k
        with code.loop(whole, step=phases) as first:
            for phase in range(phases):
                multiply(first + phase, phase)
        if phases > 1:
            with code.loop(k, start=whole) as last:
                multiply(last, 0)
        for row in range(rows):
            for v in range(2):
                total = sums[row][v].get()
                for phase in range(1, phases):
                    total = total + sums[phase * rows + row][v].get()
                code.store(c + (c_pitch * row + v * self.lanes), total)
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
                code.call(self.tile, height, a + row * pitch, pitch, panel, k, to, width)

    def _transpose(self) -> Any:
        """``transpose(w, pitch, k, units, panel)``: panel[i, u] = w[u, i], zero from `units` on."""
        code = self._code("transpose", [ADDRESS, INT, INT, INT, ADDRESS])
        w, pitch, k, units, panel = code.parameters
        block = 16  # floats in a cache line
        with code.loop(k, step=block) as first, code.loop(self.units) as u:
            last = (first + block).at_most(k)
            with code.loop(last, start=first) as i:
                value = Variable(Value(code, ir.Constant(ir.FloatType(), 0.0)))
                with code.when(u < units):
                    value.set(code.load_float(w + (u * pitch + i)))
                code.store_float(panel + (i * self.units + u), value.get())
        return code.finish()

    # What forward and backward share.

    def _rows_of(self, code: Code, a: Any, step: Value) -> Value:
        """How many rows a step has."""
        rows = Variable(a.batch)
        with code.when(a.sizes.is_given):
            rows.set(code.load_int(a.sizes, step))
        return rows.get()

    def _slices(self, a: Any, thread: Value, threads: Value) -> tuple[Value, Value]:
        """The slices of a thread."""
        count = (a.hidden + (self.units - 1)) // self.units
        return count * thread // threads, count * (thread + 1) // threads

    def _vectors(self, code: Code, a: Any, slice_: Value) -> Any:
        """For both vectors of a slice: (number, column, how many lanes are columns)."""
        for v in range(2):
            column = slice_ * self.units + v * self.lanes
            yield v, column, a.hidden - column

    def _wait(self, code: Code, threads: Value) -> None:
        with code.when(threads > 1):
            self._runtime(code, "GOMP_barrier")

    # Forward.

    def forward(self, code: Code, a: Any, thread: Value, threads: Value) -> None:
        first, last = self._slices(a, thread, threads)
        with code.loop(last, start=first) as j:
            self._pack_forward(code, a, j)
        zero = code.integer(0)
        row = Variable(a.rows.where(zero, a.reverse.differs(0)))  # first of this step
        left = Variable(zero)  # steps left whose input is projected
        base = Variable(zero)  # first row that is projected
        before, rows_before = Variable(zero), Variable(zero)
        with code.loop(a.steps) as count:
            step = (a.steps - 1 - count).where(count, a.reverse.differs(0))
            rows = self._rows_of(code, a, step)
            with code.when(a.reverse.differs(0)):
                row.set(row.get() - rows)
            with code.when(left.get().equals(0)):
                self._project(code, a, count, row.get(), left, base, first, last)
            left.set(left.get() - 1)
            with code.loop(last, start=first) as j:
                self._forward_slice(code, a, thread, j, row, rows, before, rows_before, base)
            self._wait(code, threads)
            before.set(row.get())
            rows_before.set(rows)
            with code.when(a.reverse.equals(0)):
                row.set(row.get() + rows)

    def _panels(self, a: Any, j: Value) -> tuple[list[Value], list[Value], Value]:
        """Addresses of the panels of W_ih and W_hh by gate, and of the biases of a slice."""
        gates, apart, units = self.cell.n_gates, self.cell.n_apart, self.units
        size = (a.inputs + a.hidden) * (gates * units) + (gates + apart) * units
        of_slice = a.packed + j * size
        w_ih = [of_slice + a.inputs * (g * units) for g in range(gates)]
        end = of_slice + a.inputs * (gates * units)
        w_hh = [end + a.hidden * (g * units) for g in range(gates)]
        return w_ih, w_hh, end + a.hidden * (gates * units)

    def _pack_forward(self, code: Code, a: Any, j: Value) -> None:
        w_ih, w_hh, bias = self._panels(a, j)
        units = (a.hidden - j * self.units).at_most(self.units)
        shared = self.cell.n_gates - self.cell.n_apart
        for g in range(self.cell.n_gates):
            unit = a.hidden * g + j * self.units
            code.call(self.transpose, a.w_ih + unit * a.inputs, a.inputs, a.inputs, units, w_ih[g])
            code.call(self.transpose, a.w_hh + unit * a.hidden, a.hidden, a.hidden, units, w_hh[g])
        for v, column, valid in self._vectors(code, a, j):
            for g in range(self.cell.n_gates):
                parts = []
                for b in (a.b_ih, a.b_hh):
                    lanes = valid.where(0, b.is_given)
                    parts.append(code.load(b + (a.hidden * g + column), lanes))
                at = bias + (g * self.units + v * self.lanes)
                if g < shared:
                    code.store(at, parts[0] + parts[1])
                else:
                    code.store(at, parts[0])
                    code.store(at + self.cell.n_apart * self.units, parts[1])

    def _project(
        self, code: Code, a: Any, count: Value, row: Value, left: Variable, base: Variable,
        first: Value, last: Value,
    ) -> None:  # fmt: skip
        """Multiply the input of as many steps as fit into a chunk, for the slices of this thread."""
        width = self.cell.n_gates * self.units
        rows, steps = Variable(code.integer(0)), Variable(code.integer(0))
        more = Variable(code.integer(1))
        with code.repeat(lambda: more.get().differs(0)):
            index = count + steps.get()
            step = (a.steps - 1 - index).where(index, a.reverse.differs(0))
            more.set(code.integer(0))
            with code.when(index < a.steps):
                total = rows.get() + self._rows_of(code, a, step)
                with code.when(total <= a.chunk):
                    rows.set(total)
                    steps.set(steps.get() + 1)
                    more.set(code.integer(1))
        left.set(steps.get())
        base.set(row)
        with code.when(a.reverse.differs(0)):  # the step's rows are the last ones of the chunk
            step = a.steps - 1 - count
            base.set(row + self._rows_of(code, a, step) - rows.get())
        with code.loop(last, start=first) as j:
            w_ih, _, bias = self._panels(a, j)
            to = a.projected + j * a.chunk * width
            x = a.x + base.get() * a.inputs
            self._product(code, rows.get(), x, a.inputs, w_ih, a.inputs, to)
            with code.loop(rows.get()) as i, code.loop(width, step=self.lanes) as k:
                at = to + (i * width + k)
                code.store(at, code.load(at) + code.load(bias + k))

    def _forward_slice(
        self, code: Code, a: Any, thread: Value, j: Value, row: Variable, rows: Value,
        before: Variable, rows_before: Variable, base: Variable,
    ) -> None:  # fmt: skip
        width = self.cell.n_gates * self.units
        _, w_hh, bias = self._panels(a, j)
        scratch = a.scratch + thread * a.batch * width
        known = rows.at_most(rows_before.get())
        with code.loop(2) as part:
            late = part.differs(0)
            start, stop = known.where(code.integer(0), late), rows.where(known, late)
            h = a.h_0.where(a.h + before.get() * a.pitch, late)
            pitch = a.hidden.where(a.pitch, late)
            self._product(
                code, stop - start, h + start * pitch, pitch, w_hh, a.hidden,
                scratch + start * width,
            )  # fmt: skip
        with code.loop(rows) as b:
            self._forward_row(code, a, j, b, row, base, scratch, bias)

    def _forward_row(
        self, code: Code, a: Any, j: Value, b: Value, row: Variable, base: Variable,
        scratch: Value, bias: Value,
    ) -> None:  # fmt: skip
        """The pointwise part for row b of a step."""
        cell, width = self.cell, self.cell.n_gates * self.units
        at = row.get() + b
        wx_row = a.projected + (j * a.chunk + (at - base.get())) * width
        for v, column, valid in self._vectors(code, a, j):
            with code.when(valid > 0):
                of_gate = [g * self.units + v * self.lanes for g in range(cell.n_gates)]
                wx = [code.load(wx_row + k) for k in of_gate]
                rh = [code.load(scratch + (b * width + k)) for k in of_gate]
                for g in range(cell.n_gates - cell.n_apart, cell.n_gates):
                    rh[g] = rh[g] + code.load(bias + (of_gate[g] + cell.n_apart * self.units))
                own = b * a.hidden + column
                states = [address + own for address in (a.h_n, a.c)[: cell.n_states]]
                new, saved = cell.forward(wx, rh, [code.load(s, valid) for s in states])
                for address, value in zip(states, new, strict=True):
                    code.store(address, value, valid)
                code.store(a.h + (at * a.pitch + column), new[0], valid)
                if saved:
                    with code.when(a.gates.is_given):
                        for address, value in zip(self._saved(a, at, column), saved, strict=True):
                            code.store(address, value, valid)

    def _saved(self, a: Any, row: Value, column: Value) -> list[Value]:
        """Where the saved vectors of a row are."""
        if not self.cell.n_saved:
            return []
        gates = [
            a.gates + (row * (a.hidden * self.cell.n_gates) + a.hidden * g + column)
            for g in range(self.cell.n_gates)
        ]
        return [*gates, a.extra + (row * a.hidden + column)]

    # Backward.

    def backward(self, code: Code, a: Any, thread: Value, threads: Value) -> None:
        """Walk the other way, and one step further, in which all rows receive their d_h_0."""
        first, last = self._slices(a, thread, threads)
        depth = a.hidden * self.cell.n_gates
        with code.loop(last, start=first) as j:
            panel = a.packed + j * (depth * self.units)
            for v, column, valid in self._vectors(code, a, j):
                with code.loop(depth) as k:
                    weights = code.load(a.w_hh + (k * a.hidden + column), valid)
                    code.store(panel + (k * self.units + v * self.lanes), weights)
        zero = code.integer(0)
        row = Variable(zero.where(a.rows, a.reverse.differs(0)))
        before, rows_before = Variable(zero), Variable(zero)  # in the order of this pass
        with code.loop(a.steps + 1) as count:
            step = count.where(a.steps - 1 - count, a.reverse.differs(0))
            rows = Variable(zero)
            with code.when(count < a.steps):
                rows.set(self._rows_of(code, a, step))
            with code.when(a.reverse.equals(0)):
                row.set(row.get() - rows.get())
            # Rows of the step before this one in time; rows beyond them begin here.
            rows_after = Variable(zero)
            with code.when(count + 1 < a.steps):
                following = (count + 1).where(a.steps - 2 - count, a.reverse.differs(0))
                rows_after.set(self._rows_of(code, a, following))
            after = (row.get() + rows.get()).where(row.get() - rows_after.get(), a.reverse.differs(0))
            with code.loop(last, start=first) as j:
                self._backward_slice(
                    code, a, thread, j, row.get(), rows.get(), before.get(), rows_before.get(),
                    after, rows_after.get(),
                )  # fmt: skip
            self._wait(code, threads)
            before.set(row.get())
            rows_before.set(rows.get())
            with code.when(a.reverse.differs(0)):
                row.set(row.get() + rows.get())

    def _backward_slice(
        self, code: Code, a: Any, thread: Value, j: Value, row: Value, rows: Value,
        before: Value, rows_before: Value, after: Value, rows_after: Value,
    ) -> None:  # fmt: skip
        cell = self.cell
        depth = a.hidden * cell.n_gates
        pitch = a.hidden * (cell.n_gates + cell.n_apart)
        panel = a.packed + j * (depth * self.units)
        scratch = a.scratch + thread * a.batch * self.units
        known = rows.at_most(rows_before)
        zero = code.integer(0)
        # Rows that both steps have, rows that begin in this pass, rows that end in it.
        with code.loop(3) as part:
            begins, ends = part.equals(1), part.equals(2)
            start = known.where(zero, begins)
            start = rows.where(start, ends)
            stop = rows.where(known, begins)
            stop = rows_before.where(stop, ends)
            to = scratch + start * self.units
            with code.build.if_else(begins.value) as (then, otherwise):
                with then, code.loop((stop - start) * self.units, step=self.lanes) as k:
                    code.store(to + k, code.zeros())
                with otherwise:
                    self._product(
                        code, stop - start, a.d_gates + (before + start) * pitch, pitch, [panel],
                        depth, to,
                    )  # fmt: skip
            with code.loop(stop, start=start) as b:
                self._backward_row(code, a, j, b, row, scratch, ends, after, rows_after, pitch)

    def _backward_row(
        self, code: Code, a: Any, j: Value, b: Value, row: Value, scratch: Value, ends: Value, after: Value, rows_after: Value, pitch: Value,
    ) -> None:  # fmt: skip
        cell = self.cell
        for v, column, valid in self._vectors(code, a, j):
            with code.when(valid > 0):
                own = b * a.hidden + column
                d_state = [address + own for address in (a.d_h, a.d_c)[: cell.n_states]]
                d = [code.load(address, valid) for address in d_state]
                d[0] = d[0] + code.load(scratch + (b * self.units + v * self.lanes))
                with code.build.if_else(ends.value) as (then, otherwise):
                    with then:
                        code.store(d_state[0], d[0], valid)
                    with otherwise:
                        self._backward_vector(
                            code, a, b, row + b, column, valid, d, d_state, after, rows_after, pitch
                        )

    def _backward_vector(
        self, code: Code, a: Any, b: Value, at: Value, column: Value, valid: Value, d: list[Value],
        d_state: list[Value], after: Value, rows_after: Value, pitch: Value,
    ) -> None:  # fmt: skip
        cell = self.cell
        dy = code.load(a.dy + (at * a.pitch + column), valid.where(0, a.dy.is_given))
        d[0] = d[0] + dy
        saved = [code.load(address, valid) for address in self._saved(a, at, column)]
        h = code.load(a.h + (at * a.pitch + column), valid)
        own = b * a.hidden + column
        inside = b < rows_after
        where = (a.h + ((after + b) * a.pitch + column)).where(a.h_0 + own, inside)
        previous = [code.load(where, valid)]
        if cell.n_states == 2:
            where = (a.extra + ((after + b) * a.hidden + column)).where(a.c_0 + own, inside)
            previous.append(code.load(where, valid))
        d_rh, d_wx_apart, d_previous = cell.backward(saved, [h], previous, d)
        for k, value in enumerate((*d_rh, *d_wx_apart)):
            code.store(a.d_gates + (at * pitch + a.hidden * k + column), value, valid)
        for address, value in zip(d_state, d_previous, strict=True):
            code.store(address, code.zeros() if value is None else value, valid)
