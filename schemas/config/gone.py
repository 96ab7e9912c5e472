"""Config keys that there were, and what a config that still has one is told: files of old runs hold every key there was then."""

from __future__ import annotations

from collections.abc import Sequence

_AUTHORED = (
    "pairs of evaluate.authored are only evaluated, all of them: no split, score, writer or known error of theirs was ever used there, so"
    " that nothing takes the place of these keys: delete them. For pairs to train on they are keys of pairs.sources"
)
GONE = dict.fromkeys(
    (
        "evaluate.authored.*.splits",
        "evaluate.authored.*.on_policy",
        "evaluate.authored.*.fields.split",
        "evaluate.authored.*.fields.chosen_score",
        "evaluate.authored.*.fields.rejected_score",
        "evaluate.authored.*.fields.chosen_model",
        "evaluate.authored.*.fields.rejected_model",
        "evaluate.authored.*.fields.completion_model",
        "evaluate.authored.*.fields.label_error",
    ),
    _AUTHORED,
)
"""Key, `*` for a place in a list -> what is in its place."""


def instead_of(key: Sequence[str | int]) -> str | None:
    """What is in the place of a key that is gone; None for one that never was."""
    return GONE.get(".".join("*" if isinstance(step, int) else step for step in key))
