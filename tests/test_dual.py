"""Claims about align_zero in dual form: it trains to what the primal form trains to, without a trained weight."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_cases import config, same, silent, weights
from warm import PYTHON

from alignscale.choices import (
    AdamConfig,
    ConfigError,
    ConvConfig,
    CrossEntropyConfig,
    DigitsConfig,
    MLPConfig,
    SGDConfig,
)  # fmt: skip
from alignscale.config import JACOBIANS, CalibrationConfig, TrainConfig
from alignscale.restore import restored
from alignscale.train import train
from alignscale.validation import validate
from tools import show_checkpoint

ROOT = Path(__file__).parents[1]


def options(folder: Path, form: str, precision: str = "fp64", **changes: Any) -> TrainConfig:
    """A run on 45 digits."""
    jacobian = replace(JACOBIANS["explicit"], root=str(folder), dtype=precision, inputs=precision, build=True)
    known = {"net": MLPConfig(width=640, depth=2), "data": DigitsConfig(train_limit=45), "batch_size": 20, "epochs": 10}
    known |= {"optim": SGDConfig(lr=0.2, momentum=0.9), "jacobian": jacobian, "form": form, "precision": precision}
    return config(folder / form, "align_zero", **known | {"calibration": CalibrationConfig(40)} | changes)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-10), ("fp32", 1e-5)])
@pytest.mark.parametrize("changes", [
    {}, {"optim": SGDConfig(lr=0.5)}, {"net": MLPConfig(width=640, depth=3, norm="calibrated", activation="tanh")},
    {"optim": SGDConfig(lr=0.1, momentum=0.9, nesterov=True), "loss": CrossEntropyConfig(), "accumulation": 3},
], ids=["momentum", "plain", "calibrated", "nesterov"])  # fmt: skip
def test_it_equals_the_primal_form(tmp_path: Path, precision: str, tolerance: float, changes: dict[str, Any]) -> None:
    runs = [train(options(tmp_path, form, precision, **changes), silent)["runs"][0] for form in ("primal", "dual")]
    for one, other in zip(*(run["curve"] for run in runs), strict=True):
        for name in ("test_loss", "test_accuracy", "update_cosine"):
            assert one[name] == pytest.approx(other[name], rel=10 * tolerance, abs=tolerance)
    primal, dual = (weights(tmp_path / form) for form in ("primal", "dual"))
    assert dual.pop("coefficients").shape == (45, 10)
    for name, weight in primal.items():
        assert (dual[name] - weight).norm() <= tolerance * weight.norm().clamp(min=1)


def test_only_the_coefficients_have_an_optimizer_state_and_a_gradient(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(options(tmp_path, "dual"), silent)
    from safetensors.torch import load_file

    state = load_file(sorted((tmp_path / "dual/checkpoints").glob("step-*"))[-1] / "optimizer.safetensors")
    assert {name: tuple(one.shape) for name, one in state.items()} == {"coefficients.momentum_buffer": (45, 10)}
    assert show_checkpoint.main([str(tmp_path / "dual"), "--export-universal", str(tmp_path / "out")]) == 2
    assert "expected states of weights, found coefficients.momentum_buffer" in capsys.readouterr().err


def test_any_tool_reads_the_weights_of_its_checkpoint(tmp_path: Path) -> None:
    result = train(options(tmp_path, "dual"), silent)["runs"][0]
    found = restored(tmp_path / "dual")
    test = found.splits["test"]
    score = found.learner.evaluate(found.learner.encoding.images(test.images), test.labels)
    assert score["loss"] == pytest.approx(result["test"]["loss"], rel=1e-9)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    words = ["rule=align_zero", "net=mlp", "net.width=640", "data.train_limit=45", "batch_size=15", "epochs=60"]
    words += ["form=dual", "jacobian=explicit", f"jacobian.root={tmp_path}", "jacobian.build=true", "optim.lr=0.1"]
    words += ["optim.momentum=0.9", "checkpoint.every_steps=3", "threads=1"]
    command = [PYTHON, "launch/train.py", *words]
    assert (
        subprocess.run([*command, f"run.dir={tmp_path}/whole"], cwd=ROOT, capture_output=True, check=False).returncode
        == 0
    )
    with subprocess.Popen(
        [sys.executable, *command[1:], f"run.dir={tmp_path}/cut"], cwd=ROOT, stdout=-3, stderr=-3
    ) as first:
        while first.poll() is None and not list((tmp_path / "cut").glob("checkpoints/step-*")):
            pass
        first.send_signal(signal.SIGKILL)
    assert (
        subprocess.run([*command, f"run.dir={tmp_path}/cut"], cwd=ROOT, capture_output=True, check=False).returncode
        == 0
    )
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@pytest.mark.parametrize(("changes", "found"), [
    ({"net": ConvConfig(norm="none")}, "net=conv: expected mlp"),
    ({"optim": AdamConfig()}, "optim=adam: expected sgd"),
    ({"optim": SGDConfig(weight_decay=0.1)}, "optim.weight_decay, optim.clip_norm: expected 0"),
    ({"precision": "bf16"}, "precision=bf16: expected fp32 or fp64"),
    ({"jacobian": JACOBIANS["gates"]}, "jacobian=gates: expected explicit, with dtype and inputs fp64"),
    ({"data": DigitsConfig(views=2, shift=1)}, "data.views=2: expected 1"),
], ids=str)  # fmt: skip
def test_what_it_cannot_train_is_refused(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=rf"form=dual, {found}.*or use form=primal"):
        validate(options(tmp_path, "dual", **changes))


def test_it_is_refused_where_it_would_be_larger_than_the_primal_form(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"form=dual: expected less to hold than the \d+,\d+ numbers of weights"):
        train(options(tmp_path, "dual", data=DigitsConfig()), silent)
