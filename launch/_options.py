"""The options as Hydra knows them: every choice registered by type, and the type of each option by its dotted name."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from alignscale.choices import DATA, ENGINES, LOSSES, NETS, OPTIMS, SCHEDULES, ConfigError
from alignscale.config import JACOBIANS, TrainConfig, run_folder
from alignscale.rules import RULES

CONFIGS = str(Path(__file__).resolve().parents[1] / "configs")
GROUPS: dict[str, dict[str, Any]] = {
    "rule": {name: rule.options(name=name) for name, rule in RULES.items()},
    "net": dict(NETS),
    "data": dict(DATA),
    "loss": dict(LOSSES),
    "optim": dict(OPTIMS),
    "schedule": dict(SCHEDULES),
    "engine": dict(ENGINES),
    "jacobian": dict(JACOBIANS),
}


@dataclass
class CompareConfig:
    """The grid of ``launch/compare.py``: each rule at each width with each seed, and each value of one more option.

    ``option``: its dotted name (``optim.lr``), or nothing; ``values``: what it takes. ``claim``: the one of
    launch/_report/claims.py that the report judges. ``protocol``: where this differs from the paper's public code.
    """

    title: str = "Learning rules compared"
    rules: list[str] = field(default_factory=lambda: ["backprop", "align_ada", "align_zero"])
    widths: list[int] = field(default_factory=lambda: [8, 32, 128])
    seeds: list[int] = field(default_factory=lambda: [0])
    option: str = ""
    values: list[float] = field(default_factory=list)
    claim: str = ""
    protocol: str = ""
    folder: str = "runs/compare"


@dataclass
class GridConfig(TrainConfig):
    """A comparison: the options of every run, and the grid."""

    compare: CompareConfig = field(default_factory=CompareConfig)


def register() -> None:
    """Make the options of alignscale/config.py and of every choice known to Hydra."""
    store = ConfigStore.instance()
    for name, kind in (("schema", TrainConfig), ("grid_schema", GridConfig)):
        schema = OmegaConf.structured(kind)
        for group in GROUPS:  # a default of one class would refuse the others
            schema[group] = DictConfig(MISSING, ref_type=get_type_hints(kind)[group], is_optional=False)
        store.store(name=name, node=schema)
    for group, choices in GROUPS.items():
        for name, choice in choices.items():
            node = OmegaConf.structured(choice)
            for option in dataclasses.fields(choice):
                if isinstance(getattr(choice, option.name), dict):
                    OmegaConf.set_struct(node[option.name], False)  # a mapping takes any name
            store.store(group=group, name=name, node=node)


def typed(options: DictConfig) -> Any:
    """Hydra's configuration as the dataclasses of alignscale/config.py."""
    return OmegaConf.to_object(options)


def _types(kind: type, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        path = prefix + name
        found[path] = hint
        nested = [type(node) for node in GROUPS[path].values()] if path in GROUPS else [hint]
        for one in nested:
            if dataclasses.is_dataclass(one):
                assert isinstance(one, type)
                found |= _types(one, f"{path}.")
    return found


TYPES = _types(GridConfig)
"""Those of a run and of a comparison, with the options of all choices."""


def apart(runs: Sequence[TrainConfig], given: str) -> None:
    """Raise ConfigError for runs with one folder, where each would take another's place. given: what made them."""
    counts = Counter(map(run_folder, runs))
    twice = next((folder for folder, count in counts.items() if count > 1), None)
    if twice is not None:
        raise ConfigError(
            f"{given}: expected a folder of its own for each of {len(runs)} runs, found the same run twice, {twice}: a "
            "value is there twice, or an option changes no numbers, or run.dir names the folder"
        )
