"""Photographs like ImageNet's, as a folder, as shards and as an FFCV file, made from what other packages bundle."""

import contextlib
import io
from pathlib import Path

import make_shards
import matplotlib.cbook
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

BYTES = 87_000
"""Of a JPEG, about."""
CLASSES = 4


def make_data(folder: Path, images: int, ffcv: bool) -> None:
    """train/ and val/ in ImageNet's layout in ``folder``/tree, shards and FFCV files of them in ``folder``."""
    if not (folder / "tree/val").exists():
        hopper = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
        whole = [*load_sample_images().images, np.asarray(Image.open(str(hopper)).convert("RGB"))]
        for split, count in (("train", images), ("val", CLASSES)):
            for number in range(count):
                path = folder / "tree" / split / f"class{number % CLASSES}" / f"{number:06}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(photograph(whole[number % len(whole)], number))
    command = ["--root", str(folder / "tree"), "--out", str(folder), "--shard-size", "250", "--quiet"]
    with contextlib.redirect_stdout(io.StringIO()):
        if make_shards.main([*command, *(["--ffcv"] if ffcv else [])]):
            raise RuntimeError(f"{folder}: the shards could not be made")


def photograph(whole: NDArray[np.uint8], number: int) -> bytes:
    """A crop as a JPEG of 500 x 375 pixels whose quality gives it the size."""
    dice = np.random.default_rng(number)
    part = dice.uniform(0.6, 0.95)
    height, width = (int(side * part) for side in whole.shape[:2])
    top, left = dice.integers(0, whole.shape[0] - height), dice.integers(0, whole.shape[1] - width)
    image = Image.fromarray(whole[top : top + height, left : left + width]).resize((500, 375))
    content = b""
    for quality in (75, 85, 90, 93, 95, 97):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        content = file.getvalue()
        if len(content) > BYTES:
            break
    return content
