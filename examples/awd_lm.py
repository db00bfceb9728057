"""A word-level language model with every regularizer of AWD-LSTM, and with zoneout.

The text comes with every Python. The network is that of Merity, Keskar & Socher 2018,
"Regularizing and optimizing LSTM language models", arXiv:1708.02182; each dropout mask m is drawn
once per window:

    e_t = m_0 * (m_E E)[x_t]                  E without some words (Gal & Ghahramani 2016)
    h_t, c_t = LSTM(e_t, h_{t-1}, c_{t-1})    "weights": m_W * W_hh in place of W_hh
    p(x_{t+1}) = softmax(E (m_1 * h_t) + b)   tied weights: the last layer has the width of E
    loss = -mean log p(x_{t+1}) + alpha mean (m_1 * h_t)^2 + beta mean (h_t - h_{t-1})^2

In place of weight dropout, "recurrent" drops h_{t-1} by one mask for all steps (Gal & Ghahramani
2016, arXiv:1512.05287), and "zoneout" keeps some of h and c as they were, others at each step
(Krueger et al. 2017, arXiv:1606.01305); with torch.nn these two are a loop over cells. Windows of
text follow each other: the state goes on, gradients stop. All have one length and the optimizer is
Adam; in the paper lengths vary and it is averaged SGD. "plain" has no regularizer at all.

    python examples/awd_lm.py --variant zoneout
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Any

import torch
from common import parser, save, update
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding
from tqdm import trange

import fastrnn

WORD = re.compile(r"\w+|[^\w\s]")
VARIANTS: dict[str, dict[str, float]] = {
    "plain": {},
    "weights": {"weight_dropout": 0.5},
    "recurrent": {"recurrent_dropout": 0.3},
    "zoneout": {"zoneout": 0.1},
}
WORDS, INPUT, OUTPUT, ALPHA, BETA = 0.1, 0.3, 0.4, 2.0, 1.0


def corpus(least: int = 5) -> tuple[Tensor, Tensor, int]:
    """Codes of the words to train on and of those held out, 0 for rare ones; how many there are."""
    text = "\n\n".join(topics[key].lower() for key in sorted(topics))
    paragraphs = list(dict.fromkeys(text.split("\n\n")))  # many are there more than once
    parts: tuple[list[str], list[str]] = [], []
    for i, paragraph in enumerate(paragraphs):
        parts[i // 20 % 10 == 9].extend(WORD.findall(paragraph))
    known = sorted(word for word, count in Counter(parts[0]).items() if count >= least)
    code = {word: i for i, word in enumerate(known, start=1)}
    codes, held_out = (torch.tensor([code.get(word, 0) for word in part]) for part in parts)
    return codes, held_out, len(known) + 1


def columns(codes: Tensor, batch: int) -> Tensor:
    """The text in so many parallel columns, (length, batch)."""
    length = len(codes) // batch
    return codes[: batch * length].view(batch, length).t()


def locked(x: Tensor, p: float, is_noisy: bool) -> Tensor:
    """Dropout by one mask for all steps."""
    return x * torch.dropout(torch.ones_like(x[:1]), p, is_noisy)


class AWD(torch.nn.Module):
    def __init__(self, words: int, width: int, hidden: int, layers: int, variant: str) -> None:
        super().__init__()
        self.is_plain = variant == "plain"
        self.embedding = torch.nn.Parameter(torch.empty(words, width).uniform_(-0.1, 0.1))
        self.bias = torch.nn.Parameter(torch.zeros(words))
        sizes = [width, *[hidden] * (layers - 1), width]
        options: dict[str, Any] = VARIANTS[variant]
        self.layers = torch.nn.ModuleList(
            fastrnn.LSTM(sizes[k], sizes[k + 1], **options) for k in range(layers)
        )

    def forward(self, words: Tensor, states: list[Any]) -> tuple[Tensor, list[Any], Tensor]:
        """Logits, states, and what alpha and beta punish."""
        is_noisy = self.training and not self.is_plain
        whole = torch.dropout(torch.ones_like(self.embedding[:, :1]), WORDS, is_noisy)
        x = locked(embedding(words, self.embedding * whole), INPUT, is_noisy)
        following = []
        for k, layer in enumerate(self.layers, start=1):
            h, state = layer(x, states[k - 1])
            following.append(tuple(part.detach() for part in state))
            x = locked(h, INPUT if k < len(self.layers) else OUTPUT, is_noisy)
        punished = ALPHA * x.square().mean() + BETA * (h[1:] - h[:-1]).square().mean()
        return x @ self.embedding.t() + self.bias, following, punished * is_noisy


def losses(model: AWD, text: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """The loss of each window, as it is wanted; the state goes on from one to the next."""
    states: list[Any] = [None] * len(model.layers)
    for start in range(0, len(text) - 1, steps):
        words, targets = text[start : start + steps], text[start + 1 : start + steps + 1]
        logits, states, punished = model(words[: len(targets)], states)
        yield cross_entropy(logits.flatten(0, 1), targets.flatten()), punished, len(targets)


@torch.no_grad()
def perplexity(model: AWD, text: Tensor, steps: int) -> float:
    windows = list(losses(model.eval(), text, steps))
    model.train()
    return math.exp(sum(loss.item() * n for loss, _, n in windows) / sum(n for *_, n in windows))


def train(variant: str, args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(args.seed)
    *texts, words = corpus()
    known, held_out = (columns(text[: args.words].to(args.device), args.batch) for text in texts)
    model = AWD(words, args.width, args.hidden, args.layers, variant).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    windows: Iterator[Any] = iter(())
    seen, found = [], {}
    for n in trange(args.updates, desc=variant, disable=None):
        window = next(windows, None)
        if window is None:  # all is read: once more from the beginning
            windows = losses(model, known, args.steps)
            window = next(windows)
        loss, punished, _ = window
        update(loss + punished, optimizer, args.clip)
        seen.append(loss.item())
        if n % 100 == 99 or n == args.updates - 1:
            found[n + 1] = perplexity(model, held_out, args.steps)
    print(f"{variant}: perplexity of the text held out {found[args.updates]:.1f}")
    return {"perplexity": found, "losses": seen}


def main(argv: list[str] | None = None) -> int:
    options = parser(
        __doc__, updates=600, width=(96, "of a word"), hidden=128, layers=(2, "LSTMs"), batch=16,
        steps=35, lr=2e-3, clip=1.0, words=(10**6, "how much of each text to use"),
    )  # fmt: skip
    options.add_argument("--variant", choices=VARIANTS, help="only this one")
    args = options.parse_args(argv)
    chosen = [args.variant] if args.variant else VARIANTS
    save(args.out, "awd_lm", {variant: train(variant, args) for variant in chosen})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
