"""Draw the pictures of docs/options.md, beside this file: ``python docs/pictures/options.py``."""

from __future__ import annotations

from pathlib import Path

from drawing import Drawing


def _cells(
    drawing: Drawing, corner: tuple[float, float], fills: list[str], side: float = 36
) -> None:
    """A row of squares; the name of a fill is that of its outline too, '' leaves a dashed gap."""
    x, y = corner
    for k, fill in enumerate(fills):
        place = (x + k * side, y, side - 4, side - 4)
        if fill:
            drawing.rect(*place, fill=f"{fill}-fill", stroke=fill)
        else:
            drawing.rect(*place, fill="none", dashed=True)


def _legend(drawing: Drawing, x: float, y: float, fill: str, text: str) -> None:
    _cells(drawing, (x, y - 9), [fill], side=22)
    drawing.text(x + 27, y, text, anchor="start")


def _times(drawing: Drawing, x: float, y: float, count: int, side: float = 36) -> None:
    for t in range(count):
        drawing.text(x + t * side + side / 2 - 2, y, str(t), color="soft")


def lengths() -> Drawing:
    """Rows of different lengths, with where each direction begins and ends."""
    drawing = Drawing(560, 300, "Each row of the batch has its own number of steps")
    drawing.text(20, 22, "time t", color="soft", anchor="start")
    _times(drawing, 130, 22, 8)
    for row, steps in enumerate((8, 3, 0, 5)):
        y = 44 + 50 * row
        middle = y + 16
        drawing.text(20, middle, f"lengths[{row}] = {steps}", anchor="start")
        _cells(drawing, (130, y), ["blue"] * steps + [""] * (8 - steps))
        for t in range(steps, 8):
            drawing.text(130 + 36 * t + 16, middle, "0", color="soft")
        if steps:
            end = 130 + 36 * steps
            drawing.line([(136, middle - 6), (end - 10, middle - 6)], color="blue", arrow=True)
            drawing.line([(end - 10, middle + 7), (136, middle + 7)], color="orange", arrow=True)
        text = f"h_n: after step {steps - 1}" if steps else "h_n = h_0"
        drawing.text(430, middle, text, color="blue", anchor="start")
    drawing.line([(20, 260), (50, 260)], color="blue", arrow=True)
    drawing.text(58, 260, "forward direction", anchor="start")
    drawing.line([(230, 260), (200, 260)], color="orange", arrow=True)
    drawing.text(238, 260, "reverse direction", anchor="start")
    _legend(drawing, 380, 260, "", "not read; output 0")
    return drawing


def reset() -> Drawing:
    """One row cut into three sequences, as the two directions walk over it."""
    drawing = Drawing(560, 270, "A reset before a step separates two sequences in both directions")
    fills = ["blue"] * 3 + ["green"] * 2 + ["orange"] * 4
    drawing.text(20, 24, "time t", color="soft", anchor="start")
    _times(drawing, 130, 24, 9)
    drawing.text(20, 58, "reset[t]", anchor="start")
    for t in range(9):
        is_start = t in (3, 5)
        text, color = ("True", "red") if is_start else ("-", "soft")
        drawing.text(130 + 36 * t + 16, 58, text, size=12, color=color, bold=is_start)
    _cells(drawing, (130, 82), fills)
    for k, t in enumerate((0, 3, 5)):
        drawing.text(130 + 36 * t + 16, 98, f"{'abc'[k]}")
    drawing.text(20, 98, "input x", anchor="start")
    for x in (236, 308):
        drawing.line([(x, 74), (x, 206)], color="red", dashed=True)
    drawing.text(20, 140, "forward", anchor="start")
    for text, first, last in (("h_0", 0, 3), ("s", 3, 5), ("s", 5, 9)):
        drawing.text(130 + 36 * first + 12, 140, text, color="ink", size=12)
        ends = [(130 + 36 * first + 26, 140), (130 + 36 * last - 10, 140)]
        drawing.line(ends, color="blue", arrow=True)
    drawing.text(466, 140, "h_n", anchor="start", size=12)
    drawing.text(20, 184, "reverse", anchor="start")
    for text, first, last in (("s", 0, 3), ("s", 3, 5), ("h_0", 5, 9)):
        drawing.text(130 + 36 * last - 20, 184, text, color="ink", size=12)
        ends = [(130 + 36 * last - 34, 184), (130 + 36 * first + 4, 184)]
        drawing.line(ends, color="orange", arrow=True)
    drawing.text(104, 184, "h_n", anchor="start", size=12)
    text = "s: the reset state, which is zero, given, or learned."
    drawing.text(20, 226, text, anchor="start")
    drawing.text(20, 248, "No value and no gradient crosses a red line.", anchor="start")
    return drawing


def states() -> Drawing:
    """What a call returns of two layers: output, final states and all states."""
    drawing = Drawing(560, 300, "The output, the final states, and the states of all steps")
    for layer in range(2):
        y = 150 - 74 * layer
        drawing.text(20, y + 22, f"layer {layer}", anchor="start")
        for t in range(4):
            x = 110 + 92 * t
            is_last = t == 3
            drawing.rect(x, y, 58, 44, fill="panel" if not is_last else "green-fill")
            drawing.text(x + 29, y + 14, f"h[{t}, {layer}]", size=12)
            drawing.text(x + 29, y + 30, f"c[{t}, {layer}]", size=12)
            end = x + (88 if t < 3 else 40)
            if t < 3:
                drawing.line([(x + 60, y + 22), (end, y + 22)], arrow=True)
            drawing.line([(x + 29, y - 2), (x + 29, y - 26)], arrow=True)
            if layer == 0:
                drawing.line([(x + 29, y + 72), (x + 29, y + 48)], arrow=True)
                drawing.text(x + 29, y + 84, f"x[{t}]", color="soft")
            else:
                drawing.text(x + 29, y - 38, f"y[{t}]", color="blue")
    drawing.rect(378, 64, 76, 142, fill="none", stroke="green", dashed=True)
    drawing.text(466, 128, "h_n, c_n", color="green", anchor="start")
    drawing.rect(102, 68, 360, 134, fill="none", stroke="orange", dashed=True)
    text = "States(h, c): all of these, of shape (T, L * D, B, H)"
    drawing.text(102, 260, text, color="orange", anchor="start")
    drawing.text(102, 282, 'return_states="gates" adds i, f, g, o of every step', anchor="start")
    return drawing


def bptt() -> Drawing:
    """The chain of steps with bptt=3: states go on, gradients stop."""
    drawing = Drawing(560, 220, "Truncated backpropagation: states go on, gradients stop")
    drawing.text(20, 28, "bptt=3", bold=True, anchor="start")
    for t in range(8):
        x = 34 + 64 * t
        drawing.circle(x, 100, 17, fill="panel")
        drawing.text(x, 100, f"h{t}", size=13)
        drawing.line([(x, 64), (x, 80)], color="orange", arrow=True)
        drawing.text(x, 50, f"dL/dy{t}", size=11, color="orange")
        if t < 7:
            drawing.line([(x + 19, 94), (x + 44, 94)], color="blue", arrow=True)
            if t % 3 == 2:
                drawing.line([(x + 32, 76), (x + 32, 150)], color="red", dashed=True)
            else:
                drawing.line([(x + 45, 107), (x + 20, 107)], color="orange", arrow=True)
    for first, last, text in ((0, 2, "steps 0 to 2"), (3, 5, "3 to 5"), (6, 7, "6 and 7")):
        drawing.text(34 + 32 * (first + last), 142, text, color="soft")
    drawing.line([(20, 188), (50, 188)], color="blue", arrow=True)
    drawing.text(58, 188, "state", anchor="start")
    drawing.line([(160, 188), (130, 188)], color="orange", arrow=True)
    drawing.text(168, 188, "gradient", anchor="start")
    drawing.line([(260, 178), (260, 198)], color="red", dashed=True)
    drawing.text(270, 188, "before steps 3 and 6: no gradient", anchor="start")
    return drawing


def recompute() -> Drawing:
    """What is kept between forward and backward: all, nothing, or a state per chunk."""
    drawing = Drawing(560, 310, "What a layer keeps between forward and backward")
    rows = (
        ("recompute=False", ["blue"] * 12, "everything is kept"),
        ("recompute=True", [""] * 12, "nothing on a CPU; h, c on a GPU"),
        ("recompute=4", (["green"] + [""] * 3) * 3, "the state before each chunk"),
    )
    for k, (name, fills, text) in enumerate(rows):
        y = 20 + 62 * k
        drawing.text(20, y + 12, name, anchor="start", bold=True)
        drawing.text(170, y + 12, text, anchor="start", color="soft")
        _cells(drawing, (20, y + 26), fills, side=26)
    drawing.text(350, 60, "T = 12 steps", anchor="start", color="soft")
    drawing.text(20, 218, "backward with recompute=4, last chunk first", anchor="start")
    for k in range(3):
        x = 20 + 172 * k
        fills = (["green", "", "", ""], ["orange"] * 4, [""] * 4)[k]
        _cells(drawing, (x, 234), fills, side=26)
        label = ("not reached yet", "recomputed, then walked", "done, freed")[k]
        drawing.text(x, 276, label, anchor="start", size=12, color="soft")
        if k:
            drawing.line([(x - 14, 245), (x - 56, 245)], arrow=True)
    return drawing


def noise() -> Drawing:
    """Over units and time: one mask for all steps, a mask for each step, a mask of the weights."""
    drawing = Drawing(560, 250, "Masks of recurrent dropout, zoneout and weight dropout")
    constant = [0, 1, 0, 0, 1]
    zoned = [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 1]]
    dropped = [[0, 1, 0, 0, 0], [0, 0, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 1, 0, 0, 0]]
    panels = (
        (20, "recurrent_dropout", [[row] * 4 for row in constant], "red"),
        (200, "zoneout", zoned, "orange"),
        (380, "weight_dropout", dropped, "red"),
    )
    for x, name, rows, color in panels:
        drawing.text(x, 22, name, anchor="start", bold=True)
        for row, bits in enumerate(rows):
            fills = [color if bit else "blue" for bit in bits]
            _cells(drawing, (x + 4, 60 + 24 * row), fills, side=24)
        across = "W_hh" if name == "weight_dropout" else "units (down) x steps"
        drawing.text(x + 4, 44, across, anchor="start", size=12, color="soft")
    _legend(drawing, 20, 206, "red", "0 in the product")
    _legend(drawing, 200, 206, "orange", "keeps its old value")
    _legend(drawing, 380, 206, "blue", "as usual")
    for x, text in (
        (20, "the same at every step"),
        (200, "a new mask each step"),
        (380, "one mask per call"),
    ):
        drawing.text(x, 234, text, anchor="start", color="soft")
    return drawing


def heads() -> Drawing:
    """A block-diagonal recurrent matrix, and how it is stored."""
    drawing = Drawing(560, 240, "A block-diagonal recurrent matrix and the parameter that holds it")
    colors = ("blue", "orange", "green", "red")
    drawing.text(20, 22, "num_heads=4", bold=True, anchor="start")
    drawing.rect(50, 60, 148, 148, fill="none")
    for k, color in enumerate(colors):
        place = (52 + 36 * k, 62 + 36 * k, 36, 36)
        drawing.rect(*place, fill=f"{color}-fill", stroke=color)
        drawing.text(70 + 36 * k, 80 + 36 * k, f"R{k}")
        drawing.rect(392, 62 + 36 * k, 36, 36, fill=f"{color}-fill", stroke=color)
        drawing.text(410, 80 + 36 * k, f"R{k}")
        drawing.rect(286, 62 + 36 * k, 20, 36, fill=f"{color}-fill", stroke=color)
        drawing.text(324, 80 + 36 * k, f"h{k}")
    drawing.text(168, 84, "0", color="soft", size=18)
    drawing.text(82, 178, "0", color="soft", size=18)
    drawing.text(124, 46, "H columns", color="soft")
    drawing.text(34, 134, "H", color="soft")
    drawing.text(246, 134, "times", color="soft")
    drawing.text(410, 46, "H / 4", color="soft")
    drawing.text(440, 118, "weight_hh", anchor="start")
    drawing.text(440, 138, "of one gate:", anchor="start")
    drawing.text(440, 158, "(H, H / 4)", anchor="start")
    drawing.text(50, 226, "what it means", anchor="start", color="soft")
    drawing.text(392, 226, "what is stored", anchor="start", color="soft")
    return drawing


def transforms() -> Drawing:
    """What vmap folds into one call: members of an ensemble, or samples."""
    drawing = Drawing(560, 290, "vmap over weights and over inputs becomes one call")
    drawing.text(20, 22, "vmap over weights: an ensemble", bold=True, anchor="start")
    drawing.text(300, 22, "vmap over samples: gradients", bold=True, anchor="start")
    colors = ("blue", "orange", "green")
    for k, color in enumerate(colors):
        y = 50 + 46 * k
        drawing.rect(20, y, 76, 32, fill=f"{color}-fill", stroke=color)
        drawing.text(58, y + 16, f"weights {k}", size=12)
        drawing.rect(300, y, 76, 32, fill=f"{color}-fill", stroke=color)
        drawing.text(338, y + 16, f"x of row {k}", size=12)
        drawing.line([(98, y + 16), (128, 112)], arrow=True)
        drawing.line([(378, y + 16), (408, 112)], arrow=True)
    for x in (130, 410):
        drawing.rect(x, 84, 56, 56)
        drawing.text(x + 28, 104, "one")
        drawing.text(x + 28, 122, "call")
    for k, color in enumerate(colors):
        y = 50 + 46 * k
        drawing.line([(188, 112), (214, y + 16)], arrow=True)
        drawing.rect(216, y, 46, 32, fill=f"{color}-fill", stroke=color)
        drawing.text(239, y + 16, f"y{k}", size=12)
        drawing.line([(468, 112), (494, y + 16)], arrow=True)
        drawing.rect(496, y, 50, 32, fill=f"{color}-fill", stroke=color)
        drawing.text(521, y + 16, f"dW{k}", size=12)
    drawing.text(20, 216, "Each member multiplies its part", anchor="start", color="soft")
    drawing.text(20, 238, "of the batch by its own weights.", anchor="start", color="soft")
    drawing.text(300, 216, "The samples are one batch; each", anchor="start", color="soft")
    drawing.text(300, 238, "has weight gradients of its own.", anchor="start", color="soft")
    return drawing


def drawings() -> dict[str, Drawing]:
    """All pictures of the page, by the names of their files."""
    makers = (lengths, reset, states, bptt, recompute, noise, heads, transforms)
    return {f"options-{maker.__name__}": maker() for maker in makers}


if __name__ == "__main__":
    for name, drawing in drawings().items():
        drawing.save(Path(__file__).parent, name)
