"""Measurement tables: fastrnn's times on a machine, compared with torch.nn's over a grid of sizes.

A table is a CSV file with a header that says what was measured and when. ``fastrnn tune`` writes
the table for this machine to the user's cache; nothing else changes it, so the same call takes the
same path tomorrow. The tables in ``fastrnn/tables`` were measured on other machines and apply to
similar ones. A process reads each table once, when a plan first needs it.
"""

from __future__ import annotations

import bisect
import csv
import functools
import hashlib
import io
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import cache
from ._arguments import DTYPES
from ._version import __version__
from .cells import CELLS
from .hardware import Machine
from .kernels.configs import SCHEDULES
from .problem import Decision, Problem

_log = logging.getLogger("fastrnn")

#: The tables that are shipped with the package.
SHIPPED = Path(__file__).with_name("tables")

_TITLE = "# fastrnn tune: microseconds of a call of ours, and torch.nn's time over ours"


Group = tuple[str, str, str, str]
Sizes = tuple[int, ...]


class Point(NamedTuple):
    """One measurement: a layer with input size equal to hidden size, or a step of a cell module.

    Attributes
    ----------
    cell : {'lstm', 'gru', 'rnn_tanh'}
    mode : {'forward', 'training'}
    format : str
        A dtype; for float32 on a GPU, the precision of its products.
    kind : {'plain', 'packed', 'projected', 'step'}
    steps, batch, hidden_size : int
    """

    cell: str
    mode: str
    format: str
    kind: str
    steps: int
    batch: int
    hidden_size: int

    @property
    def group(self) -> Group:
        """The fields other than the sizes; points are interpolated only within a group."""
        return self[:4]

    @property
    def sizes(self) -> Sizes:
        """T, B and H."""
        return self[4:]


class Row(NamedTuple):
    """The measurement of a point.

    Attributes
    ----------
    point : Point
    path : str
        fastrnn's path, or the schedule on a GPU.
    us : float
        Microseconds per call of fastrnn.
    ratio : float
        torch.nn's time divided by fastrnn's.
    """

    point: Point
    path: str
    us: float
    ratio: float


class Table(NamedTuple):
    """The rows measured on a machine, and the versions they were measured with.

    Attributes
    ----------
    machine : Machine
    torch, fastrnn : str
        Versions.
    date : str
        ISO 8601.
    limits : str
        Environment variables that restricted torch to part of the CPU's instruction set.
    rows : tuple of Row
    is_shipped : bool
    """

    machine: Machine
    torch: str
    fastrnn: str
    date: str
    limits: str
    rows: tuple[Row, ...]
    is_shipped: bool = False

    @property
    def source(self) -> str:
        """The origin of a decision based on this table."""
        if self.is_shipped:
            return f"table shipped with fastrnn, measured on {self.machine}, {self.date}"
        return f"table measured on this machine, {self.date}"


def point_of(problem: Problem) -> Point:
    """Return the point that represents a problem."""
    kind = "plain"
    for name in ("is_step", "projected", "packed"):
        if getattr(problem, name):
            kind = name.removeprefix("is_")
            break
    dtype = str(problem.dtype).removeprefix("torch.")
    is_float32_on_gpu = problem.device == "cuda" and problem.dtype == torch.float32
    return Point(
        "rnn_tanh" if problem.cell == "rnn_relu" else problem.cell,
        "training" if problem.training else "forward",
        problem.precision if is_float32_on_gpu else dtype,
        kind,
        problem.steps,
        problem.batch,
        problem.hidden_size,
    )


def has_sizes(problem: Problem) -> bool:
    """Whether all sizes are concrete integers, unlike those of a tracer."""
    sizes = problem.steps, problem.batch, problem.input_size, problem.hidden_size
    return all(isinstance(size, int) for size in sizes)


def dtype_of(point: Point) -> torch.dtype:
    """Return the dtype of a point."""
    return DTYPES.get(point.format, torch.float32)


def problem_of(point: Point, **others: Any) -> Problem:
    """Make the problem that a point represents; `others` sets fields that a point lacks."""
    return Problem(
        point.cell,
        point.steps,
        point.batch,
        point.hidden_size,
        point.hidden_size,
        dtype_of(point),
        training=point.mode == "training",
        packed=point.kind == "packed",
        projected=point.kind == "projected",
        is_step=point.kind == "step",
        **others,
    )


#: The source of a decision that is not based on measurements.
MODEL = "model"


class Measured(NamedTuple):
    """The speed of one of fastrnn's paths relative to torch.nn, measured or modeled.

    Attributes
    ----------
    path : str
    ratio : float
        torch.nn's time divided by fastrnn's.
    source : str
    """

    path: str
    ratio: float
    source: str

    def decision(self, path: str, what: str) -> Decision:
        """Choose between torch's path and `path`; `what` describes what runs on the latter."""
        if self.ratio < 1.0:
            return Decision("torch", f"{1 / self.ratio:.3g} times as fast as {what}", self.source)
        return Decision(path, f"{what}; {self.ratio:.3g} times as fast as torch's", self.source)


#: The ratio that a model predicts for a path at a point, on a machine.
Expected = Callable[[Machine, Point, str], float]


def factor(
    machine: Machine, point: Point, path: str, expected: Expected | None = None
) -> float | None:
    """Return the measured ratio of a path near a point, divided by the expected ratio.

    None if the group was not measured. The logarithms are interpolated between the measured sizes;
    beyond them, the nearest size counts. With a model, only the deviation from the model is
    interpolated; without one, the factor is the measured ratio itself.
    """
    points = _logarithms(machine, point.group, path, expected)
    return math.exp(interpolated(points, point.sizes)) if points else None


@functools.lru_cache(maxsize=4096)  # needed in every call of a layer on a GPU
def best(machine: Machine, point: Point) -> Measured | None:
    """Return fastrnn's fastest path near a point; None if none was measured."""
    table = table_of(machine)
    if table is None:
        return None
    paths = sorted({row.path for row in table.rows if row.point.group == point.group})
    found = [(factor(machine, point, path) or 0.0, path) for path in paths]
    if not found:
        return None
    ratio, path = max(found)
    return Measured(path, ratio, table.source)


def interpolated(points: Mapping[Sizes, float], at: Sizes) -> float:
    """Interpolate in the logarithms of sizes between the available points of a grid.

    Examples
    --------
    >>> interpolated({(1, 1): 0.0, (100, 1): 2.0}, (10, 7))
    1.0
    """
    axes = [sorted(set(sizes)) for sizes in zip(*points, strict=True)]
    total = shares = 0.0
    for corner in itertools.product(*map(_beside, axes, at)):
        sizes = tuple(size for size, _ in corner)
        if sizes in points:
            share = math.prod(share for _, share in corner)
            total, shares = total + share * points[sizes], shares + share
    if shares:
        return total / shares
    return points[min(points, key=lambda sizes: (_distance(sizes, at), sizes))]


def _beside(axis: Sequence[int], at: int) -> list[tuple[int, float]]:
    """Return the sizes of an axis adjacent to `at`, with their interpolation weights."""
    n = bisect.bisect_left(axis, at)
    if n == len(axis):
        return [(axis[-1], 1.0)]
    if n == 0 or axis[n] == at:
        return [(axis[n], 1.0)]
    below, above = axis[n - 1], axis[n]
    share = math.log(at / below) / math.log(above / below)
    return [(below, 1.0 - share), (above, share)]


def _distance(sizes: Sizes, at: Sizes) -> float:
    return sum(abs(math.log(size / max(1, other))) for size, other in zip(sizes, at, strict=True))


@functools.cache
def _logarithms(
    machine: Machine, group: Group, path: str, expected: Expected | None
) -> dict[Sizes, float]:
    """Return the logarithms of all factors for a group and path, keyed by sizes."""
    table = table_of(machine)
    return {
        row.point.sizes: math.log(
            row.ratio / (1.0 if expected is None else expected(machine, row.point, path))
        )
        for row in (() if table is None else table.rows)
        if row.path == path and row.point.group == group
    }


@functools.cache
def table_of(machine: Machine) -> Table | None:
    """Return the table in use for a machine: measured here, or shipped for a similar one."""
    return _kept(machine) or _shipped(machine)


def source(machine: Machine) -> str:
    """Return the origin of the decisions for a machine."""
    table = table_of(machine)
    return MODEL if table is None else table.source


def forget_what_was_read() -> None:
    """Drop cached tables, so that the next plan reads them again."""
    best.cache_clear()
    _logarithms.cache_clear()
    table_of.cache_clear()


# Files.


def file_of(machine: Machine) -> Path:
    """Return the path of a machine's table in the user's cache; OSError if there is no cache."""
    digest = hashlib.sha256(repr(_key(machine, torch.__version__, __version__)).encode())
    return cache.cache_folder() / f"tuned-{machine.device}-{digest.hexdigest()[:16]}.csv"


def keep(table: Table) -> Path:
    """Write a table to the user's cache; OSError if that fails."""
    path = file_of(table.machine)
    cache.write(path, text_of(table).encode())
    forget_what_was_read()
    return path


def forget(machine: Machine) -> bool:
    """Remove the table measured on this machine; False if there was none."""
    try:
        file_of(machine).unlink()
    except FileNotFoundError:
        return False
    forget_what_was_read()
    return True


def _key(machine: Machine, *versions: str) -> tuple[object, ...]:
    """Return what must match for a table in the user's cache to apply."""
    return *machine._replace(caches=()), *versions


def _kept(machine: Machine) -> Table | None:
    try:
        path = file_of(machine)
        content = cache.read(path)
    except OSError:  # no home directory
        return None
    table = None if content is None else _parsed(content, path)
    if table is None:
        return None
    key = _key(table.machine, table.torch, table.fastrnn)
    if key != _key(machine, torch.__version__, __version__):
        _log.warning("ignored %s: it was measured on another machine or with other versions", path)
        return None
    return table


def _shipped(machine: Machine) -> Table | None:
    """Return the first table for a machine with the same family, vectors and threads."""
    for path in sorted(SHIPPED.glob("*.csv")):
        table = _parsed(path.read_bytes(), path)
        if table is not None and _kin(table.machine) == _kin(machine):
            return table._replace(is_shipped=True)
    return None


def _kin(machine: Machine) -> Machine:
    """Return what must match for a table from a similar machine to apply."""
    # All GPUs of a model share one name; CPUs of a family have many.
    is_named = machine.device == "cuda"
    return machine._replace(name=machine.name if is_named else "", caches=())


def _parsed(content: bytes, path: Path) -> Table | None:
    try:
        return table_in(content.decode())
    except (ValueError, csv.Error) as error:
        _log.warning("ignored %s, which is not a valid fastrnn tune table: %s", path, error)
        return None


_MACHINE = ("device", "name", "family", "vectors", "threads", "caches")
_MADE = ("torch", "fastrnn", "date", "limits")
_PATHS = {"cpu": ("kernels", "operators"), "cuda": SCHEDULES}
_COLUMNS = (*Point._fields, *Row._fields[1:])


def text_of(table: Table) -> str:
    """Format a table as the text of a file."""
    machine = table.machine
    caches = " ".join(f"{size // 1024}K" for size in machine.caches)
    facts = dict(zip(_MACHINE, (*machine[:-1], caches), strict=True))
    facts |= {name: getattr(table, name) for name in _MADE}
    file = io.StringIO()
    file.write(f"{_TITLE}\n")
    file.writelines(f"# {name}: {value}\n" for name, value in facts.items())
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in table.rows:
        writer.writerow((*row.point, row.path, f"{row.us:.5g}", f"{row.ratio:.3f}"))
    return file.getvalue()


def table_in(text: str) -> Table:
    """Parse a table from the text of a file; ValueError if it is invalid."""
    first, *lines = text.splitlines() or [""]
    if first != _TITLE:
        raise ValueError("unexpected first line")
    facts = {}
    for line in itertools.takewhile(lambda line: line.startswith("# "), lines):
        name, _, value = line.removeprefix("# ").partition(":")
        facts[name] = value.strip()
    lines = lines[len(facts) :]
    if missing := {*_MACHINE, *_MADE} - facts.keys():
        raise ValueError(f"missing {', '.join(sorted(missing))}")
    caches = tuple(1024 * int(size.removesuffix("K")) for size in facts["caches"].split())
    device, name, family, vectors, threads, _ = (facts[name] for name in _MACHINE)
    if device not in _PATHS:
        raise ValueError(f"unknown device {device!r}")
    machine = Machine(device, name, family, vectors, int(threads), caches)
    header, *rows = csv.reader(lines)
    if tuple(header) != _COLUMNS:
        raise ValueError(f"unexpected columns {','.join(header)}")
    torch, fastrnn, date, limits = (facts[name] for name in _MADE)
    return Table(machine, torch, fastrnn, date, limits, tuple(_rows_in(rows, _PATHS[device])))


def _rows_in(rows: Iterable[Sequence[str]], paths: Sequence[str]) -> Iterable[Row]:
    for fields in rows:
        cell, mode, format, kind, *sizes, path, us, ratio = fields
        steps, batch, hidden = map(int, sizes)
        row = Row(
            Point(cell, mode, format, kind, steps, batch, hidden), path, float(us), float(ratio)
        )
        is_known = cell in CELLS and path in paths
        if not is_known or min(row.point.sizes) < 1 or not 0 < row.ratio < math.inf:
            raise ValueError(f"invalid row {','.join(fields)}")
        yield row
