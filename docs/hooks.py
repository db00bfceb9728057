"""Formulas as MathML when the site is built, so that pages need no script from elsewhere."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

# What pymdownx.arithmatex makes of $…$ and $$…$$.
_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL
)


def on_page_content(content: str, **_: object) -> str:
    """Convert the formulas of a page; mkdocs calls this with its HTML."""
    return _FORMULA.sub(_as_mathml, content)


def _as_mathml(match: re.Match[str]) -> str:
    is_inline = match[2] is not None
    formula = html.unescape(match[2] if is_inline else match[3])
    mathml = convert(formula.strip(), display="inline" if is_inline else "block")
    return mathml if is_inline else f'<div class="formula">{mathml}</div>'
