"""The functions that the arithmetic of a cell may call, independent of any engine.

An `Engine` provides an implementation for each name. Arguments are whatever the engine computes
with: a tensor, a tile, a vector, or a number for all elements.
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
    """0 where x is negative, else x; NaN stays NaN."""
    raise NotImplementedError


def exp(x: Any) -> Any:
    """The exponential function, for x up to 80."""
    raise NotImplementedError


def log_sigmoid(x: Any) -> Any:
    """``-log(1 + exp(-x))`` without overflow, and accurate where the result is near 0."""
    raise NotImplementedError


def maximum(x: Any, y: Any) -> Any:
    """The larger of x and y; NaN if either is NaN."""
    raise NotImplementedError


def where(condition: Any, x: Any, y: Any) -> Any:
    """x where the condition holds, else y; each may be a number."""
    raise NotImplementedError


def zeros_like(x: Any) -> Any:
    """Zeros of the type of x."""
    raise NotImplementedError
