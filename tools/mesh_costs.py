"""What a step keeps and computes on each rank of a mesh of width x data, and the time that it takes.

For bench_step.py and project_width.py; what it moves is the package's, alignscale/traffic.py.
"""

import math
from dataclasses import dataclass

from alignscale.nets.layers import Conv
from alignscale.traffic import FROZEN, MASTER, Plan, exchanges, outline, passes, shapes, wire


@dataclass(frozen=True)
class Sizes:
    """Of a layer on one rank: weights and biases, what it reads of an example, what it writes, places that it is at."""

    parameters: int
    weights: int
    inputs: int
    outputs: int
    places: int


def layers(plan: Plan) -> list[Sizes]:
    """Of the rank that has most; positions count as places of one layer, and steps of a recurrent network too."""
    net, found = outline(plan), []
    steps = net.shapes[0][0] if net.recurrent else 1
    for index, (layer, shape) in enumerate(zip(net.layers, shapes(plan), strict=True)):
        last = index == net.readout
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
    traces = 2 if plan.rule == "align_ada" and plan.jacobian == "live" else 1
    given = plan.reduced if plan.stage and plan.itemsize < MASTER else MASTER  # by layers, of a gradient's number
    activations = sum(one.inputs for one in every) + sum(one.outputs for one in every[:-1])
    return {
        "weights": (share if plan.stage == 3 else psi) * (plan.itemsize if plan.stage else MASTER) // MASTER,
        "gradients": share if plan.stage >= 2 else psi * given // MASTER,
        "fp32 copy": share if plan.stage else 0,
        "optimizer": plan.states * (share if plan.stage else psi),
        "initial weights": psi // MASTER * plan.itemsize if frozen or plan.rule == "feedback_alignment" else 0,
        "activations": traces * own * activations * plan.itemsize,
    }


def flop(plan: Plan) -> float:
    """Floating-point operations of a step on the rank that has most: 2 a weight, place and example in each pass.

    Backprop has 3 passes, align_ada 4 live, 3 with gates, and 2 with an explicit Jacobian, beside its contraction.
    """
    own = -(-plan.batch // plan.data)
    once = 2.0 * own * sum(one.weights * one.places for one in layers(plan))
    up, down = passes(plan)
    forward = up - plan.gathered
    contracted = plan.rule in FROZEN and plan.jacobian == "explicit"
    units = sum(one.outputs for one in layers(plan)[:-1]) if contracted else 0
    return once * (forward + down + (plan.rule != "readout_only")) + 2.0 * own * plan.classes * units


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
