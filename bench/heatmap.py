"""The heat map of speed-ups: a line for each size, a column for each cell, mode and dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.patches import Rectangle

from .drawing import MARGIN, WIDTH, Theme, in_points, make_sheet, write_heading
from .providers import BASELINE
from .registry import CELLS, DTYPES, MODES
from .report import LABELS, MODE_LABELS, machine, main_provider
from .results import Results, Row, of_provider

# The ratios that have the colors of `Theme.heat`.
_HEAT_STOPS = (0.5, 1.0, 2.0, 5.0)
# Sizes in pixels: a line, the numbers to its left, gaps between blocks and between groups of
# columns, and limits of a column's width.
_LINE, _SIZE_WIDTH, _GAP, _GROUP_GAP = 20.0, 84.0, 26.0, 6.0
_NARROWEST, _WIDEST = 35.0, 80.0


class _Size(NamedTuple):
    steps: int
    batch: int
    hidden: int


class _Column(NamedTuple):
    mode: str
    dtype: str
    cell: str


class _Map(NamedTuple):
    """What a heat map shows; each field has a ratio and a verdict."""

    sizes: list[_Size]
    columns: list[_Column]
    fields: dict[tuple[_Size, _Column], tuple[float, str]]
    n_left_out: int


def draw_heatmap(theme: Theme, found: Results) -> Any:
    """Draw the heat map of results.

    Parameters
    ----------
    theme : Theme
    found : Results

    Returns
    -------
    Figure
    """
    main = main_provider(found.rows)
    shown = _map_of(of_provider(found.rows, main))
    groups = list(dict.fromkeys((column.mode, column.dtype) for column in shown.columns))
    gaps = _GROUP_GAP * max(len(groups) - 1, 0)
    count = max(len(shown.columns), 1)
    narrowest = _SIZE_WIDTH + count * _NARROWEST + gaps
    room = WIDTH - 2 * MARGIN
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
    figure, axes = make_sheet(height)
    write_heading(
        axes, theme, f"Speed-up of {main} over {BASELINE} at each size",
        f"{machine(found.env)} · {', '.join(dtypes)}, one layer, input size equal to H",
    )  # fmt: skip
    colors = _heat(theme)
    _heat_key(axes, theme, colors, 78)
    for k, block in enumerate(blocks):
        left = MARGIN + k * (width + _GAP)
        xs = _column_positions(left, width, shown.columns)
        _draw_columns(axes, theme, shown.columns, xs, top)
        for label, x in (("B", left + 34), ("H", left + _SIZE_WIDTH - 10)):
            axes.text(
                x, top - 9, label, size=in_points(12), color=theme.soft, ha="right", va="center"
            )
        for n, line in enumerate(block):
            y = top + _LINE * (n + 0.5)
            if isinstance(line, str):
                axes.text(left, y + 1, line, size=in_points(12.5), weight="bold", va="center")
                continue
            for number, x in ((line.batch, left + 34), (line.hidden, left + _SIZE_WIDTH - 10)):
                axes.text(x, y, str(number), size=in_points(12), ha="right", va="center")
            for column, (x, w) in zip(shown.columns, xs, strict=True):
                if (line, column) in shown.fields:
                    _draw_field(axes, theme, colors, (x, y, w), shown.fields[line, column])
    if shown.n_left_out:
        axes.text(
            MARGIN, height - 18, f"{shown.n_left_out} more sizes, measured in fewer than half of "
            "the columns, are in the tables.", size=in_points(12), color=theme.soft, va="center",
        )  # fmt: skip
    return figure


def _map_of(rows: Sequence[Row]) -> _Map:
    """Choose columns of many sizes, and the sizes that at least half of these columns have."""
    fields = {
        (
            _Size(row.case.steps, row.case.batch, row.case.hidden_size),
            _Column(row.case.mode, row.case.dtype, row.case.cell),
        ): (row.times.ratio.median, row.verdict)
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
            axes.text(x + w / 2, y, word, size=in_points(12), ha="center", va="center")
    n_words = max(len(_words(column.cell)) for column in columns)
    for group in dict.fromkeys((column.mode, column.dtype) for column in columns):
        own = [place for place, column in zip(xs, columns, strict=True) if column[:2] == group]
        middle = (own[0][0] + own[-1][0] + own[-1][1]) / 2
        for k, text in enumerate((group[1], MODE_LABELS[group[0]])[not has_dtypes :]):
            y = top - 12 - 15 * (n_words + k)
            axes.text(
                middle, y, text, size=in_points(12), color=theme.soft, ha="center", va="center"
            )


def _heat(theme: Theme) -> Callable[[float], Any]:
    """The color of a ratio."""
    low, *_, high = stops = [math.log(ratio) for ratio in _HEAT_STOPS]
    places = [(stop - low) / (high - low) for stop in stops]
    cmap = LinearSegmentedColormap.from_list("", list(zip(places, theme.heat, strict=True)))
    return lambda ratio: cmap((math.log(ratio) - low) / (high - low))


def _heat_key(axes: Any, theme: Theme, colors: Callable[[float], Any], y: float) -> None:
    """Swatches of ratios, and what the outline means."""
    key: list[tuple[float, str]] = [(0.7, "equal"), (1.0, "equal"), (2.0, "equal"), (5.0, "equal")]
    x = float(MARGIN)
    for ratio, verdict in key:
        _draw_field(axes, theme, colors, (x, y, 40), (ratio, verdict))
        x += 40
    axes.text(
        x + 8, y, "or more", size=in_points(12), color=theme.soft, va="center"
    )  # fmt: skip
    _draw_field(axes, theme, colors, (x + 76, y, 40), (0.91, "slower"))
    axes.text(
        x + 124, y, "slower: 20-80 % band below 1, or median below 0.97", size=in_points(12),
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
        Rectangle(
            (x + 1, y - _LINE / 2 + 1), w - 2, _LINE - 2, facecolor=color, lw=1.2 * is_bad,
            edgecolor=theme.bad if is_bad else "none",
        )
    )  # fmt: skip
    red, green, blue = to_rgb(color)
    is_light = 0.3 * red + 0.59 * green + 0.11 * blue > 0.52
    axes.text(
        x + w / 2, y, _short(ratio), size=in_points(12), ha="center", va="center",
        color="#101418" if is_light else "#ffffff", weight="bold" if is_bad else "normal",
    )  # fmt: skip


def _short(ratio: float) -> str:
    digits = 2 if ratio < 1.995 else 1 if ratio < 9.95 else 0
    return f"{ratio:.{digits}f}"
