"""Compiles the kernels for the CPU at hand, remembers them on disk, and runs them on threads."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import time
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite
import llvmlite.binding as llvm
import torch

from .. import cache
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


# Operations between two barriers, of 0.3 us and more, for which another thread pays.
_FLOPS = 15_000


def threads(flops: int, shares: int) -> int:
    """Choose how many threads share a product of so many operations, which has so many parts."""
    most = min(shares, flops // _FLOPS)
    return 1 if most < 2 else min(_available(), most)


def _available() -> int:
    """How many threads there are."""
    if machine.is_forked() or openmp() is None:
        return 1
    return min(torch.get_num_threads(), machine.cores())


class Launch(NamedTuple):
    """A call of a kernel for several groups, by so many threads together."""

    first: int
    groups: int
    threads: int


# Operations of all groups together for which it pays to begin a parallel region, which takes 9 us.
# Forward of a bidirectional LSTM of (B, H) = (1, 32) took 1.04 times as long as by one thread for
# T = 16, and as long for T = 64.
_REGION_FLOPS = 1_000_000


def launches(groups: int, threads: int, flops: int) -> list[Launch]:
    """Choose which groups run at the same time.

    One thread for each was not slower, in any case measured, than all threads for one group after
    another, also where its weights are larger than its cache: 1.00 to 1.09 times as fast for
    ensembles of 4, T = 64, B = 4 and 16, H = 128 to 512.

    Parameters
    ----------
    groups : int
        That do not wait for each other.
    threads : int
        That could share one.
    flops : int
        Operations of one, in all.
    """
    most = _available()
    if threads == 1 and groups * flops < _REGION_FLOPS:
        return [Launch(0, groups, 1)]
    rest = groups % most  # which are left over after whole rounds, and shared
    found = [Launch(0, groups - rest, most)] if groups > rest else []
    if rest:
        found.append(Launch(groups - rest, rest, rest * min(threads, most // rest)))
    return found


# Compilation.


class Kernels(NamedTuple):
    """The compiled kernels of a cell: addresses by name, and what keeps them in memory."""

    addresses: dict[str, int]
    owner: Any


_KERNELS = ("forward", "backward", "product")

_loaded: dict[tuple[Cell, Target | None, torch.dtype, bool], Kernels] = {}


def kernels(cell: Cell, dtype: torch.dtype = torch.float32, *, noisy: bool = False) -> Kernels:
    """Get the kernels of a cell for this machine; compile them if they never were.

    Those for recurrent dropout and zoneout are others, so that nobody else pays for them.
    """
    target = machine.target()
    key = cell, target, dtype, noisy
    found = _loaded.get(key)
    if found is None:
        assert target is not None
        with machine.compiling:
            found = _loaded.get(key) or _load(cell, target._replace(dtype=dtype), noisy)
            _loaded[key] = found
    return found


def _load(cell: Cell, target: Target, noisy: bool) -> Kernels:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    code = _from_cache(cell, target, noisy)
    if code is None:
        name = f"{cell.name} kernels for {str(target.dtype).removeprefix('torch.')}"
        name += " with noise" if noisy else ""
        _log.warning("compiling the %s on this CPU, once", name)
        start = time.perf_counter()
        for_ = target_machine()
        code = for_.emit_object(optimized(cell, target, for_, noisy))
        _log.warning("compiled the %s in %.1f s", name, time.perf_counter() - start)
        _to_cache(cell, target, noisy, code)
    library = openmp()
    for name in _RUNTIME:
        function = getattr(library, name) if library else _never_called
        llvm.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
    owner = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine())
    owner.add_object_file(llvm.ObjectFileRef.from_data(code))
    owner.finalize_object()
    names = [f"{name}{suffix}" for name in _KERNELS for suffix in ("", "_region")]
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


def optimized(cell: Cell, target: Target, for_: Any, noisy: bool = False) -> Any:
    """Write the kernels of a cell and optimize them."""
    from . import sequence  # with what writes code, only where code is written

    module = llvm.parse_assembly(str(sequence.module(cell, target, noisy)))
    module.triple = for_.triple
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    # Everything is in vectors already.
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = llvm.create_pass_builder(for_, options)
    builder.getModulePassManager().run(module, builder)
    return module


# The cache: a file for each cell, named by all that its code depends on.


def _cached(cell: Cell, target: Target, noisy: bool) -> Path:
    facts = (
        llvmlite.__version__, llvm.get_process_triple(), llvm.get_host_cpu_name(),
        llvm.get_host_cpu_features().flatten(), target, noisy, MOST_STATES,
        MOST_SAVED,
    )  # fmt: skip
    digest = hashlib.sha256(repr(facts).encode())
    for path in _SOURCES:
        digest.update(path.read_bytes())
    numbers = cell.gates, cell.states, cell.n_saved, cell.n_apart, cell.extras, cell.is_normalised
    digest.update(repr(numbers).encode())
    for part in (cell.forward, cell.backward, *(cell.late or ()), *(cell.output or ())):
        if not callable(part):
            digest.update(repr(part).encode())
            continue
        for function in reached(part):
            # Not by files: a cell need not be one of ours.
            code = function.__code__
            digest.update(code.co_code + repr((code.co_names, code.co_consts)).encode())
    return cache.cache_folder() / f"{cell.name}-{digest.hexdigest()[:32]}.o"


def _from_cache(cell: Cell, target: Target, noisy: bool) -> bytes | None:
    """The code in a file of the cache; None if it is not there, not whole or not to be trusted."""
    try:
        path = _cached(cell, target, noisy)
    except OSError:  # which `_to_cache` will tell
        return None
    content = cache.read(path)
    if content is None:
        return None
    digest, code = content[:32], content[32:]
    if hashlib.sha256(code).digest() != digest:
        _log.warning("%s is damaged", path)
        return None
    return code


def _to_cache(cell: Cell, target: Target, noisy: bool, code: bytes) -> None:
    try:
        cache.write(_cached(cell, target, noisy), hashlib.sha256(code).digest() + code)
    except OSError as error:
        _log.warning("cannot keep compiled kernels: %s", error)


# Calls.

#: The type of a kernel, which takes its arguments, the number of its thread and how many there are.
KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


def run(
    cell: Cell, dtype: torch.dtype, name: str, arguments: Arguments, threads: int, *,
    noisy: bool = False,
) -> None:  # fmt: skip
    """Run ``forward``, ``backward`` or ``product``; the lock of the interpreter is free meanwhile.

    With `threads` of 1 it runs in this thread, without the OpenMP runtime.
    """
    addresses = kernels(cell, dtype, noisy=noisy).addresses
    # By reference, so that the call holds the arguments, and they hold the tensors: a compiler that
    # traces Python would otherwise free what is known by address only.
    reference = ctypes.byref(arguments)
    library = openmp()
    if threads > 1 and library is not None:
        library.GOMP_parallel(addresses[f"{name}_region"], reference, threads, 0)
    else:
        KERNEL(addresses[name])(reference, 0, 1)
