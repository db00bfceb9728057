"""What a benchmark has to say, as tables of text; ``rich`` prints them and ``page`` shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table as RichTable

from .providers import BASELINE, LOOP, OURS, PLAIN
from .registry import PUBLISHED
from .results import Band, Change, Results, Row, by_case, of_provider, summarize

#: How a verdict is written beside the ratio.
MARKS = {
    "faster": "faster",
    "equal": "",
    "slower": "▼ slower",
    "wrong": "✗ wrong",
    "failed": "✗ failed",
}
_STYLES = {"faster": "green", "slower": "red", "wrong": "bold red", "failed": "bold red"}


class Line(NamedTuple):
    """Cells of a table, the verdict that colours them, and a remark."""

    cells: tuple[str, ...]
    verdict: str = "equal"
    remark: str = ""


class Table(NamedTuple):
    """A table of text; headers that begin with '#' are of columns of numbers."""

    title: str
    headers: tuple[str, ...]
    lines: list[Line]


def to_rich(table: Table) -> RichTable:
    """Make a table for a terminal.

    Parameters
    ----------
    table : Table

    Returns
    -------
    rich.table.Table
    """
    rich = RichTable(
        title=table.title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, padding=0
    )
    for header in table.headers:
        justify: Any = "right" if header.startswith("#") else "left"
        rich.add_column(header.removeprefix("#"), justify=justify, no_wrap=True)
    for line in table.lines:
        rich.add_row(*line.cells, style=_STYLES.get(line.verdict, ""))
    return rich


def main_provider(rows: Sequence[Row]) -> str:
    """Say whom the first table is about: fastrnn, or who else was measured.

    Parameters
    ----------
    rows : sequence of Row

    Returns
    -------
    str
    """
    names = list(dict.fromkeys(row.provider for row in rows if row.provider != BASELINE))
    return OURS if OURS in names or not names else names[0]


def results_table(rows: Sequence[Row]) -> Table:
    """One line for each case: fastrnn beside torch.nn.

    Parameters
    ----------
    rows : sequence of Row

    Returns
    -------
    Table
    """
    main = main_provider(rows)
    has_graph = any(row.graph for row in rows)
    has_memory = any(row.peak_mib is not None for row in rows)
    headers = ["cell", "mode", "case", "path", f"#{main} ms", "#torch.nn ms", "torch.nn runs"]
    headers += ["#us/step", "#of limit", "#ratio"]
    headers += ["#as graph"] * has_graph + ["#MiB", "#torch.nn"] * has_memory + [""]
    lines = []
    for case, providers in by_case(rows).items():
        ours, theirs = providers.get(main), providers.get(BASELINE)
        if ours is None or theirs is None:
            continue
        cells = [case.cell, case.mode, case.shape, ours.path]
        cells += [_milliseconds(ours), _milliseconds(theirs), theirs.path]
        cells.append("-" if ours.step_us is None else three_digits(ours.step_us))
        cells.append("-" if ours.share is None else f"{ours.bound} {ours.share:4.0%}")
        cells.append(_ratio(ours))
        if has_graph:
            cells.append("-" if ours.graph is None else _band(ours.graph.ratio))
        if has_memory:
            cells += ["-" if r.peak_mib is None else f"{r.peak_mib:.1f}" for r in (ours, theirs)]
        lines.append(Line((*cells, MARKS[ours.verdict]), ours.verdict, ours.reason))
    title = f"ratio: torch.nn time / {main} time, median [20-80 %]"
    return Table(title, tuple(headers), lines)


def _milliseconds(row: Row) -> str:
    return "-" if row.times is None else three_digits(row.times.ms.median)


def three_digits(value: float) -> str:
    """Write a number with three significant digits, or all before the point."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def _band(band: Band) -> str:
    return f"{band.median:.2f} [{band.p20:.2f}-{band.p80:.2f}]"


def _ratio(row: Row) -> str:
    """Median and band of the ratio, or why there is none."""
    if row.times is not None:
        return _band(row.times.ratio)
    if row.status == "failed":
        return row.reason
    return f"error {row.error:.1e} > {row.tolerance:.1e}"


def providers_table(rows: Sequence[Row]) -> Table | None:
    """One line for each case, a column for each provider.

    Parameters
    ----------
    rows : sequence of Row

    Returns
    -------
    Table or None
        None if there is nobody beside torch.nn and one more.
    """
    names = list(dict.fromkeys(row.provider for row in rows))
    if len(names) < 3:
        return None
    lines = []
    for case, providers in by_case(rows).items():
        cells = [case.cell, case.mode, case.shape]
        for name in names:
            row = providers.get(name)
            if row is None or row.times is None:
                cells.append("-" if row is None else row.status)
            else:
                cells.append(f"{_milliseconds(row)} ({row.times.ratio.median:.2f})")
        lines.append(Line(tuple(cells)))
    title = "milliseconds (torch.nn time / time) of everybody; - cannot run it"
    return Table(title, ("cell", "mode", "case", *(f"#{name}" for name in names)), lines)


def prices_table(rows: Sequence[Row]) -> Table | None:
    """What options and other cells cost: fastrnn beside its plain layer, and beside loops.

    Parameters
    ----------
    rows : sequence of Row

    Returns
    -------
    Table or None
        None if neither was measured.
    """
    names = list(dict.fromkeys(row.provider for row in rows if row.provider != OURS))
    if not {PLAIN, LOOP} & set(names):
        return None
    others = [name for name in names if name != PLAIN]
    lines = []
    for case, providers in by_case(rows).items():
        ours = providers.get(OURS)
        if ours is None or ours.times is None:
            continue
        plain, compiled = providers.get(PLAIN), providers.get("torch.compile")
        cells = [case.cell, case.mode, case.shape, _milliseconds(ours), _quotient(plain, ours)]
        cells += [_quotient(ours, providers.get(name)) for name in others]
        first = None if compiled is None or compiled.times is None else compiled.first_s
        cells.append("-" if first is None else f"{first:.1f}")
        lines.append(Line(tuple(cells)))
    title = (
        f"price: {OURS} time / that of its plain layer; others: their time / {OURS} time, "
        f"{BASELINE} with its plain layer where it has no other; first: seconds to compile and run"
    )
    headers = ("cell", "mode", "case", f"#{OURS} ms", "#price", *(f"#{name}" for name in others))
    return Table(title, (*headers, "#first"), lines)


def quotient(a: Row | None, b: Row | None) -> Band | None:
    """The time of b / that of a, from ratios to torch.nn that were measured apart.

    So the band is that of the farthest ends of theirs.

    Parameters
    ----------
    a, b : Row or None

    Returns
    -------
    Band or None
        None if either has no time.
    """
    if a is None or b is None or a.times is None or b.times is None:
        return None
    over, under = a.times.ratio, b.times.ratio
    return Band(over.median / under.median, over.p20 / under.p80, over.p80 / under.p20)


def _quotient(a: Row | None, b: Row | None) -> str:
    found = quotient(a, b)
    return "-" if found is None else _band(found)


def published_table(rows: Sequence[Row]) -> Table | None:
    """What others published about the measured cases, beside what was measured here.

    Parameters
    ----------
    rows : sequence of Row

    Returns
    -------
    Table or None
        None if none of the cases is a published one.
    """
    measured, main = by_case(rows), main_provider(rows)
    lines = []
    for figure in PUBLISHED:
        here = measured.get(figure.case, {})
        if not here:
            continue
        times = [_milliseconds(here[name]) if name in here else "-" for name in (main, BASELINE)]
        published = (figure.who, figure.device, three_digits(figure.ms), figure.source)
        lines.append(Line((figure.case.name, *published, *times)))
    headers = ("case", "published for", "on", "#ms", "source", f"#{main} ms", "#torch.nn ms")
    title = "published by others, and measured in this run"
    return Table(title, headers, lines) if lines else None


def failures_table(rows: Sequence[Row]) -> Table | None:
    """What was wrong or could not be run, of anybody; None if nothing.

    Parameters
    ----------
    rows : sequence of Row

    Returns
    -------
    Table or None
    """
    lines = [
        Line((row.provider, row.case.cell, row.case.mode, row.case.shape, _ratio(row)), row.status)
        for row in rows
        if row.status != "ok"
    ]
    headers = ("provider", "cell", "mode", "case", "why")
    return Table("not timed", headers, lines) if lines else None


def summary_table(rows: Sequence[Row]) -> Table:
    """One line for each provider, cell, mode and dtype.

    Parameters
    ----------
    rows : sequence of Row

    Returns
    -------
    Table
    """
    headers = ("provider", "cell", "mode", "dtype", "#mean ratio", "#worst")
    lines = [
        Line(
            (*s[:4], f"{s.mean_ratio:.2f}", f"{s.worst_ratio:.2f}", *map(str, s[6:])),
            "slower" if s.slower and s.provider == OURS else "equal",
        )
        for s in summarize(rows)
    ]
    title = "geometric mean of the ratio"
    return Table(title, (*headers, "#faster", "#equal", "#slower"), lines)


def totals(rows: Sequence[Row]) -> str:
    """How many of fastrnn's rows have which verdict, in one line."""
    verdicts = [row.verdict for row in of_provider(rows, main_provider(rows))]
    counts = [
        f"{verdicts.count(verdict)} {verdict}"
        for verdict in MARKS
        if verdict in verdicts or verdict in ("faster", "equal", "slower")
    ]
    return f"{len(verdicts)} cases: {', '.join(counts)}"


def limits_line(results: Results) -> str:
    """What the device can do, in one line."""
    found = results.limits
    gemm = ", ".join(
        f"{speed:.3g} TFLOP/s {dtype}" for dtype, speed in found["gemm_tflops"].items()
    )
    copy = ", ".join(
        f"{speed:.0f} GB/s at {int(size) >> 20} MiB" for size, speed in found["copy_gb_s"].items()
    )
    exchange = found["exchange_us"]
    hand = "not measured" if exchange is None else f"{exchange:.2f} us a step"
    return f"limits: products {gemm}; copies {copy}; empty exchange {hand}"


def changes_table(changes: Sequence[Change], threshold: float) -> Table:
    """One line for each case in both benchmarks, regressions marked.

    Parameters
    ----------
    changes : sequence of Change
    threshold : float
        The one that `changes` were judged by.

    Returns
    -------
    Table
    """
    headers = ("provider", "cell", "mode", "case", "#ms", "#change", "#ratio", "#change", "")
    title = f"old → new; a regression is a ratio that dropped by more than {threshold:.0%}"
    lines = [
        Line(
            (
                change.provider,
                change.case.cell,
                change.case.mode,
                change.case.shape,
                f"{three_digits(change.old_ms)} → {three_digits(change.new_ms)}",
                f"{change.new_ms / change.old_ms - 1:+.0%}",
                f"{change.old_ratio:.2f} → {change.new_ratio:.2f}",
                f"{change.new_ratio / change.old_ratio - 1:+.0%}",
                "▼ regression" if change.is_regression else "",
            ),
            "slower" if change.is_regression else "equal",
        )
        for change in changes
    ]
    return Table(title, headers, lines)
