"""Time one training step of several rules beside backprop and beside a hand-written plain PyTorch step.

All contenders run in one process, one step each in turn, in an order that rotates from round to round; a row gives
the median seconds and the median over rounds of the ratio to backprop's and to the plain step of the same round, so
that a machine whose speed drifts spoils neither. Every contender uses the same fused SGD. build: what making the cache
computes, over the passes of the initial network that it needs.

    python tools/bench_step.py --net conv3 --width 512 --threads 1
    python tools/bench_step.py --net mlp --width 2048 --depth 4 --rules align_ada,align_zero,readout_only
    python tools/bench_step.py --net mlp --width 4096 --depth 4 --batch 256 --jacobian live,gates,explicit
    python tools/bench_step.py --device cuda --precision bf16 --net mlp --width 8192 --depth 8 --batch 1024 \
        --jacobian live,gates,explicit --tier device,host,disk
    torchrun --nproc-per-node=2 tools/bench_step.py --distributed --net mlp --width 1024 --depth 4 --stages 0,3
"""

import argparse
import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from argument_types import ended, names, new_file, numbers, positive, shape, speeds, write_json
from cached_step import build_ratio, cached_step
from plain_step import plain_step
from step_work import IN_A_ROW, Contender, clocked, measure, operations, peak_rate

from alignscale.choices import NETS, ConfigError, LocalConfig, MLPConfig, NetConfig, SGDConfig
from alignscale.config import JACOBIANS
from alignscale.environment import device_called, hardware, keep_freed_memory
from alignscale.jacobian.cache import Cache
from alignscale.jacobian.form import DTYPES
from alignscale.learner import PRECISIONS, Learner
from alignscale.rules import RULES
from alignscale.types import Batch

SHAPES = {"mlp": (1, 8, 8), "conv3": (1, 8, 8), "conv7": (3, 16, 16), "imagenet_conv7": (3, 224, 224), "rnn": (1, 8, 8)}
TIERS = ("device", "host", "disk")
BUILDS = 5
"""Rounds in which the making of a cache is timed."""
UNUSED = {"norm": "none", "jacobian": ["live"], "dtype": "fp32", "tier": ["host"], "unfused": False, "no_graph": False}
UNUSED_BY_WIDTH = {"frozen": "stored", "precision": "fp32", "device": "cpu", "reduce_dtype": "auto"}
"""Options without effect with --distributed, and with --parallel-width too: what they may be."""
PUBLIC_CODE_MS = {"backprop": 217.0, "align_ada": 297.0, "align_zero": 284.0}
"""The paper's public TensorFlow code: conv3, width 512, batch 50, 8x8 digits, one thread, on one CPU of 2026."""


def net_config(name: str, width: int, depth: int | None, norm: str | None = None) -> NetConfig:
    """The options of the network to time. Raises ConfigError for a depth that the network does not have."""
    config = dataclasses.replace(NETS[name], width=width, norm=norm or NETS[name].norm)
    if depth is not None:
        if not isinstance(config, MLPConfig):
            raise ConfigError(f"--depth {depth}: only --net mlp has a depth to set")
        config = dataclasses.replace(config, depth=depth)
    return config


def rule_step(learner: Learner, batch: Batch, fused: bool = True) -> Callable[[], None]:
    """One step of our engine, as the training loop makes it."""
    engine = learner.engine
    for group in engine.optimizer.param_groups:
        group["fused"] = fused

    def step() -> None:
        output = engine(batch)
        engine.backward(output.surrogate)
        engine.step()

    return step


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
    from distributed_step import distributed_table, ranks_on, rows  # counts collectives from its import on

    for option, default in {**UNUSED, **(UNUSED_BY_WIDTH if arguments.parallel_width else {})}.items():
        if getattr(arguments, option) not in (None, "auto", default):
            raise ConfigError(f"--{option.replace('_', '-')}: has no effect with --distributed; leave it out")
    torch.set_num_threads(arguments.threads or 1)
    config = dataclasses.replace(net_config(arguments.net, arguments.width, arguments.depth), norm="none")
    device = torch.device("cpu") if arguments.parallel_width else device_called(arguments.device)
    with ranks_on(device) as ranks:
        if arguments.parallel_width:
            from width_step import width_rows, width_table

            rows, distributed_table = width_rows, width_table
        found = rows(arguments, config, batch_of(arguments), ranks, device)
    if ranks.first:
        where = f"{ranks.size} ranks, {hardware(device)['device']}, {arguments.precision}"
        print(f"{arguments.net}, width {arguments.width}, batch {arguments.batch}, {where}")
        print(distributed_table(found))
        write_json(arguments.json, found)
    return 0


def rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure what the command line asks for; the plain step and backprop come first."""
    torch.backends.cudnn.benchmark = True  # as torch_settings has it in training
    config = net_config(arguments.net, arguments.width, arguments.depth, arguments.norm)
    device, (dtype, _) = device_called(arguments.device), PRECISIONS[arguments.precision]
    batch = batch_of(arguments)
    batch = dataclasses.replace(batch, images=batch.images.to(device, dtype), targets=batch.targets.to(device))
    shape = tuple(batch.images.shape[1:])
    if config.norm == "batch" and set(arguments.jacobian) - {"live"}:
        raise ConfigError(f"--jacobian {','.join(arguments.jacobian)}: expected --norm none, found norm batch")
    wanted = ["backprop", *[rule for rule in arguments.rules if rule != "backprop"]]
    fused, engine = not arguments.unfused, LocalConfig(cuda_graph=not arguments.no_graph)
    plain = plain_step(config, batch, arguments.classes, fused, dtype)
    steps: dict[Contender, Callable[[], None]] = {("plain", None, None): plain}
    frozen: dict[Contender, float] = {}
    predicted: dict[Contender, float] = {}
    built: dict[Contender, float | None] = {}
    with ExitStack() as held:
        for rule in wanted:
            forms = arguments.jacobian if RULES[rule].reads_jacobian else [None]
            for form in forms:
                if form in (None, "live"):
                    learner = Learner(
                        config, shape, arguments.classes, rule, SGDConfig(lr=1e-3), device=device,
                        precision=arguments.precision, frozen_weights=arguments.frozen, engine=engine,
                    )  # fmt: skip
                    steps[rule, form, None] = rule_step(learner, batch, fused)
                    if form == "live":
                        initial_pass = functools.partial(learner.fixed.frozen.trace, batch.images)
                        initial_pass()
                        passes = [clocked(initial_pass, device) for _ in range(arguments.repeats)]
                        frozen[rule, form, None] = statistics.median(passes)
                    continue
                for tier in arguments.tier:
                    how = (form, arguments.dtype, tier, batch, arguments.classes, held, fused, arguments.precision)
                    steps[rule, form, tier], cache = cached_step(config, rule, *how, engine=engine)
                    predicted |= predictions(cache, rule, form, tier)
                    built[rule, form, tier] = build_ratio(cache, batch, BUILDS)
        seconds = measure(steps, arguments.repeats, device, IN_A_ROW[device.type])
    machine = {**hardware(device), "precision": arguments.precision, "peak_tflops": peak_rate(device, dtype) / 1e12}
    made = {name: operations(learner.net, batch.images, name[0], name[1], arguments.classes) for name in steps}
    rates = {name: flop and flop / statistics.median(seconds[name]) / 1e12 for name, flop in made.items()}
    return [
        {
            "net": arguments.net,
            "width": arguments.width,
            "depth": len(learner.net.norms),
            "batch": arguments.batch,
            **machine,
            "rule": name[0],
            "jacobian": name[1],
            "tier": name[2],
            "seconds_median": statistics.median(seconds[name]),
            "ratio_to_backprop": ratio(seconds[name], seconds["backprop", None, None]),
            "ratio_to_plain": ratio(seconds[name], seconds["plain", None, None]),
            "predicted_seconds": predicted.get(name),
            "frozen_pass_seconds": frozen.get(name),
            "build_ratio": built.get(name),
            "images_per_second": arguments.batch / statistics.median(seconds[name]),
            "tflops": rates[name],
        }
        for name in steps
    ]


def predictions(cache: Cache, rule: str, form: str, tier: str) -> dict[Contender, float]:
    """Seconds that the cost model gives for a form in its cache, for live and for backprop."""
    planner, chosen = cache.planner, cache.chosen()
    return {
        ("backprop", None, None): planner.backprop,
        (rule, "live", None): planner.step(None, "host"),
        (rule, form, tier): planner.step(chosen, cache.tier_of(chosen)),
    }


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def table(measured: list[dict[str, Any]]) -> str:
    """The rows as aligned text, beside the public code's figures where the network is theirs."""
    head = (
        f"{'rule':25s} {'jacobian':>8s} {'tier':>6s} {'ms':>9s} {'/ backprop':>10s} {'/ plain':>8s} {'predicted':>9s}"
    )
    lines = [f"{head} {'frozen':>7s} {'build':>6s} {'examples/s':>10s} {'TFLOP/s':>8s} {'of peak':>7s}"]
    for row in measured:
        guess, initial = (
            f"{1000 * row[key]:.2f}" if row[key] else "-" for key in ("predicted_seconds", "frozen_pass_seconds")
        )
        build = f"{row['build_ratio']:.2f}" if row["build_ratio"] else "-"
        rate, share = (f"{row['tflops']:.3f}", f"{row['tflops'] / row['peak_tflops']:.0%}") if row["tflops"] else "--"
        lines.append(
            f"{row['rule']:25s} {row['jacobian'] or '-':>8s} {row['tier'] or '-':>6s} "
            f"{1000 * row['seconds_median']:9.2f} {row['ratio_to_backprop']:10.3f} {row['ratio_to_plain']:8.3f} "
            f"{guess:>9s} {initial:>7s} {build:>6s} {row['images_per_second']:10.0f} {rate:>8s} {share:>7s}"
        )
    lines.append(f"peak: {measured[0]['peak_tflops']:.3f} TFLOP/s in a large product of matrices in this precision")
    errors = [abs(row["predicted_seconds"] / row["seconds_median"] - 1) for row in measured if row["predicted_seconds"]]
    if errors:
        lines.append(f"median error of the predictions: {statistics.median(errors):.0%}")
    first = measured[0]
    if [first[key] for key in ("net", "width", "batch", "threads", "device")] == ["conv3", 512, 50, 1, "cpu"]:
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
    parser.add_argument("--width", type=positive, default=512)
    parser.add_argument("--depth", type=positive, help="hidden layers of --net mlp")
    parser.add_argument("--batch", type=positive, default=50)
    parser.add_argument("--classes", type=positive, default=10)
    parser.add_argument("--shape", type=shape, help="C,H,W of the images; by default the net's usual data")
    parser.add_argument(
        "--rules", type=names(tuple(sorted(RULES))), default=["align_ada", "align_zero", "readout_only"]
    )
    parser.add_argument("--jacobian", type=names(tuple(JACOBIANS)), default=["live"], help="live, or from a cache")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="of an explicit Jacobian")
    parser.add_argument("--tier", type=names(TIERS), default=["host"], help="where a cache is kept")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the computation")
    parser.add_argument("--norm", choices=("none", "batch"), help="by default the net's own")
    parser.add_argument("--unfused", action="store_true", help="torch's plain SGD in place of its fused one, for all")
    parser.add_argument("--no-graph", action="store_true", help="a GPU's steps as they are, not recorded and replayed")
    parser.add_argument("--frozen", choices=("stored", "regenerated"), default="stored", help="initial weights of live")
    parser.add_argument("--threads", type=positive, help="by default torch's own number")
    parser.add_argument("--repeats", type=positive, default=15, help="rounds; a round runs every contender once")
    parser.add_argument(
        "--parallel-width", type=positive, default=0, metavar="K",
        help="with --distributed: the width over K ranks; memory and traffic, measured and calculated, layer by layer",
    )  # fmt: skip
    parser.add_argument("--distributed", action="store_true", help="under torchrun: DeepSpeed on all ranks, norm none")
    parser.add_argument("--stages", type=numbers(range(4)), default=[0, 1, 2, 3], help="of ZeRO, with --distributed")
    parser.add_argument("--reduce-dtype", choices=("auto", "fp32", "bf16"), default="auto", help="of gradients' sums")
    parser.add_argument("--bandwidth", type=speeds, default=[1.0, 10.0, 100.0], help="GB/s a rank, to project to")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the rows to this file")
    return parser.parse_args(command)


def main() -> int:
    """Command line."""
    arguments = parse()
    keep_freed_memory()  # as the training loop does, for every contender
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.distributed:
        return distributed(arguments)
    measured = rows(arguments)
    first = measured[0]
    print(
        f"{first['net']}, width {first['width']}, {first['depth']} hidden layers, batch {first['batch']}, "
        f"{first['device']}, {first['precision']}, {first['threads']} threads, medians of {arguments.repeats} rounds"
    )
    print(table(measured))
    write_json(arguments.json, measured)
    return 0


if __name__ == "__main__":
    ended(main)
