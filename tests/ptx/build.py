"""Compile the engine, once for each of its versions and each kind of CPU."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import llvmlite.binding as llvm

from fastrnn.cache import cache_folder

ENGINE = Path(__file__).parent / "engine"

# Only headers of the C++ library are used, since building the library itself takes zig a minute.
# The engine is therefore compiled as C++ and linked as C.
_COMPILE = (
    "c++", "-c", "-O2", "-std=c++20", "-march=native", "-fPIC", "-fvisibility=hidden",
    "-fvisibility-global-new-delete=force-hidden", "-fno-exceptions", "-fno-rtti",
    "-ffp-contract=off",  # products are rounded exactly where PTX rounds them
)  # fmt: skip
_LINK = ("cc", "-shared", "-s", "-Wl,-z,defs", "-lm")


@functools.cache
def library() -> ctypes.CDLL:
    """Load the engine; compile it if it is not in the cache.

    Raises
    ------
    RuntimeError
        If there is no compiler, or it fails.
    """
    try:
        compiler = importlib.metadata.version("ziglang")
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError(
            "the PTX emulator is compiled by the package ziglang: pip install ziglang"
        ) from None
    digest = hashlib.sha256()
    facts = (compiler, _COMPILE, _LINK, llvm.get_process_triple(), *_cpu())
    digest.update(repr(facts).encode())
    for source in sorted(ENGINE.glob("*.?[pn][pc]")):  # .cpp, .hpp, .inc
        digest.update(source.name.encode() + source.read_bytes())
    kept = folder()
    path = kept / f"engine-{digest.hexdigest()[:32]}.so"
    if not path.exists():
        with _locked(kept / "engine.lock"):
            if not path.exists():  # another process may have compiled it in the meantime
                _compile(kept, path)
    return ctypes.CDLL(str(path))


def _cpu() -> tuple[str, str]:
    """Return what ``-march=native`` depends on."""
    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def folder() -> Path:
    """Make a folder next to the compiled CPU kernels; a temporary one for a user without a home."""
    try:
        path = cache_folder() / "ptx"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        path = Path(tempfile.gettempdir()) / f"fastrnn-ptx-{os.getuid()}"
        path.mkdir(mode=0o700, exist_ok=True)
        if path.stat().st_uid != os.getuid():
            raise RuntimeError(f"{path} is another user's") from None
    return path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Admit one process at a time; the lock of a process that dies is released."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(folder: Path, path: Path) -> None:
    """Compile the library; other processes see either all of it or nothing."""
    with tempfile.TemporaryDirectory(dir=folder) as part:
        built, linked = f"{part}/engine.o", Path(part, path.name)
        _zig(folder, *_COMPILE, "-o", built, str(ENGINE / "engine.cpp"))
        _zig(folder, *_LINK, "-o", str(linked), built)
        linked.replace(path)


def _zig(folder: Path, *arguments: str) -> None:
    caches = {name: str(folder / "zig") for name in ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR")}
    command = [sys.executable, "-m", "ziglang", *arguments]
    done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"the PTX emulator does not compile: {' '.join(command)}\n{done.stdout}{done.stderr}"
        )
