"""Multi-layer perceptrons: ``depth`` hidden layers of ``width`` units on the flattened image."""

import itertools
import math

from alignscale.choices import MLPConfig
from alignscale.nets.activations import ACTIVATIONS
from alignscale.nets.layered import LayeredNet
from alignscale.nets.layers import Layer, Linear
from alignscale.nets.norms import make_norm


def mlp(config: MLPConfig, shape: tuple[int, ...], classes: int) -> LayeredNet:
    """The network for images of ``shape`` (C, H, W), with ``classes`` logits."""
    sizes = [math.prod(shape), *[config.width] * config.depth, classes]
    layers: list[Layer] = [
        Linear((out, fan_in), True, config.gain if index else 1.0, config.parameterisation)
        for index, (fan_in, out) in enumerate(itertools.pairwise(sizes))
    ]
    sites: list[tuple[int, ...]] = [(config.width,)] * config.depth
    norms = [make_norm(config.norm, site) for site in sites]
    return LayeredNet(layers, norms, ACTIVATIONS[config.activation], sites, config.blocks)
