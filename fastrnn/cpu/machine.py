"""What the kernels need to know about the CPU; importing this compiles and loads nothing."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import os
import platform
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Target(NamedTuple):
    """What of an instruction set the kernels depend on.

    Attributes
    ----------
    name : str
    lanes : int
        float32 in a vector register.
    registers : int
        Vector registers.
    pairs : str
        LLVM's name of the instruction that multiplies pairs of bfloat16, if there is one.
    dtype : torch.dtype
        Of the layers that kernels are for.
    """

    name: str
    lanes: int
    registers: int
    pairs: str = ""
    dtype: torch.dtype = torch.float32

    @property
    def units(self) -> int:
        """Hidden units in a slice, two vectors of exact numbers."""
        return self.lanes if self.dtype == torch.float64 else 2 * self.lanes

    @property
    def tile_rows(self) -> int:
        """Rows of a tile of products, two vectors wide, which takes 3/4 of the registers."""
        return self.registers * 3 // 8


AVX2, AVX512, NEON = Target("AVX2", 8, 16), Target("AVX-512", 16, 32), Target("NEON", 4, 32)
AVX512_BF16 = AVX512._replace(name="AVX-512 with BF16", pairs="llvm.x86.avx512bf16.dpbf16ps.512")


@functools.cache
def target() -> Target | None:
    """Look up the instruction set of this CPU.

    Returns
    -------
    Target or None
        None if there are no kernels for it.
    """
    if platform.machine() in ("arm64", "aarch64"):
        return NEON
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and torch.cpu._is_avx512_bf16_supported():
        return AVX512_BF16
    return {"AVX2": AVX2, "AVX512": AVX512}.get(capability)


def multiplies(dtype: torch.dtype) -> bool:
    """Tell whether the kernels multiply numbers of a dtype as they are."""
    if dtype == torch.bfloat16:
        found = target()
        return found is not None and found.pairs != ""
    return dtype in (torch.float32, torch.float64)


@functools.cache
def _has_compiler() -> bool:
    with compiling:
        try:
            importlib.import_module("llvmlite.binding")
        except (ImportError, OSError):  # not there, or not for this system
            return False
        importlib.import_module(f"{__package__}.native")
    return True


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """Name the dtype of sums and states of a layer in a dtype."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def has_narrow_blas(dtype: torch.dtype) -> bool:
    """Tell whether torch's products of a dtype do not use the whole vectors of this CPU.

    MKL runs code for AVX2 on CPUs that Intel did not make.
    """
    if dtype not in (torch.float32, torch.float64) or not torch.backends.mkl.is_available():
        return False
    found = target()
    return found is not None and found.lanes > AVX2.lanes and vendor() == "AuthenticAMD"


@functools.cache
def vendor() -> str:
    """Name who made the CPU, as Linux does; '' where that is not known."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.split()[-1] for line in file if line.startswith("vendor_id")), "")
    except OSError:
        return ""


def kernel_gap(dtype: torch.dtype) -> str | None:
    """Say in a clause why no kernel can run a layer on this CPU; None if one can."""
    if not _allowed.are_kernels:
        return "no kernels, because operators were asked for"
    if _is_cut_off:
        return "no kernels after a fork while another thread compiled some"
    if not _has_compiler():
        return "no kernels without llvmlite"
    if target() is None:
        return f"no kernel of ours for a CPU with {torch.backends.cpu.get_cpu_capability()}"
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"no kernel of ours for {dtype}"
    return None


class _Allowed(threading.local):
    are_kernels = True


_allowed = _Allowed()


@contextlib.contextmanager
def kernels_allowed(are_allowed: bool) -> Iterator[None]:
    """Let the kernels run inside, in this thread, or not, as if this CPU had none."""
    before, _allowed.are_kernels = _allowed.are_kernels, are_allowed
    try:
        yield
    finally:
        _allowed.are_kernels = before


# Forks. A child has no thread but the one that forked: what the others had locked stays locked in
# it, and what they were changing stays half changed.

# Held around all calls into LLVM, and all imports for them, because a module that another thread
# is importing cannot be imported in the child. Reentrant: who holds it may fork, in a handler of
# logging for instance.
compiling = threading.RLock()

# Seconds for which a fork waits. Compiling a cell takes one, or 12 where eight processes share two
# cores; for ever if that thread waits in turn for something that the thread that forks holds.
_MAX_WAIT = 30.0

_is_forked = False
_is_cut_off = False  # LLVM was in use when this process was forked


def _before_fork() -> None:
    compiling.acquire(timeout=_MAX_WAIT)


def _after_fork_in_parent() -> None:
    with contextlib.suppress(RuntimeError):  # the wait was in vain, and another thread holds it
        compiling.release()


def _after_fork_in_child() -> None:
    global compiling, _is_forked, _is_cut_off
    _is_forked = True
    try:
        compiling.release()
    except RuntimeError:
        compiling, _is_cut_off = threading.RLock(), True
    _is_cut_off = _is_cut_off or _is_llvmlite_locked()


def _is_llvmlite_locked() -> bool:
    """Whether a thread that is not ours was calling LLVM, as one of numba's may."""
    ffi: Any = sys.modules.get("llvmlite.binding.ffi")
    try:
        lock = ffi.lib._lock._lock
        is_free = lock.acquire(blocking=False)
        if is_free:
            lock.release()
    except AttributeError:  # not imported, or a version that has it somewhere else
        return False
    return not is_free


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )


def is_forked() -> bool:
    """Tell whether this process was forked from one that had imported fastrnn.

    The threads of the parent's OpenMP pool are gone then, which the runtime does not notice: it
    would wait for them.
    """
    return _is_forked


# The OpenMP runtime that torch loaded, whose parallel regions the kernels run in.

#: What the kernels call of it: libgomp's functions, which other runtimes have too.
OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")


@functools.cache
def torch_library() -> ctypes.CDLL | None:
    """Find torch's library for CPUs, through which the functions of its OpenMP runtime resolve."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            return ctypes.CDLL(str(folder / name))
    return None


@functools.cache
def openmp_gap() -> str | None:
    """Say why the kernels cannot use torch's OpenMP runtime; None if they can."""
    library = torch_library()
    if library is None:
        return "torch's library for CPUs was not found"
    missing = [function for function in OPENMP if not hasattr(library, function)]
    return f"torch's OpenMP runtime lacks {', '.join(missing)}" if missing else None


class _Symbol(ctypes.Structure):
    """``Dl_info`` of dladdr(3)."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def openmp_library() -> str:
    """Name the file of torch's OpenMP runtime; '' if it cannot be found."""
    symbol, library = _Symbol(), torch_library()
    try:
        function = ctypes.cast(library.omp_get_num_threads, ctypes.c_void_p)  # type: ignore[union-attr]
        found = ctypes.CDLL(None).dladdr(function, ctypes.byref(symbol))
    except (AttributeError, OSError, TypeError):  # no such runtime, or no dladdr
        return ""
    return os.fsdecode(symbol.file) if found and symbol.file else ""


def cores() -> int:
    """Count the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe() -> str:
    """Describe how the kernels run here."""
    found = target()
    assert found is not None
    count = 1 if _is_forked or openmp_gap() else min(torch.get_num_threads(), cores())
    return f"{found.name}, {found.lanes} lanes, {count} thread{'s' if count > 1 else ''} at most"
