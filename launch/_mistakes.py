"""A command line checked as a whole: every job is composed as Hydra will, and a mistake becomes one line.

The line names the option, what was found, what is valid and, where there is one, the nearest valid name.
"""

import argparse
import dataclasses
import difflib
import importlib.metadata
import itertools
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from _options import CONFIGS, GROUPS, TYPES, typed
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from yaml import YAMLError

from alignscale.choices import ConfigError
from alignscale.validation import validate

WORDS = {int: "int", float: "float", bool: "bool (true or false)", str: "str"}
NAME = re.compile(r"[+~]*[\w/@:-]+(\.[\w/@:-]+)*")


def check(name: str, arguments: Sequence[str]) -> list[Any]:
    """The options of every job that a command line asks for; of none where it asks for Hydra's help.

    Raises ConfigError for the first mistake; nothing is written.

    name: of the configuration in configs/.
    """
    if "--version" in arguments:
        print(f"alignscale {importlib.metadata.version('alignscale')}")
        sys.exit()
    flags, strangers = get_args_parser().parse_known_args(list(arguments))
    _check_flags(flags, strangers)
    if flags.hydra_help or flags.shell_completion or flags.experimental_rerun:
        return []
    given: list[str] = flags.overrides
    folders = [f'hydra.searchpath=["file://{Path(flags.config_dir).absolute()}"]'] if flags.config_dir else []
    try:
        overrides = _parsed(given)
        for override in overrides:
            _check_override(override, flags.multirun)
        jobs = BasicSweeper.split_arguments(overrides, None)[0] if flags.multirun else [given]
        with initialize_config_dir(version_base="1.3", config_dir=CONFIGS):
            composed = [compose(flags.config_name or name, [*job, *folders]) for job in jobs]
        configs = [_checked(options, given) for options in composed]
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as problem:
        raise ConfigError(explain(problem, given)) from problem
    if len(configs) > 1:  # a single job does it itself
        for config in configs:
            validate(config)
    return configs


def _check_flags(flags: argparse.Namespace, strangers: Sequence[str]) -> None:
    if strangers:
        dashed = strangers[0].startswith("-")
        remedy = "options as epochs=3, without dashes" if dashed else "flags as --multirun before or after all options"
        raise ConfigError(f"{strangers[0]}: expected {remedy}; --help lists both")
    modes = [mode for mode in ("run", "multirun", "cfg", "shell_completion", "info") if getattr(flags, mode)]
    if len(modes) > 1:
        raise ConfigError(f"--{modes[0]} --{modes[1]}: expected one of them".replace("_", "-"))
    if flags.resolve and not (flags.cfg or flags.help):
        raise ConfigError("--resolve: expected --cfg or --help beside it")
    if flags.config_path:
        raise ConfigError("--config-path: expected --config-dir, for a folder of your own beside configs/")
    if flags.config_dir and not Path(flags.config_dir).is_dir():
        raise ConfigError(f"--config-dir={flags.config_dir}: expected a folder, found none")


def _parsed(given: Sequence[str]) -> list[Override]:
    parsed: list[Override] = []
    for key, repeated in itertools.groupby(given, lambda line: line.partition("=")[0]):
        values = list(dict.fromkeys(repeated))
        if len(values) > 2 or (len(values) > 1 and key.endswith("urls")):
            raise ConfigError(
                f"{values[0]} {values[1]}: expected {key} once; a shell makes words of braces without quotes: give "
                f"{key} in quotes, or several values as {key}=a,b"
            )
    for line in given:
        key, equals, value = line.partition("=")
        if not (equals or key.startswith("~")) or not NAME.fullmatch(key):
            raise ConfigError(f"{line}: expected option=value; --help lists the options")
        try:
            parsed += OverridesParser.create().parse_overrides([line])
        except OverrideParseException as problem:
            quoted = f"the value in two pairs of quotes: '{key}=\"{value}\"'"
            remedy = f"a list as {key}=[1,2], without spaces" if value.startswith(("[", "{")) else quoted
            raise ConfigError(f"{line}: cannot be read; expected {remedy}") from problem
    return parsed


def _check_override(override: Override, multirun: bool) -> None:
    """What Hydra would take, or refuse in words of its own."""
    key, line = override.key_or_group, str(override.input_line)
    if re.match(r"hydra[./]", key):
        return
    if override.is_delete():
        raise ConfigError(f"{line}: expected option=value; no option can be deleted, and one left out has its default")
    if line.startswith("+"):
        known = key in TYPES or key == "experiment"
        remedy = f"expected {line.lstrip('+')}, without +" if known else f"no such option{_hint(key, TYPES)}"
        raise ConfigError(f"{line}: {remedy}; the options are fixed, and none can be added")
    if override.package is not None:
        raise ConfigError(f"{line}: expected {key}=<choice>, without @{override.package}")
    if key.removesuffix(".name") in GROUPS and key not in GROUPS:
        raise ConfigError(f"{line}: expected {line.replace('.name', '', 1)}, which brings the options of that choice")
    if override.is_sweep_override():
        if not multirun:
            listed = f"write a {_kind(key)}, or " if get_args(TYPES.get(key)) else ""
            raise ConfigError(f"{line}: expected one value, found several; {listed}add --multirun for a run with each")
        if not override.is_discrete_sweep() or isinstance(override.value(), Glob):
            raise ConfigError(f"{line}: expected values as 1,2,3 or range(1,4)")
    elif key in GROUPS and not isinstance(override.value(), str):
        raise ConfigError(f"{line}: expected {_kind(key)}")
    elif key == "experiment" and not isinstance(override.value(), str | list):
        raise ConfigError(f"{line}: expected the name of a file in configs/experiment, or nothing at all")


def _checked(options: DictConfig, overrides: Sequence[str]) -> Any:
    """As dataclasses, without what OmegaConf lets pass: a list in a list, and an int that no tensor can hold."""
    config = typed(options)  # resolves every value
    for path, kind in TYPES.items():
        value = OmegaConf.select(options, path)  # None where another choice has it
        listed = get_origin(kind) is list and value is not None
        for part in value if listed else [value]:
            where = _given(path, overrides) or path
            if listed and type(part) not in get_args(kind):
                raise ConfigError(f"{where}: expected {_kind(path)}, found {part}")
            if isinstance(part, int) and not -(2**63) <= part < 2**63:
                raise ConfigError(f"{where}: expected int of at most 64 bits")
    return config


def explain(problem: BaseException, overrides: Sequence[str]) -> str:
    """One line on why options could not be composed. overrides: those of the command line."""
    if isinstance(problem, MissingConfigException):
        return _unknown_choice(problem, overrides)
    cause: BaseException | None = problem
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    if cause is None or not cause.full_key:
        return "; ".join(line.strip() for line in str(problem).splitlines() if line.strip())
    path = re.sub(r"\[\d+\]", "", cause.full_key)
    blamed = re.match(r"In '([^']+)'", str(problem))
    where = f"{blamed[1]}.yaml: {path}" if blamed else _given(path, overrides) or path
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return f"{where}: {_unknown_option(cause.parent_node, path)}"
    if isinstance(cause, InterpolationResolutionError):
        return f"{where}: {str(cause).splitlines()[0]}; expected a value, or the name of another option in ${{}}"
    if isinstance(cause, MissingMandatoryValue):
        return f"{where}: expected {_kind(path)}, found none"
    if where.partition("=")[0].startswith(f"{path}."):
        return f"{where}: {path} has no options of its own; expected {path}=<{_kind(path)}>"
    return f"{where}: expected {_kind(path)}"


def _unknown_choice(problem: MissingConfigException, overrides: Sequence[str]) -> str:
    path = str(problem.missing_cfg_file)
    group, slash, choice = path.rpartition("/") if path.startswith("hydra/") else path.partition("/")
    group, choice = (group, choice) if slash else ("", path)
    if not group:
        valid = sorted(path.stem for path in Path(CONFIGS).glob("*.yaml"))
        return f"--config-name={choice}: expected one of {', '.join(valid)}{_hint(choice, valid)}"
    valid = sorted(problem.options or [])
    where = _given(group, overrides) or f"{group}={choice}, which a configuration file asks for"
    folder = "; a folder is data.root=" if group == "data" and "/" in choice else ""
    return f"{where}: expected one of {', '.join(valid)}{_hint(Path(choice).stem, valid)}{folder}"


def _unknown_option(parent: DictConfig, path: str) -> str:
    """What the group has that ``path`` was looked for in, and where else there is an option of that name."""
    group, _, option = path.rpartition(".")
    names = [str(name) for name in parent if not (group in GROUPS and name == "name") and name != "hydra"]
    valid = [f"{group}.{name}" if group else name for name in names]
    having = [choice for choice, node in GROUPS.get(group, {}).items() if hasattr(node, option)]
    if having:
        hint = f"; {option} is one of {group}={' or '.join(having)}"
    elif path in TYPES:
        hint = f"; {option} is one of launch/compare.py"
    else:
        same = [other for other in TYPES if other.rpartition(".")[2] == option]
        hint = _hint(option, valid) or _hint(option, same) or ("" if group else _hint(option, TYPES))
    whose = f"{group}={parent.name}" if group in GROUPS else group or "a run"
    expected = f"; expected one of {', '.join(valid)}" if valid else ""
    return f"{whose} has no option {option}{expected}{hint}"


def _given(path: str, overrides: Sequence[str]) -> str | None:
    """The last override that sets ``path``, a group above it or something below it."""
    for override in reversed(overrides):
        key = override.partition("=")[0]
        if key == path or key.startswith(f"{path}.") or (path.startswith(f"{key}.") and key not in GROUPS):
            return override
    return None


def _hint(name: str, valid: Iterable[str]) -> str:
    """The nearest of dotted names, by their last part."""
    paths: dict[str, list[str]] = {}
    for path in valid:
        paths.setdefault(path.rpartition(".")[2], []).append(path)
    close = difflib.get_close_matches(name.rpartition(".")[2].lower(), paths, n=1)
    return f"; did you mean {' or '.join(paths[close[0]])}?" if close else ""


def _kind(path: str) -> str:
    """What an option takes, in words."""
    kind: Any = TYPES.get(path)
    if path in GROUPS:
        return f"one of {', '.join(sorted(GROUPS[path]))}"
    if dataclasses.is_dataclass(kind):
        return f"a value for one of its options, {', '.join(f'{path}.{one.name}' for one in dataclasses.fields(kind))}"
    if get_origin(kind) is dict:
        return "mapping, as {name:value}"
    if get_args(kind):
        (of,) = get_args(kind)
        return f"list of {of.__name__}, as [{'a,b' if of is str else '1,2'}]"
    return WORDS.get(kind, "a value of another type")
