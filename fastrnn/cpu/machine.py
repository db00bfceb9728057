"""What the kernels need to know about the CPU; importing this compiles and loads nothing."""

from __future__ import annotations

import functools
import importlib
import os
import platform
from typing import NamedTuple

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
    """

    name: str
    lanes: int
    registers: int

    @property
    def units(self) -> int:
        """Hidden units in a slice, two vectors of them."""
        return 2 * self.lanes

    @property
    def tile_rows(self) -> int:
        """Rows of a tile of products, two vectors wide, which takes 3/4 of the registers."""
        return self.registers * 3 // 8


AVX2, AVX512, NEON = Target("AVX2", 8, 16), Target("AVX-512", 16, 32), Target("NEON", 4, 32)


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
    return {"AVX2": AVX2, "AVX512": AVX512}.get(torch.backends.cpu.get_cpu_capability())


@functools.cache
def _has_compiler() -> bool:
    try:
        importlib.import_module("llvmlite.binding")
    except (ImportError, OSError):  # not there, or not for this system
        return False
    return True


def kernel_gap(dtype: torch.dtype, projected: bool) -> str | None:
    """Say why no kernel can run a layer on this CPU.

    Parameters
    ----------
    dtype : torch.dtype
    projected : bool
        Whether h is projected.

    Returns
    -------
    str or None
        A clause, or None if there are kernels.
    """
    if not _has_compiler():
        return "no kernels without llvmlite"
    if target() is None:
        return f"no kernel of ours for a CPU with {torch.backends.cpu.get_cpu_capability()}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no kernel of ours for {dtype}"
    return "no kernel of ours for projections" if projected else None


_is_forked = False


def _after_fork() -> None:
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def is_forked() -> bool:
    """Tell whether this process was forked from one that had imported fastrnn.

    The threads of the parent's OpenMP pool are gone then, which the runtime does not notice: it
    would wait for them.

    Returns
    -------
    bool
    """
    return _is_forked


def cores() -> int:
    """Count the CPUs that this process may use.

    Returns
    -------
    int
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe() -> str:
    """Describe how the kernels run here.

    Returns
    -------
    str
    """
    found = target()
    assert found is not None
    count = 1 if _is_forked else min(torch.get_num_threads(), cores())
    return f"{found.name}, {found.lanes} lanes, {count} thread{'s' if count > 1 else ''} at most"
