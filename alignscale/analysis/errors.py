"""Each training example's errors, summed over training: q of the paper's Sigma, without its N x N entries.

They stand alone as all that Sigma needs from training. The frozen rule's change of layer l is
-sum over x of J_l(x)^T E(x) input_l(x)^T, J the initial network's Jacobian and E(x) the sum over updates of
rate * error; so q(x1, x2) = <J_l(x1)^T E(x1), J_l(x2)^T E(x2)>.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class ErrorSums:
    """``sums``, float64: (examples, classes), or (examples, T, classes); of this rank's examples."""

    def __init__(self, keys: Sequence[str], logits: tuple[int, ...]) -> None:
        """keys: of the training examples, in order. logits: shape of one example's."""
        self.places = {key: place for place, key in enumerate(keys)}
        self.sums = torch.zeros(len(keys), *logits, dtype=torch.float64)

    def add(self, keys: Sequence[str], errors: Tensor, lr: float) -> None:
        """Add ``lr`` times the errors (B, classes) of the examples with these keys, each of which is there once."""
        places = torch.tensor([self.places[key] for key in keys], dtype=torch.int64)
        self.sums[places] += lr * errors.detach().double().cpu()
