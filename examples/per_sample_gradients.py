"""Per-sample gradients of a batch with torch.func, compared with those of Opacus.

Differentially private training clips the gradient of each sample before summing them, so that no
sample moves the weights by more than C (Abadi et al. 2016, arXiv:1607.00133):

    g = sum_b  g_b min(1, C / |g_b|)          g_b = d loss(x_b, y_b) / d weights

With fastrnn's layers, torch.func computes all g_b in one pass, vmap(grad(loss)), on an unmodified
model. With torch.nn's GRU and RNN that is an error, with its LSTM a slow fallback (torch 2.13), so
Opacus (https://opacus.ai) provides its own layers, loops over linear layers with backward hooks.
The example compares both, and a loop over the samples with torch.nn, in a sequence classifier with
the same weights and samples: the largest difference, and the times. Without Opacus
(pip install opacus) only the loop is compared.

    python examples/per_sample_gradients.py --cell gru --layers 2
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from common import parser, save, seconds_each
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

import fastrnn

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus import GradSampleModule
        from opacus.layers import DPGRU, DPLSTM, DPRNN
except ImportError:
    GradSampleModule = None

CLASSES, CLIP = 10, 1.0
Gradients = dict[str, Tensor]  # by parameter, with the samples in dimension 0


class Classifier(torch.nn.Module):
    """A recurrent layer and a linear one on its last output."""

    def __init__(self, layer_class: Any, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.recurrent = layer_class(width, hidden, num_layers=layers, batch_first=True)
        self.linear = torch.nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.recurrent(x)[0][:, -1])


def by_torch_func(model: Classifier, x: Tensor, y: Tensor) -> Gradients:
    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, weights, (x[None],)), y[None])

    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    return vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, y)


def by_loop(model: Classifier, x: Tensor, y: Tensor) -> Gradients:
    names, weights = zip(*model.named_parameters(), strict=True)
    losses = (cross_entropy(model(x[b : b + 1]), y[b : b + 1]) for b in range(len(x)))
    gradients = (torch.autograd.grad(loss, weights) for loss in losses)
    return dict(zip(names, map(torch.stack, zip(*gradients, strict=True)), strict=True))


def by_opacus(model: Any, x: Tensor, y: Tensor) -> Gradients:
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its hooks: the input needs no gradient
        cross_entropy(model(x), y, reduction="sum").backward()
    return {
        name.removeprefix("_module."): weight.grad_sample
        for name, weight in model.named_parameters()
    }


def clipped_sum(gradients: Gradients) -> tuple[Gradients, Tensor]:
    """Return the sum of the clipped gradients, and the norm of each sample's."""
    norms = torch.stack([part.flatten(1).norm(dim=1) for part in gradients.values()]).norm(dim=0)
    factors = (CLIP / norms).clamp(max=1.0)
    return {k: torch.einsum("b,b...->...", factors, g) for k, g in gradients.items()}, norms


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--cell", choices=("lstm", "gru", "rnn"), default="lstm")
    options.add_argument("--layers", type=int, default=1)
    options.add_argument("--samples", type=int, default=32)
    options.add_argument("--steps", type=int, default=64)
    options.add_argument("--width", type=int, default=32, help="of the input")
    options.add_argument("--hidden", type=int, default=64)
    args = options.parse_args(argv)
    torch.manual_seed(args.seed)
    sizes = (args.width, args.hidden, args.layers)
    x = torch.randn(args.samples, args.steps, args.width, device=args.device)
    y = torch.randint(CLASSES, (args.samples,), device=args.device)

    ours = Classifier(getattr(fastrnn, args.cell.upper()), *sizes).to(args.device)
    ways: dict[str, Callable[[], Gradients]] = {"torch.func": lambda: by_torch_func(ours, x, y)}
    stock = Classifier(getattr(torch.nn, args.cell.upper()), *sizes).to(args.device)
    stock.load_state_dict(ours.state_dict())
    ways["loop"] = lambda: by_loop(stock, x, y)
    if GradSampleModule is None:
        print("Opacus is not installed, so there is only the loop over samples to compare with")
    else:
        layer_class = {"lstm": DPLSTM, "gru": DPGRU, "rnn": DPRNN}[args.cell]
        private = Classifier(layer_class, *sizes).to(args.device)
        private.load_state_dict(ours.state_dict(), strict=False)  # it has aliases of them
        private = GradSampleModule(private, loss_reduction="sum")
        ways["Opacus"] = lambda: by_opacus(private, x, y)

    results = {name: way() for name, way in ways.items()}
    gradients = results.pop("torch.func")
    largest = {
        name: max((other[k] - g).abs().max().item() for k, g in gradients.items())
        for name, other in results.items()
    }
    scale = max(g.abs().max().item() for g in gradients.values())
    times = dict(zip(ways, seconds_each(args.device, 5, *ways.values()), strict=True))
    _, norms = clipped_sum(gradients)
    print(f"{args.samples} samples of {args.steps} steps, {ours.recurrent}")
    print(f"norms of their gradients: {norms.min().item():.3f} to {norms.max().item():.3f}")
    print(f"fastrnn and torch.func: {times['torch.func'] * 1e3:.1f} ms")
    for name, difference in largest.items():
        print(
            f"{name}: {times[name] * 1e3:.1f} ms, largest difference {difference:.1e}"
            f" of gradients up to {scale:.1e}"
        )
    save(args.out, "per_sample_gradients", {"seconds": times, "difference": largest})
    return 0 if max(largest.values()) <= 1e-4 * scale else 1


if __name__ == "__main__":
    raise SystemExit(main())
