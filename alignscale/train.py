"""``train(config)``: the loop. It knows data, rule and engine by their interfaces alone, and never which rule runs."""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import torch

from alignscale import observe
from alignscale.config import TrainConfig, as_dict
from alignscale.data.examples import stream
from alignscale.distributed import Ranks, launched
from alignscale.evaluate import evaluate
from alignscale.interrupts import Interrupted, Interrupts, first_signal
from alignscale.metrics import Metrics
from alignscale.prepare import prepare
from alignscale.results import Result
from alignscale.rules.backprop import Backprop
from alignscale.run import Diverged, Run
from alignscale.schedule import factor


def train(config: TrainConfig, show: Callable[[str], None] = print, command: str = "alignscale.train") -> Result:
    """Train as ``config`` says and return the run's result, also found in its folder as result.json.

    Draws no report: ``tools/plot_runs.py`` and the commands of launch/ do, from the result.

    show: is given each line for the user. command: shown in the report. Raises ConfigError before any work for a wrong
    option, DataError for a data file that cannot be used, CheckpointError and CacheError for such a checkpoint and such
    a cache, Diverged when the loss is not finite, Interrupted after a checkpoint when SIGINT, SIGTERM or SIGUSR2 came,
    RankError when another rank was lost, OSError when the disk is full.
    """
    with ExitStack() as held, Interrupts((launched() or Ranks()).first) as interrupts:
        run = prepare(config, show, command, held)
        if run.finished is not None:
            return run.finished
        options = (run.folder, config.log, run.name, run.start, run.stop, run.counts, as_dict(config))
        measured = [point["step"] for point in run.curve]
        with run.ranks.together(lambda: Metrics(*options, not run.ranks.first, measured)) as metrics:
            try:
                steps(run, metrics, interrupts)
            except (Diverged, Interrupted):  # as on all other ranks
                raise
            except Exception as problem:
                raise run.ranks.explained(problem) from problem
        return run.finish(run.stop)


def steps(run: Run, metrics: Metrics, interrupts: Interrupts) -> None:
    """Every update from ``run.start`` on, with what is due after it."""
    config, per_epoch, examples = run.config, run.plan.steps_per_epoch, run.splits["train"]
    batches = stream(
        examples, run.plan, run.learner.encoding, run.start, run.stop, config.accumulation, config.data.views,
        run.learner.mesh.data.part,
    )  # fmt: skip
    metrics.enter_context(closing(batches))  # which ends what reads ahead, however the loop ends
    if run.store:
        batches = metrics.enter_context(closing(run.store.attached(batches)))
    asked = signal_of_any(run, interrupts)
    if not asked and run.start % per_epoch == 0 and (not run.curve or run.curve[-1]["step"] < run.start):
        rate = config.optim.lr * factor(config.schedule, run.start - 1, per_epoch, run.stop) if run.start else None
        asked = end_epoch(run, metrics, interrupts, run.start, rate)
        if run.start and run.curve and run.curve[-1]["step"] == run.start:
            run.note_measured()
    stop_if_asked(run, run.start, asked)
    begin = time.perf_counter()
    for step, parts in batches:
        done, size = step + 1, parts[0].size
        lr = config.optim.lr * factor(config.schedule, step, per_epoch, run.stop)
        run.ranks.beat(done, "step")
        try:
            loss, right, (by_clock, *flags) = run.learner.update(parts, lr, (run.due_by_clock, *interrupts.flags))
        except FloatingPointError:
            run.diverge(done, "gradient", parts)
        asked = first_signal(flags)
        run.timings.append(time.perf_counter() - begin)
        metrics.step(done, loss, right, size, run.timings[-1], lr)
        run.counts, run.epoch_loss = metrics.counts, run.epoch_loss + loss * size / len(examples)
        if not math.isfinite(loss):
            run.diverge(done, "loss", parts)
        due = run.due(done) or by_clock > 0
        if config.log.alignment_every and done % config.log.alignment_every == 0:
            metrics.align(done, alignment(run, done))
        if done % per_epoch == 0 and not asked:  # else it saves first, and measures when it goes on
            asked = end_epoch(run, metrics, interrupts, done, lr)
            due = due or run.is_best(done)
        if due or asked:
            run.save(done)
        stop_if_asked(run, done, asked)
        begin = time.perf_counter()


def signal_of_any(run: Run, interrupts: Interrupts) -> int:
    """The signal that came to some rank; 0 for none."""
    return first_signal(run.ranks.totals(interrupts.flags, run.learner.encoding.device))


def end_epoch(run: Run, metrics: Metrics, interrupts: Interrupts, done: int, lr: float | None) -> int:
    """Measure after update ``done``, if it is time to. Returns the signal that broke it off, or 0.

    What was broken off is as if it had not begun: the run measures when it goes on.
    """

    def look() -> None:
        if asked := signal_of_any(run, interrupts):
            raise Interrupted("in an evaluation", asked)

    if done // run.plan.steps_per_epoch % run.config.evaluation.every_epochs == 0 or done == run.stop:
        try:
            measure(run, metrics, done, run.epoch_loss if done else None, lr, look)
        except Interrupted as problem:
            return problem.signum
    run.epoch_loss = 0.0
    return 0


def stop_if_asked(run: Run, done: int, asked: int) -> None:
    """Raise Interrupted after update ``done``, of which a checkpoint is on disk, if a signal came."""
    if asked:
        saved = " and a checkpoint" if done else ""
        command = "the same command" + ("" if run.config.resume == "auto" else ", without resume=never,")
        stopped = f"{run.name}: stopped by signal {asked:d} after step {done} of {run.stop}{saved}"
        raise Interrupted(f"{stopped}; {command} goes on from it", asked)


def measure(
    run: Run, metrics: Metrics, step: int, train_loss: float | None, lr: float | None, look: Callable[[], None]
) -> None:
    """Evaluate and add a point to the run's curve. Raises Diverged after training if a loss is not finite.

    look: is called before each batch, and may break it off.
    """
    point: dict[str, Any] = {"train_loss": train_loss, "lr": lr}
    run.ranks.beat(step, "evaluation")
    engine, encoding, most = run.learner.engine, run.learner.encoding, run.config.evaluation.batch_size
    lost: list[tuple[str, Callable[[], object]]] = []
    for split in dict.fromkeys(("test", *run.config.evaluation.splits)):
        scores = partial(evaluate, engine, run.splits[split], encoding, most, run.learner.mesh.data)
        found = scores(look=look)
        lost += [] if math.isfinite(found["loss"]) else [(f"{split} loss", scores)]
        loss_key = "train_end_loss" if split == "train" else f"{split}_loss"  # train_loss is the mean over the epoch
        point |= {f"{split}_accuracy": found["accuracy"], f"{split}_top5": found["top5"], loss_key: found["loss"]}
    point["update_cosine"] = update_cosine(run, step) if run.config.log.update_cosine else None
    if run.config.log.alignment_every:
        point |= alignment(run, step, whole=True)
    epoch = step // run.plan.steps_per_epoch
    run.curve.append({"epoch": epoch, "step": step, **point})
    metrics.row("epoch", step, {"epoch": epoch, **point})
    if lost and step:
        run.diverge(step, *lost[0])


def alignment(run: Run, step: int, whole: bool = False) -> dict[str, float | None]:
    """The score and what belongs to it, for metrics and the curve; its pace is log.alignment_every."""
    options, errors = run.config.log, run.errors()
    sample, most = options.alignment_examples, run.config.batch_size
    found = observe.live(run.learner, run.splits["train"], errors, sample, most, whole)
    return {"update_cosine": update_cosine(run, step), **found}


def update_cosine(run: Run, step: int) -> float | None:
    """Cosine of the rule's update with backprop's, mean over layers, on the first training examples in key order.

    Of as many as a part of a batch has, or of evaluation: each rank computes it whole.
    """
    learner, train, config = run.learner, run.splits["train"], run.config
    if isinstance(learner.rule, Backprop):
        return 1.0
    most = min(-(-config.batch_size // config.accumulation), config.evaluation.batch_size, len(train))
    batch = learner.encoding.batch(train, torch.arange(most), step)
    values = learner.cosines(run.store.of(batch) if run.store else batch)
    value = sum(values) / len(values)
    return value if math.isfinite(value) else None
