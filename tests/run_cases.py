"""A run small enough for tests of training."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from alignscale.checkpoint import complete
from alignscale.choices import MLPConfig, SGDConfig, SyntheticConfig
from alignscale.config import LogConfig, RunConfig, TrainConfig
from alignscale.rules import RULES

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
