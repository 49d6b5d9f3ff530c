"""From a configuration to everything that the loop needs, in the one order that keeps the initial network safe.

Seed first, then calibration, then the fingerprint, and only then a checkpoint.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from alignscale import checkpoint
from alignscale.checkpoint import CheckpointError
from alignscale.choices import ConfigError
from alignscale.config import TrainConfig, as_dict, defining, difference, run_name
from alignscale.data import Examples, load
from alignscale.data.examples import Encoding
from alignscale.data.plan import Plan
from alignscale.engine import LocalEngine, make_optimizer
from alignscale.environment import hardware, keep_freed_memory, versions
from alignscale.files import write_atomic
from alignscale.folder import describe_folder, open_folder
from alignscale.frozen import Fixed, calibrate, fingerprint, initialise
from alignscale.metrics import finite
from alignscale.nets import Network, build
from alignscale.report import write_report
from alignscale.results import FORMAT, Result, read_result
from alignscale.rules import make_rule
from alignscale.validation import check_data, validate

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class Diverged(RuntimeError):
    """The loss is not finite any more; the run's folder holds everything up to there."""


@dataclass
class Run:
    """One run that is ready to train, and what it leaves behind."""

    config: TrainConfig
    folder: Path
    name: str
    command: str
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

    def diverge(self, step: int, timings: list[float], what: str) -> NoReturn:
        """Write the result of a run whose ``what`` is not finite after ``step``, and raise Diverged."""
        self.finish(step, timings, diverged=True)
        raise Diverged(
            f"{self.name}: the {what} is not finite at step {step}: expected a finite number; lower optim.lr (now "
            f"{self.config.optim.lr:g}) or set a norm. The run's folder: {self.folder}"
        )

    def finish(self, step: int, timings: list[float], diverged: bool = False) -> Result:
        """Write report.html and result.json, and return the result; ``diverged_at`` is the last step of a lost run."""
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
            "steps": step,
            "epochs": self.config.epochs,
            "batch": self.config.batch_size,
            "seconds": self.seconds + sum(timings),
            "seconds_per_step": statistics.median(timings) if timings else None,
            "test": {"accuracy": last.get("test_accuracy"), "loss": finite(last.get("test_loss"))},
            "train": {"loss": finite(last.get("train_loss"))},
            "curve": [{key: finite(value) for key, value in point.items()} for point in self.curve],
            "diverged_at": step if diverged else None,
        }
        result = {
            "format": FORMAT,
            "title": self.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": self.command,
            "hardware": hardware(self.encoding.device),
            "versions": versions(),
            "config": as_dict(self.config),
            "runs": [run],
        }
        write_report(result, self.folder / "report.html", "result.json")
        write_atomic(self.folder / "result.json", json.dumps(result, indent=1, allow_nan=False).encode())
        return result


def prepare(config: TrainConfig, show: Callable[[str], None], command: str) -> Run:
    """Check the options, make the data, the initial network, the rule and the engine, and restore a checkpoint.

    Shows the resolved configuration, the derived numbers and the folder first. Raises ConfigError, CheckpointError, or
    Diverged for a run that is known to diverge.
    """
    validate(config)
    keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    device = _device(config.device)
    train, test = load(config.data)
    check_data(config, train, test)
    name = run_name(config)
    folder = Path(config.run.dir or Path(config.run.root) / name).expanduser()
    net = _network(config, train, device)
    encoding = Encoding(config.label_offset, DTYPES[config.precision], device)
    fixed = Fixed.from_seed(net, config.seed, stored=config.frozen.weights == "stored")
    rule = make_rule(net, fixed, config.rule)
    engine = LocalEngine(rule, make_optimizer(config.optim, rule.parameters()))
    plan = Plan(len(train), config.batch_size, config.seed)
    made_with = {"threads": torch.get_num_threads(), "device": str(device), **versions()}
    about: dict[str, Any] = {"config": defining(config), "made_with": made_with}
    run = Run(config, folder, name, command, train, test, encoding, plan, net, engine, about)
    show(yaml.safe_dump(as_dict(config), sort_keys=False).rstrip())
    show(_derived(run))
    show(f"folder: {folder}")
    open_folder(folder, config)
    initialise(net, config.seed)
    if config.net.norm == "calibrated":
        _calibrated(run, fixed)
    about["fingerprint"] = fingerprint(net, as_dict(config.net), config.seed)
    _resume(run, show)
    if run.finished is None:
        describe_folder(folder, config, device)
    return run


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: torch finds no CUDA device here; expected device=cpu or auto")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def _network(config: TrainConfig, train: Examples, device: torch.device) -> Network:
    """The network, once it is known to fit: weights, their gradient and, where stored, the initial weights."""
    dtype = DTYPES[config.precision]
    with torch.device("meta"):
        outline = build(config.net, train.shape, train.classes, config.batch_size)
    copies = 3 if config.frozen.weights == "stored" else 2
    needed = copies * dtype.itemsize * sum(p.numel() for p in outline.parameters()) / 2**30
    found = hardware(device)["memory_gib"]
    if device.type == "cpu" and needed > found:
        raise ConfigError(
            f"net.width={config.net.width}: weights, gradient and initial weights take {needed:.1f} GiB, found "
            f"{found} GiB of memory; choose a smaller width, or frozen.weights=regenerated"
        )
    return build(config.net, train.shape, train.classes, config.batch_size).to(device, dtype)


def _derived(run: Run) -> str:
    config, parameters = run.config, sum(p.numel() for p in run.net.parameters())
    size = parameters * run.encoding.dtype.itemsize / 2**20
    lines = [
        f"parameters: {parameters:,} in {len(run.net.layers)} layers ({size:.1f} MiB)",
        f"examples: {len(run.train):,} for training, {len(run.test):,} for testing",
        f"shape: {run.train.shape}, {run.train.classes} classes",
        f"steps: {run.plan.steps_per_epoch} an epoch, {run.plan.steps_per_epoch * config.epochs:,} in all",
        f"device: {run.encoding.device}, {torch.get_num_threads()} threads, {config.precision}",
    ]
    sites = len(run.net.norms)
    if config.net.norm == "none" and config.net.activation == "relu" and config.net.gain < 1.2 and sites > 2:
        lines.append(
            f"note: without a norm, gain {config.net.gain:g} leaves {(config.net.gain / 2**0.5) ** sites:.3g} of the "
            f"signal after {sites} relu layers; net.gain=1.4142 keeps it"
        )
    return "\n".join(lines)


def _calibrated(run: Run, fixed: Fixed) -> None:
    """Moments of the norms: computed once in a run's life, then read from its folder."""
    path = run.folder / "norms.safetensors"
    norms = run.net.norms
    assert isinstance(norms, torch.nn.ModuleList)
    if path.exists():
        try:
            norms.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as problem:
            raise CheckpointError(
                f"{path}: expected the moments of this network's norms, found: {problem}; resume=never makes them again"
            ) from problem
        return
    images = run.train.images[: run.config.calibration.examples]
    calibrate(fixed.frozen, images.to(run.encoding.device, run.encoding.dtype))
    write_atomic(path, save({name: buffer.cpu() for name, buffer in norms.state_dict().items()}))


def _resume(run: Run, show: Callable[[str], None]) -> None:
    """Go on from the newest checkpoint, or return the result of a run that has ended."""
    path = run.folder / "result.json"
    try:
        ended = read_result(path) if path.exists() else None
    except ValueError:
        ended = None  # a damaged result is written again, from the checkpoint
    lost = ended["runs"][0].get("diverged_at") if ended else None
    if lost is not None:
        raise Diverged(
            f"{run.name}: diverged before, at step {lost}; resume=never tries again. The folder: {run.folder}"
        )
    found = checkpoint.complete(run.folder / "checkpoints")
    if not found:
        return
    manifest = checkpoint.restore(found[-1], run.net, run.engine.optimizer, run.about)
    run.start = manifest["step"]
    run.curve, run.seconds = manifest["progress"]["curve"], manifest["progress"]["seconds"]
    if ended is not None and run.start == run.plan.steps_per_epoch * run.config.epochs:
        run.finished = ended
        show("finished before; resume=never trains it again")
        return
    show(f"resumed after step {run.start} from {found[-1]}")
    changed = difference(manifest["made_with"], run.about["made_with"])
    if changed:
        show(f"warning: not as before, so the run ends equal to rounding, not to the bit: {'; '.join(changed)}")
