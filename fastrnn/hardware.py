"""What a machine is, as far as the speed of a path depends on it."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import NamedTuple

import torch

from .cpu import machine
from .kernels.configs import Device


class Machine(NamedTuple):
    """A CPU with so many threads, or a GPU.

    Attributes
    ----------
    device : {'cpu', 'cuda'}
    name : str
        As its maker, or who virtualises it, calls it.
    family : str
        Vendor, family and model of a CPU, which its name may hide; the target of a GPU.
    vectors : str
        Instruction set of a CPU, as far as torch and the kernels use it; what a GPU is capable of.
    threads : int
        That torch uses on a CPU; 0 for a GPU.
    caches : tuple of int
        Bytes of a CPU's caches for data, the first level first; empty if nobody tells.
    """

    device: str
    name: str
    family: str
    vectors: str
    threads: int = 0
    caches: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.device != "cpu":
            return self.name
        count = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.name} ({self.family}), {self.vectors}, {count}"


def cpu() -> Machine:
    """Describe the CPU of this process with the threads that torch uses now."""
    name, family = _cpu_name()
    target = machine.target()
    vectors = torch.backends.cpu.get_cpu_capability() if target is None else target.name
    threads = min(torch.get_num_threads(), machine.cores())
    return Machine("cpu", name, family, vectors, threads, _caches())


def gpu(device: Device) -> Machine:
    """Describe a GPU, which need not be there."""
    return Machine("cuda", device.name, device.target, str(device.capability))


@functools.cache
def _cpu_name() -> tuple[str, str]:
    """Name and family."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    pairs = (line.partition(":")[::2] for line in text.splitlines())
    facts = {key.strip(): value.strip() for key, value in reversed([*pairs])}  # of the first CPU
    # x86-64 has the first three, ARM the others.
    keys = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
    family = " ".join(facts[key] for key in keys if key in facts)
    name = facts.get("model name") or platform.processor() or platform.machine()
    return name, family or platform.machine()


@functools.cache
def _caches() -> tuple[int, ...]:
    sizes: dict[int, int] = {}
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            kind, level, text = (
                (folder / name).read_text(encoding="utf-8").strip()
                for name in ("type", "level", "size")
            )
            if kind != "Instruction":
                sizes[int(level)] = int(text.removesuffix("K")) * 1024
        except (OSError, ValueError):  # a system that has some of them only
            continue
    if not sizes:
        known = getattr(os, "sysconf_names", {})
        for k, name in enumerate(("LEVEL1_DCACHE", "LEVEL2_CACHE", "LEVEL3_CACHE")):
            if f"SC_{name}_SIZE" in known:
                sizes[k] = os.sysconf(f"SC_{name}_SIZE")
    return tuple(size for _, size in sorted(sizes.items()) if size > 0)
