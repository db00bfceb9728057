"""The command line: ``fastrnn info``, ``bench``, ``verify``, ``plan``, ``tune``, ``warmup``."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from . import __version__
from ._arguments import UsageError, device, dtype, natural, positive, require
from .bench.terminal import printing


class _Parser(argparse.ArgumentParser):
    """Reports an invalid argument in one line, with exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON with every field")


def _info(args: argparse.Namespace) -> int:
    from .info import as_json, info
    from .info_text import text

    found = info()
    print(json.dumps(as_json(found), indent=2) if args.json else text(found))
    return 0


def _add_plan(parser: argparse.ArgumentParser) -> None:
    from .cells import CELLS
    from .kernels.configs import DEVICES, PRECISIONS

    parser.add_argument("--cell", required=True, choices=CELLS)
    parser.add_argument("--T", type=positive, default=128, help="time steps (default: 128)")
    parser.add_argument("--B", type=positive, default=1, help="batch size (default: 1)")
    parser.add_argument("--H", type=positive, required=True, help="hidden size")
    parser.add_argument("--I", type=positive, help="input size (default: H)")
    parser.add_argument(
        "--dtype", type=dtype, default=torch.float32, help="data type (default: float32)"
    )
    parser.add_argument(
        "--device", default="cpu",
        help=f"device type, or a GPU, present or not: {', '.join(DEVICES)} (default: cpu)",
    )  # fmt: skip
    parser.add_argument("--layers", type=positive, default=1, help="number of layers (default: 1)")
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument(
        "--precision", choices=PRECISIONS,
        help="precision of float32 products on a GPU (default: torch's current setting)",
    )  # fmt: skip
    parser.add_argument("--training", action="store_true", help="with gradients")
    chained = "with --step and --training: a step in a loop, whose state also has gradients"
    parser.add_argument("--chained", action="store_true", help=chained)
    parser.add_argument("--packed", action="store_true", help="sequences of different lengths")
    parser.add_argument("--projected", action="store_true", help="an LSTM with proj_size")
    parser.add_argument("--step", action="store_true", help="a single step of a cell module")
    parser.add_argument(
        "--marked", action="store_true",
        help="with lengths, resets, bptt, states of all steps, or heads",
    )  # fmt: skip
    parser.add_argument("--noisy", action="store_true", help="with recurrent dropout or zoneout")
    parser.add_argument(
        "--transform", choices=("func", "forward"), help="inside torch.func or forward-mode AD"
    )


def _plan(args: argparse.Namespace) -> int:
    from .devices import float32_precision, gpu
    from .kernels.configs import DEVICES
    from .planner import Problem, plan

    if args.projected and args.cell != "lstm":
        raise UsageError(f"--projected applies to lstm only, not {args.cell}")
    facts = DEVICES.get(args.device)
    try:
        named = torch.device("cuda" if facts else args.device)
    except RuntimeError:
        raise UsageError(f"unknown device {args.device!r}") from None
    if named.type == "cuda" and facts is None:
        facts = gpu(named.index)
        if facts is None:
            raise UsageError(f"no device {args.device!r} here; use one of {', '.join(DEVICES)}")
    chosen = plan(
        Problem(
            args.cell,
            steps=1 if args.step else args.T,
            batch=args.B,
            input_size=args.I or args.H,
            hidden_size=args.H,
            dtype=args.dtype,
            device=named.type,
            training=args.training,
            chained=args.chained and args.step and args.training,
            packed=args.packed,
            projected=args.projected,
            is_step=args.step,
            layers=args.layers,
            directions=2 if args.bidirectional else 1,
            gpu=facts,
            precision=args.precision or float32_precision(),
            marked=args.marked,
            noisy=args.noisy,
            transform=args.transform,
        )
    )
    print(f"{chosen.path}: {chosen.reason}")
    if chosen.source:
        print(f"  decided by:      {chosen.source}")
    for name, choice in zip(("forward", "backward"), chosen.kernels or (), strict=False):
        print(f"  {name + ' kernel:':17}{choice}")
    return 0


def _add_verify(parser: argparse.ArgumentParser) -> None:
    from .testing import MODULES

    parser.add_argument(
        "--cells", nargs="+", choices=MODULES, default=list(MODULES), metavar="CELL",
        help=f"any of {', '.join(MODULES)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", nargs="+", type=dtype, default=[torch.float32, torch.float64],
        help="data types (default: float32 float64)",
    )  # fmt: skip
    parser.add_argument(
        "--device", type=device, default=torch.device("cpu"),
        help="cpu, cuda or cuda:N (default: cpu)",
    )  # fmt: skip
    parser.add_argument(
        "--cases", type=positive, default=100, help="number of cases per dtype (default: 100)"
    )
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--only", type=natural, metavar="K", help="run only case K of each cell")


def _verify(args: argparse.Namespace) -> int:
    require("verify", "rich")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    from rich.table import Table

    from .testing import LIMIT, WORST, verify

    errors, out = Console(stderr=True), Console()
    # The width of the table, folded where a terminal is narrower; a pipe would default to 80.
    out.width = max(out.width, 110 if out.is_terminal else 132)
    total = (len(args.cells) if args.only is not None else args.cases) * len(args.dtype)
    columns = ("verify", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task("verify", total=total)
        summaries, failures = verify(
            args.cells,
            args.dtype,
            cases=args.cases,
            seed=args.seed,
            device=str(args.device),
            only=args.only,
            progress=lambda: progress.advance(task),
        )
    table = Table(
        title=f"errors against float64 on {args.device}",
        caption=f"passes: rms ratio <= {LIMIT:g} and worst <= {WORST:g} units of unavoidable error",
    )
    for heading in ("cell", "dtype", "path"):
        table.add_column(heading, overflow="fold")
    for heading in ("cases", "tensors", "rms fastrnn / torch.nn", "worst units"):
        table.add_column(heading, justify="right")
    for heading in ("worst tensor", ""):
        table.add_column(heading, overflow="fold")
    for row in summaries:
        worst = row.worst
        table.add_row(
            row.cell,
            str(row.dtype).removeprefix("torch."),
            row.path,
            str(row.cases),
            str(row.tensors),
            f"{row.ratio:.2f}",
            f"{worst.units:.2f}" if worst else "-",
            worst.tensor if worst else "-",
            "[green]ok[/]" if row.passed else "[bold red]FAIL[/]",
        )
    out.print(table)
    for failure in failures:
        out.print(f"FAIL {failure.case}\n  {failure.what}\n  {failure.command}", markup=False)
    failed = bool(failures) or not all(row.passed for row in summaries)
    count = sum(row.cases for row in summaries if row.path == "kernels")
    print(f"{count} cases, {len(failures)} failed: {'FAIL' if failed else 'ok'}")
    return int(failed)


def _add_warmup(parser: argparse.ArgumentParser) -> None:
    from .cells import CELLS

    names = list(CELLS)
    parser.add_argument(
        "--cells", nargs="+", choices=names, default=names, metavar="CELL",
        help=f"any of {', '.join(names)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--noisy",
        action="store_true",
        help="compile the kernels with recurrent dropout and zoneout instead",
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        type=dtype,
        default=[torch.float32],
        help="data types (default: float32)",
    )


def _warmup(args: argparse.Namespace) -> int:
    from .cpu import kernel_gap

    gap = kernel_gap(torch.float32)
    if gap is not None:
        print(f"nothing to compile: {gap}")
        return 1
    from . import cache
    from .cells import CELLS
    from .cpu import engine, machine

    # Dtypes that the kernels do not multiply natively use the float32 kernels.
    wanted: dict[tuple[torch.dtype, str], None] = {}
    for of, cell in itertools.product(args.dtype, args.cells):
        multiplies = machine.multiplies(of) and CELLS[cell].is_pointwise
        wanted[of if multiplies else machine.exact_dtype(of), cell] = None
    for of, cell in wanted:
        start = time.perf_counter()
        engine.kernels(CELLS[cell], of, noisy=args.noisy)
        took = time.perf_counter() - start
        print(f"{cell:16} {str(of).removeprefix('torch.'):8} {took:6.2f} s")
    with contextlib.suppress(OSError):  # already logged
        print(f"saved to {cache.cache_folder()}")
    return 0


def _add_tune(parser: argparse.ArgumentParser) -> None:
    from .bench.terminal import path

    parser.add_argument("--device", type=device, help="cpu or cuda (default: all available)")
    parser.add_argument(
        "--seconds", type=positive, default=110, help="total measuring time (default: 110)"
    )
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--show", action="store_true", help="print the table in use")
    one.add_argument("--forget", action="store_true", help="delete the table measured here")
    one.add_argument("--out", type=path, metavar="FOLDER", help="also write tables to this folder")


def _tune(args: argparse.Namespace) -> int:
    from . import tune, tuned

    found = tune.machines(args.device)
    for each, machine in found:
        if args.show:
            print(tune.shown(machine))
        elif args.forget:
            was_there = tuned.forget(machine)
            print(f"{machine}: {'table deleted' if was_there else 'no table to delete'}")
        else:
            table = tune.measured(each, machine, args.seconds / len(found))
            print(tune.kept(table, args.out))
    return 0


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from .bench.cli import add_arguments

    add_arguments(parser)


def _bench(args: argparse.Namespace) -> int:
    from .bench.cli import run

    return run(args)


_COMMANDS: dict[str, tuple[str, Any, Any]] = {
    "info": ("show what fastrnn finds on this machine, for bug reports", _add_info, _info),
    "bench": ("benchmark fastrnn against torch.nn and other libraries", _add_bench, _bench),
    "verify": ("check fastrnn against a float64 oracle and torch.nn", _add_verify, _verify),
    "warmup": ("compile the CPU kernels ahead of their first use", _add_warmup, _warmup),
    "tune": ("measure what the planner needs to know about this machine", _add_tune, _tune),
    "plan": ("show which path a call would take, and why", _add_plan, _plan),
}


@printing()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; by default those of the process.

    Returns
    -------
    int
        Exit status: 0, or 1 if something is wrong. Invalid arguments exit with status 2.
    """
    parser = _Parser(prog="fastrnn", description="Recurrent layers for PyTorch.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar=f"{{{','.join(_COMMANDS)}}}"
    )
    for name, (summary, add_arguments, _) in _COMMANDS.items():
        add_arguments(commands.add_parser(name, help=summary, description=summary))
    args = parser.parse_args(argv)
    try:
        return int(_COMMANDS[args.command][2](args))
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
