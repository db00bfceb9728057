"""Compile every kernel that can be chosen, for GPUs that need not be present, and check the code.

The output of ptxas or LLVM shows whether registers spill, shared memory suffices, matrix
instructions are used, loads are wide, and how the programs of a persistent kernel exchange data.
``python -m fastrnn.bench.compile_budget`` writes a row for each kernel and exits with 1 if any
breaks a budget; with ``--steps`` it generates the table from which kernels are chosen, see
``step_table.py``.

The *time loop* is the longest range of instructions that ends with a jump back to its start. For a
stepwise kernel, which is one step, and the launches of a staged one, it is the whole kernel.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton

from .. import _arguments
from ..cells import CELLS
from ..kernels import configs
from . import compiled, sass, step_table, step_time, terminal
from .compiled import DTYPES, Variant, problem

DEVICES = ("a100", "h100", "b200", "rtx5090", "mi300x")
FAULTS = (
    *("spills", "shared memory", "no matrix instructions", "narrow exchange", "narrow loads"),
    *("barriers", "round trip"),
)

# The grid. Other activations of the RNN compile like tanh, and float16 like bfloat16. Cells that
# extend an LSTM get fewer sizes, for one device; the newest devices, whose code differs little from
# that for sm_90, get fewer sizes.
_CELLS = ("lstm", "gru", "rnn_tanh", "peephole_lstm", "slstm")
_LARGE_CELLS = ("peephole_lstm", "slstm")
_NEWEST = ("b200", "rtx5090")
_RUNS = (
    *("inference", "training", "backward", "recompute"),
    *("training marked", "backward marked", "training fresh", "backward fresh"),
)
_PRODUCTS = (("bfloat16", "tf32"), ("float32", "tf32"), ("float32", "ieee"), ("float32", "tf32x3"))
_HIDDEN = (1, 7, 64, 100, 128, 129, 192, 256, 384, 512, 768, 1024, 2048)
_MORE = (100, 129, 384, 512, 2048)
_MORE_OF_FLOAT32 = (129, 512)
_COMMON = (64, 256, 1024)
_BATCH = (1, 16, 64, 128)
_NOISED = ("lstm", "gru")
_NOISE = ("training noisy", "backward noisy", "training fresh noisy", "backward fresh noisy")
_NOISY = (("resident", 64), ("resident", 128), ("persistent", 512), ("stepwise", 512))

# Cells whose step is more than a product and arithmetic on single units, and hidden sizes for their
# schedules; the last is the longest row of a normalized cell that a program can hold.
_INVOLVED = ("layernorm_lstm", "layernorm_gru", "gru_reset_before")
_STAGED = (1, 64, 129, 256, 1024, 4096)
_RESIDENT = (64, 128)


class Use(NamedTuple):
    """Batch sizes of the grid for which a variant is chosen, and its best simulated time."""

    batches: tuple[int, ...]
    step_us: float


class Measured(NamedTuple):
    """What a compiler made of a variant.

    `alone` to `shared_bytes` describe a simulated step, or a launch of a stepwise kernel: for plain
    runs on devices that the simulator supports; otherwise they are NaN.

    Attributes
    ----------
    registers, spilled : int
        Registers and bytes of stack per thread. These kernels use the stack for spills only.
    shared_memory : int
        Bytes per program.
    turn : int
        Steps of a tile per iteration of a persistent kernel's time loop; otherwise 1.
    matrix, ldsm, lds, barriers : int
        Instructions in the time loop: matrix products of a warp (HMMA, MFMA), of four (HGMMA) or of
        a program (tcgen05); matrix loads and other loads from shared memory; barriers.
    exchange_loads, other_loads : str
        Bytes per thread of the load instructions in the time loop, such as ``8 16``. Loads of the
        exchange are relaxed; others load wx and, backward, activations, states and dy.
    alone, full : float
        Cycles; see `compiled.simulated`.
    executed_barriers, chain, l2_bytes, shared_bytes : float
        Per step, with the group alone on the GPU; see `step_time.Step`.
    triton : str
    """

    registers: int
    spilled: int
    shared_memory: int
    turn: int
    matrix: int
    ldsm: int
    lds: int
    barriers: int
    exchange_loads: str
    other_loads: str
    alone: float
    full: float
    executed_barriers: float
    chain: float
    l2_bytes: float
    shared_bytes: float
    triton: str


FIELDS = (*Variant._fields, "batch", *Measured._fields, "step_us", "broken")


def plan(devices: Sequence[str] = DEVICES, *, quick: bool = False) -> dict[Variant, Use]:
    """List every variant that `configs.choose` picks over a grid of problems.

    Parameters
    ----------
    devices : sequence of str
    quick : bool
        Three hidden sizes only, for plain layers.

    Returns
    -------
    dict of Variant to Use
        Sorted.
    """
    found: dict[Variant, Use] = {}
    for some, batch, directions in itertools.product(_problems(devices, quick), _BATCH, (1, 2)):
        choice = configs.choose(
            some.shape(batch, directions),
            some.gpu,
            backward=some.is_backward,
            schedule=some.schedule or None,
        )
        if choice is None:
            assert some.schedule  # stepwise and staged accept everything
            continue
        for variant in some.launches(choice.config):
            batches, step_us = found.get(variant, ((), choice.step_us))
            found[variant] = Use(tuple(sorted({*batches, batch})), min(step_us, choice.step_us))
    return dict(sorted(found.items()))


def _problems(devices: Sequence[str], quick: bool) -> Iterator[Variant]:
    """Generate the grid without batch sizes; a schedule is set where it is not left to choose."""
    for name in devices:
        for cell, run, product, hidden in itertools.product(_CELLS, _RUNS, _PRODUCTS, _HIDDEN):
            few = quick or cell in _LARGE_CELLS or name in _NEWEST
            is_large_elsewhere = cell in _LARGE_CELLS and name != "h100"
            if _in_grid(name, run, *product, hidden, few) and not is_large_elsewhere:
                yield problem(cell, run, *product, hidden, name)
        for cell, run, (schedule, hidden) in itertools.product(_NOISED, _NOISE, _NOISY):
            if name == "h100" or (cell == "lstm" and run in _NOISE[:2] and hidden == 512):
                some = problem(cell, run, "bfloat16", "tf32", hidden, name)
                yield some._replace(schedule=schedule)
        for (cell, option, dtype, precision), hiddens, schedule in _involved(name):
            for way, hidden in itertools.product(("training", "backward"), hiddens):
                some = problem(cell, f"{way} {option}".strip(), dtype, precision, hidden, name)
                yield some._replace(schedule=schedule)


def _involved(device: str) -> Iterator[tuple[tuple[str, str, str, str], tuple[int, ...], str]]:
    """Generate layers whose step is more than a product and arithmetic on single units: cell,
    options, dtype and precision; hidden sizes; schedule.
    """
    half, single = ("bfloat16", "tf32"), ("float32", "tf32")
    for cell in _INVOLVED:
        yield (cell, "", *half), _RESIDENT, "resident"
    if device != "h100":
        for cell in ("layernorm_lstm", "gru_reset_before"):
            yield (cell, "", *half), (1024,), "staged"
        return
    for cell, projected in (*((cell, "") for cell in _INVOLVED), ("lstm", "projected")):
        yield (cell, projected, *half), _STAGED, "staged"
        yield (cell, f"{projected} fresh noisy".strip(), *half), (256,), "staged"
    for cell in _INVOLVED:
        yield (cell, "fresh noisy", *half), _RESIDENT, "resident"
        yield (cell, "", *single), _RESIDENT, "resident"
    yield ("layernorm_lstm", "fresh noisy", *half), (4096,), "staged"
    yield ("layernorm_lstm", "", *single), (256, 4096), "staged"
    yield ("layernorm_lstm", "", "float64", "ieee"), (256, 2048), "staged"
    yield ("lstm", "", "float64", "ieee"), (256,), "staged"
    for product in (single, ("float32", "ieee"), ("float32", "tf32x3")):
        yield ("lstm", "projected", *product), (256,), "staged"


def _in_grid(device: str, run: str, dtype: str, precision: str, hidden: int, few: bool) -> bool:
    common = hidden in _COMMON
    if configs.DEVICES[device].target == "hip" and precision == "tf32x3":
        return False  # triton 3.6 to 3.9 reject it for gfx942
    if run == "inference":  # training minus some stores
        return common and device == "h100" and precision == "tf32"
    if run == "recompute" or run.endswith(("marked", "fresh")):  # the other runs plus some loads
        return common and device == "h100" and dtype == "bfloat16"
    if few or common:
        return common
    # The choice differs between devices and precisions only by what fits: fewer sizes suffice.
    if device == "h100":
        return dtype == "bfloat16" or hidden in _MORE_OF_FLOAT32
    return dtype == "bfloat16" and hidden in _MORE


def measure(variant: Variant) -> Measured:
    """Compile a variant, count its instructions, and simulate it.

    Parameters
    ----------
    variant : Variant

    Returns
    -------
    Measured
    """
    kernel = compiled.compile_variant(variant)
    turn = 1
    if variant.gpu.target == "hip":
        registers, spilled, code = _read_amdgcn(kernel.asm["amdgcn"])
        is_loop = variant.schedule in _ALL_AT_ONCE
        names = _time_loop(code) if is_loop else [name for name, _ in code]
    else:
        registers, spilled = compiled.resources(kernel.asm["cubin"])
        instructions = sass.read(kernel.asm["cubin"])
        if variant.schedule in _ALL_AT_ONCE:
            loop = sass.time_loop(instructions, tiles=variant.tiles)
            instructions = [loop.code[n] for n in loop.places]
            turn = loop.steps * variant.tiles
        names = [instruction.name for instruction in instructions]
    loads = [(_width(name), "STRONG" in name) for name in names if _LOAD.match(name)]
    is_plain = not variant.has("marked", "fresh", "noisy") and not variant.is_involved
    is_simulated = variant.device in step_time.DEVICES and is_plain
    return Measured(
        registers,
        spilled,
        kernel.metadata.shared,
        turn,
        _count(r"HMMA|HGMMA|UTC.?MMA|v_mfma", names),
        _count(r"LDSM", names),
        _count(r"LDS\b|ds_(read|load)", names),
        _count(r"BAR\b|s_barrier", names),
        _distinct(width for width, is_exchange in loads if is_exchange),
        _distinct(width for width, is_exchange in loads if not is_exchange),
        *(_simulated(variant, kernel) if is_simulated else _NOTHING),
        triton=triton.__version__,
    )


_NOTHING = (math.nan,) * 6
_ALL_AT_ONCE = ("resident", "persistent")


def _simulated(variant: Variant, kernel: Any) -> tuple[float, float, float, float, float, float]:
    alone, full = compiled.simulated(variant, kernel)
    others = alone.barriers, alone.chain, alone.l2_bytes, alone.shared_bytes
    return alone.cycles, full.cycles, *others


# The name of an AMD instruction, and for a jump the index of its target.
_Code = list[tuple[str, "int | None"]]


def _read_amdgcn(text: str) -> tuple[int, int, _Code]:
    """Parse registers, bytes of stack, and code."""
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
    """Return the budgets that a variant breaks.

    Resident and stepwise kernels with marks or noise use the tiles of kernels without, the largest
    of which leave no register to spare: two or four words of a thread may be on its stack, 16 with
    noise, and 12 for cells that are more than arithmetic on single units. The longest row of a
    normalized LSTM, whose four gates take all available registers, may have up to 160 there.

    A load must be 16 bytes wide, or as wide as a thread's share of the data; this applies only
    where rows start at multiples of 16 bytes. A thread of a persistent kernel has one or two
    elements of wx. In the other kernels, wx of three or four gates is one tile (see ``tiles.py``),
    and so are the activations backward.

    A step of a persistent kernel has one barrier per tile, and h never goes through shared memory:
    the only traffic there is partial sums, and weights that do not fit in registers.

    Parameters
    ----------
    variant : Variant
    measured : Measured

    Returns
    -------
    list of str
        Members of `FAULTS`.
    """
    device, itemsize = variant.gpu, DTYPES[variant.dtype].itemsize
    aligned = device.target == "cuda" and variant.hidden_size * itemsize % 16 == 0
    is_persistent = variant.schedule == "persistent"
    received = variant.block_k // 4 * itemsize  # per thread, by `fragments.state_layout`
    tile = variant.block_b * variant.block_h * (1 if CELLS[variant.cell].n_gates == 1 else 4)
    others = tile * itemsize // (32 * variant.num_warps)
    # Backward also reads states, whose tile is smaller: the widest load counts.
    faults = (
        measured.spilled > _allowed(variant),
        measured.shared_memory > device.shared_memory,
        measured.matrix == 0 and variant.has_tensor_cores,
        aligned and is_persistent and min(_numbers(measured.exchange_loads)) < min(16, received),
        aligned and not is_persistent and max(_numbers(measured.other_loads)) < min(16, others),
        is_persistent and measured.barriers > measured.turn,
        is_persistent and (measured.ldsm > 0 or measured.shared_bytes > _needed(variant)),
    )
    return [name for name, fault in zip(FAULTS, faults, strict=True) if fault]


def _allowed(variant: Variant) -> int:
    """Return the bytes of stack that a thread may have."""
    if variant.schedule == "staged":
        row = variant.block_h * max(4, DTYPES[variant.dtype].itemsize)
        is_longest = row == configs.MAX_NORMALIZED_ROW and CELLS[variant.cell].n_gates == 4
        return 640 if is_longest else 0
    if variant.schedule == "persistent":
        return 0
    if variant.is_involved:
        return 48
    if variant.has("noisy"):
        return 64
    return 16 if variant.is_marked else 0


def _needed(variant: Variant) -> int:
    """Return the bytes that a step of a persistent kernel moves in shared memory."""
    # Weights there are read; partial sums, which have two sets of buffers, are written and read:
    # in total, for each tile, as many bytes as a program has there.
    held = configs.shared_memory(variant.config, variant.shape(1), backward=variant.is_backward)
    return variant.tiles * held


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split()] or [0]


@terminal.printing()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a variant breaks a budget, or spills, else 0."""
    parser = argparse.ArgumentParser(prog="python -m fastrnn.bench.compile_budget")
    parser.add_argument("--devices", nargs="+", choices=DEVICES, help="default: all")
    parser.add_argument("--out", type=terminal.path, help="instead of the committed table")
    parser.add_argument("--jobs", type=_arguments.positive, default=2, help="processes")
    parser.add_argument("--quick", action="store_true", help="three hidden sizes only")
    parser.add_argument(
        "--missing", action="store_true", help="compile only variants without a row in the file"
    )
    parser.add_argument(
        "--steps", action="store_true", help="generate the table from which kernels are chosen"
    )
    args = parser.parse_args(argv)
    if args.steps:
        devices = args.devices or step_table.DEVICES
        if unknown := set(devices) - set(step_table.DEVICES):
            parser.error(f"argument --devices: nothing is simulated for {', '.join(unknown)}")
        out = args.out or configs.STEPS
        return bool(step_table.write(out, devices, args.jobs, only_missing=args.missing))
    out = args.out or Path("bench/results/compile_budget.csv")
    planned = plan(args.devices or DEVICES, quick=args.quick)
    n_key = len(Variant._fields)
    known = compiled.read_table(out, n_key) if args.missing else {}
    missing = [variant for variant in planned if _key(variant) not in known]
    rows = {_key(variant): known.get(_key(variant)) for variant in planned}
    for variant, measured in zip(missing, measure_all(missing, args.jobs), strict=True):
        rows[_key(variant)] = _row(variant, planned[variant], measured)
        compiled.write_table(out, FIELDS, filter(None, rows.values()))
    found = list(filter(None, rows.values()))
    compiled.write_table(out, FIELDS, found)
    _print_summary(found)
    return int(any(row[-1] for row in found))


def _key(variant: Variant) -> tuple[str, ...]:
    return tuple(map(str, variant))


def _row(variant: Variant, use: Use, measured: Measured) -> list[str]:
    faults = ", ".join(broken(variant, measured))
    batches = " ".join(map(str, use.batches))
    fields = (*variant, batches, *measured)
    return [*map(_text, fields), f"{use.step_us:.3g}", faults]


def _text(field: object) -> str:
    if isinstance(field, float):
        return "" if math.isnan(field) else f"{field:.0f}"
    return str(field)


def measure_all(variants: Sequence[Variant], jobs: int) -> Iterator[Measured]:
    """Compile variants in several processes, showing a progress bar.

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

    results = compiled.in_processes(measure, variants, jobs)
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
