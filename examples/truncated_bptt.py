"""Truncated backpropagation through time: how far back must gradients reach, and what does it cost?

Full BPTT (Werbos 1990) differentiates through all T steps of a sequence and keeps all of them in
memory until then. Truncated BPTT (Williams & Peng 1990) reads windows of k steps; the state carries
over from one window to the next, but gradients stop between them:

    h_t = GRU(x_t, h_{t-1})           dh_t/dh_{t-1} taken as 0 where t is a multiple of k
    loss = -mean of log p(letter)     at each question, p = softmax(W h_t + b)

Many to many: a letter appears, and 10 to 40 steps later a question mark asks which one it was; then
the next letter follows. With k = 5 no gradient ever leads from a question to its letter. With
k = 20 the nearest ones do; what it learns from these also holds at larger distances. Memory is what
autograd keeps of a window for backward. `bptt=k` gives the same gradients in a single call.

    python examples/truncated_bptt.py --plot
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from typing import Any

import torch
from common import Runs, Training, new_figure, plot_losses, run, seconds_each, trainer
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

import fastrnn

LETTERS, NEAREST, FARTHEST, UNASKED = 4, 10, 40, -100
VARIANTS = {"k = 5": 5, "k = 20": 20, "k = 50": 50, "full": None}


def questions(steps: int, batch: int) -> tuple[Tensor, Tensor]:
    """Make letters, questions and blanks, (T, B, LETTERS + 1); answers, else UNASKED."""
    apart = torch.randint(NEAREST, FARTHEST + 1, (steps // NEAREST, batch))
    asked = (apart + 1).cumsum(0) - 1
    shown = asked - apart
    letters = torch.randint(LETTERS, apart.shape)
    length = int(asked.max()) + 1
    x, answers = torch.zeros(length, batch, LETTERS + 1), torch.full((length, batch), UNASKED)
    column = torch.arange(batch).expand_as(apart)
    x[shown, column, :LETTERS] = one_hot(letters, LETTERS).float()
    x[asked, column, LETTERS] = 1
    answers[asked, column] = letters
    return x[:steps], answers[:steps]


class Answerer(torch.nn.Module):
    def __init__(self, library: Any, hidden: int) -> None:
        super().__init__()
        self.recurrent = library.GRU(LETTERS + 1, hidden)
        self.linear = torch.nn.Linear(hidden, LETTERS)

    def forward(self, x: Tensor, state: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
        output, last = self.recurrent(x, state, **options)
        return self.linear(output), last


def gradients(model: Answerer, x: Tensor, answers: Tensor, k: int | None, **options: Any) -> Tensor:
    """Accumulate gradients of the mean over all questions, window by window; return that mean."""
    total, state, asked = x.new_zeros(()), None, (answers != UNASKED).sum()
    for window, of in zip(x.split(k or len(x)), answers.split(k or len(x)), strict=True):
        logits, state = model(window, state, **options)
        loss = cross_entropy(logits.flatten(0, 1), of.flatten(), reduction="sum")
        (loss / asked).backward()
        state = state.detach()
        total += loss.detach()
    return total / asked


def kept(model: Answerer, window: Tensor) -> int:
    """Count the bytes that autograd keeps for a window, without those of the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def see(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        _graph = model(window)  # kept until the bytes are counted, or memory would be reused
    return sum(size for address, size in found.items() if address not in parameters)


def both_ways(model: Answerer, x: Tensor, answers: Tensor, k: int | None) -> dict[str, float]:
    """Time the gradients by windows and by one call, which are the same gradients."""
    found, ways = [], (partial(gradients, k=k), partial(gradients, k=None, bptt=k))
    for way in ways:
        model.zero_grad()
        way(model, x, answers)
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
    times = seconds_each(x.device.type, 5, *(partial(way, model, x, answers) for way in ways))
    return {"ms by windows": times[0] * 1e3, "ms by bptt=": times[1] * 1e3}


def train(library: Any, variant: str, args: argparse.Namespace) -> Training:
    k = VARIANTS[variant]
    model = Answerer(library, args.hidden).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    for _ in range(args.updates):
        x, answers = (part.to(args.device) for part in questions(args.steps, args.batch))
        optimizer.zero_grad()
        loss = gradients(model, x, answers, k)
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        yield loss
    costs = {"MiB kept": kept(model, x[:k].clone()) / 2**20}
    costs |= both_ways(model, x, answers, k) if library is fastrnn else {}
    torch.manual_seed(args.seed)  # the same questions for all variants
    x, answers = (part.to(args.device) for part in questions(args.steps, 500))
    with torch.no_grad():
        right = (model(x)[0].argmax(2) == answers)[answers != UNASKED]
    return {"accuracy": right.float().mean().item(), **costs}


def draw(runs: Runs) -> Figure:
    figure, (curves, time, memory) = new_figure(1, 3, width=12, width_ratios=(3, 2, 2))
    figure.suptitle("Truncated BPTT: which letter was it, 10 to 40 steps ago?")
    for i, (variant, of) in enumerate(runs.items()):
        ours = of["fastrnn"]
        plot_losses(curves, ours, label=f"{variant}: {ours['accuracy']:.0%} right")
        time.bar(i - 0.2, ours["ms by windows"], 0.4, color="tab:grey")
        time.bar(i + 0.2, ours["ms by bptt="], 0.4, color="tab:blue")
        memory.bar_label(memory.bar(i, ours["MiB kept"], color="tab:grey"), fmt="%.1f")
    curves.set(title="training", ylim=(0, 2))
    curves.legend(ncols=2, loc="upper right")
    time.set(title="time of the gradients", ylabel="ms")
    time.legend(["by windows", "by bptt=k"])
    memory.set(title="kept for backward, by windows", ylabel="MiB")
    for axes in (time, memory):
        axes.set_xticks(range(len(runs)), list(runs))
    return figure


def main(argv: list[str] | None = None) -> int:
    options = trainer(__doc__, updates=250, hidden=64, batch=32, steps=200, lr=5e-3, clip=1.0)
    # Rounding decides when a network learns to remember: only the beginning is compared.
    args = options.parse_args(argv)
    if args.steps < FARTHEST:
        options.error(f"--steps must be at least {FARTHEST}, got {args.steps}")
    return run(__file__, args, train, list(VARIANTS), draw, loose=math.inf)


if __name__ == "__main__":
    raise SystemExit(main())
