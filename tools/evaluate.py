"""Accuracy (top-1 and top-5) and loss of a trained run on any of its splits, from any of its checkpoints.

    python tools/evaluate.py runs/demo/demo-align_ada-conv3-w128-s0-1a2b3c4d
    python tools/evaluate.py RUN --checkpoint best --splits train test --json scores.json

Stands alone because a number for a paper is often asked for long after training.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from argument_types import ended, new_file, write_json

from alignscale.checkpoint import CheckpointError
from alignscale.choices import ConfigError
from alignscale.config import CheckpointConfig, EvaluationConfig
from alignscale.data.examples import DataError
from alignscale.evaluate import evaluate
from alignscale.restore import restored
from alignscale.validation import check_data, validate


def scores(run: Path, which: str, splits: Sequence[str], batch_size: int | None) -> list[dict[str, Any]]:
    """A row per split: run, checkpoint's step, split, examples, accuracy, top5, loss."""
    found = restored(run, which)
    for split in splits:
        if split not in found.splits:
            raise ConfigError(f"--splits: {split}: expected some of {', '.join(found.splits)}")
    most = batch_size or found.config.evaluation.batch_size
    options = replace(found.config, evaluation=EvaluationConfig(list(splits), most), checkpoint=CheckpointConfig())
    validate(options)
    check_data(options, {split: len(found.splits[split]) for split in splits})
    return [
        {
            "run": str(run),
            "step": found.step,
            "split": split,
            "examples": len(found.splits[split]),
            **evaluate(found.learner.engine, found.splits[split], found.learner.encoding, most),
        }
        for split in splits
    ]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A line per split."""
    for row in rows:
        print(
            f"{row['split']:10s} step {row['step']}: top-1 {row['accuracy']:.2%}, top-5 {row['top5']:.2%}, "
            f"loss {row['loss']:.5f} ({row['examples']:,} examples)"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Evaluate a trained run on its splits.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--checkpoint", default="last", metavar="WHICH", help="last, best or a step (default: last)")
    parser.add_argument("--splits", nargs="+", default=["test"], metavar="SPLIT", help="train, validation, test")
    parser.add_argument("--batch-size", type=int, metavar="N", help="default: the run's evaluation.batch_size")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the rows here as well")
    options = parser.parse_args(arguments)
    if options.batch_size is not None and options.batch_size < 1:
        parser.error(f"--batch-size {options.batch_size}: expected at least 1")
    try:
        rows = scores(options.run, options.checkpoint, options.splits, options.batch_size)
        show(rows)
        write_json(options.json, rows)
    except (ConfigError, DataError, CheckpointError, OSError) as problem:
        print(f"evaluate: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    ended(main)
