"""One to many: an image of a number goes in, its name comes out letter by letter.

    e = relu of W_e (pixels) + b, for the left half and the right one
    s_0 = (tanh(W_h e), W_c e)                            s: states h and c
    s_t = LSTM(E[y_{t-1}], s_{t-1})                       y_0 is the mark for the end
    p(y_t | y_1 ... y_{t-1}) = softmax(W h_t + b)         a letter, a space or the end

A captioner as that of Vinyals et al. 2015, "Show and tell", arXiv:1411.4555, on a small scale: a
network for the image hands over to a recurrent one that writes. (Theirs feeds the image in as the
first word; here it is the first state.) While it learns, each right letter is given ("teacher
forcing"); in use it reads what it wrote. Taking the best letter each time ("greedy") can miss the
likeliest name: t begins many, none of which need be it. Beam search (beam.py) follows the five
best beginnings. Among so few names both mostly find the same, but it has other readings as well.

Two handwritten digits side by side, under noise, make a number; below ten the left half is empty.
They are real, from the UCI repository as scikit-learn brings them along. Those of the last third,
by other writers, are for the test.

    python examples/digits_to_words.py --plot
"""

from __future__ import annotations

import argparse
import math
from functools import cache
from typing import Any

import torch
from beam import beam_search
from common import Runs, Training, new_figure, run, trainer, update
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy, pad, relu
from torch.nn.utils.rnn import pad_sequence

KNOWN, HELD_OUT = slice(1157), slice(1157, None)  # images: there begins the block of a writer
NUMBERS, WIDTH = 1000, 5  # in the test; of the beam
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
ONES = f"{ONES} fifteen sixteen seventeen eighteen nineteen".split()
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
NAMES = ONES + [f"{ten} {one}".strip() for ten in TENS for one in ["", *ONES[1:10]]]
LETTERS = [".", *sorted(set("".join(NAMES)))]  # "." is the end, code 0
CODES = [torch.tensor([LETTERS.index(letter) for letter in name + "."]) for name in NAMES]
CODED = pad_sequence(CODES, padding_value=-1)  # (letters, 100), -1 after the end


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images (N, 8, 8), pixels from 0 to 1, and which digits they are."""
    pixels, values = load_digits(return_X_y=True)
    return torch.tensor(pixels / 16).float().view(-1, 8, 8), torch.tensor(values)


def pictures(part: slice, numbers: Tensor, noise: float) -> Tensor:
    """Images (B, 8, 16) of numbers from 0 to 99, each digit any of its images in this part."""
    images, values = (x[part] for x in digits())
    two = torch.stack([numbers // 10, numbers % 10], 1).view(-1, 1)
    which = torch.multinomial((two == values).float(), 1)
    made = images[which].view(-1, 2, 8, 8)
    made[numbers < 10, 0] = 0
    return made.transpose(1, 2).flatten(2) + noise * torch.randn(len(numbers), 8, 16)


class Captioner(torch.nn.Module):
    def __init__(self, library: Any, size: int) -> None:
        super().__init__()
        self.digit = torch.nn.Linear(8 * 8, size)
        self.states = torch.nn.Linear(2 * size, 2 * size)
        self.embedding = torch.nn.Embedding(len(LETTERS), size // 4)
        self.decoder = library.LSTM(size // 4, size)
        self.linear = torch.nn.Linear(size, len(LETTERS))

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        halves = relu(self.digit(images.unflatten(2, (2, 8)).transpose(1, 2).flatten(2)))
        h, c = self.states(halves.flatten(1))[None].chunk(2, 2)
        return h.tanh().contiguous(), c.contiguous()

    def forward(self, letters: Tensor, state: Any) -> tuple[Tensor, Any]:
        output, state = self.decoder(self.embedding(letters), state)
        return self.linear(output), state

    def write(self, images: Tensor, width: int) -> list[list[tuple[str, float]]]:
        """The names found for each image, the best first, and their probabilities."""
        first = torch.zeros(len(images), dtype=torch.long, device=images.device)
        found = beam_search(self, self.look(images), first, 0, width, longest=20)
        return [[("".join(LETTERS[i] for i in y), math.exp(p)) for y, p in one] for one in found]


def train(library: Any, cell: str, args: argparse.Namespace) -> Training:
    model = Captioner(library, args.hidden).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.updates)
    for _ in range(args.updates):
        numbers = torch.randint(100, (args.batch,))
        images = pictures(KNOWN, numbers, args.noise).to(args.device)
        right = CODED[:, numbers].to(args.device)
        before = pad(right[:-1].clamp(min=0), (0, 0, 1, 0))  # each letter's predecessor
        logits, _ = model(before, model.look(images))
        loss = cross_entropy(logits.flatten(0, 1), right.flatten(), ignore_index=-1)
        yield update(loss, optimizer, args.clip)
        schedule.step()
    numbers = torch.randint(100, (NUMBERS,))
    images = pictures(HELD_OUT, numbers, args.noise)
    greedy, beam = (model.write(images.to(args.device), width) for width in (1, WIDTH))
    found = list(zip([NAMES[i] for i in numbers], greedy, beam, strict=True))
    # For the picture: first images, one whose likeliest name greedy search misses, the least clear.
    unclear = min(range(NUMBERS), key=lambda i: beam[i][0][1])
    astray = [i for i, (_, a, b) in enumerate(found) if a[0][0] != b[0][0]]
    return {
        "greedy": sum(a[0][0] == name for name, a, _ in found) / NUMBERS,
        "beam": sum(b[0][0] == name for name, _, b in found) / NUMBERS,
        "among five": sum(name in dict(b) for name, _, b in found) / NUMBERS,
        "likelier by beam": sum(b[0][1] > 1.001 * a[0][1] for _, a, b in found) / NUMBERS,
        "examples": [
            {"image": images[i].tolist(), "name": found[i][0], "greedy": greedy[i], "beam": beam[i]}
            for i in [*range(8), (astray or [8])[0], unclear]
        ],
    }


def draw(runs: Runs) -> Figure:
    """What greedy search writes for some images, and what the beam finds for two unclear ones."""
    examples = runs["lstm"]["fastrnn"]["examples"]
    figure, axes = new_figure(3, 4, width=12, height=6.4)
    for one, shown in zip([*axes[:2].flat, *axes[2, ::2]], examples, strict=True):
        one.imshow(shown["image"], "gray", vmin=-0.5, vmax=1.5)
        one.axis("off")
        name, probability = shown["greedy"][0]
        right = name == shown["name"]
        text = f"{name}, {probability:.0%}" + ("" if right else f"\n(it is {shown['name']})")
        one.set_title(text, color="black" if right else "tab:red", size="medium")
    for one, shown in zip(axes[2, 1::2], examples[8:], strict=True):
        for y, (name, probability) in enumerate(shown["beam"]):
            one.barh(y, probability, color="palegreen" if name == shown["name"] else "lightgray")
            one.text(0, y, f" {name}, {probability:.0%}", va="center")
        one.set(yticks=[], xlabel="probability", ylim=(len(shown["beam"]) - 0.5, -0.5))
        one.set_title("found by beam search", size="medium")
    return figure


def main(argv: list[str] | None = None) -> int:
    noise = (0.18, "standard deviation; pixels go from 0 to 1")
    options = trainer(__doc__, updates=1500, hidden=256, batch=32, noise=noise, lr=1.5e-3, clip=1.0)
    return run(__file__, options.parse_args(argv), train, ["lstm"], draw)


if __name__ == "__main__":
    raise SystemExit(main())
