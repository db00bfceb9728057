"""Which path runs a call, and why.

``plan`` looks at a problem and returns a `Plan`; nothing is compiled or allocated.
``fastrnn plan`` prints it. The paths:

``torch``
    torch's own kernels: oneDNN and ATen on a CPU, cuDNN on an NVIDIA GPU.
``loop``
    ``fastrnn::layer`` with a hand-written forward and backward: on a CPU compiled kernels or, where
    there are none, a loop of torch operators (``fastrnn.cpu``), on a GPU the Triton kernels, by one
    of three schedules (``resident``, ``persistent`` and ``stepwise``, see ``fastrnn.kernels``).
``reference``
    the differentiable loop of ``reference.py``: for what torch does not have under a
    ``torch.func`` transform or forward-mode AD, and whenever asked for.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from . import cpu
from .cells import CELLS
from .kernels import configs
from .kernels.configs import SCHEDULES, Choice, Device, Shape

PATHS = ("torch", "loop", "reference")

# Cells that torch has kernels for.
_TORCH_CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Problem(NamedTuple):
    """One call of a recurrent layer, as far as the choice of a path depends on it.

    Attributes
    ----------
    cell : str
        Key of ``fastrnn.reference.CELLS``.
    steps, batch, input_size, hidden_size : int
        T, B, I and H; `steps` is 1 and `is_step` true for a cell module.
    dtype : torch.dtype
    device : str
        Device type, as in ``torch.device.type``.
    training : bool
        Whether gradients will be asked for.
    packed : bool
        Whether the sequences have different lengths. A PackedSequence of equal lengths
        is to torch a padded batch.
    projected, is_step : bool
    transform : {None, 'func', 'forward'}
        Whether the call is inside a ``torch.func`` transform or forward-mode AD.
    layers, directions : int
        Of the whole stack.
    marked : bool
        Whether there are lengths, resets, truncated gradients or heads, or all states are wanted.
    noisy : bool
        Whether there is recurrent dropout or zoneout.
    gpu : fastrnn.kernels.configs.Device, optional
        The GPU, present or not, if `device` is one that Triton compiles for.
    precision : {'tf32', 'tf32x3', 'ieee'}
        Of products of float32 on a GPU; see `float32_precision`.
    """

    cell: str
    steps: int
    batch: int
    input_size: int
    hidden_size: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    training: bool = False
    packed: bool = False
    projected: bool = False
    is_step: bool = False
    transform: str | None = None
    layers: int = 1
    directions: int = 1
    marked: bool = False
    noisy: bool = False
    gpu: Device | None = None
    precision: str = "tf32"


class Plan(NamedTuple):
    """The chosen path, the reason in one sentence, and how the kernels of a GPU would run.

    `kernels` are the choices for forward and backward; None where no kernel can run the problem,
    whatever the path.
    """

    path: str
    reason: str
    kernels: tuple[Choice, Choice] | None = None


class _Forced(threading.local):
    path: str | None = None
    schedule: str | None = None


_forced = _Forced()


@contextlib.contextmanager
def use_path(path: str | None) -> Iterator[None]:
    """Run every layer and cell called inside, in this thread, on one path.

    Parameters
    ----------
    path : str or None
        'torch', 'loop' or 'reference'; or 'resident', 'persistent' or 'stepwise', which are
        'loop' with that schedule on a GPU. None restores the planner's own choice. What torch
        does not have, it cannot be made to run: the identity activation stays with us. Under a
        ``torch.func`` transform and in complex numbers 'loop' is 'reference'. What
        ``torch.compile`` traces does not ask.

    Raises
    ------
    ValueError
        If `path` is none of these.

    Examples
    --------
    >>> import torch, fastrnn
    >>> from fastrnn.planner import use_path
    >>> gru, x = fastrnn.GRU(8, 16), torch.randn(5, 2, 8)
    >>> with use_path("loop"):
    ...     ours, _ = gru(x)
    >>> with use_path("torch"):
    ...     stock, _ = gru(x)
    >>> bool(torch.allclose(ours, stock, atol=1e-6))
    True
    """
    accepted = (*PATHS, *SCHEDULES)
    if path is not None and path not in accepted:
        raise ValueError(f"path must be one of {', '.join(accepted)}, got {path!r}")
    before = _forced.path, _forced.schedule
    _forced.schedule = path if path in SCHEDULES else None
    _forced.path = "loop" if path in SCHEDULES else path
    try:
        yield
    finally:
        _forced.path, _forced.schedule = before


def forced_path() -> str | None:
    """Name the path that an enclosing `use_path` asks for.

    Returns
    -------
    str or None
    """
    return _forced.path


def forced_schedule() -> str | None:
    """Name the schedule that an enclosing `use_path` asks for.

    Returns
    -------
    str or None
    """
    return _forced.schedule


def plan(problem: Problem) -> Plan:
    """Choose the path for a problem.

    Parameters
    ----------
    problem : Problem

    Returns
    -------
    Plan

    Examples
    --------
    >>> from fastrnn.planner import Problem, plan
    >>> plan(Problem("lstm", steps=1, batch=8, input_size=256, hidden_size=256)).path
    'torch'
    """
    return _plan(_forced.path, problem)


def path(*fields: Any) -> str:
    """Choose the path for a problem in the time that a call of a small layer can spare.

    Parameters
    ----------
    *fields
        Those of `Problem`, in its order and without defaults.

    Returns
    -------
    str
        ``plan(Problem(*fields)).path``, remembered.
    """
    try:
        return _remembered_path(_forced.path, *fields)
    except TypeError:  # symbolic sizes have no hash
        return plan(Problem(*fields)).path


def compiled_path(cell: str, dtype: torch.dtype, is_step: bool, transform: str | None) -> str:
    """Choose the path for a call that a compiler traces, without asking for its sizes.

    Parameters
    ----------
    cell, dtype, is_step, transform
        As for `Problem`.

    Returns
    -------
    str
    """
    if is_step and cell in _TORCH_CELLS:
        return "torch"
    if transform or dtype not in _FLOATS:
        return "reference"
    # One opaque operator; torch's own kernels would be unrolled step by step.
    return "loop"


@functools.lru_cache(maxsize=4096)
def _remembered_path(forced: str | None, *fields: Any) -> str:
    return _plan(forced, Problem(*fields)).path


def _plan(forced: str | None, problem: Problem) -> Plan:
    gap = kernel_gap(problem)
    kernels = None if gap else choose_kernels(problem, _forced.schedule)
    path, reason = _choose_path(forced, problem, gap, kernels)
    return Plan(path, reason, kernels)


def _choose_path(
    forced: str | None, problem: Problem, gap: str | None, kernels: tuple[Choice, Choice] | None
) -> tuple[str, str]:
    missing = _missing_in_torch(problem)
    if missing and forced == "torch":
        forced = None
    unknown = problem.noisy or problem.cell not in cpu.CPU_CELLS
    if forced in (None, "loop"):
        if problem.transform == "forward" or (problem.transform and (problem.is_step or unknown)):
            what = "forward mode" if problem.transform == "forward" else "a torch.func transform"
            return "reference", f"our operators have no rule for this in {what}"
        if problem.dtype not in _FLOATS:
            path = "reference" if missing or forced or problem.transform else "torch"
            return path, f"our operators have no derivatives in {problem.dtype}"
    if forced is not None:
        return forced, "asked for by fastrnn.planner.use_path"
    if unknown:
        what = "recurrent dropout and zoneout" if problem.noisy else problem.cell
        return "reference", f"no kernel of ours for {what}"
    if problem.marked and problem.device == "cuda" and kernels is None:
        return "reference", f"{missing}; {gap}"
    if missing:
        return "loop", missing
    if problem.transform:
        return "loop", "torch's kernels have no batching rules"
    if problem.device != "cpu":
        return ("torch", str(gap)) if kernels is None else _on_gpu(problem, *kernels)
    if problem.is_step:
        return "torch", "one step is one fused ATen call; ours would have to pack the weights"
    if problem.dtype in (torch.bfloat16, torch.float16) and multiplies(problem.dtype):
        return "torch", f"this CPU multiplies {problem.dtype}; we would use float32"
    gap = cpu.kernel_gap(problem.dtype, problem.projected)
    return _kernels_on_cpu(problem) if gap is None else _loop_on_cpu(problem, gap)


def _missing_in_torch(problem: Problem) -> str | None:
    """What torch has no kernel for."""
    if problem.cell not in _TORCH_CELLS:
        return f"torch has no kernel for {problem.cell}"
    if problem.marked:
        return "torch has no lengths, resets, truncated gradients, states of all steps or heads"
    return "torch has no recurrent dropout and no zoneout" if problem.noisy else None


# Where our kernels win on a CPU. Below so many steps the fixed costs of a call, 0.1 ms and in
# training 0.5 ms, are more than the steps save. Measured with torch 2.13 on a 2-core x86-64
# machine with AVX2, float32, 2 threads; time of torch.nn / ours at (B, I = H) = (1, 64), (1, 256),
# (16, 64), (16, 256):
#   RNN  inference T=4 0.8, 0.8, 1.1, 1.1; T=8 1.1, 1.0, 1.7, 1.4
#        training  T=4 0.8, 0.9, 1.0, 1.0; T=8 1.1, 1.6, 1.4, 1.6
#   GRU  inference T=2 0.9, 0.8, 1.0, 1.1; T=4 1.1, 0.9, 1.4, 1.3
#        training  T=2 0.9, 0.9, 1.0, 1.0; T=4 1.4, 1.3, 1.5, 1.3
#   LSTM inference T=2 1.2, 1.0, 1.2, 0.9; T=16 1.3, 0.9, 1.3, 1.1
#        training  T=4 0.8, 1.3, 0.9, 1.8; T=32 0.9, 1.4, 1.2, 1.0
_KERNEL_MIN_STEPS = {"rnn": (8, 8), "gru": (4, 4), "lstm": (2, 4)}
# Hidden units below which training needs more steps; (T, B, H) = (16, 8, 128) 0.90 and 0.95,
# (16, 16, 192) 0.98, (16, 8, 768) 2.3.
_SMALL_LSTM = 256
_SMALL_LSTM_MIN_STEPS = 48
# Where oneDNN's LSTM is as fast or faster, (T, B, H): training (128, 64, 512) 0.91, (128, 64, 1024)
# 0.96, (64, 32, 576) 0.94, (64, 32, 512) 1.06, (128, 64, 256) 1.28.
_LARGE_LSTM = 32 * 576  # B * H
# Inference, where packing the weights takes as long as using them in a few steps:
#   B=1   H=64 T=8 0.94, 32 1.05; H=128 T=32 0.83, 64 1.14; H=256 T=32 0.90, 64 1.10
#         H=512 T=64 0.98, 128 1.15; H=768 T=256 0.91; H=1024 T=128 0.75, 512 0.87
#   B=4   H=64 T=8 1.11; H=128 T=8 0.98, 16 1.09; H=256 T=32 0.92, 64 1.19; H=512 T=32 0.90, 64 1.02
#   B=16  H=64 T=8 1.07; H=128 T=8 1.03; H=256 T=16 0.90, 32 1.02; H=512 T=32 0.96, 64 1.06
# Up to so many hidden units: the steps it takes with a batch below 4, and with a larger one.
_LSTM_MIN_STEPS = (
    (127, 32, 2),
    (255, 64, 16),
    (511, 64, 64),
    (512, 128, 64),
    (math.inf, math.inf, 64),
)
_MANY_ROWS = 1024  # T * B from which packing does not matter to a larger batch

# Where the loop of torch operators wins, T=64, in training:
#   float64 (B, H) = (8, 64), (8, 256), (64, 256): 1.2-1.3, 1.2-1.3, 0.9-1.2
#   projected to H/2: (1, 64), (8, 64), (8, 256), (32, 256): 1.3, 1.3, 1.2, 1.1; T=48: (8, 256),
#   (32, 256): 1.1, 0.96; (64, 256): 0.9-1.0
#   inference: 0.5-1.0
_LOOP_MIN_STEPS = 48
_MAX_BATCH_TIMES_HIDDEN = 8192
# and in bfloat16 and float16, on a CPU that does not multiply them, T=64:
#   training  (1, 64) 1.3-1.7, (16, 64) 2.1-3.5, (16, 256) 9-18, (64, 256) 15-22
#   inference (1, 64) 0.6-0.8, (1, 1024) 0.7-1.2, (4, 256) 1.5-1.9, (16, 64) 1.6-2.2
#   (16, 64), T=16: training 1.3-2.3, inference 1.2-2.0; T=4: 0.7-1.2
_HALF_MIN_STEPS = 16
_HALF_MIN_BATCH = 4
_HALF_MIN_BATCH_TIMES_HIDDEN = 1024


def _kernels_on_cpu(problem: Problem) -> tuple[str, str]:
    if not problem.packed:
        minimum = _kernel_min_steps(problem)
        if problem.steps < minimum:
            if minimum == math.inf:
                return "torch", "a step is bound by reading the weights, which oneDNN does as fast"
            return "torch", f"below {minimum} steps our call costs what the steps save"
        large = problem.batch * problem.hidden_size >= _LARGE_LSTM
        if large and problem.training and problem.cell == "lstm" and problem.dtype == torch.float32:
            return "torch", f"B * H >= {_LARGE_LSTM}: bound by the same products as oneDNN's LSTM"
    return "loop", f"compiled kernels, {cpu.describe()}"


def _kernel_min_steps(problem: Problem) -> float:
    if problem.cell == "lstm" and problem.dtype == torch.float32:  # oneDNN's is slow in halves
        if problem.training and problem.hidden_size < _SMALL_LSTM:
            return _SMALL_LSTM_MIN_STEPS
        is_small = problem.batch < 4
        if not problem.training and (is_small or problem.steps * problem.batch < _MANY_ROWS):
            for hidden, small, other in _LSTM_MIN_STEPS:
                if problem.hidden_size <= hidden:
                    return small if is_small else other
    return _KERNEL_MIN_STEPS[problem.cell.partition("_")[0]][problem.training]


def _loop_on_cpu(problem: Problem, gap: str) -> tuple[str, str]:
    if problem.dtype in (torch.bfloat16, torch.float16):
        size = problem.batch * problem.hidden_size
        large = problem.batch >= _HALF_MIN_BATCH and size >= _HALF_MIN_BATCH_TIMES_HIDDEN
        if problem.steps >= (_HALF_MIN_STEPS if large else _LOOP_MIN_STEPS) and (
            large or problem.training
        ):
            return "loop", f"{gap}; this CPU does not multiply {problem.dtype}, the loop need not"
        return "torch", f"{gap}; too small to gain from computing in float32"
    if not problem.training:
        return "torch", f"{gap}; in inference torch's were faster than our loop"
    unfused = problem.packed or problem.projected or problem.dtype == torch.float64
    if problem.cell == "lstm" and not unfused:
        return "torch", f"{gap}; oneDNN runs the whole LSTM layer fused"
    if problem.steps < _LOOP_MIN_STEPS:
        return "torch", f"{gap}; below {_LOOP_MIN_STEPS} steps our loop costs what it saves"
    if not problem.packed and problem.batch * problem.hidden_size > _MAX_BATCH_TIMES_HIDDEN:
        return "torch", f"{gap}; B * H > {_MAX_BATCH_TIMES_HIDDEN}: bound by the same GEMMs"
    return "loop", f"{gap}; one GEMM for each weight gradient instead of one a step"


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN has fast products of a half-precision dtype on this CPU.

    Parameters
    ----------
    dtype : {torch.bfloat16, torch.float16}

    Returns
    -------
    bool
    """
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


# On a GPU. The figures are not yet our own: what cuDNN does was measured by others, what the
# kernels do is a model (see kernels/configs.py).

# Below this our launches, from Python, are expected to cost more than the steps save.
_GPU_MIN_STEPS = 16


def _on_gpu(problem: Problem, forward: Choice, backward: Choice) -> tuple[str, str]:
    if problem.is_step:
        return "torch", "one step is one fused ATen call; ours was not measured against it"
    if problem.steps < _GPU_MIN_STEPS:
        return "torch", f"below {_GPU_MIN_STEPS} steps launching our kernels costs what they save"
    # Not the small one: where it is, our kernels need no or little exchange.
    if "persistent" in cudnn_algorithm(problem).split(", "):
        return "torch", "cuDNN has a persistent kernel for this shape, ours was not measured"
    choices = (forward, backward) if problem.training else (forward,)
    if any(choice.config.schedule == "stepwise" for choice in choices):
        return "torch", "the weights do not fit on chip; torch launches single steps with less ado"
    times = " + ".join(f"{choice.step_us:.2f}" for choice in choices)
    return "loop", f"recurrent weights on chip; by the model {times} us a step"


def cudnn_algorithm(problem: Problem) -> str:
    """Name the algorithm that torch asks cuDNN for (ATen/native/cudnn/RNN.cpp, Ampere and later).

    Parameters
    ----------
    problem : Problem
        On a CUDA device.

    Returns
    -------
    {'standard', 'small persistent', 'persistent'}
        'standard' is launches for each step, the others keep the recurrent weights on chip. If
        forward and backward differ, 'forward, backward'.
    """
    if problem.packed or problem.projected:
        return "standard"
    gpu, hidden = problem.gpu, problem.hidden_size
    if (
        problem.dtype == torch.float16
        and problem.layers == problem.directions == 1
        and problem.cell != "gru"
        and hidden <= 1024
        and hidden % 128 == 0
        and problem.input_size % 128 == 0
        and gpu is not None
        and gpu.target == "cuda"
        and gpu.processors >= 98
        and gpu.capability % 10 != 6
        and problem.batch % 8 == 0
        and problem.batch <= 128
    ):
        large = "persistent"
    else:
        large = "standard"
    small = {"rnn": (384, 256)}.get(problem.cell.partition("_")[0], (192, 128))
    names = [
        "small persistent" if hidden <= most and problem.dtype != torch.float64 else large
        for most in small[: 2 if problem.training else 1]
    ]
    return ", ".join(dict.fromkeys(names))


_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernel_gap(problem: Problem) -> str | None:
    """Say why no Triton kernel can run a problem.

    Parameters
    ----------
    problem : Problem

    Returns
    -------
    str or None
        A clause, or None if there are kernels.
    """
    gpu = problem.gpu
    if gpu is None:
        return f"no kernel of ours for device type {problem.device!r}"
    if gpu.target == "cuda" and gpu.capability < 80:
        return f"our kernels need compute capability 8.0, {gpu.name} has {gpu.capability / 10}"
    if gpu.target == "hip" and (gpu.capability != 942 or problem.precision == "tf32x3"):
        return f"no kernel of ours for {gpu.name} in {problem.precision}"
    if problem.batch > configs.MAX_BATCH:
        return f"no kernel of ours for a batch of more than {configs.MAX_BATCH}"
    if problem.dtype not in _KERNEL_DTYPES:
        return f"no kernel of ours for {problem.dtype}"
    if problem.noisy:
        return "no kernel of ours for recurrent dropout and zoneout"
    if problem.cell not in cpu.CPU_CELLS:
        return f"no kernel of ours for {problem.cell}"
    if problem.projected:
        return "no kernel of ours for projections"
    return None


def choose_kernels(problem: Problem, schedule: str | None = None) -> tuple[Choice, Choice]:
    """Choose how the forward and the backward kernel of a layer are launched.

    Parameters
    ----------
    problem : Problem
        One for which `kernel_gap` finds none.
    schedule : str, optional
        Only this schedule.

    Returns
    -------
    tuple of fastrnn.kernels.configs.Choice
        For forward and for backward.

    Raises
    ------
    ValueError
        If the device cannot run the problem by that schedule.
    """
    assert problem.gpu is not None
    shape = Shape(
        CELLS[problem.cell].n_gates,
        problem.batch,
        problem.hidden_size,
        problem.directions,
        problem.dtype.itemsize,
        problem.precision,
    )
    # A tracer's sizes have no hash to be remembered by.
    choose = configs.choose if isinstance(problem.batch, int) else configs.choose.__wrapped__
    choices = [
        choose(shape, problem.gpu, backward=backward, schedule=schedule)
        for backward in (False, True)
    ]
    if None in choices:
        raise ValueError(
            f"no {schedule} schedule for {problem.cell}, B={problem.batch}, "
            f"H={problem.hidden_size}, {problem.dtype} on {problem.gpu.name}"
        )
    return choices[0], choices[1]  # type: ignore[return-value]


def float32_precision() -> str:
    """Tell how products of float32 are computed on a GPU, by torch's own switches.

    Returns
    -------
    {'tf32', 'tf32x3', 'ieee'}
        'tf32' where cuDNN may use it for recurrent layers (``torch.backends.cudnn.allow_tf32``,
        torch's default). Where only matrix products may
        (``torch.backends.cuda.matmul.allow_tf32``), 'tf32x3', three products of tf32 that are
        nearly as exact as float32. Otherwise 'ieee'.
    """
    if torch.backends.cudnn.rnn.fp32_precision == "tf32":  # type: ignore[attr-defined]
        return "tf32"
    return "tf32x3" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@functools.cache
def gpu(index: int | None = None) -> Device | None:
    """Describe a GPU of this machine to the planner.

    Parameters
    ----------
    index : int, optional
        The current device if None.

    Returns
    -------
    Device or None
        None if it is not there, or Triton is not installed.
    """
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return None
    facts = torch.cuda.get_device_properties(index)
    is_hip = torch.version.hip is not None
    return Device(
        facts.name,
        "hip" if is_hip else "cuda",
        _gfx(facts.gcnArchName) if is_hip else 10 * facts.major + facts.minor,
        facts.multi_processor_count,
        getattr(facts, "shared_memory_per_block_optin", facts.shared_memory_per_block),
        facts.clock_rate // 1000,
    )


def _gfx(name: str) -> int:
    """942 of 'gfx942:sramecc+'; 0 where there is a letter in the number."""
    number = name.partition(":")[0].removeprefix("gfx")
    return int(number) if number.isdecimal() else 0
