"""Does the reference that the config names read the policy's tokens? Seen without weights."""

from __future__ import annotations

from schemas.config import RunConfig
from stages.contract import ModelRef
from stages.text.render import load_tokenizer
from stages.text.vocabulary import refuse_other_tokens


def check_reference(policy: ModelRef, reference: ModelRef, config: RunConfig) -> None:
    """Raises UserError for another vocabulary."""
    trust = config.model.trust_remote_code
    refuse_other_tokens(
        reference,
        load_tokenizer(policy, trust),
        "its log-probabilities",
        "model.reference",
        "Name the model that the policy was trained from.",
        trust,
    )
