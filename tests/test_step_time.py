"""The simulator of a time step, on loops whose time is known and on small kernels.

Its times for real kernels have not been compared with a GPU here; the expected error is
`step_time.ERROR`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastrnn.bench import sass, step_known, step_time
from fastrnn.bench.sass import Instruction
from fastrnn.bench.step_known import BENCHMARKS
from fastrnn.bench.step_time import DEVICES, Step

ROOT = Path(__file__).resolve().parent.parent
_TOOLS = ("ptxas", "nvdisasm")
_WARPS = 8

# A minimal step of a persistent kernel: wait for 16 bytes per thread, compute three dependent
# products, publish.
_FRAME = """.version 8.0
.target sm_{capability}
.address_size 64
.visible .entry kernel(.param .u64 in, .param .u64 out, .param .u32 count) {{
.reg .b32 a<4>,i; .reg .b64 p,q; .reg .f32 c<4>; .reg .pred x,y;
.shared .align 16 .b8 buffer[1024];
ld.param.u64 p,[in]; ld.param.u64 q,[out]; ld.param.u32 i,[count];
mov.f32 c0,0f00000000; mov.f32 c1,c0; mov.f32 c2,c0; mov.f32 c3,c0;
STEP: .pragma "nounroll";
{body}
add.u32 i,i,-1; setp.ne.u32 y,i,0; @y bra STEP;
ret;
}}"""
_LOAD = "ld.relaxed.gpu.global.v4.u32 {a0,a1,a2,a3},[p]; setp.eq.u32 x,a0,-1;"
_POLL = f"POLL: {_LOAD} @x bra POLL;"
_MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
    "{c0,c1,c2,c3},{a0,a1,a2,a3},{a1,a2},{c0,c1,c2,c3};"
)
_STORE = "st.relaxed.gpu.global.f32 [q],c0;"
_SMALL = "\n".join((_POLL, "bar.sync 0;", _MMA, _MMA, _MMA, _STORE))


@pytest.fixture(scope="module", autouse=True)
def _with_tools() -> None:
    for name in _TOOLS:
        try:
            sass.tool(name)
        except FileNotFoundError as error:
            pytest.skip(str(error))


def assembled(body: str, device: str = "h100") -> bytes:
    ptx = _FRAME.format(capability=step_known.CAPABILITIES[device], body=body)
    return step_known.assemble(ptx, device)


@pytest.fixture(scope="module")
def small() -> bytes:
    return assembled(_SMALL)


def instruction(name: str, line: str = "", goal: int | None = None) -> Instruction:
    return Instruction(0, "@P0" if goal is not None else "", name, "", 1, 7, 7, (), line, goal)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "benchmark_", BENCHMARKS, ids=lambda b: f"{b.name}-{b.chains}-{b.num_warps}"
)
def test_known_loops(benchmark_, device):
    """Within 2 % of the known time, plus the overhead of a loop iteration."""
    least, most = benchmark_.bounds(device)
    assert least <= step_known.run_benchmark(benchmark_, device) <= most


def test_counts_of_a_small_kernel(small):
    step = step_time.simulate(small, "h100", _WARPS, constants={"visible": 0})
    assert (step.barriers, step.polls, step.chain, step.matrix) == (1, 1, 3, 3)
    assert step.l2_bytes == _WARPS * 32 * 16
    assert step.shared_bytes == step.dram_bytes == 0


def test_time_of_a_small_kernel(small):
    """An L2 round trip, three products of 24 cycles, a barrier; under 60 cycles for the rest."""
    step = step_time.simulate(small, "h100", 1, constants={"visible": 0})
    known = 262 + 3 * 24 + 22
    assert known < step.least <= step.cycles <= step.most < known + 60


def test_data_that_come_later_cost_turns_of_the_poll(small):
    soon, late = (
        step_time.simulate(small, "h100", _WARPS, constants={"visible": visible})
        for visible in (0, 900)
    )
    assert late.polls > soon.polls
    assert late.l2_bytes > soon.l2_bytes
    assert late.cycles > soon.cycles + 600
    # Two alternating tiles: each one's data arrive while the other is computed.
    hidden = step_time.simulate(small, "h100", _WARPS, tiles=2, constants={"visible": 900})
    assert soon.cycles < hidden.cycles < late.cycles - 300


def test_steps_of_a_turn(small):
    turn = step_time.simulate(small, "h100", _WARPS)
    half = step_time.simulate(small, "h100", _WARPS, steps=2)
    assert half == Step(*(n / 2 for n in turn))._replace(chain=turn.chain)
    unrolled = assembled(f"{_SMALL}\n{_SMALL.replace('POLL', 'AGAIN')}")
    assert sass.time_loop(sass.read(unrolled)).steps == 2
    assert sass.time_loop(sass.read(unrolled), tiles=2).steps == 1


def test_programs_share_l2(small):
    alone, many = (step_time.simulate(small, "h100", _WARPS, programs=n) for n in (1, 1000))
    assert many.cycles > alone.cycles + 1000


def test_a_kernel_without_a_time_loop():
    body = f"ld.global.v4.u32 {{a0,a1,a2,a3}},[p]; {_MMA} st.global.f32 [q],c0;"
    cubin = assembled(body, "a100")
    once, often = (step_time.simulate(cubin, "a100", 4, trips=n) for n in (1, 5))
    assert (once.matrix, often.matrix) == (1, 5)
    assert often.dram_bytes == 5 * once.dram_bytes == 5 * 4 * 32 * 16
    assert often.cycles > 4 * once.cycles


def test_a_loop_that_might_not_run_does():
    code = [
        instruction("BRA", goal=2),
        instruction("BRA", goal=4)._replace(predicate=""),
        instruction("HMMA"),
        instruction("BRA", goal=2),
        instruction("EXIT"),
    ]
    loop = sass.straight(code, 7)
    assert [i.predicate for i in loop.code] == ["", "", "", "@P0", ""]
    assert loop.repeats == {3: 6}


def test_jumps_by_a_predicate_of_all_threads():
    """As ptxas emits them for sm_100 and sm_120."""
    high = f"{'':50}/* 0x000fe20000000000 */"
    rows = [
        ".L_x_1:",
        "        /*0000*/  @P1 LDG.E.128.STRONG.GPU R4, [R2.64] ;  /* 0x0000000402047981 */",
        high,
        "        /*0010*/  BRA.U !UP0, `(.L_x_1) ;  /* 0x0000000100f87547 */",
        high,
    ]
    load, jump = sass._parsed("\n".join(rows))
    assert (load.predicate, load.goal, jump.predicate, jump.goal) == ("@P1", None, "@!UP0", 0)
    assert sass.back_edges([load, jump]) == [(0, 1)]


def test_the_same_again(small):
    first, second = (step_time.explain(small, "h100", _WARPS) for _ in range(2))
    assert first == second
    assert first.step == step_time.simulate(small, "h100", _WARPS)


def test_where_a_step_goes(small):
    explained = step_time.explain(small, "h100", _WARPS, constants={"visible": 0})
    assert sum(explained.causes.values()) == pytest.approx(explained.step.cycles)
    assert sum(explained.lines.values()) == pytest.approx(explained.step.cycles)
    assert max(explained.causes, key=explained.causes.__getitem__) == "poll: L2"
    assert 2 * 24 <= explained.causes["HMMA chain"] <= 3 * 26


def test_a_barrier_that_not_all_warps_reach():
    """Warps that find the data at once skip it."""
    body = f"{_LOAD} @!x bra DONE; {_POLL} bar.sync 0;\nDONE: {_MMA} {_STORE}"
    with pytest.raises(RuntimeError, match="a barrier that not all warps reach"):
        step_time.simulate(assembled(body), "h100", _WARPS, constants={"visible": 60})


def test_what_is_not_known_is_refused(small):
    with pytest.raises(ValueError, match="no constant latency"):
        step_time.simulate(small, "h100", _WARPS, constants={"latency": 1})
    with pytest.raises(ValueError, match="no constants of 'b200'"):
        step_time.simulate(small, "b200", _WARPS)
    with pytest.raises(ValueError, match="no loop"):
        sass.time_loop([])


def test_stores_that_publish():
    """Strong stores; otherwise those in a publishing function; otherwise the first."""
    load, end = instruction("LDG.E.STRONG.SYS"), instruction("BRA", goal=0)
    plain, named = instruction("STG.E", "a.py:1 save"), instruction("STG.E", "a.py:3 publish_state")
    strong = instruction("STG.E.STRONG.GPU", "a.py:1 save")
    assert sass.time_loop([load, plain, named, strong, end]).publish == {3}
    assert sass.time_loop([load, plain, named, end]).publish == {2}
    assert sass.time_loop([load, plain, plain, end]).publish == {1}


def test_command_line(small, tmp_path, capsys):
    path = tmp_path / "small.cubin"
    path.write_bytes(small)
    assert step_time.main([str(path), "--lines", "2", "--set", "visible=0", "lat_l2=162"]) == 0
    text = capsys.readouterr().out
    step = step_time.simulate(small, "h100", 8, constants={"visible": 0, "lat_l2": 162})
    assert f"small.cubin: {step.cycles:.0f} cycles a step" in text
    assert "poll: L2" in text
    with pytest.raises(SystemExit):
        step_time.main([str(path), "--set", "latency=1"])


@pytest.mark.long
def test_a_kernel_of_ours():
    """Compiled in another process: this one may run with TRITON_INTERPRET."""
    code = """
import json
from fastrnn.bench import compiled, step_time
problem = ("lstm", "training", "bfloat16", "tf32", 256, "h100")
variant = compiled.Variant(*problem, "persistent", 16, 16, 32, 8, 1)
cubin = compiled.compile_variant(variant).asm["cubin"]
print(json.dumps(step_time.simulate(cubin, "h100", variant.num_warps)))
"""
    environ = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=environ,
    )  # fmt: skip
    step = Step(*json.loads(done.stdout))
    assert step.least <= step.cycles <= step.most
    assert 1000 < step.cycles < 5000
    assert step.polls >= 1
    assert step.barriers == 1
    assert step.l2_bytes >= 16 * 256 * 2  # all of h
    assert min(step.chain, step.matrix, step.shared_bytes) > 0
