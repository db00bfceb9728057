"""Long memory: how far back do an RNN, a GRU and an LSTM remember?

Many to one: numbers u_t and marks m_t go in; the target is the sum of the marked numbers.

    h_t = tanh(W_x [u_t, m_t] + W_h h_{t-1} + b)     or GRU, or LSTM
    o = w h_T + v                                    should be y = m_1 u_1 + ... + m_T u_T

    recall     u_t uniform in [-1, 1], the first one is marked
    adding     u_t uniform in [-1, 1], one in the first half and one in the second half are marked
    counting   u_t = 1, each step is marked with a probability that varies between sequences; where
               it is 1 this is the running sum 1 + 1 + 1 + ...

Delayed recall is the simplest task that needs memory: Bengio, Simard & Frasconi 1994, "Learning
long-term dependencies with gradient descent is difficult". The adding problem is that of Hochreiter
& Schmidhuber 1997, "Long short-term memory". Counters in recurrent networks: Weiss, Goldberg &
Yahav 2018, arXiv:1805.04908. The LSTM's forget gates start with a bias near 2 (Gers et al. 2000,
"Learning to forget"), so that it remembers from the start.

The data are generated, as the tasks are synthetic. Training sequences have at most --steps steps,
fewer in the first half of training. Errors are mean squares, relative to those of the best guess
that ignores the numbers, at lengths up to twice that: 1 is no better than that guess.

    python examples/long_memory.py --plot
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from common import COLOURS, Runs, Training, new_figure, remember, run, trainer, update
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import mse_loss

TASKS = ("recall", "adding", "counting")
VARIANTS = [f"{task}, {cell}" for task in TASKS for cell in COLOURS]
TENTHS = (1, 2, 4, 6, 8, 10, 12, 15, 20)  # test lengths, in tenths of --steps
SCALE = 10  # a sum of a hundred ones is out of reach of a newly initialized layer


def drawn(task: str, steps: int, batch: int) -> Tensor:
    """Draw numbers and marks, (T, B, 2)."""
    numbers, marks = torch.rand(steps, batch) * 2 - 1, torch.zeros(steps, batch)
    if task == "counting":
        numbers, marks = torch.ones(steps, batch), torch.rand(steps, batch) < torch.rand(batch)
    elif task == "recall":
        marks[0] = 1
    else:
        middle, column = max(steps // 2, 1), torch.arange(batch)
        marks[torch.randint(middle, (batch,)), column] = 1
        marks[torch.randint(steps // 2, steps, (batch,)), column] = 1
    return torch.stack([numbers, marks.float()], dim=2)


class Memory(torch.nn.Module):
    def __init__(self, library: Any, cell: str, task: str, hidden: int) -> None:
        super().__init__()
        self.recurrent = getattr(library, cell.upper())(2, hidden)
        self.linear = torch.nn.Linear(hidden, 1)
        self.scale = SCALE if task == "counting" else 1
        if cell == "lstm":
            remember(self.recurrent, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the answer after each step, (T, B)."""
        return self.scale * self.linear(self.recurrent(x)[0]).squeeze(2)


def train(library: Any, variant: str, args: argparse.Namespace) -> Training:
    task, cell = variant.split(", ")
    model = Memory(library, cell, task, args.hidden).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.updates)
    for i in range(args.updates):
        longest = math.ceil(args.steps * min(1, 2 * (i + 1) / args.updates))
        steps = int(torch.randint(2, max(longest, 2) + 1, ()))
        x = drawn(task, steps, args.batch).to(args.device)
        error = mse_loss(model(x)[-1], x.prod(2).sum(0))
        yield update(error / model.scale**2, optimizer, args.clip)
        schedule.step()
    lengths, errors = [args.steps * tenths // 10 for tenths in TENTHS], []
    with torch.no_grad():
        for steps in lengths:
            x = drawn(task, steps, 2000).to(args.device)
            sums = x.prod(2).sum(0)
            errors.append((mse_loss(model(x)[-1], sums) / sums.var()).item())
        ones = model(torch.ones(lengths[-1], 1, 2, device=args.device))[:, 0].tolist()
    figures = {"error": errors[TENTHS.index(10)], "lengths": lengths, "errors": errors}
    return figures | ({"1 + 1 + 1 + ...": ones} if task == "counting" else {})


def draw(runs: Runs) -> Figure:
    """Plot errors over length for each task, and the answers to 1 + 1 + 1 + ..."""
    figure, axes = new_figure(2, 2, width=11, height=6.4)
    for task, one in zip(TASKS, axes.flat, strict=False):
        for cell, color in COLOURS.items():
            of = runs[f"{task}, {cell}"]["fastrnn"]
            one.semilogy(of["lengths"], of["errors"], "o-", color=color, label=cell.upper())
            if "1 + 1 + 1 + ..." in of:
                answers = of["1 + 1 + 1 + ..."]
                axes[1, 1].plot(range(1, len(answers) + 1), answers, color=color)
        one.set(title=task, xlabel="length of the sequence", ylabel="error", xlim=0)
        one.axhline(1, color="0.3", linewidth=0.8, linestyle=":")
    for one in axes.flat:
        one.axvspan(of["lengths"][TENTHS.index(10)], of["lengths"][-1], color="0.93", zorder=0)
    axes[0, 0].legend()
    axes[1, 1].axline((0, 0), slope=1, color="black", linestyle=":", label="sum")
    axes[1, 1].set(title="1 + 1 + 1 + ...", xlabel="steps", ylabel="answer", xlim=0, ylim=0)
    axes[1, 1].legend()
    figure.supxlabel("grey: longer than any sequence in training", fontsize="small")
    return figure


def main(argv: list[str] | None = None) -> int:
    options = trainer(__doc__, updates=600, hidden=64, batch=32, steps=100, lr=5e-3, clip=1.0)
    # Rounding decides at which update a network succeeds, so only the beginnings are compared.
    args = options.parse_args(argv)
    if args.steps < 10:
        options.error(f"--steps must be at least 10, got {args.steps}")
    return run(__file__, args, train, VARIANTS, draw, first=20, loose=math.inf)


if __name__ == "__main__":
    raise SystemExit(main())
