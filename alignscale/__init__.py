"""alignscale trains wide neural networks without backpropagation through their current weights.

The names below are the library. ``Learner`` is loaded when it is first used, so that a launcher that only reads a
configuration does not wait for torch. A whole run with its folder is ``alignscale.train.train``.
"""

from typing import TYPE_CHECKING, Any

from alignscale.choices import AdamConfig as AdamConfig
from alignscale.choices import ConfigError as ConfigError
from alignscale.choices import ConvConfig as ConvConfig
from alignscale.choices import CrossEntropyConfig as CrossEntropyConfig
from alignscale.choices import MLPConfig as MLPConfig
from alignscale.choices import MSEConfig as MSEConfig
from alignscale.choices import RNNConfig as RNNConfig
from alignscale.choices import SGDConfig as SGDConfig
from alignscale.config import TrainConfig as TrainConfig

if TYPE_CHECKING:
    from alignscale.learner import Learner as Learner


def __getattr__(name: str) -> Any:
    if name != "Learner":
        raise AttributeError(f"module alignscale has no attribute {name!r}")
    from alignscale.learner import Learner

    return Learner


def __dir__() -> list[str]:
    return [*globals(), "Learner"]
