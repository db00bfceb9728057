"""Draw the pictures of the pages on kernels: ``python docs/pictures/kernels.py``.

The SVG files are written beside this script.
"""

from __future__ import annotations

from pathlib import Path

from drawing import Drawing


def _box(
    picture: Drawing, at: tuple[float, float, float, float], lines: str, color: str = "",
    size: float = 14,
) -> None:  # fmt: skip
    """Draw a rectangle (x, y, width, height) with lines of text in its middle."""
    x, y, width, height = at
    fill, stroke = (f"{color}-fill", color) if color else ("panel", "line")
    picture.rect(x, y, width, height, fill=fill, stroke=stroke)
    texts = lines.split("\n") if lines else []
    step = size + 4
    for n, text in enumerate(texts):
        picture.text(
            x + width / 2, y + height / 2 + (n - (len(texts) - 1) / 2) * step, text, size=size
        )


def _steps(picture: Drawing, x: float, y: float, names: list[str], color: str) -> None:
    """Draw time steps side by side, joined by arrows in their order."""
    for n, name in enumerate(names):
        left = x + n * 46
        if name == "…":
            picture.text(left + 16, y + 20, name, size=15)
        else:
            _box(picture, (left, y, 32, 40), name, color)
        if n + 1 < len(names):
            picture.line([(left + 32, y + 20), (left + 46, y + 20)], arrow=True)


def call() -> Drawing:
    """How a call of a layer is split over time."""
    picture = Drawing(
        560, 330,
        "Forward: one GEMM for the input product of all steps, then the recurrent kernel step by "
        "step. Backward: the recurrent kernel in reverse, then GEMMs for the other gradients.",
    )  # fmt: skip
    picture.text(10, 20, "Forward", size=16, bold=True, anchor="start")
    _box(picture, (10, 40, 130, 84), "GEMM, all steps\nx W_ihᵀ + b_ih", "blue")
    picture.line([(140, 82), (198, 82)], arrow=True)
    picture.text(169, 68, "wx", size=14, color="soft")
    picture.rect(200, 40, 290, 84, fill="none", stroke="orange", dashed=True)
    picture.text(345, 56, "recurrent kernel", size=14, color="orange")
    _steps(picture, 214, 74, ["1", "2", "3", "…", "T-1", "T"], "orange")
    picture.line([(490, 94), (520, 94)], arrow=True)
    picture.text(536, 94, "y", size=15)

    picture.line([(250, 124), (250, 198)], arrow=True, dashed=True, color="soft")
    picture.text(262, 160, "y, c, gate activations", size=14, color="soft", anchor="start")

    picture.text(10, 184, "Backward", size=16, bold=True, anchor="start")
    picture.rect(10, 200, 290, 84, fill="none", stroke="orange", dashed=True)
    picture.text(155, 216, "recurrent kernel, in reverse", size=14, color="orange")
    _steps(picture, 24, 234, ["T", "T-1", "…", "3", "2", "1"], "orange")
    picture.line([(300, 242), (372, 242)], arrow=True)
    picture.text(336, 226, "d gates", size=14, color="soft")
    for n, text in enumerate(("dW_ih = d gatesᵀ x", "dW_hh = d gatesᵀ h", "dx = d gates W_ih")):
        _box(picture, (374, 196 + n * 32, 176, 28), text, "blue", size=14)
    _box(picture, (374, 292, 176, 28), "db = sum of d gates", "", size=14)
    picture.text(155, 306, "time →", size=14, color="soft")
    return picture


def resident() -> Drawing:
    """A program of the resident schedule."""
    picture = Drawing(
        560, 300,
        "Resident schedule: one program holds all recurrent weights and the state of 16 rows of "
        "the batch, and walks through all steps by itself.",
    )  # fmt: skip
    picture.text(70, 20, "batch", size=15, bold=True)
    for n in range(4):
        color = "orange" if n == 1 else ""
        _box(picture, (20, 40 + n * 58, 100, 48), "16 rows" if n < 3 else "…", color)
    picture.line([(120, 122), (168, 122)], arrow=True)

    picture.rect(170, 34, 380, 224, fill="none", stroke="orange")
    picture.text(360, 20, "one program, one launch, all T steps", size=15, bold=True)
    _box(picture, (186, 50, 150, 66), "R, all gates\non chip for all steps", "green")
    _box(picture, (186, 150, 150, 66), "h Rᵀ\ntensor cores", "blue")
    _box(picture, (390, 150, 144, 66), "+ wx, then the cell\nnew h and c", "orange")
    picture.line([(261, 116), (261, 148)], arrow=True)
    picture.line([(336, 183), (388, 183)], arrow=True)
    picture.line([(462, 216), (462, 244), (261, 244), (261, 218)], arrow=True)
    picture.text(361, 231, "h stays on chip", size=14, color="soft")
    _box(picture, (404, 62, 56, 40), "wx", "")
    _box(picture, (474, 62, 56, 40), "y", "")
    picture.line([(432, 102), (432, 148)], arrow=True)
    picture.line([(502, 150), (502, 104)], arrow=True)
    picture.text(360, 280, "programs do not wait for each other", size=14, color="soft")
    return picture


def exchange() -> Drawing:
    """The programs of a group in the persistent schedule, and what they exchange."""
    picture = Drawing(
        560, 350,
        "Persistent schedule: each program of a group owns 16 hidden units. It publishes their h "
        "into the output in memory, where every program of the group polls the words it needs.",
    )  # fmt: skip
    picture.text(280, 18, "a group of programs, one tile of 16 rows", size=15, bold=True)
    for n in range(4):
        left = 20 + n * 136
        last = n == 3
        picture.rect(left, 36, 112, 110, fill="panel", stroke="orange")
        name = "last program" if last else f"program {n}"
        picture.text(left + 56, 52, name, size=14)
        units = f"units {16 * n}-{16 * n + 15}" if not last else "last 16 units"
        _box(picture, (left + 8, 64, 96, 34), "rows of R", "green")
        _box(picture, (left + 8, 104, 96, 34), units, "blue")
        color = "orange"
        if n < 3:
            _box(picture, (left, 226, 112, 36), f"h, {16 * n}-{16 * n + 15}", color)
        else:
            picture.rect(left, 226, 112, 36, fill="red-fill", stroke="red", dashed=True)
            picture.text(left + 56, 244, "FFFFFFFF", size=14)
        picture.rect(left, 280, 112, 36, fill="red-fill", stroke="red", dashed=True)
        picture.text(left + 56, 298, "FFFFFFFF", size=14)
        if n < 3:
            picture.line([(left + 34, 146), (left + 34, 224)], arrow=True, color="orange")
    picture.line([(98, 206), (506, 206)], color="blue", dashed=True)
    for n in range(4):
        left = 20 + n * 136
        if n < 3:
            picture.line([(left + 78, 226), (left + 78, 206)], color="blue", dashed=True)
        picture.line([(left + 78, 206), (left + 78, 148)], arrow=True, dashed=True, color="blue")
    picture.text(450, 178, "poll all of h", size=14, color="blue")
    picture.text(144, 178, "publish", size=14, color="orange")
    picture.text(280, 334, "y of steps t and t+1 in memory: a word not yet written is all ones",
                 size=14, color="soft")  # fmt: skip
    return picture


def persistent_step() -> Drawing:
    """A step of a program of the persistent schedule, in time."""
    picture = Drawing(
        560, 300,
        "A step of a persistent program: every warp polls and multiplies its own columns of h, "
        "partial sums meet behind one barrier, then the cell runs and h is published.",
    )  # fmt: skip
    for n in range(3):
        top = 40 + n * 52
        name = f"warp {n}" if n < 2 else "warp 7"
        picture.text(34, top + 20, name, size=14)
        _box(picture, (70, top, 92, 40), "poll own h", "red")
        _box(picture, (166, top, 92, 40), "mma, own k", "blue")
        _box(picture, (262, top, 62, 40), "→ smem", "")
        _box(picture, (346, top, 96, 40), "sum, cell", "orange")
        _box(picture, (446, top, 104, 40), "publish h", "green")
    picture.text(34, 136, "⋮", size=14)
    picture.line([(335, 26), (335, 196)], width=3)
    picture.text(335, 16, "one barrier", size=14, bold=True)
    _box(picture, (262, 212, 180, 34), "load wx of step t+1", "", size=14)
    _box(picture, (446, 212, 104, 34), "store c, gates", "", size=14)
    picture.text(160, 229, "off the critical path:", size=14, color="soft")
    picture.line([(20, 268), (550, 268)], arrow=True, color="soft")
    picture.text(280, 284, "time of one step, about 1 µs (simulated)", size=14, color="soft")
    return picture


def staged() -> Drawing:
    """A step of the staged schedule."""
    picture = Drawing(
        560, 330,
        "Staged schedule: a step is two or three launches: the product, the cell with all units of "
        "a row, and a projection or late product if there is one.",
    )  # fmt: skip
    picture.text(280, 18, "staged: step t is two or three launches", size=15, bold=True)
    _box(picture, (14, 40, 150, 70), "1. product\nh Rᵀ, tiles of units", "blue")
    _box(picture, (204, 40, 150, 70), "2. cell\nall units of a row", "orange")
    _box(picture, (394, 40, 152, 70), "3. projection\nh = W_hr h', if any", "blue")
    picture.line([(89, 110), (89, 140)], arrow=True)
    picture.line([(240, 140), (240, 112)], arrow=True)
    picture.line([(318, 110), (318, 140)], arrow=True)
    picture.line([(440, 140), (440, 112)], arrow=True)
    picture.line([(504, 110), (504, 140)], arrow=True)
    picture.rect(14, 142, 532, 40)
    picture.text(280, 162, "memory: raw products and states, float32", size=14)
    picture.line([(20, 182), (20, 196), (8, 196), (8, 75), (12, 75)], arrow=True, color="soft")
    picture.text(110, 198, "h, next step", size=14, color="soft")

    picture.text(280, 232, "staged-resident: one launch for all steps", size=15, bold=True)
    picture.rect(14, 248, 532, 70, fill="none", stroke="orange")
    _box(picture, (26, 262, 130, 42), "R on chip", "green")
    _box(picture, (186, 262, 90, 42), "h Rᵀ", "blue")
    _box(picture, (306, 262, 228, 42), "cell, with means over units", "orange")
    picture.line([(156, 283), (184, 283)], arrow=True)
    picture.line([(276, 283), (304, 283)], arrow=True)
    picture.line([(420, 304), (420, 312), (231, 312), (231, 306)], arrow=True)
    return picture


def region() -> Drawing:
    """Threads of a CPU in the one parallel region of a call."""
    picture = Drawing(
        560, 300,
        "One parallel region runs all steps: each thread owns slices of hidden units, packs their "
        "weights once, and meets the others at one barrier per step.",
    )  # fmt: skip
    picture.text(280, 18, "one parallel region of torch's OpenMP pool", size=15, bold=True)
    for n in range(2):
        top = 44 + n * 96
        picture.text(46, top + 26, f"thread {n}", size=14, bold=True)
        picture.text(46, top + 46, "its slices", size=14, color="soft")
        _box(picture, (90, top, 76, 72), "pack\nweights", "green")
        _box(picture, (172, top, 76, 72), "x W_ihᵀ\n(a chunk)", "blue")
        for step in range(3):
            left = 254 + step * 100
            _box(picture, (left, top, 84, 34), "h Rᵀ", "blue")
            _box(picture, (left, top + 38, 84, 34), "cell → h", "orange")
    for step in range(3):
        x = 254 + step * 100 + 92
        picture.line([(x, 38), (x, 222)], width=3)
        picture.text(x - 50, 236, ("step 1", "step 2", "step 3 …")[step], size=14, color="soft")
    picture.text(346, 258, "barrier: all of h is written", size=14)
    picture.line([(20, 278), (550, 278)], arrow=True, color="soft")
    picture.text(60, 290, "time", size=14, color="soft")
    return picture


def products() -> Drawing:
    """The two forms of the product on a CPU."""
    picture = Drawing(
        560, 330,
        "tile multiplies up to 12 rows of h by a packed panel two vectors wide; dots multiplies up "
        "to 4 rows by weights as torch stores them, along k.",
    )  # fmt: skip
    picture.text(140, 18, "tile: packed weights", size=15, bold=True)
    picture.text(420, 18, "dots: unpacked weights", size=15, bold=True)
    picture.line([(280, 8), (280, 322)], color="line", dashed=True)

    _box(picture, (14, 160, 76, 84), "h\n≤ 12 rows", "orange")
    picture.text(52, 256, "k →", size=14, color="soft")
    for n in range(2):
        _box(picture, (110 + n * 78, 40, 74, 96), "", "green")
        for k in range(1, 6):
            y = 40 + k * 16
            picture.line([(110 + n * 78, y), (184 + n * 78, y)], color="green", width=0.8)
    picture.text(186, 150, "k ↓, two vectors wide", size=14, color="soft")
    _box(picture, (110, 160, 152, 84), "sums in registers", "blue")
    picture.text(140, 276, "broadcast h[k], multiply-add", size=14)
    picture.text(140, 296, "with a row of the panel", size=14)

    for n in range(4):
        _box(picture, (306, 44 + n * 24, 160, 20), "", "green")
        picture.line([(346, 44 + n * 24), (346, 64 + n * 24)], color="green", width=0.8)
        picture.line([(386, 44 + n * 24), (386, 64 + n * 24)], color="green", width=0.8)
        picture.line([(426, 44 + n * 24), (426, 64 + n * 24)], color="green", width=0.8)
        picture.line([(466, 54 + n * 24), (504, 190)], color="line", width=0.8)
    picture.text(510, 88, "4 rows", size=14)
    picture.text(510, 106, "of W", size=14)
    picture.text(386, 152, "k →, a vector at a time", size=14, color="soft")
    for n in range(2):
        _box(picture, (306, 170 + n * 24, 160, 20), "", "orange")
        picture.line([(466, 180 + n * 24), (484, 200)], color="line", width=0.8)
    picture.text(386, 230, "≤ 4 rows of h", size=14)
    _box(picture, (486, 184, 60, 36), "sums", "blue")
    picture.text(420, 276, "dot products along k,", size=14)
    picture.text(420, 296, "lanes added up at the end", size=14)
    return picture


def drawings() -> dict[str, Drawing]:
    """Return the pictures by the names of their files."""
    return {
        "gpu-call": call(),
        "gpu-resident": resident(),
        "gpu-exchange": exchange(),
        "gpu-persistent-step": persistent_step(),
        "gpu-staged": staged(),
        "cpu-region": region(),
        "cpu-products": products(),
    }


if __name__ == "__main__":
    for _name, _drawing in drawings().items():
        _drawing.save(Path(__file__).parent, _name)
