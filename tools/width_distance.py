"""How far a rule's network ends from backprop's, by width: ||f_rule - f_bp|| / ||f_bp - f_0|| on fixed inputs.

An MLP with two hidden relu layers is trained in float64 by each rule from the same start on the same batches; theory
says that the distance vanishes as the width grows. Prints a table and the slope of log distance in log width, per rule.

    python tools/width_distance.py --json distance.json --figure distance.svg
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from argument_types import ended, new_file, write_json

from alignscale.choices import MLPConfig, SGDConfig
from alignscale.engine import LocalEngine, make_optimizer
from alignscale.frozen import Fixed, initialise
from alignscale.initial import Stream, normal
from alignscale.nets import build
from alignscale.rules import RULES, make_rule
from alignscale.types import Batch

FEATURES, CLASSES, EXAMPLES = 20, 3, 40


def final_logits(rule: str, width: int, seed: int, steps: int, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits on the training inputs before and after ``steps`` full-batch updates."""
    images = normal(seed, Stream.DATA, 0, (EXAMPLES, 1, 1, FEATURES)).double()
    targets = normal(seed, Stream.DATA, 1, (EXAMPLES, CLASSES)).double()
    net = build(MLPConfig(width=width, depth=2), (1, 1, FEATURES), CLASSES).double()
    initialise(net, seed)
    module = make_rule(net, Fixed.from_seed(net, seed), RULES[rule].options(name=rule))
    engine = LocalEngine(module, make_optimizer(SGDConfig(lr=lr), module.parameters()))
    with torch.no_grad():
        before = net(images)
    for step in range(steps):
        engine.backward(engine(Batch(images, targets, [], EXAMPLES, step)).surrogate)
        engine.step()
    with torch.no_grad():
        return before, net(images)


def distances(rules: list[str], widths: list[int], seeds: list[int], steps: int, lr: float) -> list[dict[str, Any]]:
    """One row per rule, width and seed with its distance to backprop."""
    rows = []
    for width in widths:
        for seed in seeds:
            start, reference = final_logits("backprop", width, seed, steps, lr)
            for rule in rules:
                _, reached = final_logits(rule, width, seed, steps, lr)
                distance = ((reached - reference).norm() / (reference - start).norm()).item()
                rows.append({"rule": rule, "width": width, "seed": seed, "distance": distance})
    return rows


def slope(rows: list[dict[str, Any]], rule: str) -> float:
    """Least-squares slope of log distance in log width, all seeds together."""
    own = [row for row in rows if row["rule"] == rule]
    widths, values = np.log([row["width"] for row in own]), np.log([row["distance"] for row in own])
    return float(np.polyfit(widths, values, 1)[0])


def draw(result: dict[str, Any], path: Path) -> None:
    """Distance against width on log axes, mean and standard deviation over seeds, with each slope."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    looks = {"align_ada": ("#0072B2", "o", "-"), "align_zero": ("#D55E00", "s", "--")}
    for rule, found in result["slopes"].items():
        widths = sorted({row["width"] for row in result["rows"]})
        per = [[row["distance"] for row in result["rows"] if (row["rule"], row["width"]) == (rule, w)] for w in widths]
        color, marker, line = looks.get(rule, ("#444444", "^", ":"))
        means, errors = [np.mean(values) for values in per], [np.std(values) for values in per]
        label = f"{rule} (slope {found:.2f})"
        axes.errorbar(widths, means, errors, color=color, marker=marker, linestyle=line, capsize=3, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("width (units per hidden layer)")
    axes.set_ylabel("||f_rule - f_backprop|| / ||f_backprop - f_0||")
    axes.set_title(
        f"Distance to backprop after {result['steps']} steps (MLP, 2 hidden relu layers, {len(result['seeds'])} seeds)",
        fontsize=10,
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rules", nargs="+", choices=sorted(set(RULES) - {"backprop"}), default=["align_ada", "align_zero"]
    )
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the rows and slopes to this file")
    parser.add_argument("--figure", type=new_file, metavar="FILE", help="draw them: .svg, .png or .pdf")
    arguments = parser.parse_args()
    if len(set(arguments.widths)) < 2 or min(arguments.widths) < 1 or arguments.steps < 1 or arguments.lr <= 0:
        parser.error("expected at least two different widths above 0, --steps above 0 and --lr above 0")
    rows = distances(arguments.rules, arguments.widths, arguments.seeds, arguments.steps, arguments.lr)
    result = {
        "rows": rows,
        "slopes": {rule: slope(rows, rule) for rule in arguments.rules},
        "steps": arguments.steps,
        "lr": arguments.lr,
        "seeds": arguments.seeds,
    }
    print(f"{'width':>6s} " + " ".join(f"{rule:>26s}" for rule in arguments.rules))
    for width in sorted(set(arguments.widths)):
        per = [[r["distance"] for r in rows if (r["rule"], r["width"]) == (rule, width)] for rule in arguments.rules]
        print(f"{width:6d} " + " ".join(f"{np.mean(values):26.5f}" for values in per))
    print(f"{'slope':>6s} " + " ".join(f"{found:26.3f}" for found in result["slopes"].values()))
    write_json(arguments.json, result)
    if arguments.figure:
        draw(result, arguments.figure)
    return 0


if __name__ == "__main__":
    ended(main)
