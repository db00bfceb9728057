"""Run Triton kernels whose programs wait for each other, without a GPU.

Triton's interpreter runs the programs of a grid one after another, so that a program which waits
for a later one never ends. Here every program is a greenlet that hands over at accesses to global
memory, and the next to run is drawn from a seeded generator: one kernel, many schedules.

What a program stores arrives late and in parts, in any order; an atomic with release semantics
waits until all of it has. Programs that wait while nobody else can run are reported instead of
hanging, and so is a load or store outside of the tensors that the kernel was given. What this does
not model is loads that run ahead of an earlier access or see a stale cache, and the threads of a
program: a barrier, a cache modifier or `acquire` may be missing without being missed.

Works with the interpreters of triton 3.6 to 3.9; their compiled counterparts cannot be used in the
same process, because ``TRITON_INTERPRET`` is read when triton is imported (see conftest.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from greenlet import getcurrent, greenlet
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

MAX_SWITCHES = 10_000
# How often a program hands over at a load or store that is not meant for others to see.
_QUIET_ODDS = 0.05
# How much of what is on its way to memory arrives between two programs' turns.
_ARRIVAL_ODDS = 0.3


class Deadlock(RuntimeError):  # noqa: N818 - not an error of ours
    """Programs still wait after so many switches that nobody can be making progress."""


@contextlib.contextmanager
def cooperative(seed: int) -> Iterator[None]:
    """Run kernels launched inside with their programs interleaved at random.

    Parameters
    ----------
    seed : int
        Of the schedule.

    Raises
    ------
    Deadlock
        From a launch in which programs wait for what never comes.
    """
    builder = interpreter.interpreter_builder
    memory = _Memory(np.random.default_rng(seed), builder)
    call, dot, cast = interpreter.GridExecutor.__call__, builder.create_dot, builder.cast_impl

    def run(executor: Any, *args: Any, **kwargs: Any) -> None:
        kernel, programs = executor.fn, []
        memory.map([*args, *kwargs.values()])

        def enlist(**arguments: Any) -> None:
            programs.append(_Program(kernel, arguments, builder.grid_idx))
            if len(programs) == math.prod(builder.grid_dim):
                _interleave(programs, memory)

        enlist.__signature__ = inspect.signature(kernel)  # type: ignore[attr-defined]
        enlist.__annotations__ = kernel.__annotations__
        executor.fn = enlist
        try:
            call(executor, *args, **kwargs)
        except interpreter.InterpreterError as error:
            if isinstance(error.__cause__, Deadlock):
                raise error.__cause__ from None
            raise

    # The interpreter rounds to bfloat16 towards zero, and takes its bits for integers in a product.

    def rounded(source: TensorHandle, dtype: Any) -> TensorHandle:
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(source, dtype)
        bits = source.data.view(np.uint32)
        bits = np.where(np.isnan(source.data), 0x7FFF, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
        return TensorHandle(bits.astype(np.uint16), tl.bfloat16)

    def product(a: TensorHandle, b: TensorHandle, *args: Any) -> TensorHandle:
        return dot(cast(a, tl.float32), cast(b, tl.float32), *args)

    with contextlib.ExitStack() as undo:

        def replace(holder: Any, name: str, value: Any) -> None:
            undo.callback(setattr, holder, name, getattr(holder, name))
            setattr(holder, name, value)

        # Once, and not at each call of a function: it takes longer than all the rest.
        everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
        undo.callback(interpreter._patch_lang(everything).restore)
        replace(interpreter, "_patch_lang", lambda fn: SimpleNamespace(restore=lambda: None))
        # As triton 3.9 has it. That of 3.6 does not work with NumPy 2.4.
        replace(tl.tensor, "__index__", lambda tensor: int(tensor.handle.data.squeeze()))
        replace(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        replace(interpreter.GridExecutor, "__call__", run)
        replace(builder, "create_masked_load", memory.load)
        replace(builder, "create_masked_store", memory.store)
        for name in ("create_atomic_cas", "create_atomic_rmw"):
            replace(builder, name, memory.atomic(getattr(builder, name)))
        replace(builder, "cast_impl", rounded)
        replace(builder, "create_dot", product)
        yield


class _Program(greenlet):
    """One program of a grid."""

    def __init__(self, kernel: Any, arguments: dict[str, Any], index: tuple[int, ...]) -> None:
        def run() -> None:
            with np.errstate(over="ignore", invalid="ignore"):  # as on a device
                kernel(**arguments)

        super().__init__(run)
        self.index = index
        self.stores: list[tuple[Any, ...]] = []  # arguments of those that have not arrived


def _interleave(programs: list[_Program], memory: _Memory) -> None:
    running = [*programs]
    for _ in range(MAX_SWITCHES):
        program = running[memory.rng.integers(len(running))]
        interpreter.interpreter_builder.set_grid_idx(*program.index)
        program.switch()
        if program.dead:
            running.remove(program)
        if not running:
            break
        for other in programs:
            memory.finish(other, lambda addresses: memory.rng.random() < _ARRIVAL_ODDS)
    else:
        raise Deadlock(f"programs {[program.index for program in running]} wait in vain")
    for program in programs:
        memory.finish(program)


class _Memory:
    """Accesses of the program that runs, in place of the interpreter's own."""

    def __init__(self, rng: np.random.Generator, builder: Any) -> None:
        self.rng = rng
        self._load, self._store = builder.create_masked_load, builder.create_masked_store
        self._bounds = np.empty(0, np.uint64)

    def map(self, arguments: Iterable[Any]) -> None:
        """Allow accesses to the tensors among a kernel's arguments, and to nothing else."""
        ends = {}
        for argument in arguments:
            for tensor in argument if isinstance(argument, tuple) else (argument,):
                if hasattr(tensor, "untyped_storage"):
                    storage = tensor.untyped_storage()
                    ends[storage.data_ptr()] = storage.data_ptr() + storage.nbytes()
        self._bounds = np.array(sorted(ends.items()), np.uint64).ravel()

    def load(self, ptrs: TensorHandle, mask: TensorHandle, *args: Any) -> TensorHandle:
        is_volatile = args[-1]  # in every version
        self._access(ptrs.data[mask.data], is_volatile is True)
        return self._load(ptrs, mask, *args)

    def store(self, ptrs: TensorHandle, value: Any, mask: TensorHandle, *args: Any) -> None:
        program = self._access(ptrs.data[mask.data], False)
        at_once = self.rng.random(mask.data.shape) < self.rng.random()
        now, late = (
            TensorHandle(part, tl.int1) for part in (mask.data & at_once, mask.data & ~at_once)
        )
        self._store(ptrs, value, now, *args)
        program.stores.append((ptrs, value, late, *args))

    def atomic(self, access: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
        def wrapper(*args: Any) -> TensorHandle:
            sem = args[-2]
            program = self._access(np.empty(0, np.uint64), True)
            if "RELEASE" in sem.name:
                self.finish(program)
            return access(*args)

        return wrapper

    def finish(
        self, program: _Program, which: Callable[[np.ndarray], Any] = lambda addresses: True
    ) -> None:
        """Let stores arrive."""
        waiting, program.stores = program.stores, []
        for ptrs, value, mask, *args in waiting:
            if which(ptrs.data[mask.data]):
                self._store(ptrs, value, mask, *args)
            else:
                program.stores.append((ptrs, value, mask, *args))

    def _access(self, addresses: np.ndarray, shared: bool) -> _Program:
        program = getcurrent()
        if shared or self.rng.random() < _QUIET_ODDS:
            program.parent.switch()
        if (np.searchsorted(self._bounds, addresses, side="right") % 2 == 0).any():
            raise IndexError("a kernel accesses memory outside of its arguments")
        # A program's own accesses to an address are in order.
        self.finish(program, lambda others: np.isin(others, addresses).any())
        return program
