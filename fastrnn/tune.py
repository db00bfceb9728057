"""``fastrnn tune``: measure where fastrnn's or torch's kernels are faster on this machine."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import PackedSequence

from . import __version__, crossover, devices, hardware, nn, tuned
from ._arguments import DTYPES, UsageError
from .bench.built import Built, flat, forced
from .bench.gate import tolerances_of, worst_error
from .bench.limits import on_equal_terms, seconds_of
from .bench.measure import ready
from .bench.registry import Case
from .hardware import Machine
from .tuned import Point, Row, Table

_log = logging.getLogger("fastrnn")


def machines(device: torch.device | None) -> list[tuple[torch.device, Machine]]:
    """Describe a device, or all available ones."""
    if device is None:
        is_gpu_there = devices.gpu() is not None
        both = (torch.device("cpu"), torch.device("cuda"))
        return [found for each in both[: 1 + is_gpu_there] for found in machines(each)]
    if device.type == "cpu":
        return [(device, hardware.cpu())]
    facts = devices.gpu(device.index)
    if facts is None:
        raise UsageError("fastrnn tune needs triton to measure a GPU")
    return [(device, hardware.gpu(facts))]


def measured(device: torch.device, machine: Machine, seconds: float) -> Table:
    """Measure a machine within a time limit in seconds, showing progress."""
    tasks = tasks_of(device)
    with _progress(str(machine), len(tasks)) as progress:
        rows = tune(tasks, measure_on(device), seconds, progress)
    today = datetime.now(timezone.utc).date().isoformat()
    return Table(machine, torch.__version__, __version__, today, _limits(), tuple(sorted(rows)))


def _limits() -> str:
    """Return the environment variables that restrict which instructions torch uses."""
    names = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
    return " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)


def kept(table: Table, folder: Path | None) -> str:
    """Save a table to the user's cache and, optionally, to a folder; return a message."""
    try:
        paths = [tuned.keep(table)]
        if folder is not None:
            words = re.findall(r"\w+", str(table.machine).lower())
            paths.append(folder / f"{'-'.join(words)}.csv")
            paths[-1].write_text(tuned.text_of(table), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot save the table: {error}") from None
    return f"{len(table.rows)} points, saved to {' and '.join(map(str, paths))}"


def shown(machine: Machine) -> str:
    """Format the table in use."""
    table = tuned.table_of(machine)
    if table is None:
        return f"{machine}: no table, a {tuned.MODEL} decides; run fastrnn tune to measure one"
    lines = [
        f"{machine}: {table.source}",
        f"torch {table.torch}, fastrnn {table.fastrnn} {table.limits}".rstrip(),
        "speedup over torch.nn (torch.nn's time / fastrnn's) by T",
    ]
    rows = sorted(table.rows, key=lambda row: (row.point.group, row.path, row.point.sizes[1:]))
    for (group, path), of_group in itertools.groupby(rows, lambda row: (row.point.group, row.path)):
        found = list(of_group)
        steps = sorted({row.point.steps for row in found})
        lines += ["", " ".join((*group, path)), " " * 14 + "".join(f"{n:8}" for n in steps)]
        for (batch, hidden), of_line in itertools.groupby(found, lambda row: row.point.sizes[1:]):
            ratios = {row.point.steps: f"{row.ratio:.2f}" for row in of_line}
            cells = "".join(f"{ratios.get(n, '-'):>8}" for n in steps)
            lines.append(f"B {batch:<4} H {hidden:<5}{cells}")
    return "\n".join(lines)


class Task(NamedTuple):
    """A point, and fastrnn's path that is measured against torch.nn."""

    point: Point
    path: str

    def __str__(self) -> str:
        return " ".join(map(str, (*self.point, self.path)))


#: Measures a task, given its share of the time and the time left for all tasks, in seconds. Returns
#: None if the path gives wrong results, cannot run, or would take too long.
Measure = Callable[[Task, float, float], Row | None]


def tune(
    tasks: Sequence[Task], measure: Measure, seconds: float, progress: Callable[[int], None]
) -> list[Row]:
    """Measure tasks in order until time runs out, and report progress after each.

    The unused part of a task's share goes to the tasks after it.
    """
    rows, end = [], time.perf_counter() + seconds
    for done, task in enumerate(tasks):
        left = end - time.perf_counter()
        if left <= 0:
            break
        row = measure(task, left / (len(tasks) - done), left)
        if row is not None:
            rows.append(row)
        progress(done + 1)
    return rows


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar, or lines of text if rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        print(f"measuring {what}", file=sys.stderr, flush=True)
        yield lambda done: None if done % 50 else print(f"{done} of {total}", file=sys.stderr)
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


# What is measured.

_CELLS = ("lstm", "gru", "rnn_tanh")
_MODES = ("forward", "training")
_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1}


def tasks_of(device: torch.device) -> list[Task]:
    """List the tasks for a device in the order in which they are measured."""
    return _cpu_tasks() if device.type == "cpu" else list(_gpu_tasks(device))


# Floating-point operations in the products of an inference call: about 20 ms on two cores. Larger
# sizes, like their neighbors in the grid, are bound by these products alone.
_MOST_FLOPS = 5e9

# Steps, batches and hidden sizes, by kind. The grid is fine only for plain layers in float32, whose
# behavior the other kinds and formats share.
_FINE = ((1, 4, 16, 64, 256), (1, 8, 64), (64, 256, 1024))
_COARSE = ((1, 16, 64), (1, 8, 64), (64, 256))
_PACKED = ((4, 16, 64), (2, 8, 64), (64, 256))  # with fewer steps or rows, all lengths are equal
_STEP = ((1,), (1, 8, 64), (64, 256, 1024))


def _cpu_tasks() -> list[Task]:
    """List the cheapest tasks first, so that the largest are dropped if time runs out."""
    halves = (name for name in ("bfloat16", "float16") if crossover.multiplies(DTYPES[name]))
    formats = ("float64", *halves)
    groups = [
        ("plain", "float32", _CELLS, _FINE),
        ("packed", "float32", _CELLS, _PACKED),
        ("step", "float32", _CELLS, _STEP),
        ("projected", "float32", ("lstm",), _COARSE),
        *(("plain", format, _CELLS, _COARSE) for format in formats),
    ]
    points = [
        Point(cell, mode, format, kind, *sizes)
        for kind, format, cells, axes in groups
        for cell, mode, sizes in itertools.product(cells, _MODES, itertools.product(*axes))
    ]
    affordable = [point for point in points if _flops(point) <= _MOST_FLOPS]
    return [
        Task(point, crossover.ours(tuned.problem_of(point)))
        for point in sorted(affordable, key=lambda point: (_cost(point), point))
    ]


def _flops(point: Point) -> float:
    steps, batch, hidden = point.sizes
    return 4.0 * steps * batch * _GATES[point.cell] * hidden * hidden


def _cost(point: Point) -> float:
    """Return the number of operations plus an allowance for the fixed cost of a step."""
    passes = 3 if point.mode == "training" else 1
    return passes * (_flops(point) + 1e6 * point.steps)


_GPU_SIZES = ((512, 128, 1024, 256, 64), (16, 64, 1), (256, 16))  # H, B, T


def _gpu_tasks(device: torch.device) -> Iterator[Task]:
    """Yield the most informative tasks first: compiling each takes seconds, so few may run."""
    gpu, of_float32 = devices.gpu(device.index), devices.float32_precision()
    formats = ("bfloat16", of_float32, "float16")
    order = itertools.product(formats, _CELLS, *_GPU_SIZES, _MODES)
    for format, cell, hidden, batch, steps, mode in order:
        point = Point(cell, mode, format, "plain", steps, batch, hidden)
        precision = of_float32 if format == of_float32 else "tf32"
        problem = tuned.problem_of(point, device="cuda", gpu=gpu, precision=precision)
        if devices.kernel_gap(problem) is None:
            for schedule in devices.schedules(problem):
                yield Task(point, schedule)


# How it is measured.

_SAMPLE_SECONDS = 1e-3  # long enough to make the cost of reading the clock negligible
_MIN_PAIRS, _MAX_PAIRS = 5, 200
_MOST = 0.2  # largest fraction of the remaining time for one task


def measure_on(device: torch.device) -> Measure:
    """Return the function that measures on a device."""

    def measure(task: Task, seconds: float, left: float) -> Row | None:
        try:
            with on_equal_terms(device), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "LSTM with projections is not supported")
                return _measure(task, device, seconds, left)
        except Exception as failure:  # usually out of memory: the other tasks can still be measured
            _log.warning("%s failed: %s", task, str(failure).partition("\n")[0])
            return None

    return measure


def _measure(task: Task, device: torch.device, seconds: float, left: float) -> Row | None:
    end = time.perf_counter() + seconds
    case, (stock, ours), inputs = _made(task.point, device)
    # A path is forced around a whole sample, because forcing it per call would add to the time.
    sides = (stock, None), (ours, task.path)
    calls, results = [], []
    for module, path in sides:
        with _on(path):
            call = ready(case, _built(case, module, inputs))
            results.append(call.results())
        calls.append(call.call)
    count = len(list(ours.parameters())) if case.mode == "training" else 0
    tolerances = tolerances_of(case, device)._replace(parameters=count)
    error, tolerance = worst_error(results[1], results[0], tolerances)

    def sample(side: int, repeats: int) -> float:
        with _on(sides[side][1]):
            return seconds_of(calls[side], repeats, device)

    if not error <= tolerance:  # a NaN is wrong
        _log.warning("%s is wrong: error %.1e, tolerance %.1e", task, error, tolerance)
        return None
    singles = [sample(side, 1) for side in (0, 1)]
    if _MIN_PAIRS * sum(singles) > _MOST * left:
        return None
    repeats = math.ceil(_SAMPLE_SECONDS / min(singles))
    pairs: list[list[float]] = []
    while len(pairs) < _MIN_PAIRS or (time.perf_counter() < end and len(pairs) < _MAX_PAIRS):
        times = [0.0, 0.0]
        for side in (0, 1) if len(pairs) % 2 else (1, 0):
            times[side] = sample(side, repeats)
        pairs.append(times)
    # Other load on the machine can only add time, so the minimum is the best estimate.
    theirs, mine = map(min, zip(*pairs, strict=True))
    return Row(task.point, task.path, 1e6 * mine, theirs / mine)


def _on(path: str | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if path is None else forced(path)


def _made(
    point: Point, device: torch.device
) -> tuple[Case, tuple[torch.nn.Module, torch.nn.Module], list[torch.Tensor]]:
    """Make the benchmark case of a point, torch.nn's and fastrnn's modules, and the inputs."""
    (steps, batch, hidden), is_step = point.sizes, point.kind == "step"
    dtype, cell = tuned.dtype_of(point), point.cell.removesuffix("_tanh")
    name = cell + "_cell" * is_step
    case = Case(
        name, point.mode, str(dtype).removeprefix("torch."), steps, batch, hidden, hidden,
        ragged=point.kind == "packed",
    )  # fmt: skip
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    if point.kind == "projected":
        options["proj_size"] = hidden // 2
    kind = cell.upper() + "Cell" * is_step
    stock, ours = (getattr(of, kind)(hidden, hidden, **options) for of in (torch.nn, nn))
    ours.load_state_dict(stock.state_dict())
    rows = (batch,) if is_step else (sum(case.lengths),) if case.ragged else (steps, batch)
    inputs = [torch.randn(*rows, hidden, device=device, dtype=dtype)]
    if is_step:  # a loop over steps passes a state; a layer is usually called without one
        inputs += [torch.zeros_like(inputs[0]) for _ in range(2 if cell == "lstm" else 1)]
    return case, (stock, ours), inputs


def _built(case: Case, module: torch.nn.Module, inputs: list[torch.Tensor]) -> Built:
    sizes = torch.tensor([sum(n > t for n in case.lengths) for t in range(case.steps)])

    def run(x: torch.Tensor, *state: torch.Tensor) -> list[torch.Tensor]:
        if case.ragged:
            output, final = module(PackedSequence(x, sizes))
            return [output.data, *flat(final)]
        return flat(module(x, *([state] if len(state) > 1 else state)))

    return Built(run, inputs, list(module.parameters()))
