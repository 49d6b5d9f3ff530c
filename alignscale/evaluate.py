"""Accuracy and loss on a split, exact to the last partial batch, on any number of ranks."""

from collections.abc import Callable
from contextlib import closing

import torch
from torch import Tensor

from alignscale.data.examples import DataError, Encoding, Split, Wanted
from alignscale.data.plan import even_batches
from alignscale.distributed import ALONE, Ranks
from alignscale.engine import Engine
from alignscale.loss import right


@torch.no_grad()
def evaluate(
    engine: Engine, split: Split, encoding: Encoding, most: int, ranks: Ranks = ALONE,
    look: Callable[[], None] = lambda: None,
) -> dict[str, float]:  # fmt: skip
    """``accuracy`` (top 1), ``top5`` (both fractions) and ``loss`` (mean) on all examples, ``most`` in a batch.

    The batches are fixed, in key order, and taken in turn by the ranks, which all run as often; what each batch gives
    is added up in their order, so that the sums have the same bits on any number of ranks. An example that had to be
    left out counts neither as right nor as wrong. look: is called before each batch, on all ranks equally often.
    """
    bounds = even_batches(len(split), most)
    found = [[0.0, 0.0, 0.0, 0.0] for _ in bounds]
    own = range(ranks.rank, -(-len(bounds) // ranks.size) * ranks.size, ranks.size)
    parts = [bounds[index] if index < len(bounds) else bounds[0] for index in own]  # the last for the engine's sake
    wanted = (Wanted(torch.arange(part.start, part.stop), 0, len(split)) for part in parts)
    with closing(split.batches(wanted, encoding)) as batches:
        for index, batch in zip(own, batches, strict=True):
            ranks.still()
            look()
            output = engine.evaluate(batch)
            if index >= len(bounds):
                continue
            if output.logits.dim() == 3:
                first = fifth = right(output.logits, batch.targets).item()
            else:
                at = rank_of(output.logits, batch.targets.argmax(-1))
                first, fifth = (at < 1).sum().item(), (at < 5).sum().item()
            found[index] = [first, fifth, output.loss.item(), len(batch.keys)]
    flat = ranks.totals([value for values in found for value in values], encoding.device)
    first, fifth, loss, count = (sum(flat[place::4]) for place in range(4))
    if not count:
        raise DataError(
            f"evaluation: expected readable examples, found all {len(split)} of a split left out; look at them"
        )
    return {"accuracy": first / count, "top5": fifth / count, "loss": loss * (len(split) / count)}


def rank_of(logits: Tensor, labels: Tensor) -> Tensor:
    """How many logits (B, classes) are ranked before that of the label (B,): 0 is best; of equals the first counts."""
    own = logits.gather(-1, labels[:, None])
    places = torch.arange(logits.shape[-1], device=logits.device)
    before = (logits > own) | ((logits == own) & (places < labels[:, None]))
    return torch.where(own.isnan().squeeze(-1), max(logits.shape[-1], 5), before.sum(-1))
