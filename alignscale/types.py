"""The values that pass between data, networks, rules and engines.

They stand alone so that each side imports only them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

Weight = Callable[[int], Tensor]
"""The weight of layer l of some network: its own, initial, or random feedback."""

Parameters = Callable[[int], tuple[Tensor, Tensor | None]]
"""The weight and bias of layer l of a network other than the one that is trained."""


@dataclass(frozen=True)
class Batch:
    """A batch of examples, or this rank's part of one.

    images: (B, C, H, W), or (B, T, F) for sequences. targets: what the logits should be, (B, classes) or
    (B, T, classes), same dtype. keys: ``shard/row`` of each example. size: examples in the GLOBAL batch, by which the
    loss is divided. step: index of the update that this batch makes. view: which deterministic augmentation.
    """

    images: Tensor
    targets: Tensor
    keys: Sequence[str]
    size: int
    step: int = 0
    view: int = 0


class NormState(NamedTuple):
    """What a norm's pullback needs from its forward pass: its input, and the moments over the batch (flat)."""

    z: Tensor
    mean: Tensor
    inverse_std: Tensor


@dataclass
class Trace:
    """A forward pass, layer by layer.

    inputs: what each layer read. residues: per site (a pre-activation, after its norm), what the activation's gate is
    computed from. norms: per site, what the norm's pullback needs, None where it needs nothing.
    logits: (B, classes) or (B, T, classes).
    """

    inputs: list[Tensor]
    residues: list[Tensor]
    norms: list[NormState | None]
    logits: Tensor


class StepOutput(NamedTuple):
    """What a rule returns: a scalar whose gradient is the update (its value means nothing), the loss, the logits."""

    surrogate: Tensor
    loss: Tensor
    logits: Tensor
