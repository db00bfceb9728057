"""Write the tables of README.md and docs/speed.md: ``python -m fastrnn.bench.readme``.

A table stands between two comments, so that every figure in it has a file that it comes from:

    python -m fastrnn.bench.readme bench/results/NAME/results.json

What was measured decides which tables are written: fastrnn against torch.nn (``summary`` and
``speed``), against other runtimes (``runtimes``), or options and variants against the plain layer
(``prices``).
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .._arguments import UsageError
from . import terminal
from .providers import BASELINE, LOOP, OURS, PLAIN
from .registry import MODES, Case
from .report import LABELS, MODE_LABELS, quotient, totals
from .results import Results, Row, by_case, load, of_provider

_ROOT = Path(__file__).resolve().parents[1]
PAGES = (_ROOT / "README.md", _ROOT / "docs" / "speed.md")
BLOCK = re.compile(r"(<!-- (\w+): (\w+) -->\n)(.*?)(<!-- /\2 -->)", re.DOTALL)
_RUNTIMES = ("onnxruntime", "openvino")
# Shorter sequences measure the overhead of a call rather than its steps.
_SHORTEST = 16
_BATCHES = ((1, 1, "B = 1"), (2, 16, "B = 8 to 16"), (17, 2**31, "B from 32"))


@terminal.printing()
def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the tables for which a file has the results.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; those of the command line if None.

    Returns
    -------
    int
        Exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m fastrnn.bench.readme", description=__doc__)
    parser.add_argument("results", type=terminal.path, help="a results.json in bench/results")
    parser.add_argument(
        "--pages", type=terminal.path, nargs="+", default=PAGES, metavar="FILE",
        help="Markdown files with tables (default README.md docs/speed.md)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        found = load(args.results)
    except UsageError as error:
        parser.error(str(error))
    tables = tables_of(found)
    texts = {page: page.read_text(encoding="utf-8") for page in args.pages}
    blocks = {match.group(2, 3) for text in texts.values() for match in BLOCK.finditer(text)}
    device = found.env.device_type
    if not any((kind, device) in blocks for kind in tables):
        wanted = " or ".join(f"<!-- {kind}: {device} -->" for kind in tables)
        parser.error(f"no {wanted} in {', '.join(map(str, args.pages))}")

    def written(block: re.Match[str]) -> str:
        if block[2] not in tables or block[3] != device:
            return block[0]
        return f"{block[1]}{tables[block[2]](found, args.results.parent.name)}{block[5]}"

    for page, text in texts.items():
        page.write_text(BLOCK.sub(written, text), encoding="utf-8")
    return 0


def tables_of(found: Results) -> dict[str, Callable[[Results, str], str]]:
    """Name the tables that can be written from results, and the functions that write them.

    Parameters
    ----------
    found : Results

    Returns
    -------
    dict of str to function
        Each takes the results and the name of their folder in bench/results.
    """
    providers = {row.provider for row in found.rows}
    if PLAIN in providers:
        return {"prices": _prices}
    if providers & {*_RUNTIMES}:
        return {"runtimes": _runtimes}
    return {"summary": _summary, "speed": _speed}


def _summary(found: Results, name: str) -> str:
    """Compare fastrnn with torch.nn in a few lines of Markdown."""
    ours = of_provider(found.rows, OURS)
    main_dtype = _main_dtype(ours)
    timed = [row for row in ours if row.times is not None]
    kinds = dict.fromkeys(_kind(row.case, main_dtype) for row in timed)
    lines = ["| | inference | training | slower |", "|---|---|---|---|"]
    for kind in sorted(kinds, key=[*LABELS.values(), *kinds].index):
        rows = [row for row in timed if _kind(row.case, main_dtype) == kind]
        cells = [_spread(row for row in rows if row.case.mode == mode) for mode in MODES]
        slower = sum(row.verdict == "slower" for row in rows)
        lines.append(f"| {kind} | {' | '.join(cells)} | {slower or 'none'} of {len(rows)} |")
    return (
        f"{_machine(found)}.\nTime of torch.nn / time of fastrnn: geometric mean (worst to best);"
        f" {main_dtype} unless noted.\n\n"
        + "\n".join(lines)
        + f"\n\n{totals(ours)}. Source: "
        + _origin(found, name)
    )


def _speed(found: Results, name: str) -> str:
    """Compare fastrnn with torch.nn by cell, mode, batch and dtype."""
    ours = of_provider(found.rows, OURS)
    main_dtype = _main_dtype(ours)
    groups: dict[str, list[Row]] = {}
    for row in ours:
        if row.times is not None:
            groups.setdefault(_group(row.case, main_dtype), []).append(row)
    lines = [
        "| time of torch.nn / time of fastrnn | cases | mean | worst | best | slower |",
        "|---|---|---|---|---|---|",
    ]
    for group, rows in groups.items():
        ratios = _ratios(rows)
        slower = sum(row.verdict == "slower" for row in rows)
        lines.append(
            f"| {group} | {len(rows)} | {statistics.geometric_mean(ratios):.2f} "
            f"| {min(ratios):.2f} | {max(ratios):.2f} | {slower or ''} |"
        )
    ranges = ", ".join(
        f"{name} {min(values)} to {max(values)}"
        for name, values in (
            ("T", {row.case.steps for row in ours if row.case.is_plain}),
            ("B", {row.case.batch for row in ours if row.case.is_plain}),
            ("H", {row.case.hidden_size for row in ours if row.case.is_plain}),
        )
        if values
    )
    return (
        f"{_machine(found)}. Public modules, input size equal to\nhidden size, {ranges};"
        " geometric means.\n\n"
        + "\n".join(lines)
        + f"\n\n{totals(ours)}. All cases, with spread, limits and memory: "
        + _origin(found, name)
    )


def _runtimes(found: Results, name: str) -> str:
    """Compare fastrnn with runtimes for trained models."""
    bands: dict[tuple[str, str], dict[str, float]] = {}
    for case, providers in by_case(found.rows).items():
        for other in (BASELINE, *_RUNTIMES):
            band = quotient(providers.get(OURS), providers.get(other))
            if band is not None:
                size = f"T{case.steps} B{case.batch} H{case.hidden_size}"
                bands.setdefault((other, LABELS[case.cell]), {})[size] = band.median
    lines = [
        "| time of the other / time of fastrnn | mean | worst | at | best | at |",
        "|---|---|---|---|---|---|",
    ]
    for (other, cell), ratios in bands.items():
        worst, best = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
        lines.append(
            f"| {other}, {cell} | {statistics.geometric_mean(ratios.values()):.2f} "
            f"| {ratios[worst]:.2f} | {worst} | {ratios[best]:.2f} | {best} |"
        )
    sizes = max(map(len, bands.values()), default=0)
    return (
        f"{_machine(found)}; inference in {_main_dtype(found.rows)},\n"
        f"{sizes} sizes; geometric means.\n\n" + "\n".join(lines) + "\n\nSource: "
        + _origin(found, name)
    )  # fmt: skip


def _prices(found: Results, name: str) -> str:
    """Give the cost of options and cells that torch.nn does not have."""
    cases = by_case(found.rows)
    sizes = max((case.steps, case.batch, case.hidden_size) for case in cases)
    rows: dict[str, dict[str, dict[str, Row]]] = {}
    for case, providers in cases.items():
        if (case.steps, case.batch, case.hidden_size) == sizes:
            rows.setdefault(_option(case), {})[case.mode] = providers
    header = ["cost", "loop", "compiled"]
    names = [f"{MODE_LABELS[mode]}: {column}" for mode in MODES for column in header]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for option, by_mode in rows.items():
        cells = []
        for mode in MODES:
            providers = by_mode.get(mode, {})
            ours = providers.get(OURS)
            pairs = [(providers.get(PLAIN), ours)]
            pairs += [(ours, providers.get(other)) for other in (LOOP, "torch.compile")]
            bands = [quotient(a, b) for a, b in pairs]
            cells += ["-" if band is None else f"{band.median:.2f}" for band in bands]
        lines.append(f"| {option} | {' | '.join(cells)} |")
    return (
        f"{_machine(found)}; T = {sizes[0]}, B = {sizes[1]}, H = {sizes[2]}.\n"
        "*Cost*: time of fastrnn / time of its plain layer (of an ensemble: of one call per\n"
        "member). *Loop*: time of a loop of torch operators / time of fastrnn. *Compiled*: time\n"
        "of that loop under torch.compile / time of fastrnn.\n\n"
        + "\n".join(lines)
        + "\n\nThese cases and more: "
        + _origin(found, name)
    )


def _machine(found: Results) -> str:
    env = found.env
    threads = f", {env.threads} threads" if env.device_type == "cpu" else f", cuDNN {env.cudnn}"
    return f"{env.device}{threads}, torch {env.torch}, {env.date[:10]}"


def _origin(found: Results, name: str) -> str:
    env = found.env
    return (
        f"`bench/results/{name}/`,\nwritten by `{env.command}` at commit {env.commit}"
        f"{', with uncommitted changes' if env.dirty else ''}.\n"
    )


def _main_dtype(rows: Iterable[Row]) -> str:
    """The dtype of most plain cases."""
    dtypes = [row.case.dtype for row in rows if row.case.is_plain]
    return max(dtypes, key=dtypes.count, default="")


def _ratios(rows: Iterable[Row]) -> list[float]:
    return [row.times.ratio.median for row in rows if row.times]


def _spread(rows: Iterable[Row]) -> str:
    ratios = _ratios(rows)
    if not ratios:
        return "-"
    mean = statistics.geometric_mean(ratios)
    return f"{mean:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _option(case: Case) -> str:
    options = {
        "recurrent dropout": case.recurrent_dropout, "zoneout": case.zoneout,
        f"{case.num_heads} heads": case.num_heads > 1, f"ensemble of {case.members}": case.members,
        "bidirectional": case.bidirectional, f"projected to {case.proj_size}": case.proj_size,
    }  # fmt: skip
    return ", ".join([LABELS[case.cell], *(name for name, is_on in options.items() if is_on)])


def _kind(case: Case, main_dtype: str) -> str:
    """What distinguishes a case from a plain layer in the main dtype; else its cell."""
    if case.is_step:
        return "single steps (cell modules)"
    if case.ragged:
        return "packed sequences of different lengths"
    if case.proj_size:
        return "LSTM with projections"
    if case.stack:
        return "two layers, bidirectional, or both"
    return LABELS[case.cell] if case.dtype == main_dtype else case.dtype


def _group(case: Case, main_dtype: str) -> str:
    """A finer division than that of `_kind`."""
    kind, mode = _kind(case, main_dtype), MODE_LABELS[case.mode]
    if kind not in (LABELS[case.cell], case.dtype):
        return f"{kind}, {mode}"
    group = f"{LABELS[case.cell]} {mode}, {case.dtype}"
    if case.dtype != main_dtype:
        return group
    if case.steps < _SHORTEST:
        return f"{group}, T below {_SHORTEST}"
    return f"{group}, " + next(name for low, high, name in _BATCHES if low <= case.batch <= high)


if __name__ == "__main__":
    sys.exit(main())
