"""The emulator on small kernels: correct results, and faults found where kernels have them."""

from __future__ import annotations

import os
import re

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.nvidia.compiler import CUDABackend
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.errors import OutOfResources

from . import driver
from .driver import EmulationError, Emulator, Schedule
from .machine import DRAINS, POLICIES
from .program import PtxError
from .test_faults import IS_FENCED, UNFENCED

CAPABILITIES = (80, 90)


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    total = tl.load(x_ptr + at, mask=inside) + tl.load(y_ptr + at, mask=inside)
    tl.store(out_ptr + at, total, mask=inside)


@triton.jit
def softmax_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):  # noqa: N803
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + at, mask=at < n, other=-float("inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + row * n + at, e / tl.sum(e, 0), mask=at < n)


@triton.jit
def product_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, stride_bk, stride_bn,  # noqa: N803
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        a_mask, b_mask = (m < M)[:, None] & (k < K)[None, :], (k < K)[:, None] & (n < N)[None, :]
        a = tl.load(a_ptr + m[:, None] * K + k[None, :], mask=a_mask, other=0.0)
        b_ptrs = b_ptr + k[:, None] * stride_bk + n[None, :] * stride_bn
        b = tl.load(b_ptrs, mask=b_mask, other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(c_ptr + m[:, None] * N + n[None, :], total, mask=mask)


@triton.jit
def convert_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


@triton.jit
def _meet(counter_ptr, target):
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit
def neighbors_kernel(data_ptr, out_ptr, counter_ptr, rounds, BLOCK: tl.constexpr):  # noqa: N803
    """Every program writes, all meet at a counter, every program reads what the next wrote."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(rounds):
        tl.store(data_ptr + program * BLOCK + at, (program + 1) * 1.0 + step * 10.0 + at)
        _meet(counter_ptr, programs * (2 * step + 1))
        total += tl.load(data_ptr + ((program + 1) % programs) * BLOCK + at)
        _meet(counter_ptr, programs * (2 * step + 2))
    tl.store(out_ptr + program * BLOCK + at, total)


@triton.jit
def strided_kernel(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at * stride))


@pytest.mark.parametrize("capability", driver.SHARED_MEMORY)
def test_sum(capability):
    x, y = torch.randn(2, 1000)
    with Emulator(capability) as emulator, emulator.watching():
        out = torch.empty(1000)
        add_kernel[(4,)](x, y, out, 1000, BLOCK=256)
    assert torch.equal(out, x + y)
    assert emulator.findings() == []


@pytest.mark.parametrize("warps", [1, 4, 8])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_reductions_across_warps(capability, warps):
    x = torch.randn(3, 1000)
    with Emulator(capability, Schedule(1)) as emulator, emulator.watching():
        out = torch.empty(3, 1000)
        softmax_kernel[(3,)](x, out, 1000, BLOCK=1024, num_warps=warps)
    torch.testing.assert_close(out, x.softmax(-1), rtol=0, atol=1e-6)
    assert [text for text in emulator.findings() if "(benign)" not in text] == []


# The maximum error of a product, relative to its largest element: for float32 sums; for operands
# truncated to TF32's 11 bits, and for three such products.
PRODUCTS = [
    (torch.bfloat16, "tf32", 1e-6),
    (torch.float16, "tf32", 1e-6),
    (torch.float32, "ieee", 1e-6),
    (torch.float32, "tf32", 2**-10),
    (torch.float32, "tf32x3", 3e-6),
]
# Block, warps, stages: from 64 rows on, sm_90 uses warp-group products.
TILES = [((16, 32, 32), 4, 1), ((32, 64, 64), 8, 3), ((64, 32, 64), 4, 3)]


@pytest.mark.parametrize(("block", "warps", "stages"), TILES, ids=str)
@pytest.mark.parametrize(("dtype", "precision", "tolerance"), PRODUCTS, ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_products(capability, dtype, precision, tolerance, block, warps, stages):
    m, n, k = 2 * block[0] - 8, block[1] + 8, 3 * block[2]
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    if block[0] == 64 or dtype == torch.float16:
        b = b.t().contiguous().t()  # a different layout in shared memory
    with Emulator(capability, Schedule(m)) as emulator, emulator.watching():
        c = torch.empty(m, n)
        constants = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), block, strict=True))
        product_kernel[(2, 2)](
            a, b, c, m, n, k, *b.stride(), **constants, PRECISION=precision,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    exact = a.double() @ b.double()
    assert (c - exact).abs().max() <= tolerance * exact.abs().max()
    faults = [text for text in emulator.findings() if "(benign)" not in text]
    if not IS_FENCED:
        faults = [text for text in faults if UNFENCED not in text]
    assert faults == []
    is_exact = precision == "ieee" and dtype == torch.float32
    ptx = emulator.launches[0].ptx
    is_warp_group = capability == 90 and block[0] >= 64 and not is_exact
    assert ("wgmma.mma_async" in ptx) == is_warp_group
    assert ("mma.sync" in ptx) == (not is_exact and not is_warp_group)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions(dtype):
    """All 16-bit numbers to float32, and float32 to them, rounded as torch does."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    between = torch.randint(-(2**31), 2**31, (2**16,)).int().view(torch.float32)
    exactly = halves.float().nan_to_num(0.0, 1.0, -1.0)
    ties = (exactly.view(torch.int32) + (0x1000 if dtype == torch.float16 else 0x8000)).view(
        torch.float32
    )
    for x, to in ((halves, torch.float32), (between, dtype), (ties, dtype)):
        out = torch.empty(x.shape, dtype=to)
        with Emulator(90) as emulator:
            convert_kernel[(64,)](x, out, BLOCK=1024)
        expected = x.to(to)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.nan_to_num(0.0), expected.nan_to_num(0.0))
        assert emulator.findings() == []


@pytest.mark.parametrize("drain", DRAINS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_programs_that_wait(capability, policy, drain):
    out, emulator = meet(Emulator(capability, Schedule(3, policy, drain)))
    neighbor = (torch.arange(4) + 1) % 4 + 1
    expected = 3 * neighbor[:, None] + 30 + 3 * torch.arange(256)
    assert torch.equal(out, expected.flatten().float())
    assert emulator.findings() == []


def meet(emulator, programs=4, arrived=0):
    with emulator, emulator.watching():
        data, out = torch.empty(programs * 256), torch.empty(programs * 256)
        counter = torch.full((1,), arrived, dtype=torch.int32)
        neighbors_kernel[(programs,)](
            data, out, counter, 3, BLOCK=256, num_warps=8, launch_cooperative_grid=True
        )
    return out, emulator


@pytest.mark.parametrize("broken", ["gpu.release", "gpu.acquire"])
def test_a_release_or_acquire_that_is_missing(broken):
    found = set()
    for seed in range(3):
        _, emulator = meet(
            Emulator(90, Schedule(seed), mutate=lambda ptx: ptx.replace(broken, "gpu.relaxed"))
        )
        found |= {launch.kind for launch in emulator.launches[0].outcome.findings}
    assert any("write-read other CTA" in kind for kind in found), found


def test_a_wait_in_vain_says_where():
    with pytest.raises(EmulationError, match=r"(?s)neighbors_kernel: HANG.*at barrier"):
        meet(Emulator(90), arrived=-1)


def test_memory_outside_and_memory_that_nobody_wrote():
    with Emulator(90) as emulator, emulator.watching():
        x, out = torch.empty(256), torch.empty(256)
        add_kernel[(1,)](x, torch.ones(256), out, 256, BLOCK=256)
        add_kernel[(1,)](torch.ones(256), torch.ones(255), out, 256, BLOCK=256)
    first, second = emulator.launches
    assert {found.kind for found in first.outcome.findings} == {
        "global read of uninitialized memory"
    }
    assert "x_ptr byte" in first.findings()[0]
    assert {found.kind for found in second.outcome.findings} == {"global out of bounds"}
    assert "y_ptr byte" in second.findings()[0]


def test_what_it_does_not_know_is_named():
    broken = Emulator(90, mutate=lambda ptx: re.sub(r"add(\.rn)?\.f32", "frobnicate.f32", ptx))
    with broken, pytest.raises(PtxError, match=r"frobnicate\.f32"):
        add_kernel[(1,)](*torch.ones(3, 256), 256, BLOCK=256)


def test_statistics():
    """A warp's load takes 4 sectors of 32 bytes, or one per thread if they are scattered."""
    for stride, sectors in ((1, 4), (2, 8), (8, 32), (32, 32)):
        with Emulator(90, statistics=True) as emulator:
            strided_kernel[(1,)](torch.ones(256 * stride), torch.empty(128), stride, BLOCK=128)
        (launch,) = emulator.launches
        load = next(pc for pc, text in enumerate(launch.program.text) if "ld.global" in text)
        counts = launch.outcome.statistics
        executions = counts.executions[load]
        assert executions == 4
        assert counts.transactions[load] == sectors * executions
        assert counts.least[load] == 4 * executions


def test_launched_outside():
    arguments = *torch.ones(3, 256), 256
    with Emulator(90):
        compiled = add_kernel[(1,)](*arguments, BLOCK=256)
    with pytest.raises(EmulationError, match="outside of the emulator"):
        compiled.run(1, 1, 1, 0, compiled.function, None, None, None, None, *arguments, 256)


def test_what_it_leaves_behind(monkeypatch):
    """Nothing, even if it cannot be entered: what is compiled here must not reach a GPU."""

    def state():
        cache = triton.knobs.cache
        return (
            cache.dir,
            dict(vars(cache)),
            dict(os.environ),
            CUDABackend.make_cubin,
            Emulator._current,
        )

    before = state()
    with Emulator(90) as emulator:
        assert triton.knobs.cache.dir != before[0]
        with pytest.raises(RuntimeError, match="entered already"), emulator:
            pass
    assert state() == before

    def no_folder():
        raise OSError("no folder")

    monkeypatch.setattr(driver, "folder", no_folder)
    with pytest.raises(OSError, match="no folder"), Emulator(90):
        pass
    assert state() == before


@triton.jit
def scale_kernel(x_ptr, out_ptr, factor, is_added, summand, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at) * factor
    if is_added:
        x += summand
    tl.store(out_ptr + at, x)


def test_numbers_as_arguments():
    x, out = torch.randn(128), torch.empty(128)
    for factor, is_added, summand in ((0.5, True, 3), (2.75, False, 3), (-1.5, True, -(2**31))):
        with Emulator(90):
            scale_kernel[(1,)](x, out, factor, is_added, summand, BLOCK=128)
        assert torch.equal(out, x * factor + is_added * summand)


@gluon.jit
def gluon_kernel(x_ptr, out_ptr, BLOCK: gl.constexpr):  # noqa: N803
    blocked: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    at = gl.arange(0, BLOCK, layout=blocked)
    shared = gl.allocate_shared_memory(gl.float32, [BLOCK], swizzled)
    shared.store(gl.load(x_ptr + BLOCK - 1 - at) + 1)
    gl.store(out_ptr + at, shared.load(blocked))


def test_gluon():
    """Kernels with explicit layouts."""
    with Emulator(90) as emulator:
        out = torch.empty(256)
        gluon_kernel[(1,)](torch.arange(256.0), out, BLOCK=256)
    assert torch.equal(out, torch.arange(256.0).flip(0) + 1)
    assert emulator.findings() == []


@pytest.mark.parametrize(("capability", "fits"), [(103, True), (120, False)])
def test_shared_memory_of_a_device(capability, fits):
    """128 KiB."""
    out = torch.empty(2**15)
    with Emulator(capability):
        if fits:
            gluon_kernel[(1,)](torch.ones(2**15), out, BLOCK=2**15)
        else:
            with pytest.raises(OutOfResources, match=r"Required: 131072, .*: 101376"):
                gluon_kernel[(1,)](torch.ones(2**15), out, BLOCK=2**15)
    assert not fits or torch.equal(out, torch.full((2**15,), 2.0))


@gluon.jit
def transpose_kernel(x_ptr, out_ptr, SHARED: gl.constexpr):  # noqa: N803
    by_row: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    by_column: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, 4], [0, 1])
    i = gl.arange(0, 32, layout=gl.SliceLayout(1, by_row))[:, None]
    j = gl.arange(0, 32, layout=gl.SliceLayout(0, by_row))[None, :]
    shared = gl.allocate_shared_memory(gl.float32, [32, 32], SHARED)
    shared.store(gl.load(x_ptr + i * 32 + j))
    i = gl.arange(0, 32, layout=gl.SliceLayout(1, by_column))[:, None]
    j = gl.arange(0, 32, layout=gl.SliceLayout(0, by_column))[None, :]
    gl.store(out_ptr + i + j * 32, shared.load(by_column))


@pytest.mark.parametrize(("phases", "expected"), [(1, 1024), (32, 32)])
def test_conflicts(phases, expected):
    """A warp stores rows of 32 words and loads columns, which share a bank or are swizzled."""
    x, out = torch.randn(32, 32), torch.empty(32, 32)
    shared = gl.SwizzledSharedLayout(1, 1, phases, [1, 0])
    with Emulator(90, statistics=True) as emulator:
        transpose_kernel[(1,)](x, out, shared)
    assert torch.equal(out, x.t())
    (launch,) = emulator.launches
    first = transpose_kernel.starting_line_number  # of the decorator
    lines = [(rf"test_emulator\.py:{first + 7}:\d+", 32), (rf"{first + 10}:\d+", expected)]
    for (place, count), found in zip(lines, launch.wavefronts(), strict=True):
        assert re.search(place, found.place)
        assert (found.count, found.fewest) == (count, 32)
    assert launch.conflicts() == launch.wavefronts()[1:] * (expected > 32)


def test_conflicts_need_statistics():
    with Emulator(90) as emulator:
        add_kernel[(1,)](*torch.ones(3, 256), 256, BLOCK=256)
    with pytest.raises(ValueError, match="an emulator with statistics"):
        emulator.launches[0].conflicts()


@gluon.jit
def assembly_kernel(x_ptr, out_ptr, ASM: gl.constexpr, CONSTRAINTS: gl.constexpr):  # noqa: N803
    at = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    x = gl.load(x_ptr + at)
    y = gl.inline_asm_elementwise(ASM, CONSTRAINTS, (x,), out_ptr.dtype.element_ty, False, 1)
    gl.store(out_ptr + at, y)


def assembled(asm, x, out_dtype=torch.int32):
    out = torch.empty(x.shape, dtype=out_dtype)
    kinds = ["=r" if out_dtype == torch.int32 else "=f", "r" if x.dtype == torch.int32 else "f"]
    with Emulator(90) as emulator:
        assembly_kernel[(1,)](x, out, asm, ",".join(kinds))
    assert emulator.findings() == []
    return out


@pytest.mark.parametrize(
    ("asm", "expected"),
    [
        ("mov.u32 $0, %laneid;", lambda x: torch.arange(128) % 32),
        # bytes 3 2 1 0 of x; the low two of x above those of 7
        ("prmt.b32 $0, $1, $1, 0x0123;", lambda x: x.view(torch.uint8).view(-1, 4).flip(1)),
        ("prmt.b32 $0, $1, 7, 0x1054;", lambda x: (x << 16) | 7),
        ("{ .reg .b16 a, b; mov.b32 {a, b}, $1; mov.b32 $0, {b, a}; }", lambda x: x.roll(1, 0)),
        (
            "{ .reg .pred p; setp.gt.s32 p, $1, 0; setp.lt.and.s32 p, $1, 9, p; "
            "selp.b32 $0, 1, 0, p; }",
            lambda x: (x > 0) & (x < 9),
        ),
        (
            "{ .reg .pred p; setp.lt.s32 p, $1, 0; setp.gt.or.s32 p, $1, 9, !p; "
            "selp.b32 $0, 1, 0, p; }",
            lambda x: (x > 9) | ~(x < 0),
        ),
        (
            "{ .reg .pred p, q; setp.lt.s32 p, $1, 0; setp.eq.xor.s32 p|q, $1, -3, p; "
            "selp.b32 $0, 1, 0, p; @q add.s32 $0, $0, 2; }",
            lambda x: ((x < 0) ^ (x == -3)) + 2 * ((x < 0) ^ (x != -3)),
        ),
        ("redux.sync.add.s32 $0, $1, -1;", lambda x: x.view(4, 32).sum(1).repeat_interleave(32)),
        ("redux.sync.max.s32 $0, $1, -1;", lambda x: x.view(4, 32).amax(1).repeat_interleave(32)),
        (
            "{ .reg .b32 n; mov.b32 $0, 0; and.b32 n, $1, 15;\n"
            "AGAIN: add.s32 $0, $0, n; sub.s32 n, n, 1; .reg .pred p; setp.gt.s32 p, n, 0;\n"
            "@p bra AGAIN; }",
            lambda x: ((x & 15) * ((x & 15) + 1)) // 2,
        ),
    ],
)
def test_inline_assembly(asm, expected):
    x = torch.arange(-20, 108, dtype=torch.int32)
    if "b, a" in asm:
        wanted = x.view(torch.int16).view(-1, 2).flip(1).contiguous().view(torch.int32).flatten()
    else:
        wanted = expected(x)
    if wanted.dtype == torch.uint8:
        wanted = wanted.contiguous().view(torch.int32).flatten()
    assert torch.equal(assembled(asm, x), wanted.to(torch.int32))


@pytest.mark.parametrize(
    ("asm", "expected"),
    [
        ("ex2.approx.ftz.f32 $0, $1;", torch.exp2),
        ("rcp.approx.ftz.f32 $0, $1;", torch.reciprocal),
    ],
)
def test_approximations(asm, expected):
    x = torch.cat([torch.linspace(-100, 100, 124), torch.tensor([0.0, -0.0, torch.inf, torch.nan])])
    found, exact = assembled(asm, x, torch.float32), expected(x.double()).float()
    torch.testing.assert_close(found, exact, rtol=2**-23, atol=0, equal_nan=True)


# How a thread's four words are stored and loaded; 0 means by halves.
PIECES = {"b16": 0, "b32": 1, "v2.b32": 2, "v4.b32": 4}


def publish_asm(form):
    """Store four words, from $4 on, at the address $8; the result is the same words."""
    lines = ["{", ".reg .b16 low, high;"]
    for i in range(0, 4, PIECES[form] or 1):
        words = [f"${4 + n}" for n in range(i, i + (PIECES[form] or 1))]
        if form == "b16":
            lines.append(f"mov.b32 {{low, high}}, {words[0]};")
            lines += [
                f"st.relaxed.gpu.global.b16 [$8+{4 * i + 2 * n}], {half};"
                for n, half in enumerate(("low", "high"))
            ]
        else:
            vector = words[0] if form == "b32" else f"{{{', '.join(words)}}}"
            lines.append(f"st.relaxed.gpu.global.{form} [$8+{4 * i}], {vector};")
    return "\n".join([*lines, *(f"mov.b32 ${n}, ${4 + n};" for n in range(4)), "}"])


def poll_asm(form):
    """Load the four words at the address $4, and reload missing ones until all are there."""
    size = PIECES[form] or 1
    lines = ["{", ".reg .pred missing<4>, any;", ".reg .b16 low, high;", ".reg .b32 x;"]
    lines += [f"mov.b32 ${n}, -1;" for n in range(4)]
    lines.append("AGAIN:")
    for first in range(0, 4, size):
        p = f"missing{first}"
        for n in range(first, first + size):
            joined, before = (".or", f", {p}") if n > first else ("", "")
            if form == "b16":  # a half that is all ones carries out of it
                lines.append(f"add.u32 x, ${n}, 65537;\nnot.b32 x, x;\nand.b32 x, x, ${n};")
                lines.append(f"and.b32 x, x, -2147450880;\nsetp.ne.s32 {p}, x, 0;")
            else:
                lines.append(f"setp.eq{joined}.s32 {p}, ${n}, -1{before};")
        lines.append(f"or.pred any, any, {p};" if first else f"mov.pred any, {p};")
        words = [f"${n}" for n in range(first, first + size)]
        if form == "b16":
            lines.append(f"@{p} ld.relaxed.gpu.global.b16 low, [$4+{4 * first}];")
            lines.append(f"@{p} ld.relaxed.gpu.global.b16 high, [$4+{4 * first + 2}];")
            lines.append(f"@{p} mov.b32 {words[0]}, {{low, high}};")
        else:
            vector = words[0] if form == "b32" else f"{{{', '.join(words)}}}"
            lines.append(f"@{p} ld.relaxed.gpu.global.{form} {vector}, [$4+{4 * first}];")
    return "\n".join([*lines, "@!any bra DONE;", "bra AGAIN;", "DONE:", "}"])


@gluon.jit
def relay_kernel(box_ptr, out_ptr, rounds, PUBLISH: gl.constexpr, POLL: gl.constexpr):  # noqa: N803
    """Every program sends its words to the previous one and receives the next one's, twice a round.

    It also sums them over the lanes of a warp.
    """
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [2], [0])
    at = gl.arange(0, 256, layout=layout)
    program, programs = gl.program_id(0), gl.num_programs(0)
    words, total, row = program * 1000 + at, 0, 0
    for _ in range(rounds):
        for _ in gl.static_range(2):
            own = box_ptr + (row + program) * 256 + at
            gl.inline_asm_elementwise(
                PUBLISH, "=&r,=&r,=&r,=&r,r,r,r,r,l,l,l,l", (words, own), gl.int32, False, 4
            )
            others = box_ptr + (row + (program + 1) % programs) * 256 + at
            words = gl.inline_asm_elementwise(
                POLL, "=&r,=&r,=&r,=&r,l,l,l,l", (others,), gl.int32, False, 4
            )
            total += gl.sum(words, 0)
            words += 1
            row += programs
    gl.store(out_ptr + program * 256 + at, words + total)


def relay(stored, loaded, schedule, *, mutate=str, programs=3, rounds=2):
    box = torch.full((2 * rounds, programs, 256), -1, dtype=torch.int32)
    emulator = Emulator(90, schedule, mutate=mutate)
    with emulator, emulator.watching():
        out = torch.empty(programs, 256, dtype=torch.int32)
        relay_kernel[(programs,)](
            box, out, rounds, publish_asm(stored), poll_asm(loaded),
            num_warps=2, launch_cooperative_grid=True,
        )  # fmt: skip
    words = torch.arange(programs)[:, None] * 1000 + torch.arange(256)
    total = 0
    for _ in range(2 * rounds):
        words = words.roll(-1, 0)
        total += words.sum(1, keepdim=True)
        words = words + 1
    return emulator, torch.equal(out, (words + total).int())


@pytest.mark.parametrize("drain", DRAINS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("form", PIECES)
def test_words_that_are_polled(form, policy, drain):
    """A loop in inline assembly, in which each thread waits for its own words."""
    emulator, is_right = relay(form, form, Schedule(5, policy, drain))
    assert is_right
    assert emulator.findings() == []
    assert emulator.launches[0].ptx.count("AGAIN:") == 2


POLLED = "global write-read other CTA"


@pytest.mark.parametrize(
    ("stored", "loaded", "kind"),
    [
        ("b32", "v2.b32", None),
        ("b32", "v4.b32", None),
        ("v4.b32", "v2.b32", None),
        ("v4.b32", "b32", None),
        ("b32", "b16", f"{POLLED} (both strong, of different sizes)"),
        ("v2.b32", "b16", f"{POLLED} (both strong, of different sizes)"),
    ],
)
def test_pieces_that_are_polled(stored, loaded, kind):
    """Vectors are accesses of their elements; loading part of a stored word is a race."""
    for seed in range(3):
        emulator, is_right = relay(stored, loaded, Schedule(seed, "random", "lazy"))
        assert is_right
        kinds = {found.kind for found in emulator.launches[0].outcome.findings}
        assert kind in kinds if kind else not kinds


def test_halves_that_are_polled_as_a_word():
    """One half may be present while the word looks complete."""
    rights, kinds = set(), set()
    for seed in range(5):
        emulator, is_right = relay("b16", "v4.b32", Schedule(seed, "random", "random"))
        rights.add(is_right)
        kinds |= {found.kind for found in emulator.launches[0].outcome.findings}
    assert False in rights
    assert f"{POLLED} (both strong, of different sizes)" in kinds


@pytest.mark.parametrize(("old", "new"), [("st.relaxed.gpu", "st"), ("ld.relaxed.gpu", "ld")])
def test_weak_words_that_are_polled(old, new):
    kinds = set()
    for seed in range(3):
        schedule = Schedule(seed, "random", "at once")
        emulator, _ = relay("b32", "v4.b32", schedule, mutate=lambda ptx: ptx.replace(old, new))
        kinds |= {found.kind for found in emulator.launches[0].outcome.findings}
    assert f"{POLLED} (mixed weak/strong)" in kinds


def test_words_that_are_polled_in_vain():
    """The report locates it, by the line of this copy of the assembly."""
    with pytest.raises(EmulationError, match=r"(?s)relay_kernel: HANG.*ld\.relaxed.*test_emulator"):
        relay("b32", "b32", Schedule(), mutate=lambda ptx: re.sub(r"st\.relaxed.*", "", ptx))


@gluon.jit
def tell_kernel(out_ptr, ASM: gl.constexpr):  # noqa: N803
    at = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    to = (out_ptr + at).to(gl.int64)
    gl.inline_asm_elementwise(ASM, "=r,r,l", (at, to), gl.int32, False, 1)


def test_stores_under_predicates():
    asm = (
        "{ .reg .pred p; setp.lt.u32 p, $1, 40; @p bra GO; mov.u32 $0, 1; "
        "setp.gt.u32 p, $1, 99; @p st.global.u32 [$2], $1; bra DONE; GO: mov.u32 $0, 0; DONE: }"
    )
    with Emulator(90) as emulator:
        out = torch.zeros(128, dtype=torch.int32)
        tell_kernel[(1,)](out, asm)
    assert torch.equal(out, torch.arange(128).where(torch.arange(128) > 99, 0).int())
    assert emulator.findings() == []


def test_schedules_differ():
    """The seed decides what happens, and nothing else does."""
    orders = [
        meet(Emulator(90, Schedule(seed)))[1].launches[0].outcome.counters for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
