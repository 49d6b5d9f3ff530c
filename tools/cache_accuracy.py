"""What a narrow cache costs in accuracy: digits, from live and from each form and dtype, over seeds.

    python tools/cache_accuracy.py --json accuracy.json

Each row has the mean test accuracy and its standard error, and the largest distance over seeds of the logits on the
test set from those of live, relative to their norm.
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from argument_types import ended, new_file, positive, write_json

from alignscale.choices import DigitsConfig, MLPConfig, SGDConfig
from alignscale.config import JACOBIANS, LogConfig, RunConfig, TrainConfig, run_folder
from alignscale.restore import restored
from alignscale.rules import RULES
from alignscale.train import train

CONTENDERS = [
    ("live", "fp32"), ("gates", "fp32"), ("explicit", "fp32"), ("explicit", "bf16"), ("explicit", "fp16"),
    ("explicit", "fp8"),
]  # fmt: skip


def run(
    rule: str, form: str, dtype: str, seed: int, width: int, epochs: int, folder: Path
) -> tuple[float, torch.Tensor]:
    """Test accuracy, and the logits on the test set."""
    jacobian = replace(JACOBIANS[form], dtype=dtype, root=str(folder / "cache"), build=True)
    if rule == "align_zero" and dtype == "bf16":
        jacobian.inputs = "bf16"
    config = TrainConfig(
        RULES[rule].options(name=rule), MLPConfig(width=width), DigitsConfig(), SGDConfig(lr=1.0), jacobian=jacobian,
        seed=seed, epochs=epochs, log=LogConfig(progress=False, tensorboard=False), run=RunConfig(root=str(folder)),
    )  # fmt: skip
    result = train(config, lambda line: None)
    found = restored(run_folder(config))
    with torch.no_grad():
        test = found.splits["test"]
        logits = found.learner.net(found.learner.encoding.batch(test, torch.arange(len(test)), 0).images)
    return result["runs"][0]["test"]["accuracy"], logits


def rows(rules: list[str], seeds: int, width: int, epochs: int) -> list[dict[str, Any]]:
    """A row for each rule, form and dtype."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for rule in rules:
            live: list[torch.Tensor] = []
            for form, dtype in CONTENDERS:
                made = [run(rule, form, dtype, seed, width, epochs, Path(folder)) for seed in range(seeds)]
                live = live or [logits for _, logits in made]
                accuracies = [accuracy for accuracy, _ in made]
                apart = [(one - other).norm() / other.norm() for (_, one), other in zip(made, live, strict=True)]
                found.append({
                    "rule": rule, "jacobian": form, "dtype": dtype, "width": width, "epochs": epochs, "seeds": seeds,
                    "accuracy": statistics.mean(accuracies),
                    "error": statistics.stdev(accuracies) / seeds**0.5 if seeds > 1 else None,
                    "logits_apart": max(one.item() for one in apart),
                })  # fmt: skip
                print(f"{rule:11s} {form:8s} {dtype:5s} {found[-1]['accuracy']:.2%} {found[-1]['logits_apart']:.1e}")
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--width", type=positive, default=512)
    parser.add_argument("--epochs", type=positive, default=20)
    parser.add_argument("--json", type=new_file, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = rows(["align_ada", "align_zero"], options.seeds, options.width, options.epochs)
    write_json(options.json, found)


if __name__ == "__main__":
    ended(main)
