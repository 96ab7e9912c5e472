"""Trainers whose rows say something of single tokens; learning, which uses key tokens only. docs/methods.md section 7."""

from __future__ import annotations

from stages.train.allo.collators import KeyTokens
from stages.train.columns import ColumnTrainer
from stages.train.confined import ConfinedTrainer


class TokenTrainer(ColumnTrainer, ConfinedTrainer):
    """A ConfinedTrainer whose rows say something of single tokens."""


class LearnTrainer(TokenTrainer):
    """DPO whose rejected side counts in its `key_tokens` only, where rows have them."""

    columns = ("key_tokens",)
    collate = KeyTokens
