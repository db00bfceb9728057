"""Predict whether fastrnn's or torch's path is faster on a CPU, by measurements or a model."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from . import cpu, hardware, tuned
from .cells import CELLS
from .cpu import machine as instructions
from .hardware import Machine
from .problem import Decision, Problem


def choose(problem: Problem) -> Decision:
    """Choose torch's or fastrnn's path for a plain layer or a cell on a CPU, with the reason."""
    path, here = ours(problem), hardware.cpu()
    if not tuned.has_sizes(problem):
        reason = "sizes are symbolic under the tracer, so one choice serves all sizes"
        return Decision("torch" if problem.is_step else path, reason)
    ratio, source = expected_ratio(problem, path, here), tuned.MODEL
    # Only single, unchained steps are measured.
    factor = (
        None if problem.chained else tuned.factor(here, tuned.point_of(problem), path, _expected)
    )
    if factor is not None:
        ratio, source = ratio * factor, tuned.source(here)
    gap = cpu.kernel_gap(problem.dtype)
    what = f"a loop of torch operators ({gap})" if gap else f"fastrnn's kernels ({cpu.describe()})"
    return tuned.Measured(path, ratio, source).decision(path, what)


def _expected(machine: Machine, point: tuned.Point, path: str) -> float:
    return expected_ratio(tuned.problem_of(point), path, machine)


def ours(problem: Problem) -> str:
    """Return fastrnn's path for a problem: 'kernels', or 'operators' where there are none."""
    return "operators" if cpu.kernel_gap(problem.dtype) else "kernels"


# The model: the time of a call is the sum of the times of its parts, in units derived from the CPU.
# The factors were fitted to the tables; for each implementation they are the same on all CPUs.


class Cost(NamedTuple):
    """The cost factors of an implementation.

    Attributes
    ----------
    call : float
        Fixed cost of a call, in microseconds at 3 GHz.
    step : float
        Fixed cost of a step, in microseconds at 3 GHz, times the number of gates plus one.
    elements : float
        Cycles per vector of gate elements in a step.
    products : float
        Multiple of the time of the multiplications at peak speed or, if longer, of reading the
        weights.
    weights : float
        Multiple of the time of reading all weights once.
    """

    call: float
    step: float
    elements: float
    products: float
    weights: float


# For inference and for training. Calls that are packed or in half precision take "the longer way".
_COSTS = {
    "kernels": (Cost(18, 0.19, 85, 1.1, 0.08), Cost(570, 0.76, 360, 2.9, 7.2)),
    "kernels, the longer way": (Cost(200, 0.28, 35, 1.8, 1.0), Cost(860, 1.5, 230, 4.7, 7.3)),
    # Unchained: 0.87 to 1.07 times as fast as ATen's cell; RNN 0.55 to 0.87 times.
    "kernels, a step": (Cost(18, 0.19, 85, 1.1, 0.08), Cost(195, 7, 600, 5.5, 4.5)),
    # Chains of eight steps, (B, H) = (1, 32) (4, 128) (64, 128) (1, 512) (16, 512) (64, 512): LSTM
    # 1.17, 1.26, 0.91, 2.7, 1.8, 1.2 times as fast as ATen's, GRU 1.0, 1.0, 0.85, 1.8, 1.5, 1.1,
    # RNN 0.65, 0.71, 0.68, 1.3, 1.2, 1.0, on one thread of a 2.8 GHz Xeon with AVX-512. The cost of
    # a call is set 105 us above the measured one to account for chains of two steps, which are
    # slower: LSTM (1, 32) 0.77, (4, 128) 0.85.
    "kernels, chained steps": (Cost(18, 0.19, 85, 1.1, 0.08), Cost(270, 6, 700, 5.5, 1.0)),
    "operators": (Cost(140, 4.4, 260, 1.7, 0.9), Cost(600, 11, 950, 2.9, 3.4)),
    "oneDNN": (Cost(94, 0.42, 98, 1.2, 4.7), Cost(380, 1.1, 118, 5, 25)),
    "ATen": (Cost(33, 3.5, 240, 1.75, 0.92), Cost(149, 29, 436, 6.7, 3.9)),
    "ATen's cell": (Cost(9, 3.0, 155, 2.1, 0.8), Cost(46, 34, 590, 4.9, 4.1)),
}

_CYCLES_PER_US = 3000
_FLOPS_PER_LANE = 4  # two FMA units
_BYTES_PER_CYCLE = 10, 3.3  # from the last-level cache per thread, from memory for all threads
_MIN_FLOPS = 30_000  # per step; below this, a single thread is used
_EMULATED = 8  # slowdown of torch's products on a CPU that lacks instructions for the dtype


def expected_ratio(problem: Problem, path: str, on: Machine) -> float:
    """Return the modeled ratio of torch.nn's time to fastrnn's."""
    times = [
        _us(problem, _COSTS[name][problem.training], on, is_native)
        for name, is_native in (
            (_ours_in_full(problem, path), instructions.multiplies(problem.dtype)),
            (torchs(problem), _is_native(problem.dtype)),
        )
    ]
    is_emulated = not _is_native(problem.dtype)
    return times[1] / times[0] * (_EMULATED if is_emulated else 1)


def _ours_in_full(problem: Problem, path: str) -> str:
    if path != "kernels":
        return path
    if problem.packed or not instructions.multiplies(problem.dtype):
        return "kernels, the longer way"
    if problem.is_step and problem.training and cpu.trains_steps(problem.dtype):
        return "kernels, chained steps" if problem.chained else "kernels, a step"
    return path


def torchs(problem: Problem) -> str:
    """Return the name of the implementation that torch runs on a CPU."""
    if problem.is_step:
        return "ATen's cell"
    is_fused = (
        problem.cell == "lstm"
        and not problem.packed
        and not problem.projected
        and problem.dtype != torch.float64
        and torch.backends.mkldnn.is_available()
        and _is_native(problem.dtype)
    )
    return "oneDNN" if is_fused else "ATen"


def _is_native(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.float64) or multiplies(dtype)


def _us(problem: Problem, cost: Cost, on: Machine, is_native: bool) -> float:
    """Return the time of a layer in microseconds at 3 GHz."""
    gates, hidden = CELLS[problem.cell].n_gates, problem.hidden_size
    width = hidden // 2 if problem.projected else hidden
    itemsize = problem.dtype.itemsize if is_native else 4
    target = instructions.target()
    lanes = (4 if target is None else target.lanes) * 4 / itemsize
    elements = problem.batch * gates * hidden
    flops = 2 * elements * (problem.input_size + width)
    threads = on.threads if flops >= _MIN_FLOPS else 1
    vectors_per_us = lanes * threads * _CYCLES_PER_US
    recurrent = gates * hidden * width * itemsize
    weights = recurrent + gates * hidden * problem.input_size * itemsize
    step = (
        cost.step * (1 + gates)
        + cost.elements * elements / vectors_per_us
        + cost.products
        * max(flops / (_FLOPS_PER_LANE * vectors_per_us), _reading_us(recurrent, on, threads))
    )
    return cost.call + problem.steps * step + cost.weights * _reading_us(weights, on, threads, 0)


def _reading_us(size: int, on: Machine, threads: int, level: int = 2) -> float:
    """Return the microseconds to read `size` bytes; 0 if a cache up to `level` holds them."""
    if level and size <= threads * max(on.caches[:level], default=size):
        return 0.0
    per_thread, of_memory = _BYTES_PER_CYCLE
    is_cached = size <= max(on.caches, default=size)
    return size / (per_thread * threads if is_cached else of_memory) / _CYCLES_PER_US


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Return whether oneDNN has fast bfloat16 or float16 products on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()
