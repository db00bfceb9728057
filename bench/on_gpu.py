"""Everything that only a GPU can show, in one program: ``python -m fastrnn.bench.on_gpu``.

In order: the GPU tests; compute-sanitizer's memcheck and racecheck on small layers; then the
kernels beside torch.nn, most telling cases first, until the time is used up. It needs torch,
triton, pytest and hypothesis, no network and no installation: run it in the root of a checkout.
The evidence, ``gpu.json``, ``results.json`` and ``results.csv`` of the benchmark and pytest's
``tests.xml``, is left in the output folder, a table is printed last, and the exit status is 1 if a
test or a sanitizer found something, one of them ran out of time, a result was wrong, or there was
no time left for the benchmark. ``fastrnn bench --render`` makes pictures and a page of the results,
there or elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import nn, planner
from . import results, terminal
from .environment import Environment, environment
from .measure import measure_all
from .providers import default_providers, problem_of
from .registry import Case
from .results import Results, Row

_ROOT = Path(__file__).resolve().parents[1]
# Shares of the time: what the tests and each sanitizer may take at most.
_TESTS, _SANITIZER = 0.45, 0.12
_SECONDS_PER_CASE = 0.3
_RESERVE = 5.0  # seconds that are left for writing
_TAIL = 4000  # characters of a program's output that are kept


@terminal.printing()
def main(argv: Sequence[str] | None = None) -> int:
    """Run all of it.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; those of the command line if None.

    Returns
    -------
    int
        Exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m fastrnn.bench.on_gpu", description=__doc__)
    parser.add_argument(
        "--out", type=terminal.path, help="folder (default bench/results/<device>-<date>)"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default 9)")
    parser.add_argument("--commit", help="of the checkout, where git is not there to tell")
    parser.add_argument("--only", choices=("tests", "sanitizer", "bench"), help="one part alone")
    parser.add_argument("--small", action="store_true", help="run small layers and nothing else")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    if args.small:
        _small_layers()
        return 0
    start = time.monotonic()

    def remaining() -> float:
        return 60 * args.minutes - (time.monotonic() - start)

    env = environment(torch.device("cuda"), "python -m fastrnn.bench.on_gpu")
    if args.commit:
        env = dataclasses.replace(env, commit=args.commit)
    out = args.out or _ROOT / "bench" / "results" / _folder(env)
    out.mkdir(parents=True, exist_ok=True)
    evidence: dict[str, Any] = {"environment": dataclasses.asdict(env), "cuda": torch.version.cuda}
    found: Results | None = None
    failed = False
    if args.only in (None, "tests"):
        evidence["tests"] = _tests(out, remaining() if args.only else remaining() * _TESTS)
        failed |= evidence["tests"]["status"] != 0
        _write(out, evidence)  # so that what was found survives a crash or being cut off
    if args.only in (None, "sanitizer"):
        for tool in ("memcheck", "racecheck"):
            evidence[tool] = _sanitize(tool, 60 * args.minutes * _SANITIZER)
            failed |= evidence[tool]["status"] not in (0, "not run")
            _write(out, evidence)
    if args.only in (None, "bench"):
        device = torch.device("cuda")
        chosen = list(dict.fromkeys(cases()))
        evidence["model"] = [_model(case, device) for case in chosen]
        providers = default_providers("full", device.type)
        path = out / "results.json"
        if remaining() > _RESERVE:
            for so_far in measure_all(chosen, device, _SECONDS_PER_CASE, providers, env, path):
                found = so_far
                if remaining() < _RESERVE:
                    break
        rows = found.rows if found else []
        failed |= not rows
        failed |= any(row.status != "ok" for row in rows if row.is_ours)
    if found is not None:
        results.write_csv(out / "results.csv", found)
    evidence["failed"] = failed
    _write(out, evidence)
    _report(evidence, found.rows if found else [])
    return int(failed)


def _write(out: Path, evidence: dict[str, Any]) -> None:
    (out / "gpu.json").write_text(json.dumps(evidence, indent=1) + "\n", encoding="utf-8")


def _folder(env: Environment) -> str:
    device = re.sub(r"[^a-z0-9]+", "-", env.device.lower()).strip("-")
    return f"{device}-{env.date[:10]}"


def _run(command: list[str], seconds: float) -> dict[str, Any]:
    """Run a program; its status, or 'out of time', and the end of its output."""
    start = time.monotonic()
    environ = {**os.environ, "PYTHONPATH": str(_ROOT), "TRITON_INTERPRET": "0"}
    # In a group of its own, so that no child goes on using the GPU.
    process = subprocess.Popen(
        command, cwd=_ROOT, env=environ, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
    )  # fmt: skip
    status: int | str
    try:
        output, _ = process.communicate(timeout=seconds)
        status = process.returncode
    except subprocess.TimeoutExpired:
        status = "out of time"
        # pytest reports what failed so far when it is interrupted.
        for interruption, grace in ((signal.SIGINT, 15.0), (signal.SIGKILL, None)):
            os.killpg(process.pid, interruption)
            try:
                output, _ = process.communicate(timeout=grace)
                break
            except subprocess.TimeoutExpired:
                continue
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return {
        "command": " ".join(command[1:]),
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "output": output[-_TAIL:],
    }


def _tests(out: Path, seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "no:benchmark", "--no-header", "-rf", "--tb=short"]
    command += [f"--junitxml={out / 'tests.xml'}"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout=120"]  # a hang is a failure with a name
    if importlib.util.find_spec("xdist"):
        # Compilation is most of the time.
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    return _run(command, seconds)


def _sanitize(tool: str, seconds: float) -> dict[str, Any]:
    if shutil.which("compute-sanitizer") is None:
        return {"status": "not run", "output": "compute-sanitizer is not installed"}
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable]
    found = _run([*command, "-m", "fastrnn.bench.on_gpu", "--small"], seconds)
    if "Device not supported" in found["output"]:  # as on some virtual machines
        found["status"] = "not run"
    return found


def _small_layers() -> None:
    """Run every cell and schedule once, forward and backward, on odd sizes."""
    for kind, schedule in itertools.product(
        ("lstm", "gru", "rnn"), ("resident", "persistent", "stepwise")
    ):
        layer = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[kind](5, 39, bidirectional=True)
        layer.to("cuda", torch.bfloat16)
        x = torch.randn(4, 19, 5, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        with planner.use_path(schedule):
            layer(x)[0].sum().backward()
    torch.cuda.synchronize()


def cases() -> Iterator[Case]:
    """Cases of the benchmark, the most telling first.

    Yields
    ------
    Case
    """
    # Published by others: LSTM on an H100, T=1024, B=16, H=768.
    for dtype, mode in itertools.product(("float16", "bfloat16"), ("forward", "training")):
        yield Case("lstm", mode, dtype, 1024, 16, 768, 768)
    grid = [
        (batch, hidden)
        for hidden in (512, 256, 1024, 128, 768, 384, 1408, 64, 2048)
        for batch in (16, 64, 1, 128)
    ]
    for mode in ("forward", "training"):
        for batch, hidden in grid[:8]:
            for cell, dtype in itertools.product(("lstm", "gru"), ("bfloat16", "float32")):
                yield Case(cell, mode, dtype, 256, batch, hidden, hidden)
    for (batch, hidden), mode in itertools.product(grid[8:], ("forward", "training")):
        for cell in ("lstm", "gru"):
            yield Case(cell, mode, "bfloat16", 256, batch, hidden, hidden)
    for hidden, mode in itertools.product((256, 512), ("forward", "training")):
        for cell in ("lstm", "gru"):
            yield Case(cell, mode, "bfloat16", 256, 16, hidden, hidden, 2, True)
        yield Case("rnn", mode, "bfloat16", 256, 16, hidden, hidden)
        yield Case("lstm", mode, "float16", 256, 16, hidden, hidden)
        yield Case("lstm", mode, "float32", 256, 16, hidden, hidden)


def _model(case: Case, device: torch.device) -> dict[str, Any]:
    """What the planner expected of a case: its path, its kernels and the time of their steps."""
    plan = planner.plan(problem_of(case, device))
    record: dict[str, Any] = {**dataclasses.asdict(case), "planned": plan.path}
    for name, choice in zip(("forward", "backward"), plan.kernels or (), strict=False):
        record |= {f"{name}_config": list(choice.config), f"{name}_us": choice.step_us}
    return record


def _report(evidence: dict[str, Any], rows: Sequence[Row]) -> None:
    for name in ("tests", "memcheck", "racecheck"):
        if name in evidence:
            part = evidence[name]
            print(f"== {name}: status {part['status']}, {part.get('seconds')} s")
            print("\n".join(part["output"].splitlines()[-12:]))
    models = {
        tuple(m[f.name] for f in dataclasses.fields(Case)): m for m in evidence.get("model", ())
    }
    numbers = f"{'ms':>8}{'ratio':>7}{'graph':>7}{'us/step':>9}{'model':>7}"
    print(f"{'case':40}{'provider':20}{numbers}  ran")
    for row in rows:
        name = row.case.name
        if row.times is None:
            print(f"{name:40}{row.provider:20} {row.status}: {row.reason} error {row.error}")
            continue
        graph = f"{row.graph.ratio.median:7.2f}" if row.graph else f"{'-':>7}"
        model = models[dataclasses.astuple(row.case)]
        passes = ("forward", "backward") if row.case.mode == "training" else ("forward",)
        expected = sum(model.get(f"{name}_us", 0.0) for name in passes)
        print(
            f"{name:40}{row.provider:20}{row.times.ms.median:8.3f}{row.times.ratio.median:7.2f}"
            f"{graph}{row.step_us:9.2f}{expected:7.2f}  {row.path}"
        )


if __name__ == "__main__":
    sys.exit(main())
