"""A network with the rule, the loss and the engine that train it: what one step of training needs, without files.

It stands alone because a run and a user's own script or notebook train through the same object.
"""

import copy
import math
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from alignscale import choices
from alignscale.analysis.errors import ErrorSums
from alignscale.analysis.updates import cosines, weight_updates
from alignscale.choices import ConfigError, EngineConfig, LossConfig, NetConfig, OptimConfig, RuleConfig
from alignscale.config import CalibrationConfig, EvaluationConfig, FrozenConfig, TrainConfig
from alignscale.data.examples import Encoding, Examples, stream
from alignscale.data.plan import Plan
from alignscale.distributed import ALONE
from alignscale.engine import Engine, LocalEngine, make_optimizer
from alignscale.environment import device_called
from alignscale.evaluate import evaluate
from alignscale.frozen import WHOLE, Fixed, calibrate, initial_weight, initialise
from alignscale.loss import make_loss, right
from alignscale.nets import build
from alignscale.nets.functions import laid_out
from alignscale.nets.norms import BatchNorm
from alignscale.parallel import Mesh
from alignscale.rules import RULES, make_rule
from alignscale.rules.backprop import true_deltas
from alignscale.rules.dual import DualAlignZero
from alignscale.types import Batch
from alignscale.validation import check_data, validate

Choice = TypeVar("Choice")

PRECISIONS = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float32),
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
        device: str | torch.device = "cpu", frozen_weights: str = "stored", state_rows: int = 0, coefficients: int = 0,
        engine: EngineConfig = choices.ENGINES["local"], mesh: Mesh = WHOLE, sync_norm: bool = True,
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
            precision: fp32, fp16 or bf16 (computation alone), or fp64.
            device: auto, or what torch.device takes.
            frozen_weights: the initial weights are ``stored``, ``regenerated`` at each use, or ``partitioned``.
            state_rows: of a recurrent network's trained initial state: the largest batch.
            coefficients: the training examples of align_zero in dual form; 0 trains weights.
            engine: what runs a step.
            mesh: the processes that train together; those of ``mesh.data`` are given their own parts of each batch.
            sync_norm: norm batch takes its moments in training over all ranks.

        Raises:
            ConfigError: an option is wrong, or the network does not fit the shape.
        """
        rules = {name: kind.options(name=name) for name, kind in RULES.items()}
        optim = _chosen("optim", optim, choices.OPTIMS, OptimConfig)
        self.options = TrainConfig(
            _chosen("rule", rule, rules, RuleConfig), _chosen("net", net, choices.NETS, NetConfig),
            choices.DataConfig("tensors"), optim, _chosen("loss", loss, choices.LOSSES, LossConfig), seed=seed,
            frozen=FrozenConfig(frozen_weights), precision=precision, calibration=CalibrationConfig(2), batch_size=120,
            evaluation=EvaluationConfig([]),
        )  # fmt: skip
        validate(self.options)
        try:
            classes, shape = operator.index(classes), tuple(operator.index(size) for size in shape)
        except TypeError as problem:
            raise ConfigError(f"classes={classes}, shape={shape}: expected whole numbers, found: {problem}") from None
        least = 1 if getattr(self.options.net, "readout", "last") == "every" else 2
        if classes < least or not shape or min(shape) < 1:
            raise ConfigError(
                f"classes={classes}, shape={tuple(shape)}: expected at least {least} classes, and sizes above 0"
            )
        if getattr(self.options.net, "initial_state", "zero") == "trained" and state_rows < 1:
            raise ConfigError(f"state_rows={state_rows}: net.initial_state=trained wants the size of the largest batch")
        self.seed, self.shape, self.classes, self.epochs, self.trained = seed, tuple(shape), classes, 0, False
        dtype, master = PRECISIONS[precision]
        device = device_called(str(device))
        self.net = build(self.options.net, self.shape, classes, state_rows, mesh.width).to(device, master)
        for layer in [] if isinstance(engine, choices.DeepSpeedConfig) else self.net.layers:  # it lays weights out anew
            layer.weight.data = laid_out(layer.weight.data)
        initialise(self.net, seed)
        self.mesh = mesh
        synced = [norm for norm in self.net.norms if isinstance(norm, BatchNorm) and sync_norm and mesh.data.size > 1]
        for norm in synced:
            norm.total = mesh.data.sum
        self.fixed = Fixed.from_seed(self.net, seed, frozen_weights, dtype, mesh.data)
        self.loss = make_loss(self.options.loss)
        made = (self.net, self.fixed, self.options.rule, self.loss)
        self.rule = DualAlignZero(*made, coefficients) if coefficients else make_rule(*made)
        self.rule.peers = mesh.data if synced else ALONE
        self.encoding = Encoding(self.loss, dtype, master, device)
        self.errors: ErrorSums | None = None
        self.lr = optim.lr
        self.engine = self._engine(engine, optim)

    def _engine(self, config: EngineConfig, optim: OptimConfig) -> Engine:
        if isinstance(config, choices.DeepSpeedConfig):
            os.environ.setdefault("DS_ACCELERATOR", self.encoding.device.type)  # read by the import
            from alignscale.engine_deepspeed import DeepSpeedEngine  # slow to import, and an extra

            return DeepSpeedEngine(self.rule, optim, config, self.mesh, self.encoding.dtype)
        graph = getattr(config, "cuda_graph", True) and self.mesh.everyone.size == 1
        return LocalEngine(self.rule, make_optimizer(optim, self.rule.trained()), optim, graph)

    def calibrate(self, images: Tensor) -> None:
        """Set norms ``calibrated`` to the initial network's moments over ``images`` (N > 1, *shape); or ConfigError."""
        if self.trained:
            raise ConfigError("calibrate: expected an untrained network, whose moments they are; make a new Learner")
        if self.options.net.norm != "calibrated":
            raise ConfigError(
                f"calibrate: expected net.norm=calibrated, found {self.options.net.norm}, which has no use"
            )
        self.calibrate_on(self.encoding.images(self._images(images)))

    def calibrate_on(self, images: Tensor) -> None:
        """``calibrate`` with images as a batch has them."""
        if len(images) < 2 or not bool(torch.isfinite(images).all()):
            raise ConfigError(f"calibrate: expected at least 2 images of finite numbers, found {len(images)}")
        calibrate(self.fixed.frozen, images)

    @torch.enable_grad()
    def update(
        self, batches: Sequence[Batch], lr: float, flags: Sequence[float] = ()
    ) -> tuple[float, float, list[float]]:
        """One update from a batch in parts; returns its loss and how many examples it had right before the update.

        Both are of all ranks, and so are the sums of ``flags``, which need no message of their own then. Where the loss
        is not finite, the weights stay as they are.
        """
        losses, counts, errors, self.trained = [], [], [], True
        self.engine.forget()  # what an update that was broken off has left
        for place, batch in enumerate(batches, 1):
            self.mesh.everyone.still()
            output = self.engine(batch)
            self.engine.backward(output.surrogate, place == len(batches))
            losses.append(output.loss)
            if self.errors is not None:
                errors.append(self.loss.error(output.logits.detach(), batch.targets, batch.size))
            counts.append(right(output.logits, batch.targets))
        own = torch.stack([torch.stack(losses).sum().double(), torch.stack(counts).sum().double()]).tolist()
        own = own if self.mesh.width.ranks.first else [0.0, 0.0]  # the same examples on all ranks of a network
        value, count, *sums = self.mesh.everyone.totals([*own, *flags], self.encoding.device)
        if math.isfinite(value):
            self.engine.step(lr)
            if self.errors is not None:
                self.errors.add([key for batch in batches for key in batch.keys], torch.cat(errors), lr)
        else:
            self.engine.forget()
        return value, count, sums

    def start(self, index: int) -> Tensor:
        """The initial weight of a layer, in the precision that weights have."""
        weight = self.fixed.frozen.weight(index)
        return weight if weight.dtype == self.encoding.master else initial_weight(self.net, self.seed, index)

    def cosines(self, batch: Batch) -> list[float]:
        """Per layer, the cosine of the rule's update with backprop's at the same weights; 0 where it has none.

        batch: the same on all ranks.
        """
        with self.rule.evaluating():  # norms take the moments of this batch, which every rank has
            mine = weight_updates(self.net, *self.rule.local(batch, self.net.current))
            true = weight_updates(self.net, *true_deltas(self.net, batch, self.loss, self.net.current))
            return cosines(mine, true, self.mesh.width.ranks)

    def fit(self, images: Tensor, labels: Tensor, epochs: int = 10, batch_size: int = 50) -> list[float]:
        """Train for some more epochs, each in an order of its own, and return each one's mean loss.

        Raises ArithmeticError when the loss is not finite; the weights are then as the step before it left them, and it
        was that one which ruined them. An epoch that is broken off, by Ctrl-C say, begins anew with the next call.
        """
        examples = self._examples(images, labels, "train", batch_size, epochs)
        plan = Plan(len(examples), batch_size, self.seed)
        per_epoch, mean = plan.steps_per_epoch, [0.0] * epochs
        start = self.epochs * per_epoch
        stop, share = start + epochs * per_epoch, self.mesh.data.part
        for step, batches in stream(examples, plan, self.encoding, start, stop, share=share):
            loss, *_ = self.update(batches, self.lr)
            if not math.isfinite(loss):
                raise ArithmeticError(f"the loss is {loss} at step {step}: expected a finite number; lower optim.lr")
            mean[(step - start) // per_epoch] += loss * batches[0].size / len(examples)
            self.epochs = (step + 1) // per_epoch
        return mean

    def evaluate(self, images: Tensor, labels: Tensor, batch_size: int | None = None) -> dict[str, float]:
        """``accuracy``, ``top5`` (fractions) and ``loss``, in near-equal batches of at most ``batch_size``.

        By default 120, or as many as a trained initial state has rows.
        """
        rows = 120 if self.net.state is None else self.net.layers[self.net.state].shape[0]
        batch_size = min(120, rows) if batch_size is None else batch_size
        examples = self._examples(images, labels, "test", batch_size)
        return evaluate(self.engine, examples, self.encoding, batch_size, self.mesh.data)

    def alignment(self, images: Tensor, labels: Tensor) -> list[float]:
        """Layer by layer the cosine of the rule's next update with backprop's, on these examples as one batch.

        images (N, *shape), labels (N,); 0 where a layer learns nothing. The score of docs/alignment.md is another one.
        """
        examples = self._examples(images, labels, "train", len(images))
        return self.cosines(self.encoding.batch(examples, torch.arange(len(examples)), 0))

    def _images(self, images: Any) -> Tensor:
        images = _tensor("images", images)
        if tuple(images.shape[1:]) != self.shape or len(images) == 0:
            raise ConfigError(f"images {tuple(images.shape)}: expected {('N', *self.shape)}")
        if not images.is_floating_point():
            raise ConfigError(f"images: expected floating point, as the network reads them, found {images.dtype}")
        return images

    def _examples(self, images: Any, labels: Any, split: str, batch_size: int, epochs: int = 1) -> Examples:
        """Images and labels, checked together with the options of this call."""
        images, labels = self._images(images), _tensor("labels", labels)
        if labels.shape != images.shape[:1]:
            raise ConfigError(f"labels {tuple(labels.shape)}: expected ({len(images)},), one for each of the images")
        found, whole = labels.dtype, not (labels.is_floating_point() or labels.dtype == torch.bool)
        labels = labels.long() if whole else labels
        if not whole or labels.min() < 0 or labels.max() >= self.classes:
            raise ConfigError(
                f"labels: expected whole numbers from 0 to {self.classes - 1}, found {found} from "
                f"{labels.min()} to {labels.max()}"
            )
        if any(bool(buffer.isnan().any()) for norm in self.net.norms for buffer in norm.buffers()):
            raise ConfigError(
                "net.norm=calibrated: expected the norms' moments, found none; call calibrate(images) first"
            )
        rows = None if self.net.state is None else self.net.layers[self.net.state].shape[0]
        if rows is not None and batch_size > rows:
            raise ConfigError(
                f"batch_size={batch_size}: expected at most state_rows={rows}, those of the trained state"
            )
        evaluation = EvaluationConfig([], batch_size)
        options = replace(self.options, epochs=epochs, batch_size=batch_size, evaluation=evaluation)
        validate(options)
        check_data(options, {split: len(images)})
        return Examples.whole(images, labels.long(), self.classes, "tensors")


def _tensor(name: str, value: Any) -> Tensor:
    """A tensor as it is, and a copy of anything else that numpy makes an array of numbers of."""
    try:
        return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    except (TypeError, ValueError) as problem:
        raise ConfigError(f"{name}: expected a tensor or an array of numbers, found: {problem}") from None


def _chosen(option: str, value: str | Choice, named: Mapping[str, Choice], kind: type[Choice]) -> Choice:
    """The choice of a name, with its default options, or the options that are given."""
    if isinstance(value, kind):
        return value
    if isinstance(value, str) and value in named:
        return copy.deepcopy(named[value])
    found = value if isinstance(value, str) else type(value).__name__
    raise ConfigError(f"{option}={found}: expected one of {', '.join(sorted(named))}, or options of {kind.__name__}")
