"""One to many: a folk-like melody from a start note, written as MIDI.

    h_t = LSTM(E[x_t], h_{t-1})           x_t is a note: pitch and duration; or GRU, RNN
    p(x_{t+1}) = softmax(W h_t + b)       over all notes that occur, and the end; dropout on h_t

In training each step is given the correct note ("teacher forcing"); in use x_{t+1} is sampled from
softmax((W h_t + b) / temperature) and fed back. After Eck & Schmidhuber 2002 ("Finding temporal
structure in music") and, for folk songs in ABC notation, Sturm et al. 2016, arXiv:1604.08723.
Data: "Deutscher Liederhort" (Erk & Boehme), Essen folksong collection, for non-commercial use, as
included in music21; songs in major, transposed to C. No variant of a held-out song is in training.
Perplexity is compared with unigram and bigram counts, with add-one smoothing.

    python examples/melody.py --plot     melody.mid and a picture in examples/out
"""

from __future__ import annotations

import argparse
import random
import re
from pathlib import Path
from typing import Any

import mido
import torch
from common import COLOURS, Runs, Training, batches, in_package, new_figure, run, trainer, update
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Song = list[tuple[int, float]]  # MIDI pitch (60 is middle C, 0 a rest), duration in quarter notes
ABC = re.compile(r"^N: *([A-Z]\d+).*?^L: *1/(\d+).*?^K: *(\S+)(.*?)(?=^X:|\Z)", re.M | re.S)
NOTE = re.compile(r"([_=^]?)([A-Ga-gz])([,']*)(\d*)")  # _B,2: a low B flat, two units long
SEMITONES = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11, "Z": 0}
END = 0  # code of the end; those of the notes follow


def read(unit: str, key: str, tune: str) -> Song:
    """Return the notes, with the final tonic as middle C; none if in minor or ending elsewhere."""
    fifths = "FCGDAEB".index(key[0]) - 1 - 7 * key.endswith("b")  # from C to the tonic
    song = []
    for bar in tune.split("|"):  # accidentals last for a bar
        altered = {x: (i < fifths) - (i >= 7 + fifths) for i, x in enumerate("FCGDAEB")} | {"Z": 0}
        for accidental, name, marks, times in NOTE.findall(bar):
            letter, octave = name.upper(), name.islower() + marks.count("'") - marks.count(",")
            altered[letter] = {"_": -1, "=": 0, "^": 1}.get(accidental, altered[letter])
            pitch = 60 + SEMITONES[letter] + altered[letter] + 12 * octave if name != "z" else 0
            song.append((pitch, 4 / int(unit) * int(times or 1)))
    last = next((pitch for pitch, _ in reversed(song) if pitch), 0)
    minor = 3 in {(pitch - last) % 12 for pitch, _ in song if pitch}
    song = [(pitch and pitch - last + 60, duration) for pitch, duration in song]
    return [] if minor or (last - 7 * fifths) % 12 else song


def songs() -> list[list[Song]]:
    """List songs of up to 64 notes without ties; variants E0001, E0001A, ... share a list."""
    found: dict[str, list[Song]] = {}
    files = sorted(in_package("music21", "corpus/essenFolksong").glob("erk?0.abc"))
    for number, *abc in ABC.findall("".join(file.read_text("utf-8") for file in files)):
        if "-" not in abc[-1] and 0 < len(song := read(*abc)) <= 64:
            found.setdefault(number, []).append(song)
    return list(found.values())


class Composer(torch.nn.Module):
    def __init__(self, library: Any, cell: str, notes: int, size: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(notes, size // 2)
        self.recurrent = getattr(library, cell.upper())(size // 2, size)
        self.linear = torch.nn.Sequential(torch.nn.Dropout(0.4), torch.nn.Linear(size, notes))

    def forward(self, notes: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        output, state = self.recurrent(self.embedding(notes), state)
        return self.linear(output), state


def entropy(logits: Tensor, x: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[x[:-1] != END], x[1:][x[:-1] != END])


def train(library: Any, cell: str, args: argparse.Namespace) -> Training:
    random.Random(args.seed).shuffle(book := songs())
    parts = [[song for variants in part for song in variants] for part in (book[60:], book[:60])]
    notes = [None, *sorted({note for part in parts for song in part for note in song})]
    coded = [[torch.tensor([*map(notes.index, song), END]) for song in part] for part in parts]
    known, held = (pad_sequence(part, padding_value=END).to(args.device) for part in coded)
    model = Composer(library, cell, len(notes), args.hidden).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    for batch in batches(known.shape[1], args):
        yield update(entropy(model(known[:-1, batch])[0], known[:, batch]), optimizer, args.clip)
    model.eval()
    melodies = [[notes[i] for i in compose(model, notes.index((60, 1.0)), args)] for _ in range(3)]
    if library.__name__ == "fastrnn" and (args.out or args.plot):
        save_midi(melodies, (args.out or Path(__file__).parent / "out") / "melody.mid")
    pairs = torch.ones(len(notes), len(notes), device=args.device)
    for song in coded[0]:
        pairs.index_put_((song[:-1], song[1:]), pairs.new_ones(()), accumulate=True)
    single = (pairs.sum(0) - len(notes) + 1).expand(*held[1:].shape, -1)
    return {
        "perplexity": entropy(model(held[:-1])[0], held).exp().item(),
        "perplexity of bigrams": entropy(pairs.log()[held[:-1]], held).exp().item(),
        "perplexity of unigrams": entropy(single.log(), held).exp().item(),
        "melodies": melodies,
        "real": parts[1][0],
    }


@torch.no_grad()
def compose(model: Composer, note: int, args: argparse.Namespace) -> list[int]:
    """Sample note after note, feeding each back as the next input, until the end is drawn."""
    drawn, state = [], None
    while note != END and len(drawn) < 150:
        drawn.append(note)
        logits, state = model(torch.tensor([[note]], device=args.device), state)
        note = int(torch.multinomial((logits[0, 0] / args.temperature).softmax(0), 1))
    return drawn


def save_midi(songs: list[Song], path: Path) -> None:
    track = mido.MidiTrack()
    for pitch, duration in [note for song in songs for note in [*song, (0, 4.0)]]:
        track.append(mido.Message("note_on", note=pitch, velocity=80 if pitch else 0))
        track.append(mido.Message("note_off", note=pitch, time=round(480 * duration)))
    path.parent.mkdir(parents=True, exist_ok=True)
    mido.MidiFile(tracks=[track], ticks_per_beat=480).save(path)


def draw(runs: Runs) -> Figure:
    ((cell, of),) = runs.items()
    figure, axes = new_figure(4, height=7.5, sharex=True, sharey=True)
    for row, song in enumerate([*of["fastrnn"]["melodies"], of["fastrnn"]["real"]]):
        title, color = ("composed", COLOURS[cell]) if row < 3 else ("a song of the book", "gray")
        for i, (pitch, duration) in enumerate(song):
            if pitch:
                left = sum(x for _, x in song[:i])
                axes[row].barh(pitch, duration, 1, left, color=color, ec="white", zorder=2)
        axes[row].set(title=title, ylabel="pitch")
    axes[3].set(xlabel="time in quarter notes", yticks=[55, 60, 67, 72], yticklabels=list("GCGC"))
    return figure


def main(argv: list[str] | None = None) -> int:
    made = trainer(__doc__, updates=500, hidden=128, batch=32, lr=5e-3, clip=1.0, temperature=0.8)
    made.add_argument("--cell", choices=tuple(COLOURS), default="lstm")
    args = made.parse_args(argv)
    return run(__file__, args, train, [args.cell], draw)


if __name__ == "__main__":
    raise SystemExit(main())
