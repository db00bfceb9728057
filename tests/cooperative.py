"""Run Triton kernels whose programs wait for each other, without a GPU.

Triton's interpreter runs the programs of a grid one after another, so that a program which waits
for a later one never ends. Here every program is a greenlet that hands over at accesses to global
memory, and the next to run is drawn from a seeded generator: one kernel, many schedules.

What a program stores is seen by the others late, element by element, in any order; an atomic with
release semantics waits until all of it is. An access outside of the tensors that the kernel was
given is an error, and so are programs that wait while nobody else can run. What this does not
model is loads that are moved before an earlier access or see a stale cache, and the threads of a
program: no barrier, cache modifier or `acquire` is missed here if it is forgotten.

Works with the interpreters of triton 3.6 to 3.9; their compiled counterparts cannot be used in the
same process, because ``TRITON_INTERPRET`` is read when triton is imported (see conftest.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from greenlet import getcurrent, greenlet
from triton.runtime import interpreter

MAX_SWITCHES = 2_000_000
# How often a program hands over at a load or store that is not meant for others to see.
_QUIET_ODDS = 0.05
# How many of the stores that are on their way arrive between two programs' turns.
_ARRIVAL_ODDS = 0.3

_ACCESSES = (
    "create_atomic_cas",
    "create_atomic_rmw",
    "create_masked_load",
    "create_masked_store",
)


class Deadlock(RuntimeError):
    """Programs still wait after so many switches that nobody can be making progress."""


class _Program(greenlet):
    """One program of a grid, and its stores that others do not see yet: addresses and action."""

    def __init__(self, run: Callable[[], None], index: tuple[int, ...]) -> None:
        super().__init__(run)
        self.index = index
        self.stores: list[tuple[np.ndarray, Callable[[], None]]] = []

    def finish_stores(self, which: Callable[[np.ndarray], Any] = lambda addresses: True) -> None:
        if self.stores:
            waiting, self.stores = self.stores, []
            for addresses, store in waiting:
                if which(addresses):
                    store()
                else:
                    self.stores.append((addresses, store))


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
    rng = np.random.default_rng(seed)
    builder = interpreter.interpreter_builder
    builder_type = type(builder)
    atomic_cas, atomic_rmw, load, store = (getattr(builder_type, name) for name in _ACCESSES)
    bounds = np.empty(0, np.uint64)

    def hand_over(shared: bool) -> _Program:
        program = getcurrent()
        if shared or rng.random() < _QUIET_ODDS:
            program.parent.switch()
        return program

    def touch(ptrs: Any, mask: Any) -> np.ndarray:
        """The addresses of an access, all inside of a tensor of the kernel."""
        addresses = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)]
        if (np.searchsorted(bounds, addresses, side="right") % 2 == 0).any():
            raise IndexError("a kernel accesses memory outside of its arguments")
        return addresses

    def atomic(access: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(builder: Any, *args: Any) -> Any:
            program, sem = hand_over(True), args[-2]
            if "RELEASE" in sem.name:
                program.finish_stores()
            return access(builder, *args)

        return wrapper

    def late_load(builder: Any, ptrs: Any, mask: Any, *args: Any) -> Any:
        is_volatile = args[-1]  # in every version
        program = hand_over(is_volatile is True)
        addresses = touch(ptrs, mask)
        program.finish_stores(lambda stored: np.isin(stored, addresses).any())
        return load(builder, ptrs, mask, *args)

    def late_store(builder: Any, ptrs: Any, value: Any, mask: Any, *args: Any) -> None:
        program = hand_over(False)
        addresses = touch(ptrs, mask)
        program.finish_stores(lambda stored: np.isin(stored, addresses).any())
        at_once = rng.random(mask.data.shape) < rng.random()
        now, later = (
            interpreter.TensorHandle(part, tl.int1)
            for part in (mask.data & at_once, mask.data & ~at_once)
        )
        store(builder, ptrs, value, now, *args)
        later_addresses = ptrs.data[later.data]
        if later_addresses.size:
            program.stores.append(
                (later_addresses, lambda: store(builder, ptrs, value, later, *args))
            )

    def run(executor: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal bounds
        kernel, programs = executor.fn, []
        bounds = _bounds([*args, *kwargs.values()])

        def enlist(**arguments: Any) -> None:
            def program() -> None:
                with np.errstate(over="ignore", invalid="ignore"):  # as on a device
                    kernel(**arguments)

            programs.append(_Program(program, builder.grid_idx))
            if len(programs) == math.prod(builder.grid_dim):
                _interleave(programs, rng)

        enlist.__signature__ = inspect.signature(kernel)  # type: ignore[attr-defined]
        enlist.__annotations__ = kernel.__annotations__
        executor.fn = enlist
        try:
            call(executor, *args, **kwargs)
        except interpreter.InterpreterError as error:
            if isinstance(error.__cause__, Deadlock):
                raise error.__cause__ from None
            raise

    with contextlib.ExitStack() as undo:

        def replace(holder: Any, name: str, value: Any) -> Any:
            before = getattr(holder, name)
            undo.callback(setattr, holder, name, before)
            setattr(holder, name, value)
            return before

        # Once, and not at each call of a function: most of the interpreter's time.
        everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
        undo.callback(interpreter._patch_lang(everything).restore)
        replace(interpreter, "_patch_lang", lambda fn: SimpleNamespace(restore=lambda: None))
        replace(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        wrappers = atomic(atomic_cas), atomic(atomic_rmw), late_load, late_store
        for name, wrapper in zip(_ACCESSES, wrappers, strict=True):
            replace(builder_type, name, wrapper)
        call = replace(interpreter.GridExecutor, "__call__", run)
        yield


def _bounds(arguments: list[Any]) -> np.ndarray:
    """First address, and first behind, of each tensor's storage, in order."""
    storages = {}
    for argument in arguments:
        for tensor in argument if isinstance(argument, tuple) else (argument,):
            if hasattr(tensor, "untyped_storage"):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.data_ptr() + storage.nbytes()
    flat = [bound for pair in sorted(storages.items()) for bound in pair]
    return np.array(flat, np.uint64)


def _interleave(programs: list[_Program], rng: np.random.Generator) -> None:
    programs = list(programs)
    for _ in range(MAX_SWITCHES):
        program = programs[rng.integers(len(programs))]
        interpreter.interpreter_builder.set_grid_idx(*program.index)
        program.switch()
        if program.dead:
            program.finish_stores()
            programs.remove(program)
            if not programs:
                return
        for other in programs:
            other.finish_stores(lambda _: rng.random() < _ARRIVAL_ODDS)
    raise Deadlock(f"programs {[program.index for program in programs]} wait in vain")
