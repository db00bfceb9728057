"""Write a table of README.md from results: ``python -m fastrnn.bench.readme``.

A table stands between two comments, so that a figure in it has a file that it came from. Results
that were measured beside plain layers make the table of prices, others that of speeds:

    python -m fastrnn.bench.readme bench/results/NAME/results.json
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from .._arguments import UsageError
from . import terminal
from .providers import LOOP, OURS, PLAIN
from .registry import MODES, Case
from .report import quotient, totals
from .results import Results, Row, by_case, load, of_provider

_ROOT = Path(__file__).resolve().parents[1]
_BETWEEN = re.compile(r"(<!-- (speed|prices): (\S+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
_NAMES = {
    "lstm": "LSTM", "gru": "GRU", "rnn": "RNN", "peephole_lstm": "peephole LSTM",
    "slstm": "sLSTM", "layernorm_lstm": "layer-norm LSTM", "layernorm_gru": "layer-norm GRU",
    "gru_reset_before": "GRU with the reset before the product",
}  # fmt: skip
_MODES = {"forward": "inference", "training": "training"}
# Below, a row is about what a call costs, and not its steps.
_SHORTEST = 16
_BATCHES = ((1, 1, "B = 1"), (2, 16, "B = 8 to 16"), (17, 2**31, "B from 32"))


@terminal.printing()
def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the table of one device.

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
    parser.add_argument("results", type=terminal.path, help="a results.json below bench/results")
    parser.add_argument("--readme", type=terminal.path, default=_ROOT / "README.md")
    args = parser.parse_args(argv)
    try:
        found = load(args.results)
    except UsageError as error:
        parser.error(str(error))
    text = args.readme.read_text(encoding="utf-8")
    kind, device = kind_of(found), found.env.device_type
    written = SECTIONS[kind](found, args.results.parent.name)
    new, count = _BETWEEN.subn(
        lambda match: (
            f"{match[1]}{written}{match[4]}" if match.group(2, 3) == (kind, device) else match[0]
        ),
        text,
    )
    if not count or f"<!-- {kind}: {device} -->" not in text:
        parser.error(f"{args.readme} has no <!-- {kind}: {device} -->")
    args.readme.write_text(new, encoding="utf-8")
    return 0


def kind_of(found: Results) -> str:
    """Tell which table results make: ``'speed'`` or ``'prices'``.

    Parameters
    ----------
    found : Results

    Returns
    -------
    str
    """
    return "prices" if any(row.provider == PLAIN for row in found.rows) else "speed"


def section(found: Results, name: str) -> str:
    """Say in Markdown how fast fastrnn was.

    Parameters
    ----------
    found : Results
    name : str
        Of the folder below bench/results that has them.

    Returns
    -------
    str
    """
    ours = of_provider(found.rows, OURS)
    groups: dict[str, list[Row]] = {}
    dtypes = [row.case.dtype for row in ours if row.case.is_plain]
    main_dtype = max(dtypes, key=dtypes.count, default="")
    for row in ours:
        if row.times is not None:
            groups.setdefault(_group(row.case, main_dtype), []).append(row)
    lines = [
        "| time of torch.nn / time of fastrnn | cases | mean | worst | best | slower |",
        "|---|---|---|---|---|---|",
    ]
    for group, rows in groups.items():
        ratios = [row.times.ratio.median for row in rows if row.times]
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
        f"{_machine(found)}; public modules, input as\n"
        f"wide as hidden, {ranges}; geometric means.\n\n"
        + "\n".join(lines)
        + f"\n\n{totals(ours)}. All of them, with bands, limits and memory, are in\n"
        + _origin(found, name)
    )


def _machine(found: Results) -> str:
    env = found.env
    threads = f", {env.threads} threads" if env.device_type == "cpu" else f", cuDNN {env.cudnn}"
    return f"{env.device}{threads}, torch {env.torch}, {env.date[:10]}"


def _origin(found: Results, name: str) -> str:
    env = found.env
    return (
        f"`bench/results/{name}/`, written by `{env.command}`\nat commit {env.commit}"
        f"{', with uncommitted changes' if env.dirty else ''}.\n"
    )


def prices(found: Results, name: str) -> str:
    """Say in Markdown what options and cells cost that torch.nn does not have.

    Parameters
    ----------
    found : Results
    name : str
        Of the folder below bench/results that has them.

    Returns
    -------
    str
    """
    cases = by_case(found.rows)
    sizes = max((case.steps, case.batch, case.hidden_size) for case in cases)
    rows: dict[str, dict[str, dict[str, Row]]] = {}
    for case, providers in cases.items():
        if (case.steps, case.batch, case.hidden_size) == sizes:
            rows.setdefault(_option(case), {})[case.mode] = providers
    header = ["price", "a loop", "compiled"]
    names = [f"{_MODES[mode]}: {column}" for mode in MODES for column in header]
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
        f"{_machine(found)}; T = {sizes[0]}, B = {sizes[1]}, H = {sizes[2]}. *Price* is the time\n"
        "of fastrnn / that of its plain layer, of an ensemble that of as many calls; the others\n"
        "are the time of a loop of torch operators, and of what torch.compile makes of it, / that\n"
        "of fastrnn.\n\n" + "\n".join(lines) + "\n\nThese and others are in " + _origin(found, name)
    )


def _option(case: Case) -> str:
    options = {
        "recurrent dropout": case.recurrent_dropout, "zoneout": case.zoneout,
        f"{case.num_heads} heads": case.num_heads > 1, f"ensemble of {case.members}": case.members,
        "both directions": case.bidirectional, f"projected to {case.proj_size}": case.proj_size,
    }  # fmt: skip
    return ", ".join([_NAMES[case.cell], *(name for name, is_on in options.items() if is_on)])


SECTIONS = {"speed": section, "prices": prices}


def _group(case: Case, main_dtype: str) -> str:
    mode = _MODES[case.mode]
    if case.is_step:
        return f"cells, {mode}"
    if case.ragged:
        return f"sequences of different lengths, {mode}"
    if case.proj_size:
        return f"projected LSTM, {mode}"
    if case.stack:
        return f"two layers, two directions or both, {mode}"
    if case.dtype != main_dtype:
        return f"{_NAMES[case.cell]} {mode}, {case.dtype}"
    if case.steps < _SHORTEST:
        return f"{_NAMES[case.cell]} {mode}, {case.dtype}, T below {_SHORTEST}"
    batch = next(name for low, high, name in _BATCHES if low <= case.batch <= high)
    return f"{_NAMES[case.cell]} {mode}, {case.dtype}, {batch}"


if __name__ == "__main__":
    sys.exit(main())
