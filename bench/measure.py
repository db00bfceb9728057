"""Check and time one case: every provider against torch.nn's module.

All use the same weights and input. What is timed is the very call whose results were compared; a
provider whose results differ is not timed. Where torch.nn has no such layer, results are compared
with our differentiable loop, and torch.nn's layer with the same gates is timed.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import planner
from .built import Built, make_baseline
from .environment import Environment
from .gate import Tolerances, tolerances_of, worst_error
from .limits import Limits, on_equal_terms, seconds_of
from .providers import (
    BASELINE,
    OURS,
    PROVIDERS,
    REFERENCE,
    is_repeated,
    plan_name,
    problem_of,
    torch_algorithm,
)
from .registry import Case
from .results import Band, Results, Row, Times, write_json

_log = logging.getLogger("fastrnn")

_MIN_PAIRS, _MAX_PAIRS = 7, 200
# Reduced to so many pairs where the minimum would take longer than this.
_FEW_PAIRS, _LONG_SECONDS = 3, 20.0
# A sample repeats the call for at least this long, so that reading the clock, and on CUDA
# synchronizing with the device, takes less than one percent of it.
_SAMPLE_SECONDS = {"cpu": 1e-3, "cuda": 2e-3}
_WARM_UP_SECONDS = 0.02
# Idle threads spin before they sleep: torch's for 10 ms, onnxruntime's for 40 ms, openvino's for
# 1 ms. They would occupy the cores that another library's threads need, which made the times of
# either up to ten times longer. Each sample therefore begins when the process is idle: when it used
# less than a tenth of a pause's time.
_PAUSE_SECONDS, _MAX_PAUSES = 5e-3, 40
# After that, a few calls wake up the threads of the timed library.
_WAKE_UP_SECONDS = 5e-3

Call = Callable[[], object]


class Ready(NamedTuple):
    """The call to time, and the results used to check it, in torch.nn's layout."""

    call: Callable[[], list[Tensor]]
    in_torch_layout: Callable[[list[Tensor]], list[Tensor]]
    has_threads: bool = False

    def results(self) -> list[Tensor]:
        torch.manual_seed(0)  # for dropout masks
        return self.in_torch_layout(self.call())


def measure(
    case: Case, device: torch.device, seconds: float, providers: Sequence[str] = (OURS,)
) -> list[Row]:
    """Check a case, then time it.

    Parameters
    ----------
    case : Case
    device : torch.device
    seconds : float
        Time budget for each provider; at least 7 pairs (or 3 long ones) are measured even if that
        takes longer.
    providers : sequence of str
        Keys of ``PROVIDERS``, in addition to torch.nn. Left out are those that cannot run the case,
        and forced paths that the planner's own choice takes anyway, if that is measured too.

    Returns
    -------
    list of Row
        First torch.nn's, then one for each provider; without times if the provider's results are
        wrong or it could not be run.
    """
    with on_equal_terms(device):
        return _measure(case, device, seconds, providers)


def _measure(
    case: Case, device: torch.device, seconds: float, providers: Sequence[str]
) -> list[Row]:
    plan = planner.plan(problem_of(case, device))
    wanted = [
        name
        for name in providers
        if PROVIDERS[name].gap(case, device) is None
        and (name == OURS or OURS not in providers or not is_repeated(name, plan, case))
    ]
    base = Row(case, BASELINE, torch_algorithm(case, device), "", "ok")
    rows = [_planned_row(case, name, plan) for name in wanted]
    try:
        module, inputs = make_baseline(case, device)
        theirs = ready(case, PROVIDERS[BASELINE].build(case, module, inputs))
        of_theirs, tolerances = theirs.results(), tolerances_of(case, device)
        base = dataclasses.replace(base, peak_mib=_peak_mib(theirs.call, device))
        expected = of_theirs
        if case.is_beyond_torch:
            expected = ready(case, PROVIDERS[REFERENCE].build(case, module, inputs)).results()
    except RuntimeError as failure:
        return [_failed(row, failure) for row in (base, *rows)]
    graphed = _replay(theirs, of_theirs, tolerances, device)
    measured = []
    for row in rows:
        try:
            provider, start = PROVIDERS[row.provider], time.perf_counter()
            ours = ready(case, provider.build(case, module, inputs))
            found = ours.results()
            row = dataclasses.replace(row, first_s=time.perf_counter() - start)
            if provider.is_for_scale:
                of_replay = found
            else:
                of_replay = expected
                error, tolerance = worst_error(found, expected, tolerances)
                row = dataclasses.replace(row, error=error, tolerance=tolerance)
                # Written so that a NaN counts as wrong.
                if not error <= tolerance:
                    measured.append(dataclasses.replace(row, status="wrong"))
                    continue
            peak = _peak_mib(ours.call, device)
            pairs = time_pairs(ours.call, theirs.call, device, seconds, apart=ours.has_threads)
            row = dataclasses.replace(row, pairs=len(pairs), times=_times(pairs, 0), peak_mib=peak)
            if base.times is None:
                base = dataclasses.replace(base, pairs=len(pairs), times=_times(pairs, 1))
            replay = _replay(ours, of_replay, tolerances, device) if graphed else None
            if replay and graphed:
                pairs = time_pairs(replay, graphed, device, seconds / 2)
                row = dataclasses.replace(row, graph=_times(pairs, 0))
                if base.graph is None:
                    base = dataclasses.replace(base, graph=_times(pairs, 1))
        except Exception as failure:  # of any kind, including third-party code
            row = _failed(row, failure)
        measured.append(row)
    if base.times is None:
        pairs = time_pairs(theirs.call, theirs.call, device, seconds)
        base = dataclasses.replace(base, pairs=len(pairs), times=_times(pairs, 1))
    return [base, *measured]


def measure_all(
    cases: Sequence[Case],
    device: torch.device,
    seconds: float,
    providers: Sequence[str],
    env: Environment,
    path: Path,
) -> Iterator[Results]:
    """Measure cases one after another.

    Parameters
    ----------
    cases, device, seconds, providers
        As for `measure`.
    env : Environment
    path : Path
        A results.json, written after each case, so that measurements survive a crash.

    Yields
    ------
    Results
        All results so far, after each case.
    """
    limits, rows = Limits(device), []
    for case in cases:
        rows += measure(case, device, seconds, providers)
        limits.observe(case)
        found = Results(env, limits.record(), with_limits(rows, limits))
        write_json(path, found)
        yield found


def _planned_row(case: Case, name: str, plan: planner.Plan) -> Row:
    if name == OURS:
        return Row(case, name, plan_name(plan, case), plan.reason, "ok")
    return Row(case, name, name.partition(":")[2], "", "ok")


def _failed(row: Row, failure: Exception) -> Row:
    # Mostly out of memory: the other cases can still be measured.
    lines = str(failure).strip().splitlines() or [type(failure).__name__]
    return Row(row.case, row.provider, row.path, lines[0], "failed")


def _times(pairs: Sequence[tuple[float, float]], side: int) -> Times:
    """Summarize one side of the pairs; side 1 is torch.nn's."""
    ratio = Band(1.0, 1.0, 1.0) if side else ratio_band(pairs)
    return Times(band([pair[side] * 1e3 for pair in pairs]), ratio)


def with_limits(rows: Sequence[Row], limits: Limits) -> list[Row]:
    """Add to each row how close it came to what the device can do.

    Parameters
    ----------
    rows : sequence of Row
    limits : Limits
        Must have observed every case.

    Returns
    -------
    list of Row
    """
    bounds = {row.case: limits.of(row.case) for row in rows if row.times is not None}
    return [
        row
        if row.times is None
        else dataclasses.replace(row, limit_ms=bounds[row.case].ms, bound=bounds[row.case].by)
        for row in rows
    ]


def ready(case: Case, built: Built) -> Ready:
    """Make the call for a case's mode: inference, or forward and backward.

    Parameters
    ----------
    case : Case
    built : Built

    Returns
    -------
    Ready
    """
    if case.mode == "forward":

        def infer() -> list[Tensor]:
            with torch.no_grad():
                return built.run(*built.inputs)

        return Ready(infer, lambda outputs: outputs, built.has_threads)

    with torch.no_grad():
        outputs = built.run(*built.inputs)
    generator = torch.Generator().manual_seed(1)
    # Each in the memory layout of its output, which the provider chose.
    cotangents = [
        torch.empty_like(output).copy_(torch.randn(output.shape, generator=generator))
        for output in outputs
    ]
    inputs = [tensor.detach().requires_grad_() for tensor in built.inputs]
    leaves = [*inputs, *built.parameters]

    def train() -> list[Tensor]:
        outputs = built.run(*inputs)
        # Not .backward(): the gradients are new tensors each time, nothing is accumulated.
        gradients = built.gradients(outputs, leaves, cotangents)
        # A surviving autograd graph would tie a capture to the stream of an earlier call.
        return [*(output.detach() for output in outputs), *gradients]

    def in_torch_layout(results: list[Tensor]) -> list[Tensor]:
        return [*results[: len(outputs)], *built.to_torch(results[len(outputs) :])]

    return Ready(train, in_torch_layout, built.has_threads)


def time_pairs(
    ours: Call, theirs: Call, device: torch.device, seconds: float, apart: bool = False
) -> list[tuple[float, float]]:
    """Time two calls alternately.

    Parameters
    ----------
    ours, theirs : callable
    device : torch.device
    seconds : float
        As for `measure`.
    apart : bool, default False
        Whether the two have separate threads, so that those of one must be asleep before the other
        is timed.

    Returns
    -------
    list of (float, float)
        Seconds per call of each. The two measurements of a pair directly follow each other, in an
        order that alternates between pairs, so that other activity on the machine affects both
        equally.
    """
    calls = (ours, theirs)
    singles = [_warm_up(call, _WARM_UP_SECONDS, device) for call in calls]
    repeats = math.ceil(_SAMPLE_SECONDS[device.type] / min(singles))
    least = _MIN_PAIRS if _MIN_PAIRS * sum(singles) < _LONG_SECONDS else _FEW_PAIRS
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(pairs) < least or (time.perf_counter() < end and len(pairs) < _MAX_PAIRS):
        times = [0.0, 0.0]
        for side in (0, 1) if len(pairs) % 2 else (1, 0):
            if apart:
                _wait_until_idle()
                _warm_up(calls[side], _WAKE_UP_SECONDS, device)
            times[side] = seconds_of(calls[side], repeats, device)
        pairs.append((times[0], times[1]))
    return pairs


def _wait_until_idle() -> None:
    """Wait until no thread of this process runs, or until a time limit."""
    for _ in range(_MAX_PAUSES):
        before = time.process_time()
        time.sleep(_PAUSE_SECONDS)
        if time.process_time() - before < _PAUSE_SECONDS / 10:
            return


def _warm_up(call: Call, seconds: float, device: torch.device) -> float:
    """Call repeatedly for some time; return the shortest time of one call."""
    best, end = math.inf, time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < end:
        best = min(best, seconds_of(call, 1, device))
    return best


def _replay(
    ready: Ready, expected: Sequence[Tensor], tolerances: Tolerances, device: torch.device
) -> Call | None:
    """Capture a call as a CUDA graph, so that its time excludes the overhead in Python.

    None on a CPU, and if the call cannot be captured or its replay gives different results.
    """
    if device.type != "cuda":
        return None
    try:
        with _side_stream(device):
            for _ in range(3):
                ready.call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = ready.call()
        for tensor in results:
            tensor.detach().fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        error, tolerance = worst_error(ready.in_torch_layout(results), expected, tolerances)
        if not error <= tolerance:
            raise RuntimeError(f"the replay of a graph gave an error of {error:.1e}")
    except Exception as failure:  # of any kind, including third-party code
        _log.warning("no graph: %s", str(failure).strip().partition("\n")[0])
        return None
    return graph.replay


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Switch to a side stream, as torch requires before a capture."""
    current = torch.cuda.current_stream(device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def _peak_mib(call: Call, device: torch.device) -> float | None:
    """Return the peak memory of one call, without weights and inputs; None if it is unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # reuse of memory that malloc keeps would not be counted
        Path("/proc/self/clear_refs").write_bytes(b"5")  # resets the peak
    except (AttributeError, OSError):
        return None
    resident = _resident_mib("VmRSS")
    call()
    return max(0.0, _resident_mib("VmHWM") - resident)


def _resident_mib(field: str) -> float:
    """Read VmRSS, the resident set, or VmHWM, its peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def band(values: Sequence[float]) -> Band:
    """Return the median and the 20th and 80th percentile.

    Examples
    --------
    >>> from fastrnn.bench.measure import band
    >>> band([1, 2, 3, 4, 5, 100])
    Band(median=3.5, p20=2.0, p80=5.0)
    """
    p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return Band(statistics.median(values), p20, p80)


def ratio_band(pairs: Sequence[tuple[float, float]]) -> Band:
    """Return the band of second / first: how many times faster the first of each pair is."""
    return band([theirs / ours for ours, theirs in pairs])
