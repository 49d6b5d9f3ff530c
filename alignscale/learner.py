"""A network with the rule, the loss and the engine that train it: what one step of training needs, without files.

It stands alone because a run and a user's own script or notebook train through the same object.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from alignscale.analysis.updates import cosines, weight_updates
from alignscale.choices import ConfigError, LossConfig, MSEConfig, NetConfig, OptimConfig, RuleConfig, SGDConfig
from alignscale.data.examples import Encoding, Examples, stream
from alignscale.data.plan import Plan
from alignscale.engine import LocalEngine, make_optimizer
from alignscale.evaluate import evaluate
from alignscale.frozen import Fixed, calibrate, initial_weight, initialise
from alignscale.loss import make_loss
from alignscale.nets import build
from alignscale.rules import RULES, make_rule
from alignscale.rules.backprop import Backprop
from alignscale.types import Batch

PRECISIONS = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.float32),
    "fp64": (torch.float64, torch.float64),
}
"""Precision -> dtype of the computation, dtype of the weights, the optimizer and the loss."""


class Learner:
    """``net`` from a seed, trained by ``rule``.

    ``fit``, ``evaluate`` and ``alignment`` take images (N, C, H, W) as the network is to read them, and labels (N,)
    int64. Norm ``calibrated`` needs ``calibrate`` before anything else.
    """

    def __init__(
        self, net: NetConfig, shape: Sequence[int], classes: int, rule: str | RuleConfig = "align_ada",
        optim: OptimConfig | None = None, loss: LossConfig | None = None, *, seed: int = 0, precision: str = "fp32",
        device: str | torch.device = "cpu", frozen_weights: str = "stored", state_rows: int = 0,
    ) -> None:  # fmt: skip
        """Shape: of one example, (C, H, W) or (T, F). state_rows: of a recurrent network's trained initial state.

        Raises ConfigError for an unknown rule, or for a network that the data do not fit.
        """
        if isinstance(rule, str) and rule not in RULES:
            raise ConfigError(f"rule={rule}: expected one of {', '.join(sorted(RULES))}")
        options = RULES[rule].options(name=rule) if isinstance(rule, str) else rule
        optim = optim or SGDConfig()
        self.seed, self.shape, self.classes, self.epochs = seed, tuple(shape), classes, 0
        dtype, master = PRECISIONS[precision]
        self.net = build(net, self.shape, classes, state_rows).to(device, master)
        initialise(self.net, seed)
        self.fixed = Fixed.from_seed(self.net, seed, frozen_weights == "stored", dtype)
        self.loss = make_loss(loss or MSEConfig())
        self.rule = make_rule(self.net, self.fixed, options, self.loss)
        self.encoding = Encoding(self.loss, dtype, master, torch.device(device))
        self.lr = optim.lr
        pulled = optim.weight_decay > 0 and optim.decay_towards == "initial"
        self.engine = LocalEngine(
            self.rule, make_optimizer(optim, self.rule.parameters()), optim, self._initial() if pulled else ()
        )

    def _initial(self) -> list[Tensor | None]:
        """Of each parameter, its initial value from the seed; None for a bias, which starts at 0."""
        layers = {id(layer.weight): index for index, layer in enumerate(self.net.layers)}
        indices = (layers.get(id(parameter)) for parameter in self.rule.parameters())
        return [None if index is None else initial_weight(self.net, self.seed, index) for index in indices]

    def calibrate(self, images: Tensor) -> None:
        """Set the norms ``calibrated`` to the initial network's moments over ``images``, before any training."""
        calibrate(self.fixed.frozen, self.encoding.images(images))

    def update(self, batches: Sequence[Batch], lr: float) -> tuple[float, int]:
        """One update from a batch in parts; returns its loss and how many examples it had right before the update.

        Where the loss is not finite, the weights stay as they are.
        """
        losses, right = [], []
        for batch in batches:
            output = self.engine(batch)
            self.engine.backward(output.surrogate)
            losses.append(output.loss)
            right.append((output.logits.argmax(-1) == batch.targets.argmax(-1)).sum())
        value = torch.stack(losses).sum().item()
        if math.isfinite(value):
            self.engine.step(lr)
        else:
            self.engine.forget()
        return value, int(torch.stack(right).sum())

    def cosines(self, batch: Batch) -> list[float]:
        """Per layer, the cosine of the rule's update with backprop's at the same weights; 0 where it has none."""
        backprop = Backprop(self.net, self.fixed, RuleConfig("backprop"), self.loss)
        return cosines(weight_updates(self.rule, self.net, batch), weight_updates(backprop, self.net, batch))

    def fit(self, images: Tensor, labels: Tensor, epochs: int = 10, batch_size: int = 50) -> list[float]:
        """Train for some more epochs, each in an order of its own, and return each one's mean loss.

        Raises ConfigError for tensors that do not fit the network, ArithmeticError when the loss is not finite.
        """
        examples = self._examples(images, labels)
        plan = Plan(len(examples), batch_size, self.seed)
        per_epoch, mean = plan.steps_per_epoch, [0.0] * epochs
        start = self.epochs * per_epoch
        for step, batches in stream(examples, plan, self.encoding, start, start + epochs * per_epoch):
            loss, _ = self.update(batches, self.lr)
            if not math.isfinite(loss):
                raise ArithmeticError(f"the loss is {loss} at step {step}: expected a finite number; lower optim.lr")
            mean[(step - start) // per_epoch] += loss * batches[0].size / len(examples)
        self.epochs += epochs
        return mean

    def evaluate(self, images: Tensor, labels: Tensor, batch_size: int = 120) -> dict[str, float]:
        """``accuracy``, ``top5`` (fractions) and ``loss``; raises ConfigError for tensors that do not fit."""
        return evaluate(self.net, self._examples(images, labels), self.encoding, batch_size)

    def alignment(self, images: Tensor, labels: Tensor) -> list[float]:
        """``cosines`` on these examples as one batch; raises ConfigError for tensors that do not fit."""
        examples = self._examples(images, labels)
        return self.cosines(self.encoding.batch(examples, torch.arange(len(examples)), 0))

    def _examples(self, images: Tensor, labels: Tensor) -> Examples:
        if tuple(images.shape[1:]) != self.shape or labels.shape != images.shape[:1] or len(labels) == 0:
            raise ConfigError(
                f"images {tuple(images.shape)}, labels {tuple(labels.shape)}: expected {('N', *self.shape)} and (N,)"
            )
        if labels.dtype != torch.int64 or labels.min() < 0 or labels.max() >= self.classes:
            raise ConfigError(
                f"labels: expected int64 from 0 to {self.classes - 1}, found {labels.dtype} from {labels.min()} to "
                f"{labels.max()}"
            )
        return Examples.whole(images, labels, self.classes, "tensors")
