"""The implementations that are measured: our modules, torch.nn's, and third-party libraries.

A provider builds a case from the weights of torch.nn's module and inputs in torch.nn's layout. It
is called as its users would call it, in its preferred memory layout and including the product with
the input; converting its results and gradients to torch.nn's layout is not timed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import crossover, devices, nn, planner, reference
from ..call import Call
from ..cells import CELLS
from ..kernels.configs import SCHEDULES
from . import loops, others
from .built import Built, Tensors, flat, forced, make_module, named_weights, ours_of
from .registry import Case

Build = Callable[[Case, torch.nn.Module, Tensors], Built]


class Provider(NamedTuple):
    """An implementation to measure.

    Attributes
    ----------
    gap : callable
        Takes a case and a device; returns a clause that says why the case cannot be run, or None.
    build : callable
        Takes a case, the module of ``built.make_baseline`` and the inputs; returns a `Built`.
    is_for_scale : bool, default False
        Whether its results differ by design, so that it is timed only for scale.
    """

    gap: Callable[[Case, torch.device], str | None]
    build: Build
    is_for_scale: bool = False


def _never(case: Case, device: torch.device) -> None:
    return None


# torch.nn and ours.


def _build_torch(case: Case, baseline: torch.nn.Module, inputs: Tensors) -> Built:
    """Build torch.nn's layer, or its layer with the same gates, for scale, if it has none."""
    if case.members:
        return _of_members(list(baseline), inputs)  # type: ignore[call-overload]
    if case.is_beyond_torch:
        baseline = make_module(torch.nn, case.stock, inputs[0].device)
    return _of_module(case, baseline, inputs)


def _build_fastrnn(
    case: Case, baseline: torch.nn.Module, inputs: Tensors, path: str | None = None
) -> Built:
    module = make_module(ours_of(case), case, inputs[0].device)
    if case.members:
        built = _of_ensemble(module, named_weights(case, baseline), inputs)
    else:
        module.load_state_dict(baseline.state_dict())
        built = _of_module(case, module, inputs)
    if path is None:
        return built
    gradients = _inside(path, torch.autograd.grad)
    return built._replace(run=_inside(path, built.run), gradients=gradients)


def _plain_gap(case: Case, device: torch.device) -> str | None:
    return "the case is a plain layer" if case.plain == case and not case.members else None


def _build_plain(case: Case, baseline: torch.nn.Module, inputs: Tensors) -> Built:
    """Build our plain layer with the same gates, to show what an option costs."""
    count = max(1, case.members)
    modules = [make_module(nn, case.plain, inputs[0].device) for _ in range(count)]
    if case.members:
        return _of_members(modules, inputs)
    return _of_module(case.plain, modules[0], inputs)


def _of_members(modules: Sequence[torch.nn.Module], inputs: Tensors) -> Built:
    """Call each member of an ensemble separately."""
    parameters = [list(module.parameters()) for module in modules]

    def run(x: Tensor) -> list[Tensor]:
        return _stacked([flat(module(x)) for module in modules])

    def to_torch(gradients: Tensors) -> Tensors:
        dx, *others = gradients
        count = len(parameters[0])
        return [dx, *_stacked([others[k : k + count] for k in range(0, len(others), count)])]

    return Built(run, inputs, [*itertools.chain(*parameters)], to_torch)


def _stacked(rows: Sequence[Tensors]) -> list[Tensor]:
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def _of_ensemble(module: torch.nn.Module, weights: dict[str, Tensor], inputs: Tensors) -> Built:
    """Make one call, mapped over stacked weights."""
    weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}

    def member(weights: dict[str, Tensor], x: Tensor) -> Any:
        return torch.func.functional_call(module, weights, (x,))

    mapped = torch.func.vmap(member, (0, None))
    return Built(lambda x: flat(mapped(weights, x)), inputs, list(weights.values()))


def _of_module(case: Case, module: torch.nn.Module, inputs: Tensors) -> Built:
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

    return Built(run, inputs, list(module.parameters()))


def _inside(path: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function to run on a forced path."""

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
        case.hidden_size // case.num_heads,
        dtype=dtype,
        device=device.type,
        training=case.mode == "training",
        packed=case.ragged,
        projected=case.proj_size > 0,
        is_step=case.is_step,
        layers=case.num_layers,
        directions=case.directions,
        marked=case.num_heads > 1,
        noisy=case.zoneout > 0 or (case.recurrent_dropout > 0 and case.mode == "training"),
        transform="func" if case.members else None,
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


def _build_compiled(case: Case, baseline: torch.nn.Module, inputs: Tensors) -> Built:
    if not case.is_step:
        return loops.build(case, baseline, inputs, is_compiled=True)
    cell = CELLS[case.kind]
    parameters = [weight.detach().clone().requires_grad_() for weight in baseline.parameters()]

    def one_step(x: Tensor, state: list[Tensor], weights: list[Tensor]) -> Any:
        return reference.step(Call(cell, x, state, weights))

    # As in loops.build.
    torch._dynamo.reset()
    compiled = torch.compile(one_step, dynamic=False, fullgraph=True)
    return Built(lambda x, *state: list(compiled(x, list(state), parameters)), inputs, parameters)


def _registry() -> dict[str, Provider]:
    by_path = {
        f"fastrnn:{path}": Provider(
            functools.partial(_forced_gap, path), functools.partial(_build_fastrnn, path=path)
        )
        for path in (*planner.OURS, *SCHEDULES, "torch", "reference")
    }

    def other(
        package: str, cells: tuple[str, ...], dtypes: tuple[str, ...], build: Build, **has: Any
    ) -> Provider:
        return Provider(functools.partial(others.plain_gap, package, cells, dtypes, **has), build)

    def runtime(package: str, build: Build) -> Provider:
        return Provider(functools.partial(others.runtime_gap, package), build)

    both, halves = ("lstm", "gru"), ("float16", "bfloat16")
    return {
        BASELINE: Provider(_never, _build_torch),
        OURS: Provider(_never, _build_fastrnn),
        **by_path,
        PLAIN: Provider(_plain_gap, _build_plain, is_for_scale=True),
        LOOP: Provider(loops.gap, loops.build),
        "torch.compile": Provider(loops.compiled_gap, _build_compiled),
        "flashrnn": other(
            "flashrnn", ("lstm",), (*halves, "float32"), others.build_flashrnn, has_heads=True
        ),
        "torchrl": other("torchrl", both, ("float32",), others.build_torchrl),
        "haste": other(
            "haste_pytorch",
            (*both, "layernorm_lstm", "layernorm_gru"),
            ("float32",),
            others.build_haste,
        ),
        "onnxruntime": runtime("onnxruntime", others.build_onnxruntime),
        "openvino": runtime("openvino", others.build_openvino),
    }


BASELINE, OURS = "torch.nn", "fastrnn"
PLAIN, REFERENCE, LOOP = "fastrnn:plain", "fastrnn:reference", "loop"

#: By name. ``fastrnn`` is the planner's choice, ``fastrnn:PATH`` ours forced to one path or
#: schedule; ``torch.nn`` is what all others are compared with.
PROVIDERS = _registry()


def default_providers(suite: str | None, device: str) -> list[str]:
    """Return the providers that are measured against torch.nn by default.

    Parameters
    ----------
    suite : str, optional
        Key of ``registry.SUITES``; None for a user-defined grid.
    device : {'cpu', 'cuda'}

    Returns
    -------
    list of str
        'published': all; 'runtimes': the planner's choice and the runtimes; 'variants': the
        planner's choice, our plain layer, loops and the libraries that have such layers; 'full' on
        a GPU: the planner's choice and each schedule; otherwise the planner's choice.
    """
    if suite == "published":
        return [n for n in PROVIDERS if n not in (BASELINE, PLAIN, REFERENCE)]
    if suite == "variants":
        return [OURS, PLAIN, LOOP, "torch.compile", "flashrnn", "haste"]
    if suite == "runtimes":
        return [OURS, "onnxruntime", "openvino"]
    schedules = [f"fastrnn:{schedule}" for schedule in SCHEDULES]
    return [OURS, *schedules] if suite == "full" and device == "cuda" else [OURS]


def is_repeated(name: str, plan: planner.Plan, case: Case) -> bool:
    """Return whether a forced path is the planner's choice anyway, and so measured already.

    Parameters
    ----------
    name : str
    plan : fastrnn.planner.Plan
        The planner's choice for the case.
    case : Case

    Returns
    -------
    bool
    """
    return name.partition(":")[2] in (plan.path, plan_name(plan, case))


def plan_name(plan: planner.Plan, case: Case) -> str:
    """Name what runs: the path or, for GPU kernels, their schedules.

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
    """Name what torch.nn runs: a plain layer, where it has no such layer.

    Parameters
    ----------
    case : Case
    device : torch.device

    Returns
    -------
    str
        'oneDNN' or 'ATen' on a CPU; on a GPU 'ATen', 'MIOpen' or cuDNN's algorithm.
    """
    if case.is_beyond_torch:
        return f"{torch_algorithm(case.stock, device)}, plain {case.stock.cell}"
    if case.members:
        one = dataclasses.replace(case, members=0)
        return f"{torch_algorithm(one, device)}, {case.members} calls"
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
    # Since that version torch uses it for bfloat16.
    if not version or (case.dtype == "bfloat16" and version < 91300):
        return "ATen"
    return f"cuDNN {devices.cudnn_algorithm(problem_of(case, device))}"
