"""Engines: what turns a rule's output into an update of the weights.

Three calls: ``engine(batch)``, ``backward``, ``step``; and two for checkpoints: ``state``, ``load``.

They stand alone so that the loop never learns whether it runs in one process or in many. Reduction, clipping,
accumulation and the optimizer are the engine's; the learning rule is the module that it runs.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignscale.checkpoint import Coming, Makers, Tensors
from alignscale.choices import AdamConfig, ConfigError, OptimConfig, SGDConfig
from alignscale.engine_graph import StepGraph
from alignscale.environment import gpu_kernels
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


def pull_to_start(optimizer: torch.optim.Optimizer, tensors: Sequence[Tensor], config: OptimConfig) -> None:
    """Before each step, pull ``tensors`` towards what they are now as torch's optimizers pull towards 0."""
    start = {id(tensor): tensor.detach().clone() for tensor in tensors}

    @torch.no_grad()
    def pull(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    decoupled = config.name == "adamw"
                    rate = -group["lr"] * config.weight_decay if decoupled else config.weight_decay
                    target = parameter if decoupled else parameter.grad
                    target.add_(parameter - start[id(parameter)], alpha=rate)

    optimizer.register_step_pre_hook(pull)


class Engine(ABC):
    """Runs a rule, and turns its surrogates into updates."""

    graph: StepGraph | None = None
    bf16_sums = False
    """Whether ranks sum their gradients in bf16."""

    def __init__(self, rule: Rule, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Module: runs the rule. The optimizer holds the rule's parameters, or what stands for them."""
        self.rule, self.module, self.optimizer = rule, module, optimizer
        self.names: dict[Tensor, str] = {one: name.removeprefix("net.") for name, one in rule.named_parameters()}

    @property
    def records(self) -> bool:
        """Whether steps are recorded and replayed."""
        return self.graph is not None and self.rule.replayable

    def __call__(self, batch: Batch) -> StepOutput:
        """Run the rule on a batch, or on this rank's part of it."""
        return self.module(batch)

    @abstractmethod
    def backward(self, surrogate: Tensor, last: bool = True) -> None:
        """Add the update's gradient to that of the parameters; last: of the parts of a batch."""

    @abstractmethod
    def step(self, lr: float | None = None) -> None:
        """Apply the update, with learning rate ``lr`` if one is given, and forget the gradient.

        One that is not finite ruins the weights, or raises FloatingPointError on all ranks.
        """

    def _set_rate(self, lr: float | None) -> None:
        for group in self.optimizer.param_groups if lr is not None else ():
            group["lr"] = lr

    def forget(self) -> None:
        """Forget the gradient without an update."""
        self.optimizer.zero_grad()

    def weight(self, index: int) -> Tensor:
        """The weight (out, ...) of a layer in the precision in which it is updated; called by all ranks."""
        return self.rule.net.current(index)[0].detach()

    @abstractmethod
    def state(self) -> Makers:
        """Weights, norms and the optimizer's state, to be made one after the other; called by all."""

    @abstractmethod
    def load(self, tensors: Tensors) -> None:
        """Set what ``state`` gave on the first rank; called by all."""

    def evaluate(self, batch: Batch) -> StepOutput:
        """The forward pass alone."""
        with self.rule.evaluating():
            return self(batch)


class LocalEngine(Engine):
    """One process, plain torch."""

    def __init__(
        self, rule: Rule, optimizer: torch.optim.Optimizer, config: OptimConfig | None = None, cuda_graph: bool = False
    ) -> None:
        """The optimizer holds the parameters of ``rule``, at their start. config: clips and decays as it says.

        cuda_graph: of weights on a GPU, steps are recorded and replayed; not without our kernels, as torch's own way
        to the random numbers waits for Python.
        """
        super().__init__(rule, rule, optimizer)
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.clip_norm = config.clip_norm if config else 0.0
        if config and config.weight_decay and config.decay_towards == "initial":
            pull_to_start(optimizer, self.parameters, config)
        on_gpu = all(parameter.is_cuda for parameter in self.parameters)
        self.graph = StepGraph(rule, self.parameters) if cuda_graph and on_gpu and gpu_kernels() else None
        self.replayed: Tensor | None = None

    def __call__(self, batch: Batch) -> StepOutput:
        """Run the rule on a batch."""
        if not self.rule.training:
            return super().__call__(batch)
        output = self.graph(batch) if self.graph else None
        self.replayed = None if output is None else output.surrogate
        return super().__call__(batch) if output is None else output

    def backward(self, surrogate: Tensor, last: bool = True) -> None:
        """Add the update's gradient to that of the parameters.

        Raises ValueError for another surrogate than that of the last batch, where its step was replayed.
        """
        if self.graph is None or self.replayed is None:
            surrogate.backward()
            return
        if surrogate is not self.replayed:
            raise ValueError(
                "backward: expected the surrogate of the last batch as it was given, as its step was replayed, found "
                "another; LocalConfig(cuda_graph=False) takes any"
            )
        self.replayed = None
        self.graph.add_gradients()

    def step(self, lr: float | None = None) -> None:
        """Apply the update, with learning rate ``lr`` if one is given, and forget the gradient."""
        self._set_rate(lr)
        if self.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        self.forget()

    def state(self) -> Makers:
        """As they are, not copies."""
        states = [(self.names[parameter], own) for parameter, own in self.optimizer.state.items()]
        pairs = [(f"{name}.{key}", value) for name, own in states for key, value in own.items() if value is not None]
        found = {"model": self.rule.saved().items(), "optimizer": sorted(pairs, key=lambda pair: -pair[1].itemsize)}
        return {part: {name: Coming.at_hand(value) for name, value in own} for part, own in found.items()}

    def load(self, tensors: Tensors) -> None:
        """Set weights, norms and the optimizer's state."""
        self.rule.restore(tensors["model"])
        places = {self.names[parameter]: place for place, parameter in enumerate(self.parameters)}
        state: dict[int, dict[str, Tensor]] = {}
        for found, value in tensors["optimizer"].items():
            name, key = found.rsplit(".", 1)
            parameter = self.parameters[places[name]]
            alike = value.shape == parameter.shape  # then it must lie as the parameter does, for a fused step
            own = torch.empty_like(parameter, dtype=value.dtype) if alike else torch.empty_like(value)
            state.setdefault(places[name], {})[key] = own.copy_(value)  # from the file that it is mapped from
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
