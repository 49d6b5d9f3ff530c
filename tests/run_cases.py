"""Runs small enough for tests of training."""

import json
import os
import signal
import sys
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from alignscale.checkpoint import complete
from alignscale.choices import CosineConfig, MLPConfig, SGDConfig, SyntheticConfig
from alignscale.config import CheckpointConfig, LogConfig, RunConfig, TrainConfig
from alignscale.interrupts import Interrupted
from alignscale.rules import RULES
from alignscale.train import train


def config(folder: Path, rule: str = "align_ada", **changes: object) -> TrainConfig:
    options = {
        "net": MLPConfig(width=16, depth=2),
        "data": SyntheticConfig(shape=[1, 4, 4], train=107, test=31, classes=4),
        "optim": SGDConfig(lr=0.5, momentum=0.9),
        "epochs": 3,
        "batch_size": 20,
    } | changes
    return TrainConfig(
        rule=RULES[rule].options(name=rule), log=LogConfig(progress=False), run=RunConfig(dir=str(folder)), **options
    )  # type: ignore[arg-type]


def silent(line: str) -> None:
    """Swallow what a run shows."""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    path = complete(folder / "checkpoints")[-1]
    return {name: one for file in path.glob("model*.safetensors") for name, one in load_file(file).items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def long_run(folder: Path) -> TrainConfig:
    """1800 updates, with all that has a state: momentum, a schedule, parts of a batch, views, partial epochs."""
    data = SyntheticConfig(shape=[1, 4, 4], train=107, test=31, classes=4, views=3, shift=1)
    return config(
        folder,
        "sign_symmetric",
        data=data,
        epochs=300,
        accumulation=2,
        optim=SGDConfig(lr=0.05, momentum=0.9, clip_norm=1.0, weight_decay=1e-3, decay_towards="initial"),
        schedule=CosineConfig(warmup=2),
        checkpoint=CheckpointConfig(every_steps=7, every_epochs=0, keep=3),
    )


def long_run_that_may_be_stopped(folder: Path, begun: Event) -> None:
    """Train in a process of its own that may be killed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        begun.set()
        train(long_run(folder), silent)
    except Interrupted as stopped:
        sys.exit(128 + stopped.signum)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics without the times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "examples_per_second"} for line in lines]
