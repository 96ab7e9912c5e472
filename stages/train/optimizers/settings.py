"""What a merge does: its settings, checked, and as plain values in a parameter group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any, Literal, get_args

from schemas.errors import UserError
from stages.train.optimizers.rules import RULES, Rule

Preset = Literal["paper", "released"]
AlphaSchedule = Literal["lr", "constant"]


@dataclass(frozen=True)
class Merge:
    """Online merging of AdamW's step with a task vector (arXiv 2405.17931); docs/methods.md section 5.

    merge: the name of a rule in `rules/`, or none.
    preset: paper (the text) or released (what QwenLM/online_merging_optimizers computes). They differ: see the rules.
    alpha: a in [0, 1), the weight of the task vector.  reserve: p in (0, 1], the share of entries kept, of a rule that drops any.
    every: merge after so many AdamW steps (the paper's step-K merging).
    alpha_schedule: lr: a_t = alpha * lr_t / peak lr (ours), so that a step with lr 0 moves nothing; constant: a_t = alpha.
    rescale: released only: scale what was kept to the L1 norm before the mask.
    """

    merge: str
    alpha: float
    reserve: float = 1.0
    preset: Preset = "paper"
    every: int = 1
    alpha_schedule: AlphaSchedule = "lr"
    rescale: bool = False

    def __post_init__(self) -> None:
        choices = {"merge": ("none", *RULES), "preset": get_args(Preset), "alpha_schedule": get_args(AlphaSchedule)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(
                    f"{name} cannot be {getattr(self, name)!r}", where="merge", fix=f"Use {' or '.join(known)}."
                )
        if not 0 <= self.alpha < 1:
            raise UserError(f"alpha is {self.alpha}", where="merge.alpha", fix="It is a share: 0 <= alpha < 1.")
        if not 0 < self.reserve <= 1:
            raise UserError(f"reserve is {self.reserve}", where="merge.reserve", fix="It is a share: 0 < reserve <= 1.")
        if self.every < 1:
            raise UserError(f"every is {self.every}", where="merge.every", fix="Merge every 1 or more steps.")
        dense = self.merge != "none" and RULES[self.merge].selection == "none"
        if self.rescale and (self.preset != "released" or dense):
            raise UserError(
                "rescale belongs to the released code of OnDARE and OnTIES",
                where="merge.rescale",
                fix="Set preset: released, or leave rescale out.",
            )
        if dense and (self.preset != "paper" or self.reserve != 1):
            raise UserError(
                f"{self.merge} is a dense merge of this project: it has no released form and drops nothing",
                where="merge.preset, merge.reserve",
                fix="Leave both out.",
            )

    def rule(self) -> Rule:
        """The merge rule; not for none."""
        return _rule(self.merge, self.reserve < 1, self.preset == "released", self.rescale)

    @property
    def active(self) -> bool:
        """Whether the merge changes AdamW's step at all. OnTIES as released always does: it drops what the task vector
        outvotes even at alpha = 0."""
        if self.merge == "none":
            return False
        always = self.preset == "released" and RULES[self.merge].changes_at_zero
        return always or self.alpha > 0 or self.reserve < 1

    @property
    def random(self) -> bool:
        """Whether what it drops is drawn at random."""
        return self.active and self.reserve < 1 and RULES[self.merge].selection == "random"

    @property
    def needs_task_vector(self) -> bool:
        """Whether the merge cannot do without one."""
        return self.active and not RULES[self.merge].anchored

    def alpha_at(self, lr: float, peak_lr: float) -> float:
        """a_t of a step with learning rate `lr`."""
        if self.alpha_schedule == "constant":
            return self.alpha
        return min(self.alpha * lr / peak_lr, 1.0) if peak_lr else 0.0

    def knobs(self) -> dict[str, Any]:
        """As entries of a parameter group: strings and numbers only."""
        return asdict(self)

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Merge:
        """The settings of a parameter group."""
        return cls(**{field.name: group[field.name] for field in fields(cls)})


@cache
def _rule(name: str, partial: bool, released: bool, rescale: bool) -> Rule:
    return RULES[name](partial, released, rescale)


OFF = Merge("none", 0.0)
