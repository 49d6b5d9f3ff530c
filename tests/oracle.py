"""Networks once more: slow, in float64, from their formulas alone, without the package's networks.

A convolution is a dense matrix. A delta is J^T e, where e = dLoss/dlogits and J = dlogits/dx is taken in one of two
ways: by autograd, with respect to zeros ("probes") added to the pre-activations x of a forward pass; or, where the
transposed weights are not those of the forward pass, as the transpose of a linear map written forwards (``tangent``).
Activations are flat: (B, units) for a chain, (B, T, units) for a recurrent network.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignscale.choices import ConvConfig, MLPConfig, NetConfig, RNNConfig

Weights = Sequence[tuple[Tensor, Tensor | None]]
Updates = list[tuple[Tensor | None, Tensor | None]]
Moments = list[tuple[Tensor, Tensor]]
Deltas = list[Tensor | None]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
    "erf": torch.erf,
}


@dataclass
class Pass:
    """inputs: per layer. z, x, a: per site, before the norm, after it, after the activation."""

    inputs: list[Tensor]
    z: list[Tensor]
    x: list[Tensor]
    a: list[Tensor]
    logits: Tensor


class Net(ABC):
    """moments: per site, mean and variance of the calibrated norm."""

    def __init__(self, config: NetConfig, moments: Moments | None = None) -> None:
        self.config = config
        self.act = ACTIVATIONS[config.activation]
        self.moments = moments

    def scale(self, weight: Tensor, first: bool) -> float:
        if self.config.parameterisation == "standard":
            return 1.0
        return (1.0 if first else self.config.gain) / math.sqrt(weight[0].numel())

    def norm(self, z: Tensor, mean: Tensor | None = None, variance: Tensor | None = None) -> Tensor:
        if self.config.norm == "none":
            return z
        if self.config.norm == "batch":
            mean = z.mean(0)
            variance = ((z - mean) ** 2).mean(0)
        assert mean is not None
        assert variance is not None
        return (z - mean) / (variance + 1e-6) ** 0.5

    def norm_tangent(self, dz: Tensor, z: Tensor, variance: Tensor | None = None) -> Tensor:
        if self.config.norm == "none":
            return dz
        if self.config.norm == "batch":
            variance = z.var(0, correction=0)
            x = (z - z.mean(0)) / (variance + 1e-6).sqrt()
            dz = dz - dz.mean(0) - x * (x * dz).mean(0)
        assert variance is not None
        return dz / (variance + 1e-6).sqrt()

    def gate(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.act(x).sum(), x)[0]

    def fixed_moments(self, site: int, at: int | None = None) -> tuple[Tensor, ...]:
        if self.moments is None:
            return ()
        return tuple(m if at is None else m[at] for m in self.moments[site])

    @abstractmethod
    def forward(
        self, weights: Weights, images: Tensor, probes: list[Tensor] | None = None, taps: list[Tensor] | None = None
    ) -> Pass:
        """probes: added to x, site by site, and to the trained state; taps: added to a."""

    @abstractmethod
    def tangent(self, at: Pass, weights: Sequence[Tensor], probes: list[Tensor]) -> Tensor:
        """dlogits for perturbations of x: gates and moments of ``at``, connections by ``weights``."""

    @abstractmethod
    def local(self, weights: Weights, inputs: list[Tensor], deltas: Deltas) -> Tensor:
        """Sum over layers of <delta, norm(layer(input))>, whose gradient is the update."""

    @abstractmethod
    def probes(self, at: Pass) -> list[Tensor]:
        """Zeros, with gradients, in the shapes that ``forward`` takes."""

    @abstractmethod
    def by_layer(self, deltas: Sequence[Tensor], error: Tensor) -> Deltas:
        """Deltas of the probes -> deltas of the layers."""


@functools.cache
def conv_index(inputs: tuple[int, int, int], out: int, stride: int) -> Tensor:
    """Which entry of a flat 3x3 weight joins which output to which input; one past the end where none does.

    SAME padding as TensorFlow's guide states it: max(k - s, 0) in all if s divides n, else max(k - n % s, 0), the
    smaller half before.
    """
    channels, height, width = inputs
    rows, columns = math.ceil(height / stride), math.ceil(width / stride)
    top, left = ((max(3 - stride, 0) if n % stride == 0 else max(3 - n % stride, 0)) // 2 for n in (height, width))
    index = torch.full((out, rows, columns, channels, height, width), out * channels * 9)
    for i in range(rows):
        for j in range(columns):
            for u in range(3):
                for v in range(3):
                    y, x = i * stride + u - top, j * stride + v - left
                    if 0 <= y < height and 0 <= x < width:
                        pairs = torch.arange(out * channels).view(out, channels)
                        index[:, i, j, :, y, x] = pairs * 9 + 3 * u + v
    return index.view(out * rows * columns, channels * height * width)


class Chain(Net):
    """Layers one after another."""

    def __init__(self, config: NetConfig, shape: tuple[int, ...], moments: Moments | None = None) -> None:
        super().__init__(config, moments)
        self.maps = [shape]
        if isinstance(config, ConvConfig):
            for stride in config.strides:
                _, height, width = self.maps[-1]
                self.maps.append((config.width, math.ceil(height / stride), math.ceil(width / stride)))
        else:
            assert isinstance(config, MLPConfig)
            self.maps += [(config.width, 1, 1)] * config.depth
        self.hidden = len(self.maps) - 1

    def matrix(self, index: int, weight: Tensor) -> Tensor:
        if isinstance(self.config, ConvConfig) and index < self.hidden:
            where = conv_index(self.maps[index], self.config.width, self.config.strides[index])  # type: ignore[arg-type]
            weight = torch.cat([weight.flatten(), weight.new_zeros(1)])[where]
        return weight

    def layer(self, index: int, weight: Tensor, bias: Tensor | None, a: Tensor) -> Tensor:
        z = self.scale(weight, index == 0) * a @ self.matrix(index, weight).T
        return z if bias is None else z + bias.repeat_interleave(z.shape[1] // len(bias))

    def pool(self, a: Tensor) -> Tensor:
        return a.view(len(a), self.config.width, -1).mean(2)

    def forward(
        self, weights: Weights, images: Tensor, probes: list[Tensor] | None = None, taps: list[Tensor] | None = None
    ) -> Pass:
        a = images.flatten(1)
        result = Pass([], [], [], [], a)
        for index in range(self.hidden):
            result.inputs.append(a)
            z = self.layer(index, *weights[index], a)
            x = self.norm(z, *self.fixed_moments(index))
            x = x if probes is None else x + probes[index]
            a = self.act(x) if taps is None else self.act(x) + taps[index]
            for values, value in ((result.z, z), (result.x, x), (result.a, a)):
                values.append(value)
        result.inputs.append(self.pool(a))
        result.logits = self.layer(self.hidden, *weights[-1], result.inputs[-1])
        return result

    def tangent(self, at: Pass, weights: Sequence[Tensor], probes: list[Tensor]) -> Tensor:
        da = torch.zeros_like(at.inputs[0])
        for index, probe in enumerate(probes):
            dz = self.layer(index, weights[index], None, da)
            dx = self.norm_tangent(dz, at.z[index], *self.fixed_moments(index)[1:]) + probe
            da = self.gate(at.x[index]) * dx
        return self.layer(self.hidden, weights[-1], None, self.pool(da))

    def local(self, weights: Weights, inputs: list[Tensor], deltas: Deltas) -> Tensor:
        total = inputs[0].new_zeros(())
        for index, ((weight, bias), a, delta) in enumerate(zip(weights, inputs, deltas, strict=True)):
            if delta is not None:
                out = self.layer(index, weight, bias, a)
                out = out if index == self.hidden else self.norm(out, *self.fixed_moments(index))
                total = total + (delta * out).sum()
        return total

    def probes(self, at: Pass) -> list[Tensor]:
        return [torch.zeros_like(x, requires_grad=True) for x in at.x]

    def by_layer(self, deltas: Sequence[Tensor], error: Tensor) -> Deltas:
        return [*deltas, error]


class Recurrent(Net):
    """Layers: input, recurrent, readout, and perhaps a trained state."""

    config: RNNConfig

    def forward(
        self, weights: Weights, images: Tensor, probes: list[Tensor] | None = None, taps: list[Tensor] | None = None
    ) -> Pass:
        x = self.rows(images)
        (drive, bias), (back, _), *_ = weights
        h = x.new_zeros(len(x), len(back))
        if len(weights) == 4:
            h = weights[3][0][: len(x)]
            h = h if probes is None else h + probes[1]
        before, zs, xs, hs = [], [], [], []
        for t in range(x.shape[1]):
            before.append(h)
            zs.append(self.hidden(drive, bias, back, x[:, t], h))
            xs.append(self.norm(zs[-1], *self.fixed_moments(0, t)))
            if probes is not None:
                xs[-1] = xs[-1] + probes[0][:, t]
            h = self.act(xs[-1]) if taps is None else self.act(xs[-1]) + taps[0][:, t]
            hs.append(h)
        z, normed, a = (torch.stack(values, 1) for values in (zs, xs, hs))
        read = a if self.config.readout == "every" else h
        inputs = [x, torch.stack(before, 1), read, x.new_zeros(0)][: len(weights)]
        return Pass(inputs, [z], [normed], [a], self.readout(*weights[2], read))

    def rows(self, images: Tensor) -> Tensor:
        if images.dim() == 3:
            return images
        return torch.stack([images[:, :, t].reshape(len(images), -1) for t in range(images.shape[2])], 1)

    def hidden(self, drive: Tensor, bias: Tensor | None, back: Tensor, x: Tensor, h: Tensor) -> Tensor:
        z = self.scale(drive, True) * x @ drive.T + self.scale(back, False) * h @ back.T
        return z if bias is None else z + bias

    def readout(self, weight: Tensor, bias: Tensor | None, a: Tensor) -> Tensor:
        y = self.scale(weight, False) * a @ weight.T
        return y if bias is None else y + bias

    def tangent(self, at: Pass, weights: Sequence[Tensor], probes: list[Tensor]) -> Tensor:
        dh = probes[1] if len(probes) == 2 else torch.zeros_like(at.a[0][:, 0])
        dhs = []
        for t in range(at.a[0].shape[1]):
            dz = self.hidden(weights[0], None, weights[1], torch.zeros_like(at.inputs[0][:, t]), dh)
            dx = self.norm_tangent(dz, at.z[0][:, t], *self.fixed_moments(0, t)[1:]) + probes[0][:, t]
            dh = self.gate(at.x[0][:, t]) * dx
            dhs.append(dh)
        return self.readout(weights[2], None, torch.stack(dhs, 1) if self.config.readout == "every" else dh)

    def local(self, weights: Weights, inputs: list[Tensor], deltas: Deltas) -> Tensor:
        (drive, bias), (back, _), (out, out_bias), *_ = weights
        total = inputs[0].new_zeros(())
        for t in range(inputs[0].shape[1]):
            if deltas[0] is not None:
                z = self.hidden(drive, bias, back, inputs[0][:, t], inputs[1][:, t])
                total = total + (deltas[0][:, t] * self.norm(z, *self.fixed_moments(0, t))).sum()
        if deltas[2] is not None:
            total = total + (deltas[2] * self.readout(out, out_bias, inputs[2])).sum()
        if len(deltas) == 4 and deltas[3] is not None:
            total = total + (deltas[3] * weights[3][0][: len(deltas[3])]).sum()
        return total

    def probes(self, at: Pass) -> list[Tensor]:
        state = [torch.zeros_like(at.x[0][:, 0], requires_grad=True)] if len(at.inputs) == 4 else []
        return [torch.zeros_like(at.x[0], requires_grad=True), *state]

    def by_layer(self, deltas: Sequence[Tensor], error: Tensor) -> Deltas:
        return [deltas[0], deltas[0], error, *deltas[1:]]


def make_net(config: NetConfig, shape: tuple[int, ...], initial: Weights, calibration: Tensor | None = None) -> Net:
    """calibration: the examples of a calibrated norm, whose moments are those of batch norm on all of them at once."""
    if config.norm == "calibrated":
        assert calibration is not None
        batch = type(config)(**{**vars(config), "norm": "batch"})
        untrained = initial[:3] if isinstance(config, RNNConfig) else initial  # a trained state starts at 0
        z = make_net(batch, shape, initial).forward(untrained, calibration).z
        moments = [(site.mean(0), ((site - site.mean(0)) ** 2).mean(0)) for site in z]
    else:
        moments = None
    return Recurrent(config, moments) if isinstance(config, RNNConfig) else Chain(config, shape, moments)
