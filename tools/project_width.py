"""Project a step of each rule to 1 to 1024 ranks: the fastest layout that fits, its time and its efficiency.

    python tools/project_width.py --net mlp --width 65536 --depth 8 --shape 3,32,32 --batch 4096 \
        --json projection.json --figure projection.png

A layout is width x data ranks and a stage of ZeRO. Nothing overlaps: a step takes its operations at --flops, its bytes
at --bandwidth and --latency for each message. Efficiency is the time of the operations of one rank, divided over all,
to that of the step. Without --optimizer-states the optimizer keeps none, as plain SGD.
"""

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from argument_types import ended, new_file, positive, shape, write_json
from mesh_costs import flop, memory, seconds

from alignscale.choices import NETS, MLPConfig, NetConfig
from alignscale.traffic import Plan, exchanges

CONTENDERS = (("backprop", "live"), ("align_ada", "live"), ("align_ada", "gates"), ("align_ada", "explicit"))
SPARE = 0.9
"""The part of a device's memory that weights and activations may take."""


def layouts(plan: Plan, ranks: int) -> list[Plan]:
    """Every mesh and stage of so many ranks."""
    widths = [width for width in range(1, min(ranks, plan.net.width) + 1) if ranks % width == 0]
    pairs = itertools.product(widths, range(4))
    found = [dataclasses.replace(plan, width=width, data=ranks // width, stage=stage) for width, stage in pairs]
    return [one for one in found if one.data <= plan.batch and (one.data > 1 or one.stage == 0)]


def kept(plan: Plan) -> int:
    """Bytes on a rank."""
    return sum(memory(plan).values())


def row(plan: Plan, ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    """The fastest layout that fits; of none that does, the one that takes least."""
    every = layouts(plan, ranks)
    fitting = [one for one in every if kept(one) <= SPARE * options.memory * 1e9]
    given = (options.flops * 1e12, options.bandwidth * 1e9, options.latency * 1e-6)
    best = min(fitting, key=lambda one: seconds(one, *given)) if fitting else min(every, key=kept)
    step = seconds(best, *given)
    whole = dataclasses.replace(plan, width=1, data=1, stage=0)
    return {
        "ranks": ranks, "rule": plan.rule, "jacobian": plan.jacobian, "fits": bool(fitting),
        "layouts": len(every), "fitting": [f"{one.width}x{one.data} ZeRO {one.stage}" for one in fitting],
        "width": best.width, "data": best.data, "zero_stage": best.stage, "bytes": kept(best),
        "seconds": step, "compute_seconds": flop(best) / given[0],
        "messages": sum(one.messages for one in exchanges(best)),
        "efficiency": flop(whole) / given[0] / ranks / step,
    }  # fmt: skip


def figure(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw step time and efficiency against ranks."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(9, 3.6), layout="constrained")
    times, parts = drawing.subplots(1, 2)
    # gates lie on backprop: dashes show both; the colours are Okabe and Ito's, apart for the colour-blind
    styles = (("-", "#000000"), ("-", "#d55e00"), ("--", "#56b4e9"), ("-", "#009e73"))
    for (rule, jacobian), (line, colour) in zip(CONTENDERS, styles, strict=True):
        points = [one for one in rows if (one["rule"], one["jacobian"]) == (rule, jacobian) and one["fits"]]
        label = rule if rule == "backprop" else f"{rule}, {jacobian}"
        ranks = [one["ranks"] for one in points]
        for axes, value in ((times, "seconds"), (parts, "efficiency")):
            numbers = [one[value] for one in points]
            axes.plot(ranks, numbers, line, color=colour, marker="o", markersize=3, label=label)
    for axes, name in ((times, "seconds a step"), (parts, "efficiency (1: as one rank)")):
        axes.set(xscale="log", xlabel="ranks", ylabel=name)
        axes.grid(alpha=0.3)
    times.set_yscale("log")
    parts.set_ylim(0, 1.05)
    times.legend(fontsize=8)
    drawing.suptitle(title, fontsize=10)
    drawing.savefig(path, dpi=150)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text, each beside backprop on as many ranks."""
    head = f"{'ranks':>5s} {'rule':10s} {'jacobian':9s} {'width x data':>12s} {'ZeRO':>4s} {'GB':>8s} {'ms':>10s} "
    lines = [head + f"{'/ backprop':>10s} {'efficiency':>10s}"]
    for one in rows:
        first = next(row for row in rows if row["ranks"] == one["ranks"] and row["rule"] == "backprop")
        mesh = f"{one['width']} x {one['data']}" if one["fits"] else "none fits"
        line = f"{one['ranks']:5d} {one['rule']:10s} {one['jacobian']:9s} {mesh:>12s} {one['zero_stage']:4d} "
        line += f"{one['bytes'] / 1e9:8.1f} {1000 * one['seconds']:10.2f} "
        lines.append(line + f"{one['seconds'] / first['seconds']:10.2f} {one['efficiency']:10.2f}")
    return "\n".join(lines)


def net_of(options: argparse.Namespace) -> NetConfig:
    """The network of the command line."""
    config = dataclasses.replace(NETS[options.net], width=options.width, norm="none")
    return dataclasses.replace(config, depth=options.depth) if isinstance(config, MLPConfig) else config


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=sorted(NETS), default="mlp")
    parser.add_argument("--width", type=positive, default=8192)
    parser.add_argument("--depth", type=positive, default=8, help="hidden layers of --net mlp")
    parser.add_argument("--shape", type=shape, default=(3, 32, 32), help="C,H,W of the images")
    parser.add_argument("--classes", type=positive, default=10)
    parser.add_argument("--batch", type=positive, default=1024, help="examples in a step on all ranks")
    parser.add_argument("--ranks", type=lambda text: [positive(part) for part in text.split(",")],
                        default=[2**power for power in range(11)])  # fmt: skip
    parser.add_argument("--flops", type=float, default=60.0, help="TFLOP/s of a rank")
    parser.add_argument("--bandwidth", type=float, default=50.0, help="GB/s of a rank")
    parser.add_argument("--latency", type=float, default=20.0, help="microseconds a message")
    parser.add_argument("--memory", type=float, default=80.0, help="GB of a rank")
    parser.add_argument("--optimizer-states", type=int, default=0, help="numbers a weight: momentum 1, adam 2")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--figure", type=new_file, metavar="FILE", help="draw step time and efficiency")
    options = parser.parse_args(arguments)
    if min(options.flops, options.bandwidth, options.memory) <= 0:
        parser.error("--flops, --bandwidth, --memory: expected numbers above 0")
    if min(options.latency, options.optimizer_states) < 0:
        parser.error("--latency, --optimizer-states: expected numbers of at least 0")
    plan = Plan(net_of(options), options.shape, options.classes, options.batch, states=options.optimizer_states)
    plans = [dataclasses.replace(plan, rule=rule, jacobian=jacobian) for rule, jacobian in CONTENDERS]
    for ranks in options.ranks:
        if not layouts(plan, ranks):
            parser.error(f"--ranks {ranks}: expected a layout of at most --width x --batch = {options.width} x "
                         f"{options.batch} ranks, found none")  # fmt: skip
    rows = [row(one, ranks, options) for ranks in options.ranks for one in plans]
    print(table(rows))
    write_json(options.json, rows)
    if options.figure:
        title = f"{options.net}, width {options.width}, batch {options.batch}: projected, {options.flops:g} TFLOP/s, "
        figure(rows, options.figure, title + f"{options.bandwidth:g} GB/s, {options.latency:g} us")
    return 0


if __name__ == "__main__":
    ended(main)
