"""Claims about the report of a result: its page, its figures, its table as text, and what it does with odd results."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from _report import figures, series, theme
from _report import page as report
from result_cases import RULES, comparison, diverge, make_result, make_run, measure_more, set_option


def html_of(data: dict[str, Any], folder: Path) -> str:
    report.write_report(data, folder / "page.html")
    return (folder / "page.html").read_text(encoding="utf-8")


def test_text_table_is_rules_by_widths_with_the_gap_to_backprop() -> None:
    runs = [make_run("backprop", 8), make_run("align_ada", 8), make_run("align_ada", 32)]
    for run, accuracy in zip(runs, [0.972, 0.969, 0.98], strict=True):
        run["test"]["accuracy"] = accuracy
    lines = report.text_table(make_result(runs)).splitlines()
    assert lines[0].split("  ")[-1] == "width 32"
    assert [line.split() for line in lines[1:3]] == [["backprop", "97.2", "-"], ["align_ada", "96.9", "(-0.3)", "98.0"]]
    assert lines[1].index("97.2") == lines[2].index("96.9") == lines[0].index("width 8")


def test_several_seeds_give_mean_and_sample_deviation_and_the_gap_is_between_means() -> None:
    runs = [make_run(rule, 8, seed) for rule in ("backprop", "align_ada") for seed in (0, 1)]
    for run, accuracy in zip(runs, [0.96, 0.98, 0.95, 0.96], strict=True):
        run["test"]["accuracy"] = accuracy
    assert "95.5 ±0.7 (-1.5)" in report.text_table(make_result(runs))
    gap = series.series_of(runs)[1].gap(8)
    assert gap.mean == pytest.approx(-1.5)
    assert gap.std == pytest.approx(math.sqrt(0.5))  # of the differences -1 and -2, seed by seed


def test_runs_that_differ_in_an_option_are_averaged_over_seeds_alone(tmp_path: Path) -> None:
    grid = [(rule, lr, seed) for rule in ("backprop", "align_ada") for lr in (0.5, 5.0) for seed in (0, 1)]
    runs = [set_option(make_run(rule, 8, seed), "optim", "lr", lr) for rule, lr, seed in grid]
    for run, accuracy in zip(runs, [0.90, 0.92, 0.96, 0.98, 0.80, 0.82, 0.95, 0.96], strict=True):
        run["test"]["accuracy"] = accuracy
    html, lines = html_of(make_result(runs), tmp_path), report.text_table(make_result(runs)).splitlines()
    assert [re.split("  +", line) for line in lines[1:5]] == [
        ["backprop, optim.lr=0.5", "91.0 ±1.4"],
        ["backprop, optim.lr=5.0", "97.0 ±1.4"],
        ["align_ada, optim.lr=0.5", "81.0 ±1.4 (-10.0)"],  # to backprop at the same learning rate
        ["align_ada, optim.lr=5.0", "95.5 ±0.7 (-1.5)"],
    ]
    assert "1 width, 2 seeds, 2 values of optim.lr: 8 runs" in html
    assert "over 2 seeds." in html
    assert len(set(re.findall(r'<i style="background:([^"]+)"', html))) == 4
    labels = figures.figures(make_result(runs))["test_accuracy"]
    assert all(f">{line.label}<" in labels for line in series.series_of(runs))


def test_of_options_that_differ_only_those_that_part_the_runs_of_a_cell_make_series() -> None:
    runs = [make_run(rule, width, seed) for rule in RULES[:2] for width in (8, 32) for seed in (0, 1)]
    for number, run in enumerate(runs):
        inert = {"run": {"dir": f"runs/{number}"}, "threads": number, "log": {"progress": number % 2 == 0}}
        run["config"] |= inert | {"checkpoint": {"keep": number}, "optim": {"lr": 1.0 / run["width"]}}
    assert {"optim.lr", "threads"} <= set(series.differences(runs))
    assert [line.label for line in series.series_of(runs)] == ["backprop", "align_ada"]
    assert [len(line.at(8)) for line in series.series_of(runs)] == [2, 2]


def test_two_options_that_differ_together_are_one_difference() -> None:
    runs = [set_option(make_run(seed=seed), "optim", "name", name) for name in ("sgd", "adam") for seed in (0, 1)]
    runs = [set_option(run, "optim", "lr", len(run["config"]["optim"]["name"])) for run in runs]
    assert [line.label for line in series.series_of(runs)] == [
        "align_ada, optim.name=sgd",
        "align_ada, optim.name=adam",
    ]


def test_there_is_no_gap_to_backprop_with_other_options() -> None:
    runs = [
        set_option(make_run("align_ada", width), "data", "train_limit", n) for width in (8, 32) for n in (100, 1000)
    ]
    runs += [set_option(make_run("backprop", width), "data", "train_limit", 1000) for width in (8, 32)]
    backprop, small, whole = series.series_of(runs)
    assert (backprop.label, small.label) == ("backprop", "align_ada, data.train_limit=100")
    assert (backprop.base, small.base, whole.base) == (None, None, backprop)
    assert f">{small.label}<" not in figures.figures(make_result(runs))["gap_width"]
    assert f">{whole.label}<" in figures.figures(make_result(runs))["gap_width"]


def test_the_text_table_is_aligned_whatever_is_in_it() -> None:
    runs = comparison(widths=(8, 128, 1024), seeds=2)["runs"]
    runs += [set_option(run, "optim", "lr", 0.125) for run in runs if run["rule"] == "align_ada"]
    runs = [diverge(run) if run["seed"] == 0 and run["width"] == 8 else run for run in runs]
    lines = report.text_table(make_result(runs)).splitlines()[:-1]
    starts = [[match.start() for match in re.finditer(r"(?<=  )\S", line)] for line in lines]
    assert len(lines) == 8
    assert all(start == starts[0] for start in starts)


def test_a_run_shows_what_it_measured_and_no_more(tmp_path: Path) -> None:
    tiles = ["top-5 (%)</dt><dd>99.1", "validation (%)</dt><dd>95.2", "best validation (%)</dt><dd>96.3 (epoch 7)"]
    html, plain = (html_of(make_result([run]), tmp_path) for run in (measure_more(make_run()), make_run()))
    assert all(tile in html for tile in tiles)
    assert "Left out because they could not be decoded: 17 examples." in html
    assert "of training on digits." in html
    assert not any(word in plain for word in ("top-5", "validation", "best", "decoded"))


def test_a_comparison_has_a_column_for_what_some_run_measured(tmp_path: Path) -> None:
    plain, full = make_run("backprop"), measure_more(make_run())
    columns = ["top-5 (%)", "validation (%)", "training (%)", "best validation (%)"]
    html = html_of(make_result([plain, full]), tmp_path)
    assert all(f">{column}</th>" in html for column in columns)
    assert "None" not in html
    full["test"]["top5"] = 1.0  # as with five classes or fewer
    assert "top-5" not in html_of(make_result([plain, full]), tmp_path)
    assert not any(f">{column}</th>" in html_of(comparison(rules=RULES[:2]), tmp_path) for column in columns)


def test_where_a_run_failed_is_said_at_the_top(tmp_path: Path) -> None:
    failed = diverge(make_run()) | {"failed": "the loss is not finite at step 98, first in layer 2 <of 4>"}
    for runs in ([failed], [make_run("backprop"), failed]):
        lead = html_of(make_result(runs), tmp_path).split("</header>")[0]
        assert "diverged" in lead
        assert "align_ada-32-0: the loss is not finite at step 98, first in layer 2 &lt;of 4&gt;" in lead


def test_backprop_is_one_line_of_the_cosines_though_its_own_are_recorded() -> None:
    runs = [set_option(make_run(rule), "optim", "lr", lr) for rule in RULES[:2] for lr in (0.5, 5.0)]
    for run in runs[:2]:
        for point in run["curve"]:
            point["update_cosine"] = 1.0
    words = re.findall(r">([^<>]+)</text>", figures.figures(make_result(runs))["update_cosine"])
    assert [word for word in words if "=" in word or word in RULES] == [
        "backprop", "align_ada, optim.lr=0.5", "align_ada, optim.lr=5.0",
    ]  # fmt: skip


def test_the_learning_rate_is_drawn_where_it_changes() -> None:
    run = measure_more(make_run())
    assert {"learning_rate", "validation_accuracy"} <= set(figures.figure_names(make_result([run])))
    for point in run["curve"]:
        point["lr"] = 5.0
    assert "learning_rate" not in figures.figure_names(make_result([run]))


def test_diverged_runs_are_named_and_left_out_of_means(tmp_path: Path) -> None:
    data = comparison(widths=(8, 32), seeds=2)
    data["runs"] = [
        diverge(run) if run["width"] == 8 and (run["rule"] == "align_zero" or run["name"] == "align_ada-8-1") else run
        for run in data["runs"]
    ]
    html = html_of(data, tmp_path)
    assert "1 of 2 diverged" in html
    assert ">diverged</td>" in html
    assert not re.search(r">[^<]*\b(nan|inf|none)\b", html.split("</style>", 1)[1], re.IGNORECASE)


@pytest.mark.parametrize("count", [1, 2])
def test_a_result_in_which_all_diverged_still_has_its_page(tmp_path: Path, count: int) -> None:
    runs = [diverge(make_run("align_ada", width)) for width in (8, 32)[:count]]
    for run in runs:
        run["curve"] = []
        run["seconds_per_step"] = None
    html = html_of(make_result(runs), tmp_path)
    assert "diverged" in html
    assert "<svg" not in html


def test_a_rule_without_backprop_in_the_set_has_no_gap(tmp_path: Path) -> None:
    data = comparison(rules=["align_ada", "readout_only"])
    assert "gap_width" not in figures.figure_names(data)
    assert "(" not in report.text_table(data)
    assert "gap to backprop" not in html_of(data, tmp_path)


def test_figures_over_width_need_two_widths() -> None:
    over_width = {"accuracy_width", "gap_width"}
    assert over_width <= set(figures.figure_names(comparison(rules=RULES[:2])))
    assert not over_width & set(figures.figure_names(comparison(widths=(32,), rules=RULES[:2])))


def test_gaps_are_to_backprop_on_the_same_net() -> None:
    runs = [make_run(rule) | {"net": net} for net in ("conv3", "mlp") for rule in ("backprop", "align_ada")]
    for run, accuracy in zip(runs, [0.90, 0.89, 0.80, 0.78], strict=True):
        run["test"] = {"accuracy": accuracy, "loss": 0.1}
    table = report.text_table(make_result(runs))
    assert re.search(r"align_ada \(conv3\) +89.0 \(-1.0\)", table)
    assert re.search(r"align_ada \(mlp\) +78.0 \(-2.0\)", table)


def test_every_rule_known_or_not_looks_different() -> None:
    lines = [series.Series(rule, "conv3", rule) for rule in [*list(theme.LOOKS)[1:], "a_rule_of_my_own"]]
    looks = list(theme.looks(lines).values())
    assert len({look.marker for look in looks}) == len({look.color for look in looks}) == len(lines)


def test_no_two_series_look_the_same_when_the_colours_are_used_up() -> None:
    runs = [set_option(make_run() | {"rule": rule}, "optim", "lr", lr) for rule in theme.LOOKS for lr in (1, 2, 3, 4)]
    looks = theme.looks(series.series_of(runs))
    assert len(set(looks.values())) == len(runs) == 32
    assert all(theme.LOOKS[line.rule] == look for line, look in looks.items() if line.label.endswith("=1"))


def test_options_that_differ_are_listed_with_whose_they_are(tmp_path: Path) -> None:
    data = comparison(rules=["backprop", "align_ada"], widths=(8, 32))
    assert list(series.differences(data["runs"])) == ["frozen.weights"]
    row = re.search(r"<td[^>]*><code>stored</code></td><td[^>]*>(.*?)</td>", html_of(data, tmp_path))
    assert row
    assert row[1] == "rule align_<wbr>ada"


def test_everything_from_the_result_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>&\"'"
    run = make_run() | {"name": evil, "rule": evil, "net": evil, "folder": evil}
    run["config"][evil] = {evil: evil}
    data = make_result([run, make_run("backprop")], title=evil) | {"created": evil, "command": evil}
    data |= {"hardware": {evil: evil}, "versions": {evil: evil}, "config": {evil: evil}}
    assert "<script" not in html_of(data, tmp_path)
    assert "<script" not in html_of(data | {"runs": [run]}, tmp_path)


def test_a_page_needs_nothing_but_itself_and_is_the_same_again(tmp_path: Path) -> None:
    data = comparison(widths=(8, 32), seeds=2, rules=RULES[:3])
    html = html_of(data, tmp_path)
    assert html == html_of(json.loads(json.dumps(data)), tmp_path)
    assert not re.search(r'(src=|@import|url\((?!#)|href="(?!data:,|#|result\.json))', html)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', html)) <= set(ids)
    assert not any(color in html for color in theme.SENTINELS.values())
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_importing_the_report_does_not_import_matplotlib() -> None:
    code = "import sys; sys.path.append('launch'); import _report.page; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[1]).returncode == 0


def test_options_that_change_rounding_alone_set_no_runs_apart() -> None:
    runs = [make_run(seed=seed) for seed in (0, 1)]
    for run, device in zip(runs, ("cpu", "auto"), strict=True):
        run["config"] |= {"device": device, "engine": {"name": "local" if device == "cpu" else "deepspeed"}}
    assert [len(line.at(32)) for line in series.series_of(runs)] == [2]
