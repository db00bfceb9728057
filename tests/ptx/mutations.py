"""Ways to break the PTX of a kernel, as functions of its text.

Each raises `LookupError` if there is nothing to break, so that a mutation cannot silently become
empty when the compiler or a kernel changes.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Change = Callable[[str], str]

BARRIER = r"bar\.sync"
LOAD = r"ld\.relaxed\.gpu\.global"
STORE = r"st\.relaxed\.gpu\.global"
AGAIN = r"^bra AGAIN;$"


def in_kernel(kernel: str, change: Change) -> Change:
    """Change one kernel and leave the others unchanged."""
    return lambda ptx: change(ptx) if f".entry {kernel}(" in ptx else ptx


def replaced(pattern: str, new: Any, *, count: int = 0) -> Change:
    """Replace the first, or every, match of a pattern."""

    def change(ptx: str) -> str:
        text, n = re.subn(pattern, new, ptx, count=count, flags=re.M)
        if not n:
            raise LookupError(f"no {pattern}")
        return text

    return change


def without(pattern: str, *, before: str = "", after: str = "", last: bool = False) -> Change:
    """Remove a line: the first match, or the nearest one before or after another pattern."""

    def change(ptx: str) -> str:
        lines = ptx.split("\n")
        if anchor := before or after:
            at = _places(lines, anchor)[-1 if last else 0]
            near = _places(lines, pattern)
            near = [i for i in near if (i < at if before else i > at)]
            chosen = near[-1 if before else 0]
        else:
            chosen = _places(lines, pattern)[0]
        del lines[chosen]
        return "\n".join(lines)

    return change


def stored_by_halves(ptx: str) -> str:
    """Publish the halves of each word separately."""
    halves = (
        r"mov.b32 {low, high}, \2;\n@p st.relaxed.gpu.global.b16 [\1], low;\n"
        r"@p st.relaxed.gpu.global.b16 [\1+2], high;"
    )
    return replaced(rf"^@p {STORE}\.b32 \[(%rd\d+)\], (%r\d+);", halves)(ptx)


def waiting_for_words(ptx: str) -> str:
    """Treat a word as present as soon as one of its halves is."""
    test = (
        r"add\.u32 x, (%r\d+), 0x00010001;\nnot\.b32 x, x;\nand\.b32 x, x, %r\d+;\n"
        r"and\.b32 x, x, 0x80008000;\nsetp\.ne(\S*)\.s32 (missing\d+), x, 0(.*);"
    )
    return replaced(test, r"setp.eq\2.s32 \3, \1, -1\4;")(ptx)


def with_one_set_of_buffers(size: int) -> Change:
    """Redirect the second of two sets of partial-sum buffers, of `size` bytes, to the first."""

    def change(ptx: str) -> str:
        buffers = set(re.findall(r"st\.shared\.v4\.b32 \[ (%r\d+) ", ptx))

        def moved(found: re.Match[str]) -> str:
            start, register, offset = found[1], found[2], int(found[3])
            is_second = offset >= size and (register in buffers or start.startswith("ld"))
            return f"{start}{offset - size}" if is_second else found[0]

        loaded = re.sub(r"(ld\.shared\.b32.*\[(%r\d+)\+)(\d+)", moved, ptx)
        stored = re.sub(r"(add\.s32\s+(%r\d+), %r\d+, )(\d+)", moved, loaded)
        if ptx in (loaded, stored) or loaded == stored:
            raise LookupError("no second set of buffers")
        return stored

    return change


def without_each(pattern: str, ptx: str) -> Iterator[tuple[str, Change]]:
    """Remove each match of a pattern in turn; yield its source file and line, and the change."""
    lines, place = ptx.split("\n"), ""
    for i, line in enumerate(lines):
        place = _place(line) or place
        if re.search(pattern, line):
            yield place, functools.partial(_without_line, i)


def _without_line(number: int, ptx: str) -> str:
    lines = ptx.split("\n")
    del lines[number]
    return "\n".join(lines)


def place_of(function: Any, text: str) -> str:
    """Return the file and line where a text first occurs in a JIT function."""
    source, first = inspect.getsourcelines(function.fn)
    number = first + next(n for n, line in enumerate(source) if text in line)
    return f"{Path(inspect.getsourcefile(function.fn) or '').name}:{number}"


def _place(line: str) -> str:
    """Return the file and line of the innermost function for a line of PTX, if known."""
    found = re.search(r"\.loc.*?//\s*(\S+?:\d+):\d+", line)
    return found[1] if found else ""


def _places(lines: list[str], pattern: str) -> list[int]:
    found = [i for i, line in enumerate(lines) if re.search(pattern, line)]
    if not found:
        raise LookupError(f"no {pattern}")
    return found
