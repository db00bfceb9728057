"""``fastrnn tune``: tables, including broken ones, and the decisions they lead to."""

from __future__ import annotations

import itertools
import math
import os
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrnn import crossover, devices, hardware, planner, tune, tuned
from fastrnn.__main__ import main
from fastrnn.cpu import machine
from fastrnn.hardware import Machine
from fastrnn.kernels.configs import DEVICES
from fastrnn.problem import Problem
from fastrnn.tune import Task
from fastrnn.tuned import Point, Row, Table

CPU = torch.device("cpu")
SHIPPED = sorted(tuned.SHIPPED.glob("*.csv"))
GRU = Problem("gru", steps=16, batch=8, input_size=64, hidden_size=64)
POINT = tuned.point_of(GRU)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache and no tables shipped with the package."""
    (tmp_path / "shipped").mkdir()
    monkeypatch.setenv("FASTRNN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    tuned.forget_what_was_read()
    yield tmp_path
    tuned.forget_what_was_read()


def table(rows, machine=None):
    versions = torch.__version__, tuned.__version__
    return Table(machine or hardware.cpu(), *versions, "2026-11-29", "", tuple(rows))


def rows_of(point, path, ratios):
    """Rows of T, B and H with their ratios."""
    return [Row(Point(*point.group, *sizes), path, 10.0, ratio) for sizes, ratio in ratios.items()]


OURS = crossover.ours(GRU)


def decide(ratios, problem=GRU):
    tuned.keep(table(rows_of(tuned.point_of(problem), OURS, ratios)))
    return planner.plan(problem)


# Tables and files.


def test_a_table_is_what_was_written():
    machine = Machine("cpu", "A: B, C # D", "x 1", "AVX9", 3, (32768, 1 << 20))
    rows = rows_of(POINT, "kernels", {(1, 1, 64): 0.5, (4, 1, 64): 123.456})
    written = table(rows, machine)._replace(limits="ATEN_CPU_CAPABILITY=avx2")
    assert tuned.table_in(tuned.text_of(written)) == written


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: "cell,mode\n" + text,
        lambda text: text.replace("# torch: ", "# other: "),
        lambda text: text.replace("threads: ", "threads: many"),
        lambda text: text.replace("hidden_size,", "width,"),
        lambda text: text[:-9],
        lambda text: text + "gru,forward\n",
        lambda text: text.replace(",0.500", ",nan"),
        lambda text: text.replace(",0.500", ",-1"),
        lambda text: text.replace(",16,8,64,", ",0,8,64,"),
        lambda text: text.replace("gru,", "gnu,"),
        lambda text: text.replace(OURS, "resident"),
        lambda text: text.replace("# device: cpu", "# device: abacus"),
        lambda text: text[: text.index("cell,")],
        lambda text: text + "x" * 200_000,
        lambda text: text.encode("utf-16"),
    ],
)
def test_a_broken_file_is_ignored_with_one_warning(caplog, damage):
    path = tuned.keep(table(rows_of(POINT, OURS, {(16, 8, 64): 0.5})))
    assert planner.plan(GRU).path == "torch"
    damaged = damage(path.read_text())
    path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    tuned.forget_what_was_read()
    assert planner.plan(GRU).source == planner.plan(GRU._replace(steps=17)).source == "model"
    assert len(caplog.records) == 1
    assert str(path) in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"torch": "1.0"},
        {"fastrnn": "9.9"},
        {"machine": hardware.cpu()._replace(threads=77)},
        {"machine": hardware.cpu()._replace(name="another")},
    ],
    ids=str,
)
def test_a_table_of_another_machine_or_version_is_not_used(caplog, change):
    other = table(rows_of(POINT, OURS, {(16, 8, 64): 0.5}))._replace(**change)
    path = tuned.file_of(hardware.cpu())
    assert tuned.file_of(other.machine) == path or "machine" in change
    path.parent.mkdir(mode=0o700)
    path.write_text(tuned.text_of(other))
    path.chmod(0o600)
    assert planner.plan(GRU).source == "model"
    assert "on another machine or with other versions" in caplog.text


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners and modes")
def test_a_file_that_others_can_write_is_not_used():
    path = tuned.keep(table(rows_of(POINT, OURS, {(16, 8, 64): 0.5})))
    path.chmod(0o666)
    tuned.forget_what_was_read()
    assert planner.plan(GRU).source == "model"


def test_a_shipped_table_stands_in_for_a_machine_like_its_own(folder):
    machine = hardware.cpu()
    kin = machine._replace(name="another name", caches=())
    shipped = folder / "shipped" / "a.csv"
    for change, source in (
        ({"threads": 77}, "model"),
        ({"vectors": "AVX9"}, "model"),
        ({"family": "another"}, "model"),
        ({}, f"table shipped with fastrnn, measured on {kin}, 2026-11-29"),
    ):
        other = table(rows_of(POINT, OURS, {(16, 8, 64): 0.5}), kin._replace(**change))
        shipped.write_text(tuned.text_of(other._replace(torch="1.0")))
        tuned.forget_what_was_read()
        assert planner.plan(GRU).source == source
    assert decide({(16, 8, 64): 2.0}).source == "table measured on this machine, 2026-11-29"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_model_agrees_with_the_tables_that_are_shipped(monkeypatch, path):
    """Choosing the slower path costs little or is rare: the mean loss is below 5 %."""
    made = tuned.table_in(path.read_text("utf-8"))
    if made.machine.device != "cpu":
        pytest.skip("there is no such model of a GPU")
    targets = (machine.AVX2, machine.AVX512, machine.AVX512_BF16, machine.NEON)
    (target,) = (target for target in targets if target.name == made.machine.vectors)
    monkeypatch.setattr(machine, "target", lambda: target)
    monkeypatch.setattr(crossover, "multiplies", lambda dtype: True)  # the table has rows for it
    assert len(made.rows) > 100
    losses = []
    for point, ours, _, ratio in made.rows:
        is_torch = crossover.expected_ratio(tuned.problem_of(point), ours, made.machine) < 1
        losses.append(math.log(max(ratio, 1.0) / (1.0 if is_torch else ratio)))
    assert math.exp(sum(losses) / len(losses)) < 1.05


def test_a_table_changes_the_next_process_only_by_tune():
    """Tables written by another process are not seen, so a call keeps its path."""
    assert planner.plan(GRU).source == "model"
    path = tuned.file_of(hardware.cpu())
    tuned.cache.write(path, tuned.text_of(table(rows_of(POINT, OURS, {(16, 8, 64): 9}))).encode())
    assert planner.plan(GRU).source == "model"
    tuned.forget_what_was_read()
    assert planner.plan(GRU).source != "model"


# Decisions.


@pytest.mark.parametrize(("ratio", "path"), [(0.5, "torch"), (0.99, "torch"), (1.01, OURS)])
def test_torch_where_it_was_faster(ratio, path):
    chosen = decide({(16, 8, 64): ratio})
    assert chosen.path == path
    assert f"{1 / ratio if path == 'torch' else ratio:.3g} times as fast" in chosen.reason


@pytest.mark.parametrize(
    "change",
    [
        {"cell": "lstm"},
        {"training": True},
        {"dtype": torch.float64},
        {"packed": True},
        {"is_step": True, "steps": 1},
    ],
    ids=str,
)
def test_what_was_not_measured_is_up_to_the_model(change):
    tuned.keep(table(rows_of(POINT, OURS, {(16, 8, 64): 0.5})))
    assert planner.plan(GRU).source != "model"
    assert planner.plan(GRU._replace(**change)).source == "model"


def test_the_two_kinds_of_plain_rnn_are_one():
    rnn = GRU._replace(cell="rnn_tanh")
    assert decide({(16, 8, 64): 0.5}, rnn).path == "torch"
    assert planner.plan(rnn._replace(cell="rnn_relu")).path == "torch"


def test_points_and_problems_are_each_others():
    for point in {task.point for task in tune.tasks_of(CPU)}:
        assert tuned.point_of(tuned.problem_of(point)) == point


GRID = {
    sizes: math.log(1 + sum(sizes)) for sizes in itertools.product((1, 4, 64), (1, 8), (64, 256))
}


def test_interpolation_has_the_points_and_nothing_beyond():
    for sizes, value in GRID.items():
        assert tuned.interpolated(GRID, sizes) == pytest.approx(value)
    assert tuned.interpolated(GRID, (999, 99, 9999)) == pytest.approx(GRID[64, 8, 256])
    assert tuned.interpolated(GRID, (0, 0, 1)) == pytest.approx(GRID[1, 1, 64])
    half = tuned.interpolated(GRID, (2, 1, 64))
    assert half == pytest.approx((GRID[1, 1, 64] + GRID[4, 1, 64]) / 2)


@given(
    missing=st.sets(st.sampled_from(sorted(GRID)), max_size=len(GRID) - 1),
    at=st.tuples(*[st.integers(0, 5000)] * 3),
)
def test_interpolation_without_some_points(missing, at):
    points = {sizes: value for sizes, value in GRID.items() if sizes not in missing}
    value = tuned.interpolated(points, at)
    assert min(points.values()) - 1e-9 <= value <= max(points.values()) + 1e-9
    if at in points:
        assert value == pytest.approx(points[at])


def test_what_was_measured_corrects_the_model(monkeypatch):
    """At a measured point it alone decides; elsewhere the model extrapolates it."""
    monkeypatch.setattr(crossover, "expected_ratio", lambda problem, *_: problem.steps / 8)
    assert "1.5 times" in decide({(16, 8, 64): 1.5}).reason
    assert "3 times" in planner.plan(GRU._replace(steps=32)).reason


# The model.


def expected(problem, machine=None):
    return crossover.expected_ratio(problem, "kernels", machine or hardware.cpu())


def test_the_model_follows_from_facts():
    """Fixed costs matter for small problems; problems bound by products gain little."""
    long = GRU._replace(steps=1024, batch=1)
    assert expected(long) > 2 * expected(long._replace(steps=1))
    assert expected(long) > 2 * expected(long._replace(batch=64, hidden_size=1024, input_size=1024))
    lstm = long._replace(cell="lstm")
    assert expected(lstm) < expected(lstm._replace(packed=True))
    assert 0.5 < expected(lstm._replace(steps=256, batch=256, hidden_size=512)) < 2


def test_the_model_counts_what_the_cpu_does_not_multiply(monkeypatch):
    half = GRU._replace(dtype=torch.float16, steps=64)
    monkeypatch.setattr(crossover, "multiplies", lambda dtype: True)
    native = expected(half)
    monkeypatch.setattr(crossover, "multiplies", lambda dtype: False)
    assert expected(half) > 2 * native


def test_the_model_knows_caches():
    machine = hardware.cpu()._replace(threads=1)
    lstm = Problem("lstm", 256, 1, 1024, 1024)
    times = [
        crossover._us(lstm, crossover._COSTS["kernels"][0], machine._replace(caches=caches), True)
        for caches in ((), (1 << 15, 1 << 30), (1 << 15, 1 << 20, 1 << 25), (1 << 15, 1 << 20))
    ]
    assert times[0] == times[1] < times[2] < times[3]


# Measuring.


class Clock:
    """A clock that advances only when something is measured."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(tune.time, "perf_counter", lambda: self.now)


def test_no_task_begins_after_the_time_is_over(monkeypatch):
    clock, shares, done = Clock(monkeypatch), [], []

    def measure(task, share, left):
        shares.append((share, left))
        clock.now += 3.0
        return None if task.point.steps == 4 else Row(task.point, task.path, 1.0, 1.0)

    tasks = [Task(POINT._replace(steps=steps), "kernels") for steps in range(1, 9)]
    rows = tune.tune(tasks, measure, 10.0, done.append)
    assert [row.point.steps for row in rows] == [1, 2, 3]
    assert done == [1, 2, 3, 4]
    assert shares == [(10 / 8, 10), (7 / 7, 7), (4 / 6, 4), (1 / 5, 1)]


def test_the_tasks_of_a_cpu():
    points = [task.point for task in tune.tasks_of(CPU)]
    assert len(set(points)) == len(points)
    flops = [tune._flops(point) for point in points]
    assert max(flops) <= tune._MOST_FLOPS
    costs = [tune._cost(point) for point in points]
    assert costs == sorted(costs), "what there is no time for is the largest"
    kinds = {point.kind for point in points}
    assert kinds == {"plain", "packed", "projected", "step"}
    assert all(tune._made(point, CPU) for point in points[::40])
    ragged = [point for point in points if point.kind == "packed"]
    assert all(len(set(tune._made(point, CPU)[0].lengths)) > 1 for point in ragged[::7])


@pytest.mark.parametrize("task", tune.tasks_of(CPU)[:60:7], ids=str)
def test_what_is_measured_is_right_and_takes_time(task):
    row = tune.measure_on(CPU)(task, 0.0, math.inf)
    assert row is not None
    assert (row.point, row.path) == task
    assert row.us > 0 < row.ratio


def test_wrong_results_are_not_timed(monkeypatch, caplog):
    monkeypatch.setattr(tune, "worst_error", lambda *_: (math.nan, 1e-6))
    monkeypatch.setattr(tune, "seconds_of", lambda *_: 1 / 0)
    assert tune.measure_on(CPU)(tune.tasks_of(CPU)[0], 1.0, 100.0) is None
    assert "is wrong" in caplog.text


def test_what_fails_leaves_the_others(monkeypatch, caplog):
    task = tune.tasks_of(CPU)[0]
    monkeypatch.setattr(tune, "_made", lambda *_: [][0])
    assert tune.measure_on(CPU)(task, 1.0, 100.0) is None
    assert f"{task} failed: list index" in caplog.text


def test_what_would_take_too_long_is_left_out(monkeypatch):
    monkeypatch.setattr(tune, "seconds_of", lambda *_: 1.0)
    assert tune.measure_on(CPU)(tune.tasks_of(CPU)[0], 1.0, 30.0) is None


def test_a_ratio_is_that_of_undisturbed_samples(monkeypatch):
    """Each path is measured separately, and the shortest times count."""
    seen, times = [], itertools.cycle([1.0, 2.0, 3.0])

    def sample(call, repeats, device):
        seen.append(planner.forced.path)
        return next(times) * (0.01 if planner.forced.path is None else 0.005)

    monkeypatch.setattr(tune, "seconds_of", sample)
    row = tune.measure_on(CPU)(Task(POINT, OURS), 0.0, 100.0)
    assert row.ratio == 2.0
    assert row.us == 5000.0
    assert set(seen) == {None, OURS}


# The command line.


def test_tune_show_and_forget(capsys, monkeypatch):
    few = tune.tasks_of(CPU)[:5]
    monkeypatch.setattr(tune, "tasks_of", lambda device: few)
    monkeypatch.setattr(tune, "measure_on", lambda device: lambda task, *_: Row(*task, 1.0, 2.0))
    plan = ["plan", "--cell", few[0].point.cell, "--H", "64", "--T", "1"]
    plan += ["--step"] if few[0].point.kind == "step" else []
    assert main(["tune", "--device", "cpu", "--show"]) == 0
    assert capsys.readouterr().out.endswith("a model decides; run fastrnn tune to measure one\n")
    assert main(["tune", "--device", "cpu", "--seconds", "5"]) == 0
    assert "5 points, saved to" in capsys.readouterr().out
    main(["tune", "--device", "cpu", "--show"])
    out = capsys.readouterr().out
    assert ": table measured on this machine, 20" in out
    assert " ".join((*few[0].point.group, few[0].path)) in out
    main(plan)
    assert "decided by:      table measured on this machine, 20" in capsys.readouterr().out
    assert main(["tune", "--device", "cpu", "--forget"]) == 0
    assert "table deleted" in capsys.readouterr().out
    main(plan)
    assert "decided by:      model" in capsys.readouterr().out
    main(["tune", "--device", "cpu", "--forget"])
    assert "no table to delete" in capsys.readouterr().out


def test_tables_for_the_package(capsys, monkeypatch, folder):
    """`--out` names the file after its machine and records limits imposed on torch."""
    monkeypatch.setattr(tune, "tasks_of", lambda device: [])
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    main(["tune", "--device", "cpu", "--out", str(folder / "shipped")])
    (path,) = (folder / "shipped").iterdir()
    assert hardware.cpu().vectors.lower().split("-")[0] in path.name
    assert "# limits: ATEN_CPU_CAPABILITY=avx2\n" in path.read_text()


def test_a_cache_that_cannot_be_written(capsys, monkeypatch, folder):
    (folder / "cache").write_text("a file")
    monkeypatch.setattr(tune, "tasks_of", lambda device: [])
    with pytest.raises(SystemExit) as error:
        main(["tune", "--device", "cpu"])
    assert error.value.code == 2
    assert "cannot save the table" in capsys.readouterr().err


def test_progress_without_rich(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with tune._progress("a machine", 120) as progress:
        for done in range(1, 121):
            progress(done)
    err = capsys.readouterr().err.splitlines()
    assert err == ["measuring a machine", "50 of 120", "100 of 120"]


# GPUs, none of which needs to be present.

H100 = DEVICES["h100"]
LAYER = Problem("lstm", 256, 16, 512, 512, torch.bfloat16, "cuda", gpu=H100, training=True)


def keep_gpu(ratios, problem=LAYER):
    """Measurements by mode and schedule, all at one point."""
    rows = [
        Row(tuned.point_of(problem._replace(training=mode == "training")), schedule, 10.0, ratio)
        for (mode, schedule), ratio in ratios.items()
    ]
    tuned.keep(table(rows, hardware.gpu(problem.gpu)))


def test_a_gpu_takes_the_schedule_that_was_fastest():
    simulated = planner.plan(LAYER)
    assert simulated.source == "model"
    assert [choice.config.schedule for choice in simulated.kernels] == ["persistent"] * 2
    keep_gpu({
        ("forward", "persistent"): 1.5, ("forward", "stepwise"): 1.2,
        ("training", "persistent"): 1.1, ("training", "stepwise"): 1.7,
    })  # fmt: skip
    chosen = planner.plan(LAYER)
    assert [choice.config.schedule for choice in chosen.kernels] == ["persistent", "stepwise"]
    assert (chosen.path, chosen.source) == ("kernels", "table measured on this machine, 2026-11-29")
    assert "stepwise kernels; 1.7 times as fast" in chosen.reason
    assert "persistent kernels; 1.5 times" in planner.plan(LAYER._replace(training=False)).reason
    assert planner.plan(LAYER._replace(gpu=DEVICES["a100"])).source == "model"


def test_a_gpu_takes_torch_where_that_was_faster():
    keep_gpu({("training", "persistent"): 0.8, ("training", "stepwise"): 0.4})
    chosen = planner.plan(LAYER)
    assert (chosen.path, chosen.source) == ("torch", "table measured on this machine, 2026-11-29")


def test_what_runs_otherwise_than_what_was_measured_is_up_to_the_model():
    keep_gpu({("training", "resident"): 9.0})
    assert devices._best(LAYER).path == "resident"
    assert planner.plan(LAYER).source == "model", "H=512 does not fit"
    half = LAYER._replace(dtype=torch.float16, training=False)
    keep_gpu({("forward", "persistent"): 2.0}, half)
    assert planner.plan(half).source != "model"
    assert planner.plan(half._replace(layers=2)).source == "model", "cuDNN is another"
    with planner.use_path("stepwise"):
        assert planner.plan(half).kernels[0].config.schedule == "stepwise"


def test_float32_on_a_gpu_is_told_by_how_it_is_multiplied():
    assert tuned.point_of(LAYER._replace(dtype=torch.float32)).format == "tf32"
    assert tuned.point_of(LAYER._replace(dtype=torch.float32, precision="ieee")).format == "ieee"
    assert tuned.dtype_of(POINT._replace(format="tf32x3")) == torch.float32


def test_the_tasks_of_a_gpu(monkeypatch):
    monkeypatch.setattr(devices, "gpu", lambda index=None: H100)
    tasks = tune.tasks_of(torch.device("cuda"))
    assert len(set(tasks)) == len(tasks)
    assert {task.path for task in tasks} == {"resident", "persistent", "stepwise"}
    assert {task.point.format for task in tasks} == {"bfloat16", "float16", "tf32"}
    assert tasks[0].point.hidden_size == 512
    rows = tune.tune(tasks, lambda task, *_: Row(*task, 1.0, 2.0), 100.0, lambda done: None)
    made = table(rows, hardware.gpu(H100))
    assert tuned.table_in(tuned.text_of(made)) == made


def test_machines_that_are_there(monkeypatch):
    monkeypatch.setattr(devices, "gpu", lambda index=None: None)
    assert tune.machines(None) == [(CPU, hardware.cpu())]
    monkeypatch.setattr(devices, "gpu", lambda index=None: H100)
    assert [machine.device for _, machine in tune.machines(None)] == ["cpu", "cuda"]
    assert str(tune.machines(None)[1][1]) == "h100"


# Identification of machines.


def test_the_cpu_here():
    machine = hardware.cpu()
    assert 1 <= machine.threads <= torch.get_num_threads()
    assert machine.name
    assert machine.family
    assert list(machine.caches) == sorted(machine.caches)
    assert str(machine).endswith("thread" if machine.threads == 1 else "threads")


def test_a_cpu_that_says_nothing(monkeypatch):
    def unreadable(*args, **options):
        raise PermissionError

    monkeypatch.setattr(hardware.Path, "read_text", unreadable)
    monkeypatch.setattr(hardware.os, "sysconf_names", {}, raising=False)
    assert hardware._caches.__wrapped__() == ()
    name, family = hardware._cpu_name.__wrapped__()
    assert name
    assert family
    machine = hardware.cpu()._replace(caches=())
    assert math.isfinite(crossover.expected_ratio(GRU, "operators", machine))
