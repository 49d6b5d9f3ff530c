"""Accuracy and loss on a split, exact to the last partial batch."""

import torch
from torch import Tensor

from alignscale.data.examples import Encoding, Examples, evaluation_batches
from alignscale.nets.network import Network


@torch.no_grad()
def evaluate(net: Network, examples: Examples, encoding: Encoding, most: int) -> dict[str, float]:
    """``accuracy`` (top 1), ``top5`` (both fractions) and ``loss`` (mean) on all examples, ``most`` in a batch."""
    first, fifth, loss = 0, 0, 0.0
    for batch, labels in evaluation_batches(examples, encoding, most):
        logits = net(batch.images)
        loss += encoding.loss.value(logits, batch.targets, len(examples)).item()
        at = rank_of(logits, labels.to(logits.device))
        first += int((at < 1).sum())
        fifth += int((at < 5).sum())
    return {"accuracy": first / len(examples), "top5": fifth / len(examples), "loss": loss}


def rank_of(logits: Tensor, labels: Tensor) -> Tensor:
    """How many logits (B, classes) are ranked before that of the label (B,): 0 is best; of equals the first counts."""
    own = logits.gather(-1, labels[:, None])
    places = torch.arange(logits.shape[-1], device=logits.device)
    before = (logits > own) | ((logits == own) & (places < labels[:, None]))
    return torch.where(own.isnan().squeeze(-1), logits.shape[-1], before.sum(-1))
