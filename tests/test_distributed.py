"""Two processes with half a batch each match one with all of it; checkpointing changes nothing.

The processes run this file as a program: ``torchrun ... tests/test_distributed.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastrnn

STEPS, BATCH = 40, 6
KINDS = ("ddp", "fsdp", "fsdp_layers")


class Model(torch.nn.Module):
    """Recurrent layers between linear ones."""

    def __init__(self, layer_class: type[torch.nn.Module], **options: float) -> None:
        super().__init__()
        self.first = torch.nn.Linear(5, 7)
        self.recurrent = layer_class(7, 16, num_layers=2, bidirectional=True, **options)
        self.last = torch.nn.Linear(32, 3)

    def forward(self, x: Tensor, lengths: Tensor, reset: Tensor) -> Tensor:
        output, _ = self.recurrent(self.first(x), lengths=lengths, reset=reset)
        return self.last(output)


def make(
    dtype: torch.dtype, layer_class: type[torch.nn.Module] = fastrnn.LSTM, **options: float
) -> tuple[Model, tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    model = Model(layer_class, **options).to(dtype)
    x, reset = torch.randn(STEPS, BATCH, 5, dtype=dtype), torch.rand(STEPS, BATCH) < 0.1
    return model, (x, torch.randint(STEPS + 1, (BATCH,)), reset)


def train(model: torch.nn.Module, inputs: tuple[Tensor, ...]) -> list[list[Tensor]]:
    """Gradients of three steps, and the parameters after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    seen = []
    for _ in range(3):
        (model(*inputs) - 1).square().mean().backward()
        seen.append([whole(weight.grad) for weight in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
    return [*seen, [whole(weight) for weight in model.parameters()]]


def whole(part: Tensor) -> Tensor:
    """Gather a sharded tensor."""
    return (part.full_tensor() if hasattr(part, "full_tensor") else part).detach().clone()


def distribute(kind: str, model: Model) -> torch.nn.Module:
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if kind == "fsdp_layers":  # gathered and freed separately, in forward and again in backward
        fully_shard(model.recurrent, mesh=mesh, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh)


def compare(kind: str) -> None:
    """Train in all processes, each on its part of the batch, and alone on the whole batch."""
    for dtype in (torch.float32, torch.float64):
        model, (x, lengths, reset) = make(dtype)
        alone = train(model, (x, lengths, reset))
        part = slice(dist.get_rank(), None, dist.get_world_size())
        model, _ = make(dtype)
        together = train(distribute(kind, model), (x[:, part], lengths[part], reset[:, part]))
        for ours, expected in zip(together, alone, strict=True):
            for a, b in zip(ours, expected, strict=True):  # sums over all rows, in another order
                bound = 32 * torch.finfo(dtype).eps * b.abs().max().item()
                torch.testing.assert_close(a, b, rtol=0, atol=bound)


@pytest.mark.long
@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_processes_share_a_batch() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in KINDS:
        assert done.stdout.count(f"{kind} agrees") == 2


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("layer_class", [fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activation_checkpointing(
    layer_class: type[torch.nn.Module], dtype: torch.dtype, use_reentrant: bool
) -> None:
    """The forward pass that backward reruns draws the same masks and gives the same gradients."""
    model, (x, *others) = make(dtype, layer_class, dropout=0.3, recurrent_dropout=0.2, zoneout=0.1)

    def results(call: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        output = call(leaf, *others)
        output.square().mean().backward()
        return [output, leaf.grad, *(weight.grad.clone() for weight in model.parameters())]

    def checkpointed(*inputs: Tensor) -> Tensor:
        return checkpoint(model, *inputs, use_reentrant=use_reentrant)

    torch.testing.assert_close(results(checkpointed), results(model), rtol=0, atol=0)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for kind in KINDS:
        compare(kind)
        print(f"{kind} agrees", flush=True)
    dist.barrier()  # gloo's threads are idle then, so closing it cannot hang
    dist.destroy_process_group()
