"""Small programs of one warp, and what the engine reports."""

from __future__ import annotations

import numpy as np
import pytest

from . import machine
from .driver import Schedule
from .parser import parse

PROLOGUE = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid 32
{
    .reg .pred %p<4>;
    .reg .b32 %r<16>;
    .reg .b16 %rs<4>;
    .reg .b64 %rd<4>;
    ld.param.b64 %rd1, [kernel_param_0];
    mov.u32 %r1, %tid.x;
    mov.b32 %r2, 0;
    mov.b32 %r3, 0;
    mov.b32 %r4, 0;
    mov.b32 %r5, 0;
    setp.lt.s32 %p1, %r1, 16;
    setp.lt.s32 %p2, %r1, 32;
    shl.b32 %r10, %r1, 2;
    xor.b32 %r11, %r10, 4;
    cvt.u64.u32 %rd2, %r10;
    add.s64 %rd3, %rd1, %rd2;
"""
HALF, ALL = "@%p1 ", "@%p2 "
MMA = (
    "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
    "{%r2, %r3, %r4, %r5}, {%r2, %r3}, {%r2}, {%r2, %r3, %r4, %r5};"
)
STORE, LOAD, NEXT = "st.shared.b32 [%r10], %r1;", "ld.shared.b32 %r2, [%r10];", "[%r11]"
LOAD_NEXT, MEET = LOAD.replace("[%r10]", NEXT), "bar.warp.sync -1;"


def run(body, *, ctas=1, seed=0, drain="at once", is_written=True, **options):
    program = parse(f"{PROLOGUE}{body}\nret;\n}}\n")
    data, written = np.zeros(64, np.uint32), np.full(256, is_written, np.uint8)
    region = machine.Region(1 << 36, 256, data.ctypes.data, written)
    schedule = Schedule(seed, "random", drain)
    return machine.run(
        program, (ctas, 1, 1), [1 << 36], [region], 1024, schedule=schedule, **options
    )


LANES = "collective instruction without all of its lanes"
MEMBERS = "member mask that leaves out a lane, or differs between lanes"
WARP = "intra-warp shared {} without bar.warp.sync"


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        (MMA, []),
        (ALL + MMA, []),
        (HALF + MMA, [LANES]),
        (f"{HALF} ret; {MMA}", [LANES]),
        (HALF + "bar.sync 0;", ["predicated bar.sync"]),
        (HALF + MEET, [LANES]),
        (HALF + "bar.warp.sync 65535;", []),
        ("shfl.sync.bfly.b32 %r2, %r3, 1, 31, -1;", []),
        ("shfl.sync.bfly.b32 %r2, %r3, 1, 31, 0;", [MEMBERS]),
        (HALF + "bra.uni L; mov.b32 %r2, 1;\nL:", ["bra.uni that diverges"]),
        (ALL + "bra.uni L; mov.b32 %r2, 1;\nL:", []),
        (HALF + "bra L; mov.b32 %r2, 1;\nL:", []),
        (STORE + LOAD, []),
        (STORE + MEET + LOAD_NEXT, []),
        (STORE + LOAD_NEXT, [WARP.format("write-read")]),
        (STORE + MEET + LOAD_NEXT + STORE, [WARP.format("read-write")]),
        (STORE + STORE.replace("[%r10]", NEXT), [WARP.format("write-write")]),
        (LOAD, ["shared read of uninitialized memory"]),
        ("st.shared.b32 [%r10 + 1000], %r1;", ["shared out of bounds"]),
        ("st.shared.b32 [%r2], %r1;", ["two lanes store DIFFERENT values to one shared address"]),
        ("st.global.b32 [%rd1], %r1;", ["two lanes store DIFFERENT values to one address"]),
        ("st.global.b32 [%rd1], %r2;", ["two lanes store the same value to one address"]),
        ("ld.global.b32 %r2, [%rd3 + 252];", ["global out of bounds"]),
        ("ld.global.b32 %r2, [%rd3 + 2];", ["misaligned global access", "fatal"]),
        ("trap;", ["trap", "fatal"]),
    ],
)
def test_kinds(body, kinds):
    outcome = run(body)
    assert {finding.kind for finding in outcome.findings} == set(kinds)
    assert outcome.status == ("FATAL" if "fatal" in kinds else "ended")


@pytest.mark.parametrize("drain", machine.DRAINS)
def test_bytes_that_nobody_wrote(drain):
    """Also next to bytes that are still in flight."""
    store = "shl.b64 %rd2, %rd2, 1; add.s64 %rd3, %rd1, %rd2; st.global.b32 [%rd3], %r1;"
    outcome = run(store + "ld.global.b32 %r2, [%rd3];", is_written=False, drain=drain)
    assert outcome.findings == []
    outcome = run(store + "ld.global.v2.b32 {%r2, %r3}, [%rd3];", is_written=False, drain=drain)
    assert [f.kind for f in outcome.findings] == ["global read of uninitialized memory"]


WEAK, MIXED = "both weak", "mixed weak/strong"
SIZES = "both strong, of different sizes"
ST, LD = "st.relaxed.gpu.global", "ld.relaxed.gpu.global"
HALVES = f"mov.b32 {{%rs1, %rs2}}, %r1; {ST}.b16 [%rd3], %rs1; {ST}.b16 [%rd3+2], %rs2;"
FOUR = f"setp.eq.s32 %p3, %r1, 0; @%p3 {ST}.v4.b32 [%rd1], {{%r1, %r2, %r3, %r4}};"
LOAD_FOUR = f"{LD}.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd1];"


@pytest.mark.parametrize(
    ("store", "load", "how"),
    [
        ("st.global.b32 [%rd3], %r1;", "ld.global.b32 %r2, [%rd3];", WEAK),
        ("st.global.b32 [%rd3], %r1;", "ld.volatile.global.b32 %r2, [%rd3];", MIXED),
        ("st.global.b32 [%rd3], %r1;", f"{LD}.b32 %r2, [%rd3];", MIXED),
        ("st.global.b32 [%rd3], %r1;", LOAD_FOUR, MIXED),
        (f"{ST}.b32 [%rd3], %r1;", "ld.global.b32 %r2, [%rd3];", MIXED),
        # the same bytes, with strong operations
        (f"{ST}.b32 [%rd3], %r1;", f"{LD}.b32 %r2, [%rd3];", None),
        (HALVES, f"{LD}.b16 %rs3, [%rd3+2];", None),
        ("red.relaxed.gpu.global.add.u32 [%rd3], %r1;", f"{LD}.b32 %r2, [%rd3];", None),
        # each element of vectors
        (f"{ST}.b32 [%rd3], %r1;", LOAD_FOUR, None),
        (f"{ST}.v2.b32 [%rd2], {{%r1, %r1}};", f"{LD}.b32 %r2, [%rd3];", None),
        (f"{ST}.v2.b32 [%rd2], {{%r1, %r1}};", LOAD_FOUR, None),
        (FOUR, LOAD_FOUR, None),
        (HALVES, f"{LD}.v2.b16 {{%rs1, %rs2}}, [%rd3];", None),
        # partly the same bytes
        (f"{ST}.b32 [%rd3], %r1;", f"{LD}.b16 %rs1, [%rd3];", SIZES),
        (f"{ST}.b32 [%rd3], %r1;", f"{LD}.b16 %rs1, [%rd3+2];", SIZES),
        (f"{ST}.b32 [%rd3], %r1;", f"{LD}.v2.b16 {{%rs1, %rs2}}, [%rd3];", SIZES),
        (HALVES, f"{LD}.b32 %r2, [%rd3];", SIZES),
        (HALVES, LOAD_FOUR, SIZES),
        (FOUR, f"{LD}.v2.b64 {{%rd2, %rd3}}, [%rd1];", SIZES),
        ("red.relaxed.gpu.global.add.u32 [%rd3], %r1;", f"{LD}.b16 %rs1, [%rd3];", SIZES),
    ],
)
def test_two_programs(store, load, how):
    """One writes what the other reads, in either order."""
    body = f"""
        mul.wide.u32 %rd2, %r1, 8;
        add.s64 %rd2, %rd1, %rd2;
        mov.u32 %r6, %ctaid.x;
        setp.eq.s32 %p3, %r6, 0;
        @%p3 bra W;
        {load}
        ret;
    W:  {store}
    """
    orders = set()
    for seed in range(4):
        found = {f.kind for f in run(body, ctas=2, seed=seed).findings}
        assert bool(found) == bool(how)
        orders |= found
    unordered = {WEAK: WEAK, MIXED: "mixed", SIZES: "of different sizes"}.get(how)
    assert orders <= {
        f"global write-read other CTA ({how})",
        f"global read-write other CTA (UNORDERED, {unordered})",
    }


def test_two_programs_store():
    """Words, and halves of words."""
    body = f"""
        mov.u32 %r6, %ctaid.x;
        setp.eq.s32 %p3, %r6, 0;
        @%p3 {ST}.b32 [%rd3], %r1;
        mov.b16 %rs1, 1;
        @!%p3 {ST}.b{{}} [%rd3], {{}};
    """
    assert run(body.format(32, "%r1"), ctas=2).findings == []
    kinds = {f.kind for f in run(body.format(16, "%rs1"), ctas=2).findings}
    assert kinds == {f"global write-write other CTA ({SIZES})"}


@pytest.mark.parametrize(("release", "kinds"), [("release", set()), ("relaxed", {WEAK})])
@pytest.mark.parametrize("place", [0, 4])
def test_an_element_of_a_vector_releases(release, kinds, place):
    """A vector is one operation per element, in release patterns too."""
    body = f"""
        setp.ne.s32 %p1, %r1, 0;
        @%p1 ret;
        mov.u32 %r6, %ctaid.x;
        mov.b32 %r7, 1;
        setp.eq.s32 %p3, %r6, 0;
        @%p3 bra W;
    L:  ld.acquire.gpu.global.b32 %r2, [%rd1 + {64 + place}];
        setp.eq.s32 %p2, %r2, 0;
        @%p2 bra L;
        ld.global.b32 %r2, [%rd1];
        ret;
    W:  st.global.b32 [%rd1], %r7;
        st.{release}.gpu.global.v2.b32 [%rd1 + 64], {{%r7, %r7}};
    """
    outcome = run(body, ctas=2)
    assert outcome.status == "ended"
    found = {f.kind for f in outcome.findings}
    assert found == {f"global write-read other CTA ({kind})" for kind in kinds}


def test_what_never_ends():
    endless = "L: atom.global.relaxed.gpu.add.u32 %r2, [%rd1], {}; bra L;"
    assert run(endless.format(1), most_instructions=10_000).status == "ENDLESS"
    assert run(endless.format(0)).status == "HANG"


def test_a_long_computation_is_no_hang():
    loop = "L: add.s32 %r2, %r2, 1; setp.lt.s32 %p3, %r2, 100000; @%p3 bra L;"
    assert run(loop).status == "ended"


def test_limits():
    with pytest.raises(ValueError, match="16385"):
        run("", ctas=16385)
