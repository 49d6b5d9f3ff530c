"""A run: what the loop trains with, when a checkpoint is due, and what the run leaves behind when it ends."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from alignscale import checkpoint
from alignscale.analysis.finite import IMAGES, LOSS_ALONE, first_not_finite
from alignscale.checkpoint import Coming
from alignscale.config import TrainConfig, as_dict
from alignscale.data import Split
from alignscale.data.plan import Plan
from alignscale.distributed import Ranks
from alignscale.environment import hardware, versions
from alignscale.files import write_atomic
from alignscale.jacobian.store import Store
from alignscale.learner import Learner
from alignscale.results import Result, finite, make_result
from alignscale.types import Batch


class Diverged(RuntimeError):
    """The loss is not finite any more; the run's folder holds everything up to there, and ``result`` is its result."""

    result: Result


@dataclass
class Run:
    """One run that is ready to train, and what it leaves behind."""

    config: TrainConfig
    folder: Path
    name: str
    command: str
    splits: dict[str, Split]
    plan: Plan
    learner: Learner
    about: dict[str, Any]
    ranks: Ranks
    start: int = 0
    seconds: float = 0.0
    seconds_per_step: float | None = None
    epoch_loss: float = 0.0
    counts: Sequence[float] = (0, 0, 0.0)
    timings: list[float] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    saved: float = field(default_factory=time.monotonic)
    finished: Result | None = None
    store: Store | None = None

    @property
    def stop(self) -> int:
        """The number of updates in the whole run."""
        return self.plan.steps_per_epoch * self.config.epochs

    @property
    def due_by_clock(self) -> bool:
        """Whether a checkpoint is due by minutes: on the first rank, whose clock counts."""
        minutes = self.config.checkpoint.every_minutes
        return self.ranks.first and 0 < minutes <= (time.monotonic() - self.saved) / 60

    def due(self, done: int) -> bool:
        """Whether a checkpoint is due after update ``done``, by steps or epochs."""
        options = self.config.checkpoint
        return (
            done == self.stop
            or (options.every_steps > 0 and done % options.every_steps == 0)
            or (options.every_epochs > 0 and done % (options.every_epochs * self.plan.steps_per_epoch) == 0)
        )

    def best(self) -> dict[str, Any] | None:
        """The point of the curve with the highest accuracy on ``checkpoint.best``, the first of equals."""
        key = f"{self.config.checkpoint.best}_accuracy"
        points = [point for point in self.curve if point["step"] > 0]
        return max(points, key=lambda point: point[key], default=None)

    def is_best(self, step: int) -> bool:
        """Whether the network was measured after update ``step``, and is the best so far."""
        return (self.best() or {}).get("step") == step

    def save(self, step: int) -> None:
        """Write a checkpoint after update ``step``. Raises Diverged if a weight is not finite."""
        self.ranks.beat(step, "save")
        tensors = self.learner.engine.state()
        if self.learner.errors is not None:
            tensors = {**tensors, "errors": {"sums": Coming(self.learner.errors.size, lambda _: self.errors())}}
        about, folder = {**self.about, "progress": self._progress()}, self.folder / "checkpoints"
        try:
            checkpoint.save(folder, step, tensors, about, self.config.checkpoint.keep, self.ranks)
        except FloatingPointError:
            self.diverge(step, "weight")
        self.saved = time.monotonic()

    def note_measured(self) -> None:
        """Write what was measured just now into the checkpoint that the run goes on from, which came before it."""
        folder = self.folder / "checkpoints"
        self.ranks.of_first(lambda: checkpoint.amend(checkpoint.find(folder, "last"), self._progress()))

    def _progress(self) -> dict[str, Any]:
        options = self.config.checkpoint
        return {
            "best": (self.best() or {}).get("step"), "best_of": options.best, "curve": self.curve,
            "seconds": self.seconds + sum(self.timings), "seconds_per_step": self._typical(),
            "epoch_loss": self.epoch_loss, "counts": self.counts,
        }  # fmt: skip

    def errors(self) -> Tensor:
        """The summed errors of all ranks' examples, float64 (examples, classes), in host memory."""
        assert self.learner.errors is not None
        return self.learner.errors.whole(self.learner.encoding.device)

    def diverge(self, step: int, what: str, seen: Sequence[Batch] | Callable[[], object] = ()) -> NoReturn:
        """Write the result of a run whose ``what`` is not finite at ``step``, and raise Diverged.

        seen: the parts of the batch, or the evaluation, in which it shows.
        """
        learner = self.learner
        forward = seen if callable(seen) else partial(self._again, seen, step)
        weights = {name: partial(coming.make, 0) for name, coming in learner.engine.state()["model"].items()}
        found = self.ranks.objects(first_not_finite(learner.net, weights, forward))
        where = next((one for one in found if one != LOSS_ALONE), LOSS_ALONE)
        remedy = f"lower optim.lr (now {self.config.optim.lr:g}) or clip (optim.clip_norm)"
        message = (
            f"the {what} is not finite at step {step}: expected a finite number, found the first NaN or "
            f"infinity in {where}; {'look at the data' if where == IMAGES else remedy}"
        )
        result = self.finish(step, failed=message)
        kept = checkpoint.complete(self.folder / "checkpoints")
        good = (
            f"the last good checkpoint is {kept[-1]}" if kept else f"no checkpoint was due before it in {self.folder}"
        )
        problem = Diverged(f"{self.name}: {message}; {good}")
        problem.result = result
        raise problem

    def _again(self, parts: Sequence[Batch], step: int) -> None:
        """Forward passes of a batch's parts; of the first examples where there are none, as all ranks take part."""
        learner, few = self.learner, torch.arange(min(2, self.config.batch_size))
        full = [part if len(part.images) else None for part in parts]
        for part in full or [None]:
            learner.engine.evaluate(part or learner.encoding.batch(self.splits["train"], few, step))

    def lost(self) -> set[str]:
        """The keys of the examples that some rank had to leave out, in this session of the run."""
        own = {f"{name}: {key}" for name, split in self.splits.items() for key in split.missing}
        return set().union(*self.ranks.objects(own))

    def _typical(self) -> float | None:
        return statistics.median(self.timings) if self.timings else self.seconds_per_step

    def finish(self, step: int, failed: str | None = None) -> Result:
        """Write result.json and return the result; ``diverged_at`` is the last step of a lost run."""
        config, best = self.config, self.best()
        last = self.curve[-1] if self.curve and failed is None else {}
        run: dict[str, Any] = {
            "name": self.name, "folder": ".", "config": as_dict(config), "data": config.data.name, "seed": config.seed,
            "rule": config.rule.name, "net": config.net.name, "width": config.net.width, "steps": step,
            "parameters": self.learner.net.size, "ranks": self.ranks.size,
            "epochs": config.epochs, "batch": config.batch_size,
            "seconds": self.seconds + sum(self.timings), "seconds_per_step": self._typical(),
            "skipped": sum(split.skipped for split in self.splits.values()) + len(self.lost()),
            "curve": [{key: finite(value) for key, value in point.items()} for point in self.curve],
            "diverged_at": None if failed is None else step, "failed": failed,
        }  # fmt: skip
        for split in ("test", *config.evaluation.splits):
            run[split] = {key: finite(last.get(f"{split}_{key}")) for key in ("accuracy", "top5", "loss")}
        measured = last.get("train_end_loss", last.get("train_loss"))  # of the final network, else the epoch's mean
        run["train"] = {**run.get("train", {}), "loss": finite(measured)}
        if best is not None:
            split = config.checkpoint.best
            where = {key: best[key] for key in ("epoch", "step")}
            run["best"] = {"split": split, "accuracy": best[f"{split}_accuracy"], **where}
        run_on = {"hardware": hardware(self.learner.encoding.device), "versions": versions()}
        result = make_result(self.name, self.command, run_on, as_dict(config), [run])
        content = json.dumps(result, indent=1, allow_nan=False).encode()
        self.ranks.of_first(lambda: write_atomic(self.folder / "result.json", content))
        return result
