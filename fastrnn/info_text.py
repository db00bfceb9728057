"""The record of ``fastrnn info`` as text: sections of aligned rows."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from .info import Cache, Cpu, Gpu, Info, PathState, TableInForce, Triton, Versions

_WIDTH = 100
_MOST_REFUSED = 5

Rows = list[tuple[str, str]]


def text(found: Info) -> str:
    """Format a record for people.

    Parameters
    ----------
    found : Info

    Returns
    -------
    str
    """
    return "\n\n".join(_section(title, rows) for title, rows in _sections(found) if rows)


def _section(title: str, rows: Rows) -> str:
    lines, width = [title], max(12, *(len(label) + 2 for label, _ in rows))
    for label, text in rows:
        lines += textwrap.wrap(
            text,
            _WIDTH,
            initial_indent=f"  {label:{width}}",
            subsequent_indent="  " + " " * width,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def _sections(found: Info) -> Iterator[tuple[str, Rows]]:
    yield "Versions", _version_rows(found.versions)
    yield "CPU", _cpu_rows(found.cpu, found.versions)
    for gpu in found.gpus:
        yield f"GPU {gpu.number}", _gpu_rows(gpu)
    if found.gpu_gap:
        yield "GPU", [("none", found.gpu_gap)]
    yield "Triton", _triton_rows(found.triton)
    yield "Cache", _cache_rows(found.cache)
    yield "Tables", [(table.device, _source(table)) for table in found.tables]
    yield "Paths", [*_path_rows(found.paths)]
    switches = ", ".join(f"{name} = {_plain(value)}" for name, value in found.settings.items())
    yield "Settings", [("torch", switches)]
    yield "Environment", list(found.environment.items())
    yield "Warnings", [("", warning) for warning in found.warnings]


def _plain(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _joined(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)


def _version_rows(of: Versions) -> Rows:
    commit = of.commit and f"commit {of.commit}{', modified' if of.modified else ''}"
    cuda = of.cuda and f"CUDA {of.cuda}"
    llvm = of.llvm and f"LLVM {of.llvm}"
    return [
        ("fastrnn", _joined(of.fastrnn, commit)),
        ("torch", _joined(of.torch, cuda, of.hip and f"HIP {of.hip}")),
        ("cuDNN", of.cudnn or "none"),
        ("triton", of.triton or "none"),
        ("llvmlite", _joined(of.llvmlite or "none", llvm)),
        ("python", of.python),
        ("system", of.system),
    ]


def _cpu_rows(of: Cpu, versions: Versions) -> Rows:
    lanes = of.lanes and f"{of.lanes} float32 lanes"
    threads = f"{of.threads} intra-op, {of.interop_threads} inter-op"
    openmp = of.openmp or "none found"
    if of.openmp_gap:
        openmp += f"; kernels run on one thread: {of.openmp_gap}"
    blas = versions.blas or "none"
    if of.narrow_blas:
        narrow = " and ".join(of.narrow_blas)
        blas += f"; uses only part of each vector in {narrow}, so fastrnn's products replace it"
    halves = f"fast matrix products in {' and '.join(of.onednn_half)}" if of.onednn_half else None
    onednn = _joined(versions.onednn or "version unknown", halves) if of.onednn else "off"
    if not of.onednn and versions.onednn:
        onednn = _joined("off", versions.onednn, halves)
    return [
        ("name", f"{of.name} ({of.family})"),
        ("vectors", _joined(of.instructions, lanes or "fastrnn has no kernels for it")),
        ("caches", ", ".join(map(_size, of.caches)) or "unknown"),
        ("cores", str(of.cores)),
        ("threads", threads),
        ("OpenMP", openmp),
        ("BLAS", blas),
        ("oneDNN", onednn),
    ]


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def _gpu_rows(of: Gpu) -> Rows:
    alike = f"same architecture and size as {' and '.join(of.alike)}" if of.alike else None
    times = "simulated" if of.simulated else "not simulated: the first kernel that fits is used"
    planner = _joined(alike or "not in the planner's device list", f"step times {times}")
    rows = [
        ("name", of.name),
        ("device", _joined(
            f"capability {of.capability}", f"{of.processors} multiprocessors", _size(of.memory),
            f"driver {of.driver}",
        )),
        ("planner", planner if of.formats else "no kernels"),
    ]  # fmt: skip
    for each in of.formats:
        closed: dict[str, list[str]] = {}
        for name, gap in each.schedules.items():
            if gap is not None:
                closed.setdefault(gap, []).append(name)
        why = [f"no {_either(names)} schedule: {gap}" for gap, names in closed.items()]
        if why:
            rows.append((each.dtype, "; ".join(why)))
    return rows


def _either(names: list[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def _triton_rows(of: Triton) -> Rows:
    if of.gap is not None:
        return [("state", of.gap)]
    mode = "on: kernels are interpreted, not compiled" if of.interpreter else "off"
    return [
        ("interpreter", mode),
        ("cache", of.cache or "unknown"),
        ("compiler", of.compiler or "none: Triton needs gcc or clang to launch kernels"),
    ]


def _cache_rows(of: Cache) -> Rows:
    source = "default" if of.source == "home" else f"${of.source}"
    if of.folder is None:
        return [("folder", f"none: {of.read_gap}")]
    content = f"{_count(of.kernels, 'kernel')}, {_count(of.tables, 'table')}, {_size(of.bytes)}"
    if not of.exists:
        content = "does not exist yet"
    rows = [
        ("folder", f"{of.folder} ({source})"),
        ("content", content),
        ("read", f"no: {of.read_gap}" if of.read_gap else "yes"),
        ("write", f"no: {of.write_gap}" if of.write_gap else "yes"),
    ]
    rows += [("not read", gap) for gap in of.refused[:_MOST_REFUSED]]
    if len(of.refused) > _MOST_REFUSED:
        rows.append(("", f"and {len(of.refused) - _MOST_REFUSED} more files"))
    return rows


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _source(of: TableInForce) -> str:
    if of.date is None:
        return f"none: a {of.source} decides; run fastrnn tune to measure one"
    return f"{of.source}; torch {of.torch}, fastrnn {of.fastrnn}"


def _path_rows(paths: Iterable[PathState]) -> Iterator[tuple[str, str]]:
    """Yield one row for all dtypes in the same state."""
    dtypes: dict[tuple[Any, ...], list[str]] = {}
    for path, device, dtype, *state in paths:
        dtypes.setdefault((path, device, *state), []).append(dtype)
    for (path, device, how, gap, remedy), names in dtypes.items():
        word = "available" if gap is None else "unavailable"
        of = "" if names == ["any"] else f" in {', '.join(names)}"
        yield f"{path:12}{device}", f"{word}{of}: {how if gap is None else gap}"
        if remedy is not None:
            yield "", f"fix: {remedy}"
