"""A step on a mesh of width x data ranks: memory and traffic, measured beside what alignscale/traffic.py calculates.

For ``bench_step.py --distributed --parallel-width K``. Peaks are of the process while a rule alone is there.
"""

import argparse
import math
import statistics
import time
from dataclasses import replace
from typing import Any

import collective_bytes
import torch
from distributed_step import MEMORY_STEPS, NOTHING_KEPT, resident
from mesh_costs import memory, table

from alignscale.choices import DeepSpeedConfig, NetConfig, SGDConfig
from alignscale.distributed import Ranks
from alignscale.learner import Learner
from alignscale.parallel import Mesh
from alignscale.traffic import Plan, exchanges
from alignscale.types import Batch

ROUNDS = 7
"""Of a step without overlap and one with it; the first warms up."""


def plan_of(arguments: argparse.Namespace, config: NetConfig, mesh: Mesh, rule: str, stage: int) -> Plan:
    """The step that the command line asks for."""
    shape, (width, data) = tuple(arguments.shape), (mesh.width.ranks.size, mesh.data.size)
    return Plan(config, shape, arguments.classes, arguments.batch, rule, width, data, stage)


def width_rows(
    arguments: argparse.Namespace, config: NetConfig, whole: Batch, ranks: Ranks, device: torch.device
) -> list[dict[str, Any]]:
    """A row for each rule and stage."""
    mesh = Mesh.of(ranks, arguments.parallel_width, config.width)
    share = mesh.data.part(len(whole.images))
    batch = Batch(whole.images[share], whole.targets[share], [], whole.size)
    arguments.shape = tuple(batch.images.shape[1:])
    found = []
    for stage in arguments.stages:
        for rule in dict.fromkeys(["backprop", *arguments.rules]):
            plan = plan_of(arguments, config, mesh, rule, stage)
            found.append(measured(plan, batch, mesh, device))
    return found


def measured(plan: Plan, batch: Batch, mesh: Mesh, device: torch.device) -> dict[str, Any]:
    """Measure one rule at one stage."""
    engine = DeepSpeedConfig(
        zero_stage=plan.stage, extra={"zero_optimization": NOTHING_KEPT} if plan.stage == 3 else {}
    )
    before = resident(device, reset=True)
    learner = Learner(plan.net, plan.shape, plan.classes, plan.rule, SGDConfig(lr=1e-3), engine=engine, mesh=mesh)
    for _ in range(MEMORY_STEPS):
        collective_bytes.reset()
        learner.update([batch], 1e-3)
    peak = max(mesh.everyone.objects(resident(device) - before))
    group = mesh.width.ranks.group
    counts = collective_bytes.within(group) if group is not None else {}
    turns = replace(plan, overlap=True).turns if mesh.width.ranks.size > 1 else 1
    plain, overlapped = taking_turns(learner, batch, mesh, turns > 1)
    ratios = [after / before for before, after in zip(plain, overlapped, strict=False)]
    expected = [one for one in exchanges(plan) if one.over == "width"]
    return {
        "net": plan.net.name, "units": plan.net.width, "batch": plan.batch, "rule": plan.rule,
        "width": plan.width, "data": plan.data, "zero_stage": plan.stage,
        "peak_bytes": peak, "calculated_bytes": sum(memory(plan).values()), "memory": memory(plan),
        "width_bytes": sum(moved for _, moved in counts.values()),
        "seconds": statistics.median(plain),
        "overlapped_ratio": statistics.median(ratios) if ratios else None,
        "width_messages": sum(messages for messages, _ in counts.values()),
        "calculated_width_bytes": sum(one.bytes for one in expected),
        "calculated_width_messages": sum(one.messages for one in expected), "traffic": table(plan),
    }  # fmt: skip


def taking_turns(learner: Learner, batch: Batch, mesh: Mesh, overlaps: bool) -> tuple[list[float], list[float]]:
    """Seconds of steps that wait for each exchange, and of as many, in turn with them, that overlap it with compute."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(ROUNDS):
        for overlap in ([False, True], [True, False])[number % 2] if overlaps else [False]:
            learner.net.width = replace(learner.net.width, overlap=overlap)
            mesh.everyone.objects(None)  # begin together
            begin = time.perf_counter()
            learner.update([batch], 1e-3)
            seconds[overlap].append(time.perf_counter() - begin)
    return seconds[False][1:], seconds[True][1:]


def width_table(found: list[dict[str, Any]]) -> str:
    """The rows as aligned text, and each rule's traffic layer by layer."""
    head = f"{'ZeRO':>4s} {'rule':24s} {'peak MiB':>9s} {'calc MiB':>9s} {'width bytes':>14s} {'calculated':>14s} "
    lines = [head + f"{'messages':>8s} {'calc':>5s} {'ms':>9s} {'overlapped':>10s}"]
    lines += [
        f"{one['zero_stage']:4d} {one['rule']:24s} {one['peak_bytes'] / 2**20:9.1f} "
        f"{one['calculated_bytes'] / 2**20:9.1f} {one['width_bytes']:14,d} {one['calculated_width_bytes']:14,d} "
        f"{one['width_messages']:8d} {one['calculated_width_messages']:5d} {1000 * one['seconds']:9.1f} "
        f"{one['overlapped_ratio'] or math.nan:10.3f}"
        for one in found
    ]
    for one in found:
        lines.append(f"\n{one['rule']}, ZeRO {one['zero_stage']}, {one['width']} x {one['data']} ranks, calculated:")
        lines.append(one["traffic"])
    return "\n".join(lines)
