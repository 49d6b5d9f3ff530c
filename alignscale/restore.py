"""A run's network as it was at one of its checkpoints, for tools that look at it.

Stands alone beside ``prepare``, which goes on training from the newest one.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from alignscale import checkpoint
from alignscale.checkpoint import CheckpointError
from alignscale.choices import ENGINES
from alignscale.config import AnalysisConfig, LogConfig, TrainConfig
from alignscale.data import Split, load
from alignscale.environment import device_called
from alignscale.folder import read_config
from alignscale.learner import Learner
from alignscale.moments import load_moments
from alignscale.parallel import Mesh
from alignscale.prepare import identity, make_learner
from alignscale.rules.dual import COEFFICIENTS
from alignscale.validation import validate


@dataclass(frozen=True)
class Restored:
    """A run's network as it was after update ``step``, with the data that it reads."""

    config: TrainConfig
    splits: dict[str, Split]
    learner: Learner
    step: int


def restored(folder: Path, which: str = "last") -> Restored:
    """What the run in ``folder`` was at its checkpoint ``which``: last, best or a step.

    Raises ConfigError, DataError or CheckpointError where a part of the run is missing or damaged.
    """
    # what another machine had is nothing to refuse
    config = replace(read_config(folder), log=LogConfig(), analysis=AnalysisConfig(), threads=0)
    validate(config)
    path = checkpoint.find(folder / "checkpoints", which)
    splits = load(config.data)
    primal = replace(config, form="primal")  # whose weights a checkpoint of the dual form has too
    learner = make_learner(primal, splits["train"], device_called("auto"), ENGINES["local"], Mesh())
    if config.net.norm == "calibrated":
        load_moments(folder / "norms.safetensors", learner)
    manifest = checkpoint.verified(path, identity(config, splits, learner))
    model = checkpoint.read(path, manifest, "model")
    model.pop(COEFFICIENTS, None)
    try:
        learner.net.load_state_dict(model)
    except RuntimeError as problem:
        raise CheckpointError(
            f"{path}: expected the layers of this run's network, found others: {' '.join(str(problem).split())}; put "
            "the checkpoint's own files back, or train again with resume=never"
        ) from problem
    return Restored(config, splits, learner, manifest["step"])
