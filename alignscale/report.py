"""The report of a run or of a comparison: one HTML page that needs nothing else, and its main table for the terminal.

The page is drawn from a result (see `alignscale.results`) alone, so the JSON beside it is enough to draw it again, to
the same bytes. Figures and style are inline; there is no script, no font to load and no other file that it needs.

Stands alone because it is the only file that writes HTML.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from urllib.parse import quote

from alignscale import figures, results, theme
from alignscale.files import write_atomic
from alignscale.results import Result, Run, Series, finite


def text_table(data: Result) -> str:
    """Test accuracy in percent over widths as aligned plain text, each cell with its gap to backprop: "97.2 (-0.3)"."""
    lines, found = results.series(data["runs"]), results.widths(data["runs"])
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
    lost = sum(results.diverged(run) for run in own)
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
    write_atomic(path, _page(data, path, json_name).encode())


def _page(data: Result, path: Path, json_name: str) -> str:
    runs = data["runs"]
    drawn = {name: _figure(data, name, svg) for name, svg in figures.figures(data).items()}
    if len(runs) == 1:
        sections = {
            "Result": _tiles(runs[0]),
            "Training": _gallery(drawn, [name for name in drawn if name != "step_time"], 1),
            "Options": _groups(runs[0]["config"]),
        }
    else:
        columns = len(results.widths(runs))
        curves = ["test_accuracy", "validation_accuracy", "train_loss", "learning_rate"]
        sections = {
            "Result": _accuracy_table(runs) + _gallery(drawn, ["accuracy_width", "gap_width"], 1),
            "Training": _gallery(drawn, curves, columns),
            "Direction and cost of a step": _gallery(drawn, ["update_cosine", "step_time"], columns),
            "Runs": _runs_table(runs, path),
            "Options that differ between runs": _differences(runs),
            "Options common to all runs": _groups(data["config"]),
        }
    sections["Machine and versions"] = _groups({"machine": data["hardware"], "versions": data["versions"]})
    sections["Numbers"] = _numbers(data, json_name)
    body = "\n".join(f"<section>\n<h2>{name}</h2>\n{part}\n</section>" for name, part in sections.items() if part)
    frame = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return frame.substitute(title=escape(data["title"]), style=theme.style_sheet(), lead=_lead(data), sections=body)


def _lead(data: Result) -> str:
    """What was run, when, and the command that runs it again."""
    runs = data["runs"]
    lost = sum(results.diverged(run) for run in runs)
    if len(runs) == 1:
        words = f"{runs[0]['rule']} on {runs[0]['net']}, width {runs[0]['width']}, seed {runs[0]['seed']}"
        words += "; the run diverged" if lost else ""
    else:
        counts = {word: len({run[word] for run in runs}) for word in ("rule", "net", "width", "seed")}
        parts = [f"{count} {word}{'s' * (count > 1)}" for word, count in counts.items()]
        lines = results.series(runs)
        parts += [f"{len({line.options[name] for line in lines})} values of {name}" for name in lines[0].options]
        words = ", ".join(parts)
        words += f": {len(runs)} runs" + (f", {lost} of them diverged" if lost else "")
    words += f"; {results.duration(sum(finite(run.get('seconds')) or 0.0 for run in runs))} of training"
    sets = dict.fromkeys(run["data"] for run in runs if run.get("data"))
    notes = [words + (f" on {', '.join(sets)}." if sets else ".")]
    failed = [f"{run['name']}: {run['failed']}" for run in runs if run.get("failed")]
    notes += failed[:3] + ([f"{len(failed) - 3} more failed."] if len(failed) > 3 else [])
    skipped = max(run.get("skipped") or 0 for run in runs)
    notes += [f"Left out because they could not be decoded: {skipped:,} examples."] if skipped else []
    return (
        "".join(f"<p>{escape(note)}</p>\n" for note in notes)
        + f'<p class="quiet">Made {escape(data["created"])} by</p>\n'
        f'<pre class="box" tabindex="0" aria-label="command"><code>{escape(data["command"])}</code></pre>'
    )


def _figure(data: Result, name: str, svg: str) -> str:
    """A figure in a box of its own that scrolls sideways before its text gets too small to read."""
    plot = figures.PLOTS[name]
    size = re.search(r'width="([\d.]+)pt" height="[\d.]+pt"', svg)
    if size:
        pixels = float(size[1]) * 96 / 72
        label = escape(f"{plot.title}. {plot.caption}")
        limits = f"max-width:{1.15 * pixels:.0f}px;min-width:{0.8 * pixels:.0f}px"
        svg = svg.replace(size[0], f'role="img" aria-label="{label}" style="{limits}"', 1)
    several = len({run["seed"] for run in data["runs"]}) > 1
    caption = escape(plot.caption) + (" Mean and standard deviation over seeds." if several else "")
    if several and name != "step_time" and any(results.diverged(run) for run in data["runs"]):
        caption += " Seeds that diverged are left out where others finished."
    caption += " Bars stand a little apart, not to hide each other." if several and name.endswith("_width") else ""
    box = f'<div class="box" tabindex="0" role="group" aria-label="{escape(plot.title)}">{svg.strip()}</div>'
    return f'<figure id="{name}">\n{box}\n<figcaption>{caption}</figcaption>\n</figure>'


def _gallery(drawn: dict[str, str], names: Sequence[str], columns: int) -> str:
    """The figures that exist among those named, in pairs where they are of one panel."""
    found = "\n".join(drawn[name] for name in names if name in drawn)
    return f'<div class="pair">\n{found}\n</div>' if found and columns == 1 else found


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, text: Sequence[str] = (), kind: str = ""
) -> str:
    """A table of HTML cells in a box that scrolls sideways; rows begin with a heading; `text`: columns of words."""
    classes = [' class="text"' if name in text else "" for name in head]
    top = "".join(f'<th scope="col"{css}>{name}</th>' for name, css in zip(head, classes, strict=True))
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td{css}>{cell}</td>" for cell, css in zip(rest, classes[1:], strict=True))
        lines.append(f'<tr><th scope="row">{first}</th>{cells}</tr>\n')
    table = f'<table class="{kind}">\n<thead><tr>{top}</tr></thead>\n<tbody>\n{"".join(lines)}</tbody>\n</table>'
    # The caption stays outside the box: it must not widen with the table and scroll out of sight.
    box = f'<div class="box" tabindex="0" role="group" aria-label="table">{table}</div>\n'
    return f'<p class="quiet">{caption}</p>\n{box}'


def _name(name: str) -> str:
    """A name that may break into lines at its underscores."""
    return escape(name).replace("_", "_<wbr>")


def _measures(run: Run) -> dict[str, str]:
    """How a run went, as a table's headings and cells: those that it has."""
    best, step, seconds = run.get("best") or {}, finite(run.get("seconds_per_step")), finite(run.get("seconds"))
    reached = finite(best.get("accuracy"))
    measures = {
        "test accuracy (%)": _percent(run, "test"),
        "top-5 (%)": _percent(run, "test", "top5"),
        "validation (%)": _percent(run, "validation"),
        "training (%)": _percent(run, "train"),
        f"best {best.get('split')} (%)": reached and f"{100 * reached:.1f} (epoch {best.get('epoch')})",
        "test loss": _loss(run, "test"),
        "training loss": _loss(run, "train"),
        "ms per step": step and results.significant(1000 * step),
        "time": seconds and results.duration(seconds),
        "parameters": f"{run['parameters']:,}",
        "epochs": f"{run['epochs']:,}",
        "steps": f"{run['steps']:,}",
        "batch size": f"{run['batch']:,}",
    }
    return {escape(name): escape(str(words)) for name, words in measures.items() if words}


def _tiles(run: Run) -> str:
    items = "".join(f"<div><dt>{name}</dt><dd>{words}</dd></div>" for name, words in _measures(run).items())
    return f'<dl class="tiles">{items}</dl>'


def _accuracy_table(runs: Sequence[Run]) -> str:
    lines, found = results.series(runs), results.widths(runs)
    cells = [own for line in lines for width in found if (own := line.at(width))]
    seeds = [len({run["seed"] for run in own}) for own in cells]
    caption = "Test accuracy (%) at the end of training"
    if max(seeds) > 1:
        number = f"{max(seeds)}" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
        caption += f", mean ± sample standard deviation over {number} seeds"
    caption += "."
    if any(line.base for line in lines):
        caption += " Below it, smaller: the gap to backprop at the same width and options, in percentage points."
    if seeds != [len(own) for own in cells]:
        caption += " Some cells average over several runs of the same seed."
    rows = []
    for line, look in theme.looks(lines).items():
        swatch = f'<i style="background:var(--{look.color})"></i>'
        row = [f'<span class="key">{swatch}<span>{_name(line.label)}</span></span>']
        for value, gap, lost in (_accuracy_words(line, width) for width in found):
            shown = "–" if value == "-" else value.replace("±", "± ")
            below = "<br>".join(words for words in (gap.replace("-", "&minus;"), lost) if words)
            row.append(shown + (f"<small>{below}</small>" if below else ""))
        rows.append(row)
    return _table(["rule", *(f"width {width}" for width in found)], rows, caption)


def _runs_table(runs: Sequence[Run], path: Path) -> str:
    """One row a run; a column in which all runs agree becomes a part of the caption."""
    rows = []
    for line in results.series(runs):
        options = {_name(option): escape(value) for option, value in line.options.items()}
        for run in line.runs:
            names = {key: _name(str(run[key])) for key in ("rule", "net", "width", "seed")}
            rows.append({"run": _link(run, path), **names, **options, **_measures(run)})
    head = dict.fromkeys(key for row in rows for key in row)
    columns = {key: [row.get(key, "–") for row in rows] for key in head}
    if set(columns.get("top-5 (%)", [])) <= {"–", "diverged", "100.0"}:
        columns.pop("top-5 (%)", None)  # with five classes or fewer it is no news
    settings = ("net", "width", "seed", "parameters", "epochs", "steps", "batch size")
    common = {key: columns.pop(key)[0] for key in settings if len(set(columns[key])) == 1}
    shared = ", ".join(f"{key} {value}" for key, value in common.items())
    caption = f"The same in all runs: {shared}. " if shared else ""
    caption += "A linked name leads to the run's own report." if any("<a " in row["run"] for row in rows) else ""
    return _table(list(columns), list(zip(*columns.values(), strict=True)), caption, ("rule", "net"), "dense")


def _link(run: Run, path: Path) -> str:
    """A run's name, linked to its report if its folder, as seen from the page, holds one."""
    page = path.parent / run["folder"] / "report.html"
    if not page.is_file() or page.resolve() == path.resolve():
        return _name(run["name"])
    target = os.path.relpath(page.resolve(), path.parent.resolve())
    return f'<a href="{escape(quote(target))}">{_name(run["name"])}</a>'


def _differences(runs: Sequence[Run]) -> str:
    rows = []
    for option, values in results.differences(runs).items():
        for index, value in enumerate(dict.fromkeys(values)):
            its = [run for run, own in zip(runs, values, strict=True) if own == value]
            name = f"<code>{_name(option)}</code>" if index == 0 else ""
            rows.append([name, f"<code>{escape(value)}</code>", _name(_whose(its, runs))])
    if not rows:
        return "<p>None but rule, net, width and seed.</p>"
    return _table(["option", "value", "runs"], rows, "Beside rule, net, width and seed.", ("value", "runs"))


def _whose(its: Sequence[Run], runs: Sequence[Run]) -> str:
    """Names some of the runs in words: by what they share if that picks out just them, else by name or number."""
    for key in ("rule", "net", "width", "seed"):
        shared = {run[key] for run in its}
        if sum(run[key] in shared for run in runs) == len(its):
            return f"{key} " + ", ".join(str(value) for value in sorted(shared))
    return ", ".join(run["name"] for run in its) if len(its) <= 4 else f"{len(its)} of {len(runs)} runs"


def _groups(options: dict[str, object]) -> str:
    """Nested options as short lists, one for each of the outer names; those that have no outer name come first."""
    groups: dict[str, dict[str, object]] = {"": {k: v for k, v in options.items() if not isinstance(v, dict)}}
    groups |= {key: results.flatten(value) for key, value in options.items() if isinstance(value, dict)}
    parts = []
    for title, group in groups.items():
        terms = "".join(
            f"<dt>{escape(key.replace('memory_gib', 'memory (GiB)'))}</dt><dd>{escape(results.option_text(value))}</dd>"
            for key, value in group.items()
        )
        heading = f"<h3>{escape(title)}</h3>" if title else ""
        parts.append(f'<div class="group">{heading}<dl>{terms}</dl></div>\n' if terms else "")
    return f'<div class="groups">\n{"".join(parts)}</div>' if any(parts) else ""


def _numbers(data: Result, json_name: str) -> str:
    return (
        f'<p>All of this page was drawn from <a href="{escape(quote(json_name))}">{escape(json_name)}</a>.</p>\n'
        f'<pre class="box" tabindex="0" aria-label="the result as text"><code>{escape(text_table(data))}</code></pre>'
    )


def _percent(run: Run, split: str, key: str = "accuracy") -> str:
    reached = results.accuracy(run, split, key)
    return _missing(run, split, key) if reached is None else f"{reached:.1f}"


def _loss(run: Run, split: str) -> str:
    value = finite(run[split].get("loss"))
    return _missing(run, split, "loss") if value is None else f"{value:#.3g}".rstrip(".")


def _missing(run: Run, split: str, key: str) -> str:
    """What stands in the place of a number that a run has not: nothing, if it was not measured."""
    return "diverged" if results.diverged(run) and key in (run.get(split) or {}) else ""
