"""Draw the figures of a report again, each as a file of its own in colours for white paper, from the JSON beside it.

``--format html`` draws the page itself.

    python tools/plot_runs.py runs/demo/result.json --figure accuracy_width --format pdf --out paper/figures

Stands alone because a paper needs its figures one by one, long after the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "launch"))

from _report.figures import PLOTS, figure_names, save_figure
from _report.page import write_report
from argument_types import ended

from alignscale.files import write_atomic
from alignscale.results import read_result


def draw(result: Path, figure: str | None, out: Path, kind: str) -> list[dict[str, str]]:
    """Draw one figure of a result, or all that it has the numbers for; returns what was written where.

    Raises:
        ValueError: the file is no result, or it has no such figure.
        OSError: a figure cannot be written.
    """
    data = read_result(result)
    if kind == "html":
        if figure is not None:
            raise ValueError(f"--figure {figure}: expected --format svg, png or pdf; a page has all figures")
        out.mkdir(parents=True, exist_ok=True)
        write_report(data, out / "report.html", os.path.relpath(result, out))
        return [{"figure": "report", "file": str(out / "report.html")}]
    names = figure_names(data)
    if figure is not None and figure not in names:
        reason = "this result lacks the numbers for it" if figure in PLOTS else "there is no such figure"
        raise ValueError(f"--figure: expected one of {', '.join(names)}; found '{figure}': {reason}; choose another")
    out.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name in names if figure is None else [figure]:
        path = out / f"{name}.{kind}"
        save_figure(data, name, path)
        drawn.append({"figure": name, "file": str(path)})
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Draw the figures of a report again, from the JSON beside it.")
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument("--figure", metavar="NAME", help=f"one of {', '.join(PLOTS)} (default: all that there are)")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="folder to write to (default: here)")
    parser.add_argument("--format", choices=("svg", "png", "pdf", "html"), default="svg")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the list of figures and files here as well")
    options = parser.parse_args(arguments)
    if options.out.suffix in (".svg", ".png", ".pdf", ".html"):
        parser.error(f"--out {options.out}: expected a folder, found the name of a file; --format says which kind")
    try:
        drawn = draw(options.result, options.figure, options.out, options.format)
        if options.json:
            write_atomic(options.json, (json.dumps(drawn, indent=2) + "\n").encode())
    except ValueError as error:
        print(f"plot_runs: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"plot_runs: expected a place to write to, found {error}; choose another --out or --json", file=sys.stderr
        )
        return 2
    for row in drawn:
        print(row["file"])
    return 0


if __name__ == "__main__":
    ended(main)
