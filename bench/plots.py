"""Pictures of results, each for light and for dark pages: ``python -m fastrnn.bench.plots``.

``fastrnn bench`` draws all of them beside its other files, and ``fastrnn bench --render
RESULTS.json`` draws them again. The documentation shows two of them, which are drawn from committed
results by

    python -m fastrnn.bench.plots bench/results/NAME/results.json --out docs/pictures

Every file names the results it was drawn from, and their SHA-256, in its metadata: see `origin`.
A picture is 1000 pixels wide, saved at twice that.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .._arguments import UsageError
from . import terminal
from .providers import BASELINE
from .registry import CELLS, DTYPES, MODES, Case
from .report import LABELS, MODE_LABELS, group_of, machine, main_provider
from .results import Results, Row, by_case, load, of_provider

NAMES = ("speedup", "heatmap", "steps", "memory")
#: Those that the README and the documentation show.
PUBLISHED = ("speedup", "heatmap")


class Theme(NamedTuple):
    """Colours; ``heat`` is those of half as fast, equal, twice and five times as fast."""

    suffix: str
    paper: str
    ink: str
    soft: str
    line: str
    bad: str
    bad_panel: str
    modes: tuple[str, ...]
    heat: tuple[str, ...]
    batches: tuple[float, float]


# Blue and orange are told apart with any colour vision.
LIGHT = Theme(
    "", "#ffffff", "#1f2328", "#59636e", "#d8dee4", "#b3261e", "#fdf1f0", ("#2563ab", "#d9730d"),
    ("#d9604f", "#f1f3f5", "#9cc4ea", "#2563ab"), (0.0, 0.88),
)  # fmt: skip
DARK = Theme(
    "-dark", "#0d1117", "#e6edf3", "#9aa4ae", "#30363d", "#ff8a80", "#211617",
    ("#6cb0ff", "#f2a154"), ("#e0604f", "#21262d", "#2b5e96", "#8cc3ff"), (0.3, 1.0),
)  # fmt: skip
THEMES = (LIGHT, DARK)
# Logarithms of the ratios that have the colours of `Theme.heat`.
_HEAT_STOPS = (0.5, 1.0, 2.0, 5.0)

_WIDTH, _MARGIN = 1000, 20
_TIMES = "\N{MULTIPLICATION SIGN}"
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
            with plt.rc_context(_style(theme)):
                _save(_DRAWINGS[name](theme, found), path, mark)
        pictures[name] = Picture(*paths)
    return pictures


def origin_of(source: Path) -> str:
    """Name a results.json by its folder and its content.

    Parameters
    ----------
    source : Path

    Returns
    -------
    str
    """
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    return f"{source.resolve().parent.name}/{source.name} sha256:{digest}"


def origin(picture: Path) -> str:
    """Tell which results a picture was drawn from.

    Parameters
    ----------
    picture : Path

    Returns
    -------
    str
        What `origin_of` said of them; '' for another picture.
    """
    with Image.open(picture) as image:
        return str(image.info.get("Source", ""))


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


def _style(theme: Theme) -> dict[Any, Any]:
    return {
        "font.family": "DejaVu Sans",  # it comes with matplotlib: the same everywhere
        "font.size": 9,
        "text.color": theme.ink,
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "axes.labelcolor": theme.ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": theme.line,
        "axes.edgecolor": theme.soft,
        "xtick.color": theme.soft,
        "ytick.color": theme.soft,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "legend.frameon": False,
        "figure.constrained_layout.w_pad": 0.12,
        "figure.constrained_layout.h_pad": 0.12,
    }


def _save(figure: Any, path: Path, mark: str) -> None:
    """Write a PNG of few colours, which takes a third of the bytes, and of known origin."""
    figure.set_dpi(200)
    figure.canvas.draw()
    pixels, size = figure.canvas.buffer_rgba(), figure.canvas.get_width_height()
    image = Image.frombuffer("RGBA", size, pixels, "raw", "RGBA", 0, 1)
    flat = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    plt.close(figure)
    notes = PngInfo()
    notes.add_text("Source", mark)
    flat.save(path, optimize=True, pnginfo=notes)


def _points(pixels: float) -> float:
    return 0.72 * pixels


def _sheet(height: float) -> tuple[Any, Any]:
    """A figure and axes over all of it, whose units are pixels from the upper left corner."""
    figure = plt.figure(figsize=(_WIDTH / 100, height / 100))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, _WIDTH), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def _heading(axes: Any, theme: Theme, title: str, line: str) -> None:
    axes.text(_MARGIN, 26, title, size=_points(19), weight="bold", va="center")
    axes.text(_MARGIN, 52, line, size=_points(12.5), color=theme.soft, va="center")


_ROW, _TOP, _BOTTOM = 40, 94, 62
_PLOT_END = 780


def _draw_speedup(theme: Theme, found: Results) -> Any:
    """A row for each kind of layer and mode: a dot for every case, a bar for their mean."""
    main = main_provider(found.rows)
    groups = grouped(of_provider(found.rows, main))
    height = _TOP + _ROW * max(len(groups), 1) + _BOTTOM
    figure, sheet = _sheet(height)
    timed = [row for rows in groups.values() for row in rows]
    faster = sum(row.verdict == "faster" for row in timed)
    is_beyond = any(row.case.is_beyond_torch for row in timed)
    plain = "'s plain layers" if is_beyond else ""
    title = f"{main} is faster than {BASELINE}{plain}"
    title += f" in {faster} of {len(timed)} cases"
    title += f", geometric mean {_mean(timed):.2g}{_TIMES}" if timed else ""
    _heading(sheet, theme, title, machine(found.env))
    left, right = _MARGIN + 14 + 9.3 * max(map(len, groups), default=0), _PLOT_END
    axes = figure.add_axes(
        (left / _WIDTH, _BOTTOM / height, (right - left) / _WIDTH, 1 - (_TOP + _BOTTOM) / height)
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
        sheet.text(left - 14, middle, label, size=_points(14), ha="right", va="center")
        sheet.text(
            right + 66, middle, f"{mean_ratio:.2f}{_TIMES}", size=_points(15), weight="bold",
            ha="right", va="center",
        )  # fmt: skip
        slower = sum(row.verdict == "slower" for row in rows)
        _counts(sheet, theme, middle, len(rows), slower)
    for x, text in ((right + 66, "mean"), (right + 128, "cases"), (_WIDTH - _MARGIN, "slower")):
        sheet.text(x, _TOP - 11, text, size=_points(12), color=theme.soft, ha="right", va="center")
    axes.axvline(1, color=theme.ink, lw=1.2, zorder=2)
    low, high = axes.get_xlim()
    ticks = [x for x in (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500) if low <= x <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}{_TIMES}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=_points(13), length=0, pad=5)
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    one = axes.transData.transform((1, 0))[0] * _WIDTH / figure.bbox.width
    sheet.text(one + 8, _TOP - 11, "faster →", size=_points(13), va="center")
    if one - left > 58:
        sheet.text(
            one - 8, _TOP - 11, "slower", size=_points(13), color=theme.bad, ha="right",
            va="center",
        )  # fmt: skip
    plain = ", or as its plain layer where it has no such option" if is_beyond else ""
    sheet.text(
        left, height - 16, f"Times as fast as {BASELINE}{plain} (logarithmic scale)",
        size=_points(13), va="center",
    )  # fmt: skip
    keys = [
        plt.Line2D([], [], color=theme.soft, marker="o", ls="", ms=4.5, label="one case"),
        plt.Line2D([], [], color=theme.ink, marker="|", ls="", ms=11, mew=2,
                   label="geometric mean"),
        plt.Line2D([], [], color=theme.bad, marker="v", ls="", ms=5.5, label="slower"),
    ]  # fmt: skip
    figure.legend(
        handles=keys, loc="upper right", ncols=3, fontsize=_points(12.5), handletextpad=0.1,
        columnspacing=1, bbox_to_anchor=(1 - 12 / _WIDTH, 1 - 43 / height), borderpad=0,
    )  # fmt: skip
    return figure


def _counts(sheet: Any, theme: Theme, y: float, cases: int, slower: int) -> None:
    """How many cases a row has, and how many of them are slower."""
    right = _PLOT_END
    sheet.text(
        right + 128, y, str(cases), size=_points(13), color=theme.soft, ha="right", va="center"
    )
    sheet.text(
        _WIDTH - _MARGIN, y, str(slower), size=_points(13), ha="right", va="center",
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


class _Size(NamedTuple):
    steps: int
    batch: int
    hidden: int


class _Column(NamedTuple):
    mode: str
    dtype: str
    cell: str


class _Map(NamedTuple):
    """What a heat map shows: rows of it, columns, ratios with verdicts, sizes left out."""

    sizes: list[_Size]
    columns: list[_Column]
    fields: dict[tuple[_Size, _Column], tuple[float, str]]
    n_left_out: int


def _map_of(rows: Sequence[Row]) -> _Map:
    """Choose columns of many sizes, and the sizes that at least half of these columns have."""
    fields = {
        (
            _Size(row.case.steps, row.case.batch, row.case.hidden_size),
            _Column(row.case.mode, row.case.dtype, row.case.cell),
        ): (_ratio(row), row.verdict)
        for row in rows
        if row.times is not None and row.case.is_plain
    }
    found = [column for _, column in fields]
    most = max(map(found.count, found), default=0)
    columns = sorted(
        {column for column in found if 2 * found.count(column) >= most},
        key=lambda c: (MODES.index(c.mode), DTYPES.index(c.dtype), CELLS.index(c.cell)),
    )
    every = sorted({size for size, _ in fields})
    filled = {size: sum((size, column) in fields for column in columns) for size in every}
    least = min(len(columns) / 2, max(filled.values(), default=0))
    sizes = [size for size in every if filled[size] >= least]
    return _Map(sizes, columns, fields, len(every) - len(sizes))


_LINE, _SIZE_WIDTH, _GAP, _GROUP_GAP = 20.0, 84.0, 26.0, 6.0
_NARROWEST, _WIDEST = 35.0, 80.0


def _draw_heatmap(theme: Theme, found: Results) -> Any:
    """A line for each T, B and H that was measured, a column for each cell and mode."""
    main = main_provider(found.rows)
    shown = _map_of(of_provider(found.rows, main))
    groups = list(dict.fromkeys((column.mode, column.dtype) for column in shown.columns))
    gaps = _GROUP_GAP * max(len(groups) - 1, 0)
    count = max(len(shown.columns), 1)
    narrowest = _SIZE_WIDTH + count * _NARROWEST + gaps
    room = _WIDTH - 2 * _MARGIN
    heads = list(dict.fromkeys(size.steps for size in shown.sizes))
    n_lines = len(shown.sizes) + len(heads)
    across = int(max(1, min((room + _GAP) // (narrowest + _GAP), n_lines // 9)))
    width = (room - (across - 1) * _GAP) / across
    width = min(width, _SIZE_WIDTH + gaps + count * _WIDEST)
    blocks = _flow(shown.sizes, across)
    depth = max((len(block) for block in blocks), default=0)
    n_words = max((len(_words(column.cell)) for column in shown.columns), default=1)
    dtypes = list(dict.fromkeys(dtype for _, dtype in groups))
    top = 122 + 15 * n_words + 15 * (len(dtypes) > 1)
    height = top + _LINE * depth + 36
    figure, axes = _sheet(height)
    _heading(
        axes, theme, f"Speed-up of {main} over {BASELINE} at each size",
        f"{machine(found.env)} · {', '.join(dtypes)}, one layer, input size equal to H",
    )  # fmt: skip
    colors = _heat(theme)
    _heat_key(axes, theme, colors, 78)
    for k, block in enumerate(blocks):
        left = _MARGIN + k * (width + _GAP)
        xs = _column_positions(left, width, shown.columns)
        _draw_columns(axes, theme, shown.columns, xs, top)
        for label, x in (("B", left + 34), ("H", left + _SIZE_WIDTH - 10)):
            axes.text(
                x, top - 9, label, size=_points(12), color=theme.soft, ha="right", va="center"
            )
        for n, line in enumerate(block):
            y = top + _LINE * (n + 0.5)
            if isinstance(line, str):
                axes.text(left, y + 1, line, size=_points(12.5), weight="bold", va="center")
                continue
            for number, x in ((line.batch, left + 34), (line.hidden, left + _SIZE_WIDTH - 10)):
                axes.text(x, y, str(number), size=_points(12), ha="right", va="center")
            for column, (x, w) in zip(shown.columns, xs, strict=True):
                if (line, column) in shown.fields:
                    _draw_field(axes, theme, colors, (x, y, w), shown.fields[line, column])
    if shown.n_left_out:
        axes.text(
            _MARGIN, height - 18, f"{shown.n_left_out} more sizes, measured in fewer than half of "
            "the columns, are in the tables.", size=_points(12), color=theme.soft, va="center",
        )  # fmt: skip
    return figure


def _flow(sizes: Sequence[_Size], across: int) -> list[list[str | _Size]]:
    """Lines of as many blocks side by side, with a heading where T changes or a block begins."""
    total = len(sizes) + len({size.steps for size in sizes})
    blocks: list[list[str | _Size]] = [[]]
    for k, size in enumerate(sizes):
        begins = not k or sizes[k - 1].steps != size.steps
        room = math.ceil((total + across - 1) / across) - len(blocks[-1])
        if room < 1 + begins and len(blocks) < across:
            blocks.append([])
        if begins or not blocks[-1]:
            blocks[-1].append(f"T = {size.steps}" + ("" if begins else ", continued"))
        blocks[-1].append(size)
    return blocks if sizes else []


def _words(cell: str) -> list[str]:
    return LABELS[cell].split(" ")


def _column_positions(
    left: float, width: float, columns: Sequence[_Column]
) -> list[tuple[float, float]]:
    """Left end and width of each column of a block, with a gap where the mode or dtype changes."""
    breaks = [
        k > 0 and columns[k - 1][:2] != column[:2] for k, column in enumerate(columns)
    ]  # fmt: skip
    each = (width - _SIZE_WIDTH - _GROUP_GAP * sum(breaks)) / max(len(columns), 1)
    return [
        (left + _SIZE_WIDTH + k * each + _GROUP_GAP * sum(breaks[: k + 1]), each)
        for k in range(len(columns))
    ]


def _draw_columns(
    axes: Any,
    theme: Theme,
    columns: Sequence[_Column],
    xs: Sequence[tuple[float, float]],
    top: float,
) -> None:
    """The headings of a block: mode, and dtype if there are several, over the names of cells."""
    has_dtypes = len({column.dtype for column in columns}) > 1
    for column, (x, w) in zip(columns, xs, strict=True):
        words = _words(column.cell)
        for k, word in enumerate(words):
            y = top - 9 - 14 * (len(words) - 1 - k)
            axes.text(x + w / 2, y, word, size=_points(12), ha="center", va="center")
    n_words = max(len(_words(column.cell)) for column in columns)
    for group in dict.fromkeys((column.mode, column.dtype) for column in columns):
        own = [place for place, column in zip(xs, columns, strict=True) if column[:2] == group]
        middle = (own[0][0] + own[-1][0] + own[-1][1]) / 2
        for k, text in enumerate((group[1], MODE_LABELS[group[0]])[not has_dtypes :]):
            y = top - 12 - 15 * (n_words + k)
            axes.text(middle, y, text, size=_points(12), color=theme.soft, ha="center", va="center")


def _heat(theme: Theme) -> Callable[[float], Any]:
    """The colour of a ratio."""
    low, *_, high = stops = [math.log(ratio) for ratio in _HEAT_STOPS]
    places = [(stop - low) / (high - low) for stop in stops]
    cmap = LinearSegmentedColormap.from_list("", list(zip(places, theme.heat, strict=True)))
    return lambda ratio: cmap((math.log(ratio) - low) / (high - low))


def _heat_key(axes: Any, theme: Theme, colors: Callable[[float], Any], y: float) -> None:
    """Swatches of ratios, and what the outline means."""
    key: list[tuple[float, str]] = [(0.7, "equal"), (1.0, "equal"), (2.0, "equal"), (5.0, "equal")]
    x = float(_MARGIN)
    for ratio, verdict in key:
        _draw_field(axes, theme, colors, (x, y, 40), (ratio, verdict))
        x += 40
    axes.text(
        x + 8, y, "or more", size=_points(12), color=theme.soft, va="center"
    )  # fmt: skip
    _draw_field(axes, theme, colors, (x + 76, y, 40), (0.91, "slower"))
    axes.text(
        x + 124, y, "slower: 20-80 % band below 1, or median below 0.97", size=_points(12),
        color=theme.soft, va="center",
    )  # fmt: skip


def _draw_field(
    axes: Any,
    theme: Theme,
    colors: Callable[[float], Any],
    place: tuple[float, float, float],
    field: tuple[float, str],
) -> None:
    """A ratio and its verdict, at a left end, the middle of a line, and of a width."""
    (x, y, w), (ratio, verdict) = place, field
    color, is_bad = colors(ratio), verdict == "slower"
    axes.add_patch(
        plt.Rectangle(
            (x + 1, y - _LINE / 2 + 1), w - 2, _LINE - 2, facecolor=color, lw=1.2 * is_bad,
            edgecolor=theme.bad if is_bad else "none",
        )
    )  # fmt: skip
    red, green, blue = to_rgb(color)
    is_light = 0.3 * red + 0.59 * green + 0.11 * blue > 0.52
    axes.text(
        x + w / 2, y, _short(ratio), size=_points(12), ha="center", va="center",
        color="#101418" if is_light else "#ffffff", weight="bold" if is_bad else "normal",
    )  # fmt: skip


def _short(ratio: float) -> str:
    digits = 2 if ratio < 1.995 else 1 if ratio < 9.95 else 0
    return f"{ratio:.{digits}f}"


def _draw_steps(theme: Theme, found: Results) -> Any:
    """Microseconds of a step over H, a panel for each cell and mode."""
    main = main_provider(found.rows)
    plain = {
        case: providers
        for case, providers in by_case(found.rows).items()
        if case.is_plain and main in providers and providers[main].times is not None
    }
    dtypes = [case.dtype for case in plain]
    # In fewer steps the fixed costs of a call would be what is seen.
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
        figsize=(_WIDTH / 100, 1.2 + 2.6 * max(len(cells), 1)),
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
    figure.suptitle(title, fontsize=_points(19), fontweight="bold", x=_MARGIN / _WIDTH, ha="left")
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
    "heatmap": _draw_heatmap,
    "steps": _draw_steps,
    "memory": _draw_memory,
}


if __name__ == "__main__":
    sys.exit(main())
