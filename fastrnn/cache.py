"""Files kept between runs, which are read only if no other user can have written them.

Their contents may be executed, so they must pass the checks that OpenSSH applies to key files: the
file and its folder belong to the user and are writable only by the user; the parent folders belong
to the user or root and are not writable by anyone else either. Otherwise another user could replace
the folder with a different one that the user owns, such as one unpacked from a crafted archive. A
sticky folder such as ``/tmp`` may be a parent, because users can only remove their own entries.

A link to a folder is followed if the link, its target and all parent folders of both pass. Rights
granted by access control lists show up in the group mode bits.

Windows has no such owners and modes, so nothing is checked there: user folders are private by
default.
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
    """Return the cache folder: ``$FASTRNN_CACHE_DIR``, or by default one in the user's cache.

    The variable may begin with ``~`` or ``~user``, which not every tool that sets environment
    variables expands. A relative path is resolved against the working directory, but a relative
    ``$XDG_CACHE_HOME`` is ignored, as its specification requires.

    Raises
    ------
    OSError
        If the user has no home directory.
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
    """Return what determines `cache_folder`: the name of an environment variable, or 'home'."""
    if os.environ.get(_OWN):
        return _OWN
    return _SHARED if Path(os.environ.get(_SHARED, "")).is_absolute() else "home"


def read(path: Path) -> bytes | None:
    """Read a file; None if it does not exist or, with a warning, if it is not safe to read."""
    try:
        return _read_own(path) if hasattr(os, "geteuid") else path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn(f"cached file not loaded: {error}")
        return None


def read_gap(folder: Path, name: str = "") -> str | None:
    """Return why `read` refuses all files in a folder, or the named one; None if it does not.

    For a folder that does not exist yet, the existing parent folders are checked.
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
    """Return why `write` cannot write to a folder or create it; None if it can.

    Nothing is written to find out, so a full disk goes undetected.
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
    """Return the path, or its nearest existing parent."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def write(path: Path, data: bytes) -> None:
    """Atomically write a file that `read` accepts; other processes see all of it or nothing.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    _make(path.parent)
    handle, part = tempfile.mkstemp(dir=path.parent)  # with mode 0600
    try:
        with open(handle, "wb") as file:
            file.write(data)
        os.replace(part, path)
    except OSError:
        os.unlink(part)
        raise


def _make(folder: Path) -> None:
    """Create a folder; new parents are private too, or a umask of 002 would let the group write."""
    if not folder.exists():
        _make(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def _read_own(path: Path) -> bytes:
    with _opened_file(path) as file:
        return file.read()


# Checks and reads use the same descriptors, so a path that is replaced in between has no effect.


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
            raise OSError(f"{path} is not a regular file")
        yield file


def _require_safe_above(path: Path) -> None:
    for place in _on_the_way(path):
        _require_safe(place, os.lstat(place), is_above=True)


def _open_in(folder: int, name: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a pipe would block until it has a writer.
    return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)


def _on_the_way(path: Path) -> Iterator[Path]:
    """Yield every folder and link that resolving a path passes through, the path included."""
    for place in (*reversed(path.parents), path):
        yield place
        if place.is_symlink():
            yield from _on_the_way(place.parent / place.readlink())


def _require_safe(place: Path, status: os.stat_result, is_above: bool = False) -> None:
    user = os.geteuid()
    if status.st_uid not in ((user, 0) if is_above else (user,)):
        raise PermissionError(f"{place} belongs to another user")
    # The mode of a link has no effect.
    is_exempt = is_above and (stat.S_ISLNK(status.st_mode) or status.st_mode & stat.S_ISVTX)
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not is_exempt:
        raise PermissionError(f"{place} is writable by other users (chmod go-w)")


@functools.cache
def _warn(message: str) -> None:
    """Log each message once."""
    _log.warning(message)
