"""What the kernels of whole sequences share: products of slices, and the walk over the steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..cells import Cell
from .activations import VECTORS
from .machine import Target
from .matrices import MatrixWriter
from .vector import Code, Value, Variable, where


class Step(NamedTuple):
    """A step of a walk: its rows and those of the steps before and after it in its order."""

    number: Value  # in the order of the walk
    row: Value  # the first
    rows: Value  # how many
    before: Value
    rows_before: Value
    after: Value
    rows_after: Value


class Matrix(NamedTuple):
    """Weights (blocks * columns, k), which a product takes transposed."""

    weights: Value
    panels: Value  # null: as they are
    blocks: int  # gates, whose columns of a slice a product puts side by side
    columns: Value
    k: Value


class StepWriter(MatrixWriter):
    """Writes what the kernels of a cell have in common."""

    def __init__(self, module: Any, cell: Cell, target: Target) -> None:
        super().__init__(module, target)
        self.cell = cell
        self.advance, self.pull_back = VECTORS.bind(cell.forward), VECTORS.bind(cell.backward)
        self.width = cell.n_gates * self.units  # columns of a slice

    def _panel(self, matrix: Matrix, j: Value, block: int) -> Value:
        """Where a block of a slice is packed."""
        return matrix.panels + (j * matrix.blocks + block) * self.factors.depth(matrix.k) * (
            self.units
        )

    def _rows_of(self, matrix: Matrix, j: Value, block: int) -> tuple[Value, Value]:
        """A block of a slice where it is not packed, and how many rows it has."""
        first = j * self.units
        count = (matrix.columns - first).at_most(self.units)
        return matrix.weights + (matrix.columns * block + first) * matrix.k, count

    def _pack(self, code: Code, matrix: Matrix, j: Value) -> None:
        """Pack a slice, if it shall be."""
        with code.when(matrix.panels.is_given):
            for block in range(matrix.blocks):
                weights, count = self._rows_of(matrix, j, block)
                code.call(self.pack, weights, matrix.k, count, self._panel(matrix, j, block))

    def _product(
        self, code: Code, rows: Value, a: Value, pitch: Value, matrix: Matrix, j: Value, c: Value
    ) -> None:
        """c = a @ (a slice of a matrix)^T for any number of rows."""
        width = code.integer(matrix.blocks * self.units)
        with code.either(matrix.panels.is_given) as (packed, unpacked):
            with packed:
                for block in range(matrix.blocks):
                    panel = self._panel(matrix, j, block)
                    self._by_panel(
                        code, rows, a, pitch, panel, matrix.k, c + block * self.units, width
                    )
            with unpacked:
                # A block stays in a cache for all rows.
                for block in range(matrix.blocks):
                    weights, count = self._rows_of(matrix, j, block)
                    with code.loop(rows, step=self.dot_rows) as row:
                        height = (rows - row).at_most(self.dot_rows)
                        to = c + (row * width + block * self.units)
                        code.call(
                            self.multiply_unpacked,
                            height, a + row * pitch, pitch, weights, count, matrix.k, to, width,
                        )  # fmt: skip

    def _by_panel(
        self, code: Code, rows: Value, a: Value, pitch: Value, panel: Value, k: Value, c: Value,
        width: Value,
    ) -> None:  # fmt: skip
        """c = a @ panel for any number of rows."""
        with code.loop(rows, step=self.tile_rows) as row:
            height = (rows - row).at_most(self.tile_rows)
            to = c + row * width
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
    def _walk(self, code: Code, a: Any, descending: Value, beyond: int = 0) -> Iterator[Step]:
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
            yield Step(count, first, size, before.get(), rows_before.get(), after, rows_after)
            before.set(first)
            rows_before.set(size)
            row.set(where(descending, first, first + size))
            rows.set(rows_after)

    def _slices(self, a: Any, thread: Value, threads: Value) -> tuple[Value, Value]:
        """The slices of a thread."""
        return self.slices(a.hidden, thread, threads)

    @contextlib.contextmanager
    def _parts(self, code: Code, step: Step) -> Iterator[tuple[Value, Value, Value, Value]]:
        """Repeat the block for the rows that both steps have, that begin, and that end in a walk.

        They are given as (begins, ends, start, stop).
        """
        known = step.rows.at_most(step.rows_before)
        with code.loop(3) as part:
            begins, ends = part == 1, part == 2
            start = where(ends, step.rows, where(begins, known, code.integer(0)))
            stop = where(ends, step.rows_before, where(begins, step.rows, known))
            yield begins, ends, start, stop

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
