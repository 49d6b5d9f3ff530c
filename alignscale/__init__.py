"""alignscale trains wide neural networks without backpropagation through their current weights.

The names below are the library; each is loaded when it is first used, so that a launcher that only reads a
configuration does not wait for torch. A whole run with its folder is ``alignscale.train.train``.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignscale.choices import (
        AdamConfig,
        ConfigError,
        ConvConfig,
        CrossEntropyConfig,
        MLPConfig,
        MSEConfig,
        RNNConfig,
        SGDConfig,
    )
    from alignscale.config import TrainConfig
    from alignscale.learner import Learner

__all__ = [
    "AdamConfig",
    "ConfigError",
    "ConvConfig",
    "CrossEntropyConfig",
    "Learner",
    "MLPConfig",
    "MSEConfig",
    "RNNConfig",
    "SGDConfig",
    "TrainConfig",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module alignscale has no attribute {name!r}: expected one of {', '.join(__all__)}")
    module = {"Learner": "learner", "TrainConfig": "config"}.get(name, "choices")
    return getattr(importlib.import_module(f"alignscale.{module}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
