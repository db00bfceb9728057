"""A language of float32 vectors: Python that writes LLVM's code.

A kernel is a Python function that is called once, with a `Code` to write to; loops and conditions
that shall exist in the kernel are ``with`` blocks of it, everything else is Python and is gone
when the kernel is compiled. Values are 64-bit integers, addresses of float32, float32 numbers and
vectors of them; Python's operators work on all of these::

    with code.loop(rows) as row:
        code.store(y + row * lanes, tanh(code.load(x + row * lanes)))

The width of a vector is a number like any other, so one source serves every instruction set.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from llvmlite import ir

INT, INT32, BYTE, FLOAT = ir.IntType(64), ir.IntType(32), ir.IntType(8), ir.FloatType()
ADDRESS = ir.PointerType()


class Value:
    """Something that a kernel computes.

    Arithmetic takes Python's numbers too, which for a vector stand for all of its lanes. Adding
    to an address counts in elements of float32.
    """

    def __init__(self, code: Code, value: Any) -> None:
        self.code, self.value, self.type = code, value, value.type

    @property
    def is_float(self) -> bool:
        return self.type == FLOAT or isinstance(self.type, ir.VectorType)

    def same(self, other: Any) -> Value:
        """A number, or None for an address, as a value of this type; a value as it is."""
        if isinstance(other, Value):
            return other
        if self.type == ADDRESS:
            return Value(self.code, ir.Constant(ADDRESS, None))
        number = float(other) if self.is_float else int(other)
        lanes = isinstance(self.type, ir.VectorType)
        constant = ir.Constant(self.type, [number] * self.type.count if lanes else number)
        return Value(self.code, constant)

    def _combine(self, operation: str, other: Any) -> Value:
        operation = f"f{operation}" if self.is_float else operation
        build = getattr(self.code.build, operation)
        return Value(self.code, build(self.value, self.same(other).value))

    def __add__(self, other: Any) -> Value:
        if self.type != ADDRESS:
            return self._combine("add", other)
        index = other.value if isinstance(other, Value) else INT(other)
        return Value(self.code, self.code.build.gep(self.value, [index], source_etype=FLOAT))

    def __sub__(self, other: Any) -> Value:
        return self._combine("sub", other)

    def __mul__(self, other: Any) -> Value:
        return self._combine("mul", other)

    def __truediv__(self, other: Any) -> Value:
        return self._combine("div", other)

    def __floordiv__(self, other: Any) -> Value:
        """Quotient of integers that are not negative."""
        return self._combine("udiv", other)

    def __rsub__(self, other: Any) -> Value:
        return self.same(other) - self

    def __rtruediv__(self, other: Any) -> Value:
        return self.same(other) / self

    __radd__, __rmul__ = __add__, __mul__

    def __and__(self, other: Value) -> Value:
        return Value(self.code, self.code.build.and_(self.value, other.value))

    def __or__(self, other: Value) -> Value:
        return Value(self.code, self.code.build.or_(self.value, other.value))

    def _compare(self, operator: str, other: Any) -> Value:
        """Of floats, false where one is not a number."""
        build = self.code.build
        compare = build.fcmp_ordered if self.is_float else build.icmp_signed
        return Value(self.code, compare(operator, self.value, self.same(other).value))

    def __lt__(self, other: Any) -> Value:
        return self._compare("<", other)

    def __le__(self, other: Any) -> Value:
        return self._compare("<=", other)

    def __gt__(self, other: Any) -> Value:
        return self._compare(">", other)

    def equals(self, other: Any) -> Value:
        return self._compare("==", other)

    def differs(self, other: Any) -> Value:
        return self._compare("!=", other)

    @property
    def is_given(self) -> Value:
        """Whether an address is not null."""
        return self.differs(None)

    def where(self, other: Any, condition: Value) -> Value:
        """This value where `condition` holds, else `other`."""
        select = self.code.build.select
        return Value(self.code, select(condition.value, self.value, self.same(other).value))

    def at_most(self, limit: Any) -> Value:
        """The smaller of this and a limit; where this is not a number, this."""
        return self.same(limit).where(self, self > limit)


class Variable:
    """A value that changes while the kernel runs."""

    def __init__(self, initial: Value) -> None:
        self.code = initial.code
        with self.code.build.goto_entry_block():
            self.slot = self.code.build.alloca(initial.type)
        self.type = initial.type
        self.set(initial)

    def get(self) -> Value:
        return Value(self.code, self.code.build.load(self.slot, typ=self.type))

    def set(self, value: Value) -> None:
        self.code.build.store(value.value, self.slot)


class Code:
    """A function that is being written.

    Parameters
    ----------
    module : llvmlite.ir.Module
    name : str
    parameters : sequence of llvmlite type
    lanes : int
        float32 in a vector.
    """

    def __init__(self, module: Any, name: str, parameters: Sequence[Any], lanes: int) -> None:
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), parameters), name)
        self.build = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.parameters = [Value(self, parameter) for parameter in self.function.args]
        self.lanes, self.vector = lanes, ir.VectorType(FLOAT, lanes)

    def integer(self, number: int) -> Value:
        return Value(self, INT(number))

    def number(self, number: float) -> Value:
        return Value(self, FLOAT(number))

    @property
    def always(self) -> Value:
        """A condition that holds."""
        return Value(self, ir.Constant(ir.IntType(1), 1))

    def zeros(self) -> Value:
        return Value(self, ir.Constant(self.vector, [0.0] * self.lanes))

    def finish(self) -> Any:
        """End the function and return it."""
        self.build.ret_void()
        return self.function

    def call(self, function: Any, *arguments: Value) -> None:
        self.build.call(function, [argument.value for argument in arguments])

    def intrinsic(self, name: str, *arguments: Value) -> Value:
        """Call LLVM's intrinsic of vectors ``llvm.<name>``."""
        of = ir.FunctionType(self.vector, [self.vector] * len(arguments))
        function = self._declared(f"{name}.v{self.lanes}f32", of)
        return Value(self, self.build.call(function, [argument.value for argument in arguments]))

    def _declared(self, name: str, of: Any) -> Any:
        module, name = self.build.module, f"llvm.{name}"
        return module.globals.get(name) or ir.Function(module, of, name)

    def fields(self, address: Value, structure: type[ctypes.Structure]) -> SimpleNamespace:
        """Load the fields of a structure of 64-bit integers and addresses."""
        values = {}
        for k, field in enumerate(structure._fields_):
            where = self.build.gep(address.value, [INT(k)], source_etype=INT)
            of = ADDRESS if field[1] is ctypes.c_void_p else INT
            values[field[0]] = Value(self, self.build.load(where, typ=of))
        return SimpleNamespace(**values)

    # Control.

    @contextlib.contextmanager
    def loop(self, stop: Any, start: Any = 0, step: int = 1) -> Iterator[Value]:
        """Repeat the block for ``range(start, stop, step)``."""
        count = Variable(start if isinstance(start, Value) else self.integer(start))
        stop = stop if isinstance(stop, Value) else self.integer(stop)
        with self.repeat(lambda: count.get() < stop):
            index = count.get()
            yield index
            count.set(index + step)

    @contextlib.contextmanager
    def repeat(self, condition: Any) -> Iterator[None]:
        """Repeat the block while what the function `condition` writes holds."""
        test, body, end = map(self.function.append_basic_block, ("test", "body", "end"))
        self.build.branch(test)
        self.build.position_at_end(test)
        self.build.cbranch(condition().value, body, end)
        self.build.position_at_end(body)
        yield
        self.build.branch(test)
        self.build.position_at_end(end)

    @contextlib.contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Do the block if a condition holds."""
        with self.build.if_then(condition.value):
            yield

    # Memory.

    def load_float(self, address: Value) -> Value:
        return Value(self, self.build.load(address.value, typ=FLOAT))

    def load_int(self, address: Value, index: Value) -> Value:
        where = self.build.gep(address.value, [index.value], source_etype=INT)
        return Value(self, self.build.load(where, typ=INT))

    def load_byte(self, address: Value, index: Value) -> Value:
        """Load an unsigned byte as an integer."""
        where = self.build.gep(address.value, [index.value], source_etype=BYTE)
        return Value(self, self.build.zext(self.build.load(where, typ=BYTE), INT))

    def store_float(self, address: Value, value: Value) -> None:
        self.build.store(value.value, address.value)

    def splat(self, scalar: Value) -> Value:
        """A vector with one number in all lanes."""
        of = ir.VectorType(scalar.type, self.lanes)
        undefined = ir.Constant(of, ir.Undefined)
        first = self.build.insert_element(undefined, scalar.value, INT32(0))
        zeros = ir.Constant(ir.VectorType(INT32, self.lanes), [0] * self.lanes)
        return Value(self, self.build.shuffle_vector(first, undefined, zeros))

    def load(self, address: Value, valid: Value | None = None) -> Value:
        """Load a vector; lanes from `valid` on are zero and are not read."""
        if valid is None:
            return Value(self, self.build.load(address.value, typ=self.vector, align=4))
        result = Variable(self.zeros())
        with self.build.if_else((valid < self.lanes).value) as (some, all_):
            with some:
                mask = self._mask(valid)
                of = ir.FunctionType(self.vector, [ADDRESS, INT32, mask.type, self.vector])
                masked = self._declared(f"masked.load.v{self.lanes}f32.p0", of)
                arguments = [address.value, INT32(4), mask, self.zeros().value]
                result.set(Value(self, self.build.call(masked, arguments)))
            with all_:
                result.set(self.load(address))
        return result.get()

    def store(self, address: Value, value: Value, valid: Value | None = None) -> None:
        """Store a vector; lanes from `valid` on are not written."""
        if valid is None:
            self.build.store(value.value, address.value, align=4)
            return
        with self.build.if_else((valid < self.lanes).value) as (some, all_):
            with some:
                mask = self._mask(valid)
                of = ir.FunctionType(ir.VoidType(), [self.vector, ADDRESS, INT32, mask.type])
                masked = self._declared(f"masked.store.v{self.lanes}f32.p0", of)
                self.build.call(masked, [value.value, address.value, INT32(4), mask])
            with all_:
                self.store(address, value)

    def _mask(self, valid: Value) -> Any:
        lane = ir.Constant(ir.VectorType(INT, self.lanes), list(range(self.lanes)))
        return self.build.icmp_signed("<", lane, self.splat(valid).value)


def fma(a: Value, b: Any, c: Any) -> Value:
    """``a * b + c``, rounded once."""
    return a.code.intrinsic("fma", a, a.same(b), a.same(c))


# Both activations are made from exp(y) = 2**n * (1 + p) with p = exp(r) - 1, y = n * ln 2 + r and
# |r| <= ln 2 / 2: there the Taylor series to r**7 is within a quarter of a unit in the last place.
_LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440054690583e-4  # n * high is exact
_ROUND = 1.5 * 2.0**23  # adding it leaves an integer in the lowest bits
_TAYLOR = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2)


def _exp_parts(y: Value) -> tuple[Value, Value]:
    """``2**n`` and p for |y| <= 87."""
    code, build = y.code, y.code.build
    shifted = fma(y, _LOG2_E, _ROUND)
    n = shifted - _ROUND
    r = fma(n, -_LN2_LOW, fma(n, -_LN2_HIGH, y))
    series = fma(r, _TAYLOR[0], _TAYLOR[1])
    for coefficient in _TAYLOR[2:]:
        series = fma(series, r, coefficient)
    p = fma(r * r, series, r)
    integers = ir.VectorType(INT32, code.lanes)
    exponent = build.shl(
        build.bitcast(shifted.value, integers), ir.Constant(integers, [23] * code.lanes)
    )
    bits = build.add(exponent, ir.Constant(integers, [127 << 23] * code.lanes))
    return Value(code, build.bitcast(bits, code.vector)), p


def sigmoid(x: Value) -> Value:
    """``1 / (1 + exp(-x))``; not a number where x is not."""
    scale, p = _exp_parts((0.0 - x.at_most(87.0)).at_most(87.0))
    return 1.0 / (fma(scale, p, scale) + 1.0)


def tanh(x: Value) -> Value:
    """``e / (e + 2)`` with e = exp(2 |x|) - 1 and the sign of x; not a number where x is not."""
    scale, p = _exp_parts((x.code.intrinsic("fabs", x) * 2.0).at_most(20.0))
    e = fma(scale, p, scale - 1.0)
    return x.code.intrinsic("copysign", e / (e + 2.0), x)
