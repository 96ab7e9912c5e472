"""Losses that are asked for and not there say why, in one sentence."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from schemas.config.loss import LossConfig


@pytest.mark.parametrize(
    ("name", "why"), [("kto", "single answers"), ("rpo", "DPO \\+ NLL"), ("cpo", "simpo"), ("orpo", "odds")]
)
def test_losses_that_are_not_there_say_why(name: str, why: str) -> None:
    with pytest.raises(ValidationError, match=f"{name} .*{why}"):
        LossConfig(type=name)
