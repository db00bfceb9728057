"""What the benchmark refuses to time, how it times, and what bounds a case."""

import contextlib
import dataclasses
import functools
import importlib
import itertools
import math
import sys
import types

import pytest
import torch

from fastrnn import devices, planner
from fastrnn.bench import (
    built,
    empty_cpu,
    gate,
    limits,
    loops,
    measure,
    others,
    providers,
    registry,
)
from fastrnn.bench.environment import environment
from fastrnn.bench.limits import Bound, Limits
from fastrnn.bench.providers import PROVIDERS, Provider
from fastrnn.bench.registry import Case
from fastrnn.bench.results import Band, load
from fastrnn.kernels.configs import DEVICES

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CASES = [
    Case("lstm", "training", "float32", 3, 2, 8, 8),
    Case("gru", "forward", "float64", 3, 2, 8, 8, num_layers=2, bidirectional=True),
    Case("rnn", "training", "bfloat16", 3, 2, 8, 8),
    Case("lstm_cell", "training", "float32", 1, 2, 8, 8),
    Case("gru_cell", "forward", "float32", 1, 2, 8, 8),
    Case("rnn_cell", "training", "float64", 1, 2, 8, 8),
    Case("gru", "training", "float32", 8, 3, 8, 8, ragged=True),
    Case("lstm", "training", "float32", 4, 2, 5, 8),
]
NAMES = [case.name.replace(" ", "-") for case in CASES]


# Gate.


@pytest.mark.sweep(3)
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_right_results_are_timed(case):
    base, row = measure.measure(case, CPU, seconds=0)
    assert (base.provider, row.provider) == ("torch.nn", "fastrnn")
    assert base.path in ("ATen", "oneDNN")
    assert row.status == base.status == "ok"
    assert row.error <= row.tolerance < 0.1
    assert base.error is base.tolerance is None
    assert row.pairs == base.pairs == 7
    assert row.times.ms.p20 > 0
    assert row.times.ratio.p20 <= row.times.ratio.median <= row.times.ratio.p80
    assert base.times.ratio == Band(1.0, 1.0, 1.0)


def test_inputs_and_weights_are_the_same_each_time():
    for case in CASES:
        (a, x), (b, y) = (built.make_baseline(case, CPU) for _ in range(2))
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
        assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True))


class SkewedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


def wrong_build(change):
    def build(case, baseline, inputs):
        right = PROVIDERS["torch.nn"].build(case, baseline, inputs)

        def run(x):
            y, *state = right.run(SkewedGradient.apply(x) if change == "gradient" else x)
            return {
                "value": lambda: [y * 1.001, *state],
                "nan": lambda: [y * torch.tensor([math.nan] + [1.0] * 7), *state],
                "shape": lambda: [y[:-1], *state],
                "dtype": lambda: [y.double(), *state],
                "missing": lambda: [y],
                "gradient": lambda: [y, *state],
            }[change]()

        return right._replace(run=run)

    return Provider(lambda case, device: None, build)


@pytest.mark.parametrize("change", ["value", "nan", "shape", "dtype", "missing", "gradient"])
def test_wrong_results_are_not_timed(monkeypatch, change):
    monkeypatch.setitem(PROVIDERS, "fastrnn", wrong_build(change))
    base, row = measure.measure(CASES[0], CPU, seconds=0)
    assert row.status == row.verdict == "wrong"
    assert row.times is None
    assert row.pairs == 0
    assert base.times.ms.median > 0  # torch.nn's time is known all the same


def failing(case, baseline, inputs):
    raise NotImplementedError("out of memory\nstack")


def test_who_cannot_run_a_case_does_not_stop_the_others(monkeypatch):
    monkeypatch.setitem(PROVIDERS, "other", Provider(lambda case, device: None, failing))
    monkeypatch.setitem(PROVIDERS, "never", Provider(lambda case, device: "a reason", failing))
    rows = measure.measure(CASES[0], CPU, 0, ["other", "never", "fastrnn"])
    assert [(row.provider, row.status) for row in rows] == [
        ("torch.nn", "ok"),
        ("other", "failed"),
        ("fastrnn", "ok"),
    ]
    assert rows[1].reason == "out of memory"


def test_a_case_that_torch_cannot_run_is_reported(monkeypatch):
    def failing(case, device):
        raise RuntimeError("out of memory\nstack")

    monkeypatch.setattr(measure, "make_baseline", failing)
    rows = measure.measure(CASES[0], CPU, seconds=0)
    assert [(row.status, row.reason) for row in rows] == [("failed", "out of memory")] * 2


def test_error_is_that_of_the_tensor_furthest_from_what_is_allowed():
    tolerances = gate.Tolerances(0.1, 1.0, parameters=1)
    theirs = [torch.tensor([1.0, -4.0]), torch.tensor([100.0])]
    ours = [torch.tensor([1.0, -3.0]), torch.tensor([190.0])]
    assert gate.worst_error(ours, theirs, tolerances) == (0.25, 0.1)
    ours = [torch.tensor([1.0, -3.9]), torch.tensor([190.0])]
    assert gate.worst_error(ours, theirs, tolerances) == (pytest.approx(0.9), 1.0)
    assert gate.worst_error(ours[:1], theirs, tolerances) == (math.inf, 0.1)
    for nan in ([math.nan, 0.0], [0.0, math.nan]):
        error, _ = gate.worst_error([torch.tensor(nan), ours[1]], theirs, tolerances)
        assert math.isnan(error)
    zero = [torch.zeros(2)]
    assert gate.worst_error(zero, zero, tolerances) == (0.0, 0.1)
    assert gate.worst_error([torch.tensor([0.0, 1e-3])], zero, tolerances)[0] == pytest.approx(1e-3)
    assert math.isnan(gate.worst_error([torch.tensor(nan)], zero, tolerances)[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("steps", [16, 1024])
def test_a_small_mistake_is_seen_at_any_length(monkeypatch, dtype, steps):
    def build(case, baseline, inputs):
        right = PROVIDERS["torch.nn"].build(case, baseline, inputs)
        with torch.no_grad():
            baseline.bias_hh_l0.zero_()
        return right

    case = Case("gru", "forward", dtype, steps, 2, 32, 32)
    module, inputs = built.make_baseline(case, CPU)
    expected = measure.ready(case, PROVIDERS["torch.nn"].build(case, module, inputs)).results()
    wrong = measure.ready(case, build(case, module, inputs)).results()
    error, tolerance = gate.worst_error(wrong, expected, gate.tolerances_of(case, CPU))
    assert error > 1.3 * tolerance


def test_tolerances_of_a_gpu_follow_its_products(monkeypatch):
    case = Case("gru", "training", "float32", 64, 8, 64, 64)
    exact = gate.tolerances_of(case, CPU)
    monkeypatch.setattr(devices, "float32_precision", lambda: "ieee")
    assert gate.tolerances_of(case, CUDA) == exact
    monkeypatch.setattr(devices, "float32_precision", lambda: "tf32")
    rounded = gate.tolerances_of(case, CUDA)
    assert rounded.recurrent == 4 * 2**-10
    assert rounded.summed == 12 * 2**-10


def test_one_step_whose_weights_have_no_gradient():
    # h_0 is 0, so dW_hh is.
    case = Case("gru", "training", "float32", 1, 2, 8, 8)
    _, row = measure.measure(case, CPU, seconds=0)
    assert row.status == "ok"


# Providers.


def test_a_forced_path_is_measured_unless_the_planner_picks_it():
    case = dataclasses.replace(CASES[0], steps=64, hidden_size=128, input_size=128)
    picked = planner.plan(providers.problem_of(case, CPU)).path
    forced = [name for name in PROVIDERS if name.startswith("fastrnn:")]
    (_, alone) = measure.measure(case, CPU, 0, [f"fastrnn:{picked}"])
    assert (alone.provider, alone.status) == (f"fastrnn:{picked}", "ok")
    rows = measure.measure(case, CPU, 0, ["fastrnn", *forced])
    paths = {"kernels", "operators", "torch", "reference"} - {picked}
    # Schedules are for GPUs.
    assert {row.provider for row in rows[2:]} == {f"fastrnn:{path}" for path in paths}
    assert {row.path for row in rows[2:]} == paths
    assert {row.status for row in rows} == {"ok"}


def test_schedules_on_a_gpu(monkeypatch):
    case = Case("gru", "training", "bfloat16", 64, 16, 512, 512)
    problem = providers.problem_of(case, CPU)._replace(device="cuda", gpu=DEVICES["h100"])
    monkeypatch.setattr(providers, "problem_of", lambda case, device: problem)
    plan = planner.plan(problem)
    assert providers.plan_name(plan, case) == "persistent"
    assert providers.is_repeated("fastrnn:persistent", plan, case)
    assert not providers.is_repeated("fastrnn:stepwise", plan, case)
    assert PROVIDERS["fastrnn:stepwise"].gap(case, CUDA) is None
    assert "no resident schedule" in PROVIDERS["fastrnn:resident"].gap(case, CUDA)
    projected = problem._replace(projected=True)
    monkeypatch.setattr(providers, "problem_of", lambda case, device: projected)
    assert "no stepwise schedule" in PROVIDERS["fastrnn:stepwise"].gap(case, CUDA)
    assert PROVIDERS["fastrnn:staged"].gap(case, CUDA) is None


@pytest.mark.parametrize(
    ("cell", "dtype", "sizes", "version", "algorithm"),
    [
        ("lstm", "float16", (16, 768), 91000, "cuDNN persistent"),
        ("lstm", "float16", (12, 768), 91000, "cuDNN standard"),
        ("lstm", "bfloat16", (16, 768), 91300, "cuDNN standard"),
        ("lstm", "bfloat16", (16, 768), 91200, "ATen"),
        ("gru", "float16", (16, 768), 91300, "cuDNN standard"),
        ("gru", "float32", (16, 128), 91300, "cuDNN small persistent"),
        ("gru", "float32", (16, 192), 91300, "cuDNN small persistent, standard"),
        ("rnn", "float32", (16, 384), 91300, "cuDNN small persistent, standard"),
        ("gru", "float32", (16, 192), None, "ATen"),
    ],
)
def test_what_torch_runs_on_a_gpu(monkeypatch, cell, dtype, sizes, version, algorithm):
    batch, hidden = sizes
    case = Case(cell, "training", dtype, 64, batch, hidden, hidden)
    problem = providers.problem_of(case, CPU)._replace(device="cuda", gpu=DEVICES["h100"])
    monkeypatch.setattr(providers, "problem_of", lambda case, device: problem)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    assert providers.torch_algorithm(case, CUDA) == algorithm


@pytest.mark.long
def test_a_compiled_loop(monkeypatch):
    graphs = []

    def backend(graph, inputs):  # instead of inductor, which takes half a minute
        def run(*inputs):
            graphs[-1] += 1
            return graph.forward(*inputs)

        return run

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    # More than dynamo compiles one function for.
    many = [dataclasses.replace(CASES[0], batch=batch) for batch in range(1, 11)]
    for case in (
        *many,
        dataclasses.replace(CASES[0], steps=24),  # two parts of 12
        dataclasses.replace(CASES[0], cell="rnn", steps=7),
        CASES[3],
        CASES[4],
    ):
        graphs.append(0)
        _, row = measure.measure(case, CPU, 0, ["torch.compile"])
        assert row.status == "ok", row
        assert graphs[-1] > 7
    assert "one layer" in PROVIDERS["torch.compile"].gap(CASES[1], CPU)


# What torch.nn has not.

SMALL = [
    dataclasses.replace(
        case, steps=6, batch=3, hidden_size=16, input_size=16, proj_size=min(case.proj_size, 5)
    )
    for case in registry.variants("cpu")
    if case.hidden_size == 64
]


@pytest.mark.sweep(11)
@pytest.mark.parametrize("case", SMALL, ids=[case.name.replace(" ", "-") for case in SMALL])
def test_what_torch_has_not_is_compared_with_loops(case):
    base, *rows = measure.measure(case, CPU, 0, ["fastrnn", "fastrnn:plain", "loop"])
    assert base.times is not None
    statuses = {row.provider: row.status for row in rows}
    assert statuses == dict.fromkeys(statuses, "ok"), [row for row in rows if row.status != "ok"]
    errors = {row.provider: row.error for row in rows}
    assert errors.pop("fastrnn:plain", None) is None
    assert None not in errors.values()
    is_plain = case.plain == case and not case.members
    assert len(rows) == 3 - is_plain
    assert all(row.first_s > 0 for row in rows)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("cell", ["lstm", "slstm", "layernorm_gru", "gru_reset_before"])
def test_mistakes_in_what_torch_has_not_are_seen(monkeypatch, cell):
    n_states, step = loops._STEPS[cell]

    def wrong(wx, h, state, w):
        return step(wx * 1.0001, h, state, w)

    monkeypatch.setitem(loops._STEPS, cell, (n_states, wrong))
    case = Case(cell, "training", "float32", 6, 3, 5, 16, zoneout=0.1 * (cell == "lstm"))
    _, ours, loop = measure.measure(case, CPU, 0, ["fastrnn", "loop"])
    assert (ours.status, loop.status) == ("ok", "wrong")


@pytest.mark.long
def test_compiled_loops_of_what_torch_has_not(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for case in SMALL:
        if case.mode == "training" and case.cell != "gru":
            case = dataclasses.replace(case, steps=20 if case.bidirectional else 3)  # or 2 parts
            _, row = measure.measure(case, CPU, 0, ["torch.compile"])
            assert row.status == "ok", row


def test_no_compiler(monkeypatch):
    from torch._inductor import cpp_builder, exc

    def fails():
        raise exc.InvalidCxxCompiler

    loops._compiler_gap.cache_clear()
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", fails)
    gap = PROVIDERS["torch.compile"].gap
    assert gap(SMALL[0], CPU) == "torch.compile needs a C++ compiler, and finds none"
    assert gap(SMALL[0], CUDA) is None
    loops._compiler_gap.cache_clear()


def test_what_is_not_a_loop():
    gap = PROVIDERS["loop"].gap
    for change in ({"ragged": True}, {"num_layers": 2}, {"cell": "lstm_cell", "steps": 1}):
        assert "one layer" in gap(dataclasses.replace(SMALL[0], **change), CPU)
    heads = Case("lstm", "forward", "float32", 4, 2, 8, 8, num_heads=2)
    assert gap(heads, CPU) is None
    for change in ({"bidirectional": True}, {"zoneout": 0.1}, {"cell": "slstm"}):
        assert "of plain layers" in gap(dataclasses.replace(heads, **change), CPU)


# Other libraries, replaced by what their documentation says where they are not installed. Only the
# interfaces that need no GPU are called of those that are.


def fake_flashrnn(monkeypatch):
    def flashrnn(wx, r, b, states, function, backend, dtype):
        assert (function, str(wx.dtype)) == ("lstm", f"torch.{dtype}")
        batch, steps, gates, heads, hidden = wx.shape
        assert gates == 4
        assert r.shape == (4, heads, hidden, hidden)
        h, c = states.view(2, batch, heads, hidden)
        hs, cs = [], []
        for t in range(steps):
            # R[gate, head, out, in], gates i, f, z, o
            raw = wx[:, t] + torch.einsum("gnok,bnk->bgno", r, h) + b
            i, f, z, o = raw.unbind(1)
            c = f.sigmoid() * c + i.sigmoid() * z.tanh()
            h = o.sigmoid() * c.tanh()
            hs.append(h)
            cs.append(c)
        every = torch.stack([torch.stack(hs, 1), torch.stack(cs, 1)])
        return every, torch.stack([h, c])[:, :, None]

    module = types.ModuleType("flashrnn")
    module.flashrnn = flashrnn
    monkeypatch.setitem(sys.modules, "flashrnn", module)


def fake_torchrl(monkeypatch):
    class TensorDict(dict):
        def __init__(self, source, batch_size, device):
            super().__init__(source)

    class Module(torch.nn.Module):
        def __init__(self, inputs, hidden, in_keys, out_keys, device, **options):
            super().__init__()
            assert options["default_recurrent_mode"]
            kind = torch.nn.LSTM if self.name == "lstm" else torch.nn.GRU
            setattr(self, self.name, kind(inputs, hidden, batch_first=True, device=device))
            self.in_keys, self.out_keys = in_keys, out_keys

        def forward(self, data):
            assert data["is_init"].shape == (*data["x"].shape[:2], 1)
            y, final = getattr(self, self.name)(data[self.in_keys[0]])
            final = final if isinstance(final, tuple) else (final,)
            steps = y.shape[1]
            # (B, T, layers, H), zero but at the last step
            data[self.out_keys[0]] = y
            for key, part in zip(self.out_keys[1:], final, strict=True):
                last = part.transpose(0, 1)[:, None]
                zeros = torch.zeros_like(last).expand(-1, steps - 1, -1, -1)
                data[key] = torch.cat([zeros, last], 1)
            return data

    rl, modules, td = map(types.ModuleType, ("torchrl", "torchrl.modules", "tensordict"))
    modules.LSTMModule = type("LSTMModule", (Module,), {"name": "lstm"})
    modules.GRUModule = type("GRUModule", (Module,), {"name": "gru"})
    td.TensorDict = TensorDict
    for module in (rl, modules, td):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def fake_haste(monkeypatch):
    class Layer(torch.nn.Module):
        def __init__(self, inputs, hidden):
            super().__init__()
            self.kernel = torch.nn.Parameter(torch.zeros(inputs, self.gates * hidden))
            self.recurrent_kernel = torch.nn.Parameter(torch.zeros(hidden, self.gates * hidden))
            self.bias = torch.nn.Parameter(torch.zeros(self.gates * hidden))
            if self.is_normal:
                self.gamma = torch.nn.Parameter(torch.zeros(2, self.gates * hidden))
                self.gamma_h, self.beta_h = (torch.nn.Parameter(torch.zeros(hidden)) for _ in "12")
            if self.gates == 3:
                self.recurrent_bias = torch.nn.Parameter(torch.zeros(3 * hidden))

        def forward(self, x):
            hidden = self.recurrent_kernel.shape[0]
            h = c = x.new_zeros(x.shape[1], hidden)
            ys = []
            for x_t in x:
                wx, rh = x_t @ self.kernel, h @ self.recurrent_kernel
                if self.is_normal:
                    norm = torch.nn.functional.layer_norm
                    wx, rh = (
                        norm(part, g.shape) * g
                        for part, g in zip((wx, rh), self.gamma, strict=True)
                    )
                wx = wx + self.bias
                if self.gates == 4:
                    i, g, f, o = (wx + rh).chunk(4, -1)
                    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                    shown = c
                    if self.is_normal:
                        shown = norm(c, c.shape[-1:]) * self.gamma_h + self.beta_h
                    h = o.sigmoid() * shown.tanh()
                else:
                    z, r, n = wx.chunk(3, -1)
                    r_z, r_r, r_n = (rh + self.recurrent_bias).chunk(3, -1)
                    z = (z + r_z).sigmoid()
                    h = z * h + (1 - z) * (n + (r + r_r).sigmoid() * r_n).tanh()
                ys.append(h)
            return torch.stack(ys), (h[None], c[None]) if self.gates == 4 else h[None]

    module = types.ModuleType("haste_pytorch")
    for name, gates in (("LSTM", 4), ("GRU", 3)):
        for prefix in ("", "LayerNorm"):
            facts = {"gates": gates, "is_normal": bool(prefix)}
            setattr(module, prefix + name, type(prefix + name, (Layer,), facts))
    monkeypatch.setitem(sys.modules, "haste_pytorch", module)


OTHERS = {
    "flashrnn": (("flashrnn",), fake_flashrnn, {"backend": "vanilla"}, ("lstm",)),
    "torchrl": (("tensordict", "torchrl"), fake_torchrl, {"backend": "pad"}, ("lstm", "gru")),
    "haste": (
        ("haste_pytorch",),
        fake_haste,
        {},
        ("lstm", "gru", "layernorm_lstm", "layernorm_gru"),
    ),
}


@pytest.mark.parametrize(
    ("name", "cell"), [(name, cell) for name, facts in OTHERS.items() for cell in facts[3]]
)
@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.filterwarnings("ignore")
def test_another_library(monkeypatch, name, cell, mode):
    packages, fake, options, _ = OTHERS[name]
    if name == "haste" or any(importlib.util.find_spec(package) is None for package in packages):
        fake(monkeypatch)
    build = functools.partial(PROVIDERS[name].build, **options)
    monkeypatch.setitem(PROVIDERS, name, Provider(lambda case, device: None, build))
    for heads in (1, 2) if name == "flashrnn" else (1,):
        case = Case(cell, mode, "float32", 6, 3, 5, 8, num_heads=heads)
        base, row = measure.measure(case, CPU, 0, [name])
        assert row.status == "ok", row
        assert base.times is not None


@pytest.mark.parametrize("name", OTHERS)
def test_why_another_library_is_not_measured(monkeypatch, name):
    gap = PROVIDERS[name].gap
    found = {"spec": object()}
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: found["spec"])
    assert gap(CASES[0], CPU) == "on CUDA devices only"
    assert gap(CASES[0], CUDA) is None
    assert "float32 only" in gap(dataclasses.replace(CASES[0], dtype="float64"), CUDA)
    assert "one plain layer of lstm" in gap(dataclasses.replace(CASES[0], num_layers=2), CUDA)
    heads = gap(dataclasses.replace(CASES[0], num_heads=2), CUDA)
    assert heads is None if name == "flashrnn" else "one plain layer" in heads
    found["spec"] = None
    assert gap(CASES[0], CUDA).endswith("is not installed")


RUNTIMES = ("onnxruntime", "openvino")


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_runtime(name, cell, layers, bidirectional):
    for package in ("onnx", name):
        pytest.importorskip(package)
    case = Case(cell, "forward", "float32", 5, 3, 6, 8, layers, bidirectional)
    assert PROVIDERS[name].gap(case, CPU) is None
    _, row = measure.measure(case, CPU, 0, [name])
    assert row.status == "ok", row
    assert row.error <= row.tolerance < 1e-5


@pytest.mark.parametrize("load", [others.onnxruntime_call, others.openvino_call])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_state_goes_through_a_runtime(load, kind):
    for package in ("onnx", load.__name__.removesuffix("_call")):
        pytest.importorskip(package)
    module, x = getattr(torch.nn, kind)(5, 7, num_layers=2), torch.randn(3, 2, 5)
    states = {name: torch.randn(2, 2, 7) for name in ("h0", "c0")[: 1 + (kind == "LSTM")]}
    with torch.no_grad():
        y, final = module(x, tuple(states.values()) if kind == "LSTM" else states["h0"])
    call, outputs = load(others.onnx_model(module, 3, 2, has_state=True), {"x": x, **states})
    call()
    expected = [y.unsqueeze(1), *built.flat(final)]
    for output, right in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, right, rtol=1e-5, atol=1e-6)
    x.zero_()  # inputs are read at each call
    call()
    assert not torch.allclose(outputs[0], y.unsqueeze(1), atol=1e-2)


@pytest.mark.parametrize("name", RUNTIMES)
def test_why_a_runtime_is_not_measured(monkeypatch, name):
    gap, case = PROVIDERS[name].gap, Case("lstm", "forward", "float32", 4, 2, 5, 8)
    found = {name: object(), "onnx": object()}
    monkeypatch.setattr(importlib.util, "find_spec", found.get)
    assert gap(case, CPU) is None
    assert gap(case, CUDA) == "on a CPU only"
    assert gap(dataclasses.replace(case, mode="training"), CPU) == "inference only"
    for change in (
        {"cell": "lstm_cell", "steps": 1}, {"dtype": "float64"}, {"ragged": True}, {"proj_size": 4},
    ):  # fmt: skip
        assert "layers in float32 only" in gap(dataclasses.replace(case, **change), CPU)
    del found["onnx"]
    assert gap(case, CPU) == "onnx is not installed"
    found.clear()
    assert gap(case, CPU) == f"{name} is not installed"


# Time.


def test_ratio_is_the_median_over_pairs_not_the_ratio_of_medians():
    pairs = [(1.0, 2.0), (10.0, 20.0), (100.0, 200.0), (1.0, 8.0), (4.0, 4.0)]
    assert measure.ratio_band(pairs) == Band(2.0, pytest.approx(1.8), pytest.approx(3.2))


def test_pairs_alternate_and_keep_their_sides(monkeypatch):
    monkeypatch.setattr(measure, "_MAX_PAIRS", 8)
    monkeypatch.setattr(measure, "_warm_up", lambda *_: 1.0)
    order = []
    monkeypatch.setattr(
        measure, "seconds_of", lambda call, *_: order.append(call) or {"us": 1.0, "them": 3.0}[call]
    )
    assert measure.time_pairs("us", "them", CPU, seconds=60) == [(1.0, 3.0)] * 8
    assert {tuple(order[:2]), tuple(order[2:4])} == {("us", "them"), ("them", "us")}


def test_other_threads_sleep_before_a_sample(monkeypatch):
    """Each side is called again, untimed, after the process was idle."""
    monkeypatch.setattr(measure, "_MAX_PAIRS", 2)
    monkeypatch.setattr(measure, "_MIN_PAIRS", 2)
    order = []
    monkeypatch.setattr(measure, "_warm_up", lambda call, *_: order.append(f"call {call}") or 1.0)
    monkeypatch.setattr(measure, "_wait_until_idle", lambda: order.append("wait"))
    monkeypatch.setattr(measure, "seconds_of", lambda call, *_: order.append(f"time {call}") or 1.0)
    measure.time_pairs("us", "them", CPU, seconds=60, apart=True)
    sides = [["wait", f"call {side}", f"time {side}"] for side in ("them", "us", "us", "them")]
    assert order[2:] == [*itertools.chain.from_iterable(sides)]


def test_waiting_for_threads_that_spin(monkeypatch):
    clock = {"now": 0.0, "spinning": 0.042}

    def sleep(seconds):
        clock["now"] += min(seconds, clock["spinning"])
        clock["spinning"] = max(0.0, clock["spinning"] - seconds)
        clock["slept"] = clock.get("slept", 0.0) + seconds

    monkeypatch.setattr(measure.time, "sleep", sleep)
    monkeypatch.setattr(measure.time, "process_time", lambda: clock["now"])
    measure._wait_until_idle()
    assert clock["spinning"] == 0
    assert 0.042 <= clock["slept"] <= 0.042 + 2 * measure._PAUSE_SECONDS
    clock.update(spinning=math.inf, slept=0.0)
    measure._wait_until_idle()
    assert clock["slept"] == pytest.approx(measure._MAX_PAUSES * measure._PAUSE_SECONDS)


@pytest.mark.parametrize(("single", "pairs"), [(1e-3, 7), (1.0, 7), (2.0, 3)])
def test_long_calls_are_timed_less_often(monkeypatch, single, pairs):
    monkeypatch.setattr(measure, "_warm_up", lambda *_: single)
    monkeypatch.setattr(measure, "seconds_of", lambda *_: single)
    assert len(measure.time_pairs("us", "them", CPU, seconds=0)) == pairs


class FakeEvent:
    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.now

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return other.at - self.at


@pytest.fixture
def fake_cuda(monkeypatch):
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)


def test_the_clock_of_a_gpu_is_that_of_its_events(fake_cuda):
    def call():
        FakeEvent.now += 3.0  # milliseconds

    assert limits.seconds_of(call, 5, CUDA) == pytest.approx(3e-3)


@pytest.mark.parametrize("fault", [None, "replay", "capture"])
def test_a_graph_is_timed_if_its_replay_is_right(fake_cuda, monkeypatch, caplog, fault):
    results = [torch.zeros(3), torch.zeros(2)]

    def call():
        if fault == "capture":
            raise RuntimeError("operation not permitted when stream is capturing")
        results[0].fill_(1.0)
        results[1].fill_(2.0)
        return results

    replay = call if fault is None else lambda: None
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=replay))
    ready = measure.Ready(call, lambda results: results)
    expected = [torch.ones(3), torch.full((2,), 2.0)]
    tolerances = gate.Tolerances(1e-6, 1e-6, 0)
    found = measure._replay(ready, expected, tolerances, CUDA)
    assert found is (replay if fault is None else None)
    reason = {None: "", "replay": "error of nan", "capture": "when stream is capturing"}[fault]
    assert reason in caplog.text
    assert measure._replay(ready, expected, tolerances, CPU) is None


def test_graphs_are_timed_beside_each_other(monkeypatch):
    monkeypatch.setattr(measure, "_replay", lambda ready, *_: ready.call)
    base, row = measure.measure(CASES[0], CPU, seconds=0)
    assert row.graph.ms.median > 0
    assert base.graph.ratio == Band(1.0, 1.0, 1.0)


def test_what_fails_late_has_no_times(monkeypatch):
    monkeypatch.setattr(measure, "_replay", lambda ready, *_: ready.call)
    timed = [[(1.0, 2.0)] * 7]
    monkeypatch.setattr(measure, "time_pairs", lambda *_, **__: timed.pop())
    base, row = measure.measure(CASES[0], CPU, seconds=0)
    assert row.status == row.verdict == "failed"
    assert row.times is row.graph is row.error is None
    assert base.times.ms.median == 2000.0


def test_results_of_a_call_keep_no_graph():
    module, inputs = built.make_baseline(CASES[0], CPU)
    ready = measure.ready(CASES[0], PROVIDERS["torch.nn"].build(CASES[0], module, inputs))
    assert not any(tensor.requires_grad for tensor in ready.results())


def test_what_is_forced_is_forced_backward_too(monkeypatch):
    """In this thread: autograd's own do not know what is asked for here."""

    def forced():
        return planner.forced.schedule, torch._C._is_multithreading_enabled()

    seen, grad, case = [], torch.autograd.grad, CASES[0]
    module, inputs = built.make_baseline(case, CPU)
    expected = measure.ready(case, PROVIDERS["torch.nn"].build(case, module, inputs)).call()
    monkeypatch.setattr(torch.autograd, "grad", lambda *a: seen.append(forced()) or grad(*a))
    mine = measure.ready(case, PROVIDERS["fastrnn:stepwise"].build(case, module, inputs)).call()
    assert seen == [("stepwise", False)]
    assert forced() == (None, True)
    torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_all_multiply_float32_alike(monkeypatch, precision):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device", lambda d: contextlib.nullcontext(chosen.append(d)))
    monkeypatch.setattr(devices, "float32_precision", lambda: precision)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with limits.on_equal_terms(torch.device("cuda:1")):
        assert matmul.fp32_precision == ("tf32" if precision == "tf32" else before)
    assert matmul.fp32_precision == before
    assert chosen == [torch.device("cuda:1")]


def test_what_was_measured_outlives_a_crash(monkeypatch, tmp_path):
    real = measure.measure
    monkeypatch.setattr(
        measure, "measure", lambda case, *rest: 1 / 0 if case.is_step else real(case, *rest)
    )
    env = environment(CPU, "")
    found = measure.measure_all(CASES[2:4], CPU, 0, ["fastrnn"], env, tmp_path / "results.json")
    first = next(found)
    with pytest.raises(ZeroDivisionError):
        next(found)
    assert load(tmp_path / "results.json") == first
    assert [row.provider for row in first.rows] == ["torch.nn", "fastrnn"]
    assert first.rows[1].share > 0


# Limits.


def limits_with(device=CPU, exchange=2.0):
    found = Limits(device)
    found.gemm = {"float32": 1e11, "bfloat16": 1e15}
    found.copy = dict.fromkeys(limits._COPY_BYTES, 1e10 if device == CPU else 1e12)
    found.exchange_us = exchange
    return found


def test_what_bounds_a_case_on_a_cpu(monkeypatch):
    monkeypatch.setattr(limits, "uses_threads", lambda case: True)
    large = Case("gru", "training", "float32", 10, 512, 256, 256)
    assert limits_with().of(large) == Bound(pytest.approx(large.flops / 1e11 * 1e3), "products")
    single = Case("gru", "forward", "float32", 11, 1, 256, 256)
    read = 10 * 3 * 256 * 256 * 4 / 1e10
    assert limits_with().of(single) == Bound(pytest.approx(read * 1e3), "weights")
    tiny = Case("gru", "training", "float32", 11, 1, 8, 8)
    assert limits_with().of(tiny) == Bound(pytest.approx(2 * 11 * 2e-3), "exchange")
    assert limits_with(exchange=None).of(tiny).by == "weights"
    step = Case("gru_cell", "forward", "float32", 1, 1, 64, 64)
    assert limits_with().of(step) == Bound(pytest.approx(step.min_bytes / 1e10 * 1e3), "memory")
    half = dataclasses.replace(large, dtype="bfloat16")  # multiplied as float32
    assert limits_with().of(half).ms == limits_with().of(large).ms


@pytest.mark.parametrize(
    ("dtype", "hidden", "batch", "by"),
    [
        ("bfloat16", 512, 16, "exchange"),
        ("bfloat16", 4096, 1, "weights"),
        ("float32", 16, 16, "products"),
    ],
)
def test_what_bounds_a_case_on_a_gpu(monkeypatch, dtype, hidden, batch, by):
    """Exact float32 is resident: nothing is handed on."""
    case = Case("gru", "forward", dtype, 100, batch, hidden, hidden)
    problem = providers.problem_of(case, CPU)._replace(
        device="cuda", gpu=DEVICES["h100"], precision="ieee"
    )
    monkeypatch.setattr(limits, "problem_of", lambda case, device: problem)
    assert limits_with(CUDA).of(case).by == by


def test_limits_are_measured():
    found = Limits(CPU)
    case = Case("gru", "training", "bfloat16", 16, 4, 64, 64)
    found.observe(case)
    first = found.record()
    found.observe(case)
    second = found.record()
    assert first["gemm_tflops"].keys() == {"float32"}
    assert 0 < first["gemm_tflops"]["float32"] <= second["gemm_tflops"]["float32"]
    assert 0 < found.of(case).ms < 1000
    assert second["exchange_us"] is None or 0 < second["exchange_us"] < 1e4


def test_no_exchange_without_a_runtime(monkeypatch):
    monkeypatch.setattr(empty_cpu, "_region", lambda: None)
    found = Limits(CPU)
    found.observe(CASES[0])
    assert found.record()["exchange_us"] is None
    assert found.of(CASES[0]).ms > 0


@pytest.mark.parametrize(
    "device", [None, DEVICES["mi300x"], DEVICES["h100"]._replace(gap="an old driver")], ids=str
)
def test_no_empty_exchange_where_no_persistent_kernel_is(monkeypatch, device):
    empty_gpu = pytest.importorskip("fastrnn.bench.empty_gpu")
    monkeypatch.setattr(devices, "gpu", lambda index: device)
    assert empty_gpu.loop(CUDA, 5) is None
    assert limits.exchange_us(CUDA) is None


def test_no_empty_exchange_without_gluon(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastrnn.bench.empty_gpu", None)
    assert limits.exchange_us(CUDA) is None
