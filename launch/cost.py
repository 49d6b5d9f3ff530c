"""What training on ImageNet would cost: python launch/cost.py experiment=imagenet_modern.

FLOPs are counted layer by layer from the network that the options describe; nothing is read and nothing is trained.
"""

import math

import torch
from _hydra import entry

from alignscale.choices import ConfigError, StreamedConfig
from alignscale.config import TrainConfig
from alignscale.conflicts import growth_conflicts, jacobian_conflicts
from alignscale.nets import build
from alignscale.nets.layers import Conv, State
from alignscale.validation import check_values

IMAGES, CLASSES = 1_281_167, 1000
"""ImageNet's training set."""
PASSES = {"direct_feedback_alignment": 2, "readout_only": 1}
"""Forward passes that a step costs where it is not 3: forward, pullback, weight gradients."""
KEPT = {"gates": 3, "explicit": 2}
"""Those of an Align rule where a cache has this of the initial network; 4 with a pass of the initial network live."""
PEAK = {"fp32": 66.9e12, "fp16": 989e12, "bf16": 989e12, "fp64": 66.9e12}
"""Dense FLOP/s of an H100 SXM, from its data sheet."""
UTILISATION = 0.4
"""Of the peak: an assumption, to be replaced by a measurement."""


def forward_flops(config: TrainConfig, size: int, channels: int) -> int:
    """Of one image: two for each multiplication and addition of a layer."""
    with torch.device("meta"):
        net = build(config.net, (channels, size, size), CLASSES, 1)
    steps = net.shapes[0][0] if net.recurrent else 1
    last = steps if getattr(config.net, "readout", "last") == "every" else 1
    found = 0
    for index, layer in enumerate(net.layers):
        places = math.prod(layer.outputs[1:]) if isinstance(layer, Conv) else last if index == net.readout else steps
        found += 0 if isinstance(layer, State) else 2 * math.prod(layer.shape) * places
    return found


def passes(config: TrainConfig) -> int:
    """How many forward passes' work a step has. Raises ConfigError for ``jacobian=auto``, which a machine decides."""
    if config.rule.name not in ("align_ada", "align_zero"):
        return PASSES.get(config.rule.name, 3)
    kind = config.jacobian.name
    if kind == "auto":
        raise ConfigError("jacobian=auto: expected live, gates or explicit; tools/cache_jacobian.py --plan chooses")
    again = config.rule.name == "align_zero" and kind != "live" and config.jacobian.inputs == "recomputed"
    return KEPT.get(kind, 4) + again


def cost(config: TrainConfig) -> dict[str, float]:
    """FLOPs an image and in all, images a second that keep one GPU busy, hours on 1 and on 8.

    Those of an image are the mean over the epochs, whose images may grow.
    """
    data = config.data
    sizes = [data.pixels(epoch + 1) if isinstance(data, StreamedConfig) else 224 for epoch in range(config.epochs)]
    forward = sum(forward_flops(config, size, 3) * sizes.count(size) for size in set(sizes)) / config.epochs
    step = forward * passes(config)
    total = step * IMAGES * config.epochs
    rate = UTILISATION * PEAK[config.precision] / step
    hours = IMAGES * config.epochs / rate / 3600
    return {"forward": forward, "step": step, "total": total, "rate": rate, "hours_1": hours, "hours_8": hours / 8}


@entry("train")
def main(config: TrainConfig) -> None:
    """Print the cost as a row of a table."""
    check_values(config)
    growth = growth_conflicts(config, config.data) if isinstance(config.data, StreamedConfig) else ()
    for conflict in (*growth, *jacobian_conflicts(config)):
        raise ConfigError(conflict)
    found = cost(config)
    print("| run | GFLOP forward | GFLOP a step | EFLOP in all | images/s, 1 GPU | 8 GPUs | hours, 1 GPU | 8 GPUs |")
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {config.name}, {config.rule.name}, {config.precision} | {found['forward'] / 1e9:.2f} "
        f"| {found['step'] / 1e9:.1f} | {found['total'] / 1e18:.1f} | {found['rate']:.0f} | {8 * found['rate']:.0f} "
        f"| {found['hours_1']:.1f} | {found['hours_8']:.1f} |"
    )


if __name__ == "__main__":
    main()
