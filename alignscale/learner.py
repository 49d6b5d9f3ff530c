"""A network with the rule, the loss and the engine that train it: what one step of training needs, without files.

It stands alone because a run and a user's own script or notebook train through the same object.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from alignscale.analysis.updates import cosines, weight_updates
from alignscale.choices import (
    LOSSES,
    NETS,
    OPTIMS,
    ConfigError,
    DataConfig,
    LossConfig,
    NetConfig,
    OptimConfig,
    RuleConfig,
)  # fmt: skip
from alignscale.config import CalibrationConfig, EvaluationConfig, FrozenConfig, TrainConfig
from alignscale.data.examples import Encoding, Examples, stream
from alignscale.data.plan import Plan
from alignscale.engine import LocalEngine, make_optimizer
from alignscale.environment import device_called
from alignscale.evaluate import evaluate
from alignscale.frozen import Fixed, calibrate, initial_weight, initialise
from alignscale.loss import make_loss
from alignscale.nets import build
from alignscale.rules import RULES, make_rule
from alignscale.rules.backprop import Backprop
from alignscale.types import Batch
from alignscale.validation import check_data, validate

Choice = TypeVar("Choice")

PRECISIONS = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.float32),
    "fp64": (torch.float64, torch.float64),
}
"""Precision -> dtype of the computation, dtype of the weights, the optimizer and the loss."""


class Learner:
    """``net`` from a seed, trained by ``rule``.

    ``fit``, ``evaluate`` and ``alignment`` take images (N, C, H, W) or sequences (N, T, F) as the network is to read
    them, floating point, and labels (N,), whole numbers from 0; tensors, arrays or lists. Norm ``calibrated`` needs
    ``calibrate`` before anything else. Each raises ConfigError for what does not fit the network.
    """

    def __init__(
        self, net: str | NetConfig, shape: Sequence[int], classes: int, rule: str | RuleConfig = "align_ada",
        optim: str | OptimConfig = "sgd", loss: str | LossConfig = "mse", *, seed: int = 0, precision: str = "fp32",
        device: str | torch.device = "cpu", frozen_weights: str = "stored", state_rows: int = 0,
    ) -> None:  # fmt: skip
        """What is given by name has its default options.

        Args:
            net: a network.
            shape: of one example, (C, H, W) or (T, F).
            classes: the number of logits.
            rule: a learning rule.
            optim: an optimizer.
            loss: a loss.
            seed: of the initial network and the order of examples.
            precision: fp32, bf16 (computation alone) or fp64.
            device: auto, or what torch.device takes.
            frozen_weights: the initial weights are ``stored``, or ``regenerated`` at each use.
            state_rows: of a recurrent network's trained initial state: the largest batch.

        Raises:
            ConfigError: an option is wrong, or the network does not fit the shape.
        """
        rules = {name: kind.options(name=name) for name, kind in RULES.items()}
        optim = _chosen("optim", optim, OPTIMS, OptimConfig)
        self.options = TrainConfig(
            _chosen("rule", rule, rules, RuleConfig), _chosen("net", net, NETS, NetConfig), DataConfig("tensors"),
            optim, _chosen("loss", loss, LOSSES, LossConfig), frozen=FrozenConfig(frozen_weights), seed=seed,
            precision=precision, calibration=CalibrationConfig(2), batch_size=120, evaluation=EvaluationConfig([]),
        )  # fmt: skip
        validate(self.options)
        if classes < 2 or not shape or min(shape) < 1:
            raise ConfigError(
                f"classes={classes}, shape={tuple(shape)}: expected at least 2 classes, and sizes above 0"
            )
        if getattr(self.options.net, "initial_state", "zero") == "trained" and state_rows < 1:
            raise ConfigError(f"state_rows={state_rows}: net.initial_state=trained wants the size of the largest batch")
        self.seed, self.shape, self.classes, self.epochs, self.trained = seed, tuple(shape), classes, 0, False
        dtype, master = PRECISIONS[precision]
        device = device_called(device) if isinstance(device, str) else device
        self.net = build(self.options.net, self.shape, classes, state_rows).to(device, master)
        initialise(self.net, seed)
        self.fixed = Fixed.from_seed(self.net, seed, frozen_weights == "stored", dtype)
        self.loss = make_loss(self.options.loss)
        self.rule = make_rule(self.net, self.fixed, self.options.rule, self.loss)
        self.encoding = Encoding(self.loss, dtype, master, device)
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
        if self.trained:
            raise ConfigError("calibrate: expected an untrained network, whose moments they are; make a new Learner")
        calibrate(self.fixed.frozen, self.encoding.images(self._images(images)))

    def update(self, batches: Sequence[Batch], lr: float) -> tuple[float, int]:
        """One update from a batch in parts; returns its loss and how many examples it had right before the update.

        Where the loss is not finite, the weights stay as they are.
        """
        losses, right, self.trained = [], [], True
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

        Raises ArithmeticError when the loss is not finite; the weights are then as they were before that step. An epoch
        that is broken off, by Ctrl-C say, begins anew with the next call.
        """
        examples = self._examples(images, labels, "train", batch_size, epochs)
        plan = Plan(len(examples), batch_size, self.seed)
        per_epoch, mean = plan.steps_per_epoch, [0.0] * epochs
        start = self.epochs * per_epoch
        for step, batches in stream(examples, plan, self.encoding, start, start + epochs * per_epoch):
            loss, _ = self.update(batches, self.lr)
            if not math.isfinite(loss):
                raise ArithmeticError(f"the loss is {loss} at step {step}: expected a finite number; lower optim.lr")
            mean[(step - start) // per_epoch] += loss * batches[0].size / len(examples)
            self.epochs = (step + 1) // per_epoch
        return mean

    def evaluate(self, images: Tensor, labels: Tensor, batch_size: int = 120) -> dict[str, float]:
        """``accuracy``, ``top5`` (fractions) and ``loss``, in near-equal batches of at most ``batch_size``."""
        examples = self._examples(images, labels, "test", batch_size)
        return evaluate(self.net, examples, self.encoding, batch_size)

    def alignment(self, images: Tensor, labels: Tensor) -> list[float]:
        """``cosines`` on these examples as one batch."""
        examples = self._examples(images, labels, "train", len(labels))
        return self.cosines(self.encoding.batch(examples, torch.arange(len(examples)), 0))

    def _images(self, images: Any) -> Tensor:
        images = torch.as_tensor(images)
        if tuple(images.shape[1:]) != self.shape or len(images) == 0:
            raise ConfigError(f"images {tuple(images.shape)}: expected {('N', *self.shape)}")
        if not images.is_floating_point():
            raise ConfigError(f"images: expected floating point, as the network reads them, found {images.dtype}")
        return images

    def _examples(self, images: Any, labels: Any, split: str, batch_size: int, epochs: int = 1) -> Examples:
        """Images and labels, checked together with the options of this call."""
        images, labels = self._images(images), torch.as_tensor(labels)
        if labels.shape != images.shape[:1]:
            raise ConfigError(f"labels {tuple(labels.shape)}: expected ({len(images)},), one for each of the images")
        whole = labels.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
        if not whole or labels.min() < 0 or labels.max() >= self.classes:
            raise ConfigError(
                f"labels: expected whole numbers from 0 to {self.classes - 1}, found {labels.dtype} from "
                f"{labels.min()} to {labels.max()}"
            )
        if any(bool(buffer.isnan().any()) for norm in self.net.norms for buffer in norm.buffers()):
            raise ConfigError(
                "net.norm=calibrated: expected the norms' moments, found none; call calibrate(images) first"
            )
        rows = None if self.net.state is None else len(self.net.layers[self.net.state].weight)
        if rows is not None and batch_size > rows:
            raise ConfigError(
                f"batch_size={batch_size}: expected at most state_rows={rows}, those of the trained state"
            )
        evaluation = EvaluationConfig([], batch_size)
        options = replace(self.options, epochs=epochs, batch_size=batch_size, evaluation=evaluation)
        validate(options)
        check_data(options, {split: len(images)})
        return Examples.whole(images, labels.long(), self.classes, "tensors")


def _chosen(option: str, value: str | Choice, choices: Mapping[str, Choice], kind: type[Choice]) -> Choice:
    """The choice of a name, with its default options, or the options that are given."""
    if isinstance(value, kind):
        return value
    if isinstance(value, str) and value in choices:
        return copy.deepcopy(choices[value])
    found = value if isinstance(value, str) else type(value).__name__
    raise ConfigError(f"{option}={found}: expected one of {', '.join(sorted(choices))}, or options of {kind.__name__}")
