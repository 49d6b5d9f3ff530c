"""Turn images into WebDataset tar shards with a manifest, and into FFCV files.

What is killed and run again keeps the shards that are whole and ends with the same bytes.

    python tools/make_shards.py --root imagenet --out shards
    python tools/make_shards.py --root imagenet --out shards --resize 512 --quality 90 --ffcv
    python tools/make_shards.py --source cifar10 --root data --out shards/cifar10 --splits train,test
    python tools/make_shards.py --index 'https://host/a/train-{000000..000146}.tar' --out manifests
"""

import argparse
import fcntl
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from _shards.sources import SOURCES, check_split, source
from _shards.tars import Settings, make
from argument_types import ended

from alignscale.choices import ConfigError
from alignscale.data.examples import DataError


def main(command: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = parse(command)
    try:
        if arguments.index:
            _index(arguments)
        else:
            _make(arguments)
    except (ConfigError, DataError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except OSError as problem:
        print(
            f"error: {problem.filename}: {problem.strerror}; nothing half written is left: free space or mend it, then "
            "give the same command",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on, and keeps the shards that are whole", file=sys.stderr)
        return 130
    return 0


def _index(arguments: argparse.Namespace) -> None:
    from _shards.index import index

    path = index(arguments.index, arguments.out, arguments.classes, arguments.workers, not arguments.quiet)
    print(f"written: {path}")


def _make(arguments: argparse.Namespace) -> None:
    if arguments.out is None:
        raise ConfigError("--out: expected a folder for the shards, found none")
    if arguments.no_verify and arguments.source not in ("cifar10", "kmnist"):
        raise ConfigError(f"--no-verify: expected --source cifar10 or kmnist, found {arguments.source}")
    if arguments.ffcv and importlib.util.find_spec("ffcv") is None:
        raise ConfigError("--ffcv: expected the package, found none; pip install 'alignscale[ffcv]' (docs/shards.md)")
    out: Path = arguments.out.expanduser()
    settings = Settings(arguments.seed, arguments.shard_size, arguments.resize, arguments.quality, arguments.skip)
    out.mkdir(parents=True, exist_ok=True)
    classes = None
    with _alone(out):
        for split in arguments.splits:
            found = source(arguments.source, arguments.root, split, not arguments.no_verify)
            classes = found.classes if classes is None else classes
            if list(found.classes) != list(classes):
                other = ", ".join(sorted(set(found.classes) ^ set(classes))[:3])
                raise DataError(
                    f"{arguments.root}: expected the same class folders in all splits, found in one alone: {other}; "
                    "arrange them as docs/shards.md says"
                )
            manifest = make(found, settings, out, split, arguments.workers, not arguments.quiet)
            print(f"{split}: {len(manifest)} images of {len(manifest.classes)} classes, {len(manifest.shards)} shards")
            if arguments.ffcv:
                from _shards.beton import pack  # an extra

                pack(manifest, out, out / f"{split}.beton", not arguments.quiet)
                print(f"{split}: {out / f'{split}.beton'}")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Raise ConfigError if another process writes shards to the folder."""
    with (out / ".make_shards.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--out {out}: another process makes shards there; wait, or choose another") from None
        yield


def parse(command: list[str] | None = None) -> argparse.Namespace:
    """The command line; every wrong value is refused with the valid ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=SOURCES, default="imagefolder")
    parser.add_argument("--root", default="data", help="where the source is; imagefolder: above train/<class>/*")
    parser.add_argument(
        "--no-verify", action="store_true", help="cifar10, kmnist: take any files, as data.verify=false"
    )
    parser.add_argument("--out", type=Path, help="folder for the shards")
    parser.add_argument("--splits", type=_splits, default=["train", "val"], help="train,val by default; or test")
    parser.add_argument("--ffcv", action="store_true", help="pack <split>.beton from the shards as well")
    parser.add_argument("--shard-size", type=_number(1), default=8716, help="images in a shard at most; ImageNet: 147")
    parser.add_argument("--seed", type=_number(0), default=0, help="of the images' order over the shards")
    parser.add_argument("--resize", type=_number(1), default=0, help="scale down until the shorter side has so many")
    parser.add_argument("--quality", type=_number(1, 100), default=0, help="encode as JPEG anew; 90 with --resize")
    parser.add_argument("--skip", action="store_true", help="leave out, name and count what is not an image")
    parser.add_argument("--index", metavar="URL", help="only write the manifest of shards that are there already")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="with --index: the classes' names, one a line")
    parser.add_argument("--workers", type=_number(0), default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(command)


def _splits(text: str) -> list[str]:
    try:
        return [check_split(name) for name in dict.fromkeys(text.split(","))]
    except ConfigError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None


class _number:
    """A whole number from ``least`` to ``most``, for argparse."""

    def __init__(self, least: int, most: int = 2**31) -> None:
        self.least, self.most = least, most

    def __call__(self, text: str) -> int:
        if not text.isdigit() or not self.least <= int(text) <= self.most:
            raise argparse.ArgumentTypeError(f"expected a whole number, {self.least} to {self.most}, found {text!r}")
        return int(text)


if __name__ == "__main__":
    ended(main)
