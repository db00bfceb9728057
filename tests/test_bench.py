"""The benchmark: what it measures, what it refuses to time, what it writes."""

import argparse
import csv
import dataclasses
import importlib.util
import json
import math
import re
import subprocess
import sys
import types

import pytest
import torch

from fastrnn.bench import cli, measure, page, plots, registry, results
from fastrnn.bench.environment import environment
from fastrnn.bench.registry import Case
from fastrnn.bench.results import Band, Row, Times

CPU = torch.device("cpu")
CASES = [
    Case("lstm", "training", "float32", 3, 2, 8, 8),
    Case("gru", "forward", "float64", 3, 2, 8, 8, num_layers=2, bidirectional=True),
    Case("rnn", "training", "bfloat16", 3, 2, 8, 8),
    Case("lstm_cell", "training", "float32", 1, 2, 8, 8),
    Case("gru_cell", "forward", "float32", 1, 2, 8, 8),
    Case("rnn_cell", "training", "float64", 1, 2, 8, 8),
    Case("gru", "training", "float32", 8, 3, 8, 8, ragged=True),
]


def make_row(case: Case, ratio: float, spread: float = 0.01) -> Row:
    ours, theirs = Band(2.0, 1.9, 2.1), Band(2 * ratio, 1.9 * ratio, 2.1 * ratio)
    times = Times(ours, theirs, Band(ratio, ratio - spread, ratio + spread))
    return Row(case, "loop", 'because of "<b>"', "ok", 1e-6, 1e-7, 9, times)


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    cli.add_arguments(parser)
    return parser.parse_args(argv)


# Suites.


@pytest.mark.parametrize("suite", registry.SUITES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_suites_have_every_cell_in_both_modes_and_no_case_twice(suite, device):
    cases = {"quick": registry.quick, "full": registry.full}[suite](device)
    assert len(cases) == len(set(cases))
    assert {(c.cell, c.mode) for c in cases} == {
        (cell, mode) for cell in registry.CELLS for mode in registry.MODES
    }
    assert all(c.steps == 1 for c in cases if c.is_step)


def test_size_of_the_suites():
    assert 30 <= len(registry.quick("cpu")) <= 36
    assert 200 <= len(registry.full("cuda")) <= 600
    full = registry.full("cuda")
    axes = ((c.steps, c.batch, c.hidden_size) for c in full if not c.is_step)
    steps, batch, hidden = (set(axis) for axis in zip(*axes, strict=True))
    assert {16, 1024} < steps
    assert {1, 128} < batch
    assert {64, 1024} < hidden


def test_lengths_and_operations_of_a_case():
    padded = Case("gru", "forward", "float32", 8, 3, 5, 7)
    ragged = dataclasses.replace(padded, ragged=True)
    assert padded.lengths == [8, 8, 8]
    assert ragged.lengths == [8, 5, 2]
    assert padded.flops == 2 * 8 * 3 * 3 * 7 * (5 + 7)
    assert ragged.flops == 2 * 15 * 3 * 7 * (5 + 7)
    assert dataclasses.replace(padded, mode="training").flops == 3 * padded.flops
    deep = dataclasses.replace(padded, num_layers=2, bidirectional=True)
    first, second = 2 * (5 + 7), 2 * (2 * 7 + 7)
    assert deep.flops == 2 * 8 * 3 * 3 * 7 * (first + second)


def test_given_values_replace_the_suite():
    cases = registry.select(
        "quick", "cpu", cells=["lstm", "lstm_cell"], steps=[5, 7], batch=[2, 2], dtype=["float64"]
    )
    assert len(cases) == len(set(cases))
    assert {c.steps for c in cases if c.cell == "lstm"} == {5, 7}
    assert {c.steps for c in cases if c.cell == "lstm_cell"} == {1}
    assert {(c.batch, c.dtype) for c in cases} == {(2, "float64")}
    assert {c.mode for c in cases} == set(registry.MODES)


def test_shapes_on_an_axis_are_unambiguous():
    cases = registry.full("cpu")
    assert len({(c.cell, c.mode, c.shape) for c in cases}) == len(cases)


# Gate.


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.cell}-{case.dtype}-{case.mode}")
def test_right_results_are_timed(case):
    row = measure.measure(case, CPU, seconds=0)
    assert row.status == "ok"
    assert row.error <= row.tolerance < 0.1
    assert row.pairs == 7
    assert row.times.fastrnn_ms.p20 > 0
    assert row.times.ratio.p20 <= row.times.ratio.median <= row.times.ratio.p80


class SkewedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


def wrong_module(change):
    class Wrong(torch.nn.LSTM):
        def forward(self, x, hx=None):
            y, state = super().forward(SkewedGradient.apply(x) if change == "gradient" else x, hx)
            return {
                "value": lambda: y * 1.001,
                "nan": lambda: y * torch.tensor([math.nan] + [1.0] * (y.shape[-1] - 1)),
                "shape": lambda: y[:-1],
                "gradient": lambda: y,
            }[change](), state

    return Wrong


@pytest.mark.parametrize("change", ["value", "nan", "shape", "gradient"])
def test_wrong_results_are_not_timed(monkeypatch, change):
    module = types.SimpleNamespace(LSTM=wrong_module(change))
    monkeypatch.setitem(measure.PROVIDERS, "fastrnn", module)
    monkeypatch.setattr(measure, "time_pairs", lambda *_: pytest.fail("timed a wrong result"))
    row = measure.measure(CASES[0], CPU, seconds=0)
    # torch itself refuses the gradient of an output whose shape is wrong.
    assert row.status == ("failed" if change == "shape" else "wrong")
    assert row.times is None
    assert row.verdict == row.status


def test_a_case_that_cannot_run_is_reported(monkeypatch):
    class Failing(torch.nn.LSTM):
        def forward(self, *_):
            raise RuntimeError("out of memory\nstack")

    monkeypatch.setitem(measure.PROVIDERS, "fastrnn", types.SimpleNamespace(LSTM=Failing))
    row = measure.measure(CASES[0], CPU, seconds=0)
    assert (row.status, row.reason) == ("failed", "out of memory")


def test_error_is_that_of_the_worst_tensor_relative_to_its_largest_element():
    theirs = [torch.tensor([1.0, -4.0]), torch.tensor([100.0])]
    ours = [torch.tensor([1.0, -3.0]), torch.tensor([101.0])]
    assert measure.max_error(ours, theirs) == 0.25
    assert measure.max_error(ours[:1], theirs) == math.inf
    assert math.isnan(measure.max_error([torch.tensor([math.nan])], [torch.tensor([1.0])]))


# Statistics.


def test_ratio_is_the_median_over_pairs_not_the_ratio_of_medians():
    pairs = [(1.0, 2.0), (10.0, 20.0), (100.0, 200.0), (1.0, 8.0), (4.0, 4.0)]
    assert measure.ratio_band(pairs) == Band(2.0, pytest.approx(1.8), pytest.approx(3.2))


def test_pairs_alternate_and_keep_their_sides(monkeypatch):
    monkeypatch.setattr(measure, "_MAX_PAIRS", 8)
    monkeypatch.setattr(measure, "_warm_up", lambda *_: 1.0)
    order = []
    monkeypatch.setattr(
        measure, "_sample", lambda call, *_: order.append(call) or {"us": 1.0, "them": 3.0}[call]
    )
    assert measure.time_pairs("us", "them", CPU, seconds=60) == [(1.0, 3.0)] * 8
    assert {tuple(order[:2]), tuple(order[2:4])} == {("us", "them"), ("them", "us")}


@pytest.mark.parametrize(
    ("ratio", "spread", "verdict"),
    [
        (1.5, 0.1, "faster"),
        (1.5, 0.6, "equal"),
        (1.02, 0.01, "equal"),
        (0.98, 0.01, "slower"),
        (0.98, 0.1, "equal"),
        (0.9, 0.5, "slower"),
    ],
)
def test_verdict(ratio, spread, verdict):
    assert make_row(CASES[0], ratio, spread).verdict == verdict


def test_summary_is_the_geometric_mean_by_cell_and_mode():
    a, b = CASES[0], dataclasses.replace(CASES[0], batch=4)
    wrong = Row(dataclasses.replace(a, batch=5), "torch", "", "wrong", 1e-6, 1.0)
    summary, other = results.summarize(
        [make_row(a, 4.0), make_row(b, 0.25), wrong, make_row(CASES[1], 1.0)]
    )
    assert summary == ("lstm", "training", pytest.approx(1.0), 1, 0, 1)
    assert other[:2] == ("gru", "forward")


# Files.


@pytest.fixture
def rows():
    rows = [make_row(CASES[0], 0.8), make_row(CASES[1], 1.5), make_row(CASES[2], 1.0)]
    return [*rows, Row(CASES[3], "torch", "reason", "wrong", 1e-6, 0.5)]


@pytest.fixture
def env():
    return environment(CPU, "fastrnn bench --quick")


def test_json_round_trip(tmp_path, env, rows):
    results.write_json(tmp_path / "results.json", env, rows)
    assert results.load(tmp_path / "results.json") == (env, rows)


def test_csv_rows_carry_the_environment(tmp_path, env, rows):
    results.write_csv(tmp_path / "results.csv", env, rows)
    with (tmp_path / "results.csv").open(newline="") as file:
        records = list(csv.DictReader(file))
    assert [record["ratio"] for record in records] == ["0.8", "1.5", "1.0", ""]
    assert [float(record["torch_ms_p80"] or 0) for record in records[:2]] == [2.1 * 0.8, 2.1 * 1.5]
    assert {(record["device"], record["torch"]) for record in records} == {(env.device, env.torch)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a results.json"),
        ('{"schema": 0}', "is not a results.json"),
        (f'{{"schema": {results.SCHEMA}}}', "missing, unknown or wrong fields: 'rows'"),
        (f'{{"schema": {results.SCHEMA}, "rows": [{{"cell": "gru"}}]}}', "fields: 'mode'"),
    ],
)
def test_load_says_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        results.load(path)
    with pytest.raises(ValueError, match="cannot read"):
        results.load(tmp_path / "missing.json")


@pytest.mark.parametrize(("field", "value"), [("ratio", "x"), ("ratio", None), ("steps", [1])])
def test_load_refuses_wrong_values(tmp_path, env, rows, field, value):
    path = tmp_path / "old.json"
    results.write_json(path, env, rows)
    content = json.loads(path.read_text())
    content["rows"][0][field] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="missing, unknown or wrong fields"):
        results.load(path)


def test_compare_finds_the_regression_only(rows):
    assert not any(change.is_regression for change in results.compare(rows, rows))
    new = [make_row(CASES[0], 0.8 * 0.89), make_row(CASES[1], 1.5 * 0.91), make_row(CASES[3], 1)]
    changes = results.compare(rows, new)
    assert [(change.case, change.is_regression) for change in changes] == [
        (CASES[0], True),
        (CASES[1], False),
    ]
    assert not any(change.is_regression for change in results.compare(rows, new, threshold=0.2))


def test_page_needs_nothing_beside_it_and_marks_what_is_slower(tmp_path, env, rows):
    pictures = tmp_path / "speedup.png", tmp_path / "time.png"
    plots.plot_speedup(pictures[0], env, rows)
    plots.plot_time(pictures[1], env, rows)
    page.write_page(tmp_path / "report.html", env, rows, *pictures)
    text = (tmp_path / "report.html").read_text()
    sources = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')> ]{1,30})", text)
    assert sources == ["data:image/png;base64,iVBORw0K"[:30]] * 2
    assert re.findall(r'<tr class="(\w+)"', text) == ["slower", "faster", "equal", "wrong"]
    assert text.count("▼ slower") == 1
    assert env.command in text
    assert env.device in text
    assert 'because of "<b>"' not in text


def test_plots_of_no_timed_row(tmp_path, env, rows):
    plots.plot_speedup(tmp_path / "empty.png", env, rows[3:])
    assert (tmp_path / "empty.png").stat().st_size > 0


# Command line.


def test_values_may_be_separated_by_commas_or_spaces():
    args = parse("--cells", "lstm,gru", "rnn", "--T", "1", "2,3", "--dtype", "bf16")
    assert args.cells == [["lstm", "gru"], ["rnn"]]
    assert args.T == [[1], [2, 3]]
    assert args.dtype == [["bfloat16"]]


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("--cells", "lstn", "unknown cell 'lstn', expected one of lstm, gru"),
        ("--T", "0", "'0' is not a positive integer"),
        ("--B", "1.5", "'1.5' is not a positive integer"),
        ("--H", "8,", "'' is not a positive integer"),
        ("--dtype", "int8", "unknown dtype 'int8', expected one of float16"),
        ("--device", "tpu", "unknown device 'tpu', expected cpu"),
        ("--device", "cuda:99", "no device 'cuda:99'"),
        ("--seconds", "nan", "'nan' is not a positive number"),
        ("--threshold", "0", "'0' is not a positive number"),
    ],
)
def test_bad_values_are_named(option, text, message):
    with pytest.raises(argparse.ArgumentError, match=re.escape(message)):
        parse(option, text)


TINY = ["--cells=gru", "--T=3", "--B=2", "--H=8", "--device=cpu", "--seconds=1e-3"]


def test_run_writes_all_files(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert cli.run(parse(*TINY, "--out", str(out))) == 0
    names = ["report.html", "results.csv", "results.json", "speedup.png", "time.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    env, rows = results.load(out / "results.json")
    assert [row.case.mode for row in rows] == list(registry.MODES)
    assert str(tmp_path) not in env.command
    # The command must give the same cases again.
    assert cli._command(parse(*env.command.split()[2:]), CPU) == env.command


def test_run_compares(tmp_path, capsys):
    args = parse(*TINY, "--out", str(tmp_path), "--compare", str(tmp_path / "old.json"))
    cases = registry.select("quick", "cpu", cells=["gru"], steps=[3], batch=[2], hidden=[8])
    env = environment(CPU, "")
    for ratio, status in ((1000.0, 1), (0.001, 0)):
        old = [make_row(case, ratio, ratio / 10) for case in cases]
        results.write_json(tmp_path / "old.json", env, old)
        assert cli.run(args) == status
    assert "2 regressions" in capsys.readouterr().out


def test_run_refuses_before_measuring(tmp_path, env, rows, monkeypatch):
    monkeypatch.setattr(cli, "measure", lambda *_: pytest.fail("measured"))
    args = parse(*TINY, "--compare", str(tmp_path / "old.json"))
    with pytest.raises(ValueError, match="cannot read"):
        cli.run(args)
    results.write_json(tmp_path / "old.json", env, rows)
    with pytest.raises(ValueError, match="has none of the 2 cases"):
        cli.run(args)
    with pytest.raises(ValueError, match=r"cannot write to .*old.json: File exists"):
        cli.run(parse(*TINY, "--out", str(tmp_path / "old.json")))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape("install fastrnn[bench]")):
        cli.run(args)


def test_run_fails_on_a_wrong_result(tmp_path, monkeypatch, capsys):
    wrong = types.SimpleNamespace(GRU=type("Wrong", (torch.nn.GRU,), {"forward": _shifted}))
    monkeypatch.setitem(measure.PROVIDERS, "fastrnn", wrong)
    assert cli.run(parse(*TINY, "--out", str(tmp_path))) == 1
    assert "wrong" in capsys.readouterr().out
    _, rows = results.load(tmp_path / "results.json")
    assert {row.status for row in rows} == {"wrong"}


def _shifted(self, x, hx=None):
    y, h = torch.nn.GRU.forward(self, x, hx)
    return y + 1e-3, h


def test_options_do_not_import_matplotlib():
    code = "import sys, fastrnn.bench.cli; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
