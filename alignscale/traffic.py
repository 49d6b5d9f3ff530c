"""What a step moves, keeps and computes on each rank of a mesh: pure functions of a network's options.

It stands alone because a bench, a projection and the test that counts real collectives must agree on it. Bytes are
those of the whole tensor that is gathered, scattered or summed, padded to equal parts, on one rank; of them (n - 1) / n
pass its network card (twice that for a sum). Norm batch's moments and the loss are not in it.
"""

import math
from dataclasses import dataclass, replace

import torch

from alignscale.choices import NetConfig
from alignscale.config import TrainConfig
from alignscale.nets import Network, build
from alignscale.nets.layers import Conv

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
    what is computed. states: of the optimizer, in numbers a weight.
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
    states: int = 0


def plan_of(config: TrainConfig, shape: tuple[int, ...], classes: int, width: int, data: int, itemsize: int) -> Plan:
    """The plan of a run on ``width`` x ``data`` ranks, its Jacobian live."""
    inputs = config.jacobian.inputs if config.jacobian.inputs == "recomputed" else config.parallel.inputs
    stage = getattr(config.engine, "zero_stage", 1)
    ranks = (width, data, stage)
    return Plan(config.net, shape, classes, config.batch_size, config.rule.name, *ranks, "live", inputs, itemsize)


@dataclass(frozen=True)
class Exchange:
    """What a layer's ranks tell each other in a step. over: ``width`` or ``data``, the ranks of the mesh that do."""

    layer: int
    what: str
    call: str
    over: str
    messages: int
    bytes: int


@dataclass(frozen=True)
class Sizes:
    """Of a layer on one rank: weights and biases, what it reads of an example, what it writes, places that it is at."""

    parameters: int
    weights: int
    inputs: int
    outputs: int
    places: int


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
    found = []
    if plan.width > 1:
        units = plan.width * -(-plan.net.width // plan.width)
        steps = net.shapes[0][0] - 1 if net.recurrent else 1
        above = [1] if net.recurrent else range(1, net.readout)
        for layer in above if steps else ():
            places = 1 if net.recurrent else math.prod(net.shapes[layer - 1][1:])
            size = own * units * places * plan.itemsize * steps
            messages, moved = up * steps, up * size
            if net.recurrent and plan.jacobian != "live" and plan.inputs == "gathered" and plan.rule == "align_zero":
                messages, moved = steps + 1, 2 * size + size // steps  # the cached states of all steps at once
            found.append(Exchange(layer, "activations", "all_gather", "width", messages, moved))
            if down:
                found.append(Exchange(layer, "signals", "reduce_scatter", "width", down * steps, down * size))
        forward = up - (plan.rule == "align_zero" and plan.jacobian != "live" and plan.inputs == "gathered")
        size = own * plan.classes * plan.itemsize
        found.append(Exchange(net.readout, "logits", "all_reduce", "width", forward, forward * size))
    if plan.data > 1:
        for layer, sizes in enumerate(layers(plan)):
            found += _weights(plan, layer, sizes)
    return sorted(found, key=lambda one: one.layer)


def _weights(plan: Plan, layer: int, sizes: Sizes) -> list[Exchange]:
    """What ZeRO does with a layer, nothing kept from the forward pass to the backward pass."""
    biases = sizes.parameters - sizes.weights
    parts = [sizes.weights, *([biases] if biases else [])]
    size = sum(plan.data * -(-part // plan.data) for part in parts) * MASTER
    if plan.stage == 0:
        return [Exchange(layer, "gradients", "all_reduce", "data", 1, size)]
    if plan.stage < 3:
        gradients = Exchange(layer, "gradients", "reduce_scatter", "data", 1, size)
        return [gradients, Exchange(layer, "weights", "all_gather", "data", 1, size)]
    twice = 2 if plan.rule in ("backprop", "sign_symmetric") else 1
    return [
        Exchange(layer, "weights", "all_gather", "data", twice * len(parts), twice * size),
        Exchange(layer, "gradients", "reduce_scatter", "data", len(parts), size),
    ]


def outline(plan: Plan) -> Network:
    """The whole network without storage."""
    with torch.device("meta"):
        return build(plan.net, plan.shape, plan.classes)


def layers(plan: Plan) -> list[Sizes]:
    """Of the rank that has most; positions count as places of one layer, and steps of a recurrent network too."""
    net, share = outline(plan), -(-plan.net.width // plan.width)
    found = []
    steps = net.shapes[0][0] if net.recurrent else 1
    for index, layer in enumerate(net.layers):
        last = index == net.readout
        shape = (layer.shape[0], share) if last else (share, *layer.shape[1:])
        places = math.prod(layer.outputs[1:]) if isinstance(layer, Conv) else steps * (not last) + last
        read = math.prod(layer.padded) if isinstance(layer, Conv) else shape[1] * places
        bias = 0 if layer.held[1] is None else shape[0]
        found.append(Sizes(math.prod(shape) + bias, math.prod(shape), read, shape[0] * places, places))
    return found


def memory(plan: Plan) -> dict[str, int]:
    """Bytes that stay on a rank during a step, by what they are; DeepSpeed's buckets come on top."""
    own, every = -(-plan.batch // plan.data), layers(plan)
    psi = sum(one.parameters for one in every) * MASTER
    share = -(-psi // plan.data)
    frozen = plan.rule == "align_prop" or (plan.rule in FROZEN and plan.jacobian != "explicit")
    feedback = plan.rule in ("feedback_alignment", "sign_symmetric")
    traces = 2 if plan.rule == "align_ada" and plan.jacobian == "live" else 1
    activations = sum(one.inputs for one in every) + sum(one.outputs for one in every[:-1])
    return {
        "weights": share if plan.stage == 3 else psi,
        "gradients": share if plan.stage >= 2 else psi,
        "fp32 copy": share if plan.stage else 0,
        "optimizer": plan.states * (share if plan.stage else psi),
        "initial weights": psi // MASTER * plan.itemsize if frozen or feedback else 0,
        "activations": traces * own * activations * plan.itemsize,
    }


def flop(plan: Plan) -> float:
    """Floating-point operations of a step on the rank that has most: 2 a weight, place and example in each pass.

    Backprop has 3 passes, align_ada 4 live, 3 with gates, and 2 with an explicit Jacobian, beside its contraction.
    """
    own = -(-plan.batch // plan.data)
    once = 2.0 * own * sum(one.weights * one.places for one in layers(plan))
    up, down = passes(plan)
    forward = up - (plan.rule == "align_zero" and plan.jacobian != "live" and plan.inputs == "gathered")
    contracted = plan.rule in FROZEN and plan.jacobian == "explicit"
    units = sum(one.outputs for one in layers(plan)[:-1]) if contracted else 0
    return once * (forward + down + (plan.rule != "readout_only")) + 2.0 * own * plan.classes * units


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


def seconds(plan: Plan, flops: float, bandwidth: float, latency: float) -> float:
    """A step on a machine of so many FLOP/s, bytes/s and seconds a message; nothing overlapped."""
    moved, messages = wire(plan)
    return flop(plan) / flops + moved / bandwidth + messages * latency


def table(plan: Plan) -> str:
    """The exchanges as aligned text."""
    head = f"{'layer':>5s} {'what':12s} {'call':14s} {'over':5s} {'messages':>8s} {'bytes':>15s}"
    rows = [
        f"{one.layer:5d} {one.what:12s} {one.call:14s} {one.over:5s} {one.messages:8d} {one.bytes:15,d}"
        for one in exchanges(plan)
    ]
    return "\n".join([head, *rows])
