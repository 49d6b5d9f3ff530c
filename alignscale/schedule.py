"""The learning rate as a function of the step alone, so that a resumed run has nothing to restore."""

import math

from alignscale.choices import ConfigError, ConstantConfig, CosineConfig, ScheduleConfig, StepConfig


def factor(config: ScheduleConfig, step: int, per_epoch: int, stop: int) -> float:
    """What the learning rate of update ``step`` (from 0 to before ``stop``) is multiplied by.

    per_epoch: updates in an epoch. The warm-up is linear and reaches 1 at its last update.
    """
    warmup = config.warmup * per_epoch
    if step + 1 < warmup:
        return (step + 1) / warmup
    if isinstance(config, ConstantConfig):
        return 1.0
    if isinstance(config, StepConfig):
        return math.prod(config.factor for milestone in config.milestones if step >= milestone * per_epoch)
    if isinstance(config, CosineConfig):
        passed = max(step - warmup, 0) / max(stop - warmup, 1)
        return config.final + (1 - config.final) * (1 + math.cos(math.pi * passed)) / 2
    raise ConfigError(f"schedule={config.name}: expected a class of alignscale.choices, found {type(config).__name__}")
