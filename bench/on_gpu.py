"""Run everything that needs a GPU, in one program: ``python -m fastrnn.bench.on_gpu``.

In order of importance, in case time is short: whether kernels are right, on a few informative
cases, beginning with those whose programs wait for each other; how long a step takes, in ours and
in torch.nn's; the GPU tests; compute-sanitizer's memcheck and racecheck on small layers; the
benchmark, the most informative cases first, until the time is used up. Each part is a process with
a time limit of its own: a hang or crash costs one case, or its part, but not the others.

It needs torch, triton, pytest and hypothesis, but no network and no installation: run it in the
root of a checkout. The evidence is written before the next part begins: ``gpu.json`` has all of it,
``telling.json``, ``steps.json`` and ``bench.json`` the rows of their parts as they come,
``tests.xml`` is pytest's, ``results.json`` and ``results.csv`` are the benchmark's, from which
``fastrnn bench --render`` makes pictures and a page. A table is printed last, and the exit status
is 1 if a part found something wrong, crashed or ran out of time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch

from . import terminal
from .environment import Environment, environment
from .gpu_parts import CASES, HEADERS, line, read_rows, write_json

_ROOT = Path(__file__).resolve().parents[1]
_GRACE = 10.0  # seconds between asking a program to stop and killing it
_RESERVE = _GRACE + 5  # seconds reserved at the end, for that and for writing files
_LAST = 15.0  # seconds before the end of a part, during which it starts nothing new
_TAIL = 200  # lines kept of a program's output
_SHOWN = 11_500  # maximum characters of the table


class Part(NamedTuple):
    """A part, which runs in a process of its own.

    Attributes
    ----------
    name : str
    command : tuple of str
        ``{out}`` stands for the folder and ``{seconds}`` for the time until which it may start
        something new.
    share : float
        Share of the remaining time that it may take; the last part may take all.
    is_endless : bool
        Whether it uses all the time available.
    """

    name: str
    command: tuple[str, ...]
    share: float
    is_endless: bool = False


def parts() -> list[Part]:
    """List the parts in order.

    Returns
    -------
    list of Part
    """
    module = sys.executable, "-m", "fastrnn.bench.gpu_parts"
    rows = "--out={out}"
    pytest = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-q", "--no-header", "-rfE"]
    pytest += ["-p", "no:cacheprovider", "-p", "no:benchmark", "--tb=short"]
    pytest += ["--junitxml={out}/tests.xml"]
    if importlib.util.find_spec("pytest_timeout"):
        # Turn a hang into a named failure. A thread ends it: no signal interrupts a GPU wait.
        pytest += ["--timeout=60", "--timeout-method=thread"]
    if importlib.util.find_spec("xdist"):
        # Most of the time is compilation.
        pytest += ["-n", str(min(8, os.cpu_count() or 1))]
    sanitizer = "compute-sanitizer", "--error-exitcode", "9", "--tool"
    return [
        Part("telling", (*module, "telling", rows), 0.25),
        Part("steps", (*module, "steps", rows), 0.35),
        Part("tests", tuple(pytest), 0.4),
        Part("memcheck", (*sanitizer, "memcheck", *module, "small"), 0.3),
        Part("racecheck", (*sanitizer, "racecheck", *module, "small"), 0.3),
        Part("bench", (*module, "bench", rows, "--seconds={seconds}"), 1.0, is_endless=True),
    ]


@terminal.printing()
def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; those of the command line if None.

    Returns
    -------
    int
        Exit status.
    """
    chosen = parts()
    names = [part.name for part in chosen]
    parser = argparse.ArgumentParser(prog="python -m fastrnn.bench.on_gpu", description=__doc__)
    parser.add_argument(
        "--out", type=terminal.path, help="folder (default bench/results/<device>-<date>)"
    )
    parser.add_argument("--minutes", type=float, default=13.0, help="time limit (default 13)")
    parser.add_argument("--commit", help="commit of the checkout, where git cannot tell")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="run only these")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    end = time.monotonic() + 60 * args.minutes - _RESERVE
    env = environment(torch.device("cuda"), "python -m fastrnn.bench.on_gpu")
    if args.commit:
        env = dataclasses.replace(env, commit=args.commit)
    out = args.out or _ROOT / "bench" / "results" / _folder(env)
    out = out.resolve()  # the parts run in the root
    out.mkdir(parents=True, exist_ok=True)
    evidence: dict[str, Any] = {"environment": dataclasses.asdict(env)}
    evidence["cuda"] = torch.version.cuda
    run_parts([part for part in chosen if part.name in args.only], out, evidence, end)
    print(table(evidence))
    return int(evidence["failed"])


def _folder(env: Environment) -> str:
    device = re.sub(r"[^a-z0-9]+", "-", env.device.lower()).strip("-")
    return f"{device}-{env.date[:10]}"


def run_parts(chosen: Sequence[Part], out: Path, evidence: dict[str, Any], end: float) -> None:
    """Run parts one after another and add their results to the evidence, also in ``gpu.json``.

    Parameters
    ----------
    chosen : sequence of Part
    out : Path
    evidence : dict of str to Any
    end : float
        Deadline for everything, by ``time.monotonic``.
    """
    evidence |= {"parts": {}, "failed": False}
    write_json(out / "gpu.json", evidence)
    for part in chosen:
        seconds = (end - time.monotonic()) * (1.0 if part is chosen[-1] else part.share)
        print(f"== {part.name}: at most {seconds:.0f} s", flush=True)
        found = _run_part(part, out, seconds)
        evidence["parts"][part.name] = found
        evidence["failed"] |= found["failed"]
        write_json(out / "gpu.json", evidence)


def _run_part(part: Part, out: Path, seconds: float) -> dict[str, Any]:
    """Run a part, and restart it as long as it crashes after new rows: it resumes behind them."""
    start = time.monotonic()
    kept = out / f"{part.name}.json", out / f"{part.name}.xml"
    for path in kept:
        path.unlink(missing_ok=True)
    status: int | str = "out of time"
    rows: list[dict[str, Any]] = []
    output: deque[str] = deque(maxlen=_TAIL)
    starts = 0
    if shutil.which(part.command[0]) is None:
        status = "not run"
        output.append(f"{part.command[0]} is not installed\n")
    while status != "not run" and (left := seconds - (time.monotonic() - start)) > 0:
        until = f"{max(0.0, left - _LAST):.0f}"
        command = [
            word.replace("{out}", str(out)).replace("{seconds}", until) for word in part.command
        ]
        status = _run(command, left, output)
        starts += 1
        before, rows = len(rows), read_rows(kept[0])
        if status in (0, "out of time") or len(rows) == before:
            break
    if status and any("Device not supported" in text for text in output):
        status = "not run"  # the sanitizer does not support some virtual machines
    rows += _failed_tests(kept[1])
    is_over = status in (0, "not run")
    if part.is_endless and status == "out of time" and len(rows) > 1:
        is_over, rows = True, rows[:-1]  # the last row was cut off
    wrong = any(row["status"] != "ok" for row in rows)
    return {
        "command": " ".join(part.command[1:]),
        "status": status,
        "failed": wrong or not is_over or (part.is_endless and not rows),
        "starts": starts,
        "seconds": round(time.monotonic() - start, 1),
        "output": "".join(output),
        "rows": rows,
    }


def _run(command: Sequence[str], seconds: float, output: deque[str]) -> int | str:
    """Run a program, passing its output on; return its status, or 'out of time'."""
    environ = {
        **os.environ, "PYTHONPATH": str(_ROOT), "TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1"
    }  # fmt: skip
    # In its own process group, so that no child keeps using the GPU.
    process = subprocess.Popen(
        command, cwd=_ROOT, env=environ, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
    )  # fmt: skip
    reader = threading.Thread(target=_pass_on, args=(process.stdout, output), daemon=True)
    reader.start()
    status: int | str
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        status = "out of time"
        # On an interrupt, pytest reports the failures so far.
        for interruption in (signal.SIGINT, signal.SIGKILL):
            os.killpg(process.pid, interruption)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
                break
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        reader.join(_GRACE)
    return status


def _pass_on(stream: Any, output: deque[str]) -> None:
    with stream:
        for text in stream:
            output.append(text)
            with contextlib.suppress(OSError):  # the reader is gone
                print(text, end="", flush=True)


def _failed_tests(path: Path) -> list[dict[str, Any]]:
    """Return the failures in pytest's file, which does not exist if pytest was killed."""
    try:
        cases = ElementTree.parse(path).iter("testcase")
    except (OSError, ElementTree.ParseError):
        return []
    return [
        {
            "name": str(case.get("name")),
            "status": "failed",
            "reason": str(found.get("message")).partition("\n")[0],
        }
        for case in cases
        for found in case
        if found.tag in ("failure", "error")
    ]


def table(evidence: dict[str, Any]) -> str:
    """Format the table that is printed last, short enough for the end of a log.

    Parameters
    ----------
    evidence : dict of str to Any

    Returns
    -------
    str
        How long a step takes; what is wrong; how the parts ended, and their rows.
    """
    found = evidence["parts"]
    lines = _table_of("steps", found)
    wrong = [
        f"{name}: {row['name']}: {row['status']}: {row['reason']}"
        for name, part in found.items()
        for row in part["rows"]
        if row["status"] != "ok"
    ]
    lines += ["", "wrong:", *wrong[:30]] if wrong else ["", "nothing wrong in the parts that ran"]
    lines += [f"and {len(wrong) - 30} more, in gpu.json"] if len(wrong) > 30 else []
    lines.append("")
    for name, part in found.items():
        more = f", {len(part['rows'])} of {len(CASES[name])} cases" if name in CASES else ""
        more += f", {part['starts']} starts" if part["starts"] > 1 else ""
        verdict = "failed" if part["failed"] else "not run" if not part["starts"] else "right"
        lines.append(f"{name}: {verdict}; status {part['status']}, {part['seconds']} s{more}")
        if name not in CASES or part["status"] not in (0, "out of time"):
            lines += [f"    {text}" for text in part["output"].splitlines()[-6:]]
    lines += [*_table_of("telling", found), *_table_of("bench", found)]
    shown, size = [], 0
    for text in "\n".join(lines).splitlines():
        size += len(text[:200]) + 1
        if size > _SHOWN:
            shown.append("and more, in gpu.json")
            break
        shown.append(text[:200])
    return "\n".join(shown)


def _table_of(name: str, found: dict[str, Any]) -> list[str]:
    """Return the header and the rows that have numbers; the others are listed as wrong."""
    rows = found[name]["rows"] if name in found else []
    lines = [line(name, row) for row in rows if row["status"] == "ok" or row.get("rows")]
    return ["", HEADERS[name], *lines] if lines else []


if __name__ == "__main__":
    sys.exit(main())
