"""Lengths, resets, truncated gradients and traces in the kernels, against the oracle."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import pytest
import torch
import triton
from kernel_harness import MODES, as_on_a_device, as_states, same_bits, tiled

from fastrnn import cpu, devices, flow, gpu, gradients, planner, reference
from fastrnn.call import Asked, Call, Cotangents
from fastrnn.cells import CELLS
from fastrnn.flow import Flow, make_marks
from fastrnn.kernels import tiles
from fastrnn.kernels.configs import DEVICES, Choice

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="runs in Triton's interpreter"
)

STEPS, BATCH, INPUTS, HIDDEN = 5, 5, 3, 7


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    problem_of, facts = planner.problem_of, {"gpu": DEVICES["h100"], "precision": "ieee"}
    monkeypatch.setattr(planner, "problem_of", lambda call: problem_of(call)._replace(**facts))


@pytest.fixture(params=MODES)
def mode(request, monkeypatch):
    """A schedule, which gpu.py then uses."""
    take(monkeypatch, request.param)
    return request.param


def take(monkeypatch, mode, block_b=8):
    choice = Choice(tiled(mode, HIDDEN, block_b=block_b), 0.0)
    monkeypatch.setattr(devices, "choose_kernels", lambda *_: (choice, choice))


class Layer(NamedTuple):
    """A problem, and which parts of a flow it has.

    BATCH is per member, HIDDEN per head; `members` is 0 without an ensemble. With `zones`, some
    units of each state keep their old value, or all keep a share of it, or none keep it.
    """

    cell: str
    directions: int = 1
    heads: int = 1
    members: int = 0
    drop: bool = False
    zones: tuple[Literal["units", "share", ""], ...] = ()
    lengths: bool = True
    resets: bool = True
    bptt: int | None = 3
    fresh: bool = True
    state: bool = True
    traced: bool = True
    d_traced: bool = True
    dy: bool = True
    bias: bool = True
    save: int = cpu.ALL
    dtype: torch.dtype = torch.float32


class Numbers(NamedTuple):
    call: Call
    given: Cotangents


@functools.cache
def draw(layer: Layer) -> Numbers:
    """Random numbers; full and empty rows, resets at the first step and at consecutive steps."""
    generator = torch.Generator().manual_seed(layer.directions)

    def random(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(layer.dtype)

    cell, batch, hidden = CELLS[layer.cell], BATCH * max(1, layer.members), HIDDEN * layer.heads
    width, in_state = cell.n_gates * hidden, (layer.directions, batch, hidden)
    shapes = [(width, INPUTS), (width, HIDDEN), *[(width,)] * (2 * layer.bias)]
    shapes += [(extra.blocks * hidden,) for extra in cell.extras]
    shapes = [(layer.members, *shape) if layer.members else shape for shape in shapes]
    lengths = torch.tensor([STEPS, 0, 3, STEPS, 1]).repeat(max(1, layer.members))
    resets = torch.rand(STEPS, batch, generator=generator) < 0.3
    resets[:, 0] = torch.tensor([1, 0, 1, 1, 0])
    resets[2:4, 2] = True  # its last step, and one after its end
    marks = make_marks(
        STEPS,
        batch,
        layer.directions,
        torch.device("cpu"),
        lengths if layer.lengths else None,
        resets if layer.resets else None,
        layer.bptt,
    )
    y = STEPS, batch, layer.directions * hidden
    fresh, state = (
        as_states(cell, [random(*in_state) for _ in range(cell.n_states * given)])
        for given in (layer.fresh, layer.state)
    )
    noise = []
    if layer.drop or layer.zones:
        kept = torch.rand(in_state, generator=generator) < 0.6
        noise = [kept.to(layer.dtype) / 0.6 if layer.drop else torch.empty(0, dtype=layer.dtype)]
    for zone in layer.zones:
        units = torch.rand(in_state[0], STEPS, *in_state[1:], generator=generator) < 0.4
        share = torch.full((1 if zone else 0,), 0.3, dtype=layer.dtype)
        noise.append(units if zone == "units" else share)
    x = random(STEPS, batch, INPUTS)
    weights = [random(*shape, scale=0.4) for _ in range(layer.directions) for shape in shapes]
    return Numbers(
        Call(cell, x, state, weights, None, layer.directions == 2, Flow(marks, fresh, noise)),
        Cotangents(
            random(*y) if layer.dy else None,
            [random(*in_state) for _ in range(cell.n_states)],
            [random(*y) for _ in range((cell.n_states - 1) * layer.d_traced)],
        ),
    )


def by_reference(layer: Layer, numbers: Numbers) -> dict[str, torch.Tensor]:
    """All results in float64, by autograd."""
    marks, *others = numbers.call.flow
    (x,), state, weights, fresh, noise, (dy,), d_final, d_traces = (
        [part.double() if part is not None and part.is_floating_point() else part for part in parts]
        for parts in (
            *([numbers.call.x], numbers.call.state, numbers.call.weights, *others),
            *([numbers.given.dy], numbers.given.d_final, numbers.given.d_traces),
        )
    )
    call = numbers.call._replace(x=x, state=state, weights=weights, flow=Flow(marks, fresh, noise))
    result = reference.layer(call)
    grads = gradients.first(call, Cotangents(dy, d_final, d_traces))
    return {
        **named(y=[result.y], final=result.final, traces=result.traces if layer.traced else []),
        **named(d_x=[grads.dx], d_state=or_zeros(grads.d_state, state)),
        **named(d_weights=or_zeros(grads.d_weights, weights)),
        **named(d_fresh=or_zeros(grads.d_fresh, fresh)),
    }


def or_zeros(grads, inputs):
    return [
        torch.zeros_like(part) if grad is None else grad
        for grad, part in zip(grads, inputs, strict=True)
    ]


def named(**results):
    return {
        f"{name}{k}": part.detach()
        for name, parts in results.items()
        for k, part in enumerate(parts)
    }


def by_kernels(layer: Layer, numbers: Numbers, *, groups: int = 0, keep: bool = True):
    """All results from the kernels; with `keep`, backward gets what forward saved."""
    call, given = numbers
    with as_on_a_device():
        (y, final, traces), saved = gpu.forward(call, layer.save, layer.traced)
        assert not {t.data_ptr() for t in traces} & {t.data_ptr() for t in saved}
        dx, d_state, d_fresh, d_weights = gpu.backward(
            call, given, [y, *saved] if keep else [], Asked(groups=groups)
        )
    d_state = d_state if layer.state else []
    return {
        **named(y=[y], final=final, traces=traces),
        **named(d_x=[dx], d_state=d_state, d_weights=d_weights, d_fresh=d_fresh),
    }


def assert_right(layer: Layer, results, exact):
    assert results.keys() == exact.keys()
    units = 64 if layer.dtype == torch.float32 else 8
    for name, truth in exact.items():
        assert results[name].dtype == layer.dtype
        bound = units * torch.finfo(layer.dtype).eps * max(1.0, truth.abs().max().item())
        torch.testing.assert_close(
            results[name].double(), truth, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}"
        )


def check(layer: Layer, **options) -> None:
    numbers = draw(layer)
    assert_right(layer, by_kernels(layer, numbers, **options), by_reference(layer, numbers))


@pytest.mark.sweep(3)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "peephole_lstm", "slstm"])
def test_every_mark(mode, cell, directions):
    check(Layer(cell, directions))


@pytest.mark.sweep(5)
@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(layer, id=name)
        for name, layer in {
            "zeros": Layer("lstm", fresh=False, state=False, bias=False),
            "recompute": Layer("gru", 2, save=cpu.STATES),
            "resets": Layer("gru", lengths=False, bptt=None, dy=False),
            "lengths": Layer("lstm", resets=False, bptt=1, traced=False, d_traced=False),
            "half": Layer("lstm", 2, dtype=torch.float16),
            "traces": Layer("lstm", lengths=False, resets=False, bptt=None, save=cpu.STATES),
            "extra": Layer("peephole_lstm", 2, fresh=False, save=cpu.STATES),
            "normalizer": Layer("slstm", fresh=False, state=False, save=cpu.STATES),
        }.items()
    ],
)
def test_some(mode, layer):
    check(layer)


def test_backward_after_a_forward_for_inference(monkeypatch):
    take(monkeypatch, "resident")
    check(Layer("lstm"), keep=False)


@pytest.mark.parametrize("mode", MODES)
def test_several_tiles_of_the_batch(monkeypatch, mode):
    take(monkeypatch, mode, block_b=2)
    check(Layer("gru", save=cpu.STATES))


@pytest.mark.sweep(3)
@pytest.mark.parametrize("cell", ["lstm", "gru", "peephole_lstm", "slstm"])
def test_nan_does_not_pass_a_reset(mode, cell):
    layer = Layer(cell, 2 if mode == "stepwise" else 1, bptt=None)
    clean = draw(layer)
    dirty = clean._replace(call=clean.call._replace(x=clean.call.x.clone()))
    dirty.call.x[2, 0] = float("nan")  # between two resets
    results, right = by_kernels(layer, dirty), by_kernels(layer, clean)
    exact = by_reference(layer, dirty)
    for name, part in results.items():
        assert part.isnan().equal(exact[name].isnan()), name
        is_number = ~part.isnan()
        assert same_bits(part[is_number], right[name][is_number]), name
    assert results["y0"].isnan().any(dim=(1, 2)).tolist() == [t == 2 for t in range(STEPS)]


@pytest.mark.sweep(7)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("mode", "cell"),
    [
        *(("resident", cell) for cell in ("lstm", "slstm")),
        *(("stepwise", cell) for cell in ("gru", "peephole_lstm")),
    ],
)
def test_what_no_gradient_comes_to_is_left_out(monkeypatch, mode, cell, bad, keep):
    """Steps after the end of a row, and a sequence whose output nothing depends on."""
    take(monkeypatch, mode)
    layer = Layer(cell, 2, bptt=None)
    clean = draw(layer)
    dy, *d_traces = (part.clone() for part in (clean.given.dy, *clean.given.d_traces))
    for part in (dy, *d_traces):
        part[2, 0] = 0.0  # between two resets
    clean = clean._replace(given=clean.given._replace(dy=dy, d_traces=d_traces))
    dirty = clean._replace(call=clean.call._replace(x=clean.call.x.clone()))
    dirty.call.x[2, 0] = bad
    dirty.call.x[((clean.call.flow.marks[0] & flow.HOLD) != 0)] = bad
    results, right = (by_kernels(layer, numbers, keep=keep) for numbers in (dirty, clean))
    assert_right(layer, right, by_reference(layer, clean))
    for name, part in results.items():
        if name.startswith("d_"):
            assert same_bits(part, right[name]), name


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("cell", ["gru", "peephole_lstm"])
def test_groups(monkeypatch, cell, marked):
    take(monkeypatch, "resident")
    layer = Layer(cell, 2)
    numbers = draw(layer)
    pairs = torch.arange(4)
    both = part_of(numbers, pairs, marked)
    results = by_kernels(layer, both, groups=2)
    for g in range(2):
        exact = by_reference(layer, part_of(numbers, pairs[2 * g : 2 * g + 2], marked))
        own = {
            name: part[g] if name.startswith("d_w") else part[..., 2 * g : 2 * g + 2, :]
            for name, part in results.items()
        }
        assert_right(layer, own, exact)


def part_of(numbers: Numbers, rows: torch.Tensor, marked: bool) -> Numbers:
    def of(parts):
        return [part[:, rows].contiguous() for part in parts]

    call, given = numbers
    (x, dy), marks = of([call.x, given.dy]), call.flow.marks[..., rows].contiguous()
    flow = Flow(marks if marked else None, of(call.flow.fresh))
    return Numbers(
        call._replace(x=x, state=of(call.state), flow=flow),
        Cotangents(dy, of(given.d_final), of(given.d_traces)),
    )


def test_bits_are_those_of_the_package():
    for name in ("HOLD", "FRESH", "CUT", "START"):
        assert getattr(tiles, name).value == getattr(flow, name)
