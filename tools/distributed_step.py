"""One step of several rules under DeepSpeed on all ranks of a launch: time, traffic and memory, stage by stage.

For ``bench_step.py --distributed``. Beside each rule runs a minimal hand-written DeepSpeed loop of the same network,
one step each in turn; traffic is counted around torch's collectives, and memory is what making a rule, or the loop, and
its first steps add at most, to the process's or a GPU's. In half precision the loop is DeepSpeed's own bf16 or fp16,
which sums gradients in it, if ``--reduce-dtype`` does not say in what both do. The projection adds, to the time of a
rank's share in one process, what its bytes take at a bandwidth.
"""

import argparse
import ctypes
import gc
import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import collective_bytes
import torch
import torch.nn.functional as F
from mesh_costs import memory
from plain_step import same_conv
from step_work import measure
from torch import Tensor, nn

from alignscale.choices import ConfigError, ConvConfig, DeepSpeedConfig, LocalConfig, MLPConfig, NetConfig, SGDConfig
from alignscale.distributed import Ranks, beside, joined, launched
from alignscale.environment import hardware, take_gpu
from alignscale.learner import PRECISIONS, Learner
from alignscale.nets.functions import laid_out
from alignscale.parallel import Mesh
from alignscale.traffic import Plan
from alignscale.types import Batch

MEMORY_STEPS = 3
NOTHING_KEPT = dict.fromkeys(
    ("stage3_param_persistence_threshold", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"), 0
)
"""ZeRO 3 that keeps no weight from the forward pass to the backward pass, as it is where they do not fit."""


@contextmanager
def ranks_on(device: torch.device) -> Iterator[Ranks]:
    """All ranks of the launch, each on its GPU where ``device`` is one."""
    if device.index is not None:
        raise ConfigError(
            f"--device {device}: expected cuda with --distributed, where each rank takes a GPU of its own"
        )
    if device.type == "cuda":
        torch.backends.cudnn.benchmark, around = True, launched()
        take_gpu(around.local if around else 0, beside())
    with joined(device, 600.0) as ranks:
        yield ranks


def rows(
    arguments: argparse.Namespace, config: NetConfig, whole: Batch, ranks: Ranks, device: torch.device
) -> list[dict[str, Any]]:
    """A row for each stage and rule, the same on all ranks but for what rank 0 alone prints."""
    if arguments.precision == "fp16" and device.type == "cpu":
        raise ConfigError("--precision fp16: expected a GPU, as DeepSpeed has it on no CPU; use bf16")
    share, (dtype, _) = ranks.part(len(whole.images)), PRECISIONS[arguments.precision]
    batch = Batch(laid_out(whole.images[share].to(device, dtype)), whole.targets[share].to(device), [], whole.size)
    rules = ["backprop", *[rule for rule in arguments.rules if rule != "backprop"]]
    pairs = itertools.product(arguments.stages, rules)
    small = replace(config, width=8)  # so that no row has what the first step of all brings into memory
    shape = tuple(batch.images.shape[1:])
    options = {"device": device, "precision": arguments.precision, "mesh": Mesh(ranks, ranks)}
    warm = Learner(small, shape, arguments.classes, engine=DeepSpeedConfig(), **options)
    warm.update([batch], 1e-3)
    found = [measured(arguments, config, batch, ranks, stage, rule) for stage, rule in pairs]
    for one in found:
        first = next(row for row in found if (row["zero_stage"], row["rule"]) == (one["zero_stage"], "backprop"))
        one["ratio_to_backprop"] = one["ratio_to_plain"] / first["ratio_to_plain"]  # measured minutes apart
    return found


def measured(
    arguments: argparse.Namespace, config: NetConfig, batch: Batch, ranks: Ranks, stage: int, rule: str
) -> dict[str, Any]:
    """Measure one rule at one stage."""
    shape, classes, device = tuple(batch.images.shape[1:]), arguments.classes, batch.images.device
    settings: dict[str, Any] = {"zero_optimization": NOTHING_KEPT} if stage == 3 else {}
    engine = DeepSpeedConfig(zero_stage=stage, reduce_dtype=arguments.reduce_dtype, extra=settings)
    before = resident(device, reset=True)
    make = partial(
        Learner, config, shape, classes, rule, SGDConfig(lr=1e-3), device=device, precision=arguments.precision,
        frozen_weights=arguments.frozen,
    )  # fmt: skip
    learner = make(engine=engine, mesh=Mesh(ranks, ranks))
    psi = padded_bytes(learner, ranks.size)
    peak = peak_of(lambda: learner.update([batch], 1e-3), before, device, ranks)
    before = resident(device, reset=True)
    itemsize = batch.images.itemsize
    number = 2 if engine.reduces_in_bf16(arguments.precision == "bf16") else 4
    plan = Plan(config, shape, classes, arguments.batch, rule, 1, ranks.size, stage, itemsize=itemsize, reduced=number)
    left_out = {"activations"} if arguments.frozen == "stored" else {"activations", "initial weights"}
    sums = {} if arguments.reduce_dtype == "auto" else {"communication_data_type": arguments.reduce_dtype}
    half = {arguments.precision: {"enabled": True}} if itemsize == 2 else {}
    settings = {**settings, **half, **sums}
    plain = plain_loop(config, batch, classes, stage, settings, ranks)
    plain_peak = peak_of(plain, before, device, ranks)
    collective_bytes.reset()
    learner.update([batch], 1e-3)
    gathered, scattered, summed = map(collective_bytes.moved, ("all_gather", "reduce_scatter", "all_reduce"))
    seconds = measure({rule: lambda: learner.update([batch], 1e-3), "plain": plain}, arguments.repeats, device)
    ranks.still()
    alone = make(engine=LocalConfig(cuda_graph=False))  # as DeepSpeed's steps are
    compute = statistics.median(measure({rule: lambda: alone.update([batch], 1e-3)}, arguments.repeats, device)[rule])
    wire = (gathered + scattered + 2 * summed) * (ranks.size - 1) / ranks.size
    return {
        "net": arguments.net, "width": arguments.width, "batch": arguments.batch, "ranks": ranks.size,
        "device": hardware(device)["device"], "precision": arguments.precision, "bytes_a_sum": number,
        "zero_stage": stage, "rule": rule, "psi_bytes": psi,
        "all_gather_psi": gathered / psi, "reduce_scatter_psi": scattered / psi, "all_reduce_psi": summed / psi,
        "peak_bytes": peak, "plain_peak_bytes": plain_peak,
        "calculated_bytes": sum(size for what, size in memory(plan).items() if what not in left_out),
        "seconds_median": statistics.median(seconds[rule]),
        "ratio_to_plain": statistics.median(a / b for a, b in zip(seconds[rule], seconds["plain"], strict=True)),
        "compute_seconds": compute,
        "projected_seconds": {f"{speed:g} GB/s": compute + wire / (speed * 1e9) for speed in arguments.bandwidth},
    }  # fmt: skip


class SameConv(nn.Conv2d):
    """With the padding of the networks here."""

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> (B, out, ceil(H / stride), ceil(W / stride))."""
        return same_conv(images, self.weight, self.stride[0], self.bias)


class PlainNet(nn.Module):
    """The network in torch's own modules, its scales as factors; norm none."""

    def __init__(self, config: NetConfig, shape: tuple[int, ...], classes: int) -> None:
        """Raises ConfigError for a network that it is not."""
        super().__init__()
        if config.norm != "none" or not isinstance(config, MLPConfig | ConvConfig):
            raise ConfigError(f"--distributed: expected an mlp or a conv net with norm none, found {config.name}")
        hidden: list[nn.Module] = []
        sizes = [math.prod(shape), *[config.width] * config.depth] if isinstance(config, MLPConfig) else []
        hidden += [nn.Linear(inputs, out) for inputs, out in itertools.pairwise(sizes)]
        strides = config.strides if isinstance(config, ConvConfig) else []
        channels = [shape[0], *[config.width] * len(strides)]
        pairs = zip(itertools.pairwise(channels), strides, strict=True)
        hidden += [SameConv(inputs, out, 3, stride) for (inputs, out), stride in pairs]
        self.hidden, self.readout = nn.ModuleList(hidden), nn.Linear(config.width, classes)
        self.flat, self.scale = not strides, config.gain / math.sqrt(config.width)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits."""
        a = images.flatten(1) if self.flat else images
        for layer in self.hidden:
            a = F.relu(layer(a) * self.scale)
        return self.readout(a if self.flat else a.mean((2, 3))) * self.scale


def plain_loop(
    config: NetConfig, batch: Batch, classes: int, stage: int, settings: dict[str, Any], ranks: Ranks
) -> Callable[[], object]:
    """The same network and optimizer as a user of DeepSpeed would write it, with backpropagation."""
    from alignscale.engine_zero import deepspeed

    with batch.images.device:
        module = PlainNet(config, tuple(batch.images.shape[1:]), classes)
    optimizer = torch.optim.SGD(module.parameters(), 1e-3, fused=True)
    options = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "zero_allow_untested_optimizer": True,
        **settings, "zero_optimization": {"stage": stage, **settings.get("zero_optimization", {})},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=options, dist_init_required=False)

    def step() -> None:
        logits = engine(batch.images)
        loss = (logits.float() - batch.targets).square().sum() * (ranks.size / (batch.size * classes))
        engine.backward(loss)
        engine.step()
        ranks.totals([loss.item()], logits.device)

    return step


def peak_of(step: Callable[[], object], before: int, device: torch.device, ranks: Ranks) -> int:
    """Bytes over those of ``before`` at a peak of the first steps; on a GPU of one that tries no more algorithms."""
    for _ in range(MEMORY_STEPS):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
    return max(ranks.objects(resident(device) - before))


def padded_bytes(learner: Learner, ranks: int) -> int:
    """Psi: bytes of all parameters, each padded to the same length on every rank."""
    sizes = (getattr(parameter, "ds_numel", parameter.numel()) for parameter in learner.rule.parameters())
    return sum(4 * ranks * -(-size // ranks) for size in sizes)


def resident(device: torch.device, reset: bool = False) -> int:
    """The peak of the process's resident memory, or a GPU's, in bytes; reset: forget it and give what is held now."""
    if reset:
        gc.collect()
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # or what an earlier rule has freed would count as there
        Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["VmHWM"].split()[0])


def distributed_table(found: list[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    speeds = list(found[0]["projected_seconds"])
    head = f"{'ZeRO':>4s} {'rule':24s} {'gather':>7s} {'scatter':>7s} {'reduce':>7s} {'peak MiB':>9s} {'plain':>6s} "
    head += f"{'calc MiB':>9s} {'ms':>8s} {'/ backprop':>10s} {'/ plain':>8s}"
    head += "".join(f" {speed:>10s}" for speed in speeds)
    lines = [head]
    for one in found:
        projected = "".join(f" {1000 * one['projected_seconds'][speed]:>7.1f} ms" for speed in speeds)
        lines.append(
            f"{one['zero_stage']:4d} {one['rule']:24s} {one['all_gather_psi']:7.3f} {one['reduce_scatter_psi']:7.3f} "
            f"{one['all_reduce_psi']:7.3f} {one['peak_bytes'] / 2**20:9.1f} "
            f"{one['plain_peak_bytes'] / 2**20:6.0f} {one['calculated_bytes'] / 2**20:9.1f} "
            f"{1000 * one['seconds_median']:8.2f} {one['ratio_to_backprop']:10.3f} {one['ratio_to_plain']:8.3f}"
            f"{projected}"
        )
    lines.append("(gather, scatter, reduce: bytes of a step in units of Psi, the padded bytes of all parameters)")
    return "\n".join(lines)
