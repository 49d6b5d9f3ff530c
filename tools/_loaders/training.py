"""Training on streamed beside training on synthetic data, and the memory of many epochs."""

import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from _loaders.loaders import Setting, _split
from alignscale.choices import ConfigError, ConvConfig, MSEConfig, SGDConfig, SyntheticConfig
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


RANKS = 2
"""Of the training whose memory is measured."""


def memory(setting: Setting, name: str, epochs: int) -> list[float]:
    """MB after each epoch of training on ``name``: of all processes of torchrun, by their proportional set sizes.

    It trains an epoch more, after whose end the processes end too.
    """
    folder = setting.folder.absolute()
    places = {
        "webdataset": {
            "urls": "::".join(str(Path(shard).absolute()) for shard in setting.shards),
            "manifest": f"{folder}/train.manifest.json",
            "test_urls": f"{folder}/val-000000.tar",
            "test_manifest": f"{folder}/val.manifest.json",
        },
        "ffcv": {"path": f"{folder}/train.beton", "test_path": f"{folder}/val.beton"},
    }[name]
    with tempfile.TemporaryDirectory() as run:
        given = [f"data={name}", *(f"data.{option}={place}" for option, place in places.items())]
        given += [f"data.workers={setting.workers}", f"batch_size={setting.batch}"]
        net = ["net=imagenet_conv7", "net.width=4", "net.norm=none", "optim.lr=1e-3", "log.progress=false"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        command += [
            "launch/train.py",
            *given,
            *net,
            f"epochs={epochs + 1}",
            "evaluation.batch_size=4",
            f"run.dir={run}",
        ]
        process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL)
        sizes: list[float] = []
        try:
            while process.poll() is None:
                time.sleep(0.2)
                rows = Path(run, "metrics.jsonl")
                ended = rows.read_text().count('"kind": "epoch"') - 1 if rows.exists() else 0  # with one of the start
                if len(sizes) < ended <= epochs:
                    sizes += [sum(map(_proportional, _family(process.pid)))] * (ended - len(sizes))
        finally:
            process.terminate()
            process.wait()
        if process.returncode:
            raise ConfigError(f"{' '.join(command)}: expected status 0, found {process.returncode}")
    return sizes


def _family(parent: int) -> list[int]:
    """A process and all that it started."""
    found = [parent]
    for number in found:
        with suppress(FileNotFoundError, ProcessLookupError):
            for task in Path(f"/proc/{number}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def _proportional(number: int) -> float:
    """The proportional set size of a process in MB, 0 for one that has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{number}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0
