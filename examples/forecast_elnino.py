"""Forecast the sea temperature off Peru a year ahead: El Nino, from the previous months.

Many to many: after every month the network forecasts the next twelve at once.

    h_t = GRU(x_t, h_{t-1})                   x_t: temperature of month t, standardised
    (x_{t+1}, ..., x_{t+12}) ~ W h_t + b      trained on the squared error of all twelve

Forecasting all steps at once with one model is the "MIMO" strategy of Ben Taieb et al. 2012,
arXiv:1108.3259. The series is real: sea surface temperature at the coast of Peru in degrees
Celsius, monthly from 1950 to 2010, as included in statsmodels. The last fifteen years are held out:
a forecast is made from each of their months, using only the data up to it. It has to beat

    seasonal naive      the same month of the previous year
    calendar mean       the mean of that month over the training years
    fading anomaly      the calendar mean plus r^k (x_t - its calendar mean), k months ahead, with
                        the r that is best over the training years: what remains of El Nino

    python examples/forecast_elnino.py --plot
"""

from __future__ import annotations

import argparse
from functools import cache
from typing import Any

import torch
from common import COLOURS, Runs, Training, in_package, new_figure, run, trainer, update
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import mse_loss

AHEAD, FIRST_YEAR = 12, 1950
HELD_OUT = 15 * 12  # months at the end


@cache
def temperatures() -> Tensor:
    lines = in_package("statsmodels", "datasets/elnino/elnino.csv").read_text("utf-8").splitlines()
    return torch.tensor([[float(x) for x in line.split(",")[1:]] for line in lines[1:]]).flatten()


def following(series: Tensor) -> Tensor:
    """Return in row t the AHEAD values after series[t]."""
    return series[1:].unfold(0, AHEAD, 1)


class Forecaster(torch.nn.Module):
    """A recurrent layer and a linear one, with AHEAD forecasts at every step."""

    def __init__(self, library: Any, cell: str, hidden: int) -> None:
        super().__init__()
        self.recurrent = getattr(library, cell.upper())(1, hidden)
        self.linear = torch.nn.Linear(hidden, AHEAD)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.recurrent(x.unsqueeze(-1))[0])


def train(library: Any, cell: str, args: argparse.Namespace) -> Training:
    series = temperatures().to(args.device)
    known = series[:-HELD_OUT]
    mean, spread = known.mean(), known.std()
    windows = ((known - mean) / spread).unfold(0, args.window + AHEAD, 1)
    model = Forecaster(library, cell, args.hidden).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.updates)
    for _ in range(args.updates):
        chosen = windows[torch.randint(len(windows), (args.batch,))].t()
        x = chosen[: args.window]
        # Without noise the network would memorise the few training years.
        forecast = model(x + args.noise * torch.randn(x.shape).to(x.device))
        # During the first year the network has too little history.
        loss = mse_loss(forecast[AHEAD:], following(chosen)[AHEAD:])
        yield update(loss, optimizer, args.clip)
        schedule.step()
    with torch.no_grad():
        forecast = model((series - mean).unsqueeze(1) / spread).squeeze(1) * spread + mean
    made = slice(len(known) - 1, -AHEAD)  # only forecasts of held-out months
    months = {
        "error": forecast[made],
        "seasonal naive": torch.cat([series[:AHEAD], series]).unfold(0, AHEAD, 1)[1:][made],
        **{name: x[made] for name, x in of_the_calendar(series, len(known)).items()},
    }
    errors = {name: (x - following(series)[made.start :]).square() for name, x in months.items()}
    return {
        **{name: error.mean().sqrt().item() for name, error in errors.items()},
        "by month": {name: error.mean(0).sqrt().tolist() for name, error in errors.items()},
        "forecasts": forecast[made][::AHEAD].tolist(),
    }


def of_the_calendar(series: Tensor, known: int) -> dict[str, Tensor]:
    """Forecast by the mean of each month, and with the current anomaly fading away."""
    mean = series[:known].view(-1, 12).mean(0).repeat(len(series) // 12 + 2)
    calendar = following(mean)[: len(series)]
    anomaly = (series - mean[: len(series)]).unsqueeze(1)
    rates = torch.linspace(0, 1, 101, device=series.device)
    months = torch.arange(1, AHEAD + 1, device=series.device)
    faded = [calendar + anomaly * rate**months for rate in rates]
    truth = following(series[:known])
    best = min(faded, key=lambda x: mse_loss(x[: len(truth)], truth).item())
    return {"calendar mean": calendar, "fading anomaly": best}


def draw(runs: Runs) -> Figure:
    figure, (track, error) = new_figure(2, height=7.5)
    best = min(runs, key=lambda cell: runs[cell]["fastrnn"]["error"])
    series = temperatures().tolist()
    year = [FIRST_YEAR + month / 12 for month in range(len(series))][-HELD_OUT:]
    track.plot(year, series[-HELD_OUT:], color="black", linewidth=1, label="measured")
    for i, forecast in enumerate(runs[best]["fastrnn"]["forecasts"]):
        part = slice(AHEAD * i, AHEAD * (i + 1))
        label = f"{best.upper()}, twelve months from each January" if i == 0 else None
        track.plot(year[part], forecast, color=COLOURS[best], linewidth=2, label=label)
    track.set(title="The sea off Peru, years held out", ylabel="°C", xlim=(year[0], year[-1]))
    track.legend(ncols=2, loc="upper right")

    ahead = range(1, AHEAD + 1)
    first = next(iter(runs.values()))["fastrnn"]["by month"]
    styles = {"seasonal naive": "-", "calendar mean": "--", "fading anomaly": ":"}
    for name, style in styles.items():
        error.plot(ahead, first[name], style, color="tab:grey", linewidth=2, label=name)
    for cell, of in runs.items():
        by_month = of["fastrnn"]["by month"]["error"]
        error.plot(ahead, by_month, "o-", color=COLOURS[cell], label=cell.upper())
    error.set(title="Error of the forecasts", xlabel="months ahead", ylabel="RMSE in °C")
    error.set(ylim=(0, None), xticks=ahead)
    error.legend(ncols=2, loc="lower right")
    return figure


def main(argv: list[str] | None = None) -> int:
    window = (60, "months in a sequence of training")
    noise = (0.1, "added to the input in training, in standard deviations")
    options = trainer(
        __doc__, updates=600, hidden=24, batch=32, window=window, noise=noise, lr=5e-3, clip=1.0
    )
    args = options.parse_args(argv)
    if args.window <= AHEAD:
        options.error(f"--window must be more than {AHEAD}, got {args.window}")
    # Rounding: torch.nn's own RNN, started with weights 2e-8 off, also differs by 1.4e-2.
    return run(__file__, args, train, list(COLOURS), draw, loose=5e-2)


if __name__ == "__main__":
    raise SystemExit(main())
