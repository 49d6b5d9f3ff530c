"""How long a checkpoint takes when all ranks write it, beside the first one alone: medians, one save in turn.

    torchrun --nproc-per-node=2 tools/bench_save.py --width 4096 --depth 4 --zero-stage 3 --folder /shared/disk

The network is an mlp after one step of Adam; the folder is the disk that is measured, and is empty again afterwards.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from argument_types import ended, positive
from distributed_step import ranks_on

from alignscale import checkpoint
from alignscale.choices import AdamConfig, ConfigError, DeepSpeedConfig, MLPConfig
from alignscale.environment import device_called
from alignscale.learner import Learner
from alignscale.parallel import Mesh
from alignscale.types import Batch

ALONE = 2**62
"""Bytes for which one more rank would write: the first writes alone."""


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Time checkpoints of all ranks and of the first rank alone.")
    parser.add_argument("--width", type=positive, default=2048)
    parser.add_argument("--depth", type=positive, default=4)
    parser.add_argument("--zero-stage", type=int, choices=range(4), default=3)
    parser.add_argument("--repeats", type=positive, default=5, help="saves of each kind (default: 5)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--folder", type=Path, default=Path(), help="where a folder for them is made (default: here)")
    options = parser.parse_args()
    try:
        device = device_called(options.device)
        with ranks_on(device) as ranks:
            learner = Learner(
                MLPConfig(width=options.width, depth=options.depth), (1, 28, 28), 10, "align_ada", AdamConfig(),
                device=device, engine=DeepSpeedConfig(zero_stage=options.zero_stage), mesh=Mesh(ranks, ranks),
            )  # fmt: skip
            images, targets = torch.rand(1, 1, 28, 28, device=device), torch.rand(1, 10, device=device)
            learner.update([Batch(images, targets, [], ranks.size)], 1e-3)
            folder = Path(ranks.of_first(lambda: tempfile.mkdtemp(dir=options.folder.resolve())))
            usual = checkpoint.LEAST
            seconds: dict[int, list[float]] = {ALONE: [], usual: []}
            for turn in range(1 + options.repeats):
                for least in list(seconds)[:: 1 if turn % 2 else -1]:
                    checkpoint.LEAST, begin = least, time.perf_counter()
                    checkpoint.save(folder, turn, learner.engine.state(), {"progress": {"best": None}}, 1, ranks)
                    if turn:  # the first ones warm up
                        seconds[least].append(time.perf_counter() - begin)
            checkpoint.LEAST = usual
            checkpoint.save(folder, turn + 1, learner.engine.state(), {"progress": {"best": None}}, 1, ranks)
            if ranks.first:
                files = {path.stem: path.stat().st_size for path in checkpoint.find(folder, "last").glob("*.safet*")}
                wrote = len({name.partition("-")[2] for name in files})
                size = sum(files.values()) / 1e6
                alone, together = map(statistics.median, seconds.values())
                print(
                    f"{size:.0f} MB, {wrote} of {ranks.size} ranks, ZeRO {options.zero_stage}: the first "
                    f"alone {alone:.2f} s, all {together:.2f} s, {together / alone:.2f} of it"
                )
                shutil.rmtree(folder)
    except (ConfigError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    ended(main)
