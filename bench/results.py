"""What a benchmark returns: a row for each case, its files, and what to conclude from rows."""

from __future__ import annotations

import csv
import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .._arguments import UsageError
from .environment import Environment
from .registry import Case

#: Version of the files' layout: raised when a field changes its meaning or goes away.
SCHEMA = 2

# A median ratio this far from 1 is called a difference.
_MARGIN = 0.03


class Band(NamedTuple):
    """A median and the 20th and 80th percentile around it."""

    median: float
    p20: float
    p80: float


class Times(NamedTuple):
    """Milliseconds of one call of each side, and torch.nn time / fastrnn time of the pairs."""

    fastrnn_ms: Band
    torch_ms: Band
    ratio: Band


@dataclass(frozen=True)
class Row:
    """The result of one case.

    Attributes
    ----------
    case : Case
    path, reason : str
        The planner's choice; for a failed case the reason is the error.
    status : {'ok', 'wrong', 'failed'}
        'wrong' if fastrnn's results differ from torch.nn's, 'failed' if the case could not
        be run.
    tolerance : float
        Allowed difference of an output or gradient, relative to its largest element.
    error : float, optional
        The largest difference; None for a failed case.
    pairs : int
        How often both sides were timed.
    times : Times, optional
        None unless the status is 'ok'. In files a band is three columns, such as
        ``ratio`` (the median), ``ratio_p20`` and ``ratio_p80``.
    fastrnn_peak_mib, torch_peak_mib : float, optional
        Largest memory that one call allocates; on a CPU by the resident set, on Linux only.
    share : float, optional
        Operations of fastrnn a second, divided by those of a large matrix product of torch on
        the same device in the same run.
    """

    case: Case
    path: str
    reason: str
    status: str
    tolerance: float
    error: float | None = None
    pairs: int = 0
    times: Times | None = None
    fastrnn_peak_mib: float | None = None
    torch_peak_mib: float | None = None
    share: float | None = None

    @property
    def verdict(self) -> str:
        """'faster', 'equal' or 'slower', or the status of a row without times.

        'slower' if the whole band of the ratio, to two digits, is below 1 or the median below
        0.97; 'faster' only if the whole band is above 1 and the median above 1.03, lest
        noise counts as a win.
        """
        if self.times is None:
            return self.status
        median, p20, p80 = (round(value, 2) for value in self.times.ratio)
        if p80 < 1 or median < 1 - _MARGIN:
            return "slower"
        return "faster" if p20 > 1 and median > 1 + _MARGIN else "equal"

    def record(self) -> dict[str, Any]:
        """The row as flat fields, as files have it."""
        fields = dataclasses.asdict(self)
        times = fields.pop("times")
        return {
            **fields.pop("case"),
            **fields,
            **{
                column: times and getattr(getattr(times, name), statistic)
                for name, statistic, column in _band_columns()
            },
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Row:
        """The inverse of `record`; KeyError, TypeError or ValueError if fields do not fit."""
        rest = dict(record)
        case = Case(**{field.name: rest.pop(field.name) for field in dataclasses.fields(Case)})
        numbers = [rest.pop(column) for _, _, column in _band_columns()]
        times = None
        if numbers[0] is not None:
            values = map(float, numbers)
            times = Times(*(Band(*triple) for triple in zip(values, values, values, strict=True)))
        return cls(case=case, times=times, **rest)


def _band_columns() -> list[tuple[str, str, str]]:
    """Name, statistic and column of every number in a `Times`."""
    return [
        (name, statistic, name if statistic == "median" else f"{name}_{statistic}")
        for name in Times._fields
        for statistic in Band._fields
    ]


def write_json(path: Path, env: Environment, rows: Sequence[Row]) -> None:
    """Write everything; `load` reads it."""
    content = {
        "schema": SCHEMA,
        "environment": dataclasses.asdict(env),
        "rows": [row.record() for row in rows],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_csv(path: Path, env: Environment, rows: Sequence[Row]) -> None:
    """Write a table whose rows each carry the environment; for other programs."""
    records = [{**row.record(), **dataclasses.asdict(env)} for row in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def load(path: Path) -> tuple[Environment, list[Row]]:
    """Read a results.json.

    Parameters
    ----------
    path : Path

    Returns
    -------
    tuple of Environment and list of Row

    Raises
    ------
    UsageError
        If the file cannot be read or is no results.json of this version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise UsageError(f"{path} is not a results.json of fastrnn bench with schema {SCHEMA}")
    try:
        rows = [Row.from_record(record) for record in content["rows"]]
        hash(tuple(row.case for row in rows))  # TypeError if a field of a case is a list
        return Environment(**content["environment"]), rows
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} has missing, unknown or wrong fields: {error}") from error


class Change(NamedTuple):
    """One case in an old and a new benchmark."""

    case: Case
    old_ms: float
    new_ms: float
    old_ratio: float
    new_ratio: float
    is_regression: bool


def compare(old: Sequence[Row], new: Sequence[Row], threshold: float = 0.1) -> list[Change]:
    """Compare the cases that were timed in both benchmarks.

    Parameters
    ----------
    old, new : sequence of Row
    threshold : float, default 0.1
        By how much, relative to the old, a case's ratio may drop. It is the ratio to
        torch.nn that is judged, because milliseconds change with the machine and its load.

    Returns
    -------
    list of Change
        In the order of `new`.
    """
    before = {row.case: row.times for row in old}
    changes = []
    for row in new:
        past = before.get(row.case)
        if past is None or row.times is None:
            continue
        old_ratio, new_ratio = past.ratio.median, row.times.ratio.median
        changes.append(
            Change(
                row.case,
                past.fastrnn_ms.median,
                row.times.fastrnn_ms.median,
                old_ratio,
                new_ratio,
                is_regression=new_ratio < old_ratio * (1 - threshold),
            )
        )
    return changes


class Summary(NamedTuple):
    """The timed rows of one cell and mode: geometric mean of the ratio, and verdicts."""

    cell: str
    mode: str
    mean_ratio: float
    faster: int
    equal: int
    slower: int


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """Group rows by cell and mode, in the order in which these occur."""
    groups: dict[tuple[str, str], tuple[list[float], list[str]]] = {}
    for row in rows:
        if row.times is not None:
            ratios, verdicts = groups.setdefault((row.case.cell, row.case.mode), ([], []))
            ratios.append(row.times.ratio.median)
            verdicts.append(row.verdict)
    return [
        Summary(
            cell,
            mode,
            statistics.geometric_mean(ratios),
            *(verdicts.count(verdict) for verdict in ("faster", "equal", "slower")),
        )
        for (cell, mode), (ratios, verdicts) in groups.items()
    ]
