"""Time one training step of several rules beside backprop and beside a hand-written plain PyTorch step.

All contenders run in one process, one step each in turn, in an order that rotates from round to round; a row gives
the median seconds and the median over rounds of the ratio to backprop's and to the plain step of the same round, so
that a machine whose speed drifts spoils neither. Every contender uses the same fused SGD.

    python tools/bench_step.py --net conv3 --width 512 --threads 1
    python tools/bench_step.py --net mlp --width 2048 --depth 4 --rules align_ada,align_zero,readout_only
    torchrun --nproc-per-node=2 tools/bench_step.py --distributed --net mlp --width 1024 --depth 4 --stages 0,3
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plain_step import plain_step

from alignscale.choices import NETS, ConfigError, ConvConfig, MLPConfig, NetConfig, SGDConfig
from alignscale.distributed import joined
from alignscale.engine import LocalEngine, make_optimizer
from alignscale.environment import keep_freed_memory
from alignscale.files import write_atomic
from alignscale.frozen import Fixed, initialise
from alignscale.nets import build
from alignscale.rules import RULES, make_rule
from alignscale.types import Batch

SHAPES = {"mlp": (1, 8, 8), "conv3": (1, 8, 8), "conv7": (3, 16, 16), "imagenet_conv7": (3, 224, 224), "rnn": (1, 8, 8)}
JACOBIANS = ("live",)
WARM_UP = 3
PUBLIC_CODE_MS = {"backprop": 217.0, "align_ada": 297.0, "align_zero": 284.0}
"""The paper's public TensorFlow code: conv3, width 512, batch 50, 8x8 digits, one thread, on one CPU of 2026."""


def net_config(name: str, width: int, depth: int | None) -> NetConfig:
    """The options of the network to time. Raises ConfigError for a depth that the network does not have."""
    config = dataclasses.replace(NETS[name], width=width)
    if depth is not None:
        if not isinstance(config, MLPConfig):
            raise ConfigError(f"--depth {depth}: only --net mlp has a depth to set")
        config = dataclasses.replace(config, depth=depth)
    return config


def depth_of(config: NetConfig) -> int:
    """Hidden layers."""
    return (
        config.depth if isinstance(config, MLPConfig) else len(config.strides) if isinstance(config, ConvConfig) else 1
    )


def rule_step(config: NetConfig, rule: str, batch: Batch, classes: int) -> Callable[[], None]:
    """One step of our engine, as the training loop makes it."""
    net = build(config, tuple(batch.images.shape[1:]), classes)
    initialise(net, 0)
    module = make_rule(net, Fixed.from_seed(net, 0), RULES[rule].options(name=rule))
    engine = LocalEngine(module, make_optimizer(SGDConfig(lr=1e-3), module.parameters()))

    def step() -> None:
        output = engine(batch)
        engine.backward(output.surrogate)
        engine.step()

    return step


def measure(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every contender in every round."""
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repeats):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            begin = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def batch_of(arguments: argparse.Namespace) -> Batch:
    """Random images and labels, the same in every process."""
    shape = arguments.shape or SHAPES[arguments.net]
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(arguments.batch, *shape, generator=generator)
    labels = torch.randint(arguments.classes, (arguments.batch,), generator=generator)
    targets = torch.nn.functional.one_hot(labels, arguments.classes).float() - 0.1
    return Batch(images, targets, [], arguments.batch)


def distributed(arguments: argparse.Namespace) -> int:
    """The ranks of torchrun together; the first one writes."""
    from distributed_step import distributed_table, rows  # counts collectives from its import on

    torch.set_num_threads(arguments.threads or 1)
    config = dataclasses.replace(net_config(arguments.net, arguments.width, arguments.depth), norm="none")
    with joined(torch.device("cpu"), 600.0) as ranks:
        found = rows(arguments, config, batch_of(arguments), ranks)
    if ranks.first:
        print(f"{arguments.net}, width {arguments.width}, batch {arguments.batch}, {ranks.size} ranks")
        print(distributed_table(found))
        if arguments.json:
            write_atomic(arguments.json, json.dumps(found, indent=1).encode())
    return 0


def rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure what the command line asks for; the plain step and backprop come first."""
    config, batch = net_config(arguments.net, arguments.width, arguments.depth), batch_of(arguments)
    wanted = ["backprop", *[rule for rule in arguments.rules if rule != "backprop"]]
    steps = {"plain": plain_step(config, batch, arguments.classes)}
    steps |= {rule: rule_step(config, rule, batch, arguments.classes) for rule in wanted}
    seconds = measure(steps, arguments.repeats)
    return [
        {
            "net": arguments.net,
            "width": arguments.width,
            "depth": depth_of(config),
            "batch": arguments.batch,
            "threads": torch.get_num_threads(),
            "rule": name,
            "jacobian": "live" if name in ("align_ada", "align_zero") else None,
            "seconds_median": statistics.median(seconds[name]),
            "ratio_to_backprop": ratio(seconds[name], seconds["backprop"]),
            "ratio_to_plain": ratio(seconds[name], seconds["plain"]),
        }
        for name in steps
    ]


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def table(measured: list[dict[str, Any]]) -> str:
    """The rows as aligned text, beside the public code's figures where the network is theirs."""
    lines = [f"{'rule':28s} {'jacobian':>8s} {'ms':>9s} {'/ backprop':>10s} {'/ plain':>8s}"]
    lines += [
        f"{row['rule']:28s} {row['jacobian'] or '-':>8s} {1000 * row['seconds_median']:9.2f} "
        f"{row['ratio_to_backprop']:10.3f} {row['ratio_to_plain']:8.3f}"
        for row in measured
    ]
    first = measured[0]
    if [first[key] for key in ("net", "width", "batch", "threads")] == ["conv3", 512, 50, 1]:
        lines.append("\nbeside the paper's public TensorFlow code (its times are from another machine):")
        lines += [
            f"{row['rule']:28s} ours {1000 * row['seconds_median']:7.1f} ms, "
            f"theirs {PUBLIC_CODE_MS[row['rule']]:5.0f} ms, "
            f"ratio {1000 * row['seconds_median'] / PUBLIC_CODE_MS[row['rule']]:.2f}"
            for row in measured
            if row["rule"] in PUBLIC_CODE_MS
        ]
    return "\n".join(lines)


def parse(command: list[str] | None = None) -> argparse.Namespace:
    """The command line; every wrong value is refused with the valid ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=sorted(SHAPES), default="conv3")
    parser.add_argument("--width", type=_positive, default=512)
    parser.add_argument("--depth", type=_positive, help="hidden layers of --net mlp")
    parser.add_argument("--batch", type=_positive, default=50)
    parser.add_argument("--classes", type=_positive, default=10)
    parser.add_argument("--shape", type=_shape, help="C,H,W of the images; by default the net's usual data")
    parser.add_argument(
        "--rules", type=_names(tuple(sorted(RULES))), default=["align_ada", "align_zero", "readout_only"]
    )
    parser.add_argument("--jacobian", type=_names(JACOBIANS), default=["live"], help="forms of the frozen Jacobian")
    parser.add_argument("--threads", type=_positive, help="by default torch's own number")
    parser.add_argument("--repeats", type=_positive, default=15, help="rounds; a round runs every contender once")
    parser.add_argument("--distributed", action="store_true", help="under torchrun: DeepSpeed on all ranks, norm none")
    parser.add_argument("--stages", type=_numbers(range(4)), default=[0, 1, 2, 3], help="of ZeRO, with --distributed")
    parser.add_argument("--bandwidth", type=_speeds, default=[1.0, 10.0, 100.0], help="GB/s a rank, to project to")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    return parser.parse_args(command)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    lengths = tuple(_positive(part) for part in text.split(","))
    if len(lengths) != 3:
        raise argparse.ArgumentTypeError(f"expected C,H,W, found {text!r}")
    return lengths


def _numbers(valid: range) -> Callable[[str], list[int]]:
    names = _names(tuple(str(number) for number in valid))
    return lambda text: [int(name) for name in names(text)]


def _speeds(text: str) -> list[float]:
    try:
        speeds = [float(part) for part in text.split(",")]
    except ValueError:
        speeds = []
    if not speeds or min(speeds) <= 0:
        raise argparse.ArgumentTypeError(f"expected numbers above 0, as 1,10,100, found {text!r}")
    return speeds


def _names(valid: tuple[str, ...]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        found = [name for name in text.split(",") if name]
        wrong = [name for name in found if name not in valid]
        if wrong or not found:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(valid)}, found {text!r}")
        return list(dict.fromkeys(found))

    return names


def main() -> int:
    """Command line."""
    arguments = parse()
    keep_freed_memory()  # as the training loop does, for every contender
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        if arguments.distributed:
            return distributed(arguments)
        measured = rows(arguments)
    except ConfigError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    first = measured[0]
    print(
        f"{first['net']}, width {first['width']}, {first['depth']} hidden layers, batch {first['batch']}, "
        f"{first['threads']} threads, medians of {arguments.repeats} rounds"
    )
    print(table(measured))
    if arguments.json:
        write_atomic(arguments.json, json.dumps(measured, indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
