"""Checkpoints in safetensors and JSON: written whole or not at all, verified when read.

A checkpoint is a folder ``step-<update>`` with the weights, the optimizer's state and a manifest of checksums. The
initial network is not in it: it comes from the seed, before a restore, and the manifest's fingerprint must match it.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignscale.config import refuse_difference
from alignscale.files import sync, write_atomic

FORMAT = 2
MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message says why and what to do."""


def save(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], about: dict[str, Any], keep: int) -> Path:
    """Write ``folder/step-<step>`` and then remove all but the newest ``keep`` and the best.

    tensors: of each file, ``model`` and ``optimizer``. about: goes into the manifest: ``fingerprint``, ``config`` (the
    defining options), ``examples`` (digests of the splits), ``made_with`` and ``progress``, whose ``best`` is the step
    of the best checkpoint.
    Raises OSError (a full disk, say) with the checkpoints before it untouched.
    """
    final = folder / _name(step)
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        sums = {}
        for name, values in tensors.items():
            path = partial / f"{name}.safetensors"
            try:
                save_file({key: value.detach().contiguous().cpu() for key, value in values.items()}, path)
            except SafetensorError as problem:
                raise OSError(f"{path}: {problem}") from problem
            sums[path.name] = _checksum(path)
            sync(path)
        manifest = sealed({"format": FORMAT, "step": step, "files": sums, **about})
        write_atomic(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(folder)
    for old in complete(folder)[:-keep]:
        if old.name != _name(about["progress"]["best"]):
            _remove(old)
    return final


def _name(step: int | None) -> str:
    return f"step-{step:09d}" if step is not None else ""


def _remove(path: Path) -> None:
    """Take a checkpoint away under another name first: half of one must never look whole."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    path.rename(partial)
    shutil.rmtree(partial)


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
        raise CheckpointError(f"{path}: expected checkpoint format {FORMAT}, found {found}; delete {path}")
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
