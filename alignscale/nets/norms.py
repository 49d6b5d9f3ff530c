"""Norms between a layer and its activation, with their local pullbacks.

They stand alone: a rule may pull back through another network's moments.

Moments are per channel AND position, over the examples (axis 0) alone, biased, eps 1e-6, no trained gain or shift, as
in the paper's public code. A norm works on tensors (B, *site); a recurrent network's site is (T, units) and is
normalised one step at a time, so ``at`` names a position of the site's first axis.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from alignscale.types import NormState

EPS = 1e-6
ALL = slice(None)


class Norm(nn.Module, ABC):
    """Normalises one site."""

    @abstractmethod
    def forward(self, z: Tensor, at: int | slice = ALL) -> tuple[Tensor, NormState | None]:
        """z (B, *site) -> normalised x of the same shape, and what ``pullback`` needs of this pass."""

    @abstractmethod
    def pullback(self, delta: Tensor, state: NormState | None, at: int | slice = ALL) -> Tensor:
        """Delta after the norm -> delta before it, by the moments of the pass that left ``state``."""


class NoNorm(Norm):
    """The identity."""

    def forward(self, z: Tensor, at: int | slice = ALL) -> tuple[Tensor, NormState | None]:
        """Z itself."""
        return z, None

    def pullback(self, delta: Tensor, state: NormState | None, at: int | slice = ALL) -> Tensor:
        """Delta itself."""
        return delta


class BatchNorm(Norm):
    """The batch's own moments, in training and in evaluation; the pullback goes through the moments."""

    def forward(self, z: Tensor, at: int | slice = ALL) -> tuple[Tensor, NormState | None]:
        """(z - mean) / sqrt(var + eps) over axis 0."""
        x, mean, inverse_std = torch.native_batch_norm(z.flatten(1), None, None, None, None, True, 0.0, EPS)
        return x.view_as(z), NormState(z, mean, inverse_std)

    def pullback(self, delta: Tensor, state: NormState | None, at: int | slice = ALL) -> Tensor:
        """(delta - mean(delta) - x mean(delta x)) / std, means over axis 0."""
        if state is None:
            raise ValueError("BatchNorm.pullback: expected the state of a forward pass, found None")
        gradient, _, _ = torch.ops.aten.native_batch_norm_backward(
            delta.flatten(1), state.z.flatten(1), None, None, None, state.mean, state.inverse_std, True, EPS,
            [True, False, False],
        )  # fmt: skip
        return gradient.view_as(delta)


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
