"""Check that a device computes what the CPU computes in float64, before a long run is trusted to it.

The initial weights bit by bit; one update of every rule, network and norm in fp32, and some steps of training, which a
GPU records and replays; in half precision the cosine with fp32's update at the ImageNet recipe's scale (batch 100, 1000
classes); training from caches in every form and tier.

    python tools/check_device.py --device cuda
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from argument_types import ended, names
from cached_step import cached_step

from alignscale.choices import NETS, ConvConfig, MLPConfig, NetConfig, RNNConfig, SGDConfig
from alignscale.engine import LocalEngine
from alignscale.environment import device_called
from alignscale.initial import Stream, normal
from alignscale.learner import PRECISIONS, Learner
from alignscale.rules import RULES
from alignscale.types import Batch

CPU = torch.device("cpu")
GROUPS = ("initial", "update", "steps", "half", "cache")
EXACT = 1e-4
"""Distance to float64 that sums in fp32 may have."""
AFTER_STEPS, RATE = 5e-3, 1e-2
"""The same after some steps, and their learning rate."""
PARTS = [(24,)] * 5 + [(11,), (24,), (24, 24), (24,), (7,), (7, 7)] + [(7,)] * 4 + [(24, 24)] * 3 + [(24, 11), (24,)]
REPLAYS = 11
"""Examples of the parts of each step's batch: long enough alike to be recorded, and with others in between; and how
many parts a GPU replays then."""
COSINES = {"fp16": 0.999, "bf16": 0.99}
CACHES = [("gates", "fp32", 1e-3), ("explicit", "fp32", 1e-3), ("explicit", "fp16", 2e-3), ("explicit", "bf16", 2e-2),
          ("explicit", "fp8", 0.1)]  # fmt: skip
"""Form, dtype, and how far from float64 the change of the weights may be."""
Finding = tuple[str, float, float, bool]
"""What was checked, the figure, its bound, and whether the figure has to be below the bound or above."""


@contextmanager
def without_tf32() -> Iterator[None]:
    """fp32 with all of its bits: TF32 keeps 10 of 23."""
    before = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def batch_for(learner: Learner, examples: int, seed: int = 0, size: int = 0) -> Batch:
    """The same random examples on every device; size: of the batch that they are a part of."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(examples, *learner.shape, generator=generator)
    labels = torch.randint(learner.classes, (examples,), generator=generator)
    encoding = learner.encoding
    targets = encoding.loss.targets(labels.to(encoding.device), learner.classes, encoding.master)
    return Batch(encoding.images(images), targets, [], size or examples, seed)


def update(
    config: NetConfig, rule: str, precision: str, device: torch.device, shape: tuple[int, ...], classes: int = 10,
    examples: int = 24,
) -> Tensor:  # fmt: skip
    """The gradient that the engine is given, of all weights in one row, (parameters,) float64 on the CPU."""
    learner = Learner(config, shape, classes, rule, seed=1, precision=precision, device=device)
    batch = batch_for(learner, examples)
    if config.norm == "calibrated":
        learner.calibrate_on(batch.images)
    output = learner.engine(batch)
    learner.engine.backward(output.surrogate)
    return torch.cat([one.grad.flatten().double().cpu() for one in learner.rule.trained() if one.grad is not None])


def distance(found: Tensor, reference: Tensor) -> float:
    """Relative, in the Frobenius norm; not a number wherever one of them is none."""
    return float((found - reference).norm() / reference.norm())


def initial(device: torch.device, rules: list[str]) -> Iterator[Finding]:
    """Numbers, and rows of them, that differ from the CPU's."""
    kinds = itertools.product(Stream, (None, slice(3, 70)), (torch.float32, torch.bfloat16, torch.float16))
    for stream, rows, dtype in kinds:
        there, here = (normal(7, stream, 2, (101, 33), rows, device=one, dtype=dtype) for one in (device, CPU))
        yield f"{stream.name.lower()}, {dtype}, rows {rows}", float((there.cpu() != here).sum()), 0.5, True


def small_nets() -> list[NetConfig]:
    """Every kind of network, with every norm."""
    nets: list[NetConfig] = [MLPConfig(width=40, depth=3), ConvConfig(width=12), RNNConfig(width=24)]
    nets.append(replace(NETS["conv7"], width=8))
    return [replace(net, norm=norm) for net in nets for norm in ("none", "batch", "calibrated")]


def updates(device: torch.device, rules: list[str]) -> Iterator[Finding]:
    """Every rule, network and norm beside float64 on the CPU."""
    for net, rule in itertools.product(small_nets(), rules):
        found, reference = (
            update(net, rule, precision, one, (2, 11, 10)) for precision, one in (("fp32", device), ("fp64", CPU))
        )
        yield f"{rule}, {net.name}, norm {net.norm}", distance(found, reference), EXACT, True


def steps(device: torch.device, rules: list[str]) -> Iterator[Finding]:
    """Some steps of every rule, network and norm beside as many in float64 on the CPU."""
    for net, rule in itertools.product(small_nets(), rules):
        found, reference = (
            after_steps(net, rule, precision, one) for precision, one in (("fp32", device), ("fp64", CPU))
        )
        yield f"{rule}, {net.name}, norm {net.norm}", distance(found, reference), AFTER_STEPS, True


def after_steps(net: NetConfig, rule: str, precision: str, device: torch.device) -> Tensor:
    """How PARTS change the weights, (parameters,) float64 on the CPU; no number if too few were replayed."""
    learner = Learner(
        net, (2, 11, 10), 10, rule, SGDConfig(lr=RATE, momentum=0.9), precision=precision, device=device,
        frozen_weights="regenerated",
    )  # fmt: skip
    if net.norm == "calibrated":
        learner.calibrate_on(batch_for(learner, 24).images)
    before = [one.detach().clone() for one in learner.rule.trained()]
    for step, parts in enumerate(PARTS):
        learner.update([batch_for(learner, part, step + 100 * at, sum(parts)) for at, part in enumerate(parts)], RATE)
    pairs = zip(learner.rule.trained(), before, strict=True)
    change = torch.cat([(now.detach() - start).flatten().double().cpu() for now, start in pairs])
    graph = learner.engine.graph if isinstance(learner.engine, LocalEngine) else None
    return change * math.nan if graph and graph.rule.replayable and graph.replays != REPLAYS else change


def halves(device: torch.device, rules: list[str]) -> Iterator[Finding]:
    """bf16 and fp16 beside fp32, at batch 100 and 1000 classes."""
    nets = [(MLPConfig(width=512, depth=4, gain=2**0.5), (3, 16, 16))]
    nets += [(replace(NETS["imagenet_conv7"], width=64, norm="none", gain=2**0.5), (3, 64, 64))]  # type: ignore[list-item]
    for (config, shape), rule in itertools.product(nets, rules):
        whole = update(config, rule, "fp32", device, shape, 1000, 100)
        for precision, bound in COSINES.items():
            found = update(config, rule, precision, device, shape, 1000, 100)
            yield f"{rule}, {config.name}, {precision}", float(torch.cosine_similarity(found, whole, 0)), bound, False


def caches(device: torch.device, rules: list[str]) -> Iterator[Finding]:
    """Six steps from a cache beside six in float64 on the CPU."""
    tiers = ("device", "host", "disk") if device.type == "cuda" else ("host", "disk")
    nets: list[NetConfig] = [MLPConfig(width=40, depth=3), ConvConfig(width=12, norm="none")]
    for config, rule in itertools.product(nets, [rule for rule in rules if RULES[rule].reads_jacobian]):
        reference = trained(config, rule, "gates", "fp64", "host", CPU, "fp64")
        for (form, dtype, bound), tier in itertools.product(CACHES, tiers):
            found = trained(config, rule, form, dtype, tier, device, "fp32")
            yield f"{rule}, {config.name}, {form} {dtype}, {tier}", distance(found, reference), bound, True


def trained(
    config: NetConfig, rule: str, form: str, dtype: str, tier: str, device: torch.device, precision: str
) -> Tensor:
    """How six steps from a cache change the weights, (parameters,) float64 on the CPU."""
    blank = torch.zeros(24, 2, 11, 10, device=device, dtype=PRECISIONS[precision][0])
    with ExitStack() as held:
        step, cache = cached_step(config, rule, form, dtype, tier, Batch(blank, blank, [], 24), 10, held, False,
                                  precision, lr=0.5)  # fmt: skip
        weights = [layer.held[0] for layer in cache.frozen.net.layers]
        before = [weight.detach().clone() for weight in weights]
        for _ in range(6):
            step()
        pairs = zip(weights, before, strict=True)
        return torch.cat([(now.detach() - start).flatten().double().cpu() for now, start in pairs])


CHECKS: dict[str, Callable[[torch.device, list[str]], Iterator[Finding]]] = dict(
    zip(GROUPS, (initial, updates, steps, halves, caches), strict=True)
)


def main(command: list[str] | None = None) -> int:
    """Command line; 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--groups", type=names(GROUPS), default=list(GROUPS))
    parser.add_argument("--rules", type=names(tuple(sorted(RULES))), default=sorted(RULES))
    arguments = parser.parse_args(command)
    device = device_called(arguments.device)
    wrong = 0
    for group in arguments.groups:
        with without_tf32():
            findings = list(CHECKS[group](device, arguments.rules))
        if not findings:
            print(f"{group}: nothing to compare for {', '.join(arguments.rules)}")
            continue
        bad = [one for one in findings if not (one[1] <= one[2] if one[3] else one[1] >= one[2])]
        worst = max(findings, key=lambda one: one[1] / one[2] if one[3] else one[2] / max(one[1], 1e-9))
        good = f"{len(findings) - len(bad)} of {len(findings)}"
        print(f"{group}: {good} as on the CPU; the worst {worst[1]:.3g}: {worst[0]}")
        for name, figure, bound, below in bad:
            print(f"  {name}: {figure:.3g}, expected at {'most' if below else 'least'} {bound:g}")
        wrong += len(bad)
    return int(wrong > 0)


if __name__ == "__main__":
    ended(main)
