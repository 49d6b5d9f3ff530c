"""Claims about the training loop and what a run leaves behind."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from _runs import train_and_report
from run_cases import config, same, silent, weights
from warm import PYTHON

from alignscale.checkpoint import complete
from alignscale.choices import DATA, NETS, AdamConfig, MLPConfig, SGDConfig
from alignscale.run import Diverged
from alignscale.train import train

ROOT = Path(__file__).parents[1]


def test_run_folder_holds_all_of_the_run(tmp_path: Path) -> None:
    result = train_and_report(config(tmp_path / "run"), silent, "command")
    names = {path.name for path in (tmp_path / "run").iterdir() if path.name not in (".lock", "source.diff")}
    assert names == {
        "config.yaml", "versions.json", "metrics.jsonl", "tensorboard", "checkpoints", "result.json", "report.html",
    }  # fmt: skip
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["net"]["width"] == 16
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "epoch"] == [0, 6, 12, 18]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [10]
    assert result["runs"][0]["test"]["accuracy"] == result["runs"][0]["curve"][-1]["test_accuracy"]


def test_configuration_is_shown_before_work_and_derived_numbers_too(tmp_path: Path) -> None:
    lines: list[str] = []
    train(config(tmp_path / "run", epochs=1), lines.append)
    shown = "\n".join(lines)
    for expected in ("name: align_ada", "steps: 6 an epoch, 6 in all", "folder: ", "107 for training, 31 for testing"):
        assert expected in shown


@pytest.mark.parametrize("rule", ["backprop", "align_ada", "align_zero", "sign_symmetric"])
@pytest.mark.parametrize("optim", [SGDConfig(lr=0.5, momentum=0.9), AdamConfig(lr=0.01)], ids=["sgd", "adam"])
def test_resumed_run_ends_with_the_same_bits(tmp_path: Path, rule: str, optim: SGDConfig | AdamConfig) -> None:
    whole = train(config(tmp_path / "whole", rule, optim=optim), silent)
    train(config(tmp_path / "parts", rule, optim=optim), silent)
    newest = complete(tmp_path / "parts/checkpoints")[-1]
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()  # as if the run had been killed before its last checkpoint
    (tmp_path / "parts/result.json").unlink()
    resumed = train(config(tmp_path / "parts", rule, optim=optim), silent)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert resumed["runs"][0]["curve"] == whole["runs"][0]["curve"]
    assert _steps(tmp_path / "parts") == _steps(tmp_path / "whole")


def _steps(folder: Path) -> list[tuple[str, int]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["kind"], row["step"]) for row in rows]


def test_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    command = [
        PYTHON,
        "launch/train.py",
        "net=mlp",
        "net.width=32",
        "optim.lr=0.5",
        "epochs=12",
        "threads=1",
        "log.progress=false",
    ]
    subprocess.run([*command, f"run.dir={tmp_path / 'whole'}"], cwd=ROOT, check=True, capture_output=True)
    process = subprocess.Popen(
        [sys.executable, *command[1:], f"run.dir={tmp_path / 'parts'}"],
        cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not complete(tmp_path / "parts/checkpoints"):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "parts/result.json").exists()
    done = subprocess.run(
        [*command, f"run.dir={tmp_path / 'parts'}"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert "resumed after step" in done.stdout
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_divergence_ends_the_run_with_its_step(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"loss is not finite at step \d+: .*lower optim.lr \(now 1e\+06\)"):
        train_and_report(config(tmp_path / "run", optim=SGDConfig(lr=1e6)), silent, "command")
    run = json.loads((tmp_path / "run/result.json").read_text())["runs"][0]
    assert run["test"]["accuracy"] is None
    assert (tmp_path / "run/report.html").exists()
    with pytest.raises(Diverged, match=f"diverged before, at step {run['diverged_at']}"):
        train(config(tmp_path / "run", optim=SGDConfig(lr=1e6)), silent)


def test_last_update_that_diverges_is_found_and_not_saved(tmp_path: Path) -> None:
    options = config(tmp_path / "run", optim=SGDConfig(lr=1e25), epochs=1, batch_size=107)
    with pytest.raises(Diverged, match="the test loss is not finite at step 1"):
        train(options, silent)
    assert complete(tmp_path / "run/checkpoints") == []
    assert json.loads((tmp_path / "run/result.json").read_text())["runs"][0]["diverged_at"] == 1


@pytest.mark.parametrize("norm", ["none", "batch", "calibrated"])
def test_regenerated_weights_train_to_the_bits_of_stored_ones(tmp_path: Path, norm: str) -> None:
    for kept in ("stored", "regenerated"):
        options = config(tmp_path / kept, net=MLPConfig(width=16, depth=2, norm=norm), epochs=1)
        options.frozen.weights = kept
        options.calibration.examples = 50
        train(options, silent)
    assert same(weights(tmp_path / "stored"), weights(tmp_path / "regenerated"))


@pytest.mark.parametrize("net", sorted(NETS))
@pytest.mark.parametrize("rule", ["align_ada", "direct_feedback_alignment"])
def test_every_net_trains_on_digits(tmp_path: Path, net: str, rule: str) -> None:
    small = dataclasses.replace(NETS[net], width=4)
    result = train(
        config(
            tmp_path / "run", rule, net=small, data=DATA["digits"], epochs=1, batch_size=479, optim=SGDConfig(lr=0.01)
        ),
        silent,
    )
    assert result["runs"][0]["steps"] == 3


def test_calibrated_moments_are_read_on_resume_and_never_computed_again(tmp_path: Path) -> None:
    options = config(tmp_path / "run", net=MLPConfig(width=16, depth=2, norm="calibrated"), epochs=1)
    options.calibration.examples = 50
    train(options, silent)
    path = tmp_path / "run/norms.safetensors"
    before = path.stat().st_mtime_ns
    train(options, silent)
    assert path.stat().st_mtime_ns == before
