"""How close a rule's update is to backprop's, and how far training has moved a network from its start.

They stand alone as pure functions of a network's state, which they leave as it was; the theory of the alignment score
holds as far as a network moves little.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from alignscale.distributed import ALONE, Ranks
from alignscale.nets.network import Deltas, Network
from alignscale.types import Trace


@torch.no_grad()
def weight_updates(net: Network, trace: Trace, deltas: Deltas) -> Iterator[Tensor | None]:
    """The gradient that deltas and a trace give the weight of each layer of ``net``; None where it learns nothing."""
    for layer, a, delta in zip(net.layers, trace.inputs, net.through_norms(trace, deltas), strict=True):
        yield None if delta is None else layer.weight_gradient(a, delta)[0]


def cosines(first: Iterable[Tensor | None], second: Iterable[Tensor | None], ranks: Ranks = ALONE) -> list[float]:
    """Cosine of two updates layer by layer, in float64; 0 for a layer that has no update in one of them.

    ranks: those that have the other parts of the updates.
    """
    pairs = zip(first, second, strict=True)
    return [0.0 if a is None or b is None else _cosine(a.double(), b.double(), ranks) for a, b in pairs]


def _cosine(a: Tensor, b: Tensor, ranks: Ranks) -> float:
    products = torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()])
    product, first, second = ranks.sum(products).tolist()
    scale = math.sqrt(first * second)
    return product / scale if scale > 0 else 0.0


def relative(now: Tensor, start: Tensor) -> float:
    """|now - start| / |start|; NaN where the start is 0."""
    scale = start.double().norm().item()
    return (now.double() - start.double()).norm().item() / scale if scale > 0 else math.nan


def gates_moved(net: Network, now: Trace, start: Trace) -> list[float]:
    """Per site: of relu the fraction of units that opened or closed, else the relative change of the derivative."""
    pairs = zip(net.gates(now), net.gates(start), strict=True)
    if net.activation.binary:
        return [((a > 0) != (b > 0)).double().mean().item() for a, b in pairs]
    return [relative(a, b) for a, b in pairs]
