"""The CPU's features that the kernels depend on; importing this compiles and loads nothing."""

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
    """The properties of an instruction set that the kernels depend on.

    Attributes
    ----------
    name : str
    lanes : int
        Number of float32 elements in a vector register.
    registers : int
        Number of vector registers.
    pairs : str
        LLVM's name for the instruction that multiplies pairs of bfloat16, if there is one.
    dtype : torch.dtype
        Dtype of the layers that the kernels are compiled for.
    """

    name: str
    lanes: int
    registers: int
    pairs: str = ""
    dtype: torch.dtype = torch.float32

    @property
    def units(self) -> int:
        """Hidden units in a slice: two vectors in the accumulation dtype."""
        return self.lanes if self.dtype == torch.float64 else 2 * self.lanes

    @property
    def tile_rows(self) -> int:
        """Rows of a tile of products, which is two vectors wide and takes 3/4 of the registers."""
        return self.registers * 3 // 8


AVX2, AVX512, NEON = Target("AVX2", 8, 16), Target("AVX-512", 16, 32), Target("NEON", 4, 32)
AVX512_BF16 = AVX512._replace(name="AVX-512 with BF16", pairs="llvm.x86.avx512bf16.dpbf16ps.512")


@functools.cache
def target() -> Target | None:
    """Detect the instruction set of this CPU.

    Returns
    -------
    Target or None
        None if fastrnn has no kernels for it.
    """
    if platform.machine() in ("arm64", "aarch64"):
        return NEON
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and torch.cpu._is_avx512_bf16_supported():
        return AVX512_BF16
    return {"AVX2": AVX2, "AVX512": AVX512}.get(capability)


def multiplies(dtype: torch.dtype) -> bool:
    """Return whether the kernels multiply numbers of a dtype without converting them."""
    if dtype == torch.bfloat16:
        found = target()
        return found is not None and found.pairs != ""
    return dtype in (torch.float32, torch.float64)


@functools.cache
def _has_compiler() -> bool:
    with compiling:
        try:
            importlib.import_module("llvmlite.binding")
        except (ImportError, OSError):  # not installed, or not built for this system
            return False
        importlib.import_module(f"{__package__}.native")
    return True


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the sums and states of a layer in a dtype."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def has_narrow_blas(dtype: torch.dtype) -> bool:
    """Return whether torch's products in a dtype use only part of this CPU's vectors.

    On CPUs not made by Intel, MKL runs its AVX2 code.
    """
    if dtype not in (torch.float32, torch.float64) or not torch.backends.mkl.is_available():
        return False
    found = target()
    return found is not None and found.lanes > AVX2.lanes and vendor() == "AuthenticAMD"


@functools.cache
def vendor() -> str:
    """Return the CPU's vendor as Linux reports it; '' if unknown."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.split()[-1] for line in file if line.startswith("vendor_id")), "")
    except OSError:
        return ""


def kernel_gap(dtype: torch.dtype) -> str | None:
    """Return a clause on why no kernel can run a layer on this CPU; None if one can."""
    if not _allowed.are_kernels:
        return "fastrnn's kernels are disabled by use_path"
    if _is_cut_off:
        return "this process was forked while another thread was compiling kernels"
    if not _has_compiler():
        return "fastrnn's kernels need llvmlite"
    if target() is None:
        return (
            f"fastrnn has no kernels for CPU capability {torch.backends.cpu.get_cpu_capability()}"
        )
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"fastrnn has no kernels for {dtype}"
    return None


class _Allowed(threading.local):
    are_kernels = True


_allowed = _Allowed()


@contextlib.contextmanager
def kernels_allowed(are_allowed: bool) -> Iterator[None]:
    """Allow or disable the kernels in this thread; if disabled, as if this CPU had none."""
    before, _allowed.are_kernels = _allowed.are_kernels, are_allowed
    try:
        yield
    finally:
        _allowed.are_kernels = before


# Forks. A child process has only the thread that forked: locks held by other threads stay locked in
# it, and data that they were changing stays half changed.

# Held around all calls into LLVM and all imports for them, because a module that another thread is
# importing cannot be imported in the child. Reentrant, because its holder may fork, for instance in
# a logging handler.
compiling = threading.RLock()

# Seconds for which a fork waits. Compiling a cell takes one second, or 12 with eight processes on
# two cores. Without a limit, the wait would never end if the compiling thread itself waits for
# something that the forking thread holds.
_MAX_WAIT = 30.0

_is_forked = False
_is_cut_off = False  # another thread was using LLVM when this process was forked


def _before_fork() -> None:
    compiling.acquire(timeout=_MAX_WAIT)


def _after_fork_in_parent() -> None:
    with contextlib.suppress(RuntimeError):  # the wait timed out: another thread holds it
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
    """Return whether another library's thread, such as one of numba's, was calling LLVM."""
    ffi: Any = sys.modules.get("llvmlite.binding.ffi")
    try:
        lock = ffi.lib._lock._lock
        is_free = lock.acquire(blocking=False)
        if is_free:
            lock.release()
    except AttributeError:  # not imported, or a version that keeps the lock elsewhere
        return False
    return not is_free


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )


def is_forked() -> bool:
    """Return whether this process was forked from one that had imported fastrnn.

    The threads of the parent's OpenMP pool do not exist in the child, but the runtime does not
    notice and would wait for them.
    """
    return _is_forked


# The OpenMP runtime that torch loaded, whose parallel regions the kernels run in.

#: The functions that the kernels call: libgomp's interface, which other runtimes provide too.
OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")


@functools.cache
def torch_library() -> ctypes.CDLL | None:
    """Load torch's CPU library, through which the functions of its OpenMP runtime resolve."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            return ctypes.CDLL(str(folder / name))
    return None


@functools.cache
def openmp_gap() -> str | None:
    """Return why the kernels cannot use torch's OpenMP runtime; None if they can."""
    library = torch_library()
    if library is None:
        return "torch's CPU library was not found"
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
    """Return the path of torch's OpenMP runtime; '' if it cannot be found."""
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
    """Describe how the kernels run on this CPU."""
    found = target()
    assert found is not None
    count = 1 if _is_forked or openmp_gap() else min(torch.get_num_threads(), cores())
    return f"{found.name}, {found.lanes} lanes, at most {count} thread{'s' if count > 1 else ''}"
