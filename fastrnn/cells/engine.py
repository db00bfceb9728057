"""How a cell's functions become those of an engine."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from types import FunctionType
from typing import Any


def reached(function: Any) -> list[Any]:
    """List a function of a cell and all functions of cells that it calls."""
    called = (function.__globals__.get(name) for name in function.__code__.co_names)
    found = [function]
    for other in called:
        if isinstance(other, FunctionType):
            found += reached(other)
    return found


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


class Engine:
    """Binds the functions of cells to what an engine computes with.

    A Python function looks up by name, in its globals, what it calls. So a copy of it with other
    globals is the same source on another engine; ``triton.jit`` reads source and globals of what
    it gets, and can take such a copy too.

    Parameters
    ----------
    names : dict of str to callable
        The engine's functions, by their names in ``functions.py``; and what else it wants to see
        in the globals of every function.
    compile : callable, optional
        What is done with each copy, such as ``triton.jit``.

    Examples
    --------
    >>> import math
    >>> from fastrnn.cells import CELLS, Engine
    >>> engine = Engine({"tanh": math.tanh})
    >>> engine.bind(CELLS["rnn_tanh"].forward)([0.5], [-0.5], [0.0], ())
    ((0.0,), ())
    """

    def __init__(
        self,
        names: dict[str, Callable[..., Any]],
        compile: Callable[[Callable[..., Any]], Any] = _as_it_is,
    ) -> None:
        self.names, self._compile = names, compile
        self._bound: dict[Callable[..., Any], Any] = {}

    def bind(self, function: Any) -> Any:
        """Get the engine's copy of a function of a cell."""
        if function not in self._bound:
            self._bound[function] = self._bind(function)
        return self._bound[function]

    def _bind(self, function: Any) -> Any:
        """Make the copy, and those of the functions of cells that it calls."""
        # An import from C, as torch makes them, takes its builtins from the caller's globals.
        names = {"__builtins__": builtins, **self.names}
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            if name not in names and isinstance(value, FunctionType):
                names[name] = self.bind(value)
        # Without a name of a module, or a compiler of Python would look up globals there.
        copy = FunctionType(function.__code__, names, function.__name__)
        copy.__module__, copy.__doc__ = function.__module__, function.__doc__
        return self._compile(copy)
