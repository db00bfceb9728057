"""Bind the cells to Triton: the functions they call on tiles, and a cell as a kernel constant."""

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..cells import Cell, Engine

# Primitives, which an engine may replace. The functions below are composed of them.


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def reciprocal(x):
    return 1.0 / x


@triton.jit
def _exp_of_nvidia(x):
    """Like `exp`, but with the rounding error of ``x * log2(e)`` added: |x| / 2^24 and 2 ulp."""
    power = x * 1.4426950408889634  # log2(e)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [power], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _reciprocal_of_nvidia(x):
    """Like `reciprocal`, accurate to 1 ulp, without the handling of subnormal numbers."""
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


def sigmoid(x):
    return reciprocal(1.0 + exp(-x))


def tanh(x):
    """Hyperbolic tangent to a few units in the last place, saturating at +-1."""
    e = exp(-2.0 * tl.abs(x))
    far = (1.0 - e) * reciprocal(1.0 + e)
    # Near zero 1 - e cancels.
    square = x * x
    if x.dtype == tl.float64:
        # The continued fraction x / (1 + x^2 / (3 + x^2 / (5 + ...))).
        near = 11.0 + square / 13.0
        near = 7.0 + square / (9.0 + square / near)
        near = x / (1.0 + square / (3.0 + square / (5.0 + square / near)))
    else:
        # The Taylor series, whose next term is below 1e-8 of x here.
        near = 62.0 / 2835.0 + square * (-1382.0 / 155925.0)
        near = -17.0 / 315.0 + square * near
        near = 2.0 / 15.0 + square * near
        near = x + x * square * (-1.0 / 3.0 + square * near)
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


def log_sigmoid(x):
    """``min(x, 0) - log(1 + e)``, e = exp(-|x|), to a few units in the last place."""
    e = exp(-tl.abs(x))
    if x.dtype == tl.float64:
        # log1p: rescale the logarithm of the rounded 1 + e by e over what was actually added.
        total = 1.0 + e
        added = total - 1.0
        found = tl.where(added == 0.0, e, tl.log(total) * (e / tl.where(added == 0.0, 1.0, added)))
    else:
        # 2 atanh(s), s = e / (2 + e) <= 1/3: the series, truncated below 2e-8 relative error.
        s = e * reciprocal(2.0 + e)
        square = s * s
        series = 1.0 / 11.0 + square * (1.0 / 13.0)
        series = 1.0 / 9.0 + square * series
        series = 1.0 / 7.0 + square * series
        series = 1.0 / 5.0 + square * series
        series = 1.0 / 3.0 + square * series
        found = 2.0 * (s + s * square * series)
    return tl.minimum(x, 0.0) - found


@triton.jit
def relu(x):
    return tl.where(x < 0, 0.0, x)


@triton.jit
def maximum(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def where(condition, x, y):
    return tl.where(condition, x, y)


@triton.jit
def zeros_like(x):
    # tl.zeros_like cannot infer a layout in Gluon.
    return tl.where(x == x, 0.0, 0.0).to(x.dtype)


def _engine(**own: Any) -> Engine:
    """Build an engine for cells on tiles in float32, with some functions replaced."""
    functions = (exp, reciprocal, relu, maximum, where, zeros_like)
    # The interpreter requires `tl` among the globals of every function.
    names = {"tl": tl, **{f.__name__: f for f in functions}, **own}
    base = Engine(names, compile=triton.jit)
    composed = {f.__name__: base.bind(f) for f in (sigmoid, tanh, log_sigmoid)}
    return Engine({**names, **composed}, compile=triton.jit)


#: The cells with Triton's portable functions.
ENGINE = _engine()
#: The cells with NVIDIA's approximate instructions, which take half the time.
NVIDIA_ENGINE = _engine(exp=_exp_of_nvidia, reciprocal=_reciprocal_of_nvidia)


class Bound(NamedTuple):
    """A cell as a single constant of a kernel; its fields are those of `Cell`, plus those of `Late`
    and `Output` where the cell has them.
    """

    forward: Any
    backward: Any
    n_gates: int
    n_saved: int
    n_apart: int
    n_extra: int
    d_extra: Any
    is_normalized: bool
    n_late: int
    late_factor: Any
    late_backward: Any
    output_forward: Any
    output_backward: Any
    output_saved: int

    @property
    def cache_key(self) -> str:
        """Key for Triton's on-disk cache of compiled kernels; includes the functions' source."""
        return str([getattr(part, "cache_key", part) for part in self])


@functools.cache
def bound(cell: Cell, engine: Engine = ENGINE) -> Bound:
    """Bind a cell to the functions of an engine, for use in kernels."""

    def of(part: Any, name: str) -> Any:
        function = getattr(part, name, None)
        return None if function is None else engine.bind(function)

    late, output = cell.late, cell.output
    return Bound(
        engine.bind(cell.forward),
        engine.bind(cell.backward),
        *(cell.n_gates, cell.n_saved, cell.n_apart, cell.n_extra),
        of(cell, "d_extra"),
        cell.is_normalized,
        late.n_gates if late else 0,
        *(of(late, "factor"), of(late, "backward")),
        *(of(output, "forward"), of(output, "backward")),
        output.saved if output else 0,
    )
