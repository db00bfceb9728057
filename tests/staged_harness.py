"""Run layers that need several products per step with ``gpu_staged.py`` and with the reference.

The oracle is `reference.layer` in float64 with autograd, on the same numbers, with every option
of a layer: marks, noise, heads, ensemble members.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from kernel_harness import as_on_a_device, as_states, unchanged

from fastrnn import cpu, gpu_staged, gradients, reference
from fastrnn.call import Asked, Call, Cotangents
from fastrnn.cells import CELLS
from fastrnn.flow import Flow, make_marks
from fastrnn.kernels.configs import Config

#: Cells of this kind without a projection; without one they can also run in a single launch.
CELLS_OF_THIS_KIND = ("layernorm_lstm", "layernorm_gru", "gru_reset_before")
#: Cells and projection sizes, 0 for none.
PROBLEMS = [
    *[(cell, 0) for cell in CELLS_OF_THIS_KIND],
    *[(cell, 3) for cell in ("lstm", "peephole_lstm", "slstm", "layernorm_lstm")],
]
#: The same with schedules.
RUNS = [
    *[(*problem, "staged") for problem in PROBLEMS],
    *[(cell, 0, "resident") for cell in CELLS_OF_THIS_KIND],
]


class Layer(NamedTuple):
    """A problem, which determines its numbers.

    `batch` is per member; `size_h` is 0 without a projection, `members` is 0 without an ensemble.
    """

    cell: str
    steps: int = 3
    batch: int = 3
    hidden: int = 5
    size_h: int = 0
    directions: int = 1
    heads: int = 1
    members: int = 0
    lengths: bool = False
    resets: bool = False
    bptt: int | None = None
    fresh: bool = False
    drop: bool = False
    zones: str = ""
    state: bool = True
    bias: bool = True
    dy: bool = True
    traced: bool = True
    dtype: torch.dtype = torch.float32


class Numbers(NamedTuple):
    call: Call
    given: Cotangents


@functools.cache
def draw(layer: Layer) -> Numbers:
    """Random numbers; full and empty rows, resets at the first step and at consecutive steps."""
    generator = torch.Generator().manual_seed(layer.hidden)

    def random(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(layer.dtype)

    def chance(*shape):
        return torch.rand(shape, generator=generator) < 0.3

    cell, hidden, inputs = CELLS[layer.cell], layer.hidden, 4
    batch, width = layer.batch * max(1, layer.members), cell.n_gates * hidden
    size_h = layer.size_h or hidden
    widths = [size_h, *[hidden] * (cell.n_states - 1)]
    seen = size_h // layer.heads
    scale = 0.8 * seen**-0.5
    of_member = (layer.members,) if layer.members else ()
    shapes = [((width, inputs), 0.4), ((width, seen), scale), *[((width,), 0.5)] * (2 * layer.bias)]
    shapes += [((size_h, hidden), hidden**-0.5)] * (layer.size_h > 0)
    shapes += [((extra.blocks * hidden,), 0.7) for extra in cell.extras]
    weights = [random(*of_member, *s, scale=k) for _ in range(layer.directions) for s, k in shapes]
    fresh, state = (
        as_states(cell, [random(layer.directions, batch, w) for w in widths] if given else [])
        for given in (layer.fresh, layer.state)
    )
    steps = layer.steps
    resets = chance(steps, batch)
    resets[:, :1] = (torch.arange(steps) % 3 != 1)[:, None]
    marks = make_marks(
        *(steps, batch, layer.directions, torch.device("cpu")),
        (torch.arange(batch) * 2 + steps) % (steps + 1) if layer.lengths else None,
        resets if layer.resets else None,
        layer.bptt,
    )
    noise = []
    if layer.drop or layer.zones:
        none = torch.zeros(0)
        drop = chance(layer.directions, batch, size_h).logical_not().to(layer.dtype) / 0.7
        zones = [none] * cell.n_states
        if layer.zones == "masks":
            zones = [chance(layer.directions, steps, batch, w) for w in widths]
        elif layer.zones == "shares":
            zones = [torch.full((1,), 0.1 + 0.2 * k, dtype=layer.dtype) for k in range(len(widths))]
        elif layer.zones == "last":
            zones[-1] = chance(layer.directions, steps, batch, widths[-1])
        noise = [drop if layer.drop else none, *zones]
    columns = [layer.directions * w for w in widths]
    return Numbers(
        Call(
            *(cell, random(steps, batch, inputs), state, weights, None, layer.directions == 2),
            Flow(marks, fresh, noise),
        ),
        Cotangents(
            random(steps, batch, columns[0]) if layer.dy else None,
            [random(layer.directions, batch, w) for w in widths],
            [random(steps, batch, w) for w in columns[1:] if layer.traced],
        ),
    )


def in_double(parts):
    return [part if part is None or part.dtype == torch.bool else part.double() for part in parts]


@functools.cache
def by_reference(layer: Layer) -> dict[str, torch.Tensor]:
    """All results in float64, by autograd."""
    call, (dy, d_final, d_traces) = draw(layer)
    (x, dy), state, weights = map(in_double, ([call.x, dy], call.state, call.weights))
    flow = Flow(call.flow.marks, in_double(call.flow.fresh), in_double(call.flow.noise))
    call = call._replace(x=x, state=state, weights=weights, flow=flow)
    result = reference.layer(call)
    found = gradients.first(call, Cotangents(dy, in_double(d_final), in_double(d_traces)))
    return {
        **named(y=[result.y], final=result.final, traces=result.traces if layer.traced else []),
        **named(d_x=or_zeros([found.dx], [x]), d_state=or_zeros(found.d_state, state)),
        **named(d_weights=or_zeros(found.d_weights, weights)),
        **named(d_fresh=or_zeros(found.d_fresh, flow.fresh)),
    }


def or_zeros(grads, inputs):
    pairs = zip(grads, inputs, strict=True)
    return [torch.zeros_like(part) if grad is None else grad for grad, part in pairs]


def named(**results):
    return {
        f"{name}{k}": part.detach()
        for name, parts in results.items()
        for k, part in enumerate(parts)
    }


#: Tiles far smaller than on a GPU.
CONFIG = Config("staged", 4, 16, 4, 4, 0, 65535)


def config_of(layer: Layer, schedule: str) -> Config:
    """A configuration with such small tiles for either schedule."""
    units = triton.next_power_of_2(layer.hidden // layer.heads)
    return CONFIG if schedule == "staged" else Config("resident", 4, units, units, 4, 0, 65535)


def by_kernels(layer: Layer, schedule: str = "staged", **options):
    """All results from the kernels."""
    options = {"config": config_of(layer, schedule), **options}
    results = run(*draw(layer), traced=layer.traced, **options)
    return {n: part for n, part in results.items() if layer.state or not n.startswith("d_state")}


def run(call, given, *, traced=True, groups=0, config=CONFIG, precision="ieee"):
    """All results for a call and its cotangents; checks that no bit of either changes."""
    tensors = [part for part in call.flat() if part is not None]
    with as_on_a_device(), unchanged(*tensors, given.dy, given.d_final, given.d_traces):
        (y, final, traces), saved = gpu_staged.forward(call, config, precision, cpu.ALL, traced)
        dx, d_state, d_fresh, d_weights = gpu_staged.backward(
            call, config, precision, given, saved, Asked(groups=groups)
        )
    return {
        **named(y=[y], final=final, traces=traces),
        **named(d_x=[dx], d_state=d_state, d_weights=d_weights, d_fresh=d_fresh),
    }


def assert_right(layer: Layer, results: dict[str, torch.Tensor]) -> None:
    """Compare with the float64 oracle."""
    exact = by_reference(layer)
    assert results.keys() == exact.keys()
    units = 8 if layer.dtype.itemsize == 2 else 64
    for name, truth in exact.items():
        assert results[name].dtype == layer.dtype
        bound = units * torch.finfo(layer.dtype).eps * max(1.0, truth.abs().max().item())
        torch.testing.assert_close(
            results[name].double(), truth, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}"
        )


def check(layer: Layer, schedule: str = "staged", **options) -> None:
    assert_right(layer, by_kernels(layer, schedule, **options))
