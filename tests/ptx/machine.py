"""Run a parsed program in the engine."""

from __future__ import annotations

import ctypes
import functools
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .build import ENGINE, library
from .program import Program

if TYPE_CHECKING:
    from .driver import Schedule

# In the order of the engine's enumerations.
POLICIES = ("random", "one", "starve-warp", "starve-cta", "bursts")
DRAINS = ("at once", "random", "lazy")
STATUSES = ("ended", "HANG", "FATAL", "ENDLESS")
WAITS = ("ready", "at barrier", "waits for lanes", "done")
KINDS = tuple(re.findall(r'^X\(\w+, "(.*)"\)', (ENGINE / "findings.inc").read_text(), re.M))

# Each warp has two clocks of 4 bytes per warp, 2 GiB in all. (Warp numbers have 16 bits.)
_MOST_WARPS = math.isqrt((2 << 30) // (2 * 4))
_MOST_WARPS_OF_CTA = 32
_WARP = 32


class Region(NamedTuple):
    """A tensor's storage in the address space of a launch."""

    base: int  # its address in the kernel, within the 64 GiB from (its index + 1) << 36
    size: int
    data: int  # its address in this process
    written: np.ndarray  # uint8, for each of its bytes: whether it has been written


@dataclass(frozen=True)
class Finding:
    """A fault, counted by its kind and by the instructions involved."""

    kind: str  # one of KINDS
    first: int  # pc of the earlier access
    second: int  # pc of the access that was noticed; the same if there is only one
    count: int
    example: str  # the first occurrence: which bytes, which threads

    def show(self, program: Program) -> str:
        """Describe it with the text and source of its instructions."""
        where = program.show(self.second)
        if self.first != self.second:
            where = f"{program.show(self.first)}  THEN  {where}"
        return f"{self.kind} x{self.count}: {where} [{self.example}]"


class Lanes(NamedTuple):
    """Lanes of a warp at the same instruction when a launch stops early."""

    x: int  # the CTA
    y: int
    z: int
    warp: int
    pc: int
    mask: int
    wait: int  # index of WAITS


@dataclass(frozen=True)
class Counters:
    """Event counts of a launch."""

    instructions: int  # warp instructions
    l1_hits: int
    stale_hits: int  # L1 hits that differ from memory
    drained: int  # stores, counted by element
    barriers: int


@dataclass(frozen=True)
class Statistics:
    """Counts by instruction."""

    executions: np.ndarray
    first_warp: np.ndarray  # executions by warp 0 of CTA 0
    transactions: np.ndarray  # wavefronts of shared memory, sectors of global memory
    least: np.ndarray  # transactions if the same bytes were contiguous


@dataclass(frozen=True)
class Outcome:
    """The result of a launch."""

    code: int  # index of STATUSES: 0 if all warps ended
    findings: list[Finding]
    state: list[Lanes]  # of the warps that did not end
    counters: Counters
    statistics: Statistics | None

    @property
    def status(self) -> str:
        """One of STATUSES."""
        return STATUSES[self.code]

    @property
    def instructions(self) -> int:
        """Executed warp instructions."""
        return self.counters.instructions


# Mirrors of the records in machine.hpp, program.hpp and engine.cpp.


def _record(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_i32, _u32, _i64, _u64 = ctypes.c_int32, ctypes.c_uint32, ctypes.c_int64, ctypes.c_uint64
_pointer = ctypes.c_void_p

_Region = _record("_Region", base=_u64, size=_u64, bytes=_pointer, defined=_pointer)
_Config = _record(
    "_Config", grid=_i32 * 3, warps=_i32, shared_bytes=_i32, n_regions=_i32, policy=_i32,
    drain=_i32, at_once=_i32, statistics=_i32, seed=_u64, most_instructions=_u64,
)  # fmt: skip
_Program = _record(
    "_Program", code=_pointer, pool=_pointer, words=_pointer, longs=_pointer, parameters=_pointer,
    n_code=_i32, n_words=_i32, n_longs=_i32, n_word_registers=_i32, n_long_registers=_i32,
    n_predicates=_i32,
)  # fmt: skip
_Finding = _record(
    "_Finding", kind=_i32, first=_i32, second=_i32, count=_u64, example=ctypes.c_char * 256
)
_Stuck = _record("_Stuck", x=_i32, y=_i32, z=_i32, warp=_i32, pc=_i32, mask=_u32, wait=_i32)
_Counters = _record(
    "_Counters", instructions=_u64, l1_hits=_u64, stale_hits=_u64, drained=_u64, barriers=_u64
)
_COUNTS = ctypes.POINTER(_u64)
_Result = _record(
    "_Result", status=_i32, n_findings=_i32, n_stuck=_i32, findings=ctypes.POINTER(_Finding),
    stuck=ctypes.POINTER(_Stuck), executions=_COUNTS, first_warp=_COUNTS, transactions=_COUNTS,
    least=_COUNTS, counters=_Counters,
)  # fmt: skip


@functools.cache
def _engine() -> ctypes.CDLL:
    engine = library()
    engine.ptx_run.restype = _pointer
    engine.ptx_run.argtypes = [_pointer] * 4
    engine.ptx_free.restype = None
    engine.ptx_free.argtypes = [_pointer]
    return engine


def run(
    program: Program,
    grid: tuple[int, int, int],
    parameters: list[int],
    regions: list[Region],
    shared: int,
    *,
    schedule: Schedule,
    at_once: int = 0,
    statistics: bool = False,
    most_instructions: int = 300_000_000,
) -> Outcome:
    """Launch a kernel and run it until it ends or cannot continue.

    Parameters
    ----------
    program : Program
    grid : tuple of int
        Number of CTAs in each dimension.
    parameters : list of int
        The bits of each parameter.
    regions : list of Region
        The memory that the kernel's pointers refer to.
    shared : int
        Bytes of shared memory per CTA.
    schedule : Schedule
        Determines all choices of the engine.
    at_once : int
        Maximum number of co-resident CTAs; 0 for all.
    statistics : bool
        Count by instruction.
    most_instructions : int
        Limit for all warps together, beyond which the launch is aborted as ENDLESS.

    Raises
    ------
    ValueError
        If the launch exceeds the engine's limits.
    """
    warps, rest = divmod(program.threads, _WARP)
    ctas = grid[0] * grid[1] * grid[2]
    if rest or not 1 <= warps <= _MOST_WARPS_OF_CTA:
        raise ValueError(f"{program.threads} threads are not 1 to {_MOST_WARPS_OF_CTA} warps")
    if ctas * warps > _MOST_WARPS:
        raise ValueError(f"{ctas} CTAs of {warps} warps: the engine has at most {_MOST_WARPS}")
    config = _Config(
        grid=grid, warps=warps, shared_bytes=shared, n_regions=len(regions),
        policy=POLICIES.index(schedule.policy), drain=DRAINS.index(schedule.drain),
        at_once=at_once, statistics=statistics, seed=schedule.seed,
        most_instructions=most_instructions,
    )  # fmt: skip
    values = np.array([*parameters, 0], np.uint64)  # never empty
    tables = (program.code, program.pool, program.const32, program.const64, values)
    kernel = _Program(
        *(table.ctypes.data for table in tables), len(program.code), len(program.const32),
        len(program.const64), *program.counts,
    )  # fmt: skip
    areas = (_Region * max(1, len(regions)))(
        *(_Region(r.base, r.size, r.data, r.written.ctypes.data) for r in regions)
    )
    result = _Result()
    engine = _engine()
    handle = engine.ptx_run(*map(ctypes.byref, (config, kernel, areas, result)))
    try:
        return _outcome(result, len(program.code) if statistics else None)
    finally:
        engine.ptx_free(handle)


def _outcome(result: Any, n_code: int | None) -> Outcome:
    """Copy a result, whose pointers are only valid during the run."""
    findings = [
        Finding(KINDS[f.kind], f.first, f.second, f.count, f.example.decode())
        for f in result.findings[: result.n_findings]
    ]
    state = [Lanes(*_values(one)) for one in result.stuck[: result.n_stuck]]
    statistics = None
    if n_code is not None:
        columns = (result.executions, result.first_warp, result.transactions, result.least)
        statistics = Statistics(*(np.array(column[:n_code], np.uint64) for column in columns))
    counters = Counters(*_values(result.counters))
    return Outcome(result.status, findings, state, counters, statistics)


def _values(record: Any) -> list[int]:
    return [getattr(record, name) for name, _ in record._fields_]
