"""Steps of several products, in the interpreter: normalized cells, late products, projections.

Whole layers run by ``gpu_staged.py``, in float16, float32 and float64, against autograd through
the reference in float64.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from gpu_stand_in import as_on_a_gpu
from kernel_harness import as_on_a_device, same_bits
from staged_harness import (
    CELLS_OF_THIS_KIND,
    PROBLEMS,
    RUNS,
    Layer,
    assert_right,
    by_kernels,
    check,
    config_of,
    draw,
    run,
)

from fastrnn import cpu, gpu, gpu_staged, planner
from fastrnn.call import Asked
from fastrnn.cases import MODULES
from fastrnn.cells import CELLS
from fastrnn.flow import Flow, make_marks
from fastrnn.kernels import activations, staged, staged_products, staged_resident
from fastrnn.kernels.configs import DEVICES, Config
from fastrnn.planner import Problem, use_path

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="runs in Triton's interpreter"
)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


of_every_kind = pytest.mark.parametrize(("cell", "size_h", "schedule"), RUNS)
by_both = pytest.mark.parametrize("schedule", ["staged", "resident"])


@of_every_kind
def test_every_cell(cell, size_h, schedule):
    check(Layer(cell, size_h=size_h), schedule)


MARKS = {"lengths": True, "resets": True, "bptt": 2}


@pytest.mark.sweep(5)
@pytest.mark.parametrize("directions", [1, 2])
@of_every_kind
def test_every_mark(cell, size_h, schedule, directions):
    layer = Layer(cell, 5, 3, size_h=size_h, directions=directions, fresh=True, **MARKS)
    check(layer, schedule)


@pytest.mark.sweep(7)
@of_every_kind
def test_noise(cell, size_h, schedule):
    """Noise together with resets and rows that end early."""
    every = Layer(cell, 5, 3, size_h=size_h, drop=True, zones="masks", fresh=True, **MARKS)
    check(every, schedule)
    check(Layer(cell, size_h=size_h, directions=2, zones="shares", resets=True), schedule)


@pytest.mark.parametrize("zones", ["", "last"])
def test_some_noise(zones):
    check(Layer("layernorm_lstm", drop=not zones, zones=zones))
    check(Layer("layernorm_lstm", drop=not zones, zones=zones), "resident")
    check(Layer("slstm", size_h=3, drop=not zones, zones=zones))


@pytest.mark.sweep(5)
@by_both
@pytest.mark.parametrize("cell", CELLS_OF_THIS_KIND)
def test_heads(cell, schedule):
    check(Layer(cell, hidden=6, heads=2), schedule)
    layer = Layer(cell, 4, hidden=6, heads=3, directions=2, drop=True, zones="masks", **MARKS)
    check(layer, schedule)


ENSEMBLES = [
    Layer("layernorm_gru", members=2, fresh=True, **MARKS),
    Layer("layernorm_lstm", 2, 2, 6, directions=2, heads=2, members=3, drop=True),
    Layer("gru_reset_before", members=2, heads=1, zones="masks", drop=True),
    Layer("peephole_lstm", size_h=3, members=2, directions=2, zones="masks", resets=True),
]


@pytest.mark.sweep(5)
@pytest.mark.parametrize(
    ("layer", "schedule"),
    [*[(layer, "staged") for layer in ENSEMBLES], *[(part, "resident") for part in ENSEMBLES[:3]]],
    ids=lambda value: getattr(value, "cell", value),
)
@pytest.mark.parametrize("each", [0, 2])
def test_members(layer, schedule, each):
    """Ensembles, also with separate weight gradients for each half of a member's batch."""
    layer = layer._replace(batch=4)
    results = by_kernels(layer, schedule, groups=each * layer.members)
    if each:
        results = {
            name: part.unflatten(0, (layer.members, each)).sum(1) if "d_weights" in name else part
            for name, part in results.items()
        }
    assert_right(layer, results)


@pytest.mark.parametrize("cell", ["layernorm_lstm", "gru_reset_before"])
@pytest.mark.parametrize("marked", [False, True])
def test_parts_of_the_batch(cell, marked):
    layer = Layer(cell, batch=4, fresh=marked, **(MARKS if marked else {}))
    results = by_kernels(layer, groups=2)
    results = {n: part.sum(0) if "d_weights" in n else part for n, part in results.items()}
    assert_right(layer, results)


@pytest.mark.sweep(5)
@pytest.mark.parametrize(
    ("layer", "tile"),
    [
        (Layer("layernorm_lstm", 1, 1, 1), (16, 16, 16)),
        (Layer("layernorm_gru", 2, 2, 33), (2, 16, 16)),
        (Layer("layernorm_lstm", 2, 1, 17, 9), (4, 8, 4)),
        (Layer("gru_reset_before", 7, 1, 9, directions=2), (16, 4, 8)),
        (Layer("gru_reset_before", 2, 5, 33), (2, 16, 16)),
        (Layer("lstm", 2, 17, 3, 2), (8, 2, 2)),
        (Layer("slstm", 2, 2, 129, 33), (4, 64, 32)),
        (Layer("lstm", 1, 3, 2, 1), (4, 4, 4)),
    ],
)
def test_sizes(layer, tile):
    check(layer, config=Config("staged", *tile, 4, 0, 65535))


@pytest.mark.parametrize(
    ("layer", "rows", "units"),
    [
        (Layer("layernorm_lstm", 1, 1, 1), 16, 16),
        (Layer("layernorm_lstm", 2, 5, 33), 4, 64),
        (Layer("layernorm_lstm", 2, 3, 128), 2, 128),
        (Layer("layernorm_gru", 1, 17, 7, directions=2), 16, 8),
        (Layer("layernorm_gru", 3, 2, 64), 2, 64),
        (Layer("gru_reset_before", 5, 1, 100), 1, 128),
        (Layer("gru_reset_before", 1, 33, 7), 16, 8),
    ],
)
def test_sizes_in_one_launch(layer, rows, units):
    check(layer, config=Config("resident", rows, units, units, 4, 0, 65535))


@by_both
@pytest.mark.parametrize("cell", CELLS_OF_THIS_KIND)
def test_no_rows(cell, schedule):
    layer = Layer(cell, batch=0, directions=2)
    results = by_kernels(layer, schedule)
    assert results["y0"].shape == (3, 0, 10)
    assert not any(part.any() for name, part in results.items() if "d_weights" in name)


def test_passes_by_different_schedules():
    """Both schedules keep the same tensors in forward."""
    layer = Layer("layernorm_lstm", 5, 3, fresh=True, drop=True, zones="masks", **MARKS)
    call, given = draw(layer)
    configs = [config_of(layer, schedule) for schedule in ("staged", "resident")]
    with as_on_a_device():
        pasts = [gpu_staged.forward(call, c, "ieee", cpu.ALL, True)[1] for c in configs]
        grads = [
            gpu_staged.backward(call, c, "ieee", given, past, Asked())
            for c, past in zip(configs[::-1], pasts, strict=True)
        ]
    for mine, theirs in zip(*pasts, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(*(part.d_weights for part in grads), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


# No bfloat16: the interpreter multiplies its bits as integers. Compiled: tests/ptx.
@of_every_kind
def test_half_precision(cell, size_h, schedule):
    layer = Layer(cell, size_h=size_h, dtype=torch.float16)
    check(layer, schedule)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("missing", ["bias", "state", "dy", "traced"])
@pytest.mark.parametrize(
    ("cell", "size_h", "schedule"),
    [
        ("layernorm_lstm", 0, "staged"),
        ("layernorm_lstm", 0, "resident"),
        ("gru_reset_before", 0, "staged"),
        ("gru_reset_before", 0, "resident"),
        ("slstm", 3, "staged"),
    ],
)
def test_without(cell, size_h, schedule, missing):
    """No bias, a zero state, no gradient of the output or of states."""
    check(Layer(cell, size_h=size_h, resets=missing == "state", **{missing: False}), schedule)


@pytest.mark.sweep(7)
@of_every_kind
def test_what_no_gradient_comes_to_is_left_out(cell, size_h, schedule):
    """Steps after the end of a row, and a sequence whose output nothing depends on."""
    layer = Layer(cell, 5, 3, size_h=size_h, directions=2, lengths=True, resets=True)
    call, given = draw(layer)
    dy, *d_traces = (part.clone() for part in (given.dy, *given.d_traces))
    ends = torch.tensor([0, 1, 1, 0, 0])
    marks = make_marks(
        *(5, 3, 2, torch.device("cpu")),
        torch.tensor([5, 3, 0]),
        torch.stack([ends, torch.zeros(5), torch.zeros(5)], dim=1).bool(),
    )
    for part in (dy, *d_traces):
        part[1, 0] = 0.0  # between two resets
    call = call._replace(flow=Flow(marks))
    given = given._replace(dy=dy, d_traces=d_traces)
    x = call.x.clone()
    x[1, 0] = x[3:, 1] = x[:, 2] = float("nan")
    config = config_of(layer, schedule)
    clean, dirty = (run(part, given, config=config) for part in (call, call._replace(x=x)))
    for name, part in dirty.items():
        if name.startswith("d_"):
            torch.testing.assert_close(part, clean[name], rtol=0, atol=0)
    assert dirty["y0"][1, 0].isnan().any()


DOUBLE = [*PROBLEMS, *[(name, 0) for name, cell in CELLS.items() if cell.is_pointwise]]


@pytest.mark.sweep(3)
@pytest.mark.parametrize(("cell", "size_h"), DOUBLE)
def test_double_precision(cell, size_h):
    """For every cell, since no other schedule supports it."""
    noise = {"drop": True, "zones": "masks"}
    check(Layer(cell, 3, 2, size_h=size_h, fresh=True, dtype=torch.float64, **noise, **MARKS))


@pytest.mark.parametrize("activation", ["tanh", "log_sigmoid"])
def test_activations_in_double_precision(activation):
    x = torch.cat([torch.logspace(-300, 2, 2000, dtype=torch.float64), torch.zeros(1)])
    x = torch.cat([x, -x])
    y, exact = torch.empty_like(x), getattr(torch.nn.functional, activation.replace("_", ""))(x)
    with as_on_a_device():
        activation_kernel[(1,)](x, y, getattr(activations, activation), len(x))
    torch.testing.assert_close(y, exact, rtol=8 * torch.finfo(x.dtype).eps, atol=0)


@triton.jit
def activation_kernel(x_ptr, y_ptr, activation: tl.constexpr, n: tl.constexpr):
    at = tl.arange(0, 4096)
    y = activation(tl.load(x_ptr + at, mask=at < n, other=0.0))
    tl.store(y_ptr + at, y, mask=at < n)


@pytest.mark.sweep(7)
@pytest.mark.parametrize("options", [{}, {"proj_size": 3}, {"num_heads": 2}], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_modules(options, recompute):
    """Several layers with the kernels the planner chooses, also where backward reruns forward."""
    name = "layernorm_gru" if "num_heads" in options else "lstm"
    cls, given = MODULES[name]
    module = cls(3, 6, num_layers=2, bidirectional=True, **given, **options)
    x, lengths = torch.randn(4, 2, 3), torch.tensor([4, 2])
    results = []
    for path in ("reference", None):
        with as_on_a_gpu(), as_on_a_device(), use_path(path):
            y, final = module(x, lengths=lengths, recompute=recompute)
            grads = torch.autograd.grad(y.square().sum(), list(module.parameters()))
        states = final if isinstance(final, tuple) else (final,)
        results.append([y, *states, *grads])
    for mine, theirs in zip(*results[::-1], strict=True):
        bound = 256 * torch.finfo(torch.float32).eps * max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(mine, theirs, rtol=0, atol=bound)


@pytest.mark.parametrize(("size_h", "schedule"), [(3, "staged"), (0, "resident")])
def test_inference_is_the_same(size_h, schedule):
    """Nothing is returned that is not requested."""
    layer = Layer("layernorm_lstm", size_h=size_h, directions=2)
    call, config = draw(layer).call, config_of(layer, schedule)
    with as_on_a_device():
        trained, saved = gpu_staged.forward(call, config, "ieee", cpu.ALL, True)
        result, nothing = gpu_staged.forward(call, config, "ieee", cpu.STATES, False)
    assert saved
    assert nothing == result.traces == []
    for mine, theirs in zip((result.y, *result.final), (trained.y, *trained.final), strict=True):
        assert same_bits(mine, theirs)


@pytest.mark.parametrize("save", [cpu.NOTHING, cpu.STATES, cpu.ALL])
@pytest.mark.parametrize(
    "layer",
    [
        Layer("layernorm_lstm", size_h=3, directions=2, dtype=torch.float16),
        Layer("gru_reset_before", hidden=6, heads=2, members=2),
        Layer("gru", dtype=torch.float64, lengths=True),
    ],
    ids=lambda layer: layer.cell,
)
def test_fake_tensors_are_those_of_the_kernels(layer, save):
    call, _ = draw(layer)
    with as_on_a_gpu(), as_on_a_device():
        _, saved = gpu.forward(call, save, False)
        fake = gpu.fake_saved(call, save)
    assert [(t.shape, t.dtype) for t in saved] == [(t.shape, t.dtype) for t in fake]


STAGED = [
    {"cell": "layernorm_lstm"},
    {"cell": "gru_reset_before", "noisy": True},
    {"projected": True},
    {"dtype": torch.float64, "marked": True},
]


@pytest.mark.parametrize("change", STAGED, ids=str)
def test_the_planner_knows(change):
    problem = Problem("lstm", 64, 8, 256, 256, torch.bfloat16, "cuda", gpu=DEVICES["h100"])
    chosen = planner.plan(problem._replace(**change))
    assert {choice.config.schedule for choice in chosen.kernels} == {"staged"}
    # Where torch has a kernel, it has less overhead.
    assert chosen.path == ("torch" if "projected" in change else "kernels")


SMALL = Problem("layernorm_lstm", 64, 8, 64, 64, torch.bfloat16, "cuda", gpu=DEVICES["h100"])


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"cell": "gru_reset_before", "hidden_size": 128, "marked": True}, True),
        ({"cell": "layernorm_gru", "dtype": torch.float32, "training": True}, True),
        ({"hidden_size": 129}, False),
        ({"hidden_size": 128, "noisy": True}, False),
        ({"projected": True}, False),
        ({"dtype": torch.float64}, False),
        ({"cell": "lstm", "projected": True}, False),
    ],
    ids=str,
)
def test_what_fits_into_one_program(change, fits):
    """Either schedule can be requested where it can run."""
    problem = SMALL._replace(**change)
    found = {choice.config.schedule for choice in planner.plan(problem).kernels}
    assert found == {"resident" if fits else "staged"}
    with use_path("staged"):
        found = {choice.config.schedule for choice in planner.plan(problem).kernels}
    assert found == {"staged"}
    with use_path("resident"):
        if fits:
            assert planner.plan(problem).path == "kernels"
        else:
            with pytest.raises(ValueError, match=f"no resident schedule for {problem.cell}, B=8"):
                planner.plan(problem)


@pytest.mark.parametrize("schedule", ["staged", "resident"])
def test_layers_by_either_schedule(schedule):
    """Called as by a user, they launch the requested schedule."""
    module = MODULES["layernorm_gru"][0](3, 6, bidirectional=True)
    x = torch.randn(4, 2, 3)
    with use_path("reference"):
        expected, _ = module(x)
    kernel = {"staged": staged, "resident": staged_resident}[schedule].backward_kernel
    watched = mock.patch.object(kernel, "run", wraps=kernel.run)
    with as_on_a_gpu(), as_on_a_device(), use_path(schedule), watched as launched:
        y, _ = module(x)
        y.sum().backward()
    torch.testing.assert_close(y, expected)
    assert launched.call_count == (1 if schedule == "resident" else 4)


@of_every_kind
def test_nothing_waits_for_the_device(monkeypatch, cell, size_h, schedule):
    """The launches depend on sizes alone, as a CUDA graph requires."""
    layer = Layer(cell, 5, size_h=size_h, directions=2, resets=True)
    (call, given), config = draw(layer), config_of(layer, schedule)
    launches = []
    for module in (staged, staged_products, staged_resident):
        for kernel in vars(module).values():
            if hasattr(kernel, "run"):
                monkeypatch.setattr(kernel, "run", lambda **_: launches.append(1))
    with monkeypatch.context() as patched:
        for reads in ("item", "tolist", "cpu", "nonzero", "__bool__", "__int__", "__float__"):
            patched.setattr(torch.Tensor, reads, None)
        _, saved = gpu_staged.forward(call, config, "ieee", cpu.ALL, True)
        gpu_staged.backward(call, config, "ieee", given, saved, Asked())
    n_products = 1 + (cell == "gru_reset_before") + (size_h > 0)
    assert len(launches) == (2 if schedule == "resident" else 2 * 5 * (1 + n_products) + 1)
