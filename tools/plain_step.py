"""The step that a careful person writes in plain PyTorch for each network here: the yardstick of bench_step.py.

It shares no code with alignscale/nets, uses torch's fused kernels wherever one fits, and the same fused SGD.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alignscale.choices import ConfigError, ConvConfig, MLPConfig, NetConfig, RNNConfig
from alignscale.types import Batch

Plain = tuple[list[Tensor], Callable[[Tensor], Tensor]]


def plain_step(
    config: NetConfig, batch: Batch, classes: int, fused: bool = True, dtype: torch.dtype = torch.float32
) -> Callable[[], None]:
    """One backprop step by autograd on weights of its own, on the device of ``batch``, under autocast to ``dtype``.

    Raises ConfigError for a network it has no code for.
    """
    torch.manual_seed(0)
    makers: dict[type[NetConfig], Callable[[Any, tuple[int, ...], int], Plain]]
    makers = {MLPConfig: plain_mlp, ConvConfig: plain_conv, RNNConfig: plain_rnn}
    if type(config) not in makers or config.activation != "relu" or config.norm == "calibrated":
        raise ConfigError(f"net={config.name}: the plain step has mlp, conv and rnn with relu, norm none or batch")
    images, device = batch.images.float(), batch.images.device
    images = images.contiguous(memory_format=torch.channels_last) if device.type == "cuda" else images
    with torch.device(device):
        weights, forward = makers[type(config)](config, tuple(images.shape[1:]), classes)
    for weight in weights:
        if weight.dim() == 4 and device.type == "cuda":
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        weight.requires_grad_()
    optimizer = torch.optim.SGD(weights, 1e-3, fused=fused)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = forward(images)
        loss = F.mse_loss(logits.float(), batch.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain_mlp(config: MLPConfig, shape: tuple[int, ...], classes: int) -> Plain:
    """Weights and biases in turn, and the forward pass."""
    sizes = [math.prod(shape), *[config.width] * config.depth, classes]
    weights = [torch.randn(out, inputs) for inputs, out in itertools.pairwise(sizes)]
    biases = [torch.zeros(out) for out in sizes[1:]]

    def forward(images: Tensor) -> Tensor:
        a = images.flatten(1)
        for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            if index:
                a = F.relu(a)
            scale = (config.gain if index else 1.0) / math.sqrt(weight.shape[1])
            z = F.linear(a, weight)
            a = z * scale + bias.to(z.dtype)
            if config.norm == "batch" and index + 1 < len(weights):
                a = F.batch_norm(a, None, None, training=True, eps=1e-6)
        return a

    return [*weights, *biases], forward


def same_conv(a: Tensor, weight: Tensor, stride: int, bias: Tensor | None = None) -> Tensor:
    """A 3 x 3 convolution with TensorFlow's SAME padding, (B, in, H, W) -> (B, out, H', W'); by hand if lopsided."""
    rows, columns = (max((-(-n // stride) - 1) * stride + 3 - n, 0) for n in a.shape[2:])
    if rows % 2 or columns % 2:
        sides = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return F.conv2d(F.pad(a, sides), weight, bias, stride)
    return F.conv2d(a, weight, bias, stride, (rows // 2, columns // 2))


def plain_conv(config: ConvConfig, shape: tuple[int, ...], classes: int) -> Plain:
    """As ``plain_mlp``, with SAME padding."""
    channels = [shape[0], *[config.width] * len(config.strides)]
    weights = [torch.randn(out, inputs, 3, 3) for inputs, out in itertools.pairwise(channels)]
    readout = torch.randn(classes, config.width)
    biases = [torch.zeros(config.width) for _ in weights] + [torch.zeros(classes)]

    def forward(images: Tensor) -> Tensor:
        a = images
        for index, (weight, bias, stride) in enumerate(zip(weights, biases, config.strides, strict=False)):
            if index:
                a = F.relu(a)
            z = same_conv(a, weight, stride)
            a = z * ((config.gain if index else 1.0) / math.sqrt(9 * weight.shape[1]))
            a = a + bias[:, None, None].to(a.dtype)
            if config.norm == "batch":
                a = F.batch_norm(a.flatten(1), None, None, training=True, eps=1e-6).view_as(a)
        return F.linear(F.relu(a).mean((2, 3)), readout) * (config.gain / math.sqrt(config.width)) + biases[-1]

    return [*weights, readout, *biases], forward


def plain_rnn(config: RNNConfig, shape: tuple[int, ...], classes: int) -> Plain:
    """Rows of the image as steps, logits from the last."""
    features, width = shape[0] * shape[2], config.width
    inputs, recurrent = torch.randn(width, features), torch.randn(width, width)
    readout, bias, shift = torch.randn(classes, width), torch.zeros(width), torch.zeros(classes)
    scale = config.gain / math.sqrt(width)

    def forward(images: Tensor) -> Tensor:
        x = images.transpose(1, 2).flatten(2)
        drive = F.linear(x, inputs) / math.sqrt(features) + bias
        h = x.new_zeros(len(x), width)
        for step in range(x.shape[1]):
            z = drive[:, step] + F.linear(h, recurrent) * scale
            if config.norm == "batch":
                z = F.batch_norm(z, None, None, training=True, eps=1e-6)
            h = F.relu(z)
        return F.linear(h, readout) * scale + shift

    return [inputs, recurrent, readout, bias, shift], forward
