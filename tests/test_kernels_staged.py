"""Steps in several launches, in the interpreter: normalised cells, late products, projections.

Whole layers as ``gpu_staged.py`` runs them, in float32 and half precision, against autograd through
the reference in float64.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from gpu_stand_in import as_on_a_gpu
from kernel_harness import as_on_a_device, same_bits
from staged_harness import CONFIG, PROBLEMS, Layer, assert_right, by_kernels, check, draw, run

from fastrnn import cpu, gpu, gpu_staged, planner
from fastrnn.call import Asked
from fastrnn.cases import MODULES
from fastrnn.cells import CELLS
from fastrnn.flow import Flow, make_marks
from fastrnn.kernels import activations, staged, staged_products
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


UNPROJECTED = [cell for cell, size_h in PROBLEMS if not size_h]


@pytest.mark.parametrize(("cell", "size_h"), PROBLEMS)
def test_every_cell(cell, size_h):
    check(Layer(cell, size_h=size_h))


MARKS = {"lengths": True, "resets": True, "bptt": 2}


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(("cell", "size_h"), PROBLEMS)
def test_every_mark(cell, size_h, directions):
    check(Layer(cell, 5, 3, size_h=size_h, directions=directions, fresh=True, **MARKS))


@pytest.mark.parametrize(("cell", "size_h"), PROBLEMS)
def test_noise(cell, size_h):
    """Of a reset and of rows that end, too."""
    check(Layer(cell, 5, 3, size_h=size_h, drop=True, zones="masks", fresh=True, **MARKS))
    check(Layer(cell, size_h=size_h, directions=2, zones="shares", resets=True))


@pytest.mark.parametrize("zones", ["", "last"])
def test_some_noise(zones):
    check(Layer("layernorm_lstm", drop=not zones, zones=zones))
    check(Layer("slstm", size_h=3, drop=not zones, zones=zones))


@pytest.mark.parametrize("cell", UNPROJECTED)
def test_heads(cell):
    check(Layer(cell, hidden=6, heads=2))
    check(Layer(cell, 4, hidden=6, heads=3, directions=2, drop=True, zones="masks", **MARKS))


@pytest.mark.parametrize(
    "layer",
    [
        Layer("layernorm_gru", members=2, fresh=True, **MARKS),
        Layer("layernorm_lstm", 2, 2, 6, directions=2, heads=2, members=3, drop=True),
        Layer("gru_reset_before", members=2, heads=1, zones="masks", drop=True),
        Layer("peephole_lstm", size_h=3, members=2, directions=2, zones="masks", resets=True),
    ],
    ids=lambda layer: layer.cell,
)
@pytest.mark.parametrize("each", [0, 2])
def test_members(layer, each):
    """Ensembles; also with gradients of the weights of every half of a member's batch."""
    layer = layer._replace(batch=4)
    results = by_kernels(layer, groups=each * layer.members)
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


# The interpreter takes the bits of bfloat16 for integers in a product; compiled: tests/ptx.
@pytest.mark.parametrize(("cell", "size_h"), PROBLEMS)
def test_half_precision(cell, size_h):
    layer = Layer(cell, size_h=size_h, dtype=torch.float16)
    check(layer)


@pytest.mark.parametrize("missing", ["bias", "state", "dy", "traced"])
@pytest.mark.parametrize(
    ("cell", "size_h"), [("layernorm_lstm", 0), ("gru_reset_before", 0), ("slstm", 3)]
)
def test_without(cell, size_h, missing):
    """No bias, a state of zeros, no gradient of the output or of states."""
    check(Layer(cell, size_h=size_h, resets=missing == "state", **{missing: False}))


@pytest.mark.parametrize(("cell", "size_h"), PROBLEMS)
def test_what_no_gradient_comes_to_is_left_out(cell, size_h):
    """Steps that a row does not have, and a sequence whose output nothing depends on."""
    layer = Layer(cell, 5, 3, size_h=size_h, directions=2, lengths=True, resets=True)
    call, given = draw(layer)
    dy, *d_traces = (part.clone() for part in (given.dy, *given.d_traces))
    resets = torch.zeros_like(call.flow.marks)
    ends = torch.tensor([0, 1, 1, 0, 0])
    marks = make_marks(
        *(5, 3, 2, torch.device("cpu")),
        torch.tensor([5, 3, 0]),
        torch.stack([ends, torch.zeros(5), torch.zeros(5)], dim=1).bool(),
    )
    assert resets.shape == marks.shape
    for part in (dy, *d_traces):
        part[1, 0] = 0.0  # between two resets
    call = call._replace(flow=Flow(marks))
    given = given._replace(dy=dy, d_traces=d_traces)
    x = call.x.clone()
    x[1, 0] = x[3:, 1] = x[:, 2] = float("nan")
    clean, dirty = (run(part, given) for part in (call, call._replace(x=x)))
    for name, part in dirty.items():
        if name.startswith("d_"):
            torch.testing.assert_close(part, clean[name], rtol=0, atol=0)
    assert dirty["y0"][1, 0].isnan().any()


DOUBLE = [*PROBLEMS, *[(name, 0) for name, cell in CELLS.items() if cell.is_pointwise]]


@pytest.mark.parametrize(("cell", "size_h"), DOUBLE)
def test_double_precision(cell, size_h):
    """Of every cell: no other schedule has it."""
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


@pytest.mark.parametrize("options", [{}, {"proj_size": 3}, {"num_heads": 2}], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_modules(options, recompute):
    """By what the planner chooses, of several layers, also where backward runs forward again."""
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


def test_inference_is_the_same():
    """And of what is not asked for there is nothing."""
    call, _ = draw(Layer("layernorm_lstm", size_h=3, directions=2))
    with as_on_a_device():
        trained, saved = gpu_staged.forward(call, CONFIG, "ieee", cpu.ALL, True)
        result, nothing = gpu_staged.forward(call, CONFIG, "ieee", cpu.STATES, False)
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
    # Where torch has a kernel, it has less ado.
    assert chosen.path == ("torch" if "projected" in change else "kernels")


@pytest.mark.parametrize(("cell", "size_h"), PROBLEMS)
def test_nothing_waits_for_the_device(monkeypatch, cell, size_h):
    """Which launches there are depends on sizes alone, as a CUDA graph wants it."""
    call, given = draw(Layer(cell, 5, size_h=size_h, directions=2, resets=True))
    launches = []
    for module in (staged, staged_products):
        for kernel in vars(module).values():
            if hasattr(kernel, "run"):
                monkeypatch.setattr(kernel, "run", lambda **_: launches.append(1))
    with monkeypatch.context() as patched:
        for reads in ("item", "tolist", "cpu", "nonzero", "__bool__", "__int__", "__float__"):
            patched.setattr(torch.Tensor, reads, None)
        _, saved = gpu_staged.forward(call, CONFIG, "ieee", cpu.ALL, True)
        gpu_staged.backward(call, CONFIG, "ieee", given, saved, Asked())
    n_products = 1 + (cell == "gru_reset_before") + (size_h > 0)
    assert len(launches) == 2 * 5 * (1 + n_products) + 1
