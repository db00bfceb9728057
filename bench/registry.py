"""The cases that are measured, and the suites made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

LAYERS = ("lstm", "gru", "rnn")
STEPS = ("lstm_cell", "gru_cell", "rnn_cell")
CELLS = LAYERS + STEPS
MODES = ("forward", "training")
DTYPES = ("float32", "bfloat16", "float16", "float64")
SUITES = ("quick", "full")


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes
    ----------
    cell : str
        One of ``CELLS``: a layer, or a cell module that runs a single step.
    mode : {'forward', 'training'}
        Inference without autograd, or forward and backward with all gradients.
    dtype : str
        Name of a torch dtype.
    steps, batch, input_size, hidden_size : int
        T, B, I and H; T is 1 for a cell module.
    num_layers : int, default 1
    bidirectional : bool, default False
    ragged : bool, default False
        Whether the input is a PackedSequence of lengths from T/4 to T.
    """

    cell: str
    mode: str
    dtype: str
    steps: int
    batch: int
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False
    ragged: bool = False

    @property
    def lengths(self) -> list[int]:
        """Of the sequences, the longest first."""
        shortest = -(-self.steps // 4) if self.ragged else self.steps
        span, last = self.steps - shortest, max(1, self.batch - 1)
        return [self.steps - span * b // last for b in range(self.batch)]

    @property
    def flops(self) -> float:
        """Operations in the products alone; in training three times those of inference."""
        gates = {"lstm": 4, "gru": 3, "rnn": 1}[self.cell.removesuffix("_cell")]
        directions = 2 if self.bidirectional else 1
        deeper = (self.num_layers - 1) * directions * (directions + 1) * self.hidden_size
        columns = directions * (self.input_size + self.hidden_size) + deeper
        passes = 3 if self.mode == "training" else 1
        return 2.0 * passes * sum(self.lengths) * gates * self.hidden_size * columns

    @property
    def is_step(self) -> bool:
        """Whether the case is a cell module."""
        return self.cell in STEPS

    @property
    def stack(self) -> str:
        """What is beyond one plain layer: '', '2 layers', '2 layers, bidirectional', 'ragged'..."""
        layers = [f"{self.num_layers} layers"] * (self.num_layers > 1)
        others = ["bidirectional"] * self.bidirectional + ["ragged"] * self.ragged
        return ", ".join(layers + others)

    @property
    def shape(self) -> str:
        """Everything but the cell and the mode, for the axis of a plot."""
        sizes = f"T{self.steps} B{self.batch} H{self.hidden_size}"
        dtype = {"float32": "", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}[
            self.dtype
        ]
        stack = f"{self.num_layers}L" * (self.num_layers > 1) + " bi" * self.bidirectional
        stack += " ragged" * self.ragged
        return " ".join(part for part in (sizes, dtype, stack) if part)


# (T, B, H) from the latency of a single short sequence to what only GEMMs bound. The GPU's
# shapes start higher: below them everything there is launch latency.
_QUICK_SHAPES = {
    "cpu": [(32, 1, 64), (128, 1, 256), (128, 8, 64), (128, 8, 256), (64, 32, 128), (128, 64, 256)],
    "cuda": [
        (128, 1, 256),
        (128, 8, 256),
        (128, 64, 256),
        (1024, 8, 128),
        (256, 32, 512),
        (128, 128, 1024),
    ],
}
# Which of those shapes a cell other than the LSTM is measured at.
_QUICK_PICKS = {"lstm": range(6), "gru": (0, 1, 3, 4), "rnn": (0, 3, 4)}
# On a CPU without half-precision units torch takes 20 times longer than in float32.
_QUICK_HALF_SHAPE = {"cpu": (32, 8, 64), "cuda": (128, 64, 256)}
_QUICK_STACK_SHAPE = (64, 8, 128)
_QUICK_STEPS = [("forward", 1, 128), ("training", 32, 256)]

_FULL_STEPS = (16, 64, 256, 1024)
_FULL_BATCHES = (1, 8, 32, 128)
_FULL_HIDDEN = (64, 128, 256, 512, 1024)
# On a CPU, where the largest of these take seconds a call: (T, B, H) in float32, and in bfloat16.
_FULL_CPU_SHAPES = [
    *product((128,), (1, 8, 64), (64, 256, 512, 1024)),
    *product((32,), (1, 8, 64), (64, 512)),
    *product((512,), (1, 8), (64, 512)),
    (512, 64, 64),
]
_FULL_CPU_HALF_SHAPES = [(128, 1, 256), (128, 8, 64), (32, 8, 256)]
_FULL_RAGGED_SHAPES = [(128, 8, 64), (128, 8, 256), (128, 64, 256)]

# What the axes that were not asked for are, when others were.
_AXES: dict[str, dict[str, Sequence[int]]] = {
    "quick": {"steps": (128,), "batch": (1, 8, 64), "hidden": (64, 256)},
    "full": {"steps": _FULL_STEPS, "batch": _FULL_BATCHES, "hidden": _FULL_HIDDEN},
}


def quick(device: str) -> list[Case]:
    """Every cell in both modes at a few sizes; some two minutes.

    Parameters
    ----------
    device : {'cpu', 'cuda'}

    Returns
    -------
    list of Case
    """
    shapes = _QUICK_SHAPES[device]
    cases = [
        _case(cell, mode, "float32", *shapes[pick])
        for cell, picks in _QUICK_PICKS.items()
        for pick in picks
        for mode in MODES
    ]
    cases += [_case("lstm", mode, "bfloat16", *_QUICK_HALF_SHAPE[device]) for mode in MODES]
    cases += [
        _case(cell, "training", "float32", *_QUICK_STACK_SHAPE, num_layers=2, bidirectional=True)
        for cell in ("lstm", "gru")
    ]
    cases += [
        _case(cell, mode, "float32", 1, batch, hidden)
        for cell in STEPS
        for mode, batch, hidden in _QUICK_STEPS
    ]
    return cases


def full(device: str) -> list[Case]:
    """Every cell in both modes over a grid of sizes and dtypes; hundreds of cases.

    Parameters
    ----------
    device : {'cpu', 'cuda'}

    Returns
    -------
    list of Case
    """
    # Half of the grid, as the squares of one colour of a chessboard: every value of an axis
    # still meets every value of each other axis.
    shapes = [
        (steps, batch, hidden)
        for (i, steps), (j, batch), (k, hidden) in product(
            enumerate(_FULL_STEPS), enumerate(_FULL_BATCHES), enumerate(_FULL_HIDDEN)
        )
        if (i + j + k) % 2 == 0
    ]
    # The dtype changes the speed of the GEMMs, hardly how it depends on T: one T is enough.
    half_shapes = [shape for shape in shapes if shape[0] == 64]
    half = ("bfloat16",) if device == "cpu" else ("bfloat16", "float16")
    if device == "cpu":
        shapes, half_shapes = _FULL_CPU_SHAPES, _FULL_CPU_HALF_SHAPES
    cases = [
        _case(cell, mode, dtype, *shape)
        for dtype in ("float32", *half)
        for cell, shape, mode in product(
            LAYERS, shapes if dtype == "float32" else half_shapes, MODES
        )
    ]
    cases += [
        dataclasses.replace(_case(cell, mode, "float32", *shape), ragged=True)
        for cell, shape, mode in product(LAYERS, _FULL_RAGGED_SHAPES, MODES)
    ]
    cases += [
        _case(cell, mode, "float32", *_QUICK_STACK_SHAPE, num_layers=2, bidirectional=both)
        for cell, mode, both in product(LAYERS, MODES, (False, True))
    ]
    cases += [
        _case(cell, mode, "float32", 1, batch, hidden)
        for cell, mode, batch, hidden in product(STEPS, MODES, _FULL_BATCHES, _FULL_HIDDEN)
        if (batch in (1, 32)) == (hidden in (64, 256, 1024)) and batch * hidden < 2**16
    ]
    return cases


def select(
    suite: str,
    device: str,
    *,
    cells: Sequence[str] | None = None,
    steps: Sequence[int] | None = None,
    batch: Sequence[int] | None = None,
    hidden: Sequence[int] | None = None,
    dtype: Sequence[str] | None = None,
) -> list[Case]:
    """Choose the cases to measure.

    Parameters
    ----------
    suite : {'quick', 'full'}
    device : {'cpu', 'cuda'}
    cells, steps, batch, hidden, dtype : sequence, optional
        If any is given, the cases are the product of the given values in both modes
        instead of the suite; the suite then gives the values of the other axes.

    Returns
    -------
    list of Case
        Without duplicates, in the order of ``CELLS``.

    Examples
    --------
    >>> from fastrnn.bench.registry import select
    >>> [case.shape for case in select("quick", "cpu", cells=["gru"], steps=[16], batch=[2])]
    ['T16 B2 H64', 'T16 B2 H64', 'T16 B2 H256', 'T16 B2 H256']
    """
    if not any((cells, steps, batch, hidden, dtype)):
        return _grouped({"quick": quick, "full": full}[suite](device))
    axes = _AXES[suite]
    return _grouped(
        _case(cell, mode, of, *shape)
        for of in dtype or ("float32",)
        for cell in cells or LAYERS
        for shape in product(
            steps or axes["steps"], batch or axes["batch"], hidden or axes["hidden"]
        )
        for mode in MODES
    )


def _case(
    cell: str,
    mode: str,
    dtype: str,
    steps: int,
    batch: int,
    hidden: int,
    num_layers: int = 1,
    bidirectional: bool = False,
) -> Case:
    steps = 1 if cell in STEPS else steps
    return Case(cell, mode, dtype, steps, batch, hidden, hidden, num_layers, bidirectional)


def _grouped(cases: Iterable[Case]) -> list[Case]:
    return sorted(dict.fromkeys(cases), key=lambda case: CELLS.index(case.cell))
