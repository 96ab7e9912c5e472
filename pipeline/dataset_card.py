"""The card of an exported data set: what it is, how it was made with its figures, and what its labels are worth."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml

from pipeline import __version__
from pipeline.account import totals
from schemas.config import RunConfig
from schemas.manifests import StageManifest
from schemas.reasons import OFF_TOPIC
from stages.sources import hub_ids
from stages.text.codes import hub_codes
from stages.text.markdown import escape
from stages.text.visible import visible

_NO_LICENCE = "No licence was given for this data set; its texts may be under the terms of where they come from."
_SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)


@dataclass(frozen=True)
class Contents:
    """What is exported. pattern: of its files, content hash included. rows: by language. size: bytes of the files; raw: uncompressed."""

    pattern: str
    rows: Mapping[str, int]
    size: int
    raw: int


def dataset_card(config: RunConfig, round_: int, contents: Contents, made: Sequence[StageManifest]) -> str:
    """Markdown with a YAML header that Hugging Face reads. made: the stages the pairs went through, in order."""
    total = sum(contents.rows.values())
    lines = [
        f"# {escape(config.name)}: curated preference pairs",
        "",
        *([escape(config.banner), ""] if config.banner else []),
        f"{total:,} preference pairs, each with `prompt`, `chosen` and `rejected` as conversational messages, as TRL's DPOTrainer takes"
        " them, and with the score they were ranked by.",
        "",
        "| language | pairs |",
        "| --- | ---: |",
        *(f"| {escape(language)} | {count:,} |" for language, count in sorted(contents.rows.items())),
        "",
        "## How it was made",
        "",
        _origin(config),
        "",
        _held_back(made) + _selection(config, round_),
        "",
        "| stage | in | kept | dropped, by reason |",
        "| --- | ---: | ---: | --- |",
        *(row for manifest in made for row in _rows(manifest)),
        "",
        *_held_out(made),
        "## What the labels are worth",
        "",
        _labels(config),
        "",
        "The texts were not checked by people: they may be wrong or harmful.",
        "",
        *([] if config.card.dataset_license else [_NO_LICENCE, ""]),
        f"Made with congrad-pipeline {__version__}.",
        "",
    ]
    return f"---\n{_header(config, contents, total)}---\n\n" + "\n".join(lines)


def _header(config: RunConfig, contents: Contents, total: int) -> str:
    codes = hub_codes(sorted(contents.rows))
    sources = config.pairs.sources if config.imported else config.prompts.sources
    splits = [{"name": "train", "num_bytes": contents.raw, "num_examples": total}]
    meta = {
        "pretty_name": f"{' '.join(visible(config.name).split())}: curated preference pairs",
        "license": config.card.dataset_license,
        "language": codes,
        "task_categories": ["text-generation"],
        "size_categories": [_size(total)],
        "multilinguality": ["multilingual" if len(codes) > 1 else "monolingual"],
        "annotations_creators": [] if config.imported else ["machine-generated"],
        "language_creators": [] if config.imported else ["machine-generated"],
        "source_datasets": hub_ids(sources, config.languages.codes),
        "tags": ["preference", "dpo", "trl", "congrad"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": contents.pattern}]}],
        "dataset_info": {
            "config_name": "default",
            "splits": splits,
            "download_size": contents.size,
            "dataset_size": contents.raw,
        },
    }
    return yaml.safe_dump(
        {k: v for k, v in meta.items() if v}, sort_keys=False, allow_unicode=True, width=10_000
    )  # no line of its own: ---


def _size(total: int) -> str:
    """The hub's category of so many rows."""
    names = [f"{n // 1000}K" if n < 1_000_000 else f"{n // 1_000_000}M" for n in _SIZES]
    if total < _SIZES[0]:
        return f"n<{names[0]}"
    above = next((n for n, limit in enumerate(_SIZES) if total < limit), None)
    return f"n>{names[-1]}" if above is None else f"{names[above - 1]}<n<{names[above]}"


def model_name(name: str) -> str:
    """A model as a card names it, escaped: of a folder its last part, since paths are of one machine."""
    return escape(os.path.basename(name.rstrip(os.sep)) if os.path.isabs(name) or name.startswith(".") else name)


def _origin(config: RunConfig) -> str:
    if config.imported:
        sources = ", ".join(model_name(source.path) for source in config.pairs.sources)
        return f"The pairs come from an existing preference data set: {sources}."
    model, generate = config.model, config.generate
    revision = f" (revision {escape(model.revision)})" if model.revision else ""
    start = ", after supervised fine-tuning in this run," if config.sft.on else ""
    later = " In later rounds it is the model that the round before trained." if config.rounds > 1 else ""
    return (
        f"{model_name(model.policy)}{revision}{start} wrote {generate.candidates} answers to every prompt (temperature"
        f" {generate.sampling.temperature:g}, at most {generate.sampling.max_tokens} tokens, seed {config.seed}).{later}"
    )


def _held_back(made: Sequence[StageManifest]) -> str:
    """What the relevance gate did, whatever the rest was selected by."""
    held = sum(row["dropped"].get(OFF_TOPIC, 0) for manifest in made for row in totals(manifest.tallies))
    if not held:
        return ""
    what = "1 pair was" if held == 1 else f"{held:,} pairs were"
    return f"{what} left out before: the prompt makes an answer of it no likelier than other prompts do. "


def _selection(config: RunConfig, round_: int) -> str:
    select, conflict = config.select, config.conflict
    where = f"In round {round_} " if config.rounds > 1 else ""
    whose = "of each language" if select.quota == "language" else "of all languages"
    criteria = " and criterion" if config.judge.criteria and not config.imported else ""
    spread = select.diversity
    share = f"the best {100 * select.keep:g}% of the pairs {whose}{criteria}"
    if spread.cells:
        share += f", at most {100 * spread.share:g}% of them from one of {spread.cells} cells of alike gradients,"
    if select.by != "conflict":
        return f"{_capital(where + share)} were kept by {escape(select.by)} (`select.by`), a baseline, not by gradient conflict."
    trusted = f" of trusted pairs (the {conflict.target} split, which is not in this data set)"
    others = " of the other languages"
    weighted = ", ".join(f"{code} {weight:g}" for code, weight in conflict.language_weights.items())
    return (
        f"{_capital(where + share)} were kept by gradient conflict: the agreement of a pair's DPO gradient with the direction merged over languages"
        f" by {escape(conflict.surgery)}{trusted if conflict.target != 'train' else others if conflict.score == 'others' else ''}."
        f"{f' Languages weigh {escape(weighted)} in it, the others 1.' if weighted else ''}"
        " This follows ConGrad (arXiv 2503.23777), whose code was never published; the share kept, the"
        " compression of gradients and the similarity measure are this pipeline's choices."
    )


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _held_out(made: Sequence[StageManifest]) -> list[str]:
    """How many imported pairs there are that no stage after pairs begins with. (Of generated ones the stage counts prompts.)"""
    count = {(m.stage, row["unit"]): row for m in made for row in totals(m.tallies)}
    if not count.keys() >= {("pairs", "row"), ("gradients", "pair")}:
        return []
    held = count["pairs", "row"]["kept"] - count["gradients", "pair"]["in"]
    return [f"Held out for evaluation after the stage pairs: {held:,} pairs.", ""] if held > 0 else []


def _rows(manifest: StageManifest) -> list[str]:
    rows = []
    for row in totals(manifest.tallies):
        dropped = ", ".join(f"{escape(reason)} {count:,}" for reason, count in row["dropped"].items())
        failed = f"{', ' if dropped else ''}failed {row['failed']:,}" if row["failed"] else ""
        rows.append(f"| {manifest.stage} | {row['in']:,} {row['unit']}s | {row['kept']:,} | {dropped}{failed} |")
    return rows


def _labels(config: RunConfig) -> str:
    if config.imported:
        return "Which answer is chosen is the source's word. This pipeline judged nothing: it only left pairs out."
    if config.judges_itself:
        return (
            "**Self-judged:** the model that wrote the answers also rated them, and chosen is the one it rated higher. That says which"
            " answer this model prefers. Nobody, and no other model, checked that it is the better one."
        )
    judges = ", ".join(model_name(name) if name else "the model that wrote the answers" for name in config.judge_models)
    rated = f"Rated by a model, {judges}" if len(config.judge_models) == 1 else f"Rated by several models ({judges})"
    return f"{rated}: chosen is the answer that was rated higher. Nobody checked the ratings."
