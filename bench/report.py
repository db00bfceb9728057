"""Results in a terminal, as rich tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from .results import Band, Change, Row, Summary

#: How a verdict is written beside the ratio.
MARKS = {
    "faster": "faster",
    "equal": "",
    "slower": "▼ slower",
    "wrong": "✗ wrong",
    "failed": "✗ failed",
}
_STYLES = {
    "faster": "green",
    "equal": "",
    "slower": "red",
    "wrong": "bold red",
    "failed": "bold red",
}

_NUMBERS = ("T", "B", "H", "fastrnn ms", "torch.nn ms", "of GEMM", "ratio")


def results_table(rows: Sequence[Row]) -> Table:
    """One line for each case.

    Parameters
    ----------
    rows : sequence of Row

    Returns
    -------
    rich.table.Table
    """
    headers = ("cell", "mode", "T", "B", "H", "dtype", "path", "fastrnn ms", "torch.nn ms")
    title = "torch.nn time / fastrnn time: median [20-80 %]; speed as a share of a large GEMM's"
    table = _table(title, *headers, "of GEMM", "ratio", "")
    for row in rows:
        case = row.case
        table.add_row(
            cell_name(row),
            case.mode,
            str(case.steps),
            str(case.batch),
            str(case.hidden_size),
            case.dtype,
            row.path,
            milliseconds(row.times and row.times.fastrnn_ms),
            milliseconds(row.times and row.times.torch_ms),
            share(row),
            ratio(row),
            MARKS[row.verdict],
            style=_STYLES[row.verdict],
        )
    return table


def cell_name(row: Row) -> str:
    """The cell, and what it is beyond one plain layer."""
    return f"{row.case.cell} ({row.case.stack})" if row.case.stack else row.case.cell


def milliseconds(band: Band | None) -> str:
    """The median in three significant digits, or a dash."""
    return "-" if band is None else _three_digits(band.median)


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def share(row: Row) -> str:
    """Operations of fastrnn a second beside those of a large GEMM, or a dash."""
    return "-" if row.share is None else f"{row.share:.0%}"


def ratio(row: Row) -> str:
    """Median and band of the ratio, or why there is none."""
    if row.times is not None:
        median, p20, p80 = row.times.ratio
        return f"{median:.2f} [{p20:.2f}-{p80:.2f}]"
    if row.status == "failed":
        return row.reason
    return f"error {row.error:.1e} > {row.tolerance:.1e}"


def summary_table(summaries: Sequence[Summary]) -> Table:
    """One line for each cell and mode.

    Parameters
    ----------
    summaries : sequence of Summary

    Returns
    -------
    rich.table.Table
    """
    headers = ("cell", "mode", "mean ratio", "faster", "equal", "slower")
    table = _table("geometric mean of the ratio", *headers)
    for summary in summaries:
        numbers = (summary.faster, summary.equal, summary.slower)
        mean = f"{summary.mean_ratio:.2f}"
        table.add_row(summary.cell, summary.mode, mean, *map(str, numbers))
    return table


def totals(rows: Sequence[Row]) -> str:
    """How many rows have which verdict, in one line."""
    verdicts = [row.verdict for row in rows]
    counts = [
        f"{verdicts.count(verdict)} {verdict}"
        for verdict in MARKS
        if verdict in verdicts or verdict in ("faster", "equal", "slower")
    ]
    return f"{len(rows)} cases: {', '.join(counts)}"


def changes_table(changes: Sequence[Change], threshold: float) -> Table:
    """One line for each case in both benchmarks, regressions marked.

    Parameters
    ----------
    changes : sequence of Change
    threshold : float
        The one that `changes` were judged by.

    Returns
    -------
    rich.table.Table
    """
    headers = ("cell", "mode", "case", "fastrnn ms", "change", "ratio", "change", "")
    title = f"old → new; a regression is a ratio that dropped by more than {threshold:.0%}"
    table = _table(title, *headers)
    for change in changes:
        table.add_row(
            change.case.cell,
            change.case.mode,
            change.case.shape,
            f"{_three_digits(change.old_ms)} → {_three_digits(change.new_ms)}",
            f"{change.new_ms / change.old_ms - 1:+.0%}",
            f"{change.old_ratio:.2f} → {change.new_ratio:.2f}",
            f"{change.new_ratio / change.old_ratio - 1:+.0%}",
            "▼ regression" if change.is_regression else "",
            style="red" if change.is_regression else "",
        )
    return table


def _table(title: str, *headers: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for header in headers:
        is_number = header in (*_NUMBERS, "change", "mean ratio", "faster", "equal", "slower")
        table.add_column(header, justify="right" if is_number else "left", no_wrap=True)
    return table
