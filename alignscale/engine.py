"""Engines: what turns a rule's output into an update of the weights.

Three calls: ``engine(batch)``, ``backward``, ``step``.

They stand alone so that the loop never learns whether it runs in one process or in many. Reduction, clipping,
accumulation and the optimizer are the engine's; the learning rule is the module that it runs.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from alignscale.choices import AdamConfig, OptimConfig, SGDConfig
from alignscale.rules import Rule
from alignscale.types import Batch, StepOutput


def make_optimizer(config: OptimConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """torch's optimizer of this name; fused, so that an update reads and writes each weight once."""
    if isinstance(config, SGDConfig):
        return torch.optim.SGD(parameters, config.lr, momentum=config.momentum, fused=True)
    if isinstance(config, AdamConfig):
        return torch.optim.Adam(parameters, config.lr, (config.beta1, config.beta2), config.eps, fused=True)
    raise TypeError(f"optim={config.name}: expected an SGDConfig or AdamConfig, found {type(config).__name__}")


class LocalEngine:
    """One process, plain torch."""

    def __init__(self, rule: Rule, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer holds the parameters of ``rule``."""
        self.rule = rule
        self.optimizer = optimizer

    def __call__(self, batch: Batch) -> StepOutput:
        """Run the rule on a batch."""
        output: StepOutput = self.rule(batch)
        return output

    def backward(self, surrogate: Tensor) -> None:
        """Put the update's gradient into the parameters."""
        surrogate.backward()

    def step(self) -> None:
        """Apply the update and forget the gradient."""
        self.optimizer.step()
        self.optimizer.zero_grad()
