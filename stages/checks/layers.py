"""Can the model's layers be trained as the config says? Seen without weights."""

from __future__ import annotations

from schemas.config import RunConfig
from schemas.config.trainer import TrainerConfig
from schemas.config.training import TrainConfig
from schemas.errors import UserError
from stages.contract import ModelRef
from stages.models.strict import skeleton


def check_layers(model: ModelRef, config: RunConfig, section: TrainerConfig) -> list[str]:
    """What there is to say of them. Raises UserError for a model that TRL's forward cannot run, for a LoRA target, with the names there
    are, that is no linear layer of the model, for weights that objectives in sequence cannot protect, for rows that are no neurons where
    ALLO selects rows, and where both together need too much memory."""
    made = skeleton(model, config.model.trust_remote_code)
    if made.base_model is made:
        raise UserError(
            f"{type(made).__name__} has no text model of its own under its head, which TRL's trainers need",
            where=section.section,
            fix="Curate its pairs and export them to train elsewhere (`--until select`), or use another model.",
        )
    if section.names_targets:
        from stages.train.model import adapter_config  # PEFT takes a second to import

        adapter_config(section, made)
    if isinstance(section, TrainConfig) and section.way == "sequence":
        from stages.train.optimizers.subspace import refuse_unprotected

        refuse_unprotected(made, section.method)
    if isinstance(section, TrainConfig) and section.allo.on and section.allo.unit == "row":
        from stages.train.allo.masks import refuse_transposed

        refuse_transposed(made)
    if isinstance(section, TrainConfig) and section.way == "sequence" and section.allo.on:
        from stages.train.room import check_room

        return check_room(made, section)
    return []
