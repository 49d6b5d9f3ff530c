"""Data sets by name: training, validation and test examples."""

from importlib import import_module

import torch
from torch import Tensor

from alignscale import choices
from alignscale.choices import ConfigError, DataConfig
from alignscale.data.examples import Examples, Split
from alignscale.initial import Stream, permutation

__all__ = ["Examples", "Split", "load", "split"]

READERS: dict[type[DataConfig], tuple[str, str]] = {
    choices.DigitsConfig: ("builtin", "digits"),
    choices.SyntheticConfig: ("builtin", "synthetic"),
    choices.AddConfig: ("builtin", "add"),
    choices.ArchiveConfig: ("archives", "archive"),
    choices.ImageFolderConfig: ("image_folder", "image_folder"),
    choices.WebDatasetConfig: ("webdataset", "webdataset"),
    choices.FFCVConfig: ("ffcv", "ffcv"),
}
"""Of each class of options, the module and function that read training and test examples; some need an extra."""


def load(config: DataConfig) -> dict[str, Split]:
    """The splits ``train``, ``test`` and perhaps ``validation`` of the data set that ``config`` names.

    Raises ConfigError for an option that does not fit the data, DataError for a file that is missing or damaged.
    """
    return split(config, *_read(config))


def _read(config: DataConfig) -> tuple[Split, Split]:
    if type(config) not in READERS:
        raise ConfigError(f"data={config.name}: expected one of alignscale.choices.DATA, found {type(config).__name__}")
    module, name = READERS[type(config)]
    try:
        return getattr(import_module(f"{__name__}.{module}"), name)(config)
    except ModuleNotFoundError as problem:
        extra = "ffcv" if module == "ffcv" else "stream"
        raise ConfigError(
            f"data={config.name}: expected the package {problem.name}, found none; pip install 'alignscale[{extra}]', "
            "or make setup in a clone"
        ) from problem


def split(config: DataConfig, train: Split, test: Split) -> dict[str, Split]:
    """Hold ``config.validation`` examples out of the training set, cut the rest, and leave the test set whole."""
    if config.validation >= len(train):
        raise ConfigError(f"data.validation={config.validation}: expected less than the {len(train)} training examples")
    if config.shift >= min(train.shape[-2:]):
        raise ConfigError(f"data.shift={config.shift}: expected less than the images' {min(train.shape[-2:])} pixels")
    splits: dict[str, Split] = {"test": test}
    order = balanced_order(train.labels)
    if config.validation:
        held_out = order[: config.validation].sort().values
        splits["validation"] = train.part(held_out, counted=False)  # once, with the training set
        order = order[config.validation :]
    limit = config.train_limit or len(order)
    if limit > len(order):
        raise ConfigError(f"data.train_limit={limit}: expected at most the {len(order)} training examples")
    whole = len(order) == limit == len(train)
    return {"train": train if whole else train.part(order[:limit].sort().values), **splits}


def balanced_order(labels: Tensor) -> Tensor:
    """An order of all examples, always the same, whose every beginning has the classes as equal as they can be."""
    order = permutation(0, Stream.SUBSET, 0, len(labels))
    if labels.is_floating_point():  # targets, which have no classes
        return order
    by_class = order[torch.argsort(labels[order], stable=True)]
    counts = torch.bincount(labels)
    turn = torch.cat([torch.arange(int(count)) for count in counts])  # of an example within its class
    return by_class[torch.argsort(turn, stable=True)]
