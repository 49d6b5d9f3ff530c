"""Checkpoints in safetensors and JSON: written whole or not at all, verified when read.

A checkpoint is a folder ``step-<update>`` with the weights, the optimizer's state and a manifest of checksums. The
initial network is not in it: it comes from the seed, before a restore, and the manifest's fingerprint must match it.
Beside the checkpoints the file ``latest`` names the one written last, for scripts; ``find`` looks at the folders.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from alignscale.analysis.finite import all_finite
from alignscale.config import refuse_difference
from alignscale.distributed import ALONE, Ranks
from alignscale.files import sync, write_atomic
from alignscale.tensor_file import TensorFile, checksum

FORMAT = 4
READ = (3, FORMAT)
"""3 has all of a part in one file."""
MANIFEST = "manifest.json"
LEAST = 2**22
"""Bytes for which it is worth it that one more rank writes."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message says why and what to do."""


Tensors = Mapping[str, Mapping[str, Tensor]]
"""What a checkpoint holds: ``model``, whose names are the network's, and ``optimizer``, ``<weight>.<state>``."""


@dataclass(frozen=True)
class Coming:
    """A tensor before it is in memory.

    size: about its bytes, the same on all ranks. make: gives it as it is now, whole on the rank that it is called with;
    all ranks call it, in order. It may be the live one.
    """

    size: int
    make: Callable[[int], Tensor]

    @classmethod
    def at_hand(cls, tensor: Tensor) -> "Coming":
        """One that each rank has whole."""
        return cls(tensor.nbytes, lambda _: tensor.detach())


Makers = Mapping[str, Mapping[str, Coming]]
"""``Tensors`` before they are in memory."""


def save(folder: Path, step: int, tensors: Makers, about: dict[str, Any], keep: int, ranks: Ranks = ALONE) -> None:
    """Write ``folder/step-<step>`` and then remove all but the newest ``keep`` and the best; called by all ranks.

    about: goes into the manifest: ``fingerprint``, ``config`` (the defining options), ``examples`` (digests of the
    splits), ``made_with`` and ``progress``, whose ``best`` is the step of the best checkpoint.
    Raises OSError (a full disk, say) or FloatingPointError on all ranks, with the checkpoints before it untouched.
    """
    final = folder / _name(step)
    partial = final.with_name(ranks.of_first(lambda: _begun(final)))
    try:
        writers = _writers(partial, tensors, ranks)
        suffix = "" if ranks.first else f"-{ranks.rank}"
        with ExitStack() as files, ThreadPoolExecutor(1) as thread:
            paths = {part: partial / f"{part}{suffix}.safetensors" for part in tensors}
            own = {part: files.enter_context(TensorFile(path, tensors[part])) for part, path in paths.items()}
            problem: Future[Exception | None] = thread.submit(lambda: None)
            for to, part, name, coming in _shared_out(tensors, writers):
                ranks.still()
                made = coming.make(to)
                if ranks.rank == to and problem.result() is None:
                    problem = thread.submit(_write, own[part], name, [made])  # while the next one is made
                del made  # before the next one comes
            found = ranks.objects(ranks.together(lambda: _finished(problem.result(), own.values(), ranks.first)))
        checksums = {name: digest for one in found for name, digest in one.items()}
        manifest = sealed({"format": FORMAT, "step": step, **about, "files": checksums})
        ranks.of_first(lambda: _complete(partial, final, manifest, tensors, keep))
    except BaseException as error:
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(final)
        raise


def _begun(final: Path) -> str:
    """The name of the folder, made now, in which a checkpoint is written: no other disk has one of that name."""
    for broken_off in final.parent.glob(f".{final.name}.*.partial"):
        shutil.rmtree(broken_off, ignore_errors=True)
    partial = final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir(parents=True)
    return partial.name


def _writers(partial: Path, tensors: Makers, ranks: Ranks) -> list[int]:
    """The ranks that write a checkpoint together: the first, and others that can write in its folder.

    Not more than one for each ``LEAST`` bytes, and from as many machines as there are.
    """
    can = ranks.objects(ranks.first or os.access(partial, os.R_OK | os.W_OK | os.X_OK))
    seen = [rank for rank, sees in enumerate(can) if sees]
    size = sum(coming.size for named in tensors.values() for coming in named.values())
    return seen[:: -(-len(seen) // max(1, size // LEAST))]


def _shared_out(tensors: Makers, writers: Sequence[int]) -> Iterator[tuple[int, str, str, Coming]]:
    """Each tensor, in order, with the rank that writes it: the one that has the fewest bytes so far."""
    given = dict.fromkeys(writers, 0)
    for part, named in tensors.items():
        for name, coming in named.items():
            to = min(given, key=given.__getitem__)
            given[to] += coming.size
            yield to, part, name, coming


def _write(file: TensorFile, name: str, made: list[Tensor]) -> Exception | None:
    """What went wrong in writing the tensor in ``made``, which nothing holds afterwards."""
    try:
        tensor = made.pop().cpu()
        if file.path.name.startswith("model") and not all_finite([tensor]):
            raise FloatingPointError(f"{file.path}: expected finite numbers, found others in {name}")
        file.add(name, tensor)
    except Exception as error:
        return error.with_traceback(None)  # whose frames hold the tensor
    return None


def _finished(problem: Exception | None, own: Iterable[TensorFile], first: bool) -> dict[str, str]:
    """A rank's files, with their checksums; the first has one of each part. Raises the problem that there was."""
    if problem is not None:
        raise problem
    return {file.path.name: file.finish() for file in own if file.about or first}


def _complete(partial: Path, final: Path, manifest: dict[str, Any], tensors: Makers, keep: int) -> None:
    """Make what was written a checkpoint, and take old ones away. Raises RuntimeError where it is not all there."""
    for part, named in tensors.items():
        found = sorted(name for file in _files(manifest, part) for name in load_file(partial / file))  # maps it
        if found != sorted(named):
            raise RuntimeError(f"{final}: expected each tensor of {part} once, found {found} of {sorted(named)}")
    write_atomic(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    sync(final.parent)
    note_latest(final)
    for old in complete(final.parent)[:-keep]:
        if old.name != _name(manifest["progress"]["best"]):
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


def parts(manifest: Mapping[str, Any]) -> list[str]:
    """What a checkpoint holds: model, optimizer, and more."""
    return sorted(name.removesuffix(".safetensors") for name in manifest["files"] if "-" not in name)


def _files(manifest: Mapping[str, Any], part: str) -> list[str]:
    """Those of all ranks that have written something of ``part``."""
    return [name for name in manifest["files"] if re.fullmatch(rf"{part}(-\d+)?\.safetensors", name)]


def read(path: Path, manifest: dict[str, Any], part: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint's ``part``, of all ranks that wrote it. Raises CheckpointError for a damaged file."""
    expected = {path / name: manifest["files"][name] for name in _files(manifest, part)}
    if not expected:
        raise CheckpointError(f"{path}: expected {part}, found {', '.join(parts(manifest))}; delete {path}")
    with ThreadPoolExecutor() as threads:
        found = threads.map(lambda file: checksum(file) if file.is_file() else "no file", expected)
    for file, digest in zip(expected, found, strict=True):
        if digest != expected[file]:
            raise CheckpointError(
                f"{file}: expected SHA-256 {expected[file][:12]}, found {digest[:12]}: the file is damaged; "
                f"delete {path} to go on from the checkpoint before it, or use resume=never"
            )
    return {name: tensor for file in expected for name, tensor in load_file(file).items()}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises CheckpointError if it is not one of this format."""
    try:
        manifest: Any = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as problem:
        raise CheckpointError(
            f"{path / MANIFEST}: expected a checkpoint's manifest: {problem}; delete {path}"
        ) from problem
    found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
    if found not in READ:
        remedy = f"use the version of alignscale that wrote it, or delete {path}"
        raise CheckpointError(f"{path}: expected checkpoint format {FORMAT} or 3, found {found}; {remedy}")
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
