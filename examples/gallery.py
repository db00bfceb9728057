"""Run the examples against torch.nn and present the results: ``make gallery``.

Each section of README.md in this folder names the example it shows and the figures to tabulate:

    <!-- results: char_lm perplexity -->
    <!-- /results -->

The picture and a table go between the two, both from the files that the example wrote and that are
kept in gallery/. Several figures are separated by bars: FIGURE | FIGURE.

    python examples/gallery.py                    all of them, about twenty minutes on two cores
    python examples/gallery.py char_lm melody     only these
    python examples/gallery.py --no-run           only rewrite the page
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PAGE, KEPT, OUT = FOLDER / "README.md", FOLDER / "gallery", FOLDER / "out"
RESULTS = re.compile(r"(<!-- results: (\w+) (.*?) -->\n).*?(<!-- /results -->)", re.DOTALL)
SUMMARY = re.compile(r"(<!-- summary -->\n).*?(<!-- /summary -->)", re.DOTALL)
TITLE = re.compile(r"^## (.*?)\n(?:(?!^## ).)*?<!-- results: (\w+) ", re.DOTALL | re.MULTILINE)


def load(name: str) -> dict[str, Any]:
    return json.loads((KEPT / f"{name}.json").read_text(encoding="utf-8"))


def table(*rows: list[str]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def how_fast(runs: dict[str, Any]) -> str:
    """Return the update times of torch.nn over those of fastrnn, from smallest to largest."""
    ratios = sorted(of["torch.nn"]["step"] / of["fastrnn"]["step"] for of in runs.values())
    return " to ".join(dict.fromkeys(f"{ratio:.2f}" for ratio in (ratios[0], ratios[-1])))


def section(name: str, figures: list[str]) -> str:
    """Format picture, figures and times of one example."""
    record = load(name)
    rows = [["", *figures, "update, fastrnn", "update, torch.nn", "ratio", "same losses"]]
    for variant, of in record["runs"].items():
        ours, stock = of["fastrnn"], of["torch.nn"]
        shown = [ours.get(figure, "") for figure in figures]
        shown = [f"{x:.4g}" if isinstance(x, float) else str(x) for x in shown]
        times = [f"{1e3 * one['step']:.1f} ms" for one in (ours, stock)]
        agree = "yes" if record["agreement"][variant] else "**no**"
        rows.append([variant, *shown, *times, how_fast({variant: of}), agree])
    return f"\n![{name}](gallery/{name}.png)\n\n{table(*rows)}\n"


def summary(page: str) -> str:
    """Format one row per example: training time with fastrnn and torch.nn, ratio, agreement."""
    rows = [["example", "training, fastrnn", "training, torch.nn", "update: torch.nn / fastrnn"]]
    rows[0].append("same losses")
    machines = {}
    for title, name in TITLE.findall(page):
        record = load(name)
        environment = record["environment"]
        seconds = [
            f"{sum(of[library]['seconds'] for of in record['runs'].values()):.0f} s"
            for library in ("fastrnn", "torch.nn")
        ]
        anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        agree = "yes" if all(record["agreement"].values()) else "**no**"
        rows.append([f"[{title}](#{anchor})", *seconds, how_fast(record["runs"]), agree])
        machine = (
            f"{environment['device']}, {environment['threads']} threads, torch "
            f"{environment['torch']}, {environment['date'][:10]}, commit {environment['commit']}"
            f"{' with uncommitted changes' if environment['dirty'] else ''}"
        )
        machines.setdefault(machine, []).append(name)
    where = [f"Measured on {machine}: {', '.join(names)}." for machine, names in machines.items()]
    return f"\n{table(*rows)}\n" + "\n".join(where) + "\n\n"


def written(page: str) -> str:
    """Return the page with tables from the kept results."""
    page = RESULTS.sub(lambda m: f"{m[1]}{section(m[2], m[3].split(' | '))}{m[4]}", page)
    return SUMMARY.sub(lambda m: f"{m[1]}{summary(page)}{m[2]}", page)


def main(argv: list[str] | None = None) -> int:
    page = PAGE.read_text(encoding="utf-8")
    every = [name for _, name in TITLE.findall(page)]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(every)}")
    parser.add_argument("--no-run", action="store_true", help="write the page from what is kept")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(every):
        parser.error(f"no section of {PAGE} shows {', '.join(sorted(unknown))}")
    failed = []
    names = [] if args.no_run else args.names or every
    for name in names:
        print(f"\n{name}", flush=True)
        for old in OUT.glob(f"{name}.*"):
            old.unlink()
        # Results go to an ignored folder first, since each records whether the checkout is dirty.
        command = [sys.executable, f"examples/{name}.py", "--stock", "--plot"]
        command += ["--out", str(OUT.relative_to(FOLDER.parent))]
        if subprocess.run(command, cwd=FOLDER.parent).returncode:
            failed.append(name)
    KEPT.mkdir(exist_ok=True)
    for name in names:
        for file in OUT.glob(f"{name}.*"):
            shutil.copy(file, KEPT)
    if missing := [name for name in every if not (KEPT / f"{name}.json").is_file()]:
        parser.error(f"there are no results of {', '.join(missing)}, so the page is not written")
    PAGE.write_text(written(page), encoding="utf-8")
    if failed:
        print(f"failed, or losses that differ: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
