"""Results as pictures, with matplotlib."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import TwoSlopeNorm
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from .environment import Environment
from .providers import BASELINE
from .registry import CELLS, DTYPES, MODES, Case
from .report import main_provider
from .results import Row, Times, by_case, of_provider

# Blue and orange are told apart with any colour vision.
_COLORS = {"forward": "#2563ab", "training": "#d9730d"}
_INK, _BAD = "#3c4043", "#b3261e"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "axes.edgecolor": "#9aa0a6",
    "legend.frameon": False,
}

_MAP_POINTS = 6
_MANY_STEPS = 64

Draw = Callable[[Any, Any], None]


def plot_speedup(path: Path, env: Environment, rows: Sequence[Row]) -> None:
    """Draw the ratio of every timed case as a dot, a line for each cell, mode, dtype and stack.

    Parameters
    ----------
    path : Path
        Of the PNG to write.
    env : Environment
    rows : sequence of Row
    """
    main = main_provider(rows)
    groups: dict[tuple[Any, ...], list[tuple[Row, Times]]] = {}
    for row in of_provider(rows, main):
        if row.times is not None:
            case = row.case
            key = (CELLS.index(case.cell), DTYPES.index(case.dtype), case.stack, case.mode)
            groups.setdefault(key, []).append((row, row.times))
    keys = sorted(groups)
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(9, 1.8 + 0.27 * len(keys)), layout="constrained")
        axes.set_xscale("log")
        for y, key in enumerate(keys):
            color = _COLORS[groups[key][0][0].case.mode]
            ratios = [times.ratio.median for _, times in groups[key]]
            axes.plot([min(ratios), max(ratios)], [y, y], color=color, alpha=0.3, lw=2)
            for row, times in groups[key]:
                face = _BAD if row.verdict == "slower" else color
                axes.plot(times.ratio.median, y, "o", color=face, ms=4.5, alpha=0.75)
            mean = statistics.geometric_mean(ratios)
            axes.plot(mean, y, "|", color=_INK, ms=11, mew=2)
            axes.annotate(
                f"{mean:.2f}", (1, y), xycoords=("axes fraction", "data"), xytext=(6, 0),
                textcoords="offset points", va="center", fontsize=8, color=_INK,
            )  # fmt: skip
        labels = [_group_label(groups[key][0][0].case, len(groups[key])) for key in keys]
        axes.set_yticks(range(len(keys)), labels, fontsize=8)
        axes.set_ylim(max(len(keys), 1) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.8), max(high, 1.25))
        axes.axvspan(axes.get_xlim()[0], 1, color=_BAD, alpha=0.06, lw=0)
        axes.axvline(1, color=_INK, lw=1)
        _label_log_axis(axes.xaxis, axes.get_xlim())
        axes.set_xlabel(f"torch.nn time / {main} time (right of 1: {main} is faster)")
        dots = [_dot(_COLORS[mode], mode) for mode in MODES]
        dots += [_dot(_BAD, "slower"), plt.Line2D([], [], color=_INK, marker="|", ms=10, mew=2,
                 ls="", label="geometric mean, at the right in figures")]  # fmt: skip
        figure.legend(handles=dots, loc="outside lower center", ncols=4)
        _finish(figure, path, f"Speed-up of {main} over torch.nn on {env.device}")


def _group_label(case: Case, count: int) -> str:
    stack = f", {case.stack}" if case.stack else ""
    return f"{case.cell} {case.mode}, {case.dtype}{stack} ({count})"


def plot_heatmap(path: Path, env: Environment, rows: Sequence[Row]) -> None:
    """Draw the ratio over T, B and H: panels for each T, a row for each cell, mode and dtype.

    Parameters
    ----------
    path : Path
        Of the PNG to write.
    env : Environment
    rows : sequence of Row
        Those that ``Case.is_plain`` says are points of the grid are drawn.
    """
    main = main_provider(rows)
    ratios = {
        row.case: (row.times.ratio.median, row.verdict)
        for row in of_provider(rows, main)
        if row.times is not None and row.case.is_plain
    }
    kinds = [(CELLS.index(c.cell), DTYPES.index(c.dtype), c.cell, c.dtype, c.mode) for c in ratios]
    # A few points are not a map, unless there is nothing else.
    least = min(_MAP_POINTS, max(map(kinds.count, kinds), default=0))
    groups = sorted({kind for kind in kinds if kinds.count(kind) >= least})
    ratios = {
        case: found for case, found in ratios.items()
        if (case.cell, case.dtype, case.mode) in {group[2:] for group in groups}
    }  # fmt: skip
    steps, batches, hidden = (
        sorted({getattr(case, axis) for case in ratios})
        for axis in ("steps", "batch", "hidden_size")
    )
    style = {**_STYLE, "axes.grid": False}
    with plt.rc_context(style):
        figure, grid = plt.subplots(
            max(len(groups), 1),
            max(len(steps), 1),
            squeeze=False,
            sharex=True,
            sharey=True,
            figsize=(
                1.6 + max(len(steps), 1) * (0.5 + 0.42 * len(hidden)),
                1.4 + max(len(groups), 1) * (0.55 + 0.27 * len(batches)),
            ),
            layout="constrained",
        )
        for axes_row, (_, _, cell, dtype, mode) in zip(grid, groups, strict=False):
            for axes, t in zip(axes_row, steps, strict=False):
                cells = {
                    (case.batch, case.hidden_size): found
                    for case, found in ratios.items()
                    if (case.cell, case.dtype, case.mode, case.steps) == (cell, dtype, mode, t)
                }
                _draw_map(axes, cells, batches, hidden)
                axes.set_title(f"T = {t}", fontsize=8)
            axes_row[0].set_ylabel(f"{cell} {mode}\n{dtype}\nB", fontsize=8)
        for axes in grid[-1]:
            axes.set_xlabel("H", fontsize=8)
        title = f"torch.nn time / {main} time on {env.device}"
        _finish(figure, path, f"{title}\nblue: {main} is faster; red figures: slower")


def _draw_map(
    axes: Any,
    cells: dict[tuple[int, int], tuple[float, str]],
    batches: list[int],
    hidden: list[int],
) -> None:
    """Colour the field of each batch and hidden size that has a ratio and a verdict."""
    # White is 1; a ratio of 5 or more is as blue as it gets, 1/2 or less as red.
    norm = TwoSlopeNorm(0.0, math.log(0.5), math.log(5.0))
    image = [[math.nan] * len(hidden) for _ in batches]
    for (b, h), (ratio, verdict) in cells.items():
        x, y, is_bad = hidden.index(h), batches.index(b), verdict == "slower"
        image[y][x] = math.log(ratio)
        axes.text(
            x, y, _short(ratio), ha="center", va="center", fontsize=7.5,
            color=_BAD if is_bad else "white" if ratio > 2.2 else _INK,
            fontweight="bold" if is_bad else "normal",
        )  # fmt: skip
    axes.imshow(image, cmap="RdBu", norm=norm, aspect="auto")
    axes.set_facecolor("#f1f2f4")
    axes.set_xticks(range(len(hidden)), hidden, rotation=90, fontsize=7)
    axes.set_yticks(range(len(batches)), batches, fontsize=7)
    axes.tick_params(length=0)


def _short(ratio: float) -> str:
    digits = 2 if ratio < 1.995 else 1 if ratio < 9.95 else 0
    return f"{ratio:.{digits}f}"


def plot_steps(path: Path, env: Environment, rows: Sequence[Row]) -> None:
    """Draw the time of a step over H with the device's limit, a panel for each cell and mode.

    Parameters
    ----------
    path : Path
        Of the PNG to write.
    env : Environment
    rows : sequence of Row
        Points of the grid; those of the dtype that most of them have.
    """
    main = main_provider(rows)
    plain = {
        case: providers
        for case, providers in by_case(rows).items()
        if case.is_plain and main in providers and providers[main].times is not None
    }
    dtypes = [case.dtype for case in plain]
    # In fewer steps the fixed costs of a call would be what is seen.
    least = min(_MANY_STEPS, max((case.steps for case in plain), default=0))
    plain = {
        case: found
        for case, found in plain.items()
        if case.dtype == max(dtypes, key=dtypes.count) and case.steps >= least
    }

    batches = sorted({case.batch for case in plain})
    colors = {
        batch: plt.get_cmap("viridis")(0.9 * k / max(1, len(batches) - 1))
        for k, batch in enumerate(batches)
    }

    def draw(axes: Any, cases: list[Case]) -> None:
        for batch in sorted({case.batch for case in cases}):
            color = colors[batch]
            # Of several T the longest.
            chosen = {
                case.hidden_size: case
                for case in sorted(cases, key=lambda case: case.steps)
                if case.batch == batch
            }
            hidden = sorted(chosen)
            for name, style in ((main, "o-"), (BASELINE, "x--")):
                points = [(h, plain[chosen[h]][name].step_us) for h in hidden]
                axes.plot(*zip(*points, strict=True), style, color=color, ms=4, lw=1.2)
            limits = [(plain[chosen[h]][main].limit_ms or math.nan) for h in hidden]
            times = [limit * 1e3 / chosen[h].steps for limit, h in zip(limits, hidden, strict=True)]
            axes.plot(hidden, times, ":", color=color, lw=1.5)
        axes.set_yscale("log")
        _label_log_axis(axes.yaxis, axes.get_ylim())
        axes.set_ylabel("µs per step")

    dtype = next(iter(plain)).dtype if plain else ""
    legend = [
        plt.Line2D([], [], color=_INK, marker="o", label=main),
        plt.Line2D([], [], color=_INK, marker="x", ls="--", label=BASELINE),
        plt.Line2D([], [], color=_INK, ls=":", label="limit of the device"),
    ]
    legend += [
        plt.Line2D([], [], color=color, marker="s", ls="", label=f"B = {batch}")
        for batch, color in colors.items()
    ]
    _panels(path, plain, draw, f"Time of a step on {env.device} {dtype}", legend)


def plot_memory(path: Path, env: Environment, rows: Sequence[Row]) -> None:
    """Draw the peak memory of fastrnn over that of torch.nn, a panel for each cell and mode.

    Parameters
    ----------
    path : Path
        Of the PNG to write.
    env : Environment
    rows : sequence of Row
    """
    main = main_provider(rows)
    peaks = {
        case: (providers[main].peak_mib, providers[BASELINE].peak_mib)
        for case, providers in by_case(rows).items()
        if not case.is_step and main in providers and providers[main].times is not None
    }
    # Less than this is the noise of an allocator.
    known = {case: pair for case, pair in peaks.items() if min(x or 0 for x in pair) > 1}

    def draw(axes: Any, cases: list[Case]) -> None:
        ours, theirs = zip(*(known[case] for case in cases), strict=True)
        color = _COLORS[cases[0].mode]
        axes.plot(theirs, ours, "o", color=color, ms=4.5, alpha=0.75)
        ends = [min(*ours, *theirs) / 1.5, max(*ours, *theirs) * 1.5]
        axes.plot(ends, ends, color=_INK, lw=1)
        axes.set_yscale("log")
        axes.set_ylabel(f"{main}, MiB")
        axes.set_xlabel(f"{BASELINE}, MiB")
        for axis in (axes.xaxis, axes.yaxis):
            _label_log_axis(axis, (ends[0], ends[1]))

    _panels(path, known, draw, f"Peak memory of one call on {env.device}", [
        plt.Line2D([], [], color=_INK, label="the same; below: fastrnn takes less"),
    ], xlabel=None)  # fmt: skip


def _panels(
    path: Path, cases: Any, draw: Draw, title: str, legend: list[Any], xlabel: str | None = "H"
) -> None:
    """Make a panel for each cell, in a row, and mode, in a column, with a logarithmic x axis."""
    cells = [cell for cell in CELLS if any(case.cell == cell for case in cases)]
    with plt.rc_context(_STYLE):
        figure, grid = plt.subplots(
            max(len(cells), 1),
            len(MODES),
            squeeze=False,
            figsize=(10, 1.2 + 3.1 * max(len(cells), 1)),
            layout="constrained",
        )
        for axes_row, cell in zip(grid, cells, strict=False):
            for axes, mode in zip(axes_row, MODES, strict=True):
                panel = [case for case in cases if case.cell == cell and case.mode == mode]
                axes.set_title(f"{cell} {mode}", loc="left", fontweight="bold")
                axes.set_xscale("log")
                if panel:
                    draw(axes, panel)
                if panel and xlabel:
                    hidden = sorted({case.hidden_size for case in panel})
                    axes.set_xticks(hidden, hidden, fontsize=7)
                    axes.xaxis.set_minor_locator(NullLocator())
                    axes.set_xlabel(xlabel)
        figure.legend(handles=legend, loc="outside lower center", ncols=min(len(legend), 10))
        _finish(figure, path, title)


def _dot(color: str, label: str) -> Any:
    return plt.Line2D([], [], color=color, marker="o", ls="", label=label)


def _finish(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=12, fontweight="bold")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _label_log_axis(axis: Any, limits: tuple[float, float]) -> None:
    """Ticks in plain numbers: powers of ten, or more closely on a shorter axis."""
    low, high = limits
    digits: tuple[float, ...] = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    if high / low > 8:
        digits = (1,) if high / low > 1000 else (1, 2, 5)
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
