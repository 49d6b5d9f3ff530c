"""Views: deterministic augmentations, each a function of an example's row and the view's number alone.

They stand alone because a cached Jacobian belongs to a view of an example: it must be the same in every epoch, run and
process that asks for it.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from alignscale.initial import Stream, philox


@dataclass(frozen=True)
class Moves:
    """At most ``shift`` pixels up, down, left or right, and with ``flip`` mirrored in half of the cases."""

    shift: int
    flip: bool

    def of(self, rows: Tensor, view: int, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Down (B,), right (B,) and mirrored (B,) of the examples at ``places`` of those with ``rows`` (N,)."""
        down, right, mirrored = _draws(self, rows, view)
        return down[places], right[places], mirrored[places]


@functools.lru_cache(maxsize=2)
def _draws(moves: Moves, rows: Tensor, view: int) -> tuple[Tensor, Tensor, Tensor]:
    """Those of all examples: drawn once a view, as a draw for one batch costs as much as for all."""
    words = philox((rows, view, 0, int(Stream.VIEW)), 0)
    down, right = (word % (2 * moves.shift + 1) - moves.shift for word in words[:2])
    return down, right, (words[2] % 2 == 1) & moves.flip


def moved(images: Tensor, down: Tensor, right: Tensor, mirrored: Tensor) -> Tensor:
    """Images (B, C, H, W), each mirrored and moved as the (B,) tensors say; pixels from outside are 0."""
    _, _, height, width = images.shape
    y = torch.arange(height) - down[:, None]
    x = torch.arange(width) - right[:, None]
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    x = torch.where(mirrored[:, None], width - 1 - x, x)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    example = torch.arange(len(images))[:, None, None]
    picked = images[example, :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
    return (picked * inside[:, None]).contiguous()
