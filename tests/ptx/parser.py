"""Translate PTX, as Triton's LLVM back end prints it, to the words that the engine runs.

Only debugging information is skipped: an unknown directive, instruction or suffix raises
`PtxError`, also before and after the kernel. An encoder consumes the suffixes of its instruction
one by one, and any that remain are unknown. Their order is not checked, since Triton's own order is
not always that of the manual.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from . import encode_memory, encode_registers, encode_warps  # noqa: F401 - they register encoders
from .program import FIELDS, OPS, Program, PtxError
from .statements import REGISTERS, Assembler, encode, guard_and_rest


def parse(ptx: str) -> Program:
    """Encode the kernel of a PTX text.

    Parameters
    ----------
    ptx : str
        The text, with exactly one kernel.

    Returns
    -------
    Program

    Raises
    ------
    PtxError
        If anything in the kernel is unknown.
    """
    header = _read_header(ptx)
    _check_outside(ptx[: header.start], 1)
    assembler = Assembler(header.params)
    origins: list[_Token] = []
    for token in _tokens(ptx, header.end):
        try:
            if token.kind == "label":
                assembler.add_label(token.text)
            elif token.kind == "{":
                assembler.open_block()
            elif token.kind == "}":
                assembler.close_block()
            elif token.text.startswith("."):
                _read_directive(assembler, token.text)
            else:
                words = encode(assembler, token.text)
                assembler.code += words
                origins += [token] * len(words)
        except PtxError as error:
            raise _failure(token, error) from None
    for at, label, labels in assembler.jumps:
        if label not in labels:
            raise _failure(origins[at], f"there is no label {label}")
        assembler.code[at][-1] = labels[label]
    assembler.code.append([OPS["RET"], -1, *[0] * (FIELDS - 2)])
    source = origins[-1].source if origins else "?"
    origins.append(_Token("statement", "(end)", len(ptx.splitlines()), source))
    return Program(
        header.name,
        np.array(assembler.code, np.int32),
        np.array(assembler.pool or [0], np.int32),
        np.array(list(assembler.constants["r"]) or [0], np.uint32),
        np.array(list(assembler.constants["d"]) or [0], np.uint64),
        (assembler.counts["r"], assembler.counts["d"], assembler.counts["p"]),
        header.params,
        header.threads,
        [token.text for token in origins],
        [token.source for token in origins],
        [token.line for token in origins],
        dict(assembler.labels),
    )


class _Header(NamedTuple):
    """What precedes the body of a kernel, and where kernel and body begin."""

    name: str
    params: list[str]
    threads: int
    start: int
    end: int


_ENTRY = re.compile(r"^\s*(?:\.visible\s+)?\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", re.M)
_PARAMETER = re.compile(
    r"\.param\s+\.[busf](?:8|16|32|64)\s+(?:\.ptr\s+)?(?:\.global\s+)?(?:\.align\s+\d+\s+)?([\w$]+)"
)
# Bounds for register allocation, which the engine does not need.
_BOUNDS = re.compile(r"\.(maxnreg|maxntid|minnctapersm)\b.*")


# Allowed outside of the kernel, without comments. Sections are for debuggers, and the string
# belongs to the compiler's own library, which is inlined.
_OUTSIDE = re.compile(
    r"""\.version\s+\d+\.\d+ | \.target\s+sm_\w+(,\s*debug)? | \.address_size\s+64
    | \.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+global_smem\[\]; | \.file\s+\d+\s+".*"
    | \.section\s+\.debug_\w+\s*\{[^{}]*\}
    | \.global\s+\.align\s+1\s+\.b8\s+_\$_str\[\d+\]\s*=\s*\{[\d,\s]+\};""",
    re.X,
)


def _check_outside(text: str, line: int) -> None:
    """Raise if there is anything unknown before or after a kernel; `line` is that of the text."""
    text = re.sub(r'("[^"\n]*")|//.*', r"\1", text)
    at = 0
    while rest := text[at:].lstrip():
        at = len(text) - len(rest)
        found = _OUTSIDE.match(text, at)
        if found is None:
            raise PtxError(
                f"ptx:{line + text.count(chr(10), 0, at)} {rest.splitlines()[0]}: not known"
            )
        at = found.end()


def _read_header(ptx: str) -> _Header:
    names = re.findall(r"^[^/\n]*\.entry\s+([\w$]+)", ptx, re.M)
    entry = _ENTRY.search(ptx)
    if len(names) != 1 or entry is None:
        raise PtxError(f"one kernel is expected, not {', '.join(names) or 'none'}")

    def failure(text: str, problem: str) -> PtxError:
        line = ptx.count("\n", 0, ptx.index(text, entry.start())) + 1
        return PtxError(f"ptx:{line} {text} at {entry[1]}: {problem}")

    params = []
    for text in filter(None, map(str.strip, entry[2].split(","))):
        found = _PARAMETER.fullmatch(text)
        if found is None:
            raise failure(text, "such a parameter is not known")
        params.append(found[1])
    threads = 0
    for text in filter(None, (line.partition("//")[0].strip() for line in entry[3].splitlines())):
        if found := re.fullmatch(r"\.reqntid\s+(\d+)(\s*,\s*1)*", text):
            threads = int(found[1])
        elif not _BOUNDS.fullmatch(text):
            raise failure(text, "not known")
    if not threads:
        raise failure(".entry", "there is no .reqntid")
    return _Header(entry[1], params, threads, entry.start(), entry.end())


class _Token(NamedTuple):
    """A part of a kernel's body: label, brace or statement, with its PTX line and its source."""

    kind: str
    text: str
    line: int
    source: str


def _failure(token: _Token, problem: object) -> PtxError:
    name = guard_and_rest(token.text)[1].split()[0]
    return PtxError(f"ptx:{token.line} {name} at {token.source}: {problem}")


_NEXT = re.compile(r"(?P<label>[\w$]+)\s*:(?!:)|(?P<brace>[{}])|(?P<statement>[^;]*);")


def _tokens(ptx: str, start: int) -> Iterator[_Token]:
    """Split the body of a kernel, up to its closing brace.

    A brace where a statement may begin opens or closes a block, which inline assembly uses for its
    own registers and labels; other braces belong to operands.
    """
    first = ptx.count("\n", 0, start) + 1
    rest, source, depth, begun = "", "?", 1, first
    lines = ptx[start:].splitlines()
    for number, line in enumerate(lines, first):
        code, _, comment = line.partition("//")
        code = code.strip()
        # The only directives without a semicolon.
        if found := re.match(r"\.(loc|file)\b", code):
            if rest:
                raise _failure(_Token("", rest, begun, source), "no ; ends it")
            if found[1] == "loc":
                source = comment.strip() or code
            continue
        begun = begun if rest else number
        rest = f"{rest} {code}".strip()
        while rest and (found := _NEXT.match(rest)):
            rest = rest[found.end() :].lstrip()
            if found["brace"]:
                depth += 1 if found["brace"] == "{" else -1
                if depth == 0:
                    behind = lines[number - first + 1 :]
                    return _check_outside("\n".join([rest, *behind]), number)
                yield _Token(found["brace"], found["brace"], begun, source)
            elif found["label"]:
                yield _Token("label", found["label"], begun, source)
            elif found["statement"].strip():
                yield _Token("statement", found["statement"].strip(), begun, source)
            begun = number
    raise _failure(_Token("", rest or "}", begun, source), "the kernel does not end")


# Directives for ptxas: not to unroll a loop, and which bytes of a load are used.
_PRAGMA = re.compile(r'\.pragma\s+"(nounroll|used_bytes_mask 0x[0-9a-f]+)"')
_DECLARATION = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)


def _read_directive(assembler: Assembler, text: str) -> None:
    if _PRAGMA.fullmatch(text):
        return
    found = _DECLARATION.fullmatch(text)
    if found is None:
        raise PtxError(f"{text!r} is not known")
    if found[1] not in REGISTERS:
        raise PtxError(f"registers of type .{found[1]} are not known")
    for name in found[2].split(","):
        assembler.declare(REGISTERS[found[1]], name.strip())
