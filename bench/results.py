"""The results of a benchmark: a row for each case, files, and conclusions from rows."""

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
from .providers import BASELINE, OURS
from .registry import Case

#: Version of the file format: raised when a field changes its meaning or is removed.
SCHEMA = 3

# A median ratio at least this far from 1 counts as a difference.
_MARGIN = 0.03


class Band(NamedTuple):
    """A median and the 20th and 80th percentile around it."""

    median: float
    p20: float
    p80: float


class Times(NamedTuple):
    """Milliseconds per call, and torch.nn's time / this time over the pairs."""

    ms: Band
    ratio: Band


@dataclass(frozen=True)
class Row:
    """The results of one provider in one case.

    Attributes
    ----------
    case : Case
    provider : str
        Key of ``providers.PROVIDERS``.
    path : str
        What ran: for fastrnn the planner's path or the schedules of its kernels, for torch.nn the
        library's algorithm, and for which plain layer where it has no other; '' for others.
    reason : str
        The planner's reason or, after a failure, the error.
    status : {'ok', 'wrong', 'failed'}
        'wrong' if the results differ from the expected ones, 'failed' if the case could not be run.
    error, tolerance : float, optional
        For the output or gradient with the largest error relative to its tolerance: its difference
        from torch.nn's, or from our differentiable loop's where torch.nn has no such layer,
        relative to the largest element, and its tolerance. None for torch.nn itself, for what is
        timed for scale only, and for a failed case.
    first_s : float, optional
        Seconds until the first results, including compilation.
    pairs : int
        How many times the provider and torch.nn were timed one after the other.
    times : Times, optional
        As users call it; None unless the status is 'ok'. In files a band is three columns, such
        as ``ratio`` (the median), ``ratio_p20`` and ``ratio_p80``.
    graph : Times, optional
        As a replayed CUDA graph; None on a CPU and where it cannot be captured.
    peak_mib : float, optional
        Peak memory that one call allocates, apart from what the provider keeps between calls; on a
        CPU measured by the resident set, on Linux only.
    limit_ms : float, optional
        The minimum time of the case on this device; see ``limits``.
    bound : str, optional
        What determines that limit.
    """

    case: Case
    provider: str
    path: str
    reason: str
    status: str
    error: float | None = None
    tolerance: float | None = None
    pairs: int = 0
    times: Times | None = None
    graph: Times | None = None
    peak_mib: float | None = None
    limit_ms: float | None = None
    bound: str | None = None
    first_s: float | None = None

    @property
    def is_ours(self) -> bool:
        """Whether the provider is fastrnn, by the planner's choice or a forced path."""
        return self.provider.startswith(OURS)

    @property
    def step_us(self) -> float | None:
        """Microseconds for each of the T steps, all layers and directions together."""
        return self.times and self.times.ms.median * 1e3 / self.case.steps

    @property
    def share(self) -> float | None:
        """The limit divided by the time; 1 means as fast as the device can be."""
        if self.times is None or self.limit_ms is None:
            return None
        return self.limit_ms / self.times.ms.median

    @property
    def verdict(self) -> str:
        """'faster', 'equal' or 'slower', or the status of a row without times.

        'slower' if the whole band of the ratio, to two digits, is below 1 or the median below 0.97;
        'faster' only if the whole band is above 1 and the median above 1.03, so that noise does not
        count as a win.
        """
        if self.times is None:
            return self.status
        median, p20, p80 = (round(value, 2) for value in self.times.ratio)
        if p80 < 1 or median < 1 - _MARGIN:
            return "slower"
        return "faster" if p20 > 1 and median > 1 + _MARGIN else "equal"

    def record(self) -> dict[str, Any]:
        """Return the row as flat fields, as stored in files."""
        fields = dataclasses.asdict(self)
        for name in _TIMES:
            del fields[name]
        return {
            **fields.pop("case"),
            **fields,
            **{
                column: (times := getattr(self, name)) and getattr(getattr(times, part), statistic)
                for name, part, statistic, column in _band_columns()
            },
            **{name: getattr(self, name) for name in _DERIVED},
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Row:
        """Invert `record`; raises KeyError, TypeError or ValueError if fields do not fit."""
        rest = {**_LATER, **record}
        for name in _DERIVED:
            del rest[name]
        case = Case(**{field.name: rest.pop(field.name) for field in dataclasses.fields(Case)})
        numbers = [rest.pop(column) for *_, column in _band_columns()]
        size = len(numbers) // len(_TIMES)
        times: dict[str, Any] = {
            name: _times_of(numbers[k * size : (k + 1) * size]) for k, name in enumerate(_TIMES)
        }
        if rest["path"] == "loop":  # the name of compiled kernels until 2026-11-28
            rest["path"] = "kernels"
        return cls(case=case, **times, **rest)


# Fields that the cases of older files lack.
_LATER = {
    "proj_size": 0, "recurrent_dropout": 0.0, "zoneout": 0.0, "num_heads": 1, "members": 0,
}  # fmt: skip
# Fields that span several columns, and columns derived from others.
_TIMES = ("times", "graph")
_DERIVED = ("step_us", "share")


def _band_columns() -> list[tuple[str, str, str, str]]:
    """List field, part, statistic and column of every number in the `Times` of a row."""
    columns = []
    for name in _TIMES:
        prefix = "graph_" if name == "graph" else ""
        for part in Times._fields:
            for statistic in Band._fields:
                suffix = "" if statistic == "median" else f"_{statistic}"
                columns.append((name, part, statistic, f"{prefix}{part}{suffix}"))
    return columns


def _times_of(numbers: Sequence[Any]) -> Times | None:
    if numbers[0] is None:
        return None
    values = map(float, numbers)
    return Times(*(Band(*triple) for triple in zip(values, values, values, strict=True)))


class Results(NamedTuple):
    """A benchmark: where it ran, what the device can do (see ``limits``), and the rows."""

    env: Environment
    limits: dict[str, Any]
    rows: list[Row]


def write_json(path: Path, results: Results) -> None:
    """Write everything; `load` reads it."""
    content = {
        "schema": SCHEMA,
        "environment": dataclasses.asdict(results.env),
        "limits": results.limits,
        "rows": [row.record() for row in results.rows],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_csv(path: Path, results: Results) -> None:
    """Write a table whose rows each include the environment, for use by other programs."""
    environment = dataclasses.asdict(results.env)
    records = [{**row.record(), **environment} for row in results.rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def load(path: Path) -> Results:
    """Read a results.json.

    Parameters
    ----------
    path : Path

    Returns
    -------
    Results

    Raises
    ------
    UsageError
        If the file cannot be read or is not a results.json of this version.
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
        return Results(Environment(**content["environment"]), dict(content["limits"]), rows)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} has missing, unknown or wrong fields: {error}") from error


def by_case(rows: Sequence[Row]) -> dict[Case, dict[str, Row]]:
    """Group rows: for each case its providers, in order of appearance.

    Parameters
    ----------
    rows : sequence of Row

    Returns
    -------
    dict of Case to dict of str to Row
    """
    groups: dict[Case, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(row.case, {})[row.provider] = row
    return groups


def of_provider(rows: Sequence[Row], provider: str) -> list[Row]:
    """Choose the rows of one provider."""
    return [row for row in rows if row.provider == provider]


class Change(NamedTuple):
    """A case of one provider in an old and a new benchmark."""

    case: Case
    provider: str
    old_ms: float
    new_ms: float
    old_ratio: float
    new_ratio: float
    is_regression: bool


def compare(old: Sequence[Row], new: Sequence[Row], threshold: float = 0.1) -> list[Change]:
    """Compare our times between two benchmarks.

    Parameters
    ----------
    old, new : sequence of Row
    threshold : float, default 0.1
        By how much, relative to the old, a case's ratio may drop. The criterion is the ratio to
        torch.nn, because milliseconds change with the machine and its load.

    Returns
    -------
    list of Change
        In the order of `new`.
    """
    before = {(row.case, row.provider): row.times for row in old}
    changes = []
    for row in new:
        past = before.get((row.case, row.provider))
        if past is None or row.times is None or not row.is_ours:
            continue
        old_ratio, new_ratio = past.ratio.median, row.times.ratio.median
        changes.append(
            Change(
                row.case,
                row.provider,
                past.ms.median,
                row.times.ms.median,
                old_ratio,
                new_ratio,
                is_regression=new_ratio < old_ratio * (1 - threshold),
            )
        )
    return changes


class Summary(NamedTuple):
    """Timed rows of one provider, cell, mode and dtype: geometric mean of the ratio, verdicts."""

    provider: str
    cell: str
    mode: str
    dtype: str
    mean_ratio: float
    worst_ratio: float
    faster: int
    equal: int
    slower: int


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """Group rows by provider, cell, mode and dtype, in order of appearance.

    Parameters
    ----------
    rows : sequence of Row
        Rows of torch.nn, whose ratio is 1, are left out.

    Returns
    -------
    list of Summary
    """
    groups: dict[tuple[str, str, str, str], list[tuple[float, str]]] = {}
    for row in rows:
        if row.times is not None and row.provider != BASELINE:
            key = row.provider, row.case.cell, row.case.mode, row.case.dtype
            groups.setdefault(key, []).append((row.times.ratio.median, row.verdict))
    summaries = []
    for key, found in groups.items():
        ratios, verdicts = zip(*found, strict=True)
        counts = (verdicts.count(verdict) for verdict in ("faster", "equal", "slower"))
        summaries.append(Summary(*key, statistics.geometric_mean(ratios), min(ratios), *counts))
    return summaries
