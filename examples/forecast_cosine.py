"""Predict the next point of a cosine with a linear recurrent layer.

Many to one: the layer reads a window of 500 points and its last state gives the 501st.

    h_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh      200 linear units, h_0 = 0
    x_{501} is predicted as w . h_500 + b

This is the network of Elman 1990 with the identity in place of tanh. A cosine sampled at
distance d obeys x_{t+1} = 2 cos(d) x_t - x_{t-1}, so a linear recurrence is all it takes.

fastrnn.RNN has nonlinearity="identity", torch.nn.RNN has not: ``--stock`` trains a loop of
torch operations from the same seed as well, and checks that both have the same loss curve.

    python examples/forecast_cosine.py
    python examples/forecast_cosine.py --stock
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import Run, now, parser, same_curve
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import linear, mse_loss
from tqdm import tqdm

import fastrnn

POINTS, FIRST, LAST = 3000, 1.0, 100.0
HELD_OUT = 500  # windows at the end, for validation


class LoopRNN(torch.nn.RNN):
    """A linear recurrent layer from torch alone; parameters and their initial values as RNN's."""

    def forward(self, x: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        h = x.new_zeros(x.shape[0], self.hidden_size)
        for from_input in linear(x, self.weight_ih_l0, self.bias_ih_l0).unbind(1):
            h = from_input + linear(h, self.weight_hh_l0, self.bias_hh_l0)
        return None, h.unsqueeze(0)  # the example needs no other output than the last


class Forecaster(torch.nn.Module):
    """Recurrent layer, then a linear layer on its last state."""

    def __init__(self, stock: bool, hidden: int) -> None:
        super().__init__()
        if stock:
            self.recurrent = LoopRNN(1, hidden, batch_first=True)
        else:
            self.recurrent = fastrnn.RNN(1, hidden, nonlinearity="identity", batch_first=True)
        self.linear = torch.nn.Linear(hidden, 1)

    def forward(self, windows: Tensor) -> Tensor:
        _, last = self.recurrent(windows)
        return self.linear(last[0])


def train(stock: bool, x: Tensor, y: Tensor, args: argparse.Namespace) -> tuple[Forecaster, Run]:
    # A linear recurrence multiplies by W_hh at every step: with an eigenvalue beyond 1 the
    # state grows like its 500th power. torch's initial values put the largest near 0.58, and
    # at this learning rate training moves it to about 0.95, not across 1. From an orthogonal
    # W_hh, where all lie at 1, the first steps of Adam cross it and the loss becomes infinite.
    # Clipping keeps the large gradients of the first batches out of Adam's averages.
    torch.manual_seed(args.seed)
    model = Forecaster(stock, args.hidden).to(x.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    name = "torch" if stock else "fastrnn"
    run, losses = Run(), []
    for epoch in range(args.epochs):
        start = now(args.device)
        order = torch.randperm(len(x) - HELD_OUT).to(x.device)
        for batch in tqdm(order.split(args.batch), desc=f"{name}, epoch {epoch + 1}"):
            loss = mse_loss(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            losses.append(loss.detach())
        run.seconds += now(args.device) - start
        with torch.no_grad():
            run.validation.append(mse_loss(model(x[-HELD_OUT:]), y[-HELD_OUT:]).item())
        print(f"{name}, epoch {epoch + 1}: validation MSE {run.validation[-1]:.2e}")
    run.losses = torch.stack(losses).tolist()
    print(f"{name}: trained in {run.seconds:.1f} s")
    return model, run


def plot(time: Tensor, series: Tensor, predicted: Tensor, path: Path) -> None:
    """The series, the validation part at closer range, and the error there."""
    time, series, predicted = (part.numpy() for part in (time, series, predicted))
    held_time, truth = time[-HELD_OUT:], series[-HELD_OUT:]
    figure = Figure(figsize=(9, 8), layout="constrained")
    whole, zoom, error = figure.subplots(3, 1, height_ratios=(2, 3, 2))
    figure.suptitle("One-step forecast of a cosine by 200 linear recurrent units")

    whole.plot(time, series, color="tab:blue", linewidth=1)
    whole.axvspan(held_time[0], held_time[-1], color="tab:orange", alpha=0.25, label="validation")
    whole.set(ylabel="cos t", xlim=(time[0], time[-1]), ylim=(-1.2, 1.7))
    whole.legend(loc="upper right", framealpha=1)

    zoom.plot(held_time, truth, color="tab:blue", linewidth=4, alpha=0.4, label="truth")
    zoom.plot(held_time[::8], predicted[::8], ".", color="black", markersize=5, label="prediction")
    zoom.set(title="validation (every 8th prediction drawn)", ylabel="cos t", ylim=(-1.2, 1.5))
    zoom.legend(loc="upper right", ncols=2, framealpha=1)

    error.axhline(0, color="grey", linewidth=0.8)
    error.plot(held_time, predicted - truth, color="tab:red", linewidth=1)
    error.set(ylabel="prediction - truth", xlabel="t")
    error.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (zoom, error):
        axes.set_xlim(held_time[0], held_time[-1])
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    time = torch.linspace(FIRST, LAST, POINTS, dtype=torch.float64)
    series = time.cos().float()
    windows = series.to(args.device).unfold(0, args.window + 1, 1)
    x, y = windows[:, :-1].unsqueeze(2), windows[:, -1:]
    print(f"{len(x)} windows of {args.window} points; the last {HELD_OUT} validate")

    model, ours = train(False, x, y, args)
    with torch.no_grad():
        predicted = model(x[-HELD_OUT:]).squeeze(1).cpu()
    path = args.out / "forecast_cosine.png"
    plot(time, series, predicted, path)
    print(f"plot: {path}")
    if args.stock:
        # In float32 a state of 200 units predicts to about 1e-5; 1e-7 is the square of 3e-4.
        return 0 if same_curve(ours, train(True, x, y, args)[1], floor=1e-7) else 1
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    add = options.add_argument
    add("--stock", action="store_true", help="train a torch loop too; exit 1 if losses differ")
    add("--window", type=int, default=500, help="points read before the one predicted")
    add("--hidden", type=int, default=200)
    add("--batch", type=int, default=100)
    add("--epochs", type=int, default=10)
    add("--lr", type=float, default=1e-3)
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    options.set_defaults(out=Path(__file__).parent / "out")  # here for the plot
    return options.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
