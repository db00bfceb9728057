"""Tag every frame of a clip: which digit does a bad camera see?

Many to many, in step: one tag per frame, from the frames so far or from all of them.

    f_t = relu(W_f x_t + b_f)                       x_t: the 64 pixels of frame t
    h_t = GRU(f_t, h_{t-1})                         unidirectional: frames 1 ... t
    g_t = GRU'(f_t, g_{t+1})                        bidirectional: frames t ... T as well
    p(tag of frame t) = softmax(W [h_t, g_t] + b)

The GRU is that of Cho et al. 2014, arXiv:1406.1078, the bidirectional network that of Schuster &
Paliwal 1997; "frame alone" has a linear layer instead of the recurrent one. The images are real:
handwritten digits of the UCI repository as included in scikit-learn, with the last third (by other
writers) held out. The clips are composed of them: a counter goes up or down, changes direction at
random and stays at each digit for a few frames. Every frame is a different image of its digit, with
heavy noise, and occasionally something passes in front of the camera.

    python examples/tag_frames.py --plot
"""

from __future__ import annotations

import argparse
from typing import Any

import digits_to_words
import torch
from common import Runs, Training, new_figure, run, trainer, update
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy, relu

VARIANTS = ("frame alone", "unidirectional", "bidirectional")
NOISE, HIDDEN_FRAMES, STAY, TURN = 0.35, 0.35, 0.7, 0.2


def of_each_digit(part: slice) -> list[Tensor]:
    """Return ten tensors of images, (N, 64), with pixels from 0 to 1."""
    images, values = (x[part] for x in digits_to_words.digits())
    return [images[values == digit].flatten(1) for digit in range(10)]


def films(images: list[Tensor], clips: int, frames: int) -> tuple[Tensor, Tensor]:
    """Make frames (T, B, 64) and the digit in each, (T, B)."""
    moves = torch.rand(frames, clips) > STAY
    turns = moves & (torch.rand(frames, clips) < TURN)
    direction = 1 - 2 * ((turns.cumsum(0) + torch.randint(2, (clips,))) % 2)
    tags = ((moves * direction).cumsum(0) + torch.randint(10, (clips,))) % 10
    seen = torch.empty(frames, clips, 64)
    for digit, of_digit in enumerate(images):
        here = tags == digit
        seen[here] = of_digit[torch.randint(len(of_digit), (int(here.sum()),))]
    seen *= (torch.rand(frames, clips, 1) > HIDDEN_FRAMES).float()
    return seen + NOISE * torch.randn(seen.shape), tags


class Tagger(torch.nn.Module):
    """A layer for the frames; a recurrent layer in one or both directions, or none; the tags."""

    def __init__(self, library: Any, variant: str, hidden: int) -> None:
        super().__init__()
        self.frames = torch.nn.Linear(64, 64)
        self.recurrent = None
        if variant == "unidirectional":
            self.recurrent = library.GRU(64, hidden)
        elif variant == "bidirectional":
            self.recurrent = library.GRU(64, hidden // 2, bidirectional=True)
        self.alone = torch.nn.Linear(64, hidden) if variant == "frame alone" else None
        self.linear = torch.nn.Linear(hidden, 10)

    def forward(self, frames: Tensor) -> Tensor:
        x = relu(self.frames(frames))
        if self.recurrent is None:
            return self.linear(relu(self.alone(x)))
        return self.linear(self.recurrent(x)[0])


def train(library: Any, variant: str, args: argparse.Namespace) -> Training:
    known, held_out = map(of_each_digit, (digits_to_words.KNOWN, digits_to_words.HELD_OUT))
    model = Tagger(library, variant, args.hidden).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.updates)
    for _ in range(args.updates):
        frames, tags = (x.to(args.device) for x in films(known, args.batch, args.frames))
        loss = cross_entropy(model(frames).flatten(0, 1), tags.flatten())
        yield update(loss, optimizer, args.clip)
        schedule.step()
    torch.manual_seed(args.seed)  # the same clips for all variants
    frames, tags = films(held_out, 500, args.frames)
    with torch.no_grad():
        read = model(frames.to(args.device)).argmax(2).cpu()
    return {
        "accuracy": (read == tags).float().mean().item(),
        "film": {
            "frames": (frames[:18, 0] * 100).round().int().tolist(),
            "truth": tags[:18, 0].tolist(),
            "read": read[:18, 0].tolist(),
        },
    }


def draw(runs: Runs) -> Figure:
    """Draw the first frames of a clip and the digits read in them, and the accuracies."""
    film = next(iter(runs.values()))["fastrnn"]["film"]
    figure, strip = new_figure(width=12, height=2.6)
    strip.axis("off")
    strip.set(xlim=(-3.2, len(film["truth"]) + 0.2), ylim=(-3.2, 1.6))
    strip.set_title("A clip of a counter, and the digit read in each frame (wrong ones in red)")
    for i, frame in enumerate(film["frames"]):
        image = [frame[row : row + 8] for row in range(0, 64, 8)]
        strip.imshow(image, "gray", vmin=-50, vmax=150, extent=(i + 0.03, i + 0.97, 0.55, 1.49))
    rows = [("digit", film["truth"])]
    rows += [(variant, of["fastrnn"]["film"]["read"]) for variant, of in runs.items()]
    for y, (name, tags) in enumerate(rows):
        share = f" {runs[name]['fastrnn']['accuracy']:.0%}" if name in runs else ""
        strip.text(-0.2, -0.9 * y, name + share, ha="right", va="center")
        for i, (tag, truth) in enumerate(zip(tags, film["truth"], strict=True)):
            color, weight = ("black", "normal") if tag == truth else ("tab:red", "bold")
            style = {"color": color, "weight": weight, "ha": "center", "va": "center"}
            strip.text(i + 0.5, -0.9 * y, str(tag), **style)
    strip.set_aspect("equal")
    return figure


def main(argv: list[str] | None = None) -> int:
    options = trainer(
        __doc__,
        updates=600,
        hidden=96,
        batch=32,
        frames=(40, "length of a clip"),
        lr=5e-3,
        clip=1.0,
    )
    return run(__file__, options.parse_args(argv), train, VARIANTS, draw)


if __name__ == "__main__":
    raise SystemExit(main())
