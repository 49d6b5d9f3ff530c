"""Feed-forward networks: a chain of layers with a norm and an activation after each but the last.

It stands alone as the one forward pass and the one pullback of every MLP and convolutional network here.
"""

import itertools
import math

from torch import Tensor

from alignscale.choices import ConvConfig, MLPConfig, NetConfig
from alignscale.nets.layers import Conv, Layer, Linear
from alignscale.nets.network import Deltas, Gates, Jacobians, Network, States, contract
from alignscale.parallel import ALL_UNITS, Turns, Width
from alignscale.types import Parameters, Trace, Weight


class LayeredNet(Network):
    """layer, norm, activation, layer, ..., readout; maps are averaged over positions before the readout."""

    def __init__(
        self, config: NetConfig, layers: list[Layer], shapes: list[tuple[int, ...]], width: Width = ALL_UNITS
    ) -> None:
        """shapes: per hidden layer, of one example's pre-activations on all ranks of ``width``."""
        super().__init__(config, layers, shapes, width)
        self.readout = len(shapes)
        self.sites = [*range(self.readout), None]
        self.direct_shapes = shapes
        self.flat = len(shapes[-1]) == 1
        for layer in layers[:-1]:
            layer.rectifies = config.norm == "none" and config.activation == "relu"

    def tracing(self, images: Tensor, parameters: Parameters | None) -> Turns[Trace]:
        """Images (B, C, H, W) -> the trace; logits (B, classes)."""
        a = self.first_input(images)
        inputs, residues, norms = [], [], []
        for index, norm in enumerate(self.norms):
            inputs.append(a)
            x, state = norm(self.run_layer(index, a, parameters))
            own, residue = (x, x) if self.layers[index].rectifies and x.is_cuda else self.activation.forward(x)
            residues.append(residue)
            norms.append(state)
            a = (yield from self.width.gather(own)) if index + 1 < self.readout else (yield from _turn(own))
        features = a if self.flat else a.mean((2, 3))
        inputs.append(features)
        return Trace(inputs, residues, norms, self.run_layer(self.readout, features, parameters))

    def first_input(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), flat for an MLP."""
        return images.flatten(1) if self.flat else images

    def pulling(
        self, error: Tensor, gates: Gates, norms: States, feedback: Weight, local_gates: Gates | None,
        jacobians: Jacobians,
    ) -> Turns[Deltas]:  # fmt: skip
        """Error (B, classes) -> deltas, from the readout down; see Network.pullback."""
        deltas: Deltas = [None] * len(self.layers)
        deltas[self.readout] = delta = error
        for index in reversed(range(self.readout)):
            if index in jacobians:
                deltas[index] = delta = contract(jacobians[index], error)
                continue
            above, last = index + 1, index + 1 == self.readout
            pulled = delta if last else self.norms[above].pullback(delta, norms[above])
            signal = self.layers[above].transpose(pulled, feedback(above))
            signal = yield from _turn(self._spread(signal)) if last else self.width.scatter(signal)
            deltas[index] = delta = self.activation.pullback(signal, gates[index])
            if last and local_gates is not None:
                deltas[index] = self.activation.pullback(signal, local_gates[index])
        return deltas

    def _spread(self, signal: Tensor) -> Tensor:
        """The transpose of the mean over positions."""
        if self.flat:
            return signal
        last = self.layers[self.readout - 1]
        assert isinstance(last, Conv)
        _, height, width = last.outputs
        return (signal / (height * width))[:, :, None, None].expand(-1, -1, height, width)


def _turn(own: Tensor) -> Turns[Tensor]:
    """No exchange, but another's turn: all parts of a batch are at the same layer, whose weight is asked for once."""
    yield
    return own


def mlp(config: MLPConfig, shape: tuple[int, ...], classes: int, width: Width = ALL_UNITS) -> LayeredNet:
    """A multi-layer perceptron for images of ``shape`` (C, H, W), which it flattens, with ``classes`` logits."""
    sizes = [math.prod(shape), *[config.width] * config.depth, classes]
    shares = [width.share(0)] * config.depth + [width.share(1)]
    layers: list[Layer] = [
        Linear((out, fan_in), True, config.gain if index else 1.0, config.parameterisation, shares[index])
        for index, (fan_in, out) in enumerate(itertools.pairwise(sizes))
    ]
    return LayeredNet(config, layers, [(config.width,)] * config.depth, width)


def conv(config: ConvConfig, shape: tuple[int, ...], classes: int, width: Width = ALL_UNITS) -> LayeredNet:
    """The paper's networks for images of ``shape`` (C, H, W): 3x3 layers, a mean over the map, a linear readout."""
    layers: list[Layer] = []
    shapes: list[tuple[int, ...]] = [shape]
    for stride in config.strides:
        gain = config.gain if layers else 1.0
        layer = Conv(shapes[-1], config.width, stride, gain, config.parameterisation, width.share(0))
        layers.append(layer)
        shapes.append(layer.outputs)
    layers.append(Linear((classes, config.width), True, config.gain, config.parameterisation, width.share(1)))
    return LayeredNet(config, layers, shapes[1:], width)
