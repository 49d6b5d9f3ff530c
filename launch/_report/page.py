"""The report of a run or of a comparison: one HTML page that needs nothing else, and its main table for the terminal.

The page is drawn from a result (see `alignscale.results`) alone, so the JSON beside it is enough to draw it again, to
the same bytes. Figures and style are inline; there is no script, no font to load and no other file that it needs.
What it says is in report.html.jinja; here is what that has to know.

Stands alone because the page and the terminal must show the same table.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from _report import figures, series, theme
from _report.claims import verdict
from _report.series import Series, series_of, widths
from alignscale.files import write_atomic
from alignscale.results import Result, Run, diverged, finite, flatten


def text_table(data: Result) -> str:
    """Test accuracy in percent over widths as aligned plain text, each cell with its gap to backprop: "97.2 (-0.3)"."""
    lines, found = series_of(data["runs"]), widths(data["runs"])
    rows = [["test accuracy, %", *(f"width {width}" for width in found)]]
    for line in lines:
        rows.append([line.label])
        for value, gap, lost in (_accuracy_words(line, width) for width in found):
            rows[-1].append(value + (f" ({gap})" if gap else "") + (f" [{lost}]" if lost else ""))
    columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = ["  ".join(cell.ljust(size) for cell, size in zip(row, columns, strict=True)).rstrip() for row in rows]
    if any(line.base for line in lines):
        text.append("(in brackets: the gap to backprop at the same width, in percentage points)")
    return "\n".join(text)


def _accuracy_words(line: Series, width: int) -> tuple[str, str, str]:
    """A cell's accuracy over seeds, its gap to backprop, how many seeds diverged; empty where there is none."""
    own, accuracy, gap = line.at(width), line.accuracy(width), line.gap(width)
    lost = sum(diverged(run) for run in own)
    if accuracy.mean is None:
        return "diverged" if lost else "-", "", ""
    words = f"{accuracy.mean:.1f}" + ("" if accuracy.std is None else f" ±{accuracy.std:.1f}")
    signed = "" if gap.mean is None else "0.0" if abs(gap.mean) < 0.05 else f"{gap.mean:+.1f}"
    return words, signed, f"{lost} of {len(own)} diverged" if lost else ""


def write_report(data: Result, path: Path, json_name: str = "result.json") -> None:
    """Write the page of a result; two runs or more make a comparison.

    Args:
        data: a result of format 1.
        path: the page's file, replaced in one step.
        json_name: the name of the JSON that holds `data`, in the same folder.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined,
    )  # fmt: skip
    environment.tests["diverged"] = diverged
    environment.filters |= {"accuracy_words": _accuracy_words, "grouped": _grouped}
    environment.globals |= {"figures": figures, "series": series, "theme": theme}
    runs, lines = data["runs"], series_of(data["runs"])
    ordered = [run for line in lines for run in line.runs]
    page = environment.get_template("report.html.jinja").render(
        **data,
        **_cells(lines, widths(runs)),
        **_runs_table(lines),
        data=data,
        differences=_differences(runs),
        json_name=json_name,
        lines=lines,
        links=[_link(run, path) for run in ordered],
        measures=_measures(runs[0]),
        ordered=ordered,
        seconds=sum(finite(run.get("seconds")) or 0.0 for run in runs),
        skipped=max(run.get("skipped") or 0 for run in runs),
        text=text_table(data),
        verdict=verdict(data),
        values={name: len({line.options[name] for line in lines}) for name in lines[0].options},
    )
    write_atomic(path, page.encode())


def _cells(lines: Sequence[Series], found: Sequence[int]) -> dict[str, Any]:
    """The widths, the numbers of seeds of the cells of rules by widths, and whether a cell has a seed twice."""
    cells = [own for line in lines for width in found if (own := line.at(width))]
    seeds = [len({run["seed"] for run in own}) for own in cells]
    return {"widths": found, "seeds": seeds, "repeated": seeds != [len(own) for own in cells]}


def _measures(run: Run) -> dict[str, str]:
    """How a run went, as a table's headings and cells: those that it has."""
    best, step, seconds = run.get("best") or {}, finite(run.get("seconds_per_step")), finite(run.get("seconds"))
    reached = finite(best.get("accuracy"))
    measures = {
        "test accuracy (%)": _number(run, "test"),
        "top-5 (%)": _number(run, "test", "top5"),
        "validation (%)": _number(run, "validation"),
        "training (%)": _number(run, "train"),
        f"best {best.get('split')} (%)": reached and f"{100 * reached:.1f} (epoch {best.get('epoch')})",
        "test loss": _number(run, "test", "loss"),
        "training loss": _number(run, "train", "loss"),
        "ms per step": step and series.significant(1000 * step),
        "time": seconds and series.duration(seconds),
        "parameters": f"{run['parameters']:,}",
        "epochs": f"{run['epochs']:,}",
        "steps": f"{run['steps']:,}",
        "batch size": f"{run['batch']:,}",
    }
    return {name: str(words) for name, words in measures.items() if words}


def _number(run: Run, split: str, key: str = "accuracy") -> str:
    """A number at the end of a run as text, ``diverged`` in the place of one that was lost; empty if never measured."""
    value = finite(run[split].get(key)) if key == "loss" else series.accuracy(run, split, key)
    if value is None:
        return "diverged" if diverged(run) and key in (run.get(split) or {}) else ""
    return f"{value:#.3g}".rstrip(".") if key == "loss" else f"{value:.1f}"


def _runs_table(lines: Sequence[Series]) -> dict[str, dict[str, Any]]:
    """The columns of the table of the runs, in the order of the series, and those in which all of them agree."""
    words = ("rule", "net", "width", "seed")
    pairs = [(run, line.options) for line in lines for run in line.runs]
    rows = [{key: str(run[key]) for key in words} | options | _measures(run) for run, options in pairs]
    columns = {key: [row.get(key, "–") for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    if set(columns.get("top-5 (%)", [])) <= {"–", "diverged", "100.0"}:
        columns.pop("top-5 (%)", None)  # with five classes or fewer it is no news
    settings = ("net", "width", "seed", "parameters", "epochs", "steps", "batch size")
    common = {key: columns.pop(key)[0] for key in settings if len(set(columns[key])) == 1}
    return {"table": columns, "common": common}


def _link(run: Run, path: Path) -> str | None:
    """The way from a page to a run's own report, if its folder, as seen from the page, holds one."""
    page = path.parent / run["folder"] / "report.html"
    if not page.is_file() or page.resolve() == path.resolve():
        return None
    return os.path.relpath(page.resolve(), path.parent.resolve())


def _differences(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """Options that differ between runs, each with its values and whose they are."""
    return {
        option: {
            value: _whose([run for run, own in zip(runs, values, strict=True) if own == value], runs)
            for value in values
        }
        for option, values in series.differences(runs).items()
    }


def _whose(its: Sequence[Run], runs: Sequence[Run]) -> str:
    """Names some of the runs in words: by what they share if that picks out just them, else by name or number."""
    for key in ("rule", "net", "width", "seed"):
        shared = {run[key] for run in its}
        if sum(run[key] in shared for run in runs) == len(its):
            return f"{key} " + ", ".join(str(value) for value in sorted(shared))
    return ", ".join(run["name"] for run in its) if len(its) <= 4 else f"{len(its)} of {len(runs)} runs"


def _grouped(options: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Nested options by their outer names; those that have no outer name come first."""
    groups = {"": {key: value for key, value in options.items() if not isinstance(value, dict)}}
    groups |= {key: flatten(value) for key, value in options.items() if isinstance(value, dict)}
    return [(title, group) for title, group in groups.items() if group]
