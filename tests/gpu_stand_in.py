"""Layers on a CPU's tensors as if on a GPU: its plans, its kernels, its operators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from fastrnn import cpu, gpu, ops, planner
from fastrnn.kernels.configs import DEVICES, Device


@contextlib.contextmanager
def as_on_a_gpu(device: Device = DEVICES["h100"], precision: str = "ieee") -> Iterator[None]:
    """Let the operators' CPU implementation be that of a GPU.

    Where kernels run, Triton decides: its interpreter, or a driver that a test put in its place.
    """
    on_cpu, problem_of = (cpu.forward, cpu.backward), planner.problem_of

    def fall_back(function):
        # gpu.py hands over what has no kernel by these names, which must then mean themselves.
        def call(*args):
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(cpu, "forward", on_cpu[0])
                inner.setattr(cpu, "backward", on_cpu[1])
                return function(*args)

        return call

    def as_gpu_asks(call, *dtype, **is_step):  # which the planner itself tells apart
        problem = problem_of(call, *dtype, **is_step)
        return problem if is_step else problem._replace(gpu=device, precision=precision)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(planner, "problem_of", as_gpu_asks)
        patched.setattr(cpu, "forward", fall_back(gpu.forward))
        patched.setattr(cpu, "backward", fall_back(gpu.backward))
        patched.setattr(ops, "_with_output", lambda y, saved: (y, *saved))
        yield
