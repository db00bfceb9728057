"""Stacked recurrent layers: the character model with one to four layers.

Deep RNN: the output of a layer is the input of the layer above it, and each has its own state.

    h^l_t = GRU_l(h^{l-1}_t, h^l_{t-1})       l = 1 ... L,  h^0_t = E[x_t]
    p(x_{t+1}) = softmax(W h^L_t + b)

This is the stack of Graves 2013, arXiv:1308.0850, without his skip connections; Pascanu et al.
2013, arXiv:1312.6026, ask what depth is good for. More layers of the same width also mean more
parameters, so comparing at equal width says little: here the width shrinks as the depth grows, and
the recurrent layers of all models have about the same number of parameters. Deeper models need more
sequential steps, which is part of the result.

    python examples/stacked_layers.py --plot
    python examples/stacked_layers.py --cell lstm --hidden 256
"""

from __future__ import annotations

import argparse
from typing import Any

import char_lm
from common import Runs, Training, new_figure, plot_losses, run, trainer
from matplotlib.figure import Figure

GATES = {"rnn": 1, "gru": 3, "lstm": 4}  # rows of the weights, in multiples of the width
COLOUR = "tab:blue"
DEPTHS = {"1 layer": 1, "2 layers": 2, "3 layers": 3, "4 layers": 4}


def parameters(cell: str, embedding: int, hidden: int, layers: int) -> int:
    """Count those of all recurrent layers: two weights and two biases each."""
    inputs = embedding + (layers - 1) * hidden
    return GATES[cell] * hidden * (inputs + layers * (hidden + 2))


def width(layers: int, args: argparse.Namespace) -> int:
    """Return the largest width, a multiple of 8, within the parameters of a single layer."""
    allowed = parameters(args.cell, args.embedding, args.hidden, 1)
    fits = (
        hidden
        for hidden in range(args.hidden, 8, -8)
        if parameters(args.cell, args.embedding, hidden, layers) <= allowed
    )
    return next(fits, min(8, args.hidden))


def train(library: Any, variant: str, args: argparse.Namespace) -> Training:
    layers = DEPTHS[variant]
    hidden = width(layers, args)
    shape = {"layers": layers, "hidden": hidden, "prompt": "The ", "length": 0, "temperature": 1.0}
    figures = yield from char_lm.train(library, args.cell, argparse.Namespace(**vars(args) | shape))
    return {
        "perplexity": figures["perplexity"],
        "width": hidden,
        "parameters": parameters(args.cell, args.embedding, hidden, layers),
    }


def draw(runs: Runs) -> Figure:
    figure, (curves, quality, cost) = new_figure(1, 3, width=12)
    figure.suptitle("Next character by stacked layers of about equally many parameters")
    shades = [0.35, 0.55, 0.75, 1.0]
    for (variant, of), shade in zip(runs.items(), shades, strict=False):
        label = f"{variant} of {of['fastrnn']['width']}"
        plot_losses(curves, of["fastrnn"], color=COLOUR, alpha=shade, label=label)
    curves.set(title="training", ylim=(1.0, 3.5))
    curves.legend()

    layers = [str(DEPTHS[variant]) for variant in runs]
    found = [of["fastrnn"]["perplexity"] for of in runs.values()]
    quality.bar_label(quality.bar(layers, found, color=COLOUR), fmt="%.2f")
    quality.set(title="perplexity on text not trained on", xlabel="layers", ylim=(1, None))

    for library, color in (("torch.nn", "tab:grey"), ("fastrnn", COLOUR)):
        times = [of[library]["step"] * 1e3 for of in runs.values() if library in of]
        if times:
            cost.plot(layers, times, "o-", color=color, label=library)
    cost.set(title="time of an update", xlabel="layers", ylabel="ms", ylim=(0, None))
    cost.legend()
    return figure


def main(argv: list[str] | None = None) -> int:
    options = trainer(
        __doc__,
        updates=400,
        hidden=(192, "units of the model with one layer"),
        embedding=(64, "width of a character"),
        dropout=(0.0, "between layers"),
        chars=(400_000, "how much of the text to use"),
        batch=32,
        steps=(64, "characters per window"),
        lr=5e-3,
        clip=1.0,
    )
    options.add_argument("--cell", choices=tuple(GATES), default="gru")
    return run(__file__, options.parse_args(argv), train, list(DEPTHS), draw)


if __name__ == "__main__":
    raise SystemExit(main())
