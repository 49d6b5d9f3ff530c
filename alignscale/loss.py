"""The loss and the error at the output, e = dLoss/dlogits: the one thing that every rule takes from the current network."""

from torch import Tensor


def mse(logits: Tensor, targets: Tensor, size: int) -> Tensor:
    """Squared error: mean over examples and classes, sum over time steps where there are any; a scalar.

    logits, targets: (B, classes) or (B, T, classes). size: examples in the global batch, of which B are here.
    """
    return (logits - targets).square().sum() / (size * logits.shape[-1])


def mse_error(logits: Tensor, targets: Tensor, size: int) -> Tensor:
    """d mse / d logits, shape of the logits."""
    return (logits - targets) * (2 / (size * logits.shape[-1]))
