"""Tag every word of a conversation with its part of speech, from the words so far or from all.

Many to many, in step: one tag per word.

    x_t = [E_w[word_t], sum over its characters of E_c[character]]
    h_t = LSTM(x_t, h_{t-1})                        unidirectional: words 1 ... t
    g_t = LSTM'(x_t, g_{t+1})                       bidirectional: words t ... T as well
    p(tag of word t) = softmax(W [h_t, g_t] + b)

An unknown word is represented by its characters only; to make the network rely on them, a quarter
of the words is hidden in training. Bidirectional layers are due to Schuster & Paliwal 1997, their
use for part-of-speech tagging to Wang et al. 2015, arXiv:1510.06168, and to Plank et al. 2016,
arXiv:1604.05529, who also combine words with characters. Both models have the same width.

Data: the Hong Kong Cantonese Corpus (Luke & Wong 2015, CC BY), as included in the package
pycantonese: conversations of the 1990s, 16,000 utterances, tagged by hand; six of 58 recordings are
held out. The baseline gives each word its most frequent tag, and an unknown word the most frequent
tag overall.

    python examples/tag_words.py --plot
"""

from __future__ import annotations

import argparse
import re
from collections import Counter, defaultdict
from functools import cache
from itertools import chain
from typing import Any

import torch
from common import Runs, Training, batches, in_package, new_figure, run, trainer, update
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_sequence

Word = tuple[str, str]  # word, tag
COLOUR = {"usual tag": "tab:grey", "unidirectional": "tab:cyan", "bidirectional": "tab:blue"}
UTTERANCE = re.compile(r"^\*\w+:\t(.*)\n%mor:\t(.*)", re.M)
LETTERS, HIDDEN = 5, 0.25  # characters used per word; share of words hidden in training
NAMES = {"v": "verb", "r": "pronoun", "d": "adverb", "y": "final particle", "n": "noun"}
NAMES |= {"c": "conjunction", "u": "auxiliary", "a": "adjective", "q": "classifier"}
NAMES |= {"e": "interjection", "m": "numeral", "vu": "modal verb"}


@cache
def utterances() -> tuple[list[list[Word]], list[list[Word]]]:
    """Return the training and the held-out utterances, without punctuation."""
    recordings = []
    for file in sorted(in_package("pycantonese", "data/hkcancor").glob("*.cha")):
        found = []
        for words, tags in UTTERANCE.findall(file.read_text("utf-8").replace("\n\t", " ")):
            pairs = zip(words.split(), tags.split(), strict=True)
            said = [(word, tag.split("|")[0]) for word, tag in pairs if "|" in tag]
            found += [said] if said else []
        recordings.append(found)
    held_out = recordings[7::10]  # friends at home and radio; splits no multi-part recording
    return tuple([*chain(*x)] for x in ([r for r in recordings if r not in held_out], held_out))


class Tagger(torch.nn.Module):
    """Map words and their characters to scores of the tags."""

    def __init__(
        self, library: Any, both: bool, known: int, spelling: Tensor, tags: int, width: int
    ) -> None:
        super().__init__()
        self.known = known  # words; all others share one code
        self.register_buffer("spelling", spelling)  # characters of each word, padded with 0
        self.word = torch.nn.Embedding(known + 1, width // 2)
        self.letter = torch.nn.Embedding(int(spelling.max()) + 1, width // 2, padding_idx=0)
        self.recurrent = library.LSTM(width, width // (1 + both), bidirectional=both)
        self.linear = torch.nn.Linear(width, tags)

    def forward(self, words: PackedSequence) -> Tensor:
        shown = words.data.clamp(max=self.known)
        if self.training:
            shown = shown.where(torch.rand(shown.shape).to(shown.device) > HIDDEN, self.known)
        x = torch.cat([self.word(shown), self.letter(self.spelling[words.data]).sum(1)], dim=1)
        return self.linear(self.recurrent(words._replace(data=x))[0].data)


def train(library: Any, variant: str, args: argparse.Namespace) -> Training:
    said, held_out = utterances()
    had: dict[str, Counter[str]] = defaultdict(Counter)  # tag counts of each word
    for word, tag in chain(*said):
        had[word][tag] += 1
    words = list(dict.fromkeys([*had, *(word for word, _ in chain(*held_out))]))
    number = {word: i for i, word in enumerate(words)}
    tags = sorted({tag for _, tag in chain(*said, *held_out)})
    alphabet = {letter: i + 1 for i, letter in enumerate(sorted({*"".join(had)}))}
    spelt = [torch.tensor([alphabet.get(x, 0) for x in word[:LETTERS]]) for word in words]

    def coded(chosen: list[list[Word]]) -> tuple[PackedSequence, Tensor]:
        codes = [torch.tensor([(number[x], tags.index(y)) for x, y in one]) for one in chosen]
        packed = pack_sequence(codes, enforce_sorted=False).to(args.device)
        return packed._replace(data=packed.data[:, 0]), packed.data[:, 1]

    both, spelling = variant == "bidirectional", pad_sequence(spelt, batch_first=True)
    model = Tagger(library, both, len(had), spelling, len(tags), args.hidden).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.updates)
    for batch in batches(len(said), args):
        x, right = coded([said[i] for i in batch.tolist()])
        yield update(cross_entropy(model(x), right), optimizer, args.clip)
        schedule.step()
    model.eval()
    x, right = coded(held_out)
    commonest = sum(had.values(), Counter())
    usual = [tags.index(had.get(word, commonest).most_common(1)[0][0]) for word in words]
    with torch.no_grad():
        found = {"": model(x).argmax(1), " of usual tags": right.new_tensor(usual)[x.data]}
    figures: dict[str, Any] = {}
    for who, guess in found.items():
        correct, unknown = (guess == right).double(), x.data >= len(had)
        figures[f"accuracy{who}"] = correct.mean().item()
        figures[f"unknown words{who}"] = correct[unknown].mean().item()
        by_tag = [correct[right == tags.index(tag)] for tag in NAMES]
        figures[f"by tag{who}"] = [of.mean().item() for of in by_tag]
    return figures


def draw(runs: Runs) -> Figure:
    figure, (axes, total) = new_figure(1, 2, width=12, height=4, width_ratios=(5, 1))
    of = {variant: libraries["fastrnn"] for variant, libraries in runs.items()}
    of = {"usual tag": next(iter(of.values())), **of}
    for i, (label, figures) in enumerate(of.items()):
        who = " of usual tags" if label == "usual tag" else ""
        errors = [100 * (1 - x) for x in [figures[f"accuracy{who}"], *figures[f"by tag{who}"]]]
        places = [x + 0.27 * (i - 1) for x in range(len(NAMES))]
        axes.bar(places, errors[1:], 0.27, color=COLOUR[label], label=label)
        total.bar_label(total.bar(i, errors[0], color=COLOUR[label]), fmt="%.1f")
    names = [name.replace(" ", "\n") for name in NAMES.values()]
    axes.set_xticks(range(len(NAMES)), names, fontsize="small")
    axes.set(title="wrong tags in conversations not trained on, by right tag", ylabel="%")
    axes.legend()
    total.set(title="of all words", xticks=[])
    return figure


def main(argv: list[str] | None = None) -> int:
    options = trainer(__doc__, updates=1000, hidden=128, batch=32, lr=1e-2, clip=1.0)
    utterances()  # cached, so that no library's time includes it
    return run(__file__, options.parse_args(argv), train, list(COLOUR)[1:], draw)


if __name__ == "__main__":
    raise SystemExit(main())
