"""Pictures of results, each for light and for dark pages: ``python -m fastrnn.bench.plots``.

``fastrnn bench`` draws all of them beside its other files, and ``fastrnn bench --render
RESULTS.json`` draws them again. The documentation shows two of them, which are drawn from committed
results by

    python -m fastrnn.bench.plots bench/results/NAME/results.json --out docs/pictures

Every file names the results it was drawn from, and their SHA-256, in its metadata: see
`drawing.origin`. A picture is 1000 pixels wide, saved at twice that.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from .._arguments import UsageError
from . import terminal
from .drawing import (
    MARGIN,
    THEMES,
    WIDTH,
    Theme,
    in_points,
    make_sheet,
    origin_of,
    rc_settings,
    save,
    write_heading,
)
from .heatmap import draw_heatmap
from .providers import BASELINE
from .registry import CELLS, MODES, Case
from .report import LABELS, MODE_LABELS, group_of, machine, main_provider
from .results import Results, Row, by_case, load, of_provider

NAMES = ("speedup", "heatmap", "steps", "memory")
#: Those that the README and the documentation show.
PUBLISHED = ("speedup", "heatmap")

_TIMES = "\N{MULTIPLICATION SIGN}"
# Of the picture of speed-ups, in pixels: height of a row, space above and below the rows, and where
# the plot ends on the right.
_ROW, _TOP, _BOTTOM = 40, 94, 62
_PLOT_END = 780
# In shorter sequences the fixed costs of a call would hide the time of a step.
_MANY_STEPS = 64

Draw = Callable[[Any, Any], None]


class Picture(NamedTuple):
    """The files of one picture."""

    light: Path
    dark: Path


def draw(
    folder: Path, found: Results, source: Path, names: Sequence[str] = NAMES
) -> dict[str, Picture]:
    """Draw pictures for light and for dark pages.

    Parameters
    ----------
    folder : Path
        To write to: ``speedup.png``, ``speedup-dark.png`` and so on.
    found : Results
    source : Path
        The results.json of `found`, which the files name.
    names : sequence of str, default NAMES

    Returns
    -------
    dict of str to Picture
        By name.
    """
    mark = origin_of(source)
    pictures = {}
    for name in names:
        paths = [folder / f"{name}{theme.suffix}.png" for theme in THEMES]
        for theme, path in zip(THEMES, paths, strict=True):
            with plt.rc_context(rc_settings(theme)):
                save(_DRAWINGS[name](theme, found), path, mark)
        pictures[name] = Picture(*paths)
    return pictures


@terminal.printing()
def main(argv: Sequence[str] | None = None) -> int:
    """Draw the pictures of the README and the documentation.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; those of the command line if None.

    Returns
    -------
    int
        Exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fastrnn.bench.plots",
        description="Draw the pictures of the documentation from results.",
    )
    parser.add_argument("results", type=terminal.path, help="a results.json below bench/results")
    parser.add_argument(
        "--out", type=terminal.path, metavar="DIR", default=Path("docs/pictures"),
        help="folder to write to (default: %(default)s)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        found = load(args.results)
    except UsageError as error:
        parser.error(str(error))
    if not args.out.is_dir():
        parser.error(f"no folder {args.out}")
    for picture in draw(args.out, found, args.results, PUBLISHED).values():
        print(*picture, sep="\n")
    return 0


def _draw_speedup(theme: Theme, found: Results) -> Any:
    """A row for each kind of layer and mode: a dot for every case, a bar for their mean."""
    main = main_provider(found.rows)
    groups = grouped(of_provider(found.rows, main))
    height = _TOP + _ROW * max(len(groups), 1) + _BOTTOM
    figure, sheet = make_sheet(height)
    timed = [row for rows in groups.values() for row in rows]
    faster = sum(row.verdict == "faster" for row in timed)
    is_beyond = any(row.case.is_beyond_torch for row in timed)
    plain = "'s plain layers" if is_beyond else ""
    title = f"{main} is faster than {BASELINE}{plain}"
    title += f" in {faster} of {len(timed)} cases"
    title += f", geometric mean {_mean(timed):.2g}{_TIMES}" if timed else ""
    write_heading(sheet, theme, title, machine(found.env))
    left, right = MARGIN + 14 + 9.3 * max(map(len, groups), default=0), _PLOT_END
    axes = figure.add_axes(
        (left / WIDTH, _BOTTOM / height, (right - left) / WIDTH, 1 - (_TOP + _BOTTOM) / height)
    )
    axes.set_xscale("log")
    axes.set_ylim(max(len(groups), 1) - 0.5, -0.5)
    ratios = [_ratio(row) for row in timed]
    axes.set_xlim(min([0.7, *(0.93 * r for r in ratios)]), max([2.5, *(1.08 * r for r in ratios)]))
    axes.axvspan(axes.get_xlim()[0], 1, color=theme.bad_panel, lw=0, zorder=0)
    for y, (label, rows) in enumerate(groups.items()):
        color = theme.modes[MODES.index(rows[0].case.mode)]
        mean_ratio = _mean(rows)
        axes.barh(
            y, mean_ratio - 1, left=1, height=0.56, color=color, alpha=0.32, lw=0, zorder=1
        )  # fmt: skip
        for row in rows:
            is_bad = row.verdict == "slower"
            axes.plot(
                _ratio(row), y, "v" if is_bad else "o", color=theme.bad if is_bad else color,
                ms=5.5 if is_bad else 4.5, mew=0, alpha=0.9 if is_bad else 0.55, zorder=3,
            )  # fmt: skip
        axes.plot([mean_ratio] * 2, [y - 0.28, y + 0.28], color=theme.ink, lw=2, zorder=4)
        middle = _TOP + _ROW * (y + 0.5)
        sheet.text(left - 14, middle, label, size=in_points(14), ha="right", va="center")
        sheet.text(
            right + 66, middle, f"{mean_ratio:.2f}{_TIMES}", size=in_points(15), weight="bold",
            ha="right", va="center",
        )  # fmt: skip
        slower = sum(row.verdict == "slower" for row in rows)
        _counts(sheet, theme, middle, len(rows), slower)
    for x, text in ((right + 66, "mean"), (right + 128, "cases"), (WIDTH - MARGIN, "slower")):
        sheet.text(
            x, _TOP - 11, text, size=in_points(12), color=theme.soft, ha="right", va="center"
        )
    axes.axvline(1, color=theme.ink, lw=1.2, zorder=2)
    low, high = axes.get_xlim()
    ticks = [x for x in (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500) if low <= x <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}{_TIMES}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=in_points(13), length=0, pad=5)
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    one = axes.transData.transform((1, 0))[0] * WIDTH / figure.bbox.width
    sheet.text(one + 8, _TOP - 11, "faster →", size=in_points(13), va="center")
    if one - left > 58:
        sheet.text(
            one - 8, _TOP - 11, "slower", size=in_points(13), color=theme.bad, ha="right",
            va="center",
        )  # fmt: skip
    plain = ", or as its plain layer where it has no such option" if is_beyond else ""
    sheet.text(
        left, height - 16, f"Times as fast as {BASELINE}{plain} (logarithmic scale)",
        size=in_points(13), va="center",
    )  # fmt: skip
    keys = [
        plt.Line2D([], [], color=theme.soft, marker="o", ls="", ms=4.5, label="one case"),
        plt.Line2D([], [], color=theme.ink, marker="|", ls="", ms=11, mew=2,
                   label="geometric mean"),
        plt.Line2D([], [], color=theme.bad, marker="v", ls="", ms=5.5, label="slower"),
    ]  # fmt: skip
    figure.legend(
        handles=keys, loc="upper right", ncols=3, fontsize=in_points(12.5), handletextpad=0.1,
        columnspacing=1, bbox_to_anchor=(1 - 12 / WIDTH, 1 - 43 / height), borderpad=0,
    )  # fmt: skip
    return figure


def _counts(sheet: Any, theme: Theme, y: float, cases: int, slower: int) -> None:
    """How many cases a row has, and how many of them are slower."""
    right = _PLOT_END
    sheet.text(
        right + 128, y, str(cases), size=in_points(13), color=theme.soft, ha="right", va="center"
    )
    sheet.text(
        WIDTH - MARGIN, y, str(slower), size=in_points(13), ha="right", va="center",
        color=theme.bad if slower else theme.soft,
    )  # fmt: skip


def grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group timed rows by kind of layer and mode.

    Parameters
    ----------
    rows : sequence of Row

    Returns
    -------
    dict of str to list of Row
        By the group's label, in the order of cells and modes.
    """
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (CELLS.index(row.case.cell), row.case.mode)):
        if row.times is not None:
            groups.setdefault(group_of(row.case), []).append(row)
    return groups


def _ratio(row: Row) -> float:
    return row.times.ratio.median if row.times else math.nan


def _mean(rows: Sequence[Row]) -> float:
    return statistics.geometric_mean(_ratio(row) for row in rows)


def _draw_steps(theme: Theme, found: Results) -> Any:
    """Microseconds of a step over H, a panel for each cell and mode."""
    main = main_provider(found.rows)
    plain = {
        case: providers
        for case, providers in by_case(found.rows).items()
        if case.is_plain and main in providers and providers[main].times is not None
    }
    dtypes = [case.dtype for case in plain]
    least = min(_MANY_STEPS, max((case.steps for case in plain), default=0))
    plain = {
        case: providers
        for case, providers in plain.items()
        if case.dtype == max(dtypes, key=dtypes.count) and case.steps >= least
    }

    batches = sorted({case.batch for case in plain})
    first, last = theme.batches
    colors = {
        batch: plt.get_cmap("viridis")(first + (last - first) * k / max(1, len(batches) - 1))
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

    dtype = f", {next(iter(plain)).dtype}" if plain else ""
    legend = [
        plt.Line2D([], [], color=theme.ink, marker="o", label=main),
        plt.Line2D([], [], color=theme.ink, marker="x", ls="--", label=BASELINE),
        plt.Line2D([], [], color=theme.ink, ls=":", label="limit of the device"),
    ]
    legend += [
        plt.Line2D([], [], color=color, marker="s", ls="", label=f"B = {batch}")
        for batch, color in colors.items()
    ]
    return _panels(plain, draw, f"Time per step on {found.env.device}{dtype}", legend)


def _draw_memory(theme: Theme, found: Results) -> Any:
    """Peak memory of both, a panel for each cell and mode."""
    main = main_provider(found.rows)
    peaks = {
        case: (providers[main].peak_mib, providers[BASELINE].peak_mib)
        for case, providers in by_case(found.rows).items()
        if not case.is_step and main in providers and providers[main].times is not None
    }
    # Less than this is the noise of an allocator.
    known = {case: pair for case, pair in peaks.items() if min(x or 0 for x in pair) > 1}

    def draw(axes: Any, cases: list[Case]) -> None:
        ours, theirs = zip(*(known[case] for case in cases), strict=True)
        color = theme.modes[MODES.index(cases[0].mode)]
        axes.plot(theirs, ours, "o", color=color, ms=4.5, alpha=0.75)
        ends = [min(*ours, *theirs) / 1.5, max(*ours, *theirs) * 1.5]
        axes.plot(ends, ends, color=theme.ink, lw=1)
        axes.set_yscale("log")
        axes.set_ylabel(f"{main}, MiB")
        axes.set_xlabel(f"{BASELINE}, MiB")
        for axis in (axes.xaxis, axes.yaxis):
            _label_log_axis(axis, (ends[0], ends[1]))

    line = plt.Line2D([], [], color=theme.ink, label=f"equal; below the line {main} needs less")
    title = f"Peak memory of one call on {found.env.device}"
    return _panels(known, draw, title, [line], xlabel=None)


def _panels(
    cases: Any, draw: Draw, title: str, legend: list[Any], xlabel: str | None = "H"
) -> Any:  # fmt: skip
    """Make a panel for each cell, in a row, and mode, in a column, with a logarithmic x axis."""
    cells = [cell for cell in CELLS if any(case.cell == cell for case in cases)]
    figure, grid = plt.subplots(
        max(len(cells), 1),
        len(MODES),
        squeeze=False,
        figsize=(WIDTH / 100, 1.2 + 2.6 * max(len(cells), 1)),
        layout="constrained",
    )
    for axes_row, cell in zip(grid, cells, strict=False):
        for axes, mode in zip(axes_row, MODES, strict=True):
            panel = [case for case in cases if case.cell == cell and case.mode == mode]
            axes.set_title(f"{LABELS[cell]} {MODE_LABELS[mode]}", loc="left", fontweight="bold")
            axes.set_xscale("log")
            if panel:
                draw(axes, panel)
            if panel and xlabel:
                hidden = sorted({case.hidden_size for case in panel})
                axes.set_xticks(hidden, hidden, fontsize=8)
                axes.xaxis.set_minor_locator(NullLocator())
                axes.set_xlabel(xlabel)
    figure.legend(handles=legend, loc="outside lower center", ncols=min(len(legend), 10))
    figure.suptitle(title, fontsize=in_points(19), fontweight="bold", x=MARGIN / WIDTH, ha="left")
    return figure


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


_DRAWINGS: dict[str, Callable[[Theme, Results], Any]] = {
    "speedup": _draw_speedup,
    "heatmap": draw_heatmap,
    "steps": _draw_steps,
    "memory": _draw_memory,
}


if __name__ == "__main__":
    sys.exit(main())
