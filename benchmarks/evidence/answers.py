"""Preference pairs of real answers: a stronger chat model's answer to a prompt is chosen over a weaker one's.

A data set has the columns id (equal for translations), language, prompt, model, answer; its path is given, nothing of it is in the project. Both
answers of a pair are cut to the same number of words, so that length decides nothing. Three contrasts over the same prompts, as in
`benchmarks.planted.texts`:

    real       chosen: the stronger model's answer; rejected: the weaker one's
    easy       chosen: the same; rejected: the weaker model's answer to a prompt that is in no pair (flipped: an off-topic preference)
    language   chosen: the same; rejected: the stronger model's answer in another language
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

CONTRASTS = ("real", "easy", "language")
_COLUMNS = ("id", "language", "prompt", "model", "answer")


@dataclass(frozen=True)
class Pool:
    """Which pairs: `count` prompts in every language, the answers of `strong` over those of `weak`, cut to at most `words` words."""

    languages: tuple[str, ...] = ("de", "es", "fr", "ru")
    count: int = 40
    strong: str = "gpt-4o-mini"
    weak: str = "gpt-3.5-turbo-0125"
    words: int = 40
    seed: int = 0

    def pairs(self, answers: Answers) -> dict[str, list[dict[str, str]]]:
        """By contrast: see `make_pairs`."""
        return make_pairs(answers, self.languages, self.count, self.strong, self.weak, self.words, self.seed)

    def held_out(self, answers: Answers, languages: Sequence[str], count: int) -> list[dict[str, str]]:
        """`count` pairs a language of prompts that no pair of the pool is about: first prompts as long as the pool's, then up to twice as long.
        Raises ValueError where there are too few."""
        models = (self.strong, self.weak)
        used = answers.questions(self.languages, models, self.seed, (20, self.words))[: 2 * self.count]
        short, long = (
            answers.questions(languages, models, self.seed, (20, most)) for most in (self.words, 2 * self.words)
        )
        ids = [id_ for id_ in dict.fromkeys(short + long) if id_ not in set(used)]
        if len(ids) < count:
            raise ValueError(f"{len(ids)} prompts are left to hold out, {count} are needed")
        found = []
        for id_ in ids[:count]:
            for code in languages:
                chosen, rejected = cut(*(answers.texts[id_, code, model] for model in models), self.words)
                prompt = answers.prompts[id_, code]
                found.append(
                    {"group_id": id_, "language": code, "prompt": prompt, "chosen": chosen, "rejected": rejected}
                )
        return found


@dataclass(frozen=True)
class Answers:
    """prompts: (id, language) -> text; texts: (id, language, model) -> answer."""

    prompts: dict[tuple[str, str], str]
    texts: dict[tuple[str, str, str], str]

    @classmethod
    def read(cls, path: Path) -> Answers:
        """Raises ValueError for a file without the columns."""
        frame = pl.read_parquet(path)
        if missing := [name for name in _COLUMNS if name not in frame.columns]:
            raise ValueError(f"{path} has no column {', '.join(missing)}")
        rows = frame.select(pl.col(name).cast(pl.String) for name in _COLUMNS).drop_nulls().rows()
        return cls(
            {(id_, language): prompt for id_, language, prompt, _, _ in rows},
            {(id_, language, model): answer for id_, language, _, model, answer in rows},
        )

    def questions(
        self, languages: Sequence[str], models: Sequence[str], seed: int, words: tuple[int, int]
    ) -> list[str]:
        """Ids, shuffled by the seed, that every language has a prompt of at most words[1] and answers of at least words[0] words of."""
        least, most = words
        ids = sorted({id_ for id_, _ in self.prompts})
        fit = [
            id_
            for id_ in ids
            if all(
                len(self.prompts.get((id_, code), "").split()) in range(1, most + 1)
                and all(len(self.texts.get((id_, code, model), "").split()) >= least for model in models)
                for code in languages
            )
        ]
        random.Random(seed).shuffle(fit)
        return fit


def make_pairs(
    answers: Answers, languages: Sequence[str], count: int, strong: str, weak: str, words: int = 60, seed: int = 0
) -> dict[str, list[dict[str, str]]]:
    """contrast -> `count` pairs in each language: group_id, kind, error, language, prompt, chosen, rejected. Raises ValueError where there are
    too few prompts: off-topic answers are to as many others."""
    ids = answers.questions(languages, (strong, weak), seed, (20, words))
    if len(ids) < 2 * count:
        raise ValueError(f"{len(ids)} prompts fit in every language, {2 * count} are needed")
    found: dict[str, list[dict[str, str]]] = {contrast: [] for contrast in CONTRASTS}
    for number, (id_, other) in enumerate(zip(ids[:count], ids[count:], strict=False)):
        for place, code in enumerate(languages):
            spoken = languages[(place + 1 + number % (len(languages) - 1)) % len(languages)]
            rejected = {
                "real": answers.texts[id_, code, weak],
                "easy": answers.texts[other, code, weak],
                "language": answers.texts[id_, spoken, strong],
            }
            for contrast, text in rejected.items():
                chosen, text = cut(answers.texts[id_, code, strong], text, words)
                found[contrast].append(
                    {
                        "group_id": f"{number:04d}-{id_}",
                        "kind": id_,
                        "error": contrast,
                        "language": code,
                        "prompt": answers.prompts[id_, code],
                        "chosen": chosen,
                        "rejected": text,
                    }
                )
    return found


def cut(one: str, other: str, words: int) -> tuple[str, str]:
    """Both texts with as many words as the shorter one has, at most `words`."""
    parts = one.split(), other.split()
    most = min(words, *map(len, parts))
    return " ".join(parts[0][:most]), " ".join(parts[1][:most])
