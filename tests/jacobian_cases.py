"""Runs and commands with a cache of the Jacobian."""

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

from run_cases import config
from warm import PYTHON

from alignscale.choices import MLPConfig, SGDConfig, SyntheticConfig
from alignscale.config import JACOBIANS, CalibrationConfig, TrainConfig

ROOT = Path(__file__).parents[1]
DATA = SyntheticConfig(shape=[1, 4, 4], train=107, test=31, classes=4, views=2, shift=1)
OPTIONS: dict[str, Any] = {"net": MLPConfig(width=16, depth=2, norm="calibrated"), "data": DATA, "epochs": 2}
OPTIONS |= {"calibration": CalibrationConfig(50), "optim": SGDConfig(lr=0.1)}


def options(folder: Path, build: bool = False, cached: str = "gates", **changes: Any) -> TrainConfig:
    """A run on the one cache of ``folder``."""
    jacobian = replace(JACOBIANS[cached], dir=str(folder / "cache"), build=build)
    name = f"run-{len(list(folder.glob('run-*')))}"
    return config(folder / name, changes.pop("rule", "align_ada"), **OPTIONS | {"jacobian": jacobian} | changes)


def command(folder: Path, *more: str, python: str = PYTHON) -> list[str]:
    words = ["net=mlp", "net.width=256", "net.norm=calibrated", "rule=align_zero", "threads=1", "data.views=6"]
    words += ["data.shift=1", f"jacobian.dir={folder}/cache", "jacobian=explicit"]
    return [python, "tools/cache_jacobian.py", *words, *more]


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
