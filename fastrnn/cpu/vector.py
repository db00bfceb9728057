"""A language of float32 vectors: Python that writes LLVM's code.

A kernel is a Python function that is called once, with a `Code` to write to; loops and conditions
that shall exist in the kernel are ``with`` blocks of it, everything else is Python and is gone
when the kernel is compiled. Values are 64-bit integers, addresses of float32, float32 numbers and
vectors of them; Python's operators work on all of these::

    with code.loop(count, step=lanes) as k:
        code.store(y + k, code.load(x + k) * 2.0)

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
    to an address counts in elements of float32. Of floats, a product and the sum it goes into may
    be rounded once: plain arithmetic becomes FMAs.
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
        build, operands = self.code.build, (self.value, self.same(other).value)
        if self.is_float:
            return Value(self.code, getattr(build, f"f{operation}")(*operands, flags=("contract",)))
        return Value(self.code, getattr(build, operation)(*operands))

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
        build = self.code.build
        compare = build.icmp_signed
        if self.is_float:  # as in Python, only != holds for what is not a number
            compare = build.fcmp_unordered if operator == "!=" else build.fcmp_ordered
        return Value(self.code, compare(operator, self.value, self.same(other).value))

    def __lt__(self, other: Any) -> Value:
        return self._compare("<", other)

    def __le__(self, other: Any) -> Value:
        return self._compare("<=", other)

    def __gt__(self, other: Any) -> Value:
        return self._compare(">", other)

    def __eq__(self, other: Any) -> Value:  # type: ignore[override]
        return self._compare("==", other)

    def __ne__(self, other: Any) -> Value:  # type: ignore[override]
        return self._compare("!=", other)

    @property
    def is_given(self) -> Value:
        """Whether an address is not null."""
        return self._compare("!=", None)

    def at_most(self, limit: Any) -> Value:
        """The smaller of this and a limit; where this is not a number, this."""
        return where(self > limit, limit, self)


def where(condition: Value, x: Any, y: Any) -> Value:
    """x where a condition holds, else y; two numbers are those of vectors."""
    code = condition.code
    like = next((part for part in (x, y) if isinstance(part, Value)), code.zeros())
    x, y = like.same(x), like.same(y)
    return Value(code, code.build.select(condition.value, x.value, y.value))


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
        """Load the fields of a structure of 64-bit integers, addresses, and arrays of these."""

        def load(offset: int, of: Any) -> Any:
            if issubclass(of, ctypes.Array):
                size = ctypes.sizeof(of._type_)
                return [load(offset + k * size, of._type_) for k in range(of._length_)]
            at = self.build.gep(address.value, [INT(offset)], source_etype=BYTE)
            typ = ADDRESS if of is ctypes.c_void_p else INT
            return Value(self, self.build.load(at, typ=typ))

        fields = [field[:2] for field in structure._fields_]
        loaded = {name: load(getattr(structure, name).offset, of) for name, of in fields}
        return SimpleNamespace(**loaded)

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
        at = self.build.gep(address.value, [index.value], source_etype=INT)
        return Value(self, self.build.load(at, typ=INT))

    def load_byte(self, address: Value, index: Value) -> Value:
        """Load an unsigned byte as an integer."""
        at = self.build.gep(address.value, [index.value], source_etype=BYTE)
        return Value(self, self.build.zext(self.build.load(at, typ=BYTE), INT))

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
