"""Where will the ball be next? An Elman network watches it bounce around a box.

Many to many, in step: after each position that it sees, the network predicts the next one.

    h_t = phi(W_x x_t + W_h h_{t-1} + b)      x_t: the position seen at step t
    o_t = W_o h_t + b_o                       x_{t+1} is predicted as x_t + o_t

This is the simple recurrent network of Elman 1990, "Finding structure in time". phi is relu, which
suits a path that is straight between bounces; with the more usual tanh it learns more slowly. The
loss is the distance from the true position at every step of every track. Tracks of different
lengths, packed, train it to predict from any history of up to --longest positions.

The tracks are simulated: a ball with a random position, velocity, gravity, and spin that bends its
path, in a box from -1 to 1. The network sees positions only. The baseline extrapolates the last
velocity, 2 x_t - x_{t-1}, which ignores bends and walls.

    python examples/elman_ball.py --plot
    python examples/elman_ball.py --phi tanh
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from typing import Any

import torch
from common import Runs, Training, batches, new_figure, run, trainer, update
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

TRACKS, HELD_OUT = 4096, 1000
# In the picture: tracks, start and length of the free run, errors that are marked with a cross.
SHOWN, START, ALONE, FAR = 3, 12, 6, 0.08
DRAWN = ("true", "own", "last", "alone")
WHERE = ("everywhere", "near walls", "elsewhere")


def roll(count: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return positions, (steps, count, 2), and whether a wall is hit on the way to the next."""
    place = torch.rand(count, 2) * 1.8 - 0.9
    angle, speed = torch.rand(count) * math.tau, torch.rand(count) * 0.12 + 0.08
    velocity = torch.stack([angle.cos(), angle.sin()], 1) * speed[:, None]
    spin, gravity = torch.rand(count) * 0.5 - 0.25, torch.rand(count, 1) * torch.tensor([0, 0.025])
    turn = torch.stack([spin.cos(), -spin.sin(), spin.sin(), spin.cos()], 1).view(count, 2, 2)
    places, hits = [], []
    for _ in range(steps):
        places.append(place)
        velocity = (turn @ velocity[:, :, None])[:, :, 0] - gravity
        place = place + velocity
        outside = place.abs() > 1
        place = torch.where(outside, 2 * place.sign() - place, place)
        velocity = torch.where(outside, -velocity, velocity)
        hits.append(outside.any(1))
    return torch.stack(places), torch.stack(hits)


class Elman(torch.nn.Module):
    """Recurrent layer and linear layer; the recurrent one comes from `library`."""

    def __init__(self, library: Any, phi: str, hidden: int) -> None:
        super().__init__()
        self.recurrent = library.RNN(2, hidden, nonlinearity=phi)
        self.linear = torch.nn.Linear(hidden, 2)

    def forward(self, places: Any, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the predictions; for packed positions in packed order."""
        output, state = self.recurrent(places, state)
        if isinstance(places, PackedSequence):
            places, output = places.data, output.data
        return places + self.linear(output), state


def train(library: Any, phi: str, args: argparse.Namespace) -> Training:
    places = roll(TRACKS, args.longest + 1)[0].to(args.device)
    model = Elman(library, phi, args.hidden).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.updates)
    for batch in batches(TRACKS, args):
        lengths = torch.randint(1, args.longest + 1, (args.batch,))
        pack = partial(pack_padded_sequence, lengths=lengths, enforce_sorted=False)
        seen, following = pack(places[:-1, batch]), pack(places[1:, batch])
        loss = (model(seen)[0] - following.data).norm(dim=1).mean()
        yield update(loss, optimizer, args.clip)
        schedule.step()
    return evaluate(model, *(part.to(args.device) for part in roll(HELD_OUT, args.longest + 1)))


@torch.no_grad()
def evaluate(model: Elman, places: Tensor, hits: Tensor) -> dict[str, Any]:
    """Return mean distances from the true positions, for histories from two on, and some tracks."""
    own, last = model(places[:-1])[0], 2 * places[1:-1] - places[:-2]
    near = hits[1:-1] | hits[:-2]  # a bounce also spoils the velocity of the following step
    figures: dict[str, Any] = {}
    for who, guess in {"network": own[1:], "last velocity": last}.items():
        distance = (guess - places[2:]).norm(dim=2)
        for where, mask in zip(WHERE, (near | True, near, ~near), strict=True):
            figures[f"{who} {where}"] = distance[mask].mean().item()
            by_history = (distance * mask).sum(1) / mask.sum(1)
            figures[f"{who} {where} by history"] = by_history.tolist()
    alone, state = model(places[:START, :SHOWN])
    for _ in range(ALONE - 1):
        guess, state = model(alone[-1:], state)
        alone = torch.cat([alone, guess])
    for name, x in zip(DRAWN, (places, own[1:], last, alone[-ALONE:]), strict=True):
        figures[name] = x[:, :SHOWN].permute(1, 2, 0).tolist()
    return figures


def draw(runs: Runs) -> Figure:
    """Draw three held-out tracks, and the error over the number of positions seen."""
    (figures,) = (of["fastrnn"] for of in runs.values())
    figure, (tracks, distances) = new_figure(2, SHOWN, width=11, height=7.4, height_ratios=(4, 3))
    for k, axes in enumerate(tracks):
        true, own, last, alone = (torch.tensor(figures[name][k]) for name in DRAWN)
        last = last[:, (last - true[:, 2:]).norm(dim=0) > FAR]
        axes.plot(*true, ".-", color="0.7", markersize=9, label="true positions")
        axes.plot(*last, "x", color="tab:red", label=f"guess by last velocity, if off by {FAR}")
        axes.plot(*own, "o", color="tab:blue", mfc="none", label="guess of the network")
        axes.plot(*alone, "-", color="tab:blue", label="network fed its own guesses")
        axes.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal")
        axes.add_patch(Rectangle((-1, -1), 2, 2, fill=False, linewidth=2))
        axes.axis("off")
    figure.legend(*tracks[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    for where, axes in zip(WHERE, distances, strict=True):
        for who, color in {"last velocity": "tab:red", "network": "tab:blue"}.items():
            values = figures[f"{who} {where} by history"]
            axes.plot(range(2, 2 + len(values)), values, color=color, label=who)
        axes.set(title=f"mean error {where}", xlabel="positions seen", ylim=0)
    distances[0].set_ylabel("distance (the box: 2 wide)")
    distances[2].legend()
    return figure


def main(argv: list[str] | None = None) -> int:
    longest = 30, "positions of the longest history"
    options = trainer(
        __doc__, updates=2500, hidden=96, batch=32, longest=longest, lr=8e-3, clip=1.0
    )
    options.add_argument("--phi", choices=("relu", "tanh"), default="relu")
    args = options.parse_args(argv)
    # The kinks of relu, and of a distance at 0, amplify rounding differences.
    return run(__file__, args, train, [args.phi], draw, loose=0.1)


if __name__ == "__main__":
    raise SystemExit(main())
