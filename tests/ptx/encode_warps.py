"""Encode operations across the lanes of a warp: products, matrices, barriers, shuffles, votes."""

from __future__ import annotations

from typing import NamedTuple

from .program import PtxError
from .statements import SHARED, Statement, Word, count_of, elements, encodes, integer

# Synchronizing the lanes is part of these operations; the engine checks that all participate.
_COLLECTIVE = ("sync", "aligned")


def _matrix_suffixes(statement: Statement) -> tuple[int, int]:
    """Return the number of matrices, and whether they are transposed."""
    statement.require(*_COLLECTIVE, "m8n8", "b16")
    statement.choose(SHARED)
    return statement.choose({"x1": 1, "x2": 2, "x4": 4}), int(statement.has("trans"))


@encodes("ldmatrix")
def _ldmatrix(statement: Statement) -> list[Word]:
    count, transposed = _matrix_suffixes(statement)
    first, second = statement.operands(2)
    destinations = [statement.destination(text, "r") for text in elements(first, count)]
    base, offset = statement.address(second, "r")
    return [
        statement.word("LDMATRIX", destinations, [base], imm=offset, aux=count, aux2=transposed)
    ]


@encodes("stmatrix")
def _stmatrix(statement: Statement) -> list[Word]:
    count, transposed = _matrix_suffixes(statement)
    first, second = statement.operands(2)
    base, offset = statement.address(first, "r")
    sources = [base, *statement.vector(second, count)]
    return [statement.word("STMATRIX", [], sources, imm=offset, aux=count, aux2=transposed)]


_FACTORS = {"bf16": 0, "f16": 1, "tf32": 2}


class _Shape(NamedTuple):
    """The operation for a shape of mma, and the registers of its two factors."""

    operation: str
    a: int
    b: int


_SHAPES = {
    **dict.fromkeys((("m16n8k16", "bf16"), ("m16n8k16", "f16")), _Shape("MMA16816", 4, 2)),
    **dict.fromkeys((("m16n8k8", "bf16"), ("m16n8k8", "f16")), _Shape("MMA1688", 2, 1)),
    ("m16n8k8", "tf32"): _Shape("MMA1688TF32", 4, 2),
    ("m16n8k4", "tf32"): _Shape("MMA1684TF32", 2, 1),
}


@encodes("mma")
def _mma(statement: Statement) -> list[Word]:
    statement.require(*_COLLECTIVE, "row", "col")
    size = statement.choose({size: size for size, _ in _SHAPES})
    types = statement.take_last(4)
    factor = types[1]
    if types != ("f32", factor, factor, "f32") or (size, factor) not in _SHAPES:
        raise PtxError(f"types .{'.'.join(types)} of {size} are not known")
    shape = _SHAPES[size, factor]
    d, a, b, c = statement.operands(4)
    destinations = [statement.destination(text, "r") for text in elements(d, 4)]
    sources = [
        *statement.vector(a, shape.a),
        *statement.vector(b, shape.b),
        *statement.vector(c, 4),
    ]
    return [statement.word(shape.operation, destinations, sources, aux=_FACTORS[factor])]


@encodes("wgmma.mma_async")
def _wgmma(statement: Statement) -> list[Word]:
    statement.require(*_COLLECTIVE)
    types = statement.take_last(3)
    factor = types[1]
    if types != ("f32", factor, factor) or factor not in _FACTORS:
        raise PtxError(f"types .{'.'.join(types)} are not known")
    depth = 8 if factor == "tf32" else 16
    columns = statement.choose({f"m64n{n}k{depth}": n for n in range(8, 257, 8)})
    d, a, b, added, *numbers = statement.operands(6, 7, 8)
    signs, transposed = numbers[:2], numbers[2:]
    if signs != ["1", "1"]:
        raise PtxError("negated factors are not known")
    in_registers = a.startswith("{")
    # Flags for those factors that may be transposed: 16-bit factors in shared memory.
    if len(transposed) != (0 if factor == "tf32" else 1 if in_registers else 2):
        raise PtxError(f"{len(transposed)} factors cannot be transposed")
    if not {"0", "1"}.issuperset(transposed):
        raise PtxError("a factor is transposed by 0 or 1")
    transposed_a, transposed_b = [0, 0, *map(int, transposed)][-2:]
    destinations = [statement.destination(text, "r") for text in elements(d, columns // 2)]
    factors = statement.vector(a, 4) if in_registers else [statement.source(a, "d")]
    return [
        statement.word(
            "WGMMA",
            destinations,
            [*factors, statement.source(b, "d"), statement.source(added, "p")],
            imm=columns,
            flags=int(in_registers),
            aux=_FACTORS[factor],
            aux2=transposed_a | transposed_b << 1,
        )
    ]


@encodes("wgmma.fence")
def _wgmma_fence(statement: Statement) -> list[Word]:
    statement.require(*_COLLECTIVE)
    statement.operands(0)
    return [statement.word("WGFENCE")]


@encodes("wgmma.commit_group")
def _wgmma_commit(statement: Statement) -> list[Word]:
    statement.require(*_COLLECTIVE)
    statement.operands(0)
    return [statement.word("WGCOMMIT")]


@encodes("wgmma.wait_group")
def _wgmma_wait(statement: Statement) -> list[Word]:
    statement.require(*_COLLECTIVE)
    (left,) = statement.operands(1)
    return [statement.word("WGWAIT", aux=count_of(left))]


@encodes("bar.sync", "barrier.sync")
def _bar_sync(statement: Statement) -> list[Word]:
    if statement.name == "barrier.sync":
        statement.require("aligned")  # otherwise each lane would arrive separately
    first, *second = statement.operands(1, 2)
    number, threads = integer(first), integer(second[0]) if second else 0
    if number not in range(16):
        raise PtxError(f"there is no barrier {number}")
    if second and (threads <= 0 or threads % 32):
        raise PtxError(f"{threads} threads are not whole warps")
    return [statement.word("BARSYNC", aux=number, aux2=threads)]


@encodes("bar.warp.sync")
def _bar_warp(statement: Statement) -> list[Word]:
    (mask,) = statement.operands(1)
    return [statement.word("BARWARP", [], [statement.source(mask, "r")])]


@encodes("shfl.sync")
def _shfl(statement: Statement) -> list[Word]:
    mode = statement.choose({"up": 0, "down": 1, "bfly": 2, "idx": 3})
    statement.require("b32")
    first, *others = statement.operands(5)
    value, *valid = first.split("|")
    destinations = [statement.destination_or_sink(value.strip(), "r")]
    destinations += [statement.destination(text.strip(), "p") for text in valid]
    return [statement.word("SHFL", destinations, statement.sources(others), aux=mode)]


@encodes("redux.sync")
def _redux(statement: Statement) -> list[Word]:
    kind = statement.choose({"add": 0, "and": 1, "or": 2, "xor": 3, "min": 4, "max": 5})
    bitwise = kind in (1, 2, 3)
    signed = statement.choose({"b32": False} if bitwise else {"u32": False, "s32": True})
    first, *others = statement.operands(3)
    destination = statement.destination(first, "r")
    return [
        statement.word(
            "REDUX", [destination], statement.sources(others), aux=kind, aux2=int(signed)
        )
    ]


@encodes("vote.sync")
def _vote(statement: Statement) -> list[Word]:
    mode = statement.choose({"ballot": 0, "any": 1, "all": 2})
    statement.require("pred" if mode else "b32")
    first, predicate, mask = statement.operands(3)
    destination = statement.destination(first, "p" if mode else "r")
    return [
        statement.word(
            "VOTE",
            [destination],
            [statement.source(predicate, "p"), statement.source(mask, "r")],
            aux=mode,
        )
    ]


@encodes("activemask.b32")
def _activemask(statement: Statement) -> list[Word]:
    (first,) = statement.operands(1)
    return [statement.word("ACTIVEMASK", [statement.destination(first, "r")])]


@encodes("elect.sync")
def _elect(statement: Statement) -> list[Word]:
    first, mask = statement.operands(2)
    lane, bar, chosen = first.partition("|")
    if not bar:
        raise PtxError(f"{first} is not a register and a predicate")
    destinations = [
        statement.destination_or_sink(lane.strip(), "r"),
        statement.destination(chosen.strip(), "p"),
    ]
    return [statement.word("ELECT", destinations, [statement.source(mask, "r")])]
