"""Encode loads, stores, atomics, fences and asynchronous copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .program import ACQUIRE, CG, RELAXED, RELEASE, SCOPE, VOLATILE, WEAK, PtxError
from .statements import (
    MOVED,
    SHARED,
    Statement,
    Word,
    address,
    count_of,
    elements,
    encodes,
    integer,
)

_STORED = MOVED | {"b8": 1, "u8": 1, "s8": 1}
# The engine zero-extends into registers; it does not sign-extend.
_LOADED = [name for name in _STORED if name not in ("s8", "s16")]


@encodes("ld.param")
def _ld_param(statement: Statement) -> list[Word]:
    size = statement.choose({kind: _STORED[kind] for kind in _LOADED})
    first, second = statement.operands(2)
    name, offset = address(second)
    if name not in statement.assembler.params:
        raise PtxError(f"there is no parameter {name}")
    if offset not in range(9 - size):
        raise PtxError(f"offset {offset} is behind the parameter")
    destination = statement.destination(first, "d" if size == 8 else "r")
    number = statement.assembler.params.index(name)
    if size >= 4:
        return [statement.word(f"LDPARAM{size * 8}", [destination], imm=offset, aux=number)]
    whole = statement.assembler.temporary()
    own = statement.assembler.constant((1 << 8 * size) - 1, "r")
    return [
        statement.word("LDPARAM32", [whole], imm=offset, aux=number),
        statement.word("AND32", [destination], [whole, own]),
    ]


# L1 eviction hints.
_HINTS = {f"L1::{hint}": 0 for hint in ("evict_first", "evict_last", "no_allocate")}
# cs is a hint as well. Not nc: the data it reads must not change meanwhile, which is not checked.
_LOAD_CACHES = {"ca": 0, "cg": CG, "cs": 0}
_STORE_CACHES = {"wb": 0, "cg": CG, "cs": 0}


class _Access(NamedTuple):
    """The suffixes of a load or store."""

    is_shared: bool
    flags: int
    scope: int
    elements: int
    type: str

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return _STORED[self.type]

    @property
    def register_kind(self) -> str:
        return "d" if self.size == 8 else "r"

    @property
    def address_kind(self) -> str:
        return "r" if self.is_shared else "d"

    def is_narrower(self, statement: Statement, register: str) -> bool:
        """Return whether a 64-bit register is given for a narrower element."""
        return self.size < 8 and statement.assembler.is_wide(register)

    def word(
        self,
        statement: Statement,
        name: str,
        destinations: list[int],
        sources: list[int],
        offset: int,
    ) -> Word:
        return statement.word(
            name + ("S" if self.is_shared else "G"),
            destinations,
            sources,
            imm=offset,
            flags=self.flags,
            aux=self.size,
            aux2=self.elements | self.scope << 8,
        )


def _read_access(
    statement: Statement, order: Mapping[str, int], caches: Mapping[str, int], types: Sequence[str]
) -> _Access:
    is_shared = statement.choose({**SHARED, "global": False})
    flags = statement.choose(
        {"weak": WEAK, "volatile": VOLATILE, "relaxed": RELAXED, **order}, WEAK
    )
    scope = SCOPE["sys"] if flags in (WEAK, VOLATILE) else statement.choose(SCOPE)
    if not is_shared:
        flags |= statement.choose(caches, 0)
        statement.choose(_HINTS, 0)
    elements = statement.choose({"v2": 2, "v4": 4, "v8": 8}, 1)
    access = _Access(
        is_shared, flags, scope, elements, statement.choose({name: name for name in types})
    )
    if access.size * elements > (16 if is_shared else 32):
        raise PtxError(f"{access.size * elements} bytes are more than one access has")
    return access


@encodes("ld")
def _ld(statement: Statement) -> list[Word]:
    access = _read_access(statement, {"acquire": ACQUIRE}, _LOAD_CACHES, _LOADED)
    widening = "CVT_S64_S32" if access.type == "s32" else "CVT_U64_U32"
    first, second = statement.operands(2)
    destinations, after = [], []
    for text in elements(first, access.elements):
        if access.is_narrower(statement, text):
            destinations.append(statement.assembler.temporary())
            after.append(
                statement.word(widening, [statement.destination(text, "d")], destinations[-1:])
            )
        else:
            destinations.append(statement.destination_or_sink(text, access.register_kind))
    base, offset = statement.address(second, access.address_kind)
    return [access.word(statement, "LD", destinations, [base], offset), *after]


@encodes("st")
def _st(statement: Statement) -> list[Word]:
    access = _read_access(statement, {"release": RELEASE}, _STORE_CACHES, list(_STORED))
    first, second = statement.operands(2)
    base, offset = statement.address(first, access.address_kind)
    sources, before = [], []
    for text in elements(second, access.elements):
        if access.is_narrower(statement, text):
            sources.append(statement.assembler.temporary())
            before.append(statement.word("CVT_32_64", sources[-1:], [statement.source(text, "d")]))
        else:
            sources.append(statement.source(text, access.register_kind))
    return [*before, access.word(statement, "ST", [], [base, *sources], offset)]


_ATOMS = {"add": 0, "and": 1, "or": 2, "xor": 3, "min": 4, "max": 5, "exch": 6, "cas": 7}
_ATOM_KINDS = {"add": ("u32", "s32", "f32"), "min": ("u32", "s32"), "max": ("u32", "s32")}
_RED_ORDER = {"relaxed": RELAXED, "release": RELEASE}
_ATOM_ORDER = {**_RED_ORDER, "acquire": ACQUIRE, "acq_rel": ACQUIRE | RELEASE}


@encodes("atom", "red")
def _atom(statement: Statement) -> list[Word]:
    returns = statement.name == "atom"
    statement.require("global")
    flags = statement.choose(_ATOM_ORDER if returns else _RED_ORDER, RELAXED)
    scope = statement.choose(SCOPE, SCOPE["gpu"])
    action = statement.choose(
        {name: name for name in _ATOMS if returns or name not in ("exch", "cas")}
    )
    kind = statement.choose({name: name for name in _ATOM_KINDS.get(action, ("b32",))})
    number = {"u": 0, "b": 0, "s": 1, "f": 2}[kind[0]]
    operands = list(statement.operands(2 + returns + (action == "cas")))
    destinations = [statement.destination_or_sink(operands.pop(0), "r")] if returns else []
    base, offset = statement.address(operands[0], "d")
    return [
        statement.word(
            "ATOM",
            destinations,
            [base, *statement.sources(operands[1:])],
            imm=offset,
            flags=flags,
            aux=_ATOMS[action] | number << 8,
            aux2=scope << 8,
        )
    ]


@encodes("fence", "membar")
def _fence(statement: Statement) -> list[Word]:
    both = ACQUIRE | RELEASE
    if statement.name == "membar":
        flags, scope = both, statement.choose({"cta": 0, "gl": 2, "sys": 3})
    else:
        orders = {"sc": both, "acq_rel": both, "acquire": ACQUIRE, "release": RELEASE}
        flags, scope = statement.choose(orders, both), statement.choose(SCOPE)
    statement.operands(0)
    return [statement.word("FENCE", flags=flags, aux2=scope << 8)]


@encodes("fence.proxy.async")
def _fence_proxy(statement: Statement) -> list[Word]:
    # .global would exclude shared memory, the only memory that the engine's fence covers.
    statement.has("shared::cta")
    statement.operands(0)
    return [statement.word("FENCEPROXY")]


@encodes("cp.async")
def _cp_async(statement: Statement) -> list[Word]:
    flags = statement.choose({"ca": WEAK, "cg": CG})
    statement.choose(SHARED)
    statement.require("global")
    first, second, third, *given = statement.operands(3, 4)
    to, to_offset = statement.address(first, "r")
    of, of_offset = statement.address(second, "d")
    size = integer(third)
    if size not in ((16,) if flags == CG else (4, 8, 16)):
        raise PtxError(f"a copy has not {size} bytes")
    sources = [to, of, *statement.sources(given)]
    return [
        statement.word("CPASYNC", [], sources, imm=to_offset, flags=flags, aux=size, aux2=of_offset)
    ]


@encodes("cp.async.commit_group")
def _cp_commit(statement: Statement) -> list[Word]:
    statement.operands(0)
    return [statement.word("CPCOMMIT")]


@encodes("cp.async.wait_group")
def _cp_wait(statement: Statement) -> list[Word]:
    (left,) = statement.operands(1)
    return [statement.word("CPWAIT", aux=count_of(left))]


@encodes("cp.async.wait_all")
def _cp_wait_all(statement: Statement) -> list[Word]:
    statement.operands(0)
    return [statement.word("CPWAIT", aux2=1)]
