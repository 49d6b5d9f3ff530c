"""Time loaders of ImageNet-like photographs beside bare pipelines of the same work, and training on streamed data.

It makes its own data: JPEGs of 87 kB and 500 x 375 pixels, crops of the photographs that scikit-learn and matplotlib
bundle. In each epoch every loader runs once, in an order that rotates, so that a machine whose speed drifts spoils no
ratio; a row gives the median over epochs, after one to warm up, of the speed and of the ratio to the bare pipeline in
the same epoch. CPU seconds are those of all processes of a loader.

    python tools/bench_loader.py --json loaders.json
    python tools/bench_loader.py --images 2000 --workers 2 --epochs 5
    python tools/bench_loader.py --training
    python tools/bench_loader.py --memory 20
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _loaders.data import make_data
from _loaders.loaders import BARE, LOADERS, Setting, rounds
from argument_types import ended, new_file, positive, write_json

from alignscale.choices import ConfigError

TARGETS = {
    "webdataset": 0.97, "webdataset, checksums": 0.95, "ffcv": 0.97,
}  # fmt: skip
"""The least ratio to the bare pipeline that is asked for."""

RATIOS = (
    ("ratio_to_bare", None, 0), ("cpu_ratio_to_bare", None, 1),
    ("ratio_to_imagefolder", "imagefolder", 0), ("cpu_ratio_to_imagefolder", "imagefolder", 1),
)  # fmt: skip
"""Name, the other loader (None: the bare one), and whether of seconds (0) or CPU seconds, steady on a busy machine."""


def rows(setting: Setting, names: list[str], epochs: int) -> list[dict[str, Any]]:
    """Speed and ratio of each loader, medians over epochs."""
    measured = rounds(setting, names, epochs)
    result = []
    for name in names:
        row: dict[str, Any] = {
            "loader": name,
            "images_per_second": statistics.median(setting.images / wall for wall, _ in measured[name]),
            "images_per_cpu_second": statistics.median(setting.images / cpu for _, cpu in measured[name]),
        }
        for key, other, which in RATIOS:
            row[key] = None
            if (other or BARE[name]) in measured:
                pairs = zip(measured[name], measured[other or BARE[name]], strict=True)
                row[key] = statistics.median(theirs[which] / ours[which] for ours, theirs in pairs)
        result.append({**row, "target": TARGETS.get(name)})
    return result


def table(found: list[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    heads = ("/ bare", "by CPU", "target", "/ folder", "by CPU")
    lines = [f"{'loader':24s} {'images/s':>9s} {'/ CPU s':>8s} " + " ".join(f"{head:>8s}" for head in heads)]
    for row in found:
        keys = [key for key, _, _ in RATIOS]
        ratios = [row[key] for key in (*keys[:2], "target", *keys[2:])]
        lines.append(
            f"{row['loader']:24s} {row['images_per_second']:9.0f} {row['images_per_cpu_second']:8.0f} "
            + " ".join(f"{'-' if ratio is None else f'{ratio:.3f}':>8s}" for ratio in ratios)
        )
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    arguments = parse()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as held:
        folder = arguments.data or Path(held)
        make_data(folder, arguments.images, "ffcv" in " ".join(arguments.loaders))
        setting = Setting(folder, arguments.images, arguments.workers, arguments.batch)
        if arguments.training:
            from _loaders.training import training

            found["training"] = training(setting, arguments.epochs)
            print("training on streamed / on synthetic data: {ratio:.3f} of its images/s".format(**found["training"]))
        elif arguments.memory:
            from _loaders.training import memory

            names = [name for name in ("webdataset", "ffcv") if name in arguments.loaders]
            if not names:
                raise ConfigError("--loaders: expected webdataset or ffcv with --memory, found neither")
            found["memory"] = {name: memory(setting, name, arguments.memory) for name in names}
            for name, sizes in found["memory"].items():
                print(f"{name}: MB of 2 ranks and their workers after each epoch:", *(f"{one:.0f}" for one in sizes))
        else:
            found["loaders"] = rows(setting, arguments.loaders, arguments.epochs)
            print(f"{arguments.images} images, {arguments.workers} workers, medians of {arguments.epochs} epochs")
            print(table(found["loaders"]))
    write_json(arguments.json, found)
    return 0


def parse(command: list[str] | None = None) -> argparse.Namespace:
    """The command line; every wrong value is refused with the valid ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loaders", type=_names, default=list(LOADERS), help="some of: " + "; ".join(LOADERS))
    parser.add_argument("--images", type=positive, default=1000)
    parser.add_argument("--workers", type=positive, default=2)
    parser.add_argument("--batch", type=positive, default=100)
    parser.add_argument("--epochs", type=positive, default=5, help="measured, after one to warm up")
    parser.add_argument("--training", action="store_true", help="time training with one worker instead")
    parser.add_argument(
        "--memory", type=positive, default=0, metavar="EPOCHS", help="memory of training over so many epochs instead"
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="keep the images there; by default removed again")
    parser.add_argument("--json", type=new_file, metavar="FILE")
    return parser.parse_args(command)


def _names(text: str) -> list[str]:
    found = [name.strip() for name in text.split(";")]
    wrong = [name for name in found if name not in LOADERS]
    if wrong:
        raise argparse.ArgumentTypeError(f"expected some of {'; '.join(LOADERS)}, found {wrong[0]!r}")
    return found


if __name__ == "__main__":
    ended(main)
