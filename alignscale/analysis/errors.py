"""Each training example's errors, summed over training: q of the paper's Sigma, without its N x N entries.

They stand alone as all that Sigma needs from training. The frozen rule's change of layer l is
-sum over x of J_l(x)^T E(x) input_l(x)^T, J the initial network's Jacobian and E(x) the sum over updates of
rate * error; so q(x1, x2) = <J_l(x1)^T E(x1), J_l(x2)^T E(x2)>.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from alignscale.distributed import ALONE, Ranks


class ErrorSums:
    """``sums``, float64: (own examples, classes), or (own examples, T, classes). ``size``: bytes of those of all ranks.

    A rank has the same examples from start to end, whoever trains on them: so no sum depends on where a run stopped.
    """

    def __init__(self, keys: Sequence[str], logits: tuple[int, ...], ranks: Ranks = ALONE) -> None:
        """keys: of the training examples, in order. logits: shape of one example's. ranks: share out the examples."""
        self.places = {key: place for place, key in enumerate(keys)}
        self.size = 8 * len(keys) * torch.Size(logits).numel()
        self.ranks, self.own = ranks, ranks.part(len(keys))
        self.sums = torch.zeros(self.own.stop - self.own.start, *logits, dtype=torch.float64)

    def add(self, keys: Sequence[str], errors: Tensor, lr: float) -> None:
        """Add ``lr`` times the errors (B, classes) of the examples with these keys, each of which is there once.

        A collective of all ranks, of which each brings its part of a batch.
        """
        places = torch.tensor([self.places[key] for key in keys], dtype=torch.int64)
        for found, part in self.ranks.objects((places, errors.detach().cpu())):
            mine = (found >= self.own.start) & (found < self.own.stop)
            self.sums[found[mine] - self.own.start] += lr * part[mine].double()

    def whole(self, device: torch.device) -> Tensor:
        """Of all examples, (examples, classes), in host memory; a collective of all ranks, on ``device``."""
        found = torch.zeros(len(self.places), *self.sums.shape[1:], dtype=torch.float64, device=device)
        found[self.own] = self.sums.to(device)
        return self.ranks.sum(found).cpu()

    def load(self, whole: Tensor | None, device: torch.device) -> None:
        """Go on from ``whole``, which the first rank has; a collective of all ranks, on ``device``."""
        found = torch.zeros(len(self.places), *self.sums.shape[1:], dtype=torch.float64) if whole is None else whole
        self.sums = self.ranks.broadcast(found.to(device))[self.own].cpu().clone()
