"""Diagnose recurrent layers: gradients over time, saturation, recurrent weights.

``diagnose`` runs a module through ``reference.py`` and has autograd compute the gradient of every
state at every step, which is exact but slow.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from . import planner, reference
from .cells import CELLS
from .nn import REPLACEMENTS, _Layers, plain_class
from .options import States
from .reference import State

#: Gradients vanish if the ratio of the first step's norm to the last step's is below this.
VANISHING = 1e-3
#: Gradients explode if that ratio is above this.
EXPLODING = 1e3
#: A sigmoid is saturated below LOW and above HIGH, a tanh below -HIGH and above HIGH.
LOW, HIGH = 0.05, 0.95
#: Fraction of saturated values above which the verdict calls an activation saturated.
SATURATED = 0.5

_TANH = ("g", "n", "tanh(c)")


class Trajectory(NamedTuple):
    """A state of a direction over time.

    Norms are taken over the units, and averaged as root mean squares over the sequences that
    have the step.

    Attributes
    ----------
    norm : Tensor of shape (T,)
        Norm of the state.
    gradient : Tensor of shape (T,)
        Norm of dL/dh_t (dL/dc_t), the total derivative through all later steps and layers.
    first, last : float
        Norm of the gradient at the first and the last step of each sequence, in the order in which
        the direction runs.
    distance : float
        Average number of steps between the first and the last.
    """

    norm: Tensor
    gradient: Tensor
    first: float
    last: float
    distance: float

    @property
    def ratio(self) -> float:
        """`first` over `last`."""
        return self.first / self.last if self.last else math.nan

    @property
    def per_step(self) -> float:
        """The average factor by which the gradient norm changes per step, going backward."""
        return self.ratio ** (1 / self.distance) if self.distance else math.nan


class Activation(NamedTuple):
    """The fractions of an activation's values that are saturated.

    Attributes
    ----------
    low, high : float
        Fraction of values below 0.05 and above 0.95; of a tanh, below -0.95 and above 0.95. For a
        relu, `low` is the fraction of zeros, and `high` is 0.
    """

    low: float
    high: float


class Spectrum(NamedTuple):
    """The spectrum of a gate's recurrent weights, multiplied by the projection's if there is one.

    With heads, the values are the largest over all heads.

    Attributes
    ----------
    radius : float
        Spectral radius.
    largest : float
        Largest singular value.
    """

    radius: float
    largest: float


@dataclass(frozen=True)
class Direction:
    """The findings for one direction of one layer.

    Attributes
    ----------
    name : str
        Suffix of its parameter names: ``l0``, ``l0_reverse``.
    states : dict of str to Trajectory
        Keyed by 'h', 'c' and any other states of the cell.
    activations : dict of str to Activation
        Keyed by the gates (i, f, g, o or r, z, n) and, for an LSTM, 'tanh(c)', the factor of the
        output gate; by 'h' for an Elman network. Empty for cells that do not expose their gates.
    weights : dict of str to Spectrum
        Keyed by the same gates; by 'h' for an Elman network.
    verdict : str
        A summary in words.
    """

    name: str
    states: dict[str, Trajectory]
    activations: dict[str, Activation]
    weights: dict[str, Spectrum]
    verdict: str


@dataclass(frozen=True)
class Diagnosis:
    """The findings of `diagnose`; ``print`` shows them as tables.

    Attributes
    ----------
    module : str
        Name of the module's class.
    loss : float
        Value of L.
    directions : tuple of Direction
        The directions of all layers, in the order of ``h_n``.
    """

    module: str
    loss: float
    directions: tuple[Direction, ...]

    def __str__(self) -> str:
        steps = len(self.directions[0].states["h"].norm)
        states = [
            (one.name, name, _mean(s.norm), s.first, s.last, s.ratio, s.per_step)
            for one in self.directions
            for name, s in one.states.items()
        ]
        gates = []
        for one in self.directions:
            for name in dict.fromkeys([*one.weights, *one.activations]):
                low, high = one.activations.get(name, (math.nan, math.nan))
                spectrum = one.weights.get(name, (math.nan, math.nan))
                gates.append((one.name, name, f"{low:.0%}", f"{high:.0%}", *spectrum))
        heads = (
            ("layer", "state", "norm", "dL first", "dL last", "ratio", "per step"),
            ("layer", "gate", "low", "high", "radius", "largest"),
        )
        return "\n".join(
            [
                f"{self.module}, {steps} steps, loss {self.loss:.4g}",
                "",
                "norms of states, and of their gradients at the first and the last step",
                *_table(heads[0], states),
                "",
                f"shares of activations below {LOW} (tanh -{HIGH}, relu 0), above {HIGH}; weights",
                *_table(heads[1], gates),
                "",
                *(f"{one.name}: {one.verdict}" for one in self.directions),
            ]
        )

    def plot(self, path: Any = None) -> Any:
        """Plot gradient norms over time, and saturation.

        Parameters
        ----------
        path : str or path-like, optional
            File to save the figure to.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        try:
            import matplotlib
        except ImportError as error:
            raise ImportError("plot needs matplotlib: pip install matplotlib") from error
        with matplotlib.rc_context(_STYLE):
            figure = _draw(self)
            if path is not None:
                figure.savefig(os.path.expanduser(path), dpi=120)
        return figure


def diagnose(
    module: torch.nn.Module,
    input: Any,
    hx: Any = None,
    *,
    lengths: Tensor | None = None,
    reset: Any = None,
    reset_state: Any = None,
    bptt: int | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
) -> Diagnosis:
    """Examine every layer and direction of a sequence module on one batch.

    Parameters
    ----------
    module : torch.nn.Module
        A layer of this package, or a torch.nn.LSTM, GRU or RNN. In training mode dropout is
        active, as in any call. No gradients are accumulated into its parameters.
    input, hx, lengths, reset, reset_state, bptt
        As for the module.
    loss : callable, optional
        ``loss(output, hx)`` is called with the results of the module and returns L, a tensor of
        one element. By default L is the sum of squares of the last layer's final states h_n, which
        depends on earlier steps only through the recurrence, so the gradients at those steps show
        how well the layers carry a gradient through time. A loss on all outputs would hide that,
        because it adds a direct gradient at every step.

    Returns
    -------
    Diagnosis

    Raises
    ------
    TypeError
        If `module` is of another class.
    ValueError
        If L is not a single number that depends on the module's results, or if the module raises
        one for its arguments.

    Notes
    -----
    Gradients vanish or explode as products of the Jacobians of many steps do (Bengio, Simard
    & Frasconi 1994; Pascanu, Mikolov & Bengio 2013, arXiv:1211.5063). They are certain to vanish if
    the recurrent weights have a spectral radius below 1 in a linear network, or a largest singular
    value below 1 in a network of tanh units. Everything is computed in the dtype of the module;
    gradients that underflow in it are reported as 0.

    Examples
    --------
    >>> import torch, fastrnn
    >>> rnn = fastrnn.RNN(4, 8, nonlinearity="identity", bias=False)
    >>> with torch.no_grad():
    ...     _ = rnn.weight_hh_l0.copy_(0.5 * torch.eye(8))
    >>> found = fastrnn.diagnose(rnn, torch.randn(20, 3, 4))
    >>> layer = found.directions[0]
    >>> round(layer.states["h"].per_step, 3), round(layer.weights["h"].radius, 3)
    (0.5, 0.5)
    >>> print(layer.verdict)
    gradients vanish: the first step's are 1.9e-06 times the last step's, a factor of 0.5 a step
    """
    own = _ours(module)
    is_packed = isinstance(input, PackedSequence)
    data = input.data if is_packed else input
    if not data.requires_grad:
        # Every state gets a gradient, even if parameters are frozen.
        data = data.detach().requires_grad_()
    input = input._replace(data=data) if is_packed else data
    record: list[State] = []
    with torch.enable_grad():
        with planner.use_path("reference"), reference.watch(record):
            output, hidden, states = own(
                input,
                hx,
                lengths=lengths,
                reset=reset,
                reset_state=reset_state,
                return_states="gates" if CELLS[own._cell].activations else True,
                bptt=bptt,
            )
        value = _squares(own, hidden) if loss is None else loss(output, hidden)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise ValueError("loss must return a tensor of one element that depends on its arguments")
    found = iter(
        torch.autograd.grad(value, [part for new in record for part in new], allow_unused=True)
    )
    gradients: list[State] = []
    for new in record:
        grads = [next(found) for _ in new]
        gradients.append(
            tuple(
                torch.zeros_like(part) if grad is None else grad
                for part, grad in zip(new, grads, strict=True)
            )
        )
    run = _Run(own, input, lengths, record, gradients, states)
    count = own.num_layers * run.directions
    return Diagnosis(
        type(module).__name__, float(value.detach()), tuple(run.direction(n) for n in range(count))
    )


def _ours(module: torch.nn.Module) -> Any:
    if isinstance(module, _Layers):
        return module
    replacement: Any = REPLACEMENTS.get(plain_class(module))
    if replacement is None or not issubclass(replacement, _Layers):
        raise TypeError(
            "diagnose expects a layer of fastrnn, or a torch.nn.LSTM, GRU or RNN, "
            f"got {type(module).__name__}"
        )
    return replacement.from_torch(module)


def _squares(module: Any, hidden: Any) -> Tensor:
    h_n = hidden if isinstance(hidden, Tensor) else hidden[0]
    return h_n[-2 if module.bidirectional else -1 :].square().sum()


class _Run:
    """The records of one run of a module, and the findings derived from them."""

    def __init__(
        self,
        module: Any,
        input: Any,
        lengths: Any,
        record: list[State],
        gradients: list[State],
        states: States,
    ) -> None:
        self.module, self.record, self.gradients = module, record, gradients
        self.cell, self.directions = module._cell, 2 if module.bidirectional else 1
        # (T, L * D, B, ·), for unbatched input as well
        gates = states.gates
        self.gates = gates if gates is None or gates.dim() == 4 else gates.unsqueeze(2)
        steps, batch = states.h.shape[0], 1 if states.h.dim() == 3 else states.h.shape[2]
        self.order = None
        if isinstance(input, PackedSequence):
            self.order = input.unsorted_indices
            _, lengths = pad_packed_sequence(input)
        self.lengths = torch.full((batch,), steps, device="cpu")
        if lengths is not None:
            self.lengths = torch.as_tensor(lengths, device="cpu").detach().reshape(-1)
        #: Whether a sequence has a step, (T, B).
        self.there = torch.arange(steps, device="cpu")[:, None] < self.lengths

    def direction(self, n: int) -> Direction:
        """Collect the findings for the n-th direction, in the order of ``h_n``."""
        layer, d = divmod(n, self.directions)
        name = f"l{layer}{'_reverse' if d else ''}"
        names = [field for field in States._fields if field != "gates"]
        states = {names[k]: self._trajectory(n, k) for k in range(CELLS[self.cell].n_states)}
        activations, weights = self._activations(n), self._weights(name)
        verdict = _verdict(states["h"], activations)
        return Direction(name, states, activations, weights, verdict)

    def _series(self, record: list[State], n: int, k: int) -> Tensor:
        """A state or its gradient, (T, B, width), in the order of time and of the input's batch."""
        heads, steps = self.module.num_heads, len(self.there)
        layer, d = divmod(n, self.directions)
        parts = []
        for head in range(heads):
            start = ((layer * heads + head) * self.directions + d) * steps
            parts.append(torch.stack([new[k] for new in record[start : start + steps]]))
        series = torch.cat(parts, dim=-1).detach()
        series = series.flip(0) if d else series
        if self.order is not None:
            series = series.index_select(1, self.order)
        # float64, so that squares do not underflow.
        return series.cpu().double().masked_fill(~self.there[..., None], 0.0)

    def _trajectory(self, n: int, k: int) -> Trajectory:
        norm, gradient = (
            self._series(record, n, k).norm(dim=-1) for record in (self.record, self.gradients)
        )
        rows = (self.lengths > 0).nonzero()[:, 0]
        lengths = self.lengths[rows]
        ends = [gradient[0, rows], gradient[lengths - 1, rows]]
        first, last = (float(_rms(part, len(rows))) for part in ends)
        if n % self.directions:
            first, last = last, first
        counts = self.there.sum(1)
        return Trajectory(
            _rms(norm, counts), _rms(gradient, counts), first, last, _mean(lengths - 1)
        )

    def _activations(self, n: int) -> dict[str, Activation]:
        values = {}
        if self.gates is not None:
            gates = self.gates[:, n].detach().cpu()[self.there]
            names = CELLS[self.cell].gates
            values = dict(zip(names, gates.chunk(len(names), dim=-1), strict=True))
        if self.cell in ("lstm", "peephole_lstm"):
            values["tanh(c)"] = self._series(self.record, n, 1)[self.there].tanh()
        if self.cell in ("rnn_tanh", "rnn_relu"):
            values["h"] = self._series(self.record, n, 0)[self.there]
        found = {}
        for name, value in values.items():
            low, high = LOW, HIGH
            if name in _TANH or self.cell == "rnn_tanh":
                low = -HIGH
            if self.cell == "rnn_relu":
                low, high = 0.0, math.inf
            found[name] = Activation(_mean(value <= low), _mean(value >= high))
        return found

    def _weights(self, name: str) -> dict[str, Spectrum]:
        module, cell = self.module, CELLS[self.cell]
        # The weights of this run: recomputing parametrizations may have side effects.
        flat = dict(zip(module._flat_weights_names, module._flat_weights, strict=True))
        w_hh = flat[f"weight_hh_{name}"].detach().cpu().double()
        w_hr = flat.get(f"weight_hr_{name}")
        names = cell.gates
        found = {}
        for gate, blocks in zip(names, w_hh.chunk(cell.n_gates), strict=True):
            blocks = blocks.unflatten(0, (module.num_heads, -1))
            if w_hr is not None:
                blocks = blocks @ w_hr.detach().cpu().double()
            if blocks.isfinite().all():
                radius = torch.linalg.eigvals(blocks).abs().max()
                largest = torch.linalg.matrix_norm(blocks, 2).max()
                found[gate] = Spectrum(float(radius), float(largest))
        return found


def _rms(norms: Tensor, counts: Any) -> Tensor:
    """Root mean square over the last dimension, of which `counts` elements are not padding."""
    mean = norms.square().sum(-1) / torch.as_tensor(counts, device=norms.device).clamp(min=1)
    return mean.sqrt()


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if values.numel() else math.nan


def _verdict(h: Trajectory, activations: dict[str, Activation]) -> str:
    if not math.isfinite(h.first + h.last + float(h.gradient.sum())):
        found = ["gradients are not finite"]
    elif not h.gradient.any():
        found = ["no gradient arrives"]
    elif not h.distance or not h.last:
        found = ["gradients cannot be compared: there is none at the last step, or no other step"]
    elif not h.first:
        found = ["no gradient reaches the first step"]
    else:
        what = "vanish" if h.ratio < VANISHING else "explode" if h.ratio > EXPLODING else "pass"
        found = [
            f"gradients {what}: the first step's are {h.ratio:.2g} times the last step's, "
            f"a factor of {h.per_step:.3g} a step"
        ]
    for name, (low, high) in activations.items():
        for share, end in ((low, "low"), (high, "high")):
            if share > SATURATED:
                found.append(f"{name} is saturated: {share:.0%} {end}")
    return "; ".join(found)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Format a table: names left-aligned, numbers right-aligned, a dash for NaN."""
    texts = [[_text(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *texts, strict=True)]
    return [
        "  ".join(
            text.ljust(width) if k < 2 else text.rjust(width)
            for k, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *texts)
    ]


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else f"{value:.3g}"
    return "-" if text in ("nan", "nan%") else text


# Blue and orange are distinguishable with any color vision.
_BLUE, _ORANGE, _INK = "#2563ab", "#d9730d", "#3c4043"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "axes.edgecolor": "#9aa0a6",
    "legend.frameon": False,
}


def _draw(diagnosis: Diagnosis) -> Any:
    """Draw gradients on the left, one panel per state, and saturation, if known, on the right."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    directions = diagnosis.directions
    states = list(directions[0].states)
    bars: list[tuple[str, Activation | None]] = []
    for one in directions:
        bars += [(_title(one.name), None), *one.activations.items()] if one.activations else []
    height = max(1.2 + 2.4 * len(states), 1.5 + 0.24 * len(bars), 3.6)
    columns = 2 if bars else 1
    figure = Figure(figsize=(5 + 3 * columns, height), layout="constrained")
    grid = figure.add_gridspec(len(states), columns, width_ratios=[3, 2][:columns])
    last_layer = _layer(directions[-1].name)
    for row, state in enumerate(states):
        axes = figure.add_subplot(grid[row, 0])
        for one in directions:
            gradient = one.states[state].gradient
            axes.plot(
                # A gap where the gradient is 0: the axis is logarithmic.
                torch.where(gradient > 0, gradient, math.nan).tolist(),
                color=colormaps["viridis"](0.8 * _layer(one.name) / max(1, last_layer)),
                ls="--" if one.name.endswith("reverse") else "-",
                marker="o" if len(gradient) == 1 else None,
                label=_title(one.name),
                lw=1.6,
            )
        axes.set_yscale("log")
        axes.set_title(f"Gradient norm of {state}", loc="left", fontweight="bold")
        axes.set_ylabel(f"‖dL/d{state}‖")
        axes.set_xlabel("step t")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=min(len(labels), 6))
    if bars:
        _draw_saturation(figure.add_subplot(grid[:, 1]), bars)
    title = f"{diagnosis.module}, loss {diagnosis.loss:.4g}"
    figure.suptitle(title, fontsize=12, fontweight="bold")
    return figure


def _draw_saturation(axes: Any, bars: Sequence[tuple[str, Activation | None]]) -> None:
    """Draw a bar to each side for every activation, under the name of its direction."""
    for y, (_, activation) in enumerate(bars):
        if activation is None:
            continue
        for share, sign, color in zip(activation, (-1, 1), (_BLUE, _ORANGE), strict=True):
            axes.barh(y, sign * share, color=color, height=0.7)
            axes.annotate(
                f"{share:.0%}", (sign * share, y), xytext=(sign * 4, 0),
                textcoords="offset points", va="center", ha="left" if sign > 0 else "right",
                fontsize=7.5, color=_INK,
            )  # fmt: skip
    axes.axvline(0, color=_INK, lw=1)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    for label, (_, activation) in zip(axes.get_yticklabels(), bars, strict=True):
        label.set_fontweight("bold" if activation is None else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(-1.15, 1.15)
    ticks = (-1, -SATURATED, 0, SATURATED, 1)
    axes.set_xticks(ticks, [f"{abs(share):.0%}" for share in ticks])
    axes.grid(axis="y", visible=False)
    axes.set_title("Saturated activations", loc="left", fontweight="bold")
    axes.set_xlabel(f"below {LOW}, tanh -{HIGH}, relu 0    |    above {HIGH}", fontsize=8)


def _title(name: str) -> str:
    return name.replace("l", "layer ", 1).replace("_", ", ")


def _layer(name: str) -> int:
    return int(name.partition("_")[0].removeprefix("l"))
