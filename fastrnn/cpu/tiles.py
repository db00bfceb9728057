"""Products in registers, of which all kernels are made, and what every kernel begins with."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from .machine import Target
from .vector import ADDRESS, INT, Code, Value, Variable

# In one turn of the inner loop; more would not fit the registers of a large tile.
_PRODUCTS = 24


class Writer:
    """Writes kernels for a target into a module.

    A product is a few rows of a matrix times a packed panel, (k, 2 vectors), with the results in
    registers.
    """

    def __init__(self, module: Any, target: Target) -> None:
        self.module = module
        self.lanes, self.units, self.tile_rows = target.lanes, target.units, target.tile_rows

    def function(self, name: str, parameters: Sequence[Any]) -> Code:
        """Begin a function that only the module calls."""
        code = Code(self.module, name, parameters, self.lanes)
        code.function.linkage = "internal"
        return code

    def kernel(
        self, name: str, structure: type[ctypes.Structure], body: Callable[..., None]
    ) -> None:
        """Write a kernel and ``<name>_region``, which asks the OpenMP runtime who it is.

        Both take the arguments by address; the kernel also its number among the threads and theirs.
        """
        code = Code(self.module, name, [ADDRESS, INT, INT], self.lanes)
        arguments, thread, threads = code.parameters
        body(code, code.fields(arguments, structure), thread, threads)
        kernel = code.finish()
        region = Code(self.module, f"{name}_region", [ADDRESS], self.lanes)
        who = [
            self._runtime(region, name) for name in ("omp_get_thread_num", "omp_get_num_threads")
        ]
        region.call(kernel, *region.parameters, *who)
        region.finish()

    def _runtime(self, code: Code, name: str) -> Value:
        """Call a function of the OpenMP runtime that takes nothing and returns an int."""
        of = ir.FunctionType(ir.IntType(32), [])
        function = self.module.globals.get(name) or ir.Function(self.module, of, name)
        return Value(code, code.build.zext(code.build.call(function, []), INT))

    def wait(self, code: Code, threads: Value) -> None:
        """Wait until all threads have come here."""
        with code.when(threads > 1):
            self._runtime(code, "GOMP_barrier")

    def share(self, count: Value, thread: Value, threads: Value) -> tuple[Value, Value]:
        """The range of a thread among `count` things."""
        return count * thread // threads, count * (thread + 1) // threads

    def vectors(self, code: Code, columns: Value, slice_: Value) -> Any:
        """For both vectors of a slice: (number, column, how many lanes are columns)."""
        for v in range(2):
            column = slice_ * self.units + v * self.lanes
            yield v, column, columns - column

    def tile(self) -> Any:
        """Write ``tile(rows, a, pitch, panel, k, c, c_pitch)``: c = a @ panel.

        For up to `tile_rows` rows; `a` and c have so many elements from row to row.
        """
        parameters = [INT, ADDRESS, INT, ADDRESS, INT, ADDRESS, INT]
        sizes = {rows: self._tile_of(rows, parameters[1:]) for rows in range(1, self.tile_rows + 1)}
        code = self.function("tile", parameters)
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
        code = self.function(f"tile{rows}", parameters)
        a, pitch, panel, k, c, c_pitch = code.parameters
        # Few rows are few chains of dependent sums: several k at a time keep the adders busy.
        phases = -(-4 // rows)
        sums = [[Variable(code.zeros()) for _ in range(2)] for _ in range(rows * phases)]
        row_of = [a + pitch * row for row in range(rows)]

        def multiply(k_: Value, phase: int) -> None:
            columns = [code.load(panel + (k_ * self.units + v * self.lanes)) for v in range(2)]
            for row in range(rows):
                factor = code.splat(code.load_float(row_of[row] + k_))
                for column, total in zip(columns, sums[phase * rows + row], strict=True):
                    total.set(code.intrinsic("fma", factor, column, total.get()))

        turns = phases * max(1, _PRODUCTS // (2 * rows * phases))
        whole = k // turns * turns
        with code.loop(whole, step=turns) as first:
            for turn in range(turns):
                multiply(first + turn, turn % phases)
        with code.loop(k, start=whole) as last:
            multiply(last, 0)
        for row in range(rows):
            for v in range(2):
                total = sums[row][v].get()
                for phase in range(1, phases):
                    total = total + sums[phase * rows + row][v].get()
                code.store(c + (c_pitch * row + v * self.lanes), total)
        return code.finish()

    def copy_panel(
        self, code: Code, b: Value, pitch: Value, k: Value, columns: Value, slice_: Value,
        panel: Value,
    ) -> None:  # fmt: skip
        """Pack a slice of the columns of b, (k, columns), with zeros beyond them."""
        for v, column, valid in self.vectors(code, columns, slice_):
            with code.loop(k) as i:
                values = code.load(b + (i * pitch + column), valid)
                code.store(panel + (i * self.units + v * self.lanes), values)
