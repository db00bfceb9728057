"""Shared by the command-line programs: output in any encoding, and paths with ``~``."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Keep output from failing on its encoding, or with a traceback when its reader is gone.

    Use it around ``main``, as a context manager or decorator. Characters that the output's encoding
    lacks are printed as '?'. If the reader of a pipe is gone, as with ``| head``, the exit status
    is 1.
    """
    for stream in (sys.stdout, sys.stderr):
        # Replacements for the streams may have no encoding, and other error handlers do not fail.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # as with >&-
                sys.stdout.flush()
    except BrokenPipeError:
        if not isinstance(sys.stdout, io.TextIOWrapper):
            raise
        # Python flushes once more at exit, and would report an error then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def path(text: str) -> Path:
    """Parse a path that may begin with ``~``, which not every shell expands in ``--out=~/x``.

    Parameters
    ----------
    text : str

    Returns
    -------
    pathlib.Path

    Raises
    ------
    argparse.ArgumentTypeError
        If the home directory does not exist.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ArgumentTypeError(f"{text!r} is in a home directory that does not exist") from None
