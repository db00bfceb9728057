"""``fastrnn bench``: measure, print, write files, compare."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from .. import _arguments
from . import registry, results
from .environment import Environment, environment
from .measure import measure, with_shares
from .results import Row

# A GPU repeats its times more closely than a CPU that other programs use too.
_SECONDS = {"cpu": 3.0, "cuda": 1.0}

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastrnn bench``.

    Parameters
    ----------
    parser : argparse.ArgumentParser
    """
    suite = parser.add_mutually_exclusive_group()
    for name, help in (
        ("quick", "some 35 cases in about two minutes (default)"),
        ("full", "hundreds of cases"),
    ):
        suite.add_argument(f"--{name}", dest="suite", action="store_const", const=name, help=help)
    parser.set_defaults(suite="quick")
    grid = parser.add_argument_group(
        "grid", "if any of these is given, their product is measured instead of the suite"
    )
    for flag, parse, metavar in (
        ("--cells", _cell, "CELL"),
        ("--T", _arguments.positive, "STEPS"),
        ("--B", _arguments.positive, "BATCH"),
        ("--H", _arguments.positive, "HIDDEN"),
        ("--dtype", _dtype, "DTYPE"),
    ):
        grid.add_argument(
            flag, type=_comma_separated(parse), nargs="+", metavar=metavar, help=_GRID_HELP[flag]
        )
    parser.add_argument(
        "--device", type=_arguments.device, help="cpu, cuda or cuda:N (default: cuda if any)"
    )
    parser.add_argument(
        "--seconds",
        type=_positive_float,
        help="time spent on each case (default: 3 on a CPU, 1 on a GPU)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("bench/results/latest"),
        help="folder for the files (default: %(default)s)",
    )
    parser.add_argument(
        "--compare", type=Path, metavar="OLD.json", help="a results.json to compare with"
    )
    parser.add_argument(
        "--threshold",
        type=_positive_float,
        metavar="PERCENT",
        default=10.0,
        help="drop of a case's ratio since OLD.json that is a regression (default: 10)",
    )


_GRID_HELP = {
    "--cells": ", ".join(registry.CELLS),
    "--T": "numbers of time steps",
    "--B": "batch sizes",
    "--H": "hidden sizes, and as large inputs",
    "--dtype": ", ".join(_arguments.DTYPES),
}


def run(args: argparse.Namespace) -> int:
    """Run the benchmark that the options ask for.

    Parameters
    ----------
    args : argparse.Namespace
        From a parser with `add_arguments`.

    Returns
    -------
    int
        Exit status: 0, or 1 if a case was wrong, failed or became slower than in the old
        benchmark.

    Raises
    ------
    UsageError
        If rich or matplotlib is missing, the folder cannot be written to, or the old
        benchmark cannot be read or has none of the cases; before anything is measured.
    """
    # Imported only now: matplotlib takes a second, and both may be missing.
    _arguments.require("bench", "rich", "matplotlib")
    from rich.console import Console

    from . import report

    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    grid = {
        "cells": _joined(args.cells),
        "steps": _joined(args.T),
        "batch": _joined(args.B),
        "hidden": _joined(args.H),
        "dtype": _joined(args.dtype),
    }
    cases = registry.select(args.suite, device.type, **grid)
    old = results.load(args.compare)[1] if args.compare else None
    if old is not None and not {row.case for row in old} & set(cases):
        raise _arguments.UsageError(f"{args.compare} has none of the {len(cases)} cases to measure")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _arguments.UsageError(f"cannot write to {args.out}: {error.strerror}") from error
    if not os.access(args.out, os.W_OK):
        raise _arguments.UsageError(f"cannot write to {args.out}: Permission denied")

    rows = _measure_all(cases, device, args.seconds or _SECONDS[device.type])
    env = environment(device, _command(args, device))
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(report.results_table(rows))
    console.print(report.summary_table(results.summarize(rows)))
    console.print(report.totals(rows))
    for path in _write(args.out, env, rows):
        console.print(os.path.relpath(path), soft_wrap=True)

    bad = any(row.status != "ok" for row in rows)
    if old is not None:
        changes = results.compare(old, rows, args.threshold / 100)
        console.print(report.changes_table(changes, args.threshold / 100))
        regressions = sum(change.is_regression for change in changes)
        console.print(f"{len(changes)} cases in both, {regressions} regressions")
        bad = bad or regressions > 0
    return 1 if bad else 0


def _measure_all(cases: Sequence[registry.Case], device: torch.device, seconds: float) -> list[Row]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    rows = []
    case_name = TextColumn("{task.description}")
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), case_name)
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=f"{case.cell} {case.mode} {case.shape}")
            rows.append(measure(case, device, seconds))
            progress.advance(task)
    return with_shares(rows, device)


def _write(folder: Path, env: Environment, rows: Sequence[Row]) -> list[Path]:
    from . import page, plots

    names = ("results.json", "results.csv", "speedup.png", "time.png", "report.html")
    paths = [folder / name for name in names]
    results.write_json(paths[0], env, rows)
    results.write_csv(paths[1], env, rows)
    plots.plot_speedup(paths[2], env, rows)
    plots.plot_time(paths[3], env, rows)
    page.write_page(paths[4], env, rows, paths[2], paths[3])
    return paths


def _command(args: argparse.Namespace, device: torch.device) -> str:
    """The command line without the options that name files of this machine."""
    words = ["fastrnn bench", f"--{args.suite}"]
    for flag in _GRID_HELP:
        if values := _joined(getattr(args, flag.lstrip("-"))):
            words += [flag, *map(str, values)]
    words += ["--device", str(device)]
    return " ".join(words + ([f"--seconds {args.seconds:g}"] if args.seconds else []))


def _joined(lists: Sequence[Sequence[T]] | None) -> list[T] | None:
    return None if lists is None else [value for values in lists for value in values]


def _comma_separated(parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    return lambda text: [parse(part) for part in text.split(",")]


def _cell(text: str) -> str:
    if text not in registry.CELLS:
        raise argparse.ArgumentTypeError(
            f"unknown cell {text!r}, expected one of {', '.join(registry.CELLS)}"
        )
    return text


def _dtype(text: str) -> str:
    return str(_arguments.dtype(text)).removeprefix("torch.")


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value
