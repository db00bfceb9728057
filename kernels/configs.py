"""Which schedule, tiles and protocol for a problem on a device, by a model of a step's time.

Nothing here runs on a device or imports torch, so a plan can be made for a GPU that is not there.
The model adds up, in cycles of one multiprocessor, what a step cannot avoid; constants are
published figures or counts from compiled code, named beside them. None of its results has been
compared with a measurement yet.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..cells import Cell


class Device(NamedTuple):
    """What the choice needs to know about a GPU.

    Attributes
    ----------
    name : str
    target : {'cuda', 'hip'}
    capability : int
        10 * major + minor of CUDA; of HIP the number in gfx942.
    processors : int
        Streaming multiprocessors or compute units.
    shared_memory : int
        Most bytes that one program may have.
    clock_mhz : int
        Boost clock, for times in microseconds.
    protocol : {'flag', 'counter'}
        How programs wait for each other (see exchange.py). By default 'flag', which is one trip
        through L2 where 'counter' is two.
    """

    name: str
    target: str
    capability: int
    processors: int
    shared_memory: int
    clock_mhz: int
    protocol: str = "flag"


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
        Device("mi300x", "hip", 942, 304, 64 * 1024, 2100),
    )
}


class Shape(NamedTuple):
    """A problem as the kernels see it.

    Attributes
    ----------
    n_gates : int
    batch, hidden_size, directions : int
    itemsize : int
        Bytes of an element of the weights.
    precision : {'ieee', 'tf32', 'tf32x3'}
        Of products of float32.
    n_more : int
        Tiles that a thread holds beyond those of an LSTM: of further states, and rows of extra
        weights.
    """

    n_gates: int
    batch: int
    hidden_size: int
    directions: int
    itemsize: int
    precision: str
    n_more: int = 0

    @classmethod
    def of(cls, cell: Cell, *others: Any) -> Shape:
        """Describe a problem of a cell by the fields from `batch` to `precision`."""
        shape = cls(cell.n_gates, *others)
        return shape._replace(n_more=max(cell.n_states - 2, 0) + cell.n_extra)


class Config(NamedTuple):
    """How one kernel is launched.

    Attributes
    ----------
    schedule : {'resident', 'persistent', 'stepwise'}
    protocol : {'local', 'flag', 'counter'}
    block_b, block_h : int
        Rows of the batch and hidden units of one program.
    block_k : int
        Columns of h (forward) or of dh (backward) that go through one dot.
    num_warps : int
    tiles : int
        Batch tiles in one launch; more of them are launched one after another.
    """

    schedule: str
    protocol: str
    block_b: int
    block_h: int
    block_k: int
    num_warps: int
    tiles: int


class Choice(NamedTuple):
    """A configuration and what the model says of it."""

    config: Config
    step_us: float

    def __str__(self) -> str:
        schedule, protocol, block_b, block_h, _, num_warps, _ = self.config
        exchange = f", exchange by {protocol}" if protocol != LOCAL else ""
        return (
            f"{schedule}, {block_b} rows x {block_h} units a program, {num_warps} warps{exchange}: "
            f"{self.step_us:.2f} us a step by the model"
        )


SCHEDULES = ("resident", "persistent", "stepwise")
PRECISIONS = ("ieee", "tf32", "tf32x3")  # of float32
MAX_BATCH = 16 * 65535  # batch tiles are the second dimension of a grid
LOCAL, FLAG, COUNTER = PROTOCOLS = ("local", "flag", "counter")  # see exchange.py

# Cycles. Shared memory reads 128 bytes a cycle (CUDA programming guide, 32 banks of 4 bytes).
_SHARED_BYTES = 128
# A warp-level matrix product that waits for the one before it, 16 deep in K for 2-byte elements: a
# design estimate after Sun et al., arXiv:2206.02874, who measured A100, for all devices.
_DOT_LATENCY = 33
# Multiply-adds of a multiprocessor in a cycle: 312, 156 and 19.5 TFLOP/s of the A100 white paper.
# Later devices are taken to be no faster at the same warp-level instructions, a design estimate.
_FMA = {"half": 1024, "tf32": 512, "tf32x3": 512 / 3, "ieee": 64}
# Store, until another multiprocessor sees it in L2 (some 0.5 us); a load from L2; bytes that
# arrive at one multiprocessor in a cycle. Design estimates for an H100.
_VISIBLE, _L2_LATENCY, _L2_BYTES = 900, 270, 64
# Pointwise part: some ten barriers with a trip through shared memory between, 40 cycles each
# (they are counted in bench/results/compile_budget.csv; the cycles are a design estimate).
_POINTWISE = 400
# A launch that does nothing, back to back on a stream, and the latency of device memory: design
# estimates.
_LAUNCH_US, _MEMORY_LATENCY = 2.5, 600


class _Limits(NamedTuple):
    """What a thread may hold of a tile [block_b, block_h] without spilling its 255 registers.

    Each for rows that are loaded 16 bytes at a time, and for rows that start anywhere and are
    loaded in parts, each with an address and a predicate.

    Attributes
    ----------
    resident, backward : (float, float)
        Elements, of a resident kernel (of which only backward minds how rows are loaded) and of a
        persistent backward one.
    forward : (float, float)
        Elements times `_PER_ELEMENT` and h in registers together, of a persistent forward one.
    """

    resident: tuple[float, float]
    backward: tuple[float, float]
    forward: tuple[float, float]


# Fitted to what compiles without spilling for sm_80, sm_90 and sm_100 with triton 3.6
# (bench/compile_budget.py); mostly the next larger tile spills. The registers of products in three
# parts and of exact ones, which no matrix instruction computes, vary more than a formula follows:
# see `_in_registers`.
_LIMITS = {
    "half": _Limits((8, 4), (4, 2), (118, 77)),
    "tf32": _Limits((4, 4), (2, 1), (118, 59)),
    "tf32x3": _Limits((4, 2), (2, 1), (86, 43)),
    "ieee": _Limits((1, 1), (1, 0.5), (59, 29)),
}
# An element of one gate, and of several gates with what is computed from them.
_PER_ELEMENT_OF_ONE, _PER_ELEMENT = 10.5, 27
# Elements of dh, of a tile of the batch and all units: 32 rows of 2048 spill, of 1408 do not.
_BACKWARD_TILE = 32 * 1536
# 256 threads: then all 255 registers of NVIDIA's and 512 of AMD's multiprocessors are theirs.
_WARPS = {"cuda": 8, "hip": 4}
_THREADS = 256


@functools.lru_cache(maxsize=4096)  # asked at every call of a layer
def choose(
    shape: Shape, device: Device, *, backward: bool = False, schedule: str | None = None
) -> Choice | None:
    """Choose how to launch a kernel: the fastest by the model, perhaps of one schedule only.

    None if `schedule` cannot run this shape on this device.
    """
    choices = [
        Choice(config, step_us(config, shape, device, backward=backward))
        for config in candidates(shape, device, backward=backward)
        if schedule in (None, config.schedule)
    ]
    return min(choices, key=lambda choice: choice.step_us, default=None)


def candidates(shape: Shape, device: Device, *, backward: bool = False) -> Iterator[Config]:
    """All configurations that fit the device."""
    # 64 rows would be warp-group (sm_90) or tcgen05 (sm_100) products, whose left operand is in
    # shared memory, all of h at once; up to 3,744 bytes of a thread spilled in most of those tried.
    for block_b in (16, 32):
        if block_b > 16 and block_b >= 2 * shape.batch:
            continue  # more than half of its rows would be empty
        for block_h in (16, 32, 64, 128):
            yield from _on_chip(shape, device, backward, block_b, block_h)
    # Larger blocks, or float32 or more tiles in fewer threads, spill.
    kind, narrow = _kind(shape), _narrow(shape)
    block_k = 64 if kind == "half" else 32
    num_warps = 4 if kind == "half" and not shape.n_more else _WARPS[device.target]
    # Nor more rows than these on sm_90, where 64 would be warp-group products: triton before 3.7.1
    # does not order what cp.async writes before their reads (triton PR 9610), and in three parts
    # their left operand is in registers, which ptxas may take for others too early (PR 11781).
    is_warp_group = device.target == "cuda" and device.capability // 10 == 9
    more_rows = () if narrow else (32,) if is_warp_group else (64,)
    if kind == "ieee":
        more_rows, block_k = (32,), 16 if narrow else 32
    for block_b in (16, *more_rows):
        yield Config("stepwise", LOCAL, block_b, 32, block_k, num_warps, 65535)


def _on_chip(
    shape: Shape, device: Device, backward: bool, block_b: int, block_h: int
) -> Iterator[Config]:
    hidden, warps = shape.hidden_size, _WARPS[device.target]
    slices = -(-hidden // block_h)
    if slices == 1:
        if block_h > 16 and block_h >= 2 * hidden:
            return
        config = Config("resident", LOCAL, block_b, block_h, block_h, warps, 65535)
    else:
        if device.target != "cuda":
            return  # programs that wait for each other were not tried there
        block_k = _block_k(shape, backward)
        if backward:
            block_k = max(block_k, block_h)  # a mailbox is filled by one product
        tiles = min(device.processors // (slices * shape.directions), 65535)
        config = Config("persistent", device.protocol, block_b, block_h, block_k, warps, tiles)
    if (
        config.tiles
        and _in_registers(config, shape, backward)
        and shared_memory(config, shape, backward=backward) <= device.shared_memory
    ):
        yield config


def _in_registers(config: Config, shape: Shape, backward: bool) -> bool:
    """Whether a kernel compiles without spilling registers, and its warps share its products."""
    kind, narrow = _kind(shape), _narrow(shape)
    limits = _LIMITS[kind]
    tile = config.block_b * config.block_h / _THREADS
    several = 4 if shape.n_gates == 1 else 1  # elements of one gate take so much less
    padded = -(-shape.hidden_size // config.block_k) * config.block_k
    if config.schedule == "resident":
        is_tight = narrow or (kind == "tf32x3" and shape.n_more > 0)
        return tile <= several * limits.resident[is_tight and backward]
    if backward:
        fits = tile <= several * limits.backward[narrow]
        return fits and config.block_b * padded <= _BACKWARD_TILE
    # If products follow each other, Triton gives all warps the same columns of one that is not
    # wider than high.
    if _block_width(shape) * config.block_h <= config.block_b and kind != "ieee":
        return False
    # These spill although the formula below sees room.
    wide = config.block_h > 16
    if kind == "tf32" and shape.n_gates > 2 and wide and padded > (128 if shape.n_more else 256):
        return False
    if kind == "tf32x3":
        widest = 128 if wide or shape.n_gates == 3 or shape.n_more else 256
        if padded > widest or (shape.n_gates > 2 and wide):
            return False
    if kind == "ieee" and (shape.n_gates == 3 or (shape.n_more and config.block_k < 64)):
        return False
    h = config.block_b * padded * shape.itemsize / 4 / _THREADS
    per_element = _PER_ELEMENT_OF_ONE if shape.n_gates == 1 else _PER_ELEMENT + shape.n_more
    return h + per_element * tile <= limits.forward[narrow]


def _block_width(shape: Shape) -> int:
    """Gates of the block that goes through forward's products: of 3, one of 4 is empty."""
    return 4 if shape.n_gates == 3 else shape.n_gates


def _narrow(shape: Shape) -> bool:
    """Whether rows do not all start at a multiple of 16 bytes."""
    return shape.hidden_size * shape.itemsize % 16 > 0


def _kind(shape: Shape) -> str:
    return "half" if shape.itemsize == 2 else shape.precision


def _block_k(shape: Shape, backward: bool) -> int:
    """The widest block that wastes less than an eighth of itself and does not spill."""
    widest = {
        "half": 128 if backward else 512,
        "tf32": 128,
        "tf32x3": 64 if backward else 32,
        "ieee": 64,
    }[_kind(shape)]
    while widest > 32 and -(-shape.hidden_size // widest) * widest > shape.hidden_size * 9 / 8:
        widest //= 2
    return widest


def block_s(config: Config, slices: int) -> int:
    """How many mailboxes a program reads at once: at most 64 registers of every thread."""
    most = 64 * 32 * config.num_warps // (config.block_b * config.block_h)
    return min(most, 1 << (slices - 1).bit_length())


def shared_memory(config: Config, shape: Shape, *, backward: bool = False) -> int:
    """Bytes of shared memory of an on-chip schedule, from above; compiled code takes no more."""
    padded = -(-shape.hidden_size // config.block_k) * config.block_k
    copies = 2 if _kind(shape) == "tf32x3" else 1
    gates = shape.n_gates if backward else _block_width(shape)
    weights = gates * config.block_h * padded * shape.itemsize * copies
    # On their way to another layout: the left operand of a dot, a result of backward, dh and a tile
    # of each gate, or what a reduction needs at least.
    columns = max(
        config.block_k * shape.itemsize * copies,
        min(config.block_k, 128) * 4,
        (shape.n_gates + 1) * config.block_h * shape.itemsize,
        256,
    )
    return weights + config.block_b * columns


def step_us(config: Config, shape: Shape, device: Device, *, backward: bool = False) -> float:
    """Model the time of one time step in microseconds."""
    hidden = shape.hidden_size
    slices = -(-hidden // config.block_h)
    tiles = -(-shape.batch // config.block_b)
    padded = -(-hidden // config.block_k) * config.block_k
    gates = shape.n_gates if backward else _block_width(shape)
    rate = _FMA[_kind(shape)]
    products = config.block_b * gates * config.block_h * padded / rate
    if config.schedule == "stepwise":
        waves = -(-slices * tiles * shape.directions // device.processors)
        # Each K block of the weights comes from L2 behind the one before it.
        reads = padded // config.block_k * _L2_LATENCY + (
            gates * config.block_h * padded * shape.itemsize / _L2_BYTES
        )
        cycles = waves * (max(products, reads) + _POINTWISE + _MEMORY_LATENCY)
        return _LAUNCH_US + cycles / device.clock_mhz
    weights = gates * config.block_h * padded * shape.itemsize / _SHARED_BYTES
    depth = gates * config.block_h if backward else padded
    chain = _DOT_LATENCY * depth * shape.itemsize / 32
    if _kind(shape) == "ieee":
        chain = 0.0
    cycles = max(products, weights, chain) + _POINTWISE
    if config.schedule == "persistent":
        # Everybody receives h, or dh in float32.
        received = config.block_b * padded * (4 if backward else shape.itemsize)
        trips = 1 if config.protocol == FLAG else 2
        cycles += trips * (_VISIBLE + _L2_LATENCY) + received / _L2_BYTES
        if backward:  # and sends as much
            cycles += received / _L2_BYTES
    launches = -(-tiles // config.tiles)
    resident = -(-slices * min(tiles, config.tiles) * shape.directions // device.processors)
    return launches * resident * cycles / device.clock_mhz
