"""Models that read the policy's tokens must have its vocabulary."""

from __future__ import annotations

from typing import Any

from schemas.errors import UserError
from stages.contract import ModelRef
from stages.text.render import load_tokenizer


def refuse_other_tokens(model: ModelRef, tokenizer: Any, what: str, where: str, fix: str, trust: bool = False) -> None:
    """Raise UserError unless the model's tokenizer has the entries of `tokenizer`, the policy's. what: of other tokens otherwise."""
    if load_tokenizer(model, trust).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{model.name} has another vocabulary than the policy: {what} would be of other tokens",
            where=where,
            fix=fix,
        )
