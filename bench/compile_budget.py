"""Compile every kernel that the model may choose, for GPUs that are not there, and check it.

Triton's wheel has all it takes. A launch on meta tensors gives the arguments of a real one; what
ptxas or LLVM made of them says whether registers spill, shared memory suffices, matrix
instructions are used and loads are wide. ``python -m fastrnn.bench.compile_budget`` writes a row
for each kernel and exits with 1 if one breaks a budget.

The *time loop* is the longest range of instructions that ends with a jump back to its start; of a
stepwise kernel, which is one step, it is all. The first poll of an exchange is peeled off its loop,
so that the two count together.
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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .. import _arguments
from ..cells import CELLS
from ..kernels import configs, launch, persistent, stepwise
from . import terminal

DEVICES = ("a100", "h100", "b200", "mi300x")
FAULTS = ("spills", "shared memory", "no matrix instructions", "narrow exchange", "narrow loads")

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}

# The grid. Other activations of the RNN compile as tanh does, and float16 as bfloat16. Of cells
# that are an LSTM and something more, fewer sizes.
_CELLS = ("lstm", "gru", "rnn_tanh", "peephole_lstm", "slstm")
_LARGE_CELLS = ("peephole_lstm", "slstm")
_RUNS = (
    *("inference", "training", "backward", "recompute"),
    *("training marked", "backward marked", "training fresh", "backward fresh"),
)
_PRODUCTS = (("bfloat16", "tf32"), ("float32", "tf32"), ("float32", "ieee"), ("float32", "tf32x3"))
_HIDDEN = (1, 7, 64, 100, 128, 129, 192, 256, 384, 512, 640, 768, 1024, 1408, 2048)
_MORE = (100, 129, 384, 512, 2048)
_COMMON = (64, 256, 1024)
_BATCH = (1, 16, 64, 128)


class Variant(NamedTuple):
    """What decides which code is compiled; the last fields are those of `configs.Config`.

    In 'training', forward saves what 'backward' reads; 'recompute' is backward from the gates. What
    is 'marked' has lengths, resets or truncated gradients; 'fresh' also states after a reset, and
    gradients of the traces.
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


class Use(NamedTuple):
    """The batch sizes of the grid for which a variant is chosen, and the model's best time."""

    batches: tuple[int, ...]
    step_us: float


class Measured(NamedTuple):
    """What a compiler made of a variant.

    Attributes
    ----------
    registers, spilled : int
        Registers, and bytes of stack, of a thread. These kernels spill to it and nothing else.
    shared_memory : int
        Bytes of a program.
    matrix, ldsm, lds, barriers : int
        Instructions in the time loop: matrix products of a warp (HMMA, MFMA), of four (HGMMA) or
        of a program (tcgen05), loads of matrices and others from shared memory.
    exchange_loads, other_loads : str
        Bytes that instructions in the time loop load for a thread, such as ``8 16``. Loads of the
        exchange are volatile; others are of wx, and of activations, states and dy backward.
    triton : str
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


FIELDS = (*Variant._fields, "batch", *Measured._fields, "step_us", "broken")


def plan(devices: Sequence[str] = DEVICES, *, quick: bool = False) -> dict[Variant, Use]:
    """List every variant that `configs.choose` picks over a grid of problems.

    Parameters
    ----------
    devices : sequence of str
    quick : bool
        Three hidden sizes only.

    Returns
    -------
    dict of Variant to Use
        Sorted.
    """
    found: dict[Variant, Use] = {}
    for problem in itertools.product(devices, _CELLS, _RUNS, _PRODUCTS, _HIDDEN, _BATCH, (1, 2)):
        name, cell, run, (dtype, precision), hidden, batch, directions = problem
        few = quick or cell in _LARGE_CELLS
        if not _in_grid(name, run, dtype, precision, hidden, few):
            continue
        if cell in _LARGE_CELLS and name != "h100" and dtype != "bfloat16":
            continue
        itemsize = _DTYPES[dtype].itemsize
        shape = configs.Shape.of(CELLS[cell], batch, hidden, directions, itemsize, precision)
        choice = configs.choose(shape, configs.DEVICES[name], backward=_is_backward(run))
        assert choice is not None  # stepwise takes everything
        variant = Variant(cell, run, dtype, precision, hidden, name, *choice.config[:6])
        batches, step_us = found.get(variant, ((), choice.step_us))
        found[variant] = Use(tuple(sorted({*batches, batch})), min(step_us, choice.step_us))
    return dict(sorted(found.items()))


def _in_grid(device: str, run: str, dtype: str, precision: str, hidden: int, few: bool) -> bool:
    common = hidden in _COMMON
    if configs.DEVICES[device].target == "hip" and precision == "tf32x3":
        return False  # triton 3.6 to 3.9 refuse it for gfx942
    if run == "inference":  # training less some stores
        return common and device == "h100" and precision == "tf32"
    if run == "recompute" or _is_marked(run):  # the others plus some loads
        return common and device == "h100" and dtype == "bfloat16"
    if few or common:
        return common
    # The choice differs between devices and precisions by what fits: fewer sizes will do.
    if device == "h100":
        return dtype == "bfloat16" or hidden in _MORE
    return dtype == "bfloat16" and hidden in _MORE


def _is_marked(run: str) -> bool:
    return run.endswith(("marked", "fresh"))


def _is_backward(run: str) -> bool:
    return run.startswith(("backward", "recompute"))


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
    loop = _time_loop(code) if variant.schedule != "stepwise" else [name for name, _ in code]
    loads = [(_width(name), "STRONG.SYS" in name) for name in loop if _LOAD.match(name)]
    return Measured(
        registers,
        spilled,
        compiled.metadata.shared,
        matrix=_count(r"HMMA|HGMMA|UTC.?MMA|v_mfma", loop),
        ldsm=_count(r"LDSM", loop),
        lds=_count(r"LDS\b|ds_(read|load)", loop),
        barriers=_count(r"BAR\b|s_barrier", loop),
        exchange_loads=_distinct(width for width, volatile in loads if volatile),
        other_loads=_distinct(width for width, volatile in loads if not volatile),
        triton=triton.__version__,
    )


def _compile(variant: Variant, target: GPUTarget) -> Any:
    """Compile the kernel of a launch with the types, constants and options that it would have."""
    kernel, arguments = _recorded(variant)
    if target.backend == "hip":
        arguments.pop("maxnreg", None)
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[Any]] = {}

    def kind(value: Any, path: tuple[int, ...], is_constant: bool) -> Any:
        """The type of an argument, or of a part of a tuple, that is found by `path`."""
        if is_constant or value is None:
            constants[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(kind(part, (*path, j), False) for j, part in enumerate(value))
        if not isinstance(value, torch.Tensor):
            return "i32"
        attributes[path] = [["tt.divisibility", 16]]
        return _POINTERS[value.dtype]

    for i, parameter in enumerate(kernel.params):
        value = arguments.pop(parameter.name)
        signature[parameter.name] = kind(value, (i,), parameter.is_constexpr)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=arguments)


def _recorded(variant: Variant) -> tuple[Any, dict[str, Any]]:
    """The kernel that a launch would run, and its arguments, on meta tensors."""
    cell, hidden, steps, batch = CELLS[variant.cell], variant.hidden_size, 2, variant.block_b

    def tensor(*sizes: int, dtype: torch.dtype = _DTYPES[variant.dtype]) -> torch.Tensor:
        return torch.empty(*sizes, dtype=dtype, device="meta")

    config = configs.Config(*variant[6:], tiles=1)
    y = tensor(steps, batch, hidden)
    r = tensor(1, cell.n_gates * hidden, hidden)
    gates = tensor(1, steps, batch, cell.n_gates * hidden)
    states = [tensor(1, batch, hidden)] * cell.n_states
    module = stepwise if variant.schedule == "stepwise" else persistent
    name = "backward_kernel" if _is_backward(variant.run) else "forward_kernel"
    kernel = getattr(module, name)
    way, _, flow = variant.run.partition(" ")
    operands = launch.Operands(
        r,
        tensor(1, cell.n_gates * hidden),
        tensor(1, cell.n_extra * hidden) if cell.n_extra else None,
        states,
        tensor(1, steps, batch, dtype=torch.uint8) if flow else None,
        states if flow == "fresh" else (),
        tensor(1, batch, cell.n_gates * hidden) if flow == "fresh" else None,
    )
    with mock.patch.object(module, name, mock.MagicMock()) as stand_in:
        if _is_backward(way):
            saved = tensor(1, steps, batch, cell.n_saved * hidden)
            traces = [tensor(*y.shape, dtype=torch.float32)] * (cell.n_states - 1)
            past = launch.Past(y, traces, (saved,) if way == "backward" else (gates, gates))
            given = y, states, [y] * (cell.n_states - 1) if flow == "fresh" else []
            launch.backward(cell, config, variant.precision, operands, past, given)
        else:
            keep = {"traced": way == "training", "save": way == "training"}
            launch.forward(cell, config, variant.precision, gates, operands, **keep)
    return kernel, dict(stand_in.__getitem__.return_value.call_args.kwargs)


# An instruction's name, and for a jump the place in the list that it goes to.
_Code = list[tuple[str, "int | None"]]


def _read_cubin(cubin: bytes) -> tuple[int, int, _Code]:
    """Registers, bytes of stack, code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-res-usage", "-sass", file.name]
        text = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@\S+ )?([A-Z][\w.]*)(.*?);", text, re.M)
    places = {int(address, 16): n for n, (address, _, _) in enumerate(lines)}
    code: _Code = []
    for _, name, operands in lines:
        goal = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        code.append((name, places.get(int(goal[1], 16)) if goal else None))
    return int(usage[1]), int(usage[2]), code


def _read_amdgcn(text: str) -> tuple[int, int, _Code]:
    """As `_read_cubin`, of assembler text."""
    values = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size): +(\d+)", text))
    places: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for label, name, operands in re.findall(r"^(?:(\.L\w+):|\t([a-z]\w+)(.*))", text, re.M):
        if label:
            places[label] = len(lines)
        else:
            lines.append((name, operands.strip()))
    code = [(name, places.get(goal) if "branch" in name else None) for name, goal in lines]
    return int(values["vgpr_count"]), int(values["private_segment_fixed_size"]), code


def _time_loop(code: _Code) -> list[str]:
    first, last = max(
        ((goal, n) for n, (_, goal) in enumerate(code) if goal is not None),
        key=lambda jump: jump[1] - jump[0],
    )
    return [name for name, _ in code[first : last + 1]]


_LOAD = re.compile(r"LDG|(global|buffer)_load")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "U8": 1}
_WIDTHS |= {"dwordx4": 16, "dwordx2": 8, "ushort": 2, "short": 2, "ubyte": 1}


def _width(name: str) -> int:
    return next((_WIDTHS[part] for part in re.split(r"[._]", name) if part in _WIDTHS), 4)


def _count(pattern: str, names: Iterable[str]) -> int:
    return sum(bool(re.match(pattern, name)) for name in names)


def _distinct(numbers: Iterable[int]) -> str:
    return " ".join(map(str, sorted(set(numbers))))


def broken(variant: Variant, measured: Measured) -> list[str]:
    """Say which budgets a variant breaks.

    The tiles of kernels with marks are those of kernels without, of which the largest leave no
    register to spare: two or four words of a thread may be on its stack.

    A load is 16 bytes wide, or as wide as a thread's share of the tile; only where rows start at
    multiples of 16 bytes. wx of three or four gates is one tile (see ``tiles.py``), and so are
    the activations backward.

    Parameters
    ----------
    variant : Variant
    measured : Measured

    Returns
    -------
    list of str
        Of `FAULTS`.
    """
    device, itemsize = configs.DEVICES[variant.device], _DTYPES[variant.dtype].itemsize
    config = configs.Config(*variant[6:], tiles=1)
    aligned = device.target == "cuda" and variant.hidden_size * itemsize % 16 == 0
    tile = config.block_b * config.block_h
    block_s = configs.block_s(config, -(-variant.hidden_size // config.block_h))
    received = (
        tile * block_s * 4
        if _is_backward(variant.run)
        else config.block_b * config.block_k * itemsize
    )
    others = tile * (1 if CELLS[variant.cell].n_gates == 1 else 4) * itemsize
    threads = 32 * config.num_warps
    # Backward also reads states, whose tile is smaller: the widest counts.
    faults = (
        measured.spilled > (16 if _is_marked(variant.run) else 0),
        measured.shared_memory > device.shared_memory,
        measured.matrix == 0 and variant.precision != "ieee",
        aligned
        and config.schedule == "persistent"
        and min(_numbers(measured.exchange_loads)) < min(16, received // threads),
        aligned and max(_numbers(measured.other_loads)) < min(16, others // threads),
    )
    return [name for name, fault in zip(FAULTS, faults, strict=True) if fault]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split()] or [0]


@terminal.printing()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if a variant breaks a budget, else 0."""
    parser = argparse.ArgumentParser(prog="python -m fastrnn.bench.compile_budget")
    parser.add_argument("--devices", nargs="+", choices=DEVICES, default=DEVICES)
    parser.add_argument(
        "--out", type=terminal.path, default=Path("bench/results/compile_budget.csv")
    )
    parser.add_argument("--jobs", type=_arguments.positive, default=2, help="processes")
    parser.add_argument("--quick", action="store_true", help="three hidden sizes only")
    parser.add_argument(
        "--missing", action="store_true", help="compile only what the file has no row of"
    )
    args = parser.parse_args(argv)
    planned = plan(args.devices, quick=args.quick)
    known = _known(args.out) if args.missing else {}
    missing = [variant for variant in planned if _key(variant) not in known]
    measured = measure_all(missing, args.jobs)
    rows = []
    with args.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        for variant, use in planned.items():
            row = known.get(_key(variant)) or _row(variant, use, next(measured))
            rows.append(row)
            writer.writerow(row)
            file.flush()
        next(measured, None)  # ends the progress bar
    _print_summary(rows)
    return int(any(row[-1] for row in rows))


def _key(variant: Variant) -> tuple[str, ...]:
    return tuple(map(str, variant))


def _row(variant: Variant, use: Use, measured: Measured) -> list[str]:
    faults = ", ".join(broken(variant, measured))
    batches = " ".join(map(str, use.batches))
    return [*map(str, (*variant, batches, *measured)), f"{use.step_us:.3g}", faults]


def _known(path: Path) -> dict[tuple[str, ...], list[str]]:
    """The rows of a file."""
    with path.open(encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file)
    return {tuple(row[: len(Variant._fields)]): row for row in rows}


def measure_all(variants: Sequence[Variant], jobs: int) -> Iterator[Measured]:
    """Compile variants in several processes, with a progress bar.

    Parameters
    ----------
    variants : sequence of Variant
    jobs : int

    Yields
    ------
    Measured
        In the order of `variants`.
    """
    _arguments.require("bench", "rich")
    from rich.console import Console
    from rich.progress import track

    # A fork of a process with threads, as torch's is, may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        results = pool.map(measure, variants)
        yield from track(results, "", len(variants), console=Console(stderr=True))


def _print_summary(rows: Sequence[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    headers = ("device", "variants", "most registers", *FAULTS)
    table = Table(*headers, title="compiled kernels", title_justify="left")
    named = [dict(zip(FIELDS, row, strict=True)) for row in rows]
    for name in dict.fromkeys(row["device"] for row in named):
        of_device = [row for row in named if row["device"] == name]
        counts = Counter(fault for row in of_device for fault in row["broken"].split(", "))
        most = max(int(row["registers"]) for row in of_device)
        numbers = (len(of_device), most, *(counts[fault] for fault in FAULTS))
        table.add_row(name, *map(str, numbers))
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    Console(width=None if is_terminal else 120).print(table)


if __name__ == "__main__":
    sys.exit(main())
