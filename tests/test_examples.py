"""The examples, run small: they learn, and with --stock torch.nn has the same loss curve."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    """Import an example as running it would, with its folder first on sys.path."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names = ("common", "char_lm", "forecast_cosine")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small matrices gain nothing from more
    yield importlib.import_module
    torch.set_num_threads(threads)
    for name in names:
        sys.modules.pop(name, None)


CHAR_LM = ["--chars", "20000", "--hidden", "48", "--embedding", "16", "--batch", "8"]
CHAR_LM += ["--steps", "32", "--epochs", "2", "--samples", "1", "--length", "20"]


@pytest.mark.parametrize(
    "options",
    [["--cell", "lstm", "--layers", "2", "--dropout", "0.2"], ["--cell", "gru"], ["--cell", "rnn"]],
    ids=lambda options: options[1],
)
def test_char_lm(example, options, tmp_path, capsys):
    main = example("char_lm").main
    assert main([*CHAR_LM, *options, "--stock", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "loss curves agree" in printed
    assert len(printed.partition("--- The ")[2]) >= 20
    metrics = json.loads((tmp_path / "char_lm.json").read_text())
    assert set(metrics) == {"fastrnn", "torch.nn"}
    for run in metrics.values():
        first, second = run["validation"]
        assert second < first < 60  # from an alphabet of about 90
        assert run["seconds"] > 0


def test_char_lm_writes_no_file_unasked(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert example("char_lm").main([*CHAR_LM, "--epochs", "1"]) == 0
    assert "torch.nn" not in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_forecast_cosine(example, tmp_path, capsys):
    argv = ["--window", "60", "--hidden", "32", "--epochs", "3", "--stock", "--out", str(tmp_path)]
    assert example("forecast_cosine").main(argv) == 0
    printed = capsys.readouterr().out
    assert "loss curves agree" in printed
    ours = [float(mse) for mse in re.findall(r"fastrnn, epoch \d: validation MSE (\S+)", printed)]
    assert len(ours) == 3
    assert ours[-1] < ours[0]
    assert ours[-1] < 0.05  # the mean of the series would give 0.5
    image = (tmp_path / "forecast_cosine.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000


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
    assert module.main([*CHAR_LM, "--epochs", "1", "--stock"]) == 1
    assert "loss curves DIFFER" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "agree"), [(1e-6, True), (0.1, False), (float("nan"), False)])
def test_same_curve(example, change, agree):
    """A change late in the run must be seen where it lasts for a tenth of it."""
    common = example("common")
    stock = common.Run(losses=[1.0 - i / 400 for i in range(200)], seconds=1.0)
    ours = common.Run(losses=[x + (i >= 180) * change for i, x in enumerate(stock.losses)])
    ours.seconds = 1.0
    assert common.same_curve(ours, stock) is agree
