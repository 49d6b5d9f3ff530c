"""Options that exclude one another, in words: the part of validation.py that looks at more than one option.

Stands alone (no torch) beside it.
"""

import importlib.util
from collections.abc import Iterator

from alignscale import choices
from alignscale.config import TrainConfig


def conflicts(config: TrainConfig) -> Iterator[str]:
    """Options that exclude one another, in words."""
    data, net, best = config.data, config.net, config.checkpoint.best
    shape = getattr(data, "shape", [0, 0, 0])
    if len(shape) != 3:
        yield f"data.shape={shape}: expected [channels, height, width]"
    if isinstance(data, choices.StreamedConfig):
        yield from _streamed_conflicts(data)
        yield from growth_conflicts(config, data)
    elif data.views == 0:
        yield "data.views=0: expected at least 1; another view in each epoch is for data that is streamed"
    elif (data.shift > 0 or data.flip) != (data.views > 1):
        yield (
            f"data.views={data.views}, data.shift={data.shift}, data.flip={data.flip}: views above 1 differ by shift "
            "or flip, and view 0 has neither; expected both, or neither"
        )
    if isinstance(net, choices.MLPConfig) and net.blocks == "public":
        yield "net.blocks=public: the paper's public code has no mlp; expected theory"
    if getattr(net, "strides", None) == []:
        yield "net.strides=[]: expected at least one stride, one for each convolution"
    yield from jacobian_conflicts(config)
    if config.parallel.width > 1 and (config.log.alignment_every or config.analysis.track_errors):
        yield (
            f"parallel.width={config.parallel.width}: expected 1 with log.alignment_every or analysis.track_errors, "
            "which look at whole layers; tools/alignment.py looks at a checkpoint of a shared network"
        )
    stage = getattr(config.engine, "zero_stage", 1)
    if config.parallel.overlap and (config.parallel.width == 1 or net.norm == "batch" or stage == 3):
        yield (
            "parallel.overlap=true: expected parallel.width above 1, net.norm=none or calibrated and engine.zero_stage "
            f"below 3, found {config.parallel.width}, {net.norm} and {stage}; leave it false"
        )
    if config.form == "dual":
        yield from _dual_conflicts(config)
    if isinstance(data, choices.AddConfig):
        if len(data.delays) != 2 or not all(0 <= delay < data.steps for delay in data.delays):
            yield f"data.delays={data.delays}: expected two of at least 0 and below data.steps={data.steps}"
        if isinstance(config.loss, choices.CrossEntropyConfig):
            yield "loss=cross_entropy: data=add has numbers for targets and no classes; expected loss=mse"
    trained = isinstance(net, choices.RNNConfig) and net.initial_state == "trained"
    if trained and config.accumulation > 1:
        yield (
            f"accumulation={config.accumulation}: expected 1 with net.initial_state=trained, whose rows belong to the "
            "places in a batch"
        )
    if trained and config.evaluation.batch_size > config.batch_size:
        yield (
            f"evaluation.batch_size={config.evaluation.batch_size}: expected at most batch_size={config.batch_size}, "
            "the rows of net.initial_state=trained"
        )
    evaluated = dict.fromkeys(("test", *config.evaluation.splits))
    if "validation" in (*evaluated, best) and data.validation == 0:
        yield "evaluation.splits, checkpoint.best: validation needs data.validation above 0, or train or test instead"
    if best not in evaluated:
        yield (
            f"checkpoint.best={best}: expected a split that is evaluated, one of {', '.join(evaluated)}; add it to "
            "evaluation.splits"
        )
    if config.log.alignment_every and not config.analysis.track_errors:
        yield (
            f"log.alignment_every={config.log.alignment_every}: it needs the errors summed in training; expected "
            "analysis.track_errors=true, or log.alignment_every=0"
        )
    if config.analysis.track_errors and (data.views != 1 or config.form == "dual"):
        yield (
            f"analysis.track_errors=true, data.views={data.views}, form={config.form}: an example's errors are summed "
            "over one view of it, and the weights compared; expected data.views=1 and form=primal"
        )
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        yield "log.wandb=true: expected the package wandb, found none; pip install 'alignscale[wandb]' or leave it out"
    if isinstance(config.optim, choices.SGDConfig) and config.optim.nesterov and config.optim.momentum == 0:
        yield "optim.nesterov=true: expected optim.momentum above 0, found 0"
    if config.schedule.warmup > config.epochs:
        yield f"schedule.warmup={config.schedule.warmup}: expected at most epochs={config.epochs}"
    if isinstance(config.engine, choices.DeepSpeedConfig) and config.engine.offload and config.engine.zero_stage == 0:
        yield "engine.offload=true: expected engine.zero_stage from 1 to 3, found 0, where DeepSpeed offloads nothing"
    if config.accumulation > config.batch_size:
        yield (
            f"accumulation={config.accumulation}: expected at most batch_size={config.batch_size}, the examples that "
            "it divides"
        )


def _dual_conflicts(config: TrainConfig) -> Iterator[str]:
    kept = config.jacobian.name == "explicit" and config.jacobian.inputs == config.jacobian.dtype == config.precision
    wrong = {
        f"rule={config.rule.name}: expected align_zero": config.rule.name != "align_zero",
        f"net={config.net.name}: expected mlp": not isinstance(config.net, choices.MLPConfig),
        f"optim={config.optim.name}: expected sgd": not isinstance(config.optim, choices.SGDConfig),
        "optim.weight_decay, optim.clip_norm: expected 0, as they are of weights": bool(
            config.optim.weight_decay or config.optim.clip_norm
        ),
        f"precision={config.precision}: expected fp32 or fp64": config.precision not in ("fp32", "fp64"),
        f"data.views={config.data.views}: expected 1": config.data.views != 1,
        f"jacobian.tier={config.jacobian.tier}: expected auto, or where the network is": config.jacobian.tier == "disk",
        f"jacobian={config.jacobian.name}: expected explicit, with dtype and inputs {config.precision}": not kept,
        f"jacobian.layers={config.jacobian.layers}: expected none": bool(config.jacobian.layers),
    }
    yield from (f"form=dual, {what}; or use form=primal" for what, is_so in wrong.items() if is_so)


def jacobian_conflicts(config: TrainConfig) -> Iterator[str]:
    """What is wrong with the options of the Jacobian's cache."""
    options, net = config.jacobian, config.net
    forms = {options.name, *options.layers}
    if options.name == "live":
        if options.layers:
            yield f"jacobian.layers={options.layers}: expected none with jacobian=live; use jacobian=gates or explicit"
        return
    if net.norm == "batch" and options.name != "auto":
        yield (
            f"jacobian={options.name}: expected net.norm=none or calibrated, found batch, whose moments make each "
            "example's Jacobian depend on the others of its batch; or use jacobian=live"
        )
    if "explicit" in forms and net.blocks == "public":
        yield "net.blocks=public: its last gate is the current network's; expected theory with explicit Jacobians"
    if "explicit" in forms and isinstance(net, choices.RNNConfig):
        yield (
            "jacobian=explicit: net=rnn has a Jacobian for each step, "
            f"classes x steps x {net.width} numbers an example ({10 * 8 * net.width:,} for 10 classes and 8 steps), "
            "which costs more to read than to compute; expected live or gates"
        )
    wanted = options.layers or [options.name if net.norm != "batch" else ""]  # as auto is live then
    gates = {"gates", "auto"} & {*wanted} and net.activation != "relu"
    if gates and options.dtype not in ("fp64", "fp32", "bf16"):
        yield f"jacobian.dtype={options.dtype}: expected fp32 or bf16 for the gates of {net.activation}"
    if getattr(net, "initial_state", "zero") == "trained":
        yield f"jacobian={options.name}: net.initial_state=trained changes what the initial network reads; use live"
    if config.data.views == 0:
        yield f"jacobian={options.name}: expected data.views above 0, found 0, another view in each epoch; use live"


def _streamed_conflicts(data: choices.StreamedConfig) -> Iterator[str]:
    if data.shift:
        yield f"data.shift={data.shift}: expected 0; views of data that is streamed differ by data.scale and data.flip"
    if len(data.scale) != 2 or not data.scale[0] <= data.scale[-1] <= 1:
        yield f"data.scale={data.scale}: expected [least, largest] parts of the image's area, from above 0 to 1"
    if data.resize < data.size:
        yield f"data.resize={data.resize}: expected at least data.size={data.size}, which is cropped from it"
    for option in ("urls", "test_urls") if isinstance(data, choices.WebDatasetConfig) else ():
        if not getattr(data, option):
            yield f"data.{option}: expected files or URLs, as 'a/train-{{000000..000146}}.tar', found nothing"
    for option in ("path", "test_path") if isinstance(data, choices.FFCVConfig) else ():
        if not getattr(data, option):
            yield f"data.{option}: expected an FFCV file, as train.beton, found nothing; tools/make_shards.py makes it"


def growth_conflicts(config: TrainConfig, data: choices.StreamedConfig) -> Iterator[str]:
    """What is wrong with images that grow, in words."""
    grows = len(data.growth) == 2 and 0 <= data.growth[0] < data.growth[1] < config.epochs
    wrong = {
        f"data.growth=[from, to], 0 <= from < to < epochs={config.epochs}": not grows,
        f"data.first_size from 1 to data.size={data.size}": not 0 < data.first_size <= data.size,
        f"data.views=0, as each epoch's view has a size, found {data.views}": data.views != 0,
        f"a convolutional network, found net={config.net.name}": not isinstance(config.net, choices.ConvConfig),
        "net.norm=none or batch, as calibrated is made for one size": config.net.norm == "calibrated",
        "a rule whose feedback is made for any size": config.rule.name == "direct_feedback_alignment",
    }
    named = f"data.first_size={data.first_size}, data.growth={data.growth}: expected "
    yield from (named + what for what, is_so in wrong.items() if is_so and (data.first_size or data.growth != [0, 0]))
