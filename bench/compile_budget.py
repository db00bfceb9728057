"""Compile every kernel that the model may choose, for GPUs that are not there, and check it.

Triton's wheel has all it takes. A launch on meta tensors gives the arguments of a real one; what
ptxas or LLVM made of them says whether registers spill, shared memory suffices, matrix
instructions are used and loads are wide. ``python -m fastrnn.bench.compile_budget`` writes a row
for each kernel and exits with 1 if one breaks a budget.

The *time loop* is the longest range of instructions that ends with a jump back to its start; a
kernel without one counts as a whole. The first poll of an exchange is peeled off its loop, so that
the two count together. The loop of a stepwise kernel is the one over K.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .. import _arguments
from ..kernels import configs, launch, persistent, stepwise
from ..kernels.cells import CELLS

DEVICES = ("a100", "h100", "b200", "mi300x")

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}

# The grid. Other activations of the RNN compile as tanh does, and float16 as bfloat16.
_CELLS = ("lstm", "gru", "rnn_tanh")
_RUNS = ("inference", "training", "backward", "recompute")
_PRODUCTS = (("bfloat16", "tf32"), ("float32", "tf32"), ("float32", "ieee"), ("float32", "tf32x3"))
_HIDDEN = (1, 7, 64, 100, 128, 129, 192, 256, 384, 512, 640, 768, 1024, 1408, 2048)
_COMMON = (64, 256, 1024)
_BATCH = (1, 16, 64, 128)


class Variant(NamedTuple):
    """What decides which code is compiled.

    Attributes
    ----------
    cell : str
    run : {'inference', 'training', 'backward', 'recompute'}
        'training' saves what 'backward' reads; 'recompute' is backward from the gates.
    dtype, precision : str
    hidden_size : int
    device : str
    schedule, protocol, block_b, block_h, block_k, num_warps
        As in `configs.Config`.
    """

    cell: str
    run: str
    dtype: str
    precision: str
    hidden_size: int
    device: str
    schedule: str
    protocol: str
    block_b: int
    block_h: int
    block_k: int
    num_warps: int

    @property
    def config(self) -> configs.Config:
        """For a launch of one batch tile."""
        return configs.Config(*self[6:], tiles=1)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return _DTYPES[self.dtype].itemsize


class Planned(NamedTuple):
    """A variant, the batch sizes of the grid for which it is chosen, and the model's best time."""

    variant: Variant
    batches: tuple[int, ...]
    step_us: float


class Measured(NamedTuple):
    """What a compiler made of a variant.

    Attributes
    ----------
    registers : int
        Of a thread.
    spilled : int
        Bytes of a thread's stack, which these kernels use for nothing else.
    shared_memory : int
        Bytes of a program.
    matrix : int
        Matrix instructions in the time loop: of a warp (HMMA, MFMA), of four warps (HGMMA) or of
        a program (tcgen05).
    ldsm, lds, barriers : int
        Loads of matrices and others from shared memory, and barriers, in the time loop.
    exchange_loads, other_loads : str
        How many bytes instructions load for a thread, such as ``8 16``, in the time loop. Those
        of the exchange are volatile; others are of wx forward, of activations, states and dy
        backward.
    triton : str
        Version.
    """

    registers: int
    spilled: int
    shared_memory: int
    matrix: int
    ldsm: int
    lds: int
    barriers: int
    exchange_loads: str
    other_loads: str
    triton: str


def plan(devices: Sequence[str] = DEVICES, *, quick: bool = False) -> list[Planned]:
    """List every variant that `configs.choose` picks over a grid of problems.

    Parameters
    ----------
    devices : sequence of str
    quick : bool
        Three hidden sizes only.

    Returns
    -------
    list of Planned
        Sorted.
    """
    found: dict[Variant, tuple[set[int], float]] = {}
    for problem in itertools.product(devices, _CELLS, _RUNS, _PRODUCTS, _HIDDEN, _BATCH, (1, 2)):
        name, cell, run, (dtype, precision), hidden, batch, directions = problem
        if _left_out(name, run, dtype, precision, hidden, quick):
            continue
        itemsize = _DTYPES[dtype].itemsize
        shape = configs.Shape(CELLS[cell].n_gates, batch, hidden, directions, itemsize, precision)
        backward = run in ("backward", "recompute")
        choice = configs.choose(shape, configs.DEVICES[name], backward=backward)
        assert choice is not None  # stepwise takes everything
        variant = Variant(cell, run, dtype, precision, hidden, name, *choice.config[:6])
        batches, step_us = found.get(variant, (set(), choice.step_us))
        found[variant] = batches | {batch}, min(step_us, choice.step_us)
    return [Planned(v, tuple(sorted(b)), us) for v, (b, us) in sorted(found.items())]


def _left_out(device: str, run: str, dtype: str, precision: str, hidden: int, quick: bool) -> bool:
    common = hidden in _COMMON
    if configs.DEVICES[device].target == "hip" and precision == "tf32x3":
        return True  # triton 3.6 to 3.9 refuse it for gfx942
    if run == "inference":  # training less some stores
        return not (common and device == "h100" and precision == "tf32")
    if run == "recompute":
        return not (common and device == "h100" and dtype == "bfloat16")
    # Where code differs between devices, it differs at common sizes.
    return not common and (quick or (device != "h100" and dtype != "bfloat16"))


def measure(variant: Variant) -> Measured:
    """Compile a variant and count what is in it.

    Parameters
    ----------
    variant : Variant

    Returns
    -------
    Measured
    """
    device = configs.DEVICES[variant.device]
    if device.target == "hip":
        compiled = _compile(variant, GPUTarget("hip", f"gfx{device.capability}", 64))
        registers, spilled, code = _read_amdgcn(compiled.asm["amdgcn"])
    else:
        compiled = _compile(variant, GPUTarget("cuda", device.capability, 32))
        registers, spilled, code = _read_cubin(compiled.asm["cubin"])
    loop = _time_loop(code)
    counts = {kind: sum(bool(re.match(p, name)) for name in loop) for kind, p in _KINDS.items()}
    loads = [(int(width), name) for name in loop if (width := _width(name))]
    return Measured(
        registers,
        spilled,
        compiled.metadata.shared,
        exchange_loads=_distinct(width for width, name in loads if "STRONG.SYS" in name),
        other_loads=_distinct(width for width, name in loads if "STRONG.SYS" not in name),
        triton=triton.__version__,
        **counts,
    )


_KINDS = {
    "matrix": r"HMMA|HGMMA|UTC.?MMA|v_mfma",
    "ldsm": r"LDSM",
    "lds": r"LDS\b|ds_(read|load)",
    "barriers": r"BAR\b|s_barrier",
}


def _compile(variant: Variant, target: GPUTarget) -> Any:
    """Compile the kernel of a launch with the types and constants that it would have."""
    kernel, arguments = _recorded(variant)
    names = [parameter.name for parameter in kernel.params]
    signature: dict[str, Any] = {}
    aligned: list[tuple[int, ...]] = []
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            aligned.append((i,))
        elif isinstance(value, tuple):
            signature[parameter.name] = tuple(_POINTERS[part.dtype] for part in value)
            aligned += [(i, j) for j in range(len(value))]
        else:
            signature[parameter.name] = "i32"
    constants = {name: arguments[name] for name in names if signature[name] == "constexpr"}
    options = {name: value for name, value in arguments.items() if name not in names}
    if target.backend == "hip":
        options.pop("maxnreg", None)
    attributes = {path: [["tt.divisibility", 16]] for path in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options)


def _recorded(variant: Variant) -> tuple[Any, Mapping[str, Any]]:
    """The kernel that a launch would run, and its arguments, on meta tensors."""
    cell, hidden, steps, batch = CELLS[variant.cell], variant.hidden_size, 2, variant.block_b

    def tensor(*sizes: int, dtype: torch.dtype = _DTYPES[variant.dtype]) -> torch.Tensor:
        return torch.empty(*sizes, dtype=dtype, device="meta")

    y = tensor(steps, batch, hidden)
    r = tensor(1, cell.n_gates * hidden, hidden)
    gates = tensor(1, steps, batch, cell.n_gates * hidden)
    states = [tensor(1, batch, hidden)] * cell.n_states
    calls: list[tuple[Any, Mapping[str, Any]]] = []
    with mock.patch.multiple(
        launch, persistent=_Recorder(persistent, calls), stepwise=_Recorder(stepwise, calls)
    ):
        if variant.run in ("inference", "training"):
            training = variant.run == "training"
            launch.forward(
                cell, gates, r, tensor(1, cell.n_gates * hidden), states, variant.config,
                variant.precision, traced=training, save=training,
            )  # fmt: skip
        else:
            saved = tensor(1, steps, batch, cell.n_saved * hidden)
            traces = [tensor(steps, batch, hidden, dtype=torch.float32)] * (cell.n_states - 1)
            launch.backward(
                cell, y, states, r, states, y, traces,
                saved if variant.run == "backward" else (gates, gates),
                variant.config, variant.precision,
            )  # fmt: skip
    return calls[0]


class _Recorder:
    """In place of a module of kernels: notes launches and does not make them."""

    def __init__(self, module: Any, calls: list[tuple[Any, Mapping[str, Any]]]) -> None:
        self._module, self._calls = module, calls

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self._module, name)

        class Launcher:
            def __getitem__(_, grid: Any) -> Any:
                return lambda **arguments: self._calls.append((kernel, arguments))

        return Launcher()


# An instruction's name, and for a jump the place in the list that it goes to.
_Code = list[tuple[str, "int | None"]]


def _read_cubin(cubin: bytes) -> tuple[int, int, _Code]:
    """Registers, bytes of stack, code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_TOOLS / "cuobjdump", "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(.*?);", text, re.M)
    place = {int(address, 16): n for n, (address, _, _) in enumerate(lines)}
    code: _Code = []
    for _, name, operands in lines:
        goal = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        code.append((name, place.get(int(goal[1], 16)) if goal else None))
    return int(usage[1]), int(usage[2]), code


def _read_amdgcn(text: str) -> tuple[int, int, _Code]:
    """As `_read_cubin`, of assembler text."""
    values = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size): +(\d+)", text))
    names: list[tuple[str, str]] = []
    place = {}
    for label, name, operands in re.findall(r"^(?:(\.L\w+):|\t([a-z]\w+)(.*))", text, re.M):
        if label:
            place[label] = len(names)
        else:
            names.append((name, operands.strip()))
    code = [(name, place.get(operands) if "branch" in name else None) for name, operands in names]
    return int(values["vgpr_count"]), int(values["private_segment_fixed_size"]), code


def _time_loop(code: _Code) -> list[str]:
    loops = [(n - goal, goal) for n, (_, goal) in enumerate(code) if goal is not None and goal < n]
    length, first = max(loops, default=(len(code), 0))
    return [name for name, _ in code[first : first + length + 1]]


def _width(name: str) -> int:
    """Bytes that an instruction loads from global memory for a thread; 0 for other ones."""
    if name.startswith(("LDG", "global_load", "buffer_load")):
        sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "dwordx4": 16, "dwordx3": 12}
        sizes |= {"dwordx2": 8, "ushort": 2, "short": 2, "ubyte": 1}
        return next((sizes[part] for part in re.split(r"[._]", name) if part in sizes), 4)
    return 0


def _distinct(numbers: Iterable[int]) -> str:
    return " ".join(map(str, sorted(set(numbers))))


def broken(variant: Variant, measured: Measured) -> list[str]:
    """Say which budgets a variant breaks.

    A load is 16 bytes wide, or as wide as a thread's share of the tile; only rows that start at
    multiples of 16 bytes allow that. wx of three or four gates is one tile (see ``tiles.py``), and
    so is what backward reads of them.

    Parameters
    ----------
    variant : Variant
    measured : Measured

    Returns
    -------
    list of str
    """
    device = configs.DEVICES[variant.device]
    found = []
    if measured.spilled:
        found.append("spills")
    if measured.shared_memory > device.shared_memory:
        found.append("shared memory")
    if not measured.matrix and variant.precision != "ieee":
        found.append("no matrix instructions")
    if device.target == "cuda" and variant.hidden_size * variant.itemsize % 16 == 0:
        config = variant.config
        backward = variant.run in ("backward", "recompute")
        tile = config.block_b * config.block_h
        if config.schedule == "persistent":
            slices = -(-variant.hidden_size // config.block_h)
            received = tile * configs.block_s(config, slices) * 4
            if not backward:
                received = config.block_b * config.block_k * variant.itemsize
            if _narrow(measured.exchange_loads.split()[:1], received, config):
                found.append("narrow exchange")
        tiles = 1 if CELLS[variant.cell].n_gates == 1 else 4
        # Backward also reads states, whose tile is smaller: the widest counts.
        if _narrow(measured.other_loads.split()[-1:], tiles * tile * variant.itemsize, config):
            found.append("narrow wx")
    return found


def _narrow(widths: Sequence[str], tile_bytes: int, config: configs.Config) -> bool:
    share = tile_bytes // (32 * config.num_warps)
    return not widths or int(widths[0]) < min(16, share)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional

    Returns
    -------
    int
        1 if a variant breaks a budget, else 0.
    """
    parser = argparse.ArgumentParser(prog="python -m fastrnn.bench.compile_budget")
    parser.add_argument(
        "--devices",
        nargs="+",
        choices=DEVICES,
        default=DEVICES,
        metavar="DEVICE",
        help=f"of {', '.join(DEVICES)} (default: all)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bench/results/compile_budget.csv"),
        metavar="FILE",
        help="default: %(default)s",
    )
    parser.add_argument("--jobs", type=_arguments.positive, default=2, help="default: 2")
    parser.add_argument("--quick", action="store_true", help="three hidden sizes only")
    args = parser.parse_args(argv)
    planned = plan(args.devices, quick=args.quick)
    rows = []
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        for (variant, batches, step_us), measured in zip(
            planned, _measure_all([p.variant for p in planned], args.jobs), strict=True
        ):
            faults = broken(variant, measured)
            rows.append((variant, measured, faults))
            writer.writerow(
                (
                    *variant,
                    " ".join(map(str, batches)),
                    *measured,
                    f"{step_us:.3g}",
                    ", ".join(faults),
                )
            )
            file.flush()
    _print_summary(rows)
    return int(any(faults for _, _, faults in rows))


#: Columns of the file.
FIELDS = (*Variant._fields, "batch", *Measured._fields, "step_us", "broken")


def _measure_all(variants: Sequence[Variant], jobs: int) -> Iterator[Measured]:
    from rich.console import Console
    from rich.progress import track

    # Forked processes of one with threads, as torch's are, may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        results = pool.map(measure, variants)
        yield from track(results, "", len(variants), console=Console(stderr=True))


def _print_summary(rows: Sequence[tuple[Variant, Measured, list[str]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="compiled variants", title_justify="left", header_style="bold")
    faults = ("spills", "shared memory", "no matrix instructions", "narrow exchange", "narrow wx")
    for header in ("device", "variants", "most registers", *faults):
        table.add_column(header, justify="left" if header == "device" else "right")
    for device in dict.fromkeys(variant.device for variant, _, _ in rows):
        mine = [
            (measured, faults) for variant, measured, faults in rows if variant.device == device
        ]
        counts = Counter(fault for _, faults in mine for fault in faults)
        table.add_row(
            device,
            str(len(mine)),
            str(max(m.registers for m, _ in mine)),
            *(str(counts[fault]) for fault in faults),
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    sys.exit(main())
