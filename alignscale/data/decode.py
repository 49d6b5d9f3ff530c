"""The bytes of an image file -> pixels of a view of it.

It stands alone because what a network sees is decided here: by the bytes, the view's crop and nothing else. The pixels
are taken as the file has them: EXIF rotation is not applied, as in the loaders that ImageNet's published accuracies
come from. Grey images become colour, CMYK and whatever else is no plain JPEG (a PNG named .JPEG, say) go through PIL.
"""

import io
import warnings
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image

from alignscale.choices import ConfigError
from alignscale.data.torchvision import transforms

Pixels = NDArray[np.uint8]
JPEG = b"\xff\xd8\xff"


def decode(content: bytes, channels: int) -> Pixels:
    """(H, W, channels), RGB or grey. Raises ValueError for what is no whole image of at most 8 bits a channel."""
    if content.startswith(JPEG):
        try:
            return simplejpeg.decode_jpeg(content, "RGB" if channels == 3 else "GRAY")
        except ValueError:  # CMYK, or a flaw that may be harmless
            pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of EXIF data and the like, which nothing here looks at
            with Image.open(io.BytesIO(content)) as image:
                if image.mode[0] in "IF":
                    raise ValueError(f"grey pixels of more than 8 bits, PIL's mode {image.mode}")
                return np.asarray(image.convert("RGB" if channels == 3 else "L")).reshape(image.height, image.width, -1)
    except MemoryError:
        raise
    except Exception as problem:  # a damaged image may raise anything
        raise ValueError(" ".join(str(problem).split())) from problem


def scaled(pixels: Pixels, size: int) -> Pixels:
    """To (size, size, channels): the mean of the pixels that fall together, or bilinear where it grows."""
    shrinks = min(pixels.shape[:2]) > size
    resized = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return np.asarray(resized, np.uint8).reshape(size, size, -1)


def transform_called(name: str) -> Callable[[Pixels, int], Pixels]:
    """torchvision's transform of that name with its defaults, on pixels and a seed. Raises ConfigError for another."""
    found = transforms()
    kind: Any = getattr(found, name, None)
    try:
        apply, image = kind(), torch.zeros(3, 8, 8, dtype=torch.uint8)
        for _ in range(20):  # some change an image at times
            made = apply(image)
            if (made.shape, made.dtype) != (image.shape, image.dtype):
                raise ValueError(f"{made.dtype} of {tuple(made.shape)} for {image.dtype} of {tuple(image.shape)}")
    except Exception as problem:  # another one may need arguments, boxes or anything
        some = "TrivialAugmentWide, RandAugment, AutoAugment, AugMix or RandomErasing"
        raise ConfigError(
            f"data.transform={name}: expected the name of a class in torchvision.transforms.v2 that needs no arguments "
            f"and makes images of the same size and type, as {some}, found: {' '.join(str(problem).split())[:120]}"
        ) from None

    def applied(pixels: Pixels, seed: int) -> Pixels:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the transform is a function of the example and the view
            image = apply(torch.from_numpy(pixels).permute(2, 0, 1))
        return np.asarray(image.permute(1, 2, 0).numpy())

    return applied
