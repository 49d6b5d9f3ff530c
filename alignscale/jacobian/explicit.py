"""Explicit Jacobians of the initial network: d logits / d x at a site, for each class and unit.

Pure functions; they stand alone so that caches can store them. delta = J^T e needs no weights and no layer above.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from alignscale.frozen import Frozen
from alignscale.types import Jacobian, Trace

PEAKS = {torch.float16: 1024.0, torch.float8_e4m3fn: 448.0}
"""What the largest value of an example and class is scaled to where a dtype's range is narrow."""


@torch.no_grad()
def jacobians(frozen: Frozen, trace: Trace, sites: Collection[int]) -> dict[int, Tensor]:
    """Site -> J (B, classes, *site) at the examples of a trace of the initial network: one pullback a class."""
    net, (batch, classes) = frozen.net, trace.logits.shape
    found = {site: trace.logits.new_empty(batch, classes, *net.shapes[site]) for site in sites}
    for label in range(classes if found else 0):
        error = torch.zeros_like(trace.logits)
        error[:, label] = 1.0
        deltas = frozen.pullback(error, trace)
        for site, delta in zip(net.sites, deltas, strict=True):
            if site in found and delta is not None:
                found[site][:, label] = delta
    return found


def encoded(jacobian: Tensor, dtype: torch.dtype) -> Jacobian:
    """J (B, classes, *site) in ``dtype``; fp16 and fp8 with a scale, fp32 (B, classes), for each example and class."""
    if dtype not in PEAKS:
        return Jacobian(jacobian.to(dtype))
    flat = jacobian.flatten(2)
    largest = flat.abs().amax(2).float()
    scale = torch.where(largest > 0, largest / PEAKS[dtype], 1.0)
    return Jacobian((flat / scale[:, :, None]).to(dtype).view(jacobian.shape), scale)
