"""The run in a few figures: what it was, how much was kept, whether held-out accuracy moved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from schemas.config import RunConfig
from schemas.config.curation import SelectConfig
from schemas.manifests import StageManifest
from schemas.reasons import OFF_TOPIC
from stages.evaluate.metrics import WIN_RATES
from stages.report.conflicts import Conflicts
from stages.report.data import Tables
from stages.report.results import ALL, Results
from stages.report.text import count, fixed, percent
from stages.schedule import schedule


@dataclass(frozen=True)
class Card:
    """A headline figure with what it means."""

    title: str
    value: str
    detail: str


_UNSCORED = ("no_score", OFF_TOPIC)
"""Reasons of pairs that select did not rank."""
_LEFT_OUT = {"pair": "the pair", "answers": "pairs that share an answer", "group": "shared answers and translations"}


def cards(tables: Tables, conflicts: Sequence[Conflicts], results: Sequence[Results]) -> list[Card]:
    """Pairs, kept pairs, accuracy before and after, conflicting languages; only of what is there. Latest round."""
    found = []
    made = [r for r in tables.rounds() if tables.has("pairs", r)]
    if made:
        pairs = tables.read("pairs", made[-1], ["split"])
        train = pairs.filter(split="train").height
        found.append(Card("Preference pairs", count(len(pairs)), f"{count(train)} to train on, the rest held out"))
    chosen = [r for r in tables.rounds() if tables.has("curated", r)]
    if chosen:
        kept = tables.read("curated", chosen[-1], ["pair_id"]).height
        left = tables.read("rejected", chosen[-1], ["reason"])
        total = kept + left.filter(~pl.col("reason").is_in(_UNSCORED)).height
        share = percent(kept / total) if total else "–"
        found.append(Card("Kept for training", count(kept), f"{share} of {count(total)} scored pairs"))
    found += _accuracy(results)
    if conflicts and conflicts[-1].scopes and conflicts[-1].scopes[0].compared:
        model = conflicts[-1].scopes[0]
        detail = "whole model, cosine below zero"
        if model.expected is not None:
            detail += f"; noise alone would give about {fixed(model.expected)}"
        found.append(Card("Language pairs in conflict", f"{model.negative} of {model.compared}", detail))
    return found


def _accuracy(results: Sequence[Results]) -> list[Card]:
    """Preference accuracy over all languages on test or authored pairs, whichever are more, of the last round."""
    rows = [
        (row.n, split == "test", split, row)
        for result in results[-1:]
        for split, _, measured in result.splits
        for one in measured
        for row in one.rows
        if split in ("test", "authored") and one.name == "accuracy" and row.language == ALL and row.after is not None
    ]
    if not rows:
        return []
    n, _, split, row = max(rows, key=lambda found: found[:2])
    detail = f"before → after training, {count(n)} {split} pairs"
    if row.after_interval:
        low, high = row.after_interval
        detail += f"; after: 95% interval {percent(low, 1)} to {percent(high, 1)}"
    return [Card("Held-out accuracy", f"{percent(row.before, 1)} → {percent(row.after, 1)}", detail)]


def facts(
    config: RunConfig, manifests: Sequence[StageManifest], results: Sequence[Results] = ()
) -> list[tuple[str, str]]:
    """(name, value) lines that say what was run. No judge is named where nobody judged."""
    measured = {one.name for result in results for _, _, measures in result.splits for one in measures}
    compared = bool(measured & set(WIN_RATES))
    names = {role: name for manifest in manifests for role, name in manifest.models.items()}
    languages = ", ".join(config.languages.seen)
    unseen = ", ".join(config.languages.unseen)
    scored = "other languages' direction" if config.conflict.against == "others" else "merged direction"
    trusted = config.conflict.target != "train"
    train = config.train
    steps = f"{train.max_steps} steps" if train.max_steps > 0 else f"{train.epochs:g} epochs"
    lines = [
        ("Policy", config.model.policy + (f" @ {config.model.revision}" if config.model.revision else "")),
        *([("Supervised fine-tuning", _sft(config))] if config.sft.on else []),
        *(
            [("Judge", ", ".join(name or "the policy of the round, judging itself" for name in config.judge_models))]
            if not config.imported
            else []
        ),
        *(
            [("Evaluation judge", config.model.evaluation_judge or names.get("evaluation_judge", "the round-0 policy"))]
            if compared
            else []
        ),
        *([("Second evaluation judge", names["second_judge"])] if compared and "second_judge" in names else []),
        ("Languages", languages + (f"; only evaluated: {unseen}" if unseen else "")),
        ("Rounds", str(config.rounds)),
        ("Seed", str(config.seed)),
        (
            "Loss",
            f"{config.loss.label}, β = {config.loss.beta:g}"
            + (f", α = {config.loss.alpha:g}" if config.loss.alpha else ""),
        ),
        ("Sketch", _sketch(config, manifests)),
        (
            "Conflict score",
            f"cosine with the {scored} ({config.conflict.surgery} "
            f"{'per layer group' if config.conflict.scope == 'layer' else 'on the whole model'}, {config.conflict.direction}, "
            f"metric {config.conflict.metric}, weighting {config.conflict.weighting}, "
            + (
                f"of the {config.conflict.target} split's pairs)"
                if trusted
                else f"{_LEFT_OUT[config.conflict.leave_out]} left out)"
            ),
        ),
        ("Selection", _selection(config.select)),
        (
            "Training",
            f"{'LoRA, rank ' + str(train.lora.r) if train.method == 'lora' else 'all weights'}, {train.optimizer}, "
            f"learning rate {train.learning_rate:g}, {train.batch_size} pairs a step, {steps}",
        ),
    ]
    if config.imported:
        lines.insert(0, ("Pairs from", ", ".join(source.path for source in config.pairs.sources)))
    else:
        lines.insert(3, ("Engine", f"{config.engine.kind}, {config.generate.candidates} candidates a prompt"))
    return lines


def _sft(config: RunConfig) -> str:
    """What the sft stage makes of the policy before round 0."""
    sft = config.sft
    how = f"LoRA, rank {sft.lora.r}" if sft.method == "lora" else "all weights"
    steps = f"{sft.max_steps} steps" if sft.max_steps > 0 else f"{sft.epochs:g} epochs"
    return f"on {', '.join(source.path for source in sft.sources)}; {how}, learning rate {sft.learning_rate:g}, {steps}"


def _sketch(config: RunConfig, manifests: Sequence[StageManifest]) -> str:
    """How gradients were compressed, and how far that moves a cosine."""
    sketch = config.gradients.sketch
    size = {
        "two_sided": f"at most {count(sketch.dim)} numbers per pair",
        "one_sided": f"one-sided (Flora), rank {sketch.rank}",
        "exact": "exact gradients",
    }[sketch.method]
    metric = ", in Adam's factored metric" if sketch.precondition == "adam_factored" else ""
    errors = [m.stats["sketch_cosine_error"] for m in manifests if "sketch_cosine_error" in m.stats]
    measured = f"; standard error of a cosine between two pairs {max(errors):.3f}, from a second seed" if errors else ""
    return f"{size}, seed {sketch.seed}{metric}{measured}"


def config_json(config: RunConfig) -> str:
    """The whole config, readable."""
    return json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False)


def unfinished(config: RunConfig, manifests: Sequence[StageManifest]) -> list[str]:
    """Stages without a finished result, in order; empty when the run is complete."""
    done = {(manifest.stage, manifest.round) for manifest in manifests}
    return [step.title for step in schedule(config) if (step.spec.name, step.round) not in done]


def _selection(select: SelectConfig) -> str:
    """What pairs were ranked by and how many stay."""
    ranked = f"top {percent(select.keep)} by {select.by}{'' if select.by == 'conflict' else ' (a baseline)'}"
    spread = select.diversity
    cap = (
        f", at most {percent(spread.share)} from one of {spread.cells} cells of alike gradients" if spread.cells else ""
    )
    return f"{ranked}, per {select.quota} quota{cap}"
