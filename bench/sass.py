"""Read the machine code of a compiled kernel: instructions with control words, and the time loop.

nvdisasm, which is in Triton's wheel, prints every 128-bit instruction with its encoding. The high
half contains the compiler's scheduling information: for how many cycles the warp stalls after the
instruction, which scoreboards it sets and which it waits for. The bit positions are those of
CuAssembler's ``CuControlCode.py``, their meaning is that of Huerta et al., "Dissecting and Modeling
the Architecture of Modern GPU Cores" (MICRO 2025).

The *time loop* is the longest range of instructions that ends with a jump back to its start. A
*poll loop* is an innermost loop in it with a load that has ``STRONG`` in its name, as volatile and
relaxed loads do.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

BOARDS = 6  # scoreboards of a warp; an instruction that sets none has a higher number


class Instruction(NamedTuple):
    """One instruction.

    Attributes
    ----------
    address : int
    predicate, name, operands : str
        As in ``@!P4 BRA `(.L_x_0)``.
    stall : int
        Cycles before the warp's next instruction.
    write, read : int
        The scoreboards that are held until the result is there, and until the operands are read.
    wait : tuple of int
        The scoreboards that must be clear.
    line : str
        File, line and function of the source, if the file is there.
    goal : int or None
        The index of a jump's target.
    """

    address: int
    predicate: str
    name: str
    operands: str
    stall: int
    write: int
    read: int
    wait: tuple[int, ...]
    line: str
    goal: int | None


class Loop(NamedTuple):
    """A loop through time.

    Attributes
    ----------
    code : sequence of Instruction
        All instructions of the kernel.
    first, last : int
        Indices of the first instruction and of the jump back.
    polls : tuple of (int, int)
        First and last indices of the poll loops, in order.
    publish : frozenset of int
        Indices of the stores that publish data.
    steps : int
        Time steps per iteration.
    repeats : dict of int to int
        Trip counts of inner loops' jumps back, by the index of the jump.
    """

    code: Sequence[Instruction]
    first: int
    last: int
    polls: tuple[tuple[int, int], ...]
    publish: frozenset[int]
    steps: int
    repeats: dict[int, int]

    @property
    def places(self) -> range:
        return range(self.first, self.last + 1)

    @property
    def loads(self) -> list[int]:
        """Indices of the polling loads."""
        return [n for n in self.places if kind(self.code[n].name) == "poll"]


@functools.cache
def tool(name: str) -> Path:
    """Find an NVIDIA tool that ships with Triton.

    Parameters
    ----------
    name : str

    Returns
    -------
    pathlib.Path

    Raises
    ------
    FileNotFoundError
        If it is missing.
    """
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"{name} comes with triton, which is not installed")
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"triton does not include {name}: no {path}")
    return path


_CODE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/"  # address
    r"\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)\s*(.*?)\s*;"  # predicate, name, operands
    r"\s+/\* 0x[0-9a-f]{16} \*/"
)
_HIGH = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^(\.L_\w+):")
_LINE = re.compile(r'//## File "([^"]+)", line (\d+)( inlined)?')
_GOAL = re.compile(r"(\.L_\w+|0x[0-9a-f]+)\)?$")
_CONTROL = 41  # the bit of the high half at which the control word starts


@functools.lru_cache(maxsize=1)  # the same kernel is read several times
def read(cubin: bytes) -> list[Instruction]:
    """Disassemble a cubin of one kernel.

    Parameters
    ----------
    cubin : bytes

    Returns
    -------
    list of Instruction
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(tool("nvdisasm")), "-g", "-c", "-hex", str(path)]
        text = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True
        ).stdout
    return _parsed(text)


def _parsed(text: str) -> list[Instruction]:
    """Parse instructions from nvdisasm's output, which has the halves of each on two lines."""
    rows: list[tuple[re.Match[str], str, str]] = []
    goals: dict[str, int] = {}  # indices of labels and addresses
    labels: list[str] = []
    line, pending = "", None
    for row in text.splitlines():
        if match := _LINE.search(row):
            line = line if match[3] else _place(match[1], int(match[2]))
        elif match := _LABEL.match(row):
            labels.append(match[1])
        elif match := _CODE.match(row):
            goals |= dict.fromkeys([*labels, hex(int(match[1], 16))], len(rows))
            labels, pending = [], match
        elif pending and (match := _HIGH.match(row)):
            rows.append((pending, match[1], line))
            pending = None
    return [_instruction(match, high, line, goals) for match, high, line in rows]


def _instruction(match: re.Match[str], high: str, line: str, goals: dict[str, int]) -> Instruction:
    predicate, name, operands = (match[2] or "").strip(), match[3], match[4]
    goal = None
    if name == "BRA.U":  # since sm_100: with a uniform predicate, the first operand
        predicate = f"@{operands.split(',')[0]}"
    # For sm_80, ptxas leaves loops with a call that does not return.
    if name in ("BRA", "BRA.U") or (predicate and name == "CALL.REL.NOINC"):
        target = _GOAL.search(operands)
        goal = goals.get(target[1]) if target else None
    word = int(high, 16) >> _CONTROL
    return Instruction(
        int(match[1], 16),
        predicate,
        name,
        operands,
        stall=word & 15,
        write=word >> 5 & 7,
        read=word >> 8 & 7,
        wait=tuple(board for board in range(BOARDS) if word >> 11 + board & 1),
        line=line,
        goal=goal,
    )


def _place(path: str, line: int) -> str:
    inside = [name for first, name in _functions(path) if first <= line]
    return f"{Path(path).name}:{line} {inside[-1] if inside else ''}".strip()


@functools.cache
def _functions(path: str) -> list[tuple[int, str]]:
    """Return first lines and names of the functions in a file."""
    try:
        rows = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = ((n, re.match(r"\s*def (\w+)", row)) for n, row in enumerate(rows, 1))
    return [(n, match[1]) for n, match in found if match]


_HEADS = {
    "hmma": "HMMA IMMA",
    "hgmma": "HGMMA",
    "lds": "LDS LDSM LDL",
    "sts": "STS STSM STL",
    "ldg": "LDG LD",
    "ldgsts": "LDGSTS",
    "stg": "STG ST",
    "atom": "ATOM ATOMG RED ATOMS",
    "bar": "BAR",
    "xu": "MUFU I2F F2I F2F FRND FLO POPC",
    "control": "BRA NOP EXIT BSSY BSYNC WARPSYNC DEPBAR LDGDEPBAR BREAK YIELD MEMBAR FENCE RET "
    "CALL WARPGROUP ERRBAR CCTL",
    "shfl": "SHFL",
    "redux": "REDUX",
    "ldc": "LDC",
    "s2r": "S2R S2UR",
    "imad": "IMAD",
    "fma": "FFMA FADD FMUL HFMA2 HADD2 HMUL2",
}
_KINDS = {head: kind for kind, heads in _HEADS.items() for head in heads.split()}


def kind(name: str) -> str:
    """Classify an instruction by the unit that executes it.

    Parameters
    ----------
    name : str
        Such as ``LDG.E.128``.

    Returns
    -------
    str
        A key of the table, such as 'ldg'; 'poll' for a load that sees other programs' stores, 'udp'
        for the uniform datapath, and 'alu' for the rest.
    """
    head = name.split(".")[0]
    if "STRONG" in name and head in ("LDG", "LD"):
        return "poll"
    return _KINDS.get(head) or ("udp" if head[0] == "U" else "alu")


def width(name: str) -> int:
    """Return the bytes per thread that an instruction moves, from its name.

    Parameters
    ----------
    name : str

    Returns
    -------
    int
    """
    parts = name.split(".")
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1}
    return next((size for part, size in widths.items() if part in parts), 4)


def back_edges(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """Find the jumps back.

    Parameters
    ----------
    code : sequence of Instruction

    Returns
    -------
    list of (int, int)
        Indices of target and jump, the longest loop first. Code behind the end, where rare branches
        are placed, is left out.
    """
    exits = (n for n, i in enumerate(code) if i.name == "EXIT" and not i.predicate)
    end = next(exits, len(code))
    edges = [(i.goal, n) for n, i in enumerate(code[:end]) if i.goal is not None and i.goal < n]
    return sorted(edges, key=lambda edge: edge[0] - edge[1])


def time_loop(code: Sequence[Instruction], steps: int | None = None, tiles: int = 1) -> Loop:
    """Find the loop through time.

    Publishing stores are ``STRONG`` ones, as relaxed stores are; without any, those from a source
    function with 'publish' or 'send' in its name; otherwise the first store.

    Parameters
    ----------
    code : sequence of Instruction
    steps : int or None
        Time steps per iteration. By default, how often a publishing store follows a polling load,
        for each tile.
    tiles : int
        Batch tiles that a program alternates between.

    Returns
    -------
    Loop

    Raises
    ------
    ValueError
        If there is no jump back.
    """
    edges = back_edges(code)
    if not edges:
        raise ValueError("no loop: use straight() for a kernel without one")
    (first, last), *others = edges
    places = range(first, last + 1)
    loads = [n for n in places if kind(code[n].name) == "poll"]
    inner = [(a, b) for a, b in others if first <= a and b < last]
    polls = _innermost((a, b) for a, b in inner if any(a <= n <= b for n in loads))
    stores = [n for n in places if kind(code[n].name) == "stg"]
    publish = (
        {n for n in stores if "STRONG" in code[n].name}
        or {n for n in stores if re.search(r" \w*(publish|send)\w*$", code[n].line)}
        or set(stores[:1])
    )
    if steps is None:
        events = [n in publish for n in places if n in publish or n in loads]
        before = [*events[-1:], *events]
        steps = sum(new and not old for old, new in zip(before, events, strict=False)) // tiles
    return Loop(code, first, last, polls, frozenset(publish), max(1, steps), {})


def _innermost(edges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    edges = sorted(edges)

    def is_innermost(first: int, last: int) -> bool:
        return not any(first <= a and b <= last and (a, b) != (first, last) for a, b in edges)

    return tuple(edge for edge in edges if is_innermost(*edge))


def straight(code: Sequence[Instruction], trips: int) -> Loop:
    """Treat a kernel without a time loop, which is one step, as a loop over all of its code.

    Parameters
    ----------
    code : sequence of Instruction
    trips : int
        Trip count of its longest loop, over the products.

    Returns
    -------
    Loop
    """
    last = max(n for n, i in enumerate(code) if i.name == "EXIT")
    code = [*code[:last], code[last]._replace(name="BRA", goal=0)]
    repeats = {}
    for start, jump in back_edges(code[:last])[:1]:
        repeats[jump] = trips - 1
        for n in _guards(code, start, jump):
            code[n] = code[n]._replace(predicate="")
    return Loop(code, 0, last, (), frozenset(), 1, repeats)


def _guards(code: Sequence[Instruction], start: int, jump: int) -> list[int]:
    """Find jumps to a loop past one that skips it, which are there if its trip count is unknown."""
    skips = [
        n
        for n, i in enumerate(code[:start])
        if i.goal is not None and i.goal > jump and not i.predicate
    ]
    return [
        n
        for n, i in enumerate(code[:start])
        if i.goal is not None and any(n < skip < i.goal <= start for skip in skips)
    ]


def longest_chain(loop: Loop) -> int:
    """Count the matrix products that each accumulate onto the previous one.

    Parameters
    ----------
    loop : Loop

    Returns
    -------
    int
    """
    depth: dict[int | None, int] = {}
    longest = 0
    for n in loop.places:
        name, operands = loop.code[n].name, loop.code[n].operands
        if name.startswith("HMMA"):
            registers = [_register(operand.strip()) for operand in operands.split(",")]
            depth[registers[0]] = depth.get(registers[-1], 0) + 1
            longest = max(longest, depth[registers[0]])
        elif not name.startswith(("ST", "BRA")) and (result := _register(operands)) is not None:
            # A register written by anything else starts a new chain.
            many = 4 if "128" in name or name.endswith(".4") else 1
            for register in range(result, result + many):
                depth.pop(register, None)
    return longest


def _register(operand: str) -> int | None:
    match = re.match(r"R(\d+)", operand)
    return int(match[1]) if match else None
