"""The moments of calibrated norms: computed once, kept in a file, and the same on all ranks.

It stands alone because a run and the cache of its Jacobian must have the same ones.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from alignscale.checkpoint import CheckpointError
from alignscale.config import TrainConfig
from alignscale.data import Examples
from alignscale.files import write_atomic
from alignscale.learner import Learner


def calibrated(config: TrainConfig, learner: Learner, train: Examples, folders: list[Path]) -> None:
    """Moments of the norms: computed once in a run's life, then read from its folder, or from that of its cache.

    folders: where they may be; they are kept in the first.
    """
    paths, mesh = [folder / "norms.safetensors" for folder in folders], learner.mesh
    known = mesh.everyone.of_first(lambda: next((path for path in paths if path.exists()), None))
    if known:
        load_moments(known, learner)
    else:
        images = train.images[: config.calibration.examples]
        mesh.everyone.together(lambda: learner.calibrate(images) if mesh.data.first else None)
    if known != paths[0]:
        share = learner.net.width.share(learner.net.units_axis)
        whole = {name: mesh.whole(buffer, share).cpu() for name, buffer in _moments(learner).items()}
        mesh.everyone.of_first(lambda: _write_norms(paths[0], whole))
    load_moments(paths[0], learner)


def _write_norms(path: Path, moments: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save(moments))


def _moments(learner: Learner) -> dict[str, torch.Tensor]:
    return torch.nn.ModuleList(learner.net.norms).state_dict()


def load_moments(path: Path, learner: Learner) -> None:
    """Set the norms of all ranks from the file, which the first one reads."""
    mesh, share = learner.mesh, learner.net.width.share(learner.net.units_axis)
    moments = _moments(learner)
    shapes = {name: one.shape if share is None else share.whole(one.shape) for name, one in moments.items()}

    def read() -> dict[str, torch.Tensor]:
        found = load_file(path)
        if {name: tuple(one.shape) for name, one in found.items()} != {name: (*one,) for name, one in shapes.items()}:
            raise RuntimeError("moments of another network's")
        return found

    try:
        found = mesh.everyone.together(lambda: read() if mesh.everyone.first else {})
    except (OSError, SafetensorError, RuntimeError) as problem:
        raise CheckpointError(
            f"{path}: expected the moments of this network's norms, found: {problem}; put the file "
            "back, or train again with resume=never"
        ) from problem
    for name, one in moments.items():
        one.copy_(mesh.part(found.get(name), share, one))
