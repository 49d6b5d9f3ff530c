"""Data sets by name: training and test examples."""

from alignscale.config import ConfigError, DataConfig, DigitsConfig, SyntheticConfig
from alignscale.data.digits import digits
from alignscale.data.examples import Examples
from alignscale.data.synthetic import synthetic

__all__ = ["Examples", "load"]


def load(config: DataConfig) -> tuple[Examples, Examples]:
    """Training and test examples of the data set that ``config`` names. Raises ConfigError for an unknown one."""
    if isinstance(config, DigitsConfig):
        return digits(config)
    if isinstance(config, SyntheticConfig):
        return synthetic(config)
    raise ConfigError(f"data={config.name}: expected a DigitsConfig or SyntheticConfig, found {type(config).__name__}")
