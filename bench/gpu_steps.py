"""Time a step on a GPU, in our kernels and in torch.nn's."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch

from .. import planner
from ..kernels.configs import Choice
from .built import forced, make_baseline
from .gate import tolerances_of, worst_error
from .gpu_telling import POLLS, choose, replaced
from .limits import on_equal_terms
from .measure import Ready, band, ratio_band, ready, time_pairs
from .providers import BASELINE, OURS, PROVIDERS, problem_of, torch_algorithm
from .registry import MODES, Case

_STEPS = 1024  # enough to make everything but the loop through time negligible
_SECONDS = 0.25  # for each pairing of ours with one of torch.nn's

#: bfloat16, by cell, batch and size; forward, and forward with backward.
CASES = [
    Case(cell, mode, "bfloat16", _STEPS, batch, hidden, hidden)
    for cell, batch, hidden in (
        *(("lstm", 16, hidden) for hidden in (128, 256, 512, 768, 1024)),
        *(("gru", 16, hidden) for hidden in (128, 256, 512, 768, 1024)),
        *(("lstm", 64, hidden) for hidden in (512, 768)),
        ("rnn", 16, 512),
    )
    for mode in MODES
]


def measure_steps(
    case: Case, device: torch.device, schedule: str = "persistent", seconds: float = _SECONDS
) -> dict[str, Any]:
    """Time our layer against torch.nn's in the same dtype and in float16, alternately.

    cuDNN keeps recurrent weights on chip in float16 only.

    Parameters
    ----------
    case : Case
    device : torch.device
    schedule : str, default 'persistent'
        As for ``gpu_telling.choose``.
    seconds : float
        For each of the two.

    Returns
    -------
    dict of str to Any
        `status` ('ok' or 'wrong') and `reason`; what `ran`, in which `configs`, and what the
        planner would take (`planned`). In microseconds per step: `expected_us`, the simulated time
        of the kernels, or None; `kernel_us`, by name, of our GPU kernels that took longest; and the
        bands `ours_us` and, by dtype, torch.nn's in `beside`, with the `ratio` of the pairs.
    """
    from ..kernels import launch

    path, plan = choose(problem_of(case, device), schedule)
    choices = (plan.kernels or ())[: 2 if case.mode == "training" else 1]
    row: dict[str, Any] = {
        "status": "ok",
        "reason": "",
        "ran": path,
        "configs": [list(choice.config) for choice in choices],
        "planned": planner.plan(problem_of(case, device)).path,
        "expected_us": expected_us(choices),
        "beside": {},
    }
    with on_equal_terms(device), forced(path):
        module, inputs = make_baseline(case, device)
        mine = ready(case, PROVIDERS[OURS].build(case, module, inputs))
        expected, tolerances = _stock(case, device).results(), tolerances_of(case, device)
        with launch.bounded_spin(POLLS):
            bounded = mine.results()
        for results in (bounded, mine.results()):
            error, tolerance = worst_error(results, expected, tolerances)
            row |= {"error": error, "tolerance": tolerance}
            # Written so that a NaN counts as wrong.
            if not error <= tolerance:
                reason = f"error {error:.1e}, allowed {tolerance:.1e}"
                return {**row, "status": "wrong", "reason": reason}
        if reason := replaced(schedule, path, device):
            return {**row, "status": "wrong", "reason": reason}
        del bounded, expected, results
        row["kernel_us"] = _kernel_us(mine, case.steps) if device.type == "cuda" else {}
        for dtype in dict.fromkeys((case.dtype, "float16")):
            other = dataclasses.replace(case, dtype=dtype)
            stock = _stock(other, device)
            pairs = time_pairs(mine.call, stock.call, device, seconds)
            ours, theirs = zip(*pairs, strict=True)
            row.setdefault("ours_us", _per_step(ours, case.steps))
            row["beside"][dtype] = {
                "us": _per_step(theirs, case.steps),
                "ratio": ratio_band(pairs),
                "algorithm": torch_algorithm(other, device),
                "pairs": len(pairs),
            }
    return row


def expected_us(choices: Iterable[Choice]) -> float | None:
    """Add up the simulated step times; None if any was not simulated.

    Parameters
    ----------
    choices : iterable of Choice

    Returns
    -------
    float or None
    """
    total = sum(choice.step_us for choice in choices)
    return None if math.isnan(total) else total


def _stock(case: Case, device: torch.device) -> Ready:
    module, inputs = make_baseline(case, device)
    return ready(case, PROVIDERS[BASELINE].build(case, module, inputs))


def _per_step(seconds: Any, steps: int) -> Any:
    return band([each * 1e6 / steps for each in seconds])


def _kernel_us(layer: Ready, steps: int) -> dict[str, float]:
    """Return the GPU time of the five longest-running kernels, from torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    found: dict[str, float] = {}
    try:
        with torch.profiler.profile(activities=activities) as profile:
            layer.call()
            torch.cuda.synchronize()
        for event in profile.events() or ():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                us = event.time_range.elapsed_us()
                found[event.name] = found.get(event.name, 0.0) + us / steps
    except (RuntimeError, AttributeError):  # the other times do not depend on it
        return {}
    return dict(sorted(found.items(), key=lambda item: -item[1])[:5])


def bench_cases() -> list[Case]:
    """List cases of the benchmark, the most informative first.

    Returns
    -------
    list of Case
    """
    # Published by others: LSTM on an H100, T=1024, B=16, H=768.
    cases = [
        Case("lstm", mode, dtype, 1024, 16, 768, 768)
        for dtype, mode in itertools.product(("float16", "bfloat16"), MODES)
    ]
    grid = [
        (batch, hidden)
        for hidden in (512, 256, 1024, 128, 768, 384, 1408, 64, 2048)
        for batch in (16, 64, 1, 128)
    ]
    cases += [
        Case(cell, mode, dtype, 256, batch, hidden, hidden)
        for mode in MODES
        for batch, hidden in grid[:8]
        for cell, dtype in itertools.product(("lstm", "gru"), ("bfloat16", "float32"))
    ]
    cases += [
        Case(cell, mode, "bfloat16", 256, batch, hidden, hidden)
        for (batch, hidden), mode in itertools.product(grid[8:], MODES)
        for cell in ("lstm", "gru")
    ]
    for hidden, mode in itertools.product((256, 512), MODES):
        sizes = 256, 16, hidden, hidden
        cases += [Case(cell, mode, "bfloat16", *sizes, 2, True) for cell in ("lstm", "gru")]
        cases.append(Case("rnn", mode, "bfloat16", *sizes))
        cases += [Case("lstm", mode, dtype, *sizes) for dtype in ("float16", "float32")]
    return list(dict.fromkeys(cases))
