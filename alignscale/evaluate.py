"""Accuracy and loss on a split, exact to the last partial batch, on any number of ranks."""

import torch
from torch import Tensor

from alignscale.data.examples import Encoding, Examples
from alignscale.data.plan import even_batches
from alignscale.distributed import Ranks
from alignscale.engine import Engine
from alignscale.loss import right

ALONE = Ranks()


@torch.no_grad()
def evaluate(
    engine: Engine, examples: Examples, encoding: Encoding, most: int, ranks: Ranks = ALONE
) -> dict[str, float]:
    """``accuracy`` (top 1), ``top5`` (both fractions) and ``loss`` (mean) on all examples, ``most`` in a batch.

    The batches are fixed, in key order, and taken in turn by the ranks, which all run as often; what each batch gives
    is added up in their order, so that the sums have the same bits on any number of ranks.
    """
    batches = even_batches(len(examples), most)
    found = [[0.0, 0.0, 0.0] for _ in batches]
    for turn in range(-(-len(batches) // ranks.size)):
        ranks.still()
        index = turn * ranks.size + ranks.rank
        part = batches[index] if index < len(batches) else batches[0]  # a pass for the engine's sake
        places = torch.arange(part.start, part.stop)
        batch = encoding.batch(examples, places, 0, len(examples))
        output = engine.evaluate(batch)
        if index >= len(batches):
            continue
        if output.logits.dim() == 3:
            found[index] = [right(output.logits, batch.targets).item()] * 2 + [output.loss.item()]
        else:
            at = rank_of(output.logits, examples.labels[places].to(output.logits.device))
            found[index] = [(at < 1).sum().item(), (at < 5).sum().item(), output.loss.item()]
    flat = ranks.totals([value for values in found for value in values], encoding.device)
    first, fifth, loss = (sum(flat[place::3]) for place in range(3))
    return {"accuracy": first / len(examples), "top5": fifth / len(examples), "loss": loss}


def rank_of(logits: Tensor, labels: Tensor) -> Tensor:
    """How many logits (B, classes) are ranked before that of the label (B,): 0 is best; of equals the first counts."""
    own = logits.gather(-1, labels[:, None])
    places = torch.arange(logits.shape[-1], device=logits.device)
    before = (logits > own) | ((logits == own) & (places < labels[:, None]))
    return torch.where(own.isnan().squeeze(-1), max(logits.shape[-1], 5), before.sum(-1))
