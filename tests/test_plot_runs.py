"""Claims about tools/plot_runs.py, which draws what a report has again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from result_cases import RULES, comparison, make_result, make_run, write_page

from tools import plot_runs


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(tmp_path_factory.mktemp("comparison"))


def test_plot_runs_draws_the_whole_page_again(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(comparison(rules=RULES[:2])), encoding="utf-8")
    arguments = [str(tmp_path / "result.json"), "--format", "html", "--out", str(tmp_path / "again")]
    assert plot_runs.main(arguments) == 0
    page = (tmp_path / "again/report.html").read_text()
    assert all(f">{rule}<" in page for rule in RULES[:2])
    assert 'href="../result.json"' in page
    assert plot_runs.main([*arguments, "--figure", "test_accuracy"]) == 2


@pytest.mark.parametrize(("kind", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_plot_runs_redraws_a_figure_to_the_same_bytes(tmp_path: Path, kind: str, start: bytes) -> None:
    (tmp_path / "result.json").write_text(json.dumps(comparison(rules=RULES[:2])), encoding="utf-8")
    listing, drawn = tmp_path / "list.json", tmp_path / f"a/accuracy_width.{kind}"
    for folder in ("a", "b"):
        arguments = ["--figure", "accuracy_width", "--format", kind, "--out", str(tmp_path / folder)]
        assert plot_runs.main([str(tmp_path / "result.json"), *arguments, "--json", str(listing)]) == 0
    assert drawn.read_bytes().startswith(start)
    assert drawn.read_bytes() == (tmp_path / f"b/accuracy_width.{kind}").read_bytes()
    assert json.loads(listing.read_text()) == [{"figure": "accuracy_width", "file": str(tmp_path / f"b/{drawn.name}")}]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "found none"),
        ("{", "expected JSON"),
        ("[]", "found a list"),
        ('{"a": 1}', "without 'format'"),
        ('{"format": 2}', "found format 2"),
        ('{"format": 1, "runs": []}', "found no runs"),
        (json.dumps(make_result([make_run() | {"width": "8"}])), "run 0 with 'width' that is str, not int"),
        (json.dumps(make_result([make_run() | {"curve": [{}]}])), "point without 'epoch'"),
        (json.dumps(make_result([make_run() | {"best": 0.9}])), "run 0 with 'best' that is float, not dict"),
    ],
)
def test_plot_runs_says_in_one_line_what_is_wrong_with_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, found: str
) -> None:
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert plot_runs.main([str(path), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert found in message
    assert "give the JSON that lies beside a report.html" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_plot_runs_lists_the_figures_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "result.json").write_text(json.dumps(make_result([make_run()])), encoding="utf-8")
    for name, reason in (("accuracy_width", "lacks the numbers"), ("pie", "no such figure")):
        assert plot_runs.main([str(tmp_path / "result.json"), "--figure", name]) == 2
        message = capsys.readouterr().err
        assert "expected one of test_accuracy, train_loss, test_loss, update_cosine, step_time" in message
        assert f"found '{name}'" in message
        assert reason in message


def test_plot_runs_takes_no_file_for_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plot_runs.main([str(tmp_path / "result.json"), "--out", str(tmp_path / "figure.pdf")])
    assert (
        "figure.pdf: expected a folder, found the name of a file; --format says which kind" in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())
