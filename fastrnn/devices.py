"""Choose between fastrnn's kernels and cuDNN on a GPU, and between fastrnn's schedules.

Where ``fastrnn tune`` has measured a GPU, its table decides. Otherwise the choice is not based on
measurements: the behavior of cuDNN is inferred from published figures, and the step times of
fastrnn's kernels are simulated (see kernels/configs.py).
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings

import torch
from torch import Tensor

from . import hardware, tuned
from .cells import CELLS
from .kernels import configs
from .kernels.configs import Choice, Device, Shape
from .problem import Decision, Problem

# With fewer steps, launching the kernels from Python is expected to cost more than they save.
_GPU_MIN_STEPS = 16


def choose(problem: Problem, forward: Choice, backward: Choice) -> Decision:
    """Choose torch's or fastrnn's path for a plain layer on a GPU, with the reason.

    `forward` and `backward` are the configurations in which fastrnn's kernels would run.
    """
    last = backward if problem.training else forward
    best = _best(problem)
    # The measured layer and this one must use the same cuDNN algorithm.
    alike = problem._replace(layers=1, directions=1, input_size=problem.hidden_size)
    if (
        best is not None
        and best.path == last.config.schedule
        and cudnn_algorithm(problem) == cudnn_algorithm(alike)
    ):
        return best.decision("kernels", f"fastrnn's {best.path} kernels")
    return Decision(*_simulated(problem, forward, backward), tuned.MODEL)


def _simulated(problem: Problem, forward: Choice, backward: Choice) -> tuple[str, str]:
    if problem.is_step:
        return "torch", (
            "a single step is one fused ATen call, which fastrnn's kernels have not been measured "
            "against"
        )
    if problem.steps < _GPU_MIN_STEPS:
        return "torch", (
            f"below {_GPU_MIN_STEPS} steps, launching fastrnn's kernels is expected to cost more "
            "than they save"
        )
    # The small persistent kernel does not count: at its sizes, fastrnn's kernels exchange little.
    if "persistent" in cudnn_algorithm(problem).split(", "):
        return "torch", "cuDNN has a persistent kernel for this shape; fastrnn's was only simulated"
    if is_staged(problem):
        return "torch", "fastrnn takes several launches per step, which cost less in torch"
    choices = (forward, backward) if problem.training else (forward,)
    if any(choice.config.schedule == "stepwise" for choice in choices):
        return "torch", f"{_why_stepwise(problem)}; a launch per step costs less in torch"
    times = [choice.step_us for choice in choices]
    known = "" if any(map(math.isnan, times)) else "; simulated: {} us per step"
    return "kernels", "recurrent weights stay on chip" + known.format(
        " + ".join(f"{time:.2f}" for time in times)
    )


def _why_stepwise(problem: Problem) -> str:
    """Return why the kernels of at least one pass cannot keep the weights on chip."""
    assert problem.gpu is not None
    shape = _shape(problem)
    if gap := configs.persistent_gap(shape, problem.gpu):
        return gap
    fits = all(
        configs.choose(shape, problem.gpu, backward=backward, schedule="persistent")
        for backward in (False, True)
    )
    if fits:
        return "one launch per step is faster in the simulation"
    return "the recurrent weights do not fit on chip"


def cudnn_algorithm(problem: Problem) -> str:
    """Return the algorithm that torch requests from cuDNN (cudnn/RNN.cpp in ATen, from Ampere on).

    Parameters
    ----------
    problem : Problem
        On a CUDA device.

    Returns
    -------
    {'standard', 'small persistent', 'persistent'}
        'standard' launches kernels for each step; the others keep the recurrent weights on chip. If
        forward and backward differ, both names are returned: 'forward, backward'.
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


_KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def kernel_gap(problem: Problem) -> str | None:
    """Return why no Triton kernel can run a problem.

    Returns
    -------
    str or None
        The reason as a clause, or None if there are kernels.
    """
    gpu = problem.gpu
    if gpu is None:
        return f"fastrnn has no kernels for device type {problem.device!r}"
    if gpu.target == "cuda" and gpu.capability < 80:
        return (
            f"fastrnn's kernels need compute capability 8.0 or higher, {gpu.name} has "
            f"{gpu.capability / 10}"
        )
    if gpu.target == "hip" and gpu.capability != 942:
        return f"fastrnn has no kernels for {gpu.name}"
    if gpu.target == "hip" and problem.precision == "tf32x3":
        return f"fastrnn has no kernels for {gpu.name} in tf32x3"
    if problem.batch > configs.MAX_BATCH:
        return f"fastrnn has no kernels for batches of more than {configs.MAX_BATCH} rows"
    if problem.directions * problem.parts > configs.MAX_GROUPS:
        return (
            f"fastrnn has no kernels for more than {configs.MAX_GROUPS} directions x heads x "
            "ensemble members"
        )
    most = configs.MAX_NORMALIZED_ROW // max(4, problem.dtype.itemsize)
    if CELLS[problem.cell].is_normalized and problem.hidden_size > most:
        return f"fastrnn's kernels normalize at most {most} hidden units in {problem.dtype}"
    if problem.dtype not in _KERNEL_DTYPES:
        return f"fastrnn has no kernels for {problem.dtype}"
    return None


def is_staged(problem: Problem) -> bool:
    """Return whether a step is more than one product followed by pointwise arithmetic.

    It may have several products, or an operation over all hidden units between two products.
    float64 is included for lack of a faster schedule. Such a step takes several launches, unless
    one program can run all steps.
    """
    is_pointwise = CELLS[problem.cell].is_pointwise
    return problem.projected or not is_pointwise or problem.dtype == torch.float64


def choose_kernels(problem: Problem, schedule: str | None = None) -> tuple[Choice, Choice]:
    """Choose how the forward and the backward kernel of a layer are launched.

    `kernel_gap` must have returned None. Raises ValueError if `schedule` cannot run the problem on
    the device.
    """
    assert problem.gpu is not None
    shape = _shape(problem)
    # Symbolic sizes cannot be hashed, so they bypass the cache.
    choose = configs.choose if isinstance(problem.batch, int) else configs.choose.__wrapped__

    def chosen(backward: bool) -> Choice | None:
        if schedule is None and (best := _best(problem._replace(training=backward))):
            found = choose(shape, problem.gpu, backward=backward, schedule=best.path)
            if found is not None:  # the measured layer has one direction; with two it may not fit
                return found
        return choose(shape, problem.gpu, backward=backward, schedule=schedule)

    choices = [chosen(backward) for backward in (False, True)]
    if None in choices:
        gap = configs.persistent_gap(shape, problem.gpu) if schedule == "persistent" else None
        raise ValueError(
            f"no {schedule} schedule for {problem.cell}, B={problem.batch}, "
            f"H={problem.hidden_size}, {problem.dtype} on {problem.gpu.name}"
            + (f": {gap}" if gap else "")
        )
    return choices[0], choices[1]  # type: ignore[return-value]


def schedules(problem: Problem) -> list[str]:
    """List the schedules that can run both passes; `kernel_gap` must have returned None."""
    assert problem.gpu is not None
    shape = _shape(problem)
    return [
        schedule
        for schedule in configs.SCHEDULES
        if all(
            configs.choose(shape, problem.gpu, backward=backward, schedule=schedule)
            for backward in (False, True)
        )
    ]


def schedule_gaps(problem: Problem) -> dict[str, str | None]:
    """Return for each schedule why it cannot run an LSTM of any size; None if it can.

    `problem` gives GPU, dtype and precision; `kernel_gap` must have returned None.
    """
    assert problem.gpu is not None
    # The small one fits in one program; the large one is distributed over several.
    small, large = (
        problem._replace(cell="lstm", batch=8, hidden_size=hidden) for hidden in (16, 512)
    )
    ways = (small, large, small._replace(projected=True))
    found = {name for each in ways for name in schedules(each)}
    gap = configs.persistent_gap(_shape(large), problem.gpu)
    if is_staged(small):
        gap = f"a step in {str(problem.dtype).removeprefix('torch.')} takes several launches"
    return {
        name: None if name in found else gap or "the recurrent weights do not fit on chip"
        for name in configs.SCHEDULES
    }


def _best(problem: Problem) -> tuned.Measured | None:
    """Return the fastest measured schedule; None if nothing comparable was measured."""
    if problem.gpu is None or not tuned.has_sizes(problem):
        return None
    here = hardware.gpu(problem.gpu)
    return tuned.best(here, tuned.point_of(problem)) if tuned.table_of(here) else None


def _shape(problem: Problem) -> Shape:
    shape = Shape.of(
        CELLS[problem.cell],
        problem.batch,
        problem.hidden_size,
        problem.directions * problem.parts,
        problem.dtype.itemsize,
        problem.precision,
    )
    staged, projected = is_staged(problem), problem.projected
    return shape._replace(
        marked=problem.marked, noisy=problem.noisy, staged=staged, projected=projected
    )


def float32_precision() -> str:
    """Return how float32 products are computed on a GPU, following torch's settings.

    Returns
    -------
    {'tf32', 'tf32x3', 'ieee'}
        'tf32' if cuDNN may use TF32 for recurrent layers (``torch.backends.cudnn.allow_tf32``,
        torch's default). 'tf32x3', three TF32 products that together are nearly as accurate as
        float32, if only matrix products may (``torch.backends.cuda.matmul.allow_tf32``).
        Otherwise 'ieee'.
    """
    if torch.backends.cudnn.rnn.fp32_precision == "tf32":  # type: ignore[attr-defined]
        return "tf32"
    return "tf32x3" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


# Why this version of Triton failed to compile the persistent kernels, if it has.
_gap = ""


def note_gap(reason: str) -> None:
    """Stop planning persistent kernels in this process, for the given reason."""
    global _gap
    if not _gap:
        warnings.warn(f"{reason}; using other schedules instead", stacklevel=2)
    _gap = reason


def gpu(index: int | None = None) -> Device | None:
    """Describe a GPU for the planner, by default the current one.

    Returns None if there is no GPU or Triton is not installed.
    """
    found = _gpu(index)
    return found if found is None else found._replace(gap=_gap)


@functools.cache
def _gpu(index: int | None) -> Device | None:
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
    """Parse 942 from 'gfx942:sramecc+'; 0 if the number contains a letter."""
    number = name.partition(":")[0].removeprefix("gfx")
    return int(number) if number.isdecimal() else 0


def facts(x: Tensor) -> tuple[Device | None, str]:
    """Return the fields `gpu` and `precision` of ``Problem`` for a tensor."""
    if not x.is_cuda:
        return None, "tf32"
    # For other dtypes there is no choice of precision.
    precision = float32_precision() if x.dtype == torch.float32 else "tf32"
    return gpu(x.device.index), precision
