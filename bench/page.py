"""Results as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from .environment import Environment
from .report import MARKS, cell_name, milliseconds, ratio, share, totals
from .results import Row, summarize

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
<h2>Speed-up</h2>
<img src="data:image/png;base64,{speedup}" alt="Ratio of torch.nn's to fastrnn's time, by case">
<h2>All cases</h2>
<p>Times are medians. The band of the ratio is its 20th to 80th percentile. A case is
<b class="slower">slower</b> if the whole band is below 1 or the median is below 0.97, and
<b class="faster">faster</b> only if the whole band is above 1 and the median above 1.03.</p>
<div class="wide">{table}</div>
<h2>Time of one call</h2>
<img src="data:image/png;base64,{time}" alt="Milliseconds of one call of both, by case">
<h2>How this was measured</h2>
<ul>
<li>Both sides are the public modules, with the same weights and the same input; input size is
the hidden size. <i>forward</i> is inference without autograd, <i>training</i> is forward and
backward with the gradients of input, state and all parameters.</li>
<li>Before a case is timed, all its results are compared with torch.nn's in the same dtype, with
a tolerance that follows from the dtype and the number of sums. A case that differs gets no
time.</li>
<li>The two are timed in pairs, one right after the other in alternating order, after a warm-up.
A ratio is taken within each pair.</li>
<li><i>of GEMM</i>: fastrnn's operations a second, divided by those of a large matrix product of
torch in the same run.</li>
<li><i>path</i> is what the planner chose. On the path <i>torch</i>, fastrnn calls the same
kernels as torch.nn, so that only the difference in Python remains.</li>
</ul>
<h2>Environment</h2>
{environment}
<h2>Reproduce</h2>
<pre>{command}</pre>
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
  max-width: 1080px; margin: 0 auto; padding: 24px; }
h1 { margin: 0; font-size: 26px; }
h2 { margin: 36px 0 8px; font-size: 19px; border-bottom: 1px solid var(--line); }
header p { margin: 4px 0; color: var(--soft); }
header p.totals { color: var(--ink); font-weight: 600; }
img { display: block; width: 100%; max-width: 940px; margin: 12px auto; background: #fff;
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
.slower td:last-child, .wrong td:last-child, .failed td:last-child, b.slower {
  color: var(--bad); font-weight: 600; }
.faster td:last-child, b.faster { color: var(--good); font-weight: 600; }
.environment { width: auto; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 6px;
  padding: 10px 14px; overflow-x: auto; }
"""

_HEADERS = ("cell", "mode", "T", "B", "H", "dtype", "path", "fastrnn ms", "torch.nn ms", "of GEMM")
_NUMBERS = (2, 3, 4, 7, 8, 9, 10)


def write_page(
    path: Path, env: Environment, rows: Sequence[Row], speedup: Path, time: Path
) -> None:
    """Write the report.

    Parameters
    ----------
    path : Path
        Of the HTML file to write.
    env : Environment
    rows : sequence of Row
    speedup, time : Path
        The pictures of ``plots``, which become part of the file.
    """
    commit = f"{env.commit}, with uncommitted changes" if env.dirty else env.commit
    facts = {
        "device": f"{env.device} ({env.device_type})",
        "CPU threads": env.threads,
        "fastrnn": f"{env.fastrnn} (commit {commit})",
        "torch": env.torch,
        "triton": env.triton,
        "Python": env.python,
        "date": env.date,
    }
    text = _PAGE.format(
        css=_CSS,
        device=escape(env.device),
        date=escape(env.date.partition("T")[0]),
        totals=escape(totals(rows)),
        cards=_cards(rows),
        table=_table(rows),
        speedup=_base64(speedup),
        time=_base64(time),
        environment="".join(
            [
                '<table class="environment">',
                *(
                    f"<tr><th>{key}</th><td>{escape(str(fact))}</td></tr>"
                    for key, fact in facts.items()
                ),
                "</table>",
            ]
        ),
        command=escape(env.command),
    )
    path.write_text(text, encoding="utf-8")


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")


def _cards(rows: Sequence[Row]) -> str:
    return "".join(
        f'<div class="card">{s.cell} · {s.mode}<b>{s.mean_ratio:.2f}&times;</b>'
        f"<small>{s.faster} faster, {s.equal} equal, {s.slower} slower</small></div>"
        for s in summarize(rows)
    )


def _table(rows: Sequence[Row]) -> str:
    has_memory = any(row.torch_peak_mib is not None for row in rows)
    headers = [*_HEADERS, "ratio [20-80 %]"]
    numbers = [*_NUMBERS]
    if has_memory:
        numbers += [len(headers), len(headers) + 1]
        headers += ["fastrnn MiB", "torch.nn MiB"]
    lines = [_line("th", [*headers, ""], numbers)]
    body = []
    for row in rows:
        case = row.case
        cells = [cell_name(row), case.mode, case.steps, case.batch, case.hidden_size, case.dtype]
        cells += [row.path, *_times(row), share(row), ratio(row)]
        if has_memory:
            peaks = (row.fastrnn_peak_mib, row.torch_peak_mib)
            cells += ["-" if peak is None else f"{peak:.1f}" for peak in peaks]
        line = _line("td", [*cells, MARKS[row.verdict]], numbers)
        body.append(f'<tr class="{row.verdict}" title="{escape(row.reason)}">{line}</tr>')
    return f"<table><thead><tr>{lines[0]}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _times(row: Row) -> list[str]:
    times = row.times
    return [milliseconds(times and times.fastrnn_ms), milliseconds(times and times.torch_ms)]


def _line(tag: str, cells: Iterable[object], numbers: Sequence[int]) -> str:
    return "".join(
        f'<{tag} class="number">{escape(str(cell))}</{tag}>'
        if k in numbers
        else f"<{tag}>{escape(str(cell))}</{tag}>"
        for k, cell in enumerate(cells)
    )
