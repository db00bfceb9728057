"""Compile a step of every cell in Gluon, Triton's language of explicit layouts, without a device.

Prints a line for each. A script, because a process whose Triton interprets cannot compile.
"""

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from fastrnn.cells import CELLS, Engine


@gluon.jit
def sigmoid(x):
    return 1.0 / (1.0 + gl.exp(-x))


@gluon.jit
def tanh(x):
    return 2.0 * sigmoid(2.0 * x) - 1.0


@gluon.jit
def relu(x):
    return gl.where(x < 0.0, 0.0, x)


@gluon.jit
def exp(x):
    return gl.exp(x)


@gluon.jit
def log_sigmoid(x):
    return gl.minimum(x, 0.0) - gl.log(1.0 + gl.exp(-gl.abs(x)))


@gluon.jit
def maximum(x, y):
    return gl.maximum(x, y)


@gluon.jit
def where(condition, x, y):
    return gl.where(condition, x, y)


@gluon.jit
def zeros_like(x):
    return x * 0.0


FUNCTIONS = (sigmoid, tanh, relu, exp, log_sigmoid, maximum, where, zeros_like)
GLUON = Engine({f.__name__: f for f in FUNCTIONS}, compile=gluon.jit)


@gluon.jit
def load(ptr, first: gl.constexpr, count: gl.constexpr):
    """Vectors number `first` and after of those that lie one after another."""
    at = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    vectors = ()
    for n in gl.static_range(count):
        vectors += (gl.load(ptr + (first + n) * 128 + at),)
    return vectors


@gluon.jit
def store(ptr, vectors):
    at = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    for n in gl.static_range(len(vectors)):
        gl.store(ptr + n * 128 + at, vectors[n])


@gluon.jit
def step_kernel(
    ptr,
    out_ptr,
    forward: gl.constexpr,
    backward: gl.constexpr,
    n_gates: gl.constexpr,
    n_states: gl.constexpr,
    n_extra: gl.constexpr,
):
    wx, rh = load(ptr, 0, n_gates), load(ptr, 4, n_gates)
    state, extra = load(ptr, 8, n_states), load(ptr, 12, n_extra)
    new, saved = forward(wx, rh, state, extra)
    d_rh, d_wx, d_state = backward(saved, new, state, load(ptr, 16, n_states), extra)
    store(out_ptr, new + saved + d_rh + d_wx + d_state)


if __name__ == "__main__":
    for cell in CELLS.values():
        if cell.is_pointwise:
            constants = {
                "forward": GLUON.bind(cell.forward),
                "backward": GLUON.bind(cell.backward),
                "n_gates": cell.n_gates,
                "n_states": cell.n_states,
                "n_extra": cell.n_extra,
            }
            signature = {"ptr": "*fp32", "out_ptr": "*fp32"}
            signature |= dict.fromkeys(constants, "constexpr")
            source = GluonASTSource(step_kernel, signature, constants)
            code = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
            print(cell.name, code.count("st.global"))
