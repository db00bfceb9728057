"""Products in registers, the building blocks of all kernels, and the entry code of a kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from llvmlite import ir

from .arguments import Elements, Exact, Flags, Panels
from .machine import Target
from .vector import (
    ADDRESS,
    BFLOAT,
    BYTE,
    DOUBLE,
    FLOAT,
    INT,
    INT16,
    INT32,
    Code,
    Format,
    Value,
    Variable,
    fma,
    where,
)  # fmt: skip

# Products in one iteration of the inner loop; more would not fit the registers of a large tile.
_PRODUCTS = 24
# The parameters of a tile.
_OF_TILE = (INT, ADDRESS, INT, ADDRESS, INT, ADDRESS, INT)
# Element and exact number of each dtype.
_TYPES = {
    torch.float32: (FLOAT, FLOAT),
    torch.float64: (DOUBLE, DOUBLE),
    torch.bfloat16: (BFLOAT, FLOAT),
}
# Rows of unpacked weights that are multiplied at a time.
_MOST_ROWS = 4


class Factors:
    """The factors of products: each lane of a vector holds one number."""

    group = 1  # numbers per lane

    def __init__(self, format: Format) -> None:
        self.word = format.exact  # type of a lane
        self.vector = ir.VectorType(self.word, format.lanes)

    def depth(self, k: Value) -> Value:
        """The number of lanes that hold k numbers."""
        return k

    def load(self, address: Value, valid: Value | None = None) -> Value:
        """Load a vector of factors, with zeros from number `valid` on."""
        return address.code.load(address, valid)

    def splat(self, row: Value, lane: Value) -> Value:
        """Broadcast one factor of a row to all lanes."""
        return row.code.splat(row.code.load_number(row + lane))

    def multiply_add(self, a: Value, b: Value, total: Value) -> Value:
        return fma(a, b, total)


class Pairs(Factors):
    """Each lane holds two half-precision numbers, whose products are added to one exact sum."""

    group = 2

    def __init__(self, format: Format, product: str) -> None:
        self.word, self.vector = INT32, ir.VectorType(INT32, format.lanes)
        self._halves = ir.VectorType(INT16, 2 * format.lanes)
        self._product = product

    def depth(self, k: Value) -> Value:
        return (k + 1) // 2

    def load(self, address: Value, valid: Value | None = None) -> Value:
        code = address.code
        if address.unit == INT32 and valid is None:
            return code.load_raw(address, self.vector)
        halves = code.load_raw(address, self._halves, valid)
        return Value(code, code.build.bitcast(halves.value, self.vector))

    def splat(self, row: Value, lane: Value) -> Value:
        code, at = row.code, row + lane * 2
        return code.splat(Value(code, code.build.load(at.value, typ=INT32, align=2)))

    def splat_single(self, row: Value, lane: Value) -> Value:
        """Broadcast the last factor of a row of odd length."""
        code, at = row.code, row + lane * 2
        half = code.build.load(at.value, typ=INT16)
        return code.splat(Value(code, code.build.zext(half, INT32)))

    def multiply_add(self, a: Value, b: Value, total: Value) -> Value:
        code = total.code
        pairs = ir.VectorType(BFLOAT, 2 * code.lanes)
        of = ir.FunctionType(total.type, [total.type, pairs, pairs])
        operands = [code.build.bitcast(part.value, pairs) for part in (a, b)]
        function = code.declared(self._product, of)
        return Value(code, code.build.call(function, [total.value, *operands]))


class Writer:
    """Writes kernels for a target to a module.

    A product multiplies a few rows of a matrix by weights, with the results in registers. The
    weights are a packed panel, (k, 2 vectors), or rows in torch's layout.
    """

    dot_rows = 4

    def __init__(self, module: Any, target: Target) -> None:
        element, exact = _TYPES[target.dtype]
        self.units, self.tile_rows = target.units, target.tile_rows
        self.lanes = self.units // 2
        self.module, self.format = module, Format(element, exact, self.lanes)
        is_paired = element == BFLOAT
        self.factors = Pairs(self.format, target.pairs) if is_paired else Factors(self.format)
        self._registers = target.registers
        self.multiply, self.multiply_columns = self.tile(), self.tile_of_columns()
        self.multiply_unpacked, self.pack = self.dots(), self.transpose()

    def function(self, name: str, parameters: Sequence[Any]) -> Code:
        """Begin a function that is internal to the module."""
        code = Code(self.module, name, parameters, self.format)
        code.function.linkage = "internal"
        return code

    def kernel(
        self, name: str, structure: type[ctypes.Structure], body: Callable[..., None]
    ) -> None:
        """Write a kernel, and ``<name>_region``, which gets its thread number from OpenMP.

        Both take the arguments by address; the kernel also takes its thread number and the number
        of threads. Each thread either runs groups alone, one after another, or shares a group with
        others, in which case all groups have the same number of barriers. If the runtime provides
        a different number of threads than planned, one thread runs all groups.
        """
        code = Code(self.module, name, [ADDRESS, INT, INT], self.format)
        arguments, thread, threads = code.parameters
        units = {
            Elements: self.format.element,
            Exact: self.format.exact,
            Panels: self.factors.word,
            Flags: BYTE,
        }
        groups = code.load_int(arguments, code.integer(0))
        team = where(threads > groups, threads // groups, 1)
        with code.loop(groups, start=thread // team, step=threads // team) as group:
            first = arguments.of(BYTE) + group * ctypes.sizeof(structure)
            fields = code.fields(first, structure, units)
            body(code, fields, thread - thread // team * team, team)
        kernel = code.finish()
        region = Code(self.module, f"{name}_region", [ADDRESS], self.format)
        who = [
            self._runtime(region, name) for name in ("omp_get_thread_num", "omp_get_num_threads")
        ]
        thread, threads = who
        groups, planned = (region.load_int(region.parameters[0], region.integer(k)) for k in (0, 1))
        with region.either((groups == 1) | (threads == planned)) as (as_planned, otherwise):
            with as_planned:
                region.call(kernel, *region.parameters, thread, threads)
            with otherwise, region.when(thread == 0):
                region.call(kernel, *region.parameters, thread, region.integer(1))
        region.finish()

    def _runtime(self, code: Code, name: str) -> Value:
        """Call a function of the OpenMP runtime that takes nothing and returns an int."""
        of = ir.FunctionType(ir.IntType(32), [])
        return Value(code, code.build.zext(code.build.call(code.declared(name, of), []), INT))

    def wait(self, code: Code, threads: Value) -> None:
        """Wait until all threads have arrived."""
        with code.when(threads > 1):
            self._runtime(code, "GOMP_barrier")

    def slices(self, columns: Value, thread: Value, threads: Value) -> tuple[Value, Value]:
        """The range of slices of the columns that a thread owns."""
        count = (columns + (self.units - 1)) // self.units
        return count * thread // threads, count * (thread + 1) // threads

    def vectors(self, columns: Value, slice_: Value) -> Any:
        """Yield, for both vectors of a slice, (number, column, number of valid lanes)."""
        for v in range(2):
            column = slice_ * self.units + v * self.lanes
            yield v, column, columns - column

    # Products with packed weights.

    def tile(self) -> Any:
        """Write ``tile(rows, a, pitch, panel, k, c, c_pitch)``: c = a @ panel.

        It takes up to `tile_rows` rows; the pitches are in elements.
        """
        return self._by_rows("tile", _OF_TILE, self._tile_of, self.tile_rows)

    def tile_of_columns(self) -> Any:
        """Write ``columns(rows, a, pitch, panel, k, c, c_pitch)``, like `tile` with a transposed.

        `a` has k rows of `pitch` numbers, with `pitch` at least `rows`.
        """

        def write(rows: int, parameters: Sequence[Any]) -> Any:
            return self._tile_of(rows, parameters, by_columns=True)

        return self._by_rows("columns", _OF_TILE, write, self.tile_rows)

    def _by_rows(
        self, name: str, parameters: Sequence[Any], write: Callable[..., Any], most: int
    ) -> Any:
        """Write a function for up to `most` rows that dispatches to one for each number."""
        sizes = {rows: write(rows, parameters[1:]) for rows in range(1, most + 1)}
        code = self.function(name, parameters)
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

    def _tile_of(self, rows: int, parameters: Sequence[Any], by_columns: bool = False) -> Any:
        name = f"{'columns' if by_columns else 'tile'}{rows}"
        code, factors = self.function(name, parameters), self.factors
        a, pitch, panel, k, c, c_pitch = code.parameters
        a, c, panel = a.of(code.element), c.of(code.exact), panel.of(factors.word)
        # Few rows give few independent accumulators: unroll over k to hide the FMA latency.
        phases = -(-4 // rows)
        sums = [[Variable(code.zeros()) for _ in range(2)] for _ in range(rows * phases)]
        row_of = [a + (row if by_columns else pitch * row) for row in range(rows)]

        def multiply(lane: Value, phase: int, splat: Callable[..., Value]) -> None:
            columns = [factors.load(panel + (lane * self.units + v * self.lanes)) for v in range(2)]
            for row in range(rows):
                factor = splat(row_of[row], lane * pitch if by_columns else lane)
                for column, total in zip(columns, sums[phase * rows + row], strict=True):
                    total.set(factors.multiply_add(factor, column, total.get()))

        turns = phases * max(1, _PRODUCTS // (2 * rows * phases))
        depth = k // factors.group
        whole = depth // turns * turns
        with code.loop(whole, step=turns) as first:
            for turn in range(turns):
                multiply(first + turn, turn % phases, factors.splat)
        with code.loop(depth, start=whole) as last:
            multiply(last, 0, factors.splat)
        if isinstance(factors, Pairs):
            with code.when(depth * 2 < k):
                multiply(depth, 0, factors.splat_single)
        for row in range(rows):
            for v in range(2):
                total = sums[row][v].get()
                for phase in range(1, phases):
                    total = total + sums[phase * rows + row][v].get()
                code.store(c + (c_pitch * row + v * self.lanes), total)
        return code.finish()

    def transpose(self) -> Any:
        """Write ``transpose(w, k, units, panel)``: panel[i, u] = w[u, i], 0 for u >= `units`."""
        code, factors = self.function("transpose", [ADDRESS, INT, INT, ADDRESS]), self.factors
        w, k, units, panel = code.parameters
        w, panel, group = w.of(code.element), panel.of(factors.word), factors.group
        whole = k // (group * self.lanes) * self.lanes
        with code.loop(2) as v, code.when((v + 1) * self.lanes <= units):
            of_half = w + v * self.lanes * k
            with code.loop(whole, step=self.lanes) as first:
                at = of_half + first * group
                rows = [factors.load(at + k * u) for u in range(self.lanes)]
                to = panel + (first * self.units + v * self.lanes)
                for n, column in enumerate(_transposed(rows)):
                    code.store_raw(to + n * self.units, column)
        # The rest: columns past the full blocks, and all columns of a half that is not full.
        of_element = panel.of(code.element)
        raw = INT16 if code.element == BFLOAT else code.element
        done = units // self.lanes * self.lanes
        with code.loop(self.units) as u:
            start = where(u < done, whole * group, 0)
            with code.loop(factors.depth(k) * group, start=start) as i:
                value = Variable(Value(code, ir.Constant(raw, 0)))
                with code.when((u < units) & (i < k)):
                    value.set(Value(code, code.build.load((w + (u * k + i)).value, typ=raw)))
                at = (i // group * self.units + u) * group + (i - i // group * group)
                code.build.store(value.get().value, (of_element + at).value)
        return code.finish()

    def copy_panel(
        self, code: Code, b: Value, pitch: Value, k: Value, columns: Value, slice_: Value,
        panel: Value,
    ) -> None:  # fmt: skip
        """Pack a slice of the columns of b, (k, columns), padded with zeros."""
        group = self.factors.group
        for v, column, valid in self.vectors(columns, slice_):
            to, first = panel + v * self.lanes, b + column
            with code.loop(k // group) as i:
                rows = [first + (i * group + g) * pitch for g in range(group)]
                code.store_raw(to + i * self.units, self._joined(code, rows, valid))
            if group == 2:
                with code.when(k // 2 * 2 < k):
                    last = self._joined(code, [first + (k - 1) * pitch], valid)
                    code.store_raw(to + k // 2 * self.units, last)

    def _joined(self, code: Code, rows: Sequence[Value], valid: Value) -> Value:
        """Interleave numbers of one or two rows as the lanes of a panel."""
        if self.factors.group == 1:
            return code.load(rows[0], valid)
        build, halves = code.build, ir.VectorType(INT16, self.lanes)
        wide = [
            build.zext(code.load_raw(row, halves, valid).value, self.factors.vector) for row in rows
        ]
        if len(wide) == 1:
            return Value(code, wide[0])
        shift = ir.Constant(self.factors.vector, [16] * self.lanes)
        return Value(code, build.or_(wide[0], build.shl(wide[1], shift)))

    # Products with unpacked weights.

    def dots(self) -> Any:
        """Write ``dots(rows, a, pitch, w, units, k, c, c_pitch)``: c = a @ w^T.

        It takes up to `dot_rows` rows; w has `units` contiguous rows of k numbers, and c a column
        for each, rounded up to a multiple of four.
        """
        parameters = [INT, ADDRESS, INT, ADDRESS, INT, INT, ADDRESS, INT]
        return self._by_rows("dots", parameters, self._dots_of, self.dot_rows)

    def _dots_of(self, rows: int, parameters: Sequence[Any]) -> Any:
        code, factors = self.function(f"dots{rows}", parameters), self.factors
        a, pitch, w, units, k, c, c_pitch = code.parameters
        a, w, c = a.of(code.element), w.of(code.element), c.of(code.exact)
        count = min(_MOST_ROWS, self.lanes)
        if (count + 1) * rows + 1 > self._registers:
            count = 2
        row_of, step = [a + pitch * row for row in range(rows)], self.lanes * factors.group
        whole = k // step * step
        with code.loop(units, step=count) as u:
            # Past the last row, its results are computed again.
            w_of = [w + (u + n).at_most(units - 1) * k for n in range(count)]
            sums = [[Variable(code.zeros()) for _ in range(count)] for _ in range(rows)]

            def multiply(i: Value, valid: Value | None) -> None:
                loaded = [factors.load(row + i, valid) for row in row_of]
                for n, of in enumerate(w_of):
                    column = factors.load(of + i, valid)
                    for factor, totals in zip(loaded, sums, strict=True):
                        total = totals[n]
                        total.set(factors.multiply_add(factor, column, total.get()))

            with code.loop(whole, step=step) as i:
                multiply(i, None)
            with code.when(whole < k):
                multiply(whole, k - whole)
            for row, totals in enumerate(sums):
                total = _sums([total.get() for total in totals])
                code.store_raw(c + (c_pitch * row + u), total)
        return code.finish()


def _transposed(rows: Sequence[Value]) -> list[Value]:
    """Transpose a square of vectors by exchanging blocks, of twice the size in each round."""
    result, size = list(rows), len(rows)
    distance = 1
    while distance < size:
        lanes = range(size)
        low = [k if not k & distance else size + k - distance for k in lanes]
        high = [k + distance if not k & distance else size + k for k in lanes]
        for i in lanes:
            if not i & distance:
                x, y = result[i], result[i + distance]
                result[i] = x.code.shuffle(x, y, low)
                result[i + distance] = x.code.shuffle(x, y, high)
        distance *= 2
    return result


def _sums(vectors: Sequence[Value]) -> Value:
    """Sum the lanes of each vector; the results are the lanes of one vector."""
    parts, block = list(vectors), vectors[0].type.count
    while block > 1 or len(parts) > 1:
        is_one = len(parts) == 1
        firsts, seconds = (parts, parts) if is_one else (parts[::2], parts[1::2])
        blocks = (1 if is_one else 2) * parts[0].type.count // block
        half = block // 2
        lower = [b * block + i for b in range(blocks) for i in range(half)]
        upper = [lane + half for lane in lower]
        parts = [
            x.code.shuffle(x, y, lower) + x.code.shuffle(x, y, upper)
            for x, y in zip(firsts, seconds, strict=True)
        ]
        block = half
    return parts[0]
