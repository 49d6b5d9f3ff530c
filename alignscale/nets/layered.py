"""Feed-forward networks: a chain of layers with a norm and an activation after each but the last.

It stands alone as the one forward pass and the one pullback of every MLP and convolutional network here.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from alignscale.nets.activations import Activation
from alignscale.nets.layers import Layer
from alignscale.nets.network import Deltas, Network
from alignscale.nets.norms import Norm
from alignscale.types import NormState, Parameters, Trace, Weight


class LayeredNet(Network):
    """layer, norm, activation, layer, ..., readout; maps are averaged over positions before the readout."""

    def __init__(
        self,
        layers: list[Layer],
        norms: list[Norm],
        activation: Activation,
        outputs: list[tuple[int, ...]],
        blocks: str,
    ) -> None:
        """Outputs: per hidden layer, the shape of one example's pre-activations; blocks: ``theory`` or ``public``."""
        super().__init__(activation)
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]
        self.norms = nn.ModuleList(norms)  # type: ignore[assignment]
        self.sites = [*range(len(norms)), None]
        self.readout = len(norms)
        self.direct_shapes = outputs
        self.flat = len(outputs[-1]) == 1
        self.public = blocks == "public"

    def trace(self, images: Tensor, parameters: Parameters | None = None) -> Trace:
        """Images (B, C, H, W) -> the trace; logits (B, classes)."""
        a = images.flatten(1) if self.flat else images
        inputs, residues, norms = [], [], []
        for index, norm in enumerate(self.norms):
            inputs.append(a)
            x, state = norm(self.run_layer(index, a, parameters))
            a, residue = self.activation.forward(x)
            residues.append(residue)
            norms.append(state)
        features = a if self.flat else a.mean((2, 3))
        inputs.append(features)
        return Trace(inputs, residues, norms, self.run_layer(self.readout, features, parameters))

    def pullback(
        self,
        error: Tensor,
        gates: Sequence[Tensor],
        norms: Sequence[NormState | None],
        feedback: Weight,
        local_gates: Sequence[Tensor] | None = None,
    ) -> Deltas:
        """Error (B, classes) -> deltas, from the readout down; see Network.pullback."""
        deltas: Deltas = [None] * len(self.layers)
        deltas[self.readout] = delta = error
        for index in reversed(range(self.readout)):
            above = delta if index + 1 == self.readout else self.norms[index + 1].pullback(delta, norms[index + 1])
            signal = self.layers[index + 1].transpose(above, feedback(index + 1))
            if index + 1 == self.readout:
                signal = self._spread(signal)
            deltas[index] = delta = self.activation.pullback(signal, gates[index])
            if local_gates is not None and index + 1 == self.readout:
                deltas[index] = self.activation.pullback(signal, local_gates[index])
        return deltas

    def _spread(self, signal: Tensor) -> Tensor:
        """The transpose of the mean over positions."""
        if self.flat:
            return signal
        _, height, width = self.direct_shapes[-1]
        return (signal / (height * width))[:, :, None, None].expand(-1, -1, height, width)
