"""Run layers on CPU tensors as if on a GPU: with its plans, kernels and operators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

import fastrnn
from fastrnn import cpu, forms, gpu, ops, planner
from fastrnn.call import Asked, Call, Cotangents
from fastrnn.cells import CELLS
from fastrnn.flow import Flow, make_marks
from fastrnn.kernels.configs import DEVICES, Device
from fastrnn.planner import use_path


@contextlib.contextmanager
def as_on_a_gpu(device: Device = DEVICES["h100"], precision: str = "ieee") -> Iterator[None]:
    """Replace the operators' CPU implementation with that of a GPU.

    Triton decides where kernels run: in its interpreter, or with a driver a test substituted.
    """
    on_cpu, problem_of = (cpu.forward, cpu.backward), planner.problem_of

    def fall_back(function):
        # gpu.py calls these names where it has no kernel; there they must be the originals.
        def call(*args):
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(cpu, "forward", on_cpu[0])
                inner.setattr(cpu, "backward", on_cpu[1])
                return function(*args)

        return call

    def as_gpu_asks(call, *dtype, **is_step):  # steps stay on the CPU
        problem = problem_of(call, *dtype, **is_step)
        return problem if is_step else problem._replace(gpu=device, precision=precision)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(planner, "problem_of", as_gpu_asks)
        # No prepared calls, which are for a CPU.
        for name in ("run_prepared", "step_prepared"):
            patched.setattr(forms, name, lambda *_: None)
        patched.setattr(cpu, "forward", fall_back(gpu.forward))
        patched.setattr(cpu, "backward", fall_back(gpu.backward))
        patched.setattr(ops, "_with_output", lambda y, saved: (y, *saved))
        yield


# Checks of layers for every schedule, with interpreted or emulated kernels.


def check_layers(schedule: str, atol: float | None = None) -> None:
    """Two bidirectional layers, forward and backward; `atol` is for TF32 products."""
    gru = fastrnn.GRU(3, 40, num_layers=2, bidirectional=True, batch_first=True)
    x = torch.randn(2, 4, 3)
    with use_path("reference"):
        expected, _ = gru(x)
    with use_path(schedule):
        y, _ = gru(x)
        y.sum().backward()
    torch.testing.assert_close(y, expected, rtol=None if atol is None else 0.0, atol=atol)
    assert gru.weight_hh_l1_reverse.grad.any()


def check_empty_batch(cell: str, schedule: str) -> None:
    """A batch of size 0."""
    module = getattr(fastrnn, cell.upper())(3, 40, bidirectional=True)
    x = torch.randn(4, 0, 3, requires_grad=True)
    with use_path(schedule):
        y, _ = module(x)
        y.sum().backward()
    assert y.shape == (4, 0, 80)
    assert x.grad.shape == x.shape
    assert not any(p.grad.any() for p in module.parameters())


def check_dtypes(schedule: str) -> None:
    """Half-precision layers return half-precision results and gradients."""
    lstm, hidden = CELLS["lstm"], 24
    x = torch.zeros(5, 3, 3, dtype=torch.bfloat16)
    state = [torch.zeros(1, 3, hidden, dtype=x.dtype) for _ in lstm.states]
    weights = [torch.zeros(4 * hidden, n, dtype=x.dtype) for n in (3, hidden)]
    marks = make_marks(5, 3, 1, x.device, torch.tensor([3, 5, 0]), torch.ones(5, 3).bool())
    call = Call(lstm, x, state, weights, flow=Flow(marks, state))
    with torch.no_grad(), use_path(schedule):
        (y, final, traces), saved = gpu.forward(call, cpu.ALL, True)
        dx, d_state, d_fresh, d_weights = gpu.backward(
            call, Cotangents(y, final, traces), [y, *saved], Asked()
        )
    results = (y, *final, *traces, dx, *d_state, *d_fresh, *d_weights)
    assert {t.dtype for t in results} == {torch.bfloat16}
    assert [t.shape for t in d_state] == [t.shape for t in d_fresh] == [t.shape for t in state]
