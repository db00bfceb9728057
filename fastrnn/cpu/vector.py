"""A language of vectors: Python that writes LLVM's code.

A kernel is a Python function that is called once, with a `Code` to write to; loops and conditions
that shall exist in the kernel are ``with`` blocks of it, everything else is Python and is gone
when the kernel is compiled. Values are 64-bit integers, addresses, numbers and vectors of them;
Python's operators work on all of these::

    with code.loop(count, step=lanes) as k:
        code.store(y + k, code.load(x + k) * 2.0)

The width of a vector is a number like any other, so one source serves every instruction set; and so
is the dtype, in its `Format`. An address knows what lies there, and loading and storing convert.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from llvmlite import ir


class _BFloat(ir.Type):
    """LLVM's bfloat16, which llvmlite does not name."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


INT, INT32, INT16, BYTE = (ir.IntType(bits) for bits in (64, 32, 16, 8))
FLOAT, DOUBLE, BFLOAT = ir.FloatType(), ir.DoubleType(), _BFloat()
ADDRESS = ir.PointerType()
_FLOATS = (FLOAT, DOUBLE)


class Format(NamedTuple):
    """What a kernel computes in.

    Attributes
    ----------
    element : llvmlite type
        Of the large tensors and of the factors of products.
    exact : llvmlite type
        Of sums, of states, and of all other arithmetic.
    lanes : int
        Exact numbers in a vector.
    """

    element: Any
    exact: Any
    lanes: int


class Value:
    """Something that a kernel computes.

    Arithmetic takes Python's numbers too, which for a vector stand for all of its lanes. Adding
    to an address counts in what lies there, its `unit`. Of floats, a product and the sum it goes
    into may be rounded once: plain arithmetic becomes FMAs.
    """

    def __init__(self, code: Code, value: Any, unit: Any = None) -> None:
        self.code, self.value, self.type, self.unit = code, value, value.type, unit

    @property
    def is_float(self) -> bool:
        of = self.type.element if isinstance(self.type, ir.VectorType) else self.type
        return of in _FLOATS

    def of(self, unit: Any) -> Value:
        """The same address, of another unit."""
        return Value(self.code, self.value, unit)

    def same(self, other: Any) -> Value:
        """A number, or None for an address, as a value of this type; a value as it is."""
        if isinstance(other, Value):
            return other
        if self.type == ADDRESS:
            return Value(self.code, ir.Constant(ADDRESS, None), self.unit)
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
        at = self.code.build.gep(self.value, [index], source_etype=self.unit)
        return Value(self.code, at, self.unit)

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
    return Value(code, code.build.select(condition.value, x.value, y.value), x.unit)


class Variable:
    """A value that changes while the kernel runs."""

    def __init__(self, initial: Value) -> None:
        self.code = initial.code
        with self.code.build.goto_entry_block():
            self.slot = self.code.build.alloca(initial.type)
        self.type, self.unit = initial.type, initial.unit
        self.set(initial)

    def get(self) -> Value:
        return Value(self.code, self.code.build.load(self.slot, typ=self.type), self.unit)

    def set(self, value: Value) -> None:
        self.code.build.store(value.value, self.slot)


class Code:
    """A function that is being written.

    Parameters
    ----------
    module : llvmlite.ir.Module
    name : str
    parameters : sequence of llvmlite type
    format : Format
    """

    def __init__(self, module: Any, name: str, parameters: Sequence[Any], format: Format) -> None:
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), parameters), name)
        self.build = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.parameters = [Value(self, parameter) for parameter in self.function.args]
        self.element, self.exact, self.lanes = format
        self.vector = ir.VectorType(self.exact, self.lanes)

    def integer(self, number: int) -> Value:
        return Value(self, INT(number))

    @property
    def always(self) -> Value:
        """A condition that holds."""
        return Value(self, ir.Constant(ir.IntType(1), 1))

    def constant(self, number: float) -> Value:
        """A vector of one number."""
        return Value(self, ir.Constant(self.vector, [number] * self.lanes))

    def zeros(self) -> Value:
        return self.constant(0.0)

    def finish(self) -> Any:
        """End the function and return it."""
        self.build.ret_void()
        return self.function

    def call(self, function: Any, *arguments: Value) -> None:
        self.build.call(function, [argument.value for argument in arguments])

    def intrinsic(self, name: str, *arguments: Value) -> Value:
        """Call LLVM's intrinsic ``llvm.<name>``, of vectors or of exact numbers."""
        typ = arguments[0].type
        of = ir.FunctionType(typ, [typ] * len(arguments))
        function = self.declared(f"llvm.{name}.{_suffix(typ)}", of)
        return Value(self, self.build.call(function, [argument.value for argument in arguments]))

    def total(self, vector: Value) -> Value:
        """The sum of all lanes, in an order that is the same for every call."""
        of = ir.FunctionType(self.exact, [self.exact, self.vector])
        function = self.declared(f"llvm.vector.reduce.fadd.{_suffix(self.vector)}", of)
        arguments = [ir.Constant(self.exact, 0.0), vector.value]
        return Value(self, self.build.call(function, arguments, fastmath=("reassoc",)))

    def number(self, integer: Value) -> Value:
        """An integer as an exact number."""
        return Value(self, self.build.sitofp(integer.value, self.exact))

    def declared(self, name: str, of: Any) -> Any:
        """A function of LLVM's, of a type."""
        module = self.build.module
        return module.globals.get(name) or ir.Function(module, of, name)

    def fields(
        self, address: Value, structure: type[ctypes.Structure], units: dict[Any, Any]
    ) -> SimpleNamespace:
        """Load the fields of a structure of 64-bit integers, addresses, and arrays of these.

        `units` are those of the kinds of addresses.
        """

        def load(offset: int, of: Any) -> Any:
            if issubclass(of, ctypes.Array):
                size = ctypes.sizeof(of._type_)
                return [load(offset + k * size, of._type_) for k in range(of._length_)]
            at = self.build.gep(address.value, [INT(offset)], source_etype=BYTE)
            typ = ADDRESS if issubclass(of, ctypes.c_void_p) else INT
            return Value(self, self.build.load(at, typ=typ), units.get(of))

        fields = [field[:2] for field in structure._fields_]
        loaded = {name: load(getattr(structure, name).offset, of) for name, of in fields}
        return SimpleNamespace(**loaded)

    # Control.

    @contextlib.contextmanager
    def loop(self, stop: Any, start: Any = 0, step: Any = 1) -> Iterator[Value]:
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

    @contextlib.contextmanager
    def either(self, condition: Value) -> Iterator[Any]:
        """Give two blocks, of which one is done: the first if a condition holds."""
        with self.build.if_else(condition.value) as blocks:
            yield blocks

    # Memory.

    def load_number(self, address: Value) -> Value:
        """Load a number, as an exact one."""
        if address.unit != BFLOAT:
            return Value(self, self.build.load(address.value, typ=self.exact))
        return Value(self, self._widened(self.build.load(address.value, typ=INT16)))

    def load_int(self, address: Value, index: Value) -> Value:
        at = self.build.gep(address.value, [index.value], source_etype=INT)
        return Value(self, self.build.load(at, typ=INT))

    def load_byte(self, address: Value, index: Value) -> Value:
        """Load an unsigned byte as an integer."""
        at = self.build.gep(address.value, [index.value], source_etype=BYTE)
        return Value(self, self.build.zext(self.build.load(at, typ=BYTE), INT))

    def splat(self, scalar: Value) -> Value:
        """A vector with one number in all lanes."""
        of = ir.VectorType(scalar.type, self.lanes)
        undefined = ir.Constant(of, ir.Undefined)
        first = self.build.insert_element(undefined, scalar.value, INT32(0))
        zeros = ir.Constant(ir.VectorType(INT32, self.lanes), [0] * self.lanes)
        return Value(self, self.build.shuffle_vector(first, undefined, zeros))

    def shuffle(self, x: Value, y: Value, lanes: Sequence[int]) -> Value:
        """Lanes of two vectors, those of the second counted on."""
        chosen = ir.Constant(ir.VectorType(INT32, len(lanes)), list(lanes))
        return Value(self, self.build.shuffle_vector(x.value, y.value, chosen))

    def load(self, address: Value, valid: Value | None = None) -> Value:
        """Load a vector of exact numbers; lanes from `valid` on are zero and are not read."""
        of = INT16 if address.unit == BFLOAT else self.exact
        loaded = self.load_raw(address, ir.VectorType(of, self.lanes), valid)
        return loaded if of != INT16 else Value(self, self._widened(loaded.value))

    def load_raw(self, address: Value, of: Any, valid: Value | None = None) -> Value:
        """Load a vector of a type, with zeros from `valid` on."""
        align = _bytes(of.element)
        if valid is None:
            return Value(self, self.build.load(address.value, typ=of, align=align))
        result = Variable(Value(self, ir.Constant(of, [0] * of.count)))
        with self.either(valid < of.count) as (some, all_):
            with some:
                mask = self._mask(valid, of.count)
                masked = self.declared(
                    f"llvm.masked.load.{_suffix(of)}.p0",
                    ir.FunctionType(of, [ADDRESS, INT32, mask.type, of]),
                )
                zeros = ir.Constant(of, [0] * of.count)
                arguments = [address.value, INT32(align), mask, zeros]
                result.set(Value(self, self.build.call(masked, arguments)))
            with all_:
                result.set(self.load_raw(address, of))
        return result.get()

    def load_flags(self, address: Value, valid: Value) -> Value:
        """Load bytes of a vector's lanes, as conditions."""
        flags = self.load_raw(address, ir.VectorType(BYTE, self.lanes), valid)
        zeros = ir.Constant(flags.type, [0] * self.lanes)
        return Value(self, self.build.icmp_unsigned("!=", flags.value, zeros))

    def are_valid(self, valid: Value) -> Value:
        """Conditions that hold in the lanes before `valid`."""
        return Value(self, self._mask(valid, self.lanes))

    def store_number(self, address: Value, number: Value) -> None:
        """Store an exact number."""
        self.build.store(number.value, address.value)

    def store(self, address: Value, value: Value, valid: Value | None = None) -> None:
        """Store a vector of exact numbers; lanes from `valid` on are not written."""
        if address.unit == BFLOAT:
            value = Value(self, self._narrowed(value.value))
        self.store_raw(address, value, valid)

    def store_raw(self, address: Value, value: Value, valid: Value | None = None) -> None:
        """Store a vector of any type; lanes from `valid` on are not written."""
        of = value.type
        align = _bytes(of.element)
        if valid is None:
            self.build.store(value.value, address.value, align=align)
            return
        with self.either(valid < of.count) as (some, all_):
            with some:
                mask = self._mask(valid, of.count)
                masked = self.declared(
                    f"llvm.masked.store.{_suffix(of)}.p0",
                    ir.FunctionType(ir.VoidType(), [of, ADDRESS, INT32, mask.type]),
                )
                self.build.call(masked, [value.value, address.value, INT32(align), mask])
            with all_:
                self.store_raw(address, value)

    def _mask(self, valid: Value, lanes: int) -> Any:
        of = ir.VectorType(INT, lanes)
        undefined = ir.Constant(of, ir.Undefined)
        first = self.build.insert_element(undefined, valid.value, INT32(0))
        zeros = ir.Constant(ir.VectorType(INT32, lanes), [0] * lanes)
        limit = self.build.shuffle_vector(first, undefined, zeros)
        return self.build.icmp_signed("<", ir.Constant(of, list(range(lanes))), limit)

    # bfloat16 is the upper half of a float32.

    def _widened(self, halves: Any) -> Any:
        wide, exact, shift = INT32, FLOAT, INT32(16)
        if isinstance(halves.type, ir.VectorType):
            wide, exact = (ir.VectorType(of, self.lanes) for of in (INT32, FLOAT))
            shift = ir.Constant(wide, [16] * self.lanes)
        return self.build.bitcast(self.build.shl(self.build.zext(halves, wide), shift), exact)

    def _narrowed(self, numbers: Any) -> Any:
        rounded = self.build.fptrunc(numbers, ir.VectorType(BFLOAT, self.lanes))
        return self.build.bitcast(rounded, ir.VectorType(INT16, self.lanes))


def _bytes(of: Any) -> int:
    return {FLOAT: 4, DOUBLE: 8}[of] if of in _FLOATS else of.width // 8


def _suffix(of: Any) -> str:
    """The part of an intrinsic's name that says a type."""
    if isinstance(of, ir.VectorType):
        return f"v{of.count}{of.element.intrinsic_name}"
    return of.intrinsic_name


def fma(a: Value, b: Any, c: Any) -> Value:
    """``a * b + c``, rounded once."""
    return a.code.intrinsic("fma", a, a.same(b), a.same(c))
