"""The properties of a machine that determine how fast a path is."""

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
    """A CPU with a number of threads, or a GPU.

    Attributes
    ----------
    device : {'cpu', 'cuda'}
    name : str
        As reported by the vendor or the hypervisor.
    family : str
        Vendor, family and model of a CPU, which its name may not reveal; the target of a GPU.
    vectors : str
        Instruction set of a CPU that torch and the kernels use; compute capability of a GPU.
    threads : int
        Number of threads torch uses on a CPU; 0 for a GPU.
    caches : tuple of int
        Sizes of a CPU's data caches in bytes, from level 1 up; empty if unknown.
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
    """Describe this machine's CPU and the number of threads torch currently uses."""
    name, family = _cpu_name()
    target = machine.target()
    vectors = torch.backends.cpu.get_cpu_capability() if target is None else target.name
    threads = min(torch.get_num_threads(), machine.cores())
    return Machine("cpu", name, family, vectors, threads, _caches())


def gpu(device: Device) -> Machine:
    """Describe a GPU, which need not be present."""
    return Machine("cuda", device.name, device.target, str(device.capability))


@functools.cache
def _cpu_name() -> tuple[str, str]:
    """Return the name and the family."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    pairs = (line.partition(":")[::2] for line in text.splitlines())
    facts = {key.strip(): value.strip() for key, value in reversed([*pairs])}  # for the first CPU
    # x86-64 reports the first three, ARM the others.
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
        except (OSError, ValueError):  # a system that reports only some of them
            continue
    if not sizes:
        known = getattr(os, "sysconf_names", {})
        for k, name in enumerate(("LEVEL1_DCACHE", "LEVEL2_CACHE", "LEVEL3_CACHE")):
            if f"SC_{name}_SIZE" in known:
                sizes[k] = os.sysconf(f"SC_{name}_SIZE")
    return tuple(size for _, size in sorted(sizes.items()) if size > 0)
