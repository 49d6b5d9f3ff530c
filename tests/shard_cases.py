"""Images to make shards of, and the command that does."""

from pathlib import Path

import make_shards
import pytest
from stream_cases import encoded, jpeg, photograph

TOOL = Path(__file__).parents[1] / "tools/make_shards.py"
CLASSES = ["-z", "a..b.c", 'café "x"', "n01440764"]


def content(number: int) -> bytes:
    image = photograph(number)
    match number:
        case 4:
            return encoded(image.convert("CMYK"))
        case 5:
            return encoded(image.convert("L"))
        case 6:
            return encoded(image, "PNG")
        case 7:
            exif = image.getexif()
            exif[274] = 6  # lying on its side
            return encoded(image, exif=exif)
    return jpeg(number)


def plant(root: Path, train: int = 44, val: int = 9) -> Path:
    """ImageNet's layout: photographs, some in unusual forms, in classes with odd names."""
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            path = root / split / CLASSES[number % 4] / f"{number:03}.v1.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content(number))
    return root


def made(root: Path, out: Path, *options: str, status: int = 0) -> dict[str, bytes]:
    """The shards and manifests that the command leaves."""
    command = ["--root", str(root), "--out", str(out), "--shard-size", "10", "--quiet", "--workers", "2", *options]
    assert make_shards.main(command) == status
    return contents(out)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file() and path.stat().st_size}


def refused(capsys: pytest.CaptureFixture[str], root: Path, out: Path, *options: str) -> str:
    made(root, out, *options, status=2)
    return capsys.readouterr().err
