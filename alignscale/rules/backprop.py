"""Backpropagation: gates, transposed weights and layer inputs are all the current network's.

The baseline, by autograd.
"""

from typing import Any

import torch
from torch import Tensor

from alignscale.choices import RuleConfig
from alignscale.frozen import Fixed
from alignscale.loss import Loss
from alignscale.nets.network import Deltas, Network
from alignscale.rules.base import Rule, register, scaled
from alignscale.types import Batch, Parameters, StepOutput, Trace


@register("backprop")
class Backprop(Rule):
    """The surrogate is the loss itself; in half precision that of a scaled error, and gradients are scaled back."""

    replayable = True
    own_hooks = 1

    def __init__(self, net: Network, fixed: Fixed, config: RuleConfig, loss: Loss) -> None:
        """Hooks on the parameters scale their gradients back."""
        super().__init__(net, fixed, config, loss)
        self.unscale: Tensor | None = None
        for parameter in net.parameters():
            parameter.register_hook(self._scaled_back)

    def _scaled_back(self, gradient: Tensor) -> Tensor | None:
        return None if self.unscale is None else gradient * self.unscale

    def learn(self, batch: Batch) -> StepOutput:
        """The forward pass, with autograd's graph."""
        logits = self.net.trace(batch.images).logits
        loss = self.loss.value(logits, batch.targets, batch.size)
        if logits.dtype == batch.targets.dtype:
            return StepOutput(loss, loss.detach(), logits.detach())
        with torch.no_grad():
            error = self.loss.error(logits, batch.targets, batch.size)
            error, self.unscale = scaled(error, logits.dtype, self.peers)
        return StepOutput(_Surrogate.apply(logits, error, self), loss.detach(), logits.detach())

    @torch.no_grad()
    def local(self, batch: Batch, parameters: Parameters | None = None) -> tuple[Trace, Deltas]:
        """By the network's own pullback, which equals autograd's to rounding."""
        return true_deltas(self.net, batch, self.loss, parameters)


class _Surrogate(torch.autograd.Function):
    """A scalar 0 whose gradient by the logits is ``error``; what it is multiplied by goes where fp16 is scaled back."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, error: Tensor, rule: Backprop) -> Tensor:
        ctx.error, ctx.rule = error, rule
        return error.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *factor: Tensor) -> tuple[Tensor, None, None]:
        if ctx.rule.unscale is None:  # bf16 has the range of fp32
            return ctx.error * factor[0], None, None
        ctx.rule.unscale = ctx.rule.unscale * factor[0]
        return ctx.error, None, None


@torch.no_grad()
def true_deltas(net: Network, batch: Batch, loss: Loss, parameters: Parameters | None = None) -> tuple[Trace, Deltas]:
    """The trace of a batch, and dLoss/dz at every layer's output, after its norm; in fp16 all times a power of 2."""
    trace = net.trace(batch.images, parameters)
    error, _ = scaled(loss.error(trace.logits, batch.targets, batch.size), trace.logits.dtype)
    return trace, net.pullback(error, net.gates(trace), trace.norms, lambda index: net.current(index)[0])
