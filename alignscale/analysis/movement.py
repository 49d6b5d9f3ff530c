"""How far training has moved a network from its start: pure functions of two networks of one structure, on a sample.

They stand alone beside the alignment score, whose theory holds as far as these are small.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignscale.nets.network import Network
from alignscale.types import Parameters, Trace


def relative(now: Tensor, start: Tensor) -> float:
    """|now - start| / |start|; NaN where the start is 0."""
    scale = start.double().norm().item()
    return (now.double() - start.double()).norm().item() / scale if scale > 0 else math.nan


def gates_moved(net: Network, now: Trace, start: Trace) -> list[float]:
    """Per site: of relu the fraction of units that opened or closed, else the relative change of the derivative."""
    pairs = zip(net.gates(now), net.gates(start), strict=True)
    if net.activation.of_output and net.activation.gate(torch.ones(1)) == 1:  # relu, whose residue is its gate
        return [((a > 0) != (b > 0)).double().mean().item() for a, b in pairs]
    return [relative(a, b) for a, b in pairs]


@dataclass(frozen=True)
class Tangent:
    """The tangent kernel of a sample, (n, n), mean over logits; and J moved, (n, classes): J times a change."""

    kernel: Tensor
    moved: Tensor | None


@torch.no_grad()
def tangent(net: Network, parameters: Parameters, images: Tensor, change: Sequence[Sequence[Tensor]] = ()) -> Tangent:
    """Of the network of these parameters at ``images`` (n, ...), through the moments of norm batch where there are any.

    change: per layer, of the weight and the bias if it has one. Holds n gradients of all weights at once.
    """
    trace = net.trace(images, parameters)
    gates, (count, classes) = net.gates(trace), (len(images), trace.logits.shape[-1])
    kernel = images.new_zeros(count, count, dtype=torch.float64)
    moved = images.new_zeros(count, classes, dtype=torch.float64)
    flat = torch.cat([one.flatten() for layer in change for one in layer]).to(images) if change else None
    for logit in range(classes):
        rows = []
        for example in range(count):
            error = torch.zeros_like(trace.logits)
            error[example, ..., logit] = 1
            deltas = net.pullback(error, gates, trace.norms, lambda index: parameters(index)[0])
            local = zip(net.layers, trace.inputs, net.through_norms(trace, deltas), strict=True)
            gradients = [one for layer, a, d in local if d is not None for one in layer.weight_gradient(a, d)]
            rows.append(torch.cat([one.flatten() for one in gradients if one is not None]))
        jacobian = torch.stack(rows)
        kernel += (jacobian @ jacobian.T).double() / classes
        if flat is not None:
            moved[:, logit] = (jacobian @ flat).double()
    return Tangent(kernel, moved if change else None)


def label_alignment(kernel: Tensor, labels: Tensor, classes: int) -> float:
    """cos(K, Y Y^T) with Y the one-hot labels minus 1 / classes (Cristianini et al. 2001): 1 is the perfect kernel."""
    targets = torch.nn.functional.one_hot(labels, classes).to(kernel) - 1 / classes
    ideal = targets @ targets.T
    return ((kernel * ideal).sum() / (kernel.norm() * ideal.norm())).item()
