"""What the examples share: options, a clock, and whether two runs had the same loss curve."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch


@dataclass
class Run:
    """What one training run leaves behind.

    Attributes
    ----------
    losses : list of float
        Training loss of every optimizer step.
    validation : list of float
        Validation figure after every epoch.
    seconds : float
        Time spent in training, validation not counted.
    """

    losses: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    seconds: float = 0.0


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows the first line of a docstring, and has what every example takes."""
    made = argparse.ArgumentParser(
        description=(doc or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--out", type=Path, help="folder for the figures as JSON")
    return made


def save(folder: Path | None, name: str, figures: dict[str, Any]) -> None:
    """Write figures as JSON, if a folder was asked for."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(figures, indent=1))


def now(device: str) -> float:
    """Seconds on a clock, read once the device has finished what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_each(device: str, repeats: int, *functions: Callable[[], Any]) -> list[float]:
    """Median time of each function; called in turn, so that a busy machine slows all alike."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, own in zip(functions, times, strict=True):
            start = now(device)
            function()
            if repeat:  # the first call compiles and allocates
                own.append(now(device) - start)
    return [median(own) for own in times]


def same_curve(
    ours: Run,
    stock: Run,
    *,
    first: int = 50,
    tight: float = 1e-4,
    loose: float = 1e-2,
    floor: float = 0.0,
) -> bool:
    """Compare the losses of two runs from one seed, print the outcome, return whether they agree.

    Two correct implementations round differently (another order of the sums), and training
    amplifies such differences step by step, so no one tolerance fits a whole curve. Each of
    the `first` losses, where a wrong gradient shows and rounding has had no time to grow, must
    agree to `tight`; the mean over each tenth of the run must agree to `loose`. Both are
    relative to the stock loss, or to `floor` where that is smaller: a loss so small that it
    is itself made of rounding errors is not worth comparing closer.
    """
    a, b = torch.tensor(ours.losses).double(), torch.tensor(stock.losses).double()
    early = _relative(a[:first], b[:first], floor)
    tenths = [
        torch.stack([part.mean() for part in x.tensor_split(min(10, len(x)))]) for x in (a, b)
    ]
    late = _relative(*tenths, floor)
    agree = early <= tight and late <= loose  # false for a loss that is not a number, too
    print(
        f"time in training, one run after the other: fastrnn {ours.seconds:.1f} s, "
        f"torch {stock.seconds:.1f} s (for a fair ratio: fastrnn bench)\n"
        f"largest difference of any loss: {(a - b).abs().max().item():.1e}\n"
        f"  first {min(first, len(a))} steps, relative: {early:.1e} (at most {tight:.0e})\n"
        f"  mean of each tenth, relative: {late:.1e} (at most {loose:.0e})\n"
        f"loss curves {'agree' if agree else 'DIFFER'}"
    )
    return agree


def _relative(a: torch.Tensor, b: torch.Tensor, floor: float) -> float:
    return ((a - b).abs() / b.clamp(min=floor)).max().item()
