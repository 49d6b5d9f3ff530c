"""The parts of a configuration chosen by name, as dataclasses: rule, net, data, loss, optimizer, schedule, engine.

The data sets are in choices_data.py. Stands alone (no torch) beside config.py, whose TrainConfig has one of each. Hydra
composes these classes in ``launch/``; library users construct them directly.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from alignscale.choices_data import DATA as DATA
from alignscale.choices_data import AddConfig as AddConfig
from alignscale.choices_data import ArchiveConfig as ArchiveConfig
from alignscale.choices_data import DataConfig as DataConfig
from alignscale.choices_data import DigitsConfig as DigitsConfig
from alignscale.choices_data import FFCVConfig as FFCVConfig
from alignscale.choices_data import ImageFolderConfig as ImageFolderConfig
from alignscale.choices_data import StreamedConfig as StreamedConfig
from alignscale.choices_data import SyntheticConfig as SyntheticConfig
from alignscale.choices_data import WebDatasetConfig as WebDatasetConfig


class ConfigError(ValueError):
    """A user's option is wrong; the message names the option, the value found and the valid values."""


@dataclass
class RuleConfig:
    """A learning rule by name. A rule with options of its own subclasses this in its own file."""

    name: str


@dataclass
class NetConfig:
    """Options that every network has; ``gain`` multiplies the weights of each layer that reads an activation.

    ``gain`` is 1 in the public code of the paper, where a batch norm follows every layer. Without a norm relu wants
    sqrt(2), or a deep network's signal halves at each layer. ``blocks`` says where the blocks end that the Align rules
    take from the initial network: ``theory`` (at every pre-activation) or ``public`` (as the paper's public code).
    """

    name: str
    width: int
    activation: str = "relu"
    norm: str = "none"
    parameterisation: str = "ntk"
    gain: float = 1.0
    blocks: str = "theory"


@dataclass
class MLPConfig(NetConfig):
    """``depth`` hidden layers of ``width`` units on the flattened image."""

    name: str = "mlp"
    width: int = 512
    depth: int = 3
    gain: float = math.sqrt(2.0)


@dataclass
class ConvConfig(NetConfig):
    """3x3 convolutions, one per stride, SAME padding, then the mean over the map and a linear readout."""

    name: str = "conv"
    width: int = 128
    norm: str = "batch"
    strides: list[int] = field(default_factory=lambda: [1, 2, 2])


@dataclass
class RNNConfig(NetConfig):
    """A recurrent network that reads an image row by row, or a sequence step by step; gain 1, or the state grows.

    ``readout``: ``last`` (logits after the last step) or ``every`` (at each step). ``initial_state``: ``zero`` or
    ``trained`` (one trained row per place in the batch, as the paper's public code; needs full batches).
    """

    name: str = "rnn"
    width: int = 128
    readout: str = "last"
    initial_state: str = "zero"


NETS: dict[str, NetConfig] = {
    "mlp": MLPConfig(),
    "conv3": ConvConfig(name="conv3", strides=[1, 2, 2]),
    "conv7": ConvConfig(name="conv7", strides=[1, 1, 1, 2, 1, 2, 1]),
    "imagenet_conv7": ConvConfig(name="imagenet_conv7", width=512, strides=[4, 2, 1, 2, 1, 2, 1]),
    "rnn": RNNConfig(),
}


@dataclass
class LossConfig:
    """A loss by name, a mean over examples."""

    name: str


@dataclass
class MSEConfig(LossConfig):
    """(logits - target)^2, ``mean`` or ``sum`` over classes; ``centred``: one-hot targets minus 1 / classes."""

    name: str = "mse"
    centred: bool = True
    reduction: str = "mean"


@dataclass
class CrossEntropyConfig(LossConfig):
    """Of softmax(logits) with the labels, of which ``label_smoothing`` is spread evenly over all classes."""

    name: str = "cross_entropy"
    label_smoothing: float = 0.0


LOSSES: dict[str, LossConfig] = {"mse": MSEConfig(), "cross_entropy": CrossEntropyConfig()}


@dataclass
class OptimConfig:
    """An optimizer of torch by name; all of its options are torch's but for two.

    ``decay_towards``: ``zero``, or ``initial``: weight decay pulls every weight and bias towards its initial value.
    ``clip_norm``: gradients together are scaled down to this norm at most; 0 does not clip.
    """

    name: str
    lr: float
    weight_decay: float = 0.0
    decay_towards: str = "zero"
    clip_norm: float = 0.0


@dataclass
class SGDConfig(OptimConfig):
    """Gradient descent; in the NTK parameterisation good rates are of order 1, whatever the width."""

    name: str = "sgd"
    lr: float = 1.0
    momentum: float = 0.0
    nesterov: bool = False


@dataclass
class AdamConfig(OptimConfig):
    """Adam: every weight moves by about ``lr`` a step, so it wants ``net.parameterisation=standard`` or a low rate.

    Its weight decay is a part of the gradient, and that of ``adamw`` (Loshchilov & Hutter 2019) is not.
    """

    name: str = "adam"
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


OPTIMS: dict[str, OptimConfig] = {
    "sgd": SGDConfig(),
    "adam": AdamConfig(),
    "adamw": AdamConfig(name="adamw", weight_decay=0.01),
}


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


@dataclass
class EngineConfig:
    """What runs a step: ``local`` (one process), or ``auto``: deepspeed under torchrun, else local."""

    name: str = "auto"


@dataclass
class LocalConfig(EngineConfig):
    """One process. ``cuda_graph``: a GPU's step is recorded and replayed, which saves the time to start its kernels."""

    name: str = "local"
    cuda_graph: bool = True


@dataclass
class DeepSpeedConfig(EngineConfig):
    """DeepSpeed on any number of ranks.

    ``zero_stage``: what is partitioned over them: nothing (0), the optimizer (1), gradients too (2), weights too (3).
    ``offload``: keep the optimizer's state in host memory. ``reduce_dtype``: in what gradients are summed over ranks:
    fp32, bf16, or auto, which is bf16 where layers compute in it. ``extra``: DeepSpeed's own settings, which go before
    ours. ``timeout``: seconds after which a rank that waits for another one gives up.
    """

    name: str = "deepspeed"
    zero_stage: int = 1
    offload: bool = False
    reduce_dtype: str = "auto"
    timeout: float = 1800.0
    extra: dict[str, Any] = field(default_factory=dict)

    def reduces_in_bf16(self, computes: bool) -> bool:
        """Whether gradients are summed in bf16; ``computes``: whether layers compute in it."""
        return self.reduce_dtype == "bf16" or (self.reduce_dtype == "auto" and computes)


ENGINES: dict[str, EngineConfig] = {
    "auto": EngineConfig(),
    "local": LocalConfig(),
    "deepspeed": DeepSpeedConfig(),
}
