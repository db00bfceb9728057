"""Run layers as a user calls them on emulated kernels, and compare them with float64.

A `Case` is a module of fastrnn, a call, and the GPU on which it claims to run; plan, launches and
results are the package's own. `emulate` returns all outputs and gradients by name, `check` compares
them with `reference.py` in float64, and `faults` lists what the emulator found.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from compare import assert_accurate
from gpu_stand_in import as_on_a_gpu
from torch import Tensor

from fastrnn import devices, ops, paths, planner, reference
from fastrnn.call import Call
from fastrnn.cases import MODULES
from fastrnn.cells import CELLS
from fastrnn.kernels import launch, launch_staged
from fastrnn.kernels.configs import DEVICES, Choice, Config, Device, Shape, candidates
from fastrnn.planner import use_path

from .driver import Emulator, Schedule

#: Names of the cells that have kernels.
POINTWISE = [name for name, cell in CELLS.items() if cell.is_pointwise]

#: GPUs that can be emulated.
GPUS = {name: device for name, device in DEVICES.items() if device.target == "cuda"}

#: Cells whose gradient is discontinuous.
HAVE_MAXIMUM = ("rnn_relu", "slstm")


@dataclass(frozen=True)
class Case:
    """A layer and a call of it.

    Attributes
    ----------
    cell : str
    hidden, batch, steps : int
    dtype : str
    precision : {'ieee', 'tf32', 'tf32x3'}
        Of float32 products.
    directions : {1, 2}
    flow : {'', 'marked', 'fresh'}
        Whether there are lengths, resets and truncated gradients; 'fresh' also has states after a
        reset, and returns all states.
    heads : int
        Number of heads that `hidden` is divided into.
    members : int
        Members of an ensemble, as the operator takes it, each with `batch` rows; 0 for none.
    noise : {'', 'drop', 'units', 'share', 'drop units', 'drop share'}
        Recurrent dropout; zoneout in some units of every state, or as a share of all.
    bias, recompute, training : bool
        Without `training` there are no gradients.
    gpu : str
        A key of `GPUS`.
    schedule : str, optional
        Chosen by the planner if not given.
    processors : int, optional
        Number of processors, instead of that GPU's own: with fewer there are several launches.
    configs : (Config, Config), optional
        Configurations of the forward and the backward kernel, instead of the planned ones.
    seed : int
        Seed of the random numbers.
    """

    cell: str = "lstm"
    hidden: int = 64
    batch: int = 16
    steps: int = 4
    dtype: str = "bfloat16"
    precision: str = "tf32"
    directions: int = 1
    flow: str = ""
    heads: int = 1
    members: int = 0
    noise: str = ""
    bias: bool = True
    recompute: bool = False
    training: bool = True
    gpu: str = "h100"
    schedule: str | None = None
    processors: int | None = None
    configs: tuple[Config, Config] | None = None
    seed: int = 0

    def __str__(self) -> str:
        default = Case()
        facts = [
            str(value) if isinstance(value, str) else f"{name}={value}"
            for name, value in vars(self).items()
            if value != getattr(default, name) and name != "configs"
        ]
        facts += map(described, self.configs or ())
        return " ".join([self.cell, *(f for f in facts if f != self.cell)])

    @property
    def device(self) -> Device:
        """The GPU."""
        device = GPUS[self.gpu]
        return device._replace(processors=self.processors) if self.processors else device

    @property
    def shape(self) -> Shape:
        """The problem as the kernels see it."""
        itemsize = getattr(torch, self.dtype).itemsize
        sizes = self.batch, self.units, self.groups
        shape = Shape.of(CELLS[self.cell], *sizes, itemsize, self.precision)
        return shape._replace(marked=bool(self.flow), noisy=bool(self.noise))

    @property
    def units(self) -> int:
        """The hidden units of a head."""
        return self.hidden // self.heads

    @property
    def groups(self) -> int:
        """How many layers of these units the kernels see."""
        return self.directions * self.heads * max(1, self.members)

    def candidates(self, **fields: Any) -> Iterator[tuple[Config, Config]]:
        """Pair up the configurations of both kernels; the shorter list is reused.

        Parameters
        ----------
        **fields
            Fields of `Config` that they have in common.
        """
        found = [
            [
                config
                for config in candidates(self.shape, self.device, backward=backward)
                if fields.items() <= config._asdict().items()
            ]
            for backward in (False, True)
        ]
        for n in range(max(map(len, found)) if all(found) else 0):
            forward, backward = (of[n % len(of)] for of in found)
            yield forward, backward

    def chunks(self, config: Config, backward: bool) -> int:
        """Count the chunks of columns of a persistent kernel's product."""
        columns = self.units * (self.shape.n_gates if backward else 1)
        return -(-columns // (config.num_warps * config.block_k))

    @property
    def is_tf32(self) -> bool:
        """Whether products round float32 to TF32."""
        return self.dtype == "float32" and self.precision == "tf32"

    @property
    def eps(self) -> float:
        """The machine epsilon; for TF32 that of float16, which has as many mantissa bits."""
        return torch.finfo(torch.float16 if self.is_tf32 else getattr(torch, self.dtype)).eps


def described(config: Config) -> str:
    """Format a configuration: schedule, tile and columns, warps, chunks in registers."""
    schedule, block_b, block_h, block_k, num_warps, in_registers, _ = config
    return f"{schedule} {block_b}x{block_h}x{block_k}, {num_warps}, {in_registers}"


def emulate(
    case: Case,
    schedule: Schedule = Schedule(),  # noqa: B008 - immutable
    *,
    mutate: Callable[[str], str] = str,
    statistics: bool = False,
) -> tuple[dict[str, Tensor], Emulator]:
    """Run a case; return outputs and gradients by name, and the emulator with its launches."""
    emulator = Emulator(case.device.capability, schedule, mutate=mutate, statistics=statistics)
    path = case.schedule or "kernels"
    with contextlib.ExitStack() as stack:
        stack.enter_context(as_on_a_gpu(case.device, case.precision))
        stack.enter_context(use_path(path))
        if case.configs:
            choices = tuple(Choice(config, 0.0) for config in case.configs)
            patched = mock.patch.object(devices, "choose_kernels", return_value=choices)
            stack.enter_context(patched)
        stack.enter_context(_watched(emulator))
        stack.enter_context(emulator)
        return _run(case, getattr(torch, case.dtype)), emulator


@functools.lru_cache(maxsize=4)  # large, and requested again soon
def expected(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the results of plain torch operations in the case's dtype, and in float64."""
    with use_path("reference"):
        dtypes = getattr(torch, case.dtype), torch.float64
        by_torch, exact = (_run(case, dtype) for dtype in dtypes)
    return by_torch, exact


def stable(case: Case) -> Case:
    """Return the case with the first seed whose results can be judged.

    In cells with a maximum, rounding to few bits may decide it, and with it a gradient. Therefore
    torch's own error must be small, and the results in float64 must not change if the inputs are
    moved by two roundings.
    """
    moves = range(1, 21) if case.cell in HAVE_MAXIMUM and case.eps > 1e-4 else ()
    for seed in range(case.seed, case.seed + 50):
        by_torch, exact = expected(found := replace(case, seed=seed))
        moved = ((_run(found, torch.float64, k), 12 * case.eps) for k in moves)
        others = itertools.chain([(by_torch, 1 / 16)], moved)
        if all(
            (results[name].double() - truth).abs().max() <= most * truth.abs().max().clamp(min=1)
            for results, most in others
            for name, truth in exact.items()
        ):
            return found
    raise LookupError(f"no seed for {case}")


def check(case: Case, results: dict[str, Tensor], *, gradients: bool = True) -> None:
    """Compare with float64: at most twice torch's error plus two or four units of the dtype.

    For TF32, to which torch's own operations here do not round, two units of float16, which has as
    many mantissa bits.
    """
    results, by_torch, exact = (
        {name: part for name, part in parts.items() if gradients or not name.startswith("d_")}
        for parts in (results, *expected(case))
    )
    if not case.is_tf32:
        # Long float32 sums, which kernels accumulate sequentially and torch in blocks.
        terms = case.hidden if case.dtype == "float32" and case.hidden > 256 else 0
        return assert_accurate(results, by_torch, exact, str(case), terms)
    assert results.keys() == exact.keys()
    for name, truth in exact.items():
        assert (results[name].shape, results[name].dtype) == (truth.shape, torch.float32), name
        error = (results[name].double() - truth).abs().max()
        unit = case.eps * truth.abs().max().clamp(min=1)
        assert error <= 2 * unit, f"{name} {case}: error {error:.3g} ({error / unit:.3g} units)"


def faults(emulator: Emulator) -> list[str]:
    """Return the findings that are faults."""
    return [
        text
        for launch in emulator.launches
        for finding, text in zip(launch.outcome.findings, launch.findings(), strict=True)
        if finding.kind not in _HARMLESS
    ]


# Threads that store the same value twice, due to layouts with more threads than elements.
_HARMLESS = (
    "shared write-write race of the same value (benign)",
    "two lanes store the same value to one address",
)


@contextlib.contextmanager
def _watched(emulator: Emulator) -> Iterator[None]:
    """Watch the memory that the operator gives to the kernels, from inside of it."""

    def watch(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with emulator.watching():
                return function(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for module, name in itertools.product((launch, launch_staged), ("forward", "backward")):
            watched = watch(getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, watched))
        yield


def _run(case: Case, dtype: torch.dtype, move: int = 0) -> dict[str, Tensor]:
    """Call the module on random numbers, the same in every dtype, rounded to the case's own.

    With `move`, each is shifted by up to two roundings, using that seed.
    """
    moving = torch.Generator().manual_seed(move)
    generator = torch.Generator().manual_seed(case.hidden + case.seed)
    own = getattr(torch, case.dtype)

    def random(*shape: int, scale: float = 1.0, name: str = "") -> Tensor:
        numbers = torch.randn(shape, generator=generator, dtype=torch.float32) * scale
        numbers = numbers.abs() + 1 if name == "n" else numbers  # the normalizer of an sLSTM
        numbers = numbers.to(own).to(dtype)
        if move:
            away = torch.rand(shape, generator=moving, dtype=dtype) * 2 - 1
            numbers = numbers * (1 + case.eps * away)
        return numbers.requires_grad_()

    steps, batch, inputs = case.steps, case.batch * max(1, case.members), 5
    options = {"bidirectional": case.directions == 2, "bias": case.bias, "dtype": dtype}
    options |= {"num_heads": case.heads, "recurrent_dropout": 0.4 * ("drop" in case.noise)}
    options["zoneout"] = 0.3 * any(kind in case.noise for kind in ("units", "share"))
    cls, given_to_class = MODULES[case.cell]
    module = cls(inputs, case.hidden, **given_to_class, **options)
    for name, parameter in module.named_parameters():
        scale = 0.8 * case.hidden**-0.5 if "weight_hh" in name else 0.4
        parameter.data = random(*parameter.shape, scale=scale).detach()
    states = CELLS[case.cell].states
    shape = case.directions, batch, case.hidden
    hx, fresh = ([random(*shape, name=name) for name in states] for _ in range(2))
    leaves = {"x": random(steps, batch, inputs), **_named("{}_0", states, hx)}
    given: dict[str, Any] = {"recompute": True} if case.recompute else {}
    if case.flow:
        lengths = torch.randint(0, steps + 1, (batch,), generator=generator)
        lengths[0] = steps
        reset = torch.rand(steps, batch, generator=generator) < 0.3
        given |= {"lengths": lengths, "reset": reset, "bptt": 3}
    if case.flow == "fresh":
        given |= {"reset_state": _as_hx(fresh), "return_states": True}
        leaves |= _named("fresh_{}", states, fresh)
    noise = _noise(case, shape, generator, own, dtype)
    parameters = dict(module.named_parameters())
    call: Callable[..., Any] = module
    if case.members:
        sizes = {name: (case.members, *part.shape) for name, part in parameters.items()}
        parameters = {name: random(*size, scale=0.2) for name, size in sizes.items()}
        call = functools.partial(_ensemble, case, list(parameters.values()))
    drawn = mock.patch.object(paths, "_noise", return_value=noise)
    with torch.set_grad_enabled(case.training), drawn:
        y, final, *more = call(leaves["x"], _as_hx(hx), **given)
    outputs = {"y": y, **_named("{}_n", states, final if isinstance(final, tuple) else (final,))}
    if more:
        outputs |= {name: part for name, part in more[0]._asdict().items() if part is not None}
    if not case.training:
        return outputs
    leaves |= parameters
    cotangents = [random(*part.shape).detach() for part in outputs.values()]
    grads = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), cotangents, materialize_grads=True
    )
    results = outputs | {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: part.detach() for name, part in results.items()}


def _ensemble(
    case: Case, weights: list[Tensor], x: Tensor, hx: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run layers whose weights have a dimension of members."""
    state = hx if isinstance(hx, tuple) else (hx,)
    call = Call(CELLS[case.cell], x, state, weights, bidirectional=case.directions == 2)
    layer = reference.layer if planner.forced.path == "reference" else ops.layer
    y, final, _ = layer(call)
    return y, tuple(final)


def _noise(
    case: Case,
    shape: tuple[int, ...],
    generator: torch.Generator,
    own: torch.dtype,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Draw the same noise in every dtype, for states of a shape."""
    kept = torch.rand(shape, generator=generator) < 0.6
    drop = (kept / 0.6).to(own).to(dtype) if "drop" in case.noise else torch.empty(0, dtype=dtype)
    found = [drop]
    for _ in CELLS[case.cell].states:
        sizes = shape[0], case.steps, *shape[1:]
        units = torch.rand(sizes, generator=generator) < 0.3
        share = torch.full((1 if "share" in case.noise else 0,), 0.3, dtype=own).to(dtype)
        found.append(units if "units" in case.noise else share)
    return found


def _as_hx(states: list[Tensor]) -> Any:
    return tuple(states) if len(states) > 1 else states[0]


def _named(form: str, names: tuple[str, ...], parts: Any) -> dict[str, Tensor]:
    return {form.format(name): part for name, part in zip(names, parts, strict=True)}
