"""Training on streamed beside training on synthetic data, and the memory of many epochs."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from _loaders.loaders import Setting, _split
from alignscale.choices import ConvConfig, MSEConfig, SGDConfig, SyntheticConfig
from alignscale.data import load
from alignscale.data.examples import Split, stream
from alignscale.data.plan import Plan
from alignscale.learner import Learner
from alignscale.rules import RULES

STEP = 16
"""Examples."""


def training(setting: Setting, epochs: int) -> dict[str, Any]:
    """Images/s of training on streamed and on synthetic data, in turn, with one worker and one thread."""
    torch.set_num_threads(1)
    one = Setting(setting.folder, setting.images, 1, STEP)
    shape = [3, 224, 224]
    synthetic = load(SyntheticConfig(shape=shape, train=4 * STEP, test=4, classes=4))["train"]
    found: dict[str, list[float]] = {"streamed": [], "synthetic": []}
    net = ConvConfig(name="imagenet_conv7", width=192, strides=[4, 2, 1, 2, 1, 2, 1])
    rule = RULES["align_ada"].options(name="align_ada")
    learner = Learner(net, (3, 224, 224), 4, rule, SGDConfig(lr=1e-3), MSEConfig(), seed=0)
    for number in range(epochs + 1):
        for name, split in (("streamed", _split(one, "webdataset")), ("synthetic", synthetic)):
            seconds = _epoch(learner, split, number)
            if number:
                found[name].append(seconds)
    pairs = zip(found["streamed"], found["synthetic"], strict=True)
    return {
        "ratio": statistics.median(theirs / ours for ours, theirs in pairs),
        "ms_per_image": 1000 * statistics.median(found["synthetic"]),
    }


def _epoch(learner: Learner, split: Split, number: int) -> float:
    """Seconds an image, of 4 updates after the first."""
    plan = Plan(len(split), STEP, 0, split.layout)
    steps = stream(split, plan, learner.encoding, 0, 5, views=0 if split.layout else 1)
    begin = 0.0
    for step, parts in steps:
        if step == 1:
            begin = time.perf_counter()
        learner.update(parts, 1e-3)
    return (time.perf_counter() - begin) / (4 * STEP)


def memory(setting: Setting, epochs: int) -> list[float]:
    """Resident MB of this process after each epoch of streaming; its workers end with the epoch."""
    from _loaders.loaders import timed

    sizes = []
    for number in range(epochs):
        timed(setting, "webdataset", number)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes.append(pages * 4096 / 1e6)
    return sizes
