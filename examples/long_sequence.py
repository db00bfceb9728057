"""Train an LSTM through 100,000 steps, with the memory of a thousand.

Backward needs the gates of every step. With recompute=k the forward pass only keeps the output and
the state before each chunk of k steps; backward processes the chunks from the last to the first,
each forward and then backward (Chen et al. 2016, arXiv:1604.06174; Gruslys et al. 2016,
arXiv:1606.03401). The gradient is the same, not truncated; the price is a second forward pass.

The task: x_t is noise, and the target its running average with a memory of m steps,

    y_t = (1 - 1/m) y_{t-1} + x_t / m       scaled to unit variance

so that the state has to last for m steps and more. The gate biases are initialized so that the
units forget after 1 to 2 m steps (Tallec and Ollivier 2018, arXiv:1804.11188); with torch's initial
values they forget after a few.

First, one training step is measured for each variant, in a separate process: its time, and by how
much it raises the peak resident memory (on Linux). Then the model is trained with --chunk.

    python examples/long_sequence.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import now, parser, save
from torch import Tensor
from torch.nn.functional import mse_loss
from tqdm import trange

import fastrnn


class Averager(torch.nn.Module):
    """A recurrent layer from `library` and a linear one."""

    def __init__(self, library: Any, args: argparse.Namespace) -> None:
        super().__init__()
        self.recurrent = library.LSTM(1, args.hidden)
        self.scale = float(args.memory)
        self.linear = torch.nn.Linear(args.hidden, 1)
        forget = torch.empty(args.hidden).uniform_(1, 2 * args.memory).log()
        with torch.no_grad():
            zero = torch.zeros_like(forget)
            self.recurrent.bias_ih_l0.copy_(torch.cat([-forget, forget, zero, zero]))  # i, f, g, o
            self.recurrent.bias_hh_l0.zero_()
            self.linear.weight.zero_()

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.linear(self.recurrent(x, **options)[0] * self.scale)  # of order 1


def make_batch(steps: int, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Make noise and its averages, both (T, B, 1), with a layer of one linear unit."""
    x = torch.randn(steps, args.batch, 1)
    average = fastrnn.RNN(1, 1, bias=False, nonlinearity="identity")
    with torch.no_grad():
        average.weight_hh_l0.fill_(1 - 1 / args.memory)
        average.weight_ih_l0.fill_((2 / args.memory) ** 0.5)
        y, _ = average(x)
    return x.to(args.device), y.to(args.device)


def options_of(way: str) -> dict[str, Any]:
    """Return the keyword arguments of a call: none, recompute=True or recompute=1000."""
    return {} if way in ("torch.nn", "plain") else {"recompute": json.loads(way.lower())}


def peak(device: str) -> float:
    """Return the peak memory so far, in MiB: of the GPU, or resident memory of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    # Not from getrusage, whose peak a new process inherits from its parent.
    status = Path("/proc/self/status").read_text("utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**10


def measure(way: str, args: argparse.Namespace) -> dict[str, float]:
    """Measure time and memory of one training step."""
    model = Averager(torch.nn if way == "torch.nn" else fastrnn, args).to(args.device)

    def step(x: Tensor, y: Tensor) -> None:
        mse_loss(model(x, **options_of(way)), y).backward()

    step(*make_batch(100, args))  # triggers one-time initialization
    batch = make_batch(args.steps, args)
    before, start = peak(args.device), now(args.device)
    step(*batch)
    return {"seconds": now(args.device) - start, "MiB": peak(args.device) - before}


def train(args: argparse.Namespace) -> list[float]:
    torch.manual_seed(args.seed)
    model = Averager(fastrnn, args).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    losses = []
    for _ in trange(args.updates):
        x, y = make_batch(args.steps, args)
        loss = mse_loss(model(x, recompute=args.chunk), y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=100_000)
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--hidden", type=int, default=64)
    options.add_argument("--chunk", type=int, default=1000, help="steps computed again at once")
    options.add_argument("--memory", type=int, default=1000, help="steps that are averaged")
    options.add_argument("--updates", type=int, default=20)
    options.add_argument("--lr", type=float, default=1e-3)
    options.add_argument("--measure", help="only measure this: torch.nn, plain, True or a number")
    args = options.parse_args(argv)
    if args.measure:
        print(json.dumps(measure(args.measure, args)))
        return 0
    table: dict[str, Any] = {}
    print(f"{args.steps} steps of {args.batch} sequences, {args.hidden} units:")
    for way in ("torch.nn", "plain", "True", str(args.chunk)):
        command = [sys.executable, __file__, *(argv or sys.argv[1:]), "--measure", way]
        table[way] = json.loads(subprocess.check_output(command, encoding="utf-8"))
        name = "recompute=" * bool(options_of(way)) + way
        print(f"  {name:16} {table[way]['MiB']:6.0f} MiB {table[way]['seconds']:6.2f} s")
    before, start = peak(args.device), now(args.device)
    losses = train(args)
    used, seconds = peak(args.device) - before, now(args.device) - start
    print(f"mean squared error: first update {losses[0]:.3f}, last {losses[-1]:.3f}")
    print(f"{args.updates} updates, recompute={args.chunk}: {seconds:.1f} s, {used:.0f} MiB")
    save(args.out, "long_sequence", {"table": table, "losses": losses, "MiB": used})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
