"""A few shapes as SVG, in colors that read on light and on dark pages.

Coordinates are in pixels of a drawing at its natural size; text is set in the reader's own
sans-serif font, so leave room around it.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

# Names of roles, not of colors: each has a value on a light and one on a dark page.
_LIGHT = {
    "ink": "#24292f", "soft": "#6e7781", "line": "#8c959f", "panel": "#f3f4f6",
    "blue": "#2563ab", "blue-fill": "#dbe9f8", "orange": "#b85c00", "orange-fill": "#fde8d0",
    "green": "#1a7f37", "green-fill": "#dcf3e1", "red": "#b3261e", "red-fill": "#fbe0de",
}  # fmt: skip
_DARK = {
    "ink": "#e6edf3", "soft": "#9aa4ae", "line": "#768390", "panel": "#22272e",
    "blue": "#79b8ff", "blue-fill": "#173454", "orange": "#ffb266", "orange-fill": "#4a2c0a",
    "green": "#6bd68a", "green-fill": "#143d22", "red": "#ff8a80", "red-fill": "#4c1f1c",
}  # fmt: skip


def _style() -> str:
    def rules(colors: dict[str, str]) -> str:
        return "".join(
            f".s-{name}{{stroke:{value}}}.f-{name}{{fill:{value}}}"
            for name, value in colors.items()
        )

    return (
        "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}"
        f".f-none{{fill:none}}.s-none{{stroke:none}}{rules(_LIGHT)}"
        f"@media (prefers-color-scheme:dark){{{rules(_DARK)}}}"
    )


class Drawing:
    """An SVG picture of a given size, to which shapes are added.

    Parameters
    ----------
    width, height : int
        In pixels.
    title : str
        What the picture shows, for readers who do not see it.
    """

    def __init__(self, width: int, height: int, title: str) -> None:
        self._size = width, height
        self._title = title
        self._parts: list[str] = []

    def rect(
        self, x: float, y: float, width: float, height: float,
        *, fill: str = "panel", stroke: str = "line", dashed: bool = False,
    ) -> None:  # fmt: skip
        """Add a rectangle with slightly rounded corners; ``fill`` and ``stroke`` are role names."""
        dashes = ' stroke-dasharray="4 3"' if dashed else ""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" '
            f'class="f-{fill} s-{stroke}"{dashes}/>'
        )

    def text(
        self, x: float, y: float, text: str,
        *, size: float = 13, color: str = "ink", anchor: str = "middle", bold: bool = False,
    ) -> None:  # fmt: skip
        """Add a line of text whose vertical center is ``y``; ``anchor`` is start, middle or end."""
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" '
            f'dominant-baseline="central" class="f-{color}"{weight}>{escape(text)}</text>'
        )

    def line(
        self, points: list[tuple[float, float]],
        *, color: str = "ink", arrow: bool = False, dashed: bool = False, width: float = 1.5,
    ) -> None:  # fmt: skip
        """Add a line through points, with an arrow head at its end if ``arrow``."""
        dashes = ' stroke-dasharray="4 3"' if dashed else ""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._parts.append(
            f'<polyline points="{path}" stroke-width="{width:g}" class="f-none s-{color}"{dashes}/>'
        )
        if arrow:
            (x0, y0), (x1, y1) = points[-2:]
            length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
            dx, dy = 7 * (x1 - x0) / length, 7 * (y1 - y0) / length
            head = f"{x1:g},{y1:g} {x1 - dx - dy / 2:.4g},{y1 - dy + dx / 2:.4g} "
            head += f"{x1 - dx + dy / 2:.4g},{y1 - dy - dx / 2:.4g}"
            self._parts.append(f'<polygon points="{head}" class="f-{color}"/>')

    def circle(
        self, x: float, y: float, radius: float, *, fill: str = "panel", stroke: str = "line"
    ) -> None:
        """Add a circle."""
        self._parts.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" class="f-{fill} s-{stroke}"/>'
        )

    def __str__(self) -> str:
        width, height = self._size
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img">'
        )
        lines = [head, f"<title>{escape(self._title)}</title>", f"<style>{_style()}</style>"]
        return "\n".join([*lines, *self._parts, "</svg>"]) + "\n"

    def save(self, folder: Path, name: str) -> None:
        """Write ``name``.svg to a folder."""
        (folder / f"{name}.svg").write_text(str(self), encoding="utf-8")
