"""Choose between our kernels and cuDNN on a GPU, and which of our kernels to run.

Where ``fastrnn tune`` has measured a GPU, its table decides. Otherwise nothing was measured here:
the behaviour of cuDNN is taken from figures published by others, and step times of our kernels are
simulated (see kernels/configs.py).
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

# Below this, launching our kernels from Python is expected to cost more than the steps save.
_GPU_MIN_STEPS = 16


def choose(problem: Problem, forward: Choice, backward: Choice) -> Decision:
    """Choose between torch's path and ours for a plain layer on a GPU, and say why.

    `forward` and `backward` are the configurations our kernels would run in; they must exist.
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
        return best.decision("kernels", f"{best.path} kernels")
    return Decision(*_simulated(problem, forward, backward), tuned.MODEL)


def _simulated(problem: Problem, forward: Choice, backward: Choice) -> tuple[str, str]:
    if problem.is_step:
        return "torch", "a single step is one fused ATen call, against which our kernels were not measured"
    if problem.steps < _GPU_MIN_STEPS:
        return "torch", f"below {_GPU_MIN_STEPS} steps, launching our kernels costs what they save"
    # The small persistent kernel does not count: at its sizes ours need little or no exchange.
    if "persistent" in cudnn_algorithm(problem).split(", "):
        return "torch", "cuDNN has a persistent kernel for this shape, and ours was only simulated"
    if is_staged(problem):
        return "torch", "our kernels take several launches per step, which cost less in torch"
    choices = (forward, backward) if problem.training else (forward,)
    if any(choice.config.schedule == "stepwise" for choice in choices):
        return "torch", f"{_why_stepwise(problem)}; launches per step cost less in torch"
    times = [choice.step_us for choice in choices]
    known = "" if any(map(math.isnan, times)) else "; simulated: {} us a step"
    return "kernels", "recurrent weights on chip" + known.format(
        " + ".join(f"{time:.2f}" for time in times)
    )


def _why_stepwise(problem: Problem) -> str:
    """Say why no kernel keeps the weights on chip; one of the passes must have none."""
    assert problem.gpu is not None
    shape = _shape(problem)
    if gap := configs.persistent_gap(shape, problem.gpu):
        return gap
    fits = all(
        configs.choose(shape, problem.gpu, backward=backward, schedule="persistent")
        for backward in (False, True)
    )
    if fits:
        return "one launch per step is faster in simulation"
    return "the weights do not fit on chip"


def cudnn_algorithm(problem: Problem) -> str:
    """Name the algorithm that torch asks cuDNN for (ATen/native/cudnn/RNN.cpp, Ampere and later).

    Parameters
    ----------
    problem : Problem
        On a CUDA device.

    Returns
    -------
    {'standard', 'small persistent', 'persistent'}
        'standard' launches kernels for each step; the others keep the recurrent weights on chip. If
        forward and backward differ, both names: 'forward, backward'.
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
    """Say why no Triton kernel can run a problem.

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
    if problem.directions * problem.parts > configs.MAX_GROUPS:
        return f"no kernel of ours for more than {configs.MAX_GROUPS} heads and members"
    most = configs.MAX_NORMALISED_ROW // max(4, problem.dtype.itemsize)
    if CELLS[problem.cell].is_normalised and problem.hidden_size > most:
        return f"no kernel of ours normalises more than {most} hidden units in {problem.dtype}"
    if problem.dtype not in _KERNEL_DTYPES:
        return f"no kernel of ours for {problem.dtype}"
    return None


def is_staged(problem: Problem) -> bool:
    """Tell whether a step is more than one product followed by arithmetic on single hidden units.

    It may have several products, or an operation over all hidden units between two of them.
    float64 counts too, for lack of anything faster. Such a step takes several launches, unless one
    program can run all steps.
    """
    is_pointwise = CELLS[problem.cell].is_pointwise
    return problem.projected or not is_pointwise or problem.dtype == torch.float64


def choose_kernels(problem: Problem, schedule: str | None = None) -> tuple[Choice, Choice]:
    """Choose how the forward and the backward kernel of a layer are launched.

    `kernel_gap` must have found none. Raises ValueError if the device cannot run it by `schedule`.
    """
    assert problem.gpu is not None
    shape = _shape(problem)
    # Symbolic sizes cannot be hashed, so the cache does not take them.
    choose = configs.choose if isinstance(problem.batch, int) else configs.choose.__wrapped__

    def chosen(backward: bool) -> Choice | None:
        if schedule is None and (best := _best(problem._replace(training=backward))):
            found = choose(shape, problem.gpu, backward=backward, schedule=best.path)
            if found is not None:  # what was measured has one direction; this may not fit
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
    """List the schedules by which both passes can run; `kernel_gap` must have found none."""
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
    """Say for each schedule why it can run no LSTM of any size, or None if it can run one.

    `problem` gives GPU, dtype and precision; `kernel_gap` must have found none.
    """
    assert problem.gpu is not None
    # The small one fits into one program, the large one is shared by several.
    small, large = (
        problem._replace(cell="lstm", batch=8, hidden_size=hidden) for hidden in (16, 512)
    )
    ways = (small, large, small._replace(projected=True))
    found = {name for each in ways for name in schedules(each)}
    gap = configs.persistent_gap(_shape(large), problem.gpu)
    if is_staged(small):
        gap = f"a step in {str(problem.dtype).removeprefix('torch.')} takes several launches"
    return {
        name: None if name in found else gap or "the weights do not fit on chip"
        for name in configs.SCHEDULES
    }


def _best(problem: Problem) -> tuned.Measured | None:
    """The fastest schedule by measurement; None if nothing like this was measured."""
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
    """Tell how float32 products are computed on a GPU, following torch's switches.

    Returns
    -------
    {'tf32', 'tf32x3', 'ieee'}
        'tf32' where cuDNN may use it for recurrent layers (``torch.backends.cudnn.allow_tf32``,
        torch's default). 'tf32x3', three TF32 products that together are nearly as accurate as
        float32, where only matrix products may (``torch.backends.cuda.matmul.allow_tf32``).
        Otherwise 'ieee'.
    """
    if torch.backends.cudnn.rnn.fp32_precision == "tf32":  # type: ignore[attr-defined]
        return "tf32"
    return "tf32x3" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


# Why this version of Triton failed to compile the persistent kernels, once that has happened.
_gap = ""


def note_gap(reason: str) -> None:
    """Stop planning persistent kernels in this process, for the reason given."""
    global _gap
    if not _gap:
        warnings.warn(f"{reason}; other schedules run in their place", stacklevel=2)
    _gap = reason


def gpu(index: int | None = None) -> Device | None:
    """Describe a GPU to the planner, by default the current one.

    None if there is none, or Triton is not installed.
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
    # Other dtypes leave nothing to choose.
    precision = float32_precision() if x.dtype == torch.float32 else "tf32"
    return gpu(x.device.index), precision
