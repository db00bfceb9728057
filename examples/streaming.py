"""A live stream: audio features go through an LSTM and a GRU as they arrive.

A frame arrives every 10 ms, and its answer is due before the next one. The layer is therefore not
called on a sequence, but on blocks of one or a few frames, each from the state after the last:

    y_k, s_k = layer(x_k, s_{k-1})        pieces of    y, s = layer([x_1 ... x_K], s_0)

Such a call is short, so the overhead beyond the products matters: checks, allocations, waking up
threads, reordering weights. The example times each call of fastrnn, torch.nn and, where installed
(pip install ".[others]"), onnxruntime, whose model takes the state as an input and returns
the next one, copied back. All must produce the output of torch.nn for all frames in a single call.

Each library runs its own loop, call after call: the best case for all of them, as threads stay
awake and caches warm. The slowest call in a hundred (p99) says as much about the machine as about
the library.

    python examples/streaming.py --hidden 512 --layers 2
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median, quantiles

import torch
from common import parser, save
from torch import Tensor

import fastrnn
from fastrnn.bench.others import onnx_model, onnxruntime_call

RATE, HOP, BANDS = 16000, 160, 40  # samples per second; samples per frame; features per frame
WARM_UP = 20  # untimed calls
PAUSE = 0.1  # seconds for the last library's threads to go to sleep

Step = Callable[[Tensor], Tensor]


def frames(steps: int) -> Tensor:
    """Make spectra (steps, 1, BANDS) of a noisy tone that rises and falls."""
    t = torch.arange(steps * HOP) / RATE
    sound = torch.sin(2000 * torch.sin(2 * t)) + 0.1 * torch.randn_like(t)
    window = torch.hann_window(2 * BANDS)
    spectra = torch.stft(sound, 2 * BANDS, HOP, window=window, return_complex=True)
    features = spectra.abs()[1:, :steps].t().add(1e-3).log()
    return ((features - features.mean()) / features.std()).unsqueeze(1)


def by_module(module: torch.nn.RNNBase) -> Step:
    state = None

    def step(block: Tensor) -> Tensor:
        nonlocal state
        y, state = module(block, state)
        return y

    return step


def by_onnxruntime(module: torch.nn.RNNBase, size: int) -> Step:
    x = torch.zeros(size, 1, BANDS)
    names = ("h0", "c0") if module.mode == "LSTM" else ("h0",)
    state = {name: torch.zeros(module.num_layers, 1, module.hidden_size) for name in names}
    model = onnx_model(module, size, 1, has_state=True)
    call, (y, *following) = onnxruntime_call(model, {"x": x, **state})

    def step(block: Tensor) -> Tensor:
        x.copy_(block)
        call()
        for old, new in zip(state.values(), following, strict=True):
            old.copy_(new)
        return y.squeeze(1)

    return step


def stream(step: Step, blocks: tuple[Tensor, ...]) -> tuple[Tensor, list[float]]:
    """Return the output of all steps, and the seconds of each call."""
    outputs, seconds = [], []
    for block in blocks:
        start = time.perf_counter()
        y = step(block)
        seconds.append(time.perf_counter() - start)
        outputs.append(y.clone())  # a runtime overwrites its output with the next one
    return torch.cat(outputs), seconds[WARM_UP:]


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__, steps=(1000, "frames of the stream"), hidden=256, layers=1)
    args = options.parse_args(argv)
    torch.manual_seed(args.seed)
    x = frames(args.steps)
    has_runtime = all(find_spec(package) for package in ("onnx", "onnxruntime"))
    if not has_runtime:
        print("onnx and onnxruntime are not installed, so there is only torch.nn to compare with")
    figures, worst = {}, 0.0
    for cell in ("LSTM", "GRU"):
        stock = getattr(torch.nn, cell)(BANDS, args.hidden, args.layers)
        ours = getattr(fastrnn, cell)(BANDS, args.hidden, args.layers)
        ours.load_state_dict(stock.state_dict())
        whole, _ = stock(x)
        for size in (1, 4):
            ways = {"fastrnn": by_module(ours), "torch.nn": by_module(stock)}
            if has_runtime:
                ways["onnxruntime"] = by_onnxruntime(stock, size)
            for name, step in ways.items():
                time.sleep(PAUSE)
                y, seconds = stream(step, x.split(size))
                *_, p99 = quantiles((1e6 * s for s in seconds), n=100, method="inclusive")
                middle = 1e6 * median(seconds)
                error = (y - whole).abs().max().item()
                worst = max(worst, error)
                figures[f"{cell}, {size} frames, {name}"] = {"median": middle, "p99": p99}
                print(
                    f"{cell:5}{size} frame{'s' * (size > 1):2}{name:12}"
                    f"{middle:8.1f} us a call, p99 {p99:8.1f} us, error {error:.0e}"
                )
    save(args.out, "streaming", {"microseconds": figures, "error": worst})
    same = worst <= 1e-5
    print("all the same output" if same else "outputs DIFFER")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
