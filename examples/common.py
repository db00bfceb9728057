"""Shared by the examples: options, training compared with torch.nn, results, pictures."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import fastrnn
from fastrnn.bench.environment import environment

# A training run yields its loss after each update and returns the figures of the result.
Training = Generator[Tensor, None, dict[str, Any]]
Runs = dict[str, dict[str, Any]]  # figures by variant, then library
COLOURS = {"rnn": "tab:orange", "gru": "tab:green", "lstm": "tab:blue"}
HELP = {
    "updates": "steps of the optimizer",
    "batch": "sequences in a batch",
    "hidden": "units of each recurrent layer, a multiple of 4",
    "steps": "length of a sequence",
    "lr": "learning rate",
    "clip": "largest norm of the gradient",
    "temperature": "below 1 what is likelier gets likelier",
}
POINTS = 200  # of a loss curve in a results file
_NUMBERS = re.compile(r"\[[-+.,\sEe\dNaInfity]*\]")


def parser(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Make a parser with the common options, and an additional option for each default.

    A default is a number or a string, or a pair of that and a help text.
    """
    made = argparse.ArgumentParser(
        description=(doc or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--out", type=Path, help="folder for the figures as JSON")
    for name, given in defaults.items():
        default, text = given if isinstance(given, tuple) else (given, HELP.get(name))
        kind = type(default)
        kind = multiple(4 if name == "hidden" else 1) if kind is int else kind
        made.add_argument(f"--{name}", type=kind, default=default, help=text or " ")
    return made


def multiple(of: int) -> Callable[[str], int]:
    """Return the type of an option that is at least `of`, and a multiple of it."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < of or int(text) % of:
            kind = f"a multiple of {of}, at least that" if of > 1 else "a whole number from 1 on"
            raise argparse.ArgumentTypeError(f"must be {kind}, got {text!r}")
        return int(text)

    return parse


def trainer(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Make the parser of an example that ends in `run`."""
    made = parser(doc, **defaults)
    made.add_argument(
        "--stock", action="store_true", help="train with torch.nn too; exit 1 if losses differ"
    )
    made.add_argument("--plot", action="store_true", help="draw NAME.png in --out, or examples/out")
    return made


def update(loss: Tensor, optimizer: torch.optim.Optimizer, clip: float) -> Tensor:
    """Take an optimizer step, after clipping the gradient to the norm `clip`."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
    optimizer.step()
    return loss.detach()


def remember(lstm: torch.nn.Module, bias: float) -> None:
    """Initialize the forget gates of a single-layer LSTM as open."""
    size = lstm.hidden_size
    with torch.no_grad():
        lstm.bias_hh_l0[size : 2 * size] += bias


def batches(count: int, args: argparse.Namespace) -> Iterator[Tensor]:
    """Yield indices below `count` for each update, in a new random order for each epoch."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(args.updates):
        if len(order) < args.batch:
            again = -(-args.batch // count)
            order = torch.cat([order, *(torch.randperm(count) for _ in range(again))])
        yield order[: args.batch].to(args.device)
        order = order[args.batch :]


class Lane:
    """A training run that advances update by update, with its own clock and random numbers."""

    def __init__(self, training: Training, args: argparse.Namespace) -> None:
        self.training, self.device = training, args.device
        self.gpu = [args.device] if args.device.startswith("cuda") else []
        self.random = [
            torch.Generator(device).manual_seed(args.seed).get_state()
            for device in ("cpu", *self.gpu)
        ]
        self.losses: list[Tensor] = []
        self.seconds: list[float] = []
        self.figures: dict[str, Any] | None = None

    def advance(self) -> None:
        """Advance to the next loss, or to the final figures."""
        with torch.random.fork_rng(self.gpu):
            torch.set_rng_state(self.random[0])
            for device in self.gpu:
                torch.cuda.set_rng_state(self.random[1], device)
            start = now(self.device)
            try:
                self.losses.append(next(self.training))
                self.seconds.append(now(self.device) - start)
            except StopIteration as stop:
                self.figures = stop.value
            self.random = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self.gpu)]

    def result(self) -> dict[str, Any]:
        losses = torch.stack(self.losses).double().cpu()
        points = [part.mean().item() for part in losses.tensor_split(min(POINTS, len(losses)))]
        times = {"seconds": sum(self.seconds), "step": median(self.seconds)}
        return {**(self.figures or {}), **times, "losses": points}


def run(
    example: str,
    args: argparse.Namespace,
    train: Callable[[Any, str, argparse.Namespace], Training],
    variants: Sequence[str],
    draw: Callable[[Runs], Figure] | None = None,
    **tolerances: float,
) -> int:
    """Train every variant, with --stock also with torch.nn; print, save and draw the results.

    Parameters
    ----------
    example : str
        The ``__file__`` of the example.
    args : argparse.Namespace
        Options, including those of `trainer`.
    train : callable
        ``train(library, variant, args)`` starts a training run with the layers of `library`, which
        is fastrnn or torch.nn. Both start from the same seed and alternate update by update, so
        that other load on the machine slows both equally.
    variants : sequence of str
        What the example compares: cells, numbers of layers, and the like.
    draw : callable, optional
        Makes a picture from all figures.
    tolerances : float
        For `same_curve`.

    Returns
    -------
    int
        Exit status: 1 if a loss curve differs from torch.nn's.
    """
    _warm_up()
    if args.device.startswith("cuda"):
        torch.backends.cudnn.allow_tf32 = False  # with TF32, losses differ by 1e-3
    runs: Runs = {}
    agreement = {}
    for variant in variants:
        lanes = {
            library.__name__: Lane(train(library, variant, args), args)
            for library in ([fastrnn, torch.nn] if args.stock else [fastrnn])
        }
        with tqdm(total=args.updates, desc=variant, disable=None) as bar:
            while any(lane.figures is None for lane in lanes.values()):
                for lane in lanes.values():
                    lane.advance()
                if lane.figures is None:
                    bar.update()
                    if bar.n % 20 == 0:  # not every time: reading the loss synchronizes
                        bar.set_postfix(loss=f"{lane.losses[-1].item():.4g}")
        runs[variant] = {library: lane.result() for library, lane in lanes.items()}
        for library, figures in runs[variant].items():
            print(f"{variant}, {library}: {_in_words(figures)}")
        if args.stock:
            losses = [torch.stack(lane.losses).tolist() for lane in lanes.values()]
            agreement[variant] = same_curve(*losses, **tolerances)
    name = Path(example).stem
    command = f"python examples/{name}.py {' '.join(sys.argv[1:])}".strip()
    record = {
        "environment": asdict(environment(torch.device(args.device), command)),
        "arguments": {key: x for key, x in vars(args).items() if key not in ("out", "plot")},
        "agreement": agreement,
        "runs": runs,
    }
    save(args.out, name, record)
    if args.plot and draw:
        path = (args.out or Path(example).parent / "out") / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(runs).savefig(path, dpi=110)
        print(f"picture: {path}")
    return 0 if all(agreement.values()) else 1


def _warm_up() -> None:
    """Run the first update of the process, whose lazy imports would be charged to one library."""
    linear = torch.nn.Linear(1, 1)
    update(linear(torch.ones(1, 1)).sum(), torch.optim.Adam(linear.parameters()), 1.0)


def _in_words(figures: dict[str, Any]) -> str:
    return ", ".join(f"{key} {x:.4g}" for key, x in figures.items() if isinstance(x, (int, float)))


def in_package(package: str, path: str) -> Path:
    """Locate a file or folder of an installed package, without importing the package."""
    found = find_spec(package)
    if not (found and found.origin):
        raise SystemExit(f"this example reads data of the package {package}: pip install {package}")
    return Path(found.origin).parent / path


def new_figure(
    rows: int = 1, columns: int = 1, width: float = 9.0, height: float = 3.5, **options: Any
) -> tuple[Figure, Any]:
    """Make a figure and its axes, like matplotlib's `subplots`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, **options)
    for one in figure.axes:
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_losses(axes: Any, figures: dict[str, Any], **style: Any) -> None:
    """Plot the loss curve of one run."""
    losses = figures["losses"]
    share = [100 * (i + 0.5) / len(losses) for i in range(len(losses))]
    axes.plot(share, losses, **style)
    axes.set(xlabel="% of training", ylabel="training loss")


def save(folder: Path | None, name: str, figures: dict[str, Any]) -> None:
    """Write figures as JSON, floats to six digits, if a folder is given."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_rounded(figures), indent=1) + "\n"
        # A list of numbers is easier to read on one line than on hundreds.
        text = _NUMBERS.sub(lambda match: " ".join(match[0].split()), text)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def _rounded(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _rounded(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_rounded(value) for value in x]
    return float(f"{x:.6g}") if isinstance(x, float) else x


def now(device: str) -> float:
    """Return a clock's seconds, once the device has finished its queued work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_each(device: str, repeats: int, *functions: Callable[[], Any]) -> list[float]:
    """Return the median time of each function; alternates, so that load slows all equally."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, own in zip(functions, times, strict=True):
            start = now(device)
            function()
            if repeat:  # the first call compiles and allocates
                own.append(now(device) - start)
    return [median(own) for own in times]


def same_curve(
    ours: list[float],
    stock: list[float],
    *,
    first: int = 50,
    tight: float = 1e-4,
    loose: float = 1e-2,
    floor: float = 0.0,
) -> bool:
    """Compare the losses of two runs from one seed, print the outcome, return whether they agree.

    Two correct implementations round differently (another order of the sums), and training
    amplifies such differences step by step, so no single tolerance fits a whole curve. Each of the
    `first` losses, where a wrong gradient shows and rounding has had no time to grow, must agree to
    `tight`; the mean over each tenth of the run must agree to `loose`. Both are relative to the
    stock loss, or to `floor` where that is larger: a loss so small that it consists of rounding
    errors itself is not worth comparing more closely.
    """
    a, b = (torch.tensor(losses, dtype=torch.double) for losses in (ours, stock))
    early = _relative(a[:first], b[:first], floor)
    tenths = [
        torch.stack([part.mean() for part in x.tensor_split(min(10, len(x)))]) for x in (a, b)
    ]
    late = _relative(*tenths, floor)
    agree = early <= tight and late <= loose  # also false if a loss is NaN
    print(
        f"loss curves {'agree' if agree else 'DIFFER'}: "
        f"first {min(first, len(a))} updates to {early:.1e} (at most {tight:.0e}), "
        f"mean of each tenth to {late:.1e} "
        f"({f'at most {loose:.0e}' if math.isfinite(loose) else 'not asked for'})"
    )
    return agree


def _relative(a: Tensor, b: Tensor, floor: float) -> float:
    return ((a - b).abs() / b.abs().clamp(min=floor)).max().item()
