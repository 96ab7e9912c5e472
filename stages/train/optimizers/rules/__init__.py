"""The merge rules by their names in `train.optimizer`. A new one: a class in a file here, its entry below, its name in the config."""

from __future__ import annotations

from stages.train.optimizers.rules.anchor import Anchor
from stages.train.optimizers.rules.ondare import OnDare
from stages.train.optimizers.rules.onties import OnTies
from stages.train.optimizers.rules.rule import Rule

RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (OnDare, OnTies, Anchor)}

__all__ = ["RULES", "Rule"]
