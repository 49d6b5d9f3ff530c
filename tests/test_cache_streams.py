"""Claims about caches of data that is streamed: a file for each shard and view, and training equal to the live one."""

from dataclasses import replace
from pathlib import Path

import pytest
import stream_cases
import torch
from run_cases import config, silent

from alignscale.choices import ConfigError, ConvConfig, SGDConfig
from alignscale.config import JACOBIANS, EvaluationConfig, TrainConfig
from alignscale.jacobian.files import CacheError
from alignscale.train import train
from alignscale.validation import validate


def options(folder: Path, form: str, views: int = 2, **data: object) -> TrainConfig:
    """A run on three shards of 13, 1 and 9 photographs."""
    jacobian = replace(JACOBIANS[form], root=str(folder / "cache"), build=True, tier="disk")
    return config(
        folder / form, "align_zero", net=ConvConfig(name="conv3", width=6, norm="none", gain=1.4), batch_size=8,
        data=stream_cases.config(folder, views=views, workers=0, **data), optim=SGDConfig(lr=0.05), epochs=4,
        evaluation=EvaluationConfig(["train"], 7), jacobian=jacobian,
    )  # fmt: skip


def test_every_shard_and_view_has_its_file_and_training_is_the_live_one(tmp_path: Path) -> None:
    live = train(options(tmp_path, "live"), silent)["runs"][0]
    for form in ("gates", "explicit"):
        run = train(options(tmp_path, form), silent)["runs"][0]
        losses = [torch.tensor([point["train_end_loss"] for point in one["curve"]]) for one in (run, live)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-7)
        files = sorted(path.name for path in tmp_path.glob(f"cache/*-{form}-*/*.safetensors"))
        assert files == [f"train-{shard:03}.view{view}.safetensors" for shard in range(3) for view in range(2)]


def test_another_crop_is_another_transform(tmp_path: Path) -> None:
    train(options(tmp_path, "gates"), silent)
    (folder,) = tmp_path.glob("cache/*")
    other = options(tmp_path, "gates", scale=[0.5, 1.0])
    other.jacobian.dir, other.jacobian.build, other.run.dir = str(folder), False, str(tmp_path / "other")
    with pytest.raises(CacheError, match=r"transform.scale: \[0.08, 1.0\] -> \[0.5, 1.0\]"):
        train(other, silent)


def test_another_view_in_each_epoch_has_no_cache(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"jacobian=gates: expected data.views above 0, found 0"):
        validate(options(tmp_path, "gates", views=0))


def test_views_of_another_place_are_other_examples(tmp_path: Path) -> None:
    train(options(tmp_path, "gates"), silent)
    (folder,) = tmp_path.glob("cache/*")
    other = options(tmp_path, "gates", urls=f"{tmp_path}/train-{{001..002}}.tar")
    other.jacobian.dir, other.jacobian.build, other.run.dir = str(folder), False, str(tmp_path / "other")
    with pytest.raises(CacheError, match="was made of other data"):
        train(other, silent)
