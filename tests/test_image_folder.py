"""Claims about folders of images."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_cases import (
    error_of,
    image_files,
    write_image_folder,
)
from PIL import Image

from alignscale.choices import ConfigError, ImageFolderConfig
from alignscale.data import load
from alignscale.data.examples import Examples
from alignscale.data.image_folder import decode
from alignscale.data.torchvision import datasets


@pytest.mark.parametrize(("height", "width"), [(20, 30), (30, 20), (8, 8), (5, 4), (33, 8)])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_scaled_and_cropped_as_by_torchvision(
    height: int, width: int, channels: int, tmp_path: Path
) -> None:
    datasets()
    from torchvision.transforms import functional

    write_image_folder(tmp_path, size=(height, width))
    read = folder(tmp_path, channels=channels)["train"]
    assert (read.shape, len(read), read.classes, read.shard) == ((channels, 8, 8), 15, 3, "imagefolder-train")
    for image, path in zip(read.images, image_files(tmp_path, "train"), strict=True):
        theirs = functional.resize(Image.open(path).convert("RGB" if channels == 3 else "L"), 8)
        assert torch.equal(image, functional.pil_to_tensor(functional.center_crop(theirs, 8)))


def test_images_of_the_right_size_keep_their_pixels(tmp_path: Path) -> None:
    written = write_image_folder(tmp_path, size=(8, 8))
    read = folder(tmp_path)
    for split, (images, labels) in written.items():
        assert torch.equal(read[split].images, torch.from_numpy(images).permute(0, 3, 1, 2))
        assert read[split].labels.tolist() == labels


def test_images_are_turned_as_their_exif_says(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(3 * 64, dtype=np.uint8).reshape(8, 8, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: a quarter turn to the right makes it so again
    image.save(tmp_path / "turned.png", exif=exif)
    turned = decode((tmp_path / "turned.png").read_bytes(), 8, 3)
    assert np.array_equal(turned, np.rot90(np.asarray(image), -1).transpose(2, 0, 1))


def test_a_palette_with_transparency_is_read(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("P")
    image.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    assert np.array_equal(decode((tmp_path / "palette.png").read_bytes(), 8, 1)[0], np.asarray(image.convert("L")))


def test_val_stands_in_for_test(tmp_path: Path) -> None:
    write_image_folder(tmp_path, names="train val")
    assert folder(tmp_path)["test"].shard == "imagefolder-val"
    write_image_folder(tmp_path, names="test")
    assert folder(tmp_path)["test"].shard == "imagefolder-test"


def test_one_class_alone_is_named(tmp_path: Path) -> None:
    write_image_folder(tmp_path, classes=1)
    assert f"{tmp_path / 'train'}: expected at least two class folders, found " in error_of(lambda: folder(tmp_path))


def test_missing_folders_are_named(tmp_path: Path) -> None:
    assert f"expected a folder {tmp_path / 'train'}, found none" in error_of(lambda: folder(tmp_path))
    write_image_folder(tmp_path, names="train")
    assert f"{tmp_path / 'test'} or {tmp_path / 'val'}, found none" in error_of(lambda: folder(tmp_path))
    (tmp_path / "val").mkdir()
    assert f"{tmp_path / 'val'}: expected a folder for each class" in error_of(lambda: folder(tmp_path))


def test_classes_of_one_split_alone_are_named(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    (tmp_path / "test/class2").rename(tmp_path / "test/cats")
    error = error_of(lambda: folder(tmp_path))
    assert f"only in {tmp_path / 'train'}: class2; only in {tmp_path / 'test'}: cats; arrange" in error


def test_an_empty_class_is_named_before_anything_is_decoded(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    (tmp_path / "train/class0/000.png").write_text("not an image")
    for path in (tmp_path / "test/class1").iterdir():
        path.rename(path.with_suffix(".txt"))
    assert f"{tmp_path / 'test'}: expected a readable image in each class folder" in error_of(lambda: folder(tmp_path))


def damage(path: Path, how: str) -> None:
    if how == "cut off":
        path.write_bytes(path.read_bytes()[:-200])
    elif how == "16 bits":
        Image.fromarray(np.full((9, 9), 300, np.uint16)).save(path)
    else:
        path.write_text(how)


@pytest.mark.parametrize("how", ["cut off", "16 bits", "", "not an image"])
def test_a_file_without_an_image_is_named_or_left_out(how: str, tmp_path: Path) -> None:
    write_image_folder(tmp_path, per_class=50, size=(9, 10))  # three tasks of the thread pool
    whole = folder(tmp_path)["train"]
    places = [3, 70, 149]
    for place in places:
        damage(list(image_files(tmp_path, "train"))[place], how)
    error = error_of(lambda: folder(tmp_path))
    assert error.startswith(
        f"{tmp_path / 'train/class0/003.png'}: expected an image, found a file that cannot be decoded"
    )
    assert " at 0x" not in error
    assert "data.skip_undecodable=true" in error
    read = folder(tmp_path, skip_undecodable=True)
    kept = torch.tensor([place for place in range(150) if place not in places])
    assert read["train"].digest == whole.part(kept).digest
    assert (read["train"].skipped, read["train"].part(kept[:2]).skipped, read["test"].skipped) == (3, 3, 0)


def test_a_class_that_loses_its_last_image_is_named(tmp_path: Path) -> None:
    write_image_folder(tmp_path, per_class=2)
    for name in ("000.png", "001.png"):
        (tmp_path / "train/class1" / name).write_text("not an image")
    assert "found none in class1; add images" in error_of(lambda: folder(tmp_path, skip_undecodable=True))


def test_a_file_that_cannot_be_opened_is_never_left_out(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    (tmp_path / "train/class0/000.png").unlink()
    (tmp_path / "train/class0/000.png").symlink_to("nowhere.png")
    error = error_of(lambda: folder(tmp_path, skip_undecodable=True))
    assert "class0/000.png: expected a readable file, found: No such file" in error


def test_what_cannot_fit_the_memory_is_refused_before_decoding(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    error = error_of(lambda: folder(tmp_path, size=10**6), ConfigError)
    most = int(re.search(r"data.size=1000000: expected at most (\d+), so that 30 images fit", error)[1])  # type: ignore[index]
    assert 0 < 30 * 3 * most**2 < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def folder(root: Path, **options: Any) -> dict[str, Examples]:
    return load(ImageFolderConfig(**{"root": str(root), "size": 8} | options))
