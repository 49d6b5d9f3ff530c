"""The report of a run or of a comparison: one HTML page that needs nothing else, and its main table for the terminal.

The page is drawn from a result (see `alignscale.results`) alone, so it can be drawn again from the JSON beside it. It holds
its figures as inline SVG and its style inline; no script, no font, no network. The same JSON gives the same bytes.

Stands alone because it is the only file that writes HTML.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from alignscale import figures, results
from alignscale.results import Result, Run, Series, finite

STYLE = """
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:62rem;margin:0 auto;padding:2.2rem 1.2rem 3rem}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.6rem 0 .6rem;padding-top:.9rem;border-top:1px solid var(--grid)}
h3{font-size:.95rem;margin:0 0 .3rem}
p{margin:.4rem 0;max-width:46rem}
a{color:var(--link);text-underline-offset:.15em}
a:focus-visible,.box:focus-visible,summary:focus-visible{outline:2px solid var(--link);outline-offset:2px}
.quiet,figcaption,caption,th,dt{color:var(--muted)}
.quiet,figcaption,caption{font-size:.875rem}
code,pre{font-family:ui-monospace,"SF Mono",Menlo,Consolas,monospace;font-size:.84rem}
.box{overflow-x:auto;max-width:100%}
pre.box{background:var(--panel);border:1px solid var(--grid);border-radius:6px;padding:.6rem .8rem;margin:.6rem 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem}
caption{text-align:left;padding:0 0 .5rem;max-width:46rem}
th,td{padding:.36rem .8rem;text-align:right;white-space:nowrap;vertical-align:top}
th{font-weight:600}
thead th{border-top:2px solid var(--ink);border-bottom:1px solid var(--ink)}
tbody tr:last-child>*{border-bottom:2px solid var(--ink)}
tbody tr+tr>*{border-top:1px solid var(--grid)}
th:first-child,td.text,th.text{text-align:left}
tbody th{color:var(--ink);position:sticky;left:0;background:var(--paper)}
td.text{white-space:normal;min-width:9rem;overflow-wrap:anywhere}
td small{display:block;color:var(--muted);font-size:.8rem;line-height:1.25}
.swatch{display:inline-block;width:.7em;height:.7em;border-radius:2px;margin-right:.5em}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1.6rem 2rem;align-items:start}
figure{margin:1.4rem 0 0;min-width:0}
figure svg{display:block;width:100%;height:auto}
figure svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif!important}
figcaption{margin-top:.3rem;max-width:46rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.2rem,1fr));gap:1rem 1.4rem;margin:1.2rem 0 0}
.tiles dd{font-size:1.3rem;font-weight:600;font-variant-numeric:tabular-nums}
dl{margin:0}
dd{margin:0}
dt{font-size:.875rem}
.groups{columns:19rem;column-gap:2.2rem;margin-top:1rem}
.group{break-inside:avoid;margin-bottom:1.2rem}
.group dl{display:grid;grid-template-columns:minmax(6rem,auto) 1fr;gap:.1rem .9rem}
.group dd{overflow-wrap:anywhere;font-size:.9rem}
summary{cursor:pointer;color:var(--link);margin:.6rem 0}
@media (max-width:36rem){main{padding:1.3rem 1rem 2rem}th,td{padding:.36rem .55rem}}
@media print{main{max-width:none}.box{overflow:visible}figure,tr{break-inside:avoid}}
"""


def text_table(data: Result) -> str:
    """Test accuracy in percent over widths as aligned plain text, each cell with its gap to backprop: "97.2 (-0.3)"."""
    runs = data["runs"]
    found = results.widths(runs)
    rows = [["test accuracy, %", *(f"width {width}" for width in found)]]
    for line in results.series(runs):
        row = [line.label]
        for width in found:
            value, gap = _accuracy_words(runs, line, width)
            row.append(f"{value} ({gap})" if gap else value)
        rows.append(row)
    columns = [max(len(row[column]) for row in rows) for column in range(len(found) + 1)]
    table = "\n".join("  ".join(text.ljust(size) for text, size in zip(row, columns, strict=True)).rstrip() for row in rows)
    if any(line.rule == "backprop" for line in results.series(runs)) and "(" in table:
        table += "\n(in brackets: gap to backprop at the same width, percentage points)"
    return table


def _accuracy_words(runs: Sequence[Run], line: Series, width: int) -> tuple[str, str]:
    """A cell's accuracy over seeds and its gap to backprop, both as ASCII but for the plus-minus; empty where there is none."""
    own = results.cell(runs, line, width)
    accuracy, gap = results.accuracies(runs, line, width), results.gap(runs, line, width)
    lost = sum(results.diverged(run) for run in own)
    if accuracy.mean is None:
        return "diverged" if lost else "-", ""
    words = f"{accuracy.mean:.1f}" + ("" if accuracy.std is None else f" ±{accuracy.std:.1f}")
    words += f" [{lost} of {len(own)} diverged]" if lost else ""
    return words, "" if gap.mean is None else f"{gap.mean:+.1f}".replace("-0.0", "0.0").replace("+0.0", "0.0")


def write_report(data: Result, path: Path, json_name: str | None = None) -> None:
    """Write the page of a result; two runs or more make a comparison.

    Args:
        data: a result of format 1.
        path: the page's file, replaced in one step.
        json_name: the name, in the same folder, of the JSON that holds `data`; without it the page's own name with `.json`.
    """
    page = _page(data, path, json_name or f"{path.stem}.json")
    results.write_atomic(path, page.encode())


def _page(data: Result, path: Path, json_name: str) -> str:
    light, dark = ("".join(f"--{role}:{color};" for role, color in one.items()) for one in (figures.LIGHT, figures.DARK))
    theme = f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    runs, title = data["runs"], escape(data["title"])
    drawn = {name: _figure(data, name, svg) for name, svg in figures.figures(data, themed=True).items()}
    if len(runs) == 1:
        sections = [
            _section("Result", _tiles(runs[0])),
            _section("Training", _gallery(drawn, ["test_accuracy", "train_loss", "test_loss", "update_cosine"], 1)),
            _section("Options", _groups(runs[0]["config"])),
        ]
    else:
        columns = len(results.widths(runs))
        sections = [
            _section("Result", _accuracy_table(runs) + _gallery(drawn, ["accuracy_width", "gap_width"], 1)),
            _section("Training", _gallery(drawn, ["test_accuracy", "train_loss"], columns)),
            _section("Direction of the updates", _gallery(drawn, ["update_cosine"], columns)),
            _section("Cost", _gallery(drawn, ["step_time"], columns)),
            _section("Runs", _runs_table(runs, path)),
            _section("Options that differ between runs", _differences(runs)),
            _section("Options common to all runs", _groups(data["config"])),
        ]
    sections.append(_section("Machine and versions", _groups({"machine": data["hardware"], "versions": data["versions"]})))
    sections.append(_section("Numbers", _numbers(data, json_name)))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{title}</title>\n<style>{theme}{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header>\n<h1>{title}</h1>\n{_lead(data)}\n</header>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>\n" if content else ""


def _lead(data: Result) -> str:
    """What was run, when, and the command that runs it again."""
    runs = data["runs"]
    lost = sum(results.diverged(run) for run in runs)
    if len(runs) == 1:
        words = f"{runs[0]['rule']} on {runs[0]['net']}, width {runs[0]['width']}, seed {runs[0]['seed']}"
        words += "; the run diverged" if lost else ""
    else:
        counts = {word: len({run[word] for run in runs}) for word in ("rule", "net", "width", "seed")}
        words = ", ".join(f"{count} {word}{'s' * (count > 1)}" for word, count in counts.items())
        words += f": {len(runs)} runs" + (f", {lost} of them diverged" if lost else "")
    total = _duration(sum(finite(run.get("seconds")) or 0.0 for run in runs))
    return (
        f'<p>{escape(words)}; {total} of training.</p>\n<p class="quiet">Made {escape(data["created"])} by</p>\n'
        f'<pre class="box" tabindex="0" aria-label="command"><code>{escape(data["command"])}</code></pre>'
    )


def _figure(data: Result, name: str, svg: str) -> str:
    """A figure in a box of its own that scrolls sideways before its text gets too small to read."""
    plot, size = figures.PLOTS[name], re.search(r'<svg [^>]*?width="([\d.]+)pt" height="[\d.]+pt"', svg)
    width = float(size[1]) * 96 / 72 if size else 0.0
    shape = f'role="img" aria-label="{escape(plot.caption)}" style="max-width:{1.24 * width:.0f}px;min-width:{0.8 * width:.0f}px"'
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', shape, svg, count=1)
    seeds = len({run["seed"] for run in data["runs"]})
    caption = plot.caption + (f" Mean and standard deviation over {seeds} seeds." if seeds > 1 else "")
    box = f'<div class="box" tabindex="0" role="group" aria-label="{plot.title}">{svg.strip()}</div>'
    return f'<figure id="{name}">\n{box}\n<figcaption>{caption}</figcaption>\n</figure>'


def _gallery(drawn: dict[str, str], names: Sequence[str], columns: int) -> str:
    """The figures that exist among those named, in pairs where they are of one panel."""
    found = "\n".join(drawn[name] for name in names if name in drawn)
    return f'<div class="pair">\n{found}\n</div>' if found and columns == 1 else found


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, text: Sequence[int] = ()) -> str:
    """A table in a box that scrolls sideways; cells are HTML, the first of a row its heading, `text` the columns of words."""
    kind = ['class="text"' if index in text else "" for index in range(len(head))]
    top = "".join(f'<th scope="col" {kind[index]}>{cell}</th>' for index, cell in enumerate(head))
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f"<td {kind[index]}>{cell}</td>" for index, cell in enumerate(row) if index)
        + "</tr>\n"
        for row in rows
    )
    table = f"<table>\n<caption>{caption}</caption>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
    return f'<div class="box" tabindex="0" role="group" aria-label="table">{table}</div>\n'


def _tiles(run: Run) -> str:
    step = finite(run.get("seconds_per_step"))
    tiles = {
        "test accuracy": _end_accuracy(run, " %"),
        "test loss": _end_loss(run, "test"),
        "training loss": _end_loss(run, "train"),
        "time per step": "–" if step is None else f"{results.significant(1000 * step)} ms",
        "steps": f"{run['steps']:,}",
        "epochs": f"{run['epochs']:,}",
        "batch size": f"{run['batch']:,}",
        "parameters": f"{run['parameters']:,}",
    }
    return f'<dl class="tiles">{"".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles.items())}</dl>'


def _accuracy_table(runs: Sequence[Run]) -> str:
    lines, found, seeds = results.series(runs), results.widths(runs), len({run["seed"] for run in runs})
    caption = "Test accuracy (%) at the end of training"
    caption += f", mean ± sample standard deviation over {seeds} seeds." if seeds > 1 else "."
    if any(results.reference(runs, line) for line in lines):
        caption += " Below it, smaller: the gap to backprop at the same width, in percentage points."
    cells = (results.cell(runs, line, width) for line in lines for width in found)
    if any(len({run["seed"] for run in own}) < len(own) for own in cells):
        caption += " Some cells average over runs that differ in more than the seed: see the options that differ."
    rows = []
    for line, look in figures.looks(lines).items():
        row = [f'<i class="swatch" style="background:var(--{look.color})"></i>{escape(line.label)}']
        for value, gap in (_accuracy_words(runs, line, width) for width in found):
            shown = "–" if value == "-" else escape(value.replace("±", "± "))
            row.append(shown + (f"<small>{gap.replace('-', '−')}</small>" if gap else ""))
        rows.append(row)
    return _table(["rule", *(f"width {width}" for width in found)], rows, caption)


def _runs_table(runs: Sequence[Run], path: Path) -> str:
    head = ["run", "rule", "net", "width", "seed", "parameters", "epochs", "steps", "batch", "test accuracy (%)",
            "test loss", "training loss", "ms per step", "time"]  # fmt: skip
    rows = []
    for run in runs:
        step, seconds = finite(run.get("seconds_per_step")), finite(run.get("seconds"))
        counts = (f"{run[key]:,}" for key in ("parameters", "epochs", "steps", "batch"))
        rows.append([
            _link(run, path), escape(run["rule"]), escape(run["net"]), str(run["width"]), str(run["seed"]), *counts,
            _end_accuracy(run), _end_loss(run, "test"), _end_loss(run, "train"),
            "–" if step is None else results.significant(1000 * step), "–" if seconds is None else _duration(seconds),
        ])  # fmt: skip
    return _table(head, rows, "A run's name leads to its own report, where that is on this disk.", text=(1, 2))


def _link(run: Run, path: Path) -> str:
    """A run's name, linked to its report if its folder (as seen from the page, or from here) holds one."""
    for page in (path.parent / run["folder"] / "report.html", Path(run["folder"]) / "report.html"):
        if page.is_file() and page.resolve() != path.resolve():
            target = os.path.relpath(page.resolve(), path.parent.resolve())
            return f'<a href="{escape(quote(target))}">{escape(run["name"])}</a>'
    return escape(run["name"])


def _differences(runs: Sequence[Run]) -> str:
    rows = []
    for option, values in results.differences(runs).items():
        for index, (value, its) in enumerate(values.items()):
            name = f"<code>{escape(option)}</code>" if index == 0 else ""
            rows.append([name, f"<code>{escape(value)}</code>", escape(_whose(its, runs))])
    caption = "Beside rule, net, width and seed."
    return _table(["option", "value", "runs"], rows, caption, text=(1, 2)) if rows else "<p>None beside rule, net, width and seed.</p>"


def _whose(its: Sequence[Run], runs: Sequence[Run]) -> str:
    """Names some of the runs in words: by what they share if that picks out just them, else one by one."""
    for key in ("rule", "net", "width", "seed"):
        shared = {run[key] for run in its}
        if sum(run[key] in shared for run in runs) == len(its):
            return f"{key} " + ", ".join(str(value) for value in sorted(shared))
    names = [run["name"] for run in its]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


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


def _end_accuracy(run: Run, unit: str = "") -> str:
    accuracy = results.accuracy(run)
    if accuracy is None:
        return "diverged" if results.diverged(run) else "–"
    return f"{accuracy:.1f}{unit}"


def _end_loss(run: Run, part: str) -> str:
    value = finite(run[part].get("loss"))
    return "diverged" if value is None else f"{value:.4g}"


def _duration(seconds: float) -> str:
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{results.significant(seconds / size, 2)} {unit}"
    return f"{results.significant(seconds, 2)} s"
