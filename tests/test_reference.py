"""Claims about the check against the recorded trajectories."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import check_reference
import numpy as np
import pytest
from warm import PYTHON

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "tests/data/reference"
CASE = "conv3_align_ada_w8_lr1"


def quiet(line: str) -> None:
    """Swallow the line of a case."""


@pytest.fixture
def one_case(tmp_path: Path) -> Path:
    """A folder that holds one case."""
    index = json.loads((REFERENCE / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({CASE: index[CASE]}))
    shutil.copy(REFERENCE / f"{CASE}.npz", tmp_path)
    return tmp_path


@pytest.fixture
def status(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command's exit status, in this process."""

    def call(*arguments: Path | str) -> int:
        monkeypatch.setattr(sys, "argv", ["check_reference.py", *map(str, arguments)])
        return check_reference.main()

    return call


def test_every_recorded_trajectory_is_reproduced() -> None:
    rows = check_reference.run(REFERENCE, quiet)
    assert len(rows) == 19
    assert [row["case"] for row in rows if not row["passed"]] == []
    assert max(row["error"] for row in rows if row["tolerance"] < 1e-6) < 1e-11


def test_one_changed_number_fails(one_case: Path) -> None:
    arrays = check_reference.load(one_case / f"{CASE}.npz")
    arrays["step20_W1"][1, 2, 3, 4] += 2e-9
    np.savez(one_case / f"{CASE}.npz", **arrays)
    command = [PYTHON, "tools/check_reference.py", str(one_case)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert f"FAIL {CASE}" in done.stdout
    assert "error 2.0e-09" in done.stdout


def test_a_good_folder_ends_with_status_0_and_its_rows_in_json(
    one_case: Path, status: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(one_case, "--json", one_case / "rows.json") == 0
    assert f"ok   {CASE}" in capsys.readouterr().out
    (row,) = json.loads((one_case / "rows.json").read_text())
    assert row["case"] == CASE
    assert row["passed"]
    assert row["error"] < 1e-11


@pytest.mark.parametrize("damage", ["truncated", "missing", "rule", "key", "optimizer", "nan"])
def test_a_case_that_cannot_be_run_fails_by_name(one_case: Path, damage: str) -> None:
    path = one_case / f"{CASE}.npz"
    index = json.loads((one_case / "index.json").read_text())
    arrays = check_reference.load(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "missing":
        path.unlink()
    elif damage == "key":
        del arrays["init_W1"]
        np.savez(path, **arrays)
    elif damage == "nan":
        arrays["loss"][3] = np.nan
        np.savez(path, **arrays)
    else:
        index[CASE][damage] = "unheard-of"
        (one_case / "index.json").write_text(json.dumps(index))
    lines: list[str] = []
    (row,) = check_reference.run(one_case, lines.append)
    assert not row["passed"]
    assert lines[0].startswith(f"FAIL {CASE}")


def test_a_folder_without_an_index_is_refused(
    tmp_path: Path, status: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(tmp_path) == 1
    assert "expected a folder with index.json" in capsys.readouterr().err


def test_nothing_checked_is_no_success(tmp_path: Path, status: Callable[..., int]) -> None:
    (tmp_path / "index.json").write_text("{}")
    assert status(tmp_path) == 1
