"""Make, or plan, the cache of the initial network's Jacobian for a run; the options are those of launch/train.py.

    python tools/cache_jacobian.py rule=align_ada net=mlp net.width=4096 data=cifar10 jacobian=explicit
    python tools/cache_jacobian.py --plan rule=align_zero net=mlp net.width=4096 data=cifar10 jacobian=auto
    torchrun --nproc-per-node=8 tools/cache_jacobian.py rule=align_ada net=imagenet_conv7 ... jacobian=gates

Only what is missing is made, so a command that was stopped is given again. ``--plan`` makes nothing: it prints each
form with its size, the time to make it, the time of a training step with it, and whether it fits.
"""

import math
import sys
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "launch"))

from _hydra import entry

from alignscale.choices import ConfigError, DeepSpeedConfig, LocalConfig
from alignscale.config import TrainConfig
from alignscale.data import load
from alignscale.jacobian.cache import Cache
from alignscale.jacobian.form import Form
from alignscale.jacobian.plan import Planner
from alignscale.memory import check_memory
from alignscale.moments import calibrated
from alignscale.prepare import begun, cache_of, make_learner
from alignscale.rules import RULES
from alignscale.validation import check_data

PLAN = "--plan"


def table(cache: Cache) -> str:
    """A line for each form and tier, then how the layers differ."""
    planner, fastest = cache.planner, cache.chosen()
    tiers = (*(("device",) if cache.encoding.device.type == "cuda" else ()), "host", "disk")
    machine = planner.machine
    speeds = (
        f"memory {machine.memory / 1e9:.1f}, disk {machine.disk / 1e9:.2f} (writing {machine.disk_write / 1e9:.2f})"
    )
    if machine.network < math.inf:
        speeds += f", network {machine.network / 1e9:.2f} a rank"
    lines = [
        f"{cache.folder}: {cache.examples:,} examples, batch {planner.batch} on each rank",
        f"measured: {planner.costs.flop_rate / 1e9:.0f} GFLOP/s; GB/s: {speeds}",
        f"{'form':10s} {'tier':7s} {'GiB':>9s} {'build s':>9s} {'step ms':>9s} {'/ backprop':>10s}",
        row("backprop", "-", 0.0, 0.0, planner.backprop, planner.backprop, ""),
        row("live", "-", 0.0, 0.0, planner.step(None, "host"), planner.backprop, ""),
    ]
    for name, form in cache.candidates().items():
        size = cache.examples * planner.size(form)
        for tier in tiers:
            fits = "" if size <= cache.free(tier) else f"does not fit {cache.free(tier) / 2**30:.1f} GiB"
            mark = "chosen" if form == fastest and tier == cache.tier_of(form) else fits
            build = build_seconds(planner, form, cache.examples)
            lines.append(row(name, tier, size / 2**30, build, planner.step(form, tier), planner.backprop, mark))
    lines += [f"layers: {', '.join(fastest.sites)}"]
    widths = [shape[0] for shape in cache.frozen.net.shapes]
    even = [f"{planner.costs.flop_rate / machine.bandwidth(tier):.0f} in {tier}" for tier in tiers]
    lines.append(
        f"width / classes: {', '.join(f'{width / cache.train.classes:.0f}' for width in widths)}; an explicit "
        f"Jacobian pays above {', '.join(even)}"
    )
    return "\n".join(lines)


def build_seconds(planner: Planner, form: Form, examples: int) -> float:
    """Of a cache: the passes it needs, and the writing, which goes on beside them."""
    passes = planner.forward + (planner.classes * planner.pullback if "explicit" in form.sites else 0.0)
    return max(passes * examples / planner.batch, examples * planner.size(form) / planner.machine.disk_write)


def row(name: str, tier: str, size: float, build: float, step: float, backprop: float, mark: str) -> str:
    """One line."""
    return f"{name:10s} {tier:7s} {size:9.3f} {build:9.1f} {1000 * step:9.2f} {step / backprop:10.2f} {mark}".rstrip()


def cache_for(config: TrainConfig, held: ExitStack) -> Cache:
    """The cache of a run that need not have begun. held: is given torch's settings and the process group."""
    device, engine, mesh = begun(config, held)
    ranks = mesh.everyone
    train = ranks.together(lambda: load(config.data))["train"]
    check_data(config, {"train": len(train)})
    ranks.together(lambda: check_memory(config, train, device, engine, mesh))
    local = LocalConfig(cuda_graph=False) if isinstance(engine, DeepSpeedConfig) else engine
    learner = make_learner(config, train, device, local, mesh)
    cache = cache_of(config, learner, train)
    if config.net.norm == "calibrated":
        calibrated(config, learner, train, None)
    return cache


@entry("train")
def main(config: TrainConfig) -> None:
    """Plan or make."""
    if not RULES[config.rule.name].reads_jacobian:
        readers = ", ".join(name for name, rule in sorted(RULES.items()) if rule.reads_jacobian)
        raise ConfigError(f"rule={config.rule.name}: reads no frozen Jacobian; expected one of {readers}")
    if config.jacobian.name == "live":
        raise ConfigError("jacobian=live: expected gates, explicit or auto, which have a cache")
    with ExitStack() as held:
        cache = cache_for(config, held)
        show = print if cache.mesh.everyone.first else lambda line: None
        if planning:
            show(table(cache))
        else:
            cache.make(show)
            show(f"the cache is whole: {cache.folder}")


if __name__ == "__main__":
    planning = PLAN in sys.argv
    sys.argv = [one for one in sys.argv if one != PLAN]
    main()
