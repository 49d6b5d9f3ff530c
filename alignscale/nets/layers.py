"""Layers with trained weights.

A layer does three things: forward, transpose, weight gradient; each is a function of the weight given.

They stand alone because every learning rule is made of these three maps, taken from different networks. In the NTK
parameterisation (Jacot et al. 2018) weights are drawn from N(0, 1) and the forward pass multiplies by
gain / sqrt(fan_in); in the standard one they are drawn with that deviation and the forward pass multiplies by nothing.
A layer computes in the precision of what it reads; its weight and the gradient of it keep theirs.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from alignscale.environment import gpu_kernels
from alignscale.parallel import Share


class _WeightGradient(torch.autograd.Function):
    """A scalar 0 whose gradient with respect to a layer's weight and bias is <delta, layer's weight-gradient port>."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, layer: "Layer", a: Tensor, delta: Tensor, unscale: Tensor | None
    ) -> Tensor:
        ctx.layer, ctx.dtype, ctx.unscale = layer, weight.dtype, unscale
        ctx.save_for_backward(a, delta)
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> tuple[Tensor | None, ...]:
        a, delta = ctx.saved_tensors
        gradients = ctx.layer.weight_gradient(a, delta, scale[0] if ctx.unscale is None else 1.0)
        gradients = tuple(None if one is None else one.to(ctx.dtype) for one in gradients)
        for one in gradients if ctx.unscale is not None else ():
            if one is not None:
                one.mul_(scale[0] * ctx.unscale)
        for parameter in ctx.layer.held:
            _lend(parameter, ctx.layer)
        return *gradients, None, None, None, None


def _lend(parameter: nn.Parameter | None, layer: "Layer") -> bool:
    """Give a parameter that an engine has released its shape for autograd's checks, without storage.

    ZeRO 3 keeps a rank's part of a weight and leaves the parameter empty where no forward pass runs; a weight gradient
    needs the weight's shape and nothing else of it. Returns whether it was empty.
    """
    if parameter is None or parameter.numel():
        return False
    parameter.data = parameter.data.new_empty(1).expand(layer.shape if parameter is layer.held[0] else layer.shape[:1])
    return True


class Layer(nn.Module, ABC):
    """A linear map with a weight (out, ...) and perhaps a bias (out,); ``delta`` is always at its own output."""

    bias: nn.Parameter | None
    rectifies = False
    """Whether relu follows at once, which a GPU makes in the pass that adds the bias."""

    def __init__(
        self, shape: tuple[int, ...], bias: bool, gain: float, parameterisation: str, share: Share | None = None
    ) -> None:
        """Shape: of the whole weight, of which this rank has its share; ``alignscale.frozen.initialise`` sets it."""
        super().__init__()
        self.whole, self.share = shape, share
        self.shape = shape if share is None else share.shape(shape)
        self.fan_in = math.prod(shape[1:])
        deviation = gain / math.sqrt(self.fan_in)
        ntk = parameterisation == "ntk"
        self.initial_std = 1.0 if ntk else deviation
        self.scale = deviation if ntk else 1.0
        self.weight = nn.Parameter(torch.zeros(self.shape))
        self.bias = nn.Parameter(torch.zeros(self.shape[0])) if bias else None
        self.held = (self.weight, self.bias)  # for who must not ask for them as attributes, which ZeRO 3 watches

    def forward(self, a: Tensor) -> Tensor:
        """The layer's output for input ``a`` under its own weight."""
        return self.compute(a, self.weight, self.bias)

    @abstractmethod
    def compute(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """scale * weight a + bias, for any weight of this layer's shape; on a GPU relu of it if the layer rectifies."""

    @abstractmethod
    def transpose(self, delta: Tensor, weight: Tensor) -> Tensor:
        """scale * weight^T delta: the signal at the layer's input."""

    @abstractmethod
    def weight_gradient(self, a: Tensor, delta: Tensor, factor: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None]:
        """scale * sum over examples of delta a^T, and the bias's sum of delta, both times ``factor``."""

    def _scaled_and_shifted(self, z: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(z.dtype)
        if self.rectifies and gpu_kernels(z):
            found: Tensor = _Rectified.apply(z, None if bias is None else bias.flatten(), self.scale)
            return found
        z = _scaled(z, self.scale) if bias is None else torch.add(bias, z, alpha=self.scale)
        return torch.relu(z) if self.rectifies and z.is_cuda else z

    def port(self, a: Tensor, delta: Tensor, unscale: Tensor | None = None) -> Tensor:
        """A scalar whose backward pass puts ``weight_gradient(a, delta)`` into the weight and bias.

        unscale: what a gradient in half precision is multiplied by when it is in the weight's precision again.
        """
        lent = [parameter for parameter in self.held if _lend(parameter, self)]
        result: Tensor = _WeightGradient.apply(*self.held, self, a, delta, unscale)
        for parameter in lent:
            assert parameter is not None
            parameter.data = parameter.data.new_empty(0)
        return result


class Linear(Layer):
    """weight (out, in), on the last axis of inputs (..., in).

    total: sums over the ranks that have the other columns of the weight.
    """

    total: Callable[[Tensor], Tensor] | None = None

    def compute(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(..., in) -> (..., out)."""
        z = F.linear(a, weight.to(a.dtype))
        return self._scaled_and_shifted(z if self.total is None else self.total(z), bias)

    def transpose(self, delta: Tensor, weight: Tensor) -> Tensor:
        """(..., out) -> (..., in)."""
        return _scaled(delta, self.scale) @ weight.to(delta.dtype)

    def weight_gradient(self, a: Tensor, delta: Tensor, factor: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None]:
        """(out, in) and (out,)."""
        delta = delta.flatten(0, -2)
        scaled, a = _scaled(delta, self.scale * factor).T, a.flatten(0, -2)
        if delta.is_cuda and delta.dtype in (torch.float16, torch.bfloat16):  # in fp32, as it is summed
            gradient = torch.mm(scaled, a, out_dtype=torch.float32)
        else:
            gradient = scaled @ a
        return gradient, None if self.held[1] is None else _scaled(delta.sum(0), factor)


class Conv(Layer):
    """weight (out, in, k, k) on maps (B, in, H, W) with TensorFlow's SAME padding: outputs are ceil(H / stride).

    ``transpose`` is that of the last maps' size, which ``fit`` takes.
    """

    def __init__(
        self, inputs: tuple[int, ...], out: int, stride: int, gain: float, parameterisation: str,
        share: Share | None = None,
    ) -> None:  # fmt: skip
        """Inputs: (C, H, W) of what the layer reads; out: of its channels on all ranks."""
        super().__init__((out, inputs[0], 3, 3), True, gain, parameterisation, share)
        self.stride = stride
        self.fit(inputs)

    def fit(self, inputs: tuple[int, ...]) -> None:
        """Take maps of ``inputs`` (C, H, W) from now on."""
        channels, height, width = self.inputs = inputs
        rows, columns = _same_padding(height, 3, self.stride), _same_padding(width, 3, self.stride)
        self.outputs = (self.whole[0], -(-height // self.stride), -(-width // self.stride))
        symmetric = rows[0] == rows[1] and columns[0] == columns[1]
        self.padding = (rows[0], columns[0]) if symmetric else (0, 0)
        self.extra = (0, 0, 0, 0) if symmetric else (*columns, *rows)
        self.padded = (channels, height + self.extra[2] + self.extra[3], width + self.extra[0] + self.extra[1])
        sizes = zip(self.padded[1:], self.padding, strict=True)
        self.rest = [(size + 2 * side - 3) % self.stride for size, side in sizes]  # lines that no window reaches

    def compute(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(B, in, H, W) -> (B, out, H', W')."""
        maps, weight = self._safe(laid_out(self._padded(a))), self._safe(weight.to(a.dtype))
        z = F.conv2d(maps, weight, stride=self.stride, padding=self.padding).to(a.dtype)
        return self._scaled_and_shifted(z, None if bias is None else bias[:, None, None])

    def transpose(self, delta: Tensor, weight: Tensor) -> Tensor:
        """(B, out, H', W') -> (B, in, H, W)."""
        # the scale goes to the weight, and below to the gradient: they are far smaller than a batch of maps
        scaled = laid_out(_scaled(weight.to(delta.dtype), self.scale))
        signal = F.conv_transpose2d(laid_out(delta), scaled, None, self.stride, self.padding, self.rest)
        # cropped into a contiguous tensor, which elementwise kernels read ten times faster than a view
        return _resized(signal, [-n for n in self.extra]) if any(self.extra) else signal

    def weight_gradient(self, a: Tensor, delta: Tensor, factor: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None]:
        """(out, in, k, k) and (out,)."""
        shape = (delta.shape[1], *self.shape[1:])  # fewer rows of the weight have a gradient of their own
        narrow = delta.dtype == torch.float16  # whose range the sums over a batch of maps would leave without the scale
        scaled = _scaled(delta, self.scale) if narrow else delta
        maps, scaled = self._safe(laid_out(self._padded(a))), self._safe(laid_out(scaled))
        gradient = conv2d_weight(maps, shape, scaled, self.stride, self.padding)
        return _scaled(gradient, factor if narrow else self.scale * factor), _scaled(delta.sum((0, 2, 3)), factor)

    def _safe(self, maps: Tensor) -> Tensor:
        """In fp32 where oneDNN (3.12, bf16 with AMX) reads memory not its own: strides to maps of one column."""
        narrow = self.stride > 1 and min(self.outputs[1:]) == 1
        return maps.float() if narrow and maps.itemsize == 2 and not maps.is_cuda else maps

    def _padded(self, a: Tensor) -> Tensor:
        if a.shape[1:] != self.inputs:
            self.fit(tuple(a.shape[1:]))
        padded: Tensor = _Pad.apply(a, self.extra) if any(self.extra) else a
        return padded


class State(Layer):
    """A trained initial state, weight (B, units): its output is its weight, one row per place in the batch."""

    def __init__(self, batch: int, units: int) -> None:
        """Starts at 0."""
        super().__init__((batch, units), False, 1.0, "ntk")
        self.scale, self.initial_std = 1.0, 0.0

    def compute(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The weight; of ``a`` only the dtype is read."""
        return weight.to(a.dtype)

    def transpose(self, delta: Tensor, weight: Tensor) -> Tensor:
        """Nothing lies below a state: delta itself."""
        return delta

    def weight_gradient(self, a: Tensor, delta: Tensor, factor: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None]:
        """Delta itself; rows that a partial batch has not used have 0."""
        return F.pad(_scaled(delta, factor), (0, 0, 0, self.shape[0] - len(delta))), None


class _Pad(torch.autograd.Function):
    """``_resized`` by sides that are not negative, with its transpose."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, sides: tuple[int, ...]) -> Tensor:
        ctx.sides = sides
        return _resized(maps, sides)

    @staticmethod
    def backward(ctx: Any, *signal: Tensor) -> tuple[Tensor, None]:
        return _resized(signal[0], [-n for n in ctx.sides]), None


class _Rectified(torch.autograd.Function):
    """relu(scale * z + bias) in one pass over z (B, units) or (B, C, H, W); bias (units,) or (C,)."""

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
        return _scaled(delta, ctx.scale), delta.sum(others) if ctx.biased else None, None


def _resized(maps: Tensor, sides: Sequence[int]) -> Tensor:
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


def _scaled(delta: Tensor, scale: Tensor | float) -> Tensor:
    return delta if isinstance(scale, float) and scale == 1.0 else delta * scale


def _same_padding(length: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME: the output has ceil(length / stride) places, the odd padding row comes after."""
    total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
    return total // 2, total - total // 2
