"""Code shared by the sequence kernels: products of slices, and the walk over the steps."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..cells import EPSILON, Cell
from .activations import VECTORS
from .machine import Target
from .matrices import MatrixWriter
from .vector import Code, Value, Variable, where


class Step(NamedTuple):
    """A step of a walk: its rows, and those of the steps before and after it in walk order."""

    number: Value  # in the order of the walk
    row: Value  # index of the first row
    rows: Value  # number of rows
    before: Value
    rows_before: Value
    after: Value
    rows_after: Value


class Vector(NamedTuple):
    """A vector of a row in a slice."""

    v: int
    column: Value
    valid: Value  # number of valid lanes


class Matrix(NamedTuple):
    """Weights (blocks * columns, k), which a product takes transposed."""

    weights: Value
    panels: Value  # packed weights; null if they are not packed
    blocks: int  # gates, whose columns of a slice are adjacent in a product
    columns: Value
    stride: Value  # columns between blocks
    k: Value


class StepWriter(MatrixWriter):
    """Writes the code that the kernels of a cell have in common."""

    def __init__(self, module: Any, cell: Cell, target: Target, noisy: bool) -> None:
        super().__init__(module, target)
        self.cell, self.noisy = cell, noisy
        self.advance, self.pull_back = VECTORS.bind(cell.forward), VECTORS.bind(cell.backward)
        self.width = cell.n_gates * self.units  # columns of a slice
        self.n_early = cell.n_gates - (cell.late.n_gates if cell.late else 0)
        # Whether threads meet between a product and the use of its result, so that all slices wait.
        self.meets = not cell.is_pointwise

    def _panel(self, matrix: Matrix, j: Value, block: int) -> Value:
        """The address of a packed block of a slice."""
        return matrix.panels + (j * matrix.blocks + block) * self.factors.depth(matrix.k) * (
            self.units
        )

    def _rows_of(self, matrix: Matrix, j: Value, block: int) -> tuple[Value, Value]:
        """The address of an unpacked block of a slice, and its number of rows."""
        first = j * self.units
        count = (matrix.columns - first).at_most(self.units)
        return matrix.weights + (matrix.stride * block + first) * matrix.k, count

    def _pack(self, code: Code, matrix: Matrix, j: Value) -> None:
        """Pack a slice, if there are panels for it."""
        with code.when(matrix.panels.is_given):
            for block in range(matrix.blocks):
                weights, count = self._rows_of(matrix, j, block)
                code.call(self.pack, weights, matrix.k, count, self._panel(matrix, j, block))

    def _product(
        self, code: Code, rows: Value, a: Value, pitch: Value, matrix: Matrix, j: Value, c: Value,
        blocks: range | None = None,
    ) -> None:  # fmt: skip
        """Compute c = a @ (slice of a matrix)^T for any number of rows, for all or some blocks."""
        width, blocks = code.integer(matrix.blocks * self.units), blocks or range(matrix.blocks)
        with code.either(matrix.panels.is_given) as (packed, unpacked):
            with packed:
                for block in blocks:
                    panel = self._panel(matrix, j, block)
                    self._by_panel(
                        code, rows, a, pitch, panel, matrix.k, c + block * self.units, width
                    )
            with unpacked:
                # Block by block, so that a block stays in cache for all rows.
                for block in blocks:
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
        """Compute c = a @ panel for any number of rows."""
        with code.loop(rows, step=self.tile_rows) as row:
            height = (rows - row).at_most(self.tile_rows)
            to = c + row * width
            code.call(self.multiply, height, a + row * pitch, pitch, panel, k, to, width)

    def _scratch(self, a: Any, j: Value, thread: Value, width: int) -> Value:
        """The address for results of a product, per slice or, unless threads meet, per thread."""
        return a.scratch + (j if self.meets else thread) * a.batch * width

    def _clear(self, code: Code, to: Value, count: Value) -> None:
        """Store `count` zeros, a multiple of the vector width."""
        with code.loop(count, step=self.lanes) as k:
            code.store(to + k, code.zeros())

    # The walk over the steps.

    def _rows(self, code: Code, a: Any, count: Value, descending: Value) -> Value:
        """The number of rows of step `count` of the walk, 0 past the last."""
        rows = Variable(code.integer(0))
        with code.when(count < a.steps):
            rows.set(a.batch)
            with code.when(a.sizes.is_given):
                step = where(descending, a.steps - 1 - count, count)
                rows.set(code.load_int(a.sizes, step))
        return rows.get()

    @contextlib.contextmanager
    def _walk(self, code: Code, a: Any, descending: Value, beyond: Any = 0) -> Iterator[Step]:
        """Repeat the block for every step, up or down the rows, then for `beyond` empty steps."""
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
        """The range of slices of a thread."""
        return self.slices(a.hidden, thread, threads)

    @contextlib.contextmanager
    def _parts(self, code: Code, step: Step) -> Iterator[tuple[Value, Value, Value, Value]]:
        """Repeat the block for rows that this step and the one before have, that begin, that end.

        Each range of rows is given as (begins, ends, start, stop).
        """
        known = step.rows.at_most(step.rows_before)
        with code.loop(3) as part:
            begins, ends = part == 1, part == 2
            start = where(ends, step.rows, where(begins, known, code.integer(0)))
            stop = where(ends, step.rows_before, where(begins, step.rows, known))
            yield begins, ends, start, stop

    def _has_mark(self, code: Code, a: Any, row: Value, bits: int, is_row: Value) -> Value:
        """Whether a row, if `is_row`, has any of the marks."""
        mark = Variable(code.integer(0))
        with code.when(is_row & a.marks.is_given):
            mark.set(code.load_byte(a.marks, row) & code.integer(bits))
        return mark.get() != 0

    def _saved(self, a: Any, row: Value, column: Value) -> list[Value]:
        """The addresses of the saved vectors of a row."""
        return [first + (row * a.width + column) for first in a.saved[: self.cell.n_saved]]

    def _extra(self, code: Code, a: Any, column: Value, valid: Value) -> list[Value]:
        """Load the vectors of the extra weights."""
        blocks = range(self.cell.n_extra)
        return [code.load(a.extra + (a.width * k + column), valid) for k in blocks]

    # Zoneout.

    def _zoned(
        self, code: Code, a: Any, k: int, row: Value, column: Value, valid: Value, old: Value,
        new: Value,
    ) -> Value:  # fmt: skip
        """Apply zoneout to state number k of a row."""
        if not self.noisy:
            return new
        result, pitch = Variable(new), a.width if k else a.width_h
        with code.when(a.zones[k].is_given):
            kept = code.load_flags(a.zones[k] + (row * pitch + column), valid)
            result.set(where(kept, old, new))
        with code.when(a.shares[k].is_given):
            share = code.splat(code.load_number(a.shares[k]))
            result.set(share * old + (1.0 - share) * new)  # exactly the old value for a share of 1
        return result.get()

    # Means over all units. Each slice stores its own sums; once all have, every thread adds up the
    # sums of all slices, in the same order.

    def _sums(self, a: Any, j: Value, b: Value) -> Value:
        """The address of the two sums of a row of a slice."""
        return a.sums + (j * a.batch + b) * 2

    def _means(self, a: Any, b: Value, thread: Value) -> Value:
        """The address of the two means of a row."""
        return a.means + (thread * a.batch + b) * 2

    def _put_sums(self, code: Code, a: Any, j: Value, b: Value, x: Value, y: Value) -> None:
        """Store the sums of two vectors."""
        at = self._sums(a, j, b)
        code.store_number(at, code.total(x))
        code.store_number(at + 1, code.total(y))

    def _put_moments(
        self, code: Code, a: Any, j: Value, b: Value, vectors: Sequence[tuple[Value, Value]]
    ) -> None:
        """Store the sum of vectors, and the sum of squared differences from their mean.

        Each vector comes with its number of valid lanes; the other lanes are zero.
        """
        sum_ = code.total(functools.reduce(operator.add, [x for x, _ in vectors]))
        mean = code.splat(sum_ / self._count(code, a, j, len(vectors) // 2))
        squares = code.zeros()
        for x, valid in vectors:
            apart = where(code.are_valid(valid), x - mean, code.zeros())
            squares = squares + apart * apart
        at = self._sums(a, j, b)
        code.store_number(at, sum_)
        code.store_number(at + 1, code.total(squares))

    def _count(self, code: Code, a: Any, j: Value, blocks: int) -> Value:
        """The number of elements of a slice in `blocks` blocks, as an exact number."""
        return code.number((a.hidden - j * self.units).at_most(self.units) * blocks)

    def _n_slices(self, code: Code, a: Any) -> Value:
        return self.slices(a.hidden, code.integer(0), code.integer(1))[1]

    def _add_means(self, code: Code, a: Any, b: Value, thread: Value, blocks: int) -> None:
        """Compute the two means of a row over `blocks` blocks."""
        x, y = (Variable(code.number(code.integer(0))) for _ in range(2))
        with code.loop(self._n_slices(code, a)) as j:
            at = self._sums(a, j, b)
            for total, k in ((x, 0), (y, 1)):
                total.set(total.get() + code.load_number(at + k))
        count, to = code.number(a.hidden * blocks), self._means(a, b, thread)
        for total, k in ((x, 0), (y, 1)):
            code.store_number(to + k, total.get() / count)

    def _add_moments(self, code: Code, a: Any, b: Value, thread: Value, blocks: int) -> None:
        """Compute the mean and 1 / deviation of a row from the moments of all slices."""
        zero, count = code.number(code.integer(0)), code.number(a.hidden * blocks)
        total, squares = Variable(zero), Variable(zero)
        n_slices = self._n_slices(code, a)
        with code.loop(n_slices) as j:
            total.set(total.get() + code.load_number(self._sums(a, j, b)))
        mean = total.get() / count
        with code.loop(n_slices) as j:
            at, of_slice = self._sums(a, j, b), self._count(code, a, j, blocks)
            apart = code.load_number(at) / of_slice - mean
            squares.set(squares.get() + code.load_number(at + 1) + of_slice * apart * apart)
        to = self._means(a, b, thread)
        code.store_number(to, mean)
        deviation = code.intrinsic("sqrt", squares.get() / count + EPSILON)
        code.store_number(to + 1, 1.0 / deviation)

    def _gains(self, code: Code, a: Any, column: Value, valid: Value) -> list[Value]:
        """Load the gains of the recurrent product."""
        blocks = range(self.cell.n_gates, 2 * self.cell.n_gates)
        return [code.load(a.extra + (a.width * k + column), valid) for k in blocks]
