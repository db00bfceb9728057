"""Lengths, resets, truncated gradients and traces in the kernels, against the oracle."""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
import triton
from cooperative import cooperative
from kernel_harness import MODES, same_bits, tiled

from fastrnn import cpu, flow, gpu, reference
from fastrnn.cells import CELLS
from fastrnn.flow import PLAIN, Flow, make_marks
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
    monkeypatch.setattr(gpu, "facts", lambda x: (DEVICES["h100"], "ieee"))


@pytest.fixture(params=MODES)
def mode(request, monkeypatch):
    """A schedule, which gpu.py then takes."""
    take(monkeypatch, request.param)
    return request.param


def take(monkeypatch, mode, block_b=8):
    choice = Choice(tiled(mode, HIDDEN, block_b=block_b), 0.0)
    monkeypatch.setattr(gpu, "_choices", lambda problem: (choice, choice))


class Layer(NamedTuple):
    """A problem, and which parts of a flow it has."""

    cell: str
    directions: int = 1
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
    x: torch.Tensor
    state: list[torch.Tensor]
    weights: list[torch.Tensor]
    flow: Flow
    d_y: torch.Tensor | None
    d_final: list[torch.Tensor]
    d_traces: list[torch.Tensor]


@functools.cache
def draw(layer: Layer) -> Numbers:
    """Random numbers; rows with all steps and with none, resets at the first and one by one."""
    generator = torch.Generator().manual_seed(layer.directions)

    def random(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(layer.dtype)

    cell = CELLS[layer.cell]
    width, in_state = cell.n_gates * HIDDEN, (layer.directions, BATCH, HIDDEN)
    shapes = [(width, INPUTS), (width, HIDDEN), *[(width,)] * (2 * layer.bias)]
    lengths = torch.tensor([STEPS, 0, 3, STEPS, 1])
    resets = torch.rand(STEPS, BATCH, generator=generator) < 0.3
    resets[:, 0] = torch.tensor([1, 0, 1, 1, 0])
    resets[2:4, 2] = True  # its last step, and one that it does not have
    marks = make_marks(
        STEPS,
        BATCH,
        layer.directions,
        torch.device("cpu"),
        lengths if layer.lengths else None,
        resets if layer.resets else None,
        layer.bptt,
    )
    y = STEPS, BATCH, layer.directions * HIDDEN
    fresh = [random(*in_state) for _ in range(cell.n_states * layer.fresh)]
    return Numbers(
        random(STEPS, BATCH, INPUTS),
        [random(*in_state) for _ in range(cell.n_states * layer.state)],
        [random(*shape, scale=0.4) for _ in range(layer.directions) for shape in shapes],
        Flow(marks, fresh),
        random(*y) if layer.dy else None,
        [random(*in_state) for _ in range(cell.n_states)],
        [random(*y) for _ in range((cell.n_states - 1) * layer.d_traced)],
    )


def by_reference(layer: Layer, numbers: Numbers) -> dict[str, torch.Tensor]:
    """All results in float64, by autograd."""
    (x,), state, weights, fresh = groups = [
        [part.double().requires_grad_() for part in parts]
        for parts in ([numbers.x], numbers.state, numbers.weights, numbers.flow.fresh)
    ]
    result = reference.layer(
        layer.cell, x, state, weights, None, layer.directions == 2, Flow(numbers.flow.marks, fresh)
    )
    outputs = [*result.final, *result.traces[: len(numbers.d_traces)]]
    cotangents = [*numbers.d_final, *numbers.d_traces]
    if numbers.d_y is not None:
        outputs, cotangents = [result.y, *outputs], [numbers.d_y, *cotangents]
    leaves = [part for parts in groups for part in parts]
    grads = iter(
        torch.autograd.grad(
            outputs,
            leaves,
            [part.double() for part in cotangents],
            allow_unused=True,
            materialize_grads=True,
        )
    )
    traces = result.traces if layer.traced else []
    return {
        **named(y=[result.y], final=result.final, traces=traces),
        **named(d_x=[next(grads)], d_state=[next(grads) for _ in state]),
        **named(d_weights=[next(grads) for _ in weights], d_fresh=[next(grads) for _ in fresh]),
    }


def named(**results):
    return {
        f"{name}{k}": part.detach()
        for name, parts in results.items()
        for k, part in enumerate(parts)
    }


def by_kernels(
    layer: Layer, numbers: Numbers, *, seed: int = 0, groups: int = 0, keep: bool = True
):
    """All results of the kernels; backward gets what forward saved only if asked to `keep` it."""
    arguments = numbers.x, numbers.state, numbers.weights, None, layer.directions == 2, numbers.flow
    with cooperative(seed):
        y, final, traces, saved = gpu.layer_forward(
            layer.cell, *arguments, layer.save, layer.traced
        )
        assert not {t.data_ptr() for t in traces} & {t.data_ptr() for t in saved}
        dx, d_state, d_fresh, d_weights = gpu.layer_backward(
            layer.cell, numbers.d_y, numbers.d_final, numbers.d_traces, *arguments,
            [y, *saved] if keep else [], True, True, groups,
        )  # fmt: skip
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


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_every_mark(mode, cell, directions):
    check(Layer(cell, directions))


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(layer, id=name)
        for name, layer in {
            "zeros": Layer("lstm", fresh=False, state=False, bias=False),
            "recompute": Layer("gru", 2, save=cpu.STATES),
            "resets": Layer("gru", lengths=False, bptt=None, dy=False),
            "lengths": Layer("lstm", resets=False, bptt=1, traced=False, d_traced=False),
            "half": Layer("lstm", 2, dtype=torch.bfloat16),
            "traces": Layer("lstm", lengths=False, resets=False, bptt=None, save=cpu.STATES),
        }.items()
    ],
)
def test_some(mode, layer):
    check(layer)


def test_backward_after_a_forward_for_inference(monkeypatch):
    take(monkeypatch, "resident")
    check(Layer("lstm"), keep=False)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("mode", ["flag", "counter"])
def test_several_tiles_of_the_batch_and_other_orders_of_programs(monkeypatch, mode, seed):
    take(monkeypatch, mode, block_b=2)
    check(Layer("gru", save=cpu.STATES), seed=seed)


def test_nan_does_not_pass_a_reset(mode):
    layer = Layer("lstm", bptt=None) if mode in ("flag", "resident") else Layer("gru", 2, bptt=None)
    clean = draw(layer)
    dirty = clean._replace(x=clean.x.clone())
    dirty.x[2, 0] = float("nan")  # between two resets
    results, right = by_kernels(layer, dirty), by_kernels(layer, clean)
    exact = by_reference(layer, dirty)
    for name, part in results.items():
        assert part.isnan().equal(exact[name].isnan()), name
        is_number = ~part.isnan()
        assert same_bits(part[is_number], right[name][is_number]), name
    assert results["y0"].isnan().any(dim=(1, 2)).tolist() == [t == 2 for t in range(STEPS)]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_no_gradient_comes_to_is_left_out(mode, bad, keep):
    """Steps that a row does not have, and a sequence whose output nothing depends on."""
    layer = Layer("lstm" if mode in ("flag", "resident") else "gru", 2, bptt=None)
    clean = draw(layer)
    d_rows = [part.clone() for part in (clean.d_y, *clean.d_traces)]
    for part in d_rows:
        part[2, 0] = 0.0  # between two resets
    clean = clean._replace(d_y=d_rows[0], d_traces=d_rows[1:])
    dirty = clean._replace(x=clean.x.clone())
    dirty.x[2, 0] = bad
    dirty.x[((clean.flow.marks[0] & flow.HOLD) != 0)] = bad
    results, right = (by_kernels(layer, numbers, keep=keep) for numbers in (dirty, clean))
    assert_right(layer, right, by_reference(layer, clean))
    for name, part in results.items():
        if name.startswith("d_"):
            assert same_bits(part, right[name]), name


@pytest.mark.parametrize("marked", [False, True])
def test_groups(monkeypatch, marked):
    take(monkeypatch, "resident")
    layer = Layer("gru", 2)
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

    (x, dy), marks = of([numbers.x, numbers.d_y]), numbers.flow.marks[..., rows].contiguous()
    return numbers._replace(
        x=x,
        state=of(numbers.state),
        flow=Flow(marks if marked else None, of(numbers.flow.fresh)),
        d_y=dy,
        d_final=of(numbers.d_final),
    )


def test_noise_has_no_kernels():
    x, state, weights, *_ = draw(Layer("gru"))
    arguments = "gru", x, state, weights, None, False
    noise = Flow(None, [], [torch.rand(1, BATCH, HIDDEN), torch.rand(1, STEPS, BATCH, HIDDEN)])
    assert gpu.has_kernels("gru", x, weights, None, PLAIN)
    assert not gpu.has_kernels("gru", x, weights, None, noise)
    expected = reference.layer(*arguments, noise)
    y, final, *_ = gpu.layer_forward(*arguments, noise, cpu.NOTHING, False)
    torch.testing.assert_close(y, expected.y)
    for saved in ([], [y]):
        dx, *_ = gpu.layer_backward("gru", y, final, [], *arguments[1:], noise, saved, True, True)
        assert dx.shape == x.shape


def test_bits_are_those_of_the_package():
    for name in ("HOLD", "FRESH", "CUT", "START"):
        assert getattr(tiles, name).value == getattr(flow, name)
