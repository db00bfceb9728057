"""The benchmark's cases, and the suites made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from ..cells import CELLS as DEFINITIONS

LAYERS = ("lstm", "gru", "rnn")
VARIANTS = ("peephole_lstm", "slstm", "layernorm_lstm", "layernorm_gru", "gru_reset_before")
STEPS = ("lstm_cell", "gru_cell", "rnn_cell")
CELLS = LAYERS + VARIANTS + STEPS
MODES = ("forward", "training")
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Case:
    """A case to measure.

    Attributes
    ----------
    cell : str
        One of ``CELLS``: a layer, from torch.nn or not, or a cell module, which runs a single step.
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
    proj_size : int, default 0
        Size of an LSTM's projected h; 0 for no projection.
    recurrent_dropout, zoneout : float, default 0.0
    num_heads : int, default 1
    members : int, default 0
        How many layers of these sizes share the input, as an ensemble; 0 for a single layer.
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
    proj_size: int = 0
    recurrent_dropout: float = 0.0
    zoneout: float = 0.0
    num_heads: int = 1
    members: int = 0

    @property
    def lengths(self) -> list[int]:
        """Lengths of the sequences, the longest first."""
        shortest = -(-self.steps // 4) if self.ragged else self.steps
        span, last = self.steps - shortest, max(1, self.batch - 1)
        return [self.steps - span * b // last for b in range(self.batch)]

    @property
    def name(self) -> str:
        """The cell, the mode and the shape in one line."""
        return f"{self.cell} {self.mode} {self.shape}"

    @property
    def kind(self) -> str:
        """Key of ``reference.CELLS``."""
        return {"rnn": "rnn_tanh"}.get(kind := self.cell.removesuffix("_cell"), kind)

    @property
    def is_noisy(self) -> bool:
        """Whether recurrent dropout or zoneout is used."""
        return bool(self.recurrent_dropout or self.zoneout)

    @property
    def is_beyond_torch(self) -> bool:
        """Whether torch.nn has no module with the same results."""
        return self.cell in VARIANTS or self.is_noisy or self.num_heads > 1

    @property
    def stock(self) -> Case:
        """The same case with torch.nn's layer that has as many gates."""
        if not self.is_beyond_torch:
            return self
        cell = {3: "gru", 4: "lstm"}[self.gates] if self.cell in VARIANTS else self.cell
        return dataclasses.replace(self, cell=cell, recurrent_dropout=0.0, zoneout=0.0, num_heads=1)

    @property
    def plain(self) -> Case:
        """The case of `stock` with one direction and no projection."""
        return dataclasses.replace(self.stock, bidirectional=False, proj_size=0)

    @property
    def parts(self) -> int:
        """How many separate products a step has: one for each head or member."""
        return max(self.num_heads, self.members)

    @property
    def gates(self) -> int:
        """How many times H columns the recurrent weights have."""
        return DEFINITIONS[self.kind].n_gates

    @property
    def is_half(self) -> bool:
        """Whether the dtype is a half-precision one."""
        return self.itemsize == 2

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]

    @property
    def directions(self) -> int:
        """1 or 2."""
        return 2 if self.bidirectional else 1

    @property
    def output_size(self) -> int:
        """P, the size of h: that of the projection, or H."""
        return self.proj_size or self.hidden_size

    @property
    def recurrent_weights(self) -> int:
        """Elements of the matrices that one direction of a layer needs at every step."""
        gates = self.gates * self.hidden_size * self.output_size // self.num_heads
        return max(1, self.members) * (gates + self.hidden_size * self.proj_size)

    @property
    def weights(self) -> int:
        """Elements of all weight matrices."""
        deeper = (self.num_layers - 1) * self.directions * self.output_size
        inputs = self.gates * self.hidden_size * (self.input_size + deeper) * max(1, self.members)
        return self.directions * (inputs + self.num_layers * self.recurrent_weights)

    @property
    def flops(self) -> float:
        """Operations in the products alone; for training, three times those of inference."""
        passes = 3 if self.mode == "training" else 1
        return 2.0 * passes * sum(self.lengths) * self.weights

    @property
    def min_bytes(self) -> float:
        """Bytes that any implementation must move: input, output and weights, once per pass.

        In training, forward reads x and the weights and writes y; backward reads all three and dy,
        and writes the gradients of x and of the weights.
        """
        rows = sum(self.lengths)
        deeper = (self.num_layers - 1) * self.directions * self.output_size
        inputs = rows * (self.input_size + deeper)
        outputs = rows * self.num_layers * self.directions * self.output_size * max(1, self.members)
        once = inputs + outputs + self.weights
        return float(self.itemsize * (3 * once if self.mode == "training" else once))

    @property
    def is_step(self) -> bool:
        """Whether the case is a cell module."""
        return self.cell in STEPS

    @property
    def stack(self) -> str:
        """What exceeds one plain layer: '', '2 layers, bidirectional', 'ragged', '8 heads'..."""
        layers = [f"{self.num_layers} layers"] * (self.num_layers > 1)
        others = ["bidirectional"] * self.bidirectional + ["ragged"] * self.ragged
        others += [f"projected to {self.proj_size}"] * (self.proj_size > 0)
        others += [f"recurrent dropout {self.recurrent_dropout:g}"] * bool(self.recurrent_dropout)
        others += [f"zoneout {self.zoneout:g}"] * bool(self.zoneout)
        others += [f"{self.num_heads} heads"] * (self.num_heads > 1)
        others += [f"{self.members} members"] * (self.members > 0)
        return ", ".join(layers + others)

    @property
    def shape(self) -> str:
        """Everything but the cell and the mode, for the axis of a plot."""
        inputs = f"I{self.input_size} " if self.input_size != self.hidden_size else ""
        sizes = f"T{self.steps} B{self.batch} {inputs}H{self.hidden_size}"
        dtype = {"float32": "", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}[
            self.dtype
        ]
        stack = f"{self.num_layers}L" * (self.num_layers > 1) + " bi" * self.bidirectional
        stack += " ragged" * self.ragged + f" P{self.proj_size}" * (self.proj_size > 0)
        stack += f" drop{self.recurrent_dropout:g}" * bool(self.recurrent_dropout)
        stack += f" zone{self.zoneout:g}" * bool(self.zoneout)
        stack += f" {self.num_heads}heads" * (self.num_heads > 1) + f" x{self.members}" * (
            self.members > 0
        )
        return " ".join(part for part in (sizes, dtype, stack) if part)

    @property
    def is_plain(self) -> bool:
        """Whether T, B and H, with cell, mode and dtype, define it fully: a point of a heat map."""
        return not self.is_step and not self.stack and self.input_size == self.hidden_size


# (T, B, H), from the latency of a single short sequence to sizes bound by GEMMs alone. The GPU's
# shapes start higher: anything smaller is dominated by launch latency there.
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
# Indices of the shapes at which each cell is measured.
_QUICK_PICKS = {"lstm": range(6), "gru": (0, 1, 3, 4), "rnn": (0, 3, 4)}
# Without half-precision units on a CPU, torch takes 20 times longer than in float32.
_QUICK_HALF_SHAPE = {"cpu": (32, 8, 64), "cuda": (128, 64, 256)}
_STACK_SHAPE = {"cpu": (64, 8, 128), "cuda": (256, 16, 512)}
_QUICK_STEPS = [("forward", 1, 128), ("training", 32, 256)]
# (cell, T) of streams: one step shows the overhead of a call, more steps what each adds.
_QUICK_STREAMS = [("lstm", 1), ("lstm", 16), ("gru", 1), ("rnn", 1)]
_QUICK_STREAM_HIDDEN = 256

_FULL_STEPS = (16, 64, 256, 1024, 4096)
_FULL_BATCHES = (1, 8, 16, 32, 64, 128, 256)
_FULL_HIDDEN = (64, 128, 192, 256, 384, 512, 768, 1024, 1408, 2048)
# Limits for a case: on a CPU for time, in operations of an LSTM's inference, about 0.1 s; on a GPU
# for memory, in elements of the output, of which training keeps up to ten times as many.
_FULL_FLOPS = 1e10
_FULL_OUTPUT = 2**28
_FULL_DTYPES: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {"lstm": ("float32",), "gru": ("float32",), "rnn": ("float32",)},
    "cuda": {
        "lstm": ("float32", "bfloat16", "float16"),
        "gru": ("float32", "bfloat16"),
        "rnn": ("bfloat16",),
    },
}
_FULL_CPU_HALF_SHAPES = [(128, 1, 256), (128, 8, 64), (32, 8, 256)]
_FULL_CPU_DOUBLE_SHAPES = [(16, 1, 256), (128, 1, 256), (128, 8, 64)]
# (T, B, H, P)
_FULL_CPU_PROJECTED = [(16, 1, 256, 64), (128, 1, 512, 128), (64, 8, 256, 64), (64, 32, 512, 128)]
# Streams arrive in blocks of a few steps.
_STREAM_SHAPES = [*product((1, 4, 16), (1,), (128, 256, 512)), (1, 4, 256)]
_STREAM_HALF_SHAPES = [(1, 1, 256), (16, 1, 256)]
# Where the paths for a single-sequence LSTM cross over, and those of other libraries.
_SINGLE_STEPS, _SINGLE_HIDDEN = 128, (64, 128, 192, 256, 384, 512, 768, 1024)
_FULL_RAGGED_SHAPES = {
    "cpu": [(128, 8, 64), (128, 8, 256), (128, 64, 256)],
    "cuda": [(256, 16, 256), (256, 64, 512), (1024, 16, 512)],
}
_STEP_BATCHES = (1, 8, 32, 128)
_STEP_HIDDEN = (64, 128, 256, 512, 1024)


def quick(device: str) -> list[Case]:
    """List every cell in both modes at a few sizes; takes about two minutes.

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
        _case(cell, "training", "float32", *_STACK_SHAPE[device], num_layers=2, bidirectional=True)
        for cell in ("lstm", "gru")
    ]
    cases += [
        _case(cell, mode, "float32", 1, batch, hidden)
        for cell in STEPS
        for mode, batch, hidden in _QUICK_STEPS
    ]
    if device == "cpu":
        cases += [
            _case(cell, "forward", "float32", steps, 1, _QUICK_STREAM_HIDDEN)
            for cell, steps in _QUICK_STREAMS
        ]
    return cases


def full(device: str) -> list[Case]:
    """List every cell in both modes over a grid of sizes and dtypes; hundreds of cases.

    Parameters
    ----------
    device : {'cpu', 'cuda'}

    Returns
    -------
    list of Case
    """
    shapes = [
        (steps, batch, hidden)
        for (i, steps), (j, batch), (k, hidden) in product(
            enumerate(_FULL_STEPS), enumerate(_FULL_BATCHES), enumerate(_FULL_HIDDEN)
        )
        # A fifth of the grid: each value of an axis still meets each value of the other axes.
        if (i + 2 * j + 3 * k) % 5 == 0 and _is_affordable(steps, batch, hidden, device)
    ]
    dtypes = _FULL_DTYPES[device]
    cases = [
        _case(cell, mode, dtype, *shape)
        for cell in LAYERS
        for dtype, shape, mode in product(dtypes[cell], shapes, MODES)
    ]
    if device == "cpu":
        cases += _full_cpu()
    main = "float32" if device == "cpu" else "bfloat16"
    cases += [
        _case(cell, mode, main, *shape, ragged=True)
        for cell, shape, mode in product(LAYERS, _FULL_RAGGED_SHAPES[device], MODES)
    ]
    cases += [
        _case(cell, mode, main, *_STACK_SHAPE[device], num_layers=layers, bidirectional=both)
        for cell, mode, (layers, both) in product(LAYERS, MODES, ((2, False), (1, True), (2, True)))
    ]
    cases += [
        _case(cell, mode, "float32", 1, batch, hidden)
        for cell, mode, batch, hidden in product(STEPS, MODES, _STEP_BATCHES, _STEP_HIDDEN)
        if (batch in (1, 32)) == (hidden in (64, 256, 1024)) and batch * hidden < 2**16
    ]
    return list(dict.fromkeys(cases))  # some streams are also in the grid


def _full_cpu() -> list[Case]:
    """List CPU-only cases: streams, single sequences, other dtypes and projections."""
    shapes = {
        "bfloat16": _FULL_CPU_HALF_SHAPES,
        "float64": _FULL_CPU_DOUBLE_SHAPES,
    }
    streams = {"float32": _STREAM_SHAPES, "bfloat16": _STREAM_HALF_SHAPES}
    return [
        *(
            _case(cell, mode, dtype, *shape)
            for dtype in shapes
            for cell, shape, mode in product(LAYERS, shapes[dtype], MODES)
        ),
        *(
            _case(cell, "forward", dtype, *shape)
            for dtype in streams
            for cell, shape in product(LAYERS, streams[dtype])
        ),
        *(
            _case("lstm", mode, "float32", _SINGLE_STEPS, 1, hidden)
            for hidden, mode in product(_SINGLE_HIDDEN, MODES)
        ),
        *(
            _case("lstm", mode, "float32", steps, batch, hidden, proj_size=proj_size)
            for (steps, batch, hidden, proj_size), mode in product(_FULL_CPU_PROJECTED, MODES)
        ),
    ]


def _is_affordable(steps: int, batch: int, hidden: int, device: str) -> bool:
    if device == "cpu":
        return _case("lstm", "forward", "float32", steps, batch, hidden).flops <= _FULL_FLOPS
    return steps * batch * hidden <= _FULL_OUTPUT


class Published(NamedTuple):
    """A published figure of another implementation.

    Attributes
    ----------
    case : Case
    who : str
        The implementation.
    ms : float
    device : str
    source : str
    """

    case: Case
    who: str
    ms: float
    device: str
    source: str


_FLASHRNN = "FlashRNN, figure head_dim--lstm.svg of its repository"
_GRU_QAT = "gru-qat, README"
_TORCHRL = "torchrl, pull request 3725"
_FLASHRNN_CASE = Case("lstm", "forward", "float16", 1024, 16, 768, 768)
_FLASHRNN_TRAINING = dataclasses.replace(_FLASHRNN_CASE, mode="training")
_GRU_QAT_CASE = Case("gru", "training", "float32", 64, 32, 512, 512)
# H is not stated there; 256 is the size in torchrl's own benchmark.
_TORCHRL_CASE = Case("gru", "forward", "float32", 64, 128, 256, 256)

#: Published figures for cases of `published`. FlashRNN's own times exclude the product with the
#: input, which all other times include.
PUBLISHED = (
    Published(_FLASHRNN_CASE, "cuDNN", 2.01, "H100", _FLASHRNN),
    Published(_FLASHRNN_TRAINING, "cuDNN", 5.19, "H100", _FLASHRNN),
    *(
        Published(dataclasses.replace(case, dtype=dtype), who, ms, "H100", _FLASHRNN)
        for case, who, dtype, ms in (
            (_FLASHRNN_CASE, "FlashRNN, fused CUDA", "bfloat16", 4.87),
            (_FLASHRNN_TRAINING, "FlashRNN, fused CUDA", "bfloat16", 13.61),
            (_FLASHRNN_CASE, "haste", "float32", 18.41),
            (_FLASHRNN_TRAINING, "haste", "float32", 43.86),
        )
    ),
    Published(_GRU_QAT_CASE, "cuDNN", 4.4, "RTX 2000 Ada", _GRU_QAT),
    Published(_GRU_QAT_CASE, "gru-qat, persistent Triton", 8.8, "RTX 2000 Ada", _GRU_QAT),
    Published(_GRU_QAT_CASE, "torch.compile of a loop", 38.7, "RTX 2000 Ada", _GRU_QAT),
    Published(_TORCHRL_CASE, "cuDNN", 1.07, "not stated", _TORCHRL),
    Published(_TORCHRL_CASE, "torch.compile of a scan", 2.95, "not stated", _TORCHRL),
)


def published(device: str) -> list[Case]:
    """List the sizes with published figures, and a few that others use as a yardstick.

    Parameters
    ----------
    device : {'cpu', 'cuda'}
        On a CPU half precision becomes float32, and what would take minutes is left out.

    Returns
    -------
    list of Case
    """
    cases = [figure.case for figure in PUBLISHED]
    for mode in MODES:
        # The default of pytorch/benchmarks/fastrnns; two of torchrl's (a batch of 2048 in its pull
        # request 4174 and a long sequence of the same size), and one of a persistent LSTM on AMD's
        # DCU.
        cases += [
            _case("lstm", mode, "float32", 100, 64, 512),
            _case("gru", mode, "float32", 64, 128, 256),
            _case("gru", mode, "float32", 512, 2048, 128),
            _case("gru", mode, "float32", 2048, 512, 128),
            _case("lstm", mode, "float16", 1000, 512, 128, num_layers=4),
        ]
    if device == "cpu":
        cases = [dataclasses.replace(case, dtype="float32") for case in cases]
        cases = [case for case in cases if case.steps * case.batch <= 2**14]
    return list(dict.fromkeys(cases))


_RUNTIME_SHAPES = [
    *((1, 1, hidden) for hidden in (128, 512)),
    (16, 1, 256),
    *((128, 1, hidden) for hidden in (64, 256, 512, 1024)),
    *((128, 8, hidden) for hidden in (64, 256, 512)),
    *((128, 64, hidden) for hidden in (64, 256)),
    (64, 64, 512),
    (32, 8, 128),
]


def runtimes(device: str) -> list[Case]:
    """List single-layer inference cases, as run in runtimes for trained models.

    Parameters
    ----------
    device : {'cpu', 'cuda'}

    Returns
    -------
    list of Case
    """
    return [
        _case(cell, "forward", "float32", *shape)
        for cell, shape in product(("lstm", "gru"), _RUNTIME_SHAPES)
    ]


# (T, B, H)
_VARIANT_SHAPES = [(64, 4, 64), (64, 16, 256)]
_NOISE = [
    {"recurrent_dropout": 0.2},
    {"zoneout": 0.1},
    {"recurrent_dropout": 0.2, "zoneout": 0.1},
]
_PARTS = 8


def variants(device: str) -> list[Case]:
    """Layers and options that torch.nn does not have, in both modes.

    Parameters
    ----------
    device : {'cpu', 'cuda'}

    Returns
    -------
    list of Case
    """
    options: list[dict[str, Any]] = [
        *_NOISE, {"num_heads": _PARTS}, {"members": _PARTS}, {"bidirectional": True},
    ]  # fmt: skip
    cases = []
    for (steps, batch, hidden), mode in product(_VARIANT_SHAPES, MODES):
        kinds = [*product(("lstm", "gru"), options), ("lstm", {"proj_size": hidden // 2})]
        kinds += [(cell, {}) for cell in VARIANTS]
        cases += [
            _case(cell, mode, "float32", steps, batch, hidden, **given) for cell, given in kinds
        ]
    return cases


SUITES: dict[str, Callable[[str], list[Case]]] = {
    "quick": quick,
    "full": full,
    "published": published,
    "runtimes": runtimes,
    "variants": variants,
}


def select(
    suite: str,
    device: str,
    *,
    cells: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
) -> list[Case]:
    """Choose cases of a suite.

    Parameters
    ----------
    suite : str
        Key of ``SUITES``.
    device : {'cpu', 'cuda'}
    cells, modes, dtypes : sequence of str, optional
        If given, only cases with these.

    Returns
    -------
    list of Case
        In the order of ``CELLS``.

    Examples
    --------
    >>> from fastrnn.bench.registry import select
    >>> {case.dtype for case in select("quick", "cpu", cells=["lstm"], modes=["forward"])} == {
    ...     "float32", "bfloat16"}
    True
    """
    return _grouped(
        case
        for case in SUITES[suite](device)
        if (not cells or case.cell in cells)
        and (not modes or case.mode in modes)
        and (not dtypes or case.dtype in dtypes)
    )


def grid(
    *,
    cells: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    steps: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
    hidden: Sequence[int] | None = None,
    inputs: Sequence[int] | None = None,
    **stack: Any,
) -> list[Case]:
    """Make the product of the given values.

    Parameters
    ----------
    cells, modes, dtypes : sequence of str, optional
        By default the three layers, both modes and float32.
    steps, batches, hidden : sequence of int, optional
        By default (128,), (1, 8, 64) and (64, 256).
    inputs : sequence of int, optional
        By default the input size equals the hidden size.
    **stack
        `num_layers`, `bidirectional` and `ragged` of `Case`, for all cases; cell modules, which
        have none of these, are left unchanged.

    Returns
    -------
    list of Case
        In the order of ``CELLS``.

    Examples
    --------
    >>> from fastrnn.bench.registry import grid
    >>> [case.shape for case in grid(cells=["gru"], modes=["forward"], steps=[16], batches=[2])]
    ['T16 B2 H64', 'T16 B2 H256']
    """
    cases = []
    for cell, mode, dtype, t, b, h in product(
        cells or LAYERS,
        modes or MODES,
        dtypes or ("float32",),
        steps or (128,),
        batches or (1, 8, 64),
        hidden or (64, 256),
    ):
        options = {} if cell in STEPS else stack
        cases += [
            dataclasses.replace(_case(cell, mode, dtype, t, b, h), input_size=i, **options)
            for i in inputs or (h,)
        ]
    return _grouped(cases)


def _case(
    cell: str, mode: str, dtype: str, steps: int, batch: int, hidden: int, **stack: Any
) -> Case:
    steps = 1 if cell in STEPS else steps
    return Case(cell, mode, dtype, steps, batch, hidden, hidden, **stack)


def _grouped(cases: Iterable[Case]) -> list[Case]:
    return sorted(dict.fromkeys(cases), key=lambda case: CELLS.index(case.cell))
