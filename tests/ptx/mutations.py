"""Ways to break the PTX of a kernel: functions of its text.

Each raises `LookupError` if there is nothing to break, so that a change of the compiler or of a
kernel cannot make a mutation empty.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Change = Callable[[str], str]

BARRIER = r"bar\.sync"
RELEASE = r"atom\.global\.gpu\.release\.add"
ACQUIRE = r"(ld|atom)\.global\.gpu\.acquire"
JUMP = r"@%p\d+\s+bra"


def in_kernel(kernel: str, change: Change) -> Change:
    """Change one kernel and leave the others as they are."""
    return lambda ptx: change(ptx) if f".entry {kernel}(" in ptx else ptx


def both(first: Change, second: Change) -> Change:
    """One change after another."""
    return lambda ptx: second(first(ptx))


def replaced(pattern: str, new: Any, *, count: int = 0) -> Change:
    """Replace the first or all places of a pattern."""

    def change(ptx: str) -> str:
        text, n = re.subn(pattern, new, ptx, count=count, flags=re.M)
        if not n:
            raise LookupError(f"no {pattern}")
        return text

    return change


def without(pattern: str, *, before: str = "", after: str = "", last: bool = False) -> Change:
    """Remove a line: the first, or the nearest one before or after one of another pattern."""

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


def waiting_once(pattern: str) -> Change:
    """Do not repeat a wait: without the jump back after its last load."""

    def change(ptx: str) -> str:
        lines = ptx.split("\n")
        last = _places(lines, pattern)[-1]
        del lines[_first(i for i in _places(lines, JUMP) if i > last)]
        return "\n".join(lines)

    return change


def published_early(function: Any, text: str) -> Change:
    """Move the barrier and the release before the store in a line of a function."""

    def change(ptx: str) -> str:
        lines = ptx.split("\n")
        release = _places(lines, RELEASE)[0]
        # With its predicate, whose one is made nearby, and the block of inline assembly around it.
        barrier = [i for i in _places(lines, BARRIER) if i < release][-1]
        one = [i for i in _places(lines, r"mov\.b32\s+%r\d+, 1;") if i < release][-1]
        moved = [lines[i] for i in (barrier, one, release - 1, release)]
        store = _first(i for i in _of_source(lines, function, text) if "st.global" in lines[i])
        if not store < barrier:
            raise LookupError("the store is not before the barrier")
        for i in (release, release - 1, barrier):
            del lines[i]
        lines[store:store] = moved
        return "\n".join(lines)

    return change


def rewritten(pattern: str, new: str, *places: tuple[Any, str]) -> Change:
    """Rewrite instructions of a pattern that were made of lines of JIT functions."""

    def change(ptx: str) -> str:
        lines, n = ptx.split("\n"), 0
        for i in (i for place in places for i in _of_source(lines, *place)):
            lines[i], count = re.subn(pattern, new, lines[i])
            n += count
        if not n:
            raise LookupError(f"no {pattern}")
        return "\n".join(lines)

    return change


def with_one_mailbox(*places: tuple[Any, str]) -> Change:
    """Let the ring have depth 1: the parity of the step is taken to be 0 where addresses are."""
    return rewritten(r"and\.b32\s+(%r\d+), (%r\d+), \d+;", r"and.b32 \1, \2, 0;", *places)


def without_lap(*place: Any) -> Change:
    """Leave the lap out of what is sent."""
    return rewritten(r"or\.b32\s+(%r\d+), (%r\d+), %r\d+;", r"mov.b32 \1, \2;", place)


def without_each(pattern: str, ptx: str) -> Iterator[tuple[str, Change]]:
    """Remove each line of a pattern in turn: the file and line that it was made of, the change."""
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
    """The file and line of a JIT function in which a text is first."""
    source, first = inspect.getsourcelines(function.fn)
    number = first + next(n for n, line in enumerate(source) if text in line)
    return f"{Path(inspect.getsourcefile(function.fn) or '').name}:{number}"


def _place(line: str) -> str:
    """The file and line of the innermost function that a line of PTX tells, if it does."""
    found = re.search(r"\.loc.*?//\s*(\S+?:\d+):\d+", line)
    return found[1] if found else ""


def _first(places: Iterable[int]) -> int:
    for place in places:
        return place
    raise LookupError("no such place")


def _places(lines: list[str], pattern: str) -> list[int]:
    found = [i for i, line in enumerate(lines) if re.search(pattern, line)]
    if not found:
        raise LookupError(f"no {pattern}")
    return found


def _of_source(lines: list[str], function: Any, text: str) -> list[int]:
    """The instructions that were made of a line of a JIT function, innermost."""
    wanted, place, found = place_of(function, text), "", []
    for i, line in enumerate(lines):
        if new := _place(line):
            place = new
        elif place == wanted:
            found.append(i)
    return found
