"""Functions of tensors that layers are made of, with a way back of their own where autograd's is slower or keeps more.

It stands alone because what a device or a precision is best at is decided here, and what a layer is elsewhere.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alignscale.environment import gpu_kernels

There = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(a, weight, bias) -> the output."""
Back = Callable[[Tensor, Tensor, Tensor, list[bool]], tuple[Tensor | None, Tensor, Tensor | None]]
"""(delta, a, weight, which are wanted) -> the signal at a, and the gradients of weight and bias."""


class _Narrow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor, bias: Tensor | None, there: There, back: Back) -> Tensor:
        ctx.back, ctx.biased = back, bias is not None
        ctx.save_for_backward(a, weight)
        return there(a, weight.to(a.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *delta: Tensor) -> tuple[Tensor | None, ...]:
        a, weight = ctx.saved_tensors
        return *ctx.back(*delta, a, weight.to(a.dtype), [ctx.needs_input_grad[0], True, ctx.biased]), None, None


def rounded_again(a: Tensor, weight: Tensor, bias: Tensor | None, there: There, back: Back) -> Tensor:
    """``there(a, weight, bias)`` in the half precision of ``a``, whose way back keeps the weight and no rounded copy.

    Of what an engine releases meanwhile a copy would be half; of a weight of many steps there would be as many. The
    weight's gradient is rounded only where it is made in half precision.
    """
    return _Narrow.apply(a, weight, bias, there, back)


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, sides: tuple[int, ...]) -> Tensor:
        ctx.sides = sides
        return resized(maps, sides)

    @staticmethod
    def backward(ctx: Any, *signal: Tensor) -> tuple[Tensor, None]:
        return resized(signal[0], [-n for n in ctx.sides]), None


def padded(maps: Tensor, sides: tuple[int, ...]) -> Tensor:
    """``resized`` by sides that are not negative, with its transpose."""
    return _Pad.apply(maps, sides) if maps.is_cuda else F.pad(maps, sides)


class _Rectified(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        found: Tensor = gpu_kernels().rectified(z, scale, bias)
        ctx.scale, ctx.biased = scale, bias is not None
        ctx.save_for_backward(found)
        return found

    @staticmethod
    def backward(ctx: Any, *signal: Tensor) -> tuple[Tensor, Tensor | None, None]:
        delta = torch.ops.aten.threshold_backward(signal[0], *ctx.saved_tensors, 0)
        others = [axis for axis in range(delta.dim()) if axis != 1]
        return times(delta, ctx.scale), delta.sum(others) if ctx.biased else None, None


def rectified(z: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """relu(scale * z + bias) on a GPU in one pass over z (B, units) or (B, C, H, W); bias (units,) or (C,)."""
    return _Rectified.apply(z, bias, scale)


def resized(maps: Tensor, sides: Sequence[int]) -> Tensor:
    """Maps with columns (left, right) and rows (top, bottom) of 0 more, or fewer of their own."""
    together = 8 // maps.element_size()
    if not maps.is_cuda or maps.shape[1] % together:
        return F.pad(maps, sides)
    moved = laid_out(maps).permute(0, 2, 3, 1).view(torch.int64)  # so many channels in one move of a GPU's thread
    if min(sides) < 0:
        return F.pad(moved, (0, 0, *sides)).view(maps.dtype).permute(0, 3, 1, 2)
    batch, height, width, groups = moved.shape
    left, right, top, bottom = sides
    padded = moved.new_empty(batch, top + height + bottom, left + width + right, groups)
    for lines in (padded[:, :top], padded[:, top + height :], padded[:, :, :left], padded[:, :, left + width :]):
        if lines.numel():
            lines.zero_()
    padded[:, top : top + height, left : left + width] = moved
    return padded.view(maps.dtype).permute(0, 3, 1, 2)


def laid_out(maps: Tensor) -> Tensor:
    """Maps (B, C, H, W), or the weight of a convolution, as its device reads them fastest: on a GPU channels last."""
    return maps.contiguous(memory_format=torch.channels_last) if maps.is_cuda and maps.dim() == 4 else maps


def summed(delta: Tensor, a: Tensor, kept: torch.dtype = torch.float32) -> Tensor:
    """The sum over examples of delta a^T, of (B, out) and (B, in); a GPU's of half precision in fp32, as it sums.

    kept: in what the sum is to be; where that is what delta is in, fp32 would be a detour.
    """
    if delta.is_cuda and delta.dtype in (torch.float16, torch.bfloat16) and delta.dtype != kept:
        return torch.mm(delta.T, a, out_dtype=torch.float32)
    return delta.T @ a


def times(delta: Tensor, scale: Tensor | float) -> Tensor:
    """Delta times scale."""
    return delta if isinstance(scale, float) and scale == 1.0 else delta * scale
