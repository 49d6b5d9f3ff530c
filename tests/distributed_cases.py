"""What each rank of a launch of torchrun does: trains cases with DeepSpeed, and the same ones in one process.

    torchrun --nproc-per-node=2 tests/distributed_cases.py FILE [--all] [-v] [CASE]

Rank 0 writes a row for each case to FILE: how far losses and weights are from those of the local engine, and the bytes
that the ranks exchanged a step. What the local engine found is kept beside FILE, for launches of other ranks.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import cases
import collective_bytes
import pytest
import torch
from cases import RULE_NAMES, SUMS

from alignscale import checkpoint
from alignscale.choices import (
    AdamConfig,
    ConvConfig,
    DeepSpeedConfig,
    EngineConfig,
    MLPConfig,
    NetConfig,
    OptimConfig,
    RuleConfig,
    SGDConfig,
)  # fmt: skip
from alignscale.data.examples import Examples, stream
from alignscale.data.plan import Plan
from alignscale.distributed import Ranks, joined
from alignscale.learner import Learner
from alignscale.parallel import Mesh
from alignscale.rules import RULES
from alignscale.rules.feedback import SignSymmetricConfig
from alignscale.types import Batch

EXAMPLES, BATCH, STEPS = 114, 37, 20  # each fourth batch has 3 examples: fewer than 4 ranks
STAGE_3 = ("stage3_param_persistence_threshold", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size")
SGD = SGDConfig(lr=0.03, momentum=0.9)
DIVERGES = {("calibrated", "feedback_alignment")}
"""Norms and rules whose loss explodes at that rate, and rounding with it: they are given a tenth of it."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One training of ``steps``."""

    net: str
    norm: str
    rule: str
    stage: int
    optim: str = "sgd"
    parts: int = 1
    options: str = ""
    seed: int = 1

    def __str__(self) -> str:
        words = [self.net, self.norm, self.rule, f"zero{self.stage}", self.optim, f"parts{self.parts}", self.options]
        return "-".join(word for word in words if word)


HALF = ("fp16", "bf16")

OPTIMS: dict[str, OptimConfig] = {
    "sgd": SGD,
    "adam": AdamConfig(lr=1e-3),
    "decay": SGDConfig(lr=0.03, momentum=0.9, weight_decay=0.1, decay_towards="initial"),
    "clip": SGDConfig(lr=0.2, clip_norm=0.01),
    "adamw": AdamConfig(name="adamw", lr=1e-3, weight_decay=0.1, decay_towards="initial"),
}
NETS = {
    **cases.NETS,
    "wide": (MLPConfig(width=128, depth=3), (1, 8, 8)),
    "wide_conv": (ConvConfig(name="wide_conv", width=24, strides=[1, 2], gain=1.3), (4, 6, 6)),
}
CHOSEN = ("mlp", "conv3", "conv_stride4", "conv7", "rnn")


def table() -> list[Case]:
    """Every rule with every net, norm and stage."""
    every = itertools.product(CHOSEN, ("none", "batch", "calibrated"), RULE_NAMES, range(4))
    return [Case(*values) for values in every]


def pairwise(ranks: int) -> list[Case]:
    """A few cases that hold every pair of net, norm, rule and stage, and each other option.

    Adam is at every stage. The options are at two stages on two ranks, at a third one on one and at the fourth one on
    four, each time with another net and rule.
    """
    every = [case for case in table() if case.net != "conv_stride4"]
    left = {pair for case in every for pair in pairs(case)}
    chosen: list[Case] = []
    while left:
        best = max(every, key=lambda case: len(left & pairs(case)))
        chosen.append(best)
        left -= pairs(best)
    every_stage = [Case("mlp", "batch", "align_ada", stage, optim) for stage in range(4) for optim in ("adam", "adamw")]
    nets, rules = (
        itertools.cycle(("mlp", "conv3", "rnn")),
        itertools.cycle(("align_ada", "backprop", "align_zero", "align_prop")),
    )
    others = [
        Case(next(nets), "none" if options in HALF else "batch", next(rules), stage, optim, parts, options)
        for stage in range(4)
        for number, (optim, parts, options) in enumerate((
            ("decay", 1, ""), ("clip", 1, ""), ("adamw", 2, ""), ("sgd", 3, ""),
            ("sgd", 1, "partitioned"), ("adam", 1, "offload"), ("sgd", 1, "regenerated"), ("sgd", 1, "own-moments"),
            ("sgd", 1, "bf16"), ("sgd", 1, "fp16"), ("sgd", 1, "few"),
        ))
        if (number + stage) % 4 in {1: (0,), 2: (1, 3), 4: (2,)}[ranks] and (stage or options != "offload")
    ]  # fmt: skip
    if ranks == 2:
        others += [Case("conv3", "none", "align_ada", 3, options="kept+bf16")]  # DeepSpeed's defaults
        others += [Case("conv3", "none", "backprop", stage, "clip", 3, "offload+fp16") for stage in (1, 2, 3)]
        others += [
            Case("mlp", "none", "sign_symmetric/fixed", stage, "adam", 2, half)
            for stage in (1, 2)
            for half in ("bf16", "sum-bf16+fp16")
        ]
        others += [Case("conv3", "none", "backprop", stage, "clip", 3, "offload+bf16") for stage in (1, 2)]
        half_nets = zip(("mlp", "conv3"), HALF, strict=True)
        others += [Case(net, "none", "backprop", 3, "sgd", 2, f"offload_param+{half}") for net, half in half_nets]
    return chosen + every_stage + others


def traffic() -> list[Case]:
    """What the bytes of ZeRO 3 are counted for."""
    rules = ("backprop", "align_ada", "align_zero", "align_prop", "feedback_alignment")
    cases = [Case(net, "none", rule, 3) for net in ("wide", "wide_conv") for rule in rules]
    return [
        *cases,
        *(Case("wide", "none", rule, 3, options=how) for rule in rules for how in ("regenerated", "partitioned")),
        *(Case("wide", "none", rule, 3, options=half) for rule in ("backprop", "align_ada") for half in SUMS),
        *(Case("wide", "none", "backprop", stage, options=half) for stage in range(3) for half in SUMS),
    ]


def pairs(case: Case) -> set[tuple[tuple[str, Any], ...]]:
    values = [(name, getattr(case, name)) for name in ("net", "norm", "rule", "stage")]
    return set(itertools.combinations(values, 2))


def learner(case: Case, engine: EngineConfig, ranks: Ranks, width: int = 1) -> Learner:
    config, shape = NETS[case.net]
    name, _, magnitude = case.rule.partition("/")
    rule: RuleConfig = SignSymmetricConfig(magnitude=magnitude) if magnitude else RULES[name].options(name=name)
    net: NetConfig = dataclasses.replace(config, norm=case.norm)
    optim = OPTIMS[case.optim]
    if (case.norm, case.rule) in DIVERGES:
        optim = dataclasses.replace(optim, lr=optim.lr / 10)
    words = case.options.split("+")
    keeping = next((word for word in words if word in ("partitioned", "regenerated")), "stored")
    made = Learner(
        net, shape, 3, rule, optim, seed=case.seed, frozen_weights=keeping, engine=engine,
        mesh=Mesh.of(ranks, width, net.width, "overlap" in words),
        state_rows=BATCH, sync_norm=case.options != "own-moments",
        precision=next((word for word in words if word in HALF), "fp32"),
    )  # fmt: skip
    if case.norm == "calibrated":
        made.calibrate(images(case))
    return made


def images(case: Case) -> torch.Tensor:
    return torch.randn(EXAMPLES, *NETS[case.net][1], generator=torch.Generator().manual_seed(2 + case.seed))


def examples(case: Case) -> Examples:
    # moments over 3 examples are sensitive to rounding: one net has them ("few"); a rank's own cannot be of nothing
    count = 111 if case.norm == "batch" and case.options != "few" else EXAMPLES
    labels = torch.randint(3, (EXAMPLES,), generator=torch.Generator().manual_seed(3 + case.seed))
    return Examples.whole(images(case)[:count], labels[:count], 3, "x")


def batches(case: Case, made: Learner) -> Iterator[tuple[int, list[Batch]]]:
    data = examples(case)
    return stream(data, Plan(len(data), BATCH, 0), made.encoding, 0, steps(case), case.parts, 1, made.mesh.data.part)


def steps(case: Case) -> int:
    """Fewer where the bytes of a step are counted."""
    return 3 if dataclasses.replace(case, seed=1) in traffic() else STEPS


def train(case: Case, made: Learner) -> list[float]:
    return [made.update(parts, made.lr)[0] for _, parts in batches(case, made)]


def row(case: Case, ranks: Ranks) -> dict[str, Any]:
    """The case with DeepSpeed on all ranks, beside the same in the first one's process alone."""
    zero3 = {"zero_optimization": dict.fromkeys(STAGE_3, 0)} if case.stage == 3 and "kept" not in case.options else {}
    if "offload_param" in case.options:
        zero3["zero_optimization"]["offload_param"] = {"device": "cpu"}  # type: ignore[assignment]
    sums = next((word[4:] for word in case.options.split("+") if word.startswith("sum-")), "auto")
    engine = DeepSpeedConfig(zero_stage=case.stage, offload="offload" in case.options, reduce_dtype=sums, extra=zero3)
    made = learner(case, engine, ranks)
    collective_bytes.reset()
    found = train(case, made)
    counted = dict(collective_bytes.COUNTED)
    weights = model_of(made)
    scores = made.evaluate(examples(case).images, examples(case).labels, 20)
    first = made.encoding.batch(examples(case), torch.arange(20), 0)
    cosines, psi = made.cosines(first), padded(made, ranks.size)
    now = {f"layers.{index}.weight": made.engine.weight(index).clone() for index in range(len(made.net.layers))}
    copies = copied(made, first) if case in traffic() else 0
    if case.stage and made.encoding.dtype.itemsize == 2:
        check_bits(case, engine, ranks, found, weights)
    if not ranks.first:
        return {}
    own = case.options == "own-moments"  # each rank's are those of a part of the batch
    expected = alone(dataclasses.replace(case, parts=ranks.size) if own else case)
    return {
        "case": str(case), "ranks": ranks.size, "psi": psi,
        **compared(expected, found, weights, scores, cosines),
        "exact": all(torch.equal(one, weights[name]) for name, one in now.items()),
        "rounded": all(torch.equal(weights[name], weights[name].bfloat16().float()) for name in now),
        "copies": copies,
        "bytes": {name: count / steps(case) for name, count in counted.items()},
    }  # fmt: skip


def check_bits(
    case: Case, engine: DeepSpeedConfig, ranks: Ranks, losses: list[float], weights: dict[str, torch.Tensor]
) -> None:
    """Weights that layers have in half precision give the same as fp32 ones that each layer rounds where it reads.

    But in fp16 each part's gradient is rounded to bf16, in which it is summed, and not only the sum of the parts.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alignscale.engine_zero.narrow", lambda *_: None)
        made = learner(case, engine, ranks)
    again, others = train(case, made), model_of(made)
    if case.parts > 1 and case.options.endswith("sum-bf16+fp16"):
        assert not ranks.first or apart(weights, others) < 1e-5, case
        return
    assert again == losses, case
    assert not ranks.first or all(torch.equal(one, others[name]) for name, one in weights.items()), case


def copied(made: Learner, batch: Batch) -> int:
    """How many weights, whole, the graph of a step keeps till its way back, beside the parameters themselves."""
    shapes, found = {tuple(sorted(layer.shape)) for layer in made.net.layers}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tuple(sorted(tensor.shape)) in shapes and not (tensor.is_leaf and tensor.requires_grad))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made.update([batch], made.lr)
    return sum(found)


def model_of(made: Learner) -> dict[str, torch.Tensor]:
    """Whole weights and norms on the first rank, as a checkpoint has them that all ranks wrote; a collective of all."""
    ranks, state = made.mesh.everyone, made.engine.state()
    whole = {part: {name: one.make(0).clone() for name, one in named.items()} for part, named in state.items()}
    if ranks.size > 1:
        folder = Path(sys.argv[1]).parent / "written"
        checkpoint.save(folder, 1, state, {"progress": {"best": None}}, 1, ranks)
        if ranks.first:
            path = checkpoint.find(folder, "last")
            manifest = checkpoint.read_manifest(path)
            assert len(manifest["files"]) > len(state)
            for part, named in whole.items():
                found = checkpoint.read(path, manifest, part)
                assert found.keys() == named.keys()
                for name, one in named.items():
                    assert torch.equal(found[name], one), name
    return whole["model"]


def alone(case: Case) -> dict[str, Any]:
    """What the local engine makes of a case, whatever the stage: from its file, or trained now."""
    config = (NETS[case.net], dataclasses.replace(case, stage=0))
    kept = Path(sys.argv[1]).parent / f"{hashlib.sha256(repr(config).encode()).hexdigest()}.pt"
    if not kept.exists():
        made = learner(case, EngineConfig("local"), Ranks())
        losses, data = train(case, made), examples(case)
        scores = made.evaluate(data.images, data.labels, 20)
        cosines = made.cosines(made.encoding.batch(data, torch.arange(20), 0))
        weights = model_of(made)
        torch.save({"losses": losses, "weights": weights, "scores": scores, "cosines": cosines}, kept)
    found: dict[str, Any] = torch.load(kept)
    return found


def compared(
    expected: dict[str, Any], losses: list[float], weights: dict[str, torch.Tensor], scores: dict[str, float],
    cosines: list[float],
) -> dict[str, Any]:  # fmt: skip
    """How far a training on ranks is from what ``alone`` gave."""
    wanted = expected["scores"]
    return {
        "loss": max(abs(a - b) / abs(b) for a, b in zip(losses, expected["losses"], strict=True)),
        "weights": apart(weights, expected["weights"]),
        "accuracy": [scores["accuracy"], wanted["accuracy"]],
        "evaluation_loss": abs(scores["loss"] - wanted["loss"]) / wanted["loss"],
        "cosine": max(abs(a - b) for a, b in zip(cosines, expected["cosines"], strict=True)),
    }


def beyond(row: dict[str, Any], times: float = 1.0) -> dict[str, Any]:
    """What of a row is further off than rounding takes it, or than so many times as far."""
    if row["case"].endswith(HALF):  # each rank rounds its own sums
        bounds = {"loss": 2e-2, "weights": 4e-3 if row["case"].endswith("bf16") else 5e-4, "evaluation_loss": 4e-3}
    else:
        adam, right = "adam" in row["case"], row["accuracy"]
        bounds = {"loss": 1e-4 if adam else 1e-5, "evaluation_loss": 1e-5, "cosine": 1e-4}
        bounds |= {} if adam else {"weights": 1e-5}
        row, bounds = {**row, "right": abs(right[0] - right[1])}, {**bounds, "right": 1e-3}  # less than an example
    return {name: row[name] for name, bound in bounds.items() if not row[name] < times * bound}


def or_again(case: Case, ranks: Ranks, made: Callable[[Case], dict[str, Any]]) -> dict[str, Any]:
    """The row that is ``made`` of a case; one that is off is made from another seed, and tests allow few of these.

    In one training of some hundred an input of relu is so near 0 that it is open in one process and shut on ranks, or
    the other way round, which moves a loss by some 1e-5. What is wrong is so from any seed.
    """
    found = made(case)
    if str(case).endswith(HALF) or not ranks.of_first(lambda: beyond(found)):
        return found
    first = {name: found[name] for name in ("exact", "rounded", "copies", "start") if name in found}
    return {**made(dataclasses.replace(case, seed=2)), **first, "before": found}


def apart(weights: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The distance between two networks' weights, relative to the second's norm."""
    assert weights.keys() == wanted.keys()
    off, whole = (
        sum(tensor.double().square().sum().item() for tensor in tensors)
        for tensors in ([weights[name] - one for name, one in wanted.items()], wanted.values())
    )
    return (off / whole) ** 0.5


def padded(made: Learner, ranks: int) -> int:
    """Bytes of all parameters, each padded to the same length on every rank."""
    sizes = [layer.shape for layer in made.net.layers] + [
        layer.shape[:1] for layer in made.net.layers if layer.held[1] is not None
    ]
    return sum(4 * ranks * -(-math.prod(shape) // ranks) for shape in sizes)


def main() -> None:
    torch.set_num_threads(1)
    checkpoint.LEAST = 1
    rows = []
    with joined(torch.device("cpu"), 1800.0) as ranks:
        counted = traffic() if ranks.size > 1 else []  # one rank moves nothing
        cases = table() if "--all" in sys.argv else pairwise(ranks.size) + counted
        wanted = next((word for word in sys.argv[2:] if not word.startswith("-")), "")
        chosen = [case for case in cases if wanted in str(case)]
        for case in chosen:
            rows.append(or_again(case, ranks, lambda one: row(one, ranks)))
            if ranks.first and "-v" in sys.argv:
                print({key: value for key, value in rows[-1].items() if key != "bytes"}, flush=True)
    assert "torch._inductor.compile_fx" not in sys.modules, "DeepSpeed was to import no compiler"
    if ranks.first:
        Path(sys.argv[1]).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
