"""What a step moves between the ranks of a mesh: pure functions of a network's options.

It stands alone because the cost model, a projection and the test that counts real collectives must agree on it. Bytes
are those of the whole tensor that is gathered, scattered or summed, padded to equal parts, on one rank; of them
(n - 1) / n pass its network card (twice that for a sum). Norm batch's moments and the loss are not in it.
"""

import math
from dataclasses import dataclass, replace

import torch

from alignscale.choices import DeepSpeedConfig, NetConfig
from alignscale.config import TrainConfig
from alignscale.nets import Network, build

DOWN = ("backprop", "align_ada", "align_zero", "align_prop", "feedback_alignment", "sign_symmetric")
"""Rules whose signals go down the network, layer by layer."""
FROZEN = ("align_ada", "align_zero")
"""Rules that read the initial network, live or from a cache."""
MASTER = 4


@dataclass(frozen=True)
class Plan:
    """A network, its batch, a rule and a mesh.

    batch: examples in a step on all ranks. width, data: of the mesh. stage: of ZeRO. jacobian: live, gates or explicit.
    inputs: align_zero's initial layer inputs are ``whole`` in the cache, ``gathered`` or ``recomputed``. itemsize: of
    what is computed. reduced: bytes of a gradient's number on its way to the data ranks. states: of the optimizer, in
    numbers a weight. overlap: whether halves of the batch take turns.
    """

    net: NetConfig
    shape: tuple[int, ...]
    classes: int
    batch: int
    rule: str = "backprop"
    width: int = 1
    data: int = 1
    stage: int = 1
    jacobian: str = "live"
    inputs: str = "whole"
    itemsize: int = 4
    reduced: int = MASTER
    states: int = 0
    overlap: bool = False

    @property
    def gathered(self) -> bool:
        """Whether the initial layer inputs are, from the parts of them that the ranks have cached."""
        return self.rule == "align_zero" and self.jacobian != "live" and self.inputs == "gathered"

    @property
    def turns(self) -> int:
        """Messages of an exchange of activations: those of the whole batch, or of each half."""
        mixed = self.net.norm == "batch" or getattr(self.net, "initial_state", "") == "trained"
        return 2 if self.overlap and self.stage < 3 and not mixed and -(-self.batch // self.data) > 1 else 1


def plan_of(config: TrainConfig, shape: tuple[int, ...], classes: int, width: int, data: int, itemsize: int) -> Plan:
    """The plan of a run on ``width`` x ``data`` ranks, its Jacobian live."""
    inputs = config.jacobian.inputs if config.jacobian.inputs == "recomputed" else config.parallel.inputs
    engine = config.engine if isinstance(config.engine, DeepSpeedConfig) else DeepSpeedConfig()
    reduced = 2 if engine.reduces_in_bf16(config.precision == "bf16") else MASTER
    ranks = (width, data, engine.zero_stage)
    what = (config.batch_size, config.rule.name, *ranks, "live", inputs, itemsize, reduced)
    return Plan(config.net, shape, classes, *what, overlap=config.parallel.overlap)


@dataclass(frozen=True)
class Exchange:
    """What a layer's ranks tell each other in a step. over: ``width`` or ``data``, the ranks of the mesh that do."""

    layer: int
    what: str
    call: str
    over: str
    messages: int
    bytes: int


def passes(plan: Plan) -> tuple[int, int]:
    """How often activations go up the network, and signals down, between the ranks that share its width."""
    cached = plan.rule in FROZEN and plan.jacobian != "live"
    again = plan.rule == "align_zero" and plan.inputs != "whole" if cached else plan.rule in FROZEN
    down = plan.rule in DOWN and not (cached and plan.jacobian == "explicit")
    return 1 + again, int(down)


def exchanges(plan: Plan) -> list[Exchange]:
    """Every exchange of a step, layer by layer."""
    net = outline(plan)
    own = -(-plan.batch // plan.data)
    up, down = passes(plan)
    forward = up - plan.gathered
    found = []
    if plan.width > 1:
        units = plan.width * -(-plan.net.width // plan.width)
        steps = net.shapes[0][0] - 1 if net.recurrent else 1
        above = [1] if net.recurrent else range(1, net.readout)
        for layer in above if steps else ():
            places = 1 if net.recurrent else math.prod(net.shapes[layer - 1][1:])
            size = own * units * places * plan.itemsize * steps
            messages, moved = forward * steps * plan.turns, forward * size
            if plan.gathered:  # the cached states of all steps at once, with the first
                messages, moved = messages + 1, moved + size + (size // steps if net.recurrent else 0)
            found.append(Exchange(layer, "activations", "all_gather", "width", messages, moved))
            if down:
                found.append(Exchange(layer, "signals", "reduce_scatter", "width", steps * plan.turns, size))
        every = getattr(plan.net, "readout", "last") == "every"  # logits at each step
        size = own * plan.classes * plan.itemsize * (net.shapes[0][0] if every else 1)
        found.append(Exchange(net.readout, "logits", "all_reduce", "width", forward * plan.turns, forward * size))
    if plan.data > 1:
        for layer, shape in enumerate(shapes(plan)):
            found += _weights(plan, layer, shape)
    return sorted(found, key=lambda one: one.layer)


def _weights(plan: Plan, layer: int, shape: tuple[int, ...]) -> list[Exchange]:
    """What ZeRO does with a layer, nothing kept from the forward pass to the backward pass."""
    parts = [math.prod(shape), *([shape[0]] if outline(plan).layers[layer].held[1] is not None else [])]
    size = sum(plan.data * -(-part // plan.data) for part in parts) * MASTER
    summed = size * plan.reduced // MASTER
    if plan.stage == 0:
        return [Exchange(layer, "gradients", "all_reduce", "data", 1, summed)]
    once = size * plan.itemsize // MASTER  # as layers compute
    if plan.stage < 3:
        gradients = Exchange(layer, "gradients", "reduce_scatter", "data", 1, summed)
        return [gradients, Exchange(layer, "weights", "all_gather", "data", 1, once)]
    again = {"backprop": once, "sign_symmetric": size}.get(plan.rule, 0)  # signs of fp32 weights
    return [
        Exchange(layer, "weights", "all_gather", "data", (1 + bool(again)) * len(parts), once + again),
        Exchange(layer, "gradients", "reduce_scatter", "data", len(parts), summed),
    ]


def outline(plan: Plan) -> Network:
    """The whole network without storage."""
    with torch.device("meta"):
        return build(plan.net, plan.shape, plan.classes)


def shapes(plan: Plan) -> list[tuple[int, ...]]:
    """Of each layer's weight, on the rank that has most of it."""
    net, share = outline(plan), -(-plan.net.width // plan.width)
    every = [layer.shape for layer in net.layers]
    return [(one[0], share) if index == net.readout else (share, *one[1:]) for index, one in enumerate(every)]


def wire(plan: Plan) -> tuple[float, int]:
    """Bytes that pass a rank's network card in a step, and messages."""
    ranks = {"width": plan.width, "data": plan.data}
    found = exchanges(plan)
    moved = sum(
        one.bytes * (2 if one.call == "all_reduce" else 1) * (ranks[one.over] - 1) / ranks[one.over] for one in found
    )
    return moved, sum(one.messages for one in found)


def wires(plan: Plan) -> dict[str, float]:
    """The bytes of ``wire`` for backprop, and for the plan's rule with each form of the Jacobian."""
    forms = {form: wire(replace(plan, jacobian=form))[0] for form in ("live", "gates", "explicit")}
    return {"backprop": wire(replace(plan, rule="backprop"))[0], **forms}
