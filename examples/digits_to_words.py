"""One to many: an image of a number goes in, its name comes out letter by letter.

    e = relu of W_e (pixels) + b, for the left and the right half
    s_0 = (tanh(W_h e), W_c e)                            s: states h and c
    s_t = LSTM(E[y_{t-1}], s_{t-1})                       y_0 is the end symbol
    p(y_t | y_1 ... y_{t-1}) = softmax(W h_t + b)         a letter, a space or the end

A small captioner in the style of Vinyals et al. 2015, "Show and tell", arXiv:1411.4555: an image
network feeds a recurrent network that writes. (Theirs takes the image as the first word; here it is
the initial state.) In training, each step is given the correct previous letter ("teacher forcing");
in use, the letter it wrote. Taking the best letter each time ("greedy") can miss the likeliest
name: t, with which many begin, can be the likeliest letter without starting that name. Beam search
(beam.py) follows the five best prefixes; with so few names both mostly agree on the best one.

Two handwritten digits side by side, with noise, form a number; below ten the left half is empty.
The digits are real, from the UCI repository as included in scikit-learn. The last third, by other
writers, is held out for the test.

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

KNOWN, HELD_OUT = slice(1157), slice(1157, None)  # images: a new writer begins there
NUMBERS, WIDTH = 1000, 5  # test numbers; beam width
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
ONES = f"{ONES} fifteen sixteen seventeen eighteen nineteen".split()
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
NAMES = ONES + [f"{ten} {one}".strip() for ten in TENS for one in ["", *ONES[1:10]]]
LETTERS = [".", *sorted(set("".join(NAMES)))]  # "." is the end symbol, code 0
CODES = [torch.tensor([LETTERS.index(letter) for letter in name + "."]) for name in NAMES]
CODED = pad_sequence(CODES, padding_value=-1)  # (letters, 100), -1 after the end


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Return images (N, 8, 8), with pixels from 0 to 1, and their digits."""
    pixels, values = load_digits(return_X_y=True)
    return torch.tensor(pixels / 16).float().view(-1, 8, 8), torch.tensor(values)


def pictures(part: slice, numbers: Tensor, noise: float) -> Tensor:
    """Make images (B, 8, 16) of numbers from 0 to 99 from random images of this part's digits."""
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
        """Return the names found for each image, the best first, with their probabilities."""
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
    # For the picture: the first images, one whose best name greedy search misses, the least clear.
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
    """Draw what greedy search writes for some images, and the beam's names for two unclear ones."""
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
