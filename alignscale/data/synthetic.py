"""Noisy class prototypes of any shape: for benchmarks, and for trying a network out before its real data is there."""

import torch

from alignscale.choices import SyntheticConfig
from alignscale.data.examples import Examples
from alignscale.initial import Stream, normal


def synthetic(config: SyntheticConfig) -> tuple[Examples, Examples]:
    """Image = prototype of its class + noise, all standard normal times 1 or ``config.noise``; labels go round."""
    shape = tuple(config.shape)
    prototypes = normal(config.seed, Stream.DATA, 0, (config.classes, *shape))
    labels = torch.arange(config.train + config.test) % config.classes
    noise = normal(config.seed, Stream.DATA, 1, (len(labels), *shape))
    images = prototypes[labels] + config.noise * noise
    train, test = slice(0, config.train), slice(config.train, None)
    return (
        Examples.whole(images[train], labels[train], config.classes, "synthetic-train"),
        Examples.whole(images[test], labels[test], config.classes, "synthetic-test"),
    )
