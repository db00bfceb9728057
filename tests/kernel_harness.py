"""Run a layer with the Triton kernels and with the reference, on the same numbers.

The kernels take the projected input and return the gradients of the gates. The GEMMs before and
after them run here, the latter in float64, so a whole layer is compared: output, states and every
gradient. The oracle is `reference.layer` in float64 with autograd; it also runs in the dtype under
test, to measure the error torch makes there (see compare.py).

Results are named y, h_n, c_n; trace_c, which is c after every step; saved; and d_ plus an input.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from compare import assert_accurate
from torch import Tensor
from torch.nn.functional import linear
from triton.runtime import interpreter

from fastrnn import reference
from fastrnn.call import Call, Weights
from fastrnn.cells import Cell
from fastrnn.kernels import launch
from fastrnn.kernels.configs import Config

#: The schedules that Triton's interpreter runs; it cannot run the persistent one, in Gluon.
MODES = ("resident", "stepwise")


@dataclass(frozen=True)
class Layer:
    """A problem, which determines its numbers."""

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
    """Input and its projection, initial states, weights of each direction, and cotangents."""

    x: Tensor
    wx: Tensor
    initial: list[Tensor]
    weights: list[Weights]
    dy: Tensor | None
    d_final: list[Tensor]


def tiled(
    mode: str, hidden: int, slices: int = 2, *, block_b: int = 4, block_k: int = 0, tiles: int = 99
) -> Config:
    """A configuration with `slices` slices; by default, tiles are far smaller than a GPU's."""
    whole, part = (1 << (n - 1).bit_length() for n in (hidden, -(-hidden // slices)))
    if mode == "resident":
        return Config(mode, block_b, whole, whole, 4, 0, tiles)
    return Config(mode, block_b, part, block_k or whole, 4, 0, tiles)


@functools.cache
def draw(layer: Layer) -> Numbers:
    """Random numbers in the layer's dtype; weights are small enough that errors do not grow."""
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
            extras=tuple(random(e.blocks * hidden, scale=0.5) for e in layer.cell.extras),
        )
        for _ in range(layer.directions)
    ]
    initial = [random(*state, scale=float(layer.state)) for _ in range(layer.cell.n_states)]
    return Numbers(
        x,
        torch.stack([linear(x, w.w_ih, w.b_ih) for w in weights]),
        as_states(layer.cell, initial) if layer.state else initial,
        weights,
        random(*sequence, layer.directions * hidden) if layer.dy else None,
        [random(*state) for _ in range(layer.cell.n_states)],
    )


def as_states(cell: Cell, drawn: Sequence[Tensor]) -> list[Tensor]:
    """Turn random numbers into valid states of a cell: n is at least 1."""
    pairs = zip(cell.states, drawn, strict=False)
    return [part.abs() + 1 if name == "n" else part for name, part in pairs]


def convert(numbers: Numbers, dtype: torch.dtype) -> Numbers:
    """A copy in another dtype."""

    def to(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.to(dtype, copy=True)

    x, wx, initial, weights, dy, d_final = numbers
    weights = [Weights(*map(to, w[:4]), extras=tuple(map(to, w.extras))) for w in weights]
    return Numbers(to(x), to(wx), [*map(to, initial)], weights, to(dy), [*map(to, d_final)])


def by_reference(layer: Layer, numbers: Numbers, dtype: torch.dtype) -> dict[str, Tensor]:
    """All results, by autograd."""
    numbers = convert(numbers, dtype)
    leaves = {"x": numbers.x, **named(layer, numbers.initial, "{}_0")}
    for d, w in enumerate(numbers.weights):
        leaves |= {f"{name}_{d}": part for name, part in weights_of(w).items()}
    for leaf in leaves.values():
        leaf.requires_grad_()

    weights = [part for w in numbers.weights for part in weights_of(w).values()]
    y, final, traces = reference.layer(
        Call(layer.cell, numbers.x, numbers.initial, weights, bidirectional=layer.directions == 2)
    )
    outputs, cotangents = [*final], [*numbers.d_final]
    if numbers.dy is not None:
        outputs, cotangents = [*outputs, y], [*cotangents, numbers.dy]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    results = {"y": y, **named(layer, final, "{}_n"), **named(layer, ["", *traces], "trace_{}")}
    results |= {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    if layer.cell.n_saved:
        forward = reference.TORCH.bind(layer.cell.forward)
        previous = zip(*(before(numbers, [y, *traces], s) for s in range(len(final))), strict=True)
        saved = [
            torch.cat(
                forward(*(g.chunk(layer.cell.n_gates, -1) for g in gates), s, w.blocks())[1], -1
            )
            for *gates, s, w in zip(*recompute(numbers, y), previous, numbers.weights, strict=True)
        ]
        results["saved"] = torch.stack(saved)
    return {name: tensor.detach() for name, tensor in results.items()}


def weights_of(weights: Weights) -> dict[str, Tensor]:
    """The weights that are present, by name."""
    names = {name: part for name, part in weights._asdict().items() if isinstance(part, Tensor)}
    return names | {f"extra{k}": part for k, part in enumerate(weights.extras)}


def named(layer: Layer, states: Sequence[Tensor], form: str) -> dict[str, Tensor]:
    pairs = zip(layer.cell.states, states, strict=False)
    return {form.format(name): part for name, part in pairs if isinstance(part, Tensor)}


def recompute(numbers: Numbers, y: Tensor) -> tuple[Tensor, Tensor]:
    """The input and recurrent parts of the gates with their biases, (D, T, B, G * H)."""
    wx = [linear(numbers.x, w.w_ih, w.b_ih) for w in numbers.weights]
    befores = zip(numbers.weights, before(numbers, [y], 0), strict=True)
    return torch.stack(wx), torch.stack([linear(h, w.w_hh, w.b_hh) for w, h in befores])


def before(numbers: Numbers, sequences: Sequence[Tensor], s: int) -> list[Tensor]:
    """A state before every step of each direction, (T, B, H), from the state after every step."""
    start = numbers.initial[s]
    first, *second = sequences[s].chunk(len(start), dim=-1)
    return [torch.cat([start[:1], first[:-1]]), *(torch.cat([v[1:], start[1:]]) for v in second)]


def by_kernels(
    layer: Layer,
    numbers: Numbers,
    config: Config,
    backward_config: Config | None = None,
    *,
    save: bool = True,
) -> dict[str, Tensor]:
    """The kernels' results: like `by_reference`, but with d_gates instead of its products.

    Without `save`, backward recomputes the activations. Checks that forward and backward leave
    their arguments unchanged.
    """
    operands = operands_of(numbers)
    with unchanged(numbers.wx, *operands), as_on_a_device():
        y, traces, saved, final = launch.forward(
            layer.cell, config, "ieee", numbers.wx, operands, traced=True, save=save
        )
    past = launch.Past(y, traces, (saved,) if save else recompute(numbers, y))
    given = numbers.dy, numbers.d_final, ()
    with unchanged(*operands, *past, *given), as_on_a_device():
        config = backward_config or config
        d_gates, d_initial, _ = launch.backward(layer.cell, config, "ieee", operands, past, given)
    assert {part.dtype for part in (y, *final, d_gates, *d_initial)} == {layer.dtype}
    assert {part.dtype for part in traces} <= {torch.float32}
    results = {"y": y, "d_gates": d_gates, **named(layer, ["", *traces], "trace_{}")}
    results |= named(layer, final, "{}_n") | named(layer, d_initial, "d_{}_0")
    return results | ({"saved": saved} if save and layer.cell.n_saved else {})


@contextlib.contextmanager
def as_on_a_device() -> Iterator[None]:
    """Silence the interpreter's warnings about infinity and NaN, and patch it only once."""
    if not triton.knobs.runtime.interpret:
        yield
        return
    # By default it patches at each function call, which takes longer than everything else.
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    with contextlib.ExitStack() as undo:
        undo.callback(interpreter._patch_lang(everything).restore)
        nothing = SimpleNamespace(restore=lambda: None)
        undo.enter_context(mock.patch.object(interpreter, "_patch_lang", return_value=nothing))
        # As in triton 3.9; the version in 3.6 does not work with NumPy 2.4.
        undo.enter_context(mock.patch.object(tl.tensor, "__index__", _as_index))
        undo.enter_context(np.errstate(over="ignore", invalid="ignore"))
        yield


def _as_index(tensor: tl.tensor) -> int:
    return int(tensor.handle.data.squeeze())


def operands_of(numbers: Numbers) -> launch.Operands:
    """Weights and initial states in the layout that the kernels take."""

    def stacked(parts: Iterable[Tensor | None]) -> Tensor | None:
        found = [part for part in parts if part is not None]
        return torch.stack(found) if found else None

    ws = numbers.weights
    return launch.Operands(
        stacked(w.w_hh for w in ws),
        stacked(w.b_hh for w in ws),
        stacked(torch.cat(w.extras) if w.extras else None for w in ws),
        numbers.initial,
    )


@contextlib.contextmanager
def unchanged(*arguments: object) -> Iterator[None]:
    """Check that a call changes no bit of its tensor arguments, including those in sequences."""
    parts = [part for a in arguments for part in (a if isinstance(a, (list, tuple)) else [a])]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    before = [tensor.clone() for tensor in tensors]
    yield
    assert all(map(same_bits, tensors, before))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are bitwise equal, NaNs included."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return a.dtype == b.dtype and a.view(integer).equal(b.view(integer))


def whole(layer: Layer, numbers: Numbers, results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Multiply out d_gates in float64, then round everything to the layer's dtype."""
    exact, results = convert(numbers, torch.float64), dict(results)
    width, apart = layer.cell.n_gates * layer.hidden, layer.cell.n_apart * layer.hidden
    d_gates = results.pop("d_gates").double()
    d_rh = d_gates[..., :width]
    d_wx = torch.cat([d_rh[..., : width - apart], d_gates[..., width:]], dim=-1)
    results["d_x"] = torch.zeros_like(exact.x)
    sequences = [results["y"], *(results[f"trace_{name}"] for name in layer.cell.states[1:])]
    sequences = [part.double() for part in sequences]
    befores = [before(exact, sequences, s) for s in range(len(sequences))]
    for d, (w, h) in enumerate(zip(exact.weights, befores[0], strict=True)):
        results["d_x"] += d_wx[d] @ w.w_ih
        results[f"d_w_ih_{d}"] = torch.einsum("tbg,tbi->gi", d_wx[d], exact.x)
        results[f"d_w_hh_{d}"] = torch.einsum("tbg,tbh->gh", d_rh[d], h)
        if w.b_ih is not None:
            results[f"d_b_ih_{d}"] = d_wx[d].sum((0, 1))
            results[f"d_b_hh_{d}"] = d_rh[d].sum((0, 1))
        if w.extras:
            after = [part.chunk(layer.directions, dim=-1)[d] for part in sequences]
            d_extra = reference.TORCH.bind(layer.cell.d_extra)
            parts = d_extra(d_rh[d].chunk(layer.cell.n_gates, -1), after, [b[d] for b in befores])
            results[f"d_extra0_{d}"] = torch.cat([part.sum((0, 1)) for part in parts])
    return {name: tensor.to(layer.dtype) for name, tensor in results.items()}


@functools.cache
def expected(layer: Layer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Torch's results in the layer's dtype, and the exact ones."""
    by_torch, exact = (
        by_reference(layer, draw(layer), dtype) for dtype in (layer.dtype, torch.float64)
    )
    return by_torch, exact


def assert_right(layer: Layer, results: dict[str, Tensor], what: object = "") -> None:
    """Compare everything the kernels returned for the numbers of `draw` with the oracle."""
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


def check_nan(layer: Layer, bits: int, *configs: Config) -> None:
    """NaN in wx of row 1, h_0 of row 2 and dy of row 3 stays in those rows."""
    clean = draw(layer)
    dirty = convert(clean, layer.dtype)
    for part in (dirty.x[1, 1], dirty.wx[:, 1, 1], dirty.initial[0][:, 2], dirty.dy[1, 3]):
        fill(part, bits)
    right, results = (by_kernels(layer, numbers, *configs) for numbers in (clean, dirty))
    for name, tensor in results.items():
        assert same_bits(tensor[..., 0, :], right[name][..., 0, :]), name
    exact = by_reference(layer, dirty, torch.float64)
    for name, tensor in whole(layer, dirty, results).items():
        assert tensor.isnan().equal(exact[name].isnan()), name


def fill(tensor: Tensor, bits: int) -> None:
    """Overwrite a view with a bit pattern."""
    tensor.view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]).fill_(bits)
