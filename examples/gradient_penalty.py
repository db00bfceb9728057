"""Train a Wasserstein GAN on sine waves, with a gradient penalty: second derivatives of a GRU.

A critic f maps a sequence to a number; a generator turns noise into sequences:

    critic:     minimize  E[f(G(z))] - E[f(x)] + 10 E[(|grad f(m)| - 1)^2]
    generator:  minimize  -E[f(G(z))]

with m at a random point between a real and a generated sequence (Gulrajani et al. 2017,
arXiv:1704.00028, algorithm 1 with its penalty, betas and number of critic updates). The penalty
contains a gradient, so its own gradient passes through the backward pass of the critic. cuDNN has
no second derivatives of a recurrent layer; torch.nn has them without cuDNN, and --stock compares
the losses of the first updates.

The real sequences are sine waves of random phase with a period of 8 to 16 steps. Both networks
consist of a recurrent layer and a linear one; f is the mean over all steps. The mean |grad f|
should approach 1. E[f(x)] - E[f(G(z))], the estimate of the Wasserstein distance, grows while the
critic learns to distinguish the two, and falls as the generator catches up.

    python examples/gradient_penalty.py
    python examples/gradient_penalty.py --stock --cell lstm
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from common import Runs, Training, new_figure, run, trainer, update
from matplotlib.figure import Figure
from torch import Tensor

NOISE, PENALTY, CRITIC_STEPS = 4, 10.0, 5


class Sequences(torch.nn.Module):
    """A recurrent layer from `library` and a linear one; maps sequences to sequences."""

    def __init__(self, library: Any, cell: str, width: int, hidden: int) -> None:
        super().__init__()
        self.recurrent = getattr(library, cell.upper())(width, hidden)
        self.linear = torch.nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.recurrent(x)[0])


def sines(args: argparse.Namespace) -> Tensor:
    """Make real sequences, (T, B, 1)."""
    phase, frequency = torch.rand(2, args.batch, 1, device=args.device) * 2 * math.pi
    time = torch.arange(args.steps, device=args.device).view(-1, 1, 1)
    return torch.sin(phase + time * (frequency + 2 * math.pi) / 16)


def noise(args: argparse.Namespace) -> Tensor:
    """Draw noise that is the same at all steps, so that it can determine the phase, for example."""
    return torch.randn(1, args.batch, NOISE, device=args.device).expand(args.steps, -1, -1)


def gradient_norm(critic: Sequences, real: Tensor, fake: Tensor) -> Tensor:
    """Return |grad f| at a random point between each pair; differentiable."""
    share = torch.rand_like(real[:1, :, :1])
    between = torch.lerp(fake, real, share).requires_grad_()
    with torch.backends.cudnn.flags(enabled=False):
        judged = critic(between)
    (gradient,) = torch.autograd.grad(judged.mean(0).sum(), between, create_graph=True)
    return gradient.square().sum((0, 2)).sqrt()


def train(library: Any, cell: str, args: argparse.Namespace) -> Training:
    critic = Sequences(library, cell, 1, args.hidden).to(args.device)
    generator = Sequences(library, cell, NOISE, args.hidden).to(args.device)
    optimizers = [
        torch.optim.Adam(module.parameters(), lr=args.lr, betas=(0.0, 0.9))
        for module in (critic, generator)
    ]
    distances, norms = [], []
    for _ in range(args.updates):
        losses = []
        for _ in range(CRITIC_STEPS):
            real = sines(args)
            with torch.no_grad():
                fake = generator(noise(args))
            norm = gradient_norm(critic, real, fake)
            distance = critic(real).mean() - critic(fake).mean()
            loss = PENALTY * (norm - 1).square().mean() - distance
            losses.append(update(loss, optimizers[0], math.inf))
        update(-critic(generator(noise(args))).mean(), optimizers[1], math.inf)
        distances.append(distance.item())
        norms.append(norm.mean().item())
        yield torch.stack(losses).mean()
    with torch.no_grad():
        drawn = generator(noise(args))[:, :4, 0].t().tolist()
    return {
        "distance in the end": sum(distances[-20:]) / len(distances[-20:]),
        "norm in the end": sum(norms[-20:]) / len(norms[-20:]),
        "distance": distances,
        "norm": norms,
        "drawn": drawn,
    }


def draw(runs: Runs) -> Figure:
    (of,) = runs.values()
    figures = of["fastrnn"]
    figure, (norm, distance, waves) = new_figure(1, 3, width=12)
    norm.plot(figures["norm"], color="tab:blue")
    norm.axhline(1, color="grey", linewidth=0.8)
    norm.set(title="norm of the critic's gradient", xlabel="updates of the generator")
    distance.plot(figures["distance"], color="tab:blue")
    distance.set(title="estimated Wasserstein distance", xlabel="updates of the generator")
    for wave in figures["drawn"]:
        waves.plot(wave)
    waves.set(title="sequences made of noise", xlabel="step")
    return figure


def main(argv: list[str] | None = None) -> int:
    options = trainer(
        __doc__,
        updates=(200, "of the generator"),
        hidden=32,
        batch=32,
        steps=(24, "length of the sequences"),
        lr=3e-3,
    )
    options.add_argument("--cell", choices=("lstm", "gru", "rnn"), default="gru")
    args = options.parse_args(argv)
    # Two networks that react to each other: rounding differences quickly grow large.
    return run(__file__, args, train, [args.cell], draw, first=10, floor=1.0, loose=math.inf)


if __name__ == "__main__":
    raise SystemExit(main())
