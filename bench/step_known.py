"""Check the simulator of a step on small loops whose time is known.

``python -m fastrnn.bench.step_known`` compares it with published figures, or with the compiler's
stall counts. Most of these return the constants that were put in: they show that control words are
read and applied correctly.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from . import sass, terminal
from .step_time import DEVICES, simulate


class Benchmark(NamedTuple):
    """A loop of dependent instructions.

    Attributes
    ----------
    name, body : str
        Of the instruction, in SASS and in PTX.
    chains, copies, num_warps : int
        Independent chains, instructions of each per iteration, warps.
    h100, a100 : float
        Cycles per instruction, as published or according to the compiler's stall counts.
    overhead : float
        Extra cycles that an iteration of the loop may take.
    """

    name: str
    body: str
    chains: int
    copies: int
    num_warps: int
    h100: float
    a100: float
    overhead: float = 30

    def bounds(self, device: str) -> tuple[float, float]:
        """Return the bounds for a simulation: 2 % off, plus the overhead of the loop."""
        known: float = getattr(self, device)
        overhead = self.overhead / (self.copies * self.chains)
        return 0.98 * known, 1.02 * known + overhead


_MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{0}}},{{a0,a1,a2,a3}},{{a1,a2}},{{{0}}};"
)
_LDSM = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {a0,a1,a2,a3},[a0];"
BENCHMARKS = (
    Benchmark("LDS", "ld.shared.u32 a0,[a0];", 1, 16, 1, 24, 24),  # Huerta
    Benchmark("LDSM.x4", _LDSM, 1, 16, 1, 29, 29),  # Sun et al.
    Benchmark("LDSM.x4", _LDSM, 1, 16, 8, 32, 32),  # 512 bytes at 128 per cycle, for 8 warps
    Benchmark("LDG.STRONG", "ld.relaxed.gpu.global.u64 q,[q];", 1, 16, 1, 260, 221),  # Study, MT4G
    Benchmark("MUFU", "ex2.approx.ftz.f32 f0,f0;", 1, 16, 1, 20, 20),  # accel-sim
    Benchmark("FFMA", "fma.rn.f32 f0,f0,f1,f1;", 1, 16, 1, 4, 4),  # stalls
    Benchmark("FADD", "add.f32 f0,f0,f1;", 1, 1, 1, 29, 29, overhead=0),  # Study, with its loop
    Benchmark("BAR", "bar.sync 0;", 1, 16, 1, 22, 22),  # estimate
    Benchmark("HMMA", _MMA, 1, 8, 1, 24, 24),  # stalls
    Benchmark("HMMA", _MMA, 8, 8, 1, 6, 8),  # stalls
    Benchmark("HMMA", _MMA, 8, 8, 8, 12, 16),  # two warps on each sub-core
)

_FRAME = """.version 8.0
.target sm_{capability}
.address_size 64
.visible .entry kernel(.param .u64 out, .param .u32 count) {{
.reg .b32 a<4>,i; .reg .b64 q,p; .reg .f32 f<2>,c<32>; .reg .pred x;
ld.param.u64 p,[out]; mov.u64 q,p; ld.param.u32 i,[count];
mov.u32 a0,i; add.u32 a1,i,1; add.u32 a2,i,2; add.u32 a3,i,3;
cvt.rn.f32.u32 f0,i; add.f32 f1,f0,0f3f800000;
{start}
LOOP: .pragma "nounroll";
{body}
add.u32 i,i,-1; setp.ne.u32 x,i,0; @x bra LOOP;
st.global.u32 [p],a0; st.global.u64 [p+8],q; st.global.f32 [p+16],f0;
{end}
ret;
}}"""


def run_benchmark(benchmark: Benchmark, device: str) -> float:
    """Compile a benchmark and simulate it.

    Parameters
    ----------
    benchmark : Benchmark
    device : str

    Returns
    -------
    float
        Cycles per instruction.
    """
    chains = [",".join(f"c{4 * c + n}" for n in range(4)) for c in range(benchmark.chains)]
    bodies = [
        benchmark.body.format(c) if benchmark.name == "HMMA" else benchmark.body for c in chains
    ]
    ptx = _FRAME.format(
        capability=CAPABILITIES[device],
        start="".join(f"mov.f32 c{n},f0;" for n in range(32)),
        body="\n".join(bodies * benchmark.copies),
        end="".join(f"st.global.f32 [p+{32 + 4 * n}],c{n};" for n in range(32)),
    )
    step = simulate(assemble(ptx, device), device, benchmark.num_warps)
    return step.cycles / benchmark.copies / benchmark.chains


CAPABILITIES = {"h100": 90, "a100": 80}


def assemble(ptx: str, device: str) -> bytes:
    """Assemble a cubin with the ptxas that ships with Triton.

    Parameters
    ----------
    ptx : str
    device : str

    Returns
    -------
    bytes
    """
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        command = [
            str(sass.tool("ptxas")),
            *(f"-arch=sm_{CAPABILITIES[device]}", str(source), "-o", str(cubin)),
        ]
        subprocess.run(command, capture_output=True, check=True)
        return cubin.read_bytes()


@terminal.printing()
def main() -> int:
    """Print the benchmarks.

    Returns
    -------
    int
        1 if any is outside its bounds, else 0.
    """
    status = 0
    print("cycles per instruction:  simulated, known, and allowed with loop overhead")
    for device in DEVICES:
        for benchmark in BENCHMARKS:
            cycles = run_benchmark(benchmark, device)
            least, most = benchmark.bounds(device)
            is_known = least <= cycles <= most
            status |= not is_known
            name, _, chains, copies, num_warps, *_ = benchmark
            print(
                f"{device} {name:10} {chains} x {copies:2}, {num_warps} warps: {cycles:6.1f}"
                f"  {getattr(benchmark, device):4}  up to {most:.1f}{'' if is_known else '  OFF'}"
            )
    return status


if __name__ == "__main__":
    sys.exit(main())
