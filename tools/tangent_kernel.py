"""The tangent kernel of a network on a small sample: its change is how far a network is from its linearisation.

Stands alone beside the alignment score, whose theory holds as far as that change is small.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignscale.nets.network import Network
from alignscale.nets.norms import BatchNorm
from alignscale.types import Parameters


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
    master = torch.promote_types(images.dtype, torch.float32)
    kernel = images.new_zeros(count, count, dtype=torch.float64)
    moved = images.new_zeros(count, classes, dtype=torch.float64)
    flat = torch.cat([one.flatten() for layer in change for one in layer]).to(kernel.device) if change else None
    mixed = any(isinstance(norm, BatchNorm) for norm in net.norms)
    for logit in range(classes):
        rows = []
        for example in range(count):
            if mixed or example == 0:  # else one pullback has all examples' deltas
                error = torch.zeros_like(trace.logits)
                error[example if mixed else slice(None), ..., logit] = 1
                found = net.pullback(error, gates, trace.norms, lambda index: parameters(index)[0])
                deltas = net.through_norms(trace, found)
            own = slice(None) if mixed else slice(example, example + 1)
            local = zip(net.layers, trace.inputs, deltas, strict=True)
            gradients = [one for layer, a, d in local if d is not None for one in layer.weight_gradient(a[own], d[own])]
            rows.append(torch.cat([one.flatten().to(master) for one in gradients if one is not None]))
        jacobian = torch.stack(rows)
        kernel += (jacobian @ jacobian.T).double() / classes
        if flat is not None:
            moved[:, logit] = (jacobian @ flat.to(master)).double()
    return Tangent(kernel, moved if change else None)


def label_alignment(kernel: Tensor, labels: Tensor, classes: int) -> float:
    """cos(K, Y Y^T) with Y the one-hot labels minus 1 / classes (Cristianini et al. 2001): 1 is the perfect kernel."""
    targets = torch.nn.functional.one_hot(labels, classes).to(kernel) - 1 / classes
    ideal = targets @ targets.T
    return ((kernel * ideal).sum() / (kernel.norm() * ideal.norm())).item()
