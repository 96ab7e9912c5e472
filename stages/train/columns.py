"""Trainers whose rows say more than `ROW_COLUMNS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from stages.train.trainer import PairTrainer

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


class ColumnTrainer(PairTrainer):
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
