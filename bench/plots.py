"""Results as pictures, with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from .environment import Environment
from .registry import CELLS, MODES
from .results import Row, Times

# Blue and orange are told apart with any colour vision.
_COLORS = {"forward": "#2563ab", "training": "#d9730d"}
_THEIRS = "#8a8f98"
_ROW_INCHES, _PANEL_INCHES = 0.24, 0.75
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "axes.edgecolor": "#9aa0a6",
    "ytick.major.size": 0,
}


def plot_speedup(path: Path, env: Environment, rows: Sequence[Row]) -> None:
    """Draw the ratio of every timed case with its band, a panel for each cell.

    Parameters
    ----------
    path : Path
        Of the PNG to write.
    env : Environment
    rows : sequence of Row
    """

    def draw(axes: Any, y: int, row: Row, times: Times) -> None:
        median, p20, p80 = times.ratio
        color = _COLORS[row.case.mode]
        axes.plot([p20, p80], [y, y], color=color, alpha=0.35, lw=5)
        axes.plot(median, y, "o", color=color, ms=5)
        axes.annotate(
            f"{median:.2f}",
            (p80, y),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color="#b3261e" if row.verdict == "slower" else "#3c4043",
        )

    def decorate(axes: Any) -> None:
        axes.axvspan(axes.get_xlim()[0], 1, color="#b3261e", alpha=0.06, lw=0)
        axes.axvline(1, color="#3c4043", lw=1)

    _draw(
        path,
        rows,
        title=f"Speed-up of fastrnn over torch.nn on {env.device}",
        xlabel="torch.nn time / fastrnn time (right of 1: fastrnn is faster)",
        draw=draw,
        decorate=decorate,
        at_least=(0.8, 1.25),
        legend=[_dot(_COLORS[mode], mode) for mode in MODES]
        + [plt.Line2D([], [], color=_THEIRS, alpha=0.5, lw=5, label="20th to 80th percentile")],
    )


def plot_time(path: Path, env: Environment, rows: Sequence[Row]) -> None:
    """Draw the time of both sides for every timed case, a panel for each cell.

    Parameters
    ----------
    path : Path
        Of the PNG to write.
    env : Environment
    rows : sequence of Row
    """

    def draw(axes: Any, y: int, row: Row, times: Times) -> None:
        ours, theirs = times.fastrnn_ms.median, times.torch_ms.median
        color = _COLORS[row.case.mode]
        axes.plot([ours, theirs], [y, y], color=_THEIRS, lw=1.2)
        axes.plot(theirs, y, "o", mfc="white", mec=_THEIRS, mew=1.5, ms=7)
        axes.plot(ours, y, "o", color=color, ms=4.5)

    _draw(
        path,
        rows,
        title=f"Time of one call on {env.device}",
        xlabel="milliseconds, median (further left is faster)",
        draw=draw,
        legend=[
            *(_dot(_COLORS[mode], f"fastrnn, {mode}") for mode in MODES),
            _dot("white", "torch.nn", markeredgecolor=_THEIRS, markeredgewidth=1.5),
        ],
    )


def _dot(color: str, label: str, **options: Any) -> Any:
    return plt.Line2D([], [], color=color, marker="o", ls="", label=label, **options)


def _draw(
    path: Path,
    rows: Sequence[Row],
    *,
    title: str,
    xlabel: str,
    draw: Callable[[Any, int, Row, Times], None],
    legend: list[Any],
    decorate: Callable[[Any], None] = lambda axes: None,
    at_least: tuple[float, float] = (math.inf, 0.0),
) -> None:
    """Make panels that share a logarithmic x axis, one line in them for each timed row."""
    timed = [(row, row.times) for row in rows if row.times is not None]
    panels = [p for cell in CELLS if (p := [pair for pair in timed if pair[0].case.cell == cell])]
    heights = [_PANEL_INCHES + _ROW_INCHES * len(panel) for panel in panels]
    with plt.rc_context(_STYLE):
        # The last inches are for title, legend and the label of the x axis.
        figure, grid = plt.subplots(
            max(len(panels), 1),
            squeeze=False,
            sharex=True,
            figsize=(9, sum(heights) + 1.2),
            height_ratios=heights or None,
            layout="constrained",
        )
        plt.setp(grid, xscale="log")
        for axes, panel in zip(grid[:, 0], panels, strict=False):
            for y, (row, times) in enumerate(panel):
                draw(axes, y, row, times)
            labels = [f"{row.case.shape}  {row.case.mode}" for row, _ in panel]
            axes.set_yticks(range(len(panel)), labels, fontsize=8)
            axes.set_ylim(len(panel) - 0.4, -0.6)
            axes.grid(axis="y", visible=False)
            axes.set_title(panel[0][0].case.cell, loc="left", fontweight="bold")
        # Room for the numbers on the right; the panels share these limits.
        low, high = grid[0, 0].get_xlim()
        grid[0, 0].set_xlim(min(low, at_least[0]), max(high * (high / low) ** 0.05, at_least[1]))
        for axes in grid[:, 0]:
            decorate(axes)
            _label_log_axis(axes)
        grid[-1, 0].set_xlabel(xlabel)
        figure.suptitle(title, fontsize=12, fontweight="bold")
        figure.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _label_log_axis(axes: Any) -> None:
    """Ticks in plain numbers: powers of ten, or more closely on a shorter axis."""
    low, high = axes.get_xlim()
    digits: tuple[float, ...] = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    if high / low > 8:
        digits = (1,) if high / low > 1000 else (1, 2, 5)
    axes.xaxis.set_major_locator(LogLocator(subs=digits))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelbottom=True)
