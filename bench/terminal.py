"""Helpers for the command-line programs: output in any encoding, and paths with ``~``."""

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
    """Keep output from failing because of its encoding or a closed pipe.

    Use it around ``main``, as a context manager or decorator. Characters that the output encoding
    cannot represent are printed as '?'. If the reader of a pipe has exited, as with ``| head``, the
    exit status is 1, without a traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        # Replacement streams may have no encoding; other error handlers do not raise.
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
        # Python flushes once more at exit, which would report an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def path(text: str) -> Path:
    """Parse a path, expanding a leading ``~``, which not every shell does in ``--out=~/x``.

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
