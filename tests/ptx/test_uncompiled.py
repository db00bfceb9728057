"""Where this version of Triton cannot compile Gluon kernels, layers run with another schedule."""

from __future__ import annotations

import sys

import pytest
import torch
from gpu_stand_in import as_on_a_gpu
from triton.runtime.errors import PTXASError

import fastrnn
import fastrnn.kernels
from fastrnn import devices
from fastrnn.cells import CELLS
from fastrnn.kernels import configs, launch, persistent
from fastrnn.kernels.configs import DEVICES
from fastrnn.planner import Problem, plan, use_path

from .driver import Emulator


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Forget what this process noted, chose and compiled."""
    monkeypatch.setattr(devices, "_gap", "")
    monkeypatch.setattr(devices, "_gpu", lambda index: DEVICES["h100"])
    kernels = persistent.forward_kernel, persistent.backward_kernel

    def clear():
        configs.choose.cache_clear()
        for kernel in kernels:
            kernel.device_caches.clear()

    clear()
    yield
    clear()


def no_gluon(monkeypatch):
    monkeypatch.delattr(fastrnn.kernels, "persistent")
    monkeypatch.setitem(sys.modules, "fastrnn.kernels.persistent", None)


def a_name_that_is_gone(monkeypatch):
    monkeypatch.delattr(persistent, "mma_v2")


def other_parameters(monkeypatch):
    monkeypatch.setattr(persistent, "mma_v2", persistent.load_vectors)


@pytest.mark.parametrize("change", [no_gluon, a_name_that_is_gone, other_parameters])
def test_another_schedule_runs(monkeypatch, change):
    gru, x = fastrnn.GRU(5, 24), torch.randn(4, 3, 5, requires_grad=True)
    expected, _ = gru(x)
    wanted = torch.autograd.grad(expected.sum(), [x, *gru.parameters()])

    def prefer_persistent(config, *args, **kwargs):
        return ("persistent", "resident", "stepwise").index(config.schedule)

    monkeypatch.setattr(configs, "step_us", prefer_persistent)
    change(monkeypatch)
    with Emulator(90) as emulator, as_on_a_gpu(precision="tf32"), use_path("kernels"):
        with pytest.warns(UserWarning, match="using other schedules instead"):
            y, _ = gru(x)
        assert "does not compile our persistent kernels" in devices.gpu().gap
        grads = torch.autograd.grad(y.sum(), [x, *gru.parameters()])
    torch.testing.assert_close(y, expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(grads, wanted, atol=1e-2, rtol=0)
    # A persistent kernel would have two programs.
    assert [run.grid for run in emulator.launches] == [(1, 1, 1)] * 2


def test_the_planner_says_why():
    with pytest.warns(UserWarning, match=r"triton 9\.0"):
        devices.note_gap("triton 9.0 does not compile our persistent kernels (TypeError)")
    problem = Problem("lstm", 512, 16, 512, 512, torch.bfloat16, "cuda", gpu=devices.gpu())
    chosen = plan(problem)
    assert chosen.path == "torch"
    assert "triton 9.0 does not compile" in chosen.reason
    assert [choice.config.schedule for choice in chosen.kernels] == ["stepwise"] * 2
    with (
        pytest.raises(ValueError, match=r"no persistent schedule .*: triton 9\.0"),
        use_path("persistent"),
    ):
        plan(problem)


@pytest.mark.parametrize(
    ("failure", "is_of_compiler"),
    [
        (PTXASError("an instruction is not known"), True),
        (RuntimeError("PassManager::run failed"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), False),
    ],
    ids=str,
)
def test_which_failures_are_of_the_compiler(monkeypatch, failure, is_of_compiler):
    def fail(*args, **kwargs):
        raise failure

    class Kernel:
        def __getitem__(self, grid):
            return fail

    monkeypatch.setattr(persistent, "forward_kernel", Kernel())
    gru, x = fastrnn.GRU(5, 24), torch.randn(4, 3, 5)
    kind = launch.UncompiledError if is_of_compiler else RuntimeError
    config = configs.Config("persistent", 16, 16, 16, 4, 1, 8)
    operands = launch.Operands(gru.weight_hh_l0.data[None], None, None, [torch.zeros(1, 3, 24)])
    with pytest.raises(kind) as raised:
        launch.forward(CELLS["gru"], config, "tf32", x.new_zeros(1, 4, 3, 72), operands)
    assert isinstance(raised.value, launch.UncompiledError) == is_of_compiler
    assert str(failure) in str(raised.value)
