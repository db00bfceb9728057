"""Do gradients reach the first step? An RNN, a GRU and an LSTM must recall what they read there.

Many to one: a sequence of random symbols goes in; at the end the network names the first symbol.

    h_t = tanh(W_x x_t + W_h h_{t-1} + b)     or GRU, or LSTM; x_t: a symbol, one-hot
    p(first symbol) = softmax(W_o h_T + b_o)

The loss, -log p, is at the last step only, so everything a network learns about the first comes
through the chain rule, a product of one Jacobian matrix for each step in between:

    dL/dh_t = dL/dh_T J_T J_{T-1} ... J_{t+1}     J_k = dh_k/dh_{k-1}; RNN: diag(1 - h_k^2) W_h

As T - t grows it vanishes or explodes: Hochreiter 1991, "Untersuchungen zu dynamischen neuronalen
Netzen"; Bengio, Simard & Frasconi 1994, "Learning long-term dependencies with gradient descent is
difficult". fastrnn.diagnose measures it before and after training. Gates can learn to preserve a
state, with a factor near 1 per step; the LSTM's forget gates start with a bias near 1 (Jozefowicz,
Zaremba & Sutskever 2015). "rnn x 3" is an RNN whose W_h starts three times as large as usual. Its
gradients explode; the remedy is clipping them to a norm of --clip (Pascanu, Mikolov & Bengio 2013,
arXiv:1211.5063). Once it can recall, its gradients vanish instead: a state that is held so firmly
that later symbols cannot change it does not respond to small changes either.

Training sequences have any length up to --steps, so that a network can learn from short ones what
to preserve in longer ones. Accuracy and gradients are those of new sequences of full length.

    python examples/vanishing_gradients.py --plot
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from common import COLOURS, Runs, Training, new_figure, plot_losses, remember, run, trainer, update
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

import fastrnn

HELD_OUT, MEASURED = 2000, 256  # sequences for the accuracy, and for the gradients
SCALED, UNCLIPPED = "rnn x 3", "rnn x 3 unclipped"


class Recall(torch.nn.Module):
    """Recurrent layer and linear layer; the recurrent one comes from `library`."""

    def __init__(self, library: Any, variant: str, args: argparse.Namespace) -> None:
        super().__init__()
        cell = variant.split()[0]
        self.recurrent = getattr(library, cell.upper())(args.symbols, args.hidden)
        self.linear = torch.nn.Linear(args.hidden, args.symbols)
        if cell == "lstm":
            remember(self.recurrent, 1)
        if variant in (SCALED, UNCLIPPED):
            with torch.no_grad():
                self.recurrent.weight_hh_l0 *= 3
            self.double()  # exploding gradients also amplify rounding errors

    def encoded(self, sequences: Tensor) -> Tensor:
        return one_hot(sequences, self.linear.out_features).to(self.linear.weight.dtype)

    def forward(self, sequences: Tensor) -> Tensor:
        return self.linear(self.recurrent(self.encoded(sequences))[0][-1])


def gradients(model: Recall, sequences: Tensor) -> dict[str, list[float]]:
    """Return the norm of dL/dh_t for each step, relative to the last; for the LSTM also dL/dc_t."""

    def loss(output: Tensor, _: Any) -> Tensor:
        return cross_entropy(model.linear(output[-1]), sequences[0], reduction="sum")

    found = fastrnn.diagnose(model.recurrent, model.encoded(sequences), loss=loss)
    states = found.directions[0].states
    return {name: (one.gradient / one.last).tolist() for name, one in states.items()}


def train(library: Any, variant: str, args: argparse.Namespace) -> Training:
    def drawn(steps: int, count: int) -> Tensor:
        return torch.randint(args.symbols, (steps, count)).to(args.device)

    measured, held_out = drawn(args.steps, MEASURED), drawn(args.steps, HELD_OUT)
    model = Recall(library, variant, args).to(args.device)
    before = gradients(model, measured)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    for _ in range(args.updates):
        sequences = drawn(int(torch.randint(1, args.steps + 1, ())), args.batch)
        loss = cross_entropy(model(sequences), sequences[0])
        yield update(loss, optimizer, math.inf if variant == UNCLIPPED else args.clip)
    after = gradients(model, measured)
    logits = model(held_out).detach()
    return {
        "accuracy": (logits.argmax(1) == held_out[0]).double().mean().item(),
        "accuracy of guessing": 1 / args.symbols,
        "loss": cross_entropy(logits, held_out[0]).item(),
        "loss of guessing": math.log(args.symbols),
        "gradient, first step by last, before training": before["h"][0],
        "gradient, first step by last, after training": after["h"][0],
        "before": before,
        "after": after,
    }


def draw(runs: Runs) -> Figure:
    """Plot gradients over time for four networks, and the loss curves."""
    figure, axes = new_figure(2, 3, width=11, height=6.4)
    colors = {**COLOURS, SCALED: "tab:red", UNCLIPPED: "0.6"}
    for (variant, color), one in zip(colors.items(), axes.flat[:4], strict=False):
        for which, style in {"before": "--", "after": "-"}.items():
            for state, norms in runs[variant]["fastrnn"][which].items():
                shade = "navy" if state == "c" else color
                label = f"{state}, {which} training"
                one.semilogy(range(len(norms))[::-1], norms, style, color=shade, label=label)
        one.set(title=variant.upper().replace(" X", ", recurrent weights x"))
        one.set(xlabel="steps before the end", ylabel="gradient, by the last step's")
        one.set_ylim(1e-15, 1e5)
        one.legend(loc="lower left", fontsize="small")
    titles = {"Learning to recall": COLOURS, "RNN x 3: what clipping does": (SCALED, UNCLIPPED)}
    for (title, variants), one in zip(titles.items(), axes.flat[4:], strict=True):
        for variant in variants:
            figures = runs[variant]["fastrnn"]
            label = f"{variant}: {figures['accuracy']:.0%} right in the end"
            plot_losses(one, figures, color=colors[variant], label=label)
        one.axhline(figures["loss of guessing"], color="0.3", linewidth=0.8, linestyle=":")
        one.set(title=title, ylim=(0, 3.6))
        one.legend(loc="upper right", fontsize="small")
    return figure


def main(argv: list[str] | None = None) -> int:
    options = trainer(
        __doc__,
        updates=900,
        hidden=64,
        batch=32,
        symbols=(4, "to tell apart"),
        steps=(60, "of the longest sequence"),
        lr=3e-3,
        clip=1.0,
    )
    args, variants = options.parse_args(argv), [*COLOURS, SCALED, UNCLIPPED]
    # Rounding decides at which update a network succeeds, so only the beginnings are compared.
    return run(__file__, args, train, variants, draw, first=10, loose=math.inf)


if __name__ == "__main__":
    raise SystemExit(main())
