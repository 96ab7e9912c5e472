"""Are the layers there that a LoRA training names? Seen without weights."""

from __future__ import annotations

from schemas.config import RunConfig
from schemas.config.trainer import TrainerConfig
from stages.contract import ModelRef
from stages.models.strict import skeleton
from stages.train.model import adapter_config


def check_targets(model: ModelRef, config: RunConfig, section: TrainerConfig) -> None:
    """Raises UserError, with the names there are, for one that is no linear layer of the model."""
    adapter_config(section, skeleton(model, config.model.trust_remote_code))
