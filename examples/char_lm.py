"""Train a character-level language model on text that every Python brings along.

The network reads a text character by character and predicts the next one:

    e_t = E[x_t]                          embedding of the character
    h_t = LSTM(e_t, h_{t-1})              one or more recurrent layers, here fastrnn's
    p(x_{t+1}) = softmax(W h_t + b)       linear layer over the vocabulary

It minimises the mean of -log p(x_{t+1}). Perplexity is exp of that: how many characters
the model still finds equally likely at each step. The text is cut into parallel streams
and read window by window; the state is carried from window to window but gradients stop
at its start: truncated backpropagation through time (Williams & Peng 1990). The LSTM is
that of Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000; the use of
such a network as a generator of text follows Graves 2013, arXiv:1308.0850.

    python examples/char_lm.py             train with fastrnn, then write some text
    python examples/char_lm.py --stock     train with torch.nn too: the same loss curve?
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict
from pydoc_data.topics import topics
from typing import Any

import torch
from common import Run, now, parser, same_curve, save
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import fastrnn


class CharModel(torch.nn.Module):
    """Embedding, recurrent layers, linear layer; the layers come from `library`."""

    def __init__(self, library: Any, vocabulary: int, args: argparse.Namespace) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, args.embedding)
        layer_class = getattr(library, args.cell.upper())  # fastrnn.LSTM or torch.nn.LSTM
        self.recurrent = layer_class(
            args.embedding, args.hidden, num_layers=args.layers, dropout=args.dropout
        )
        self.linear = torch.nn.Linear(args.hidden, vocabulary)

    def forward(self, characters: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        output, state = self.recurrent(self.embedding(characters), state)
        return self.linear(output), state


def windows(codes: Tensor, batch: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, both (steps, batch); column b goes on where it ended before."""
    length = (len(codes) - 1) // batch
    inputs = codes[: batch * length].view(batch, length).t()
    targets = codes[1 : batch * length + 1].view(batch, length).t()
    return zip(inputs.split(steps), targets.split(steps), strict=True)


def detached(state: Any) -> Any:
    return tuple(map(Tensor.detach, state)) if isinstance(state, tuple) else state.detach()


def train(
    library: Any, train_codes: Tensor, valid_codes: Tensor, vocabulary: int, args: Any
) -> tuple[CharModel, Run]:
    torch.manual_seed(args.seed)
    model = CharModel(library, vocabulary, args).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    run, losses = Run(), []
    print(f"{library.__name__}: {model.recurrent}")
    for epoch in range(args.epochs):
        model.train()
        state, start = None, now(args.device)
        bar = tqdm(list(windows(train_codes, args.batch, args.steps)), desc=f"epoch {epoch + 1}")
        for inputs, targets in bar:
            logits, state = model(inputs, state)
            state = detached(state)
            loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            losses.append(loss.detach())
            if bar.n % 20 == 0:  # reading the loss waits for the device, so not every time
                bar.set_postfix(loss=f"{loss.item():.3f}")
        run.seconds += now(args.device) - start
        run.validation.append(perplexity(model, valid_codes, args))
        print(f"epoch {epoch + 1}: validation perplexity {run.validation[-1]:.3f}")
    run.losses = torch.stack(losses).tolist()
    print(f"{library.__name__}: trained in {run.seconds:.1f} s")
    return model, run


@torch.no_grad()
def perplexity(model: CharModel, codes: Tensor, args: argparse.Namespace) -> float:
    model.eval()
    state, total, count = None, 0.0, 0
    for inputs, targets in windows(codes, args.batch, args.steps):
        logits, state = model(inputs, state)
        total += cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += targets.numel()
    return math.exp(total / count)


@torch.no_grad()
def generate(model: CharModel, prompt: Tensor, length: int, temperature: float) -> Tensor:
    """Draw characters from softmax(logits / temperature), feeding each back as the next input."""
    model.eval()
    logits, state = model(prompt.view(-1, 1))
    drawn = [prompt]
    for _ in range(length):
        drawn.append(torch.multinomial(torch.softmax(logits[-1, 0] / temperature, dim=0), 1))
        logits, state = model(drawn[-1].view(1, 1), state)
    return torch.cat(drawn)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    text = "\n".join(topics[key] for key in sorted(topics))[: args.chars]
    alphabet = sorted(set(text + args.prompt))
    code_of = {character: code for code, character in enumerate(alphabet)}
    codes = torch.tensor([code_of[character] for character in text], device=args.device)
    split = len(codes) * 9 // 10
    data = codes[:split], codes[split:], len(alphabet)
    print(f"{len(text)} characters, {len(alphabet)} different ones; the last 10 % validate")

    model, ours = train(fastrnn, *data, args)
    runs = {"fastrnn": ours}
    if args.stock:
        runs["torch.nn"] = train(torch.nn, *data, args)[1]
    prompt = torch.tensor([code_of[character] for character in args.prompt], device=args.device)
    for _ in range(args.samples):
        sample = generate(model, prompt, args.length, args.temperature)
        print(f"\n--- {''.join(alphabet[code] for code in sample.tolist())}")
    save(args.out, "char_lm", {name: asdict(run) for name, run in runs.items()})
    if args.stock:
        print()
        return 0 if same_curve(ours, runs["torch.nn"]) else 1
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    add = options.add_argument
    add("--stock", action="store_true", help="train with torch.nn too; exit 1 if losses differ")
    add("--cell", choices=("lstm", "gru", "rnn"), default="lstm")
    add("--layers", type=int, default=1)
    add("--embedding", type=int, default=64)
    add("--hidden", type=int, default=192)
    add("--dropout", type=float, default=0.0, help="between layers; needs --layers 2 or more")
    add("--chars", type=int, default=400_000, help="how much of the text to use")
    add("--batch", type=int, default=32, help="parallel streams")
    add("--steps", type=int, default=64, help="characters per window")
    add("--epochs", type=int, default=3)
    add("--lr", type=float, default=3e-3)
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--samples", type=int, default=2, help="texts to write at the end")
    add("--prompt", default="The ")
    add("--length", type=int, default=300, help="characters per text")
    add("--temperature", type=float, default=0.7)
    return options.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
