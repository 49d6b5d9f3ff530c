"""The paper's claims, and the verdict of an experiment's numbers on each.

They stand alone because the page, the terminal and the results table must say the same. Each verdict states the numbers
that it rests on, and a threshold that was fixed before them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from _report.series import Series, accuracy, series_of, spread, widths
from alignscale.results import Result, Run, finite, flatten

ALIGN = ("align_ada", "align_zero")


@dataclass(frozen=True)
class Verdict:
    """A claim in the paper's words, whether it holds here, and by which numbers."""

    claim: str
    holds: bool | None
    evidence: str

    @property
    def word(self) -> str:
        """The verdict in words."""
        return {True: "holds here", False: "does not hold here", None: "cannot be judged"}[self.holds]

    def __str__(self) -> str:
        """In one line."""
        return f"{self.claim}: {self.word}. {self.evidence}"


Judged = tuple[bool | None, str]
UNPAIRED = "no {} beside a backprop run that finished"


def _gap(runs: Sequence[Run], rule: str) -> float | None:
    """Accuracy of a rule minus backprop's in points, mean over the seeds that backprop finished.

    A run of the rule that diverged counts as 0 %. None where no seed has both.
    """
    base = {run["seed"]: accuracy(run) for run in runs if run["rule"] == "backprop"}
    ours = {run["seed"]: accuracy(run) or 0.0 for run in runs if run["rule"] == rule}
    pairs = ((mine, base.get(seed)) for seed, mine in ours.items())
    return spread(None if theirs is None else mine - theirs for mine, theirs in pairs).mean


def _of_width(data: Result, width: int) -> list[Run]:
    return [run for run in data["runs"] if run["width"] == width]


def _last(runs: Sequence[Run], key: str, rule: str = "backprop") -> float | None:
    """A quantity at the end of training, mean over seeds."""
    curves = [run["curve"] for run in runs if run["rule"] == rule]
    return spread(finite(curve[-1].get(key)) for curve in curves if curve).mean


def _narrow_and_wide(data: Result, points: float) -> Judged:
    """The gaps at the widest network are within ``points``, and not larger than at the narrowest."""
    found = widths(data["runs"])
    words, holds = [], True
    for rule in ALIGN:
        first, last = (_gap(_of_width(data, width), rule) for width in (found[0], found[-1]))
        if first is None or last is None:
            return None, UNPAIRED.format(rule)
        holds = holds and abs(last) <= max(points, 0.0) and (len(found) == 1 or abs(last) <= max(abs(first), 1.0))
        words.append(f"{rule} {first:+.1f} points at width {found[0]}, {last:+.1f} at width {found[-1]}")
    return holds, f"Gap to backprop: {'; '.join(words)} (within {points:g} at the widest, and not growing)."


def _option(run: Run, option: str) -> float:
    return float(flatten(run["config"])[option])


def _small_rates(data: Result) -> Judged:
    """At the widest network, mean |gap| over the smaller half of the rates is at most that over the larger half."""
    width, option = widths(data["runs"])[-1], data["experiment"]["option"]
    runs = _of_width(data, width)
    trained = [run for run in runs if run["rule"] == "backprop" and accuracy(run) is not None]
    rates = sorted({_option(run, option) for run in trained})
    if len(rates) < 2:
        return None, "backprop finished at fewer than two rates"
    middle = len(rates) // 2
    halves = []
    for chosen in (rates[:middle], rates[-middle:]):
        pairs = [(rule, rate) for rule in ALIGN for rate in chosen]
        gaps = [_gap([run for run in runs if _option(run, option) == rate], rule) for rule, rate in pairs]
        half = spread(None if gap is None else abs(gap) for gap in gaps).mean
        if half is None:
            return None, UNPAIRED.format("Align rule")
        halves.append(half)
    return halves[0] <= halves[1], (
        f"Mean absolute gap at width {width}: {halves[0]:.1f} points over rates {rates[0]:g} to {rates[middle - 1]:g}, "
        f"{halves[1]:.1f} over {rates[-middle]:g} to {rates[-1]:g} (rates at which backprop diverged are left out)."
    )


def _low_data(data: Result) -> Judged:
    """The gaps with the fewest examples are at least -1 point, and at most 1 below those with all."""
    width, option = widths(data["runs"])[-1], data["experiment"]["option"]
    sizes = sorted({_option(run, option) or float("inf") for run in data["runs"]})
    words, holds = [], True
    for rule in ALIGN:
        gaps = []
        for size in (sizes[0], sizes[-1]):
            runs = [run for run in _of_width(data, width) if (_option(run, option) or float("inf")) == size]
            gap = _gap(runs, rule)
            if gap is None:
                return None, UNPAIRED.format(rule)
            gaps.append(gap)
        holds = holds and gaps[0] >= max(gaps[1] - 1.0, -1.0)
        words.append(f"{rule} {gaps[0]:+.1f} points with the fewest, {gaps[1]:+.1f} with the most")
    wanted = "at least -1 with the fewest, and at most 1 below that with the most"
    return holds, f"Gap at width {width}: {'; '.join(words)} ({wanted})."


def _seeds(data: Result) -> Judged:
    """At the widest network each rule's mean gap is within two standard errors of 0, or within one point."""
    width, words, holds = widths(data["runs"])[-1], [], True
    for line in series_of(data["runs"]):
        if line.rule in ALIGN:
            gap, count = line.gap(width), len(line.at(width))
            if gap.mean is None or gap.std is None:
                return None, "fewer than two seeds"
            error = gap.std / count**0.5
            holds = holds and abs(gap.mean) <= max(2 * error, 1.0)
            words.append(f"{line.rule} {gap.mean:+.2f} ± {error:.2f}")
    if not words:
        return None, UNPAIRED.format("Align rule")
    return holds, f"Gap at width {width}, mean ± standard error of the seeds: {'; '.join(words)} points."


def _time(data: Result) -> Judged:
    """An Align step takes at most 1.5 times backprop's at the widest network: 4/3 by the count of passes."""
    width = widths(data["runs"])[-1]
    lines: dict[str, Series] = {line.rule: line for line in series_of(data["runs"])}
    base = lines["backprop"].step_milliseconds(width).mean if "backprop" in lines else None
    if not base:
        return None, "no time of backprop"
    ratios = {rule: (lines[rule].step_milliseconds(width).mean or 0.0) / base for rule in ALIGN if rule in lines}
    if not ratios:
        return None, "no time of an Align rule"
    words = ", ".join(f"{rule} {ratio:.2f}" for rule, ratio in ratios.items())
    return all(0 < ratio <= 1.5 for ratio in ratios.values()), (
        f"Time of a step over backprop's at width {width}: {words} (at most 1.5)."
    )


def _aligned(data: Result) -> Judged:
    """At the widest network the score ends above 0.5 and above both controls, and at all epochs is above 0.5."""
    found = widths(data["runs"])
    ends = {width: _last(_of_width(data, width), "alignment") for width in found}
    wide = _of_width(data, found[-1])
    controls = [_last(wide, key) or 0.0 for key in ("alignment_shuffled", "alignment_shuffled_update")]
    points = [finite(point.get("alignment")) for run in wide if run["rule"] == "backprop" for point in run["curve"]]
    known = [point for point in points if point is not None]
    last = ends[found[-1]]
    if last is None or not known:
        return None, "no scores; log.alignment_every=1 analysis.track_errors=true measures them"
    words = ", ".join(f"{value:.2f} at width {width}" for width, value in ends.items() if value is not None)
    return min(known) > 0.5 and last > max(controls), (
        f"Score of backprop's change at the end: {words}; at the widest never below {min(known):.2f} in training; "
        f"controls {controls[0]:.2f} (weights shuffled) and {controls[1]:.2f} (update shuffled)."
    )


def _moves_little(data: Result) -> Judged:
    """Backprop's relative change of weights and of layer inputs falls from the narrowest to the widest network."""
    found, words, holds = widths(data["runs"]), [], True
    for key, name in (("weight_change", "weights"), ("input_change", "layer inputs")):
        first, last = (_last(_of_width(data, width), key) for width in (found[0], found[-1]))
        if first is None or last is None:
            return None, "no measurements; log.alignment_every=1 analysis.track_errors=true makes them"
        holds = holds and last < first
        words.append(f"{name} {first:.1%} at width {found[0]}, {last:.1%} at width {found[-1]}")
    return holds, f"Relative change under backprop: {'; '.join(words)}."


CLAIMS: dict[str, tuple[str, Callable[[Result], Judged]]] = {
    "width": ("Align rules approach backprop on wide networks", lambda data: _narrow_and_wide(data, 2.0)),
    "during_training": ("Wide networks are highly aligned, all through training", _aligned),
    "learning_rate": ("Align rules match backprop closely on wide networks at small learning rates", _small_rates),
    "standard": (
        "Align rules approach backprop in the standard parameterisation with Adam too",
        lambda data: _narrow_and_wide(data, 3.0),
    ),
    "low_data": ("Align rules are particularly advantageous with few data", _low_data),
    "seeds": ("Align rules equal backprop within the error of the seeds", _seeds),
    "time": ("An Align step costs one forward pass more than backprop's three", _time),
    "add": ("Align rules approach backprop in wide recurrent networks", lambda data: _narrow_and_wide(data, 2.0)),
    "movement": ("Weights and activations of wide networks move little", _moves_little),
    "imagenet": ("Align rules match backprop closely on ImageNet", lambda data: _narrow_and_wide(data, 3.0)),
}


def verdict(data: Result) -> Verdict | None:
    """The verdict on the claim of an experiment; None for a comparison that makes none."""
    asked: Any = (data.get("experiment") or {}).get("claim")
    if asked not in CLAIMS:
        return None
    claim, judge = CLAIMS[asked]
    return Verdict(claim, *judge(data))
