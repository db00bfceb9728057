"""Write the table of speeds in README.md from results: ``python -m fastrnn.bench.readme``.

The table stands between two comments, so that a figure in it has a file that it came from:

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
from .providers import OURS
from .registry import Case
from .report import totals
from .results import Results, Row, load, of_provider

_ROOT = Path(__file__).resolve().parents[1]
_BETWEEN = re.compile(r"(<!-- speed: (\S+) -->\n).*?(<!-- /speed -->)", re.DOTALL)
_NAMES = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}
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
    new, count = _BETWEEN.subn(
        lambda match: (
            f"{match[1]}{section(found, args.results.parent.name)}{match[3]}"
            if match[2] == found.env.device_type
            else match[0]
        ),
        text,
    )
    if not count or f"<!-- speed: {found.env.device_type} -->" not in text:
        parser.error(f"{args.readme} has no <!-- speed: {found.env.device_type} -->")
    args.readme.write_text(new, encoding="utf-8")
    return 0


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
    env, ours = found.env, of_provider(found.rows, OURS)
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
    threads = f", {env.threads} threads" if env.device_type == "cpu" else f", cuDNN {env.cudnn}"
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
        f"{env.device}{threads}, torch {env.torch}, {env.date[:10]}; public modules, input as\n"
        f"wide as hidden, {ranges}; geometric means.\n\n"
        + "\n".join(lines)
        + f"\n\n{totals(ours)}. All of them, with bands, limits and memory, are in\n"
        f"`bench/results/{name}/`, written by `{env.command}`\nat commit {env.commit}"
        f"{', with uncommitted changes' if env.dirty else ''}.\n"
    )


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
