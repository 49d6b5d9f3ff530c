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
import torch
import yaml
from safetensors.torch import load_file

from alignscale.checkpoint import CheckpointError, complete
from alignscale.config import (
    DATA,
    NETS,
    AdamConfig,
    ConfigError,
    LogConfig,
    MLPConfig,
    RuleConfig,
    RunConfig,
    SGDConfig,
    SyntheticConfig,
    TrainConfig,
)
from alignscale.rules import RULES
from alignscale.train import Diverged, train

ROOT = Path(__file__).parents[1]
QUIET = LogConfig(progress=False)


def config(folder: Path, rule: str = "align_ada", **changes: object) -> TrainConfig:
    options = {
        "net": MLPConfig(width=16, depth=2),
        "data": SyntheticConfig(shape=[1, 4, 4], train=107, test=31, classes=4),
        "optim": SGDConfig(lr=0.5, momentum=0.9),
        "epochs": 3,
        "batch_size": 20,
    } | changes
    return TrainConfig(rule=RULES[rule].options(name=rule), log=QUIET, run=RunConfig(dir=str(folder)), **options)  # type: ignore[arg-type]


def silent(line: str) -> None:
    """Swallow what a run shows."""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(complete(folder / "checkpoints")[-1] / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_run_folder_holds_all_of_the_run(tmp_path: Path) -> None:
    result = train(config(tmp_path / "run"), silent)
    names = {path.name for path in (tmp_path / "run").iterdir()}
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
        sys.executable,
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
        [*command, f"run.dir={tmp_path / 'parts'}"], cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
    )
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


def test_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = train(config(tmp_path / "run"), silent)
    lines: list[str] = []
    assert train(config(tmp_path / "run"), lines.append) == first
    assert "finished before; resume=never trains it again" in lines


def test_changed_configuration_is_refused_with_the_difference(tmp_path: Path) -> None:
    train(config(tmp_path / "run", epochs=1), silent)
    before = (tmp_path / "run/config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"seed: 0 -> 3"):
        train(config(tmp_path / "run", epochs=1, seed=3), silent)
    assert (tmp_path / "run/config.yaml").read_text() == before


def test_resume_never_starts_again(tmp_path: Path) -> None:
    train(config(tmp_path / "run", epochs=3), silent)
    train(config(tmp_path / "run", epochs=1, seed=3, resume="never"), silent)
    assert [path.name for path in complete(tmp_path / "run/checkpoints")] == ["step-000000006"]


def test_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    train(config(tmp_path / "run", epochs=1), silent)
    path = complete(tmp_path / "run/checkpoints")[-1] / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="the file is damaged"):
        train(config(tmp_path / "run", epochs=1), silent)


def test_checkpoint_of_another_initial_network_is_refused(tmp_path: Path) -> None:
    train(config(tmp_path / "run", epochs=1), silent)
    path = complete(tmp_path / "run/checkpoints")[-1] / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "fingerprint": "0" * 16}))
    with pytest.raises(CheckpointError, match="expected the initial network"):
        train(config(tmp_path / "run", epochs=1), silent)


def test_divergence_ends_the_run_with_its_step(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"the loss is (nan|inf) at step \d+: .*lower optim.lr \(now 1e\+06\)"):
        train(config(tmp_path / "run", optim=SGDConfig(lr=1e6)), silent)
    run = json.loads((tmp_path / "run/result.json").read_text())["runs"][0]
    assert run["test"]["accuracy"] is None
    assert (tmp_path / "run/report.html").exists()


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 200}, "batch_size=200: expected at most the 107 training examples"),
        ({"batch_size": 53, "net": MLPConfig(norm="batch")}, "last batch of one example"),
        ({"net": MLPConfig(norm="calibrated")}, "calibration.examples=1000: expected at most the 107"),
        ({"device": "tpu"}, "device=tpu: expected one of auto, cpu, cuda"),
    ],
)
def test_options_that_do_not_fit_the_data_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(config(tmp_path / "run", **changes), silent)
    assert not (tmp_path / "run").exists()


def test_unknown_rule_lists_the_valid_ones(tmp_path: Path) -> None:
    options = config(tmp_path / "run")
    options.rule = RuleConfig(name="alignada")
    with pytest.raises(ConfigError, match="rule=alignada: expected one of align_ada, align_prop, align_zero, backprop"):
        train(options, silent)


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="expected a folder that can be written"):
        train(config(tmp_path / "file/run"), silent)
