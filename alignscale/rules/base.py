"""What a learning rule is: a module from a batch to a scalar whose gradient is the update.

It stands alone so that adding a rule is one new file in this folder: subclass ``LocalRule``, say which deltas meet
which layer inputs, and ``register`` it under a name.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from alignscale.choices import ConfigError, RuleConfig
from alignscale.distributed import ALONE, Ranks
from alignscale.frozen import Fixed
from alignscale.loss import MSE, Loss
from alignscale.nets.network import Deltas, Network
from alignscale.types import Batch, Parameters, StepOutput, Trace


class Rule(nn.Module, ABC):
    """The module that an engine runs. It holds the network; what is fixed is no part of its parameters."""

    options: ClassVar[type[RuleConfig]] = RuleConfig
    """The class of the rule's own options."""
    trains_hidden: ClassVar[bool] = True
    """Whether all layers learn, or only the readout and a trained state."""
    reads_jacobian: ClassVar[bool] = False
    """Whether it uses ``batch.cached``, the initial network's Jacobian."""
    reads_inputs: ClassVar[bool] = False
    """Whether it uses the layer inputs in ``batch.cached`` too."""

    replayable: bool = False
    """Whether ``learn`` runs the same kernels on every batch of a kind, so that a GPU may record and replay them.

    It may then depend on the batch's tensors and ``size``, on weights and on what never changes, and on nothing else:
    not on ``batch.step``, and on no number that Python reads from a tensor. A class promises it for itself alone.
    """

    own_hooks: ClassVar[int] = 0
    """How many hooks the rule itself has on each parameter's gradient."""

    def __init_subclass__(cls) -> None:
        """What a class promises is not inherited: a subclass may do more."""
        super().__init_subclass__()
        cls.replayable = cls.__dict__.get("replayable", False)

    def __init__(self, net: Network, fixed: Fixed, config: RuleConfig, loss: Loss) -> None:
        """Fixed: the initial network and the random feedback."""
        super().__init__()
        self.net = net
        self.loss = loss
        self.fixed = fixed
        self.config = config
        self.peers = ALONE
        """The ranks whose deltas meet in the moments of norms, and are scaled alike."""

    def trained(self) -> list[nn.Parameter]:
        """The parameters that learn, layer by layer; the others are marked as such."""
        last = (self.net.readout, self.net.state)
        for index, layer in enumerate(self.net.layers):
            layer.requires_grad_(self.trains_hidden or index in last)
        return [one for layer in self.net.layers for one in layer.held if one is not None and one.requires_grad]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """In evaluation mode until the block ends, however it does."""
        self.eval()
        try:
            yield
        finally:
            self.train()

    def saved(self) -> dict[str, Tensor]:
        """Weights and norms, for a checkpoint."""
        return self.net.state_dict()

    def restore(self, model: Mapping[str, Tensor]) -> None:
        """Set what ``saved`` gave."""
        self.net.load_state_dict(model)

    def forward(self, batch: Batch) -> StepOutput:
        """One step on ``batch``, up to the scalar to call backward on; in evaluation mode the forward pass alone."""
        if self.training:
            return self.learn(batch)
        with torch.no_grad():
            logits = self.net.trace(batch.images).logits
            loss = self.loss.value(logits, batch.targets, batch.size)
        return StepOutput(loss, loss, logits)

    @abstractmethod
    def learn(self, batch: Batch) -> StepOutput:
        """A step of training."""

    @abstractmethod
    def local(self, batch: Batch, parameters: Parameters | None = None) -> tuple[Trace, Deltas]:
        """The layer inputs and deltas that make the update: those of ``learn``, unscaled and without a graph.

        parameters: the network's own, to go past the layers as modules.
        """


class LocalRule(Rule, ABC):
    """A rule that gives every layer its delta itself. No graph is kept from one layer to another.

    In fp16 the error is scaled by a power of 2 before the pullback, as the deltas of a wide network would vanish, and
    the weight gradients are scaled back in the weights' precision. Where norms take their moments over ranks, it is the
    same power on all of them.
    """

    reads_trace: ClassVar[bool] = True
    """Whether ``assign`` reads more of the current trace than its logits; if not, the rest is freed before it."""

    def learn(self, batch: Batch) -> StepOutput:
        """Trace, error, deltas, surrogate."""
        with torch.no_grad():
            trace = self.net.trace(batch.images)
            loss = self.loss.value(trace.logits, batch.targets, batch.size)
            error = self.loss.error(trace.logits, batch.targets, batch.size)
            error, unscale = scaled(error, trace.logits.dtype, self.peers)
            if not self.reads_trace:
                trace = Trace([], [], [], trace.logits)
            local, deltas = self.assign(batch, trace, error)
        return StepOutput(self.net.surrogate(local, deltas, unscale), loss, trace.logits)

    @torch.no_grad()
    def local(self, batch: Batch, parameters: Parameters | None = None) -> tuple[Trace, Deltas]:
        """As ``assign`` gives them; in fp16 the deltas are all times a power of 2."""
        trace = self.net.trace(batch.images, parameters)
        error, _ = scaled(self.loss.error(trace.logits, batch.targets, batch.size), trace.logits.dtype)
        return self.assign(batch, trace, error)

    @abstractmethod
    def assign(self, batch: Batch, trace: Trace, error: Tensor) -> tuple[Trace, Deltas]:
        """The trace whose layer inputs and norm moments are used, and each layer's delta (None: it does not learn).

        trace: of the current network on this batch. error: dLoss/dlogits. Called without gradients.
        """


PEAK, MOST = 16.0, 512
"""What the largest error is scaled to in fp16, for up to so many (examples, times of a readout at each), and less for
more: sums over a batch stay below its largest number, 65,504."""


def scaled(error: Tensor, dtype: torch.dtype, peers: Ranks = ALONE) -> tuple[Tensor, Tensor | None]:
    """The error in ``dtype``, times a power of 2 where its range is narrower, and what scales it back (None: 1).

    peers: take the least of their powers. A collective of theirs in fp16.
    """
    if dtype != torch.float16 or error.dtype == dtype:
        return error.to(dtype), None
    largest = error.abs().max() if error.numel() else error.new_zeros(())
    peak = PEAK * min(1.0, MOST * error.shape[-1] / max(error.numel(), 1))
    power = peers.least(torch.exp2(torch.floor(torch.log2(peak / largest.clamp(min=1e-30)))))
    return (error * power).to(dtype), 1 / power


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
