"""Choose the path that runs a call, and give the reason.

``plan`` maps a `Problem` to a `Plan` without compiling or allocating anything; ``fastrnn plan``
prints the result. The paths are:

- ``torch``: torch's kernels: oneDNN and ATen on a CPU, cuDNN on an NVIDIA GPU.
- ``kernels``: fastrnn's kernels, forward and backward. On a CPU they are compiled by
  ``fastrnn.cpu``; on a GPU they are Triton kernels with one of four schedules, ``resident``,
  ``persistent``, ``stepwise`` and ``staged`` (see ``fastrnn.kernels``).
- ``operators``: fastrnn's loop of torch operators (``fastrnn.cpu``), for every device and dtype,
  where there is no kernel.
- ``reference``: the differentiable loop in ``reference.py``, for forward-mode AD, complex numbers,
  and on request.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch

from . import cpu, crossover, devices
from .call import Call
from .context import are_known, differentiated, is_plain, is_ragged, is_traced, transform
from .kernels.configs import SCHEDULES, Choice
from .problem import Decision, Problem

#: fastrnn's paths; the planner uses the operators where there are no kernels.
OURS = ("kernels", "operators")
PATHS = ("torch", *OURS, "reference")

# Cells that torch has kernels for.
_TORCH_CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Plan(NamedTuple):
    """The chosen path, the reason in one sentence, and the configuration of the GPU kernels.

    `kernels` holds the configurations for forward and backward, whichever path was chosen, or is
    None if no GPU kernel can run the problem. `source` is that of the ``Decision`` between torch's
    and fastrnn's paths.
    """

    path: str
    reason: str
    kernels: tuple[Choice, Choice] | None = None
    source: str = ""


class _Forced(threading.local):
    path: str | None = None
    schedule: str | None = None


#: The path that an enclosing `use_path` forces.
forced = _Forced()


@contextlib.contextmanager
def use_path(path: str | None) -> Iterator[None]:
    """Run every layer and cell called inside the context, in this thread, on one path.

    Parameters
    ----------
    path : str or None
        'torch', 'kernels', 'operators' or 'reference'; or one of 'resident', 'persistent',
        'stepwise' and 'staged', which select 'kernels' with that schedule on a GPU. None restores
        the planner's own choice.

    Raises
    ------
    ValueError
        If `path` is not one of these.

    Notes
    -----
    A call that cannot run on the path takes another one. If torch has no kernel, the planner
    ignores 'torch' and chooses a path itself. 'kernels' falls back to 'operators' where there is no
    kernel; on a GPU, 'operators' uses the kernels where there are any. In forward-mode AD and for
    complex numbers, 'kernels' and 'operators' fall back to 'reference'.

    The setting does not apply to code that ``torch.compile`` traces, nor to code that autograd runs
    in its own threads, as it does in backward on a GPU unless
    ``torch.autograd.set_multithreading_enabled(False)`` is set.

    Examples
    --------
    >>> import torch, fastrnn
    >>> from fastrnn.planner import use_path
    >>> gru, x = fastrnn.GRU(8, 16), torch.randn(5, 2, 8)
    >>> with use_path("kernels"):
    ...     ours, _ = gru(x)
    >>> with use_path("torch"):
    ...     stock, _ = gru(x)
    >>> bool(torch.allclose(ours, stock, atol=1e-6))
    True
    """
    accepted = (*PATHS, *SCHEDULES)
    if path is not None and path not in accepted:
        renamed = "; it is now called 'kernels', or 'operators'" if path == "loop" else ""
        raise ValueError(f"path must be one of {', '.join(accepted)}, got {path!r}{renamed}")
    before = forced.path, forced.schedule
    forced.schedule = path if path in SCHEDULES else None
    forced.path = "kernels" if path in SCHEDULES else path
    try:
        with cpu.kernels_allowed(path != "operators"):
            yield
    finally:
        forced.path, forced.schedule = before


def plan(problem: Problem) -> Plan:
    """Choose the path for a problem.

    Parameters
    ----------
    problem : Problem
        Description of the call.

    Returns
    -------
    Plan
        The path and the reason for it. A path forced by an enclosing `use_path` is respected.

    Examples
    --------
    >>> from fastrnn.planner import Problem, plan
    >>> plan(Problem("lstm", 64, 8, input_size=256, hidden_size=256, marked=True)).reason
    'torch does not support lengths, resets, truncated gradients, states of all steps or heads'
    """
    gap = devices.kernel_gap(problem)
    kernels = None if gap else devices.choose_kernels(problem, forced.schedule)
    path, reason, source = _choose_path(forced.path, problem, gap, kernels)
    return Plan(path, reason, kernels, source)


def problem_of(call: Call, dtype: torch.dtype | None = None, *, is_step: bool = False) -> Problem:
    """Describe a call, or a single step, computed in `dtype`, by default the input's dtype."""
    x, options, hidden, num_heads = call.x, call.options, call.hidden_size, call.num_heads
    gpu, precision = devices.facts(x)
    return Problem(
        call.cell.name,
        steps=1 if is_step else call.steps,
        batch=(x.shape[0] if is_step else call.batch) // max(1, call.members),
        input_size=x.shape[-1],
        hidden_size=hidden // num_heads,
        dtype=x.dtype if dtype is None else dtype,
        device=x.device.type,
        training=differentiated(*call.tensors),
        packed=is_ragged(call.batch_sizes),
        projected=call.size_h != hidden,
        is_step=is_step,
        chained=is_step and _is_chained(call),
        transform=transform(),
        layers=call.num_layers,
        directions=call.directions,
        parts=num_heads * max(1, call.members),
        marked=call.flow.marks is not None or options.is_marked,
        noisy=len(call.flow.noise) > 0 or options.is_noisy,
        gpu=gpu,
        precision=precision,
    )


def path_of(call: Call, dtype: torch.dtype | None = None, *, is_step: bool = False) -> str:
    """Choose the path for a call, that is for the problem that `problem_of` returns for it."""
    x, options, tensors, known = call.x, call.options, call.tensors, call.known
    if known is None:
        assert torch.compiler.is_compiling() or is_traced(), "the call was not checked"
        return _recorded_path(call, x.dtype if dtype is None else dtype, is_step)
    asked = forced.path
    if asked is None and not are_known(*tensors) and _has_stock(call):
        return "torch"
    packed = call.batch_sizes is not None and is_ragged(call.batch_sizes)
    # Everything a problem depends on that `known` does not cover; building a problem is slower.
    key = (
        asked, forced.schedule, x.dtype, dtype, differentiated(*tensors), transform(), packed,
        is_step and _is_chained(call),
        options.training, options.lengths is None, options.reset is None,
        torch.get_num_threads() if x.is_cpu else (x.device, devices.facts(x)),
    )  # fmt: skip
    found = known.paths.get(key)
    if found is None:
        found = known.paths[key] = plan(problem_of(call, dtype, is_step=is_step)).path
    return found


def _is_chained(call: Call) -> bool:
    """Whether a step's state requires a gradient and nothing rules out the fast path for steps."""
    is_chained = differentiated(*call.state) and is_plain(*call.tensors)
    return is_chained and all(weight.is_contiguous() for weight in call.weights)


def _has_stock(call: Call) -> bool:
    """Whether torch has kernels for a call."""
    options = call.options
    is_plain = not options.is_marked and not options.is_noisy and options.num_heads == 1
    return is_plain and call.cell.name in _TORCH_CELLS


def _recorded_path(call: Call, dtype: torch.dtype, is_step: bool) -> str:
    """Choose the path for a call traced by a compiler or torch.jit, without reading its sizes."""
    if not torch.compiler.is_compiling():
        # A trace of a loop would fix T; a single operator does not.
        return "torch" if _has_stock(call) else "reference" if is_step else "kernels"
    if is_step and call.cell.name in _TORCH_CELLS:
        return "torch"
    if transform() or dtype not in _FLOATS:
        return "reference"
    # One opaque operator; torch's own kernels would be unrolled step by step.
    return "kernels"


def _choose_path(
    asked: str | None, problem: Problem, gap: str | None, kernels: tuple[Choice, Choice] | None
) -> Decision:
    missing = _missing_in_torch(problem)
    if missing and asked == "torch":
        asked = None
    if asked in (None, *OURS):
        if problem.transform == "forward":
            return Decision("reference", "fastrnn's operators do not support forward-mode AD")
        if problem.dtype not in _FLOATS:
            path = "reference" if missing or asked or problem.transform else "torch"
            return Decision(path, f"fastrnn's operators have no derivatives for {problem.dtype}")
    if asked is not None:
        path = _ours(problem, kernels) if asked in OURS else asked
        return Decision(path, "forced by fastrnn.planner.use_path")
    if missing:
        is_gap = kernels is None and problem.device != "cpu"
        return Decision(_ours(problem, kernels), f"{missing}; {gap}" if is_gap else missing)
    if problem.transform:
        return Decision(
            _ours(problem, kernels), "torch's kernels have no torch.func batching rules"
        )
    if problem.device == "cpu":
        return crossover.choose(problem)
    if kernels is None:
        return Decision("torch", str(gap))
    return devices.choose(problem, *kernels)


def _ours(problem: Problem, kernels: tuple[Choice, Choice] | None) -> str:
    """Return 'kernels' if there are any; checked late on a CPU, as it imports the compiler."""
    if problem.device == "cpu":
        return "operators" if cpu.kernel_gap(problem.dtype) else "kernels"
    return "operators" if kernels is None else "kernels"


def _missing_in_torch(problem: Problem) -> str | None:
    """Return why torch has no kernel for a problem; None if it has one."""
    if problem.cell not in _TORCH_CELLS:
        return f"torch has no kernel for {problem.cell}"
    if problem.marked or problem.parts > 1:
        return (
            "torch does not support lengths, resets, truncated gradients, states of all steps or "
            "heads"
        )
    return "torch does not support recurrent dropout or zoneout" if problem.noisy else None
