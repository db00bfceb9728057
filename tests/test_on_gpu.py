"""The GPU program on a CPU: its runner, its table, and its parts as far as a CPU can run them."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from gpu_stand_in import as_on_a_gpu
from kernel_harness import as_on_a_device

from fastrnn.bench import gpu_parts, gpu_steps, gpu_telling, measure, on_gpu, providers, results
from fastrnn.bench.environment import environment
from fastrnn.bench.gpu_parts import Rows, run_cases
from fastrnn.bench.gpu_telling import Telling
from fastrnn.bench.limits import Bound
from fastrnn.bench.on_gpu import Part
from fastrnn.bench.registry import Case
from fastrnn.bench.results import Band, Row, Times
from fastrnn.kernels.configs import DEVICES
from fastrnn.planner import PATHS

CPU = torch.device("cpu")
RIGHT = {"status": "ok", "reason": "", "error": 0.5, "ran": "persistent"}


def python(code: str, *arguments: str) -> tuple[str, ...]:
    return sys.executable, "-c", code, *arguments


def run(parts: list[Part], out, seconds: float) -> dict:
    evidence: dict = {}
    on_gpu.run_parts(parts, out, evidence, time.monotonic() + seconds)
    assert json.loads((out / "gpu.json").read_text()) == evidence
    return evidence


# The runner.


def test_a_part_costs_only_itself(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(on_gpu, "_GRACE", 0.2)
    hangs = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    found = "import json, sys; print(*json.load(open(sys.argv[1] + '/gpu.json'))['parts'])"
    parts = [
        Part("hangs", python(hangs), 0.05),
        Part("crashes", python("import os; print('so far', flush=True); os.abort()"), 0.5),
        Part("is missing", ("no-such-program",), 0.5),
        Part("is refused", python("import sys; print('Device not supported'); sys.exit(9)"), 0.5),
        Part("is right", python(found, "{out}"), 0.5),
    ]
    evidence = run(parts, tmp_path, 20.0)
    parts = evidence["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {
        "hangs": "out of time",
        "crashes": -6,
        "is missing": "not run",
        "is refused": "not run",
        "is right": 0,
    }
    assert [name for name, part in parts.items() if part["failed"]] == ["hangs", "crashes"]
    assert evidence["failed"]
    assert 0.9 < parts["hangs"]["seconds"] < 5
    assert parts["crashes"]["output"] == "so far\n"
    # Earlier results are written before a part begins.
    assert parts["is right"]["output"] == "hangs crashes is missing is refused\n"
    assert "so far\n== is missing: at most" in capsys.readouterr().out


CASES_OF_A_PROCESS = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
import torch
from fastrnn.bench import gpu_parts

torch.cuda.synchronize = lambda: None

def run(case):
    if case.name == "dies":
        os._exit(7)
    if case.name == "hangs":
        time.sleep(60)
    if case.name == "raises":
        raise ValueError("because")
    return {"status": "ok", "reason": "", "error": 0.5, "ran": "persistent"}

names = ["right", "dies", "hangs", "raises", "right too"]
cases = [SimpleNamespace(name=name) for name in names]
part = gpu_parts.Rows(cases, run, limit=2.0)
sys.exit(gpu_parts.run_cases(part, "telling", Path(sys.argv[1]), 60))
"""


@pytest.mark.long
def test_a_case_costs_only_itself(tmp_path):
    (tmp_path / "telling.json").write_text("[{}]")  # from an earlier run
    evidence = run([Part("telling", python(CASES_OF_A_PROCESS, "{out}"), 1.0)], tmp_path, 100.0)
    part = evidence["parts"]["telling"]
    assert [(row["name"], row["status"]) for row in part["rows"]] == [
        ("right", "ok"),
        ("dies", "cut off"),
        ("hangs", "cut off"),
        ("raises", "failed"),
        ("right too", "ok"),
    ]
    assert part["rows"][3]["reason"] == "ValueError: because"
    assert part["rows"][3]["traceback"].startswith("Traceback")
    assert (part["status"], part["starts"], part["failed"]) == (0, 3, True)
    assert part["rows"] == json.loads((tmp_path / "telling.json").read_text())
    assert "right too" in part["output"]


@pytest.mark.parametrize(("count", "is_endless"), [(2, False), (1, True), (2, True)])
def test_a_part_that_is_cut_off_leaves_its_rows(monkeypatch, tmp_path, count, is_endless):
    """A part that is cut off has failed, unless it is endless and a case has finished."""
    monkeypatch.setattr(on_gpu, "_GRACE", 0.2)
    rows = [{"name": "a", **RIGHT}, {"name": "b", "status": "cut off", "reason": ""}][:count]
    code = f"open({str(tmp_path / 'bench.json')!r}, 'w').write({json.dumps(rows)!r})\n"
    code += "import time; time.sleep(60)"
    evidence = run([Part("bench", python(code), 1.0, is_endless)], tmp_path, 2.5)
    part = evidence["parts"]["bench"]
    assert part["status"] == "out of time"
    assert len(part["rows"]) == count - (is_endless and count == 2)
    assert part["failed"] == (not is_endless or count < 2)


def test_no_time_is_left(tmp_path):
    part = run([Part("bench", python("1 / 0"), 1.0, True)], tmp_path, 0.0)["parts"]["bench"]
    assert (part["status"], part["starts"], part["failed"]) == ("out of time", 0, True)


def test_output_of_any_encoding(tmp_path):
    code = "import sys; sys.stdout.buffer.write(b'\\xe2\\x96\\xbc \\xff')"
    part = run([Part("prints", python(code), 1.0)], tmp_path, 60)["parts"]["prints"]
    assert (part["status"], part["output"]) == (0, "▼ �")


def test_failed_tests_are_rows(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_right(): pass\ndef test_wrong(): assert 1 == 2\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", str(tmp_path), "-q", "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist", "--junitxml={out}/tests.xml"]
    part = run([Part("tests", tuple(command), 1.0)], tmp_path, 60)["parts"]["tests"]
    assert part["rows"] == [{"name": "test_wrong", "status": "failed", "reason": "assert 1 == 2"}]
    assert (part["status"], part["failed"]) == (1, True)


def test_the_order_and_the_shares():
    parts = on_gpu.parts()
    assert [part.name for part in parts] == [
        *("telling", "steps", "tests", "memcheck", "racecheck", "bench")
    ]
    assert [part.is_endless for part in parts] == [False] * 5 + [True]
    assert all(0 < part.share <= 1 for part in parts)
    rest = math.prod(1 - part.share for part in parts[:-1])
    assert rest > 0.1  # of the time remains for the benchmark even if all others use their share


@pytest.fixture
def fake_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    env = dataclasses.replace(environment(CPU, "x"), device="NVIDIA H100", device_type="cuda")
    monkeypatch.setattr(on_gpu, "environment", lambda device, command: env)


def test_command_line(fake_gpu, monkeypatch, tmp_path, capsys):
    parts = [
        Part("telling", python("print('one')"), 0.5),
        Part("tests", python("print('two')"), 0.5),
        Part("bench", python("import sys; sys.exit(5)"), 0.5),
    ]
    monkeypatch.setattr(on_gpu, "parts", lambda: parts)
    monkeypatch.setenv("HOME", str(tmp_path))
    only = ["--out=~/below", "--commit=abc", "--minutes=2", "--only"]
    assert on_gpu.main([*only, "telling", "tests"]) == 0
    evidence = json.loads((tmp_path / "below" / "gpu.json").read_text())
    assert [*evidence["parts"]] == ["telling", "tests"]
    assert evidence["environment"]["commit"] == "abc"
    assert "nothing wrong in" in capsys.readouterr().out
    assert on_gpu.main([*only, "bench"]) == 1
    assert "bench: failed; status 5" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        on_gpu.main([*only, "sanitizer"])


def test_there_is_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        on_gpu.main([])
    assert "no CUDA device" in capsys.readouterr().err


# The table.


def part_of(rows: list[dict], status=0, output: str = "", failed: bool = False) -> dict:
    fields = {"rows": rows, "status": status, "output": output, "failed": failed}
    return {"command": "x", "starts": 1, "seconds": 1.5, **fields}


def steps_row(case: Case) -> dict:
    beside = {"us": [9.0, 8.0, 10.0], "ratio": [4.5, 4.0, 5.0], "algorithm": "x", "pairs": 9}
    row = {"name": case.name, "status": "ok", "reason": "", "ran": "persistent"}
    row |= {"planned": "torch", "expected_us": 1.5, "ours_us": [2.0, 1.9, 2.1]}
    row |= {"kernel_us": {"forward_kernel": 1.75, "gemm": 7.0}}
    return {**row, "beside": {"bfloat16": beside, "float16": beside}}


def bench_row(case: Case, status: str = "ok") -> dict:
    times = Times(Band(2.0, 1.9, 2.1), Band(3.0, 2.9, 3.1)) if status == "ok" else None
    row = Row(case, "fastrnn", "kernels", "because", status, 1e-7, 1e-6, 9, times)
    return {
        **{"name": case.name, "status": status, "reason": "because"},
        **{"expected_us": 1.5, "rows": [row.record()]},
    }


def test_the_table_is_short_and_has_the_steps_first():
    wrong = {"name": "lstm", "status": "wrong", "reason": "y: 7 times the error " + 300 * "x"}
    failures = [{"name": f"test_{k}", "status": "failed", "reason": "assert"} for k in range(99)]
    parts = {
        "telling": part_of([{"name": "gru", **RIGHT}, wrong], failed=True),
        "steps": part_of([steps_row(case) for case in gpu_steps.CASES]),
        "tests": part_of(failures, 1, "".join(f"line {k}\n" for k in range(200)), failed=True),
        "memcheck": {**part_of([], "not run", "not installed\n"), "starts": 0},
        "bench": part_of([bench_row(case) for case in gpu_steps.bench_cases()]),
    }
    text = on_gpu.table({"parts": parts})
    assert len(text) < 12_000
    lines = text.splitlines()
    assert lines[1].startswith("steps: us a step")
    assert " ".join(lines[2].split()) == (
        "lstm forward T1024 B16 H128 bf16 1.50 1.75 2.00 (1.90 2.10) 9.00 (8.00 10.00) 4.50 "
        "9.00 (8.00 10.00) 4.50 persistent, torch"
    )
    assert max(map(len, lines)) <= 200
    after = text[text.index("wrong:") :]
    assert after.splitlines()[1].startswith("telling: lstm: wrong: y: 7 times the error")
    assert "and 70 more, in gpu.json" in after
    assert "tests: failed; status 1, 1.5 s" in after
    assert "    line 199" in after
    assert "memcheck: not run" in after
    assert "telling: failed; status 0, 1.5 s, 2 of 14 cases" in after
    assert "0.50 of the tolerance" in after
    assert after.endswith("and more, in gpu.json")


def test_the_table_of_the_benchmark():
    case = Case("lstm", "forward", "bfloat16", 500, 16, 64, 64)
    rows = [bench_row(case), bench_row(case, "wrong")]
    *_, right, wrong = on_gpu.table({"parts": {"bench": part_of(rows)}}).splitlines()
    assert right.split()[6:] == ["fastrnn", "2.000", "3.00", "-", "4.00", "1.50", "kernels"]
    assert "wrong: because error 1e-07" in wrong


# The parts.


def named(*names: str) -> list[SimpleNamespace]:
    return [SimpleNamespace(name=name) for name in names]


def test_rows_are_written_before_and_after_each_case(tmp_path):
    def run(case):
        rows = json.loads((tmp_path / "telling.json").read_text())
        assert [row["status"] for row in rows] == ["ok"] * (len(rows) - 1) + ["cut off"]
        assert rows[-1]["name"] == case.name
        return RIGHT

    assert run_cases(Rows(named("a", "b"), run, 60.0), "telling", tmp_path, 60.0) == 0
    assert len(gpu_parts.read_rows(tmp_path / "telling.json")) == 2
    assert not [*tmp_path.glob("*.part")]


def test_no_case_begins_too_late(tmp_path):
    assert run_cases(Rows(named("a"), lambda *_: 1 / 0, 60.0), "telling", tmp_path, -1.0) == 0
    assert not gpu_parts.read_rows(tmp_path / "telling.json")


@pytest.mark.parametrize("answers", [True, False])
def test_a_process_whose_gpu_does_not_answer_ends(monkeypatch, tmp_path, answers):
    def synchronize():
        if not answers:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    part = Rows(named("a", "b"), lambda *_: 1 / 0, 60.0)
    status = run_cases(part, "telling", tmp_path, 60.0)
    assert status == (0 if answers else gpu_parts.BROKEN)
    rows = gpu_parts.read_rows(tmp_path / "telling.json")
    assert [row["status"] for row in rows] == ["failed"] * (2 if answers else 1)


def test_a_part_by_its_name(monkeypatch, tmp_path, capsys):
    part = Rows(named("a"), lambda *_: RIGHT, 60.0)
    monkeypatch.setattr(
        gpu_parts, "_part", lambda name, out: {("telling", tmp_path): part}[name, out]
    )
    assert gpu_parts.main(["telling", f"--out={tmp_path}"]) == 0
    assert "a      " in capsys.readouterr().out
    monkeypatch.setattr(gpu_parts, "small_layers", lambda: print("small"))
    assert gpu_parts.main(["small"]) == 0
    assert capsys.readouterr().out == "small\n"


def test_telling_cases():
    cases = gpu_telling.CASES
    assert len(cases) == len({case.name for case in cases}) == 14
    cases, involved = cases[:-3], cases[-3:]
    names = {"layernorm_lstm", "gru_reset_before", "layernorm_gru"}
    assert {case.cell for case in involved} == names
    assert {case.schedule for case in involved} == {"staged", "resident"}

    def values(field: str) -> set:
        return {getattr(case, field) for case in cases}

    assert values("cell") == {"lstm", "gru", "rnn", "peephole_lstm"}
    assert {case.cell for case in cases if case.dtype != "float32"} == {"lstm", "gru", "rnn"}
    assert values("dtype") == {"bfloat16", "float16", "float32"}
    assert values("hidden_size") == {99, 128, 256, 512, 768, 1024}
    assert values("batch") == {1, 16, 64}
    for option in ("bidirectional", "marked", "fresh", "recompute"):
        assert values(option) == {False, True}
    assert values("zoneout") == {0.0, 0.1}
    assert values("schedule") == {"persistent"}
    assert all(case.marked for case in cases if case.fresh)
    assert values("steps") == {64}


@pytest.mark.parametrize("device", ["h100", "h200"])
def test_telling_cases_and_steps_have_their_kernels(monkeypatch, device):
    facts = DEVICES[device], "tf32"
    monkeypatch.setattr(providers.devices, "facts", lambda x: facts)
    problems = [
        (gpu_telling.problem_of(case.case, CPU)._replace(marked=case.marked), case.schedule)
        for case in gpu_telling.CASES
    ]
    problems += [(gpu_steps.problem_of(case, CPU), "persistent") for case in gpu_steps.CASES]
    for problem, schedule in problems:
        path, plan = gpu_telling.choose(problem, schedule)
        assert path == schedule
        assert {choice.config.schedule for choice in plan.kernels} == {path}


def test_small_layers_have_their_kernels():
    for kind, options, schedules in gpu_parts.SMALL:
        layer = kind(5, 39, **options)
        problem = gpu_telling.problem_of(Case("lstm", "training", "bfloat16", 4, 19, 5, 39), CPU)
        problem = problem._replace(
            cell=layer._cell, projected=layer.proj_size > 0, noisy=bool(layer.zoneout),
            device="cuda", directions=2, gpu=DEVICES["h100"],
        )  # fmt: skip
        assert {*schedules} <= {*providers.devices.schedules(problem)}, kind


@pytest.fixture
def _emulated():
    # The interpreter multiplies in float32 regardless of the precision.
    with as_on_a_gpu(precision="tf32x3"), as_on_a_device():
        yield


SMALL = [
    Telling("lstm", "float32", 2, 9, steps=3),
    Telling("gru", "float32", 3, 7, bidirectional=True, marked=True, steps=4),
    Telling("rnn", "float32", 1, 5, marked=True, steps=3),
    Telling("lstm", "float32", 4, 6, bidirectional=True, marked=True, fresh=True, steps=6),
    Telling("gru", "float32", 2, 9, recompute=True, steps=4),
    Telling("peephole_lstm", "float32", 1, 7, bidirectional=True, marked=True, steps=4),
    Telling("lstm", "float32", 2, 6, marked=True, zoneout=0.3, steps=4),
]
# A schedule in which no program waits: the interpreter runs programs one after another.
SMALL = [case._replace(schedule="resident") for case in SMALL]
SMALL += [
    Telling("layernorm_lstm", "float32", 2, 6, marked=True, steps=4, schedule="staged"),
    Telling("gru_reset_before", "float32", 2, 6, zoneout=0.3, steps=4, schedule="staged"),
]


@pytest.mark.sweep(5)
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
@pytest.mark.usefixtures("_emulated")
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_telling_case_in_the_interpreter(case):
    row = gpu_telling.check(case, CPU)
    assert row["status"] == "ok", row
    assert 0 < row["error"] <= 1
    assert row["ran"] == case.schedule
    json.dumps(row)


@pytest.mark.parametrize("fault", ["wrong", "NaN", "another"])
def test_telling_case_finds(monkeypatch, fault):
    right, runs = gpu_telling._results, []

    def results(case, layer, numbers, path):
        found = right(case, layer, numbers, "reference")
        if path != "reference":
            runs.append(path)
            where = found["d_weight_hh_l0"][-1]
            if fault == "another" and len(runs) == 3:  # off by one rounding
                where[-1] = math.nextafter(where[-1].item(), 1.0) + 1e-7
            elif fault != "another" and len(runs) == 2:
                where += 0.1 if fault == "wrong" else math.nan
        return found

    monkeypatch.setattr(gpu_telling, "_results", results)
    row = gpu_telling.check(SMALL[0], CPU)
    assert row["status"] == "wrong"
    assert ("different results" if fault == "another" else "d_weight_hh_l0") in row["reason"]


def test_a_schedule_that_a_gpu_does_not_have(monkeypatch):
    problem = gpu_telling.problem_of(Case("lstm", "training", "float32", 4, 2, 8, 8), CPU)
    assert gpu_telling.choose(problem, "persistent")[0] == "persistent"

    def plan(problem):
        if gpu_telling.planner.forced.schedule:
            raise ValueError("no persistent schedule")
        return SimpleNamespace(path="kernels")

    monkeypatch.setattr(gpu_telling.planner, "plan", plan)
    assert gpu_telling.choose(problem, "persistent")[0] == "kernels"


def test_what_ran_in_the_place_of_a_schedule(monkeypatch):
    gpu, reason = DEVICES["h100"], "no persistent schedule of this on h100"
    monkeypatch.setattr(gpu_telling.devices, "gpu", lambda index: gpu)

    def found(schedule="persistent", path="persistent", device="cuda"):
        return gpu_telling.replaced(schedule, path, torch.device(device))

    assert found() == ""
    assert found(path="kernels") == reason
    assert found(path="kernels", device="cpu") == ""
    gpu = gpu._replace(gap="not compiled")
    assert found() == found(path="kernels") == "not compiled"
    assert found("resident", "resident") == ""
    assert found("resident", "kernels") == "no resident schedule of this on h100"
    for other in (DEVICES["mi300x"], DEVICES["a100"]._replace(capability=75), None):
        gpu = other
        assert found(path="kernels") == ""


def test_what_ran_in_the_place_of_a_schedule_is_not_right(monkeypatch):
    for part in (gpu_telling, gpu_steps):
        monkeypatch.setattr(part, "replaced", lambda *_: "not compiled")
    monkeypatch.setattr(gpu_steps, "time_pairs", lambda *_: pytest.fail("timed"))
    steps = Case("lstm", "training", "float32", 4, 2, 8, 8)
    for row in (gpu_telling.check(SMALL[0], CPU), gpu_steps.measure_steps(steps, CPU)):
        assert (row["status"], row["reason"]) == ("wrong", "not compiled")


def test_what_is_forced_is_forced_backward_too():
    with gpu_telling.forced("stepwise"):
        assert gpu_telling.planner.forced.schedule == "stepwise"
        assert not torch._C._is_multithreading_enabled()
    assert torch._C._is_multithreading_enabled()


def test_cases_of_steps():
    shapes = {(case.cell, case.batch, case.hidden_size) for case in gpu_steps.CASES}
    wanted = {(cell, 16, h) for cell in ("lstm", "gru") for h in (128, 256, 512, 768, 1024)}
    assert shapes == wanted | {("lstm", 64, 512), ("lstm", 64, 768), ("rnn", 16, 512)}
    assert len(gpu_steps.CASES) == 2 * len(shapes)
    assert {case.dtype for case in gpu_steps.CASES} == {"bfloat16"}


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_time_of_steps(mode):
    case = Case("lstm", mode, "float32", 4, 2, 8, 8)
    row = gpu_steps.measure_steps(case, CPU, "kernels", seconds=0.01)
    assert row["status"] == "ok"
    assert row["error"] <= row["tolerance"]
    assert list(row["beside"]) == ["float32", "float16"]
    for beside in row["beside"].values():
        assert all(us > 0 for us in (*row["ours_us"], *beside["us"]))
        assert beside["pairs"] >= 7
    row = json.loads(json.dumps(row))
    assert "kernels, " in gpu_parts.line("steps", {"name": case.name, **row})


def test_steps_that_are_wrong_are_not_timed(monkeypatch):
    monkeypatch.setattr(gpu_steps, "worst_error", lambda *_: (math.nan, 1e-3))
    monkeypatch.setattr(gpu_steps, "time_pairs", lambda *_: pytest.fail("timed"))
    row = gpu_steps.measure_steps(Case("gru", "forward", "float32", 4, 2, 8, 8), CPU, "kernels")
    assert (row["status"], row["reason"]) == ("wrong", "error nan, allowed 1.0e-03")


def test_time_of_the_kernels_alone(monkeypatch):
    def event(name, us, device="CUDA"):
        kind = getattr(torch.autograd.DeviceType, device)
        elapsed = SimpleNamespace(elapsed_us=lambda: us)
        return SimpleNamespace(name=name, device_type=kind, time_range=elapsed)

    class Profile:
        def __init__(self, activities):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def events(self):
            gemms = [event(f"gemm_{k}", k) for k in range(6)]
            return [event("forward_kernel", 30.0), event("aten::mm", 99.0, "CPU"), *gemms]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = gpu_steps._kernel_us(SimpleNamespace(call=lambda: None), 10)
    assert list(found.items())[:2] == [("forward_kernel", 3.0), ("gemm_5", 0.5)]
    assert len(found) == 5


class FakeLimits:
    def __init__(self, device):
        self.observed = []

    def observe(self, case):
        self.observed.append(case)

    def of(self, case):
        assert case in self.observed
        return Bound(0.5, "products")

    def record(self):
        return {"gemm_tflops": {"float32": 0.1}, "copy_gb_s": {}, "exchange_us": None}


@pytest.mark.parametrize("status", ["ok", "wrong"])
def test_benchmark(monkeypatch, tmp_path, status):
    def fake_measure(case, device, seconds, names):
        assert names[0] == "fastrnn"
        rows = [Row.from_record(row) for row in bench_row(case, status)["rows"]]
        return [dataclasses.replace(rows[0], provider="torch.nn", status="ok"), *rows]

    monkeypatch.setattr(measure, "measure", fake_measure)
    monkeypatch.setattr(gpu_parts, "Limits", FakeLimits)
    original = gpu_parts.problem_of
    monkeypatch.setattr(gpu_parts, "problem_of", lambda case, device: original(case, CPU))
    env = dataclasses.asdict(environment(CPU, "x"))
    (tmp_path / "gpu.json").write_text(json.dumps({"environment": {**env, "commit": "abc"}}))
    (tmp_path / "results.json").write_text("of another day")
    cases = gpu_steps.bench_cases()[:2]
    for so_far in (cases[:1], cases):  # the second as if after a crash
        part = gpu_parts._part("bench", tmp_path)._replace(cases=so_far)
        assert run_cases(part, "bench", tmp_path, 60.0) == 0
    found = results.load(tmp_path / "results.json")
    assert [row.case for row in found.rows] == [case for case in cases for _ in range(2)]
    assert found.env.commit == "abc"
    assert (tmp_path / "results.csv").read_text().count("\n") == 5
    rows = gpu_parts.read_rows(tmp_path / "bench.json")
    assert [row["status"] for row in rows] == [status] * 2
    assert rows[0]["planned"] in PATHS


def test_benchmark_has_each_case_once():
    cases = gpu_steps.bench_cases()
    assert cases[0] == Case("lstm", "forward", "float16", 1024, 16, 768, 768)
    assert {case.dtype for case in cases} == {"float16", "bfloat16", "float32"}
    assert len(cases) == len(set(cases))
