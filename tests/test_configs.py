"""Launch configurations that fit a device, and the table of simulated times."""

from __future__ import annotations

import csv
import itertools
import math

import gpu_cases
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastrnn.cells import CELLS
from fastrnn.kernels import configs
from fastrnn.kernels.configs import DEVICES, Choice, Config, Shape, Simulated, step_us

H100, A100, MI300X = (DEVICES[name] for name in ("h100", "a100", "mi300x"))
LSTM = Shape(4, 16, 256, 1, 2, "tf32")
FLOAT32 = LSTM._replace(itemsize=4)

shapes = st.builds(
    Shape,
    n_gates=st.sampled_from([1, 2, 3, 4]),
    batch=st.integers(1, 5000),
    hidden_size=st.integers(1, 4096),
    groups=st.sampled_from([1, 2, 6]),
    itemsize=st.sampled_from([2, 4]),
    precision=st.sampled_from(configs.PRECISIONS),
    n_more=st.integers(0, 3),
)
involved = shapes.map(lambda shape: shape._replace(staged=True))


def named(value):
    return getattr(value, "name", None) or str(value)


@pytest.mark.parametrize("device", DEVICES.values(), ids=named)
@given(shape=shapes | involved, backward=st.booleans())
@example(Shape(1, 1, 1, 1, 2, "ieee"), False)
@example(Shape(3, 1, 128, 1, 2, "ieee", staged=True, n_late=1), True)
@example(Shape(4, 4096, 4096, 2, 4, "tf32x3"), True)
@example(Shape(4, 64, 1024, 1, 2, "tf32"), True)
@example(Shape(3, 17, 99, 2, 4, "tf32"), False)
def test_configurations_fit_the_device(device, shape, backward):
    chosen = configs.choose(shape, device, backward=backward)
    found = list(configs.candidates(shape, device, backward=backward))
    assert chosen.config in found
    assert math.isnan(chosen.step_us) or chosen.step_us > 0
    assert len(set(found)) == len(found)
    assert found[-1].schedule == ("staged" if shape.staged else "stepwise"), "runs everything"
    assert not shape.staged or {config.schedule for config in found} <= {"staged", "resident"}
    for config in found:
        assert config.schedule in configs.SCHEDULES
        assert all(n & (n - 1) == 0 for n in (config.block_b, config.block_h, config.block_k))
        assert config.num_warps in (4, 8)
        assert 1 <= config.tiles <= 65535
        slices = -(-shape.hidden_size // config.block_h)
        if config.schedule == "resident":
            assert slices == 1
            assert config.block_k == config.block_h
        if config.schedule == "persistent":
            check_persistent(config, shape, device, backward)
            assert slices * config.tiles * shape.groups <= device.processors
        else:
            assert config.in_registers == 0
        if config.schedule in ("resident", "persistent"):
            taken = configs.shared_memory(config, shape, backward=backward)
            assert taken <= device.shared_memory


def check_persistent(config, shape, device, backward):
    """Check the limits of fragments.py and words.py."""
    assert configs.persistent_gap(shape, device) is None
    assert device.target == "cuda"
    assert shape.itemsize == 2 or shape.precision == "tf32"
    assert config.block_h == 16
    assert config.block_b == 16 or (config.block_b == 32 and shape.batch > 16)
    assert config.block_k >= 16, "a product of tensor cores"
    assert config.block_k * shape.itemsize in (32, 64), "8 or 16 bytes of a row a thread"
    columns = shape.hidden_size * (shape.n_gates if backward else 1)
    assert 0 <= config.in_registers <= -(-columns // (config.num_warps * config.block_k))


@pytest.mark.parametrize("schedule", configs.SCHEDULES)
@pytest.mark.parametrize("device", DEVICES.values(), ids=named)
def test_only_one_schedule(device, schedule):
    small = Shape(4, 16, 64, 2, 2, "ieee", staged=schedule == "staged")
    choice = configs.choose(small, device, schedule=schedule)
    if schedule == "persistent" and device.target != "cuda":
        assert choice is None
    else:
        assert choice.config.schedule == schedule
    large = small._replace(hidden_size=4096)
    is_found = configs.choose(large, device, schedule=schedule) is not None
    assert is_found == (schedule in ("stepwise", "staged"))
    other = small._replace(staged=not small.staged)
    is_found = configs.choose(other, device, schedule=schedule) is not None
    assert is_found == (schedule == "resident"), "of both kinds"


@pytest.mark.parametrize("device", [DEVICES[name] for name in ("a100", "h100", "b200")], ids=named)
@pytest.mark.parametrize("backward", [False, True])
def test_what_is_resident_of_steps_that_are_more_than_a_product(device, backward):
    """Resident if it compiles without spilling; no times are simulated."""
    for name, kind, hidden, change, fits in (
        ("layernorm_lstm", (2, "tf32"), 128, {}, True),
        ("layernorm_lstm", (2, "tf32"), 128, {"marked": True}, False),
        ("layernorm_lstm", (2, "tf32"), 64, {"marked": True, "noisy": True}, True),
        ("layernorm_lstm", (4, "tf32"), 64, {"marked": True}, True),
        ("layernorm_lstm", (4, "tf32"), 65, {}, False),
        ("layernorm_lstm", (4, "ieee"), 32, {}, True),
        ("layernorm_lstm", (4, "tf32x3"), 16, {}, False),
        ("layernorm_gru", (4, "tf32x3"), 32, {}, True),
        ("layernorm_gru", (2, "tf32"), 128, {"noisy": True}, True),
        ("layernorm_gru", (2, "tf32"), 127, {}, False),
        ("gru_reset_before", (2, "tf32"), 128, {"marked": True, "noisy": True}, True),
        ("gru_reset_before", (2, "tf32"), 129, {}, False),
        ("gru_reset_before", (8, "tf32"), 16, {}, False),
        ("gru_reset_before", (2, "tf32"), 16, {"projected": True}, False),
    ):
        shape = Shape.of(CELLS[name], 16, hidden, 1, *kind)._replace(staged=True, **change)
        choice = configs.choose(shape, device, backward=backward)
        assert choice.config.schedule == ("resident" if fits else "staged"), (name, kind, hidden)
        assert math.isnan(choice.step_us)


@pytest.mark.parametrize(
    ("shape", "device", "says"),
    [
        (LSTM, H100, None),
        (LSTM._replace(precision="ieee"), A100, None),  # applies to float32 only
        (FLOAT32, H100, None),
        (FLOAT32._replace(precision="tf32x3"), H100, "float32 in tf32x3"),
        (FLOAT32._replace(precision="ieee"), H100, "float32 in ieee"),
        (LSTM, MI300X, "for mi300x"),
        (LSTM, H100._replace(gap="no cooperative launches"), "no cooperative launches"),
    ],
    ids=named,
)
@pytest.mark.parametrize("backward", [False, True])
def test_where_no_persistent_kernel_is(shape, device, says, backward):
    gap = configs.persistent_gap(shape, device)
    assert gap is None if says is None else says in gap
    found = {config.schedule for config in configs.candidates(shape, device, backward=backward)}
    assert ("persistent" in found) == (says is None)
    asked = configs.choose(shape, device, backward=backward, schedule="persistent")
    assert (asked is None) == (says is not None)


def test_too_few_processors_for_one_group():
    wide = LSTM._replace(hidden_size=1024)  # 64 programs
    for processors, is_there in ((64, True), (63, False)):
        device = H100._replace(processors=processors)
        assert (configs.choose(wide, device, schedule="persistent") is None) != is_there
    both = wide._replace(groups=2)
    assert configs.choose(both, H100._replace(processors=127), schedule="persistent") is None


def test_one_or_two_tiles_a_program():
    for batch, blocks in ((1, {16}), (16, {16}), (17, {16, 32})):
        shape = LSTM._replace(batch=batch)
        found = [c for c in configs.candidates(shape, H100) if c.schedule == "persistent"]
        assert {config.block_b for config in found} == blocks
        assert {config.num_warps for config in found} == {4, 8}


GPUS = ("h100", "h200")  # on which tests/test_gpu.py must skip nothing


def found_for(cell, shape, name, marked):
    """Candidates for a layer of tests/test_gpu.py, for every GPU and pass."""
    _, batch, _, hidden, directions = shape
    precision = name if name in configs.PRECISIONS else "tf32"
    facts = batch, hidden, directions, 4 if name == precision else 2, precision
    problem = Shape.of(CELLS[cell], *facts)._replace(marked=marked)
    for gpu, backward in itertools.product(GPUS, (False, True)):
        yield list(configs.candidates(problem, DEVICES[gpu], backward=backward))


@pytest.mark.parametrize("name", ["PERSISTENT", "WITH_MARKS", "WITH_NAN", "REPEATED", "BOUNDED"])
def test_persistent_cases_for_a_gpu_are_there(name):
    cases = getattr(gpu_cases, name)
    assert len(set(cases)) == len(cases)
    for case in cases:
        for found in found_for(case.cell, case.shape, case.format, case.marked):
            kinds = {(c.block_b, c.num_warps) for c in found if c.schedule == "persistent"}
            assert (case.block_b, case.num_warps) in kinds, case
    formats = {case.format for case in cases}
    assert formats == ({"bf16"} if name == "BOUNDED" else set(gpu_cases.FORMATS))


def test_persistent_cases_for_a_gpu_are_of_every_kind():
    for cases, kinds in (
        (gpu_cases.PERSISTENT, {(16, 4), (16, 8), (32, 8)}),
        (gpu_cases.WITH_MARKS, {(16, 4), (16, 8)}),
    ):
        for name in gpu_cases.FORMATS:
            assert {(c.block_b, c.num_warps) for c in cases if c.format == name} == kinds


def test_schedules_for_a_gpu_are_there():
    small = itertools.product(["persistent"], gpu_cases.FORMATS, gpu_cases.SMALL)
    pointwise = [name for name, cell in CELLS.items() if cell.is_pointwise]
    for cells, layers, marked in (
        (pointwise, small, False),
        (gpu_cases.MARKED, gpu_cases.MARKED_LAYERS, True),
    ):
        for cell, (schedule, name, shape) in itertools.product(cells, layers):
            for found in found_for(cell, shape, name, marked):
                assert schedule in {config.schedule for config in found}, (cell, schedule, shape)


# The table of simulated times.


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Replace the rows of the package."""

    def forget():
        configs._simulated.cache_clear()
        configs.choose.cache_clear()

    def put(*rows):
        lines = [",".join(map(str, row)) for row in (Simulated._fields, *rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        forget()

    path = tmp_path / "steps.csv"
    monkeypatch.setattr(configs, "STEPS", path)
    yield put
    forget()


PERSISTENT = Config("persistent", 16, 16, 32, 8, 1, 8)
STEPWISE = Config("stepwise", 16, 32, 64, 4, 0, 65535)
# An LSTM in bfloat16, forward, on an H100.
AT_256 = Simulated(90, "forward", 4, "half", "persistent", 16, 8, 256, 1000, 1600)
AT_512 = AT_256._replace(hidden_size=512, alone=2000, full=3000)
ALONE = H100._replace(processors=10**9)  # a launch takes a negligible share


@pytest.mark.parametrize(
    ("hidden", "cycles"), [(1, 1000), (256, 1000), (320, 1250), (512, 2000), (768, 3000)]
)
def test_time_between_sizes(table, hidden, cycles):
    """Beyond the largest size, the time is proportional to the size."""
    table(AT_512, AT_256)
    found = step_us(PERSISTENT, LSTM._replace(hidden_size=hidden), ALONE)
    assert found == pytest.approx(cycles / H100.clock_mhz, rel=1e-5)


@pytest.mark.parametrize(
    ("batch", "directions", "programs", "launches"),
    [(1, 1, 16, 1), (16, 1, 16, 1), (17, 1, 32, 1), (33, 2, 96, 1), (128, 1, 128, 1),
     (129, 1, 128, 2), (300, 1, 128, 3)],
)  # fmt: skip
def test_share_of_the_multiprocessors(table, batch, directions, programs, launches):
    """Interpolates between one group alone and a full GPU; more tiles need more launches."""
    table(AT_256)
    shape = LSTM._replace(batch=batch, groups=directions)
    cycles = 1000 + 600 * (programs - 16) / (H100.processors - 16)
    found = step_us(PERSISTENT, shape, H100)
    assert found == pytest.approx(launches * cycles / H100.clock_mhz)


@pytest.mark.parametrize(("batch", "waves"), [(16 * 132, 1), (16 * 132 + 1, 2)])
def test_more_programs_than_multiprocessors_take_turns(table, batch, waves):
    table(AT_256._replace(schedule="resident", hidden_size=64))
    shape = LSTM._replace(batch=batch, hidden_size=64)
    found = step_us(Config("resident", 16, 64, 64, 8, 0, 65535), shape, H100)
    assert found == pytest.approx(waves * 1600 / H100.clock_mhz)


def test_a_launch_for_every_step(table):
    table(AT_256._replace(schedule="stepwise", num_warps=4))
    expected = configs._LAUNCH_US + 1000 / H100.clock_mhz
    assert step_us(STEPWISE, LSTM, H100) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("device", "architecture"),
    [("a100", 80), ("a10", 80), ("rtx4090", 80), ("l4", 80), ("h100", 90), ("b200", 90)],
)
def test_which_gpu_stands_for_which(table, device, architecture):
    device = DEVICES[device]._replace(processors=10**9)
    table(AT_256, AT_256._replace(architecture=80, alone=700))
    cycles = {80: 700, 90: 1000}[architecture]
    assert step_us(PERSISTENT, LSTM, device) == pytest.approx(cycles / device.clock_mhz, rel=1e-5)


def test_each_kind_has_its_own_time(table):
    changes = [
        {},
        {"run": "backward"},
        {"n_gates": 3},
        {"n_gates": 1},
        {"kind": "tf32"},
        {"block_b": 32},
        {"num_warps": 4},
    ]
    table(*(AT_256._replace(alone=1000 + k, full=1000 + k, **c) for k, c in enumerate(changes)))
    found = [
        step_us(PERSISTENT, LSTM, H100),
        step_us(PERSISTENT, LSTM, H100, backward=True),
        step_us(PERSISTENT, LSTM._replace(n_gates=3), H100),
        step_us(PERSISTENT, LSTM._replace(n_gates=1), H100),
        step_us(PERSISTENT, FLOAT32, H100),
        step_us(PERSISTENT._replace(block_b=32), LSTM, H100),
        step_us(PERSISTENT._replace(num_warps=4), LSTM, H100),
    ]
    assert found == pytest.approx([(1000 + k) / H100.clock_mhz for k in range(len(changes))])
    assert step_us(PERSISTENT, LSTM._replace(n_gates=2), H100) == found[2]
    for precision in configs.PRECISIONS:  # applies to float32 only
        assert step_us(PERSISTENT, LSTM._replace(precision=precision), H100) == found[0]


@pytest.mark.parametrize(
    ("config", "shape", "device"),
    [
        (PERSISTENT, LSTM, MI300X),
        (PERSISTENT, FLOAT32, H100),
        (PERSISTENT, LSTM._replace(n_gates=1), H100),
        (PERSISTENT._replace(block_b=32), LSTM, H100),
        (STEPWISE, LSTM, H100),
    ],
    ids=named,
)
def test_no_time_of_what_was_not_simulated(table, config, shape, device):
    table(AT_256)
    assert math.isnan(step_us(config, shape, device))
    assert not math.isnan(step_us(PERSISTENT, LSTM, H100))


@pytest.mark.parametrize(
    ("changes", "device"), [({}, A100), ({"num_warps": 8}, H100), ({"block_b": 64}, H100)]
)
def test_what_stands_in(table, changes, device):
    """An H100 stands in for an A100; fewer warps and rows for numbers not simulated."""
    table(AT_256._replace(schedule="stepwise", block_b=32, num_warps=4))
    config = STEPWISE._replace(block_b=32)._replace(**changes)
    expected = configs._LAUNCH_US + 1000 / device.clock_mhz
    assert step_us(config, LSTM, device) == pytest.approx(expected)


@pytest.mark.parametrize("device", DEVICES.values(), ids=named)
@pytest.mark.parametrize("backward", [False, True])
def test_without_times_the_first_that_fits(table, device, backward):
    table()
    for shape in (LSTM._replace(hidden_size=64), LSTM, LSTM._replace(hidden_size=4096)):
        chosen = configs.choose(shape, device, backward=backward)
        assert chosen.config == next(configs.candidates(shape, device, backward=backward))
        assert math.isnan(chosen.step_us)


@pytest.mark.parametrize("fastest", ["resident", "persistent", "stepwise"])
def test_the_fastest_is_chosen(table, fastest):
    shape = LSTM._replace(hidden_size=64)
    found = list(configs.candidates(shape, H100))
    assert {config.schedule for config in found} == {*configs.SCHEDULES} - {"staged"}
    rows = {
        (c.schedule, c.block_b, c.num_warps): AT_256._replace(
            schedule=c.schedule, block_b=c.block_b, num_warps=c.num_warps, alone=alone, full=alone
        )
        for c in found
        for alone in [100 if c.schedule == fastest else 100_000]
    }
    table(*rows.values())
    chosen = configs.choose(shape, H100)
    assert chosen.config.schedule == fastest
    assert chosen.step_us == min(step_us(config, shape, H100) for config in found)
    # A candidate without a time loses to any with one.
    table(*(row for key, row in rows.items() if key[0] == fastest))
    assert configs.choose(shape, H100).config.schedule == fastest


def test_a_choice_in_words():
    text = "persistent, 16 rows x 16 units per program, 8 warps"
    assert str(Choice(PERSISTENT, math.nan)) == text
    assert str(Choice(PERSISTENT, 1.234)) == f"{text}: 1.23 us per step, simulated"


def test_the_table_of_the_package():
    with configs.STEPS.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == Simulated._fields
    assert rows
    found = [row for of_key in configs._simulated().values() for row in of_key]
    assert len(found) == len(rows)
    assert len({row[:-2] for row in found}) == len(rows)
    n_gates = {max(cell.n_gates, 3) if cell.n_gates > 1 else 1 for cell in CELLS.values()}
    for row in found:
        assert row.architecture in (80, 90)
        assert row.run in ("forward", "backward")
        assert row.n_gates in n_gates
        assert row.kind in ("half", *configs.PRECISIONS)
        assert row.schedule in configs.SCHEDULES
        assert row.alone > 0
        assert row.full > 0
