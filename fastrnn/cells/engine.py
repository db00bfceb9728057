"""Binding a cell's functions to an engine."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from types import FunctionType
from typing import Any


def reached(function: Any) -> list[Any]:
    """List a function of a cell and all cell functions that it calls."""
    called = (function.__globals__.get(name) for name in function.__code__.co_names)
    found = [function]
    for other in called:
        if isinstance(other, FunctionType):
            found += reached(other)
    return found


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


class Engine:
    """Binds the functions of cells to the functions of an engine.

    A Python function looks up the functions it calls by name in its globals, so a copy with other
    globals runs the same source on another engine. ``triton.jit`` reads the source and globals of
    its argument, and accepts such a copy too.

    Parameters
    ----------
    names : dict of str to callable
        The engine's functions, keyed by their names in ``functions.py``, and anything else that
        the globals of every function should contain.
    compile : callable, optional
        Applied to each copy, such as ``triton.jit``.

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
        """Return the engine's copy of a cell function."""
        if function not in self._bound:
            self._bound[function] = self._bind(function)
        return self._bound[function]

    def _bind(self, function: Any) -> Any:
        """Copy a function and the cell functions that it calls."""
        # An import from C code, as in torch, takes its builtins from the caller's globals.
        names = {"__builtins__": builtins, **self.names}
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            if name not in names and isinstance(value, FunctionType):
                names[name] = self.bind(value)
        # Without __name__: a compiler such as Dynamo would look up globals in that module.
        copy = FunctionType(function.__code__, names, function.__name__)
        copy.__module__, copy.__doc__ = function.__module__, function.__doc__
        return self._compile(copy)
