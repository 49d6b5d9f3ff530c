"""Checkpoints in safetensors and JSON: written whole or not at all, verified when read.

A checkpoint is a folder ``step-<update>`` with the weights, the optimizer's state and a manifest of checksums. The
initial network is not in it: it comes from the seed, before a restore, and the manifest's fingerprint must match it.
Beside the checkpoints the file ``latest`` names the one written last, for scripts; ``find`` looks at the folders.
"""

import collections
import errno
import hashlib
import inspect
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialized
from torch import Tensor

from alignscale.analysis.finite import all_finite
from alignscale.config import refuse_difference
from alignscale.distributed import ALONE, Ranks
from alignscale.files import sync, write_atomic

FORMAT = 3
MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message says why and what to do."""


Tensors = Mapping[str, Mapping[str, Tensor]]
"""What a checkpoint holds: ``model``, whose names are the network's, and ``optimizer``, ``<weight>.<state>``."""
Makers = Mapping[str, Mapping[str, Callable[[], Tensor]]]
"""The same before it is in memory. All ranks call, in order: each call makes a tensor as it is now, on the first rank
whole; it may be the live one."""


def save(folder: Path, step: int, tensors: Makers, about: dict[str, Any], keep: int, ranks: Ranks = ALONE) -> None:
    """Write ``folder/step-<step>`` and then remove all but the newest ``keep`` and the best; called by all ranks.

    about: goes into the manifest: ``fingerprint``, ``config`` (the defining options), ``examples`` (digests of the
    splits), ``made_with`` and ``progress``, whose ``best`` is the step of the best checkpoint.
    Raises OSError (a full disk, say) or FloatingPointError on all ranks, with the checkpoints before it untouched.
    """
    final, problem = folder / _name(step), None
    partial = final.with_name(f".{final.name}.partial")
    coming = _made(tensors, ranks)
    try:
        if ranks.first:
            problem = _write(partial, tensors, coming)
        collections.deque(coming, maxlen=0)  # the other ranks are under way to the last one
        ranks.of_first(lambda: _complete(partial, final, {"format": FORMAT, "step": step, **about}, keep, problem))
    except BaseException as error:
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(final)
        raise


def _made(tensors: Makers, ranks: Ranks) -> Generator[Tensor, None, None]:
    for makers in tensors.values():
        for make in makers.values():
            ranks.still()
            yield make()


def _write(
    partial: Path, parts: Mapping[str, Collection[str]], coming: Generator[Tensor, None, None]
) -> Exception | None:
    """What went wrong in writing the tensors that come. Raises what went wrong in making them."""
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for part, names in parts.items():
            _write_tensors(partial / f"{part}.safetensors", names, coming)
    except Exception as error:
        if inspect.getgeneratorstate(coming) == inspect.GEN_CLOSED:  # which other ranks do not wait for
            raise
        return error.with_traceback(None)  # whose frames hold a tensor
    return None


def _write_tensors(path: Path, names: Collection[str], coming: Iterator[Tensor]) -> None:
    """A safetensors file of the next tensors that come, of which one at a time is in memory.

    How large they are shows when they come, so the header goes into a room that is kept for it. A reader maps the
    file, so no type may come after one of fewer bytes. Raises OSError where the disk gives back other bytes.
    """
    room = 8 * (1 + sum(len(json.dumps(name)) // 8 + 25 for name in names))
    about, end, written = {}, 0, hashlib.sha256()
    with path.open("wb") as file:
        file.seek(8 + room)
        for name in names:
            own = next(coming).detach().cpu().contiguous()
            begin, end = end, end + own.nbytes
            if path.stem == "model" and not all_finite([own]):
                raise FloatingPointError(f"{path}: expected finite numbers, found others in {name}")
            kind = json.loads(serialized({name: own.flatten()[:0]})[8:])[name]["dtype"]
            about[name] = {"dtype": kind, "shape": [*own.shape], "data_offsets": [begin, end]}
            content = own.flatten().view(torch.uint8).numpy().data
            file.write(content)
            written.update(content)
            del own, content  # before the next one comes
        file.seek(0)
        file.write(struct.pack("<Q", room) + json.dumps(about).encode().ljust(room))
    sync(path)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what is read comes from the disk
        file.seek(8 + room)
        if hashlib.file_digest(file, "sha256").digest() != written.digest():
            raise OSError(errno.EIO, "expected to read back the bytes that were written, found others", str(path))


def _complete(partial: Path, final: Path, about: dict[str, Any], keep: int, problem: Exception | None) -> None:
    """Make what was written a checkpoint, and take old ones away; or raise the problem that there was."""
    if problem is not None:
        raise problem
    paths = sorted(partial.iterdir())
    for path in paths:
        load_file(path)  # maps it, if it is as it should be
    manifest = sealed({**about, "files": {path.name: _checksum(path) for path in paths}})
    write_atomic(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    sync(final.parent)
    note_latest(final)
    for old in complete(final.parent)[:-keep]:
        if old.name != _name(about["progress"]["best"]):
            _remove(old)


def amend(path: Path, progress: dict[str, Any]) -> None:
    """Give a checkpoint, whose tensors stay, another ``progress``, at once. Raises OSError with it as it was."""
    manifest = sealed({**read_manifest(path), "progress": progress})
    write_atomic(path / MANIFEST, json.dumps(manifest, indent=1).encode())


def note_latest(path: Path) -> None:
    """Have ``latest`` beside the checkpoint name it, as it does unless a process was killed before it could."""
    latest = path.with_name("latest")
    if not latest.is_file() or latest.read_bytes() != path.name.encode():
        write_atomic(latest, path.name.encode())


def _name(step: int | None) -> str:
    return f"step-{step:09d}" if step is not None else ""


def _remove(path: Path) -> None:
    """Take a checkpoint away under another name first: half of one must never look whole.

    What cannot go yet, as files that are read may on a network's disk, goes with the next start of the run.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    path.rename(partial)
    shutil.rmtree(partial, ignore_errors=True)


def complete(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first; half-written ones have another name and are not among them."""
    found = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{9,}", path.name))
    return sorted((path for path in found if (path / MANIFEST).is_file()), key=lambda path: int(path.name[5:]))


def find(folder: Path, which: str) -> Path:
    """The checkpoint ``last``, ``best`` or of a step in ``folder``. Raises CheckpointError if there is none."""
    found = complete(folder)
    if which == "last" and found:
        return found[-1]
    step = read_manifest(found[-1])["progress"]["best"] if which == "best" and found else which
    path = folder / _name(int(step) if str(step).isdecimal() else None)
    if path not in found:
        names = ", ".join(str(int(path.name[5:])) for path in found) or "none"
        if which == "best" and step is None and found:
            raise CheckpointError(f"checkpoint best: expected an evaluation before {found[-1]}, found none; use last")
        raise CheckpointError(f"checkpoint {which}: expected last, best or one of the steps in {folder}: {names}")
    return path


def verified(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a checkpoint of the run that ``about`` identifies.

    Raises CheckpointError for another initial network, ConfigError, with the difference, for other options or data.
    """
    manifest = read_manifest(path)
    before, now = ({"examples": one["examples"], **one["config"]} for one in (manifest, about))
    refuse_difference(path, before, now, "options or data")
    if manifest["fingerprint"] != about["fingerprint"]:
        raise CheckpointError(
            f"{path}: expected the initial network {about['fingerprint']}, found {manifest['fingerprint']}: "
            "the checkpoint belongs to another seed, architecture or generator version; use the version that wrote it, "
            "or resume=never"
        )
    return manifest


def read(path: Path, manifest: dict[str, Any], part: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint's ``part``: model or optimizer. Raises CheckpointError for a damaged file."""
    name = f"{part}.safetensors"
    expected = manifest["files"][name]
    found = _checksum(path / name) if (path / name).is_file() else "no file"
    if found != expected:
        raise CheckpointError(
            f"{path / name}: expected SHA-256 {expected[:12]}, found {found[:12]}: the file is damaged; "
            f"delete {path} to go on from the checkpoint before it, or use resume=never"
        )
    return load_file(path / name)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises CheckpointError if it is not one of this format."""
    try:
        manifest: Any = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as problem:
        raise CheckpointError(
            f"{path / MANIFEST}: expected a checkpoint's manifest: {problem}; delete {path}"
        ) from problem
    found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
    if found != FORMAT:
        remedy = f"use the version of alignscale that wrote it, or delete {path}"
        raise CheckpointError(f"{path}: expected checkpoint format {FORMAT}, found {found}; {remedy}")
    if sealed(manifest) != manifest or _name(manifest["step"]) != path.name:
        raise CheckpointError(
            f"{path / MANIFEST}: expected the manifest as it was written for {path.name}, found another, changed "
            f"or moved; delete {path} to go on from the checkpoint before it, or use resume=never"
        )
    return manifest


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the checksum of all else in it."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return {**rest, "sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
