"""Multi-layer perceptrons: ``depth`` hidden layers of ``width`` units on the flattened image."""

import itertools
import math

from alignscale.choices import MLPConfig
from alignscale.nets.layered import LayeredNet
from alignscale.nets.layers import Layer, Linear


def mlp(config: MLPConfig, shape: tuple[int, ...], classes: int) -> LayeredNet:
    """The network for images of ``shape`` (C, H, W), with ``classes`` logits."""
    sizes = [math.prod(shape), *[config.width] * config.depth, classes]
    layers: list[Layer] = [
        Linear((out, fan_in), True, config.gain if index else 1.0, config.parameterisation)
        for index, (fan_in, out) in enumerate(itertools.pairwise(sizes))
    ]
    return LayeredNet(config, layers, [(config.width,)] * config.depth)
