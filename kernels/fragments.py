"""Layouts of the operands of a persistent kernel's products, in Gluon's explicit layouts.

A program of W warps multiplies a slice of R, of UNITS hidden units, by h of TILE_ROWS batch rows.
The columns (K) are split over the warps: each computes a partial sum of every result, so it needs
only its own part of h and of R. For Triton this is a batch of W products, [UNITS, K] x
[K, TILE_ROWS], with columns in chunks: k = (chunk * W + warp) * BLOCK_K + ...

R is the left operand. A fragment of the right operand, as the tensor cores take it, is two words of
a row of h, so the 16 bytes that a thread loads from a row are two fragments without any shuffle.
This works by renaming columns: in memory they are ordered (lane, product, half, element), in a
fragment (product, half, lane, element). Both operands are renamed the same way, which does not
change the sums. The rows of h are renamed too, so that a thread of the result holds four adjacent
ones. All conversions here only rename: with `assert_trivial` the compiler rejects data movement.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# The smallest sizes that one warp-level product takes for units, and two of them for rows.
UNITS = TILE_ROWS = gl.constexpr(16)


@gluon.constexpr_function
def _bits(n):
    return [1 << i for i in range(n.bit_length() - 1)]


@gluon.constexpr_function
def _operand_layout(W, BLOCK_K, row_in_thread, row_of_lanes):
    """Lay out [W, 16, BLOCK_K] with columns as in memory, 16 bytes of two rows per thread."""
    vector = BLOCK_K // 4
    registers = [[0, 0, b] for b in _bits(vector)] + [[0, row_in_thread, 0]]
    lanes = [[0, 0, vector], [0, 0, 2 * vector]] + [[0, row, 0] for row in row_of_lanes]
    warps = [[b, 0, 0] for b in _bits(W)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [W, 16, BLOCK_K])


@gluon.constexpr_function
def weights_layout(W, BLOCK_K):
    """Return the layout of a chunk of R, [W, UNITS, BLOCK_K]."""
    return _operand_layout(W, BLOCK_K, 8, [1, 2, 4])


@gluon.constexpr_function
def state_layout(W, BLOCK_K):
    """Return the layout of a chunk of h, [W, TILE_ROWS, BLOCK_K]."""
    return _operand_layout(W, BLOCK_K, 2, [1, 4, 8])


@gluon.constexpr_function
def product_layout(W):
    return gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[W, 1, 1], instr_shape=[1, 16, 8]
    )


@gluon.constexpr_function
def sums_layout(W):
    """Lay out [W, UNITS, TILE_ROWS] partial sums, with all W of a unit and row in one thread.

    The lanes of a warp cover 8 units, or pairs of units, by 4 rows, which suits both the rows of
    global memory and the banks of shared memory.
    """
    pairs = 2 if W <= 4 else 1
    across = 2 // pairs
    return gl.BlockedLayout([W, pairs, 1], [1, 8, 4], [1, across, W // across], [1, 2, 0])


@gluon.constexpr_function
def shared_sums_layout(W):
    """Lay out [W, UNITS, TILE_ROWS] in shared memory, without bank conflicts.

    Four rows of a unit take 16 bytes. The bits of their slot, of eight in 128 bytes, are (row 4 ^
    unit 2, row 8 ^ unit 4, unit 1 ^ unit 8). The eight lanes of one store, two units with all rows,
    hit eight different slots; so do those of one load: every unit, every second or every fourth.
    """
    bases = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 4], [0, 4, 8], [0, 9, 0]]
    return gl.SharedLinearLayout(bases + [[b, 0, 0] for b in _bits(W)])


@gluon.constexpr_function
def publishing_layout(W, ITEMSIZE):
    """Lay out [UNITS, TILE_ROWS] in 32-bit words, each element in the warp that computed it.

    Where a thread computes one 16-bit element, the second half of a warp duplicates the first half
    and has nothing to store.
    """
    if W <= 4 or ITEMSIZE == 4:
        return gl.SliceLayout(0, sums_layout(W))
    lanes = [[2, 0], [4, 0], [0, 1], [0, 2], [0, 0]]
    warps = [[8, 0]] + [[0, 4 * b] for b in _bits(W // 2)]
    return gl.DistributedLinearLayout([[1, 0]], lanes, warps, [], [16, 16])


@gluon.jit
def left_operand(r, W: gl.constexpr, BLOCK_K: gl.constexpr):
    """Rename a chunk of R, from `weights_layout`."""
    E: gl.constexpr = 32 // r.dtype.primitive_bitwidth
    S: gl.constexpr = BLOCK_K // (8 * E)
    r = gl.reshape(r, [W, UNITS, 4, S, 2, E])
    r = gl.reshape(gl.permute(r, (0, 1, 3, 4, 2, 5)), [W, UNITS, BLOCK_K])
    layout: gl.constexpr = gl.DotOperandLayout(0, product_layout(W), E)
    return gl.convert_layout(r, layout, assert_trivial=True)


@gluon.jit
def right_operand(h, W: gl.constexpr, BLOCK_K: gl.constexpr):
    """Rename a chunk of h, from `state_layout`."""
    E: gl.constexpr = 32 // h.dtype.primitive_bitwidth
    S: gl.constexpr = BLOCK_K // (8 * E)
    h = gl.reshape(h, [W, 4, 2, 2, 4, S, 2, E])
    h = gl.reshape(gl.permute(h, (0, 5, 6, 4, 7, 2, 1, 3)), [W, BLOCK_K, TILE_ROWS])
    layout: gl.constexpr = gl.DotOperandLayout(1, product_layout(W), E)
    return gl.convert_layout(h, layout, assert_trivial=True)


@gluon.jit
def named_rows(sums, W: gl.constexpr):
    """Restore the original row names of a result."""
    sums = gl.reshape(sums, [W, UNITS, 2, 4, 2])
    return gl.reshape(gl.permute(sums, (0, 1, 3, 2, 4)), [W, UNITS, TILE_ROWS])


# Chunks of R that do not fit in registers are kept in shared memory as fragments, with the 16 bytes
# of each lane side by side.


@gluon.constexpr_function
def _fragments_layout(W, BLOCK_K, E):
    each = BLOCK_K // (8 * E)
    registers = [[0, 0, b] for b in _bits(4 * E)] + [[b, 0, 0] for b in _bits(each)]
    lanes = [[0, b, 0] for b in _bits(32)]
    warps = [[b * each, 0, 0] for b in _bits(W)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [W * each, 32, 4 * E])


@gluon.jit
def keep(r, W: gl.constexpr, BLOCK_K: gl.constexpr):
    """Store a left operand in shared memory."""
    E: gl.constexpr = 32 // r.dtype.primitive_bitwidth
    S: gl.constexpr = BLOCK_K // (8 * E)
    LAYOUT: gl.constexpr = _fragments_layout(W, BLOCK_K, E)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    r = gl.reshape(r, [W, 2, 8, S, 2, 4, E])
    r = gl.reshape(gl.permute(r, (0, 3, 2, 5, 4, 1, 6)), [W * S, 32, 4 * E])
    r = gl.convert_layout(r, LAYOUT, assert_trivial=True)
    return gl.allocate_shared_memory(r.dtype, [W * S, 32, 4 * E], PLAIN, r)


@gluon.jit
def kept(memory, W: gl.constexpr, BLOCK_K: gl.constexpr):
    """Load a left operand that `keep` stored."""
    E: gl.constexpr = 32 // memory.dtype.primitive_bitwidth
    S: gl.constexpr = BLOCK_K // (8 * E)
    LAYOUT: gl.constexpr = _fragments_layout(W, BLOCK_K, E)
    r = gl.reshape(memory.load(LAYOUT), [W, S, 8, 4, 2, 2, E])
    r = gl.reshape(gl.permute(r, (0, 5, 2, 1, 4, 3, 6)), [W, UNITS, BLOCK_K])
    layout: gl.constexpr = gl.DotOperandLayout(0, product_layout(W), E)
    return gl.convert_layout(r, layout, assert_trivial=True)
