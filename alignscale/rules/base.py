"""What a learning rule is: a module from a batch to a scalar whose gradient is the update.

It stands alone so that adding a rule is one new file in this folder: subclass ``LocalRule``, say which deltas meet
which layer inputs, and ``register`` it under a name.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from alignscale.choices import ConfigError, RuleConfig
from alignscale.frozen import Fixed
from alignscale.loss import MSE, Loss
from alignscale.nets.network import Deltas, Network
from alignscale.types import Batch, StepOutput, Trace


class Rule(nn.Module, ABC):
    """The module that an engine runs. It holds the network; what is fixed is no part of its parameters."""

    options: ClassVar[type[RuleConfig]] = RuleConfig
    """The class of the rule's own options."""

    def __init__(self, net: Network, fixed: Fixed, config: RuleConfig, loss: Loss) -> None:
        """Fixed: the initial network and the random feedback."""
        super().__init__()
        self.net = net
        self.loss = loss
        self.fixed = fixed
        self.config = config

    @abstractmethod
    def forward(self, batch: Batch) -> StepOutput:
        """One step on ``batch``, up to the scalar to call backward on."""


class LocalRule(Rule, ABC):
    """A rule that gives every layer its delta itself. No graph is kept from one layer to another."""

    reads_trace: ClassVar[bool] = True
    """Whether ``assign`` reads more of the current trace than its logits; if not, the rest is freed before it."""

    def forward(self, batch: Batch) -> StepOutput:
        """Trace, error, deltas, surrogate."""
        with torch.no_grad():
            trace = self.net.trace(batch.images)
            loss = self.loss.value(trace.logits, batch.targets, batch.size)
            error = self.loss.error(trace.logits, batch.targets, batch.size).to(trace.logits.dtype)
            if not self.reads_trace:
                trace = Trace([], [], [], trace.logits)
            local, deltas = self.assign(batch, trace, error)
        return StepOutput(self.net.surrogate(local, deltas), loss, trace.logits)

    @abstractmethod
    def assign(self, batch: Batch, trace: Trace, error: Tensor) -> tuple[Trace, Deltas]:
        """The trace whose layer inputs and norm moments are used, and each layer's delta (None: it does not learn).

        trace: of the current network on this batch. error: dLoss/dlogits. Called without gradients.
        """


RULES: dict[str, type[Rule]] = {}
"""Every registered rule by name."""


def register(name: str) -> Callable[[type[Rule]], type[Rule]]:
    """Class decorator: make the rule known to ``rule=<name>``."""

    def add(rule: type[Rule]) -> type[Rule]:
        if name in RULES:
            raise ValueError(f"rule {name}: registered by {RULES[name].__module__} and again by {rule.__module__}")
        RULES[name] = rule
        return rule

    return add


def make_rule(net: Network, fixed: Fixed, config: RuleConfig, loss: Loss | None = None) -> Rule:
    """The rule that ``config`` names, by default with the paper's loss.

    Raises ConfigError, with the valid names, if there is none.
    """
    if config.name not in RULES:
        raise ConfigError(f"rule={config.name}: expected one of {', '.join(sorted(RULES))}")
    return RULES[config.name](net, fixed, config, loss or MSE())
