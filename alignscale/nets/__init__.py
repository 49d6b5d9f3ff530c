"""Networks: built by name from their configuration."""

from alignscale.choices import ConfigError, ConvConfig, MLPConfig, NetConfig, RNNConfig
from alignscale.nets.layered import conv, mlp
from alignscale.nets.network import Network
from alignscale.nets.rnn import RNN
from alignscale.parallel import ALL_UNITS, Width

__all__ = ["Network", "build"]


def build(config: NetConfig, shape: tuple[int, ...], classes: int, batch: int = 0, width: Width = ALL_UNITS) -> Network:
    """The network of ``config`` for examples of ``shape``, (C, H, W) or (T, F), with ``classes`` logits; weights are 0.

    batch: rows of a recurrent network's trained initial state. width: the ranks over which its units are shared out.
    Raises ConfigError where net and data do not match.
    """
    if isinstance(config, RNNConfig):
        steps, features = (shape[1], shape[0] * shape[2]) if len(shape) == 3 else shape
        return RNN(config, steps, features, classes, batch, width)
    if isinstance(config, ConvConfig):
        if len(shape) != 3:
            raise ConfigError(f"net={config.name}: expected images (C, H, W), found examples of shape {shape}")
        return conv(config, shape, classes, width)
    if isinstance(config, MLPConfig):
        return mlp(config, shape, classes, width)
    found = type(config).__name__
    raise ConfigError(f"net={config.name}: expected an MLPConfig, ConvConfig or RNNConfig, found {found}")
