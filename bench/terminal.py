"""What the programs of the command line share: output in any encoding, and paths with ``~``."""

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
    """Let output neither fail for its encoding nor end in a traceback when nobody reads it.

    Around ``main``, as a context or a decorator. What the encoding of the output does not have is
    printed as '?'. Where the reader of a pipe is gone, as with ``| head``, the exit status is 1.
    """
    for stream in (sys.stdout, sys.stderr):
        # What stands in for them may have no encoding, and handlers other than these do not fail.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # as it is with >&-
                sys.stdout.flush()
    except BrokenPipeError:
        if not isinstance(sys.stdout, io.TextIOWrapper):
            raise
        # Python flushes once more when it ends, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def path(text: str) -> Path:
    """Parse a path, which may begin with ``~``: not every shell expands that in ``--out=~/x``.

    Parameters
    ----------
    text : str

    Returns
    -------
    pathlib.Path

    Raises
    ------
    argparse.ArgumentTypeError
        If there is no such home.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ArgumentTypeError(f"{text!r} is in a home that is not there") from None
