"""Generate the table from which configurations are chosen: ``kernels/steps.csv``.

``python -m fastrnn.bench.compile_budget --steps`` compiles every candidate of
`configs.candidates`, over a grid of sizes, for an H100 and an A100, and simulates a step. Rows are
`configs.Simulated`. A candidate that spills should not be one: it is left out, and reported.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..cells import CELLS
from ..kernels import configs
from ..kernels.configs import Simulated
from . import compiled
from .compiled import Variant, problem

DEVICES = ("h100", "a100")
_CELLS = ("lstm", "gru", "rnn_tanh")  # four gates, three and one
_RUNS = ("training", "backward")  # forward saves what backward reads
_KINDS = {
    "half": ("bfloat16", "tf32"),
    "tf32": ("float32", "tf32"),
    "tf32x3": ("float32", "tf32x3"),
    "ieee": ("float32", "ieee"),
}
_BATCH = 64  # enough for all row block sizes

# Hidden sizes.
_PERSISTENT = (32, 64, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 2048)
_FEWER = (64, 128, 256, 512, 1024)
_RESIDENT = (16, 32, 64, 128)
_STEPWISE = (128, 512, 1024, 2048)

N_KEY = len(Simulated._fields) - 2


class Result(NamedTuple):
    """The result for a variant.

    Attributes
    ----------
    alone, full : float
        Cycles; see `configs.Simulated`.
    spilled : int
        Bytes of stack per thread.
    seconds : float
        Time taken to compile and simulate.
    error : str
        Why that failed.
    """

    alone: float
    full: float
    spilled: int
    seconds: float
    error: str = ""


def key(variant: Variant) -> tuple[int, str, int, str, str, int, int, int]:
    """Return the facts that identify a variant in the table.

    Parameters
    ----------
    variant : Variant

    Returns
    -------
    tuple
        The fields of `configs.Simulated` up to the hidden size.
    """
    return (
        variant.gpu.capability,
        "backward" if variant.is_backward else "forward",
        CELLS[variant.cell].n_gates,
        "half" if variant.dtype == "bfloat16" else variant.precision,
        variant.schedule,
        variant.block_b,
        variant.num_warps,
        variant.hidden_size,
    )


def plan(devices: Sequence[str] = DEVICES) -> list[Variant]:
    """List the variants of the table, in its order.

    Parameters
    ----------
    devices : sequence of str

    Returns
    -------
    list of Variant
    """
    found = []
    sizes = sorted({*_PERSISTENT, *_RESIDENT, *_STEPWISE})
    for device, cell, run, kind, hidden in itertools.product(devices, _CELLS, _RUNS, _KINDS, sizes):
        some = problem(cell, run, *_KINDS[kind], hidden, device)
        candidates = configs.candidates(some.shape(_BATCH), some.gpu, backward=some.is_backward)
        for config in candidates:
            variant = some.of(config)
            if hidden in _sizes(variant, kind):
                found.append(variant)
    return sorted(found, key=key)


def _sizes(variant: Variant, kind: str) -> tuple[int, ...]:
    is_a100 = variant.device == "a100"
    if is_a100 and kind != "half":
        return ()
    if variant.schedule == "resident":
        return _RESIDENT[1:] if is_a100 else _RESIDENT
    if variant.schedule == "stepwise":
        return _STEPWISE[1::2] if is_a100 else _STEPWISE
    return _FEWER if is_a100 or kind != "half" else _PERSISTENT


def simulate(variant: Variant) -> Result:
    """Compile a variant and simulate a step of it.

    Parameters
    ----------
    variant : Variant

    Returns
    -------
    Result
    """
    start = time.perf_counter()
    try:
        kernel = compiled.compile_variant(variant)
        _, spilled = compiled.resources(kernel.asm["cubin"])
        alone, full = (step.cycles for step in compiled.simulated(variant, kernel))
    except Exception as error:  # from Triton or ptxas: one variant must not stop the others
        return Result(math.nan, math.nan, 0, time.perf_counter() - start, repr(error)[:300])
    return Result(round(alone), round(full), spilled, time.perf_counter() - start)


def write(
    path: Path = configs.STEPS,
    devices: Sequence[str] = DEVICES,
    jobs: int = 2,
    *,
    only_missing: bool = False,
) -> list[Variant]:
    """Write the table, row by row as results arrive, and print each result.

    Parameters
    ----------
    path : pathlib.Path
    devices : sequence of str
        Devices to simulate; rows of other devices are kept.
    jobs : int
        Number of processes.
    only_missing : bool
        Whether to keep existing rows.

    Returns
    -------
    list of Variant
        Variants that are left out.
    """
    planned = {tuple(map(str, key(variant))): variant for variant in plan(devices)}
    kept = compiled.read_table(path, N_KEY)
    everything = {tuple(map(str, key(variant))) for variant in plan()}
    rows = {
        name: row
        for name, row in kept.items()
        if name in everything and (only_missing or name not in planned)
    }
    missing = {name: variant for name, variant in planned.items() if name not in rows}
    faulty = []
    for n, (name, variant, result) in enumerate(_results(missing, jobs), 1):
        print(f"{n}/{len(missing)}", *name, *_texts(result), flush=True)
        if result.spilled or result.error:
            faulty.append((variant, result))
        else:
            rows[name] = [*name, *_texts(result)[:2]]
        compiled.write_table(path, Simulated._fields, sorted(rows.values(), key=_order))
    compiled.write_table(path, Simulated._fields, sorted(rows.values(), key=_order))
    for variant, result in faulty:
        print("left out:", *variant, result.error or f"{result.spilled} bytes of stack")
    return [variant for variant, _ in faulty]


def _texts(result: Result) -> list[str]:
    return [f"{number:.0f}" for number in result[:4]]


def _results(
    missing: dict[tuple[str, ...], Variant], jobs: int
) -> Iterator[tuple[tuple[str, ...], Variant, Result]]:
    """Yield names, variants and results; the slowest first, so that no process finishes late."""
    slowest = sorted(missing.items(), key=lambda item: -item[1].columns)
    results = compiled.in_processes(simulate, [variant for _, variant in slowest], jobs)
    for (name, variant), result in zip(slowest, results, strict=True):
        yield name, variant, result


def _order(row: Sequence[str]) -> tuple[int | str, ...]:
    return tuple(int(field) if field.isdecimal() else field for field in row[:N_KEY])
