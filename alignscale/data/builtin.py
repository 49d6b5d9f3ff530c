"""Data sets that need no files: real digits that come with a library, and noisy prototypes of any shape."""

import math

import numpy as np
import torch

from alignscale.choices import AddConfig, ConfigError, DigitsConfig, SyntheticConfig
from alignscale.data.examples import Examples
from alignscale.environment import available_memory
from alignscale.initial import Stream, normal

TRAIN = 1437


def digits(config: DigitsConfig) -> tuple[Examples, Examples]:
    """scikit-learn's handwritten digits (Alpaydin & Kaynak 1998): 1797 real images of 8x8, pixels in [0, 1].

    1437 are for training and 360 for testing; the split is fixed and no run's seed changes it.
    """
    from sklearn.datasets import load_digits  # slow to import, and only this data set needs it

    data = load_digits()
    images = torch.from_numpy(data.images / 16).float()[:, None]
    labels = torch.from_numpy(data.target).long()
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(labels)))  # a stream that numpy never changes
    images, labels = images[order], labels[order]
    return _cut(images, labels, TRAIN, 10, "digits")


def synthetic(config: SyntheticConfig) -> tuple[Examples, Examples]:
    """Image = prototype of its class + noise, all standard normal times 1 or ``config.noise``; labels go round.

    For benchmarks, and for trying a network out before its real data is there.
    """
    shape = tuple(config.shape)
    needed, found = 8 * (config.train + config.test) * math.prod(shape), available_memory(torch.device("cpu"))
    if needed > found:
        raise ConfigError(
            f"data.shape={config.shape}, data.train={config.train}, data.test={config.test}: they take "
            f"{needed / 2**30:.1f} GiB, found {found / 2**30:.1f} GiB of available memory; choose smaller ones"
        )
    prototypes = normal(config.seed, Stream.DATA, 0, (config.classes, *shape))
    labels = torch.arange(config.train + config.test) % config.classes
    noise = normal(config.seed, Stream.DATA, 1, (len(labels), *shape))
    images = prototypes[labels] + config.noise * noise
    return _cut(images, labels, config.train, config.classes, "synthetic")


def add(config: AddConfig) -> tuple[Examples, Examples]:
    """Sequences (N, 1, T, 1) of bits; labels (N, T, 1) are the targets themselves."""
    bits = (normal(config.seed, Stream.DATA, 2, (config.train + config.test, config.steps)) > 0).float()
    first, second = (_delayed(bits, delay, config.public) for delay in config.delays)
    targets = 0.5 + 0.5 * first - 0.25 * second
    return _cut(bits[:, None, :, None], targets[:, :, None], config.train, 1, "add")


def _cut(images: torch.Tensor, labels: torch.Tensor, train: int, classes: int, name: str) -> tuple[Examples, Examples]:
    """The first ``train`` examples for training, the rest for testing."""
    return (
        Examples.whole(images[:train], labels[:train], classes, f"{name}-train"),
        Examples.whole(images[train:], labels[train:], classes, f"{name}-test"),
    )


def _delayed(bits: torch.Tensor, delay: int, public: bool) -> torch.Tensor:
    """(N, T) as it was ``delay`` steps before, 0 before the first step; ``public`` zeroes examples instead."""
    moved = bits.roll(delay, 1)
    (moved if public else moved.T)[:delay] = 0
    return moved
