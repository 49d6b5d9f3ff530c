"""The moments of calibrated norms: computed once, kept in a file, and the same on all ranks.

It stands alone because a run and the cache of its Jacobian must have the same ones.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from alignscale.checkpoint import CheckpointError
from alignscale.config import TrainConfig
from alignscale.data import Split
from alignscale.data.examples import Wanted
from alignscale.data.plan import even_batches
from alignscale.files import write_atomic
from alignscale.frozen import CALIBRATION_CHUNK
from alignscale.learner import Learner


def calibrated(config: TrainConfig, learner: Learner, train: Split, path: Path | None) -> None:
    """Moments of the norms: computed once in a run's life, then read from ``path``, in its folder; None: computed."""
    mesh = learner.mesh
    if path is not None and mesh.everyone.of_first(path.exists):
        load_moments(path, learner)
        return
    computes = mesh.data.first or config.frozen.weights == "partitioned"  # each rank has a part of the weights
    images = mesh.everyone.together(lambda: _images(config, learner, train) if computes else None)
    mesh.everyone.together(lambda: None if images is None else learner.calibrate_on(images))
    whole = {name: mesh.whole(buffer, learner.net.share).cpu() for name, buffer in _moments(learner).items()}
    if path is not None:
        mesh.everyone.of_first(lambda: write_atomic(path, save(whole)))
    _set(learner, whole if mesh.everyone.first else {})


def _images(config: TrainConfig, learner: Learner, train: Split) -> torch.Tensor:
    parts = even_batches(config.calibration.examples, CALIBRATION_CHUNK)
    wanted = (Wanted(torch.arange(part.start, part.stop), 0, part.stop - part.start) for part in parts)
    batches = train.batches(wanted, learner.encoding)
    return torch.cat([batch.images for batch in batches])


def _set(learner: Learner, whole: dict[str, torch.Tensor]) -> None:
    """Each rank's part of the moments, which the first one has."""
    for name, one in _moments(learner).items():
        one.copy_(learner.mesh.part(whole.get(name), learner.net.share, one))


def _moments(learner: Learner) -> dict[str, torch.Tensor]:
    return torch.nn.ModuleList(learner.net.norms).state_dict()


def load_moments(path: Path, learner: Learner) -> None:
    """Set the norms of all ranks from the file, which the first one reads."""
    mesh, share = learner.mesh, learner.net.share
    moments = _moments(learner)
    shapes = {name: one.shape if share is None else share.whole(one.shape) for name, one in moments.items()}

    def read() -> dict[str, torch.Tensor]:
        try:
            found = load_file(path)
            if {name: (*one.shape,) for name, one in found.items()} != {name: (*one,) for name, one in shapes.items()}:
                raise RuntimeError("moments of another network's")
        except (OSError, SafetensorError, RuntimeError) as problem:
            raise CheckpointError(
                f"{path}: expected the moments of this network's norms, found: {problem}; put the file "
                "back, or train again with resume=never"
            ) from problem
        return found

    _set(learner, mesh.everyone.together(lambda: read() if mesh.everyone.first else {}))
