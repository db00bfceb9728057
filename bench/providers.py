"""Who is measured: our modules, torch.nn's, and others that do the same job.

A provider builds a case from the weights of torch.nn's module and inputs in torch.nn's layout. It
is called as its users would, in the memory layout that it wants, with the product with the input
included; what turns its results and gradients into torch.nn's is outside of what is timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import crossover, devices, nn, planner, reference
from ..call import Call
from ..cells import CELLS
from ..kernels.configs import SCHEDULES
from . import others
from .built import Built, Tensors, flat, forced, make_module
from .registry import Case

Build = Callable[[Case, torch.nn.Module, Tensors], Built]


class Provider(NamedTuple):
    """An implementation to measure.

    Attributes
    ----------
    gap : callable
        Takes a case and a device; a clause that says why the case cannot be run, or None.
    build : callable
        Takes a case, torch.nn's module of it and the inputs; returns a `Built`.
    """

    gap: Callable[[Case, torch.device], str | None]
    build: Build


def _never(case: Case, device: torch.device) -> None:
    return None


# torch.nn and ours.


def _build_torch(case: Case, baseline: torch.nn.Module, inputs: Tensors) -> Built:
    return _of_module(case, baseline, inputs)


def _build_fastrnn(
    case: Case, baseline: torch.nn.Module, inputs: Tensors, path: str | None = None
) -> Built:
    module = make_module(nn, case, inputs[0].device)
    module.load_state_dict(baseline.state_dict())
    return _of_module(case, module, inputs, path)


def _of_module(
    case: Case, module: torch.nn.Module, inputs: Tensors, path: str | None = None
) -> Built:
    sizes = None
    if case.ragged:
        sizes = torch.tensor([sum(n > t for n in case.lengths) for t in range(case.steps)])

    def run(x: Tensor, *state: Tensor) -> list[Tensor]:
        if sizes is not None:
            packed, final = module(PackedSequence(x, sizes))
            return [packed.data, *flat(final)]
        if len(state) > 1:
            return flat(module(x, state))
        return flat(module(x, *state))

    built = Built(run, inputs, list(module.parameters()))
    if path is None:
        return built
    return built._replace(run=_inside(path, run), gradients=_inside(path, torch.autograd.grad))


def _inside(path: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """A function on a forced path."""

    def of_path(*arguments: Any) -> Any:
        with forced(path):
            return call(*arguments)

    return of_path


def problem_of(case: Case, device: torch.device) -> planner.Problem:
    """Describe a case to the planner.

    Parameters
    ----------
    case : Case
    device : torch.device

    Returns
    -------
    fastrnn.planner.Problem
    """
    dtype = getattr(torch, case.dtype)
    facts, precision = devices.facts(torch.empty(0, dtype=dtype, device=device))
    return planner.Problem(
        case.kind,
        case.steps,
        case.batch,
        case.input_size,
        case.hidden_size,
        dtype=dtype,
        device=device.type,
        training=case.mode == "training",
        packed=case.ragged,
        projected=case.proj_size > 0,
        is_step=case.is_step,
        layers=case.num_layers,
        directions=case.directions,
        gpu=facts,
        precision=precision,
    )


def _forced_gap(path: str, case: Case, device: torch.device) -> str | None:
    problem = problem_of(case, device)
    if path in SCHEDULES and (gap := devices.kernel_gap(problem)) is not None:
        return gap
    try:
        with planner.use_path(path):
            planner.plan(problem)
    except ValueError as error:
        return str(error)
    return None


# torch.compile of the reference loop. It is unrolled, and compiling a graph of so many steps takes
# some ten seconds forward and half a minute with backward on a CPU.
_MAX_UNROLLED = 16


def _compile_gap(case: Case, device: torch.device) -> str | None:
    if case.stack:
        return "one plain layer only"
    return None


def _build_compiled(case: Case, baseline: torch.nn.Module, inputs: Tensors) -> Built:
    cell = CELLS[case.kind]
    parameters = [weight.detach().clone().requires_grad_() for weight in baseline.parameters()]
    unrolled = max(n for n in range(1, _MAX_UNROLLED + 1) if case.steps % n == 0)

    def some_steps(x: Tensor, state: list[Tensor], weights: list[Tensor]) -> Any:
        y, final, _ = reference.layer(Call(cell, x, state, weights))
        return y, final

    def one_step(x: Tensor, state: list[Tensor], weights: list[Tensor]) -> Any:
        return reference.step(Call(cell, x, state, weights))

    # Every case is compiled afresh; after some recompilations dynamo would give up, in silence.
    torch._dynamo.reset()
    steps = one_step if case.is_step else some_steps
    compiled = torch.compile(steps, dynamic=False, fullgraph=True)

    def run(x: Tensor, *given: Tensor) -> list[Tensor]:
        if case.is_step:
            return list(compiled(x, list(given), parameters))
        state = Call(cell, x, [], parameters).initial()
        outputs = []
        for part in x.split(unrolled):
            y, state = compiled(part, state, parameters)
            outputs.append(y)
        return [torch.cat(outputs), *state]

    return Built(run, inputs, parameters)


def _registry() -> dict[str, Provider]:
    by_path = {
        f"fastrnn:{path}": Provider(
            functools.partial(_forced_gap, path), functools.partial(_build_fastrnn, path=path)
        )
        for path in (*planner.OURS, *SCHEDULES, "torch", "reference")
    }

    def other(
        package: str, cells: tuple[str, ...], dtypes: tuple[str, ...], build: Build
    ) -> Provider:
        return Provider(functools.partial(others.plain_gap, package, cells, dtypes), build)

    def runtime(package: str, build: Build) -> Provider:
        return Provider(functools.partial(others.runtime_gap, package), build)

    both, halves = ("lstm", "gru"), ("float16", "bfloat16")
    return {
        BASELINE: Provider(_never, _build_torch),
        OURS: Provider(_never, _build_fastrnn),
        **by_path,
        "torch.compile": Provider(_compile_gap, _build_compiled),
        "flashrnn": other("flashrnn", ("lstm",), (*halves, "float32"), others.build_flashrnn),
        "torchrl": other("torchrl", both, ("float32",), others.build_torchrl),
        "haste": other("haste_pytorch", both, ("float32",), others.build_haste),
        "onnxruntime": runtime("onnxruntime", others.build_onnxruntime),
        "openvino": runtime("openvino", others.build_openvino),
    }


BASELINE, OURS = "torch.nn", "fastrnn"

#: By name. ``fastrnn`` is what the planner picks, ``fastrnn:PATH`` ours forced to one path or
#: schedule; ``torch.nn`` is what all are compared with.
PROVIDERS = _registry()


def default_providers(suite: str | None, device: str) -> list[str]:
    """Say who is measured beside torch.nn if nobody else is asked for.

    Parameters
    ----------
    suite : str, optional
        Of ``registry.SUITES``; None for a grid of the user.
    device : {'cpu', 'cuda'}

    Returns
    -------
    list of str
        'published': everybody; 'runtimes': the planner's choice and the runtimes; 'full' on a GPU:
        the planner's choice and each schedule; else the planner's choice.
    """
    if suite == "published":
        return [name for name in PROVIDERS if name != BASELINE and name != "fastrnn:reference"]
    if suite == "runtimes":
        return [OURS, "onnxruntime", "openvino"]
    schedules = [f"fastrnn:{schedule}" for schedule in SCHEDULES]
    return [OURS, *schedules] if suite == "full" and device == "cuda" else [OURS]


def is_repeated(name: str, plan: planner.Plan, case: Case) -> bool:
    """Whether a forced path is what the planner picks anyway, so that it is measured already.

    Parameters
    ----------
    name : str
    plan : fastrnn.planner.Plan
        The planner's own for the case.
    case : Case

    Returns
    -------
    bool
    """
    return name.partition(":")[2] in (plan.path, plan_name(plan, case))


def plan_name(plan: planner.Plan, case: Case) -> str:
    """Name what runs: the path or, where kernels of a GPU do, their schedules.

    Parameters
    ----------
    plan : fastrnn.planner.Plan
    case : Case

    Returns
    -------
    str
    """
    if plan.path != "kernels" or plan.kernels is None:
        return plan.path
    used = plan.kernels[: 2 if case.mode == "training" else 1]
    return ", ".join(dict.fromkeys(choice.config.schedule for choice in used))


def torch_algorithm(case: Case, device: torch.device) -> str:
    """Name what torch.nn runs.

    Parameters
    ----------
    case : Case
    device : torch.device

    Returns
    -------
    str
        'oneDNN' or 'ATen' on a CPU; on a GPU 'ATen', 'MIOpen' or cuDNN's algorithm.
    """
    if case.is_step:
        return "ATen"
    if device.type == "cpu":
        is_fast_half = case.is_half and crossover.multiplies(getattr(torch, case.dtype))
        takes = case.dtype == "float32" or is_fast_half
        is_lstm = case.cell == "lstm" and not case.ragged and not case.proj_size
        is_fused = is_lstm and torch.backends.mkldnn.is_available()
        return "oneDNN" if is_fused and takes else "ATen"
    if torch.version.hip is not None:
        return "MIOpen"
    version = torch.backends.cudnn.version() or 0
    # Since then torch gives bfloat16 to it.
    if not version or (case.dtype == "bfloat16" and version < 91300):
        return "ATen"
    return f"cuDNN {devices.cudnn_algorithm(problem_of(case, device))}"
