"""The correctness harness: random layers and cells against float64 and against torch.nn.

Each case draws every public argument at random, runs our module, torch.nn's module and the
oracle (``oracle.py``, in float64) on the same weights and inputs, and compares every output and
every gradient.

The yardstick is torch.nn's own error against the same oracle: over a run, the root mean square
of our errors must not exceed ``LIMIT`` times torch.nn's. On a single tensor chance can make either
error unusually large or small, so a single error is measured in units of the error that the dtype
makes unavoidable, and must stay within ``WORST`` units. A unit is the largest of three:

* torch.nn's own error;
* the error of the oracle itself in this dtype (for float64 that in float32, scaled), on inputs
  and weights perturbed at random by at most one rounding, the worst of ``DRAWS`` draws;
* ``FLOOR`` roundings of the largest element, or of 1, the size of the cotangents; for a sum of more
  than 48 terms, which paths add up in different orders, the standard deviation of that many
  roundings, sqrt(n / 12).

``fastrnn verify`` is the command line.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from . import oracle, planner
from .cases import MODULES, Case, draw_case
from .cells import CELLS
from .options import States
from .paths import _mask

#: Largest root mean square of our errors over a run, in multiples of torch.nn's, which counts
#: as at least one rounding, because in float64 the oracle makes rounding errors itself.
LIMIT = 2.0

#: Largest single error, in units; see above. The worst in 20,000 cases was 3.5.
WORST = 4.0

#: Roundings of the largest element that any path may make; see above.
FLOOR = 2.0

#: Draws of perturbed inputs; see above.
DRAWS = 7


@dataclass(frozen=True)
class Deviation:
    """The error of one output or gradient.

    Attributes
    ----------
    tensor : str
        Name of the tensor: 'output', 'h_n', 'grad weight_ih_l0', …
    path : str
        The path of ours that computed it.
    ours, stock : float
        Our largest error and torch.nn's against the oracle, relative to the oracle's largest
        element or to 1, whichever is larger.
    units : float
        `ours` in units of the unavoidable error, see the module's docstring.
    """

    tensor: str
    path: str
    ours: float
    stock: float
    units: float


def check_case(case: Case, dtype: torch.dtype, device: str = "cpu") -> list[Deviation]:
    """Run one case on the planner's path and on our own loop.

    Parameters
    ----------
    case : Case
    dtype : torch.dtype
    device : str, default 'cpu'

    Returns
    -------
    list of Deviation
        One for each output and gradient, on each path. A result of the wrong shape or dtype, or
        not finite where the oracle is, has infinite `units`.

    Examples
    --------
    >>> import torch
    >>> from fastrnn.testing import WORST, check_case, draw_case
    >>> deviations = check_case(draw_case("gru", seed=0, index=0), torch.float32)
    >>> max(d.units for d in deviations) <= WORST
    True
    """
    problem = _Setup(case, dtype, device)
    (exacts,) = problem.by_oracle(torch.float64, [0])
    # Nothing is exact enough to measure the oracle's errors in float64: those in float32 are
    # scaled down instead.
    rounded = torch.float32 if dtype == torch.float64 else dtype
    moved = problem.by_oracle(rounded, range(1, DRAWS + 1))
    digits = torch.finfo(dtype).eps / torch.finfo(rounded).eps
    stock = problem.run(problem.module.to_torch()) if case.is_stock else None
    deviations = []
    chosen = problem.run(problem.module)
    with planner.use_path("kernels"):
        kernels = problem.run(problem.module)
    for path, computed in (("planned", chosen), ("kernels", kernels)):
        for name, exact in exacts.items():
            scale = max(1.0, exact.abs().max().item()) if exact.numel() else 1.0
            ours = _error(computed[name], exact) / scale
            if computed[name].dtype != dtype:
                ours = math.inf
            plain = [digits * _error(results[name], exact) / scale for results in moved]
            if stock is None:  # the oracle in this dtype stands for torch.nn
                theirs = math.sqrt(sum(error**2 for error in plain) / DRAWS)
            else:
                theirs = _error(stock[name], exact) / scale
            floor = max(FLOOR, math.sqrt(_terms(case, name) / 12)) * torch.finfo(dtype).eps
            unit = max(theirs, *plain, floor)
            units = ours / unit if math.isfinite(ours) else ours
            deviations.append(Deviation(name, path, ours, theirs, units))
    return deviations


def _terms(case: Case, name: str) -> int:
    """The length of the longest single sum in the computation of a tensor."""
    if name.startswith(("grad input", "grad hx", "grad reset_state")) or "grad" not in name:
        gates = CELLS[case.cell.removesuffix("_cell")].n_gates
        shared = case.members if "grad" in name and not case.own_inputs else 0
        return max(case.input_size, gates * case.hidden_size) * max(1, shared)
    return case.batch * (1 if case.is_step else case.steps)


def _error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; infinite if shapes differ or `actual` is not finite."""
    if actual.shape != exact.shape:
        return float("inf")
    if not exact.numel():
        return 0.0
    difference = (actual.to(exact.device, torch.float64) - exact).abs()
    return float(difference.nan_to_num(nan=float("inf")).max())


class _Setup:
    """The weights, inputs and cotangents of a case, and the ways to run it."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        cls, given = MODULES[case.cell]
        options: dict[str, Any] = {**given, "device": "cpu", "dtype": torch.float32}
        generator = torch.Generator(device="cpu").manual_seed(case.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(case.seed)
            if not case.is_step:
                names = ("num_layers", "batch_first", "dropout", "bidirectional")
                given_if_set = (*_REGULARISERS, "proj_size")
                options |= {name: getattr(case, name) for name in names}
                options |= {name: value for name in given_if_set if (value := getattr(case, name))}
                if case.num_heads > 1:
                    options["num_heads"] = case.num_heads
            modules = [
                cls(case.input_size, case.hidden_size, bias=case.bias, **options)
                .to(device, dtype)
                .train(case.training)
                for _ in range(max(1, case.members))
            ]
        self.module = modules[0]
        self.weights = dict(self.module.named_parameters())
        if case.members:
            self.weights = torch.func.stack_module_state(modules)[0]

        on_cpu: dict[str, Any] = {"generator": generator, "device": "cpu"}
        like: dict[str, Any] = {**on_cpu, "dtype": torch.float32}

        own = (case.members,) if case.members and case.own_inputs else ()

        def normal(*shape: int) -> Tensor:
            return torch.randn(*own, *shape, **like).to(device, dtype)

        directions = 2 if case.bidirectional and not case.is_step else 1
        size_h = case.proj_size or case.hidden_size
        if case.is_step:
            self.input = normal(case.batch, case.input_size)
            state_shape: tuple[int, ...] = (case.batch,)
        else:
            self.input = normal(case.steps, case.batch, case.input_size)
            state_shape = (case.num_layers * directions, case.batch)
        widths = [size_h] + [case.hidden_size] * (case.n_states - 1)
        self.shapes: list[Any] = [(*state_shape, width) for width in widths]

        def states(shapes: Sequence[Any]) -> list[Tensor]:
            drawn = [normal(*shape) for shape in shapes]
            if len(drawn) == 4:  # the normalizer of a non-empty state is at least 1
                drawn[2] = drawn[2].abs() + 1
            return drawn

        self.state = states(self.shapes) if case.with_state else []
        if not case.contiguous:
            self.input, *self.state = (_strided(t) for t in (self.input, *self.state))
        self.lengths = (
            torch.randint(1, case.steps + 1, (case.batch,), **on_cpu)
            if case.packed and not case.is_step
            else None
        )
        if self.lengths is not None:
            self.lengths[-1] = case.steps
        self.cotangent_seed = case.seed + 1
        self.given: dict[str, Any] = {}
        self.fresh: list[Tensor] = []
        if case.is_step:
            return
        if case.lengths:
            lengths = torch.randint(0, case.steps + 1, (case.batch,), **on_cpu)
            self.given["lengths"] = lengths.to(device)
        if case.reset:
            reset = torch.rand(case.steps, case.batch, **like) < 0.2
            self.given["reset"] = reset.to(device)
        if case.reset in ("own", "shared"):
            rows = 1 if case.reset == "shared" else case.batch
            self.fresh = states([(shape[0], rows, shape[2]) for shape in self.shapes])
        for name in ("bptt", "recompute", "return_states"):
            if getattr(case, name):
                self.given[name] = getattr(case, name)

    def _leaves(self, module: torch.nn.Module) -> dict[str, Tensor]:
        """Inputs and weights; of an ensemble the weights, and possibly inputs, of all members."""
        named = {"input": self.input}
        named |= {f"hx[{k}]": part for k, part in enumerate(self.state)}
        named |= {f"reset_state[{k}]": part for k, part in enumerate(self.fresh)}
        leaves = {k: t.detach().requires_grad_() for k, t in named.items()}
        return leaves | (self.weights if module is self.module else dict(module.named_parameters()))

    def _is_of_members(self, name: str) -> bool:
        """Whether each member of the ensemble has its own leaf of this name."""
        return self.case.members > 0 and (name in self.weights or self.case.own_inputs)

    def _call(self, module: Any, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """Call a module as a user would, for an ensemble mapped over what differs by member."""
        torch.manual_seed(self.case.seed)
        given = dict(self.given) if module is self.module else {}  # torch.nn has no such options
        if not self.case.members:
            return self._call_one(module, leaves, given)

        def of_member(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
            weights = {name: leaves[name] for name in self.weights}

            def called(*arguments: Any, **options: Any) -> Any:
                return torch.func.functional_call(module, weights, arguments, options)

            return self._call_one(called, leaves, dict(given))

        dims = {name: 0 if self._is_of_members(name) else None for name in leaves}
        with warnings.catch_warnings():
            # Torch has no batching rule for packing.
            warnings.filterwarnings("ignore", "There is a performance drop")
            return torch.func.vmap(of_member, (dims,), randomness="different")(leaves)

    def _call_one(
        self, module: Any, leaves: dict[str, Tensor], given: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Call a module with inputs in the layout of the case."""
        case, x = self.case, leaves["input"]
        state = [leaves[f"hx[{k}]"] for k in range(len(self.state))]
        fresh = [leaves[f"reset_state[{k}]"] for k in range(len(self.fresh))]
        if "reset" in given and case.batch_first and not case.unbatched:
            given["reset"] = given["reset"].t()
        argument: Any = x
        if case.unbatched:
            state, fresh = ([part.squeeze(-2) for part in parts] for parts in (state, fresh))
            argument = x.squeeze(-2)
            given |= {k: given[k].squeeze(-1) for k in ("lengths", "reset") if k in given}
        elif self.lengths is not None:
            argument = pack_padded_sequence(x, self.lengths, enforce_sorted=False)
        elif case.batch_first and not case.is_step:
            argument = x.transpose(0, 1)
        hx, reset_state = (
            (tuple(parts) if len(parts) > 1 else parts[0]) if parts else None
            for parts in (state, fresh)
        )
        if fresh:
            given["reset_state"] = reset_state
        result = module(argument, hx, **given)
        if case.is_step:
            return _named(_STATES, _tensors(result))
        output, final, *states = result
        output = output.data if isinstance(output, PackedSequence) else output
        return {"output": output} | _named(_FINAL, _tensors(final)) | _named_states(*states)

    def run(self, module: torch.nn.Module) -> dict[str, Tensor]:
        leaves = self._leaves(module)
        with self._seeded():
            return self._with_gradients(self._call(module, leaves), leaves)

    def by_oracle(self, dtype: torch.dtype, draws: Sequence[int]) -> list[dict[str, Tensor]]:
        """The oracle's results in `dtype`; draws above 0 perturb the values by a rounding."""
        own = self._leaves(self.module)
        leaves = {name: [value.detach().to(dtype) for _ in draws] for name, value in own.items()}
        for k, draw in enumerate(draws):
            generator = torch.Generator(device="cpu").manual_seed(self.case.seed + draw)
            for values in leaves.values() if draw else ():
                like: dict[str, Any] = {"generator": generator, "dtype": dtype, "device": "cpu"}
                by = torch.rand(values[k].shape, **like) * 2 - 1
                values[k] = values[k].addcmul(
                    values[k], by.to(self.device), value=torch.finfo(dtype).eps
                )
        stacked = {k: torch.stack(values).requires_grad_() for k, values in leaves.items()}
        with self._seeded():
            results = self._with_gradients(self._call_oracle(stacked), stacked, draws=len(draws))
        return [{name: part[k] for name, part in results.items()} for k in range(len(draws))]

    def _call_oracle(self, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """The results of the oracle, K draws of each; members of an ensemble run one by one."""
        torch.manual_seed(self.case.seed)
        count = self.case.members
        if not count:
            return self._call_oracle_of_one(leaves, self._noise())
        drawn = torch.func.vmap(lambda _: self._noise(), randomness="different")
        noise, members = drawn(torch.arange(count, device=self.device)), []
        for m in range(count):
            own = {n: leaf[:, m] if self._is_of_members(n) else leaf for n, leaf in leaves.items()}
            members.append(self._call_oracle_of_one(own, {n: part[m] for n, part in noise.items()}))
        return {name: torch.stack([of_one[name] for of_one in members], 1) for name in members[0]}

    def _call_oracle_of_one(
        self, leaves: dict[str, Tensor], noise: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The results of the oracle in the form in which the module returns them."""
        case, x = self.case, leaves["input"]
        count, device = len(x), x.device
        state = [leaves[f"hx[{k}]"] for k in range(len(self.state))]
        fresh = [leaves[f"reset_state[{k}]"] for k in range(len(self.fresh))]
        if case.is_step:
            x, state = x[:, None], [part[:, None] for part in state]
        steps, (lengths, order, there) = x.shape[1], self._rows()
        reset = self.given.get("reset")
        if reset is None:
            reset = torch.zeros(steps, case.batch, dtype=torch.bool, device=device)
        walk = self._walk(lengths[order], reset[:, order], noise, x)
        zeros = [x.new_zeros(count, *shape) for shape in self._state_shapes]
        found = oracle.layers(
            case.cell.removesuffix("_cell"),
            case.num_heads,
            x[:, :, order],
            [part[:, :, order] for part in state or zeros],
            [part.expand(-1, -1, case.batch, -1)[:, :, order] for part in fresh or zeros],
            self._weights(leaves, noise),
            walk,
        )
        back = order.argsort()
        final = [part[:, :, back] for part in found.final]
        if case.is_step:
            final = [part[:, 0] for part in final]
            final = [part.squeeze(-2) for part in final] if case.unbatched else final
            return _named(_STATES, final)
        if self.lengths is not None:
            output = found.output.flatten(1, 2)[:, there.flatten()]
        else:
            output = found.output.transpose(1, 2) if case.batch_first else found.output
        states = {}
        if case.return_states:
            h, *others = [part[:, :, :, back] for part in found.states]
            gates = None
            if case.return_states == "gates" and found.gates is not None:
                gates = found.gates[:, :, :, back]
            states = _named_states(States(h, others[0] if others else None, gates, *others[1:]))
        if case.unbatched:
            output = output.squeeze(1 if case.batch_first else 2)
            final = [part.squeeze(2) for part in final]
            states = {name: part.squeeze(3) for name, part in states.items()}
        return {"output": output} | _named(_FINAL, final) | states

    def _weights(
        self, leaves: dict[str, Tensor], noise: dict[str, Tensor]
    ) -> list[list[dict[str, Tensor]]]:
        """The weights of every layer and direction, after weight dropout, without suffixes."""
        case = self.case
        found: dict[str, dict[str, Tensor]] = {}
        for name in self.weights:
            weight = leaves[name]
            if name in noise:
                weight = weight * noise[name].to(weight.dtype)
            kind, _, suffix = name.partition("_l") if not case.is_step else (name, "", "")
            found.setdefault(suffix, {})[kind] = weight
        directions = 2 if case.bidirectional and not case.is_step else 1
        each = list(found.values())
        return [each[k : k + directions] for k in range(0, len(each), directions)]

    @property
    def _state_shapes(self) -> list[Any]:
        """Shapes of the states of a layer; a step counts as one layer."""
        return [(1, *shape) if self.case.is_step else shape for shape in self.shapes]

    def _rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """The lengths, the order in which rows are packed, and which packed rows have a step."""
        case, device = self.case, self.device
        steps = 1 if case.is_step else case.steps
        order = torch.arange(case.batch, device=device)
        lengths = self.given.get("lengths")
        if lengths is None:
            lengths = torch.full((case.batch,), steps, device=device)
        if self.lengths is not None:
            lengths = self.lengths.to(device)
            order = lengths.argsort(descending=True, stable=True)
        there = torch.arange(steps, device=device)[:, None] < lengths[order]
        return lengths, order, there

    def _noise(self) -> dict[str, Tensor]:
        """Draw the random numbers in the dtype under test and in the order of the layers.

        They are for rows in packed order; dropout between the layers of a packed batch is drawn
        only for existing steps.
        """
        case, shapes, noise = self.case, self._state_shapes, {}
        _, _, there = self._rows()
        steps, batch = there.shape

        def drawn(p: float, shape: Sequence[int]) -> Tensor:
            return torch.dropout(torch.ones(shape, dtype=self.dtype, device=self.device), p, True)

        if not case.training:
            return {}
        for name, parameter in self.module.named_parameters():
            if case.weight_dropout and name.startswith("weight_hh"):
                noise[name] = drawn(case.weight_dropout, parameter.shape)
        if case.recurrent_dropout:
            noise["drop"] = drawn(case.recurrent_dropout, shapes[0])
        for k, (rate, (count, _, width)) in enumerate(zip(self._rates, shapes, strict=True)):
            if rate:
                noise[f"zone {k}"] = _mask((count, steps, batch, width), rate, there.device)
        width = shapes[0][-1] * (2 if case.bidirectional else 1)
        for k in range(case.num_layers - 1 if case.dropout else 0):
            if self.lengths is None or self._is_padded:
                noise[f"dropout {k}"] = drawn(case.dropout, (steps, batch, width))
            else:
                mask = torch.zeros(steps, batch, width, dtype=self.dtype, device=self.device)
                mask[there] = drawn(case.dropout, (int(there.sum()), width))
                noise[f"dropout {k}"] = mask
        return noise

    @property
    def _rates(self) -> tuple[float, ...]:
        """The zoneout of every state; a number is for h and c, or for h only with more states."""
        rates, count = self.case.zoneout, self.case.n_states
        if isinstance(rates, tuple):
            return rates
        return (rates,) * count if count <= 2 else (rates, 0.0, 0.0, 0.0)

    def _walk(
        self, lengths: Tensor, reset: Tensor, noise: dict[str, Tensor], like: Tensor
    ) -> oracle.Walk:
        """The walk of the oracle, with the masks that `_noise` drew, or zoneout as fractions."""
        masks, case = {name: part.to(like.dtype) for name, part in noise.items()}, self.case
        zones: list[Tensor | None] = []
        for k, (rate, (count, batch, width)) in enumerate(
            zip(self._rates, self._state_shapes, strict=True)
        ):
            share = torch.full((), rate, dtype=self.dtype, device=like.device).to(like.dtype)
            zone = masks.get(f"zone {k}", share.expand(count, len(reset), batch, width))
            zones.append(zone if rate else None)
        dropout = [masks[name] for name in masks if name.startswith("dropout")]
        return oracle.Walk(lengths, reset, case.bptt, masks.get("drop"), zones, dropout)

    @property
    def _is_padded(self) -> bool:
        """Whether a packed batch is run padded, so that dropout is drawn for padding too."""
        case = self.case
        is_noisy = bool(case.zoneout) or (case.training and case.recurrent_dropout > 0)
        marks = (case.reset, case.bptt, case.return_states)
        return is_noisy or any(marks) or type(case.recompute) is int

    def _with_gradients(
        self, results: dict[str, Tensor], leaves: dict[str, Tensor], draws: int = 0
    ) -> dict[str, Tensor]:
        """Add the gradient of every leaf for fixed random cotangents of all results.

        With `draws`, all tensors have a leading dimension of that size, and share the cotangents.
        """
        generator = torch.Generator(device="cpu").manual_seed(self.cotangent_seed)
        like: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
        cotangents = []
        for t in results.values():
            drawn = torch.randn(t.shape[bool(draws) :], **like)
            if self.case.seed % 3 == 0:  # losses on some steps and some results only
                kept = torch.rand((*drawn.shape[:-1], 1), **like) < 0.5
                drawn = drawn * kept * (torch.rand((), **like) < 0.7)
            cotangents.append(drawn.to(self.device, self.dtype).to(t.dtype).expand(t.shape))
        inputs = list(leaves.values())
        grads = torch.autograd.grad(
            list(results.values()), inputs, cotangents, allow_unused=True, materialize_grads=True
        )
        named = {f"grad {k}": g for k, g in zip(leaves, grads, strict=True)}
        return {k: t.detach() for k, t in (results | named).items()}

    @contextlib.contextmanager
    def _seeded(self) -> Iterator[None]:
        devices = [torch.device(self.device)] if self.device.startswith("cuda") else []
        with torch.random.fork_rng(devices=devices):
            yield


def _strided(tensor: Tensor) -> Tensor:
    """Copy a tensor to every second element of a larger one."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


_STATES = ("h", "c", "n", "m")
_FINAL = ("h_n", "c_n", "n_n", "m_n")
_REGULARISERS = ("recurrent_dropout", "zoneout", "weight_dropout")


def _named(names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(names, tensors, strict=False))


def _named_states(states: States | None = None) -> dict[str, Tensor]:
    if states is None:
        return {}
    return {f"states.{k}": t for k, t in states._asdict().items() if t is not None}


def _tensors(state: Any) -> Sequence[Tensor]:
    return (state,) if isinstance(state, Tensor) else state


@dataclass
class Summary:
    """The errors of one cell, dtype and path over all cases.

    Attributes
    ----------
    cell, dtype, path
    cases, tensors : int
        Numbers of cases and tensors.
    worst : Deviation or None
        The deviation that is largest in units.
    """

    cell: str
    dtype: torch.dtype
    path: str
    cases: int = 0
    tensors: int = 0
    worst: Deviation | None = None
    _ours: float = 0.0  # sums of squares
    _stock: float = 0.0

    def add(self, deviations: Sequence[Deviation]) -> None:
        """Add the deviations of one case."""
        self.cases += 1
        self.tensors += len(deviations)
        self._ours += sum(d.ours**2 for d in deviations)
        self._stock += sum(d.stock**2 for d in deviations)
        self.worst = max(
            (d for d in (self.worst, *deviations) if d is not None),
            key=lambda d: d.units,
            default=None,
        )

    @property
    def ratio(self) -> float:
        """Root mean square of our errors, in multiples of torch.nn's."""
        if not self.tensors:
            return 0.0
        ours, stock = (math.sqrt(total / self.tensors) for total in (self._ours, self._stock))
        return ours / max(stock, torch.finfo(self.dtype).eps)

    @property
    def passed(self) -> bool:
        return self.ratio <= LIMIT and (self.worst is None or self.worst.units <= WORST)


@dataclass(frozen=True)
class Failure:
    """A failed case, what went wrong, and the command that reruns it."""

    case: Case
    what: str
    command: str


def verify(
    cells: Sequence[str],
    dtypes: Sequence[torch.dtype],
    *,
    cases: int = 100,
    seed: int = 0,
    device: str = "cpu",
    only: int | None = None,
    progress: Callable[[], None] = lambda: None,
) -> tuple[list[Summary], list[Failure]]:
    """Check `cases` random cases for each dtype, spread over the cells.

    Parameters
    ----------
    cells : sequence of str
        Keys of ``MODULES``.
    dtypes : sequence of torch.dtype
    cases : int, default 100
        Number of cases for each dtype; case k uses the cell ``cells[k % len(cells)]``.
    seed : int, default 0
    device : str, default 'cpu'
    only : int, optional
        Run only the case with this index, for every cell.
    progress : callable, optional
        Called after each case.

    Returns
    -------
    summaries : list of Summary
        For each cell, dtype and path.
    failures : list of Failure
        Cases with an error beyond ``WORST`` units, or that raised.

    Examples
    --------
    >>> import torch
    >>> from fastrnn.testing import verify
    >>> summaries, failures = verify(["gru"], [torch.float64], cases=3)
    >>> failures
    []
    """
    summaries: list[Summary] = []
    failures: list[Failure] = []
    for dtype in dtypes:
        table = {
            (cell, path): Summary(cell, dtype, path)
            for cell in cells
            for path in ("planned", "kernels")
        }
        runs = (
            [(cells[k % len(cells)], k) for k in range(cases)]
            if only is None
            else [(cell, only) for cell in cells]
        )
        for cell, index in runs:
            case = draw_case(cell, seed, index)
            wrong = ""
            try:
                deviations = check_case(case, dtype, device)
            except Exception as error:
                deviations, wrong = [], f"raised {type(error).__name__}: {error}"
            for path in ("planned", "kernels"):
                table[cell, path].add([d for d in deviations if d.path == path])
            worst = max(deviations, key=lambda d: d.units, default=None)
            if worst is not None and not worst.units <= WORST:
                wrong = (
                    f"{worst.tensor} on the {worst.path} path: relative error {worst.ours:.2e}, "
                    f"torch.nn's {worst.stock:.2e}, {worst.units:.2f} units"
                )
            if wrong:
                failures.append(Failure(case, wrong, _command(cell, dtype, device, seed, index)))
            progress()
        summaries += table.values()
    return summaries, failures


def _command(cell: str, dtype: torch.dtype, device: str, seed: int, index: int) -> str:
    return (
        f"python -m fastrnn verify --cells {cell} --dtype {str(dtype).removeprefix('torch.')} "
        f"--device {device} --seed {seed} --only {index}"
    )
