"""Results as one self-contained HTML file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from . import report
from .plots import Picture
from .report import Table
from .results import Results, summarize

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastrnn benchmark</title>
<style>{css}</style>
</head>
<body>
<header>
<h1>fastrnn against torch.nn</h1>
<p>{machine} · commit {commit}</p>
</header>
<p class="lead">{summary}</p>
<div class="columns">{conclusions}</div>
{speedup}
{failures}
<h2>By layer, mode and dtype</h2>
<p>Geometric mean of the ratio torch.nn time / fastrnn time. Above 1, fastrnn is faster.</p>
<div class="cards">{cards}</div>
<h2>Speed-up by size</h2>
{heatmap}
{slower}
<h2>All cases</h2>
<p>Times are medians. The band of a ratio is its 20th to 80th percentile. A case is
<b class="slower">slower</b> if the whole band is below 1 or the median is below 0.97. It is
<b class="faster">faster</b> only if the whole band is above 1 and the median is above 1.03.</p>
<p><label>Filter: <input id="filter" placeholder="lstm training"></label></p>
{results}
{others}{prices}
{published}
<h2>Time per step</h2>
{steps}
<h2>Memory</h2>
{memory}
<h2>Method</h2>
<ul>
<li>Every provider is called through its public interface, with the same weights and input, and
including the product with the input. <i>forward</i> is inference without autograd. <i>training</i>
is forward and backward, with gradients of the input, the state and all parameters.</li>
<li>Before a case is timed, its results are compared with torch.nn's in the same dtype. The
tolerance follows from the dtype and the number of summands. A case outside the tolerance is not
timed.</li>
<li>Each provider is timed in pairs with torch.nn, in alternating order, after a warm-up. A ratio is
taken within each pair. On CUDA, times come from device events, and <i>CUDA graph</i> is the ratio
of the same calls replayed as CUDA graphs.</li>
<li><i>of limit</i> is a lower bound on the time divided by the time, and what sets the bound. The
bound is the largest of: the products at the speed of a large matrix product; inputs, outputs and
weights, each moved once at the speed of a copy of the same size; the recurrent weights, read once
per step at that speed, where they do not stay on chip; and, where programs exchange the state, an
empty exchange per step. All of these speeds are measured in the same run. {limits}</li>
<li><i>MiB</i> is the peak allocation of one call, without weights, inputs and what a provider keeps
between calls.</li>
<li><i>path</i> is the planner's choice. On the path <i>torch</i>, fastrnn calls the same kernels as
torch.nn, so only the overhead in Python differs. <i>torch.nn runs</i> is the library that torch
selects.</li>
</ul>
<h2>Environment</h2>
{environment}
<h2>Reproduce</h2>
<pre>{command}</pre>
<script>
document.getElementById("filter").addEventListener("input", event => {{
  const words = event.target.value.toLowerCase().split(" ");
  for (const line of document.querySelectorAll("tbody.filtered tr")) {{
    const text = Array.from(line.cells, cell => cell.textContent).join(" ").toLowerCase();
    line.hidden = !words.every(word => text.includes(word));
  }}
}});
</script>
</body>
</html>
"""

_CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d8dee4;
  --paper: #ffffff; --panel: #f6f8fa; --bad: #b3261e; --bad-bg: #fdecea; --good: #1a7f37; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9aa4ae; --line: #30363d; --paper: #0d1117; --panel: #161b22;
    --bad: #ff8a80; --bad-bg: #3b1a1a; --good: #5fd07a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1280px; margin: 0 auto; padding: 24px; }
@media (max-width: 600px) { body { padding: 14px; } p.lead { font-size: 17px; } }
h1 { margin: 0; font-size: 26px; }
h2 { margin: 36px 0 8px; font-size: 19px; border-bottom: 1px solid var(--line); }
header p { margin: 4px 0; color: var(--soft); }
p.lead { font-size: 19px; line-height: 1.45; margin: 18px 0 14px; }
.columns { display: grid; grid-template-columns: 2fr 3fr; gap: 6px 32px; margin-bottom: 20px; }
@media (max-width: 800px) { .columns { grid-template-columns: 1fr; } }
.columns h3 { font-size: 15px; margin: 0; }
.columns ul { margin: 6px 0; padding-left: 20px; }
.columns li { margin: 4px 0; }
img { display: block; width: 100%; min-width: 720px; max-width: 1000px; height: auto;
  margin: 12px 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 10px; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 6px;
  padding: 8px 12px; }
.card b { display: block; font-size: 22px; }
.card small { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { padding: 4px 7px; text-align: left; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
thead th { background: var(--panel); }
.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.slower td, tr.wrong td, tr.failed td { background: var(--bad-bg); }
input { font: inherit; }
.slower td:last-child, .wrong td:last-child, .failed td:last-child, b.slower {
  color: var(--bad); font-weight: 600; }
.faster td:last-child, b.faster { color: var(--good); font-weight: 600; }
.environment { width: auto; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 6px;
  padding: 10px 14px; overflow-x: auto; }
"""

_ALT = {
    "speedup": "Ratio of torch.nn's time to fastrnn's, a dot for each case, by layer and mode",
    "heatmap": "Ratio of torch.nn's time to fastrnn's, for each T, B and H",
    "steps": "Microseconds per step over H, with the limit of the device",
    "memory": "Peak memory of fastrnn against that of torch.nn",
}


def write_page(path: Path, results: Results, pictures: Mapping[str, Picture]) -> None:
    """Write the report.

    Parameters
    ----------
    path : Path
        Of the HTML file to write.
    results : Results
    pictures : mapping of str to Picture
        Those of `plots.draw`, which are embedded in the file.
    """
    env, rows = results.env, results.rows
    commit = f"{env.commit}, with uncommitted changes" if env.dirty else env.commit
    facts = {
        "device": f"{env.device} ({env.device_type})",
        "CPU threads": env.threads,
        "fastrnn": f"{env.fastrnn} (commit {commit})",
        "torch": env.torch,
        "triton": env.triton,
        "cuDNN": env.cudnn,
        "driver": env.driver,
        "Python": env.python,
        "date": env.date,
    }
    table = report.results_table(rows)
    slower = [line for line in table.lines if line.verdict == "slower"]
    concluded = report.conclusions(results)
    text = _PAGE.format(
        css=_CSS,
        machine=escape(report.machine(env)),
        commit=escape(commit),
        summary=escape(concluded.summary),
        conclusions=_bullets("Overall", concluded.faster)
        + _bullets("Where it is slower, and why", concluded.slower),
        cards=_cards(results),
        slower=_section("Slower cases", table._replace(lines=slower) if slower else None),
        results=_html(table, "filtered"),
        failures=_section("Not timed", report.failures_table(rows)),
        others=_section("All providers", report.providers_table(rows)),
        prices=_section("Cost of options", report.prices_table(rows)),
        published=_section("Published figures", report.published_table(rows)),
        limits=escape(report.limits_line(results)),
        environment=_environment(facts),
        command=escape(env.command),
        **{name: _picture(pictures[name], alt) for name, alt in _ALT.items()},
    )
    path.write_text(text, encoding="utf-8")


def _picture(picture: Picture, alt: str) -> str:
    light, dark = map(_encoded, picture)
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
    image = f'<img src="{light}" alt="{escape(alt)}">'
    return f'<div class="wide"><picture>{dark}{image}</picture></div>'


def _encoded(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _bullets(title: str, sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    items = ""
    for sentence in sentences:
        head, colon, rest = sentence.partition(": ")
        items += f"<li>{f'<b>{escape(head)}</b>: {escape(rest)}' if colon else escape(head)}</li>"
    return f"<div><h3>{title}</h3><ul>{items}</ul></div>"


def _environment(facts: Mapping[str, object]) -> str:
    lines = (f"<tr><th>{key}</th><td>{escape(str(fact))}</td></tr>" for key, fact in facts.items())
    return f'<table class="environment">{"".join(lines)}</table>'


def _cards(results: Results) -> str:
    main = report.main_provider(results.rows)
    return "".join(
        f'<div class="card">{report.LABELS[s.cell]} {report.MODE_LABELS[s.mode]} · {s.dtype}'
        f"<b>{s.mean_ratio:.2f}&times;</b>"
        f"<small>{s.faster} faster, {s.equal} equal, {s.slower} slower</small></div>"
        for s in summarize(results.rows)
        if s.provider == main
    )


def _section(title: str, table: Table | None) -> str:
    if table is None:
        return ""
    return f"<h2>{title}</h2><p>{escape(table.title)}</p>{_html(table)}"


def _html(table: Table, kind: str = "") -> str:
    numbers = [header.startswith("#") for header in table.headers]

    def line(tag: str, cells: tuple[str, ...]) -> str:
        classes = (' class="number"' if is_number else "" for is_number in numbers)
        return "".join(
            f"<{tag}{css}>{escape(cell)}</{tag}>" for css, cell in zip(classes, cells, strict=True)
        )

    head = line("th", tuple(header.removeprefix("#") for header in table.headers))
    body = "".join(
        f'<tr class="{verdict}" title="{escape(remark)}">{line("td", cells)}</tr>'
        for cells, verdict, remark in table.lines
    )
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f'<tbody class="{kind}">{body}</tbody></table></div>'
    )
