"""Claims about options that shape training: splits, limits, views, parts of a batch, losses, precision, determinism."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from data_cases import write_cifar10, write_cifar100, write_image_folder, write_mnist
from run_cases import config, same, silent, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alignscale.choices import DATA as DATA_SETS
from alignscale.choices import (
    AdamConfig,
    ConfigError,
    CosineConfig,
    CrossEntropyConfig,
    DigitsConfig,
    MLPConfig,
    MSEConfig,
    RNNConfig,
    SGDConfig,
    SyntheticConfig,
)
from alignscale.config import CheckpointConfig, EvaluationConfig, LogConfig
from alignscale.environment import torch_settings
from alignscale.folder import read_config
from alignscale.restore import restored
from alignscale.train import train
from tools import evaluate as tool

DATA = {"shape": [1, 4, 4], "train": 107, "test": 31, "classes": 4}


def test_fewer_training_examples_leave_the_test_set_whole(tmp_path: Path) -> None:
    lines: list[str] = []
    train(config(tmp_path / "run", data=DigitsConfig(train_limit=45), epochs=1, batch_size=20), lines.append)
    assert "examples: 45 for training, 360 for testing" in "\n".join(lines)


def test_every_split_is_scored_and_the_best_is_of_the_split_asked_for(tmp_path: Path) -> None:
    options = config(
        tmp_path / "run",
        data=SyntheticConfig(**DATA, validation=20, noise=2.0),
        optim=SGDConfig(lr=0.05),
        evaluation=EvaluationConfig(splits=["train", "validation"]),
        checkpoint=CheckpointConfig(best="validation"),
    )
    run = train(options, silent)["runs"][0]
    assert {"accuracy", "top5", "loss"} <= run["validation"].keys() & run["test"].keys() & run["train"].keys()
    best = max(run["curve"][1:], key=lambda point: point["validation_accuracy"])
    assert (run["best"]["split"], run["best"]["accuracy"]) == ("validation", best["validation_accuracy"])
    points = [
        {"train_loss", "train_end_loss", "validation_loss", "test_loss"} <= point.keys() for point in run["curve"]
    ]
    assert all(points)
    assert run["curve"][-1]["train_end_loss"] != run["curve"][-1]["train_loss"]
    rows = tool.scores(tmp_path / "run", "best", ["train", "validation", "test"], None)
    assert [row["examples"] for row in rows] == [87, 20, 31]
    assert [row["accuracy"] for row in rows] == [best[f"{split}_accuracy"] for split in ("train", "validation", "test")]


def test_a_runs_network_comes_back_from_its_folder_alone(tmp_path: Path) -> None:
    options = config(tmp_path / "run", net=MLPConfig(width=16, norm="calibrated"), loss=CrossEntropyConfig())
    options.calibration.examples = 50
    ended = train(options, silent)["runs"][0]
    assert read_config(tmp_path / "run") == options
    assert tool.scores(tmp_path / "run", "last", ["test"], None)[0]["loss"] == ended["test"]["loss"]
    assert same(dict(restored(tmp_path / "run").learner.net.state_dict()), weights(tmp_path / "run"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--splits", "validation"], "--splits: validation: expected some of train, test"),
        (["--checkpoint", "7"], r"checkpoint 7: expected last, best or one of the steps in"),
        (["--checkpoint", "newest"], r"checkpoint newest: expected last, best or one of the steps in"),
    ],
)
def test_evaluate_refuses_what_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    train(config(tmp_path / "run", epochs=1), silent)
    assert tool.main([str(tmp_path / "run"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert tool.main([str(tmp_path), *arguments]) == 2
    assert "config.yaml: expected a run's configuration" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        (
            MLPConfig(width=8, norm="batch"),
            ["--batch-size", "1"],
            "evaluation.batch_size=1: it makes a batch of 1 of 31",
        ),
        (RNNConfig(width=8, initial_state="trained"), ["--batch-size", "21"], "expected at most batch_size=20"),
    ],
)
def test_evaluate_refuses_batches_that_the_network_cannot_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], net: Any, options: list[str], message: str
) -> None:
    train(config(tmp_path / "run", net=net, epochs=1, evaluation=EvaluationConfig(batch_size=20)), silent)
    assert tool.main([str(tmp_path / "run"), *options]) == 2
    assert message in capsys.readouterr().err
    assert tool.main([str(tmp_path / "run")]) == 0


def test_the_training_loss_of_a_result_is_the_final_networks_where_it_was_measured(tmp_path: Path) -> None:
    options = config(tmp_path / "run", epochs=1, evaluation=EvaluationConfig(splits=["train"]))
    run = train(options, silent)["runs"][0]
    found = tool.scores(tmp_path / "run", "last", ["train"], None)[0]
    assert (run["train"]["accuracy"], run["train"]["loss"]) == (found["accuracy"], found["loss"])
    assert run["curve"][-1]["train_loss"] != found["loss"]


def test_a_view_is_trained_on_every_so_many_epochs(tmp_path: Path) -> None:
    """With a rate of (almost) 0 an epoch's loss is that of its view."""
    options = config(
        tmp_path / "run", data=SyntheticConfig(**DATA, views=2, shift=2, flip=True), optim=SGDConfig(lr=1e-30), epochs=4
    )
    losses = [point["train_loss"] for point in train(options, silent)["runs"][0]["curve"][1:]]
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)
    assert losses[1] == pytest.approx(losses[3], rel=1e-6)
    assert abs(losses[0] - losses[1]) > 1e-3 * losses[0]


def test_a_batch_in_parts_trains_as_the_whole(tmp_path: Path) -> None:
    curves = [
        train(config(tmp_path / str(parts), accumulation=parts, precision="fp64"), silent)["runs"][0]["curve"]
        for parts in (1, 3)
    ]
    for one, other in zip(*curves, strict=True):
        assert one["test_loss"] == pytest.approx(other["test_loss"], rel=1e-10)
        assert one["train_loss"] is other["train_loss"] or one["train_loss"] == pytest.approx(other["train_loss"])


def test_the_rate_follows_the_schedule_into_the_metrics(tmp_path: Path) -> None:
    log = LogConfig(progress=False, every_steps=1)
    options = config(tmp_path / "run", schedule=CosineConfig(warmup=1), optim=AdamConfig(lr=0.01))
    options.log = log
    train(options, silent)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if row["kind"] == "train"]
    assert rates[:6] == pytest.approx([0.01 * (step + 1) / 6 for step in range(6)])
    assert rates[-1] == pytest.approx(0.01 * (1 + torch.cos(torch.tensor(11 / 12 * torch.pi)).item()) / 2, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
@pytest.mark.parametrize("loss", [MSEConfig(centred=False, reduction="sum"), CrossEntropyConfig(label_smoothing=0.1)])
def test_losses_and_precisions_learn(tmp_path: Path, precision: str, loss: Any) -> None:
    optim = SGDConfig(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, clip_norm=5.0)
    ended = train(config(tmp_path / "run", precision=precision, loss=loss, optim=optim, epochs=8), silent)["runs"][0]
    assert ended["test"]["accuracy"] > 0.6
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {
        torch.float64 if precision == "fp64" else torch.float32
    }


def test_decay_towards_the_start_keeps_a_network_nearer_to_it_than_none(tmp_path: Path) -> None:
    def distance(decay: float) -> float:
        optim = SGDConfig(lr=0.5, weight_decay=decay, decay_towards="initial")
        train(config(tmp_path / str(decay), optim=optim), silent)
        found = restored(tmp_path / str(decay))
        start = found.learner.fixed.frozen.weight(1)
        return (found.learner.net.layers[1].weight - start).norm().item()

    assert 0 < distance(0.5) < 0.8 * distance(0.0)


def test_deterministic_runs_end_with_the_same_bits_and_leave_torch_as_it_was(tmp_path: Path) -> None:
    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32)
    for name in ("one", "two"):
        train(config(tmp_path / name, deterministic=True, threads=2), silent)
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))
    after = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32)
    assert before == after


def test_deterministic_sets_threads_flags_and_tf32() -> None:
    with torch_settings(0, True):
        assert not torch.utils.deterministic.fill_uninitialized_memory  # DeepSpeed has gigabytes that nobody reads
        assert torch.get_num_threads() == 1
        assert torch.are_deterministic_algorithms_enabled()
        cudnn = torch.backends.cudnn
        assert (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32) == (True, False, False)
        assert not torch.backends.cuda.matmul.allow_tf32
    with torch_settings(2, False):
        assert torch.get_num_threads() == 2
        assert not torch.are_deterministic_algorithms_enabled()


def test_tensorboard_reads_what_a_run_and_its_resumption_wrote(tmp_path: Path) -> None:
    train(config(tmp_path / "run", epochs=2), silent)
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    curve = json.loads((tmp_path / "run/result.json").read_text())["runs"][0]["curve"]
    found = events.Scalars("epoch/test_accuracy")
    assert [point.step for point in found] == [0, 6, 12]
    assert [point.value for point in found] == pytest.approx([point["test_accuracy"] for point in curve])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": SyntheticConfig(**DATA, train_limit=200)}, "data.train_limit=200: expected at most the 107"),
        ({"data": SyntheticConfig(**DATA, validation=107)}, "data.validation=107: expected less than the 107"),
        ({"net": MLPConfig(norm="batch"), "accumulation": 20}, "accumulation=20: they make a batch of one example"),
    ],
)
def test_splits_and_parts_that_cannot_be_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(config(tmp_path / "run", **changes), silent)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "kmnist", "imagefolder"])
def test_every_data_set_trains_from_its_files(tmp_path: Path, name: str) -> None:
    writers = {
        "cifar10": write_cifar10,
        "cifar100": write_cifar100,
        "mnist": write_mnist,
        "kmnist": partial(write_mnist, name="KMNIST"),
        "imagefolder": write_image_folder,
    }
    writers[name](tmp_path / "data")
    options = {"size": 8} if name == "imagefolder" else {"verify": False}
    data = replace(DATA_SETS[name], root=str(tmp_path / "data"), views=2, shift=1, flip=True, **options)
    run = train(config(tmp_path / "run", data=data, epochs=2, batch_size=5), silent)["runs"][0]
    assert run["data"] == name
    assert 0 <= run["test"]["accuracy"] <= run["test"]["top5"] <= 1


def test_files_that_were_left_out_are_counted_in_the_result(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "data")
    next(iter((tmp_path / "data/train").rglob("*.*"))).write_bytes(b"no image")
    data = replace(DATA_SETS["imagefolder"], root=str(tmp_path / "data"), size=8, skip_undecodable=True)
    lines: list[str] = []
    run = train(config(tmp_path / "run", data=data, epochs=1, batch_size=5), lines.append)["runs"][0]
    assert run["skipped"] == 1
    assert "warning: 1 files hold no readable image and are left out" in "\n".join(lines)
