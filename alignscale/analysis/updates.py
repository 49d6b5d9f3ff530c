"""How close a rule's update is to backprop's: pure functions of a network's state, which they leave as it was."""

import math

import torch
from torch import Tensor

from alignscale.nets.network import Network
from alignscale.types import Batch, StepOutput


def weight_updates(rule: torch.nn.Module, net: Network, batch: Batch) -> list[Tensor | None]:
    """The gradient that ``rule`` gives the weight of each layer of ``net`` on ``batch``; None where it gives none."""
    output: StepOutput = rule(batch)
    weights = [layer.weight for layer in net.layers]
    return list(torch.autograd.grad(output.surrogate, weights, allow_unused=True))


def cosines(first: list[Tensor | None], second: list[Tensor | None]) -> list[float]:
    """Cosine of two updates layer by layer, in float64; 0 for a layer that has no update in one of them."""
    pairs = zip(first, second, strict=True)
    return [0.0 if a is None or b is None else _cosine(a.double(), b.double()) for a, b in pairs]


def _cosine(a: Tensor, b: Tensor) -> float:
    scale = math.sqrt(a.square().sum().item() * b.square().sum().item())
    return (a * b).sum().item() / scale if scale > 0 else 0.0
