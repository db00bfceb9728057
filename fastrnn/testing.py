"""The correctness harness: random layers and cells against float64 and against torch.nn.

Each case draws every public argument at random, runs our module, torch.nn's module and the
float64 oracle (``reference.py``) on the same weights and inputs, and compares every output
and every gradient.

The measure is torch.nn's own error against the same oracle: over a run, the root mean square
of ours must not exceed ``LIMIT`` times torch.nn's. One tensor alone may be unlucky, or
torch.nn lucky on it, so a single error is measured in units of what the dtype makes
unavoidable and must stay within ``WORST`` units. A unit is the largest of three:

* torch.nn's own error;
* the error of the plain loop in this dtype, on inputs and weights moved at random by at
  most one rounding, the worst of ``REPEATS`` draws;
* ``FLOOR`` roundings of the largest element, or of 1, the size of the cotangents.

``fastrnn verify`` is the command line for it.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import nn, planner, reference, sequences, variants
from .options import Options, States

#: Names for ``--cells``, those of the registry and for a step with ``_cell``: the class, and what
#: its constructor needs to be told.
MODULES: dict[str, tuple[type[Any], dict[str, str]]] = {
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "rnn_tanh": (nn.RNN, {}),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}),
    "rnn_identity": (nn.RNN, {"nonlinearity": "identity"}),
    "layernorm_lstm": (variants.LayerNormLSTM, {}),
    "layernorm_gru": (variants.LayerNormGRU, {}),
    "gru_reset_before": (variants.ResetBeforeGRU, {}),
    "peephole_lstm": (variants.PeepholeLSTM, {}),
    "slstm": (variants.SLSTM, {}),
    "lstm_cell": (nn.LSTMCell, {}),
    "gru_cell": (nn.GRUCell, {}),
    "rnn_tanh_cell": (nn.RNNCell, {}),
    "rnn_relu_cell": (nn.RNNCell, {"nonlinearity": "relu"}),
    "rnn_identity_cell": (nn.RNNCell, {"nonlinearity": "identity"}),
}

#: Largest root mean square of our errors over a run, in multiples of torch.nn's, which counts
#: as at least one rounding (in float64 the oracle rounds as torch.nn does).
LIMIT = 2.0

#: Largest single error, in units; see above. The worst of 40,000 tensors in float32 and float64
#: was 3.3.
WORST = 4.0

#: Roundings of the largest element that any path may make; see above.
FLOOR = 2.0

#: Draws of moved inputs; see above.
REPEATS = 3

_SIZES = (1, 2, 3, 5, 7, 8, 16, 17, 31, 32, 33, 64, 65)
_STEPS = (1, 2, 3, 5, 8, 13, 32, 33, 50)
_BATCHES = (0, 1, 1, 2, 3, 4, 7, 8)


@dataclass(frozen=True)
class Case:
    """One random configuration; `seed` draws its weights, inputs and dropout masks."""

    cell: str
    seed: int
    steps: int
    batch: int
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    training: bool
    with_state: bool
    unbatched: bool
    packed: bool
    contiguous: bool
    lengths: bool
    reset: str
    bptt: int | None
    recompute: bool | int
    return_states: bool | str
    recurrent_dropout: float
    zoneout: float
    weight_dropout: float
    num_heads: int

    @property
    def is_step(self) -> bool:
        return self.cell.endswith("_cell")

    @property
    def is_stock(self) -> bool:
        """Whether torch.nn can do the same."""
        return self.cell.removesuffix("_cell") in sequences.ATEN_LAYERS and not (
            self.lengths or self.reset or self.bptt or self.return_states or self.is_regularised
            or self.num_heads > 1
        )  # fmt: skip

    @property
    def is_regularised(self) -> bool:
        return self.recurrent_dropout > 0 or self.zoneout > 0 or self.weight_dropout > 0

    def __str__(self) -> str:
        shown = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name != "cell")
        return f"{self.cell}({', '.join(shown)})"


def draw_case(cell: str, seed: int, index: int) -> Case:
    """Draw case number `index` of a run; the same three arguments give the same case.

    Parameters
    ----------
    cell : str
        Key of ``MODULES``.
    seed, index : int

    Returns
    -------
    Case

    Examples
    --------
    >>> from fastrnn.testing import draw_case
    >>> draw_case("gru", seed=0, index=3) == draw_case("gru", seed=0, index=3)
    True
    """
    rng = random.Random(f"{cell}/{seed}/{index}")
    flip = lambda p=0.5: rng.random() < p  # noqa: E731
    hidden = rng.choice(_SIZES)
    layers = rng.choice((1, 1, 2, 3))
    unbatched = flip(0.15)
    packed = not unbatched and flip(0.25)
    batch = rng.choice(_BATCHES)
    is_step = cell.endswith("_cell")
    case = Case(
        cell=cell,
        seed=rng.randrange(2**31),
        steps=rng.choice(_STEPS),
        batch=1 if unbatched else max(batch, 1) if packed else batch,
        input_size=rng.choice(_SIZES),
        hidden_size=hidden,
        num_layers=layers,
        bias=flip(0.7),
        batch_first=flip(),
        dropout=rng.choice((0.0, 0.3)) if layers > 1 else 0.0,
        bidirectional=flip(),
        proj_size=rng.randrange(1, hidden) if cell == "lstm" and hidden > 1 and flip(0.25) else 0,
        training=flip(),
        with_state=flip(),
        unbatched=unbatched,
        packed=packed,
        contiguous=flip(0.7),
        lengths=not packed and flip(0.3),
        reset=rng.choice(("", "", "zero", "own", "shared")),
        bptt=rng.choice((None, None, 1, 4)),
        recompute=rng.choice((False, False, True, 3)),
        return_states=rng.choice((False, False, True, "gates")),
        recurrent_dropout=rng.choice((0.0, 0.0, 0.0, 0.3)),
        zoneout=rng.choice((0.0, 0.0, 0.0, 0.2)),
        weight_dropout=rng.choice((0.0, 0.0, 0.0, 0.2)),
        num_heads=rng.choice([n for n in (1, 1, 1, 2, 4) if hidden % n == 0]),
    )
    changes: dict[str, Any] = {}
    if is_step or flip(0.3):
        # Also many cases that torch.nn can do, to be compared with it.
        changes = dict(_PLAIN)
    else:
        changes["steps"] = min(case.steps, 13)  # the plain loop takes its time
        if case.return_states == "gates" and reference.CELLS[cell].gates is None:
            changes["return_states"] = True
    if case.proj_size:
        changes["num_heads"] = 1
    return replace(case, **changes)


_PLAIN = {
    "lengths": False,
    "reset": "",
    "bptt": None,
    "recompute": False,
    "return_states": False,
    "recurrent_dropout": 0.0,
    "zoneout": 0.0,
    "weight_dropout": 0.0,
    "num_heads": 1,
}


@dataclass(frozen=True)
class Deviation:
    """The error of one output or gradient.

    Attributes
    ----------
    tensor : str
        Which: 'output', 'h_n', 'grad weight_ih_l0', …
    path : str
        The path of ours that computed it.
    ours, stock : float
        Our largest error and torch.nn's against the oracle, relative to its largest element
        or to 1, whichever is more.
    units : float
        `ours` in units of the unavoidable error, as the module describes.
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
        One for each output and gradient, on each path. A result of the wrong shape, or not
        finite where the oracle is, has infinite `units`.

    Examples
    --------
    >>> import torch
    >>> from fastrnn.testing import WORST, check_case, draw_case
    >>> deviations = check_case(draw_case("gru", seed=0, index=0), torch.float32)
    >>> max(d.units for d in deviations) <= WORST
    True
    """
    problem = _Setup(case, dtype, device)
    oracle, stock = problem.oracle(), problem.stock()
    moved = [problem.plain(dtype, draw) for draw in range(1, REPEATS + 1)]
    deviations = []
    chosen = problem.run(problem.module)
    with planner.use_path("loop"):
        loop = problem.run(problem.module)
    for path, computed in (("planned", chosen), ("loop", loop)):
        for name, exact in oracle.items():
            scale = max(1.0, exact.abs().max().item()) if exact.numel() else 1.0
            ours, theirs, *plain = (
                _error(results[name], exact) / scale for results in (computed, stock, *moved)
            )
            unit = max(theirs, *plain, FLOOR * torch.finfo(dtype).eps)
            units = ours / unit if math.isfinite(ours) else ours
            deviations.append(Deviation(name, path, ours, theirs, units))
    return deviations


def _error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; infinite if shapes differ or `actual` is not finite."""
    if actual.shape != exact.shape:
        return float("inf")
    if not exact.numel():
        return 0.0
    difference = (actual.to(exact.device, torch.float64) - exact).abs()
    return float(difference.nan_to_num(nan=float("inf")).max())


class _Setup:
    """The weights, inputs and cotangents of a case, and the three ways to run it."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        cls, given = MODULES[case.cell]
        options: dict[str, Any] = dict(given)
        generator = torch.Generator().manual_seed(case.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(case.seed)
            if case.is_step:
                module = cls(case.input_size, case.hidden_size, case.bias, **options)
            else:
                if case.proj_size:
                    options["proj_size"] = case.proj_size
                module = cls(
                    case.input_size,
                    case.hidden_size,
                    num_layers=case.num_layers,
                    bias=case.bias,
                    batch_first=case.batch_first,
                    dropout=case.dropout,
                    bidirectional=case.bidirectional,
                    **options,
                    **{name: getattr(case, name) for name in _REGULARISERS if getattr(case, name)},
                    **({"num_heads": case.num_heads} if case.num_heads > 1 else {}),
                )
        self.module = module.to(device, dtype).train(case.training)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        directions = 2 if case.bidirectional and not case.is_step else 1
        size_h = case.proj_size or case.hidden_size
        if case.is_step:
            self.input = normal(case.batch, case.input_size)
            state_shape: tuple[int, ...] = (case.batch,)
        else:
            self.input = normal(case.steps, case.batch, case.input_size)
            state_shape = (case.num_layers * directions, case.batch)
        n_states = reference.CELLS[case.cell.removesuffix("_cell")].n_states
        widths = [size_h] + [case.hidden_size] * (n_states - 1)
        self.shapes: list[Any] = [(*state_shape, width) for width in widths]
        self.state = [normal(*shape) for shape in self.shapes] if case.with_state else []
        if not case.contiguous:
            self.input, *self.state = (_strided(t) for t in (self.input, *self.state))
        self.lengths = (
            torch.randint(1, case.steps + 1, (case.batch,), generator=generator)
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
            lengths = torch.randint(0, case.steps + 1, (case.batch,), generator=generator)
            self.given["lengths"] = lengths.to(device)
        if case.reset:
            reset = torch.rand(case.steps, case.batch, generator=generator) < 0.2
            self.given["reset"] = reset.to(device)
        if case.reset in ("own", "shared"):
            rows = 1 if case.reset == "shared" else case.batch
            self.fresh = [normal(shape[0], rows, shape[2]) for shape in self.shapes]
        for name in ("bptt", "recompute", "return_states"):
            if getattr(case, name):
                self.given[name] = getattr(case, name)

    def _leaves(self, module: torch.nn.Module) -> dict[str, Tensor]:
        named = {"input": self.input}
        named |= {f"hx[{k}]": part for k, part in enumerate(self.state)}
        named |= {f"reset_state[{k}]": part for k, part in enumerate(self.fresh)}
        leaves = {k: t.detach().requires_grad_() for k, t in named.items()}
        return leaves | dict(module.named_parameters())

    def _call(self, module: Any, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """Call a module as a user would, in the layout that the case asks for."""
        case, x = self.case, leaves["input"]
        state = [leaves[f"hx[{k}]"] for k in range(len(self.state))]
        fresh = [leaves[f"reset_state[{k}]"] for k in range(len(self.fresh))]
        given = dict(self.given) if module is self.module else {}  # torch.nn knows none
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
        torch.manual_seed(case.seed)
        result = module(argument, hx, **given)
        if case.is_step:
            return _named(("h", "c"), _tensors(result))
        output, final, *states = result
        output = output.data if isinstance(output, PackedSequence) else output
        return {"output": output} | _named(_FINAL, _tensors(final)) | _named_states(*states)

    def run(self, module: torch.nn.Module) -> dict[str, Tensor]:
        leaves = self._leaves(module)
        with self._seeded():
            return self._with_gradients(self._call(module, leaves), leaves)

    def stock(self) -> dict[str, Tensor]:
        """torch.nn's results; a moved plain loop where torch.nn has no such layer."""
        if not self.case.is_stock:
            return self.plain(self.dtype, draw=REPEATS + 1)
        return self.run(self.module.to_torch())

    def oracle(self) -> dict[str, Tensor]:
        return self.plain(torch.float64)

    def plain(self, dtype: torch.dtype, draw: int = 0) -> dict[str, Tensor]:
        """The reference loop in `dtype`; with `draw`, on values moved by up to one rounding."""
        case = self.case
        generator = torch.Generator().manual_seed(case.seed + draw)

        def leaf(tensor: Tensor) -> Tensor:
            value = tensor.detach().to(dtype, copy=True)
            if draw:
                by = torch.rand(value.shape, generator=generator, dtype=dtype) * 2 - 1
                value.addcmul_(value, by.to(value.device), value=torch.finfo(dtype).eps)
            return value.requires_grad_()

        leaves = {k: leaf(t) for k, t in self._leaves(self.module).items()}
        weights = [leaves[name] for name, _ in self.module.named_parameters()]
        cell = case.cell.removesuffix("_cell")
        x, state = leaves["input"], [leaves[f"hx[{k}]"] for k in range(len(self.state))]
        fresh = [leaves[f"reset_state[{k}]"] for k in range(len(self.fresh))]
        with self._seeded():
            torch.manual_seed(case.seed)
            if case.is_step:
                initial = state or [x.new_zeros(case.batch, case.hidden_size)] * (
                    reference.CELLS[cell].n_states
                )
                new = reference.cell_step(cell, x, tuple(initial), weights)
                new = tuple(part.squeeze(0) for part in new) if case.unbatched else new
                return self._with_gradients(dict(zip(("h", "c"), new, strict=False)), leaves)
            results = self._oracle_layers(cell, x, state, weights, fresh)
            return self._with_gradients(results, leaves)

    def _oracle_layers(
        self,
        cell: str,
        x: Tensor,
        state: list[Tensor],
        weights: Sequence[Tensor],
        fresh: list[Tensor],
    ) -> dict[str, Tensor]:
        """What the module computes, by the reference: packed batches as padded ones."""
        case, reset = self.case, self.given.get("reset")
        lengths: Any = self.given.get("lengths")
        order = torch.arange(case.batch, device=x.device)
        if self.lengths is not None:
            lengths = self.lengths.to(x.device)
            # Masks are drawn for the sequences in the order in which they are packed.
            order = lengths.argsort(descending=True)
            lengths = lengths[order]
            reset = None if reset is None else reset[:, order]
        fresh = [part.expand(-1, case.batch, -1)[:, order] for part in fresh]
        options = Options(
            bidirectional=case.bidirectional,
            training=case.training,
            lengths=lengths,
            reset=reset,
            bptt=case.bptt,
            recurrent_dropout=case.recurrent_dropout,
            zoneout=case.zoneout,
        )
        weights = self._dropped(weights)
        # Noise is drawn in the dtype under test.
        flow, _ = sequences.flow_of(options, self.input[:, order], None, self.shapes, fresh)
        noise = [part.to(x.dtype) for part in flow.noise]
        flow = flow._replace(noise=noise)
        inputs = [x[:, order]]

        def dropout(y: Tensor) -> Tensor:
            ones = torch.ones(y.shape, dtype=self.dtype, device=y.device)
            if self.lengths is not None and not self._is_padded:
                ones = pack_padded_sequence(ones, lengths.cpu()).data
            mask = torch.dropout(ones, case.dropout, case.training).to(y.dtype)
            if self.lengths is not None and not self._is_padded:
                packed = pack_padded_sequence(y, lengths.cpu())
                mask, _ = pad_packed_sequence(packed._replace(data=mask), total_length=len(y))
            inputs.append(y * mask)
            return inputs[-1]

        results, final = reference.stack(
            cell,
            inputs[0],
            [part[:, order] for part in state],
            weights,
            case.num_layers,
            bidirectional=case.bidirectional,
            flow=flow,
            dropout=dropout,
        )
        back = order.argsort()
        output, states = results[-1].y, {}
        if self.lengths is not None:
            output = pack_padded_sequence(output, lengths.cpu()).data
        if case.return_states:
            h_0 = state[0][:, order] if state else x.new_zeros(self.shapes[0])
            per_direction = len(weights) // self.shapes[0][0]
            is_gates = case.return_states == "gates"
            gates = (cell, inputs, h_0, weights, per_direction, flow) if is_gates else None
            found = sequences.states_of(results, 2 if case.bidirectional else 1, gates)
            states = {k: t[:, :, back] for k, t in _named_states(found).items()}
        final = [part[:, back] for part in final]
        if case.unbatched:
            output = output.squeeze(1)
            final = [part.squeeze(1) for part in final]
            states = {k: t.squeeze(2) for k, t in states.items()}
        elif case.batch_first and self.lengths is None:
            output = output.transpose(0, 1)
        return {"output": output} | _named(_FINAL, final) | states

    @property
    def _is_padded(self) -> bool:
        """Whether a packed batch is run as a padded one, so that dropout is drawn for all of it."""
        case = self.case
        is_noisy = case.zoneout > 0 or (case.training and case.recurrent_dropout > 0)
        marks = (case.reset, case.bptt, case.return_states)
        return is_noisy or any(marks) or type(case.recompute) is int

    def _dropped(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Weights after their dropout, those of heads as one matrix."""
        case, dropped = self.case, []
        for (name, _), weight in zip(self.module.named_parameters(), weights, strict=True):
            if name.startswith("weight_hh"):
                if case.weight_dropout and case.training:
                    ones = torch.ones(weight.shape, dtype=self.dtype, device=weight.device)
                    weight = weight * torch.dropout(ones, case.weight_dropout, True).to(
                        weight.dtype
                    )
                if case.num_heads > 1:
                    units = case.hidden_size // case.num_heads
                    heads = weight.view(-1, case.num_heads, units, units)
                    weight = torch.cat([torch.block_diag(*gate) for gate in heads])
            dropped.append(weight)
        return dropped

    def _with_gradients(
        self, results: dict[str, Tensor], leaves: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Add the gradient of every leaf for fixed random cotangents of all results."""
        generator = torch.Generator().manual_seed(self.cotangent_seed)
        cotangents = [
            torch.randn(t.shape, generator=generator).to(self.device, self.dtype).to(t.dtype)
            for t in results.values()
        ]
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
    """The same values, every second element of a larger tensor."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


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
    worst : Deviation or None
        The largest in units.
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
        """Count one case."""
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
    """A case that went wrong: what, and how to run it again."""

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
        Number of cases for each dtype; case k is of cell ``cells[k % len(cells)]``.
    seed : int, default 0
    device : str, default 'cpu'
    only : int, optional
        Run just the case of this index, for every cell given.
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
            for path in ("planned", "loop")
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
            for path in ("planned", "loop"):
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
