"""Layers with trained weights.

A layer does three things: forward, transpose, weight gradient; each is a function of the weight given.

They stand alone because every learning rule is made of these three maps, taken from different networks. In the NTK
parameterisation (Jacot et al. 2018) weights are drawn from N(0, 1) and the forward pass multiplies by
gain / sqrt(fan_in); in the standard one they are drawn with that deviation and the forward pass multiplies by nothing.
A layer computes in the precision of what it reads; its weight keeps its own, and so does its gradient, unless an engine
has it summed over ranks in another (``grad_dtype``).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from alignscale.environment import gpu_kernels
from alignscale.nets.functions import Back, There, laid_out, padded, rectified, resized, rounded_again, summed, times
from alignscale.parallel import Share


class _WeightGradient(torch.autograd.Function):
    """A scalar 0 whose gradient with respect to a layer's weight and bias is <delta, layer's weight-gradient port>."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, layer: "Layer", a: Tensor, delta: Tensor, unscale: Tensor | None
    ) -> Tensor:
        ctx.layer, ctx.unscale = layer, unscale
        ctx.save_for_backward(a, delta)
        return weight.new_zeros((), dtype=layer.precision)

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> tuple[Tensor | None, ...]:
        a, delta = ctx.saved_tensors
        gradients = ctx.layer.weight_gradient(a, delta, scale[0] if ctx.unscale is None else 1.0)
        if ctx.unscale is not None:
            factor = scale[0] * ctx.unscale
            gradients = tuple(None if one is None else one.to(factor.dtype).mul_(factor) for one in gradients)
        gradients = tuple(None if one is None else one.to(ctx.layer.kept) for one in gradients)
        _lend(ctx.layer)
        return *gradients, None, None, None, None


def _lend(layer: "Layer") -> list[nn.Parameter]:
    """Give the parameters that an engine has released their shapes for autograd's checks, without storage.

    ZeRO 3 keeps a rank's part of a weight and leaves the parameter empty where no forward pass runs; a weight gradient
    needs the weight's shape and nothing else of it. Returns those that were empty.
    """
    lent = [parameter for parameter in layer.held if parameter is not None and not parameter.numel()]
    for parameter in lent:
        shape = layer.shape if parameter is layer.held[0] else layer.shape[:1]
        parameter.data = parameter.data.new_empty(1).expand(shape)
    return lent


class Layer(nn.Module, ABC):
    """A linear map with a weight (out, ...) and perhaps a bias (out,); ``delta`` is always at its own output."""

    bias: nn.Parameter | None
    rectifies = False
    """Whether relu follows at once, which a GPU makes in the pass that adds the bias."""
    rounds_again = False
    """Whether backprop in half precision rounds the weight once more on its way back, and keeps no copy till then."""

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

    @property
    def precision(self) -> torch.dtype:
        """Of the weight that the optimizer updates, fp32 or fp64; the layer's own may be rounded to half."""
        return torch.promote_types(self.held[0].dtype, torch.float32)

    @property
    def kept(self) -> torch.dtype:
        """Of the weight's gradient, which an engine may have summed over ranks in half precision."""
        return self.held[0].grad_dtype or self.precision

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

    def _mapped(self, a: Tensor, weight: Tensor, bias: Tensor | None, there: There, back: Back) -> Tensor:
        if a.dtype == self.precision or not (self.rounds_again and torch.is_grad_enabled()):
            return there(a, weight.to(a.dtype), bias)
        return rounded_again(a, weight, bias, there, back)

    def _scaled_and_shifted(self, z: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(z.dtype)
        if self.rectifies and gpu_kernels(z):
            return rectified(z, bias, self.scale)
        if bias is not None and z.dim() == 4:
            bias = bias.view(-1, 1, 1)
        z = times(z, self.scale) if bias is None else torch.add(bias, z, alpha=self.scale)
        return torch.relu(z) if self.rectifies and z.is_cuda else z

    def port(self, a: Tensor, delta: Tensor, unscale: Tensor | None = None) -> Tensor:
        """A scalar whose backward pass puts ``weight_gradient(a, delta)`` into the weight and bias.

        unscale: what a gradient in fp16 is multiplied by, in fp32.
        """
        lent = _lend(self)
        result: Tensor = _WeightGradient.apply(*self.held, self, a, delta, unscale)
        for parameter in lent:
            parameter.data = parameter.data.new_empty(0)
        return result


class Linear(Layer):
    """weight (out, in), on the last axis of inputs (..., in).

    total: sums over the ranks that have the other columns of the weight; the bias that counts is the first one's.
    """

    total: Callable[[Tensor], Tensor] | None = None
    first = True

    def compute(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(..., in) -> (..., out)."""
        if bias is not None and not self.first:  # a copy, whose last bit may be another one: 0, with its gradient
            bias = bias - bias.detach()
        z = self._scaled_and_shifted(self._mapped(a, weight, None, F.linear, _linear_back), bias)
        return z if self.total is None else self.total(z)

    def transpose(self, delta: Tensor, weight: Tensor) -> Tensor:
        """(..., out) -> (..., in)."""
        return times(delta, self.scale) @ weight.to(delta.dtype)

    def weight_gradient(self, a: Tensor, delta: Tensor, factor: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None]:
        """(out, in) and (out,)."""
        delta = delta.flatten(0, -2)
        gradient = summed(times(delta, self.scale * factor), a.flatten(0, -2), self.kept)
        return gradient, None if self.held[1] is None else times(delta.sum(0), factor)


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
        rows, columns = same_padding(height, self.stride), same_padding(width, self.stride)
        self.outputs = (self.whole[0], -(-height // self.stride), -(-width // self.stride))
        symmetric = rows[0] == rows[1] and columns[0] == columns[1]
        self.padding = (rows[0], columns[0]) if symmetric else (0, 0)
        self.extra = (0, 0, 0, 0) if symmetric else (*columns, *rows)
        self.padded = (channels, height + self.extra[2] + self.extra[3], width + self.extra[0] + self.extra[1])
        # lines that no window reaches
        self.rest = [(size + sum(pad) - 3) % self.stride for size, pad in ((height, rows), (width, columns))]

    def compute(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(B, in, H, W) -> (B, out, H', W')."""
        whole = laid_out(self._padded(a))
        maps = self._safe(whole)
        weight = weight if maps is whole else weight.to(a.dtype).float()
        there = partial(F.conv2d, stride=self.stride, padding=self.padding)
        back = partial(_conv_back, stride=self.stride, padding=self.padding)
        inside = None  # in bf16 a processor adds it on its way; fp16 has no range for that, fp32 sums are less exact
        if bias is not None and a.dtype == torch.bfloat16 and not maps.is_cuda:
            inside, bias = bias.to(a.dtype).to(maps.dtype) / self.scale, None
        return self._scaled_and_shifted(self._mapped(maps, weight, inside, there, back).to(a.dtype), bias)

    def transpose(self, delta: Tensor, weight: Tensor) -> Tensor:
        """(B, out, H', W') -> (B, in, H, W)."""
        # the scale goes to the weight, and below to the gradient: they are far smaller than a batch of maps
        scaled = laid_out(times(weight.to(delta.dtype), self.scale))
        signal = F.conv_transpose2d(laid_out(delta), scaled, None, self.stride, self.padding, self.rest)
        # cropped into a contiguous tensor, which elementwise kernels read ten times faster than a view
        return resized(signal, [-n for n in self.extra]) if any(self.extra) else signal

    def weight_gradient(self, a: Tensor, delta: Tensor, factor: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None]:
        """(out, in, k, k) and (out,)."""
        shape = (delta.shape[1], *self.shape[1:])  # fewer rows of the weight have a gradient of their own
        narrow = delta.dtype == torch.float16  # whose range the sums over a batch of maps would leave without the scale
        scaled = times(delta, self.scale) if narrow else delta
        maps, scaled = self._safe(laid_out(self._padded(a))), self._safe(laid_out(scaled))
        gradient = conv2d_weight(maps, shape, scaled, self.stride, self.padding)
        return times(gradient, factor if narrow else self.scale * factor), times(delta.sum((0, 2, 3)), factor)

    def _safe(self, maps: Tensor) -> Tensor:
        """In fp32 where oneDNN (3.12, bf16 with AMX) reads memory not its own: strides to maps of one column."""
        narrow = self.stride > 1 and min(self.outputs[1:]) == 1
        return maps.float() if narrow and maps.itemsize == 2 and not maps.is_cuda else maps

    def _padded(self, a: Tensor) -> Tensor:
        if a.shape[1:] != self.inputs:
            self.fit(tuple(a.shape[1:]))
        return padded(a, self.extra) if any(self.extra) else a


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
        return F.pad(times(delta, factor), (0, 0, 0, self.shape[0] - len(delta))), None


def _linear_back(delta: Tensor, a: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor | None, Tensor, None]:
    return delta @ weight if wanted[0] else None, summed(delta.flatten(0, -2), a.flatten(0, -2)), None


def _conv_back(
    delta: Tensor, maps: Tensor, weight: Tensor, wanted: list[bool], stride: int, padding: tuple[int, int]
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    found: tuple[Tensor | None, Tensor, Tensor | None] = torch.ops.aten.convolution_backward(
        delta, maps, weight, weight.shape[:1], (stride, stride), padding, (1, 1), False, (0, 0), 1, wanted
    )
    return found


def same_padding(length: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME for 3x3 kernels: ceil(length / stride) places, the odd padding row comes after."""
    total = max((-(-length // stride) - 1) * stride + 3 - length, 0)
    return total // 2, total - total // 2
