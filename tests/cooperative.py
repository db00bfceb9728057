"""Run Triton kernels whose programs wait for each other, without a GPU.

Triton's interpreter runs the programs of a grid one after another, so that a program which waits
for a later one never ends. Here every program is a greenlet that hands over at accesses to global
memory, and the next to run is drawn from a seeded generator: one kernel, many schedules. Programs
that wait while nobody else can run are reported instead of hanging. What this does not model is
the reordering of memory accesses by a real device.

Works with the interpreters of triton 3.6 to 3.9; their compiled counterparts cannot be used in the
same process, because ``TRITON_INTERPRET`` is read when triton is imported (see conftest.py).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import triton.language as tl  # noqa: F401 - the interpreter looks for it beside a kernel
from greenlet import getcurrent, greenlet
from triton.runtime import interpreter

MAX_SWITCHES = 2_000_000
# How often a program hands over at a load or store that is not meant for others to see.
_QUIET_ODDS = 0.05


class Deadlock(RuntimeError):
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
    rng = random.Random(seed)
    builder_type = type(interpreter.interpreter_builder)
    call = interpreter.GridExecutor.__call__
    before = {name: getattr(builder_type, name) for name in _ACCESSES}

    def yielding(name: str) -> Callable[..., Any]:
        access = before[name]

        @functools.wraps(access)
        def wrapper(builder: Any, *args: Any) -> Any:
            # Loads have is_volatile last, in every version.
            shared = "atomic" in name or ("load" in name and args[-1] is True)
            if getcurrent().parent is not None and (shared or rng.random() < _QUIET_ODDS):
                getcurrent().parent.switch()
            return access(builder, *args)

        return wrapper

    def run(executor: Any, *args: Any, **kwargs: Any) -> None:
        kernel = executor.fn
        programs: list[tuple[tuple[int, ...], greenlet]] = []

        def enlist(**arguments: Any) -> None:
            builder = interpreter.interpreter_builder
            programs.append((builder.grid_idx, greenlet(lambda: kernel(**arguments))))
            if len(programs) == math.prod(builder.grid_dim):
                _interleave(programs, rng)

        enlist.__signature__ = inspect.signature(kernel)  # type: ignore[attr-defined]
        enlist.__annotations__ = kernel.__annotations__
        executor.fn = enlist
        call(executor, *args, **kwargs)

    for name in before:
        setattr(builder_type, name, yielding(name))
    interpreter.GridExecutor.__call__ = run
    try:
        yield
    finally:
        interpreter.GridExecutor.__call__ = call
        for name, access in before.items():
            setattr(builder_type, name, access)


_ACCESSES = (
    "create_atomic_cas",
    "create_atomic_rmw",
    "create_masked_load",
    "create_masked_store",
)


def _interleave(programs: list[tuple[tuple[int, ...], greenlet]], rng: random.Random) -> None:
    for _ in range(MAX_SWITCHES):
        index, program = rng.choice(programs)
        interpreter.interpreter_builder.set_grid_idx(*index)
        program.switch()
        if program.dead:
            programs.remove((index, program))
            if not programs:
                return
    raise Deadlock(f"programs {[index for index, _ in programs]} wait in vain")
