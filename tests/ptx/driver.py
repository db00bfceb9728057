"""A stand-in for Triton's CUDA driver that runs launches of JIT functions in the emulator.

Arguments, specialization and compilation are Triton's own. Only ptxas is bypassed: instead of a
cubin, the PTX itself is loaded and launched.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.cache import FileCacheManager
from triton.runtime.driver import driver as drivers

from . import machine
from .build import folder
from .machine import Outcome
from .parser import parse
from .program import OPS, Program

#: Maximum shared memory of a CTA in bytes, by compute capability.
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHARED_MEMORY |= {103: 227 * 1024, 120: 99 * 1024}
_SHARED_ACCESSES = ("LDS", "STS", "LDMATRIX", "STMATRIX")
# Tensors are this far apart, so that an out-of-bounds access never hits another tensor.
_REGION, _FIRST_BYTE = 1 << 36, 0x10000
# Programs resident at a time, in a launch that does not require all to be co-resident.
_AT_ONCE = 16


class EmulationError(RuntimeError):
    """A launch that did not end, or that a GPU would have stopped."""


class Schedule(NamedTuple):
    """The order of events; see README.md.

    Attributes
    ----------
    seed : int
    policy : {'random', 'one', 'starve-warp', 'starve-cta', 'bursts'}
        Which warp runs, and for how long.
    drain : {'at once', 'random', 'lazy'}
        When stores arrive in memory.
    """

    seed: int = 0
    policy: str = "random"
    drain: str = "random"


class Wavefronts(NamedTuple):
    """Shared-memory wavefronts of a source line, over all warps.

    Attributes
    ----------
    place : str
        The line, with its callers.
    count, fewest : int
        Wavefronts, and the minimum without bank conflicts.
    """

    place: str
    count: int
    fewest: int


class Launch(NamedTuple):
    """A launch and its outcome; `tensors` are the names of its arguments by region."""

    kernel: str
    grid: tuple[int, int, int]
    ptx: str
    program: Program
    tensors: list[str]
    outcome: Outcome

    def findings(self) -> list[str]:
        """List races and other faults, each with its instructions, their source and an example."""
        return [self._named(found.show(self.program)) for found in self.outcome.findings]

    def wavefronts(self) -> list[Wavefronts]:
        """List the executed source lines that load or store shared memory or matrices there.

        Needs `statistics`. Accesses by `cp.async` and `wgmma` are not counted.
        """
        counts = self.outcome.statistics
        if counts is None:
            raise ValueError("wavefronts are counted by an emulator with statistics")
        totals: dict[str, tuple[int, int]] = {}
        is_shared = np.isin(self.program.code[:, 0], [OPS[name] for name in _SHARED_ACCESSES])
        for pc in np.flatnonzero(is_shared & (counts.transactions > 0)):
            count, fewest = totals.get(self.program.where[pc], (0, 0))
            added = int(counts.transactions[pc]), int(counts.least[pc])
            totals[self.program.where[pc]] = count + added[0], fewest + added[1]
        return [Wavefronts(place, *total) for place, total in totals.items()]

    def conflicts(self) -> list[Wavefronts]:
        """List source lines with bank conflicts; empty if there are none. Needs `statistics`."""
        return [line for line in self.wavefronts() if line.count > line.fewest]

    def stuck(self) -> str:
        """List the positions of warps that did not end, one line per instruction."""
        places: dict[int, list[str]] = {}
        for x, y, z, warp, pc, _, wait in self.outcome.state:
            where = f"({x},{y},{z}) warp {warp} {machine.WAITS[wait]}"
            places.setdefault(pc, []).append(where)
        return "\n".join(
            f"  {self.program.show(pc)}: {len(warps)} warps: {', '.join(warps[:6])}"
            for pc, warps in sorted(places.items())
        )

    def _named(self, text: str) -> str:
        for i, name in enumerate(self.tensors):
            text = text.replace(f"tensor #{i} ", f"{name} ")
        return text


class Emulator(contextlib.AbstractContextManager["Emulator"]):
    """Run launches in this context on CPU tensors, as a GPU of a compute capability would.

    Parameters
    ----------
    capability : int
        One of those in `SHARED_MEMORY`.
    schedule : Schedule
    mutate : function of str, optional
        Modifies the PTX of a kernel before it runs.
    statistics : bool
        Count executions, wavefronts of shared memory and sectors of global memory.

    Attributes
    ----------
    launches : list of Launch
        All launches so far.

    Raises
    ------
    EmulationError
        From a launch that hangs, or that a GPU would stop: lists where every warp is.
    """

    _current: Emulator | None = None

    def __init__(
        self,
        capability: int = 90,
        schedule: Schedule = Schedule(),  # noqa: B008 - immutable
        *,
        mutate: Callable[[str], str] = str,
        statistics: bool = False,
    ) -> None:
        self.capability, self.schedule = capability, schedule
        self.mutate, self.statistics = mutate, statistics
        self.launches: list[Launch] = []
        self._unwritten: dict[int, tuple[torch.Tensor, np.ndarray]] = {}
        self._exits: contextlib.ExitStack | None = None

    def __enter__(self) -> Emulator:
        if self._exits is not None:
            raise RuntimeError("this emulator is entered already")
        with contextlib.ExitStack() as stack:
            # No GPU may ever load what is compiled here, so it has a separate cache.
            stack.enter_context(triton.knobs.cache.scope())
            triton.knobs.cache.dir = str(folder() / "triton")
            triton.knobs.cache.manager_class = FileCacheManager
            stack.enter_context(mock.patch.object(CUDABackend, "make_cubin", _keep_ptx))
            stack.enter_context(mock.patch.object(drivers, "_active", _Driver(self.capability)))
            stack.enter_context(mock.patch.object(Emulator, "_current", self))
            self._exits = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._exits is not None
        self._exits.close()
        self._exits = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Fill memory that torch allocates inside with noise, and track it as unwritten.

        Our operators hide their allocations from an enclosing mode: enter this inside of them.
        """
        with _Watch(self):
            yield

    def findings(self) -> list[str]:
        """List the findings of all launches."""
        return [text for launch in self.launches for text in launch.findings()]

    def allocated(self, tensor: torch.Tensor) -> None:
        """Register memory that has not been written; it is filled with noise."""
        if tensor.device.type != "cpu" or not tensor.numel():
            return
        storage = tensor.untyped_storage()
        content = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
        noise = np.random.default_rng(self.schedule.seed + len(self._unwritten))
        np.ctypeslib.as_array(content)[:] = noise.integers(0, 256, storage.nbytes(), np.uint8)
        # The tensor is kept alive, so that its address is not reused.
        self._unwritten[storage.data_ptr()] = tensor, np.zeros(storage.nbytes(), np.uint8)

    def written(self, tensor: torch.Tensor) -> None:
        """Register that torch has written a tensor."""
        if tensor.device.type == "cpu":
            self._unwritten.pop(tensor.untyped_storage().data_ptr(), None)

    def launch(self, source: Any, metadata: Any, ptx: str, grid: Any, arguments: Any) -> None:
        """Run a kernel, as its launcher would."""
        ptx = self.mutate(ptx)
        program, memory = _parsed(ptx), _Memory(self._unwritten)
        for (name, kind), value in zip(source.signature.items(), arguments, strict=True):
            memory.take(name, kind, value)
        # Beyond the arguments, Triton's kernels take pointers to scratch memory, which is unused.
        scratch = len(program.params) - len(memory.parameters)
        assert scratch in (0, 1, 2), f"{len(memory.parameters)} arguments: {program.params}"
        outcome = machine.run(
            program,
            grid,
            memory.parameters + [0] * scratch,
            memory.regions,
            metadata.shared,
            schedule=self.schedule,
            at_once=0 if metadata.launch_cooperative_grid else _AT_ONCE,
            statistics=self.statistics,
        )
        launch = Launch(source.fn.__name__, grid, ptx, program, memory.names, outcome)
        self.launches.append(launch)
        if outcome.status != "ended":
            raise EmulationError(
                "\n".join(
                    [f"{launch.kernel}: {outcome.status}", launch.stuck(), *launch.findings()]
                )
            )


class _Memory:
    """The arguments of a launch as parameters, and the tensors that they point into."""

    def __init__(self, unwritten: dict[int, tuple[torch.Tensor, np.ndarray]]) -> None:
        self.parameters: list[int] = []
        self.regions: list[machine.Region] = []
        self.names: list[str] = []
        self._unwritten = unwritten
        self._index: dict[int, int] = {}  # region number of each storage

    def take(self, name: str, kind: Any, value: Any) -> None:
        """Add an argument, or the parts of a tuple. Compiled-in constants are not parameters."""
        if isinstance(kind, tuple):
            for i, parts in enumerate(zip(kind, value, strict=True)):
                self.take(f"{name}[{i}]", *parts)
        elif isinstance(value, torch.Tensor):
            self.parameters.append(self._address(name, value))
        elif kind != "constexpr":
            self.parameters.append(_bits(kind, value))

    def _address(self, name: str, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self._index:
            self._index[key] = len(self.regions)
            _, is_written = self._unwritten.get(key, (None, None))
            if is_written is None:
                is_written = np.ones(max(1, storage.nbytes()), np.uint8)
            base = (len(self.regions) + 1) * _REGION + _FIRST_BYTE
            self.regions.append(machine.Region(base, storage.nbytes(), key, is_written))
            self.names.append(name)
        i = self._index[key]
        if name not in self.names[i].split("/"):
            self.names[i] += f"/{name}"
        return self.regions[i].base + tensor.storage_offset() * tensor.element_size()


# Types of numeric arguments, with their struct format.
_PACKED = {"fp16": "e", "fp32": "f", "fp64": "d", "i1": "?", "u1": "?"}
_PACKED |= {"i8": "b", "i16": "h", "i32": "i", "i64": "q"}
_PACKED |= {"u8": "B", "u16": "H", "u32": "I", "u64": "Q"}


def _bits(kind: str, value: Any) -> int:
    """Return the bits of a number, or of a null pointer."""
    if kind not in _PACKED and value is not None:
        raise TypeError(f"an argument of type {kind!r} is not known here: {value!r}")
    packed = b"" if value is None else struct.pack(f"<{_PACKED[kind]}", value)
    return int.from_bytes(packed, "little")


class _Watch(TorchDispatchMode):
    """Report torch's allocations and writes to an emulator."""

    _ALLOCATE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")

    def __init__(self, emulator: Emulator) -> None:
        super().__init__()
        self.emulator = emulator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._schema.name.removeprefix("aten::") in self._ALLOCATE:
            self.emulator.allocated(result)
            return result
        given = [*args, *([None] * (len(func._schema.arguments) - len(args)))]
        for argument, value in zip(func._schema.arguments, given, strict=True):
            value = kwargs.get(argument.name, value)
            alias = argument.alias_info
            if alias is not None and alias.is_write and isinstance(value, torch.Tensor):
                self.emulator.written(value)
        return result


class _Driver:
    """The interface that Triton's runtime expects of a driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.utils, self.launcher_cls = _Utils(capability), _Launcher

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are cached separately for each

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Utils(NamedTuple):
    capability: int

    def load_binary(
        self, name: str, kernel: bytes, *_: object
    ) -> tuple[object, str, int, int, int]:
        """Return module, function, registers, spills and maximum threads; a function is its PTX."""
        return None, kernel.decode(), 0, 0, 1024

    def get_device_properties(self, device: object) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self.capability]}


class _Launcher(NamedTuple):
    """Launch a compiled kernel in the currently entered emulator."""

    source: Any
    metadata: Any

    def __call__(self, x: int, y: int, z: int, stream: int, function: str, *more: Any) -> None:
        _packed, _launch_metadata, _enter, _exit, *arguments = more
        if Emulator._current is None:
            raise EmulationError("launched outside of the emulator")
        Emulator._current.launch(self.source, self.metadata, function, (x, y, z), arguments)


def _keep_ptx(backend: Any, ptx: str, *_: object) -> bytes:
    return ptx.encode()


@functools.lru_cache(maxsize=32)
def _parsed(ptx: str) -> Program:
    return parse(ptx)
