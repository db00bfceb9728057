"""Random calls of layers and cells, for the correctness harness."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace
from typing import Any

from . import nn, paths, variant_cells, variants
from .cells import CELLS

#: Maps the names for ``--cells``, which are those of the registry, with ``_cell`` for a step, to
#: the class and the arguments of its constructor.
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
    "layernorm_lstm_cell": (variant_cells.LayerNormLSTMCell, {}),
    "layernorm_gru_cell": (variant_cells.LayerNormGRUCell, {}),
    "gru_reset_before_cell": (variant_cells.ResetBeforeGRUCell, {}),
    "peephole_lstm_cell": (variant_cells.PeepholeLSTMCell, {}),
    "slstm_cell": (variant_cells.SLSTMCell, {}),
}

_SIZES = (1, 2, 3, 5, 7, 8, 16, 17, 31, 32, 33, 64, 65)
_STEPS = (1, 2, 3, 5, 8, 13, 32, 33, 50)
_BATCHES = (0, 1, 1, 2, 3, 4, 7, 8)
_PROJECTED = ("lstm", "layernorm_lstm", "peephole_lstm", "slstm")


@dataclass(frozen=True)
class Case:
    """One random configuration; `seed` determines its weights, inputs and dropout masks.

    With `members` it is an ensemble of that size, run by ``torch.func.vmap`` over the weights, and
    with `own_inputs` over inputs and states too.
    """

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
    zoneout: float | tuple[float, ...]
    weight_dropout: float
    num_heads: int
    members: int
    own_inputs: bool

    @property
    def is_step(self) -> bool:
        return self.cell.endswith("_cell")

    @property
    def is_stock(self) -> bool:
        """Whether torch.nn supports the case."""
        return self.cell.removesuffix("_cell") in paths.ATEN_LAYERS and not (
            self.lengths or self.reset or self.bptt or self.return_states or self.is_regularized
            or self.num_heads > 1 or self.members
        )  # fmt: skip

    @property
    def is_regularized(self) -> bool:
        return bool(self.recurrent_dropout or self.zoneout or self.weight_dropout)

    @property
    def n_states(self) -> int:
        return CELLS[self.cell.removesuffix("_cell")].n_states

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
    # Over the gates of a single unit the deviation may be close to 0, and dividing by it amplifies
    # the error of every implementation.
    fewest = 2 if cell.startswith("layernorm") else 1
    hidden = rng.choice([size for size in _SIZES if size >= fewest])
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
        proj_size=rng.randrange(1, hidden) if hidden > 1 and flip(0.25) else 0,
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
        zoneout=rng.choice((0.0, 0.0, 0.2, (0.3, 0.1, 0.0, 0.0), (0.0, 0.2, 0.2, 0.1))),
        weight_dropout=rng.choice((0.0, 0.0, 0.0, 0.2)),
        num_heads=rng.choice(
            [n for n in (1, 1, 1, 2, 4) if hidden % n == 0 and hidden // n >= fewest]
        ),
        members=rng.choice((0, 0, 0, 2, 3)),
        own_inputs=flip(),
    )
    changes: dict[str, Any] = {}
    if cell not in _PROJECTED:
        case = replace(case, proj_size=0)
    if is_step or flip(0.3):
        # Include many cases that torch.nn supports, for comparison.
        changes = dict(_PLAIN)
        changes["members"] = case.members if is_step else 0
    else:
        changes["steps"] = min(case.steps, 13)  # the reference loop is slow
        if case.return_states == "gates" and CELLS[cell].activations is None:
            changes["return_states"] = True
        if isinstance(case.zoneout, tuple):
            changes["zoneout"] = case.zoneout[: case.n_states]
    if case.proj_size:
        changes["num_heads"] = 1
    case = replace(case, **changes)
    if case.members:
        # vmap cannot map packed input, and does not define the order of dropout between layers.
        case = replace(case, dropout=0.0, own_inputs=case.own_inputs and not case.packed)
    return case


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
