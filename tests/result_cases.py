"""Invented results of every shape for the tests of the report."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

from _report import page as report

RULES = ["backprop", "align_ada", "align_zero", "feedback_alignment", "direct_feedback_alignment", "readout_only"]
BEHIND = dict(zip(RULES, [0.0, 0.4, 0.7, 4.5, 6.0, 9.0], strict=True))
COSINE = dict(zip(RULES, [1.0, 0.97, 0.9, 0.45, 0.35, 0.12], strict=True))


def make_run(rule: str = "align_ada", width: int = 32, seed: int = 0, epochs: int = 10) -> dict[str, Any]:
    """A run like those on the handwritten digits, invented: the wider the net, the nearer every rule is to backprop."""
    dice = random.Random(f"{rule} {width} {seed}")
    best = 0.985 - 0.3 / width - 0.06 * BEHIND[rule] / math.sqrt(width) + dice.gauss(0, 0.002)
    curve: list[dict[str, Any]] = []
    for epoch in range(epochs + 1):
        left = math.exp(-0.6 * epoch)
        cosine = COSINE[rule] ** (8 / width**0.5 * (0.2 + epoch / epochs)) - abs(dice.gauss(0, 0.004))
        curve.append({
            "epoch": epoch, "step": 29 * epoch,
            "train_loss": None if epoch == 0 else 0.02 + 0.45 * left + (1 - best) / 4,
            "test_accuracy": 0.1 + (best - 0.1) * (1 - left) + dice.gauss(0, 0.003),
            "test_loss": 0.03 + 0.47 * left + (1 - best) / 3,
            "update_cosine": None if rule == "backprop" else cosine,
        })  # fmt: skip
    seconds = (0.002 + 1.1e-6 * width**2) * (1 + 0.33 * rule.startswith("align") - 0.5 * (rule == "readout_only"))
    config = {
        "seed": seed, "net": {"name": "conv3", "width": width, "norm": "batch", "gain": 1.0}, "rule": {"name": rule},
        "optim": {"name": "sgd", "lr": 5.0}, "data": {"name": "digits", "batch": 50},
        "frozen": {"weights": "stored"} if rule.startswith("align") else {},
    }  # fmt: skip
    name = f"{rule}-{width}-{seed}"
    return {
        "name": name, "folder": f"runs/{name}", "rule": rule, "net": "conv3", "width": width, "seed": seed,
        "parameters": 18 * width**2 + 24 * width, "config": config, "steps": 29 * epochs, "epochs": epochs, "batch": 50,
        "seconds": seconds * 29 * epochs, "seconds_per_step": seconds, "curve": curve,
        "test": {"accuracy": curve[-1]["test_accuracy"], "loss": curve[-1]["test_loss"]},
        "train": {"loss": curve[-1]["train_loss"]},
    }  # fmt: skip


def make_result(runs: list[dict[str, Any]], title: str = "Handwritten digits, conv3") -> dict[str, Any]:
    """A result that holds the runs."""
    return {
        "format": 1, "title": title, "created": "2026-01-02T03:04:05+00:00",
        "command": "python launch/compare.py rules=[backprop,align_ada] widths=[8,32,128] epochs=10",
        "hardware": {"cpu": "A processor", "cores": 2, "threads": 2, "device": "cpu", "memory_gib": 15.6},
        "versions": {"python": "3.11.9", "torch": "2.13.0", "alignscale": "0.1.0"},
        "config": {"optim": {"name": "sgd", "lr": 5.0}, "data": {"name": "digits", "batch": 50}, "epochs": 10},
        "runs": runs,
    }  # fmt: skip


def comparison(widths: tuple[int, ...] = (8, 32, 128), seeds: int = 1, rules: list[str] = RULES) -> dict[str, Any]:
    """A whole comparison: rules x widths x seeds."""
    return make_result([make_run(rule, width, seed) for width in widths for rule in rules for seed in range(seeds)])


def diverge(run: dict[str, Any]) -> dict[str, Any]:
    """The run as it would look had its loss gone to infinity after the third epoch."""
    for point in run["curve"][4:]:
        point.update(train_loss=math.nan, test_loss=math.inf, test_accuracy=None, update_cosine=None)
    run["curve"][3].update(train_loss=3e7)
    return run | {"test": {"accuracy": None, "loss": math.nan}, "train": {"loss": None}}


def measure_more(run: dict[str, Any]) -> dict[str, Any]:
    """The run as it would look with a validation split, top-5, a schedule, and files that could not be decoded."""
    run = copy.deepcopy(run)
    for point in run["curve"]:
        accuracy = point["test_accuracy"]
        point.update(validation_accuracy=accuracy - 0.01, validation_loss=point["test_loss"], validation_top5=0.98)
        point.update(test_top5=0.99, train_accuracy=accuracy, train_end_loss=point["test_loss"])
        point["lr"] = 5.0 if point["epoch"] < 6 else 0.5
    run["test"]["top5"] = 0.991
    run["train"] |= {"accuracy": 0.997, "top5": 1.0}
    run["validation"] = {"accuracy": 0.952, "top5": 0.98, "loss": 0.1}
    run["best"] = {"split": "validation", "accuracy": 0.963, "epoch": 7, "step": 203}
    return run | {"skipped": 17, "data": "digits"}


def set_option(run: dict[str, Any], group: str, name: str, value: object) -> dict[str, Any]:
    """The run as it would look with another value of an option."""
    run = copy.deepcopy(run)
    run["config"].setdefault(group, {})[name] = value
    return run | {"name": f"{run['name']}-{value}", "folder": f"{run['folder']}-{value}"}


def write_page(folder: Path) -> Path:
    """A comparison's page that has everything, with its JSON and one of the runs' reports beside it."""
    data = comparison(seeds=2)
    data["runs"] = [measure_more(run) for run in data["runs"]]
    for result, place in (
        (make_result(data["runs"][2:3], "One run"), folder / data["runs"][2]["folder"]),
        (data, folder),
    ):
        place.mkdir(parents=True, exist_ok=True)
        (place / "result.json").write_text(json.dumps(result), encoding="utf-8")
        report.write_report(result, place / "report.html")
    return folder / "report.html"
