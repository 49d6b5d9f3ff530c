"""Norms between a layer and its activation, with their local pullbacks.

They stand alone: a rule may pull back through another network's moments.

Moments are per channel AND position, over the examples (axis 0) alone, biased, eps 1e-6, no trained gain or shift, as
in the paper's public code. A norm works on tensors (B, *site); a recurrent network's site is (T, units) and is
normalised one step at a time, so ``at`` names a position of the site's first axis.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from alignscale.types import NormState

EPS = 1e-6
ALL = slice(None)
Sum = Callable[[Tensor], Tensor]


class Norm(nn.Module, ABC):
    """Normalises one site."""

    @abstractmethod
    def forward(self, z: Tensor, at: int | slice = ALL) -> tuple[Tensor, NormState | None]:
        """z (B, *site) -> normalised x of the same shape, and what ``pullback`` needs of this pass."""

    @abstractmethod
    def pullback(self, delta: Tensor, state: NormState | None, at: int | slice = ALL) -> Tensor:
        """Delta after the norm -> delta before it, by the moments of the pass that left ``state``."""


def _layout(z: Tensor) -> torch.memory_format:
    last = z.dim() == 4 and not z.is_contiguous() and z.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _flat(z: Tensor) -> Tensor:
    """(B, *site) -> (B, units), the units in the order that they lie in."""
    return (z.permute(0, 2, 3, 1) if _layout(z) == torch.channels_last else z).flatten(1)


def _like(flat: Tensor, z: Tensor) -> Tensor:
    """(B, units) -> the shape and layout of z."""
    if _layout(z) == torch.contiguous_format:
        return flat.view_as(z)
    return flat.view(z.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)


class NoNorm(Norm):
    """The identity."""

    def forward(self, z: Tensor, at: int | slice = ALL) -> tuple[Tensor, NormState | None]:
        """Z itself."""
        return z, None

    def pullback(self, delta: Tensor, state: NormState | None, at: int | slice = ALL) -> Tensor:
        """Delta itself."""
        return delta


class _Synced(torch.autograd.Function):
    """Batch norm of z (B, units) by moments over the examples of all ranks."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, total: Sum) -> tuple[Tensor, Tensor, Tensor]:
        wide = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
        count = wide.new_full((1,), len(z))
        sums = total(torch.cat([wide.sum(0), count]))
        mean = sums[:-1] / sums[-1]
        inverse_std = torch.rsqrt(total((wide - mean).square().sum(0)) / sums[-1] + EPS)
        ctx.total = total
        ctx.save_for_backward(z, mean, inverse_std)
        ctx.mark_non_differentiable(mean, inverse_std)
        return ((wide - mean) * inverse_std).to(z.dtype), mean, inverse_std

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor, None]:
        z, mean, inverse_std = ctx.saved_tensors
        return synced_pullback(deltas[0], z, mean, inverse_std, ctx.total), None


def synced_pullback(delta: Tensor, z: Tensor, mean: Tensor, inverse_std: Tensor, total: Sum) -> Tensor:
    """(delta - mean(delta) - x mean(delta x)) / std on (B, units), means over the examples of all ranks."""
    x, wide = (z - mean) * inverse_std, delta.to(mean.dtype)
    sums = total(torch.cat([wide.sum(0), (wide * x).sum(0), mean.new_full((1,), len(z))]))
    first, second = sums[:-1].view(2, -1) / sums[-1]
    return ((wide - first - x * second) * inverse_std).to(delta.dtype)


class BatchNorm(Norm):
    """The batch's own moments, in training and in evaluation; the pullback goes through the moments.

    total: sums over ranks, which makes the moments in training those of the global batch.
    """

    total: Sum | None = None

    def forward(self, z: Tensor, at: int | slice = ALL) -> tuple[Tensor, NormState | None]:
        """(z - mean) / sqrt(var + eps) over axis 0."""
        if self.total is not None and self.training:
            x, mean, inverse_std = _Synced.apply(_flat(z), self.total)
        else:
            x, mean, inverse_std = torch.native_batch_norm(_flat(z), None, None, None, None, True, 0.0, EPS)
        return _like(x, z), NormState(z, mean, inverse_std)

    def pullback(self, delta: Tensor, state: NormState | None, at: int | slice = ALL) -> Tensor:
        """(delta - mean(delta) - x mean(delta x)) / std, means over axis 0."""
        if state is None:
            raise ValueError("BatchNorm.pullback: expected the state of a forward pass, found None")
        maps = delta.dim() == 4  # whose units must lie in the order of z's, which is the moments'
        flat = _flat(delta.contiguous(memory_format=_layout(state.z)) if maps else delta)
        if self.total is not None and self.training:
            pulled = synced_pullback(flat, _flat(state.z), state.mean, state.inverse_std, self.total)
            return _like(pulled, state.z)
        gradient, _, _ = torch.ops.aten.native_batch_norm_backward(
            flat, _flat(state.z), None, None, None, state.mean, state.inverse_std, True, EPS,
            [True, False, False],
        )  # fmt: skip
        return _like(gradient, state.z)


class CalibratedNorm(Norm):
    """Fixed moments of the initial network over a fixed set of examples: each example's Jacobian is its own."""

    mean: Tensor
    inverse_std: Tensor

    def __init__(self, site: tuple[int, ...]) -> None:
        """Site: the shape of one example's pre-activations. Not usable before ``calibrate``."""
        super().__init__()
        self.register_buffer("mean", torch.full(site, float("nan")))
        self.register_buffer("inverse_std", torch.full(site, float("nan")))

    def calibrate(self, mean: Tensor, variance: Tensor, at: int | slice = ALL) -> None:
        """Set the moments, (*site) float64, or those of one position of the site's first axis."""
        self.mean[at] = mean.to(self.mean)
        self.inverse_std[at] = torch.rsqrt(variance + EPS).to(self.inverse_std)

    def forward(self, z: Tensor, at: int | slice = ALL) -> tuple[Tensor, NormState | None]:
        """(z - mean) / sqrt(var + eps) with the fixed moments."""
        return ((z - self.mean[at]) * self.inverse_std[at]).to(z.dtype), None

    def pullback(self, delta: Tensor, state: NormState | None, at: int | slice = ALL) -> Tensor:
        """Delta / std with the fixed moments."""
        return (delta * self.inverse_std[at]).to(delta.dtype)


def make_norm(name: str, site: tuple[int, ...]) -> Norm:
    """The norm called ``none``, ``batch`` or ``calibrated`` for a site of this shape."""
    return CalibratedNorm(site) if name == "calibrated" else {"none": NoNorm, "batch": BatchNorm}[name]()
