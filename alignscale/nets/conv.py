"""Convolutional networks of the paper: 3x3 layers with given strides, a mean over the map, a linear readout."""

from alignscale.choices import ConvConfig
from alignscale.nets.activations import ACTIVATIONS
from alignscale.nets.layered import LayeredNet
from alignscale.nets.layers import Conv, Layer, Linear
from alignscale.nets.norms import make_norm


def conv(config: ConvConfig, shape: tuple[int, ...], classes: int) -> LayeredNet:
    """The network for images of ``shape`` (C, H, W), with ``classes`` logits."""
    channels, height, width = shape
    layers: list[Layer] = []
    sites: list[tuple[int, ...]] = []
    maps = (channels, height, width)
    for stride in config.strides:
        layer = Conv(maps, config.width, stride, config.gain if layers else 1.0, config.parameterisation)
        maps = layer.outputs
        layers.append(layer)
        sites.append(maps)
    layers.append(Linear((classes, config.width), True, config.gain, config.parameterisation))
    norms = [make_norm(config.norm, site) for site in sites]
    return LayeredNet(layers, norms, ACTIVATIONS[config.activation], sites, config.blocks)
