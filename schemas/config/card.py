"""Config of what model and dataset cards say and the pipeline cannot know."""

from __future__ import annotations

from schemas.config.base import Section, execution

_LICENCE = r"^[a-z0-9][a-z0-9.-]*$"


class CardConfig(Section):
    """Cards of models and data sets."""

    model_license: str | None = execution(
        None,
        "licence of the trained model, as the hub spells it (apache-2.0, other, ...); never guessed",
        pattern=_LICENCE,
    )
    dataset_license: str | None = execution(
        None, "licence of the exported pairs, as the hub spells it (cc-by-4.0, ...); never guessed", pattern=_LICENCE
    )
