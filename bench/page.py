"""Results as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path

from . import report
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
<p>{device} · {date}</p>
<p class="totals">{totals}</p>
</header>
<h2>Summary</h2>
<p>Geometric mean of the ratio torch.nn time / fastrnn time; above 1 fastrnn is faster.</p>
<div class="cards">{cards}</div>
{slower}
{failures}
<h2>Speed-up</h2>
{speedup}
<h2>Speed-up over T, B and H</h2>
<p>Where nothing was measured the field is grey.</p>
{heatmap}
<h2>All cases</h2>
<p>Times are medians. The band of the ratio is its 20th to 80th percentile. A case is
<b class="slower">slower</b> if the whole band is below 1 or the median is below 0.97, and
<b class="faster">faster</b> only if the whole band is above 1 and the median above 1.03.</p>
<p><label>Only lines that contain <input id="filter" placeholder="slower"></label></p>
{results}
{others}{prices}
{published}
<h2>Time of a step</h2>
{steps}
<h2>Memory</h2>
{memory}
<h2>How this was measured</h2>
<ul>
<li>Everybody is called as users would, with the same weights and the same input, the product with
the input included. <i>forward</i> is inference without autograd, <i>training</i> is forward and
backward with the gradients of input, state and all parameters.</li>
<li>Before a case is timed, all its results are compared with torch.nn's in the same dtype, with
a tolerance that follows from the dtype and the number of sums. A case that differs gets no
time.</li>
<li>Each provider is timed in pairs with torch.nn, one right after the other in alternating order,
after a warm-up. A ratio is taken within each pair. On CUDA the clock is that of the device's
events, and <i>as graph</i> is the ratio of the same calls replayed as CUDA graphs.</li>
<li><i>of limit</i>: a yardstick divided by the time, and what it is made of. It is the largest of:
the products at the speed of a large matrix product; inputs, outputs and weights once at the speed
of a copy of as many bytes; the recurrent weights once for each step at that speed, where they do
not stay on chip; and, where the state has to cross between processors, an empty exchange for each
step. All are measured in the same run. {limits}</li>
<li><i>MiB</i> is the most that one call allocates, beside weights, inputs and what a provider keeps
between calls.</li>
<li><i>path</i> is what the planner chose. On the path <i>torch</i>, fastrnn calls the same
kernels as torch.nn, so that only the difference in Python remains. <i>torch.nn runs</i> is what
torch chooses by its own rules.</li>
</ul>
<h2>Environment</h2>
{environment}
<h2>Reproduce</h2>
<pre>{command}</pre>
<script>
document.getElementById("filter").addEventListener("input", event => {{
  const text = event.target.value.toLowerCase();
  for (const line of document.querySelectorAll("tbody.filtered tr"))
    line.hidden = !line.textContent.toLowerCase().includes(text);
}});
</script>
</body>
</html>
"""

_CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d8dee4;
  --paper: #ffffff; --panel: #f6f8fa; --bad: #b3261e; --bad-bg: #fdecea; --good: #1a7f37; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9aa4ae; --line: #343b43; --paper: #0f1318; --panel: #181e25;
    --bad: #ff8a80; --bad-bg: #3b1a1a; --good: #5fd07a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1280px; margin: 0 auto; padding: 24px; }
h1 { margin: 0; font-size: 26px; }
h2 { margin: 36px 0 8px; font-size: 19px; border-bottom: 1px solid var(--line); }
header p { margin: 4px 0; color: var(--soft); }
header p.totals { color: var(--ink); font-weight: 600; }
img { display: block; margin: 12px auto; background: #fff; zoom: 0.75;
  border: 1px solid var(--line); border-radius: 6px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 10px; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 6px;
  padding: 8px 12px; }
.card b { display: block; font-size: 22px; }
.card small { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { padding: 4px 9px; text-align: left; white-space: nowrap;
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
    "speedup": "Ratio of torch.nn's to fastrnn's time, by cell, mode and dtype",
    "heatmap": "Ratio of torch.nn's to fastrnn's time, over T, B and H",
    "steps": "Microseconds of a step over H, with the limit of the device",
    "memory": "Peak memory of fastrnn over that of torch.nn",
}


def write_page(path: Path, results: Results, pictures: Mapping[str, Path]) -> None:
    """Write the report.

    Parameters
    ----------
    path : Path
        Of the HTML file to write.
    results : Results
    pictures : mapping of str to Path
        Those of ``plots`` by name, which become part of the file.
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
    text = _PAGE.format(
        css=_CSS,
        device=escape(env.device),
        date=escape(env.date.partition("T")[0]),
        totals=escape(report.totals(rows)),
        cards=_cards(results),
        slower=_section("Where it is slower", table._replace(lines=slower) if slower else None),
        results=_html(table, "filtered"),
        failures=_section("Not timed", report.failures_table(rows)),
        others=_section("Everybody", report.providers_table(rows)),
        prices=_section("What it costs", report.prices_table(rows)),
        published=_section("Published by others", report.published_table(rows)),
        limits=escape(report.limits_line(results)),
        environment=_environment(facts),
        command=escape(env.command),
        **{name: _picture(pictures[name], alt) for name, alt in _ALT.items()},
    )
    path.write_text(text, encoding="utf-8")


def _picture(path: Path, alt: str) -> str:
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    image = f'<img src="data:image/png;base64,{content}" alt="{escape(alt)}">'
    return f'<div class="wide">{image}</div>'


def _environment(facts: Mapping[str, object]) -> str:
    lines = (f"<tr><th>{key}</th><td>{escape(str(fact))}</td></tr>" for key, fact in facts.items())
    return f'<table class="environment">{"".join(lines)}</table>'


def _cards(results: Results) -> str:
    main = report.main_provider(results.rows)
    return "".join(
        f'<div class="card">{s.cell} · {s.mode} · {s.dtype}<b>{s.mean_ratio:.2f}&times;</b>'
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
