"""Only the last layer learns: what the initial network's features alone can do."""

from torch import Tensor

from alignscale.nets.network import Deltas
from alignscale.rules.base import LocalRule, register
from alignscale.types import Batch, Trace


@register("readout_only")
class ReadoutOnly(LocalRule):
    """The error meets the readout's input; no other layer has a delta."""

    replayable = True
    trains_hidden = False

    def assign(self, batch: Batch, trace: Trace, error: Tensor) -> tuple[Trace, Deltas]:
        """Deltas of None, but for the readout's."""
        return trace, self.net.readout_deltas(error, trace)
