"""Who is measured: our modules, torch.nn's, and others that do the same job.

A provider builds a case from the weights of torch.nn's module and inputs in torch.nn's layout. It
is called as its users would, in the memory layout that it wants, with the product with the input
included; what turns its results and gradients into torch.nn's is outside of what is timed.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import gpu, nn, planner, reference
from ..kernels.configs import SCHEDULES
from .registry import Case

_CLASSES = {
    "lstm": "LSTM",
    "gru": "GRU",
    "rnn": "RNN",
    "lstm_cell": "LSTMCell",
    "gru_cell": "GRUCell",
    "rnn_cell": "RNNCell",
}

Tensors = Sequence[Tensor]


def _same(tensors: Tensors) -> Tensors:
    return tensors


class Built(NamedTuple):
    """A case, ready to be called.

    Attributes
    ----------
    run : callable
        Takes `inputs`; returns the output and the final state, in torch.nn's shapes.
    inputs : sequence of Tensor
        x and a state, if the case has one, in the layout that the provider wants.
    parameters : sequence of Tensor
    to_torch : callable
        Turns gradients of `inputs`, then `parameters`, into those of torch.nn's.
    """

    run: Callable[..., list[Tensor]]
    inputs: Tensors
    parameters: Tensors
    to_torch: Callable[[Tensors], Tensors] = _same


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
    build: Callable[[Case, torch.nn.Module, Tensors], Built]


def make_baseline(case: Case, device: torch.device) -> tuple[torch.nn.Module, list[Tensor]]:
    """Make torch.nn's module of a case and its inputs, the same ones each time.

    Parameters
    ----------
    case : Case
    device : torch.device

    Returns
    -------
    module : torch.nn.Module
    inputs : list of Tensor
        x and, for a cell module, a state: a loop over steps passes one; a layer is most often
        called without.
    """
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    module = _module(torch.nn, case, device)
    with torch.no_grad():
        for weight in module.parameters():
            # Of torch's own spread, uniform in 1 / sqrt(H).
            weight.copy_(random(*weight.shape, scale=(3 * case.hidden_size) ** -0.5))
    rows: tuple[int, ...] = (case.steps, case.batch)
    if case.is_step or case.ragged:
        rows = (sum(case.lengths),)
    inputs = [random(*rows, case.input_size)]
    if case.is_step:
        n_states = 2 if case.cell == "lstm_cell" else 1
        inputs += [random(case.batch, case.hidden_size) for _ in range(n_states)]
    return module, inputs


def _module(library: Any, case: Case, device: torch.device) -> torch.nn.Module:
    options = {} if case.is_step else {
        "num_layers": case.num_layers,
        "bidirectional": case.bidirectional,
    }  # fmt: skip
    return getattr(library, _CLASSES[case.cell])(
        case.input_size,
        case.hidden_size,
        **options,
        device=device,
        dtype=getattr(torch, case.dtype),
    )


def _flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in _flat(part)]


def _never(case: Case, device: torch.device) -> None:
    return None


# torch.nn and ours.


def _build_torch(case: Case, baseline: torch.nn.Module, inputs: Tensors) -> Built:
    return _of_module(case, baseline, inputs)


def _build_fastrnn(
    case: Case, baseline: torch.nn.Module, inputs: Tensors, path: str | None = None
) -> Built:
    module = _module(nn, case, inputs[0].device)
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
            return [packed.data, *_flat(final)]
        if len(state) > 1:
            return _flat(module(x, state))
        return _flat(module(x, *state))

    def forced(*inputs: Tensor) -> list[Tensor]:
        with planner.use_path(path):
            return run(*inputs)

    return Built(forced if path else run, inputs, list(module.parameters()))


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
        directions=case.directions,
        gpu=facts,
        precision=precision,
    )


def _forced_gap(path: str, case: Case, device: torch.device) -> str | None:
    problem = problem_of(case, device)
    if path in SCHEDULES and (gap := planner.kernel_gap(problem)) is not None:
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
    if case.ragged or case.bidirectional or case.num_layers > 1:
        return "one plain layer only"
    return None


def _build_compiled(case: Case, baseline: torch.nn.Module, inputs: Tensors) -> Built:
    cell = case.cell.removesuffix("_cell")
    cell = "rnn_tanh" if cell == "rnn" else cell
    parameters = [weight.detach().clone().requires_grad_() for weight in baseline.parameters()]
    unrolled = max(n for n in range(1, _MAX_UNROLLED + 1) if case.steps % n == 0)

    def some_steps(x: Tensor, state: list[Tensor], weights: list[Tensor]) -> Any:
        return reference.layer(cell, x, state, weights)

    def one_step(x: Tensor, state: list[Tensor], weights: list[Tensor]) -> Any:
        return reference.cell_step(cell, x, state, weights)

    # Every case is compiled afresh; after some recompilations dynamo would give up, in silence.
    torch._dynamo.reset()
    steps = one_step if case.is_step else some_steps
    compiled = torch.compile(steps, dynamic=False, fullgraph=True)

    def run(x: Tensor, *given: Tensor) -> list[Tensor]:
        if case.is_step:
            return list(compiled(x, list(given), parameters))
        state = reference.zero_state(cell, x, case.batch, parameters, 1)
        outputs = []
        for part in x.split(unrolled):
            y, state = compiled(part, state, parameters)
            outputs.append(y)
        return [torch.cat(outputs), *state]

    return Built(run, inputs, parameters)


# Others, if they are installed. Each has an order of gates and a layout of its own.


def _missing(package: str) -> str | None:
    found = importlib.util.find_spec(package) is not None
    return None if found else f"{package} is not installed"


def _plain_gap(
    package: str, cells: Sequence[str], dtypes: Sequence[str], case: Case, device: torch.device
) -> str | None:
    if (missing := _missing(package)) is not None:
        return missing
    if device.type != "cuda":
        return "on CUDA devices only"
    if case.cell not in cells or case.stack or case.dtype not in dtypes:
        return f"one plain layer of {' or '.join(cells)} in {' or '.join(dtypes)} only"
    return None


def _batch_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous()


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().contiguous().requires_grad_()


def _build_flashrnn(
    case: Case, baseline: torch.nn.Module, inputs: Tensors, backend: str = "triton_fused"
) -> Built:
    from flashrnn import flashrnn

    hidden, batch = case.hidden_size, case.batch
    w_ih, w_hh, b_ih, b_hh = (weight.detach() for weight in baseline.parameters())
    # Gates in torch.nn's order; R[gate, head, out, in], one head.
    parameters = [
        _leaf(w_ih),
        _leaf(w_hh.view(4, 1, hidden, hidden)),
        _leaf((b_ih + b_hh).view(4, 1, hidden)),
    ]
    zeros = w_ih.new_zeros(2, batch, 1, 1, hidden)

    def run(x: Tensor) -> list[Tensor]:
        w_ih, r, b = parameters
        wx = torch.nn.functional.linear(x, w_ih).view(batch, case.steps, 4, 1, hidden)
        states, last = flashrnn(
            wx, r, b, states=zeros, function="lstm", backend=backend, dtype=case.dtype
        )
        h_n, c_n = last.view(2, 1, batch, hidden)
        return [states[0].view(batch, case.steps, hidden).transpose(0, 1), h_n, c_n]

    def to_torch(gradients: Tensors) -> Tensors:
        dx, d_w_ih, d_r, d_b = gradients
        d_b = d_b.reshape(-1)
        return [dx.transpose(0, 1), d_w_ih, d_r.reshape(4 * hidden, hidden), d_b, d_b]

    return Built(run, [_batch_first(inputs[0])], parameters, to_torch)


def _build_torchrl(
    case: Case, baseline: torch.nn.Module, inputs: Tensors, backend: str = "triton"
) -> Built:
    from tensordict import TensorDict
    from torchrl.modules import GRUModule, LSTMModule

    kind = LSTMModule if case.cell == "lstm" else GRUModule
    states = ["h", "c"] if case.cell == "lstm" else ["h"]
    module = kind(
        case.input_size,
        case.hidden_size,
        in_keys=["x", *states],
        out_keys=["y", *(("next", name) for name in states)],
        recurrent_backend=backend,
        default_recurrent_mode=True,
        device=inputs[0].device,
    )
    inner = getattr(module, case.cell)
    inner.load_state_dict(baseline.state_dict())
    is_init = torch.zeros(case.batch, case.steps, 1, dtype=torch.bool, device=inputs[0].device)

    def run(x: Tensor) -> list[Tensor]:
        data = TensorDict({"x": x, "is_init": is_init}, batch_size=x.shape[:2], device=x.device)
        out = module(data)
        # (B, T, layers, H), the final state at the last step
        final = [out["next", name][:, -1].transpose(0, 1) for name in states]
        return [out["y"].transpose(0, 1), *final]

    def to_torch(gradients: Tensors) -> Tensors:
        return [gradients[0].transpose(0, 1), *gradients[1:]]

    return Built(run, [_batch_first(inputs[0])], list(inner.parameters()), to_torch)


# Which of torch.nn's gates is which of haste's: i, g, f, o and z, r, n.
_HASTE_GATES = {"lstm": [0, 2, 1, 3], "gru": [1, 0, 2]}


def _build_haste(case: Case, baseline: torch.nn.Module, inputs: Tensors) -> Built:
    import haste_pytorch

    order, hidden = _HASTE_GATES[case.cell], case.hidden_size
    inverse = [order.index(k) for k in range(len(order))]

    def reordered(weight: Tensor, order: list[int]) -> Tensor:
        return torch.cat([weight.reshape(len(order), hidden, -1)[k] for k in order])

    module = getattr(haste_pytorch, _CLASSES[case.cell])(case.input_size, hidden)
    module.to(inputs[0].device)
    w_ih, w_hh, b_ih, b_hh = (reordered(weight.detach(), order) for weight in baseline.parameters())
    values = {"kernel": w_ih.t(), "recurrent_kernel": w_hh.t(), "bias": b_ih.flatten()}
    if case.cell == "gru":
        values["recurrent_bias"] = b_hh.flatten()
    else:
        values["bias"] = values["bias"] + b_hh.flatten()
    parameters = [getattr(module, name) for name in values]
    with torch.no_grad():
        for parameter, value in zip(parameters, values.values(), strict=True):
            parameter.copy_(value)

    def to_torch(gradients: Tensors) -> Tensors:
        dx, d_kernel, d_recurrent, *d_biases = gradients
        d_biases = [reordered(d, inverse).flatten() for d in d_biases]
        return [
            dx,
            reordered(d_kernel.t(), inverse),
            reordered(d_recurrent.t(), inverse),
            *(d_biases * 2)[:2],
        ]

    return Built(lambda x: _flat(module(x)), inputs, parameters, to_torch)


def _registry() -> dict[str, Provider]:
    forced = {
        f"fastrnn:{path}": Provider(
            functools.partial(_forced_gap, path), functools.partial(_build_fastrnn, path=path)
        )
        for path in ("loop", *SCHEDULES, "torch", "reference")
    }
    halves_and_float = ("float16", "bfloat16", "float32")
    return {
        BASELINE: Provider(_never, _build_torch),
        OURS: Provider(_never, _build_fastrnn),
        **forced,
        "torch.compile": Provider(_compile_gap, _build_compiled),
        "flashrnn": Provider(
            functools.partial(_plain_gap, "flashrnn", ("lstm",), halves_and_float), _build_flashrnn
        ),
        "torchrl": Provider(
            functools.partial(_plain_gap, "torchrl", ("lstm", "gru"), ("float32",)), _build_torchrl
        ),
        "haste": Provider(
            functools.partial(_plain_gap, "haste_pytorch", ("lstm", "gru"), ("float32",)),
            _build_haste,
        ),
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
        'published': everybody; 'full' on a GPU: the planner's choice and each schedule; else the
        planner's choice.
    """
    if suite == "published":
        return [name for name in PROVIDERS if name != BASELINE and name != "fastrnn:reference"]
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
    _, _, path = name.partition(":")
    if path in SCHEDULES:
        used = (plan.kernels or ())[: 2 if case.mode == "training" else 1]
        return plan.path == "loop" and all(choice.config.schedule == path for choice in used)
    return path == plan.path


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
    if plan.path != "loop" or plan.kernels is None:
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
        'oneDNN' or 'ATen' on a CPU; on CUDA 'ATen' or cuDNN's algorithm.
    """
    problem = problem_of(case, device)
    if case.is_step:
        return "ATen"
    if device.type == "cpu":
        dtype = getattr(torch, case.dtype)
        is_half = dtype in (torch.bfloat16, torch.float16)
        takes = dtype == torch.float32 or (is_half and planner.multiplies(dtype))
        is_fused = case.cell == "lstm" and not case.ragged and torch.backends.mkldnn.is_available()
        return "oneDNN" if is_fused and takes else "ATen"
    version = torch.backends.cudnn.version() or 0
    # Since then torch gives bfloat16 to it.
    if not version or (case.dtype == "bfloat16" and version < 91300):
        return "ATen"
    return f"cuDNN {planner.cudnn_algorithm(problem)}"
