"""Whether what a step keeps fits a rank's memory, asked before a network is built."""

import math

import torch

from alignscale import environment
from alignscale.choices import AdamConfig, ConfigError, EngineConfig
from alignscale.config import TrainConfig
from alignscale.data import Split
from alignscale.distributed import beside
from alignscale.learner import PRECISIONS
from alignscale.nets import build
from alignscale.parallel import Mesh

CURRENT = ("backprop", "sign_symmetric", "direct_feedback_alignment", "readout_only")  # no initial weight


def check_memory(config: TrainConfig, train: Split, device: torch.device, engine: EngineConfig, mesh: Mesh) -> None:
    """Raise ConfigError where what a step keeps on this rank is more than there is."""
    with torch.device("meta"):
        outline = build(config.net, train.shape, train.classes, config.batch_size, mesh.width)
    dtype, master = PRECISIONS[config.precision]
    states = 2 if isinstance(config.optim, AdamConfig) else int(getattr(config.optim, "momentum", 0) > 0)
    stage, share = getattr(engine, "zero_stage", 0), 1 / mesh.data.size
    parts = 1 if config.rule.name == "feedback_alignment" else share  # whose random weights are not the initial ones
    frozen = 0 if config.rule.name in CURRENT else {"stored": 1, "partitioned": parts}.get(config.frozen.weights, 0)
    weight, gradient = share if stage == 3 else 1, share if stage >= 2 else 1
    weight *= dtype.itemsize / master.itemsize if stage else 1  # of which the optimizer has one in full precision
    pulled = config.optim.weight_decay > 0 and config.optim.decay_towards == "initial"
    optimizer = share * (states + 1 + pulled) if stage else states + pulled
    if getattr(engine, "offload", False) and device.type == "cuda":
        optimizer = 0
    copies = max(1, weight + gradient + optimizer)  # a network is built whole before it is partitioned
    weights = (copies * master.itemsize + frozen * dtype.itemsize) * sum(p.numel() for p in outline.parameters())
    units = sum(math.prod(shape) for shape in outline.direct_shapes)
    outputs = max(-(-config.batch_size // (config.accumulation * mesh.data.size)), 1) * units * dtype.itemsize
    found = environment.available_memory(device) / (beside() if device.type == "cpu" else 1)
    if weights + outputs > found:
        raise ConfigError(
            f"net.width={config.net.width}: weights, gradient, optimizer and initial weights take "
            f"{weights / 2**30:.1f} GiB, the layers' outputs {outputs / 2**30:.1f} GiB, found {found / 2**30:.1f} GiB "
            "of memory available to a rank; choose a smaller width or batch_size, more accumulation, "
            "frozen.weights=regenerated, a higher engine.zero_stage or more ranks (parallel.width shares width out)"
        )
