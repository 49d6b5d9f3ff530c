"""What training costs beside its steps: the loop around a step, and the start from the command to the first step.

The loop: a run is trained as ``launch/train.py`` would, with the time of every update (forward pass, pullback, weight
gradients, optimizer) taken out of the time between one update's end and the next one's. What is left is data, metrics,
logging and the progress bar; evaluation and checkpoints, which come once an epoch, are left out. It is given in
milliseconds and as a part of a step of ``--step-ms``.
The start: the command in a process of its own, until its first training row is on disk.

    python tools/bench_loop.py
    python tools/bench_loop.py --batch 128 --shape 3 32 32 --views 10 --json loop.json
    python tools/bench_loop.py --width 512 --alignment-every 100 --starts 0    # what live alignment adds
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from argument_types import ended, new_file, positive, write_json

from alignscale.choices import MLPConfig, SGDConfig, SyntheticConfig
from alignscale.config import AnalysisConfig, EvaluationConfig, LogConfig, RunConfig, TrainConfig
from alignscale.learner import Learner
from alignscale.rules import RULES
from alignscale.train import train

ROOT = Path(__file__).resolve().parents[1]


def loop(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Milliseconds around a step: median and mean over one long epoch."""
    batch, shape, views, steps = options.batch, options.shape, options.views, options.steps
    moves = {"views": views, "shift": 4, "flip": True} if views > 1 else {}
    config = TrainConfig(
        rule=RULES["align_ada"].options(name="align_ada"),
        net=MLPConfig(width=options.width, depth=options.depth),
        data=SyntheticConfig(shape=shape, train=batch * steps, test=batch, **moves),
        optim=SGDConfig(lr=1e-3),
        evaluation=EvaluationConfig(batch_size=batch),
        log=LogConfig(every_steps=options.log_every, alignment_every=options.alignment_every),
        analysis=AnalysisConfig(track_errors=options.alignment_every > 0),
        run=RunConfig(dir=str(folder)),
        epochs=max(2, views),
        batch_size=batch,
        resume="never",
    )
    ends: list[tuple[float, float]] = []
    update = Learner.update

    def timed(self: Learner, *arguments: Any) -> tuple[float, float, list[float]]:
        begin = time.perf_counter()
        result = update(self, *arguments)
        ends.append((begin, time.perf_counter()))
        return result

    module: Any = sys.modules["alignscale.train"]
    alignment, aligned = module.alignment, []

    def timed_alignment(run: Any, step: int, whole: bool = False) -> Any:
        begin = time.perf_counter()
        result = alignment(run, step, whole)
        if not whole:  # at the end of an epoch, where the evaluation is
            aligned.append(1000 * (time.perf_counter() - begin))
        return result

    Learner.update, module.alignment = timed, timed_alignment  # type: ignore[assignment]
    try:
        train(config, lambda line: None)
    finally:
        Learner.update, module.alignment = update, alignment  # type: ignore[method-assign]
    pairs = itertools.pairwise(ends)
    # between two epochs stand the evaluation and the checkpoint
    around = [1000 * (b[0] - a[1]) for index, (a, b) in enumerate(pairs, 1) if index % steps]
    inside = [1000 * (end - begin) for begin, end in ends]
    return {
        "around_ms_median": statistics.median(around),
        "around_ms_mean": statistics.fmean(around),
        "update_ms_median": statistics.median(inside),
        "alignment_ms_mean": statistics.fmean(aligned) if aligned else None,
        "alignment_percent": 100
        * sum(aligned)
        / (sum(aligned) + sum(inside) + len(inside) * statistics.median(around)),
    }


def start(folder: Path, options: Sequence[str]) -> float:
    """Seconds from the command to its first training row."""
    rows = folder / "metrics.jsonl"
    command = [sys.executable, str(ROOT / "launch/train.py"), f"run.dir={folder}", "log.every_steps=1", *options]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (rows.exists() and '"train"' in rows.read_text()):
            if process.poll() not in (None, 0):
                raise RuntimeError(f"{' '.join(command)}: ended with status {process.returncode}")
            time.sleep(0.002)
        seconds = time.perf_counter() - begin
        process.kill()
    return seconds


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Time the loop around a step, and the start of a command.")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--shape", type=int, nargs=3, default=[3, 32, 32], metavar=("C", "H", "W"))
    parser.add_argument("--views", type=int, default=1, help="more than 1 adds shifts and flips")
    parser.add_argument("--steps", type=positive, default=400, help="steps in an epoch")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=1, help="hidden layers")
    parser.add_argument("--alignment-every", type=int, default=0, metavar="N", help="steps; 0: never")
    parser.add_argument("--log-every", type=int, default=10, help="steps between two rows of the metrics")
    parser.add_argument("--step-ms", type=float, default=50.0, help="the step that the loop's cost is compared with")
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--json", type=new_file, metavar="FILE")
    options = parser.parse_args()
    if options.alignment_every and (options.views > 1 or options.alignment_every > 2 * options.steps):
        parser.error("--alignment-every: expected --views 1 and at most the steps of the run, twice --steps")
    if options.steps < 2 or options.step_ms <= 0:
        parser.error("--steps, --step-ms: expected at least 2 steps in an epoch, and a time above 0")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        found = loop(options, place / "loop")
        seconds = [start(place / f"start-{number}", ["net=mlp"]) for number in range(options.starts)]
    found |= {
        "around_percent": 100 * found["around_ms_mean"] / options.step_ms,
        "step_ms": options.step_ms,
        "start_seconds_median": statistics.median(seconds) if seconds else None,
        "start_seconds": seconds,
    }
    print(
        f"around a step: {found['around_ms_median']:.3f} ms (median), {found['around_ms_mean']:.3f} ms (mean), "
        f"{found['around_percent']:.2f} % of a step of {options.step_ms:g} ms"
    )
    if found["alignment_ms_mean"] is not None:
        print(
            f"alignment every {options.alignment_every} steps: {found['alignment_ms_mean']:.0f} ms, "
            f"{found['alignment_percent']:.2f} % of the time, with updates of {found['update_ms_median']:.1f} ms"
        )
    if seconds:
        print(f"start to first step: {found['start_seconds_median']:.2f} s (median of {options.starts})")
    write_json(options.json, found)
    return 0


if __name__ == "__main__":
    ended(main)
