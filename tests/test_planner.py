"""The planner: its comparisons, forced paths, and remembered answers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import checks, cpu, hardware, tuned
from fastrnn.cells import CELLS
from fastrnn.checks import checked
from fastrnn.cpu import machine, native
from fastrnn.devices import cudnn_algorithm
from fastrnn.kernels.configs import DEVICES, MAX_BATCH, PRECISIONS
from fastrnn.options import Options
from fastrnn.planner import PATHS, Problem, path_of, plan, problem_of, use_path

POINTWISE = sorted(name for name, cell in CELLS.items() if cell.is_pointwise)
GRU = Problem("gru", steps=64, batch=8, input_size=64, hidden_size=64)
LSTM = GRU._replace(cell="lstm")


@pytest.fixture
def no_tables(monkeypatch, tmp_path):
    """Ignore measurements made on this machine or on a similar one."""
    monkeypatch.setenv("FASTRNN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path)
    caches = (2**15, 2**20, 2**25)
    some = hardware.Machine("cpu", "some", "some", "some", threads=2, caches=caches)
    monkeypatch.setattr(hardware, "cpu", lambda: some)
    tuned.forget_what_was_read()
    yield
    tuned.forget_what_was_read()


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (GRU._replace(device="cuda"), "torch"),
        (GRU._replace(dtype=torch.complex64), "torch"),
        (GRU._replace(transform="forward"), "reference"),
        (GRU._replace(transform="func"), "kernels"),
        (GRU._replace(transform="func", is_step=True), "kernels"),
        (GRU._replace(cell="rnn_identity", transform="forward"), "reference"),
        (GRU._replace(steps=1, marked=True), "kernels"),
        (GRU._replace(device="cuda", marked=True), "operators"),
        (GRU._replace(noisy=True), "kernels"),
        (GRU._replace(cell="slstm"), "kernels"),
        (GRU._replace(cell="layernorm_gru"), "kernels"),
        (GRU._replace(cell="rnn_identity", dtype=torch.complex64), "reference"),
        (GRU._replace(cell="rnn_identity", device="cuda"), "operators"),
    ],
)
def test_what_nothing_is_compared_for(monkeypatch, problem, expected):
    monkeypatch.setattr(machine, "target", lambda: machine.AVX2)
    monkeypatch.setattr(fastrnn.crossover, "expected_ratio", lambda *_: 1 / 0)
    chosen = plan(problem)
    assert (chosen.path, chosen.source) == (expected, "")


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (GRU, "kernels"),
        (GRU._replace(training=True), "kernels"),
        (GRU._replace(cell="rnn_relu"), "kernels"),
        (GRU._replace(packed=True), "kernels"),
        (GRU._replace(dtype=torch.float16), "kernels"),
        (LSTM._replace(dtype=torch.bfloat16, training=True), "kernels"),
        (LSTM._replace(packed=True, training=True), "kernels"),
        (LSTM._replace(steps=1024), "kernels"),
    ],
)
@pytest.mark.parametrize("target", [machine.AVX2, machine.AVX512, machine.NEON], ids=str)
def test_the_model_has_kernels_for_many_steps(monkeypatch, no_tables, target, problem, expected):
    monkeypatch.setattr(fastrnn.crossover, "multiplies", lambda dtype: False)
    monkeypatch.setattr(machine, "target", lambda: target)
    chosen = plan(problem)
    assert (chosen.path, chosen.source) == (expected, "model")


LONG = GRU._replace(steps=128, training=True)


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (LONG, "operators"),
        (LONG._replace(steps=1), "torch"),
        (LONG._replace(training=False), "torch"),
        (LONG._replace(dtype=torch.float64), "operators"),
        (LONG._replace(cell="lstm"), "torch"),
        (LONG._replace(dtype=torch.float16, batch=64), "operators"),
        (LONG._replace(dtype=torch.float16, batch=64, training=False), "operators"),
        (LONG._replace(cell="lstm", projected=True), "operators"),
        (LONG._replace(cell="lstm", dtype=torch.float64), "operators"),
        (LONG._replace(steps=1, is_step=True), "torch"),
    ],
)
@pytest.mark.parametrize("lacks", ["llvmlite", "instructions"])
def test_the_model_without_cpu_kernels(monkeypatch, no_tables, problem, expected, lacks):
    monkeypatch.setattr(fastrnn.crossover, "multiplies", lambda dtype: False)
    if lacks == "llvmlite":
        monkeypatch.setattr(machine, "_has_compiler", lambda: False)
    else:
        monkeypatch.setattr(machine, "target", lambda: None)
    chosen = plan(problem)
    assert chosen.path == expected
    assert "a loop of torch operators (fastrnn" in chosen.reason


problems = st.builds(
    Problem,
    cell=st.sampled_from(POINTWISE),
    steps=st.integers(1, 100),
    batch=st.integers(0, 200),
    input_size=st.integers(1, 9),
    hidden_size=st.integers(1, 2000),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    device=st.sampled_from(["cpu", "cuda", "mps"]),
    training=st.booleans(),
    packed=st.booleans(),
    projected=st.booleans(),
    is_step=st.booleans(),
    transform=st.sampled_from([None, "func", "forward"]),
    layers=st.integers(1, 3),
    directions=st.integers(1, 2),
    parts=st.integers(1, 6),
    gpu=st.sampled_from([None, *DEVICES.values()]),
    precision=st.sampled_from(PRECISIONS),
    marked=st.booleans(),
    noisy=st.booleans(),
)


@given(problem=problems, forced=st.sampled_from([None, *PATHS]))
def test_every_problem_has_a_plan(problem, forced):
    with use_path(forced):
        chosen = plan(problem)
    assert chosen.path in PATHS
    assert chosen.reason


OPTIONS = {
    "plain": {},
    "training": {"training": True, "dropout": 0.5},
    "lengths": {"lengths": torch.tensor([40, 3])},
    "states": {"return_states": True},
    "bptt": {"bptt": 7},
    "noise": {"zoneout": 0.5},
    "list": {"zoneout": [0.5]},
    "batch_first": {"batch_first": True},
}


@pytest.mark.parametrize("steps", [1, 40])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_remembered_paths_are_the_plans(steps, options):
    """Ask twice, with other forced paths in between, with and without gradients."""
    gru, options = fastrnn.GRU(3, 40), Options(**options)
    if options.lengths is not None and steps == 1:
        options = options._replace(lengths=torch.tensor([1, 0]))
    x = torch.randn(2, steps, 3) if options.batch_first else torch.randn(steps, 2, 3)
    call = checked("gru", x, None, list(gru.parameters()), options)
    for forced in (None, *PATHS, None):
        for enabled in (True, False, True):
            with use_path(forced), torch.set_grad_enabled(enabled):
                assert path_of(call) == plan(problem_of(call)).path
                assert path_of(call, torch.float64) == plan(problem_of(call, torch.float64)).path


def test_packed_batches_of_as_many_rows_have_paths_of_their_own():
    weights = list(fastrnn.LSTM(4, 64).parameters())
    for sizes in ([1] * 96, [96], [2] * 40 + [1] * 16, [1] * 96):
        options = Options(batch_sizes=torch.tensor(sizes))
        call = checked("lstm", torch.randn(96, 4), None, weights, options)
        assert path_of(call) == plan(problem_of(call)).path


@pytest.fixture
def nothing_known():
    checks.remembered.cache_clear()
    yield
    checks.remembered.cache_clear()


def test_paths_are_remembered_with_the_sizes_that_were_checked(nothing_known):
    weights = list(fastrnn.GRU(3, 4).parameters())
    calls = [
        checked("gru", torch.randn(steps, 2, 3), None, weights, Options()) for steps in (7, 8, 7)
    ]
    assert calls[0].known is calls[2].known is not calls[1].known
    path_of(calls[0])
    with torch.no_grad():
        path_of(calls[0])
    assert [len(call.known.paths) for call in calls] == [2, 0, 2]


def test_steps_in_training_are_planned_as_such(monkeypatch, nothing_known):
    seen = []
    monkeypatch.setattr(
        fastrnn.planner, "plan", lambda problem: seen.append(problem) or plan(problem)
    )
    cell, x = fastrnn.RNNCell(3, 4, nonlinearity="identity"), torch.randn(2, 3)
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            cell(x)
    assert [(problem.is_step, problem.training) for problem in seen] == [(1, False), (1, True)]


def test_use_path_refuses_an_unknown_path():
    with (
        pytest.raises(
            ValueError,
            match="one of torch, kernels, operators, reference, resident, persistent, stepwise, "
            "staged, "
            "got 'cudnn'",
        ),
        use_path("cudnn"),
    ):
        pass


def test_use_path_says_what_a_path_is_called_now():
    with pytest.raises(ValueError, match="it is now called 'kernels', or 'operators'"):
        use_path("loop").__enter__()


def test_operators_can_be_asked_for():
    """On a CPU, even where there are kernels, which are used again afterwards."""
    gru, x = fastrnn.GRU(3, 4), torch.randn(40, 2, 3)
    with use_path("kernels"):
        expected = gru(x)[0]
        if cpu.kernel_gap(torch.float32) is None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(native, "forward", lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    gru(x)
                with use_path("operators"):
                    torch.testing.assert_close(gru(x)[0], expected)
        assert gru(x)[0].equal(expected)


def test_forced_paths_that_cannot_be():
    identity = GRU._replace(cell="rnn_identity")
    with use_path("torch"):
        assert plan(identity).path == "kernels"
        assert plan(identity._replace(transform="forward")).path == "reference"
        assert plan(identity._replace(dtype=torch.complex64)).path == "reference"
    with use_path("kernels"):
        assert plan(LSTM._replace(transform="forward")).path == "reference"
        assert plan(LSTM._replace(dtype=torch.complex64)).path == "reference"


def test_symbolic_sizes():
    """A tracer's symbolic sizes are not hashable, so nothing can be remembered."""
    gru = fastrnn.GRU(3, 4).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        trace = make_fx(lambda x: gru(x)[0], tracing_mode="symbolic", _allow_non_fake_inputs=True)
        traced = trace(x)
        torch.testing.assert_close(traced(x), gru(x)[0])


@pytest.mark.parametrize("cls", [fastrnn.LSTM, fastrnn.RNN])
def test_symbolic_sizes_of_weights(cls):
    module, x = cls(3, 8), torch.randn(6, 2, 3)
    weights = {name: weight.detach() for name, weight in module.named_parameters()}

    def run(weights, x):
        return torch.func.functional_call(module, weights, (x,))[0]

    traced = make_fx(run, tracing_mode="symbolic")(weights, x)
    torch.testing.assert_close(traced(weights, x), run(weights, x))


def test_packed_sequences_of_one_length_are_a_padded_batch(monkeypatch, nothing_known):
    """torch's LSTM then uses oneDNN, which our loop does not beat."""
    monkeypatch.setattr(machine, "_has_compiler", lambda: False)
    lstm, x = fastrnn.LSTM(3, 4), torch.randn(65, 2, 3)
    chosen, choose = [], fastrnn.planner.path_of
    monkeypatch.setattr(
        fastrnn.planner,
        "path_of",
        lambda *arguments: chosen.append(choose(*arguments)) or chosen[-1],
    )
    for lengths in ([65, 65], [65, 64]):
        lstm(pack_padded_sequence(x, torch.tensor(lengths)))
    assert chosen == ["torch", "operators"], "each call asks once"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gpu": None}, "device type 'cuda'"),
        ({"gpu": DEVICES["h100"]._replace(capability=75)}, "compute capability 8.0"),
        ({"gpu": DEVICES["mi300x"]._replace(capability=0)}, "fastrnn has no kernels for mi300x"),
        ({"gpu": DEVICES["mi300x"], "precision": "tf32x3"}, "in tf32x3"),
        ({"batch": MAX_BATCH + 1}, "more than 1048560"),
    ],
)
def test_what_has_no_kernel_goes_to_torch(change, says):
    problem = LSTM._replace(steps=48, device="cuda", gpu=DEVICES["h100"])
    assert plan(problem).path == "kernels"
    changed = plan(problem._replace(**change))
    assert changed.path == "torch"
    assert says in changed.reason
    assert changed.kernels is None


def test_packed_sequences_on_a_gpu_have_kernels():
    """For packed sequences cuDNN launches every step separately."""
    problem = LSTM._replace(steps=48, device="cuda", gpu=DEVICES["h100"], packed=True)
    assert plan(problem).path == "kernels"


@pytest.mark.parametrize(
    "change",
    [
        {"noisy": True},
        {"marked": True},
        {"projected": True, "marked": True},
        *({"cell": cell} for cell in ("layernorm_lstm", "layernorm_gru", "gru_reset_before")),
    ],
)
def test_what_torch_does_not_have_has_kernels(change):
    chosen = plan(LSTM._replace(steps=48, device="cuda", gpu=DEVICES["h100"], **change))
    assert chosen.path == "kernels"
    assert chosen.kernels is not None


@given(
    hidden=st.integers(1, 4096),
    batch=st.integers(0, MAX_BATCH),
    device=st.sampled_from([*DEVICES.values()]),
    cell=st.sampled_from(POINTWISE),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    directions=st.integers(1, 2),
    parts=st.integers(1, 6),
)
def test_every_size_has_kernels(hidden, batch, device, cell, dtype, directions, parts):
    problem = Problem(
        cell, 64, batch, 8, hidden, dtype, "cuda", True, directions=directions, parts=parts,
        gpu=device,
    )  # fmt: skip
    forward, backward = plan(problem).kernels
    for choice in (forward, backward):
        # No times were simulated for AMD, and perhaps none for some kernels.
        assert math.isnan(choice.step_us) or 0 <= choice.step_us < math.inf
        assert device.target == "cuda" or math.isnan(choice.step_us)


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "tf32x3"},
        {"gpu": DEVICES["mi300x"]},
        {"gpu": DEVICES["h100"]._replace(gap="an old driver")},
    ],
    ids=str,
)
def test_where_no_persistent_kernel_runs(change):
    problem = LSTM._replace(steps=48, hidden_size=512, device="cuda", gpu=DEVICES["h100"])
    with use_path("persistent"):
        assert [c.config.schedule for c in plan(problem).kernels] == ["persistent"] * 2
        with pytest.raises(ValueError, match="persistent"):
            plan(problem._replace(**change))
    assert all(c.config.schedule == "stepwise" for c in plan(problem._replace(**change)).kernels)


def test_cudnns_persistent_kernel_is_left_to_it():
    fields = {"dtype": torch.float16, "hidden_size": 512, "input_size": 512, "steps": 48}
    problem = LSTM._replace(device="cuda", gpu=DEVICES["h100"], **fields)
    assert plan(problem).path == "torch"
    for change in ({"layers": 2}, {"directions": 2}, {"batch": 12}, {"dtype": torch.bfloat16}):
        assert plan(problem._replace(**change)).path == "kernels"


@pytest.mark.parametrize(
    ("change", "algorithm"),
    [
        ({}, "persistent"),
        ({"packed": True}, "standard"),
        ({"projected": True}, "standard"),
        ({"input_size": 500}, "standard"),
        ({"hidden_size": 1152}, "standard"),
        ({"cell": "gru"}, "standard"),
        ({"cell": "rnn_relu"}, "persistent"),
        ({"gpu": DEVICES["a10"]}, "standard"),
        ({"gpu": DEVICES["mi300x"]}, "standard"),
        ({"gpu": None}, "standard"),
        ({"hidden_size": 128}, "small persistent"),
        ({"hidden_size": 192, "training": True}, "small persistent, standard"),
        ({"hidden_size": 192, "dtype": torch.float64}, "standard"),
        (
            {"cell": "rnn_tanh", "hidden_size": 384, "training": True},
            "small persistent, persistent",
        ),
    ],
)
def test_cudnns_algorithm(change, algorithm):
    problem = Problem("lstm", 64, 16, 512, 512, torch.float16, "cuda", gpu=DEVICES["h100"])
    assert cudnn_algorithm(problem._replace(**change)) == algorithm


def test_numbers_of_amds_architectures():
    assert [fastrnn.devices._gfx(name) for name in ("gfx942:sramecc+:xnack-", "gfx90a")] == [942, 0]
