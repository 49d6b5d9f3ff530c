"""A recurrent network: h_t = act(norm(W_in x_t + W_rec h_{t-1} + b)), logits W_out h_t + c at the last step or at each.

It stands alone as the one network whose pullback runs through time. Its hidden site has shape (T, units).
"""

import torch
from torch import Tensor

from alignscale.choices import ConfigError, RNNConfig
from alignscale.nets.layers import Layer, Linear, State
from alignscale.nets.network import Deltas, Gates, Jacobians, Network, States
from alignscale.parallel import ALL_UNITS, Turns, Width
from alignscale.types import NormState, Parameters, Trace, Weight

INPUT, RECURRENT, READOUT, STATE = range(4)


class RNN(Network):
    """Layers: input (units, F), recurrent (units, units), readout (classes, units), and perhaps a trained state."""

    recurrent = True
    units_axis = 1

    def __init__(
        self, config: RNNConfig, steps: int, features: int, classes: int, batch: int, width: Width = ALL_UNITS
    ) -> None:
        """steps: T. batch: the number of rows of a trained initial state; not read otherwise."""
        units, gain, parameterisation = config.width, config.gain, config.parameterisation
        layers: list[Layer] = [
            Linear((units, features), True, 1.0, parameterisation, width.share(0)),
            Linear((units, units), False, gain, parameterisation, width.share(0)),
            Linear((classes, units), True, gain, parameterisation, width.share(1)),
        ]
        layers[RECURRENT].rounds_again = True
        if config.initial_state == "trained":
            layers.append(State(batch, units))
        super().__init__(config, layers, [(steps, units)], width)
        self.state = STATE if len(layers) > STATE else None
        self.sites = [0, 0, None, None][: len(layers)]
        self.readout = READOUT
        self.every = config.readout == "every"
        self.direct_shapes = [(units,) if self.every else (steps, units)]

    def tracing(self, images: Tensor, parameters: Parameters | None) -> Turns[Trace]:
        """Images (B, T, F), or (B, C, T, W) read as T rows of C * W features -> the trace."""
        x = self.first_input(images)
        drive = self.run_layer(INPUT, x, parameters)
        h = drive.new_zeros(drive.shape[0], self.layers[RECURRENT].whole[0])
        start = h.new_empty(0)
        if self.state is not None:
            h = self._initial(h)
        before, after, residues, states = [], [], [], []
        for step in range(drive.shape[1]):
            before.append(h)
            z = drive[:, step] + self.run_layer(RECURRENT, h, parameters)
            normed, state = self.norms[0](z, step)
            own, residue = self.activation.forward(normed)
            h = (yield from self.width.gather(own)) if step + 1 < drive.shape[1] else own
            after.append(own)
            residues.append(residue)
            states.append(state)
        read = torch.stack(after, 1) if self.every else own
        logits = self.run_layer(READOUT, read, parameters)
        inputs = [x, torch.stack(before, 1), read, start][: len(self.layers)]
        return Trace(inputs, [torch.stack(residues, 1)], [_stack(states)], logits)

    def _initial(self, h: Tensor) -> Tensor:
        state: Tensor = self.layers[STATE](h)
        if state.shape[0] < h.shape[0]:
            raise ConfigError(
                f"net.initial_state=trained: a batch of {h.shape[0]} examples, but the state has {state.shape[0]} "
                "rows; use batches of at most that many, or net.initial_state=zero"
            )
        return state[: h.shape[0]]

    def first_input(self, images: Tensor) -> Tensor:
        """Sequences (B, T, F), or the rows of images (B, C, T, W) as T steps of C * W features."""
        return images if images.dim() == 3 else images.transpose(1, 2).flatten(2)

    def pulling(
        self, error: Tensor, gates: Gates, norms: States, feedback: Weight, local_gates: Gates | None,
        jacobians: Jacobians,
    ) -> Turns[Deltas]:  # fmt: skip
        """Error (B, classes) or (B, T, classes) -> deltas, back through time; see Network.pullback.

        With ``blocks=public`` a delta leaves out the path from the same step's output to the hidden weights.
        """
        out = self.layers[READOUT].transpose(error, feedback(READOUT))
        steps = gates[0].shape[1]
        recurrent = feedback(RECURRENT)
        deltas: list[Tensor] = []
        carry: Tensor | None = None
        for step in reversed(range(steps)):
            direct = out[:, step] if self.every else out
            signal = direct if carry is None else carry + direct if self.every else carry
            delta = self.activation.pullback(signal, gates[0][:, step])
            if local_gates is None:
                deltas.append(delta)
            else:
                local = torch.zeros_like(signal) if carry is None else carry
                deltas.append(self.activation.pullback(local, local_gates[0][:, step]))
            pulled = self.norms[0].pullback(delta, _at(norms[0], step), step)
            if step or self.state is not None:
                carry = yield from self.width.scatter(self.layers[RECURRENT].transpose(pulled, recurrent))
        hidden = torch.stack(deltas[::-1], 1)
        return [hidden, hidden, error, carry][: len(self.layers)]


def _stack(states: list[NormState | None]) -> NormState | None:
    """Per-step states -> one of the site (T, units)."""
    present = [state for state in states if state is not None]
    if not present:
        return None
    z, mean, inverse_std = zip(*present, strict=True)
    return NormState(torch.stack(z, 1), torch.cat(mean), torch.cat(inverse_std))


def _at(state: NormState | None, step: int) -> NormState | None:
    """The state of one step, from that of the site."""
    if state is None:
        return None
    units = state.z.shape[2]
    place = slice(step * units, (step + 1) * units)
    return NormState(state.z[:, step], state.mean[place], state.inverse_std[place])
