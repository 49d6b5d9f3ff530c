"""The Align rules (Boopathy & Fiete, ICML 2022, Proposition 2): the error goes down the network as it was at the start.

dW_l = E[ delta_l(x) input_l(x)^T ] / sqrt(fan_in), delta_l = J_l(x)^T e(x), J_l = d logits / d z_l. They differ from
backprop by O(1 / sqrt(width)) at a finite width and not at all in the limit.
"""

from torch import Tensor

from alignscale.nets.network import Deltas
from alignscale.rules.base import LocalRule, register
from alignscale.types import Batch, Trace


@register("align_ada")
class AlignAda(LocalRule):
    """Initial gates and transposed weights, current layer inputs."""

    replayable = reads_jacobian = True

    def assign(self, batch: Batch, trace: Trace, error: Tensor) -> tuple[Trace, Deltas]:
        """Deltas of the initial network meet the current layer inputs, through the current norms."""
        frozen = self.fixed.frozen
        local_gates = self.net.gates(trace) if self.net.public else None
        return trace, frozen.pullback(error, batch.cached or frozen.trace(batch.images), local_gates)


@register("align_zero")
class AlignZero(LocalRule):
    """Initial gates, transposed weights and layer inputs: only the error is the current network's."""

    reads_trace = False
    replayable = reads_jacobian = reads_inputs = True

    def assign(self, batch: Batch, trace: Trace, error: Tensor) -> tuple[Trace, Deltas]:
        """Everything but the error comes from the initial network."""
        frozen, cached = self.fixed.frozen, batch.cached
        if cached and cached.inputs:
            initial = Trace(cached.inputs, [], [None] * len(self.net.norms), trace.logits)
        else:
            initial = frozen.trace(batch.images)
        return initial, frozen.pullback(error, cached or initial)


@register("align_prop")
class AlignProp(LocalRule):
    """Initial transposed weights, current gates and layer inputs: feedback alignment whose feedback is the start."""

    replayable = True

    def assign(self, batch: Batch, trace: Trace, error: Tensor) -> tuple[Trace, Deltas]:
        """The current network's pullback, with the initial weights transposed."""
        return trace, self.net.pullback(error, self.net.gates(trace), trace.norms, self.fixed.frozen.weight)
