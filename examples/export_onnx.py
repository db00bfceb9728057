"""Export a model to ONNX: convert a copy of it to torch.nn's layers, then call torch's exporter.

A small network is trained to repeat its input three steps later, then exported once for all lengths
and batch sizes, with the state as input and output, so that the same file serves whole sequences
and streams:

    h_t, c_t = LSTM(x_t, h_{t-1}, c_{t-1})          y_t = W h_t + b, trained to be x_{t-3}

torch's exporter translates torch.nn's layers to the operator LSTM of ONNX
(github.com/onnx/onnx/blob/main/docs/Operators.md). It does not know fastrnn's, hence the copy:
`fastrnn.to_torch` changes classes only and keeps the parameters. The exporter that records traces
(``dynamo=False``) keeps T and B variable; torch 2.13's default one writes the T of the example into
the file, for torch.nn's layers too.

The file runs in onnxruntime at other sizes than those of the export, and chunk by chunk; all
results must be those of fastrnn.

    pip install ".[examples,others]"
    python examples/export_onnx.py --out exported
"""

from __future__ import annotations

import copy
import io
import warnings
from importlib.util import find_spec
from typing import Any

import torch
from common import parser, save, seconds_each, update
from torch import Tensor

import fastrnn

DELAY, WIDTH, CHUNK = 3, 4, 5
NAMES = ("x", "h", "c")


class Echo(torch.nn.Module):
    """Recurrent layers whose state is an argument and a result."""

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        self.recurrent = fastrnn.LSTM(WIDTH, hidden, layers)
        self.linear = torch.nn.Linear(hidden, WIDTH)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output, (h, c) = self.recurrent(x, (h, c))
        return self.linear(output), h, c

    def arguments(self, steps: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """A random input, and the state that a sequence begins with."""
        sizes = self.recurrent.num_layers, batch, self.recurrent.hidden_size
        return torch.randn(steps, batch, WIDTH), torch.zeros(sizes), torch.zeros(sizes)


def train(model: Echo, updates: int, lr: float) -> float:
    """Returns the last loss; that of a network that remembers nothing is 1."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    loss = torch.ones(())
    for _ in range(updates):
        x, *state = model.arguments(30, 16)
        error = model(x, *state)[0][DELAY:] - x[:-DELAY]
        loss = update(error.square().mean(), optimizer, 1.0)
    return loss.item()


def export(model: torch.nn.Module, arguments: tuple[Tensor, ...]) -> bytes:
    """Make an ONNX file; the model itself stays as it is."""
    model = copy.deepcopy(model).eval()
    report = fastrnn.to_torch(model)
    if report.kept:
        raise ValueError(f"torch.nn does not have all layers of this model: {report}")
    states = {f"{name}{after}": {1: "B"} for name in NAMES[1:] for after in ("", "_n")}
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter says that it is the older one
        torch.onnx.export(
            model,
            arguments,
            file,
            dynamo=False,
            input_names=list(NAMES),
            output_names=["y", "h_n", "c_n"],
            dynamic_axes={"x": {0: "T", 1: "B"}, "y": {0: "T", 1: "B"}, **states},
        )
    return file.getvalue()


def by_runtime(session: Any, *arguments: Tensor) -> list[Tensor]:
    given = {name: value.numpy() for name, value in zip(NAMES, arguments, strict=True)}
    return [torch.from_numpy(result) for result in session.run(None, given)]


def in_chunks(session: Any, x: Tensor, *state: Tensor) -> list[Tensor]:
    """The same results, from a call for every few steps."""
    outputs, following = [], list(state)
    for chunk in x.split(CHUNK):
        y, *following = by_runtime(session, chunk, *following)
        outputs.append(y)
    return [torch.cat(outputs), *following]


def main(argv: list[str] | None = None) -> int:
    options = parser(
        __doc__, updates=300, hidden=64, layers=(1, "recurrent layers"), lr=1e-2, steps=50
    )
    args = options.parse_args(argv)
    if missing := [name for name in ("onnx", "onnxruntime") if not find_spec(name)]:
        options.error(f'{" and ".join(missing)} not installed: pip install ".[others]"')
    import onnxruntime

    torch.manual_seed(args.seed)
    model = Echo(args.hidden, args.layers)
    loss = train(model, args.updates, args.lr)
    file = export(model, model.arguments(7, 2))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "echo.onnx").write_bytes(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    errors = {}
    with torch.no_grad():
        for steps, batch in ((1, 1), (7, 2), (args.steps, 5)):
            arguments = model.arguments(steps, batch)
            expected = model(*arguments)
            for name, way in (("one call", by_runtime), ("chunks", in_chunks)):
                pairs = zip(way(session, *arguments), expected, strict=True)
                error = max((a - b).abs().max().item() for a, b in pairs)
                errors[f"T = {steps}, B = {batch}, {name}"] = error
        arguments = model.arguments(args.steps, 1)
        ways = (lambda: model(*arguments)), (lambda: by_runtime(session, *arguments))
        ours, runtime = (1e6 * s for s in seconds_each("cpu", 50, *ways))
    for name, error in errors.items():
        print(f"{name}: largest difference {error:.1e}")
    print(f"loss {loss:.3f}; file of {len(file)} bytes")
    print(f"{args.steps} steps, B = 1: fastrnn {ours:.0f} us, onnxruntime {runtime:.0f} us")
    times = {"fastrnn": ours, "onnxruntime": runtime}
    save(args.out, "export_onnx", {"loss": loss, "errors": errors, "microseconds": times})
    return 0 if max(errors.values()) <= 1e-5 else 1


if __name__ == "__main__":
    raise SystemExit(main())
