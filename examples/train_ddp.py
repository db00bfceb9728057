"""Train on several processes, with DistributedDataParallel or with sharded parameters (FSDP2).

Every process has its own sequences; gradients are averaged over the processes after backward. DDP
(Li et al. 2020, arXiv:2006.15704) keeps all parameters in each process. With --fsdp each process
keeps a shard of every parameter and gathers the rest for a layer's forward or backward (Zhao et al.
2023, arXiv:2304.11277; torch.distributed.fsdp.fully_shard). fastrnn's layers read their parameters
at each call, so both work exactly as with torch.nn.

The task: x_t is a number from 0 to 1, and y_t is the mean of all numbers since the last reset. The
sequences of a batch have different lengths, which are passed to the layers, as are the resets:

    h_t = LSTM(x_t, 0 if t is a reset else h_{t-1}),   y_t is predicted as w . h_t + b

    torchrun --nproc-per-node 2 examples/train_ddp.py
    torchrun --nproc-per-node 2 examples/train_ddp.py --fsdp
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from common import now, parser, save
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from tqdm import trange

import fastrnn


class RunningMean(torch.nn.Module):
    """Two recurrent layers and a linear one."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.recurrent = fastrnn.LSTM(1, hidden, num_layers=2)
        self.linear = torch.nn.Linear(hidden, 1)

    def forward(self, x: Tensor, lengths: Tensor, reset: Tensor) -> Tensor:
        return self.linear(self.recurrent(x, lengths=lengths, reset=reset)[0]).squeeze(2)


def make_batch(args: argparse.Namespace, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return numbers (T, B, 1), lengths (B,), resets (T, B), targets (T, B), NaN where none is."""
    x = torch.rand(args.steps, args.batch)
    lengths = torch.randint(args.steps // 2, args.steps + 1, (args.batch,))
    reset = torch.rand_like(x) < 4 / args.steps
    y, total, count = torch.empty_like(x), torch.zeros(args.batch), torch.zeros(args.batch)
    for t in range(args.steps):
        total = torch.where(reset[t], 0.0, total) + x[t]
        count = torch.where(reset[t], 0.0, count) + 1
        y[t] = total / count
    y[torch.arange(args.steps)[:, None] >= lengths] = float("nan")
    return x[..., None].to(device), lengths.to(device), reset.to(device), y.to(device)


def distribute(model: RunningMean, fsdp: bool, device: str) -> torch.nn.Module:
    if not fsdp:
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device.partition(":")[0], (dist.get_world_size(),))
    fully_shard(model.recurrent, mesh=mesh)  # gathered and freed separately
    return fully_shard(model, mesh=mesh)


def train(args: argparse.Namespace, device: str) -> None:
    rank, processes = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(args.seed)  # the same initial values everywhere
    model = distribute(RunningMean(args.hidden).to(device), args.fsdp, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    torch.manual_seed(args.seed + 1 + rank)  # and different data
    losses, start = [], now(device)
    for _ in trange(args.updates, disable=rank > 0):
        *inputs, y = make_batch(args, device)
        known = ~y.isnan()
        loss = mse_loss(model(*inputs)[known], y[known])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    mean = torch.stack(losses)
    dist.all_reduce(mean)
    seconds, curve = now(device) - start, (mean / processes).tolist()
    if rank == 0:
        weights = [weight.to_local() if args.fsdp else weight for weight in model.parameters()]
        kept = sum(map(torch.numel, weights))
        print(f"{processes} processes, the first has {kept} elements of the parameters")
        print(f"mean squared error: first update {curve[0]:.4f}, last {curve[-1]:.4f}")
        print(f"{args.updates} updates in {seconds:.1f} s")
        save(args.out, "train_ddp", {"losses": curve, "kept": kept, "seconds": seconds})


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--fsdp", action="store_true", help="shard the parameters")
    options.add_argument("--hidden", type=int, default=64)
    options.add_argument("--batch", type=int, default=16, help="sequences of each process")
    options.add_argument("--steps", type=int, default=64, help="length of the longest sequences")
    options.add_argument("--updates", type=int, default=200)
    options.add_argument("--lr", type=float, default=3e-3)
    args = options.parse_args(argv)
    device = args.device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    train(args, device)
    # gloo's threads must be idle and the model freed: the last owner of the group waits for the
    # threads while it holds the GIL, which they need too (torch 2.13).
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
