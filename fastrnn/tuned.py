"""Tables of what was measured on a machine: torch's time beside ours, over a grid of sizes.

A table is a CSV file below lines that say what was measured and when. ``fastrnn tune`` writes that
of this machine to the user's cache; nothing else changes it, so the same call takes the same path
tomorrow. Those in ``fastrnn/tables`` were measured on other machines and stand in for machines like
these. Tables are read once in a process, when the first plan needs one.
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

#: The tables of machines measured so far, which come with the package.
SHIPPED = Path(__file__).with_name("tables")

_TITLE = "# fastrnn tune: microseconds of a call of ours, and torch.nn's time over ours"


Group = tuple[str, str, str, str]
Sizes = tuple[int, ...]


class Point(NamedTuple):
    """One thing to measure: a layer whose input is as wide as it, or one step of a cell module.

    Attributes
    ----------
    cell : {'lstm', 'gru', 'rnn_tanh'}
    mode : {'forward', 'training'}
    format : str
        A dtype; of float32 on a GPU, how it is multiplied.
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
        """What is not a size: between points that differ in it nothing is interpolated."""
        return self[:4]

    @property
    def sizes(self) -> Sizes:
        """T, B and H."""
        return self[4:]


class Row(NamedTuple):
    """What was measured of a point.

    Attributes
    ----------
    point : Point
    path : str
        Ours, or a schedule of a GPU.
    us : float
        Microseconds of a call of ours.
    ratio : float
        torch.nn's time over ours.
    """

    point: Point
    path: str
    us: float
    ratio: float


class Table(NamedTuple):
    """The rows of a machine, with what they were measured with.

    Attributes
    ----------
    machine : Machine
    torch, fastrnn : str
        Versions.
    date : str
        ISO 8601.
    limits : str
        Variables of the environment that had torch do without some of what the CPU has.
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
        """Where a decision by this table comes from."""
        if self.is_shipped:
            return f"measured on {self.machine}, {self.date}, shipped"
        return f"measured here, {self.date}"


def point_of(problem: Problem) -> Point:
    """Find the point that stands for a problem."""
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
    """Whether sizes are numbers, as those of a tracer are not."""
    sizes = problem.steps, problem.batch, problem.input_size, problem.hidden_size
    return all(isinstance(size, int) for size in sizes)


def dtype_of(point: Point) -> torch.dtype:
    """Name the dtype of a point."""
    return DTYPES.get(point.format, torch.float32)


def problem_of(point: Point, **others: Any) -> Problem:
    """Make the problem that a point stands for; `others` are fields of it that a point has not."""
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


#: The source of a decision for which nothing was measured.
MODEL = "model"


class Measured(NamedTuple):
    """What a path of ours takes beside torch.nn, as measured or by a model.

    Attributes
    ----------
    path : str
    ratio : float
        torch.nn's time over ours.
    source : str
    """

    path: str
    ratio: float
    source: str

    def decision(self, path: str, what: str) -> Decision:
        """Choose between torch's path and ours, of which it is said what runs there."""
        if self.ratio < 1.0:
            return Decision("torch", f"{1 / self.ratio:.3g} times as fast as {what}", self.source)
        return Decision(path, f"{what}; {self.ratio:.3g} times as fast as torch's", self.source)


#: The ratio that a model expects of a path at a point, on a machine.
Expected = Callable[[Machine, Point, str], float]


def factor(
    machine: Machine, point: Point, path: str, expected: Expected | None = None
) -> float | None:
    """Say how far the ratio of a path is from the expected one near a point, by measurement.

    None if nothing of the kind was measured. Between the sizes that were measured logarithms are
    interpolated, and beyond them the nearest count. With a model, only what it leaves unexplained
    is; without one, the factor is the ratio itself.
    """
    points = _logarithms(machine, point.group, path, expected)
    return math.exp(interpolated(points, point.sizes)) if points else None


@functools.lru_cache(maxsize=4096)  # asked at every call of a layer on a GPU
def best(machine: Machine, point: Point) -> Measured | None:
    """Find the path of ours that was the fastest near a point; None if none was measured."""
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
    """Interpolate in the logarithms of sizes, between those points of a grid that are there.

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
    """The sizes of an axis next to another, and the shares that they have in it."""
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
    """The logarithms of all factors of a group and path by sizes."""
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
    """Find the table in force for a machine: measured here, else shipped for one like it."""
    return _kept(machine) or _shipped(machine)


def source(machine: Machine) -> str:
    """Say where decisions for a machine come from."""
    table = table_of(machine)
    return MODEL if table is None else table.source


def forget_what_was_read() -> None:
    """Read the tables anew when the next plan needs one."""
    best.cache_clear()
    _logarithms.cache_clear()
    table_of.cache_clear()


# Files.


def file_of(machine: Machine) -> Path:
    """Name the file of a machine in the user's cache; OSError if there is no cache."""
    digest = hashlib.sha256(repr(_key(machine, torch.__version__, __version__)).encode())
    return cache.cache_folder() / f"tuned-{machine.device}-{digest.hexdigest()[:16]}.csv"


def keep(table: Table) -> Path:
    """Write a table to the user's cache; OSError if that cannot be."""
    path = file_of(table.machine)
    cache.write(path, text_of(table).encode())
    forget_what_was_read()
    return path


def forget(machine: Machine) -> bool:
    """Remove the table that was measured on this machine; False if there was none."""
    try:
        file_of(machine).unlink()
    except FileNotFoundError:
        return False
    forget_what_was_read()
    return True


def _key(machine: Machine, *versions: str) -> tuple[object, ...]:
    """What must be the same of a table that was measured here."""
    return *machine._replace(caches=()), *versions


def _kept(machine: Machine) -> Table | None:
    try:
        path = file_of(machine)
        content = cache.read(path)
    except OSError:  # no home
        return None
    table = None if content is None else _parsed(content, path)
    if table is None:
        return None
    key = _key(table.machine, table.torch, table.fastrnn)
    if key != _key(machine, torch.__version__, __version__):
        _log.warning("ignored %s: it is of another machine or version", path)
        return None
    return table


def _shipped(machine: Machine) -> Table | None:
    """The first table of a machine of the same family, vectors and threads."""
    for path in sorted(SHIPPED.glob("*.csv")):
        table = _parsed(path.read_bytes(), path)
        if table is not None and _kin(table.machine) == _kin(machine):
            return table._replace(is_shipped=True)
    return None


def _kin(machine: Machine) -> Machine:
    """What must be the same of a table that was measured on a machine like this."""
    # All GPUs of a kind have one name, and CPUs of a family many.
    is_named = machine.device == "cuda"
    return machine._replace(name=machine.name if is_named else "", caches=())


def _parsed(content: bytes, path: Path) -> Table | None:
    try:
        return table_in(content.decode())
    except (ValueError, csv.Error) as error:
        _log.warning("ignored %s, which is no table of fastrnn tune: %s", path, error)
        return None


_MACHINE = ("device", "name", "family", "vectors", "threads", "caches")
_MADE = ("torch", "fastrnn", "date", "limits")
_PATHS = {"cpu": ("kernels", "operators"), "cuda": SCHEDULES}
_COLUMNS = (*Point._fields, *Row._fields[1:])


def text_of(table: Table) -> str:
    """Write a table as a file has it."""
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
    """Read a table from the text of a file; ValueError if it is none."""
    first, *lines = text.splitlines() or [""]
    if first != _TITLE:
        raise ValueError("its first line is another")
    facts = {}
    for line in itertools.takewhile(lambda line: line.startswith("# "), lines):
        name, _, value = line.removeprefix("# ").partition(":")
        facts[name] = value.strip()
    lines = lines[len(facts) :]
    if missing := {*_MACHINE, *_MADE} - facts.keys():
        raise ValueError(f"it does not say {', '.join(sorted(missing))}")
    caches = tuple(1024 * int(size.removesuffix("K")) for size in facts["caches"].split())
    device, name, family, vectors, threads, _ = (facts[name] for name in _MACHINE)
    if device not in _PATHS:
        raise ValueError(f"its device is {device!r}")
    machine = Machine(device, name, family, vectors, int(threads), caches)
    header, *rows = csv.reader(lines)
    if tuple(header) != _COLUMNS:
        raise ValueError(f"its columns are {','.join(header)}")
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
            raise ValueError(f"in {','.join(fields)}")
        yield row
