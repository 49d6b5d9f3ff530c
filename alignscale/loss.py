"""The loss and the error at the output, e = dLoss/dlogits: what every rule takes from the current network."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from alignscale.choices import ConfigError, CrossEntropyConfig, LossConfig, MSEConfig


class Loss(ABC):
    """A mean over examples, and a sum over time steps where there are any.

    In all methods logits and targets are (B, classes) or (B, T, classes), and ``size`` is the number of examples in the
    global batch, of which B are here. Logits of a lower precision are read in the targets' precision.
    """

    @abstractmethod
    def targets(self, labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
        """Labels (B,) int64 -> targets (B, classes)."""

    @abstractmethod
    def value(self, logits: Tensor, targets: Tensor, size: int) -> Tensor:
        """The loss, a scalar."""

    @abstractmethod
    def error(self, logits: Tensor, targets: Tensor, size: int) -> Tensor:
        """The gradient of ``value`` by the logits, in their shape and the targets' precision."""


@dataclass(frozen=True)
class MSE(Loss):
    """Squared error, without a factor 1/2.

    centred: targets are one-hot labels minus 1 / classes. mean: over classes, else their sum.
    """

    centred: bool = True
    mean: bool = True

    def targets(self, labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
        """One-hot, minus 1 / classes where centred."""
        one_hot = torch.nn.functional.one_hot(labels, classes).to(dtype)
        return one_hot - 1 / classes if self.centred else one_hot

    def value(self, logits: Tensor, targets: Tensor, size: int) -> Tensor:
        """Sum of (logits - targets)^2 / (size * classes), or / size."""
        return (logits.to(targets.dtype) - targets).square().sum() / self._divisor(targets, size)

    def error(self, logits: Tensor, targets: Tensor, size: int) -> Tensor:
        """2 (logits - targets) / (size * classes), or / size."""
        return (logits.to(targets.dtype) - targets) * (2 / self._divisor(targets, size))

    def _divisor(self, targets: Tensor, size: int) -> int:
        return size * targets.shape[-1] if self.mean else size


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """-sum over classes of target * log softmax(logits); smoothing: the part of a target spread over all classes."""

    smoothing: float = 0.0

    def targets(self, labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
        """One-hot * (1 - smoothing) + smoothing / classes."""
        one_hot = torch.nn.functional.one_hot(labels, classes).to(dtype)
        return one_hot * (1 - self.smoothing) + self.smoothing / classes if self.smoothing else one_hot

    def value(self, logits: Tensor, targets: Tensor, size: int) -> Tensor:
        """Sum over examples / size."""
        return -(targets * logits.to(targets.dtype).log_softmax(-1)).sum() / size

    def error(self, logits: Tensor, targets: Tensor, size: int) -> Tensor:
        """(softmax(logits) - targets) / size, as targets sum to 1."""
        return (logits.to(targets.dtype).softmax(-1) - targets) / size


RIGHT = 1 / 8
"""How far an output may be from its target to count as right where there are no classes."""


def right(logits: Tensor, targets: Tensor) -> Tensor:
    """How many of the examples are right, a scalar; of sequences (B, T, outputs) the sum of the right steps' shares."""
    if logits.dim() == 3:
        return ((logits - targets).abs() < RIGHT).all(-1).double().mean(1).sum()
    return (logits.argmax(-1) == targets.argmax(-1)).sum()


def make_loss(config: LossConfig) -> Loss:
    """The loss that ``config`` names."""
    if isinstance(config, MSEConfig):
        return MSE(config.centred, config.reduction == "mean")
    if isinstance(config, CrossEntropyConfig):
        return CrossEntropy(config.label_smoothing)
    raise ConfigError(f"loss={config.name}: expected an MSEConfig or CrossEntropyConfig, found {type(config).__name__}")
