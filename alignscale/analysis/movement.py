"""How far training has moved a network from its start.

It stands alone beside the alignment score, whose theory holds as far as a network moves little.
"""

import math

from torch import Tensor

from alignscale.nets.network import Network
from alignscale.types import Trace


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
