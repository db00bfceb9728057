"""Errors of the activations that the CPU kernels compute, in units in the last place.

``python -m fastrnn.bench.activation_errors`` compiles every activation for this CPU by itself, runs
it over the numbers of a dtype at even intervals of their bit patterns, and prints the largest error
against a longer format as CSV: float64 for float32, 80-bit numbers for float64.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir

from ..cpu import activations, engine, machine, vector
from . import terminal

_CHUNK = 1 << 20


class Activation(NamedTuple):
    """An activation: its exact values, and whether it is for negative numbers only."""

    exact: Callable[[Any], Any]
    is_of_negatives: bool = False


ACTIVATIONS = {
    "sigmoid": Activation(lambda x: 1 / (1 + np.exp(-x))),
    "tanh": Activation(np.tanh),
    "exp": Activation(np.exp, is_of_negatives=True),
    "log_sigmoid": Activation(lambda x: np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))),
}
_TORCH = {np.float32: torch.float32, np.float64: torch.float64}
_INTEGERS: dict[Any, Any] = {np.float32: np.int32, np.float64: np.int64}
_WIDER: dict[Any, Any] = {np.float32: np.float64, np.float64: np.longdouble}
# Where the result and 1 - sigmoid are normal numbers; beyond it the kernels saturate.
LIMITS = {torch.float32: 87.0, torch.float64: 708.0}


def compiled(activation: Callable[[Any], Any], dtype: torch.dtype) -> Callable[[Any, Any], None]:
    """Compile an activation for this CPU by itself.

    Parameters
    ----------
    activation : callable
        One of ``fastrnn.cpu.activations``.
    dtype : {torch.float32, torch.float64}

    Returns
    -------
    callable
        Takes an array, and another one of the same length for the results.
    """
    target = machine.target()
    assert target is not None
    number = vector.FLOAT if dtype == torch.float32 else vector.DOUBLE
    format = vector.Format(number, number, target._replace(dtype=dtype).units // 2)
    module = ir.Module("activation")
    code = vector.Code(module, "activation", [vector.ADDRESS, vector.ADDRESS, vector.INT], format)
    x, y, count = code.parameters
    x, y = x.of(number), y.of(number)
    with code.loop(count, step=code.lanes) as k:
        code.store(y + k, activation(code.load(x + k, count - k)), count - k)
    code.finish()
    with machine.compiling:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        parsed = llvm.parse_assembly(str(module))
        owner = llvm.create_mcjit_compiler(parsed, engine.target_machine())
        owner.finalize_object()
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    function = kind(owner.get_function_address("activation"))

    def run(values: Any, results: Any) -> None:
        assert owner is not None  # it holds the code
        function(values.ctypes.data, results.ctypes.data, len(values))

    return run


def worst(name: str, dtype: Any, count: int) -> tuple[float, float]:
    """Find the largest error of an activation among so many numbers of each sign.

    Parameters
    ----------
    name : str
        Key of `ACTIVATIONS`.
    dtype : {numpy.float32, numpy.float64}
    count : int

    Returns
    -------
    units, at : float
        In units in the last place of the exact result, and for which argument.
    """
    run = compiled(getattr(activations, name), _TORCH[dtype])
    of, integer = ACTIVATIONS[name], _INTEGERS[dtype]
    end = int(np.array(LIMITS[_TORCH[dtype]], dtype).view(integer))
    bits = np.linspace(0, end, count, endpoint=False).astype(integer)
    found = 0.0, 0.0
    for first in range(0, count, _CHUNK):
        for sign in (-1, 1) if not of.is_of_negatives else (-1,):
            x = sign * bits[first : first + _CHUNK].view(dtype)
            exact = of.exact(x.astype(_WIDER[dtype]))
            unit = np.spacing(np.maximum(np.abs(exact), np.finfo(dtype).tiny).astype(dtype))
            mine = np.empty_like(x)
            run(x, mine)
            errors = np.abs(mine.astype(_WIDER[dtype]) - exact) / unit
            k = int(errors.argmax())
            found = max(found, (float(errors[k]), float(x[k])))
    return found


@terminal.printing()
def main() -> int:
    """Print a row for every activation and dtype.

    Returns
    -------
    int
        0.
    """
    print("activation,dtype,numbers of each sign,largest error in ulp,at")
    for dtype, count in ((np.float32, 1 << 25), (np.float64, 1 << 23)):
        for name in ACTIVATIONS:
            units, at = worst(name, dtype, count)
            print(f"{name},{np.dtype(dtype).name},{count},{units:.2f},{at!r}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
