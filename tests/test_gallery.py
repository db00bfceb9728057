"""The gallery, run small: it learns from any seed, and torch.nn has the same loss curves."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

NEEDED = ["matplotlib", "mido", "music21", "sklearn", "statsmodels", "tqdm"]
if missing := [name for name in NEEDED if not find_spec(name)]:
    pytest.skip(f"without {', '.join(missing)}", allow_module_level=True)

EXAMPLES = Path(__file__).parent.parent / "examples"
SEEDS = (0, 1, 2)


@pytest.fixture
def train(example, tmp_path, capsys):
    """``train(name, options, seed)`` runs an example beside torch.nn; all its figures."""

    def run(name, options, seed, stock=True):
        argv = [*options.split(), "--seed", str(seed), "--plot", "--out", str(tmp_path)]
        status = example(name).main([*argv, *["--stock"] * stock])
        printed = capsys.readouterr().out
        assert status == 0, printed
        assert ("loss curves agree" in printed) == stock
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        return json.loads((tmp_path / f"{name}.json").read_text())["runs"]

    return run


CHAR_LM = "--chars 20000 --hidden 48 --embedding 16 --batch 8 --steps 32 --updates 140 --length 20"


@pytest.mark.parametrize("seed", SEEDS)
def test_char_lm(train, seed):
    runs = train("char_lm", CHAR_LM, seed)
    assert runs.keys() == {"rnn", "gru", "lstm"}
    for libraries in runs.values():
        assert libraries["fastrnn"]["perplexity"] < 25  # from an alphabet of about 90
        assert len(libraries["fastrnn"]["sample"]) == 24


@pytest.mark.parametrize("seed", SEEDS)
def test_forecast_cosine(train, seed):
    runs = train("forecast_cosine", "--window 60 --hidden 32 --updates 70", seed)
    assert runs["linear"]["fastrnn"]["error"] < 0.2  # the mean of the series would give 0.7


SMALL_GAN = "--steps 8 --hidden 12 --batch 16 --lr 5e-3 --cell"


@pytest.mark.parametrize("seed", SEEDS)
def test_gradient_penalty(train, seed):
    runs = train("gradient_penalty", f"{SMALL_GAN} gru --updates 80", seed, stock=False)
    of = runs["gru"]["fastrnn"]
    norm, distance = torch.tensor(of["norm"]), torch.tensor(of["distance"])
    assert norm[:8].mean() < 0.7
    assert abs(norm[-16:].mean() - 1) < 0.15
    assert distance[-16:].mean() < 0.5 * distance.max()


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_gradient_penalty_as_torch(train, cell):
    train("gradient_penalty", f"{SMALL_GAN} {cell} --updates 3", 0)


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        if path.name != "common.py":
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 150, path.name


@pytest.mark.parametrize("seed", SEEDS)
def test_forecast_elnino(train, seed):
    runs = train("forecast_elnino", "--updates 120 --hidden 16 --batch 16", seed)
    for libraries in runs.values():
        of = libraries["fastrnn"]
        assert of["error"] < 1.5 < of["seasonal naive"]  # the months differ by 2.2


@pytest.mark.parametrize("seed", SEEDS)
def test_tag_frames(train, seed):
    runs = train("tag_frames", "--updates 120 --hidden 48 --frames 24 --batch 16 --lr 1e-2", seed)
    alone, before, both = (of["fastrnn"]["accuracy"] for of in runs.values())
    assert 0.4 < alone < before - 0.08
    assert before < both - 0.02


@pytest.mark.parametrize("seed", SEEDS)
def test_stacked_layers(train, seed):
    options = "--chars 20000 --hidden 48 --embedding 16 --batch 8 --steps 32 --updates 100"
    runs = train("stacked_layers", options, seed)
    allowed = runs["1 layer"]["fastrnn"]["parameters"]
    for libraries in runs.values():
        of = libraries["fastrnn"]
        assert of["perplexity"] < 35  # from an alphabet of about 90
        assert 0.5 * allowed < of["parameters"] <= allowed


@pytest.mark.parametrize("seed", SEEDS)
def test_truncated_bptt(train, seed):
    options = "--hidden 32 --updates 130 --batch 16 --steps 100 --lr 1e-2"
    runs = {k: of["fastrnn"] for k, of in train("truncated_bptt", options, seed).items()}
    assert runs["k = 5"]["accuracy"] < 0.35  # one of four letters
    assert runs["full"]["accuracy"] > 0.5
    assert runs["k = 5"]["MiB kept"] < runs["k = 20"]["MiB kept"] < runs["full"]["MiB kept"] / 2


@pytest.mark.parametrize("seed", SEEDS)
def test_elman_ball(train, seed):
    runs = train("elman_ball", "--updates 350 --hidden 48 --longest 12 --batch 32", seed)
    of = runs["relu"]["fastrnn"]
    assert of["network near walls"] < 0.7 * of["last velocity near walls"]


@pytest.mark.parametrize("seed", SEEDS)
def test_vanishing_gradients(train, seed):
    options = "--symbols 2 --steps 10 --hidden 24 --updates 80 --lr 1e-2"
    runs = {name: of["fastrnn"] for name, of in train("vanishing_gradients", options, seed).items()}
    for variant in ("rnn", "gru", "lstm", "rnn x 3"):
        assert runs[variant]["accuracy"] > 0.9  # guessing gives 0.5
    before, after = (
        {variant: of[which]["h"][0] for variant, of in runs.items()}
        for which in ("before", "after")
    )
    assert before["rnn"] < 0.03  # vanishes
    assert before["gru"] < 0.05
    assert before["rnn x 3"] > 1  # explodes
    assert after["gru"] > 0.06  # learned to pass


@pytest.mark.parametrize("seed", SEEDS)
def test_melody(train, tmp_path, seed):
    runs = train("melody", "--hidden 48 --updates 45 --batch 16 --lr 2e-2", seed)
    of = runs["lstm"]["fastrnn"]
    assert of["perplexity"] < 0.75 * of["perplexity of unigrams"]
    mido = pytest.importorskip("mido")
    mido = pytest.importorskip("mido")
    wait, played = 0, []
    for message in mido.MidiFile(tmp_path / "melody.mid").tracks[0]:
        wait += message.time
        if message.type == "note_on" and message.velocity:
            played.append([message.note])
        elif message.type == "note_off" and message.note:
            played[-1].append(wait / 480)
        if not message.is_meta:
            wait = 0
    assert played == [note for melody in of["melodies"] for note in melody if note[0]]
