"""Check kernels on a GPU with a few informative cases: first and mostly those whose programs wait
for each other, then layers whose step is more than one product.

Each case is a layer, forward and backward, compared with the reference path in float64, which uses
torch's own operations. As in the tests, the error of every output and gradient may be twice that of
the same path in the layer's dtype, plus two roundings.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import devices, planner
from ..cells import CELLS
from ..problem import Problem
from .built import flat, forced, make_module, ours_of
from .limits import on_equal_terms
from .providers import problem_of
from .registry import Case

#: After so many polls, about 20 ms, a waiting program gives up.
POLLS = 20_000


class Telling(NamedTuple):
    """A layer to check; float32 multiplies in TF32.

    If `marked`, it has lengths and resets; if `fresh`, also states after a reset, and the states of
    all steps are outputs. If `recompute`, backward recomputes the activations. `zoneout` draws the
    same mask in every dtype, which torch does not guarantee for dropout.
    """

    cell: str
    dtype: str
    batch: int
    hidden_size: int
    bidirectional: bool = False
    marked: bool = False
    fresh: bool = False
    recompute: bool = False
    zoneout: float = 0.0
    steps: int = 64
    schedule: str = "persistent"

    @property
    def case(self) -> Case:
        """The corresponding case of the benchmark, which has no marks."""
        sizes = self.steps, self.batch, self.hidden_size, self.hidden_size
        return Case(
            *(self.cell, "training", self.dtype, *sizes),
            bidirectional=self.bidirectional,
            zoneout=self.zoneout,
        )

    @property
    def name(self) -> str:
        """All fields in one line."""
        names = ("marked", "fresh", "recompute")
        options = [name for name in names if getattr(self, name)]
        return " ".join((self.cell, self.case.shape, *options))


#: The simplest first. Each of torch.nn's cells appears in half precision, and one with additional
#: weights; so does each dtype and option, with hidden sizes from 99 to 1024. Tests cover the other
#: cells, sizes and combinations. A normalized cell has so few steps that roundings do not grow.
CASES = (
    Telling("lstm", "bfloat16", 16, 512),
    Telling("gru", "bfloat16", 16, 512, marked=True),
    Telling("lstm", "bfloat16", 16, 1024),
    Telling("lstm", "float16", 64, 768, bidirectional=True),
    Telling("gru", "bfloat16", 1, 256),
    Telling("lstm", "float32", 16, 256),
    Telling("lstm", "bfloat16", 16, 99, bidirectional=True, marked=True, fresh=True),
    Telling("rnn", "bfloat16", 64, 512),
    Telling("gru", "float16", 16, 1024, recompute=True),
    Telling("peephole_lstm", "float32", 1, 128, bidirectional=True, marked=True),
    Telling("lstm", "bfloat16", 16, 512, marked=True, zoneout=0.1),
    Telling("layernorm_lstm", "bfloat16", 16, 512, marked=True, steps=8, schedule="staged"),
    Telling("gru_reset_before", "bfloat16", 16, 256, zoneout=0.1, schedule="staged"),
    Telling("layernorm_gru", "bfloat16", 16, 64, steps=8, schedule="resident"),
)


def choose(problem: Problem, schedule: str) -> tuple[str, planner.Plan]:
    """Choose a schedule for a problem if its GPU supports it, else ours that the planner picks.

    Parameters
    ----------
    problem : fastrnn.problem.Problem
    schedule : str

    Returns
    -------
    path : str
        For ``built.forced``.
    plan : fastrnn.planner.Plan
    """
    try:
        with planner.use_path(schedule):
            return schedule, planner.plan(problem)
    except ValueError:
        with planner.use_path("kernels"):
            return "kernels", planner.plan(problem)


def replaced(schedule: str, path: str, device: torch.device) -> str:
    """Explain why a GPU that should support a schedule ran another path instead.

    Parameters
    ----------
    schedule : str
        The requested schedule.
    path : str
        The path that `choose` returned.
    device : torch.device

    Returns
    -------
    str
        Empty if the schedule ran, or if the device has no persistent kernels.
    """
    gpu = devices.gpu(device.index) if device.type == "cuda" else None
    if gpu is None or gpu.target != "cuda" or gpu.capability < 80:
        return ""
    if schedule == "persistent" and gpu.gap:  # the gap may have been found only while it ran
        return gpu.gap
    return "" if path == schedule else f"no {schedule} schedule of this on {gpu.name}"


def check(case: Telling, device: torch.device) -> dict[str, Any]:
    """Compare every output and gradient of a layer with float64.

    Parameters
    ----------
    case : Telling
    device : torch.device

    Returns
    -------
    dict of str to Any
        `status` ('ok' or 'wrong') and `reason`; which path `ran`; the `error` relative to the
        tolerance, and the `tensor` where it is worst.
    """
    from ..kernels import launch

    problem = problem_of(case.case, device)._replace(marked=case.marked)
    path, _ = choose(problem, case.schedule)
    numbers = _numbers(case)
    torch.manual_seed(0)
    layer = make_module(ours_of(case.case), case.case, device)
    exact = _results(case, copy.deepcopy(layer).double(), numbers, "reference")
    with on_equal_terms(device):
        stock = _results(case, layer, numbers, "reference")
        # A wait without end gives up here. Kernels without the limit are other code, so run both.
        with launch.bounded_spin(POLLS):
            bounded = _results(case, layer, numbers, path)
        first, again = (_results(case, layer, numbers, path) for _ in range(2))
    errors = [
        (_error(found[name], stock[name], truth), name)
        for found in (bounded, first)
        for name, truth in exact.items()
    ]
    error, tensor = max(errors, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
    reason = ""
    if not error <= 1:  # a NaN counts as wrong
        reason = f"{tensor}: error {error:.3g} times the tolerance"
    elif changed := [name for name in first if not torch.equal(first[name], again[name])]:
        reason = f"a repeated call gave different results: {', '.join(changed)}"
    else:
        reason = replaced(case.schedule, path, device)
    return {
        "status": "wrong" if reason else "ok",
        "reason": reason,
        "ran": path,
        "error": error,
        "tensor": tensor,
    }


class _Numbers(NamedTuple):
    """Tensors of a case on the CPU, by name: x, states and those after a reset; and the marks."""

    leaves: dict[str, Tensor]
    marks: dict[str, Tensor]


def _numbers(case: Telling) -> _Numbers:
    generator = torch.Generator().manual_seed(0)
    state = 1 + case.bidirectional, case.batch, case.hidden_size
    names = CELLS[case.case.kind].states
    shapes = {"x": (case.steps, case.batch, case.hidden_size)}
    shapes |= {f"{name}0": state for name in names}
    if case.fresh:
        shapes |= {f"{name} fresh": state for name in names}
    dtype = getattr(torch, case.dtype)
    leaves = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }
    if not case.marked:
        return _Numbers(leaves, {})
    lengths = torch.randint(case.steps + 1, (case.batch,), generator=generator)
    lengths[0] = case.steps
    reset = torch.rand(case.steps, case.batch, generator=generator) < 0.1
    return _Numbers(leaves, {"lengths": lengths, "reset": reset})


def _results(
    case: Telling, layer: torch.nn.Module, numbers: _Numbers, path: str
) -> dict[str, Tensor]:
    """Compute all outputs and gradients by a path, on the layer's device and in its dtype."""
    like = next(layer.parameters())
    leaves = {
        name: part.detach().to(like).requires_grad_() for name, part in numbers.leaves.items()
    }
    states = CELLS[case.case.kind].states
    x, *parts = leaves.values()
    first, fresh = parts[: len(states)], parts[len(states) :]
    options: dict[str, Any] = {name: part.to(like.device) for name, part in numbers.marks.items()}
    if case.fresh:
        options |= {"reset_state": _as_state(fresh), "return_states": True}
    generator, dtype = torch.Generator().manual_seed(1), numbers.leaves["x"].dtype
    torch.manual_seed(0)  # for zoneout
    with forced(path):
        outputs = flat(layer(x, _as_state(first), recompute=case.recompute, **options))
        cotangents = [
            torch.randn(output.shape, generator=generator).to(dtype).to(like) for output in outputs
        ]
        leaves |= dict(layer.named_parameters())
        gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    names = ["y", *states, *(f"{name} of all steps" for name in states)]
    found = dict(zip(names, outputs, strict=False))
    found |= {f"d_{name}": part for name, part in zip(leaves, gradients, strict=True)}
    return {name: part.detach() for name, part in found.items()}


def _as_state(parts: Sequence[Tensor]) -> Any:
    return tuple(parts) if len(parts) > 1 else parts[0]


def _error(ours: Tensor, stock: Tensor, exact: Tensor) -> float:
    """Return the error in units of the tolerance.

    Where TF32 is allowed torch may not use it; its own error then is smaller than that of TF32.
    """
    is_tf32 = ours.dtype == torch.float32 and devices.float32_precision() == "tf32"
    eps = 2.0**-10 if is_tf32 else torch.finfo(ours.dtype).eps
    allowed = 2 * _rms(stock - exact) + 2 * eps * _rms(exact)
    error = _rms(ours - exact)
    return error / allowed if allowed else math.inf if error else 0.0


def _rms(part: Tensor) -> float:
    return part.double().square().mean().sqrt().item()
