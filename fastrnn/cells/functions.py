"""What the arithmetic of a cell may call, in no engine's words.

An `Engine` has a function of its own for each of these names. An argument is whatever that engine
computes with: a tensor, a tile, a vector, or a number for all of its elements.
"""

from __future__ import annotations

from typing import Any


def sigmoid(x: Any) -> Any:
    """``1 / (1 + exp(-x))``."""
    raise NotImplementedError


def tanh(x: Any) -> Any:
    """Hyperbolic tangent."""
    raise NotImplementedError


def relu(x: Any) -> Any:
    """0 where x is negative, else x, also where it is not a number."""
    raise NotImplementedError


def exp(x: Any) -> Any:
    """The exponential function, of what is at most 80."""
    raise NotImplementedError


def log_sigmoid(x: Any) -> Any:
    """``-log(1 + exp(-x))`` without overflow, accurate also where it is near 0."""
    raise NotImplementedError


def maximum(x: Any, y: Any) -> Any:
    """The larger of two; not a number where one of them is not."""
    raise NotImplementedError


def where(condition: Any, x: Any, y: Any) -> Any:
    """x where a condition holds, else y; each may be a number."""
    raise NotImplementedError


def zeros_like(x: Any) -> Any:
    """Zeros of the kind of x."""
    raise NotImplementedError
