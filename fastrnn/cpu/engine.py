"""Compile the kernels for the CPU at hand, remember them on disk, and run them on threads."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

_log = logging.getLogger("fastrnn")


class Machine(NamedTuple):
    """A CPU, as LLVM sees it."""

    triple: str
    name: str
    features: str
    lanes: int
    registers: int


@functools.cache
def machine() -> Machine | None:
    import llvmlite.binding as llvm
    features = llvm.get_host_cpu_features()
    lanes, registers = (16, 32) if features.get("avx512f") else (8, 16)
    return Machine(llvm.get_process_triple(), llvm.get_host_cpu_name(), features.flatten(), lanes, registers)


def compile_cell(cell, m):
    import llvmlite.binding as llvm
    from . import kernels
    llvm.initialize_all_targets() if False else llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    text = str(kernels.module(cell, kernels.Target(m.lanes, m.registers), f"fastrnn_{cell}"))
    mod = llvm.parse_assembly(text)
    mod.triple = m.triple
    mod.verify()
    tm = llvm.Target.from_triple(m.triple).create_target_machine(cpu=m.name, features=m.features, opt=3, reloc="pic", codemodel="default")
    pto = llvm.create_pipeline_tuning_options(speed_level=2)
    pto.loop_vectorization = False; pto.slp_vectorization=False
    pb = llvm.create_pass_builder(tm, pto)
    pm = pb.getModulePassManager()
    pm.run(mod, pb)
    return mod, tm


@functools.cache
def functions(cell):
    import llvmlite.binding as llvm
    m = machine()
    mod, tm = compile_cell(cell, m)
    for n, ad in zip(("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier"), openmp()[1:]): llvm.add_symbol(n, ad)
    obj = tm.emit_object(mod)
    tm2 = llvm.Target.from_triple(m.triple).create_target_machine(cpu=m.name, features=m.features, opt=3, jit=True)
    eng = llvm.create_mcjit_compiler(llvm.parse_assembly(""), tm2)
    eng.add_object_file(llvm.ObjectFileRef.from_data(obj))
    eng.finalize_object()
    d = {n: eng.get_function_address(n) for n in ("forward", "backward", "forward_region", "backward_region")}
    d["engine"] = eng
    return d


@functools.cache
def openmp():
    lib = ctypes.CDLL(os.path.join(torch.__path__[0], "lib", "libtorch_cpu.so"))
    par = lib.GOMP_parallel
    par.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    par.restype = None
    return par, *(ctypes.cast(getattr(lib, n), ctypes.c_void_p).value for n in ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier"))


KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


def run(cell, name, args, nt):
    f = functions(cell)
    par, *_ = openmp()
    if nt > 1:
        par(f[name + "_region"], ctypes.addressof(args), nt, 0)
    else:
        KERNEL(f[name])(ctypes.addressof(args), 0, 1)
