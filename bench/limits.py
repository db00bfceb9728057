"""Measure what a device can do, as a yardstick for the time of a case.

Any implementation has to compute the products, move inputs, outputs and weights, and pass h from
step to step. In the same run as the case, `Limits` measures how fast the device multiplies, copies
and exchanges data, and derives the time that the slowest of these takes on its own. It is a
yardstick, not a proof: caches may be faster than the copy that represents them, and fewer programs
exchange data faster than those of the empty exchange.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import devices
from .providers import problem_of
from .registry import Case

_GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
# Working sets that are copied, one half to the other: caches keep the data as close to the
# processor as its size permits.
_COPY_BYTES = [2**k for k in range(20, 28)]
_REPEATS = 5
# Per measurement; on a GPU enough to make the first launch negligible.
_COPIES = {"cpu": 1, "cuda": 20}


class Bound(NamedTuple):
    """The lower limit of a case in milliseconds, and what determines it.

    'products', 'memory' (inputs, outputs and weights, once), 'weights' (the recurrent ones, read at
    every step where they do not stay on chip), or 'exchange' (of h, at every step).
    """

    ms: float
    by: str


class Limits:
    """The speed of a device, from all measurements so far.

    Parameters
    ----------
    device : torch.device

    Attributes
    ----------
    gemm : dict of str to float
        Operations per second of a large matrix product, by dtype. On a CPU half precision counts as
        float32, since not every CPU multiplies it faster.
    copy : dict of int to float
        Bytes read and written per second by a copy, by total bytes of both buffers.
    exchange_us : float, optional
        Per step of a loop in which every program (on a CPU, thread) waits for all others and does
        nothing else; None where it cannot be measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gemm: dict[str, float] = {}
        self.copy: dict[int, float] = {}
        self.exchange_us: float | None = None

    def observe(self, case: Case) -> None:
        """Measure once more what bounds a case; the best value seen counts."""
        with on_equal_terms(self.device):
            self._observe_gemm(self._dtype(case))
            for size in {self._copy_size(case.min_bytes), self._copy_size(_recurrent_bytes(case))}:
                self._observe_copy(size)
            found = exchange_us(self.device)
        if found is not None:
            self.exchange_us = min(found, self.exchange_us or found)

    def of(self, case: Case) -> Bound:
        """Bound a case that was observed.

        Parameters
        ----------
        case : Case

        Returns
        -------
        Bound
        """
        passes = 2 if case.mode == "training" else 1
        steps = case.steps * case.num_layers * passes
        recurrent = _recurrent_bytes(case)
        seconds = {
            "products": case.flops / self.gemm[self._dtype(case)],
            "memory": case.min_bytes / self.copy[self._copy_size(case.min_bytes)],
        }
        if recurrent > self._on_chip_bytes(case):
            # Not at the first step, whose reads are part of 'memory'.
            read = (steps - passes * case.num_layers) * recurrent
            seconds["weights"] = read / self.copy[self._copy_size(recurrent)]
        if self.exchange_us is not None and self._exchanges(case):
            seconds["exchange"] = steps * self.exchange_us * 1e-6
        by = max(seconds, key=lambda name: seconds[name])
        return Bound(seconds[by] * 1e3, by)

    def record(self) -> dict[str, Any]:
        """Return the measurements as they are stored in files."""
        return {
            "gemm_tflops": {dtype: speed / 1e12 for dtype, speed in self.gemm.items()},
            "copy_gb_s": {str(size): self.copy[size] / 1e9 for size in sorted(self.copy)},
            "exchange_us": self.exchange_us,
        }

    def _dtype(self, case: Case) -> str:
        return "float32" if case.is_half and self.device.type == "cpu" else case.dtype

    def _observe_gemm(self, dtype: str) -> None:
        size = _GEMM_SIZE[self.device.type]
        a = torch.randn(size, size, device=self.device).to(getattr(torch, dtype))
        out = torch.empty_like(a)
        seconds = self._fastest(lambda: torch.mm(a, a, out=out))
        self.gemm[dtype] = max(self.gemm.get(dtype, 0.0), 2 * size**3 / seconds)

    def _observe_copy(self, size: int) -> None:
        source = torch.zeros(size // 2, dtype=torch.uint8, device=self.device)
        target = torch.zeros_like(source)
        seconds = self._fastest(lambda: target.copy_(source))
        self.copy[size] = max(self.copy.get(size, 0.0), size / seconds)

    @staticmethod
    def _copy_size(size: float) -> int:
        """Return the working set whose speed represents one of so many bytes."""
        return next((bytes for bytes in _COPY_BYTES if bytes >= size), _COPY_BYTES[-1])

    def _fastest(self, call: Callable[[], Tensor]) -> float:
        call()
        repeats = _COPIES[self.device.type]
        return min(seconds_of(call, repeats, self.device) for _ in range(_REPEATS))

    def _on_chip_bytes(self, case: Case) -> int:
        """Return the bytes of weights that stay on chip: on a GPU, all of its shared memory."""
        facts = problem_of(case, self.device).gpu
        return 0 if facts is None else facts.processors * facts.shared_memory

    def _exchanges(self, case: Case) -> bool:
        """Return whether the state has to cross between processors at each step."""
        if case.is_step:
            return False
        problem = problem_of(case, self.device)
        if self.device.type == "cpu":
            return uses_threads(case)
        if devices.kernel_gap(problem) is not None:
            return True
        forward, _ = devices.choose_kernels(problem)
        return forward.config.schedule != "resident"


@contextlib.contextmanager
def on_equal_terms(device: torch.device) -> Iterator[None]:
    """Make a device current, and let all providers multiply float32 like torch's recurrent layers.

    cuDNN has its own switch for TF32, which is on by default while that of matrix products is off:
    a provider that uses matrix products would do different work.

    Parameters
    ----------
    device : torch.device
    """
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with torch.cuda.device(device):
        if devices.float32_precision() == "tf32":
            matmul.fp32_precision = "tf32"
        try:
            yield
        finally:
            matmul.fp32_precision = before


def _recurrent_bytes(case: Case) -> int:
    return case.itemsize * case.directions * case.recurrent_weights


def uses_threads(case: Case) -> bool:
    """Return whether our CPU kernels distribute the steps of a case over threads."""
    if torch.get_num_threads() == 1:
        return False
    try:
        from ..cpu import engine, machine
    except ImportError:  # no llvmlite
        return True
    target = machine.target()
    slices = 1 if target is None else -(-case.hidden_size // target.units)
    return engine.threads(2 * case.batch * case.recurrent_weights, slices) > 1


def exchange_us(device: torch.device) -> float | None:
    """Time a step of a loop in which all wait for all and do nothing else.

    Parameters
    ----------
    device : torch.device

    Returns
    -------
    float or None
        Microseconds; None where it cannot be measured.
    """
    if device.type == "cuda":
        try:
            from .empty_gpu import loop
        except (ImportError, AttributeError):  # triton without Gluon, or with an early version
            return None
    else:
        from .empty_cpu import loop
    steps = 1000
    call = loop(device, steps)
    if call is None:
        return None
    call()
    return min(seconds_of(call, 1, device) for _ in range(_REPEATS)) / steps * 1e6


def seconds_of(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Time calls as the caller sees them; on CUDA with events around them, so including gaps.

    Parameters
    ----------
    call : callable
    repeats : int
    device : torch.device
        Must be the current device, if it is a GPU.

    Returns
    -------
    float
        Seconds per call.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    for _ in range(repeats):
        call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) * 1e-3 / repeats
