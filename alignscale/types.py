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
    cached: the initial network's Jacobian at these examples, where there is a cache of it.
    """

    images: Tensor
    targets: Tensor
    keys: Sequence[str]
    size: int
    step: int = 0
    view: int = 0
    cached: "Cached | None" = None


class Jacobian(NamedTuple):
    """J = d logits / d x at a site (after its norm), (B, classes, *site): ``values``, times ``scale`` (B, classes).

    rows: (B,) int64, where values and scale hold more examples than the batch has; they stay where they are.
    """

    values: Tensor
    scale: Tensor | None = None
    rows: Tensor | None = None


@dataclass(frozen=True)
class Bits:
    """relu's gates as a GPU's kernel reads them: ``packed`` (B, bytes) uint8, see jacobian/gates.py.

    rows: (B,) int64, where ``packed`` holds more examples than the batch has; they stay where they are.
    """

    packed: Tensor
    rows: Tensor | None = None

    def __getitem__(self, part: slice) -> "Bits":
        """Of some of the examples."""
        return Bits(self.packed[part]) if self.rows is None else Bits(self.packed, self.rows[part])


@dataclass(frozen=True)
class Cached:
    """What a cache holds of the initial network at the examples of a batch.

    gates: site -> (B, *site), in the form that the activation's pullback reads. jacobians: site -> J, for the sites
    that have no gates. inputs: per layer, what it read; None where they are not cached.
    """

    gates: dict[int, Tensor | Bits]
    jacobians: dict[int, Jacobian]
    inputs: list[Tensor] | None = None


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
