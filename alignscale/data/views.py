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
    result = torch.zeros_like(images)
    source, target = images.numpy(), result.numpy()  # slices of numpy's cost a tenth of an indexed read
    for place, (y, x, mirror) in enumerate(zip(down.tolist(), right.tolist(), mirrored.tolist(), strict=True)):
        rows, columns = (slice(max(-by, 0), max(size - max(by, 0), 0)) for by, size in ((y, height), (x, width)))
        image = source[place, :, :, ::-1] if mirror else source[place]
        piece = image[:, rows, columns]
        target[place, :, max(y, 0) : max(y, 0) + piece.shape[1], max(x, 0) : max(x, 0) + piece.shape[2]] = piece
    return result


ATTEMPTS = 10
"""Crops that are drawn for an image before its centre is taken, as torchvision's RandomResizedCrop does."""


@dataclass(frozen=True)
class Crops:
    """A part of an image, of ``scale`` of its area and 3/4 to 4/3 as wide as high, and with ``flip`` mirrored.

    View 0 is the central square of ``centre`` of the shorter side.
    """

    scale: tuple[float, float]
    flip: bool
    centre: float

    def of(self, places: Tensor, view: int) -> Tensor:
        """Numbers in [0, 1), float64 (B, ATTEMPTS + 1, 4), by which ``box`` crops; places: of the whole data set."""
        tries = torch.arange(ATTEMPTS + 1)
        words = philox((places[:, None] * 16 + tries, view, 1, int(Stream.VIEW)), 0)
        return torch.stack(words, -1).double() / 2**32

    def box(self, draws: list[list[float]], height: int, width: int, view: int) -> tuple[int, int, int, int, bool]:
        """Top, left, height, width and whether mirrored, of an image of these sizes."""
        if view:
            mirrored = self.flip and draws[ATTEMPTS][0] < 0.5
            low, high = self.scale
            for area, ratio, down, right in draws[:ATTEMPTS]:
                area = height * width * (low + (high - low) * area)
                ratio = (3 / 4) ** (1 - 2 * ratio)
                wide, tall = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
                if 0 < wide <= width and 0 < tall <= height:
                    return int(down * (height - tall + 1)), int(right * (width - wide + 1)), tall, wide, mirrored
            tall, wide = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
            return (height - tall) // 2, (width - wide) // 2, tall, wide, mirrored
        side = max(round(min(height, width) * self.centre), 1)
        return (height - side) // 2, (width - side) // 2, side, side, False
