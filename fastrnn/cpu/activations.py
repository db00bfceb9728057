"""The functions of the cells on vectors of hidden units."""

from __future__ import annotations

from llvmlite import ir

from ..cells import Engine
from .vector import INT32, Value, fma, where

# All are made from exp(y) = 2**n * (1 + p) with p = exp(r) - 1, y = n * ln 2 + r and
# |r| <= ln 2 / 2: there the Taylor series to r**7 is within a quarter of a unit in the last place.
_LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440054690583e-4  # n * high is exact
_ROUND = 1.5 * 2.0**23  # adding it leaves an integer in the lowest bits
_TAYLOR = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2)


def _exp_parts(y: Value) -> tuple[Value, Value]:
    """``2**n`` and p for |y| <= 87."""
    code, build = y.code, y.code.build
    shifted = fma(y, _LOG2_E, _ROUND)
    n = shifted - _ROUND
    r = fma(n, -_LN2_LOW, fma(n, -_LN2_HIGH, y))
    series = fma(r, _TAYLOR[0], _TAYLOR[1])
    for coefficient in _TAYLOR[2:]:
        series = fma(series, r, coefficient)
    p = fma(r * r, series, r)
    integers = ir.VectorType(INT32, code.lanes)
    exponent = build.shl(
        build.bitcast(shifted.value, integers), ir.Constant(integers, [23] * code.lanes)
    )
    bits = build.add(exponent, ir.Constant(integers, [127 << 23] * code.lanes))
    return Value(code, build.bitcast(bits, code.vector)), p


def sigmoid(x: Value) -> Value:
    """``1 / (1 + exp(-x))``; not a number where x is not."""
    scale, p = _exp_parts((0.0 - x.at_most(87.0)).at_most(87.0))
    return 1.0 / (fma(scale, p, scale) + 1.0)


def tanh(x: Value) -> Value:
    """``e / (e + 2)`` with e = exp(2 |x|) - 1 and the sign of x; not a number where x is not."""
    scale, p = _exp_parts((x.code.intrinsic("fabs", x) * 2.0).at_most(20.0))
    e = fma(scale, p, scale - 1.0)
    return x.code.intrinsic("copysign", e / (e + 2.0), x)


def relu(x: Value) -> Value:
    """0 where x is negative, else x, also where it is not a number."""
    return where(x < 0.0, 0.0, x)


def exp(x: Value) -> Value:
    """The exponential function of x <= 80; 0 below -87, not a number where x is not."""
    scale, p = _exp_parts(0.0 - (0.0 - x).at_most(87.0))
    return where(x < -87.0, 0.0, fma(scale, p, scale))


def log_sigmoid(x: Value) -> Value:
    """``min(x, 0) - log(1 + e)`` with e = exp(-|x|); not a number where x is not.

    The logarithm is ``2 * atanh(s)`` with s = e / (2 + e) <= 1 / 3, whose series to s**15 is within
    a tenth of a unit in the last place.
    """
    e = exp(0.0 - x.code.intrinsic("fabs", x))
    s = e / (e + 2.0)
    square = s * s
    series = fma(square, 1 / 15, 1 / 13)
    for k in (11, 9, 7, 5, 3):
        series = fma(series, square, 1 / k)
    return x.at_most(0.0) - 2.0 * fma(s * square, series, s)


def maximum(x: Value, y: Value) -> Value:
    """The larger of two; not a number where one of them is not."""
    return x.code.intrinsic("maximum", x, y)


def zeros_like(x: Value) -> Value:
    """Zeros of the kind of x."""
    return x.code.zeros()


#: The cells on vectors.
VECTORS = Engine(
    {
        function.__name__: function
        for function in (sigmoid, tanh, relu, exp, log_sigmoid, maximum, where, zeros_like)
    }
)
