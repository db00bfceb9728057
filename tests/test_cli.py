"""The command line: exit statuses, one-line errors, and that the harness can fail."""

from __future__ import annotations

import pytest
import torch

import fastrnn.cpu
import fastrnn.planner
from fastrnn import testing
from fastrnn.__main__ import main


def failure(capsys, *argv: str) -> str:
    """The one line of an error, which must exit with status 2."""
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["plan", "--cell", "lstmm", "--H", "4"], "invalid choice: 'lstmm'"),
        (["plan", "--cell", "lstm", "--H", "0"], "'0' is not a positive integer"),
        (["plan", "--cell", "lstm", "--H", "4", "--dtype", "bf17"], "unknown dtype 'bf17'"),
        (["plan", "--cell", "lstm", "--H", "4", "--device", "gpu7"], "unknown device 'gpu7'"),
        (["plan", "--cell", "gru", "--H", "4", "--projected"], "--projected is for lstm, not gru"),
        (["plan", "--cell", "lstm"], "--H"),
        (["verify", "--cells", "lstm,gru"], "invalid choice: 'lstm,gru'"),
        (["verify", "--cases", "-3"], "'-3' is not a positive integer"),
        (["verify", "--device", "nowhere"], "unknown device 'nowhere'"),
        (["bench", "--T", "x"], "x"),
        (["bench", "--compare", "missing.json"], "missing.json"),
        ([], "required: {bench,verify,warmup,plan}"),
        (["train"], "invalid choice: 'train'"),
    ],
)
def test_bad_arguments_give_one_line_and_status_2(capsys, argv, says):
    assert says in failure(capsys, *argv)


@pytest.mark.parametrize(
    ("argv", "path"),
    [
        (["--cell", "lstm", "--T", "1", "--B", "64", "--H", "512"], "torch"),
        (["--cell", "lstm", "--T", "512", "--B", "64", "--H", "512", "--projected"], "torch"),
        (["--cell", "lstm", "--T", "512", "--B", "64", "--H", "512", "--packed"], "loop"),
        (["--cell", "gru", "--H", "64", "--training"], "loop"),
        (["--cell", "gru", "--H", "64", "--training", "--step"], "torch"),
        (["--cell", "rnn_identity", "--H", "64"], "loop"),
        (["--cell", "gru", "--H", "64", "--training", "--device", "h100"], "loop"),
        (["--cell", "gru", "--H", "64", "--T", "8", "--device", "h100"], "torch"),
        (["--cell", "lstm", "--H", "4096", "--dtype", "bf16", "--device", "b200"], "torch"),
        (["--cell", "lstm", "--H", "64", "--device", "mps"], "torch"),
    ],
)
def test_plan_names_the_path_and_the_reason(capsys, argv, path):
    assert main(["plan", *argv]) == 0
    chosen, reason = capsys.readouterr().out.split(": ", 1)
    assert chosen == path
    assert len(reason) > 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes the device that is there")
def test_plan_of_a_missing_gpu_names_those_it_knows(capsys):
    says = failure(capsys, "plan", "--cell", "lstm", "--H", "64", "--device", "cuda")
    assert "no device 'cuda' here; name one of a100," in says


def test_plan_shows_the_kernels(capsys):
    shape = ["--cell", "lstm", "--H", "512", "--B", "16", "--dtype", "bf16", "--bidirectional"]
    main(["plan", *shape, "--device", "h100"])
    _, forward, backward = capsys.readouterr().out.splitlines()
    assert "forward kernel:  persistent" in forward
    assert "backward kernel: persistent" in backward
    assert "us a step by the model" in forward


def test_verify_passes(capsys):
    assert main(["verify", "--cases", "20", "--seed", "3"]) == 0
    assert "40 cases, 0 failed: ok" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_verify_half_precision(dtype):
    summaries, failures = testing.verify(["lstm", "gru", "rnn_tanh"], [dtype], cases=15)
    assert not failures
    assert all(row.passed for row in summaries)


def test_verify_reports_a_wrong_gradient_and_how_to_reproduce_it(capsys, monkeypatch):
    gru = fastrnn.cpu.CPU_CELLS["gru"]

    def factors(gates, extra, h_prev, c_prev, y):
        d_rh, d_wx_n, carry = gru.factors(gates, extra, h_prev, c_prev, y)
        return d_rh * (1 + 1e-5), d_wx_n, carry

    monkeypatch.setitem(fastrnn.cpu.CPU_CELLS, "gru", gru._replace(factors=factors))
    assert main(["verify", "--cells", "gru", "--cases", "10", "--dtype", "float64"]) == 1
    out = capsys.readouterr().out
    command = next(line for line in out.splitlines() if "python -m fastrnn" in line).split()
    assert main(command[3:]) == 1, "the command reproduces the failure"
    monkeypatch.undo()
    assert main(command[3:]) == 0


def test_verify_reports_an_exception(capsys, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(fastrnn.cpu, "layer_forward", broken)
    assert main(["verify", "--cells", "gru", "--cases", "1", "--dtype", "float64"]) == 1
    assert "raised ZeroDivisionError: on purpose" in capsys.readouterr().out


def test_cases_cover_every_argument():
    """A draw that never sets an argument would not test it."""
    cases = [testing.draw_case("lstm", seed=0, index=k) for k in range(200)]
    for name in testing.Case.__dataclass_fields__.keys() - {"cell", "seed"}:
        assert len({getattr(case, name) for case in cases}) > 1, name


@pytest.mark.parametrize("native", [False, True])
def test_plan_of_half_precision_depends_on_the_cpu(capsys, monkeypatch, native):
    monkeypatch.setattr(fastrnn.planner, "multiplies", lambda dtype: native)
    main(["plan", "--cell", "lstm", "--B", "16", "--H", "64", "--dtype", "bf16"])
    assert capsys.readouterr().out.startswith("torch: " if native else "loop: ")
