"""Accuracy and loss on a split, exact to the last partial batch."""

import torch

from alignscale.data.examples import Encoding, Examples, evaluation_batches
from alignscale.loss import mse
from alignscale.nets.network import Network


@torch.no_grad()
def evaluate(net: Network, examples: Examples, encoding: Encoding, most: int) -> dict[str, float]:
    """``accuracy`` (fraction, top 1) and ``loss`` (mean) of ``net`` on all examples, in batches of at most ``most``."""
    correct, loss = 0, 0.0
    for batch, labels in evaluation_batches(examples, encoding, most):
        logits = net(batch.images)
        loss += mse(logits, batch.targets, len(examples)).item()
        correct += int((logits.argmax(-1).cpu() == labels).sum())
    return {"accuracy": correct / len(examples), "loss": loss}
