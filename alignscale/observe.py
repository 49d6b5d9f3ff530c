"""What the analysis makes of a learner: the alignment score and movement of each layer, live or from a checkpoint.

It stands alone because the loop and the tools must give the same numbers.
"""

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from alignscale.analysis.alignment import BUDGET, POINT, PROBES, Map, Score, score, shuffled
from alignscale.analysis.updates import gates_moved, relative, weight_updates
from alignscale.data import Split
from alignscale.data.plan import even_batches
from alignscale.learner import Learner
from alignscale.nets.layers import Conv, Layer, State
from alignscale.rules.base import scaled

Changes = list[Tensor | None]


def place_of(layer: Layer) -> Map:
    """Where a layer is applied."""
    return Map.same((layer.inputs[1], layer.inputs[2]), layer.stride) if isinstance(layer, Conv) else POINT


@torch.no_grad()
def changes(learner: Learner) -> Changes:
    """Per layer, W_t - W_0; None for a trained initial state."""
    layers, weight, start = learner.net.layers, learner.engine.weight, learner.start
    return [None if isinstance(layer, State) else weight(index) - start(index) for index, layer in enumerate(layers)]


@torch.no_grad()
def frozen_changes(learner: Learner, examples: Split, errors: Tensor, places: Tensor, most: int) -> Changes:
    """Per layer, D with D^T D = Sigma: the change that the frozen rule makes of the summed errors (N, classes).

    places: the examples that Sigma is a sum over. In batches of at most ``most``, whose moments norm batch takes.
    """
    net, frozen = learner.net, learner.fixed.frozen
    sums: Changes = [None] * len(net.layers)
    for part in even_batches(len(places), most):
        batch = learner.encoding.batch(examples, places[part], 0)
        trace = frozen.trace(batch.images)
        error, unscale = scaled(errors[places[part]].to(trace.logits.device), trace.logits.dtype)
        deltas, master = frozen.pullback(error, trace), learner.encoding.master
        factor = 1.0 if unscale is None else unscale.to(master)
        updates = weight_updates(net, trace, deltas)
        found = [None if one is None else one.to(master) * factor for one in updates]
        sums = [b if a is None or b is None else a + b for a, b in zip(sums, found, strict=True)]
    return sums


def scores(learner: Learner, first: Changes, second: Changes, budget: float = BUDGET) -> list[Score | None]:
    """The score of each layer, estimated beyond ``budget``; None for one without weights, or that has not moved."""
    found, probes = list[Score | None](), PROBES if budget < BUDGET else 100
    for layer, a, b in zip(learner.net.layers, first, second, strict=True):
        one = None if a is None or b is None else score(a, b, place_of(layer), budget, probes)
        found.append(one if one is not None and math.isfinite(one.value) else None)
    return found


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are there."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.fmean(known) if known else None


def hidden(learner: Learner, found: Sequence[Score | None]) -> list[float | None]:
    """The scores of the layers below the readout, which is what the paper shows."""
    return [None if one is None else one.value for one in found[: learner.net.readout]]


def live(
    learner: Learner, examples: Split, errors: Tensor, sample: int, most: int, whole: bool = False
) -> dict[str, float | None]:
    """Means over the hidden layers of ``alignment`` and ``weight_change``, and each layer's score.

    whole: the exact score, which is else estimated from few random inputs, with ``alignment_error``; the controls, in
    which all numbers of W_t are shuffled (as in the public code) or those of the update; and what the sample sees,
    ``input_change`` and ``gate_change``.
    """
    count = min(sample or len(examples), len(examples))
    places = torch.arange(count) * len(examples) // count
    net, start, own = learner.net, learner.start, changes(learner)
    with learner.rule.evaluating():
        target = frozen_changes(learner, examples, errors, places, most)
        measured = scores(learner, own, target, BUDGET if whole else 0.0)
        found = hidden(learner, measured)
        moved = [None if a is None else relative(a + start(index), start(index)) for index, a in enumerate(own)]
        values: dict[str, float | None] = {"alignment": mean(found), "weight_change": mean(moved[: net.readout])}
        if not whole:
            values["alignment_error"] = mean([None if one is None else one.error for one in measured[: net.readout]])
        values |= {f"alignment_layer{index}": value for index, value in enumerate(found, 1)}
        if whole:
            for name, control in controls(learner, own, learner.options.seed).items():
                values[f"alignment_{name}"] = mean(hidden(learner, scores(learner, control, target)))
            images = learner.encoding.batch(examples, places[:most], 0).images
            with torch.no_grad():
                now, before = net.trace(images, net.current), learner.fixed.frozen.trace(images)
            pairs = zip(now.inputs[1:], before.inputs[1:], strict=True)
            values["input_change"] = mean([relative(a, b) for a, b in pairs])
            values["gate_change"] = mean(gates_moved(net, now, before))
    return values


def controls(learner: Learner, own: Changes, seed: int) -> dict[str, Changes]:
    """``shuffled``: W_t in a random order, minus W_0, as the public code has it; ``shuffled_update``: W_t - W_0 so."""
    start = learner.start
    whole = [None if a is None else shuffled(a + start(i), seed + i) - start(i) for i, a in enumerate(own)]
    updates = [None if a is None else shuffled(a, seed + i) for i, a in enumerate(own)]
    return {"shuffled": whole, "shuffled_update": updates}
