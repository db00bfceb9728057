"""What a benchmark shows, in sentences and tables; ``rich`` prints them and ``page`` shows them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table as RichTable

from .environment import Environment
from .providers import BASELINE, LOOP, OURS, PLAIN
from .registry import PUBLISHED, Case
from .results import Band, Change, Results, Row, by_case, of_provider, summarize

#: How a verdict is written beside the ratio.
MARKS = {
    "faster": "faster",
    "equal": "",
    "slower": "▼ slower",
    "wrong": "✗ wrong",
    "failed": "✗ failed",
}
#: Names of cells and modes in sentences and pictures.
LABELS = {
    "lstm": "LSTM",
    "gru": "GRU",
    "rnn": "RNN",
    "peephole_lstm": "peephole LSTM",
    "slstm": "sLSTM",
    "layernorm_lstm": "layer-norm LSTM",
    "layernorm_gru": "layer-norm GRU",
    "gru_reset_before": "reset-before GRU",
    "lstm_cell": "LSTMCell",
    "gru_cell": "GRUCell",
    "rnn_cell": "RNNCell",
}
MODE_LABELS = {"forward": "inference", "training": "training"}
_STYLES = {"faster": "green", "slower": "red", "wrong": "bold red", "failed": "bold red"}


class Line(NamedTuple):
    """Cells of a table, the verdict that colors them, and a remark."""

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
    """Name the provider that the first table compares with torch.nn: fastrnn if it was measured.

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
    """One line for each case: fastrnn against torch.nn.

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
    headers += ["#CUDA graph"] * has_graph + [f"#{main} MiB", "#torch.nn MiB"] * has_memory + [""]
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


def two_digits(value: float) -> str:
    """Write a number with two significant digits, or all before the point."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"


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
        None if fewer than two providers were compared with torch.nn.
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
    title = "all providers: milliseconds (torch.nn time / time); -: does not support the case"
    return Table(title, ("cell", "mode", "case", *(f"#{name}" for name in names)), lines)


def prices_table(rows: Sequence[Row]) -> Table | None:
    """What options and variants cost: fastrnn against its plain layer, and against loops.

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
        f"cost: {OURS} time / time of its plain layer; others: their time / {OURS} time, with the "
        f"plain layer of {BASELINE} where it has no such option; first call: seconds, with "
        "compilation by torch.compile"
    )
    headers = ("cell", "mode", "case", f"#{OURS} ms", "#cost", *(f"#{name}" for name in others))
    return Table(title, (*headers, "#first call"), lines)


def quotient(a: Row | None, b: Row | None) -> Band | None:
    """The time of b / that of a, from their ratios to torch.nn, which were measured separately.

    The band therefore spans the outer ends of both bands.

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
    """Figures that others published for the measured cases, next to the times of this run.

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
    title = "published figures, and the times of this run"
    return Table(title, headers, lines) if lines else None


def failures_table(rows: Sequence[Row]) -> Table | None:
    """Cases that failed or gave wrong results, of every provider; None if there are none.

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
    headers = ("provider", "cell", "mode", "case", "reason")
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
    title = "geometric means of the ratio"
    return Table(title, (*headers, "#faster", "#equal", "#slower"), lines)


def totals(rows: Sequence[Row]) -> str:
    """Count the verdicts of fastrnn's rows, in one line."""
    verdicts = [row.verdict for row in of_provider(rows, main_provider(rows))]
    counts = [
        f"{verdicts.count(verdict)} {verdict}"
        for verdict in MARKS
        if verdict in verdicts or verdict in ("faster", "equal", "slower")
    ]
    return f"{len(verdicts)} cases: {', '.join(counts)}"


def limits_line(results: Results) -> str:
    """The measured limits of the device, in one line."""
    found = results.limits
    gemm = ", ".join(
        f"{speed:.3g} TFLOP/s {dtype}" for dtype, speed in found["gemm_tflops"].items()
    )
    copy = ", ".join(
        f"{speed:.0f} GB/s at {int(size) >> 20} MiB" for size, speed in found["copy_gb_s"].items()
    )
    exchange = found["exchange_us"]
    hand = "not measured" if exchange is None else f"{exchange:.2f} us a step"
    return f"limits: matrix products {gemm}; copies {copy}; empty exchange {hand}"


class Conclusions(NamedTuple):
    """What a benchmark shows, in sentences: in one, where it is faster, where slower and why."""

    summary: str
    faster: list[str]
    slower: list[str]


def machine(env: Environment) -> str:
    """Where results were measured, in one line.

    Parameters
    ----------
    env : Environment

    Returns
    -------
    str
    """
    threads = f"{env.threads} thread{'s' * (env.threads > 1)}"
    beside = threads if env.device_type == "cpu" else f"cuDNN {env.cudnn}"
    return f"{env.device}, {beside} · torch {env.torch} · {env.date.partition('T')[0]}"


def group_of(case: Case) -> str:
    """The kind of layer and the mode of a case, such as 'LSTM inference'.

    Parameters
    ----------
    case : Case

    Returns
    -------
    str
    """
    return f"{'cell' if case.is_step else LABELS[case.cell]} {MODE_LABELS[case.mode]}"


def conclusions(found: Results) -> Conclusions:
    """Say where fastrnn is faster and where slower, with the reasons that the rows contain.

    Parameters
    ----------
    found : Results

    Returns
    -------
    Conclusions
    """
    main = main_provider(found.rows)
    every = of_provider(found.rows, main)
    timed = [row for row in every if row.times is not None]
    return Conclusions(
        _summary(found.env, main, every, timed),
        _gains(found.rows, main, timed),
        _losses(found.rows, timed),
    )


def _summary(env: Environment, main: str, every: Sequence[Row], timed: Sequence[Row]) -> str:
    threads = f" with {env.threads} thread{'s' * (env.threads > 1)}"
    where = f"On {env.device}{threads if env.device_type == 'cpu' else ''}"
    verdicts = [row.verdict for row in every]
    bad = [f"{verdicts.count(v)} {v}" for v in ("wrong", "failed") if v in verdicts]
    if not timed:
        return f"{where}, no case of {main} was timed: {', '.join(bad) or 'none was run'}."
    counts = [verdicts.count(verdict) for verdict in ("faster", "equal", "slower")]
    ratios = [_median(row) for row in timed]
    is_beyond = any(row.case.is_beyond_torch for row in timed)
    plain = " (its plain layer where it has no such option)" if is_beyond else ""
    text = (
        f"{where}, {main} is faster than {BASELINE}{plain} in {counts[0]} of {_cases(len(every))}, "
        f"equal in {counts[1]} and slower in {counts[2]}"
    )
    text += f" ({', '.join(bad)})" if bad else ""
    mean = statistics.geometric_mean(ratios)
    if len(timed) == 1:
        return f"{text}. It is {mean:.2f} times as fast."
    return (
        f"{text}. It is {mean:.2f} times as fast in the geometric mean, with a range of "
        f"{_range(ratios)}."
    )


def _gains(rows: Sequence[Row], main: str, timed: Sequence[Row]) -> list[str]:
    """Means of the groups, of what torch.nn runs, and of others that were measured."""
    cases = by_case(rows)
    groups = _split(timed, lambda row: group_of(row.case))
    sentences = []
    if len(groups) > 1:
        ordered = sorted(groups.items(), key=lambda item: -_mean(item[1]))
        means = [f"{name} {_mean(own):.2f}" for name, own in ordered]
        sentences.append(f"Geometric mean by layer and mode: {', '.join(means)}.")
    ran = {case: found[BASELINE].path.split(",")[0] for case, found in cases.items()
           if BASELINE in found}  # fmt: skip
    theirs = _split((row for row in timed if ran.get(row.case)), lambda row: ran[row.case])
    if len(theirs) > 1:
        ordered = sorted(theirs.items(), key=lambda item: -_mean(item[1]))
        means = [f"{_mean(own):.2f} where it runs {path} ({_cases(len(own))})"
                 for path, own in ordered]  # fmt: skip
        sentences.append(f"By what {BASELINE} runs: {', '.join(means)}.")
    faster = [row for row in timed if row.verdict == "faster"]
    paths = sorted(_split(faster, lambda row: row.path).items(), key=lambda item: -len(item[1]))
    if len(paths) == 1 and main == OURS:
        sentences.append(f"All faster cases ran on the path {paths[0][0]}.")
    elif paths and main == OURS:
        shares = [f"{len(own)} ran on the path {path}" for path, own in paths]
        sentences.append(f"Of the {len(faster)} faster cases, {_joined(shares)}.")
    graphs = [row.graph.ratio.median for row in timed if row.graph is not None]
    if graphs:
        sentences.append(
            f"Replayed as CUDA graphs: {statistics.geometric_mean(graphs):.2f} in the geometric "
            f"mean of {_cases(len(graphs))}."
        )
    return sentences + _others(rows, main)


def _others(rows: Sequence[Row], main: str) -> list[str]:
    """How the main provider compares with each library other than torch.nn."""
    sentences = []
    for name in dict.fromkeys(row.provider for row in rows):
        bands = [quotient(found.get(main), found.get(name)) for found in by_case(rows).values()]
        ratios = [band.median for band in bands if band is not None]
        if ratios and name != BASELINE and not name.startswith(OURS):
            sentences.append(
                f"Compared with {name}: {statistics.geometric_mean(ratios):.2f} times as fast in "
                f"the geometric mean of {_cases(len(ratios))}, {_range(ratios)}."
            )
    return sentences


def _losses(rows: Sequence[Row], timed: Sequence[Row]) -> list[str]:
    """A few sentences for each kind of layer and path with slower cases, the most cases first."""
    cases = by_case(rows)
    totals_of = _split(timed, lambda row: group_of(row.case))
    slower = [row for row in timed if row.verdict == "slower"]
    groups = _split(
        slower, lambda row: (group_of(row.case), row.path, row.case.is_beyond_torch)
    )  # fmt: skip
    sentences = []
    for (group, path, is_beyond), own in sorted(groups.items(), key=lambda item: -len(item[1])):
        head = (
            f"{group}: {len(own)} of {_cases(len(totals_of[group]))}, "
            f"{_range([_median(row) for row in own])} times as fast"
            f"{f', path {path}' if path else ''}."
        )
        if is_beyond:
            head += f" {BASELINE} has no such layer or option; its time is that of the plain layer."
        theirs = [
            cases[row.case][BASELINE].path.split(",")[0]
            for row in own
            if BASELINE in cases[row.case]
        ]
        sentences.append(f"{head} {_reason(own, theirs)}{_noise(own)}")
    return sentences


def _noise(rows: Sequence[Row]) -> str:
    """For how many of the slower rows the band of the ratio includes 1."""
    count = sum(row.times is not None and round(row.times.ratio.p80, 2) >= 1 for row in rows)
    if not count:
        return ""
    which = f"In {count} of them, the" if count < len(rows) else "Its" if count == 1 else "Their"
    return f" {which} 20-80 % band includes 1: within noise."


# What `limits` says that a limit is made of.
_BOUNDS = {
    "products": "the matrix products",
    "weights": "reading the weights",
    "memory": "the memory bandwidth",
    "exchange": "the exchange between steps",
}
# The ratio that a planner's reason expects, on our paths and on torch's.
_EXPECTED = {
    False: re.compile(r"([\d.]+) times as fast as torch's"),
    True: re.compile(r"^([\d.]+) times as fast as "),
}


def _reason(rows: Sequence[Row], theirs: Sequence[str]) -> str:
    """Why rows of one path are slower, from what they know of it."""
    ms = [row.times.ms.median for row in rows if row.times]
    name, is_torch = rows[0].provider, rows[0].path == "torch"
    matches = [_EXPECTED[is_torch].search(row.reason) for row in rows]
    expected = [float(match[1]) for match in matches if match]
    quoted = dict.fromkeys(row.reason for row in rows if row.reason)
    if is_torch:
        text = (
            f"{name} calls the same operators as {BASELINE} there: call overhead and noise, in "
            f"calls of {_range(ms, two_digits)} ms."
        )
    else:
        names = _joined(list(dict.fromkeys(filter(None, theirs))))
        shares = [100 * row.share for row in rows if row.share is not None]
        bounds = _joined([_BOUNDS.get(by, by) for by in dict.fromkeys(r.bound or "" for r in rows)])
        text = f"{BASELINE} runs {names}." if names else ""
        if shares:
            text += f" {name} reaches {_range(shares, two_digits)} % of the limit set by {bounds}."
    if len(expected) == len(rows) and is_torch:
        text += f" The planner expects them to be {_range(expected)} times as fast as the kernels."
    elif len(expected) == len(rows):
        text += (
            f" The planner expected the kernels to be {_range(expected)} times as fast as torch's."
        )
    elif 1 <= len(quoted) <= 2:
        reasons = [f'"{reason}"' for reason in quoted]
        text += f" The planner says: {_joined(reasons)}."
    return text.strip()


def _split(rows: Iterable[Row], key: Any) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _median(row: Row) -> float:
    assert row.times is not None
    return row.times.ratio.median


def _mean(rows: Sequence[Row]) -> float:
    return statistics.geometric_mean(map(_median, rows))


def _cases(count: int) -> str:
    return f"{count} case{'s' * (count != 1)}"


def _range(values: Sequence[float], form: Callable[[float], str] = "{:.2f}".format) -> str:
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"


def _joined(names: Sequence[str]) -> str:
    *most, last = names or [""]
    return f"{', '.join(most)} and {last}" if most else last


def changes_table(changes: Sequence[Change], threshold: float) -> Table:
    """One line for each case that both benchmarks have; regressions are marked.

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
