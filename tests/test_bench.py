"""The benchmark: its cases, what it concludes, what it writes, its command line."""

import argparse
import csv
import dataclasses
import functools
import importlib.util
import io
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastrnn.__main__ import main
from fastrnn.bench import (
    built,
    cli,
    drawing,
    heatmap,
    measure,
    others,
    page,
    plots,
    providers,
    readme,
    registry,
    results,
)
from fastrnn.bench import report as report_
from fastrnn.bench.environment import environment
from fastrnn.bench.registry import Case
from fastrnn.bench.results import Band, Results, Row, Times
from fastrnn.kernels.configs import SCHEDULES

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
CASES = [
    Case("lstm", "training", "float32", 3, 2, 8, 8),
    Case("gru", "forward", "float64", 3, 2, 8, 8, num_layers=2, bidirectional=True),
    Case("rnn", "training", "bfloat16", 3, 2, 8, 8),
    Case("lstm_cell", "training", "float32", 1, 2, 8, 8),
]
LIMITS = {"gemm_tflops": {"float32": 0.1}, "copy_gb_s": {"1048576": 50.0}, "exchange_us": None}


def make_row(case: Case, ratio: float, spread: float = 0.01, provider: str = "fastrnn") -> Row:
    times = Times(Band(2.0, 1.9, 2.1), Band(ratio, ratio - spread, ratio + spread))
    row = Row(case, provider, "kernels", 'because of "<b>"', "ok", 1e-7, 1e-6, 9, times)
    return dataclasses.replace(row, peak_mib=3.0, limit_ms=0.5, bound="products")


def make_baseline(case: Case) -> Row:
    return dataclasses.replace(make_row(case, 1.0, 0.0, "torch.nn"), path="ATen", reason="")


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    cli.add_arguments(parser)
    return parser.parse_args(argv)


# Suites.


@pytest.mark.parametrize("suite", ["quick", "full"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_suites_have_every_cell_in_both_modes_and_no_case_twice(suite, device):
    cases = registry.SUITES[suite](device)
    assert len(cases) == len(set(cases))
    assert {(c.cell, c.mode) for c in cases} == {
        (cell, mode) for cell in registry.LAYERS + registry.STEPS for mode in registry.MODES
    }
    assert all(c.steps == 1 for c in cases if c.is_step)


def test_size_of_the_suites():
    assert 30 <= len(registry.quick("cpu")) <= 40
    assert 300 <= len(registry.full("cpu")) <= 380
    assert 500 <= len(registry.full("cuda")) <= 1000


def test_the_full_suite_covers_the_axes():
    plain = [case for case in registry.full("cuda") if case.is_plain]
    for cell, dtype in itertools.product(("lstm", "gru"), ("float32", "bfloat16")):
        cases = [case for case in plain if (case.cell, case.dtype) == (cell, dtype)]
        assert {case.steps for case in cases} == {16, 64, 256, 1024, 4096}
        assert {case.batch for case in cases} == {1, 8, 16, 32, 64, 128, 256}
        assert {case.hidden_size for case in cases} == {
            64, 128, 192, 256, 384, 512, 768, 1024, 1408, 2048,
        }  # fmt: skip
    on_cpu = [case for case in registry.full("cpu") if case.is_plain and case.mode == "forward"]
    assert max(case.flops for case in on_cpu) < 2e10
    assert {case.steps for case in on_cpu} >= {1, 4, 16, 64, 256, 1024, 4096}
    assert {case.dtype for case in on_cpu} == {"float32", "bfloat16", "float64"}


@pytest.mark.parametrize("suite", ["quick", "full"])
def test_streams_have_the_time_of_a_step_and_of_several(suite):
    """Of the same sizes: so the cost of a call is known, and that of a step."""
    streams = {
        (case.cell, case.hidden_size, case.steps)
        for case in registry.SUITES[suite]("cpu")
        if case.is_plain and (case.mode, case.batch, case.dtype) == ("forward", 1, "float32")
    }
    both = {(cell, hidden) for cell, hidden, steps in streams if steps == 1} & {
        (cell, hidden) for cell, hidden, steps in streams if steps == 16
    }
    assert ("lstm", 256) in both
    if suite == "full":
        assert both >= set(itertools.product(registry.LAYERS, (128, 256, 512)))


def test_cases_of_the_runtimes():
    cases = registry.runtimes("cpu")
    assert len(cases) == len(set(cases)) == 2 * 14
    gap = functools.partial(others.runtime_gap, "torch")  # which is installed
    if importlib.util.find_spec("onnx"):
        assert not any(gap(case, CPU) for case in cases)


def test_cases_of_what_torch_has_not():
    cases = registry.variants("cpu")
    assert len(cases) == len(set(cases))
    assert {case.cell for case in cases} == {"lstm", "gru", *registry.VARIANTS}
    of_both = {(case.mode, case.hidden_size) for case in cases}
    assert of_both == set(itertools.product(registry.MODES, (64, 256)))
    for case in cases:
        is_stock = case.cell in registry.LAYERS and not case.is_noisy and case.num_heads == 1
        assert case.is_beyond_torch is not is_stock
        assert (case.stock == case) is is_stock
        assert case.stock.gates == case.gates
        assert case.plain.stack == ("8 members" if case.members else "")
        assert case.is_plain is (case.stack == "")


def test_published_cases_are_in_the_suite():
    cases = registry.published("cuda")
    assert len(cases) == len(set(cases))
    assert {figure.case for figure in registry.PUBLISHED} <= set(cases)
    assert {case.dtype for case in registry.published("cpu")} == {"float32"}


def test_lengths_operations_and_bytes_of_a_case():
    padded = Case("gru", "forward", "float32", 8, 3, 5, 7)
    ragged = dataclasses.replace(padded, ragged=True)
    assert padded.lengths == [8, 8, 8]
    assert ragged.lengths == [8, 5, 2]
    assert padded.flops == 2 * 8 * 3 * 3 * 7 * (5 + 7)
    assert ragged.flops == 2 * 15 * 3 * 7 * (5 + 7)
    assert padded.min_bytes == 4 * (8 * 3 * (5 + 7) + 3 * 7 * (5 + 7))
    training = dataclasses.replace(padded, mode="training", dtype="bfloat16")
    assert training.flops == 3 * padded.flops
    assert training.min_bytes == 3 / 2 * padded.min_bytes
    deep = dataclasses.replace(padded, num_layers=2, bidirectional=True)
    first, second = 2 * (5 + 7), 2 * (2 * 7 + 7)
    assert deep.flops == 2 * 8 * 3 * 3 * 7 * (first + second)
    rows = 8 * 3 * (5 + 2 * 7 + 2 * 2 * 7)
    assert deep.min_bytes == 4 * (rows + 3 * 7 * (first + second))
    projected = Case("lstm", "forward", "float32", 8, 3, 5, 7, proj_size=2)
    assert projected.flops == 2 * 8 * 3 * (4 * 7 * (5 + 2) + 7 * 2)
    assert projected.min_bytes == 4 * (8 * 3 * (5 + 2) + 4 * 7 * (5 + 2) + 7 * 2)


def test_weights_are_those_of_torch():
    deep = Case("gru", "forward", "float32", 1, 1, 5, 7, 3)
    projected = Case("lstm", "forward", "float32", 1, 1, 5, 7, 3, True, proj_size=2)
    for case in (*CASES, *registry.quick("cpu"), *registry.variants("cpu"), deep, projected):
        module, _ = built.make_baseline(case, CPU)
        assert case.weights == sum(p.numel() for p in module.parameters() if p.dim() == 2)


def test_a_grid_is_the_product_of_its_values():
    cases = registry.grid(
        cells=["lstm", "lstm_cell"], dtypes=["float64"], steps=[5, 7], batches=[2, 2], inputs=[3],
        num_layers=2, ragged=True,
    )  # fmt: skip
    assert len(cases) == len(set(cases))
    assert {(c.steps, c.num_layers, c.ragged) for c in cases if c.cell == "lstm"} == {
        (5, 2, True),
        (7, 2, True),
    }
    assert {(c.steps, c.num_layers, c.ragged) for c in cases if c.is_step} == {(1, 1, False)}
    assert {(c.batch, c.dtype, c.input_size) for c in cases} == {(2, "float64", 3)}
    assert {c.mode for c in cases} == set(registry.MODES)


def test_a_suite_is_narrowed():
    cases = registry.select("full", "cuda", cells=["gru"], modes=["forward"], dtypes=["bfloat16"])
    assert {(c.cell, c.mode, c.dtype) for c in cases} == {("gru", "forward", "bfloat16")}
    assert set(cases) < set(registry.full("cuda"))


@pytest.mark.parametrize("suite", registry.SUITES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shapes_are_unambiguous(suite, device):
    cases = registry.SUITES[suite](device)
    assert len({(c.cell, c.mode, c.shape) for c in cases}) == len(cases)


# Conclusions.


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


def test_summary_is_the_geometric_mean_of_a_group():
    a, b = CASES[0], dataclasses.replace(CASES[0], batch=4)
    wrong = Row(dataclasses.replace(a, batch=5), "fastrnn", "torch", "", "wrong", 1.0, 1e-6)
    summary, other, third = results.summarize(
        [
            make_row(a, 4.0),
            make_baseline(a),
            make_row(b, 0.25),
            wrong,
            make_row(CASES[1], 1.0),
            make_row(a, 3.0, provider="haste"),
        ]
    )
    assert summary[:4] == ("fastrnn", "lstm", "training", "float32")
    assert summary[4:] == (pytest.approx(1.0), 0.25, 1, 0, 1)
    assert other[:4] == ("fastrnn", "gru", "forward", "float64")
    assert third[:5] == ("haste", "lstm", "training", "float32", pytest.approx(3.0))


def test_numbers_that_follow_from_a_row():
    row = make_row(CASES[0], 1.0)
    assert row.step_us == pytest.approx(2000 / 3)
    assert row.share == 0.25
    assert dataclasses.replace(row, times=None).share is None


def test_compare_finds_the_regression_only(found):
    assert not any(change.is_regression for change in results.compare(found.rows, found.rows))
    new = [
        make_row(CASES[0], 0.8 * 0.89),
        make_row(CASES[0], 0.1, provider="torch.compile"),
        make_row(CASES[1], 1.5 * 0.91),
        make_row(CASES[3], 1),
    ]
    changes = results.compare(found.rows, new)
    assert [(change.case, change.is_regression) for change in changes] == [
        (CASES[0], True),
        (CASES[1], False),
    ]
    changes = results.compare(found.rows, new, threshold=0.2)
    assert not any(change.is_regression for change in changes)


# Files.


@pytest.fixture
def found():
    rows = [
        row
        for case, ratio in zip(CASES, (0.8, 1.5, 1.0), strict=False)
        for row in (make_baseline(case), make_row(case, ratio))
    ]
    rows.append(make_row(CASES[0], 0.5, provider="torch.compile"))
    rows.append(Row(CASES[3], "fastrnn", "torch", "reason", "wrong", 0.5, 1e-6))
    return Results(environment(CPU, "fastrnn bench --quick"), LIMITS, rows)


def test_json_round_trip(tmp_path, found):
    graph = Times(Band(1.0, 0.9, 1.1), Band(2.0, 1.9, 2.1))
    rows = [dataclasses.replace(found.rows[0], graph=graph), *found.rows[1:]]
    results.write_json(tmp_path / "results.json", found._replace(rows=rows))
    assert results.load(tmp_path / "results.json") == found._replace(rows=rows)


def test_results_from_before_projections(tmp_path, found):
    path = tmp_path / "results.json"
    results.write_json(path, found)
    content = json.loads(path.read_text())
    for record in content["rows"]:
        for name in results._LATER:
            assert record.pop(name) == getattr(Case, name)
    path.write_text(json.dumps(content))
    assert results.load(path) == found


def test_csv_rows_carry_the_environment(tmp_path, found):
    results.write_csv(tmp_path / "results.csv", found)
    with (tmp_path / "results.csv").open(newline="") as file:
        records = [r for r in csv.DictReader(file) if r["provider"] == "fastrnn"]
    assert [record["ratio"] for record in records] == ["0.8", "1.5", "1.0", ""]
    assert [record["ms_p80"] for record in records] == ["2.1", "2.1", "2.1", ""]
    assert [record["share"] for record in records] == ["0.25", "0.25", "0.25", ""]
    env = found.env
    assert {(record["device"], record["torch"]) for record in records} == {(env.device, env.torch)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a results.json"),
        ('{"schema": 0}', "is not a results.json"),
        (f'{{"schema": {results.SCHEMA}}}', "missing, unknown or wrong fields: 'rows'"),
        (f'{{"schema": {results.SCHEMA}, "rows": [{{"cell": "gru"}}]}}', "fields: 'step_us'"),
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
def test_load_refuses_wrong_values(tmp_path, found, field, value):
    path = tmp_path / "old.json"
    results.write_json(path, found)
    content = json.loads(path.read_text())
    content["rows"][0][field] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="missing, unknown or wrong fields"):
        results.load(path)


# Tables, pictures and the page.


def test_tables(found):
    lines = report_.results_table(found.rows).lines
    assert [line.verdict for line in lines] == ["slower", "faster", "equal"]
    assert "ATen" in lines[0].cells
    assert "products  25%" in lines[0].cells
    every = report_.providers_table(found.rows)
    assert every.headers[3:] == ("#torch.nn", "#fastrnn", "#torch.compile")
    assert every.lines[0].cells[3:] == ("2.00 (1.00)", "2.00 (0.80)", "2.00 (0.50)")
    assert every.lines[3].cells[3:] == ("-", "wrong", "-")
    two = [row for row in found.rows if row.provider != "torch.compile"]
    assert report_.providers_table(two) is None
    assert report_.failures_table(two).lines[0].cells[0] == "fastrnn"
    assert report_.failures_table(two[:6]) is None
    assert report_.totals(found.rows) == "4 cases: 1 faster, 1 equal, 1 slower, 1 wrong"


def test_prices_are_those_beside_a_plain_layer_and_loops():
    case = Case("slstm", "training", "float32", 3, 2, 8, 8)
    ratios = {"fastrnn": 0.5, "fastrnn:plain": 1.0, "loop": 0.1, "torch.compile": 0.25}
    rows = [make_baseline(case)]
    rows += [make_row(case, ratio, 0.05, provider=name) for name, ratio in ratios.items()]
    rows[-1] = dataclasses.replace(rows[-1], first_s=12.34)
    table = report_.prices_table(rows)
    assert table.headers[3:] == (
        "#fastrnn ms", "#cost", "#torch.nn", "#loop", "#torch.compile", "#first call",
    )  # fmt: skip
    assert table.lines[0].cells[3:] == (
        "2.00", "2.00 [1.73-2.33]", "0.50 [0.45-0.55]", "5.00 [3.00-11.00]", "2.00 [1.50-2.75]",
        "12.3",
    )  # fmt: skip
    failed = dataclasses.replace(rows[-1], times=None, status="failed")
    assert report_.prices_table([*rows[:-1], failed]).lines[0].cells[-2:] == ("-", "-")
    assert report_.prices_table(rows[:2]) is None


def test_published_figures_stand_beside_ours():
    figure = registry.PUBLISHED[0]
    rows = [make_baseline(figure.case), make_row(figure.case, 1.2)]
    (line, *_) = report_.published_table(rows).lines
    assert line.cells[1:4] == (figure.who, figure.device, "2.01")
    assert report_.published_table([make_row(CASES[0], 1.0)]) is None


def test_a_run_without_the_planners_choice():
    rows = [make_baseline(CASES[0]), make_row(CASES[0], 1.5, provider="fastrnn:loop")]
    assert report_.main_provider(rows) == "fastrnn:loop"
    assert report_.results_table(rows).lines[0].verdict == "faster"


def test_conclusions_name_groups_and_reasons():
    def row(case, ratio, path, reason, spread=0.01):
        return dataclasses.replace(make_row(case, ratio, spread), path=path, reason=reason)

    lstm, cell, gru = CASES[0], CASES[3], CASES[1]
    more = dataclasses.replace(lstm, batch=4)
    own = [
        row(lstm, 0.8, "kernels", "kernels, 16 lanes; 1.2 times as fast as torch's"),
        row(more, 0.9, "kernels", "kernels, 16 lanes; 1.5 times as fast as torch's", 0.2),
        row(cell, 0.95, "torch", "2.5 times as fast as kernels, 16 lanes", 0.1),
        row(gru, 4.0, "kernels", ""),
    ]
    bases = [make_baseline(case) for case in (lstm, more, cell)]
    bases.append(dataclasses.replace(make_baseline(gru), path="oneDNN, 8 calls"))
    other = make_row(gru, 8.0, provider="onnxruntime")
    env = dataclasses.replace(environment(CPU, ""), device="a CPU", threads=2)
    summary, faster, slower = report_.conclusions(Results(env, LIMITS, [*bases, *own, other]))
    assert summary == (
        "On a CPU with 2 threads, fastrnn is faster than torch.nn in 1 of 4 cases, equal in 0 and "
        "slower in 3. It is 1.29 times as fast in the geometric mean, with a range of 0.80 to 4.00."
    )
    assert faster == [
        "Geometric mean by layer and mode: GRU inference 4.00, cell training 0.95, LSTM training "
        "0.85.",
        "By what torch.nn runs: 4.00 where it runs oneDNN (1 case), 0.88 where it runs ATen (3 "
        "cases).",
        "All faster cases ran on the path kernels.",
        "Compared with onnxruntime: 0.50 times as fast in the geometric mean of 1 case, 0.50.",
    ]
    assert slower == [
        "LSTM training: 2 of 2 cases, 0.80 to 0.90 times as fast, path kernels. torch.nn runs "
        "ATen. fastrnn reaches 25 % of the limit set by the matrix products. The planner expected "
        "the kernels to be 1.20 to 1.50 times as fast as torch's. In 1 of them, the 20-80 % band "
        "includes 1: within noise.",
        "cell training: 1 of 1 case, 0.95 times as fast, path torch. fastrnn calls the same "
        "operators as torch.nn there: call overhead and noise, in calls of 2 ms. The planner "
        "expects them to be 2.50 times as fast as the kernels. Its 20-80 % band includes 1: within "
        "noise.",
    ]


def test_conclusions_quote_a_reason_and_name_what_torch_lacks(found):
    case = Case("slstm", "training", "float32", 3, 2, 8, 8)
    base = dataclasses.replace(make_baseline(case), path="oneDNN, plain lstm")
    row = dataclasses.replace(make_row(case, 0.8), reason="no kernel of torch's", limit_ms=None)
    summary, _, slower = report_.conclusions(found._replace(rows=[base, row]))
    assert "torch.nn (its plain layer where it has no such option) in 0 of 1 case," in summary
    assert slower == [
        "sLSTM training: 1 of 1 case, 0.80 times as fast, path kernels. torch.nn has no such layer "
        "or option; its time is that of the plain layer. torch.nn runs oneDNN. The planner says: "
        '"no kernel of torch\'s".'
    ]


def test_conclusions_of_what_was_not_timed(found):
    summary, faster, slower = report_.conclusions(found._replace(rows=found.rows[-1:]))
    assert summary.endswith("no case of fastrnn was timed: 1 wrong.")
    assert faster == slower == []
    assert "1 wrong" in report_.conclusions(found).summary
    assert report_.conclusions(found._replace(rows=[])).summary.endswith("timed: none was run.")


def draw(folder: Path, found: Results) -> dict[str, plots.Picture]:
    source = folder / "results.json"
    results.write_json(source, found)
    pictures = plots.draw(folder, found, source)
    assert tuple(pictures) == plots.NAMES
    for path in itertools.chain.from_iterable(pictures.values()):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert drawing.origin(path) == drawing.origin_of(source)
        with Image.open(path) as image:
            assert image.width == 2000
    return pictures


def test_page_is_self_contained_and_marks_slower_cases(tmp_path, found):
    page.write_page(tmp_path / "report.html", found, draw(tmp_path, found))
    text = (tmp_path / "report.html").read_text()
    sources = re.findall(r"(?:src|srcset|href|url)\s*[=(]\s*[\"']?([^\"')> ]{1,30})", text)
    assert sources == ["data:image/png;base64,iVBORw0K"[:30]] * 2 * len(plots.NAMES)
    dark = '<source media="(prefers-color-scheme: dark)" srcset='
    assert text.count(f"<picture>{dark}") == len(plots.NAMES)
    table = text.partition('<tbody class="filtered">')[2].partition("</tbody>")[0]
    assert re.findall(r'<tr class="(\w+)"', table) == ["slower", "faster", "equal"]
    assert table.count("▼ slower") == 1
    assert found.env.command in text
    assert found.env.device in text
    assert 'because of "<b>"' not in text
    concluded = report_.conclusions(found)
    assert text.index(concluded.summary) < text.index("<picture>")
    assert "<h3>Where it is slower, and why</h3><ul><li><b>LSTM training</b>: 1 of 1" in text


@pytest.mark.long
def test_pictures_of_little(tmp_path, found):
    draw(tmp_path, found._replace(rows=found.rows[-1:]))  # no timed row
    draw(tmp_path, found._replace(rows=[]))
    draw(tmp_path, found._replace(rows=[make_baseline(CASES[0]), make_row(CASES[0], 0.4)]))


@pytest.mark.long
def test_pictures_of_a_grid(tmp_path, found):
    rows = [
        row
        for k, case in enumerate(registry.select("full", "cuda", cells=["lstm", "gru"]))
        for row in (make_baseline(case), make_row(case, 0.4 + k % 20 / 4))
    ]
    draw(tmp_path, found._replace(rows=rows))


def test_a_heat_map_has_the_sizes_of_most_columns():
    cells = ("lstm", "gru", "rnn")
    dense = [Case(cell, "forward", "float32", 16, b, 8, 8) for cell in cells for b in (1, 2, 3, 4)]
    alone = [Case("lstm", "forward", "float32", 32, 1, 8, 8), Case(
        "rnn", "forward", "float64", 16, 1, 8, 8)]  # fmt: skip
    shown = heatmap._map_of([make_row(case, 1.5) for case in (*dense, *alone)])
    assert [column.cell for column in shown.columns] == [*cells]
    assert shown.sizes == [(16, b, 8) for b in (1, 2, 3, 4)]
    assert shown.n_left_out == 1
    half = heatmap._map_of([make_row(case, 1.5) for case in alone[:1]])
    assert (half.sizes, half.n_left_out) == ([(32, 1, 8)], 0)


@pytest.mark.parametrize("across", [1, 2, 3, 7])
def test_blocks_of_a_heat_map_have_every_size_under_its_heading(across):
    sizes = [heatmap._Size(t, b, 8) for t, n in ((1, 4), (16, 13), (64, 1)) for b in range(n)]
    blocks = heatmap._flow(sizes, across)
    assert 1 <= len(blocks) <= across
    assert [line for block in blocks for line in block if not isinstance(line, str)] == sizes
    for block in blocks:
        heading = ""
        for line, after in zip(block, [*block[1:], "end"], strict=True):
            if isinstance(line, str):
                heading = line
                assert not isinstance(after, str)
            else:
                assert heading.removesuffix(", continued") == f"T = {line.steps}"


def test_pictures_of_the_documentation_are_of_its_results(tmp_path, capsys):
    """Those of the table of speeds; the note in a file is compared, not the pixels."""
    blocks = [match for page in readme.PAGES for match in readme.BLOCK.finditer(page.read_text())]
    (name,) = {
        re.search(r"`bench/results/([^/`]+)/`", block[4])[1]
        for block in blocks
        if block.group(2, 3) == ("speed", "cpu")
    }
    source = ROOT / "bench" / "results" / name / "results.json"
    committed = ROOT / "docs" / "pictures"
    assert plots.main([str(source), "--out", str(tmp_path)]) == 0
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["heatmap-dark.png", "heatmap.png", "speedup-dark.png", "speedup.png"]
    assert all(file in capsys.readouterr().out for file in files[:1])
    for file in files:
        expected = drawing.origin(tmp_path / file)
        assert expected.startswith(f"{name}/results.json sha256:")
        assert drawing.origin(committed / file) == expected, f"redraw with {plots.__name__}"
        assert (committed / file).stat().st_size < 150_000
    for wrong in ([str(source), "--out", str(tmp_path / "none")], [str(tmp_path / "none.json")]):
        with pytest.raises(SystemExit):
            plots.main(wrong)


# The tables of README.md and docs/speed.md.


@pytest.mark.parametrize(
    ("case", "group", "kind"),
    [
        (Case("lstm", "forward", "float32", 16, 1, 8, 8), "LSTM inference, float32, B = 1", "LSTM"),
        (
            Case("gru", "forward", "float32", 4, 4, 8, 8),
            "GRU inference, float32, T below 16",
            "GRU",
        ),
        (Case("rnn", "forward", "float64", 16, 1, 8, 8), "RNN inference, float64", "float64"),
        (
            Case("lstm", "training", "float32", 1, 1, 8, 8, proj_size=2),
            "LSTM with projections, training",
            "LSTM with projections",
        ),
        (
            Case("gru_cell", "forward", "float32", 1, 1, 8, 8),
            "single steps (cell modules), inference",
            "single steps (cell modules)",
        ),
    ],
)
def test_groups_of_the_tables_of_speeds(case, group, kind):
    assert readme._group(case, "float32") == group
    assert readme._kind(case, "float32") == kind


def filled(tmp_path, found, text):
    """Return a page after the tables of results were written to it."""
    page = tmp_path / "page.md"
    page.write_text(text)
    results.write_json(tmp_path / "results.json", found)
    assert readme.main([str(tmp_path / "results.json"), "--pages", str(page)]) == 0
    return page.read_text()


def test_the_tables_of_speeds_are_those_of_a_file(tmp_path, found, capsys):
    other = "\n<!-- /speed -->\nb\n<!-- speed: cuda -->\nc\n<!-- /speed -->\n"
    mine = "<!-- summary: cpu -->\nold<!-- /summary -->\n<!-- speed: cpu -->\nold"
    text = filled(tmp_path, found, f"a\n{mine}{other}")
    assert "old" not in text
    assert text.startswith("a\n<!-- summary: cpu -->\n")
    assert text.endswith(other)
    assert "| LSTM training, float32, T below 16 | 1 | 0.80 | 0.80 | 0.80 | 1 |" in text
    assert re.search(r"^\| LSTM \| .* \| 0.80 \(0.80 to 0.80\) \| 1 of ", text, re.M)
    assert text.count(found.env.command) == 2
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(SystemExit):
        readme.main([str(tmp_path / "results.json"), "--pages", str(page)])
    assert "no <!-- summary: cpu --> or <!-- speed: cpu --> in" in capsys.readouterr().err


def test_the_table_of_prices_is_that_of_a_file(tmp_path, found):
    others = "<!-- speed: cpu -->\nb\n<!-- /speed -->\n"
    case = dataclasses.replace(CASES[0], cell="lstm", mode="forward", zoneout=0.1)
    ratios = {"fastrnn": 0.5, "fastrnn:plain": 0.8, "loop": 0.125}
    rows = [make_row(case, ratio, provider=name) for name, ratio in ratios.items()]
    page = f"{others}<!-- prices: cpu -->\nold\n<!-- /prices -->\n"
    text = filled(tmp_path, found._replace(rows=rows), page)
    assert text.startswith(f"{others}<!-- prices: cpu -->\n")
    assert "| LSTM, zoneout | 1.60 | 4.00 | - | - | - | - |" in text


def test_the_table_of_runtimes_is_that_of_a_file(tmp_path, found):
    case = dataclasses.replace(CASES[0], cell="lstm", mode="forward")
    ratios = {"torch.nn": 1.0, "fastrnn": 2.0, "onnxruntime": 4.0}
    rows = [make_row(case, ratio, provider=name) for name, ratio in ratios.items()]
    page = "<!-- runtimes: cpu -->\nold\n<!-- /runtimes -->\n"
    text = filled(tmp_path, found._replace(rows=rows), page)
    size = f"T{case.steps} B{case.batch} H{case.hidden_size}"
    assert f"| onnxruntime, LSTM | 0.50 | 0.50 | {size} | 0.50 | {size} |" in text


def test_tables_say_what_the_committed_results_say():
    blocks = [match for page in readme.PAGES for match in readme.BLOCK.finditer(page.read_text())]
    assert {block[2] for block in blocks} == {"summary", "speed", "runtimes", "prices"}
    for block in blocks:
        name = re.search(r"`bench/results/([^/`]+)/`", block[4])[1]
        committed = results.load(ROOT / "bench" / "results" / name / "results.json")
        assert committed.env.device_type == block[3]
        assert not committed.env.dirty
        assert block[4] == readme.tables_of(committed)[block[2]](committed, name)


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
        ("--mode", "infer", "unknown mode 'infer', expected one of forward, training"),
        ("--providers", "cudnn", "unknown provider 'cudnn', expected one of fastrnn, "),
        ("--T", "0", "'0' is not a positive integer"),
        ("--B", "1.5", "'1.5' is not a positive integer"),
        ("--H", "8,", "'' is not a positive integer"),
        ("--layers", "-1", "'-1' is not a positive integer"),
        ("--dtype", "int8", "unknown dtype 'int8', expected one of float16"),
        ("--device", "tpu", "unknown device 'tpu', expected cpu"),
        ("--device", "cuda:99", "no device 'cuda:99'"),
        ("--seconds", "nan", "'nan' is not a positive number"),
        ("--threshold", "0", "'0' is not a positive number"),
    ],
)
def test_bad_values_are_named(option, text, message):
    with pytest.raises(argparse.ArgumentError, match=re.escape(message)):
        parse(f"{option}={text}")


TINY = ["--cells=gru", "--T=3", "--B=2", "--H=8", "--device=cpu", "--seconds=1e-3"]
TINY_GRID = {"steps": [3], "batches": [2], "hidden": [8]}


def test_run_writes_all_files(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert cli.run(parse(*TINY, "--out", str(out), "--providers", "fastrnn,fastrnn:torch")) == 0
    names = [f"{name}{theme.suffix}.png" for name in plots.NAMES for theme in drawing.THEMES]
    names += ["report.html", "results.csv", "results.json"]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    found = results.load(out / "results.json")
    # Where the planner takes torch's path, fastrnn is fastrnn:torch.
    is_ours = [row.path != "torch" for row in found.rows if row.provider == "fastrnn"]
    assert [(row.case.mode, row.provider) for row in found.rows] == [
        (mode, name)
        for mode, more in zip(registry.MODES, is_ours, strict=True)
        for name in ("torch.nn", "fastrnn", "fastrnn:torch")[: 3 if more else 2]
    ]
    assert all(row.bound and row.share > 0 for row in found.rows)
    assert found.limits["gemm_tflops"]["float32"] > 0
    assert str(tmp_path) not in found.env.command
    # Shown again, without measuring.
    again = tmp_path / "again"
    again.mkdir()
    assert cli.run(parse("--render", str(out / "results.json"), "--out", str(again))) == 0
    assert capsys.readouterr().out.splitlines()[:8] == printed.splitlines()[:8]
    assert results.load(again / "results.json") == found
    deeper = tmp_path / "a" / "new" / "one"
    assert cli.run(parse("--render", str(out / "results.json"), "--out", str(deeper))) == 0
    assert results.load(deeper / "results.json") == found
    (out / "report.html").unlink()
    assert cli.run(parse("--render", str(out / "results.json"))) == 0
    assert (out / "report.html").exists()
    with pytest.raises(ValueError, match="--T cannot be combined with --render"):
        cli.run(parse("--render", str(out / "results.json"), "--T=3"))
    with pytest.raises(ValueError, match="--full cannot be combined with --render"):
        cli.run(parse("--render", str(out / "results.json"), "--full"))


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--full", "--cells", "lstm", "gru", "--dtype", "float32"],
        ["--T", "3", "--H", "8", "9", "--layers", "2", "--bidirectional", "--mode", "forward"],
        ["--published", "--providers", "fastrnn", "torch.compile", "--seconds", "0.5"],
        ["--runtimes"],
        ["--variants", "--cells", "slstm", "--providers", "loop", "fastrnn:plain"],
    ],
)
def test_the_recorded_command_gives_the_same_cases(options):
    args = parse(*options)
    command = cli._command(args, CPU)
    again = parse(*command.split()[2:])
    assert cli._cases(again, CPU) == cli._cases(args, CPU)
    assert cli._command(again, CPU) == command


def test_who_is_measured_if_nobody_is_asked_for():
    everybody = [name for name in providers.PROVIDERS if name != "torch.nn"]
    published = [n for n in everybody if n not in ("fastrnn:reference", "fastrnn:plain")]
    beside = ["fastrnn:plain", "loop", "torch.compile", "flashrnn", "haste"]
    schedules = [f"fastrnn:{schedule}" for schedule in SCHEDULES]
    for options, device, expected in (
        (["--quick"], CPU, ["fastrnn"]),
        (["--T=3"], CPU, ["fastrnn"]),
        (["--full"], CPU, ["fastrnn"]),
        (["--full"], torch.device("cuda"), ["fastrnn", *schedules]),
        (["--published"], CPU, published),
        (["--runtimes"], CPU, ["fastrnn", "onnxruntime", "openvino"]),
        (["--variants"], CPU, ["fastrnn", *beside]),
        (["--T=3", "--providers=all"], CPU, everybody),
        (["--full", "--providers=haste,fastrnn"], CPU, ["haste", "fastrnn"]),
    ):
        assert cli._providers(parse(*options), device) == expected


def test_who_cannot_run_is_named(tmp_path, capsys):
    options = [*TINY, "--out", str(tmp_path), "--mode=forward"]
    with pytest.raises(ValueError, match="skipped in 1 cases: torchrl: "):
        cli.run(parse(*options, "--providers=torchrl"))
    assert cli.run(parse(*options, "--providers", "torchrl", "fastrnn:reference")) == 0
    printed = capsys.readouterr().out
    assert "skipped in 1 cases: torchrl: " in printed
    assert "fastrnn:reference ms" in printed


def test_an_interrupted_run_shows_what_it_has(tmp_path, monkeypatch, capsys):
    real, calls = measure.measure, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(measure, "measure", interrupted)
    assert cli.run(parse(*TINY, "--out", str(tmp_path))) == 1
    assert "interrupted after 1 of 2 cases" in capsys.readouterr().out
    assert (tmp_path / "report.html").exists()


def test_run_compares(tmp_path, capsys):
    args = parse(*TINY, "--out", str(tmp_path), "--compare", str(tmp_path / "old.json"))
    cases = registry.grid(cells=["gru"], **TINY_GRID)
    env = environment(CPU, "")
    for ratio, status in ((1000.0, 1), (0.001, 0)):
        old = [make_row(case, ratio, ratio / 10) for case in cases]
        results.write_json(tmp_path / "old.json", Results(env, LIMITS, old))
        assert cli.run(args) == status
    assert "2 regressions" in capsys.readouterr().out


def test_run_refuses_before_measuring(tmp_path, found, monkeypatch):
    monkeypatch.setattr(cli, "measure_all", lambda *_: pytest.fail("measured"))
    args = parse(*TINY, "--compare", str(tmp_path / "old.json"))
    with pytest.raises(ValueError, match="cannot read"):
        cli.run(args)
    results.write_json(tmp_path / "old.json", found)
    with pytest.raises(ValueError, match="contains none of the 2 cases"):
        cli.run(args)
    old = str(tmp_path / "old.json")
    for options in (TINY, ("--render", old)):
        with pytest.raises(ValueError, match=r"cannot write to .*old.json: File exists"):
            cli.run(parse(*options, "--out", old))
    with pytest.raises(ValueError, match="--full selects a suite"):
        cli.run(parse("--full", "--T=3"))
    with pytest.raises(ValueError, match="no case of --quick matches"):
        cli.run(parse("--cells=rnn", "--dtype=float16", "--device=cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape("pip install 'fastrnn[bench]'")):
        cli.run(args)


def test_run_fails_on_a_wrong_result(tmp_path, monkeypatch, capsys):
    real = measure.measure

    def wrong(*arguments):
        rows = real(*arguments)
        return [rows[0], dataclasses.replace(rows[1], status="wrong", times=None)]

    monkeypatch.setattr(measure, "measure", wrong)
    assert cli.run(parse(*TINY, "--out", str(tmp_path))) == 1
    assert "2 wrong" in capsys.readouterr().out


@pytest.mark.sweep(3)
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_output_of_any_encoding(tmp_path, monkeypatch, found, encoding):
    old, out = str(tmp_path / "old.json"), io.TextIOWrapper(io.BytesIO(), encoding)
    results.write_json(Path(old), found)
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["bench", "--render", old, "--compare", old]) == 1  # there is a wrong one
    written = out.buffer.getvalue().decode(encoding)
    assert "? slower" in written
    assert "2.00 ? 2.00" in written
    assert "report.html" in written


@pytest.mark.long
def test_files_are_written_before_anything_is_printed(tmp_path, monkeypatch, found):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError("no space left on device")

    results.write_json(tmp_path / "old.json", found)
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(OSError, match="no space left"):
        cli.run(parse("--render", str(tmp_path / "old.json")))
    assert (tmp_path / "report.html").exists()
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.run(parse("--render", str(tmp_path / "old.json"))) == 1


@pytest.mark.long
def test_a_locale_without_utf_8(tmp_path, found):
    """Nor is any file opened in the encoding of the locale."""
    old = tmp_path / "old.json"
    rows = [make_row(case, 0.001) for case in registry.grid(cells=["gru"], **TINY_GRID)]
    results.write_json(old, found._replace(rows=rows))
    command = [sys.executable, "-X", "warn_default_encoding", "-m", "fastrnn", "bench", *TINY]
    done = subprocess.run(
        [*command, "--out", str(tmp_path), "--compare", str(old)],
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        encoding="ascii",
    )
    assert done.returncode == 0, done.stderr
    assert "2 cases in common, 0 regressions" in done.stdout
    assert (tmp_path / "report.html").exists()
    assert not re.findall(rf"^{re.escape(str(ROOT))}/(?!\.).*EncodingWarning.*", done.stderr, re.M)


def test_a_home_in_an_option_is_expanded(tmp_path, monkeypatch, found):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    for option in ("out", "compare", "render"):
        assert getattr(parse(f"--{option}=~/x"), option) == tmp_path / "x"
        with pytest.raises(
            argparse.ArgumentError,
            match="'~nobody-here/x' is in a home directory that does not exist",
        ):
            parse(f"--{option}=~nobody-here/x")
    assert parse("--out=x/~").out == Path("x/~")
    results.write_json(tmp_path / "results.json", found)
    (tmp_path / "README.md").write_text("<!-- speed: cpu -->\nold<!-- /speed -->\n")
    assert readme.main(["~/results.json", "--pages=~/README.md"]) == 0
    assert "old" not in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_options_do_not_import_matplotlib():
    code = "import sys, fastrnn.bench.cli; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.long
def test_pytest_runs_the_suite():
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", "-p",
               "no:xdist", "-k", "rnn_cell or rnn-forward-T32", "--benchmark-disable"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert re.search(r"^\d+ passed, \d+ deselected", done.stdout.splitlines()[-1]), done.stdout
