"""PTX is translated to the expected words, and unknown PTX is an error that says where."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ptx.instructions import SIMPLE, TABLE
from ptx.parser import parse
from ptx.program import (
    ACQUIRE,
    CG,
    CMP,
    FIELDS,
    NAMES,
    OPS,
    RELAXED,
    RELEASE,
    SCOPE,
    SINK,
    SREGS,
    VOLATILE,
    Program,
    PtxError,
)

HEADER = """\
.version 8.7
.target sm_90a
.address_size 64

.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1
)
.reqntid 128
"""
# 16-bit registers are numbered after those of 32 bits.
DECLARATIONS = """\
	.reg .pred 	%p<4>;
	.reg .b32 	%r<40>;
	.reg .b16 	%rs<4>;
	.reg .b64 	%rd<4>;
	.loc	1 7 5                          // kernel.py:7:5
"""
R, RS, D, P = 44, 40, 4, 4  # counts, except RS, which is the number of %rs0
AT = 17  # line of the first instruction
GPU, SYS = SCOPE["gpu"] << 8, SCOPE["sys"] << 8
BOTH = ACQUIRE | RELEASE
EIGHT = "{%r0, %r1, %r2, %r3, %r4, %r5, %r6, %r7}"
FOUR, OTHERS, TWO = "{%r0, %r1, %r2, %r3}", "{%r4, %r5, %r6, %r7}", "{%r8, %r9}"
HALF_TYPES = "f32.bf16.bf16"


def ptx_of(body: str, *, header: str = HEADER) -> str:
    return f"{header}{{\n{DECLARATIONS}{body}\n\tret;\n}}\n\t.section\t.debug_macinfo\t{{\t}}\n"


def words(program: Program) -> list[tuple[str, list[int], list[int], dict[str, int]]]:
    """Return operation, destinations, sources and other nonzero words, without the two returns."""
    found = []
    for row in program.code[:-2].tolist():
        op, _, _, n_to, to, n_of, of, *others = row
        named = dict(zip(("imm", "flags", "aux", "aux2", "target"), others, strict=True))
        found.append(
            (
                NAMES[op],
                program.pool[to : to + n_to].tolist(),
                program.pool[of : of + n_of].tolist(),
                {name: value for name, value in named.items() if value},
            )
        )
    return found


# A constant is the complement of its index: ~0 is the first one, or False for a predicate.
ONE_WORD = [
    ("add.s32 	%r1, %r2, 7;", "ADD32", [1], [2, ~0], {}),
    ("add.s32 	%r1, %r2, global_smem;", "ADD32", [1], [2, ~0], {}),
    ("shl.b64 	%rd1, %rd2, %r3;", "SHL64", [1], [2, 3], {}),
    ("mad.wide.s32 	%rd1, %r2, 4, %rd3;", "MADWS32", [1], [2, ~0, 3], {}),
    ("selp.b32 	%r1, %r2, 0f3F800000, %p3;", "SELP32", [1], [2, ~0, 3], {}),
    ("mov.pred 	%p1, -1;", "MOVP", [1], [~1], {}),
    # mov
    ("mov.b32 	%r1, global_smem;", "MOV32", [1], [~0], {}),
    ("mov.u16 	%rs1, 0x0;", "MOV32", [RS + 1], [~0], {}),
    ("mov.b64 	%rd1, -9223372036854775808;", "MOV64", [1], [~0], {}),
    ("mov.u32 	%r1, %ctaid.y;", "SREG", [1], [], {"aux": SREGS["%ctaid.y"]}),
    ("mov.b32 	{_, %rs1}, %r2;", "UNPACK32_16", [SINK, RS + 1], [2], {}),
    ("mov.b32 	%r1, {%rs0, %rs1};", "PACK32_16", [1], [40, 41], {}),
    ("mov.u32 	%r1, %laneid;", "SREG", [1], [], {"aux": SREGS["%laneid"]}),
    ("mov.b64 	{%r1, %r2}, %rd3;", "UNPACK64_32", [1, 2], [3], {}),
    ("mov.b64 	%rd1, {%r2, 0};", "PACK64_32", [1], [2, ~0], {}),
    ("mov.b64 	%rd1, {%rs0, %rs1, %rs2, %rs3};", "PACK64_16", [1], [40, 41, 42, 43], {}),
    # parameters
    ("ld.param.b64 	%rd1, [kernel_param_0];", "LDPARAM64", [1], [], {}),
    ("ld.param.b32 	%r1, [kernel_param_1];", "LDPARAM32", [1], [], {"aux": 1}),
    # setp
    ("setp.lt.s64 	%p1, %rd1, 5;", "SETPS64", [1], [1, ~0], {"aux": CMP["lt"]}),
    ("setp.ne.b16 	%p1, %rs1, 0;", "SETPU16", [1], [RS + 1, ~0], {"aux": CMP["ne"]}),
    ("setp.hi.u32 	%p1, %r1, %r2;", "SETPU32", [1], [1, 2], {"aux": CMP["gt"]}),
    ("setp.num.f32 	%p1, %r1, %r2;", "SETPF", [1], [1, 2], {"aux": CMP["num"]}),
    ("setp.gtu.bf16 	%p1, %rs1, %rs1;", "SETPBF16", [1], [41, 41], {"aux": CMP["gtu"]}),
    ("setp.ne.b32 	%p1|%p2, %r1, %r2;", "SETPU32", [1, 2], [1, 2], {"aux": 1}),
    ("setp.ne.and.b32 	%p1, %r1, %r2, %p3;", "SETPU32", [1], [1, 2, 3], {"aux": 1, "aux2": 1}),
    (
        "setp.ne.or.b32 	_|%p1, %r1, 1, !%p3;",
        "SETPU32",
        [SINK, 1],
        [1, ~0, 3],
        {"aux": 1, "aux2": 6},
    ),
    ("setp.gt.and.s32 %p1, %r1, 3, %p1;", "SETPS32", [1], [1, ~0, 1], {"aux": 4, "aux2": 1}),
    ("setp.eq.or.s32 %p1, %r1, -1, %p2;", "SETPS32", [1], [1, ~0, 2], {"aux2": 2}),
    # loads and stores
    ("ld.global.b32 { %r1 }, [ %rd2 + 0 ];", "LDG", [1], [2], {"aux": 4, "aux2": 1 | SYS}),
    (
        "ld.volatile.global.v2.b32 {%r1, %r2}, [%rd2+-8];",
        "LDG",
        [1, 2],
        [2],
        {"imm": -8, "flags": VOLATILE, "aux": 4, "aux2": 2 | SYS},
    ),
    (
        "ld.global.cg.L1::evict_last.b16 %rs1, [%rd2+2];",
        "LDG",
        [RS + 1],
        [2],
        {"imm": 2, "flags": CG, "aux": 2, "aux2": 1 | SYS},
    ),
    (
        "ld.global.gpu.acquire.b32 %r1, [%rd2];",
        "LDG",
        [1],
        [2],
        {"flags": ACQUIRE, "aux": 4, "aux2": 1 | GPU},
    ),
    (
        "ld.shared.b64 	%rd1, [global_smem+16];",
        "LDS",
        [1],
        [~0],
        {"imm": 16, "aux": 8, "aux2": 1 | SYS},
    ),
    (
        "st.shared.v2.b16 [ %r1 + 4 ], { %rs0, %rs1 };",
        "STS",
        [],
        [1, 40, 41],
        {"imm": 4, "aux": 2, "aux2": 2 | SYS},
    ),
    (
        "st.release.gpu.global.b32 [%rd1], 1;",
        "STG",
        [],
        [1, ~0],
        {"flags": RELEASE, "aux": 4, "aux2": 1 | GPU},
    ),
    (
        "ld.relaxed.gpu.global.b16 %rs1, [%rd2+2];",
        "LDG",
        [RS + 1],
        [2],
        {"imm": 2, "flags": RELAXED, "aux": 2, "aux2": 1 | GPU},
    ),
    (
        "ld.relaxed.gpu.global.v2.b32 {%r1, %r2}, [%rd2];",
        "LDG",
        [1, 2],
        [2],
        {"flags": RELAXED, "aux": 4, "aux2": 2 | GPU},
    ),
    (
        "ld.relaxed.gpu.global.L1::no_allocate.v4.b32 {%r1, %r2, _, %r4}, [%rd2+16];",
        "LDG",
        [1, 2, SINK, 4],
        [2],
        {"imm": 16, "flags": RELAXED, "aux": 4, "aux2": 4 | GPU},
    ),
    (
        "st.relaxed.gpu.global.b16 [%rd2+2], %rs1;",
        "STG",
        [],
        [2, RS + 1],
        {"imm": 2, "flags": RELAXED, "aux": 2, "aux2": 1 | GPU},
    ),
    (
        "st.relaxed.gpu.global.v2.b32 [%rd2], {%r1, %r2};",
        "STG",
        [],
        [2, 1, 2],
        {"flags": RELAXED, "aux": 4, "aux2": 2 | GPU},
    ),
    (
        "st.relaxed.gpu.global.v4.b32 [%rd2], {%r1, %r2, %r3, %r4};",
        "STG",
        [],
        [2, 1, 2, 3, 4],
        {"flags": RELAXED, "aux": 4, "aux2": 4 | GPU},
    ),
    (
        "st.global.u32 [%rd2], -1;",
        "STG",
        [],
        [2, ~0],
        {"aux": 4, "aux2": 1 | SYS},
    ),
    # atomics and fences
    (
        "atom.global.gpu.release.add.u32 %r1, [%rd1+4], 1;",
        "ATOM",
        [1],
        [1, ~0],
        {"imm": 4, "flags": RELEASE, "aux2": GPU},
    ),
    (
        "atom.global.acq_rel.sys.cas.b32 _, [%rd1], 0, 1;",
        "ATOM",
        [SINK],
        [1, ~0, ~1],
        {"flags": BOTH, "aux": 7, "aux2": SYS},
    ),
    (
        "red.global.max.s32 [%rd1], %r2;",
        "ATOM",
        [],
        [1, 2],
        {"flags": RELAXED, "aux": 5 | 1 << 8, "aux2": GPU},
    ),
    (
        "atom.global.add.f32 %r1, [%rd1], %r2;",
        "ATOM",
        [1],
        [1, 2],
        {"flags": RELAXED, "aux": 2 << 8, "aux2": GPU},
    ),
    ("fence.acq_rel.gpu;", "FENCE", [], [], {"flags": BOTH, "aux2": GPU}),
    ("fence.release.sys;", "FENCE", [], [], {"flags": RELEASE, "aux2": SYS}),
    ("membar.gl;", "FENCE", [], [], {"flags": BOTH, "aux2": GPU}),
    ("fence.proxy.async.shared::cta;", "FENCEPROXY", [], [], {}),
    # copies
    (
        "cp.async.cg.shared.global [ %r1 + 64 ], [ %rd1 + 32 ], 0x10, %r2;",
        "CPASYNC",
        [],
        [1, 1, 2],
        {"imm": 64, "flags": CG, "aux": 16, "aux2": 32},
    ),
    ("cp.async.ca.shared::cta.global [%r1], [%rd1], 4;", "CPASYNC", [], [1, 1], {"aux": 4}),
    ("cp.async.commit_group;", "CPCOMMIT", [], [], {}),
    ("cp.async.wait_group 2;", "CPWAIT", [], [], {"aux": 2}),
    ("cp.async.wait_all;", "CPWAIT", [], [], {"aux2": 1}),
    # matrices
    (
        "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r1, %r2}, [%r3+32];",
        "LDMATRIX",
        [1, 2],
        [3],
        {"imm": 32, "aux": 2, "aux2": 1},
    ),
    ("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r3], {%r1};", "STMATRIX", [], [3, 1], {"aux": 1}),
    (
        f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {FOUR}, {OTHERS}, {TWO}, {FOUR};",
        "MMA16816",
        [0, 1, 2, 3],
        [4, 5, 6, 7, 8, 9, 0, 1, 2, 3],
        {"aux": 1},
    ),
    (
        f"mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {FOUR}, {TWO}, {{%r4}}, {FOUR};",
        "MMA1684TF32",
        [0, 1, 2, 3],
        [8, 9, 4, 0, 1, 2, 3],
        {"aux": 2},
    ),
    (
        f"wgmma.mma_async.sync.aligned.m64n8k16.{HALF_TYPES} {FOUR}, %rd1, %rd2, %p1, 1, 1, 0, 1;",
        "WGMMA",
        [0, 1, 2, 3],
        [1, 2, 1],
        {"imm": 8, "aux2": 2},
    ),
    (
        f"wgmma.mma_async.sync.aligned.m64n16k8.f32.tf32.tf32 {EIGHT}, {FOUR}, %rd2, 0, 1, 1;",
        "WGMMA",
        [*range(8)],
        [0, 1, 2, 3, 2, ~0],
        {"imm": 16, "flags": 1, "aux": 2},
    ),
    ("wgmma.fence.sync.aligned;", "WGFENCE", [], [], {}),
    ("wgmma.commit_group.sync.aligned;", "WGCOMMIT", [], [], {}),
    ("wgmma.wait_group.sync.aligned 1;", "WGWAIT", [], [], {"aux": 1}),
    # lanes and warps
    ("bar.sync 	0;", "BARSYNC", [], [], {}),
    ("barrier.sync.aligned 1, 64;", "BARSYNC", [], [], {"aux": 1, "aux2": 64}),
    ("bar.warp.sync 	-1;", "BARWARP", [], [~0], {}),
    ("shfl.sync.bfly.b32 	%r1, %r2, 16, 31, -1;", "SHFL", [1], [2, ~0, ~1, ~2], {"aux": 2}),
    ("shfl.sync.idx.b32 	%r1|%p1, %r2, 0, 31, -1;", "SHFL", [1, 1], [2, ~0, ~1, ~2], {"aux": 3}),
    ("redux.sync.min.s32 %r1, %r2, -1;", "REDUX", [1], [2, ~0], {"aux": 4, "aux2": 1}),
    ("vote.sync.ballot.b32 %r1, %p1, -1;", "VOTE", [1], [1, ~0], {}),
    ("vote.sync.any.pred %p1, %p2, -1;", "VOTE", [1], [2, ~0], {"aux": 1}),
    ("activemask.b32 %r1;", "ACTIVEMASK", [1], [], {}),
    ("elect.sync _|%p1, -1;", "ELECT", [SINK, 1], [~0], {}),
    ("nanosleep.u32 20;", "NANOSLEEP", [], [], {}),
    ("trap;", "TRAP", [], [], {}),
    ("exit;", "RET", [], [], {}),
]


@pytest.mark.parametrize(("statement", "operation", "to", "of", "others"), ONE_WORD)
def test_one_word(statement, operation, to, of, others):
    program = parse(ptx_of(f"\t{statement}"))
    assert words(program) == [(operation, to, of, others)]
    assert program.counts == (R, D, P)


@pytest.mark.parametrize("name", SIMPLE)
def test_simple(name):
    operation, kinds = SIMPLE[name]
    names = [f"%{ {'r': 'r', 'd': 'rd', 'p': 'p'}[kind] }{n}" for n, kind in enumerate(kinds[:4])]
    names += ["3"] * (len(kinds) - len(names))
    ((found, to, of, others),) = words(parse(ptx_of(f"{name} {', '.join(names)};")))
    assert (found, to, others) == (operation, [0], {})
    assert of == [1, 2, 3, ~0][: len(kinds) - 1]


def test_table_names_each_instruction_once():
    assert sum(len(names.split()) for _, _, names in TABLE) == len(SIMPLE)
    assert {operation for operation, _, _ in TABLE} <= set(OPS)


def test_several_words():
    """Operations that the engine lacks are composed of others, with temporary registers."""
    mixed = parse(ptx_of("fma.rn.f32.bf16 %r1, %rs1, %rs2, %r3;"))
    assert words(mixed) == [
        ("CVT_F32_BF16", [R], [41], {}),
        ("CVT_F32_BF16", [R + 1], [42], {}),
        ("FMAF", [1], [R, R + 1, 3], {}),
    ]
    assert mixed.counts == (R + 2, D, P)
    load = parse(ptx_of("ld.shared.v2.s32 {%rd1, %r2}, [%r1];"))
    assert words(load) == [
        ("LDS", [R, 2], [1], {"aux": 4, "aux2": 2 | SYS}),
        ("CVT_S64_S32", [1], [R], {}),
    ]
    store = parse(ptx_of("st.global.b16 [%rd1], %rd2;"))
    assert words(store) == [
        ("CVT_32_64", [R], [2], {}),
        ("STG", [], [1, R], {"aux": 2, "aux2": 1 | SYS}),
    ]
    maximum = parse(ptx_of("max.NaN.f32 %r1, %r1, %r2;"))
    assert words(maximum) == [
        ("MAXF", [R], [1, 2], {}),
        ("SETPF", [P], [1, 2], {"aux": CMP["nan"]}),
        ("SELP32", [1], [~0, R, P], {}),
    ]
    assert maximum.const32.tolist() == [0x7FFFFFFF]
    assert maximum.counts == (R + 1, D, P + 1)
    halves = parse(ptx_of("max.bf16 %r1, %r1, %r2;"))
    assert words(halves) == [
        ("CVT_F32_BF16", [R], [1], {}),
        ("CVT_F32_BF16", [R + 1], [2], {}),
        ("MAXF", [R + 2], [R, R + 1], {}),
        ("CVT_BF16_F32", [1], [R + 2], {}),
    ]
    sums = parse(ptx_of("sub.f16x2 %r1, %r1, %r2;"))
    assert words(sums) == [
        ("UNPACK32_16", [R, R + 1], [1], {}),
        ("UNPACK32_16", [R + 2, R + 3], [2], {}),
        ("CVT_F32_F16", [R + 4], [R], {}),
        ("CVT_F32_F16", [R + 5], [R + 2], {}),
        ("SUBF", [R + 6], [R + 4, R + 5], {}),
        ("CVT_F32_F16", [R + 7], [R + 1], {}),
        ("CVT_F32_F16", [R + 8], [R + 3], {}),
        ("SUBF", [R + 9], [R + 7, R + 8], {}),
        ("CVT_F16X2_F32", [1], [R + 9, R + 6], {}),
    ]
    product = parse(ptx_of("fma.rn.bf16 %r1, %r1, %r2, %r3;"))
    assert words(product) == [
        ("CVT_F32_BF16", [R], [1], {}),
        ("CVT_F32_BF16", [R + 1], [2], {}),
        ("CVT_F32_BF16", [R + 2], [3], {}),
        ("FMAF", [R + 3], [R, R + 1, R + 2], {}),
        ("CVT_BF16_F32", [1], [R + 3], {}),
    ]
    pairs = parse(ptx_of("setp.gt.f16x2 %p1|%p2, %r1, %r2;"))
    assert words(pairs) == [
        ("UNPACK32_16", [R, R + 1], [1], {}),
        ("UNPACK32_16", [R + 2, R + 3], [2], {}),
        ("SETPF16", [1], [R, R + 2], {"aux": CMP["gt"]}),
        ("SETPF16", [2], [R + 1, R + 3], {"aux": CMP["gt"]}),
    ]
    narrow = parse(ptx_of("ld.param.b8 %rs1, [kernel_param_1+1];"))
    assert words(narrow) == [
        ("LDPARAM32", [R], [], {"imm": 1, "aux": 1}),
        ("AND32", [RS + 1], [R, ~0], {}),
    ]
    assert narrow.const32.tolist() == [0xFF]
    for program in (mixed, load, store, maximum, halves, sums, product, pairs, narrow):
        assert len(program.code) == len(program.text) == len(program.where) == len(program.line)


def test_constants():
    program = parse(
        ptx_of(
            "add.s32 %r1, 7, -1;\nmov.b32 %r2, 0f3F800000;\nadd.s32 %r3, 0xFFFFFFFF, 4294967295U;\n"
            "mov.b64 %rd1, -1;\nmov.b64 %rd2, 0d3FF0000000000000;\nmov.b64 %rd3, 0x7;"
        )
    )
    assert program.const32.tolist() == [7, 0xFFFFFFFF, 0x3F800000]
    assert program.const64.tolist() == [0xFFFFFFFFFFFFFFFF, 0x3FF0000000000000, 7]
    assert [of for _, _, of, _ in words(program)] == [[~0, ~1], [~2], [~1, ~1], [~0], [~1], [~2]]
    empty = parse(ptx_of(""))
    assert empty.const32.tolist() == empty.const64.tolist() == empty.pool.tolist() == [0]


def test_program():
    """A kernel with a loop, and with inline assembly that has its own registers."""
    program = parse(
        ptx_of(
            """\
$L__BB0_1:                              // =>This Inner Loop Header: Depth=1
	.pragma "nounroll";
	.pragma "used_bytes_mask 0xfff";
	// begin inline asm
	{
	.reg .b32 %r<1>; .reg .pred done;
	mov.u32 %r0, %tid.x; mov.u32 %r1, %r0;
	@!done bra $L__BB0_2; }
	// end inline asm
	.loc	1 8 3
	@%p2 bra 	$L__BB0_1;
$L__BB0_2:
	.file 2 "kernel.py"
	mov.u32 	%r1,
	%r0;"""
        )
    )
    assert (program.name, program.threads) == ("kernel", 128)
    assert program.params == ["kernel_param_0", "kernel_param_1"]
    assert program.labels == {"$L__BB0_1": 0, "$L__BB0_2": 4}
    assert program.counts == (R + 1, D, P + 1)
    assert words(program) == [
        ("SREG", [R], [], {}),
        ("MOV32", [1], [R], {}),
        ("BRA", [], [], {"target": 4}),
        ("BRA", [], [], {}),
        ("MOV32", [1], [0], {}),
    ]
    # guards, and whether they are negated
    assert program.code[:, 1:3].tolist() == [[-1, 0]] * 2 + [[P, 1], [2, 0]] + [[-1, 0]] * 3
    assert program.code.shape == (7, FIELDS)
    assert (program.code.dtype, program.pool.dtype) == (np.int32, np.int32)
    assert (program.const32.dtype, program.const64.dtype) == (np.uint32, np.uint64)
    assert program.code[-1].tolist() == [OPS["RET"], -1, *[0] * (FIELDS - 2)]
    begin = AT + 6
    assert program.line[:-1] == [begin, begin, begin + 1, begin + 4, begin + 7, begin + 9]
    assert program.show(1) == f"ptx:{begin} `mov.u32 %r1, %r0` at kernel.py:7:5"
    assert program.show(3).endswith("`@%p2 bra \t$L__BB0_1` at .loc\t1 8 3")
    assert program.show(6).startswith("ptx:34 `(end)`")
    assert [program.show(pc) for pc in (-1, 7)] == ["pc -1", "pc 7"]


UNKNOWN = [
    # instructions
    ("frobnicate.b32 %r1, %r2;", "not known"),
    ("mul.s32 %r1, %r2, %r3;", "not known"),
    ("add.sat.f32 %r1, %r2, %r3;", "not known"),
    ("add.rz.f32 %r1, %r2, %r3;", "not known"),
    ("mul.ftz.f32 %r1, %r2, %r3;", "not known"),
    ("add.f64 %rd1, %rd2, %rd3;", "not known"),
    ("cvt.rz.bf16.f32 %rs1, %r1;", "not known"),
    ("call.uni %r1;", "not known"),
    ("mbarrier.init.shared.b64 [%r1], 1;", "not known"),
    ("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 64;", "not known"),
    ("wgmma.mma_async.sp.sync.aligned %r1;", "suffix|types"),
    ("bar.arrive 0, 64;", "not known"),
    ("vote.ballot.b32 %r1, %p1;", "not known"),
    # suffixes
    ("add.s32.sat %r1, %r2, %r3;", r"suffix \.sat"),
    ("bra.up $L__BB0_1;", r"suffix \.up"),
    ("ret.uni;", r"suffix \.uni"),
    ("mov.v2.b32 %r1, %r2;", r"suffix \.v2"),
    ("setp.eq.ftz.f32 %p1, %r1, %r2;", r"suffix \.ftz"),
    ("setp.eq.f64 %p1, %rd1, %rd2;", r"type \.f64"),
    ("setp.lt.b32 %p1, %r1, %r2;", r"one of \.eq, \.ne$"),
    ("setp.ltu.s32 %p1, %r1, %r2;", r"one of \.eq"),
    ("ld.param.s16 %rs1, [kernel_param_1];", r"one of \.b16"),
    ("ld.b32 %r1, [%rd1];", r"one of \.shared"),
    ("ld.local.b32 %r1, [%rd1];", r"one of \.shared"),
    ("ld.shared::cluster.b32 %r1, [%r1];", r"one of \.shared"),
    ("ld.global.s16 %rs1, [%rd1];", r"one of \.b16"),
    ("ld.global.cv.b32 %r1, [%rd1];", r"suffix \.cv"),
    ("ld.global.acquire.b32 %r1, [%rd1];", r"one of \.cta, \.gpu, \.sys"),
    ("ld.global.acquire.cluster.b32 %r1, [%rd1];", r"one of \.cta, \.gpu, \.sys"),
    ("ld.volatile.gpu.global.b32 %r1, [%rd1];", r"suffix \.gpu"),
    ("ld.release.gpu.global.b32 %r1, [%rd1];", r"suffix \.release \.gpu"),
    ("ld.global.relaxed.acquire.gpu.b32 %r1, [%rd1];", r"suffix \.acquire"),
    ("ld.shared.cg.b32 %r1, [%r1];", r"suffix \.cg"),
    ("ld.global.L2::cache_hint.b32 %r1, [%rd1], %rd2;", r"suffix \.L2::cache_hint"),
    ("ld.global.L2::128B.b32 %r1, [%rd1];", r"suffix \.L2::128B"),
    ("st.global.acquire.gpu.b32 [%rd1], %r1;", r"suffix \.acquire"),
    ("st.global.wt.b32 [%rd1], %r1;", r"suffix \.wt"),
    ("atom.shared.add.u32 %r1, [%r1], 1;", r"one of \.global"),
    ("atom.global.add.noftz.f16 %rs1, [%rd1], %rs1;", r"one of \.u32"),
    ("atom.global.add.u64 %rd1, [%rd1], %rd2;", r"one of \.u32"),
    ("atom.global.inc.u32 %r1, [%rd1], 1;", r"one of \.add"),
    ("atom.global.add.L2::cache_hint.u32 %r1, [%rd1], 1, %rd2;", r"suffix \.L2::cache_hint"),
    ("red.global.acquire.add.u32 [%rd1], 1;", r"suffix \.acquire"),
    ("red.global.exch.b32 [%rd1], 1;", r"one of \.add"),
    ("fence.acq_rel.cluster;", r"one of \.cta"),
    ("fence.acquire.sync_restrict::shared::cluster.cluster;", r"one of \.cta"),
    ("fence.proxy.alias;", r"one of \.cta"),
    ("fence.proxy.async.global;", r"suffix \.global"),
    ("fence.proxy.tensormap::generic.release.gpu;", r"suffix \.proxy"),
    ("membar.proxy.alias;", r"one of \.cta"),
    ("cp.async.ca.shared.global.L2::128B [%r1], [%rd1], 4;", r"suffix \.L2::128B"),
    ("cp.async.cg.shared.global.L2::cache_hint [%r1], [%rd1], 16, %rd2;", "suffix"),
    ("cp.async.bulk.commit_group;", r"one of \.ca"),
    ("cp.async.mbarrier.arrive.noinc.shared.b64 [%r1];", r"one of \.ca"),
    ("ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r1}, [%r3];", r"one of \.m8n8"),
    ("stmatrix.sync.aligned.m16n8.x1.trans.shared.b8 [%r3], {%r1};", r"one of \.m8n8"),
    (f"mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32 {FOUR};", r"one of \.col"),
    (f"mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {FOUR};", r"one of \.m16n8k16"),
    (f"mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {FOUR};", "types"),
    (f"mma.sync.aligned.m16n8k16.row.col.satfinite.f32.f16.f16.f32 {FOUR};", "suffix"),
    (
        f"wgmma.mma_async.sync.aligned.m64n8k16.f16.f16.f16 {TWO}, %rd1, %rd2, 1, 1, 1, 0, 0;",
        "types",
    ),
    ("wgmma.mma_async.sync.aligned.m64n8k32.f32.f16.f16 %r1;", r"one of \.m64n8k16"),
    ("wgmma.fence.sync.aligned.acquire;", r"suffix \.acquire"),
    ("barrier.sync 0;", r"one of \.aligned"),
    ("bar.sync.aligned 0;", r"suffix \.aligned"),
    ("shfl.sync.bfly.b64 %r1, %r2, 16, 31, -1;", r"one of \.b32"),
    ("redux.sync.min.f32 %r1, %r2, -1;", r"one of \.u32, \.s32"),
    ("redux.sync.max.abs.u32 %r1, %r2, -1;", r"suffix \.abs"),
    ("vote.sync.uni.pred %p1, %p2, -1;", r"one of \.ballot"),
    ("setp;", "types"),
    # operands
    ("add.s32 %r1, %r2;", "2 operands, not 3"),
    ("add.s32 %r1, %r2, %r99;", "%r99 is neither"),
    ("add.s32 %r1, %r2, %rd1;", "%rd1 is a register of 64 bits, not"),
    ("add.s32 %r1, %r2, foo;", "foo is neither"),
    ("add.s32 %r1, %r2, 010;", "010 is neither"),
    ("add.s32 %r1, %r2, 4294967296;", "more than 32 bits"),
    ("add.s64 %rd1, %rd2, 0f3F800000;", "0f3F800000 is neither"),
    ("add.s32 7, %r2, %r3;", "7 is not a register"),
    ("add.s32 _, %r2, %r3;", "_ is not a register"),
    ("add.s32 %r1, _, %r3;", "_ is neither"),
    ("@%r1 add.s32 %r1, %r2, %r3;", "%r1 is a register of at most 32 bits, not a predicate"),
    ("mov.b32 {%rs1, %rs2, %rs3}, %r1;", "3 elements"),
    ("mov.b16 {%rs1, %rs2}, %rs3;", "2 elements"),
    ("mov.u64 %rd1, %globaltimer;", "%globaltimer is neither"),
    ("mov.u64 %rd1, %clock;", "%clock has 32 bits"),
    ("setp.eq.s32 %p1|%p2|%p3, %r1, %r2;", "more than two"),
    ("setp.eq.and.s32 %p1, %r1, %r2;", "3 operands, not 4"),
    ("setp.eq.s32 %p1, %r1, %r2, %p2;", "4 operands, not 3"),
    ("selp.b32 %r1, %r2, %r3, !%p1;", "!%p1 is neither"),
    ("ld.param.b32 %r1, [kernel_param_2];", "no parameter kernel_param_2"),
    ("ld.param.b64 %rd1, [kernel_param_0+4];", "offset 4"),
    ("ld.global.b32 %r1, [%rd1+2147483648];", "offset 2147483648"),
    ("st.shared.b32 [%r1+-2147483649], %r1;", "offset -2147483649"),
    ("cp.async.ca.shared.global [%r1], [%rd1+2147483648], 4;", "offset 2147483648"),
    ("ld.global.nc.b32 %r1, [%rd1];", "suffix .nc is not known"),
    ("ld.global.b32 %r1, %rd1;", "%rd1 is not an address"),
    ("ld.global.b32 %r1, [%rd1+%r1];", "not an address"),
    ("ld.global.b32 %r1, [%r1];", "%r1 is a register of at most 32 bits, not"),
    ("ld.global.v2.b32 {%r1}, [%rd1];", "1 elements, not 2"),
    ("ld.shared.v8.b32 %r1, [%r1];", "32 bytes"),
    ("cp.async.ca.shared.global [%r1], [%rd1], 12;", "12 bytes"),
    ("cp.async.cg.shared.global [%r1], [%rd1], 8;", "8 bytes"),
    ("cp.async.ca.shared.global [%r1], [%rd1], 4, %p1;", "%p1 is a predicate"),
    ("cp.async.wait_group -1;", "negative"),
    ("cp.async.wait_group %r1;", "%r1 is not an integer"),
    ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2}, [%r3];", "2 elements, not 4"),
    (f"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {FOUR}, {TWO}, {TWO}, {FOUR};", "2 elem"),
    (
        f"wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {FOUR}, %rd1, %rd2, 1, -1, 1;",
        "negated",
    ),
    (
        f"wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {FOUR}, %rd1, %rd2, 1, 1, 1, 1;",
        "transposed",
    ),
    (
        f"wgmma.mma_async.sync.aligned.m64n8k16.{HALF_TYPES} {FOUR}, %rd1, %rd2, 1, 1, 1, 0, 2;",
        "by 0 or 1",
    ),
    (
        f"wgmma.mma_async.sync.aligned.m64n16k16.{HALF_TYPES} {FOUR}, %rd1, %rd2, 1, 1, 1, 0, 0;",
        "not 8",
    ),
    ("bar.sync 16;", "no barrier 16"),
    ("bar.sync %r1;", "%r1 is not an integer"),
    ("bar.sync 1, 48;", "48 threads"),
    ("elect.sync %r1, -1;", "not a register and a predicate"),
    ("bra $L__BB0_9;", r"no label \$L__BB0_9"),
    ("bra.uni $L__BB0_9;", r"no label \$L__BB0_9"),
    # directives
    ('.pragma "unroll 4";', "not known"),
    (".local .align 8 .b8 __local_depot0[8];", "not known"),
    (".branchtargets $L__BB0_1;", "not known"),
    (".reg .b128 %rq<2>;", r"type \.b128"),
    (".reg .b32 %r[2];", "not the name"),
    (".reg .b32 %r<2>;", "another register %r0"),
    # structure
    ("here: here:", "another label"),
    ("here: { here: } here:", "another label"),
    ("add.s32 %r1, %r2, %r3\n\t.loc 1 9 9\n;", "no ; ends it"),
]


@pytest.mark.parametrize(("statement", "problem"), UNKNOWN, ids=[one for one, _ in UNKNOWN])
def test_unknown(statement, problem):
    opcode = re.sub(r"^@\S+ ", "", statement).split()[0].strip(":;")
    with pytest.raises(PtxError) as caught:
        parse(ptx_of(f"\t{statement}"))
    message = str(caught.value)
    start = f"ptx:{AT} {opcode} at kernel.py:7:5: "
    assert message.startswith(start)
    assert re.search(problem, message.removeprefix(start))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (".visible .entry kernel", ".visible .func kernel", "one kernel is expected, not none"),
        (".version 8.7", ".visible .entry other(\n)", "one kernel is expected, not other, kernel"),
        (".param .u32 kernel", ".param .align 8 .b8 kernel", "ptx:8 .param .align 8 .b8 kernel"),
        (".u32 kernel_param_1", ".b8 kernel_param_1[8]", r"ptx:8 .param .b8 kernel_param_1\[8\]"),
        (".reqntid 128", ".reqnctapercluster 2", "ptx:10 .reqnctapercluster 2 at kernel"),
        (".reqntid 128", ".maxnreg 128", "ptx:6 .entry at kernel: there is no .reqntid"),
        (".reqntid 128", ".reqntid 16, 8", "ptx:10 .reqntid 16, 8 at kernel: not known"),
    ],
)
def test_unknown_header(old, new, problem):
    assert HEADER.count(old) == 1
    with pytest.raises(PtxError, match=problem):
        parse(ptx_of("", header=HEADER.replace(old, new)))


def test_known_header():
    header = HEADER.replace(".reqntid 128\n", ".reqntid 64, 1, 1\n.maxnreg 168 // registers\n")
    assert parse(ptx_of("", header=header)).threads == 64


@pytest.mark.parametrize(
    ("before", "behind", "problem"),
    [
        (".global .align 4 .b8 text[4];", "", "ptx:6 .global .align 4 .b8 text[4];: not known"),
        (".extern .shared .align 4 .b8 own[];", "", "ptx:6 .extern .shared .align 4 .b8 own[];: n"),
        ("// comment", ".func other() {", "ptx:22 .func other() {: not known"),
        ("// comment", ".section .text { }", "ptx:22 .section .text { }: not known"),
    ],
)
def test_unknown_outside(before, behind, problem):
    header = HEADER.replace(".visible", f"{before}\n.visible")
    text = ptx_of("", header=header)
    with pytest.raises(PtxError, match=re.escape(problem)):
        parse(text + behind)


def test_known_outside():
    files = '\t.file\t1 "/a//b.py"\n\t.file\t2 "/c.py"\n'
    section = "\t.section\t.debug_str\n\t{\n$L__1:\n.b8 104 // }\n\t}\n"
    parse(f"//\n{ptx_of('')}{files}{section}")


def test_unfinished_kernel():
    text = ptx_of("").partition("\n}\n")[0]
    with pytest.raises(PtxError, match=r"ptx:18 } at kernel.py:7:5: the kernel does not end"):
        parse(text)
    with pytest.raises(PtxError, match=r"ptx:18 add at kernel.py:7:5: the kernel does not end"):
        parse(f"{text} add")


# Waits for a word, as inline assembly with local names that are the same in every copy.
WAIT = """\
	// begin inline asm
	{
	.reg .pred any, gone; .reg .b32 x, t<2>;
AGAIN:
	ld.relaxed.gpu.global.b32 x, [%rd1];
	setp.eq.s32 any, x, -1;
	@!any bra DONE;
	@gone bra $L__END;
	bra AGAIN;
DONE:
	mov.b32 %r0, x; }
	// end inline asm
"""


def test_one_block_several_times():
    """Each copy of inline assembly has its own registers and labels."""
    program = parse(ptx_of(f"{WAIT}{WAIT}DONE:\n{WAIT}\tbra DONE;\n$L__END:"))
    copies = 3
    assert program.counts == (R + 3 * copies, D, P + 2 * copies)
    assert program.labels == {"DONE": 12, "$L__END": 19}
    *blocks, back = words(program)
    for n in range(copies):
        x, (any_, gone), first = R + 3 * n, (P + 2 * n, P + 2 * n + 1), 6 * n
        assert blocks[first : first + 6] == [
            ("LDG", [x], [1], {"flags": RELAXED, "aux": 4, "aux2": 1 | GPU}),
            ("SETPS32", [any_], [x, ~0], {}),
            ("BRA", [], [], {"target": first + 5}),
            ("BRA", [], [], {"target": 19}),
            ("BRA", [], [], {"target": first} if n else {}),
            ("MOV32", [0], [x], {}),
        ]
        assert program.code[first + 2 : first + 4, 1:3].tolist() == [[any_, 1], [gone, 0]]
    assert back == ("BRA", [], [], {"target": 12})


def test_blocks_in_blocks():
    """A name refers to the innermost block that defines it, even further down."""
    program = parse(
        ptx_of(
            """\
	{ .reg .b32 x;
	{ .reg .b32 x; L: bra M; bra L; mov.b32 x, 1; { bra L; bra N; } M: }
	L: bra L; mov.b32 x, 2; }
	N: bra N;"""
        )
    )
    assert [(name, to, more.get("target", 0)) for name, to, _, more in words(program)] == [
        ("BRA", [], 5),  # M
        ("BRA", [], 0),  # the inner L
        ("MOV32", [R + 1], 0),
        ("BRA", [], 0),
        ("BRA", [], 7),  # N
        ("BRA", [], 5),  # the outer L
        ("MOV32", [R], 0),
        ("BRA", [], 7),
    ]


def test_label_of_a_block_ends_with_it():
    with pytest.raises(PtxError, match=r"ptx:18 bra at kernel\.py:7:5: there is no label INSIDE"):
        parse(ptx_of("{ INSIDE: trap; }\n\tbra INSIDE;"))
    with pytest.raises(PtxError, match=r"ptx:17 INSIDE at .*: there is another label"):
        parse(ptx_of("{ INSIDE: INSIDE: }"))


def test_register_of_a_scope_ends_with_it():
    with pytest.raises(
        PtxError, match=r"ptx:17 mov\.u32 at kernel\.py:7:5: %own is not a register"
    ):
        parse(ptx_of("{ .reg .b32 %own; mov.u32 %own, 0; } mov.u32 %own, 0;"))


def test_operation_that_the_engine_has_not(monkeypatch):
    monkeypatch.delitem(OPS, "TRAP")
    with pytest.raises(PtxError, match=r"ptx:17 trap at .*: the engine has no operation TRAP"):
        parse(ptx_of("trap;"))
