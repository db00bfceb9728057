"""A PTX instruction while it is encoded: its suffixes, operands and words."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from .program import OPS, SINK, PtxError

# The only variable in shared memory, at address 0.
_SHARED_MEMORY = "global_smem"

#: Kinds of registers by their PTX types.
REGISTERS = {"pred": "p"}
REGISTERS |= dict.fromkeys(("b8", "b16", "u16", "s16", "b32", "u32", "s32", "f32"), "r")
REGISTERS |= dict.fromkeys(("b64", "u64", "s64", "f64"), "d")
_KINDS = {"r": "a register of at most 32 bits", "d": "a register of 64 bits", "p": "a predicate"}
#: Sizes in bytes of the types that move between registers, or to and from memory.
MOVED = {"b16": 2, "u16": 2, "s16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4}
MOVED |= {"b64": 8, "u64": 8, "s64": 8, "f64": 8}

#: The suffixes of shared memory.
SHARED = {"shared": True, "shared::cta": True}

_INTEGER = re.compile(r"-?(0[xX][0-9A-Fa-f]+|0|[1-9][0-9]*)U?")
_FLOAT = re.compile(r"0[fF]([0-9A-Fa-f]{8})")
_DOUBLE = re.compile(r"0[dD]([0-9A-Fa-f]{16})")
_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+)\s*)?\]")

Word = list[int]
_T = TypeVar("_T")


class Register(NamedTuple):
    """A register: its kind, r, d or p, and its number among those."""

    kind: str
    number: int


class Assembler:
    """What encoded instructions refer to: registers, constants, parameters, labels.

    Names of registers and labels belong to the open block and hide those of the enclosing blocks; a
    label may come after the jumps to it.
    """

    def __init__(self, params: Sequence[str]) -> None:
        self.params = params
        self.registers: ChainMap[str, Register] = ChainMap()
        self.counts = {"r": 0, "d": 0, "p": 0}
        self.constants: dict[str, dict[int, int]] = {"r": {}, "d": {}}
        self.pool: list[int] = []
        self.code: list[Word] = []
        self.labels: ChainMap[str, int] = ChainMap()
        self.jumps: list[tuple[int, str, ChainMap[str, int]]] = []

    def open_block(self) -> None:
        self.registers, self.labels = self.registers.new_child(), self.labels.new_child()

    def close_block(self) -> None:
        self.registers, self.labels = self.registers.parents, self.labels.parents

    def declare(self, kind: str, name: str) -> None:
        """Declare a register, or with ``<n>`` after the name, n of them."""
        found = re.fullmatch(r"([%\w$]+)(?:<(\d+)>)?", name)
        if found is None:
            raise PtxError(f"{name!r} is not the name of a register")
        names = [f"{found[1]}{n}" for n in range(int(found[2]))] if found[2] else [name]
        for each in names:
            if each in self.registers.maps[0]:
                raise PtxError(f"there is another register {each}")
            self.registers[each] = Register(kind, self.temporary(kind))

    def temporary(self, kind: str = "r") -> int:
        """Allocate an unnamed register."""
        self.counts[kind] += 1
        return self.counts[kind] - 1

    def add_label(self, name: str) -> None:
        if name in self.labels.maps[0]:
            raise PtxError("there is another label of this name")
        self.labels[name] = len(self.code)

    def jump(self, label: str) -> None:
        """Make the next instruction jump to a label."""
        self.jumps.append((len(self.code), label, self.labels))

    def is_wide(self, text: str) -> bool:
        """Return whether this is a 64-bit register."""
        return text in self.registers and self.registers[text].kind == "d"

    def operand(self, text: str, kind: str) -> int:
        """Return the pool entry for a register or a literal."""
        if text in self.registers:
            register = self.registers[text]
            if register.kind != kind:
                raise PtxError(f"{text} is {_KINDS[register.kind]}, not {_KINDS[kind]}")
            return register.number
        if text == _SHARED_MEMORY and kind == "r":
            return self.constant(0, kind)
        if kind == "r" and (found := _FLOAT.fullmatch(text)):
            return self.constant(int(found[1], 16), kind)
        if kind == "d" and (found := _DOUBLE.fullmatch(text)):
            return self.constant(int(found[1], 16), kind)
        if not _INTEGER.fullmatch(text):
            raise PtxError(f"{text or 'nothing'} is neither {_KINDS[kind]} nor a literal")
        value = integer(text)
        return ~int(value != 0) if kind == "p" else self.constant(value, kind)

    def constant(self, value: int, kind: str) -> int:
        bits = 64 if kind == "d" else 32
        if not -(1 << (bits - 1)) <= value < 1 << bits:
            raise PtxError(f"{value} has more than {bits} bits")
        table = self.constants[kind]
        return ~table.setdefault(value % (1 << bits), len(table))


class Statement:
    """An instruction while it is encoded: first its suffixes are consumed, then its operands."""

    def __init__(
        self,
        assembler: Assembler,
        guard: tuple[int, int],
        name: str,
        suffixes: list[str],
        operands: list[str],
    ) -> None:
        self.assembler, self.guard, self.name = assembler, guard, name
        self._suffixes, self._operands = suffixes, operands

    def has(self, suffix: str) -> bool:
        """Consume a suffix if present."""
        there = suffix in self._suffixes
        if there:
            self._suffixes.remove(suffix)
        return there

    def choose(self, choices: Mapping[str, _T], default: _T | None = None) -> _T:
        """Consume the one suffix that is among the choices, and return what it stands for.

        If there are two, the other remains.
        """
        for suffix in self._suffixes:
            if suffix in choices:
                self._suffixes.remove(suffix)
                return choices[suffix]
        if default is None:
            raise PtxError(f"needs one of .{', .'.join(choices)}")
        return default

    def require(self, *suffixes: str) -> None:
        """Consume suffixes that the instruction must have and that carry no information."""
        for suffix in suffixes:
            self.choose({suffix: True})

    def take_last(self, count: int) -> tuple[str, ...]:
        """Consume the last suffixes, which are types."""
        if len(self._suffixes) < count:
            raise PtxError(f"needs {count} types")
        taken = self._suffixes[-count:]
        del self._suffixes[-count:]
        return tuple(taken)

    def operands(self, *counts: int) -> list[str]:
        """Check that all suffixes are consumed; return the operands, whose count must match."""
        if self._suffixes:
            raise PtxError(f"suffix .{' .'.join(self._suffixes)} is not known")
        if len(self._operands) not in counts:
            expected = " or ".join(map(str, counts))
            raise PtxError(f"{len(self._operands)} operands, not {expected}")
        return self._operands

    def source(self, text: str, kind: str) -> int:
        return self.assembler.operand(text, kind)

    def destination(self, text: str, kind: str) -> int:
        if text not in self.assembler.registers:
            raise PtxError(f"{text or 'nothing'} is not a register")
        return self.assembler.operand(text, kind)

    def destination_or_sink(self, text: str, kind: str) -> int:
        return SINK if text == "_" else self.destination(text, kind)

    def sources(self, texts: Sequence[str], kind: str = "r") -> list[int]:
        return [self.source(text, kind) for text in texts]

    def vector(self, text: str, count: int, kind: str = "r") -> list[int]:
        """Return the sources in braces."""
        return self.sources(elements(text, count), kind)

    def address(self, text: str, kind: str) -> tuple[int, int]:
        """Return base and offset of an operand in brackets."""
        base, offset = address(text)
        return self.source(base, kind), offset

    def word(
        self,
        operation: str,
        destinations: Sequence[int] = (),
        sources: Sequence[int] = (),
        *,
        imm: int = 0,
        flags: int = 0,
        aux: int = 0,
        aux2: int = 0,
    ) -> Word:
        """Add operands to the pool and make an instruction of the engine."""
        if operation not in OPS:
            raise PtxError(f"the engine has no operation {operation}")
        pool = self.assembler.pool
        first = len(pool)
        pool += [*destinations, *sources]
        at = (len(destinations), first, len(sources), first + len(destinations))
        return [OPS[operation], *self.guard, *at, imm, flags, aux, aux2, 0]


def encode(assembler: Assembler, text: str) -> list[Word]:
    """Encode an instruction, as several words where the engine has no single operation for it."""
    (guard, negated), rest = guard_and_rest(text)
    opcode, _, operands = rest.replace("\t", " ").partition(" ")
    names = opcode.split(".")
    predicate = assembler.operand(guard, "p") if guard else -1
    # Find the longest known name; the rest are suffixes.
    for count in range(len(names), 0, -1):
        name = ".".join(names[:count])
        if name in _ENCODERS:
            guards = (predicate, int(negated))
            statement = Statement(assembler, guards, name, names[count:], _split(operands))
            return _ENCODERS[name](statement)
    raise PtxError("such an instruction is not known")


def guard_and_rest(text: str) -> tuple[tuple[str, bool], str]:
    """Split an instruction into its guard, a predicate and whether it is negated, and the rest."""
    found = re.match(r"@(!?)\s*([%\w$]+)\s+(.*)", text, re.S)
    return ((found[2], bool(found[1])), found[3]) if found else (("", False), text)


def _split(text: str) -> list[str]:
    """Split operands at commas outside of braces and brackets."""
    parts = re.split(r",(?![^{]*\}|[^[]*\])", text)
    return [part.strip() for part in parts] if text.strip() else []


def elements(text: str, count: int) -> list[str]:
    """Return the elements of a vector in braces; a single operand is its own element."""
    braced = text.startswith("{") and text.endswith("}")
    parts = [part.strip() for part in text[1:-1].split(",")] if braced else [text]
    if len(parts) != count:
        raise PtxError(f"{text} has {len(parts)} elements, not {count}")
    return parts


def integer(text: str) -> int:
    """Parse a literal."""
    if not _INTEGER.fullmatch(text):
        raise PtxError(f"{text} is not an integer")
    return int(text.rstrip("U"), 0)


def count_of(text: str) -> int:
    """Parse a literal that must not be negative."""
    number = integer(text)
    if number < 0:
        raise PtxError(f"{text} is negative")
    return number


def address(text: str) -> tuple[str, int]:
    """Parse an address in brackets: a name and an offset."""
    found = _ADDRESS.fullmatch(text)
    if found is None:
        raise PtxError(f"{text} is not an address")
    offset = integer(found[2]) if found[2] else 0
    if not -(1 << 31) <= offset < 1 << 31:
        raise PtxError(f"offset {offset} has more than 32 bits")
    return found[1], offset


_Encoder = Callable[[Statement], "list[Word]"]
_ENCODERS: dict[str, _Encoder] = {}


def encodes(*names: str) -> Callable[[_Encoder], _Encoder]:
    """Register an encoder for instructions whose names begin with one of these."""

    def register(encoder: _Encoder) -> _Encoder:
        _ENCODERS.update(dict.fromkeys(names, encoder))
        return encoder

    return register
