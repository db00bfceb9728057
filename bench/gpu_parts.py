"""Parts that ``on_gpu`` runs in separate processes: ``python -m fastrnn.bench.gpu_parts NAME``.

A part consists of cases. ``NAME.json`` has a row for each and is written before and after each
case: however the process ends, the rows are kept, and the same command resumes with the next case.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import itertools
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import nn, planner, variants
from . import gpu_steps, gpu_telling, measure, results, terminal
from .built import forced
from .environment import Environment, environment
from .gpu_steps import bench_cases, measure_steps
from .limits import Limits
from .providers import default_providers, problem_of
from .registry import Case
from .results import Results, Row

_SECONDS_PER_CASE = 0.3
_NAME = 42  # width of the name column
#: Exit status when the process can no longer use the GPU.
BROKEN = 3


class Rows(NamedTuple):
    """A part that consists of cases.

    Attributes
    ----------
    cases : sequence
        Each has a name.
    run : callable
        Takes a case; returns its row, with `status` ('ok' if nothing is wrong) and `reason`.
    limit : float
        Seconds that a case may take before it counts as hung.
    """

    cases: Sequence[Any]
    run: Callable[[Any], dict[str, Any]]
    limit: float


def run_cases(part: Rows, name: str, out: Path, seconds: float) -> int:
    """Run the cases that do not have a row yet.

    Parameters
    ----------
    part : Rows
    name : str
    out : Path
    seconds : float
        After which no further case begins.

    Returns
    -------
    int
        Exit status: 0, or `BROKEN` if the GPU stopped responding in a case.
    """
    end = time.monotonic() + seconds
    path = out / f"{name}.json"
    rows = read_rows(path)
    for case in part.cases[len(rows) :]:
        if time.monotonic() > end:
            break
        row = {"name": case.name, "status": "cut off", "reason": "the process ended in this case"}
        write_json(path, [*rows, row])
        faulthandler.dump_traceback_later(part.limit, exit=True, file=2)
        try:
            row |= part.run(case)
        except Exception as failure:  # of any kind: the other cases must run
            reason = traceback.format_exception_only(failure)[-1].strip().partition("\n")[0]
            row |= {"status": "failed", "reason": reason, "traceback": traceback.format_exc()}
        finally:
            faulthandler.cancel_dump_traceback_later()
        rows.append(row)
        write_json(path, rows)
        print(line(name, row), flush=True)
        if row["status"] == "failed" and not _answers():
            return BROKEN
    return 0


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a part; an empty list if there are none.

    Parameters
    ----------
    path : Path

    Returns
    -------
    list of dict of str to Any
    """
    found: list[dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.exists() else []
    return found


def write_json(path: Path, content: Any) -> None:
    """Write a file atomically.

    Parameters
    ----------
    path : Path
    content : Any
    """
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def _answers() -> bool:
    """Return whether the GPU still accepts work from this process; after a fault it does not."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def _tell(case: gpu_telling.Telling) -> dict[str, Any]:
    return gpu_telling.check(case, torch.device("cuda"))


def _time_steps(case: Case) -> dict[str, Any]:
    sizes = {"cell": case.cell, "mode": case.mode, "batch": case.batch, "hidden": case.hidden_size}
    return {**sizes, **measure_steps(case, torch.device("cuda"))}


def _bench(out: Path, case: Case) -> dict[str, Any]:
    """Measure a case as the benchmark does, and update its files with all cases so far."""
    device = torch.device("cuda")
    rows = measure.measure(case, device, _SECONDS_PER_CASE, default_providers("full", device.type))
    limits = Limits(device)
    limits.observe(case)
    rows = measure.with_limits(rows, limits)
    records = itertools.chain(*(row.get("rows", ()) for row in read_rows(out / "bench.json")))
    found = Results(_environment(out), limits.record(), [*map(Row.from_record, records), *rows])
    results.write_json(out / "results.json", found)
    results.write_csv(out / "results.csv", found)
    wrong = [row for row in rows if row.is_ours and row.status != "ok"]
    return {
        "status": wrong[0].status if wrong else "ok",
        "reason": "; ".join(f"{row.provider}: {row.reason or row.error}" for row in wrong),
        **_expected(case, device),
        "rows": [row.record() for row in rows],
    }


def _environment(out: Path) -> Environment:
    """Return the environment that `on_gpu` recorded."""
    try:
        found = json.loads((out / "gpu.json").read_text(encoding="utf-8"))["environment"]
    except FileNotFoundError:
        return environment(torch.device("cuda"), "python -m fastrnn.bench.gpu_parts bench")
    return Environment(**found)


def _expected(case: Case, device: torch.device) -> dict[str, Any]:
    """Return what the planner expected for a case: path, kernels and their simulated step times."""
    plan = planner.plan(problem_of(case, device))
    passes = ("forward", "backward") if case.mode == "training" else ("forward",)
    choices = dict(zip(passes, plan.kernels or (), strict=False))
    return {
        "planned": plan.path,
        "expected_us": gpu_steps.expected_us(choices.values()),
        **{f"{name}_config": list(choice.config) for name, choice in choices.items()},
    }


#: The cases of each part, by its name.
CASES = {"telling": gpu_telling.CASES, "steps": gpu_steps.CASES, "bench": bench_cases()}


def _part(name: str, out: Path) -> Rows:
    run: dict[str, Callable[[Any], dict[str, Any]]] = {
        "telling": _tell,
        "steps": _time_steps,
        "bench": functools.partial(_bench, out),
    }
    return Rows(CASES[name], run[name], limit=90.0 if name == "bench" else 40.0)


def line(name: str, row: dict[str, Any]) -> str:
    """Format a row of a part's table, in one or more lines.

    Parameters
    ----------
    name : str
        Name of the part.
    row : dict of str to Any

    Returns
    -------
    str
    """
    if row["status"] != "ok" and not row.get("rows"):
        return f"{row['name']:{_NAME}}{row['status']}: {row['reason']}"
    if name == "telling":
        return f"{row['name']:{_NAME}}ok: {row['error']:.2f} of the tolerance, by {row['ran']}"
    if name == "steps":
        loops = ("forward_kernel", "backward_kernel")
        kernels = sum(us for kernel, us in row["kernel_us"].items() if kernel.startswith(loops))
        times = f"{_us(row['expected_us']):>6}{kernels:7.2f}{_band(row['ours_us'])}"
        for beside in row["beside"].values():
            times += f"{_band(beside['us'])}{beside['ratio'][0]:6.2f}"
        return f"{row['name']:{_NAME}}{times}  {row['ran']}, {row['planned']}"
    return "\n".join(_bench_line(row, Row.from_record(record)) for record in row["rows"])


#: Table headers.
HEADERS = {
    "telling": f"{'telling':{_NAME}}",
    "steps": f"{'steps: us a step (20th, 80th percentile)':{_NAME}}{'sim.':>6}{'kernel':>7}"
    f"{'ours':>20}{'torch bf16':>20}{'ratio':>6}{'torch fp16':>20}{'ratio':>6}  ran, planned",
    "bench": f"{'bench':{_NAME}}{'provider':20}{'ms':>8}{'ratio':>7}{'graph':>7}{'us/step':>8}"
    f"{'sim.':>7}  ran",
}


def _us(expected: float | None) -> str:
    return "-" if expected is None else f"{expected:.2f}"


def _band(values: Sequence[float]) -> str:
    median, p20, p80 = values
    return f"{f'{median:.2f} ({p20:.2f} {p80:.2f})':>20}"


def _bench_line(expected: dict[str, Any], row: Row) -> str:
    start = f"{row.case.name:{_NAME}}{row.provider:20}"
    if row.times is None:
        return f"{start}{row.status}: {row.reason} error {row.error}"
    graph = f"{row.graph.ratio.median:7.2f}" if row.graph else f"{'-':>7}"
    return (
        f"{start}{row.times.ms.median:8.3f}{row.times.ratio.median:7.2f}{graph}"
        f"{row.step_us:8.2f}{_us(expected['expected_us']):>7}  {row.path}"
    )


_ALL = ("resident", "persistent", "stepwise")
_NOISE = {"recurrent_dropout": 0.5, "zoneout": 0.3}
#: What runs under a sanitizer: layers, options and schedules.
SMALL: tuple[tuple[Any, dict[str, Any], tuple[str, ...]], ...] = (
    (nn.LSTM, {}, _ALL),
    (nn.GRU, _NOISE, _ALL),
    (nn.RNN, {}, _ALL),
    (nn.LSTM, {"proj_size": 7}, ("staged",)),
    (variants.LayerNormLSTM, {}, ("staged", "resident")),
    (variants.ResetBeforeGRU, _NOISE, ("staged", "resident")),
)


def small_layers(device: str = "cuda") -> None:
    """Run every kind of kernel once, forward and backward, on odd sizes.

    Parameters
    ----------
    device : str, default 'cuda'
    """
    runs = [(kind, options, name) for kind, options, names in SMALL for name in names]
    for kind, options, schedule in runs:
        layer = kind(5, 39, bidirectional=True, **options).to(device, torch.bfloat16)
        x = torch.randn(4, 19, 5).to(device, torch.bfloat16).requires_grad_()
        with forced(schedule):
            layer(x)[0].sum().backward()
    torch.cuda.synchronize()


@terminal.printing()
def main(argv: Sequence[str] | None = None) -> int:
    """Run one part.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; those of the command line if None.

    Returns
    -------
    int
        Exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m fastrnn.bench.gpu_parts")
    parser.add_argument("name", choices=(*CASES, "small"))
    parser.add_argument("--out", type=terminal.path, default=Path(), help="folder (default .)")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="after which no further case begins"
    )
    args = parser.parse_args(argv)
    if args.name == "small":
        small_layers()
        return 0
    print(HEADERS[args.name], flush=True)
    return run_cases(_part(args.name, args.out), args.name, args.out, args.seconds)


if __name__ == "__main__":
    sys.exit(main())
