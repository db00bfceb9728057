"""Run all kernels of the compile budget in the emulator, under many schedules: ``make emulate``.

``bench/compile_budget.py`` lists the kernels that may be planned. Here each of those for an NVIDIA
GPU runs in a layer whose batch fills one program except for a row, one forward and one backward
kernel at a time, until all schedules or the layer's time are used up. A row of the file states the
outcome.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import multiprocessing
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from fastrnn.bench import compile_budget
from fastrnn.kernels.configs import Config

from .driver import EmulationError, Schedule
from .layers import GPUS, HAVE_MAXIMUM, Case, check, described, emulate, faults
from .machine import DRAINS, POLICIES
from .program import PtxError

# Each policy with each way of draining, the most different ones first, then with other seeds.
_WAYS = sorted(
    itertools.product(range(len(POLICIES)), range(len(DRAINS))),
    key=lambda way: (sum(way) % len(DRAINS), way),
)
_STEPS, _FEWER_STEPS, _LARGE = 4, 2, 1024
_UNKNOWN = "not emulated"


class Row(NamedTuple):
    """A layer, its kernels and their outcome.

    Attributes
    ----------
    cell, run, dtype, precision, hidden_size, gpu
        As in the compile budget, with two of its runs in one: forward and backward.
    batch, steps : int
    forward, backward : str
        Schedule, block_b x block_h x block_k, warps, chunks of the weights in registers.
    schedules : int
        How many were run.
    instructions : int
        Warp instructions under the first schedule.
    result : str
        'ok': correct, bitwise identical under all schedules, and no fault; possibly 'without
        gradients', where rounding decides some in cells with a maximum. Otherwise what failed; or,
        with 'not emulated', which instruction is unknown.
    triton, commit, date : str
        The commit is the last that changed a kernel.
    """

    cell: str
    run: str
    dtype: str
    precision: str
    hidden_size: int
    gpu: str
    batch: int
    steps: int
    forward: str
    backward: str
    schedules: int
    instructions: int
    result: str
    triton: str
    commit: str
    date: str


def cases() -> Iterator[tuple[str, Case]]:
    """List runs and layers that together cover every kernel."""
    devices = [name for name in compile_budget.DEVICES if name in GPUS]
    kernels: dict[Any, tuple[list[Config], list[Config]]] = defaultdict(lambda: ([], []))
    for variant in compile_budget.plan(devices):
        if variant.is_involved:  # see test_staged.py
            continue
        way, *options = variant.run.split()
        is_backward = way in ("backward", "recompute")
        run = way if way in ("recompute", "inference") else " ".join(("training", *options))
        facts = variant.device, variant.cell, run, variant.dtype, variant.precision
        config = Config(*variant[6:], tiles=1)
        found = kernels[(*facts, variant.hidden_size)][is_backward]
        if config not in found:
            found.append(config)
    for (gpu, cell, run, dtype, precision, hidden), (forward, backward) in kernels.items():
        if run == "recompute":
            forward, _ = kernels[gpu, cell, "training", dtype, precision, hidden]
        # If one pass has fewer planned kernels than the other, they are reused.
        for n in range(max(len(forward), len(backward))):
            pair = [of[min(n, len(of) - 1)] for of in (forward or backward, backward or forward)]
            yield (
                run,
                Case(
                    cell,
                    hidden,
                    max(config.block_b for config in pair) - 1,
                    _STEPS if hidden < _LARGE else _FEWER_STEPS,
                    dtype,
                    precision,
                    flow=" ".join(word for word in run.split() if word in ("marked", "fresh")),
                    noise="drop units" if "noisy" in run.split() else "",
                    training=run != "inference",
                    recompute=run == "recompute",
                    gpu=gpu,
                    configs=(pair[0], pair[1]),
                ),
            )


def schedule(n: int) -> Schedule:
    """Return the n-th schedule."""
    policy, drain = _WAYS[n % len(_WAYS)]
    return Schedule(n, POLICIES[policy], DRAINS[drain])


def measure(case: Case, schedules: int, seconds: float) -> tuple[int, int, str]:
    """Run a layer; return the number of schedules, the instructions and the result."""
    start, first, instructions = time.monotonic(), None, 0
    good = "ok"
    if case.cell in HAVE_MAXIMUM and case.eps > 1e-4:
        good = "ok, without gradients"  # see `stable`: with so many numbers, rounding decides some
    for n in range(schedules):
        # At least two runs, to compare bits.
        if n >= 2 and time.monotonic() - start > seconds:
            return n, instructions, good
        try:
            results, emulator = emulate(case, schedule(n))
            if found := faults(emulator):
                return n + 1, instructions, found[0]
            if first is None:
                check(case, results, gradients=good == "ok")
                first = results
                instructions = sum(one.outcome.instructions for one in emulator.launches)
            for name, part in results.items():
                assert torch.equal(part, first[name]), f"{name} depends on the order of things"
        except (AssertionError, EmulationError, PtxError) as error:
            if isinstance(error, PtxError) and case.gpu == "b200" and "tcgen05" in str(error):
                return 0, instructions, f"{_UNKNOWN}: {error}"
            text = re.sub(r"\s+", " ", str(error))
            return n + 1, instructions, f"{type(error).__name__}: {text}"[:300]
    return schedules, instructions, good


def _measured(arguments: tuple[Case, int, float]) -> tuple[int, int, str]:
    torch.set_num_threads(1)
    return measure(*arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if any result is wrong, else 0."""
    parser = argparse.ArgumentParser(prog="python -m ptx.sweep", description=__doc__)
    parser.add_argument("--schedules", type=int, default=20, help="of each layer")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of each layer")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, default=Path("bench/results/emulated.csv"))
    parser.add_argument("--only", default="", help="regular expression of layers")
    parser.add_argument("--missing", action="store_true", help="what the file has no good row of")
    args = parser.parse_args(argv)
    command = ["git", "log", "-1", "--format=%h", "--", "kernels"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    known = _known(args.out, commit) if args.missing else {}
    wanted = [(run, case) for run, case in cases() if re.search(args.only, f"{run} {case}")]
    wanted.sort(key=lambda pair: pair[1].hidden)  # quick ones first
    todo = [(run, case) for run, case in wanted if _key(_row(run, case)) not in known]
    rows, since = list(known.values()), time.monotonic()
    context = multiprocessing.get_context("spawn")  # forking torch's threads may hang
    with (
        ProcessPoolExecutor(args.jobs, mp_context=context) as pool,
        args.out.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(rows)
        given = [(case, args.schedules, args.seconds) for _, case in todo]
        for n, ((run, case), found) in enumerate(
            zip(todo, pool.map(_measured, given), strict=True)
        ):
            row = _row(run, case, *found, triton.__version__, commit, _today())
            rows.append(row)
            writer.writerow(row)
            file.flush()
            passed = time.monotonic() - since
            print(f"{n + 1}/{len(todo)} {passed:.0f} s {run} {case}: {found[2]}", flush=True)
    runs = sum(int(row.schedules) for row in rows)
    unknown = sum(row.result.startswith(_UNKNOWN) for row in rows)
    bad = sum(not row.result.startswith("ok") for row in rows) - unknown
    print(f"{len(rows)} layers, {runs} runs, {unknown} {_UNKNOWN}, {bad} not right")
    return int(bool(bad))


def _today() -> str:
    return datetime.date.today().isoformat()


def _row(run: str, case: Case, *found: int | str) -> Row:
    texts = map(described, case.configs or ())
    facts = case.cell, run, case.dtype, case.precision, case.hidden, case.gpu
    rest = found or (0, 0, "", "", "", "")
    return Row(*facts, case.batch, case.steps, *texts, *rest)


def _key(row: Row) -> tuple[str, ...]:
    return tuple(map(str, row[: Row._fields.index("schedules")]))


def _known(path: Path, commit: str) -> dict[tuple[str, ...], Row]:
    """Read the good rows of a file that match the current kernels and compiler."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = [Row(*fields) for fields in itertools.islice(csv.reader(file), 1, None)]
    return {
        _key(row): row
        for row in rows
        if (row.triton, row.commit) == (triton.__version__, commit)
        and row.result.startswith(("ok", _UNKNOWN))
    }


if __name__ == "__main__":
    sys.exit(main())
