"""The command line: exit statuses, one-line errors, and faults that `verify` must detect."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys

import pytest
import torch

import fastrnn.cpu
import fastrnn.planner
from fastrnn import flow, oracle, paths, products, testing, tuned
from fastrnn.__main__ import main
from fastrnn.kernels import configs


def failure(capsys, *argv: str) -> str:
    """The one-line message of an error, which must exit with status 2."""
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
        (["plan", "--cell", "gru", "--H", "4", "--projected"], "--projected applies to lstm only"),
        (["plan", "--cell", "lstm"], "--H"),
        (["verify", "--cells", "lstm,gru"], "invalid choice: 'lstm,gru'"),
        (["verify", "--cases", "-3"], "'-3' is not a positive integer"),
        (["verify", "--device", "nowhere"], "unknown device 'nowhere'"),
        (["tune", "--seconds", "0"], "'0' is not a positive integer"),
        (["tune", "--show", "--forget"], "not allowed with argument --show"),
        (["bench", "--T", "x"], "x"),
        (["bench", "--compare", "missing.json"], "missing.json"),
        ([], "required: {info,bench,verify,warmup,tune,plan}"),
        (["train"], "invalid choice: 'train'"),
    ],
)
def test_bad_arguments_give_one_line_and_status_2(capsys, argv, says):
    assert says in failure(capsys, *argv)


@pytest.mark.parametrize(
    ("argv", "path"),
    [
        (["--cell", "rnn_identity", "--H", "64"], "kernels"),
        (["--cell", "gru", "--H", "64", "--noisy"], "kernels"),
        (["--cell", "gru", "--H", "64", "--training", "--device", "h100"], "kernels"),
        (["--cell", "gru", "--H", "64", "--T", "8", "--device", "h100"], "torch"),
        (["--cell", "lstm", "--H", "4096", "--dtype", "bf16", "--device", "b200"], "torch"),
        (["--cell", "lstm", "--H", "64", "--device", "mps"], "torch"),
    ],
)
def test_plan_names_the_path_and_the_reason(capsys, argv, path):
    assert main(["plan", *argv]) == 0
    (chosen, reason), *_ = (line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert chosen == path
    assert len(reason) > 10


@pytest.fixture
def no_tables(monkeypatch, tmp_path):
    """Ignore measurements made on this machine."""
    monkeypatch.setenv("FASTRNN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path)
    tuned.forget_what_was_read()
    yield
    tuned.forget_what_was_read()


@pytest.mark.parametrize(("ratio", "path"), [(0.5, "torch"), (2.0, "kernels")])
@pytest.mark.parametrize(
    "argv", [[], ["--training"], ["--packed"], ["--projected"], ["--step"], ["--dtype", "fp64"]]
)
def test_plan_says_how_it_was_decided(capsys, monkeypatch, no_tables, argv, ratio, path):
    monkeypatch.setattr(fastrnn.crossover, "expected_ratio", lambda *_: ratio)
    monkeypatch.setattr(fastrnn.crossover, "ours", lambda _: "kernels")
    assert main(["plan", "--cell", "lstm", "--H", "64", *argv]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{path}: ")
    assert "2 times as fast" in first
    assert second == "  decided by:      model"


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes the device that is there")
def test_plan_of_a_missing_gpu_names_those_it_knows(capsys):
    says = failure(capsys, "plan", "--cell", "lstm", "--H", "64", "--device", "cuda")
    assert "no device 'cuda' here; use one of a100," in says


def test_plan_shows_the_kernels(capsys, monkeypatch):
    monkeypatch.setattr(configs, "choose", configs.choose.__wrapped__)
    monkeypatch.setattr(configs, "step_us", lambda *_, **options: 1.5 + options["backward"])
    shape = ["--cell", "lstm", "--H", "512", "--B", "16", "--dtype", "bf16", "--bidirectional"]
    main(["plan", *shape, "--device", "h100"])
    _, source, forward, backward = capsys.readouterr().out.splitlines()
    assert source == "  decided by:      model"
    assert "forward kernel:  persistent, 16 rows x 16 units per program, 4 warps" in forward
    assert "backward kernel: persistent, 16 rows x 16 units per program, 4 warps" in backward
    assert forward.endswith(": 1.50 us per step, simulated")
    assert backward.endswith(": 2.50 us per step, simulated")
    monkeypatch.setattr(configs, "step_us", lambda *_, **options: math.nan)
    main(["plan", *shape, "--device", "h100"])
    assert capsys.readouterr().out.splitlines()[2].endswith(" warps")


@pytest.mark.sweep(2)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_verify_passes(capsys, dtype):
    assert main(["verify", "--cases", "20", "--seed", "3", "--dtype", dtype]) == 0
    assert "20 cases, 0 failed: ok" in capsys.readouterr().out


def _shifted(make_marks):
    """Marks whose truncation is off by one step, equally on every path."""

    def make(steps, batch, directions, device, lengths, reset, bptt):
        return make_marks(steps, batch, directions, device, lengths, reset, bptt and bptt + 1)

    return make


def _longer(make_marks):
    """Marks that give every row that ends early one extra step."""

    def make(steps, batch, directions, device, lengths, reset, bptt):
        if lengths is not None:
            lengths = (lengths + 1).clamp(max=steps)
        return make_marks(steps, batch, directions, device, lengths, reset, bptt)

    return make


@pytest.mark.long
@pytest.mark.parametrize("fault", [_shifted, _longer])
def test_verify_shares_no_reading_of_the_options(monkeypatch, fault):
    """The oracle must not share the code that all paths share."""
    monkeypatch.setattr(flow, "make_marks", fault(flow.make_marks))
    _, failures = testing.verify(["gru"], [torch.float64], cases=30)
    assert failures


@pytest.mark.long
def test_verify_sees_heads_that_are_normalized_together(monkeypatch):
    """Layer normalization over all units of a layer instead of over each head."""

    def together(v):
        """Normalize (K, N, rows, units) over the heads and units."""
        centered = v - v.mean((1, -1), keepdim=True)
        return centered / (centered.square().mean((1, -1), keepdim=True) + 1e-5).sqrt()

    monkeypatch.setattr(oracle, "_normalized", together)
    for cell, is_seen in (("gru", False), ("layernorm_gru", True)):
        _, failures = testing.verify([cell], [torch.float64], cases=40)
        assert bool(failures) == is_seen
        assert all(failure.case.num_heads > 1 for failure in failures)


def _shifted_masks(mask):
    """Zoneout whose masks are one step late."""
    return lambda shape, p, device: mask(shape, p, device).roll(1, 1)


def _swapped_members(vmap):
    """Ensembles whose members use each other's weights."""

    def swapped(function, *args, **options):
        mapped = vmap(function, *args, **options)
        is_of_module = function.__name__ == "of_member"

        def call(leaves):
            if is_of_module:
                names = [name for name in leaves if "weight" in name]
                leaves = leaves | {name: leaves[name].flip(0) for name in names}
            return mapped(leaves)

        return call

    return swapped


@pytest.mark.long
@pytest.mark.parametrize(
    ("module", "name", "fault"),
    [(paths, "_mask", _shifted_masks), (torch.func, "vmap", _swapped_members)],
)
def test_verify_sees_mistakes_in_noise_and_ensembles(monkeypatch, module, name, fault):
    monkeypatch.setattr(module, name, fault(getattr(module, name)))
    _, failures = testing.verify(["peephole_lstm"], [torch.float64], cases=40)
    assert failures
    for failure in failures:
        case = failure.case
        assert case.members if name == "vmap" else case.zoneout and case.training


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_verify_half_precision(dtype):
    summaries, failures = testing.verify(["lstm", "gru", "rnn_tanh"], [dtype], cases=15)
    assert not failures
    assert all(row.passed for row in summaries)


def test_verify_reports_a_wrong_gradient_and_how_to_reproduce_it(capsys, monkeypatch):
    add_d_x = products.add_d_x

    def wrong(dx, *args, **options):
        add_d_x(dx, *args, **options)
        dx.mul_(1 + 1e-5)

    monkeypatch.setattr(products, "add_d_x", wrong)
    assert main(["verify", "--cells", "gru", "--cases", "10", "--dtype", "float64"]) == 1
    out = capsys.readouterr().out
    command = next(line for line in out.splitlines() if "python -m fastrnn" in line).split()
    assert main(command[3:]) == 1, "the command reproduces the failure"
    monkeypatch.undo()
    assert main(command[3:]) == 0


def test_verify_reports_an_exception(capsys, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(fastrnn.cpu, "forward", broken)
    assert main(["verify", "--cells", "gru", "--cases", "1", "--dtype", "float64"]) == 1
    assert "raised ZeroDivisionError: on purpose" in capsys.readouterr().out


def test_verify_names_every_cell_whole(capsys):
    main(["verify", "--cases", "1", "--dtype", "float64"])
    out = capsys.readouterr().out
    assert all(f" {name} " in out for name in testing.MODULES)
    assert "…" not in out


# Standard output of any kind.

PLAN = ["plan", "--cell", "lstm", "--H", "4"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_output_of_any_encoding(monkeypatch, encoding):
    def broken(*args):
        raise ZeroDivisionError("1 → 0")

    out, errors = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", errors)
    monkeypatch.setattr(fastrnn.cpu, "forward", broken)
    assert main(["verify", "--cells", "gru", "--cases", "1", "--dtype", "float64"]) == 1
    print("→", file=errors, flush=True)
    written = out.buffer.getvalue().decode(encoding)
    assert "ZeroDivisionError: 1 ? 0" in written
    assert "| gru " in written, "the table is in ASCII"
    assert "1 failed: FAIL" in written


def test_what_stands_in_for_standard_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert main(PLAN) == 0
    assert ": " in sys.stdout.getvalue()
    monkeypatch.setattr(sys, "stdout", None)
    assert main(PLAN) == 0
    monkeypatch.setattr(
        sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii", errors="xmlcharrefreplace")
    )
    assert main(PLAN) == 0
    assert sys.stdout.errors == "xmlcharrefreplace", "what the user chose stays"


@pytest.mark.sweep(2)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_is_gone(unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "fastrnn", *PLAN],
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=writer,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_cases_cover_every_argument():
    """An argument that never varies would not be tested."""
    cases = [testing.draw_case("lstm", seed=0, index=k) for k in range(200)]
    for name in testing.Case.__dataclass_fields__.keys() - {"cell", "seed"}:
        assert len({getattr(case, name) for case in cases}) > 1, name
