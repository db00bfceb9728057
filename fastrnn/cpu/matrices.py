"""Products of large matrices, for the gradients of weights and inputs.

As usual, all threads together pack a block of the inner dimension of b, and each thread multiplies
its rows of a by it. If a is given transposed, the rows of each tile are packed as well.
"""

from __future__ import annotations

from typing import Any

from .arguments import BLOCK
from .tiles import Writer
from .vector import Code, Value, Variable


class MatrixWriter(Writer):
    """Writes products of matrices of any size."""

    def product(self, code: Code, a: Any, thread: Value, threads: Value) -> None:
        """Write the body of the kernel of ``c = a @ b``, or ``+=``."""
        first_slice, last_slice = self.slices(a.n, thread, threads)
        _, slices = self.slices(a.n, code.integer(0), code.integer(1))
        blocks = (a.m + (self.tile_rows - 1)) // self.tile_rows
        first, last = blocks * thread // threads, blocks * (thread + 1) // threads
        result = a.scratch + thread * (self.tile_rows * self.units)
        with code.loop(a.k, step=BLOCK) as start:
            k = (a.k - start).at_most(BLOCK)
            with code.loop(last_slice, start=first_slice) as j:
                b, panel = a.b + start * a.b_pitch, a.panels + j * k * self.units
                self.copy_panel(code, b, a.b_pitch, k, a.n, j, panel)
            with code.when(a.is_transposed != 0):
                self._pack_columns(code, a, start, k, first, last)
            self.wait(code, threads)
            with code.loop(last, start=first) as block, code.loop(slices) as j:
                self._add_tile(code, a, j, block, start, k, result)
            self.wait(code, threads)

    def _packed_rows(self, a: Any, block: Value, k: Value) -> Value:
        """The address of the packed rows of a tile."""
        return a.packed + block * k * self.tile_rows

    def _pack_columns(
        self, code: Code, a: Any, start: Value, k: Value, first: Value, last: Value
    ) -> None:
        """Pack the columns of a transposed matrix, which are the rows of tiles.

        They are copied in memory order, which is much faster than tile by tile.
        """
        with code.loop(k) as i, code.loop(last, start=first) as block:
            row = block * self.tile_rows
            columns, to = a.a + ((start + i) * a.a_pitch + row), self._packed_rows(a, block, k)
            for v in range(0, self.tile_rows, self.lanes):
                values = code.load(columns + v, a.m - row - v)
                at, valid = to + (i * self.tile_rows + v), code.integer(self.tile_rows - v)
                code.store(at, values, valid)

    def _add_tile(
        self, code: Code, a: Any, j: Value, block: Value, start: Value, k: Value, result: Value
    ) -> None:
        """Multiply the rows of a tile by a panel and add the result to the partial sums in c."""
        panel, row = a.panels + j * k * self.units, block * self.tile_rows
        rows, width = (a.m - row).at_most(self.tile_rows), code.integer(self.units)
        with code.either(a.is_transposed != 0) as (transposed, plain):
            with transposed:
                columns, pitch = self._packed_rows(a, block, k), code.integer(self.tile_rows)
                code.call(self.multiply_columns, rows, columns, pitch, panel, k, result, width)
            with plain:
                of_rows = a.a + (row * a.a_pitch + start)
                code.call(self.multiply, rows, of_rows, a.a_pitch, panel, k, result, width)
        with code.loop(rows) as r:
            for v, column, valid in self.vectors(a.n, j):
                with code.when(valid > 0):
                    at = a.c + ((row + r) * a.c_pitch + column)
                    found = Variable(code.load(result + (r * self.units + v * self.lanes)))
                    with code.when((a.adds != 0) | (start > 0)):
                        found.set(found.get() + code.load(at, valid))
                    code.store(at, found.get(), valid)
