"""Check and time one case: fastrnn's public module beside torch.nn's.

Both modules have the same weights and get the same input. What is timed is the very call
whose results were compared; a case whose results differ is not timed.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import gpu, nn, planner
from .registry import Case
from .results import Band, Row, Times

#: The compared libraries: where each finds the module classes.
PROVIDERS: dict[str, Any] = {"fastrnn": nn, "torch.nn": torch.nn}

_CLASSES = {
    "lstm": "LSTM",
    "gru": "GRU",
    "rnn": "RNN",
    "lstm_cell": "LSTMCell",
    "gru_cell": "GRUCell",
    "rnn_cell": "RNNCell",
}
_MIN_PAIRS, _MAX_PAIRS = 7, 200
# A sample repeats the call for at least this long, so that reading the clock, and on CUDA
# waiting for the device, are below one percent of it.
_SAMPLE_SECONDS = {"cpu": 1e-3, "cuda": 2e-3}
_WARM_UP_SECONDS = 0.02

Call = Callable[[], list[Tensor]]


def measure(case: Case, device: torch.device, seconds: float) -> Row:
    """Check a case, then time it.

    Parameters
    ----------
    case : Case
    device : torch.device
    seconds : float
        To spend on timing, unless fewer than 7 pairs were measured by then.

    Returns
    -------
    Row
        Without times if fastrnn's results are wrong or the case could not be run.
    """
    plan = planner.plan(problem_of(case, device))
    tolerance = tolerance_of(case, device)
    try:
        calls = make_calls(case, device)
        error = max_error(calls["fastrnn"](), calls["torch.nn"]())
        # Written so that a NaN is wrong.
        if not error <= tolerance:
            return Row(case, plan.path, plan.reason, "wrong", tolerance, error)
        peaks = [_peak_mib(calls[name], device) for name in ("fastrnn", "torch.nn")]
        pairs = time_pairs(calls["fastrnn"], calls["torch.nn"], device, seconds)
    except RuntimeError as failure:
        # Above all, too little memory: the other cases can still be measured.
        first_line = str(failure).strip().partition("\n")[0]
        return Row(case, plan.path, first_line, "failed", tolerance)
    ours, theirs = (band([pair[side] * 1e3 for pair in pairs]) for side in (0, 1))
    times = Times(ours, theirs, ratio_band(pairs))
    _gemm_speed(device, case)
    return Row(case, plan.path, plan.reason, "ok", tolerance, error, len(pairs), times, *peaks)


def with_shares(rows: Sequence[Row], device: torch.device) -> list[Row]:
    """Relate the speed of rows that were measured to that of a large matrix product of torch.

    Parameters
    ----------
    rows : sequence of Row
    device : torch.device
        The products are timed after every row, and the fastest counts.

    Returns
    -------
    list of Row
    """
    return [
        row
        if row.times is None
        else dataclasses.replace(
            row,
            share=row.case.flops
            / (row.times.fastrnn_ms.median * 1e-3)
            / _gemm_speed(device, row.case),
        )
        for row in rows
    ]


_gemm_speeds: dict[tuple[torch.device, torch.dtype], float] = {}


def _gemm_speed(device: torch.device, case: Case) -> float:
    """Operations a second of a large product in the dtype of a case, the best seen so far.

    On a CPU float32 stands for half precision, which not all multiply.
    """
    size = {"cpu": 1024, "cuda": 8192}[device.type]
    dtype = getattr(torch, case.dtype)
    if device.type == "cpu" and dtype != torch.float64:
        dtype = torch.float32
    a = torch.randn(size, size, device=device).to(dtype)
    fastest = min(_sample(lambda: [a @ a], 1, device) for _ in range(5))
    best = max(_gemm_speeds.get((device, dtype), 0.0), 2 * size**3 / fastest)
    _gemm_speeds[device, dtype] = best
    return best


def problem_of(case: Case, device: torch.device) -> planner.Problem:
    """Describe a case to the planner."""
    cell = case.cell.removesuffix("_cell")
    dtype = getattr(torch, case.dtype)
    facts, precision = gpu.facts(torch.empty(0, dtype=dtype, device=device))
    return planner.Problem(
        "rnn_tanh" if cell == "rnn" else cell,
        case.steps,
        case.batch,
        case.input_size,
        case.hidden_size,
        dtype=dtype,
        device=device.type,
        training=case.mode == "training",
        packed=case.ragged,
        is_step=case.is_step,
        layers=case.num_layers,
        directions=2 if case.bidirectional else 1,
        gpu=facts,
        precision=precision,
    )


def make_calls(case: Case, device: torch.device) -> dict[str, Call]:
    """Build the case for each provider.

    Returns
    -------
    dict of str to callable
        For each of `PROVIDERS` a function that runs the case once and returns every
        output, and in training the gradients of input, state and parameters after them.
    """
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    rows: tuple[int, ...] = (case.batch,) if case.is_step else (case.steps, case.batch)
    sizes = None
    if case.ragged:
        sizes = torch.tensor([sum(n > t for n in case.lengths) for t in range(case.steps)])
        rows = (sum(case.lengths),)
    inputs = [random(*rows, case.input_size)]
    if case.is_step:
        # A loop over steps passes a state; a layer is most often called without one.
        n_states = 2 if case.cell == "lstm_cell" else 1
        inputs += [random(case.batch, case.hidden_size) for _ in range(n_states)]

    options = {} if case.is_step else {
        "num_layers": case.num_layers,
        "bidirectional": case.bidirectional,
    }  # fmt: skip
    modules = {
        name: getattr(library, _CLASSES[case.cell])(
            case.input_size, case.hidden_size, **options, device=device, dtype=dtype
        )
        for name, library in PROVIDERS.items()
    }
    weights = modules["torch.nn"].state_dict()
    for module in modules.values():
        module.load_state_dict(weights)
    if case.mode == "forward":
        return {name: _forward_call(module, sizes, inputs) for name, module in modules.items()}
    outputs = _forward_call(modules["torch.nn"], sizes, inputs)()
    cotangents = [random(*output.shape) for output in outputs]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    return {
        name: _training_call(module, sizes, inputs, cotangents) for name, module in modules.items()
    }


def _forward_call(module: torch.nn.Module, sizes: Tensor | None, inputs: Sequence[Tensor]) -> Call:
    def call() -> list[Tensor]:
        with torch.no_grad():
            return _run(module, sizes, inputs)

    return call


def _training_call(
    module: torch.nn.Module,
    sizes: Tensor | None,
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
) -> Call:
    leaves = [*inputs, *module.parameters()]

    def call() -> list[Tensor]:
        outputs = _run(module, sizes, inputs)
        # Not .backward(): the gradients are new each time, nothing is added up.
        return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]

    return call


def _run(module: torch.nn.Module, sizes: Tensor | None, inputs: Sequence[Tensor]) -> list[Tensor]:
    x, *state = inputs
    if sizes is not None:
        packed, final = module(PackedSequence(x, sizes))
        return [packed.data, *_flat(final)]
    if len(state) > 1:
        return _flat(module(x, tuple(state)))
    return _flat(module(x, *state))


def _flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in _flat(part)]


def tolerance_of(case: Case, device: torch.device) -> float:
    """How far two correct implementations may be apart, relative to the largest element.

    Rounding errors that add up at random grow with the square root of their number, n. The
    recurrence itself forgets (at torch's initial weights its Jacobian has a norm of about
    0.6), so the sums over steps and rows in the weights' gradients are what grows. In
    float32 and float64 all sums are taken in that dtype. Half precision, and TF32 in
    cuDNN, multiply rounded numbers but sum up in float32, except that torch's loop
    over steps adds up weight gradients in half precision: n is the number of steps.
    Differences seen on a CPU are up to 40 % of eps * (4 + sqrt(n)), over all cells and dtypes.
    """
    eps = torch.finfo(getattr(torch, case.dtype)).eps
    n = case.steps * case.num_layers
    if device.type == "cuda" and case.dtype == "float32":
        eps = torch.finfo(torch.float16).eps  # TF32, torch's default there, has as many bits
    elif case.dtype in ("float32", "float64"):
        n = n * case.batch + case.input_size + case.hidden_size
    return eps * (4 + math.sqrt(n))


def max_error(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Largest difference in any pair of tensors, relative to the largest element of theirs.

    Returns
    -------
    float
        Infinite if number, shapes or dtypes differ.
    """
    if [(t.shape, t.dtype) for t in ours] != [(t.shape, t.dtype) for t in theirs]:
        return math.inf
    errors = []
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.detach().double(), b.detach().double()
        errors.append((a - b).abs().max() / b.abs().max())
    return torch.stack(errors).max().item()


def time_pairs(
    ours: Call, theirs: Call, device: torch.device, seconds: float
) -> list[tuple[float, float]]:
    """Time two calls alternately.

    Returns
    -------
    list of (float, float)
        Seconds for one call of each. The two of a pair were measured one right after the
        other, in an order that changes with every pair, so that what else happens on the
        machine meets both alike.
    """
    calls = (ours, theirs)
    fastest = min(_warm_up(call, device) for call in calls)
    repeats = math.ceil(_SAMPLE_SECONDS[device.type] / fastest)
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(pairs) < _MIN_PAIRS or (time.perf_counter() < end and len(pairs) < _MAX_PAIRS):
        times = [0.0, 0.0]
        for side in (0, 1) if len(pairs) % 2 else (1, 0):
            times[side] = _sample(calls[side], repeats, device)
        pairs.append((times[0], times[1]))
    return pairs


def _warm_up(call: Call, device: torch.device) -> float:
    """Call for a while; returns the shortest time of one call."""
    best, end = math.inf, time.perf_counter() + _WARM_UP_SECONDS
    while best == math.inf or time.perf_counter() < end:
        best = min(best, _sample(call, 1, device))
    return best


def _sample(call: Call, repeats: int, device: torch.device) -> float:
    """Seconds for one call, as the caller sees them, averaged over `repeats`."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / repeats


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_mib(call: Call, device: torch.device) -> float | None:
    """What one call allocates at most, beside weights and inputs; None where nobody counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free but kept would not be counted
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except (AttributeError, OSError):
        return None
    resident = _resident_mib("VmRSS")
    call()
    return max(0.0, _resident_mib("VmHWM") - resident)


def _resident_mib(field: str) -> float:
    """VmRSS, the resident set, or VmHWM, its peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def band(values: Sequence[float]) -> Band:
    """Median and 20th and 80th percentile.

    Examples
    --------
    >>> from fastrnn.bench.measure import band
    >>> band([1, 2, 3, 4, 5, 100])
    Band(median=3.5, p20=2.0, p80=5.0)
    """
    p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return Band(statistics.median(values), p20, p80)


def ratio_band(pairs: Sequence[tuple[float, float]]) -> Band:
    """How many times faster the first of each pair is: the band of second / first."""
    return band([theirs / ours for ours, theirs in pairs])
