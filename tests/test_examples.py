"""What the examples share, and those that are not of the gallery, run small."""

import argparse
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parent.parent / "examples"


CHAR_LM = ["--chars", "20000", "--hidden", "48", "--embedding", "16", "--batch", "8"]
CHAR_LM += ["--steps", "32", "--length", "20", "--cell"]


def test_char_lm_layers(example, tmp_path, capsys):
    argv = [*CHAR_LM, "lstm", "--layers", "2", "--dropout", "0.2", "--updates", "90", "--stock"]
    assert example("char_lm").main([*argv, "--out", str(tmp_path)]) == 0
    assert "loss curves agree" in capsys.readouterr().out
    figures = read(tmp_path, "char_lm")
    assert figures["arguments"]["layers"] == 2
    assert figures["environment"]["torch"] == torch.__version__
    assert figures["agreement"] == {"lstm": True}
    for library in ("fastrnn", "torch.nn"):
        of = figures["runs"]["lstm"][library]
        assert len(of["losses"]) == 90
        assert of["losses"][-1] < of["losses"][0] - 1
        assert of["seconds"] > of["step"] > 0


def test_char_lm_writes_no_file_unasked(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert example("char_lm").main([*CHAR_LM, "gru", "--updates", "5"]) == 0
    assert "torch.nn" not in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_per_sample_gradients(example, cell, tmp_path, capsys):
    argv = ["--samples", "5", "--steps", "9", "--width", "4", "--hidden", "12", "--layers", "2"]
    module = example("per_sample_gradients")
    assert module.main([*argv, "--cell", cell, "--out", str(tmp_path)]) == 0
    others = {"loop", *(["Opacus"] if module.GradSampleModule else [])}
    assert read(tmp_path, "per_sample_gradients")["difference"].keys() == others
    assert ("not installed" in capsys.readouterr().out) == (module.GradSampleModule is None)


def test_clipped_sum(example):
    gradients = {"a": torch.tensor([[3.0, 0.0], [0.3, 0.0]]), "b": torch.tensor([[4.0], [0.4]])}
    total, norms = example("per_sample_gradients").clipped_sum(gradients)
    torch.testing.assert_close(norms, torch.tensor([5.0, 0.5]))
    torch.testing.assert_close(total["a"], torch.tensor([0.9, 0.0]))
    torch.testing.assert_close(total["b"], torch.tensor([1.2]))


@pytest.mark.long
@pytest.mark.sweep(2)
@pytest.mark.parametrize("options", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_train_ddp(options, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(EXAMPLES / "train_ddp.py"), *options]
    command += ["--hidden", "16", "--batch", "8", "--steps", "16", "--updates", "60"]
    command += ["--lr", "1e-2", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = read(tmp_path, "train_ddp")
    assert figures["kept"] == (1713 if options else 3409)  # half of each, rounded up
    first, last = (sum(part) / 5 for part in (figures["losses"][:5], figures["losses"][-5:]))
    assert last < first / 4


STREAM = ["--steps", "160", "--hidden", "12", "--layers", "2"]


def test_streaming(example, tmp_path, capsys):
    assert example("streaming").main([*STREAM, "--out", str(tmp_path)]) == 0
    assert "all the same output" in capsys.readouterr().out
    figures = read(tmp_path, "streaming")
    has_runtime = all(find_spec(package) for package in ("onnx", "onnxruntime"))
    libraries = ["fastrnn", "torch.nn", *["onnxruntime"] * has_runtime]
    assert list(figures["microseconds"]) == [
        f"{cell}, {size} frames, {library}"
        for cell in ("LSTM", "GRU")
        for size in (1, 4)
        for library in libraries
    ]
    assert all(0 < of["median"] <= of["p99"] for of in figures["microseconds"].values())


def test_a_stream_without_its_state_is_noticed(example, monkeypatch, capsys):
    module = example("streaming")
    monkeypatch.setattr(module, "by_module", lambda layer: lambda block: layer(block)[0])
    assert module.main(STREAM) == 1
    assert "outputs DIFFER" in capsys.readouterr().out


def test_export_onnx(example, tmp_path, capsys):
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package)
    argv = ["--updates", "3", "--hidden", "8", "--layers", "2", "--steps", "12"]
    assert example("export_onnx").main([*argv, "--out", str(tmp_path)]) == 0
    assert "T = 12, B = 5, chunks" in capsys.readouterr().out
    figures = read(tmp_path, "export_onnx")
    assert len(figures["errors"]) == 6
    assert max(figures["errors"].values()) <= 1e-5
    assert (tmp_path / "echo.onnx").stat().st_size > 1000


def test_export_onnx_says_what_is_missing(example, monkeypatch, capsys):
    module = example("export_onnx")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        module.main([])
    assert stop.value.code == 2
    assert "onnx and onnxruntime not installed" in capsys.readouterr().err


def test_export_onnx_refuses_what_torch_does_not_have(example):
    module = example("export_onnx")
    model = module.Echo(8, 1)
    model.recurrent.zoneout = 0.1
    with pytest.raises(ValueError, match="zoneout"):
        module.export(model, model.arguments(2, 2))


def test_export_onnx_learns_and_keeps_its_state_outside(example):
    """Whether the file is right is another test's question, which needs onnx."""
    module = example("export_onnx")
    model = module.Echo(16, 1)
    assert module.train(model, 60, 2e-2) < 0.9
    x, *state = model.arguments(8, 3)
    whole, *final = model(x, *state)
    first, *between = model(x[:5], *state)
    rest, *last = model(x[5:], *between)
    torch.testing.assert_close(torch.cat([first, rest]), whole)
    torch.testing.assert_close(last, final)


AWD = ["--words", "2500", "--width", "12", "--hidden", "16", "--batch", "4", "--steps", "12"]


def test_awd_lm(example, tmp_path, capsys):
    module = example("awd_lm")
    assert module.main([*AWD, "--updates", "25", "--lr", "2e-2", "--out", str(tmp_path)]) == 0
    figures, printed = read(tmp_path, "awd_lm"), capsys.readouterr().out
    assert figures.keys() == module.VARIANTS.keys()
    for variant, of in figures.items():
        assert f"{variant}: perplexity" in printed
        assert len(of["losses"]) == 25
        assert of["losses"][-1] < of["losses"][0] - 1
        assert of["perplexity"]["25"] < 600  # of some 1200 words


def test_awd_lm_windows_follow_each_other(example):
    """In evaluation the losses of windows are those of the whole text in one call."""
    module = example("awd_lm")
    model = module.AWD(20, 8, 12, 2, "zoneout").eval()
    text = torch.randint(20, (30, 3))
    for steps in (7, 29, 40):
        parts = [(loss.item() * n, n) for loss, _, n in module.losses(model, text, steps)]
        sums = [sum(part) for part in zip(*parts, strict=True)]
        assert sums[1] == 29
        logits, _, punished = model(text[:-1], [None, None])
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[1:].flatten())
        assert sums[0] / 29 == pytest.approx(expected.item(), rel=1e-5)
        assert punished.item() == 0


def test_awd_lm_text_is_held_out(example):
    known, held_out, count = example("awd_lm").corpus()
    assert 5 * len(held_out) < len(known)
    assert max(known.max(), held_out.max()) < count
    assert (held_out == 0).float().mean() < 0.1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_long_sequence(example, tmp_path, monkeypatch):
    module = example("long_sequence")
    # Processes of their own would take longer than all the rest. What they print is not looked at.
    monkeypatch.setattr(
        module.subprocess, "check_output", lambda *_, **__: '{"MiB": 0, "seconds": 0}'
    )
    argv = ["--steps", "1000", "--memory", "20", "--hidden", "16", "--batch", "8", "--lr", "5e-3"]
    argv += ["--chunk", "100", "--updates", "25", "--out", str(tmp_path)]
    assert module.main(argv) == 0
    figures = read(tmp_path, "long_sequence")
    assert figures["table"].keys() == {"torch.nn", "plain", "True", "100"}
    assert sum(figures["losses"][:3]) > 2.4
    assert sum(figures["losses"][-3:]) < 1


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_long_sequence_takes_less_memory_in_chunks():
    used = []
    for way in ("plain", "250"):
        command = [sys.executable, str(EXAMPLES / "long_sequence.py"), "--steps", "20000"]
        printed = subprocess.check_output([*command, "--measure", way], text=True, timeout=300)
        used.append(json.loads(printed)["MiB"])
    assert used[1] < used[0] / 2


def test_a_wrong_gradient_fails_the_comparison(example, monkeypatch, capsys):
    """1 % of one weight's gradient in the wrong place is enough."""
    module = example("char_lm")

    class Wrong(module.CharModel):
        def __init__(self, library, *args):
            super().__init__(library, *args)
            if library is not torch.nn:
                weight = self.recurrent.weight_hh_l0
                weight.register_hook(lambda grad: grad + 0.01 * grad.roll(1, 0))

    monkeypatch.setattr(module, "CharModel", Wrong)
    assert module.main([*CHAR_LM, "lstm", "--updates", "50", "--stock"]) == 1
    assert "loss curves DIFFER" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "agree"), [(1e-6, True), (0.1, False), (float("nan"), False)])
def test_same_curve(example, change, agree):
    """A change late in the run must be seen where it lasts for a tenth of it."""
    stock = [1.0 - i / 400 for i in range(200)]
    ours = [x + (i >= 180) * change for i, x in enumerate(stock)]
    assert example("common").same_curve(ours, stock) is agree


def test_lanes_share_no_random_numbers(example):
    """Two trainings that take turns draw what each would have drawn alone."""
    common = example("common")
    args = argparse.Namespace(device="cpu", seed=3)

    def training():
        for _ in range(3):
            yield torch.rand(2)
        return {}

    lanes = [common.Lane(training(), args) for _ in range(2)]
    for _ in range(4):
        for lane in lanes:
            lane.advance()
    torch.manual_seed(3)
    alone = torch.rand(3, 2)
    for lane in lanes:
        assert torch.equal(torch.stack(lane.losses), alone)
        assert lane.figures == {}


@pytest.mark.parametrize(("count", "batch"), [(10, 3), (3, 10), (5, 5)])
def test_batches(example, count, batch):
    args = argparse.Namespace(updates=7, batch=batch, device="cpu")
    drawn = torch.cat([*example("common").batches(count, args)])
    assert len(drawn) == 7 * batch
    for order in drawn.split(count):
        assert len(set(order.tolist())) == len(order)  # all before any comes again
