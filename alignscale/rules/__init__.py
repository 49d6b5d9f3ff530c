"""Learning rules. Every module of this folder is imported, so a new file is enough to add a rule."""

import importlib
import pkgutil

from alignscale.rules.base import RULES, LocalRule, Rule, make_rule, register

__all__ = ["RULES", "LocalRule", "Rule", "make_rule", "register"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
