"""The kernels on a GPU: numbers against float64, races, graphs, streams, sizes beyond 32 bits.

Needs only torch, triton, pytest and hypothesis; pytest-xdist can run it in several processes.
"""

from __future__ import annotations

import itertools
import math

import gpu_cases
import pytest
import torch
from gpu_cases import MARKED, SMALL, Case
from torch import Tensor

import fastrnn
from fastrnn import devices, ops, planner, reference
from fastrnn.bench.built import forced
from fastrnn.call import Call
from fastrnn.cells import CELLS
from fastrnn.flow import PLAIN, Flow, make_marks
from fastrnn.kernels import configs, launch
from fastrnn.kernels.configs import Choice
from fastrnn.planner import use_path

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
pytestmark = pytest.mark.gpu

POINTWISE = [name for name, cell in CELLS.items() if cell.is_pointwise]
SCHEDULES = ("resident", "persistent", "stepwise")
# Name: dtype, whether cuDNN may use TF32, whether matrix products may (see float32_precision).
FORMATS = {
    "bf16": (torch.bfloat16, True, False),
    "fp16": (torch.float16, True, False),
    "tf32": (torch.float32, True, True),
    "tf32x3": (torch.float32, False, True),
    "ieee": (torch.float32, False, False),
}
# In float64 every cell runs like the involved ones.
EVERY_FORMAT = {**FORMATS, "fp64": (torch.float64, True, False)}
# T, B, I, H, directions
SHAPES = [
    (7, 5, 3, 1, 1),
    (16, 16, 64, 64, 1),
    (33, 127, 40, 127, 2),
    (64, 16, 256, 256, 1),
    (20, 33, 100, 384, 2),
    (24, 16, 512, 512, 1),
    (12, 128, 512, 1024, 1),
    (6, 8, 64, 1408, 1),
    (4, 2, 32, 4096, 1),
]


@pytest.fixture(params=FORMATS)
def dtype(request):
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    chosen, *allowed = EVERY_FORMAT[request.param]
    for switch, allow in zip(switches, allowed, strict=True):
        switch.allow_tf32 = allow
    yield chosen
    for switch, allow in zip(switches, before, strict=True):
        switch.allow_tf32 = allow


@pytest.fixture(autouse=True)
def _no_gap():
    """No test may pass with the kernels that replace those Triton fails to compile."""
    before = gap()
    yield
    assert gap() == before


def gap() -> str:
    device = devices.gpu()
    assert device is not None
    return device.gap


def make(cell, shape, dtype, bias=True, size_h=0):
    """Random x, states and weights on the GPU, requiring gradients; `size_h` is for projections."""
    steps, batch, inputs, hidden, directions = shape
    seen = size_h or hidden
    generator = torch.Generator().manual_seed(0)

    def random(*size, scale=1.0):
        values = torch.randn(*size, generator=generator) * scale
        return values.to("cuda", dtype).requires_grad_()

    n_gates, scale = CELLS[cell].n_gates, hidden**-0.5 / 2
    weights = []
    for _ in range(directions):
        weights += [random(n_gates * hidden, width, scale=scale) for width in (inputs, seen)]
        weights += [random(n_gates * hidden, scale=scale) for _ in range(2 * bias)]
        weights += [random(size_h, hidden, scale=scale) for _ in range(size_h > 0)]
        weights += [random(extra.blocks * hidden, scale=scale) for extra in CELLS[cell].extras]
    widths = [seen, *[hidden] * (CELLS[cell].n_states - 1)]
    state = [random(directions, batch, width) for width in widths]
    # The divisor of an sLSTM is at least 1.
    state[2:3] = [(part.detach().abs() + 1).requires_grad_() for part in state[2:3]]
    return random(steps, batch, inputs), state, weights


def call_of(cell, x, state, weights, directions=1, flow=PLAIN):
    return Call(CELLS[cell], x, state, weights, None, directions == 2, flow)


def run(layer, cell, x, state, weights, directions, flow=None, **options):
    """Every output and every gradient, by name."""
    call = call_of(cell, x, state, weights, directions, flow or PLAIN)
    y, final, *traces = layer(call, **options)
    outputs = {"y": y, **{f"final{k}": part for k, part in enumerate(final)}}
    fresh = call.flow.fresh
    if flow is not None:
        outputs |= {f"trace{k}": part for k, part in enumerate(traces[0])}
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(out.shape, generator=generator).to(x.device, x.dtype)
        for out in outputs.values()
    ]
    leaves = {"x": x}
    leaves |= {f"state{k}": part for k, part in enumerate(state)}
    leaves |= {f"w{k}": w for k, w in enumerate(weights)}
    leaves |= {f"fresh{k}": part for k, part in enumerate(fresh)}
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), cotangents)
    outputs |= {f"d_{name}": g for name, g in zip(leaves, grads, strict=True)}
    return {name: out.detach() for name, out in outputs.items()}


def in_float64(cell, x, state, weights, directions, **options):
    (x,), state, weights, fresh = (
        [t.detach().double().requires_grad_() for t in tensors]
        for tensors in ((x,), state, weights, options.get("flow", PLAIN).fresh)
    )
    for name, flow in options.items():
        noise = [part.double() if part.is_floating_point() else part for part in flow.noise]
        options[name] = flow._replace(fresh=fresh, noise=noise)
    return run(reference.layer, cell, x, state, weights, directions, **options)


def rms(a: Tensor) -> float:
    return a.double().square().mean().sqrt().item()


def check(ours, stock, exact):
    """Our error is at most twice torch's plus two epsilons.

    In float64 the reference is no more exact, so 64 epsilons are allowed. Where TF32 is allowed,
    torch need not use it and may be more exact, so the epsilon is that of TF32.
    """
    for name, truth in exact.items():
        eps = torch.finfo(ours[name].dtype).eps
        if ours[name].dtype == torch.float32 and devices.float32_precision() == "tf32":
            eps = 2.0**-10
        units = 64 if ours[name].dtype == torch.float64 else 2
        bound = 2 * rms(stock[name] - truth) + units * eps * rms(truth)
        error = rms(ours[name] - truth)
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"  # a NaN fails


def compare(cell, shape, dtype, schedule, bias=True):
    arguments = (cell, *make(cell, shape, dtype, bias), shape[-1])
    skip_unless_planned(schedule, *arguments)
    with forced(schedule or "kernels"):
        ours = run(ops.layer, *arguments)
    stock = run(reference.layer, *arguments)
    check(ours, stock, in_float64(*arguments))


def skip_unless_planned(schedule, *arguments, flow=PLAIN):
    """Skip what does not fit this device, but fail if Triton cannot compile it."""
    problem = planner.problem_of(call_of(*arguments, flow=flow))
    if schedule == "persistent":
        assert not problem.gpu.gap
    if schedule is not None and schedule not in devices.schedules(problem):
        pytest.skip(f"no {schedule} schedule for {problem}")


def marked(shape, state, fresh):
    """Lengths, resets (also at the first and at consecutive steps) and truncated gradients."""
    steps, batch, *_, directions = shape
    lengths = torch.randint(steps + 1, (batch,)).index_fill(0, torch.tensor([1]), 0)
    reset = torch.rand(steps, batch) < 0.1
    reset[:3, 0] = True
    marks = make_marks(steps, batch, directions, state[0].device, lengths.cuda(), reset.cuda(), 10)
    return Flow(marks, [part.detach().flip(0, 1).requires_grad_() for part in state if fresh])


def check_marks(cell, shape, schedule, fresh, dtype):
    """Check all states too, and a backward pass that recomputes."""
    x, state, weights = make(cell, shape, dtype)
    flow = marked(shape, state, fresh)
    arguments = cell, x, state, weights, shape[-1]
    skip_unless_planned(schedule, *arguments, flow=flow)
    with forced(schedule):
        ours = run(ops.layer, *arguments, flow=flow, traced=True)
        again = run(ops.layer, *arguments, flow=flow, traced=True, recompute=True)
    stock, exact = run(reference.layer, *arguments, flow=flow), in_float64(*arguments, flow=flow)
    check(ours, stock, exact)
    check(again, stock, exact)


# The kernels whose programs wait for each other, in every variant.


@pytest.fixture
def variant(monkeypatch):
    """Make every persistent kernel use the rows and warps of a case."""

    def of(case: Case) -> None:
        def choose(shape, device, *, backward=False, schedule=None):
            wanted = "persistent", case.block_b, case.num_warps
            for config in configs.candidates(shape, device, backward=backward):
                if wanted == (config.schedule, config.block_b, config.num_warps):
                    return Choice(config, math.nan)
            return None

        monkeypatch.setattr(configs, "choose", choose)

    return of


def of_each(cases):
    """Run a test for each case, in its format."""
    pairs = [pytest.param(case, case.format, id=str(case)) for case in cases]
    return pytest.mark.parametrize(("case", "dtype"), pairs, indirect=["dtype"])


@of_each(gpu_cases.PERSISTENT)
def test_persistent(case, dtype, variant):
    variant(case)
    compare(case.cell, case.shape, dtype, "persistent", bias=case.shape[1] != 5)


@pytest.mark.parametrize("fresh", [False, True])
@of_each(gpu_cases.WITH_MARKS)
def test_persistent_with_marks(case, fresh, dtype, variant):
    variant(case)
    check_marks(case.cell, case.shape, "persistent", fresh, dtype)


@of_each(gpu_cases.WITH_NAN)
def test_nan_travels_and_does_not_hang(case, dtype, variant):
    """In forward and backward, and without affecting other rows."""
    variant(case)
    x, state, weights = make("lstm", case.shape, dtype)
    arguments = "lstm", x, state, weights, 1
    skip_unless_planned("persistent", *arguments)
    with forced("persistent"):
        clean = run(ops.layer, *arguments)
        with torch.no_grad():
            x[3, 2] = math.nan
            # The bit pattern that means "not written yet".
            state[0].view({2: torch.int16, 4: torch.int32}[dtype.itemsize])[0, 5] = -1
        dirty = run(ops.layer, *arguments)
    y, d_x = dirty["y"], dirty["d_x"]
    assert y[3:, 2].isnan().all()
    assert y[:3, 2].isfinite().all()
    assert y[:, 5].isnan().all()
    assert d_x[:, [2, 5]].isnan().all()
    others = [row for row in range(20) if row not in (2, 5)]
    for name in ("y", "final0", "final1", "d_x", "d_state0", "d_state1"):
        assert torch.equal(dirty[name][:, others], clean[name][:, others]), name


@of_each(gpu_cases.REPEATED)
def test_repeated_runs_are_bitwise_equal(case, dtype, variant):
    variant(case)
    arguments = case.cell, *make(case.cell, case.shape, dtype), case.shape[-1]
    skip_unless_planned("persistent", *arguments)
    with forced("persistent"):
        first = run(ops.layer, *arguments)
        for _ in range(200):
            again = run(ops.layer, *arguments)
            assert all(torch.equal(again[name], first[name]) for name in first)


@of_each(gpu_cases.BOUNDED)
def test_bounded_spin_finds_nothing_to_report(case, dtype, variant):
    """It does not change the results either."""
    variant(case)
    arguments = case.cell, *make(case.cell, case.shape, dtype), case.shape[-1]
    skip_unless_planned("persistent", *arguments)
    with forced("persistent"):
        expected = run(ops.layer, *arguments)
        with launch.bounded_spin(10_000_000):
            bounded = run(ops.layer, *arguments)
    assert all(torch.equal(bounded[name], expected[name]) for name in expected)


def test_what_is_forced_is_forced_backward_too(monkeypatch):
    """Even though autograd runs it in another thread."""
    seen, backward = [], launch.backward

    def watched(cell, config, *rest):
        seen.append((config.schedule, launch._debug.spin_limit))
        return backward(cell, config, *rest)

    monkeypatch.setattr(launch, "backward", watched)
    arguments = "gru", *make("gru", (5, 3, 4, 32, 1), torch.bfloat16), 1
    for schedule in SCHEDULES:
        with forced(schedule), launch.bounded_spin(10_000_000):
            run(ops.layer, *arguments)
    assert seen == [(schedule, 10_000_000) for schedule in SCHEDULES]


# Every schedule.


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("cell", POINTWISE)
def test_every_cell_and_schedule(cell, shape, schedule, dtype):
    compare(cell, shape, dtype, schedule)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("dtype", ["bf16", "tf32"], indirect=True)
def test_shapes(cell, shape, dtype):
    compare(cell, shape, dtype, None, bias=shape[1] % 2 == 0)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    ("schedule", "dtype", "shape"), gpu_cases.MARKED_LAYERS, indirect=["dtype"], ids=str
)
@pytest.mark.parametrize("cell", MARKED)
def test_marks_and_traces(cell, shape, schedule, fresh, dtype):
    check_marks(cell, shape, schedule, fresh, dtype)


GROUPS = [(3, 0), (1, 3), (2, 2)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("heads", "members"), GROUPS)
@pytest.mark.parametrize("cell", MARKED)
@pytest.mark.parametrize("dtype", ["bf16", "tf32"], indirect=True)
def test_heads_and_members(cell, heads, members, schedule, dtype):
    check_groups(cell, heads, members, schedule, dtype)


def check_groups(cell, heads, members, schedule, dtype):
    steps, batch, inputs, hidden, directions = 17, 19, 24, 33, 2
    each = max(1, members)
    shape = steps, batch * each, inputs, hidden * heads, directions
    x, state, weights = make(cell, shape, dtype)
    count = len(weights) // directions
    with torch.no_grad():
        weights[1::count] = [w[:, :hidden].contiguous() for w in weights[1::count]]
        if members:
            weights = [torch.stack([w * (1 - m / 4) for m in range(members)]) for w in weights]
    weights = [w.detach().requires_grad_() for w in weights]
    flow = marked(shape, state, True)
    arguments = cell, x, state, weights, directions
    skip_unless_planned(schedule, *arguments, flow=flow)
    with forced(schedule):
        ours = run(ops.layer, *arguments, flow=flow, traced=True)
    stock, exact = run(reference.layer, *arguments, flow=flow), in_float64(*arguments, flow=flow)
    check(ours, stock, exact)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("has_drop", [False, True])
@pytest.mark.parametrize("has_zones", [False, True])
@pytest.mark.parametrize("cell", MARKED)
@pytest.mark.parametrize("dtype", ["bf16", "tf32"], indirect=True)
def test_noise(cell, has_zones, has_drop, schedule, dtype):
    shape = 33, 37, 24, 60, 2
    x, state, weights = make(cell, shape, dtype)
    kept = torch.rand(state[0].shape, device="cuda") < 0.5
    noise = [kept.to(dtype) / 0.5 if has_drop else x.new_empty(0)]
    for part in state:
        units = torch.rand(shape[-1], shape[0], *part.shape[1:], device="cuda") < 0.3
        noise.append(units if has_zones else x.new_empty(0))
    flow = marked(shape, state, True)._replace(noise=noise)
    arguments = cell, x, state, weights, shape[-1]
    skip_unless_planned(schedule, *arguments, flow=flow)
    with forced(schedule):
        ours = run(ops.layer, *arguments, flow=flow, traced=True)
        again = run(ops.layer, *arguments, flow=flow, traced=True, recompute=True)
    stock, exact = run(reference.layer, *arguments, flow=flow), in_float64(*arguments, flow=flow)
    check(ours, stock, exact)
    check(again, stock, exact)


# Layers whose step is more than one product followed by pointwise arithmetic.


def noise_of(case, x, state):
    """Recurrent dropout and zoneout."""
    if case.noise == "shares":
        return [x.new_empty(0), *(x.new_full((1,), 0.1 + 0.2 * k) for k in range(len(state)))]
    kept = torch.rand(state[0].shape, device="cuda") < 0.5
    sizes = [(len(part), case.shape[0], *part.shape[1:]) for part in state]
    return [kept.to(x.dtype) / 0.5, *(torch.rand(size, device="cuda") < 0.3 for size in sizes)]


@pytest.mark.parametrize("schedule", gpu_cases.INVOLVED_SCHEDULES)
@of_each(gpu_cases.INVOLVED)
def test_involved(case, schedule, dtype):
    x, state, weights = make(case.cell, case.shape, dtype, size_h=case.size_h)
    flow = marked(case.shape, state, True) if case.marked else PLAIN
    if case.noise:
        flow = flow._replace(noise=noise_of(case, x, state))
    arguments = case.cell, x, state, weights, case.shape[-1]
    skip_unless_planned(schedule, *arguments, flow=flow)
    with forced(schedule):
        ours = run(ops.layer, *arguments, flow=flow, traced=True)
        again = run(ops.layer, *arguments, flow=flow, traced=True)
    stock, exact = run(reference.layer, *arguments, flow=flow), in_float64(*arguments, flow=flow)
    check(ours, stock, exact)
    assert all(torch.equal(again[name], ours[name]) for name in ours)


@pytest.mark.parametrize("schedule", gpu_cases.INVOLVED_SCHEDULES)
@pytest.mark.parametrize(("heads", "members"), GROUPS)
@pytest.mark.parametrize("cell", ["layernorm_lstm", "layernorm_gru", "gru_reset_before"])
@pytest.mark.parametrize("dtype", ["bf16"], indirect=True)
def test_heads_and_members_of_involved(cell, heads, members, schedule, dtype):
    check_groups(cell, heads, members, schedule, dtype)


@pytest.mark.parametrize("schedule", gpu_cases.INVOLVED_SCHEDULES)
@pytest.mark.parametrize(("cell", "size_h"), gpu_cases.INVOLVED_CELLS[:4])
@pytest.mark.parametrize("dtype", ["bf16"], indirect=True)
def test_nan_of_involved_stays_in_its_row(cell, size_h, schedule, dtype):
    arguments = cell, *make(cell, (9, 20, 24, 33, 2), dtype, size_h=size_h), 2
    skip_unless_planned(schedule, *arguments)
    with forced(schedule):
        clean = run(ops.layer, *arguments)
        with torch.no_grad():
            arguments[1][3, 2] = math.nan
        dirty = run(ops.layer, *arguments)
    others = [row for row in range(20) if row != 2]
    assert dirty["y"][:, 2].isnan().all(1).any()
    for name in ("y", "final0", "d_x", "d_state0"):
        assert torch.equal(dirty[name][:, others], clean[name][:, others]), name


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_recompute(schedule):
    x, state, weights = make("gru", (9, 8, 16, 64, 2), torch.float32)
    with forced(schedule):
        kept = run(ops.layer, "gru", x, state, weights, 2)
        recomputed = run(ops.layer, "gru", x, state, weights, 2, recompute=True)
    check(recomputed, kept, in_float64("gru", x, state, weights, 2))


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize(
    ("cell", "schedule"),
    [
        *(("lstm", schedule) for schedule in SCHEDULES),
        *(("layernorm_lstm", schedule) for schedule in gpu_cases.INVOLVED_SCHEDULES),
    ],
)
def test_cuda_graph(cell, schedule, marked):
    x, state, weights = make(cell, (20, 16, 32, 64, 1), torch.bfloat16)
    lengths = torch.arange(5, 21, device="cuda")
    marks = make_marks(20, 16, 1, x.device, lengths, torch.rand(20, 16).cuda() < 0.2)
    flow = Flow(marks, state) if marked else PLAIN

    def call():
        with torch.no_grad():
            return ops.layer(call_of(cell, x, state, weights, flow=flow))

    skip_unless_planned(schedule, cell, x, state, weights, flow=flow)
    with use_path(schedule):
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            call()  # compiles the kernels captured below
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, final, _ = call()
        for seed in range(3):
            torch.manual_seed(seed)
            with torch.no_grad():
                x.copy_(torch.randn_like(x))
            graph.replay()
            expected, expected_final, _ = call()
            assert torch.equal(y, expected)
            assert all(map(torch.equal, final, expected_final))


def test_compile_fullgraph_with_dynamic_shapes():
    fastrnn.allow_compile()
    lstm = fastrnn.LSTM(32, 64, bidirectional=True).cuda().bfloat16()
    compiled = torch.compile(lstm, fullgraph=True, dynamic=True)
    for steps, batch in ((20, 4), (33, 7), (64, 16)):
        x = torch.randn(steps, batch, 32, device="cuda", dtype=torch.bfloat16)
        with use_path("kernels"):
            expected, _ = lstm(x)
        y, _ = compiled(x)
        torch.testing.assert_close(y, expected)
        for out in (y, expected):
            out.float().square().sum().backward()
        assert lstm.weight_hh_l0.grad.isfinite().all()


def test_two_streams():
    problems = [make("lstm", (300, 16, 64, hidden, 1), torch.bfloat16) for hidden in (512, 256)]
    with use_path("persistent"), torch.no_grad():
        alone = [ops.layer(call_of("lstm", *problem))[0] for problem in problems]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in problems]
        for _ in range(20):
            together = []
            for stream, problem in zip(streams, problems, strict=True):
                with torch.cuda.stream(stream):
                    together.append(ops.layer(call_of("lstm", *problem))[0])
            torch.cuda.synchronize()
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_second_device():
    gru = fastrnn.GRU(16, 64).to("cuda:1")
    x = torch.randn(20, 4, 16, device="cuda:1")
    with use_path("kernels"):
        y, _ = gru(x)
    torch.testing.assert_close(y, torch.nn.GRU.forward(gru, x)[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("schedule", ["resident", "persistent"])
def test_long_sequence(schedule):
    """More steps than fit a 16-bit grid or counter; the state is carried to the end."""
    x, state, weights = make("gru", (70_000, 1, 4, 64, 1), torch.float32)
    with forced(schedule):
        ours = run(ops.layer, "gru", x, state, weights, 1)
    tail = x[-200:].detach()
    with torch.no_grad():
        h = ours["y"][-201][None]
        exact = tail.double(), [h.double()], [w.double() for w in weights]
        y, *_ = reference.layer(call_of("gru", *exact))
    assert rms(ours["y"][-200:] - y) < 5e-3
    assert all(t.isfinite().all() for t in ours.values())


def test_more_than_2_to_the_31_elements():
    steps, batch, hidden = 4200, 1024, 128  # 4 * T * B * H = 2.2e9
    x, state, weights = make("lstm", (steps, batch, 4, hidden, 1), torch.bfloat16)
    with use_path("kernels"), torch.no_grad():
        y, *_ = ops.layer(call_of("lstm", x, state, weights))
        part = slice(batch - 5, batch)
        last = [s[:, part] for s in state]
        last = [s.contiguous() for s in last]
        few, *_ = ops.layer(call_of("lstm", x[:, part].contiguous(), last, weights))
    # Not bitwise: cuBLAS may project a smaller batch in another order.
    assert rms(y[:, part] - few) < torch.finfo(torch.bfloat16).eps


MODULES = [
    pytest.param(cls, options, dtype, id=f"{cls.__name__}-{options}-{dtype}")
    for cls, options, dtype in itertools.product(
        (fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN),
        (
            {"num_layers": 2, "bidirectional": True, "batch_first": True},
            {"num_layers": 3, "dropout": 0.5},
            {"bias": False},
            {"proj_size": 5},
        ),
        (torch.float32, torch.float64, torch.bfloat16),
    )
    if cls is fastrnn.LSTM or "proj_size" not in options
]


@pytest.mark.parametrize(("cls", "options", "dtype"), MODULES)
@pytest.mark.parametrize("path", [None, "kernels", "torch"])
@pytest.mark.parametrize("packed", [False, True])
def test_modules(cls, options, dtype, path, packed):
    """Every option works on every path, in training, against float64 on the CPU."""
    torch.manual_seed(0)
    module = cls(6, 20, **options).to("cuda", dtype)
    exact = cls(6, 20, **options).double()
    exact.load_state_dict(module.state_dict())
    if module.dropout:
        module.eval(), exact.eval()
        module.requires_grad_(False)
    x = torch.randn(20, 7, 6).to("cuda", dtype)
    inputs = [x, x.cpu().double()]
    if packed:
        lengths = torch.tensor([20, 20, 13, 9, 7, 2, 1])
        lengths = lengths.clamp(max=x.shape[1]) if module.batch_first else lengths
        batch = x.shape[0] if module.batch_first else x.shape[1]
        lengths = lengths.repeat(3)[:batch]
        inputs = [
            torch.nn.utils.rnn.pack_padded_sequence(
                t, lengths, batch_first=module.batch_first, enforce_sorted=False
            )
            for t in inputs
        ]
    with use_path(path):
        results = [m(t)[0] for m, t in zip((module, exact), inputs, strict=True)]
    y, truth = (out.data if packed else out for out in results)
    eps = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-3
    assert rms(y.cpu() - truth) < 16 * eps
    if not module.dropout:
        y.float().square().sum().backward()
        assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("dtype", ["tf32", "bf16"], indirect=True)
@pytest.mark.parametrize("cell", POINTWISE)
def test_cells(cell, dtype):
    x, state, weights = make(cell, (1, 5, 7, 33, 1), dtype)
    x, state = x[0], [part[0] for part in state]

    def step(call):
        new = ops.cell_step(call)
        return new[0], new[1:]

    def oracle(call):
        new = reference.step(call)
        return new[0], list(new[1:])

    leaves = [[t.detach().requires_grad_() for t in group] for group in ([x], state, weights)]
    exact = [[t.detach().double().requires_grad_() for t in group] for group in leaves]
    ours = run(step, cell, leaves[0][0], leaves[1], leaves[2], 1)
    stock = run(oracle, cell, leaves[0][0], leaves[1], leaves[2], 1)
    check(ours, stock, run(oracle, cell, exact[0][0], exact[1], exact[2], 1))


def test_autocast():
    lstm = fastrnn.LSTM(16, 64).cuda()
    x = torch.randn(40, 8, 16, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16), use_path("kernels"):
        y, (h, c) = lstm(x)
    assert y.dtype == h.dtype == c.dtype == torch.bfloat16
    with use_path("kernels"):
        torch.testing.assert_close(y.float(), lstm(x)[0], rtol=0, atol=0.05)


@pytest.mark.parametrize("steps", [1, 20])
def test_empty_batch(steps):
    x, state, weights = make("lstm", (steps, 0, 4, 40, 2), torch.float32)
    for schedule in (*SCHEDULES, "kernels"):
        with forced(schedule):
            results = run(ops.layer, "lstm", x, state, weights, 2)
        assert results["y"].shape == (steps, 0, 80)
        assert not results["d_w1"].any()


def test_strided_inputs():
    x, state, weights = make("gru", (12, 6, 8, 32, 2), torch.float32)
    with use_path("kernels"), torch.no_grad():
        expected, *_ = ops.layer(call_of("gru", x, state, weights, 2))
        strided = x.transpose(0, 1).contiguous().transpose(0, 1)
        turned = [w.t().contiguous().t() if w.dim() == 2 else w for w in weights]
        y, *_ = ops.layer(call_of("gru", strided, state, turned, 2))
    torch.testing.assert_close(y, expected)


def test_planner_describes_the_device():
    device, precision = devices.facts(torch.empty(0, device="cuda"))
    assert device.processors == torch.cuda.get_device_properties(0).multi_processor_count
    assert 48 * 1024 <= device.shared_memory <= 256 * 1024
    assert 500 < device.clock_mhz < 5000
    assert precision in ("tf32", "tf32x3", "ieee")
    assert devices.gpu(0) == device
