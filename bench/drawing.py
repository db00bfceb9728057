"""What all pictures of results share: colors, style, a sheet, and files that name their source."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

#: Width of every picture, and margin to the left and right of its content, in pixels.
WIDTH, MARGIN = 1000, 20


class Theme(NamedTuple):
    """Colors; ``heat`` is those of half as fast, equal, twice and five times as fast."""

    suffix: str
    paper: str
    ink: str
    soft: str
    line: str
    bad: str
    bad_panel: str
    modes: tuple[str, ...]
    heat: tuple[str, ...]
    batches: tuple[float, float]


# Blue and orange are told apart with any color vision.
LIGHT = Theme(
    "", "#ffffff", "#1f2328", "#59636e", "#d8dee4", "#b3261e", "#fdf1f0", ("#2563ab", "#d9730d"),
    ("#d9604f", "#f1f3f5", "#9cc4ea", "#2563ab"), (0.0, 0.88),
)  # fmt: skip
DARK = Theme(
    "-dark", "#0d1117", "#e6edf3", "#9aa4ae", "#30363d", "#ff8a80", "#211617",
    ("#6cb0ff", "#f2a154"), ("#e0604f", "#21262d", "#2b5e96", "#8cc3ff"), (0.3, 1.0),
)  # fmt: skip
THEMES = (LIGHT, DARK)


def rc_settings(theme: Theme) -> dict[Any, Any]:
    """Give matplotlib's settings for a picture.

    Parameters
    ----------
    theme : Theme

    Returns
    -------
    dict
        For ``matplotlib.pyplot.rc_context``.
    """
    return {
        "font.family": "DejaVu Sans",  # it comes with matplotlib: the same everywhere
        "font.size": 9,
        "text.color": theme.ink,
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "axes.labelcolor": theme.ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": theme.line,
        "axes.edgecolor": theme.soft,
        "xtick.color": theme.soft,
        "ytick.color": theme.soft,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "legend.frameon": False,
        "figure.constrained_layout.w_pad": 0.12,
        "figure.constrained_layout.h_pad": 0.12,
    }


def in_points(pixels: float) -> float:
    """Convert a font size from pixels to points.

    Parameters
    ----------
    pixels : float

    Returns
    -------
    float
    """
    return 0.72 * pixels


def make_sheet(height: float) -> tuple[Any, Any]:
    """Make a figure and axes over all of it, in units of pixels from the upper left corner.

    Parameters
    ----------
    height : float
        In pixels.

    Returns
    -------
    tuple of Figure and Axes
    """
    figure = plt.figure(figsize=(WIDTH / 100, height / 100))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def write_heading(axes: Any, theme: Theme, title: str, line: str) -> None:
    """Write a title, and a line below it, at the top of a sheet.

    Parameters
    ----------
    axes : Axes
        Those of `make_sheet`.
    theme : Theme
    title : str
    line : str
    """
    axes.text(MARGIN, 26, title, size=in_points(19), weight="bold", va="center")
    axes.text(MARGIN, 52, line, size=in_points(12.5), color=theme.soft, va="center")


def save(figure: Any, path: Path, mark: str) -> None:
    """Write a figure as a PNG that names its source, and close the figure.

    A palette of 256 colors makes the file a third as large.

    Parameters
    ----------
    figure : Figure
    path : Path
    mark : str
        What `origin` is to return: see `origin_of`.
    """
    figure.set_dpi(200)
    figure.canvas.draw()
    pixels, size = figure.canvas.buffer_rgba(), figure.canvas.get_width_height()
    image = Image.frombuffer("RGBA", size, pixels, "raw", "RGBA", 0, 1)
    flat = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    plt.close(figure)
    notes = PngInfo()
    notes.add_text("Source", mark)
    flat.save(path, optimize=True, pnginfo=notes)


def origin_of(source: Path) -> str:
    """Name a results.json by its folder and its content.

    Parameters
    ----------
    source : Path

    Returns
    -------
    str
    """
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    return f"{source.resolve().parent.name}/{source.name} sha256:{digest}"


def origin(picture: Path) -> str:
    """Tell which results a picture was drawn from.

    Parameters
    ----------
    picture : Path

    Returns
    -------
    str
        What `origin_of` said of them; '' for another picture.
    """
    with Image.open(picture) as image:
        return str(image.info.get("Source", ""))
