"""Folders like tests/data/reference, recorded from the slow oracle in the layout and conventions of the public code."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from oracle import Weights, make_net
from oracle_rules import ORACLES, World
from torch import Tensor

from alignscale.choices import ConvConfig, RNNConfig

STRIDES = {"conv3": [1, 2, 2], "conv7": [1, 1, 1, 2, 1, 2, 1]}
CLASSES, BATCH, SIDE, LENGTH = 10, 6, 8, 5
RNN_WEIGHTS, RNN_BIASES = ("W_ih", "W_hh", "W_ho", "init_state"), {0: "b_h", 2: "b_o"}


@dataclass
class Recording:
    """One case. drawn: the deviation of stored feedback, ``one`` or ``scaled`` by 1 / sqrt(fan_in)."""

    net: str
    rule: str
    optimizer: str = "sgd"
    width: int = 4
    lr: float = 0.5
    steps: int = 3
    drawn: str = "one"

    def __str__(self) -> str:
        return f"{self.net}-{self.rule}-{self.optimizer.replace(', ', '-').replace(' ', '_')}-{self.drawn}"

    @property
    def standard(self) -> bool:
        return "standard" in self.optimizer

    @property
    def name(self) -> str:
        return f"{self.net}_{self.rule}_w{self.width}_lr{self.lr:g}"


class Adam:
    """TensorFlow 1's: betas, eps and running powers in float32, eps outside the correction."""

    def __init__(self, lr: float) -> None:
        self.lr, self.powers = lr, [np.float32(0.9), np.float32(0.999)]
        self.moments: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, index: int, gradient: Tensor) -> Tensor:
        m, v = self.moments.get(index, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
        m = m + (gradient - m) * (1 - float(np.float32(0.9)))
        v = v + (gradient**2 - v) * (1 - float(np.float32(0.999)))
        self.moments[index] = m, v
        rate = self.lr * math.sqrt(1 - float(self.powers[1])) / (1 - float(self.powers[0]))
        return rate * m / (v.sqrt() + float(np.float32(1e-8)))

    def end_step(self) -> None:
        self.powers = [self.powers[0] * np.float32(0.9), self.powers[1] * np.float32(0.999)]


class Recorder:
    """Draws, trains and stores one case."""

    def __init__(self, what: Recording, seed: int = 0) -> None:
        self.what = what
        self.dice = torch.Generator().manual_seed(seed)
        self.arrays: dict[str, np.ndarray] = {}
        self.recurrent = what.net == "rnn"
        kind = "standard" if what.standard else "ntk"
        if self.recurrent:
            self.config: Any = RNNConfig(
                width=what.width, gain=1.0, readout="every", initial_state="trained", parameterisation=kind
            )
            shapes = [(what.width, 1), (what.width, what.width), (1, what.width), (BATCH, what.width)]
            self.shape: tuple[int, ...] = (LENGTH, 1)
            self.biases = {0: what.width, 2: 1}
        else:
            self.config = ConvConfig(
                width=what.width, norm="batch", gain=1.0, strides=STRIDES[what.net], parameterisation=kind
            )
            channels = 1 if what.net == "conv3" else 3
            layers = len(STRIDES[what.net])
            shapes = [(what.width, what.width if index else channels, 3, 3) for index in range(layers)]
            shapes.append((CLASSES, what.width))
            self.shape = (channels, SIDE, SIDE)
            self.biases = {index: shape[0] for index, shape in enumerate(shapes)}
        self.weights: Weights = [
            (
                self.weight(shape, index, kind),
                torch.zeros(self.biases[index], dtype=torch.float64) if index in self.biases else None,
            )
            for index, shape in enumerate(shapes)
        ]
        self.feedback = [self.weight(shape, -1, "standard" if what.drawn == "scaled" else "ntk") for shape in shapes]

    def normal(self, *shape: int) -> Tensor:
        """Numbers that float32 holds exactly."""
        return torch.randn(*shape, generator=self.dice).double()

    def weight(self, shape: tuple[int, ...], index: int, kind: str) -> Tensor:
        numbers = self.normal(*shape)
        if index == 3 and self.recurrent:
            return 0 * numbers
        return (numbers / math.prod(shape[1:]) ** 0.5).float().double() if kind == "standard" else numbers

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        steps = self.what.steps
        if self.recurrent:
            x = torch.randint(-1, 2, (steps, BATCH, LENGTH), generator=self.dice)
            y = self.normal(steps, BATCH, LENGTH)
            self.arrays |= {"batch_x": x.to(torch.int8).numpy(), "batch_y": y.numpy()}
            yield from zip(x.double()[..., None], y[..., None], strict=True)
            return
        pixels = torch.randint(0, 256, (steps * BATCH, SIDE, SIDE, self.shape[0]), generator=self.dice)
        labels = torch.randint(0, CLASSES, (steps * BATCH,), generator=self.dice)
        x = pixels.double().view(steps, BATCH, *pixels.shape[1:]) / 256
        y = (torch.nn.functional.one_hot(labels, CLASSES).double() - 0.1).view(steps, BATCH, -1)
        if self.what.net == "conv3":
            self.arrays |= {"batch_x": x.float().numpy(), "batch_y": y.numpy()}
        else:
            order = torch.arange(steps * BATCH).view(steps, BATCH)
            self.arrays["batch_idx"] = order.to(torch.int16).numpy()
            self.images = {"images": pixels.to(torch.uint8).numpy(), "labels": labels.numpy()}
        yield from zip(x.permute(0, 1, 4, 2, 3), y, strict=True)

    def public(self, index: int, weight: Tensor) -> np.ndarray:
        """HWIO; recurrent weights by rows, and vectors for one input or output."""
        if self.recurrent:
            return (weight.T if index == 1 else weight if index == 3 else weight.flatten()).numpy().copy()
        weight = weight if weight.dim() == 4 else weight[:, :, None, None]
        return weight.permute(2, 3, 1, 0).numpy().copy()

    def store(self, prefix: str, weights: Weights) -> None:
        for index, (weight, bias) in enumerate(weights):
            self.arrays[prefix + (RNN_WEIGHTS[index] if self.recurrent else f"W{index}")] = self.public(index, weight)
            if bias is not None:
                name = RNN_BIASES[index] if self.recurrent else f"b{index}"
                self.arrays[prefix + name] = bias.numpy().copy()

    def effective_feedback(self, index: int) -> Tensor:
        """The public code scales by 1 / sqrt(fan_in) whatever the parameterisation; our formula does so only in ntk."""
        scaled = self.what.standard and self.what.drawn == "one"
        return self.feedback[index] / (self.feedback[index][0].numel() ** 0.5 if scaled else 1)

    def record(self) -> None:
        what, net, initial = self.what, make_net(self.config, self.shape, self.weights), self.weights
        self.store("init_", initial)
        direct = {}
        if what.rule == "feedback_alignment":
            for index, weight in enumerate(self.feedback[:3] if self.recurrent else self.feedback):
                name = RNN_WEIGHTS[index] if self.recurrent else f"Wlin{index}"
                self.arrays[f"feedback_{name}"] = self.public(index, weight)
        if what.rule == "direct_feedback_alignment":
            for site, (channels, height, width) in enumerate(net.maps[1:]):  # type: ignore[attr-defined]
                matrix = self.normal(height, width, channels, CLASSES) / 10
                self.arrays[f"feedback_B{site}"] = matrix.numpy()
                direct[site] = matrix.permute(2, 0, 1, 3)
        adam = Adam(what.lr)
        losses, logits, x = [], [], None
        for step, (x, y) in enumerate(self.batches(), 1):
            world = World(
                net, self.weights, initial, x, y, BATCH, public=True,
                feedback=self.effective_feedback, direct=direct.__getitem__,
            )  # fmt: skip
            losses.append(world.loss.item())
            logits.append(world.now.logits)
            moved = []
            for index, ((weight, bias), (dw, db)) in enumerate(
                zip(self.weights, ORACLES[what.rule](world), strict=True)
            ):
                hidden = not self.recurrent and index < len(self.weights) - 1
                pairs = [(weight, dw), (bias, None if hidden else db)]  # a norm follows: no gradient but rounding
                new = []
                for place, (value, gradient) in enumerate(pairs):
                    if value is not None and gradient is not None:
                        change = adam(2 * index + place, gradient) if "adam" in what.optimizer else what.lr * gradient
                        value = value - change
                    new.append(value)
                moved.append((new[0], new[1]))
            self.weights = moved  # type: ignore[assignment]
            adam.end_step()
            if step in (1, what.steps):
                self.store(f"step{step}_", self.weights)
        assert x is not None
        self.arrays["loss"] = np.array(losses)
        if not self.recurrent:
            self.arrays["logits"] = torch.stack(logits).detach().numpy()
            last = net.forward(self.weights, x).logits.numpy()
            self.arrays[f"logits_last_batch_after_step{what.steps}"] = last


def record(folder: Path, what: Recording) -> None:
    """Write the case, its entry and its images."""
    recorder = Recorder(what)
    recorder.record()
    nets = {
        "conv3": "conv3: 3x3 filters, strides 1,2,2",
        "conv7": "conv7",
        "rnn": f"relu rnn, {what.width} hidden, T={LENGTH}",
    }
    entry = {"net": nets[what.net], "rule": what.rule, "lr": what.lr, "optimizer": what.optimizer}
    (folder / "index.json").write_text(json.dumps({what.name: entry}))
    np.savez(folder / f"{what.name}.npz", **recorder.arrays)
    if what.net == "conv7":
        np.savez(folder / "images.npz", **recorder.images)


def record_alignment(folder: Path, width: int, side: int) -> None:
    """A conv7 alignment case: random weights, and Monte-Carlo scores with the adjoint that autograd gives."""
    draw = torch.Generator().manual_seed(width)
    arrays: dict[str, np.ndarray] = {}
    scores: dict[str, list[list[float]]] = {"score": [], "control": []}
    channels, size = 3, side
    for layer, stride in enumerate(STRIDES["conv7"]):
        start, change, other = (torch.randn(width, channels, 3, 3, dtype=torch.float64, generator=draw) for _ in "abc")
        shuffled = (start + change).flatten()[torch.randperm(start.numel(), generator=draw)].view_as(start)
        weights = {"init": start, "align": start + change + other / 2, "normal": start + change}
        weights["control_shuffled"] = shuffled
        arrays |= {f"{name}_W{layer}": weight.permute(2, 3, 1, 0).numpy() for name, weight in weights.items()}
        noises = [torch.randn(40, channels, size, size, dtype=torch.float64, generator=draw) for _ in range(6)]
        arrays[f"fixed_noise{layer}"] = noises[0].permute(0, 2, 3, 1).numpy()
        for kind, first in (("score", change), ("control", shuffled - start)):
            scores[kind].append([monte_carlo(first, change + other / 2, noise, stride) for noise in noises])
        channels, size = width, -(-size // stride)
    for kind, layers in scores.items():
        runs = np.array(layers).T
        arrays |= {f"{kind}_runs": runs, f"{kind}_mean": runs.mean(0), f"fixed_{kind}": runs[0]}
        arrays[f"{kind}_std_between_runs"] = runs.std(0, ddof=1)
    np.savez(folder / f"alignment_w{width}.npz", **arrays)
    (folder / "index.json").write_text(json.dumps({f"alignment_w{width}": {"net": "conv7", "width": width}}))


def monte_carlo(first: Tensor, second: Tensor, noise: Tensor, stride: int) -> float:
    """sum(u v) / sqrt(sum(u u) sum(v v)), u and v the noise after each convolution and its adjoint."""

    def forward(z: Tensor, weight: Tensor) -> Tensor:
        total = max((-(-z.shape[-1] // stride) - 1) * stride + 3 - z.shape[-1], 0)
        pad = (total // 2, total - total // 2)
        return torch.nn.functional.conv2d(torch.nn.functional.pad(z, (*pad, *pad)), weight, stride=stride)

    u, v = (torch.func.vjp(lambda z, d=d: forward(z, d), noise)[1](forward(noise, d))[0] for d in (first, second))
    return ((u * v).sum() / ((u * u).sum() * (v * v).sum()).sqrt()).item()
