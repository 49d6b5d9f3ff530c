"""Backpropagation: gates, transposed weights and layer inputs are all the current network's.

The baseline, by autograd.
"""

from alignscale.rules.base import Rule, register
from alignscale.types import Batch, StepOutput


@register("backprop")
class Backprop(Rule):
    """The surrogate is the loss itself."""

    def forward(self, batch: Batch) -> StepOutput:
        """The forward pass, with autograd's graph."""
        logits = self.net.trace(batch.images).logits
        loss = self.loss.value(logits, batch.targets, batch.size)
        return StepOutput(loss, loss.detach(), logits.detach())
