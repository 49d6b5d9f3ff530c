"""Rules with other feedback: random, straight from the output, only the signs of the current weights, or none.

Sources: feedback alignment, Lillicrap et al. 2016; direct feedback alignment, Nokland 2016; sign-symmetric feedback,
Liao, Leibo & Poggio 2016.
"""

from dataclasses import dataclass

from torch import Tensor

from alignscale.choices import ConfigError, RuleConfig
from alignscale.frozen import Fixed
from alignscale.loss import Loss
from alignscale.nets.network import Deltas, Network
from alignscale.rules.base import LocalRule, register
from alignscale.types import Batch, Trace

MAGNITUDES = ("uniform", "fixed", "batchwise")


@register("feedback_alignment")
class FeedbackAlignment(LocalRule):
    """Current gates and layer inputs; fixed random weights in place of the transposed ones, layer by layer."""

    replayable = True

    def assign(self, batch: Batch, trace: Trace, error: Tensor) -> tuple[Trace, Deltas]:
        """The current network's pullback, with the random weights transposed."""
        return trace, self.net.pullback(error, self.net.gates(trace), trace.norms, self.fixed.feedback)


@register("direct_feedback_alignment")
class DirectFeedbackAlignment(LocalRule):
    """At every hidden site the signal is B e, B fixed and random; the readout learns by its true gradient."""

    replayable = True

    def assign(self, batch: Batch, trace: Trace, error: Tensor) -> tuple[Trace, Deltas]:
        """Delta = gate * (B e), in the shape of the site."""
        at_site = []
        for site, gate in enumerate(self.net.gates(trace)):
            signal = error @ self.fixed.direct(site).flatten(0, -2).T
            at_site.append(self.net.activation.pullback(signal.view(gate.shape), gate))
        deltas = self.net.readout_deltas(error, trace)
        for index, below in enumerate(self.net.sites):
            if below is not None:
                deltas[index] = at_site[below]
        return trace, deltas


@register("readout_only")
class ReadoutOnly(LocalRule):
    """The error meets the readout's input and no other layer learns: what the initial network's features can do."""

    replayable = True
    trains_hidden = False

    def assign(self, batch: Batch, trace: Trace, error: Tensor) -> tuple[Trace, Deltas]:
        """Deltas of None, but for the readout's."""
        return trace, self.net.readout_deltas(error, trace)


@dataclass
class SignSymmetricConfig(RuleConfig):
    """``magnitude`` of the feedback: ``uniform`` (1), ``fixed`` (random, drawn once), ``batchwise`` (each step)."""

    name: str = "sign_symmetric"
    magnitude: str = "uniform"


@register("sign_symmetric")
class SignSymmetric(LocalRule):
    """Current gates and layer inputs; the feedback is sign(current weight) times a magnitude of its own."""

    options = SignSymmetricConfig
    replayable = True

    def __init__(self, net: Network, fixed: Fixed, config: RuleConfig, loss: Loss) -> None:
        """Raises ConfigError for an unknown magnitude."""
        super().__init__(net, fixed, config, loss)
        if not isinstance(config, SignSymmetricConfig) or config.magnitude not in MAGNITUDES:
            found = getattr(config, "magnitude", "(absent)")
            raise ConfigError(f"rule.magnitude={found}: expected one of {', '.join(MAGNITUDES)}")
        self.magnitude = config.magnitude
        self.replayable = type(self).replayable and config.magnitude != "batchwise"

    def assign(self, batch: Batch, trace: Trace, error: Tensor) -> tuple[Trace, Deltas]:
        """The current network's pullback, with the signed magnitudes transposed."""

        def feedback(index: int) -> Tensor:
            layer = self.net.layers[index]
            sign = self.net.current(index)[0].detach().sign()
            if self.magnitude == "uniform":
                return sign * layer.initial_std
            return sign * self.fixed.magnitude(index, batch.step + 1 if self.magnitude == "batchwise" else 0)

        return trace, self.net.pullback(error, self.net.gates(trace), trace.norms, feedback)
