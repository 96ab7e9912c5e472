"""Trainers whose rows say something of single tokens; learning, which uses key tokens only. docs/methods.md section 7."""

from __future__ import annotations

from typing import Any, ClassVar

from stages.train.allo.collators import Collate, KeyTokens
from stages.train.confined import ConfinedTrainer


class TokenTrainer(ConfinedTrainer):
    """columns: what rows have besides `ROW_COLUMNS`; collate: made from TRL's, of whole pairs."""

    columns: ClassVar[tuple[str, ...]]
    collate: ClassVar[type[Any]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        whole: Collate = self.data_collator
        self.data_collator = self.collate(whole)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        self._signature_columns: Any = list(dict.fromkeys([*columns, *self.columns]))


class LearnTrainer(TokenTrainer):
    """DPO whose rejected side counts in its `key_tokens` only, where rows have them."""

    columns = ("key_tokens",)
    collate = KeyTokens
