"""Files kept between runs, and read only if nobody but the user can have written them.

What is read may be executed, so it is held to what OpenSSH asks of a file of keys: the file and its
folder belong to the user, who alone can write them; the folders above belong to the user or root,
and nobody else can write those either. Else others could put another folder of the user's in that
place, such as what an archive of theirs was unpacked to. They cannot where one may remove only what
is one's own, as in ``/tmp``.

A link to a folder is followed if it, what it leads to and all folders above the two are such. What
access control lists grant shows in the mode of the group.

Windows has no such owners and modes, and nothing is checked there: a user's folders are private to
begin with.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_log = logging.getLogger("fastrnn")


def cache_folder() -> Path:
    """Say where compiled kernels are kept: ``$FASTRNN_CACHE_DIR``, else in the user's cache.

    That variable may begin with ``~`` or ``~user``, which not everything that sets variables
    expands. A relative path is one from the working directory, but a relative
    ``$XDG_CACHE_HOME`` is ignored, as its specification asks.

    Raises
    ------
    OSError
        If the user has no home.
    """
    source = folder_source()
    try:
        if source == "home":
            return Path.home() / ".cache" / "fastrnn"
        folder = Path(os.environ[source])
        return folder.expanduser() if source == _OWN else folder / "fastrnn"
    except RuntimeError as error:
        raise OSError(str(error)) from error


_OWN, _SHARED = "FASTRNN_CACHE_DIR", "XDG_CACHE_HOME"


def folder_source() -> str:
    """Name what decides where `cache_folder` is: a variable of the environment, or 'home'."""
    if os.environ.get(_OWN):
        return _OWN
    return _SHARED if Path(os.environ.get(_SHARED, "")).is_absolute() else "home"


def read(path: Path) -> bytes | None:
    """Read a file of the user's; None if it is not there or, with a warning, if it is not safe."""
    try:
        return _read_own(path) if hasattr(os, "geteuid") else path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn(f"not loaded from the cache: {error}")
        return None


def read_gap(folder: Path, name: str = "") -> str | None:
    """Say why `read` refuses all files of a folder, or the one of a name; None if it does not.

    A folder that does not exist yet is judged by those above it.
    """
    if not hasattr(os, "geteuid"):
        return None
    try:
        if name:
            with _opened_file(folder / name):
                return None
        if os.path.lexists(folder):
            with _opened_folder(folder):
                return None
        _require_safe_above(_existing(folder))
    except OSError as error:
        return str(error)
    return None


def write_gap(folder: Path) -> str | None:
    """Say why `write` cannot write to a folder, which it would create; None if it can.

    Nothing is written to find out, so a full disk goes unnoticed.
    """
    try:
        place = _existing(folder)
        if not place.is_dir():
            return f"{place} is not a directory"
        if os.access(place, os.W_OK | os.X_OK):
            return None
        is_read_only = hasattr(os, "statvfs") and os.statvfs(place).f_flag & os.ST_RDONLY
    except OSError as error:
        return str(error)
    return f"{place} is {'on a read-only file system' if is_read_only else 'not writable'}"


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def write(path: Path, data: bytes) -> None:
    """Write a file that `read` will read; other processes see all of it or nothing.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    _make(path.parent)
    handle, part = tempfile.mkstemp(dir=path.parent)  # of mode 0600
    try:
        with open(handle, "wb") as file:
            file.write(data)
        os.replace(part, path)
    except OSError:
        os.unlink(part)
        raise


def _make(folder: Path) -> None:
    """Those above are private too: with a umask of 002 the group could write them otherwise."""
    if not folder.exists():
        _make(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def _read_own(path: Path) -> bytes:
    with _opened_file(path) as file:
        return file.read()


# What was checked is what is read: by descriptors, whatever the names mean meanwhile.


@contextlib.contextmanager
def _opened_folder(path: Path) -> Iterator[int]:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _require_safe_above(path.absolute())
        _require_safe(path, os.fstat(folder))
        yield folder
    finally:
        os.close(folder)


@contextlib.contextmanager
def _opened_file(path: Path) -> Iterator[BinaryIO]:
    with (
        _opened_folder(path.parent) as folder,
        open(path.name, "rb", opener=functools.partial(_open_in, folder)) as file,
    ):
        status = os.fstat(file.fileno())
        _require_safe(path, status)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is no regular file")
        yield file


def _require_safe_above(path: Path) -> None:
    for place in _on_the_way(path):
        _require_safe(place, os.lstat(place), is_above=True)


def _open_in(folder: int, name: str, flags: int) -> int:
    # A pipe would wait for someone to write otherwise.
    return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)


def _on_the_way(path: Path) -> Iterator[Path]:
    """All folders and links by which a path leads to where it does, itself included."""
    for place in (*reversed(path.parents), path):
        yield place
        if place.is_symlink():
            yield from _on_the_way(place.parent / place.readlink())


def _require_safe(place: Path, status: os.stat_result, is_above: bool = False) -> None:
    user = os.geteuid()
    if status.st_uid not in ((user, 0) if is_above else (user,)):
        raise PermissionError(f"{place} belongs to another user")
    # The rights of a link are not used.
    is_exempt = is_above and (stat.S_ISLNK(status.st_mode) or status.st_mode & stat.S_ISVTX)
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not is_exempt:
        raise PermissionError(f"{place} can be written by others (chmod go-w)")


@functools.cache
def _warn(message: str) -> None:
    """Once for each message."""
    _log.warning(message)
