"""The stages in the order data flows: what each reads and writes and what its result depends on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

from schemas.config import RunConfig


@dataclass(frozen=True)
class StageSpec:
    """A stage as the driver sees it, without importing what computes it.

    reads: tables; `table:0` is round 0's; a trailing `?` marks one that may be absent.
        The first one is what a ShardStage's shards are cut from.
    writes: tables; dropped rows go to _dropped/<first of them>.
    sections: config sections whose semantic fields its result depends on (`seed` always counts).
    models: roles its result depends on.
    kept_rows: (units, table): what the account says was kept of these units are the rows of that table.
    version: bumped when the code's output changes.
    engine: uses the inference engine; neighbours with the same models share a worker process.
    when: (config key, value): the stage is part of a run only if the key has the value.
    size: config key of the rows per shard of a ShardStage; `<name>.shard_size` if empty.
    """

    name: str
    kind: Literal["shard", "table", "artifact"]
    entry: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    sections: tuple[str, ...]
    models: tuple[str, ...] = ()
    kept_rows: tuple[tuple[str, ...], str] | None = None
    version: int = 1
    engine: bool = False
    per_round: bool = True
    when: tuple[str, str | bool] | None = None
    size: str = ""

    def is_part_of(self, config: RunConfig) -> bool:
        """Whether a run with this config has the stage at all."""
        return self.when is None or config_value(config, self.when[0]) == self.when[1]


def config_value(config: RunConfig, key: str) -> Any:
    """The value of a dotted config key."""
    return reduce(getattr, key.split("."), config)


STAGES: tuple[StageSpec, ...] = (
    StageSpec(
        "prompts",
        "table",
        "stages.prompts.stage:Prompts",
        (),
        ("prompts",),
        ("languages", "prompts", "pairs.on_empty_language"),
        kept_rows=(("row",), "prompts"),
        per_round=False,
        version=2,
    ),
    StageSpec(
        "sft",
        "artifact",
        "stages.sft.stage:Sft",
        (),
        ("conversations", "sft_metrics"),
        ("languages", "model", "text", "sft", "execution"),
        ("start",),
        kept_rows=(("row",), "conversations"),
        per_round=False,
        when=("sft.on", True),
        version=2,
    ),
    StageSpec(
        "generate",
        "shard",
        "stages.generate.stage:Generate",
        ("prompts",),
        ("candidates",),
        ("languages", "model", "text", "engine", "generate", "execution"),
        ("policy",),
        engine=True,
        version=2,
    ),
    StageSpec(
        "judge",
        "shard",
        "stages.judge.stage:Judge",
        ("candidates", "prompts"),
        ("judgements",),
        ("model", "text", "engine", "judge", "execution"),
        ("judge",),
        version=3,
        engine=True,
    ),
    StageSpec(
        "pairs",
        "table",
        "stages.pairs.stage:Pairs",
        ("prompts?", "candidates?", "judgements?"),
        ("pairs",),
        ("languages", "pairs", "text", "generate.sampling", "model.trust_remote_code"),
        ("policy",),
        kept_rows=(("prompt", "row"), "pairs"),
        version=2,
    ),
    StageSpec(
        "precondition",
        "table",
        "stages.gradients.preconditioner:Precondition",
        ("pairs",),
        ("preconditioner",),
        (
            "model",
            "text",
            "gradients.sketch.seed",
            "gradients.sketch.include",
            "gradients.sketch.exclude",
            "gradients.sketch.precondition_pairs",
            "gradients.of",
            "execution",
        ),
        ("policy",),
        version=2,
        when=("gradients.sketch.precondition", "adam_factored"),
    ),
    StageSpec(
        "aggregate",
        "shard",
        "stages.gradients.aggregate:Aggregate",
        ("pairs", "preconditioner?"),
        ("contributions", "sums"),
        (
            "model",
            "text",
            "gradients",
            "loss",
            "execution",
            "conflict.weighting",
            "conflict.metric",
            "conflict.direction",
            "conflict.ema_gamma",
            "conflict.ema_batch",
        ),
        ("policy", "reference"),
        kept_rows=(("pair",), "contributions"),
        version=2,
        when=("gradients.sketch.method", "one_sided"),
        size="gradients.aggregate_size",
    ),
    StageSpec(
        "gradients",
        "shard",
        "stages.gradients.stage:Gradients",
        ("pairs", "preconditioner?", "contributions?", "sums?"),
        ("gradients",),
        ("model", "text", "gradients", "execution"),
        ("policy", "reference"),
        kept_rows=(("pair",), "gradients"),
    ),
    StageSpec(
        "conflict",
        "table",
        "stages.conflict.stage:Conflict",
        ("gradients", "pairs", "contributions?", "sums?"),
        ("scores", "gram", "directions"),
        ("languages.seen", "conflict", "loss"),
        kept_rows=(("pair",), "scores"),
        version=3,
    ),
    StageSpec(
        "select",
        "table",
        "stages.select.stage:Select",
        ("pairs", "scores", "gradients?"),
        ("curated", "rejected"),
        ("select",),
        kept_rows=(("pair",), "curated"),
    ),
    StageSpec(
        "train",
        "artifact",
        "stages.train.stage:Train",
        ("curated", "gradients", "pairs", "pairs:0"),
        ("metrics",),
        ("model", "text", "loss", "train", "execution"),
        ("policy", "reference", "sft", "base", "token_reward"),
        version=2,
    ),
    StageSpec(
        "evaluate",
        "artifact",
        "stages.evaluate.stage:Evaluate",
        ("pairs:0", "prompts?", "curated", "conversations?"),
        ("evaluation", "answers"),
        ("languages", "model", "text", "engine", "judge.rubric", "evaluate", "execution"),
        ("initial", "trained", "evaluation_judge"),
        version=3,
        engine=True,
    ),
    StageSpec("report", "artifact", "stages.report.stage:Report", (), (), ("report",), per_round=False),
)

BY_NAME = {spec.name: spec for spec in STAGES}
