"""Activations for the cells."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Hyperbolic tangent to a few units in the last place of float32, saturating at +-1."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    # Near zero 1 - e cancels. The Taylor series, whose next term is below 1e-8 of x here.
    square = x * x
    near = 62.0 / 2835.0 + square * (-1382.0 / 155925.0)
    near = -17.0 / 315.0 + square * near
    near = 2.0 / 15.0 + square * near
    near = x + x * square * (-1.0 / 3.0 + square * near)
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))
