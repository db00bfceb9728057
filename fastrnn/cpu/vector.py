"""An embedded language for vector code: Python functions that emit LLVM IR.

A kernel is a Python function that is called once, with a `Code` to write to. Loops and conditions
of the kernel are ``with`` blocks of the `Code`; everything else is Python that runs while the
kernel is generated. Values are 64-bit integers, addresses, numbers and vectors of numbers, and
Python's operators work on all of them::

    with code.loop(count, step=lanes) as k:
        code.store(y + k, code.load(x + k) * 2.0)

The vector width is a parameter, so one source serves every instruction set; so is the dtype, given
by a `Format`. An address carries the type of its elements, and loads and stores convert.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from llvmlite import ir


class _BFloat(ir.Type):
    """LLVM's bfloat16, for which llvmlite has no type."""

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
    """The number formats of a kernel.

    Attributes
    ----------
    element : llvmlite type
        Type of large tensors and of the factors of products.
    exact : llvmlite type
        Type of sums, states and all other arithmetic.
    lanes : int
        Number of exact numbers in a vector.
    """

    element: Any
    exact: Any
    lanes: int


class Value:
    """A value that a kernel computes.

    Operands may be Python numbers, which are broadcast to all lanes of a vector. Offsets added to
    an address are in multiples of its `unit`. Multiplications and additions of floats may be
    contracted to FMAs.
    """

    def __init__(self, code: Code, value: Any, unit: Any = None) -> None:
        self.code, self.value, self.type, self.unit = code, value, value.type, unit

    @property
    def is_float(self) -> bool:
        of = self.type.element if isinstance(self.type, ir.VectorType) else self.type
        return of in _FLOATS

    def of(self, unit: Any) -> Value:
        """The same address with another unit."""
        return Value(self.code, self.value, unit)

    def same(self, other: Any) -> Value:
        """Convert a number, or None for an address, to a value of this type; keep values."""
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
        """The quotient of non-negative integers."""
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
        if self.is_float:  # as in Python, only != holds for NaN
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
        """The smaller of this value and a limit; NaN stays NaN."""
        return where(self > limit, limit, self)


def where(condition: Value, x: Any, y: Any) -> Value:
    """Select x where a condition holds, else y; if both are numbers, the result is a vector."""
    code = condition.code
    like = next((part for part in (x, y) if isinstance(part, Value)), code.zeros())
    x, y = like.same(x), like.same(y)
    return Value(code, code.build.select(condition.value, x.value, y.value), x.unit)


class Variable:
    """A mutable variable of the kernel."""

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
    """A function under construction.

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
        """A condition that is always true."""
        return Value(self, ir.Constant(ir.IntType(1), 1))

    def constant(self, number: float) -> Value:
        """A vector with the same number in all lanes."""
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
        """Call LLVM's intrinsic ``llvm.<name>`` on vectors or exact numbers."""
        typ = arguments[0].type
        of = ir.FunctionType(typ, [typ] * len(arguments))
        function = self.declared(f"llvm.{name}.{_suffix(typ)}", of)
        return Value(self, self.build.call(function, [argument.value for argument in arguments]))

    def total(self, vector: Value) -> Value:
        """Sum all lanes, in the same order in every call."""
        of = ir.FunctionType(self.exact, [self.exact, self.vector])
        function = self.declared(f"llvm.vector.reduce.fadd.{_suffix(self.vector)}", of)
        arguments = [ir.Constant(self.exact, 0.0), vector.value]
        return Value(self, self.build.call(function, arguments, fastmath=("reassoc",)))

    def number(self, integer: Value) -> Value:
        """Convert an integer to an exact number."""
        return Value(self, self.build.sitofp(integer.value, self.exact))

    def declared(self, name: str, of: Any) -> Any:
        """Get or declare an external function of a type."""
        module = self.build.module
        return module.globals.get(name) or ir.Function(module, of, name)

    def fields(
        self, address: Value, structure: type[ctypes.Structure], units: dict[Any, Any]
    ) -> SimpleNamespace:
        """Load the fields of a structure of 64-bit integers, addresses, and arrays of these.

        `units` maps the types of addresses to their units.
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
        """Repeat the block while the condition that the function `condition` writes holds."""
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
        """Run the block if a condition holds."""
        with self.build.if_then(condition.value):
            yield

    @contextlib.contextmanager
    def either(self, condition: Value) -> Iterator[Any]:
        """Yield two blocks, of which the first runs if a condition holds, else the second."""
        with self.build.if_else(condition.value) as blocks:
            yield blocks

    # Memory.

    def load_number(self, address: Value) -> Value:
        """Load a number and convert it to an exact one."""
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
        """Broadcast a scalar to all lanes of a vector."""
        of = ir.VectorType(scalar.type, self.lanes)
        undefined = ir.Constant(of, ir.Undefined)
        first = self.build.insert_element(undefined, scalar.value, INT32(0))
        zeros = ir.Constant(ir.VectorType(INT32, self.lanes), [0] * self.lanes)
        return Value(self, self.build.shuffle_vector(first, undefined, zeros))

    def shuffle(self, x: Value, y: Value, lanes: Sequence[int]) -> Value:
        """Select lanes of two vectors; indices continue from the first to the second."""
        chosen = ir.Constant(ir.VectorType(INT32, len(lanes)), list(lanes))
        return Value(self, self.build.shuffle_vector(x.value, y.value, chosen))

    def load(self, address: Value, valid: Value | None = None) -> Value:
        """Load a vector as exact numbers; lanes from `valid` on are not read and become zero."""
        of = INT16 if address.unit == BFLOAT else self.exact
        loaded = self.load_raw(address, ir.VectorType(of, self.lanes), valid)
        return loaded if of != INT16 else Value(self, self._widened(loaded.value))

    def load_raw(self, address: Value, of: Any, valid: Value | None = None) -> Value:
        """Load a vector of any type, with zeros from lane `valid` on."""
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
        """Load a byte for each lane, as conditions."""
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
    """The type suffix in the name of an intrinsic."""
    if isinstance(of, ir.VectorType):
        return f"v{of.count}{of.element.intrinsic_name}"
    return of.intrinsic_name


def fma(a: Value, b: Any, c: Any) -> Value:
    """Compute ``a * b + c``, rounded once."""
    return a.code.intrinsic("fma", a, a.same(b), a.same(c))
