"""The functions of the cells on vectors of hidden units."""

from __future__ import annotations

import math
from typing import NamedTuple

from llvmlite import ir

from ..cells import Engine
from .vector import DOUBLE, INT, INT32, Value, fma, where


class _Exp(NamedTuple):
    """The parameters of the exponential function in one dtype.

    ``exp(y) = 2**n * (1 + p)`` with p = exp(r) - 1, y = n * ln 2 + r and |r| <= ln 2 / 2. The
    Taylor series of p up to `degree` is within a quarter of a unit in the last place.
    """

    mantissa: int  # bits of the mantissa
    bias: int  # of the exponent
    ln2: tuple[float, float]  # ln 2 as a sum; n times the first part is exact
    degree: int
    limit: float  # exp(limit) and exp(-limit) are normal numbers
    most_tanh: float  # tanh(most_tanh / 2) rounds to 1
    log_terms: int  # terms of the series in log_sigmoid

    @property
    def round(self) -> float:
        """Adding it leaves an integer in the lowest bits."""
        return 1.5 * 2.0**self.mantissa


_SINGLE = _Exp(23, 127, (0.693359375, -2.12194440054690583e-4), 7, 87.0, 20.0, 8)
_DOUBLE = _Exp(
    52, 1023, (6.93147180369123816490e-01, 1.90821492927058770002e-10), 13, 708.0, 40.0, 17
)
_LOG2_E = 1.4426950408889634


def _of(x: Value) -> _Exp:
    return _DOUBLE if x.code.exact == DOUBLE else _SINGLE


def _exp_parts(y: Value) -> tuple[Value, Value]:
    """``2**n`` and p for |y| up to the limit."""
    code, build, of = y.code, y.code.build, _of(y)
    shifted = fma(y, _LOG2_E, of.round)
    n = shifted - of.round
    high, low = of.ln2
    r = fma(n, -low, fma(n, -high, y))
    first, *others = [1 / math.factorial(k) for k in range(of.degree, 1, -1)]
    series = code.constant(first)
    for coefficient in others:
        series = fma(series, r, coefficient)
    p = fma(r * r, series, r)
    integers = ir.VectorType(INT32 if of is _SINGLE else INT, code.lanes)
    shift, bias = (
        ir.Constant(integers, [k] * code.lanes) for k in (of.mantissa, of.bias << of.mantissa)
    )
    exponent = build.shl(build.bitcast(shifted.value, integers), shift)
    return Value(code, build.bitcast(build.add(exponent, bias), code.vector)), p


def sigmoid(x: Value) -> Value:
    """``1 / (1 + exp(-x))``; NaN if x is NaN."""
    limit = _of(x).limit
    scale, p = _exp_parts((0.0 - x.at_most(limit)).at_most(limit))
    return 1.0 / (fma(scale, p, scale) + 1.0)


def tanh(x: Value) -> Value:
    """``e / (e + 2)`` with e = exp(2 |x|) - 1 and the sign of x; NaN if x is NaN."""
    scale, p = _exp_parts((x.code.intrinsic("fabs", x) * 2.0).at_most(_of(x).most_tanh))
    e = fma(scale, p, scale - 1.0)
    return x.code.intrinsic("copysign", e / (e + 2.0), x)


def relu(x: Value) -> Value:
    """0 where x is negative, else x; NaN stays NaN."""
    return where(x < 0.0, 0.0, x)


def exp(x: Value) -> Value:
    """The exponential function, for x up to the limit; 0 below the negative limit; NaN for NaN."""
    limit = _of(x).limit
    scale, p = _exp_parts(0.0 - (0.0 - x).at_most(limit))
    return where(x < -limit, 0.0, fma(scale, p, scale))


def log_sigmoid(x: Value) -> Value:
    """``min(x, 0) - log(1 + e)`` with e = exp(-|x|); NaN if x is NaN.

    The logarithm is ``2 * atanh(s)`` with s = e / (2 + e) <= 1 / 3, whose series is within a tenth
    of a unit in the last place.
    """
    e = exp(0.0 - x.code.intrinsic("fabs", x))
    s = e / (e + 2.0)
    square = s * s
    first, *others = [1 / (2 * k + 1) for k in range(_of(x).log_terms - 1, 0, -1)]
    series = x.code.constant(first)
    for coefficient in others:
        series = fma(series, square, coefficient)
    return x.at_most(0.0) - 2.0 * fma(s * square, series, s)


def maximum(x: Value, y: Value) -> Value:
    """The larger of x and y; NaN if either is NaN."""
    return x.code.intrinsic("maximum", x, y)


def zeros_like(x: Value) -> Value:
    """Zeros of the type of x."""
    return x.code.zeros()


#: The engine that computes cells on vectors.
VECTORS = Engine(
    {
        function.__name__: function
        for function in (sigmoid, tanh, relu, exp, log_sigmoid, maximum, where, zeros_like)
    }
)
