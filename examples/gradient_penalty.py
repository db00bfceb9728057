"""Train a Wasserstein GAN on sine waves, with a gradient penalty: second derivatives of a GRU.

A critic f reads a sequence and gives it a number; a generator turns noise into sequences:

    critic:     minimise  E[f(G(z))] - E[f(x)] + 10 E[(|grad f(m)| - 1)^2]
    generator:  minimise  -E[f(G(z))]

with m at a random point between a real and a generated sequence (Gulrajani et al. 2017,
arXiv:1704.00028, algorithm 1 with its constants). The penalty is made of a gradient, so its own
gradient passes through the backward pass of the critic. cuDNN has no second derivatives of a
recurrent layer; torch.nn has without it, and --stock compares the losses of the first steps.

Real data: sine waves of random phase and a period of 8 to 16 steps. Both networks are a recurrent
layer and a linear one. Printed are the mean |grad f|, which should come near 1, and
E[f(x)] - E[f(G(z))], the estimate of the Wasserstein distance: it grows while the critic learns
to tell the two apart, and falls when the generator has caught up.

    python examples/gradient_penalty.py
    python examples/gradient_penalty.py --stock --cell lstm
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from common import Run, now, parser, same_curve, save
from torch import Tensor
from tqdm import trange

import fastrnn

NOISE, PENALTY, CRITIC_STEPS = 4, 10.0, 5


class Sequences(torch.nn.Module):
    """A recurrent layer from `library` and a linear one, from sequence to sequence."""

    def __init__(self, library: Any, cell: str, width: int, hidden: int) -> None:
        super().__init__()
        self.recurrent = getattr(library, cell.upper())(width, hidden)
        self.linear = torch.nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.recurrent(x)[0])


def sines(args: argparse.Namespace) -> Tensor:
    """Real sequences, (T, B, 1)."""
    phase, frequency = torch.rand(2, args.batch, 1, device=args.device) * 2 * math.pi
    time = torch.arange(args.steps, device=args.device).view(-1, 1, 1)
    return torch.sin(phase + time * (frequency + 2 * math.pi) / 16)


def noise(args: argparse.Namespace) -> Tensor:
    """The same at all steps, so that what is drawn can be the phase, and so on."""
    return torch.randn(1, args.batch, NOISE, device=args.device).expand(args.steps, -1, -1)


def gradient_norm(critic: Sequences, real: Tensor, fake: Tensor) -> Tensor:
    """|grad f| at a random point between each pair; can be differentiated again."""
    share = torch.rand_like(real[:1, :, :1])
    between = torch.lerp(fake, real, share).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).mean(0).sum(), between, create_graph=True)
    return gradient.square().sum((0, 2)).sqrt()


def train(library: Any, args: argparse.Namespace) -> tuple[Run, dict[str, list[float]]]:
    torch.manual_seed(args.seed)
    critic = Sequences(library, args.cell, 1, args.hidden).to(args.device)
    generator = Sequences(library, args.cell, NOISE, args.hidden).to(args.device)
    optimizers = [
        torch.optim.Adam(module.parameters(), lr=args.lr, betas=(0.0, 0.9))
        for module in (critic, generator)
    ]
    run, log = Run(), {"distance": [], "norm": []}
    start = now(args.device)
    for _ in trange(args.updates, desc=library.__name__):
        for _ in range(CRITIC_STEPS):
            real = sines(args)
            with torch.no_grad():
                fake = generator(noise(args))
            norm = gradient_norm(critic, real, fake)
            distance = critic(real).mean() - critic(fake).mean()
            loss = PENALTY * (norm - 1).square().mean() - distance
            optimizers[0].zero_grad()
            loss.backward()
            optimizers[0].step()
            run.losses.append(loss.item())
        optimizers[1].zero_grad()
        (-critic(generator(noise(args))).mean()).backward()
        optimizers[1].step()
        log["distance"].append(distance.item())
        log["norm"].append(norm.mean().item())
    run.seconds = now(args.device) - start
    return run, log


def tenths(values: list[float]) -> str:
    return " ".join(f"{part.mean():.2f}" for part in torch.tensor(values).tensor_split(10))


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    add = options.add_argument
    add("--stock", action="store_true", help="train with torch.nn too; exit 1 if losses differ")
    add("--cell", choices=("lstm", "gru", "rnn"), default="gru")
    add("--hidden", type=int, default=32)
    add("--batch", type=int, default=32)
    add("--steps", type=int, default=24, help="length of the sequences")
    add("--updates", type=int, default=200, help="of the generator")
    add("--lr", type=float, default=3e-3)
    args = options.parse_args(argv)
    run, log = train(fastrnn, args)
    print(f"{run.seconds:.1f} s; means of each tenth of the run:")
    print(f"  estimated distance {tenths(log['distance'])}")
    print(f"  norm of the critic's gradient {tenths(log['norm'])}")
    save(args.out, "gradient_penalty", {**log, "seconds": run.seconds})
    if args.stock:
        args.updates = min(10, args.updates)  # two networks that react to each other: chaos
        with torch.backends.cudnn.flags(enabled=False):
            stock, _ = train(torch.nn, args)
        return 0 if same_curve(train(fastrnn, args)[0], stock, floor=1.0) else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
