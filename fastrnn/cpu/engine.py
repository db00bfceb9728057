"""Compiles the kernels for the CPU at hand, remembers them on disk, and runs them on threads."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite
import llvmlite.binding as llvm
import torch

from ..cells import Cell, reached
from . import machine
from .arguments import MOST_SAVED, MOST_STATES, Arguments
from .machine import Target

_log = logging.getLogger("fastrnn")

_RUNTIME = ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")
_HERE = Path(__file__).parent
# All that compiled code, and what it is called with, comes from.
_SOURCES = sorted(_HERE.glob("*.py"))


# Threads. The parallel regions are those of the OpenMP runtime that torch uses, whichever it is:
# its pool of threads is there anyway, and spins where ours would too.


@functools.cache
def openmp() -> ctypes.CDLL | None:
    """Find the OpenMP runtime in this process: libgomp, or another one with its interface."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            library = ctypes.CDLL(str(folder / name))
            if all(hasattr(library, function) for function in ("GOMP_parallel", *_RUNTIME)):
                library.GOMP_parallel.restype = None
                library.GOMP_parallel.argtypes = [
                    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint,
                ]  # fmt: skip
                return library
    return None


# Below this, a second thread saves less than the barrier after each step costs, 0.3 us and more.
_MIN_FLOPS = 150_000


def threads(flops: int) -> int:
    """Choose how many threads share the steps of a layer, by the operations of a step's product."""
    if flops < _MIN_FLOPS or machine.is_forked() or openmp() is None:
        return 1
    return min(torch.get_num_threads(), machine.cores())


# Compilation.


class Kernels(NamedTuple):
    """The compiled kernels of a cell: addresses by name, and what keeps them in memory."""

    addresses: dict[str, int]
    owner: Any


_loaded: dict[tuple[Cell, Target], Kernels] = {}


def kernels(cell: Cell) -> Kernels:
    """Get the kernels of a cell for this machine; compile them if they never were."""
    target = machine.target()
    assert target is not None
    found = _loaded.get((cell, target))
    if found is None:
        with machine.compiling:
            found = _loaded.get((cell, target)) or _load(cell, target)
            _loaded[cell, target] = found
    return found


def _load(cell: Cell, target: Target) -> Kernels:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    code = _from_cache(cell, target)
    if code is None:
        _log.warning("compiling the %s kernels for this CPU, once", cell.name)
        start = time.perf_counter()
        for_ = target_machine()
        code = for_.emit_object(optimized(cell, target, for_))
        _log.warning("compiled the %s kernels in %.1f s", cell.name, time.perf_counter() - start)
        _to_cache(cell, target, code)
    library = openmp()
    for name in _RUNTIME:
        function = getattr(library, name) if library else _never_called
        llvm.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
    owner = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine())
    owner.add_object_file(llvm.ObjectFileRef.from_data(code))
    owner.finalize_object()
    names = (f"{name}{suffix}" for name in ("forward", "backward") for suffix in ("", "_region"))
    return Kernels({name: owner.get_function_address(name) for name in names}, owner)


# In place of the OpenMP runtime, which one thread does not need: LLVM wants an address.
_never_called = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)


def target_machine() -> Any:
    """Describe this machine to LLVM."""
    of = llvm.Target.from_triple(llvm.get_process_triple())
    features = llvm.get_host_cpu_features().flatten()
    return of.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3, jit=True
    )


def optimized(cell: Cell, target: Target, for_: Any) -> Any:
    """Write the kernels of a cell and optimize them."""
    from . import sequence  # with what writes code, only where code is written

    module = llvm.parse_assembly(str(sequence.module(cell, target)))
    module.triple = for_.triple
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    # Everything is in vectors already.
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = llvm.create_pass_builder(for_, options)
    builder.getModulePassManager().run(module, builder)
    return module


# The cache: a file for each cell, named by all that its code depends on.


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
    own = os.environ.get("FASTRNN_CACHE_DIR")
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        if own:
            return Path(own).expanduser()
        return (shared if shared.is_absolute() else Path.home() / ".cache") / "fastrnn"
    except RuntimeError as error:
        raise OSError(str(error)) from error


def _cached(cell: Cell, target: Target) -> Path:
    facts = (
        llvmlite.__version__, llvm.get_process_triple(), llvm.get_host_cpu_name(),
        llvm.get_host_cpu_features().flatten(), target, MOST_STATES, MOST_SAVED,
    )  # fmt: skip
    digest = hashlib.sha256(repr(facts).encode())
    for path in _SOURCES:
        digest.update(path.read_bytes())
    digest.update(repr((cell.gates, cell.states, cell.n_saved, cell.n_apart, cell.extras)).encode())
    for function in [*reached(cell.forward), *reached(cell.backward)]:
        # Not by files: a cell need not be one of ours.
        code = function.__code__
        digest.update(code.co_code + repr((code.co_names, code.co_consts)).encode())
    return cache_folder() / f"{cell.name}-{digest.hexdigest()[:32]}.o"


def _from_cache(cell: Cell, target: Target) -> bytes | None:
    """The code in a file of the cache; None if it is not there or not whole."""
    try:
        content = _cached(cell, target).read_bytes()
    except OSError:
        return None
    digest, code = content[:32], content[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def _to_cache(cell: Cell, target: Target, code: bytes) -> None:
    """Write a file of the cache; other processes see all of it or nothing."""
    part = None
    try:
        path = _cached(cell, target)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            part = Path(file.name)
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(part, path)
    except OSError as error:
        _log.warning("cannot keep compiled kernels: %s", error)
        if part is not None:
            part.unlink(missing_ok=True)


# Calls.

_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


def run(cell: Cell, name: str, arguments: Arguments, threads: int) -> None:
    """Run ``forward`` or ``backward``; the lock of the interpreter is free meanwhile.

    With `threads` of 1 it runs in this thread, without the OpenMP runtime.
    """
    addresses = kernels(cell).addresses
    # By reference, so that the call holds the arguments, and they hold the tensors: a compiler that
    # traces Python would otherwise free what is known by address only.
    reference = ctypes.byref(arguments)
    library = openmp()
    if threads > 1 and library is not None:
        library.GOMP_parallel(addresses[f"{name}_region"], reference, threads, 0)
    else:
        _KERNEL(addresses[name])(reference, 0, 1)
