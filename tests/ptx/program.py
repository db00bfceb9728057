"""A kernel in the engine's format, and constants shared with the engine."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

#: The engine's operations, in its own order, which defines their numbers.
NAMES = re.findall(r"X\((\w+)\)", (Path(__file__).parent / "engine" / "ops.inc").read_text())
OPS = {name: number for number, name in enumerate(NAMES)}

#: int32 words per instruction: the operation, the guard's predicate or -1, whether it is negated,
#: count and first index in the pool of the destinations, then of the sources, an offset (for wgmma
#: the columns), flags, two operation-specific numbers, and the target of a jump.
FIELDS = 12
#: In the pool, an unused destination, written ``_``.
SINK = 0x7FFFFFFF

# Flags of memory accesses and fences.
WEAK, CG, VOLATILE, RELAXED, ACQUIRE, RELEASE = 0, 1, 2, 4, 8, 16
#: 1 would be a cluster, which the engine does not support.
SCOPE = {"cta": 0, "gpu": 2, "sys": 3}

#: Comparisons: for integers, and for floats, false if one is NaN; aliases for unsigned integers;
#: for floats, true also if one is NaN; whether neither is NaN, and the opposite.
CMP = {"eq": 0, "ne": 1, "lt": 2, "le": 3, "gt": 4, "ge": 5}
CMP |= {"lo": 2, "ls": 3, "hi": 4, "hs": 5}
CMP |= {"equ": 10, "neu": 11, "ltu": 12, "leu": 13, "gtu": 14, "geu": 15, "num": 16, "nan": 17}

#: Special registers, all 32-bit.
SREGS = {
    name: number
    for number, name in enumerate(
        (
            *("%tid.x", "%tid.y", "%tid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z"),
            *("%nctaid.x", "%nctaid.y", "%nctaid.z", "%ntid.x", "%ntid.y", "%ntid.z"),
            *("%laneid", "%warpid", "%clock", "%globaltimer_lo"),
        )
    )
}


class PtxError(Exception):
    """PTX that is not supported."""


@dataclass
class Program:
    """A kernel in the engine's format.

    Attributes
    ----------
    name : str
    code : int32 array of shape (instructions, FIELDS)
    pool : int32 array
        Operands: number of a register among those of its kind, or complement of a constant's
        index. A literal predicate is the complement of 0 or 1.
    const32, const64 : uint32 and uint64 array
    counts : tuple of int
        Registers of at most 32 bits, 64-bit registers, predicates.
    params : list of str
    threads : int
        Per CTA.
    text, where, line : list
        For every instruction: its text, its line in the source, its line in the PTX.
    labels : dict of str to int
        The instruction that follows each label, without labels of blocks.
    """

    name: str
    code: np.ndarray
    pool: np.ndarray
    const32: np.ndarray
    const64: np.ndarray
    counts: tuple[int, int, int]
    params: list[str]
    threads: int
    text: list[str] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    line: list[int] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def show(self, pc: int) -> str:
        """Describe an instruction."""
        if not 0 <= pc < len(self.text):
            return f"pc {pc}"
        return f"ptx:{self.line[pc]} `{self.text[pc]}` at {self.where[pc]}"
