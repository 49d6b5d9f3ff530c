"""How close a rule's update is to backprop's: pure functions of a network's state, which they leave as it was."""

import torch
from torch import Tensor

from alignscale.nets.network import Network
from alignscale.types import Batch, StepOutput


def update(rule: torch.nn.Module, net: Network, batch: Batch) -> list[Tensor | None]:
    """The gradient that ``rule`` gives each parameter of ``net`` on ``batch``; None where it gives none."""
    output: StepOutput = rule(batch)
    return list(torch.autograd.grad(output.surrogate, list(net.parameters()), allow_unused=True))


def cosine(first: list[Tensor | None], second: list[Tensor | None]) -> float:
    """Cosine of two updates, over all parameters together, in float64; a missing gradient counts as 0.

    NaN where one of them is 0 everywhere.
    """
    dot = sum((a.double() * b.double()).sum().item() for a, b in zip(first, second, strict=True) if not (a is None or b is None))
    norms = [sum(g.double().square().sum().item() for g in side if g is not None) ** 0.5 for side in (first, second)]
    return dot / (norms[0] * norms[1]) if norms[0] * norms[1] else float("nan")
