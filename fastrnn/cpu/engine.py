"""Compile the kernels for the current CPU, cache them on disk, and run them on threads."""

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

_RUNTIME = machine.OPENMP[1:]
_HERE = Path(__file__).parent
# The source files that determine the compiled code and its arguments.
_SOURCES = sorted(_HERE.glob("*.py"))


# Threads. Parallel regions run on the OpenMP runtime that torch uses, whichever it is: its thread
# pool exists anyway, and its idle threads spin just as those of a separate pool would.


@functools.cache
def openmp() -> ctypes.CDLL | None:
    """Return the OpenMP runtime in this process: libgomp, or another one with its interface."""
    library = machine.torch_library()
    if library is None or machine.openmp_gap() is not None:
        return None
    library.GOMP_parallel.restype = None
    library.GOMP_parallel.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint,
    ]  # fmt: skip
    return library


# Operations between two barriers that justify another thread; a barrier takes 0.3 us or more.
_FLOPS = 15_000


def threads(flops: int, shares: int) -> int:
    """Choose how many threads share a product of `flops` operations in `shares` parts."""
    most = min(shares, flops // _FLOPS)
    return 1 if most < 2 else min(_available(), most)


def _available() -> int:
    """Return the number of available threads."""
    if machine.is_forked() or openmp() is None:
        return 1
    return min(torch.get_num_threads(), machine.cores())


class Launch(NamedTuple):
    """A call of a kernel for several groups, run by a number of threads together."""

    first: int
    groups: int
    threads: int


# Total operations of all groups that justify a parallel region, which takes 9 us to start. Forward
# of a bidirectional LSTM with (B, H) = (1, 32) took 1.04 times as long as on one thread for T = 16,
# and the same time for T = 64.
_REGION_FLOPS = 1_000_000


def launches(groups: int, threads: int, flops: int) -> list[Launch]:
    """Choose which groups run at the same time.

    In the measured cases, one thread per group was never slower than all threads on one group after
    another, even if a group's weights exceed the thread's cache: 1.00 to 1.09 times as fast for
    ensembles of 4, T = 64, B = 4 and 16, H = 128 to 512.

    Parameters
    ----------
    groups : int
        Number of groups, which are independent of each other.
    threads : int
        Number of threads that could share one group.
    flops : int
        Number of operations in one group.
    """
    most = _available()
    if threads == 1 and groups * flops < _REGION_FLOPS:
        return [Launch(0, groups, 1)]
    rest = groups % most  # left over after full rounds; several threads share each of them
    found = [Launch(0, groups - rest, most)] if groups > rest else []
    if rest:
        found.append(Launch(groups - rest, rest, rest * min(threads, most // rest)))
    return found


# Compilation.


class Kernels(NamedTuple):
    """A cell's compiled kernels: their addresses by name, and the object that keeps them alive."""

    addresses: dict[str, int]
    owner: Any


_KERNELS = ("forward", "backward", "product")

_loaded: dict[tuple[Cell, Target | None, torch.dtype, bool], Kernels] = {}


def kernels(cell: Cell, dtype: torch.dtype = torch.float32, *, noisy: bool = False) -> Kernels:
    """Return the kernels of a cell for this machine, compiling them if they are not cached.

    Recurrent dropout and zoneout have separate kernels, so that other calls do not pay for them.
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
        name += " with recurrent dropout and zoneout" if noisy else ""
        _log.warning("compiling the %s (first use on this CPU)", name)
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


# Stands in for a missing OpenMP runtime: LLVM needs an address, but a single thread never calls it.
_never_called = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)


def target_machine() -> Any:
    """Describe this machine to LLVM."""
    of = llvm.Target.from_triple(llvm.get_process_triple())
    features = llvm.get_host_cpu_features().flatten()
    return of.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3, jit=True
    )


def optimized(cell: Cell, target: Target, for_: Any, noisy: bool = False) -> Any:
    """Generate and optimize the kernels of a cell."""
    from . import sequence  # the code generators are imported only if code is generated

    module = llvm.parse_assembly(str(sequence.module(cell, target, noisy)))
    module.triple = for_.triple
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    # The code is vectorized already.
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = llvm.create_pass_builder(for_, options)
    builder.getModulePassManager().run(module, builder)
    return module


# The cache: one file per set of kernels, named by a hash of everything that the code depends on.


def _cached(cell: Cell, target: Target, noisy: bool) -> Path:
    facts = (
        llvmlite.__version__, llvm.get_process_triple(), llvm.get_host_cpu_name(),
        llvm.get_host_cpu_features().flatten(), target, noisy, MOST_STATES,
        MOST_SAVED,
    )  # fmt: skip
    digest = hashlib.sha256(repr(facts).encode())
    for path in _SOURCES:
        digest.update(path.read_bytes())
    numbers = cell.gates, cell.states, cell.n_saved, cell.n_apart, cell.extras, cell.is_normalized
    digest.update(repr(numbers).encode())
    for part in (cell.forward, cell.backward, *(cell.late or ()), *(cell.output or ())):
        if not callable(part):
            digest.update(repr(part).encode())
            continue
        for function in reached(part):
            # Hash the code, not the file, because a cell may be defined outside fastrnn.
            code = function.__code__
            digest.update(code.co_code + repr((code.co_names, code.co_consts)).encode())
    return cache.cache_folder() / f"{cell.name}-{digest.hexdigest()[:32]}.o"


def _from_cache(cell: Cell, target: Target, noisy: bool) -> bytes | None:
    """Read the code from the cache; None if the file is missing, damaged or not trusted."""
    try:
        path = _cached(cell, target, noisy)
    except OSError:  # `_to_cache` reports it
        return None
    content = cache.read(path)
    if content is None:
        return None
    digest, code = content[:32], content[32:]
    if hashlib.sha256(code).digest() != digest:
        _log.warning("%s is corrupt", path)
        return None
    return code


def _to_cache(cell: Cell, target: Target, noisy: bool, code: bytes) -> None:
    try:
        cache.write(_cached(cell, target, noisy), hashlib.sha256(code).digest() + code)
    except OSError as error:
        _log.warning("cannot save compiled kernels: %s", error)


# Calls.

#: The type of a kernel, which takes the arguments, the thread index and the number of threads.
KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


def run(
    cell: Cell, dtype: torch.dtype, name: str, arguments: Arguments, threads: int, *,
    noisy: bool = False,
) -> None:  # fmt: skip
    """Run ``forward``, ``backward`` or ``product``, with the GIL released.

    With one thread, the kernel runs in the calling thread, without the OpenMP runtime.
    """
    addresses = kernels(cell, dtype, noisy=noisy).addresses
    # By reference, so that the call keeps the arguments alive, and they keep the tensors alive: a
    # compiler that traces Python would otherwise free tensors that are used only by address.
    reference = ctypes.byref(arguments)
    library = openmp()
    if threads > 1 and library is not None:
        library.GOMP_parallel(addresses[f"{name}_region"], reference, threads, 0)
    else:
        KERNEL(addresses[name])(reference, 0, 1)
