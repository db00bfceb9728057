"""Cases of test_gpu.py by schedule; a test that needs no GPU checks that each is supported."""

from __future__ import annotations

import itertools
from typing import NamedTuple

# Formats that persistent kernels support.
FORMATS = ("bf16", "fp16", "tf32")

# For every schedule: T, B, I, H, directions.
SMALL = [(5, 3, 7, 7, 2), (9, 17, 24, 129, 1)]
# With marks: cells; then schedule, format and shape.
MARKED = ["lstm", "gru", "rnn_tanh", "peephole_lstm", "slstm"]
MARKED_LAYERS = [
    ("resident", "bf16", (33, 37, 24, 60, 2)),
    ("resident", "bf16", (64, 16, 32, 128, 1)),
    ("resident", "ieee", (33, 37, 24, 15, 2)),
    ("persistent", "bf16", (33, 37, 24, 127, 2)),
    ("persistent", "bf16", (64, 16, 32, 512, 1)),
    ("stepwise", "bf16", (33, 37, 24, 127, 2)),
    ("stepwise", "bf16", (64, 16, 32, 512, 1)),
    ("stepwise", "ieee", (33, 37, 24, 127, 2)),
]

# Layers whose step is more than one product followed by pointwise arithmetic, run with each of
# these schedules that supports the layer: cells and projection sizes, 0 for none.
INVOLVED_SCHEDULES = ("staged", "resident")
INVOLVED_CELLS = [
    *[(cell, 0) for cell in ("layernorm_lstm", "layernorm_gru", "gru_reset_before")],
    *[(cell, 17) for cell in ("lstm", "peephole_lstm", "slstm", "layernorm_lstm")],
]


class Involved(NamedTuple):
    """Such a layer, with `shape` T, B, I, H and directions.

    If `marked`, it has lengths, resets with reset states, truncated gradients, and returns the
    states of all steps. `noise` is '', 'masks' (recurrent dropout, and zoneout by random masks) or
    'shares' (zoneout as its expected value).
    """

    cell: str
    size_h: int
    shape: tuple[int, int, int, int, int]
    format: str
    marked: bool = False
    noise: str = ""

    def __str__(self) -> str:
        """All of it, as the id of a test."""
        sizes, options = "x".join(map(str, self.shape)), "-marked" * self.marked
        options += f"-{self.noise}" * bool(self.noise)
        return f"{self.cell}-{self.size_h}-{sizes}-{self.format}{options}"


_ODD = 12, 17, 24, 33, 2  # more steps than truncated gradients cross
INVOLVED = [
    *[Involved(*of, _ODD, name) for of in INVOLVED_CELLS for name in ("bf16", "tf32", "fp64")],
    *[Involved(*INVOLVED_CELLS[n], _ODD, name) for n in (0, 3) for name in ("tf32x3", "ieee")],
    # Small enough for one program in these formats too.
    *[
        Involved(cell, 0, (12, 17, 24, 31, 2), name)
        for cell in ("layernorm_gru", "gru_reset_before")
        for name in ("tf32x3", "ieee")
    ],
    # No normalized cells: their derivative overflows in torch's own operators.
    *[Involved(*INVOLVED_CELLS[n], _ODD, "fp16") for n in (2, 3)],
    # Cells that other schedules run in other dtypes.
    *[Involved(cell, 0, _ODD, "fp64") for cell in ("lstm", "gru", "rnn_tanh", "slstm")],
    # With every option of a layer.
    *[Involved(*of, _ODD, "bf16", True, "masks") for of in INVOLVED_CELLS],
    Involved("layernorm_lstm", 0, _ODD, "fp64", True, "masks"),
    Involved("lstm", 0, _ODD, "fp64", True, "masks"),
    Involved("layernorm_gru", 0, _ODD, "bf16", True, "shares"),
    # The largest for one program, with several tiles of rows; many programs; very long rows.
    *[Involved(*of, (33, 40, 24, 128, 2), "bf16") for of in INVOLVED_CELLS[:3]],
    Involved("layernorm_lstm", 0, (12, 64, 64, 512, 1), "bf16"),
    Involved("gru_reset_before", 0, (12, 64, 64, 512, 1), "bf16"),
    Involved("lstm", 256, (12, 64, 64, 512, 1), "bf16"),
    Involved("layernorm_lstm", 0, (3, 5, 16, 4096, 1), "bf16"),
    Involved("layernorm_gru", 0, (3, 5, 16, 2048, 1), "fp64"),
]


class Case(NamedTuple):
    """A layer (`shape` is T, B, I, H, directions), and the rows and warps of a program."""

    cell: str
    shape: tuple[int, int, int, int, int]
    block_b: int
    num_warps: int
    format: str
    marked: bool = False

    def __str__(self) -> str:
        """All of it, as the id of a test."""
        sizes = "x".join(map(str, self.shape))
        return f"{self.cell}-{sizes}-{self.block_b}rows-{self.num_warps}warps-{self.format}"


def in_every_format(*cases: tuple, formats=FORMATS, marked=False) -> list[Case]:
    return [Case(*case, name, marked) for case, name in itertools.product(cases, formats)]


PERSISTENT = [
    *in_every_format(
        ("lstm", (33, 16, 24, 512, 1), 16, 8),
        ("lstm", (33, 16, 24, 256, 1), 16, 4),
        ("gru", (33, 32, 24, 512, 1), 32, 8),
        ("gru", (33, 1, 24, 256, 2), 16, 4),
        # A half-empty second tile; an empty one; several launches.
        ("rnn_tanh", (33, 24, 24, 384, 1), 32, 8),
        ("lstm", (17, 35, 24, 256, 2), 32, 8),
        ("gru", (9, 300, 8, 768, 1), 16, 8),
        # Unaligned rows and masked columns.
        ("lstm", (33, 17, 24, 99, 2), 32, 8),
        ("gru", (33, 5, 24, 130, 1), 16, 8),
        ("rnn_relu", (5, 3, 7, 1, 1), 16, 4),
        # Additional states and weights.
        ("peephole_lstm", (17, 16, 24, 256, 1), 16, 8),
        ("slstm", (17, 20, 24, 128, 1), 32, 8),
        ("slstm", (17, 5, 24, 128, 1), 16, 4),
        # One step, and many.
        ("gru", (1, 16, 24, 256, 1), 16, 8),
        ("lstm", (2, 32, 24, 256, 1), 32, 8),
        ("lstm", (2000, 16, 16, 512, 1), 16, 8),
        # The largest numbers of weight chunks; in TF32 an LSTM fits up to this size.
        ("gru", (33, 16, 24, 1024, 1), 16, 8),
        ("lstm", (33, 16, 24, 896, 1), 16, 8),
    ),
    *in_every_format(
        ("lstm", (33, 16, 24, 1024, 1), 16, 8),
        ("lstm", (33, 32, 24, 1024, 1), 32, 8),
        formats=("bf16", "fp16"),
    ),
]

# Kernels with two tiles do not support marks.
WITH_MARKS = in_every_format(
    ("lstm", (40, 20, 16, 320, 2), 16, 8),
    ("gru", (40, 20, 16, 127, 2), 16, 8),
    ("rnn_tanh", (40, 20, 16, 127, 2), 16, 4),
    ("lstm", (40, 20, 16, 100, 2), 16, 4),
    ("slstm", (40, 20, 16, 128, 2), 16, 4),
    marked=True,
)

WITH_NAN = in_every_format(*(("lstm", (30, 20, 16, 512, 1), rows, 8) for rows in (16, 32)))

REPEATED = [
    Case(cell, (50, 32, 64, 384, 2), *others)
    for cell, *others in (
        ("lstm", 16, 8, "bf16"),
        ("lstm", 32, 8, "bf16"),
        ("gru", 16, 4, "bf16"),
        ("gru", 32, 8, "fp16"),
        ("rnn_tanh", 32, 8, "bf16"),
        ("lstm", 16, 8, "tf32"),
    )
]

BOUNDED = [Case("lstm", (30, 32, 16, 512, 1), rows, 8, "bf16") for rows in (16, 32)]
