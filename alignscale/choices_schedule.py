"""The schedules of the learning rate, as choices.py has the other parts of a configuration."""

from dataclasses import dataclass, field


@dataclass
class ScheduleConfig:
    """What ``optim.lr`` is multiplied by, step by step; it first rises from 0 to 1 in ``warmup`` epochs."""

    name: str
    warmup: float = 0.0


@dataclass
class ConstantConfig(ScheduleConfig):
    """1 after the warm-up."""

    name: str = "constant"


@dataclass
class StepConfig(ScheduleConfig):
    """``factor`` once more from each of the epochs ``milestones`` on."""

    name: str = "step"
    milestones: list[float] = field(default_factory=lambda: [5.0, 8.0])
    factor: float = 0.1


@dataclass
class CosineConfig(ScheduleConfig):
    """From 1 after the warm-up down to ``final`` at the end of training, along half a cosine."""

    name: str = "cosine"
    final: float = 0.0


SCHEDULES: dict[str, ScheduleConfig] = {"constant": ConstantConfig(), "step": StepConfig(), "cosine": CosineConfig()}
