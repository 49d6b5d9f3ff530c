"""The loss and the error at the output, e = dLoss/dlogits: what every rule takes from the current network."""

from torch import Tensor


def mse(logits: Tensor, targets: Tensor, size: int) -> Tensor:
    """Squared error: mean over examples and classes, sum over time steps where there are any; a scalar.

    logits, targets: (B, classes) or (B, T, classes). size: examples in the global batch, of which B are here.
    """
    return (logits - targets).square().sum() / (size * logits.shape[-1])


def mse_error(logits: Tensor, targets: Tensor, size: int) -> Tensor:
    """The gradient of ``mse`` by the logits, in their shape."""
    return (logits - targets) * (2 / (size * logits.shape[-1]))
