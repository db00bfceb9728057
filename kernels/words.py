"""Exchange results between the programs of a group: each word itself shows whether it has arrived.

What is exchanged, h forward and the gate gradients backward, is written once, into memory filled
with MISSING, a bit pattern that arithmetic never produces. `publish` stores 32-bit words; a
consumer loads the words that its own product needs, and each thread checks its own: no flag, no
barrier, one round trip to L2. Loads and stores are relaxed, GPU-scope operations on the same words,
so that no L1 cache returns stale data and no word is ever torn. Where rows have an odd number of
16-bit elements, the word is a single element.

A NaN with the bits of MISSING is stored as another NaN. SPIN_LIMIT is for debugging: if nonzero, a
thread writes a number to `error_ptr` after that many polls and continues with what is there.

All of this is inline assembly on a thread's own elements: the compiler would test and load one
vector after another, with a round trip for each, and splits loads whose alignment it cannot prove.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

MISSING = gl.constexpr(-1)  # all bits set


@gluon.constexpr_function
def _aligned(columns, vector, itemsize):
    """Return the alignment, up to a vector's bytes, that all rows of so many columns share."""
    piece = vector
    while columns * itemsize % piece:
        piece //= 2
    return piece


@gluon.constexpr_function
def _load(vector, words, chunk_bytes, itemsize, piece, pointers, left, guard):
    """Generate PTX that loads one of a thread's vectors, predicated on `guard` if not empty.

    Vector number 2 * chunk + row (of the thread's two rows in `fragments.state_layout`) goes to
    operands $(vector * words) and up. Operands from `pointers` on are the pointers of the first
    chunk's elements; those from `left` on, if not None, the numbers of columns remaining.
    """
    chunk, row = vector // 2, vector % 2
    element = row * (words * 4 // itemsize)
    lines = []
    pieces = words * 4 // piece
    for p in range(pieces):
        offset = chunk * chunk_bytes + p * piece
        predicate = guard
        if left is not None:
            lines.append(f"setp.gt.s32 inside, ${left + element}, {offset // itemsize};")
            if guard:
                lines.append(f"and.pred inside, inside, {guard};")
            predicate = "inside"
        at = f"[${pointers + element}+{offset}]"
        when = f"@{predicate} " if predicate else ""
        first = vector * words + p * piece // 4
        if piece == 2:
            lines.append(f"mov.b16 half{p}, 0;")
            lines.append(f"{when}ld.relaxed.gpu.global.b16 half{p}, {at};")
        elif piece == 4:
            lines.append(f"{when}ld.relaxed.gpu.global.b32 ${first}, {at};")
        else:
            to = ", ".join(f"${first + i}" for i in range(piece // 4))
            lines.append(f"{when}ld.relaxed.gpu.global.v{piece // 4}.b32 {{{to}}}, {at};")
    if piece == 2:
        when = f"@{guard} " if guard else ""
        for i in range(words):
            halves = f"{{half{2 * i}, half{2 * i + 1}}}"
            lines.append(f"{when}mov.b32 ${vector * words + i}, {halves};")
    return lines


@gluon.constexpr_function
def _load_assembly(chunks, words, chunk_bytes, itemsize, piece, is_masked):
    """Generate a load of a thread's vectors of some chunks, present or not; 0 beyond the rows.

    Operands: the words; the pointers; if `is_masked`, the columns remaining.
    """
    pointers = 2 * words * chunks
    elements = 2 * words * 4 // itemsize
    left = pointers + elements if is_masked else None
    lines = [".reg .pred inside;", f".reg .b16 half<{2 * words}>;"]
    if is_masked:
        lines += [f"mov.b32 ${n}, 0;" for n in range(pointers)]
    for vector in range(2 * chunks):
        lines += _load(vector, words, chunk_bytes, itemsize, piece, pointers, left, "")
    return "\n".join(["{", *lines, "}"])


@gluon.constexpr_function
def _settle_assembly(chunks, words, chunk_bytes, itemsize, piece, is_masked, limit):
    """Generate a wait for the first of some chunks, all of which were loaded once.

    While a thread's part of it is missing, the thread reloads all missing vectors, including those
    of later chunks, and checks again. Operands: the words, in place; the pointers; if `is_masked`,
    the columns remaining; with a limit, the error pointer and the number to write there.
    """
    pointers = 2 * (2 * words * chunks)
    elements = 2 * words * 4 // itemsize
    left = pointers + elements if is_masked else None
    error = pointers + elements * (2 if is_masked else 1)
    vectors = range(2 * chunks)

    def test(vector):  # set the predicate missing<vector>
        lines = []
        for i in range(words):
            word = f"${vector * words + i}"
            either = "" if i == 0 else ".or"
            before = "" if i == 0 else f", missing{vector}"
            if piece == 2:
                # Only a half that is all ones carries out when 1 is added. A carry from the lower
                # half into the upper one cannot hide that a half is missing.
                lines += [f"add.u32 x, {word}, 0x00010001;", "not.b32 x, x;"]
                lines += [f"and.b32 x, x, {word};", "and.b32 x, x, 0x80008000;"]
                lines.append(f"setp.ne{either}.s32 missing{vector}, x, 0{before};")
            else:
                lines.append(
                    f"setp.eq{either}.s32 missing{vector}, {word}, {MISSING.value}{before};"
                )
        return lines

    lines = [".reg .pred inside, any, more;", f".reg .pred missing<{len(vectors)}>;"]
    lines += [".reg .b32 x, polls;", f".reg .b16 half<{2 * words}>;"]
    lines += ["mov.u32 polls, 0;", "AGAIN:", *test(0), *test(1)]
    lines += ["or.pred any, missing0, missing1;", "@!any bra DONE;"]
    if limit:
        lines += ["add.u32 polls, polls, 1;", f"setp.le.u32 more, polls, {limit};", "@more bra GO;"]
        lines += [f"st.global.u32 [${error}], ${error + elements};", "bra DONE;", "GO:"]
    for vector in vectors[2:]:
        lines += test(vector)
    for vector in vectors:
        guard = f"missing{vector}"
        lines += _load(vector, words, chunk_bytes, itemsize, piece, pointers, left, guard)
    return "\n".join(["{", *lines, "bra AGAIN;", "DONE:", "}"])


@gluon.constexpr_function
def _constraints(outputs, in_place, pointers, numbers, more_pointers=0, more_numbers=0):
    """Return the constraints: words, possibly also inputs, then pointers and element counts."""
    found = ["=&r"] * outputs + ([str(n) for n in range(outputs)] if in_place else [])
    found += ["l"] * pointers + ["r"] * numbers + ["l"] * more_pointers + ["r"] * more_numbers
    return ",".join(found)


@gluon.constexpr_function
def _repeated(x, n):
    return (x,) * n


@gluon.jit
def load_chunks(pointers, left, COUNT: gl.constexpr, H: gl.constexpr, K: gl.constexpr):
    """Load COUNT chunks of operands, in `fragments.state_layout`, whether present or not.

    `pointers` are those of the first chunk; `left` is the number of columns, of K, from each
    element on. Rows, and the parts published in them, start at multiples of H columns. The chunks
    are integers.
    """
    W: gl.constexpr = pointers.shape[0]
    BLOCK_K: gl.constexpr = pointers.shape[2]
    ITEMSIZE: gl.constexpr = pointers.dtype.element_ty.primitive_bitwidth // 8
    WORDS: gl.constexpr = BLOCK_K * ITEMSIZE // 16
    ELEMENTS: gl.constexpr = BLOCK_K // 2
    integer: gl.constexpr = gl.int16 if ITEMSIZE == 2 else gl.int32
    PIECE: gl.constexpr = _aligned(H, 4 * WORDS, ITEMSIZE)
    IS_MASKED: gl.constexpr = K % (W * BLOCK_K) > 0
    ASSEMBLY: gl.constexpr = _load_assembly(
        COUNT, WORDS, W * BLOCK_K * ITEMSIZE, ITEMSIZE, PIECE, IS_MASKED
    )
    MASKED: gl.constexpr = ELEMENTS if IS_MASKED else 0
    KINDS: gl.constexpr = _constraints(2 * WORDS * COUNT, False, ELEMENTS, MASKED)
    args = (pointers,)
    if IS_MASKED:
        args += (left,)
    return gl.inline_asm_elementwise(
        ASSEMBLY, KINDS, args, _repeated(integer, COUNT), False, ELEMENTS
    )


@gluon.jit
def settle(
    chunks, pointers, left, error_ptr, number, H: gl.constexpr, K: gl.constexpr,
    SPIN_LIMIT: gl.constexpr,
):  # fmt: skip
    """Wait for this thread's part of the first of some chunks, all of which were loaded once."""
    W: gl.constexpr = pointers.shape[0]
    COUNT: gl.constexpr = len(chunks)
    BLOCK_K: gl.constexpr = pointers.shape[2]
    ITEMSIZE: gl.constexpr = chunks[0].dtype.primitive_bitwidth // 8
    WORDS: gl.constexpr = BLOCK_K * ITEMSIZE // 16
    ELEMENTS: gl.constexpr = BLOCK_K // 2
    PIECE: gl.constexpr = _aligned(H, 4 * WORDS, ITEMSIZE)
    # A vector entirely beyond the row was loaded as 0, which is not MISSING.
    IS_MASKED: gl.constexpr = K % (W * BLOCK_K) > 0 and PIECE < 4 * WORDS
    ASSEMBLY: gl.constexpr = _settle_assembly(
        COUNT, WORDS, W * BLOCK_K * ITEMSIZE, ITEMSIZE, PIECE, IS_MASKED, SPIN_LIMIT
    )
    MASKED: gl.constexpr = ELEMENTS if IS_MASKED else 0
    LIMITED: gl.constexpr = ELEMENTS if SPIN_LIMIT > 0 else 0
    KINDS: gl.constexpr = _constraints(2 * WORDS * COUNT, True, ELEMENTS, MASKED, LIMITED, LIMITED)
    args = chunks + (pointers,)
    if IS_MASKED:
        args += (left,)
    if SPIN_LIMIT > 0:
        args += (error_ptr.to(gl.int64), number)
    return gl.inline_asm_elementwise(
        ASSEMBLY, KINDS, args, _repeated(chunks[0].dtype, COUNT), False, ELEMENTS
    )


@gluon.constexpr_function
def _publish_assembly(itemsize, is_whole, is_halved):
    """Generate a store of a thread's word, predicated on its guard.

    Two 16-bit elements are one word if `is_whole`, else two. `is_halved`: the second half of a warp
    duplicates the first half and does not store. Operands: an unused result; the pointers of the
    elements; the word; its guard, or those of its halves.
    """
    elements = 4 // itemsize
    word, guard = f"${1 + elements}", f"${2 + elements}"
    lines = [".reg .pred p, q;", ".reg .b32 lane;", ".reg .b16 low, high, first, second;"]
    lines += ["mov.b32 $0, 0;", "setp.eq.b32 q, 0, 0;"]
    if is_halved:
        lines += ["mov.u32 lane, %laneid;", "setp.lt.u32 q, lane, 16;"]
    if is_whole:
        lines.append(f"setp.ne.and.s32 p, {guard}, 0, q;")
        lines.append(f"@p st.relaxed.gpu.global.b32 [$1], {word};")
    else:
        lines += [f"mov.b32 {{low, high}}, {word};", f"mov.b32 {{first, second}}, {guard};"]
        lines += ["setp.ne.and.s16 p, first, 0, q;", "@p st.relaxed.gpu.global.b16 [$1], low;"]
        lines += ["setp.ne.and.s16 p, second, 0, q;", "@p st.relaxed.gpu.global.b16 [$2], high;"]
    return "\n".join(["{", *lines, "}"])


@gluon.jit
def publish(pointers, tile, mask, H: gl.constexpr):
    """Store a tile where the group waits for it; pointers and mask are in the layout
    `fragments.publishing_layout`.
    """
    LAYOUT: gl.constexpr = pointers.type.layout
    ITEMSIZE: gl.constexpr = tile.dtype.primitive_bitwidth // 8
    ELEMENTS: gl.constexpr = 4 // ITEMSIZE
    integer: gl.constexpr = gl.int16 if ITEMSIZE == 2 else gl.int32
    IS_HALVED: gl.constexpr = ITEMSIZE == 2 and gl.num_warps() > 4
    ASSEMBLY: gl.constexpr = _publish_assembly(ITEMSIZE, _aligned(H, 4, ITEMSIZE) == 4, IS_HALVED)
    KINDS: gl.constexpr = _constraints(1, False, ELEMENTS, 2)
    bits = tile.to(integer, bitcast=True)
    bits = gl.where(bits == MISSING, -2, bits).to(integer)  # replace that NaN with another
    bits = gl.convert_layout(bits, LAYOUT)
    gl.inline_asm_elementwise(
        ASSEMBLY, KINDS, (pointers, bits, mask.to(integer)), _repeated(integer, 1), False, ELEMENTS
    )
