"""From a configuration to a run that is ready to train, in the one order that keeps the initial network safe.

Seed first, then calibration, then the fingerprint, and only then a checkpoint.
"""

import importlib.util
import json
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from typing import Any

import torch
import yaml

from alignscale import checkpoint, environment
from alignscale.analysis.errors import ErrorSums
from alignscale.choices import ENGINES, ConfigError, DeepSpeedConfig, EngineConfig
from alignscale.config import READING, TrainConfig, as_dict, defining, difference, run_folder, run_name
from alignscale.data import Split, load
from alignscale.data.plan import Plan
from alignscale.distributed import Ranks, beside, check_launched, joined, launched, restarts
from alignscale.folder import describe_folder, opened
from alignscale.frozen import fingerprint
from alignscale.interrupts import ended_at_once
from alignscale.jacobian.cache import Cache
from alignscale.learner import Learner
from alignscale.memory import check_memory
from alignscale.moments import calibrated
from alignscale.parallel import Mesh
from alignscale.results import flatten, read_result
from alignscale.rules.dual import DualAlignZero, check_size
from alignscale.run import Diverged, Run
from alignscale.validation import check_data, check_ranks, validate

LOCAL = (
    "run.",
    "threads",
    "log.progress",
    "log.tensorboard",
    "log.wandb",
    "jacobian.root",
    "jacobian.dir",
    "jacobian.tier",
    *(f"data.{name}" for name in READING),
)
"""Options that may differ from machine to machine."""
USES = {"train": "training", "validation": "validation", "test": "testing"}


def prepare(config: TrainConfig, show: Callable[[str], None], command: str, held: ExitStack) -> Run:
    """Check the options, make the data, the initial network, the rule and the engine, and restore a checkpoint.

    Shows the resolved configuration, the derived numbers and the folder first. held: is given torch's settings and the
    hold on the folder, which end with it. Raises ConfigError, DataError, CheckpointError, CacheError, or Diverged for a
    run that is known to diverge.
    """
    if config.resume == "never" and restarts():
        raise ConfigError(
            "resume=never: expected auto where torchrun (--max-restarts) or SLURM starts again, or the run would begin "
            "from nothing each time; give --max-restarts=0 (RESTARTS=0 for launch/torchrun.sh), or another run.dir"
        )
    device, engine, mesh = begun(config, held)
    ranks = mesh.everyone
    show = show if ranks.first else lambda line: None
    splits = ranks.together(lambda: ended_at_once()(load)(config.data))
    ranks.alike("data", {name: split.digest for name, split in splits.items()})
    check_data(config, {split: len(examples) for split, examples in splits.items()})
    check_ranks(config, len(splits["train"]), ranks.size)
    name, folder, train = run_name(config), run_folder(config), splits["train"]
    ranks.together(lambda: check_memory(config, train, device, engine, mesh))
    plan = Plan(len(train), config.batch_size, config.seed, train.layout)
    with ranks.busy():  # a slow import, and large weights
        learner = make_learner(config, train, device, engine, mesh)
    if config.form == "dual":
        check_size(learner.net, len(train), train.shape, train.classes)
    made_with = {
        **environment.versions(), "threads": torch.get_num_threads(), "device": str(device), "ranks": ranks.size,
        "engine": engine.name, "zero_stage": getattr(engine, "zero_stage", None),
        "cuda_graph": learner.engine.records, **({"sums": "bf16"} if learner.engine.bf16_sums else {}),
        "width_ranks": mesh.width.ranks.size, "overlap": mesh.width.overlap,
        **{name: value for name in ("offload", "extra") if (value := getattr(engine, name, None))},
    }  # fmt: skip
    run = Run(config, folder, name, command, splits, plan, learner, {"made_with": made_with}, ranks)
    show(yaml.safe_dump(as_dict(config), sort_keys=False).rstrip())
    show(_derived(run))
    show(f"folder: {folder}")
    ranks.of_first(lambda: held.enter_context(opened(folder, config)))
    if config.net.norm == "calibrated":
        calibrated(config, learner, train, folder / "norms.safetensors")
    if config.analysis.track_errors:
        logits = (train.shape[-2], train.classes) if getattr(learner.net, "every", False) else (train.classes,)
        learner.errors = ErrorSums(train.keys(torch.arange(len(train))), logits, ranks)
    run.about |= identity(config, splits, learner)
    if config.resume == "auto":
        _resume(run, show)
    if run.finished is None and config.jacobian.name != "live" and learner.rule.reads_jacobian:
        _open_cache(run, show)
    if run.finished is None:  # what trained a finished run stays on record
        ranks.of_first(lambda: describe_folder(folder, config, device))
    return run


def begun(config: TrainConfig, held: ExitStack) -> tuple[torch.device, EngineConfig, Mesh]:
    """The device, what runs the steps, and the ranks, for options that are valid; torch's settings are in force."""
    validate(config)
    environment.keep_freed_memory()
    held.enter_context(environment.torch_settings(config.threads, config.deterministic))
    device = environment.device_called(config.device)
    engine, ranks = _engine(config, device, held)
    options = flatten(as_dict(config))
    ranks.alike("options", {name: one for name, one in options.items() if not name.startswith(LOCAL)})
    return device, engine, Mesh.of(ranks, config.parallel.width, config.net.width, config.parallel.overlap)


def _engine(config: TrainConfig, device: torch.device, held: ExitStack) -> tuple[EngineConfig, Ranks]:
    """What runs the steps, and the ranks, whose process group ends with ``held``."""
    check_launched()
    around, engine = launched(), config.engine
    if engine.name == "auto":
        engine = ENGINES["local" if around is None else "deepspeed"]
    if isinstance(engine, DeepSpeedConfig):
        if config.form == "dual":
            raise ConfigError("engine=deepspeed: expected engine=local and one process for form=dual, which is small")
        if importlib.util.find_spec("deepspeed") is None:
            raise ConfigError("engine=deepspeed: expected the package, found none; pip install 'alignscale[deepspeed]'")
        if config.precision == "fp64":
            raise ConfigError("precision=fp64: expected fp32, fp16 or bf16, which are all that DeepSpeed takes")
        if device.type == "cuda":
            environment.take_gpu(around.local if around else 0, beside())
        return engine, held.enter_context(joined(device, engine.timeout))
    if around and around.size > 1:
        raise ConfigError(f"engine=local: expected one process, found {around.size}; use engine=deepspeed")
    return engine, Ranks()


def make_learner(config: TrainConfig, train: Split, device: torch.device, engine: EngineConfig, mesh: Mesh) -> Learner:
    """The learner of a run at its start, which reads examples as the run does."""
    learner = Learner(
        config.net, train.shape, train.classes, config.rule, config.optim, config.loss, seed=config.seed,
        precision=config.precision, device=device, frozen_weights=config.frozen.weights, state_rows=config.batch_size,
        engine=engine, mesh=mesh, sync_norm=config.sync_norm,
        coefficients=len(train) if config.form == "dual" else 0,
    )  # fmt: skip
    learner.encoding = learner.encoding.of(config.data, train)
    return learner


def identity(config: TrainConfig, splits: dict[str, Split], learner: Learner) -> dict[str, Any]:
    """What a checkpoint must have been made with to be this run's."""
    return {
        "config": defining(config),
        "examples": {split: examples.digest for split, examples in splits.items()},
        "fingerprint": fingerprint(learner.net, as_dict(config.net), config.seed, learner.mesh),
    }


def _derived(run: Run) -> str:
    config, learner, train = run.config, run.learner, run.splits["train"]
    made_with = run.about["made_with"]
    parameters = learner.net.size
    size = parameters * learner.encoding.master.itemsize / 2**20
    counts = [f"{len(run.splits[split]):,} for {use}" for split, use in USES.items() if split in run.splits]
    lines = [
        f"parameters: {parameters:,} in {len(learner.net.layers)} layers ({size:.1f} MiB)",
        f"examples: {', '.join(counts)}",
        f"shape: {train.shape}, {train.classes} classes",
        f"steps: {run.plan.steps_per_epoch} an epoch, {run.stop:,} in all",
        f"device: {learner.encoding.device}, {torch.get_num_threads()} threads, {config.precision}",
        f"engine: {made_with['engine']}, {made_with['ranks']} ranks, ZeRO {made_with['zero_stage'] or 0}"
        + (f", width over {made_with['width_ranks']} of them" if made_with["width_ranks"] > 1 else ""),
    ]
    skipped = sum(examples.skipped for examples in run.splits.values())
    if skipped:
        lines.append(f"warning: {skipped} files hold no readable image and are left out (data.skip_undecodable)")
    sites = len(learner.net.norms)
    if config.net.norm == "none" and config.net.activation == "relu" and config.net.gain < 1.2 and sites > 2:
        lines.append(
            f"note: without a norm, gain {config.net.gain:g} leaves {(config.net.gain / 2**0.5) ** sites:.3g} of the "
            f"signal after {sites} relu layers; net.gain=1.4142 keeps it"
        )
    if config.net.norm == "batch" and config.accumulation > 1:
        lines.append(f"note: norm batch takes the moments of each of the {config.accumulation} parts of a batch")
    return "\n".join(lines)


def _open_cache(run: Run, show: Callable[[str], None]) -> None:
    """After a restore, as a run that has ended needs none; the initial network is a function of the seed."""
    train, rule = run.splits["train"], run.learner.rule
    cache = cache_of(run.config, run.learner, train)
    if run.config.jacobian.build:
        with ended_at_once() if run.ranks.size == 1 else nullcontext():  # other ranks would wait
            cache.make(show)
    run.store = cache.open()
    form = as_dict(run.store.form) if run.store else "live"
    show(f"jacobian: {', '.join(run.store.form.sites) if run.store else form}, from {cache.home}")
    before = run.about.get("jacobian", form)
    if json.dumps(before) != json.dumps(form):
        raise ConfigError(
            f"{cache.home}: the run has trained with the form {before}, found {form}: the cache was made anew; name "
            "the form (jacobian, jacobian.layers), or use resume=never to start again"
        )
    run.about["jacobian"] = form
    if isinstance(rule, DualAlignZero) and run.store:
        rule.attach(run.store, run.learner.encoding.batch(train, torch.arange(len(train)), 0).images)


def cache_of(config: TrainConfig, learner: Learner, train: Split) -> Cache:
    """The cache of the initial network's Jacobian for a run."""
    frozen, reads = learner.fixed.frozen, learner.rule.reads_inputs
    return Cache(config, frozen, learner.encoding, train, reads, learner.mesh, learner.engine.records)


def _resume(run: Run, show: Callable[[str], None]) -> None:
    """Go on from the newest checkpoint, or return the result of a run that has ended."""
    errors = run.learner.errors
    tensors: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimizer": {}}
    if errors is not None:
        tensors["errors"] = {}

    def read() -> tuple[Any, Any, Any]:
        nonlocal tensors
        ended, manifest = None, None
        with suppress(ValueError):  # there is none, or a damaged one, which is written again from the checkpoint
            ended = read_result(run.folder / "result.json")
        lost = ended["runs"][0].get("diverged_at") if ended else None
        if ended and lost is not None:
            problem = Diverged(
                f"{run.name}: diverged before, at step {lost}; resume=never tries again. The folder: {run.folder}"
            )
            problem.result = ended
            raise problem
        found = checkpoint.complete(run.folder / "checkpoints")
        if found:
            manifest = checkpoint.verified(found[-1], run.about)
            checkpoint.note_latest(found[-1])
            if errors is not None and "errors" not in checkpoint.parts(manifest):
                raise ConfigError(
                    f"analysis.track_errors=true: expected the errors from the start on, and {found[-1]} has none; use "
                    "resume=never, or analysis.track_errors=false log.alignment_every=0"
                )
            tensors = {part: checkpoint.read(found[-1], manifest, part) for part in tensors}
        return ended, manifest, str(found[-1]) if found else None

    ended, manifest, found = run.ranks.of_first(read)
    if manifest is None:
        if ended is not None and ended["runs"][0]["steps"] == run.stop:
            run.finished = ended
            show("finished before, and its checkpoints are gone; resume=never trains it again")
        return
    if manifest["progress"]["best_of"] != run.config.checkpoint.best:
        raise ConfigError(
            f"checkpoint.best={run.config.checkpoint.best}: expected {manifest['progress']['best_of']}, by which the "
            "run has kept its best so far; use it, or resume=never to start again"
        )
    before, now = manifest["made_with"], run.about["made_with"]
    changed = difference(before, now)
    parts, found_parts = (made["ranks"] // made["width_ranks"] for made in (before, now))
    over = ended is not None and manifest["step"] == run.stop
    if parts != found_parts and not over and run.config.net.norm == "batch" and not run.config.sync_norm:
        raise ConfigError(
            f"sync_norm=false: expected {parts} ranks as before, since each takes the moments of its own examples, "
            f"found {found_parts}; use as many, or resume=never to start again"
        )
    run.learner.engine.load(tensors)
    if "jacobian" in manifest:
        run.about["jacobian"] = manifest["jacobian"]
    if errors is not None:
        errors.load(tensors["errors"].get("sums"), run.learner.encoding.device)
    run.start, progress = manifest["step"], manifest["progress"]
    for name in ("curve", "seconds", "seconds_per_step", "epoch_loss", "counts"):
        setattr(run, name, progress[name])
    if over:
        run.finished = ended
        show("finished before; resume=never trains it again")
        return
    show(f"resumed after step {run.start} from {found}")
    if changed:
        show(f"warning: not as before, so the run ends equal to rounding, not to the bit: {'; '.join(changed)}")
