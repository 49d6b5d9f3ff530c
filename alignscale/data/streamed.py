"""What is common to splits that are read while training goes on, in shards or in one file.

It stands alone because neither reader knows of the other, whose packages may be missing.
"""

from abc import ABC

from torch import Tensor

from alignscale.choices import ConfigError, StreamedConfig
from alignscale.data.examples import Split
from alignscale.data.plan import Layout


class Streamed(Split, ABC):
    """Squares of bytes, whose size may depend on the view."""

    config: StreamedConfig

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, size, size), of view 0."""
        return self.shape_in(0)

    def shape_in(self, view: int) -> tuple[int, ...]:
        """Of an example in ``view``."""
        return self.config.channels, *[self.config.pixels(view)] * 2

    @property
    def scale(self) -> float:
        """They are bytes."""
        return 255.0

    @property
    def layout(self) -> Layout:
        """That of the shards: within one, neighbours are mixed block by block, so that a disk reads near places."""
        return Layout(tuple(count for _, count in self.shards), self.config.streams, self.config.block)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Not to be had without reading everything: raises ConfigError."""
        raise ConfigError("data.normalisation=channel: expected imagenet or none with data that is streamed")
