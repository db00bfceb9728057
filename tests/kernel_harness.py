"""Run a layer by the Triton kernels, in the interpreter, and by the reference, on the same numbers.

The kernels take the input's projection and give the gradients of the gates. The GEMMs before and
after them are done here, the latter in float64, so that a whole layer is compared: output, states
and every gradient. The oracle is `reference.layer` in float64 with autograd; it is also run in the
dtype under test, for the error that torch makes there (see compare.py).

Results go by names: y, h_n, c_n; trace, which is c after every step; saved; and d_ of an input.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from compare import assert_accurate
from cooperative import cooperative
from torch import Tensor
from torch.nn.functional import linear

from fastrnn import reference
from fastrnn.cells import Weights
from fastrnn.kernels import launch
from fastrnn.kernels.cells import Cell
from fastrnn.kernels.configs import Config

#: The schedules, the persistent one by its protocols.
MODES = ("resident", "flag", "counter", "stepwise")


@dataclass(frozen=True)
class Layer:
    """A problem; its numbers follow from it."""

    cell: Cell
    steps: int = 3
    batch: int = 3
    hidden: int = 7
    directions: int = 1
    dtype: torch.dtype = torch.float32
    bias: bool = True
    state: bool = True
    dy: bool = True


class Numbers(NamedTuple):
    """Input and its projection, initial states, weights of each direction, cotangents."""

    x: Tensor
    wx: Tensor
    initial: list[Tensor]
    weights: list[Weights]
    dy: Tensor | None
    d_final: list[Tensor]


def tiled(
    mode: str, hidden: int, slices: int = 2, *, block_b: int = 4, block_k: int = 0, tiles: int = 99
) -> Config:
    """A configuration of so many slices, its tiles by default far smaller than a GPU's."""
    whole, part = (1 << (n - 1).bit_length() for n in (hidden, -(-hidden // slices)))
    if mode == "resident":
        return Config(mode, "local", block_b, whole, whole, 4, tiles)
    kind = (mode, "local") if mode == "stepwise" else ("persistent", mode)
    return Config(*kind, block_b, part, block_k or whole, 4, tiles)


@functools.cache
def draw(layer: Layer) -> Numbers:
    """Random numbers in the layer's dtype; the weights are so small that errors do not grow."""
    generator = torch.Generator().manual_seed(layer.hidden)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(layer.dtype)

    hidden, inputs, rows = layer.hidden, 5, layer.cell.n_gates * layer.hidden
    sequence, state = (layer.steps, layer.batch), (layer.directions, layer.batch, hidden)
    x = random(*sequence, inputs)
    weights = [
        Weights(
            random(rows, inputs, scale=0.4),
            random(rows, hidden, scale=0.8 * hidden**-0.5),
            *(random(rows, scale=0.5) for _ in range(2 * layer.bias)),
        )
        for _ in range(layer.directions)
    ]
    return Numbers(
        x,
        torch.stack([linear(x, w.w_ih, w.b_ih) for w in weights]),
        [random(*state, scale=float(layer.state)) for _ in range(layer.cell.n_states)],
        weights,
        random(*sequence, layer.directions * hidden) if layer.dy else None,
        [random(*state) for _ in range(layer.cell.n_states)],
    )


def convert(numbers: Numbers, dtype: torch.dtype) -> Numbers:
    """A copy in another dtype."""

    def to(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.to(dtype, copy=True)

    x, wx, initial, weights, dy, d_final = numbers
    weights = [Weights(*map(to, w[:4])) for w in weights]
    return Numbers(to(x), to(wx), [*map(to, initial)], weights, to(dy), [*map(to, d_final)])


def by_reference(layer: Layer, numbers: Numbers, dtype: torch.dtype) -> dict[str, Tensor]:
    """All results, by autograd."""
    numbers = convert(numbers, dtype)
    leaves = {"x": numbers.x, **named(numbers.initial, "{}_0")}
    for d, w in enumerate(numbers.weights):
        leaves |= {f"{name}_{d}": part for name, part in weights_of(w).items()}
    for leaf in leaves.values():
        leaf.requires_grad_()

    def run(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        weights = [part for w in numbers.weights for part in weights_of(w).values()]
        initial, bidirectional = numbers.initial, layer.directions == 2
        y, final, _ = reference.layer(layer.cell.name, x, initial, weights, None, bidirectional)
        return y, final

    y, final = run(numbers.x)
    outputs, cotangents = [*final], [*numbers.d_final]
    if numbers.dy is not None:
        outputs, cotangents = [*outputs, y], [*cotangents, numbers.dy]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    results = {"y": y, **named(final, "{}_n")}
    results |= {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    with torch.no_grad():
        if layer.cell.n_states == 2:
            # c after step t is the last of a shorter sequence.
            shorter = ((numbers.x[: t + 1], numbers.x[t:]) for t in range(layer.steps))
            cs = [(run(begin)[1][1], run(end)[1][1]) for begin, end in shorter]
            results["trace"] = torch.stack([torch.cat([c[0], *late[1:]], -1) for c, late in cs])
        if layer.cell.name in SAVED:
            wx, rh = (gates.chunk(layer.cell.n_gates, dim=-1) for gates in recompute(numbers, y))
            results["saved"] = torch.cat(SAVED[layer.cell.name](wx, rh), dim=-1)
    return {name: tensor.detach() for name, tensor in results.items()}


def weights_of(weights: Weights) -> dict[str, Tensor]:
    """The weights that there are, by name."""
    return {name: part for name, part in weights._asdict().items() if isinstance(part, Tensor)}


def named(states: Sequence[Tensor], form: str) -> dict[str, Tensor]:
    return {form.format(name): state for name, state in zip("hc", states, strict=False)}


def recompute(numbers: Numbers, y: Tensor) -> tuple[Tensor, Tensor]:
    """The input part and the recurrent part of the gates with their biases, (D, T, B, G * H)."""
    wx = [linear(numbers.x, w.w_ih, w.b_ih) for w in numbers.weights]
    befores = zip(numbers.weights, h_before(numbers, y), strict=True)
    return torch.stack(wx), torch.stack([linear(h, w.w_hh, w.b_hh) for w, h in befores])


def h_before(numbers: Numbers, y: Tensor) -> list[Tensor]:
    """h before every step of each direction, (T, B, H)."""
    h_0 = numbers.initial[0]
    first, *second = y.chunk(len(h_0), dim=-1)
    return [torch.cat([h_0[:1], first[:-1]]), *(torch.cat([h[1:], h_0[1:]]) for h in second)]


def _saved_lstm(wx: Sequence[Tensor], rh: Sequence[Tensor]) -> list[Tensor]:
    i, f, g, o = (a + b for a, b in zip(wx, rh, strict=True))
    return [i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()]


def _saved_gru(wx: Sequence[Tensor], rh: Sequence[Tensor]) -> list[Tensor]:
    r, z = torch.sigmoid(wx[0] + rh[0]), torch.sigmoid(wx[1] + rh[1])
    return [r, z, torch.tanh(wx[2] + r * rh[2]), rh[2]]


#: The activations that a cell saves, from the two parts of its gates.
SAVED: dict[str, Callable[..., list[Tensor]]] = {"lstm": _saved_lstm, "gru": _saved_gru}


def by_kernels(
    layer: Layer,
    numbers: Numbers,
    config: Config,
    backward_config: Config | None = None,
    *,
    seed: int = 0,
    save: bool = True,
) -> dict[str, Tensor]:
    """What the kernels return: like `by_reference`, but d_gates is not multiplied out.

    Without `save`, backward computes the activations again. Checks that both leave what they are
    given as it was.
    """
    initial, (r, b) = numbers.initial, stacked(numbers)
    with unchanged(numbers.wx, r, b, initial), cooperative(seed):
        y, traces, saved, final = launch.forward(
            layer.cell, numbers.wx, r, b, initial, config, "ieee", traced=True, save=save
        )
    past = saved if save else recompute(numbers, y)
    given = numbers.dy, numbers.d_final, r, initial, y, traces, past
    with unchanged(*given), cooperative(seed):
        config = backward_config or config
        d_gates, d_initial, _ = launch.backward(layer.cell, *given, config, "ieee")
    assert {part.dtype for part in (y, *final, d_gates, *d_initial)} == {layer.dtype}
    results = {"y": y, **named(final, "{}_n"), "d_gates": d_gates, **named(d_initial, "d_{}_0")}
    if traces:
        assert traces[0].dtype == torch.float32
        results["trace"] = traces[0]
    return results | ({"saved": saved} if save and layer.cell.n_saved else {})


def stacked(numbers: Numbers) -> tuple[Tensor, Tensor | None]:
    """The recurrent weights and their bias as the kernels take them."""
    r = torch.stack([w.w_hh for w in numbers.weights])
    bs = [w.b_hh for w in numbers.weights if w.b_hh is not None]
    return r, torch.stack(bs) if bs else None


@contextlib.contextmanager
def unchanged(*arguments: Tensor | Iterable[Tensor] | None) -> Iterator[None]:
    """Check that a call leaves all bits of what it is given."""
    tensors = [
        tensor
        for argument in arguments
        for tensor in ([argument] if isinstance(argument, Tensor) else argument or ())
    ]
    before = [tensor.clone() for tensor in tensors]
    yield
    assert all(map(same_bits, tensors, before))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, where a NaN is equal to itself."""
    integer = {2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    return a.dtype == b.dtype and a.view(integer).equal(b.view(integer))


def whole(layer: Layer, numbers: Numbers, results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Multiply d_gates out, in float64; everything rounded to the layer's dtype."""
    exact, results = convert(numbers, torch.float64), dict(results)
    width, apart = layer.cell.n_gates * layer.hidden, layer.cell.n_apart * layer.hidden
    d_gates = results.pop("d_gates").double()
    d_rh = d_gates[..., :width]
    d_wx = torch.cat([d_rh[..., : width - apart], d_gates[..., width:]], dim=-1)
    results["d_x"] = torch.zeros_like(exact.x)
    befores = h_before(exact, results["y"].double())
    for d, (w, h) in enumerate(zip(exact.weights, befores, strict=True)):
        results["d_x"] += d_wx[d] @ w.w_ih
        results[f"d_w_ih_{d}"] = torch.einsum("tbg,tbi->gi", d_wx[d], exact.x)
        results[f"d_w_hh_{d}"] = torch.einsum("tbg,tbh->gh", d_rh[d], h)
        if w.b_ih is not None:
            results[f"d_b_ih_{d}"] = d_wx[d].sum((0, 1))
            results[f"d_b_hh_{d}"] = d_rh[d].sum((0, 1))
    return {name: tensor.to(layer.dtype) for name, tensor in results.items()}


@functools.cache
def expected(layer: Layer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The layer's results by torch in its dtype, and the exact ones."""
    by_torch, exact = (
        by_reference(layer, draw(layer), dtype) for dtype in (layer.dtype, torch.float64)
    )
    return by_torch, exact


def assert_right(layer: Layer, results: dict[str, Tensor], what: object = "") -> None:
    """Compare all that the kernels returned for the numbers of `draw` with the oracle."""
    mine = whole(layer, draw(layer), results)
    by_torch, exact = (
        {name: tensor for name, tensor in theirs.items() if name in mine or name != "saved"}
        for theirs in expected(layer)
    )
    assert_accurate(mine, by_torch, exact, f"{layer} {what}")


def check(layer: Layer, *configs: Config, **options: object) -> dict[str, Tensor]:
    """Run the kernels and compare with the oracle."""
    results = by_kernels(layer, draw(layer), *configs, **options)
    assert_right(layer, results, f"{configs} {options}")
    return results
