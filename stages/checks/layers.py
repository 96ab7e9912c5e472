"""Can the model's layers be trained as the config says? Seen without weights."""

from __future__ import annotations

from schemas.config import RunConfig
from schemas.config.trainer import TrainerConfig
from schemas.config.training import TrainConfig
from stages.contract import ModelRef
from stages.models.strict import skeleton
from stages.train.model import adapter_config
from stages.train.optimizers.subspace import refuse_unprotected


def check_layers(model: ModelRef, config: RunConfig, section: TrainerConfig) -> None:
    """Raises UserError for a LoRA target, with the names there are, that is no linear layer of the model, and for weights that objectives in
    sequence cannot protect."""
    made = skeleton(model, config.model.trust_remote_code)
    if section.names_targets:
        adapter_config(section, made)
    if isinstance(section, TrainConfig) and section.way == "sequence":
        refuse_unprotected(made, section.method)
