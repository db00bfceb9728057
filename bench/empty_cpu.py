"""An empty exchange on a CPU: a parallel region whose threads only wait for each other."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch

_CODE = """
declare void @GOMP_barrier()

define void @region(i64* %steps) {
entry:
  %n = load i64, i64* %steps
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%next, %loop]
  call void @GOMP_barrier()
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %n
  br i1 %more, label %loop, label %exit
exit:
  ret void
}
"""


@functools.cache
def _region() -> tuple[int, Any] | None:
    """Return the address of the compiled region, and the object that keeps it in memory."""
    try:
        import llvmlite.binding as llvm

        from ..cpu import engine
    except ImportError:
        return None
    library = engine.openmp()
    if library is None:
        return None
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    address = ctypes.cast(library.GOMP_barrier, ctypes.c_void_p).value
    llvm.add_symbol("GOMP_barrier", address)
    # Older versions of LLVM have typed pointers, newer ones opaque pointers.
    code = _CODE if llvm.llvm_version_info[0] < 15 else _CODE.replace("i64*", "ptr")
    owner = llvm.create_mcjit_compiler(llvm.parse_assembly(code), engine.target_machine())
    owner.finalize_object()
    return owner.get_function_address("region"), owner


def loop(device: torch.device, steps: int) -> Callable[[], None] | None:
    """Make a call that synchronizes all of torch's threads so many times.

    Parameters
    ----------
    device : torch.device
        A CPU.
    steps : int

    Returns
    -------
    callable or None
        None where the OpenMP runtime or llvmlite is missing.
    """
    region = _region()
    if region is None:
        return None
    from ..cpu import engine

    library, count = engine.openmp(), ctypes.c_int64(steps)
    assert library is not None
    threads = torch.get_num_threads()
    return lambda: library.GOMP_parallel(region[0], ctypes.byref(count), threads, 0)
