"""What each rank of a launch of torchrun does: trains networks whose width is shared out, and the same in one process.

    torchrun --nproc-per-node=4 tests/width_cases.py FILE WIDTH [CASE | --all]

Rank 0 writes a row for each case to FILE: how far losses and weights are from those of the local engine.
"""

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import collective_bytes  # before DeepSpeed
import torch
from cases import RULE_NAMES
from distributed_cases import (
    CHOSEN,
    HALF,
    NETS,
    STAGE_3,
    Case,
    alone,
    compared,
    examples,
    learner,
    model_of,
    or_again,
    pairs,
    train,
)  # fmt: skip

from alignscale import checkpoint
from alignscale.choices import ConvConfig, DeepSpeedConfig, EngineConfig, MLPConfig, RNNConfig
from alignscale.distributed import Ranks, joined
from alignscale.jacobian.explicit import jacobians
from alignscale.jacobian.form import Form
from alignscale.learner import Learner
from alignscale.traffic import Plan, exchanges

NETS |= {
    "mlp": (MLPConfig(width=7), (2, 3, 2)),
    "conv3": (ConvConfig(name="conv3", width=6, strides=[1, 2, 2], gain=1.3), (2, 5, 6)),
    "conv7": (ConvConfig(name="conv7", width=5, strides=[1, 1, 1, 2, 1, 2, 1], gain=1.2), (1, 4, 5)),
    "rnn": (RNNConfig(width=9, gain=1.3), (2, 4, 3)),
}


def table() -> list[Case]:
    """Every rule with every net and norm, at all stages in turn."""
    nets, norms = [net for net in CHOSEN if net != "conv_stride4"], ("none", "batch", "calibrated")
    every = itertools.product(nets, norms, RULE_NAMES)
    return [Case(*values, number % 4) for number, values in enumerate(every)]


def pairwise() -> list[Case]:
    """Cases that hold every pair of net, norm and rule, at all stages in turn, and one of each other option."""
    every = [dataclasses.replace(case, stage=0) for case in table()]
    left, chosen = {pair for case in every for pair in pairs(case)}, []
    while left:
        best = max(every, key=lambda case: len(left & pairs(case)))
        chosen.append(dataclasses.replace(best, stage=len(chosen) % 4))
        left -= pairs(best)
    others = [
        Case("mlp", "none" if options in HALF else "batch", "align_ada", stage, optim, parts, options)
        for stage, optim, parts, options in (
            (1, "adam", 1, ""), (3, "decay", 1, ""), (0, "clip", 1, ""), (1, "clip", 1, ""), (3, "clip", 1, ""),
            (2, "adamw", 2, ""), (3, "sgd", 3, ""), (1, "sgd", 1, "partitioned"), (3, "sgd", 1, "regenerated"),
            (2, "sgd", 1, "offload"), (1, "sgd", 1, "bf16"), (3, "sgd", 1, "fp16"),
        )
    ]  # fmt: skip
    return chosen + others + overlapped()


def overlapped() -> list[Case]:
    """Halves of a batch that take turns, on each net; with norm batch and at stage 3 they do not."""
    rules = ("align_ada", "backprop", "align_zero", "align_prop", "sign_symmetric/fixed")
    nets = itertools.cycle(("mlp", "conv3", "conv7", "rnn"))
    cases = [Case(next(nets), "calibrated", rule, stage, options="overlap") for stage in range(3) for rule in rules]
    others = (("mlp", "batch", 1, ""), ("mlp", "none", 3, ""), ("conv3", "none", 1, "+partitioned"))
    others += (("conv3", "none", 2, "+regenerated"), ("rnn", "none", 1, "+partitioned"), ("mlp", "none", 1, "+bf16"))
    return cases + [Case(net, norm, "align_ada", stage, options=f"overlap{how}") for net, norm, stage, how in others]


def row(case: Case, ranks: Ranks, width: int) -> dict[str, Any]:
    """The case with the width shared out, beside the same in one process alone."""
    whole = learner(case, EngineConfig("local"), Ranks())
    settings = {"zero_optimization": dict.fromkeys(STAGE_3, 0)} if case.stage == 3 else {}
    engine = DeepSpeedConfig(zero_stage=case.stage, extra=settings, offload=case.options == "offload")
    made = learner(case, engine, ranks, width)
    start = all(ranks.objects(own_rows(made, whole)))
    found = train(case, made)
    data, weights = examples(case), model_of(made)
    first = made.encoding.batch(data, torch.arange(20), 0)
    scores, cosines = made.evaluate(data.images, data.labels, 20), made.cosines(first)
    copies = case.stage > 0 or all(ranks.objects(of_one_copy(made, first.images)))
    if not ranks.first:
        return {}
    differences = compared(alone(case), found, weights, scores, cosines)
    return {"case": str(case), "ranks": ranks.size, "width": width, "start": start, "copies": copies, **differences}


@torch.no_grad()
def of_one_copy(made: Learner, images: torch.Tensor) -> bool:
    """Whether, of the copies of the readout's bias, the first rank's alone is added, and saved by any rank."""
    bias = made.net.layers[made.net.readout].held[1]
    assert bias is not None
    before = made.net(images)
    bias += made.mesh.width.ranks.rank
    saved, first = made.mesh.whole(bias.detach(), None, 1), made.mesh.everyone.broadcast(bias.detach().clone())
    return torch.equal(made.net(images), before) and (made.mesh.data.rank > 0 or torch.equal(saved, first))


COUNTED = [
    (net, rule, form, inputs)
    for net in ("mlp", "conv7", "rnn")
    for rule, form, inputs in (
        ("backprop", "live", "whole"), ("align_ada", "live", "whole"), ("align_ada", "gates", "whole"),
        ("align_ada", "explicit", "whole"), ("align_zero", "explicit", "whole"), ("align_zero", "gates", "gathered"),
        ("align_zero", "gates", "recomputed"), ("align_prop", "live", "whole"),
        ("direct_feedback_alignment", "live", "whole"),
    )
    if net != "rnn" or form != "explicit"
]  # fmt: skip


def counted(
    net: str, rule: str, form: str, inputs: str, stage: int, ranks: Ranks, width: int, options: str = ""
) -> dict[str, Any]:
    """A step's real collectives beside those of alignscale/traffic.py, and how far the update is from one process's."""
    config, shape = dataclasses.replace(NETS[net][0], norm="none"), NETS[net][1]
    case = Case(net, "none", rule, stage, options=options)
    settings = {"zero_optimization": dict.fromkeys(STAGE_3, 0)} if stage == 3 else {}
    made = learner(case, DeepSpeedConfig(zero_stage=stage, extra=settings), ranks, width)
    whole = learner(case, EngineConfig("local"), Ranks())
    data, mesh, frozen = examples(case), made.mesh, made.fixed.frozen
    batch = made.encoding.batch(data, torch.arange(32)[mesh.data.part(32)], 0, 32)
    reads = rule == "align_zero" and inputs != "recomputed"
    kept = Form((form,) * len(made.net.shapes), "fp32", "fp32" if reads else None, inputs == "gathered")
    kept = dataclasses.replace(
        kept, inputs=None if inputs == "recomputed" else kept.inputs, gathered=inputs == "gathered"
    )
    trace = frozen.trace(batch.images)
    rows = kept.rows(
        made.net, trace, jacobians(frozen, trace, range(len(made.net.shapes)) if form == "explicit" else ())
    )
    collective_bytes.reset()
    if form != "live":
        batch = dataclasses.replace(batch, cached=kept.cached(made.net, rows, batch.images))
    made.update([batch], 0.1)
    groups = {"width": mesh.width.ranks.group, "data": mesh.data.group}
    found = {over: collective_bytes.within(group) for over, group in groups.items()}
    found = ranks.objects(found)[-1]  # of the rank that has most units, which the table is about
    whole.update([whole.encoding.batch(data, torch.arange(32), 0)], 0.1)
    plan = Plan(config, shape, 3, 32, rule, width, mesh.data.size, stage, form, inputs, overlap=bool(options))
    expected = {over: dict.fromkeys(found["width"], (0, 0)) for over in groups}
    for one in exchanges(plan):
        messages, total = expected[one.over][one.call]
        expected[one.over][one.call] = messages + one.messages, total + one.bytes
    weights, wanted = model_of(made), model_of(whole)
    off = [
        ((weights[name] - one).norm() / one.norm().clamp(min=1)).item() for name, one in wanted.items() if ranks.first
    ]
    return {
        "case": f"{net}-{rule}-{form}-{inputs}-zero{stage}-{options}",
        "net": net, "rule": rule, "form": form, "inputs": inputs,
        "stage": stage, "turns": plan.turns, "ranks": ranks.size, "width": width, "layers": len(made.net.layers),
        "weights": max(off, default=0.0),
        "found": found, "expected": expected,
    }  # fmt: skip


def own_rows(made: Learner, whole: Learner) -> bool:
    """Whether this rank's initial weights have the bits of the same rows of the whole network's, and no others."""
    pairs = [
        (made.fixed.frozen.weight(index), layer.share, whole.fixed.frozen.weight(index))
        for index, layer in enumerate(made.net.layers)
    ]
    return all(share is not None and torch.equal(own, share.of(weight)) for own, share, weight in pairs)


def main() -> None:
    torch.set_num_threads(1)
    checkpoint.LEAST = 1
    rows = []
    with joined(torch.device("cpu"), 1800.0) as ranks:
        for width in map(int, sys.argv[2].split(",")):
            cases = table() if "--all" in sys.argv else pairwise()
            if ranks.size == 4 and len(sys.argv) < 4:  # a third for each mesh, of all stages in turn
                cases = [case for number, case in enumerate(cases) if (number // 13 + number + width // 2) % 3 == 0]
            wanted = next((word for word in sys.argv[3:] if word != "--all"), "")
            chosen = [case for case in cases if wanted in str(case)]
            rows += [or_again(case, ranks, lambda one, width=width: row(one, ranks, width)) for case in chosen]
            if len(sys.argv) < 4:
                rows += [counted(*one, 0, ranks, width) for one in COUNTED]
                rows += [counted(*one, 0, ranks, width, "overlap") for one in COUNTED[:: 2 if ranks.size > 2 else 1]]
                rows.append(counted("mlp", "align_ada", "live", "whole", 3, ranks, width, "overlap"))
                rows += [counted("mlp", rule, "live", "whole", 3, ranks, width) for rule in ("backprop", "align_ada")]
    if ranks.first:
        Path(sys.argv[1]).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
