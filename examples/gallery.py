"""Run the examples that README.md shows, draw their pictures and fill in their figures.

README.md has two comments for each of them, with the figure to be shown in the table of all,
and what stands in between is written by this program:

    <!-- results: char_lm perplexity -->
    <!-- /results -->

    python examples/gallery.py                 run all, with torch.nn beside fastrnn
    python examples/gallery.py char_lm         run one
    python examples/gallery.py --no-run        only draw and write, from the results that are there
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE / "README.md"
RESULTS = HERE / "gallery"
SECTION = re.compile(
    r"^## (?P<title>.+?)$(?P<text>(?:(?!^## ).)*?)"
    r"(?P<begin><!-- results: (?P<name>\w+) (?P<figure>[^>]+) -->\n).*?(?P<end><!-- /results -->)",
    re.DOTALL | re.MULTILINE,
)
SUMMARY = re.compile(r"(<!-- summary -->\n).*?(<!-- /summary -->)", re.DOTALL)
TIMES = ("seconds", "step")


def written(page: str) -> str:
    """The page with the figures of the results."""
    sections = [*SECTION.finditer(page)]
    page = SECTION.sub(_filled, page)
    return SUMMARY.sub(lambda found: found[1] + _summary(sections) + found[2], page)


def results(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _filled(found: re.Match[str]) -> str:
    """A section with its picture and a table, a row for each variant."""
    name, found_results = found["name"], results(found["name"])
    runs = found_results["runs"]
    keys = [
        key
        for key, value in next(iter(runs.values()))["fastrnn"].items()
        if isinstance(value, (int, float)) and key not in TIMES
    ]
    lines = [f"![{found['title']}](gallery/{name}.png)", ""]
    lines += [_row(["", *keys, "fastrnn", "torch.nn", "an update"]), "|---" * (len(keys) + 4) + "|"]
    for variant, of in runs.items():
        ours, stock = of["fastrnn"], of["torch.nn"]
        lines.append(
            _row(
                [variant, *(_number(ours.get(key)) for key in keys)]
                + [f"{of[library]['seconds']:.1f} s" for library in ("fastrnn", "torch.nn")]
                + [f"{stock['step'] / ours['step']:.2f}"]
            )
        )
    options = found_results["arguments"]
    where = f"`python examples/{name}.py`, seed {options['seed']}, [results](gallery/{name}.json)"
    kept = f"## {found['title']}{found['text']}{found['begin']}"
    return kept + "\n".join([*lines, "", where, ""]) + found["end"]


def _summary(sections: list[re.Match[str]]) -> str:
    lines = [_row(["system", "result", "fastrnn", "torch.nn"]), "|---|---|---|---|"]
    for found in sections:
        runs, figure = results(found["name"])["runs"], found["figure"]
        shown = ", ".join(f"{name} {_number(of['fastrnn'][figure])}" for name, of in runs.items())
        seconds = [
            sum(of[library]["seconds"] for of in runs.values())
            for library in ("fastrnn", "torch.nn")
        ]
        link = re.sub(r"[^\w\- ]", "", found["title"].lower()).replace(" ", "-")
        lines.append(
            _row(
                [f"[{found['title']}](#{link})", f"{figure}: {shown}"]
                + [f"{x:.0f} s" for x in seconds]
            )
        )
    return "\n".join([*lines, ""])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(x: float | None) -> str:
    return (
        "" if x is None else f"{x:.3g}" if isinstance(x, float) and abs(x) < 1000 else f"{x:,.0f}"
    )


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("names", nargs="*", help="those to run; all if none is given")
    options.add_argument("--no-run", action="store_true", help="draw and write only")
    args = options.parse_args(argv)
    page = PAGE.read_text(encoding="utf-8")
    shown = [found["name"] for found in SECTION.finditer(page)]
    if unknown := set(args.names) - set(shown):
        options.error(
            f"not in {PAGE.name}: {', '.join(sorted(unknown))}; there are {', '.join(shown)}"
        )
    out, failed = HERE / "out", []
    for name in [] if args.no_run else args.names or shown:
        print(f"\n{name}", flush=True)
        command = [sys.executable, f"examples/{name}.py", "--stock", "--out", "examples/out"]
        if subprocess.run(command, cwd=HERE.parent).returncode:
            failed.append(name)
        else:
            RESULTS.mkdir(exist_ok=True)
            shutil.copy(out / f"{name}.json", RESULTS)
    for name in shown:
        draw = importlib.import_module(name).draw
        draw(results(name)["runs"]).savefig(RESULTS / f"{name}.png", dpi=110)
    PAGE.write_text(written(page), encoding="utf-8")
    if failed:
        print(f"failed, their older results stay: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
