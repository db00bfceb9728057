"""Choose the schedule and tiles for a problem on a device by simulated step times.

Nothing here runs on a device or imports torch, so a plan can be made for a GPU that is not present.
The times come from a table, ``steps.csv``, which a multiprocessor simulator generates from compiled
kernels (fastrnn/bench/step_time.py, which states its error: a quarter either way between schedules,
which the choice does not take into account). None has been compared with a measurement yet.
"""

from __future__ import annotations

import bisect
import csv
import functools
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..cells import Cell


class Device(NamedTuple):
    """What the choice needs to know about a GPU.

    Attributes
    ----------
    name : str
    target : {'cuda', 'hip'}
    capability : int
        10 * major + minor for CUDA; for HIP the number in gfx942.
    processors : int
        Streaming multiprocessors or compute units.
    shared_memory : int
        Maximum bytes per program.
    clock_mhz : int
        Boost clock, for times in microseconds.
    gap : str
        Why no persistent kernel runs on the device, where this module cannot tell by itself.
    """

    name: str
    target: str
    capability: int
    processors: int
    shared_memory: int
    clock_mhz: int
    gap: str = ""


# From the vendors' data sheets and tuning guides.
DEVICES = {
    device.name: device
    for device in (
        Device("a100", "cuda", 80, 108, 163 * 1024, 1410),
        Device("a10", "cuda", 86, 72, 99 * 1024, 1695),
        Device("rtx4090", "cuda", 89, 128, 99 * 1024, 2520),
        Device("l4", "cuda", 89, 58, 99 * 1024, 2040),
        Device("h100", "cuda", 90, 132, 227 * 1024, 1980),
        Device("h200", "cuda", 90, 132, 227 * 1024, 1980),
        Device("b200", "cuda", 100, 148, 227 * 1024, 1965),
        Device("rtx5090", "cuda", 120, 170, 99 * 1024, 2407),
        Device("mi300x", "hip", 942, 304, 64 * 1024, 2100),
    )
}


class Shape(NamedTuple):
    """A problem as the kernels see it.

    Attributes
    ----------
    n_gates : int
    batch, hidden_size : int
        Per group.
    groups : int
        Directions, times heads, times the members of an ensemble.
    itemsize : int
        Bytes per weight element.
    precision : {'ieee', 'tf32', 'tf32x3'}
        Of float32 products.
    n_more : int
        Tiles held by a thread in addition to those of an LSTM: further states, and rows of extra
        weights.
    marked : bool
        Whether lengths, resets or truncated gradients are in use.
    noisy : bool
        Whether recurrent dropout or zoneout is in use.
    staged : bool
        Whether a step is more than a product and arithmetic on each hidden unit separately.
    projected : bool
        Whether h is projected.
    n_late : int
        Number of gates computed by a second product.
    """

    n_gates: int
    batch: int
    hidden_size: int
    groups: int
    itemsize: int
    precision: str
    n_more: int = 0
    marked: bool = False
    noisy: bool = False
    staged: bool = False
    projected: bool = False
    n_late: int = 0

    @classmethod
    def of(cls, cell: Cell, *others: Any) -> Shape:
        """Describe a problem for a cell, given the fields from `batch` to `precision`."""
        shape = cls(cell.n_gates, *others)
        n_late = cell.late.n_gates if cell.late else 0
        return shape._replace(n_more=max(cell.n_states - 2, 0) + cell.n_extra, n_late=n_late)


class Config(NamedTuple):
    """How one kernel is launched.

    Attributes
    ----------
    schedule : {'resident', 'persistent', 'stepwise', 'staged'}
    block_b, block_h : int
        Batch rows and hidden units per program.
    block_k : int
        Operand columns per product; per warp, in a persistent kernel.
    num_warps : int
    in_registers : int
        Chunks of the weights that a persistent kernel keeps in registers.
    tiles : int
        Batch tiles per launch; any beyond are launched one after another.
    """

    schedule: str
    block_b: int
    block_h: int
    block_k: int
    num_warps: int
    in_registers: int
    tiles: int


class Choice(NamedTuple):
    """A configuration and its simulated step time; NaN where nothing can be simulated."""

    config: Config
    step_us: float

    def __str__(self) -> str:
        schedule, block_b, block_h, _, num_warps, *_ = self.config
        time = "" if math.isnan(self.step_us) else f": {self.step_us:.2f} us per step, simulated"
        return f"{schedule}, {block_b} rows x {block_h} units per program, {num_warps} warps{time}"


SCHEDULES = ("resident", "persistent", "stepwise", "staged")
PRECISIONS = ("ieee", "tf32", "tf32x3")  # of float32 products
MAX_BATCH = 16 * 65535  # batch tiles are the second dimension of a grid
MAX_GROUPS = 65535
# Row bytes of a normalized cell, in float32 or float64; one program holds all units of a row. At
# this size an LSTM spills a few hundred bytes per thread; a larger row would not fit.
MAX_NORMALIZED_ROW = 16 * 1024

# Tile sizes of a persistent kernel's programs; see fragments.py.
_UNITS = _TILE_ROWS = 16


# Elements per thread of a tile [block_b, block_h] in a resident kernel. Fitted to what compiles
# without spilling for sm_80, sm_90 and sm_100 with triton 3.6 and 3.7 (bench/compile_budget.py); in
# most cases the next larger tile spills.
_RESIDENT = {"half": 8, "tf32": 4, "tf32x3": 2, "ieee": 1}
# The same for the kernels of staged_resident.py, with at most 48 bytes of stack per thread.
_RESIDENT_STAGED = {"half": 8, "tf32": 4, "tf32x3": 2, "ieee": 2}
# 256 threads, so that each can use all 255 registers on NVIDIA's multiprocessors, 512 on AMD's.
_WARPS = {"cuda": 8, "hip": 4}
_THREADS = 256


@functools.lru_cache(maxsize=4096)  # called for every call of a layer
def choose(
    shape: Shape, device: Device, *, backward: bool = False, schedule: str | None = None
) -> Choice | None:
    """Choose how to launch a kernel: the fastest in simulation, optionally within one schedule.

    Where nothing was simulated, as on AMD's devices, returns the first configuration that fits;
    None if `schedule` cannot run this shape on this device.
    """
    choices = [
        Choice(config, step_us(config, shape, device, backward=backward))
        for config in candidates(shape, device, backward=backward)
        if schedule in (None, config.schedule)
    ]
    times = [math.inf if math.isnan(choice.step_us) else choice.step_us for choice in choices]
    return choices[times.index(min(times))] if choices else None


def candidates(shape: Shape, device: Device, *, backward: bool = False) -> Iterator[Config]:
    """Generate all configurations that fit the device."""
    if shape.staged:
        yield from _resident_staged(shape, device, backward)
    else:
        yield from _resident(shape, device, backward)
        if persistent_gap(shape, device) is None:
            yield from _persistent(shape, device, backward)
    # Larger blocks spill; so do float32 or additional tiles with fewer threads.
    kind, narrow = _kind(shape), _narrow(shape)
    block_k = 64 if kind == "half" else 32
    n_more = 0 if shape.staged else shape.n_more  # a staged product holds no part of the cell
    num_warps = 4 if kind == "half" and not n_more else _WARPS[device.target]
    # On sm_90, 64 rows would become warp-group products: before 3.7.1 triton does not order
    # cp.async writes before their reads (triton PR 9610), and with tf32x3 their left operand is in
    # registers, which ptxas may reuse too early (PR 11781).
    is_warp_group = device.target == "cuda" and device.capability // 10 == 9
    # With noise, the masks are tiles too.
    few_rows = is_warp_group or (shape.noisy and not shape.staged)
    more_rows = () if narrow else (32,) if few_rows else (64,)
    if kind == "ieee":
        more_rows, block_k = (32,), 16 if narrow else 32
    if shape.itemsize == 8:  # a program computes all its float64 products at once
        yield Config("staged", 8, 32, 16, num_warps, 0, 65535)
        return
    for block_b in (16, *more_rows):
        schedule = "staged" if shape.staged else "stepwise"
        yield Config(schedule, block_b, 32, block_k, num_warps, 0, 65535)


def persistent_gap(shape: Shape, device: Device) -> str | None:
    """Return why no persistent kernel can run a shape, whatever its size; None if one can."""
    if device.target != "cuda":
        return f"fastrnn has no persistent kernels for {device.name}"
    if shape.itemsize == 4 and shape.precision != "tf32":
        return f"fastrnn has no persistent kernels for float32 in {shape.precision}"
    return device.gap or None


def _resident(shape: Shape, device: Device, backward: bool) -> Iterator[Config]:
    kind, narrow, warps = _kind(shape), _narrow(shape), _WARPS[device.target]
    block_h = _block_h(shape)
    most = _RESIDENT[kind] * (4 if shape.n_gates == 1 else 1)  # one gate needs that much less
    if backward and narrow and kind == "half":
        most //= 2  # each part of a row needs an address and a predicate
    for block_b in _row_blocks(shape) if kind == "half" else (16,):
        config = Config("resident", block_b, block_h, block_h, warps, 0, 65535)
        fits = shared_memory(config, shape, backward=backward) <= device.shared_memory
        if block_h <= 128 and block_b * block_h / _THREADS <= most and fits:
            yield config


def _resident_staged(shape: Shape, device: Device, backward: bool) -> Iterator[Config]:
    kind, warps, is_wide = _kind(shape), _WARPS[device.target], shape.n_gates == 4
    if shape.projected or shape.itemsize == 8 or (kind == "tf32x3" and is_wide):
        return
    # A product of 16 columns does not occupy all warps.
    block_h, most = _block_h(shape, 32 if backward else 16), _RESIDENT_STAGED[kind]
    # Marks, noise and unaligned rows take registers too.
    n_options = is_wide * (shape.marked + shape.noisy)
    if (kind == "half" and (n_options > 0 or _narrow(shape))) or (kind == "tf32" and n_options > 1):
        most //= 2
    config = Config("resident", 16, block_h, block_h, warps, 0, 65535)
    fits = shared_memory(config, shape, backward=backward) <= device.shared_memory
    if 16 * block_h / _THREADS <= most and fits:
        yield config


def _block_h(shape: Shape, least: int = 16) -> int:
    """Return the tile width of a program that holds all hidden units."""
    return max(least, 1 << (shape.hidden_size - 1).bit_length())


def _persistent(shape: Shape, device: Device, backward: bool) -> Iterator[Config]:
    slices = -(-shape.hidden_size // _UNITS)
    tiles = min(device.processors // (slices * shape.groups), 65535)
    columns = shape.hidden_size * (shape.n_gates if backward else 1)
    # Two tiles with marks would exceed the available registers.
    for block_b in (16,) if shape.marked else _row_blocks(shape):
        # Fewer warps produce fewer partial sums, but each holds more of the weights.
        for warps in (4, 8) if shape.hidden_size <= 512 and block_b == _TILE_ROWS else (8,):
            block_k = _block_k(columns, warps, shape.itemsize)
            in_registers = _in_registers(shape, backward, block_b, block_k, warps)
            if in_registers is None:
                continue
            config = Config("persistent", block_b, _UNITS, block_k, warps, in_registers, tiles)
            fits = shared_memory(config, shape, backward=backward) <= device.shared_memory
            if tiles and fits:
                yield config


def _chunks(shape: Shape, backward: bool, block_k: int, warps: int) -> int:
    """Count the chunks of a persistent kernel's products."""
    columns = shape.hidden_size * (shape.n_gates if backward else 1)
    return -(-columns // (warps * block_k))


def _row_blocks(shape: Shape) -> tuple[int, ...]:
    return (16, 32) if shape.batch > 16 else (16,)


def _block_k(columns: int, warps: int, itemsize: int) -> int:
    """Return the columns of a warp's chunk: 64 bytes of a row, or 32 if an eighth would be padding.

    Tensor cores need at least 16 columns.
    """
    widest = 64 // itemsize
    if widest == 16:
        return widest
    wide, narrow = (-(-columns // (warps * k)) * k * warps for k in (widest, widest // 2))
    return widest // 2 if wide > columns * 9 / 8 and narrow < wide else widest


def _in_registers(
    shape: Shape, backward: bool, block_b: int, block_k: int, warps: int
) -> int | None:
    """Return how many chunks of the weights a thread of a persistent kernel keeps in registers.

    A bound fitted to what compiles without spilling; see bench/compile_budget.py. A few chunks in
    shared memory cost little. None if there are too few registers even with no chunk in them.
    """
    of_chunk = block_k * shape.itemsize // 8  # of h, and of the weights of one tile of sums
    sums = 1 if backward else shape.n_gates
    chunks = _chunks(shape, backward, block_k, warps)
    group = min(-(-chunks // shape.n_gates) if backward else chunks, 32 // of_chunk)
    used = (85 if backward else 75) + min(chunks, 2 * group) * of_chunk + 8 * sums
    used += 6 * shape.n_more + 40 * _narrow(shape) + 15 * (warps == 4)
    used += 70 * (block_b > _TILE_ROWS) + (60 if backward else 45) * shape.marked
    used += (20 if backward else 25) * shape.noisy
    if (255 - used) // (sums * of_chunk) >= chunks:
        return chunks
    used += 24 + 4 * max(0, chunks - 16)  # weights in flight from shared memory
    return (255 - used) // (sums * of_chunk) if used < 255 else None


def _narrow(shape: Shape) -> bool:
    """Whether some rows start at an address that is not a multiple of 16 bytes."""
    return shape.hidden_size * shape.itemsize % 16 > 0


def _kind(shape: Shape) -> str:
    return "half" if shape.itemsize == 2 else shape.precision


def shared_memory(config: Config, shape: Shape, *, backward: bool = False) -> int:
    """Return an upper bound on the shared memory, in bytes, of an on-chip schedule."""
    gates = 1 if backward else shape.n_gates
    if config.schedule == "persistent":
        chunks = _chunks(shape, backward, config.block_k, config.num_warps)
        weights = (chunks - config.in_registers) * config.block_k * shape.itemsize
        sums = 2 * _TILE_ROWS * 4
        return gates * _UNITS * config.num_warps * (weights + sums)
    copies = 2 if _kind(shape) == "tf32x3" else 1
    gates = shape.n_gates if backward else shape.n_gates + (shape.n_gates - shape.n_late == 3)
    weights = gates * config.block_h**2 * shape.itemsize * copies
    # Layout conversions: the left operand of a dot; for a result of backward, dh and a tile of each
    # gate, or in half precision two loads of four; or the minimum that a reduction needs.
    of_unit = config.block_h * shape.itemsize
    is_twice = backward and shape.itemsize == 2 and shape.n_gates > 1
    tiles = 8 if is_twice else shape.n_gates + 1
    columns = max(
        of_unit * copies,
        config.block_h * 4,
        tiles * of_unit,
        256,
    )
    if shape.staged:  # several tiles at once
        columns = config.block_h * (12 * shape.itemsize if shape.n_late else 8 + 4 * shape.itemsize)
    return weights + config.block_b * columns


class Simulated(NamedTuple):
    """A row of ``steps.csv``: the simulated time of one step of a kernel.

    Generated by ``python -m fastrnn.bench.compile_budget --steps``.

    Attributes
    ----------
    architecture : {80, 90}
        Compute capability, times 10, of the simulated GPU: an A100 or an H100.
    run : {'forward', 'backward'}
    n_gates : int
    kind : {'half', 'tf32', 'tf32x3', 'ieee'}
        How elements are multiplied.
    schedule : str
    block_b, num_warps : int
    hidden_size : int
    alone, full : float
        Cycles per step: with one group of programs alone on the GPU, and with such programs on all
        multiprocessors, which share the L2 bandwidth.
    """

    architecture: int
    run: str
    n_gates: int
    kind: str
    schedule: str
    block_b: int
    num_warps: int
    hidden_size: int
    alone: int
    full: int


STEPS = Path(__file__).with_name("steps.csv")


@functools.cache
def _simulated() -> dict[tuple[Any, ...], list[Simulated]]:
    """Return the table's rows, keyed by all facts but the hidden size, which sorts each list."""
    found: dict[tuple[Any, ...], list[Simulated]] = defaultdict(list)
    with STEPS.open(encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file)
    for texts in rows:
        fields: list[Any] = [int(text) if text.isdecimal() else text for text in texts]
        row = Simulated(*fields)
        found[row[:-3]].append(row)
    return {key: sorted(of_key, key=lambda row: row.hidden_size) for key, of_key in found.items()}


def _rows_of(config: Config, shape: Shape, device: Device, backward: bool) -> list[Simulated]:
    """Return the rows simulated for a configuration, or for the one most like it."""
    if device.target != "cuda" or shape.staged:
        return []
    # Approximate a cell of two gates by one of three, an A100 by an H100 where only that was
    # simulated, and more rows or warps of a stepwise launch by fewer.
    facts = (
        "backward" if backward else "forward",
        max(shape.n_gates, 3) if shape.n_gates > 1 else 1,
        _kind(shape),
        config.schedule,
    )
    for architecture in (90,) if device.capability >= 90 else (80, 90):
        for block_b in dict.fromkeys((config.block_b, min(config.block_b, 32))):
            for num_warps in dict.fromkeys((config.num_warps, 4, 8)):
                key = (architecture, *facts, block_b, num_warps)
                if rows := _simulated().get(key):
                    return rows
    return []


def step_us(config: Config, shape: Shape, device: Device, *, backward: bool = False) -> float:
    """Return the simulated time of one time step in microseconds; NaN if nothing was simulated.

    Interpolates between the hidden sizes of the table; beyond the largest, the time is taken to
    grow linearly. A device that was not simulated gets the cycles of an A100 below sm_90 and those
    of an H100 from sm_90 on. The fixed cost of a launch that covers all steps is not included.
    """
    rows = _rows_of(config, shape, device, backward)
    if not rows:
        return math.nan
    slices = -(-shape.hidden_size // config.block_h)
    tiles = -(-shape.batch // config.block_b)
    programs = slices * min(tiles, config.tiles) * shape.groups
    # Where this lies between a single group of programs and a full device.
    share = min(1.0, (programs - slices) / max(1, device.processors - slices))
    sizes = [row.hidden_size for row in rows]
    times = [row.alone + (row.full - row.alone) * share for row in rows]
    n = bisect.bisect_left(sizes, shape.hidden_size)
    if n == 0:
        cycles = times[0]
    elif n == len(rows):
        cycles = times[-1] * shape.hidden_size / sizes[-1]
    else:
        above = (shape.hidden_size - sizes[n - 1]) / (sizes[n] - sizes[n - 1])
        cycles = times[n - 1] + (times[n] - times[n - 1]) * above
    waves = -(-programs // device.processors) * -(-tiles // config.tiles)
    launches_us = _LAUNCH_US if config.schedule == "stepwise" else 0.0
    return launches_us + waves * cycles / device.clock_mhz


# Time per empty launch, issued back to back on a stream: a design estimate.
_LAUNCH_US = 2.5
