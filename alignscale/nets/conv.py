"""Convolutional networks of the paper: 3x3 layers with given strides, a mean over the map, a linear readout."""

from alignscale.choices import ConvConfig
from alignscale.nets.layered import LayeredNet
from alignscale.nets.layers import Conv, Layer, Linear


def conv(config: ConvConfig, shape: tuple[int, ...], classes: int) -> LayeredNet:
    """The network for images of ``shape`` (C, H, W), with ``classes`` logits."""
    layers: list[Layer] = []
    shapes: list[tuple[int, ...]] = [shape]
    for stride in config.strides:
        layer = Conv(shapes[-1], config.width, stride, config.gain if layers else 1.0, config.parameterisation)
        layers.append(layer)
        shapes.append(layer.outputs)
    layers.append(Linear((classes, config.width), True, config.gain, config.parameterisation))
    return LayeredNet(config, layers, shapes[1:])
