"""Character-level language models, trained on text that ships with Python.

Many to many, in step: the network reads "Bonjou" and predicts "onjour", one character ahead.

    e_t = E[x_t]                          embedding of the character
    h_t = LSTM(e_t, h_{t-1})              or GRU, or RNN
    p(x_{t+1}) = softmax(W h_t + b)       linear layer over the vocabulary

It minimizes the mean of -log p(x_{t+1}). Perplexity is the exponential of that: the number of
characters among which the model is still undecided at each step. The text is cut into parallel
streams and read window by window; the state carries over from one window to the next, but
gradients stop at the boundary: truncated backpropagation through time (Williams & Peng 1990). The
LSTM is that of Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000, the GRU that
of Cho et al. 2014, the RNN that of Elman 1990; the use of such a network as a generator of text
follows Graves 2013, arXiv:1308.0850.

    python examples/char_lm.py                            all three cells, then some text
    python examples/char_lm.py --cell lstm --layers 2     one of them
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Any

import torch
from common import COLOURS, Runs, Training, new_figure, plot_losses, run, trainer, update
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy

TEXT = "\n".join(topics[key] for key in sorted(topics))


class CharModel(torch.nn.Module):
    """Embedding, recurrent layers, linear layer; the layers come from `library`."""

    def __init__(self, library: Any, cell: str, vocabulary: int, args: argparse.Namespace) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, args.embedding)
        layer_class = getattr(library, cell.upper())  # fastrnn.LSTM or torch.nn.LSTM
        self.recurrent = layer_class(
            args.embedding, args.hidden, num_layers=args.layers, dropout=args.dropout
        )
        self.linear = torch.nn.Linear(args.hidden, vocabulary)

    def forward(self, characters: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        output, state = self.recurrent(self.embedding(characters), state)
        return self.linear(output), state


def windows(codes: Tensor, batch: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets, both (steps, batch); each column continues where it ended."""
    length = (len(codes) - 1) // batch
    inputs = codes[: batch * length].view(batch, length).t()
    targets = codes[1 : batch * length + 1].view(batch, length).t()
    return zip(inputs.split(steps), targets.split(steps), strict=True)


def train(library: Any, cell: str, args: argparse.Namespace) -> Training:
    text = TEXT[: args.chars]
    alphabet = sorted(set(text + args.prompt))
    code_of = {character: code for code, character in enumerate(alphabet)}
    codes = torch.tensor([code_of[character] for character in text], device=args.device)
    split = len(codes) * 9 // 10
    model = CharModel(library, cell, len(alphabet), args).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    ahead: Iterator[tuple[Tensor, Tensor]] = iter(())
    state: Any = None
    for _ in range(args.updates):
        window = next(ahead, None)
        if window is None:  # end of the text: start over
            ahead, state = windows(codes[:split], args.batch, args.steps), None
            window = next(ahead)
        logits, state = model(window[0], state)
        state = tuple(map(Tensor.detach, state)) if cell == "lstm" else state.detach()
        loss = cross_entropy(logits.flatten(0, 1), window[1].flatten())
        yield update(loss, optimizer, args.clip)
    model.eval()
    prompt = torch.tensor([code_of[character] for character in args.prompt], device=args.device)
    sample = generate(model, prompt, args.length, args.temperature)
    return {
        "perplexity": perplexity(model, codes[split:], args),
        "sample": "".join(alphabet[code] for code in sample.tolist()),
    }


@torch.no_grad()
def perplexity(model: CharModel, codes: Tensor, args: argparse.Namespace) -> float:
    state, total, count = None, 0.0, 0
    for inputs, targets in windows(codes, args.batch, args.steps):
        logits, state = model(inputs, state)
        total += cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += targets.numel()
    return math.exp(total / count)


@torch.no_grad()
def generate(model: CharModel, prompt: Tensor, length: int, temperature: float) -> Tensor:
    """Sample characters from softmax(logits / temperature), feeding each back as input."""
    logits, state = model(prompt.view(-1, 1))
    drawn = [prompt]
    for _ in range(length):
        drawn.append(torch.multinomial(torch.softmax(logits[-1, 0] / temperature, dim=0), 1))
        logits, state = model(drawn[-1].view(1, 1), state)
    return torch.cat(drawn)


def draw(runs: Runs) -> Figure:
    figure, axes = new_figure()
    for cell, of in runs.items():
        figures = of["fastrnn"]
        label = f"{cell.upper()}: perplexity {figures['perplexity']:.2f} on text not trained on"
        plot_losses(axes, figures, color=COLOURS[cell], label=label)
    axes.set(title="Next character", ylim=(0.5, 3.5))
    axes.legend()
    return figure


def main(argv: list[str] | None = None) -> int:
    options = trainer(
        __doc__,
        updates=525,
        hidden=192,
        layers=(1, "recurrent layers"),
        embedding=(64, "width of a character"),
        dropout=(0.0, "between layers; needs --layers 2 or more"),
        chars=(400_000, "how much of the text to use"),
        batch=32,
        steps=(64, "characters per window"),
        lr=3e-3,
        clip=1.0,
        prompt=("The ", "how the text to be written begins"),
        length=(300, "characters to write"),
        temperature=0.7,
    )
    options.add_argument("--cell", choices=("lstm", "gru", "rnn"), help="only this one")
    args = options.parse_args(argv)
    return run(__file__, args, train, [args.cell] if args.cell else list(COLOURS), draw)


if __name__ == "__main__":
    raise SystemExit(main())
