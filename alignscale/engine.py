"""Engines: what turns a rule's output into an update of the weights.

Three calls: ``engine(batch)``, ``backward``, ``step``.

They stand alone so that the loop never learns whether it runs in one process or in many. Reduction, clipping,
accumulation and the optimizer are the engine's; the learning rule is the module that it runs.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from alignscale.choices import AdamConfig, ConfigError, OptimConfig, SGDConfig
from alignscale.rules import Rule
from alignscale.types import Batch, StepOutput

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def make_optimizer(config: OptimConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """torch's optimizer of this name; fused, so that an update reads and writes each weight once.

    Weight decay towards the initial weights is not the optimizer's, which knows none.
    """
    decay = config.weight_decay if config.decay_towards == "zero" else 0.0
    if isinstance(config, SGDConfig):
        return torch.optim.SGD(parameters, config.lr, config.momentum, 0, decay, config.nesterov, fused=True)
    if isinstance(config, AdamConfig):
        betas = (config.beta1, config.beta2)
        return OPTIMIZERS[config.name](parameters, config.lr, betas, config.eps, decay, fused=True)
    raise ConfigError(f"optim={config.name}: expected an SGDConfig or AdamConfig, found {type(config).__name__}")


class LocalEngine:
    """One process, plain torch."""

    def __init__(
        self,
        rule: Rule,
        optimizer: torch.optim.Optimizer,
        config: OptimConfig | None = None,
        initial: Sequence[Tensor | None] = (),
    ) -> None:
        """The optimizer holds the parameters of ``rule``.

        config: clips and decays as it says. initial: of each parameter, for a decay towards it; None stands for 0.
        """
        self.rule = rule
        self.optimizer = optimizer
        self.parameters = list(rule.parameters())
        self.clip_norm = config.clip_norm if config else 0.0
        self.decay = config.weight_decay if config and config.decay_towards == "initial" else 0.0
        self.decoupled = config is not None and config.name == "adamw"
        self.initial = initial

    def __call__(self, batch: Batch) -> StepOutput:
        """Run the rule on a batch."""
        return self.rule(batch)

    def backward(self, surrogate: Tensor) -> None:
        """Add the update's gradient to that of the parameters."""
        surrogate.backward()

    def step(self, lr: float | None = None) -> None:
        """Apply the update, with learning rate ``lr`` if one is given, and forget the gradient."""
        if lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        if self.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        if self.decay:
            self._decay()
        self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Forget the gradient without an update."""
        self.optimizer.zero_grad()

    @torch.no_grad()
    def _decay(self) -> None:
        """Pull towards the initial weights as torch's optimizers pull towards 0: decoupled for AdamW."""
        rate = -self.optimizer.param_groups[0]["lr"] * self.decay if self.decoupled else self.decay
        for parameter, start in zip(self.parameters, self.initial, strict=True):
            if parameter.grad is None:
                continue
            target = parameter if self.decoupled else parameter.grad
            target.add_(parameter if start is None else parameter - start, alpha=rate)
