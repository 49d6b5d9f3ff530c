"""alignscale trains wide neural networks without backpropagation through their current weights.

The names below are the library. ``Learner`` is loaded when it is first used, so that a launcher that only reads a
configuration does not wait for torch. A whole run with its folder is ``alignscale.train.train``.
"""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from alignscale.learner import Learner

__all__ = [
    "AdamConfig", "ConfigError", "ConvConfig", "CrossEntropyConfig", "Learner", "MLPConfig", "MSEConfig", "RNNConfig",
    "SGDConfig", "TrainConfig",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name != "Learner":
        raise AttributeError(f"module alignscale has no attribute {name!r}: expected one of {', '.join(__all__)}")
    from alignscale.learner import Learner

    return Learner


def __dir__() -> list[str]:
    return [*globals(), "Learner"]
