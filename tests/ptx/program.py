"""A kernel as the engine takes it, and the numbers that both agree on."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

#: The engine's operations, in its own order, and their numbers.
NAMES = re.findall(r"X\((\w+)\)", (Path(__file__).parent / "engine" / "ops.inc").read_text())
OPS = {name: number for number, name in enumerate(NAMES)}

#: int32 words of an instruction: the operation, the guard's predicate or -1, whether it is negated,
#: number and first place in the pool of destinations, the same of sources, an offset (of wgmma the
#: columns), flags, two numbers whose meaning is the operation's, and the target of a jump.
FIELDS = 12
#: In the pool, the destination that nobody reads, written ``_``.
SINK = 0x7FFFFFFF

# Flags of accesses to memory, and of fences.
WEAK, CG, VOLATILE, RELAXED, ACQUIRE, RELEASE = 0, 1, 2, 4, 8, 16
#: 1 would be a cluster, of which the engine has none.
SCOPE = {"cta": 0, "gpu": 2, "sys": 3}

#: Comparisons. Of integers, and of floats that are numbers; the same of unsigned integers by other
#: names; of floats, true also if one is NaN; neither is NaN, and the opposite.
CMP = {"eq": 0, "ne": 1, "lt": 2, "le": 3, "gt": 4, "ge": 5}
CMP |= {"lo": 2, "ls": 3, "hi": 4, "hs": 5}
CMP |= {"equ": 10, "neu": 11, "ltu": 12, "leu": 13, "gtu": 14, "geu": 15, "num": 16, "nan": 17}

#: Special registers, all of 32 bits.
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
    """PTX that is not known."""


@dataclass
class Program:
    """A kernel as the engine takes it.

    Attributes
    ----------
    name : str
    code : int32 array of shape (instructions, FIELDS)
    pool : int32 array
        Operands: number of a register among those of its kind, or complement of a constant's. A
        predicate that is a literal is the complement of 0 or 1.
    const32, const64 : uint32 and uint64 array
    counts : tuple of int
        Registers of at most 32 bits, of 64 bits, predicates.
    params : list of str
    threads : int
        Of a CTA.
    text, where, line : list
        Of every instruction: as it was written, its line in the source, its line in the PTX.
    labels : dict of str to int
        The instructions that they stand before; without those of blocks.
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
