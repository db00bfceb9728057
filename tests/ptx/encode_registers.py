"""Encode arithmetic, moves, comparisons and jumps."""

from __future__ import annotations

from .instructions import SIMPLE
from .program import CMP, SREGS, PtxError
from .statements import MOVED, Statement, Word, elements, encodes


@encodes(*SIMPLE)
def _simple(statement: Statement) -> list[Word]:
    operation, kinds = SIMPLE[statement.name]
    first, *others = statement.operands(len(kinds))
    destination = statement.destination(first, kinds[0])
    sources = [statement.source(text, kind) for text, kind in zip(others, kinds[1:], strict=True)]
    return [statement.word(operation, [destination], sources)]


# On sm_100: all operands but the last have 16 bits; sums and products are in float32.
_MIXED = {"add": "ADDF", "add.rn": "ADDF", "sub": "SUBF", "sub.rn": "SUBF", "fma.rn": "FMAF"}


@encodes(*(f"{name}.f32.{half}" for name in _MIXED for half in ("bf16", "f16")))
def _mixed(statement: Statement) -> list[Word]:
    operation, half = statement.name.split(".f32.")
    first, *narrow, last = statement.operands(4 if operation == "fma.rn" else 3)
    widened = [statement.assembler.temporary() for _ in narrow]
    words = [
        statement.word(f"CVT_F32_{half.upper()}", [register], [statement.source(text, "r")])
        for register, text in zip(widened, narrow, strict=True)
    ]
    destination = statement.destination(first, "r")
    return [
        *words,
        statement.word(_MIXED[operation], [destination], [*widened, statement.source(last, "r")]),
    ]


@encodes("max.NaN.f32", "min.NaN.f32")
def _maximum_or_nan(statement: Statement) -> list[Word]:
    first, *others = statement.operands(3)
    destination, sources = statement.destination(first, "r"), statement.sources(others)
    number, is_nan = statement.assembler.temporary(), statement.assembler.temporary("p")
    nan = statement.assembler.constant(0x7FFFFFFF, "r")
    return [
        statement.word("MAXF" if statement.name.startswith("max") else "MINF", [number], sources),
        statement.word("SETPF", [is_nan], sources, aux=CMP["nan"]),
        statement.word("SELP32", [destination], [nan, number, is_nan]),
    ]


@encodes("max.f16", "min.f16", "max.bf16", "min.bf16")
def _maximum_of_halves(statement: Statement) -> list[Word]:
    """Compute a maximum of halves via float32, which represents all of them."""
    first, *others = statement.operands(3)
    destination, sources = statement.destination(first, "r"), statement.sources(others)
    operation, _, kind = statement.name.upper().partition(".")
    wide = [statement.assembler.temporary() for _ in range(3)]
    return [
        *(
            statement.word(f"CVT_F32_{kind}", [to], [source])
            for to, source in zip(wide, sources, strict=False)
        ),
        statement.word(f"{operation}F", wide[2:], wide[:2]),
        statement.word(f"CVT_{kind}_F32", [destination], wide[2:]),
    ]


@encodes(
    *(
        f"{name}.{kind}"
        for name in ("add", "sub", "mul", "fma.rn")
        for kind in ("f16", "bf16", "f16x2", "bf16x2")
    )
)
def _arithmetic_of_halves(statement: Statement) -> list[Word]:
    """Compute via float32, from which a sum or product rounds to the same half as directly.

    A fused multiply-add is rounded twice, except with a summand of -0, which is a plain product.
    """
    operation, *_, kind = statement.name.upper().split(".")
    first, *others = statement.operands(4 if operation == "FMA" else 3)
    destination, sources = statement.destination(first, "r"), statement.sources(others)
    halves, new, words = [[source] for source in sources], statement.assembler.temporary, []
    if kind.endswith("X2"):
        halves = [[new(), new()] for _ in sources]
        words = [
            statement.word("UNPACK32_16", pair, [source])
            for pair, source in zip(halves, sources, strict=True)
        ]
    results = []
    for of_one in zip(*halves, strict=True):
        *wide, result = (new() for _ in range(len(sources) + 1))
        words += [
            statement.word(f"CVT_F32_{kind.removesuffix('X2')}", [to], [half])
            for to, half in zip(wide, of_one, strict=True)
        ]
        words.append(statement.word(f"{operation}F", [result], wide))
        results.insert(0, result)
    return [*words, statement.word(f"CVT_{kind}_F32", [destination], results)]


@encodes("mul.wide.u16", "mul.wide.s16", "mad.wide.u16", "mad.wide.s16")
def _wide_product_of_halves(statement: Statement) -> list[Word]:
    """Compute a 32-bit product of halves from factors extended to 32 bits."""
    first, *factors = statement.operands(4 if statement.name.startswith("mad") else 3)
    summands = statement.sources(factors[2:])
    destination = statement.destination(first, "r")
    kind = statement.name[-3].upper()
    wide = [statement.assembler.temporary() for _ in range(2)]
    return [
        *(
            statement.word(f"CVT_{kind}32_{kind}16", [to], [statement.source(text, "r")])
            for to, text in zip(wide, factors, strict=False)
        ),
        statement.word("MADLO32" if summands else "MULLO32", [destination], [*wide, *summands]),
    ]


_ORDERED = ("eq", "ne", "lt", "le", "gt", "ge")
# Comparisons, by the first letter of the type.
_COMPARISONS = {"b": ("eq", "ne"), "s": _ORDERED, "u": (*_ORDERED, "lo", "ls", "hi", "hs")}
_FLOAT_COMPARISONS = (*_ORDERED, "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
_SETP = {f"{letter}{bits}": f"SETPU{bits}" for letter in "bu" for bits in (16, 32, 64)}
_SETP |= {f"s{bits}": f"SETPS{bits}" for bits in (16, 32, 64)}
_SETP |= {"f32": "SETPF", "f16": "SETPF16", "bf16": "SETPBF16"}


@encodes("setp")
def _setp(statement: Statement) -> list[Word]:
    (kind,) = statement.take_last(1)
    if kind in ("f16x2", "bf16x2"):
        return _setp_of_pairs(statement, _SETP[kind.removesuffix("x2")])
    if kind not in _SETP:
        raise PtxError(f"type .{kind} is not known")
    known = _FLOAT_COMPARISONS if kind.endswith(("f32", "f16")) else _COMPARISONS[kind[0]]
    comparison = statement.choose({name: CMP[name] for name in known})
    combination = statement.choose({"and": 1, "or": 2, "xor": 3}, 0)
    first, a, b, *more = statement.operands(4 if combination else 3)
    results = first.split("|")
    if len(results) > 2:
        raise PtxError(f"{first} is more than two predicates")
    destinations = [statement.destination_or_sink(text.strip(), "p") for text in results]
    sources = statement.sources((a, b), "d" if kind.endswith("64") else "r")
    for text in more:
        if text.startswith("!"):
            combination += 4
        sources.append(statement.source(text.removeprefix("!"), "p"))
    return [statement.word(_SETP[kind], destinations, sources, aux=comparison, aux2=combination)]


def _setp_of_pairs(statement: Statement, operation: str) -> list[Word]:
    """Compare the two halves of each operand, with a predicate for each."""
    comparison = statement.choose({name: CMP[name] for name in _FLOAT_COMPARISONS})
    first, *others = statement.operands(3)
    results = first.split("|")
    if len(results) != 2:
        raise PtxError(f"{first} is not two predicates")
    halves, words = [], []
    for source in statement.sources(others):
        halves.append([statement.assembler.temporary() for _ in range(2)])
        words.append(statement.word("UNPACK32_16", halves[-1], [source]))
    for text, *pair in zip(results, *halves, strict=True):
        destination = statement.destination_or_sink(text.strip(), "p")
        words.append(statement.word(operation, [destination], pair, aux=comparison))
    return words


@encodes("mov")
def _mov(statement: Statement) -> list[Word]:
    (kind,) = statement.take_last(1)
    if kind not in MOVED:
        raise PtxError(f"type .{kind} is not known")
    to, of = statement.operands(2)
    whole = "d" if MOVED[kind] == 8 else "r"
    if to.startswith("{"):
        operation, count = _packing(kind, to)
        parts = [statement.destination_or_sink(text, "r") for text in elements(to, count)]
        return [statement.word(f"UNPACK{operation}", parts, [statement.source(of, whole)])]
    destination = statement.destination(to, whole)
    if of.startswith("{"):
        operation, count = _packing(kind, of)
        return [statement.word(f"PACK{operation}", [destination], statement.vector(of, count))]
    if of in SREGS:
        if MOVED[kind] != 4:
            raise PtxError(f"{of} has 32 bits")
        return [statement.word("SREG", [destination], aux=SREGS[of])]
    return [
        statement.word(
            "MOV64" if whole == "d" else "MOV32", [destination], [statement.source(of, whole)]
        )
    ]


def _packing(kind: str, vector: str) -> tuple[str, int]:
    count = vector.count(",") + 1
    packings = {("b32", 2): "32_16", ("b64", 2): "64_32", ("b64", 4): "64_16"}
    if (kind, count) not in packings:
        raise PtxError(f"{count} elements do not make a .{kind}")
    return packings[kind, count], count


@encodes("ret", "exit")
def _ret(statement: Statement) -> list[Word]:
    statement.operands(0)
    return [statement.word("RET")]


@encodes("trap")
def _trap(statement: Statement) -> list[Word]:
    statement.operands(0)
    return [statement.word("TRAP")]


@encodes("bra")
def _bra(statement: Statement) -> list[Word]:
    uniform = statement.has("uni")
    (label,) = statement.operands(1)
    statement.assembler.jump(label)
    return [statement.word("BRA", aux=int(uniform))]


@encodes("nanosleep")
def _nanosleep(statement: Statement) -> list[Word]:
    statement.require("u32")
    statement.operands(1)  # the engine has no clock
    return [statement.word("NANOSLEEP")]
