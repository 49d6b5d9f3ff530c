"""Claims about what a run says while it runs: the bar, the rows, and Weights & Biases without a network."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from run_cases import config
from warm import PYTHON

from alignscale.choices import ConfigError
from alignscale.config import LogConfig
from alignscale.metrics import Metrics
from alignscale.validation import validate

ROOT = Path(__file__).parents[1]
COMMAND = [PYTHON, "launch/train.py", "net=mlp", "net.width=16", "epochs=2", "threads=1"]


def test_wandb_gets_the_rows_of_metrics_jsonl(tmp_path: Path) -> None:
    places = {f"WANDB_{name}_DIR": str(tmp_path / name) for name in ("CACHE", "CONFIG", "DATA")}
    done = subprocess.run(
        [*COMMAND, "log.wandb=true", "log.progress=false", f"run.dir={tmp_path / 'run'}"],
        cwd=ROOT, env={**os.environ, **places, "WANDB_MODE": "offline"}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    content = path.read_bytes()  # records that hold names and numbers as text
    curve = json.loads((tmp_path / "run/result.json").read_text())["runs"][0]["curve"]
    assert content.count(b"epoch/test_accuracy") >= len(curve) == 3
    assert all(json.dumps(point["test_loss"]).encode() in content for point in curve)
    assert (tmp_path / "run/wandb.id").read_text() in path.name


def test_wandb_is_off_by_default_and_asks_for_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = config(tmp_path / "run")
    assert not options.log.wandb
    options.log.wandb = True
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"log\.wandb=true: expected the package wandb, found none; pip install"):
        validate(options)


def test_wandb_without_a_login_is_refused_in_one_line(tmp_path: Path) -> None:
    places = {f"WANDB_{name}_DIR": str(tmp_path / name) for name in ("CACHE", "CONFIG", "DATA")}
    known = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        [*COMMAND, "log.wandb=true", "log.progress=false", f"run.dir={tmp_path / 'run'}"],
        cwd=ROOT, env={**known, **places, "HOME": str(tmp_path), "WANDB_MODE": "online"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: log.wandb=true: expected a login, found: ")
    assert "Traceback" not in done.stderr


def test_the_bar_shows_time_left_loss_accuracy_and_rate(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, f"run.dir={tmp_path / 'run'}"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    bar = done.stderr.split("\r")[-1]
    assert re.search(r"58/58 \[\d\d:\d\d<\d\d:\d\d, .*loss \d\.\d+, accuracy \d+\.\d%, \d+ examples/s", bar), bar


def test_rows_count_right_examples_since_the_last_row(tmp_path: Path) -> None:
    with Metrics(tmp_path, LogConfig(every_steps=2, progress=False, tensorboard=False), "run", 0, 4) as metrics:
        for step, right in enumerate((1, 3, 0, 5), 1):
            metrics.step(step, 0.5, right, 10, 0.1, 1e-3)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["accuracy"]) for row in rows] == [(2, 0.2), (4, 0.25)]
    assert [row["examples_per_second"] for row in rows] == pytest.approx([100, 100])


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    with Metrics(tmp_path, LogConfig(progress=False), "run", 0, 4) as metrics:
        metrics.row("epoch", 1, {"test_loss": float("nan"), "test_accuracy": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "kind": "epoch", "step": 1, "test_loss": None, "test_accuracy": 0.5,
    }  # fmt: skip
