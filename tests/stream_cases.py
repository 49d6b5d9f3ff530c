"""Small shards of crops of real photographs, written with tarfile, and a web server that misbehaves as it is told."""

import functools
import io
import re
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import matplotlib.cbook
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from alignscale.choices import DataConfig, MSEConfig, WebDatasetConfig
from alignscale.data import load
from alignscale.data.examples import Encoding, Split, stream
from alignscale.data.manifest import Manifest, Samples, Shard
from alignscale.data.plan import Plan
from alignscale.distributed import Ranks
from alignscale.evaluate import ALONE
from alignscale.loss import make_loss
from alignscale.types import Batch

CLASSES = ("china", "flower", "hopper")


@functools.cache
def photographs() -> list[NDArray[np.uint8]]:
    """Three photographs, one a class: (H, W, 3)."""
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        hopper = np.asarray(Image.open(file).convert("RGB"))
    return [*load_sample_images().images, hopper]


@functools.cache
def photograph(number: int) -> Image.Image:
    """A crop of the photograph of class ``number`` mod 3."""
    whole = photographs()[number % 3]
    dice = np.random.default_rng(number)
    height, width = dice.integers(40, 90, 2).tolist()
    top, left = dice.integers(0, whole.shape[0] - height), dice.integers(0, whole.shape[1] - width)
    return Image.fromarray(whole[top : top + height, left : left + width])


@functools.cache
def jpeg(number: int) -> bytes:
    return encoded(photograph(number))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write(
    folder: Path, split: str, counts: Sequence[int], content: Callable[[int], bytes] = jpeg,
    label: Callable[[int], int] = lambda number: number % 3, key: str = "n{:04}",
    others: Sequence[tarfile.TarInfo] = (),
) -> str:  # fmt: skip
    """Shards of so many examples each, and their manifest; the pattern of their names. others: members besides."""
    shards, parts, number = [], [], 0
    for index, count in enumerate(counts):
        path, rows = folder / f"{split}-{index:03}.tar", []
        with tarfile.open(path, "w") as tar:
            for member in others:
                tar.addfile(member)
            for _ in range(count):
                for ending, value in (("cls", str(label(number)).encode()), ("jpg", content(number))):
                    member = tarfile.TarInfo(f"{key.format(number)}.{ending}")
                    member.size = len(value)
                    place = tar.offset + tarfile.BLOCKSIZE
                    tar.addfile(member, io.BytesIO(value))
                rows.append((key.format(number), label(number), place, len(value), zlib.crc32(value)))
                number += 1
        shards.append(Shard(path.name, path.stat().st_size, count))
        parts.append(Samples.of(rows))
    Manifest(split, CLASSES, shards, Samples.joined(parts)).write(folder / f"{split}.manifest.json")
    return f"{folder}/{split}-{{000..{len(counts) - 1:03}}}.tar"


def config(folder: Path | str, counts: Sequence[int] = (13, 1, 9), **options: Any) -> WebDatasetConfig:
    """Of training shards with so many examples and a test shard of 7, written where there are none."""
    if isinstance(folder, Path) and not (folder / "train.manifest.json").exists():
        write(folder, "train", counts)
        write(folder, "test", [7])
    given = {
        "urls": f"{folder}/train-{{000..{len(counts) - 1:03}}}.tar", "test_urls": f"{folder}/test-000.tar", "size": 24,
        "resize": 28, "streams": 3, "block": 4, "retries": 2, "timeout": 5.0,
    } | options  # fmt: skip
    return WebDatasetConfig(**given)


class Faults:
    """What the server does wrong. Each fault is a pattern of paths, and how often it comes to pass."""

    def __init__(self) -> None:
        self.moved = "?"  # a folder that all has been moved out of
        self.ranges, self.left, self.asked = True, dict[str, tuple[str, int]](), list[tuple[str, str | None]]()

    def add(self, kind: str, pattern: str, times: int = 10**9) -> None:
        self.left[kind] = pattern, times

    def comes(self, kind: str, path: str) -> bool:
        pattern, times = self.left.get(kind, ("", 0))
        if times == 0 or not re.search(pattern, path):
            return False
        self.left[kind] = pattern, times - 1
        return True


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, Faults]]:
    """The files of a folder by HTTP with Range, and what is to go wrong with them."""
    faults = Faults()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path, span = folder / self.path.lstrip("/"), self.headers["Range"]
            faults.asked.append((self.path, span))
            if self.path.startswith(faults.moved):
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix(faults.moved.rstrip("/")))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if not path.exists() or faults.comes("missing", self.path):
                self.send_error(404)
                return
            if faults.comes("refused", self.path):
                self.send_error(503)
                return
            content, total = bytearray(path.read_bytes()), path.stat().st_size
            first, last = 0, total - 1
            if span and faults.ranges:
                begin, _, end = span.removeprefix("bytes=").partition("-")
                first, last = int(begin), min(int(end or last), last)
            part = content[first : last + 1]
            if len(part) > 1 and faults.comes("flipped", self.path):
                part[len(part) // 2] ^= 1
            self.send_response(206 if span and faults.ranges else 200)
            self.send_header("Content-Length", str(len(part)))
            if span and faults.ranges:
                self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
            self.end_headers()
            if len(part) > 1 and faults.comes("slow", self.path):
                time.sleep(1.5)
            if len(part) > 1 and faults.comes("dropped", self.path):
                self.wfile.write(part[: len(part) // 2])
                self.close_connection = True
                return
            self.wfile.write(part)

        def log_message(self, *_: object) -> None:
            """Nothing."""

        def handle(self) -> None:
            with suppress(ConnectionError, TimeoutError):  # the client has had enough
                super().handle()

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{web.server_port}", faults
    finally:
        web.shutdown()
        thread.join()
        web.server_close()


ALL = {"start": 0, "stop": 5}


def cached(folder: Path) -> list[str]:
    return sorted(path.name[13:] for path in folder.glob("*.tar"))


def encoding(data: DataConfig, train: Split) -> Encoding:
    return Encoding(make_loss(MSEConfig()), torch.float32, torch.float32, torch.device("cpu")).of(data, train)


def batches(data: Any, start: int = 0, stop: int = 10, ranks: Ranks = ALONE, parts: int = 1) -> list[list[Batch]]:
    train = load(data)["train"]
    plan = Plan(len(train), 5, 0, train.layout)
    found = stream(train, plan, encoding(data, train), start, stop, parts, data.views, ranks.part)
    return [made for _, made in found]


def same(ours: list[list[Batch]], theirs: list[list[Batch]]) -> bool:
    flat, other = ([part for step in steps for part in step] for steps in (ours, theirs))
    return len(flat) == len(other) and all(
        a.keys == b.keys and (a.view, a.step, a.size) == (b.view, b.step, b.size) and torch.equal(a.images, b.images)
        for a, b in zip(flat, other, strict=True)
    )
