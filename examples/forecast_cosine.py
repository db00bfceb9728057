"""Predict the next point of a cosine with a linear recurrent layer.

Many to one: the layer reads a window of 500 points and its last state gives the 501st.

    h_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh      200 linear units, h_0 = 0
    x_{501} is predicted as w . h_500 + b

This is the network of Elman 1990 with the identity instead of tanh. A cosine sampled at a spacing
of d obeys x_{t+1} = 2 cos(d) x_t - x_{t-1}, so a linear recurrence is sufficient.

fastrnn.RNN supports nonlinearity="identity", torch.nn.RNN does not: with ``--stock`` a loop of
torch operations is trained instead.

    python examples/forecast_cosine.py --plot
    python examples/forecast_cosine.py --stock
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import Runs, Training, batches, new_figure, run, trainer, update
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import linear, mse_loss

import fastrnn

TIME = torch.linspace(1, 100, 3000, dtype=torch.float64)
SERIES = TIME.cos().float()
HELD_OUT = 500  # windows at the end, for validation


class LoopRNN(torch.nn.RNN):
    """A linear recurrent layer in plain torch, with RNN's parameters and their initial values."""

    def forward(self, x: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        h = x.new_zeros(x.shape[0], self.hidden_size)
        for from_input in linear(x, self.weight_ih_l0, self.bias_ih_l0).unbind(1):
            h = from_input + linear(h, self.weight_hh_l0, self.bias_hh_l0)
        return None, h.unsqueeze(0)  # the example only needs the last output


class Forecaster(torch.nn.Module):
    """Recurrent layer and a linear layer on its last state."""

    def __init__(self, library: Any, hidden: int) -> None:
        super().__init__()
        if library is torch.nn:
            self.recurrent = LoopRNN(1, hidden, batch_first=True)
        else:
            self.recurrent = fastrnn.RNN(1, hidden, nonlinearity="identity", batch_first=True)
        self.linear = torch.nn.Linear(hidden, 1)

    def forward(self, windows: Tensor) -> Tensor:
        _, last = self.recurrent(windows)
        return self.linear(last[0])


def train(library: Any, variant: str, args: argparse.Namespace) -> Training:
    # A linear recurrence multiplies by W_hh at every step: with an eigenvalue beyond 1 the state
    # grows like its 500th power. torch's initial values put the largest near 0.58, and at this
    # learning rate training moves it to about 0.95, without crossing 1. With an orthogonal initial
    # W_hh, whose eigenvalues all lie at 1, Adam's first steps cross it and the loss becomes
    # infinite. Clipping keeps the large gradients of the first batches out of Adam's averages.
    windows = SERIES.to(args.device).unfold(0, args.window + 1, 1)
    x, y = windows[:, :-1].unsqueeze(2), windows[:, -1:]
    model = Forecaster(library, args.hidden).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    for batch in batches(len(x) - HELD_OUT, args):
        yield update(mse_loss(model(x[batch]), y[batch]), optimizer, args.clip)
    with torch.no_grad():
        predicted = model(x[-HELD_OUT:])
    last, truth = x[-HELD_OUT:, -1], y[-HELD_OUT:]
    return {
        "error": mse_loss(predicted, truth).sqrt().item(),
        "error of the last point": mse_loss(last, truth).sqrt().item(),
        "predicted": predicted.squeeze(1).tolist(),
    }


def draw(runs: Runs) -> Figure:
    """Draw the series, a close-up of the validation part, and the error there."""
    time, series = TIME.numpy(), SERIES.numpy()
    held_time, truth = time[-HELD_OUT:], series[-HELD_OUT:]
    predicted = torch.tensor(runs["linear"]["fastrnn"]["predicted"]).numpy()
    figure, (whole, zoom, error) = new_figure(3, height=8, height_ratios=(2, 3, 2))
    figure.suptitle("One-step forecast of a cosine by linear recurrent units")

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
    return figure


def main(argv: list[str] | None = None) -> int:
    options = trainer(
        __doc__,
        updates=200,
        window=(500, "points read before the one predicted"),
        hidden=200,
        batch=100,
        lr=1e-3,
        clip=1.0,
    )
    # In float32 a state of 200 units predicts to about 1e-5; the floor, 1e-7, is 3e-4 squared.
    return run(__file__, options.parse_args(argv), train, ["linear"], draw, floor=1e-7)


if __name__ == "__main__":
    raise SystemExit(main())
