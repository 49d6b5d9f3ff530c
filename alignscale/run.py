"""From a configuration to everything that the loop needs, in the one order that keeps the initial network safe.

Seed first, then calibration, then the fingerprint, and only then a checkpoint. Also the run's folder, which holds all
of
a run: config.yaml, versions.json, metrics.jsonl, tensorboard/, checkpoints/, norms.safetensors, result.json,
report.html.
"""

import json
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save

from alignscale import checkpoint
from alignscale.config import ConfigError, RNNConfig, TrainConfig, as_dict, defining, run_name
from alignscale.data import Examples, load
from alignscale.data.examples import Encoding
from alignscale.data.plan import Plan
from alignscale.engine import LocalEngine, make_optimizer
from alignscale.environment import hardware, keep_freed_memory, versions
from alignscale.files import write_atomic
from alignscale.frozen import Fixed, calibrate, fingerprint, initialise
from alignscale.metrics import finite
from alignscale.nets import Network, build
from alignscale.report import write_report
from alignscale.results import FORMAT, Result
from alignscale.rules import make_rule
from alignscale.validation import validate

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass
class Run:
    """One run that is ready to train, and what it leaves behind."""

    config: TrainConfig
    folder: Path
    name: str
    train: Examples
    test: Examples
    encoding: Encoding
    plan: Plan
    net: Network
    engine: LocalEngine
    about: dict[str, Any]
    start: int = 0
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)
    finished: Result | None = None

    @property
    def first_rows(self) -> torch.Tensor:
        """The first batch of training examples in key order."""
        return torch.arange(min(self.config.batch_size, len(self.train)))

    def save(self, step: int, timings: list[float]) -> None:
        """Write a checkpoint after update ``step``."""
        progress = {"curve": self.curve, "seconds": self.seconds + sum(timings)}
        folder = self.folder / "checkpoints"
        about = {**self.about, "progress": progress}
        checkpoint.save(folder, step, self.net, self.engine.optimizer, about, self.config.checkpoint.keep)

    def finish(self, steps: int, timings: list[float], diverged: bool = False) -> Result:
        """Write result.json and report.html, and return the result."""
        last = self.curve[-1] if self.curve and not diverged else {}
        run = {
            "name": self.name,
            "folder": ".",
            "rule": self.config.rule.name,
            "net": self.config.net.name,
            "width": self.config.net.width,
            "seed": self.config.seed,
            "parameters": sum(p.numel() for p in self.net.parameters()),
            "config": as_dict(self.config),
            "steps": steps,
            "epochs": self.config.epochs,
            "batch": self.config.batch_size,
            "seconds": self.seconds + sum(timings),
            "seconds_per_step": statistics.median(timings) if timings else None,
            "test": {"accuracy": last.get("test_accuracy"), "loss": last.get("test_loss")},
            "train": {"loss": last.get("train_loss")},
            "curve": [{key: finite(value) for key, value in point.items()} for point in self.curve],
        }
        result = {
            "format": FORMAT,
            "title": self.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": f"python launch/train.py run.dir={self.folder}",
            "hardware": hardware(self.encoding.device),
            "versions": versions(),
            "config": as_dict(self.config),
            "runs": [run],
        }
        write_report(result, self.folder / "report.html", "result.json")
        write_atomic(self.folder / "result.json", json.dumps(result, indent=1, allow_nan=False).encode())
        return result


def prepare(config: TrainConfig, show: Callable[[str], None] = print) -> Run:
    """Check the options, make the data, the initial network, the rule and the engine, and restore a checkpoint.

    Prints the resolved configuration, the derived numbers and the folder first. Raises ConfigError or CheckpointError.
    """
    validate(config)
    keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    device = _device(config.device)
    train, test = load(config.data)
    _check_data(config, train)
    folder = Path(config.run.dir or Path(config.run.root) / run_name(config))
    net = build(config.net, train.shape, train.classes, config.batch_size).to(device, DTYPES[config.precision])
    encoding = Encoding(config.label_offset, DTYPES[config.precision], device)
    fixed = Fixed.from_seed(net, config.seed, stored=config.frozen.weights == "stored")
    engine = _engine(config, net, fixed)
    plan = Plan(len(train), config.batch_size, config.seed)
    about: dict[str, Any] = {"config": defining(config)}
    run = Run(config, folder, run_name(config), train, test, encoding, plan, net, engine, about)
    show(yaml.safe_dump(as_dict(config), sort_keys=False).rstrip())
    show(_derived(run))
    show(f"folder: {folder}")
    _open_folder(run)
    initialise(net, config.seed)
    if config.net.norm == "calibrated":
        _calibrated(run, fixed)
    about["fingerprint"] = fingerprint(net, as_dict(config.net), config.seed)
    _resume(run, show)
    _describe(run)
    return run


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: torch finds no CUDA device here; expected device=cpu or auto")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def _check_data(config: TrainConfig, train: Examples) -> None:
    if config.batch_size > len(train):
        raise ConfigError(f"batch_size={config.batch_size}: expected at most the {len(train)} training examples")
    if config.net.norm == "calibrated" and config.calibration.examples > len(train):
        raise ConfigError(
            f"calibration.examples={config.calibration.examples}: expected at most the {len(train)} training examples"
        )
    if config.net.norm == "batch" and len(train) % config.batch_size == 1:
        raise ConfigError(
            f"batch_size={config.batch_size}: it leaves a last batch of one example of {len(train)}, which has no "
            "batch moments; choose another, or net.norm=none or calibrated"
        )
    if isinstance(config.net, RNNConfig) and config.net.readout == "every":
        raise ConfigError(
            f"net.readout=every: wants a target at each step, and data={config.data.name} has one label an example; "
            "expected net.readout=last"
        )


def _engine(config: TrainConfig, net: Network, fixed: Fixed) -> LocalEngine:
    rule = make_rule(net, fixed, config.rule)
    return LocalEngine(rule, make_optimizer(config.optim, rule.parameters()))


def _derived(run: Run) -> str:
    config, parameters = run.config, sum(p.numel() for p in run.net.parameters())
    item = torch.empty((), dtype=run.encoding.dtype).element_size()
    lines = [
        f"parameters: {parameters:,} in {len(run.net.layers)} layers ({parameters * item / 2**20:.1f} MiB)",
        (
            f"examples: {len(run.train):,} for training, {len(run.test):,} for testing, shape {run.train.shape}, "
            f"{run.train.classes} classes"
        ),
        f"steps: {run.plan.steps_per_epoch} an epoch, {run.plan.steps_per_epoch * config.epochs:,} in all",
        f"device: {run.encoding.device}, {torch.get_num_threads()} threads, {config.precision}",
    ]
    if (
        config.net.norm == "none"
        and config.net.activation == "relu"
        and config.net.gain < 1.2
        and len(run.net.norms) > 2
    ):
        fade = (config.net.gain / 2**0.5) ** len(run.net.norms)
        lines.append(
            f"note: without a norm, gain {config.net.gain:g} leaves {fade:.3g} of the signal after "
            f"{len(run.net.norms)} relu layers; net.gain=1.4142 keeps it"
        )
    return "\n".join(lines)


def _open_folder(run: Run) -> None:
    """Make the folder, and with resume=never forget what an earlier run left in it."""
    try:
        (run.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        if run.config.resume == "never":
            for name in ("checkpoints", "tensorboard"):
                shutil.rmtree(run.folder / name, ignore_errors=True)
            for name in ("metrics.jsonl", "norms.safetensors", "result.json", "report.html"):
                (run.folder / name).unlink(missing_ok=True)
        write_atomic(run.folder / ".writable", b"")
        (run.folder / ".writable").unlink()
    except OSError as problem:
        raise ConfigError(
            f"run folder {run.folder}: expected a folder that can be written, found: {problem}; set run.dir or run.root"
        ) from problem


def _describe(run: Run) -> None:
    """config.yaml and versions.json: written once the options are known to be those of the checkpoint."""
    write_atomic(run.folder / "config.yaml", yaml.safe_dump(as_dict(run.config), sort_keys=False).encode())
    about = {"versions": versions(), "hardware": hardware(run.encoding.device)}
    write_atomic(run.folder / "versions.json", json.dumps(about, indent=1).encode())


def _calibrated(run: Run, fixed: Fixed) -> None:
    """Moments of the norms: computed once in a run's life, then read from its folder."""
    path = run.folder / "norms.safetensors"
    if path.exists():
        run.net.norms.load_state_dict(load_file(path))  # type: ignore[attr-defined]
        return
    calibrate(
        fixed.frozen, run.train.images[: run.config.calibration.examples].to(run.encoding.device, run.encoding.dtype)
    )
    write_atomic(path, save({name: buffer.cpu() for name, buffer in run.net.norms.state_dict().items()}))  # type: ignore[attr-defined]


def _resume(run: Run, show: Callable[[str], None]) -> None:
    found = checkpoint.complete(run.folder / "checkpoints")
    if not found:
        return
    manifest = checkpoint.restore(found[-1], run.net, run.engine.optimizer, run.about)
    run.start = manifest["step"]
    run.curve, run.seconds = manifest["progress"]["curve"], manifest["progress"]["seconds"]
    result = run.folder / "result.json"
    if result.exists() and run.start == run.plan.steps_per_epoch * run.config.epochs:
        run.finished = json.loads(result.read_text())
        show("finished before; resume=never trains it again")
    else:
        show(f"resumed after step {run.start} from {found[-1]}")
