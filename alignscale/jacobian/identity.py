"""What a cache belongs to: the initial network, the examples as it reads them, and the form.

It stands alone because a cache of anything else must be refused, with the difference, before any work.
"""

import hashlib
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from alignscale.config import TrainConfig, as_dict, defining, difference
from alignscale.data.examples import Encoding
from alignscale.files import staged, write_atomic
from alignscale.jacobian.files import CacheError
from alignscale.jacobian.form import Form

FORMAT = 1
TRANSFORM = ("shift", "flip", "size", "resize", "scale", "channels", "transform")
"""Options of the data that change an example's pixels."""
MANIFEST, NORMS = "manifest.json", "norms.safetensors"
MADE = "make it: python tools/cache_jacobian.py with the same options, or jacobian.build=true"
"""What to do where a cache or a part of it is missing."""


Moments = dict[str, Tensor]
"""The statistics of calibrated norms, by name; none for other norms."""


def file_of(shard: str, view: int) -> str:
    """The name of the cache file of a data shard in a view."""
    return f"{quote(shard, safe='')}.view{view}.safetensors"


def folder_of(config: TrainConfig, inputs: bool) -> Path:
    """Where the cache for a run is: ``jacobian.dir``, or ``jacobian.root`` and a name that follows from the options.

    inputs: whether the rule reads the layers' inputs too.
    """
    options = config.jacobian
    if options.dir:
        return staged(options.dir)
    data = {name: value for name, value in defining(config)["data"].items() if name != "views"}
    about = [as_dict(config.net), data, config.seed, config.precision, options.name, options.layers, options.dtype]
    about += [options.inputs if inputs else None, as_dict(config.calibration) if config.net.norm == "calibrated" else 0]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
    name = f"{config.data.name}-{config.net.name}-w{config.net.width}-s{config.seed}-{options.name}-{digest}"
    return Path(options.root).expanduser() / name


def identity(config: TrainConfig, fingerprint: str, encoding: Encoding, shapes: dict[str, Any]) -> dict[str, Any]:
    """All that the rows of a cache depend on but the examples themselves and the form.

    shapes: of the net's layers and sites, for who reads the manifest.
    """
    data = as_dict(config.data)
    affine = [part.flatten().tolist() for part in encoding.affine] if encoding.affine else None
    return {
        "format": FORMAT, "fingerprint": fingerprint, "seed": config.seed, "net": as_dict(config.net), **shapes,
        "precision": config.precision,
        "transform": {"affine": affine, **{name: data[name] for name in TRANSFORM if name in data}},
    }  # fmt: skip


def claimed(folder: Path, about: dict[str, Any], form: Form, moments: Moments) -> None:
    """Make the folder and its manifest where there are none. Raises CacheError if it belongs to something else."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).exists():
        found = checked(folder, about, moments)
        if found != form:
            raise CacheError(f"{folder}: expected a cache in the form {form}, found {found}; use another jacobian.dir")
        return
    strange = [path.name for path in folder.iterdir() if not path.name.startswith((".", "width-", NORMS))]
    if strange:
        raise CacheError(
            f"{folder}: expected a new folder or a cache's, found {', '.join(sorted(strange)[:3])} and no {MANIFEST}; "
            "choose another jacobian.dir"
        )
    if moments:
        write_atomic(folder / NORMS, save(moments))
    manifest = {**about, "form": as_dict(form)}
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def checked(folder: Path, about: dict[str, Any], moments: Moments) -> Form:
    """The form of the cache in ``folder``.

    Raises CacheError if there is none, or if it is another network's, transform's or precision's, with the difference.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise CacheError(f"{folder}: expected a cache of the initial network's Jacobian, found none; {MADE}")
    try:
        manifest = json.loads(path.read_text())
        form = manifest.pop("form")
        found = Form(tuple(form["sites"]), form["dtype"], form["inputs"], form["gathered"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise CacheError(
            f"{path}: expected a cache's manifest, found: {problem}; delete {folder}, and {MADE}"
        ) from None
    changed = difference(manifest, json.loads(json.dumps(about)))
    if changed:
        raise CacheError(
            f"{folder}: the cache was made for another initial network, transform or precision than this run's: "
            f"{'; '.join(changed)}. Use the old options, or another jacobian.dir, and {MADE}"
        )
    if moments and not _agree(folder / NORMS, moments):
        raise CacheError(
            f"{folder / NORMS}: expected the norm statistics of this run's initial network, found others: the cache "
            f"was made with other examples or calibration options. Use those, or another jacobian.dir, and {MADE}"
        )
    return found


def _agree(path: Path, moments: Moments) -> bool:
    """Whether statistics are the same but for what other threads round otherwise."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError):
        return False
    return found.keys() == moments.keys() and all(
        torch.allclose(found[name], one, rtol=1e-5, atol=1e-6) for name, one in moments.items()
    )


def seal(about: dict[str, Any], form: Form) -> str:
    """What ties a file to its cache: a digest of all that the manifest says."""
    return hashlib.sha256(json.dumps([about, as_dict(form)], sort_keys=True).encode()).hexdigest()[:16]
