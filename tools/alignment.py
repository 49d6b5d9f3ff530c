"""The alignment score of trained runs, layer by layer, from any of their checkpoints, with controls and movement.

    python tools/alignment.py runs/my-run
    python tools/alignment.py RUN [RUN...] --checkpoint best --replay --json scores.json

Sigma is from the definition, by the errors that were summed in training (analysis.track_errors=true). ``--replay``
trains the run again from its seed beside a network that the frozen rule drives with the run's own errors, as the
public code does; without norm both are the same to rounding. Any run will do, whatever engine, ranks
and ZeRO stage trained it.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from argument_types import ended, new_file, write_json
from tangent_kernel import label_alignment, tangent
from torch import Tensor

from alignscale import checkpoint, observe
from alignscale.analysis.finite import all_finite
from alignscale.analysis.updates import gates_moved, relative, weight_updates
from alignscale.checkpoint import CheckpointError
from alignscale.choices import ENGINES, ConfigError
from alignscale.data.examples import DataError, stream
from alignscale.data.plan import Plan
from alignscale.engine import make_optimizer, pull_to_start
from alignscale.environment import torch_settings
from alignscale.observe import Changes
from alignscale.parallel import Mesh
from alignscale.prepare import make_learner
from alignscale.restore import Restored, restored
from alignscale.rules.base import scaled
from alignscale.schedule import factor

Row = dict[str, Any]


def summed_errors(run: Path, found: Restored) -> Tensor | None:
    """The errors that a checkpoint holds, (examples, classes); None if it has none."""
    path = checkpoint.find(run / "checkpoints", str(found.step))
    manifest = checkpoint.read_manifest(path)
    if "errors" not in checkpoint.parts(manifest):
        return None
    sums = checkpoint.read(path, manifest, "errors")["sums"]
    examples = len(found.splits["train"])
    if len(sums) != examples:
        raise CheckpointError(
            f"{path}: expected the errors of {examples} training examples, found {len(sums)}; train again with "
            "resume=never"
        )
    return sums


def replayed(found: Restored) -> Changes:
    """What the frozen rule makes of each layer when the errors are the run's own, update by update.

    Raises ConfigError where the run, trained again on this machine, does not end at its checkpoint.
    """
    config, train = replace(found.config, form="primal"), found.splits["train"]  # which ends at the same weights
    if config.optim.clip_norm:
        raise ConfigError(f"--replay: expected optim.clip_norm=0, found {config.optim.clip_norm:g}: leave --replay out")
    learner = make_learner(config, train, found.learner.encoding.device, ENGINES["local"], Mesh())
    learner.net.load_state_dict({**learner.net.state_dict(), **norms_of(found)})
    frozen, net = learner.fixed.frozen, learner.net
    weights = [torch.nn.Parameter(learner.start(index).clone()) for index, _ in enumerate(net.layers)]
    optimizer = make_optimizer(config.optim, weights)
    if config.optim.weight_decay and config.optim.decay_towards == "initial":
        pull_to_start(optimizer, weights, config.optim)
    plan = Plan(len(train), config.batch_size, config.seed, train.layout)
    whole = plan.steps_per_epoch * config.epochs
    batches = stream(train, plan, learner.encoding, 0, found.step, config.accumulation, config.data.views)
    for step, parts in batches:
        lr = config.optim.lr * factor(config.schedule, step, plan.steps_per_epoch, whole)
        for batch in parts:
            with torch.no_grad():
                error = learner.loss.error(net.trace(batch.images).logits, batch.targets, batch.size)
            trace = frozen.trace(batch.images)
            error, unscale = scaled(error, trace.logits.dtype)
            updates = weight_updates(net, trace, frozen.pullback(error, trace))
            for weight, update in zip(weights, updates, strict=True):
                if update is not None:
                    own = update.to(weight.dtype) * (1.0 if unscale is None else unscale.to(weight.dtype))
                    weight.grad = own if weight.grad is None else weight.grad + own
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        learner.update(parts, lr)
    with torch.no_grad():
        pairs = zip(observe.changes(learner), observe.changes(found.learner), strict=True)
        ended = [relative(a, b) for a, b in pairs if a is not None and b is not None]
    worst = max((value for value in ended if math.isfinite(value)), default=0.0)
    if worst > 0.01:
        raise ConfigError(
            f"--replay: trained again, the run ends {worst:.1%} of its change away from its checkpoint at step "
            f"{found.step}; expected the same weights to rounding. Replay it with the versions and on the machine of "
            "the run, or leave --replay out"
        )
    return [weight.detach() - learner.start(index) for index, weight in enumerate(weights)]


def norms_of(found: Restored) -> dict[str, Tensor]:
    """The buffers of calibrated norms, which are a part of the initial network."""
    return {name: value for name, value in found.learner.net.state_dict().items() if name.startswith("norms.")}


def analyse(run: Path, which: str, replay: bool, sample: int) -> Row:
    """All of one run: its layers, and what there is one of in a network. Raises what ``restored`` raises."""
    found = restored(run, which)
    learner, net, train = found.learner, found.learner.net, found.splits["train"]
    if not all_finite(net.state_dict().values()):
        raise CheckpointError(
            f"{run}: expected finite weights, found NaN or infinity at step {found.step}; give an earlier "
            "--checkpoint, or train again with a lower optim.lr"
        )
    errors = summed_errors(run, found)
    if errors is None and not replay:
        raise ConfigError(
            f"{run}: expected the errors that analysis.track_errors=true sums in training, found none; train with it, "
            "or give --replay, which trains the run again"
        )
    learner.rule.eval()
    own, most = observe.changes(learner), found.config.batch_size
    targets: dict[str, Changes] = {}
    if errors is not None:
        targets["definition"] = observe.frozen_changes(learner, train, errors, torch.arange(len(train)), most)
    if replay:
        targets["frozen_network"] = replayed(found)
    target = next(iter(targets.values()))
    columns: dict[str, Sequence[Any]] = {}
    for name, one in targets.items():
        scores = observe.scores(learner, own, one)
        columns[name] = [None if score is None else score.value for score in scores]
        columns[f"{name}_error"] = [None if score is None else score.error for score in scores]
    for name, control in observe.controls(learner, own, found.config.seed).items():
        columns[name] = [None if score is None else score.value for score in observe.scores(learner, control, target)]
    row = {"run": str(run), "rule": found.config.rule.name, "width": found.config.net.width, "step": found.step}
    return {**row, **moved(found, own, columns, sample)}


@torch.no_grad()
def moved(found: Restored, own: Changes, columns: dict[str, Sequence[Any]], sample: int) -> Row:
    """Movement and cosine of each layer, and the numbers of the whole network, on the first training examples."""
    learner, net, train = found.learner, found.learner.net, found.splits["train"]
    rows = len(train) if net.state is None else net.layers[net.state].shape[0]
    start, places = learner.fixed.frozen, torch.arange(min(sample, len(train), rows))
    batch = learner.encoding.batch(train, places, 0)
    now, before = net.trace(batch.images, net.current), start.trace(batch.images)
    gates = gates_moved(net, now, before)
    columns["update_cosine"] = learner.cosines(batch)
    columns["weight_change"] = [
        None if a is None else relative(a + learner.start(index), learner.start(index)) for index, a in enumerate(own)
    ]
    pairs = zip(now.inputs, before.inputs, strict=True)
    columns["input_change"] = [relative(a, b) if a.numel() else None for a, b in pairs]
    columns["gate_change"] = [None if site is None else gates[site] for site in net.sites]
    change = [
        [one for one in (None if a is None else a, layer.bias) if one is not None]
        for a, layer in zip(own, net.layers, strict=True)
    ]
    small = batch.images[: min(16, len(places))]
    once = net.state is None and now.logits.dim() == 2  # no readout at every time
    at_start = tangent(net, start.parameters, small, change) if once else None
    layers = [{"layer": index + 1, **{key: clean(c[index]) for key, c in columns.items()}} for index in range(len(own))]
    row: Row = {"layers": layers}
    if at_start is None or at_start.moved is None:
        return row
    after = tangent(net, net.current, small)
    logits = [net.trace(small, parameters).logits.double() for parameters in (net.current, start.parameters)]
    linear = logits[1].flatten(1)[:, -at_start.moved.shape[1] :] + at_start.moved
    travelled = (logits[0] - logits[1]).norm().item()
    apart = (logits[0].flatten(1)[:, -linear.shape[1] :] - linear).norm().item()
    labels = train.labels[places[: len(small)]]
    row["kernel_change"] = clean(relative(after.kernel, at_start.kernel))
    row["distance_to_linearisation"] = clean(apart / travelled if travelled > 0 else math.nan)
    for name, kernel in (("initial", at_start.kernel), ("trained", after.kernel)):
        row[f"label_alignment_{name}"] = clean(label_alignment(kernel, labels, train.classes))
    return row


def clean(value: float | None) -> float | None:
    """None for what is not there or not finite."""
    return value if value is not None and math.isfinite(value) else None


def show(row: Row) -> None:
    """A table of the layers, and a line for the network."""
    print(f"{row['run']}: {row['rule']}, width {row['width']}, after step {row['step']}")
    names = [name for name in row["layers"][0] if not name.endswith("_error")]
    print("  ".join(f"{name:>14s}" for name in names))
    for layer in row["layers"]:
        cells = {name: "-" if layer[name] is None else f"{layer[name]:.4g}" for name in names}
        print("  ".join(f"{cell:>{max(14, len(name))}s}" for name, cell in cells.items()))
    rest = [key for key in row if key not in ("run", "rule", "width", "step", "layers")]
    print(", ".join(f"{key.replace('_', ' ')} {row[key]:.4g}" for key in rest if row[key] is not None))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="The alignment score of trained runs, with controls and movement.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--checkpoint", default="last", metavar="WHICH", help="last, best or a step (default: last)")
    parser.add_argument("--replay", action="store_true", help="score against a network driven by the frozen rule too")
    parser.add_argument("--sample", type=int, default=100, metavar="N", help="examples for movement (default: 100)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: torch's own number")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the rows here as well")
    options = parser.parse_args(arguments)
    if options.sample < 2 or options.threads < 0:
        parser.error("expected --sample of at least 2 and --threads of at least 0")
    try:
        rows = []
        with torch_settings(options.threads, False):
            for run in options.runs:
                rows.append(analyse(run, options.checkpoint, options.replay, options.sample))
                show(rows[-1])
        write_json(options.json, rows, allow_nan=False)
    except (ConfigError, DataError, CheckpointError, OSError) as problem:
        print(f"alignment: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    ended(main)
