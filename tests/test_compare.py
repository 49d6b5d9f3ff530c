"""Claims about grids of runs."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from _options import CompareConfig, GridConfig
from _report.claims import verdict
from _runs import compare, expand

from alignscale.choices import ConfigError, MLPConfig, OptimConfig, RuleConfig, SGDConfig, SyntheticConfig
from alignscale.config import LogConfig
from alignscale.results import read_result
from alignscale.rules.feedback import SignSymmetricConfig


def grid(folder: Path, rules: list[str], widths: list[int], optim: OptimConfig | None = None) -> GridConfig:
    return GridConfig(
        rule=RuleConfig(name="backprop"),
        net=MLPConfig(depth=2),
        data=SyntheticConfig(shape=[1, 3, 3], train=40, test=20, classes=3),
        optim=optim or SGDConfig(lr=0.5),
        epochs=1,
        batch_size=20,
        log=LogConfig(progress=False, tensorboard=False),
        compare=CompareConfig(rules=rules, widths=widths, seeds=[0], folder=str(folder)),
    )


def silent(line: str) -> None:
    """Swallow what a comparison shows."""


def test_compare_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    options = grid(tmp_path, ["backprop", "align_ada"], [4, 8])
    first = compare(options, "command", silent)
    folders = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    assert len(folders) == len(first["runs"]) == 4
    shutil.rmtree(folders[0])
    (tmp_path / "result.json").unlink()
    kept = {path: (path / "result.json").stat().st_mtime_ns for path in folders[1:]}
    second = compare(options, "command", silent)
    assert {path: (path / "result.json").stat().st_mtime_ns for path in folders[1:]} == kept
    assert [run["test"] for run in second["runs"]] == [run["test"] for run in first["runs"]]
    assert read_result(tmp_path / "result.json")["runs"] == json.loads(json.dumps(second["runs"]))


def test_compare_reports_a_diverged_run_and_goes_on(tmp_path: Path) -> None:
    lines: list[str] = []
    result = compare(grid(tmp_path, ["backprop", "readout_only"], [4], SGDConfig(lr=1e30)), "command", lines.append)
    assert any(line.startswith("diverged") for line in lines)
    assert [run["test"]["accuracy"] for run in result["runs"]] == [None, None]
    assert (tmp_path / "report.html").exists()


def test_every_run_has_its_folder_beside_the_report(tmp_path: Path) -> None:
    result = compare(grid(tmp_path, ["align_zero"], [4]), "command", silent)
    assert (tmp_path / result["runs"][0]["folder"] / "report.html").exists()


def test_a_page_that_was_deleted_is_drawn_again_and_a_moved_comparison_keeps_its_links(tmp_path: Path) -> None:
    compare(grid(tmp_path / "old", ["align_zero", "align_ada"], [4]), "command", silent)
    (tmp_path / "old").rename(tmp_path / "new")
    page = next((tmp_path / "new").glob("*/report.html"))
    page.unlink()
    result = compare(grid(tmp_path / "new", ["align_zero", "align_ada"], [4]), "command", silent)
    assert page.exists()
    assert result["runs"][0]["folder"] == page.parent.name
    assert f'href="{page.parent.name}/report.html"' in (tmp_path / "new/report.html").read_text()


def test_a_comparison_says_that_it_leaves_runs_of_another_out(tmp_path: Path) -> None:
    compare(grid(tmp_path, ["backprop"], [4, 8]), "command", silent)
    lines: list[str] = []
    compare(grid(tmp_path, ["backprop"], [4]), "command", lines.append)
    assert any(line.startswith("note: the report leaves out 1 runs") for line in lines)


def test_options_of_a_rule_reach_its_runs_and_others_keep_theirs(tmp_path: Path) -> None:
    options = grid(tmp_path, ["backprop", "sign_symmetric"], [4])
    options.rule = SignSymmetricConfig(magnitude="fixed")
    backprop, signs = expand(options)
    assert backprop.rule == RuleConfig(name="backprop")
    assert signs.rule == SignSymmetricConfig(magnitude="fixed")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rules": ["align"]}, "compare.rules: align: expected some of align_ada"),
        ({"widths": []}, r"compare.widths=\[\]: expected at least one value"),
        ({"widths": [4, 4]}, "each once"),
        ({"widths": [0]}, "net.width=0"),
        ({"folder": ""}, "compare.folder=: expected a folder"),
    ],
)
def test_wrong_grid_is_refused_before_any_work(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    options = grid(tmp_path / "grid", ["backprop"], [4])
    for name, value in changes.items():
        setattr(options.compare, name, value)
    with pytest.raises(ConfigError, match=message):
        compare(options, "command", silent)
    assert not (tmp_path / "grid").exists()


def test_an_experiment_varies_an_option_and_judges_the_claim(tmp_path: Path) -> None:
    options = grid(tmp_path, ["backprop", "align_ada", "align_zero"], [4])
    options.compare = replace(
        options.compare, option="data.train_limit", values=[30, 0], claim="low_data", protocol="unlike the other"
    )
    result = compare(options, "command", silent)
    assert [run["config"]["data"]["train_limit"] for run in result["runs"]] == [30, 30, 30, 0, 0, 0]
    page = (tmp_path / "report.html").read_text()
    assert 'id="accuracy_option"' in page
    assert "unlike the other" in page
    assert "Align rules are particularly advantageous with few data: " in str(verdict(result))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"option": "optim.lr"}, "expected both, or neither"),
        ({"option": "rule.name", "values": [1.0]}, "compare.option=rule.name: expected an option that is a number"),
        ({"option": "epochs", "values": [1.5]}, "expected whole numbers for epochs"),
        ({"option": "epochs", "values": [math.nan]}, "expected whole numbers for epochs"),
        ({"option": "threads", "values": [1.0, 2.0]}, "found the same run twice"),
        ({"option": "net.width", "values": [8.0]}, "expected compare.widths or compare.seeds in its place"),
        ({"claim": "magic"}, "compare.claim=magic: expected one of width, during_training"),
    ],
)
def test_a_wrong_experiment_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    options = grid(tmp_path / "grid", ["backprop"], [4])
    options.compare = replace(options.compare, **changes)
    with pytest.raises(ConfigError, match=message):
        compare(options, "command", silent)
    assert not (tmp_path / "grid").exists()


def made_up(accuracies: dict[tuple[str, int], float | None], claim: str) -> dict[str, Any]:
    """A result with one seed and these accuracies; None: the run diverged."""
    runs = [
        {"rule": rule, "width": width, "seed": 0, "net": "mlp", "name": "r", "folder": ".", "config": {},
         "test": {"accuracy": value, "loss": 1.0}, "train": {"loss": 1.0}, "curve": [], "seconds_per_step": 1.0}
        for (rule, width), value in accuracies.items()
    ]  # fmt: skip
    return {"runs": runs, "experiment": {"claim": claim, "option": "", "protocol": ""}}


@pytest.mark.parametrize(("wide", "holds"), [(0.79, True), (0.70, False)])
def test_a_verdict_follows_from_the_gap_at_the_widest_network(wide: float, holds: bool) -> None:
    rules = ("align_ada", "align_zero")
    numbers: dict[tuple[str, int], float | None] = {("backprop", 8): 0.6, ("backprop", 64): 0.8}
    numbers |= {(rule, width): {8: 0.4, 64: wide}[width] for rule in rules for width in (8, 64)}
    judged = verdict(made_up(numbers, "width"))
    assert judged is not None
    assert judged.holds is holds
    assert "align_ada -20.0 points at width 8" in judged.evidence


@pytest.mark.parametrize(("diverged", "holds"), [("align_zero", False), ("backprop", None)])
def test_a_rule_that_diverges_loses_and_without_backprop_there_is_no_verdict(diverged: str, holds: bool | None) -> None:
    numbers: dict[tuple[str, int], float | None] = {
        (rule, width): 0.8 for rule in ("backprop", "align_ada", "align_zero") for width in (8, 64)
    }
    judged = verdict(made_up(numbers | {(diverged, 64): None}, "width"))
    assert judged is not None
    assert judged.holds is holds
