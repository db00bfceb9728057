"""``fastrnn bench``: measure, print, write files, compare with earlier results."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from .. import _arguments
from . import registry, results, terminal
from .environment import environment
from .measure import measure_all
from .providers import BASELINE, PROVIDERS, default_providers
from .results import Results, Row

# Times on a GPU vary less than on a CPU, which other programs use too.
_SECONDS = {"cpu": 3.0, "cuda": 1.0}
_ALL = "all"

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastrnn bench``.

    Parameters
    ----------
    parser : argparse.ArgumentParser
    """
    suite = parser.add_mutually_exclusive_group()
    for name, help in (
        ("quick", "about 40 cases in about two minutes (default)"),
        ("full", "hundreds of cases over T, B, H and dtypes"),
        ("published", "sizes with published figures, measured with all available libraries"),
        ("runtimes", "inference on a CPU, compared with onnxruntime and openvino"),
        ("variants", "options and cells that torch.nn lacks, against plain layers and torch loops"),
    ):
        suite.add_argument(f"--{name}", dest="suite", action="store_const", const=name, help=help)
    only = parser.add_argument_group("cases", "restrict the suite or the grid to these")
    _add_list(only, "--cells", _one_of("cell", registry.CELLS), "CELL", ", ".join(registry.CELLS))
    _add_list(only, "--mode", _one_of("mode", registry.MODES), "MODE", ", ".join(registry.MODES))
    _add_list(only, "--dtype", _dtype, "DTYPE", ", ".join(_arguments.DTYPES))
    grid = parser.add_argument_group("grid", "measure all combinations of these instead of a suite")
    for flag, metavar, help in (
        ("--T", "STEPS", "numbers of time steps (default: 128)"),
        ("--B", "BATCH", "batch sizes (default: 1 8 64)"),
        ("--H", "HIDDEN", "hidden sizes (default: 64 256)"),
        ("--I", "INPUT", "input sizes (default: the hidden size)"),
    ):
        _add_list(grid, flag, _arguments.positive, metavar, help)
    grid.add_argument(
        "--layers", type=_arguments.positive, metavar="N", help="number of layers (default: 1)"
    )
    grid.add_argument("--bidirectional", action="store_true")
    grid.add_argument("--ragged", action="store_true", help="sequence lengths from T/4 to T")
    names = [name for name in PROVIDERS if name != BASELINE]
    _add_list(
        parser, "--providers", _one_of("provider", (*names, _ALL)), "NAME",
        f"what to measure besides torch.nn: {_ALL}, {', '.join(names)} (default: fastrnn; with "
        "--published all but fastrnn:reference and fastrnn:plain; with --runtimes also onnxruntime "
        "and openvino; with --variants also fastrnn:plain, loop, torch.compile, flashrnn, haste; "
        "with --full on a GPU also each schedule)",
    )  # fmt: skip
    parser.add_argument(
        "--device", type=_arguments.device, help="cpu, cuda or cuda:N (default: cuda if available)"
    )
    parser.add_argument(
        "--seconds",
        type=_positive_float,
        help="time per case and provider (default: 3 on a CPU, 1 on a GPU)",
    )
    parser.add_argument(
        "--out",
        type=terminal.path,
        metavar="DIR",
        help="output folder (default: bench/results/latest, or the folder of --render)",
    )
    parser.add_argument(
        "--compare", type=terminal.path, metavar="OLD.json", help="compare with these results"
    )
    parser.add_argument(
        "--threshold",
        type=_positive_float,
        metavar="PERCENT",
        default=10.0,
        help="drop in a case's ratio since OLD.json that counts as a regression (default: 10)",
    )
    parser.add_argument(
        "--render",
        type=terminal.path,
        metavar="RESULTS.json",
        help="show these results instead of measuring",
    )


def run(args: argparse.Namespace) -> int:
    """Run the benchmark that the options specify.

    Parameters
    ----------
    args : argparse.Namespace
        From a parser set up by `add_arguments`.

    Returns
    -------
    int
        Exit status: 0, or 1 if fastrnn gave wrong results or failed in a case, became slower than
        in the old results, has no measurement in common with them, or if the run was interrupted.

    Raises
    ------
    UsageError
        Before anything is measured: if rich or matplotlib is missing, options conflict, no case is
        left, the folder is not writable, or a file cannot be read or has none of the cases.
    """
    # Imported only where used: matplotlib takes a second to import, and both may be missing.
    _arguments.require("bench", "rich", "matplotlib")
    old = results.load(args.compare).rows if args.compare else None
    if args.render:
        for flag in ("--suite", *_ONLY, *_GRID, "--providers", "--device", "--seconds"):
            if value := getattr(args, flag.lstrip("-")):
                flag = f"--{value}" if flag == "--suite" else flag
                raise _arguments.UsageError(f"{flag} cannot be combined with --render")
        shown = results.load(args.render)
        paths = _write(_made(args.out or args.render.parent), shown)
        return _show(shown, paths, old, args.threshold / 100)
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases, providers = _cases(args, device), _providers(args, device)
    if not any(PROVIDERS[name].gap(case, device) is None for case in cases for name in providers):
        raise _arguments.UsageError("\n".join(_gaps(cases, providers, device)))
    if old is not None and not {(row.case, row.provider) for row in old} & {
        (case, name) for case in cases for name in providers
    }:
        raise _arguments.UsageError(
            f"{args.compare} contains none of the {len(cases)} cases to measure"
        )
    args.out = _made(args.out or Path("bench/results/latest"))
    found = _measure_all(args, cases, providers, device)
    paths = _write(args.out, found)  # before anything is printed, which may fail
    for gap in _gaps(cases, providers, device):
        print(gap)
    status = _show(found, paths, old, args.threshold / 100)
    measured = len(results.by_case(found.rows))
    if measured < len(cases):
        print(f"interrupted after {measured} of {len(cases)} cases")
    return status or int(measured < len(cases))


def _made(folder: Path) -> Path:
    """Return a writable folder, creating it if it does not exist."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _arguments.UsageError(f"cannot write to {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise _arguments.UsageError(f"cannot write to {folder}: Permission denied")
    return folder


def _show(
    found: Results, paths: Sequence[Path], old: Sequence[Row] | None, threshold: float
) -> int:
    """Print everything; return the exit status."""
    from rich.console import Console

    from . import report

    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    console = Console(width=None if is_terminal else 200, highlight=False)
    for table in (
        report.results_table(found.rows),
        report.providers_table(found.rows),
        report.prices_table(found.rows),
        report.published_table(found.rows),
        report.failures_table(found.rows),
        report.summary_table(found.rows),
    ):
        if table is not None:
            console.print(report.to_rich(table))
    console.print(report.limits_line(found))
    summary, faster, slower = report.conclusions(found)
    console.print("")
    for line in (summary, *faster, *(f"slower: {text}" for text in slower)):
        console.print(line)
    for path in paths:
        console.print(os.path.relpath(path), soft_wrap=True)
    bad = any(row.status != "ok" for row in found.rows if row.is_ours)
    if old is not None:
        changes = results.compare(old, found.rows, threshold)
        console.print(report.to_rich(report.changes_table(changes, threshold)))
        regressions = sum(change.is_regression for change in changes)
        console.print(f"{len(changes)} cases in common, {regressions} regressions")
        bad = bad or regressions > 0 or not changes
    return 1 if bad else 0


def _providers(args: argparse.Namespace, device: torch.device) -> list[str]:
    suite = None if _makes_grid(args) else args.suite or "quick"
    names = _joined(args.providers) or default_providers(suite, device.type)
    return [name for name in PROVIDERS if name != BASELINE] if _ALL in names else names


def _gaps(
    cases: Sequence[registry.Case], providers: Sequence[str], device: torch.device
) -> list[str]:
    """Return a line for each reason why a provider was not measured."""
    reasons = Counter(
        (name, gap)
        for case in cases
        for name in providers
        if (gap := PROVIDERS[name].gap(case, device)) is not None
    )
    return [f"skipped in {count} cases: {name}: {gap}" for (name, gap), count in reasons.items()]


def _cases(args: argparse.Namespace, device: torch.device) -> list[registry.Case]:
    only: dict[str, Any] = {
        "cells": _joined(args.cells),
        "modes": _joined(args.mode),
        "dtypes": _joined(args.dtype),
    }
    axes: dict[str, Any] = {
        "steps": _joined(args.T),
        "batches": _joined(args.B),
        "hidden": _joined(args.H),
        "inputs": _joined(args.I),
        "num_layers": args.layers,
        "bidirectional": args.bidirectional,
        "ragged": args.ragged,
    }
    axes = {name: value for name, value in axes.items() if value}
    if axes and args.suite:
        raise _arguments.UsageError(
            f"--{args.suite} selects a suite and cannot be combined with --T, --B, --H, --I, "
            "--layers, --bidirectional or --ragged, which define a grid"
        )
    if axes:
        return registry.grid(**only, **axes)
    suite = args.suite or "quick"
    cases = registry.select(suite, device.type, **only)
    if not cases:
        raise _arguments.UsageError(
            f"no case of --{suite} matches --cells, --mode and --dtype; "
            "to measure a grid instead, give --T, --B or --H"
        )
    return cases


def _measure_all(
    args: argparse.Namespace,
    cases: Sequence[registry.Case],
    providers: Sequence[str],
    device: torch.device,
) -> Results:
    """Measure with a progress bar; if interrupted, return the results so far."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    env = environment(device, _command(args, device))
    found = Results(env, {}, [])
    columns = (
        BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"),
    )  # fmt: skip
    seconds = args.seconds or _SECONDS[device.type]
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(cases[0].name, total=len(cases))
        following = [*(case.name for case in cases[1:]), ""]
        try:
            for so_far, name in zip(
                measure_all(cases, device, seconds, providers, env, args.out / "results.json"),
                following,
                strict=True,
            ):
                found = so_far
                progress.update(task, advance=1, description=name)
        except KeyboardInterrupt:
            if not found.rows:
                raise
    return found


def _makes_grid(args: argparse.Namespace) -> bool:
    return any(getattr(args, name.lstrip("-")) for name in _GRID)


def _write(folder: Path, found: Results) -> list[Path]:
    """Write the files of a benchmark and return their paths."""
    from . import page, plots

    paths = [folder / "results.json", folder / "results.csv"]
    results.write_json(paths[0], found)
    results.write_csv(paths[1], found)
    pictures = plots.draw(folder, found, paths[0])
    page.write_page(folder / "report.html", found, pictures)
    files = [path for picture in pictures.values() for path in picture]
    return [*paths, *files, folder / "report.html"]


# The options for cases and for the grid, in the order in which `_command` repeats them.
_ONLY = ("--cells", "--mode", "--dtype")
_GRID = ("--T", "--B", "--H", "--I", "--layers", "--bidirectional", "--ragged")


def _command(args: argparse.Namespace, device: torch.device) -> str:
    """Return the command line without the options that name local files."""
    words = ["fastrnn bench"]
    if not _makes_grid(args):
        words.append(f"--{args.suite or 'quick'}")
    for flag in (*_ONLY, *_GRID, "--providers"):
        value = getattr(args, flag.lstrip("-"))
        if value is True:
            words.append(flag)
        elif value:
            values = _joined(value) if isinstance(value, list) else [value]
            words += [flag, *map(str, values or ())]
    words += ["--device", str(device)]
    return " ".join(words + ([f"--seconds {args.seconds:g}"] if args.seconds else []))


def _add_list(
    parser: Any, flag: str, parse: Callable[[str], object], metavar: str, help: str
) -> None:
    parser.add_argument(flag, type=_comma_separated(parse), nargs="+", metavar=metavar, help=help)


def _joined(lists: Sequence[Sequence[T]] | None) -> list[T] | None:
    return None if lists is None else [value for values in lists for value in values]


def _comma_separated(parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    return lambda text: [parse(part) for part in text.split(",")]


def _one_of(what: str, accepted: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in accepted:
            raise argparse.ArgumentTypeError(
                f"unknown {what} {text!r}, expected one of {', '.join(accepted)}"
            )
        return text

    return parse


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
