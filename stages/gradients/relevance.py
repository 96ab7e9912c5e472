"""Relevance: whether an answer answers its prompt, r(y | x) = mean-token log p(y | x) - log p(y | x0), x0 a prompt that says nothing.

An answer to another question is no likelier under the prompt than without one, whatever it prefers. What "no likelier" is, the model is asked
too: some answers of every language are looked at under another prompt of that language (the null). What passes: `stages.gradients.cuts`. x0 keeps the prompt's system message and has one user turn of three dots: every template renders it (many
refuse an empty turn), it asks for nothing, and what a system message does to an answer is no relevance. Where the template has no system role,
the paragraphs that all prompts of a language begin with are taken for one (`folded_prompts`).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from types import MappingProxyType
from typing import Any

import numpy as np
import polars as pl

from schemas.ids import seed_for
from stages.contract import Context
from stages.gradients.batching import TokenBudget
from stages.gradients.cuts import COLUMNS
from stages.gradients.items import UNKNOWN, Item, Values
from stages.gradients.logprobs import logprobs_of_rows
from stages.gradients.rows import BatchRow, Pair
from stages.gradients.work import forward_cost
from stages.text.messages import Messages, comparable
from stages.text.render import Renderer, RenderError

NOTHING = "..."
"""What the user says in x0."""
_ALIKE = 0.25
"""From this similarity on two prompts are alike. Of prompts that people wrote on their own less than one pair in a hundred is, in five
languages; of prompts from one template nearly all."""
_LOOKS, _BEGINNING = 32, 1000
"""How many prompts are looked at to find one that is not alike, and how many characters of each."""
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Relevance:
    """What one worker measures relevance with. others: pair_id -> the prompt its answers are also looked at under. plain: tokens of x0. folded: see
    `folded_prompts`."""

    model: Any
    renderer: Renderer
    budget: TokenBudget
    longest: int
    others: Mapping[str, Messages]
    plain: int
    folded: Mapping[str, str]

    @classmethod
    def of(cls, ctx: Context, model: Any, renderer: Renderer, budget: TokenBudget) -> Relevance | None:
        """None where the run does not measure it."""
        config = ctx.config
        if not config.gradients.relevance:
            return None
        folded = {} if renderer.has_system_role else folded_prompts(ctx.scan("pairs"))
        others = other_prompts(ctx.scan("pairs"), config.gradients.relevance_null, config.seed, folded)
        try:
            plain = len(renderer.prompt_ids(says_nothing([])))
        except RenderError:  # then nothing is measured either
            plain = 0
        return cls(model, renderer, budget, config.text.max_length, others, plain, folded)

    def cost(self, items: Sequence[Item], own: bool) -> int:
        """Of `measure`, about: it is not known before the other prompts are rendered. own: whether that under the prompt is computed too."""
        total = 0
        for item in items:
            pair = item.pair
            nothing = len(pair.prompt) if self.folded or item.row["prompt"][0]["role"] == "system" else self.plain
            looks = 1 + (item.pair_id in self.others) + own
            total += 2 * nothing + looks * (len(pair.chosen) + len(pair.rejected)) + (looks - 1) * 2 * len(pair.prompt)
        return total

    def measure(
        self,
        items: Sequence[Item],
        own: Sequence[Values] | None = None,
        did: Callable[[int], None] = lambda cost: None,
    ) -> None:
        """Give every item its `relevance`, and those in `others` their `null`. own: sums of log-probabilities of both answers under the
        prompt [N, 2]; None: computed here. did: told the cost of every forward. What cannot be known is NaN: an answer that does not fit in memory beside the other prompt."""
        tasks: list[tuple[Item, str, Pair | None]] = []
        for item in items:
            tasks.append(
                (
                    item,
                    "nothing",
                    self._pair(item, says_nothing(item.row["prompt"], self.folded.get(item.language, ""))),
                )
            )
            if item.pair_id in self.others:
                tasks.append((item, "other", self._pair(item, self.others[item.pair_id])))
            if own is None:
                tasks.append((item, "own", item.pair))
        rows: list[BatchRow] = []
        places: dict[tuple[int, str], int] = {}
        for item, kind, pair in tasks:
            if pair is not None:
                places[id(item), kind] = len(rows)
                rows += pair.rows
        misfits: list[int] = []

        def done(computed: list[int]) -> None:
            did(forward_cost([rows[n] for n in computed]))

        found = iter(logprobs_of_rows(self.model, rows, self.budget, misfits=misfits, done=done))
        unfit = set(misfits)
        means = [math.nan if n in unfit else float(next(found).double().mean()) for n in range(len(rows))]

        def mean(item: Item, kind: str) -> Values:
            at = places.get((id(item), kind))
            return UNKNOWN if at is None else (means[at], means[at + 1])

        for n, item in enumerate(items):
            lengths = len(item.pair.chosen), len(item.pair.rejected)
            here = mean(item, "own") if own is None else (own[n][0] / lengths[0], own[n][1] / lengths[1])
            nothing, other = mean(item, "nothing"), mean(item, "other")
            item.relevance = here[0] - nothing[0], here[1] - nothing[1]
            item.null = other[0] - nothing[0], other[1] - nothing[1]

    def _pair(self, item: Item, prompt: Messages) -> Pair | None:
        """Both answers under another prompt; None where the template refuses it, or it is too long."""
        try:
            ids = self.renderer.pair_ids(prompt, item.row["chosen"], item.row["rejected"])
        except RenderError:
            return None
        pair = Pair(tuple(ids.prompt), tuple(ids.chosen), tuple(ids.rejected))
        return pair if pair.longest <= self.longest else None


def folded_prompts(pairs: pl.LazyFrame) -> dict[str, str]:
    """Language -> the paragraphs that its training prompts all begin with: a system message that stands before the user's words, where the
    template has no system role. Languages without any are left out."""
    begins = pl.col("prompt").list.first().struct.field("content")
    ends = pairs.filter(pl.col("split") == "train").group_by("language").agg(low=begins.min(), high=begins.max())
    shared = {
        language: os.path.commonprefix([low, high])  # noqa: RUF071
        for language, low, high in ends.filter(pl.col("low") != pl.col("high")).collect().iter_rows()
    }
    return {language: text[: text.rindex("\n\n") + 2] for language, text in shared.items() if "\n\n" in text}


def says_nothing(prompt: Messages, folded: str = "") -> Messages:
    """x0 of a prompt. folded: of its language, see `folded_prompts`."""
    if folded and prompt[0]["content"].startswith(folded):
        return [{"role": "user", "content": folded + NOTHING}]
    return [message for message in prompt[:1] if message["role"] == "system"] + [{"role": "user", "content": NOTHING}]


def other_prompts(
    pairs: pl.LazyFrame, count: int, seed: int, folded: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Messages]:
    """pair_id -> the prompt of another training pair of its language, for up to `count` pairs of each.

    The pairs of a language in the order of their ids are shuffled by the seed; each of the first `count` takes the prompt of the next one (the
    last that of the first) that is of another translation group and says something else, if it can one that is not alike: what answers one of
    two prompts from one template is no answer to nothing under the other. A pair beside which all say the same has none. It depends on no shard
    and on no order of rows.
    """
    known = pairs.filter(pl.col("split") == "train").select("pair_id", "prompt_id", "group_id", "language")
    drawn: list[list[tuple[str, str, str]]] = []
    for (language,), mine in known.collect().sort("pair_id").group_by("language", maintain_order=True):
        order = np.random.default_rng(seed_for(seed, "relevance", language)).permutation(mine.height)[:count]
        drawn.append(mine.drop("language")[order.tolist()].rows())
    wanted = pairs.filter(pl.col("pair_id").is_in(sorted(row[0] for rows in drawn for row in rows)))
    prompts: dict[str, Messages] = {}
    said: dict[str, str] = {}
    for pair_id, language, prompt in wanted.select("pair_id", "language", "prompt").collect().iter_rows():
        prompts[pair_id], said[pair_id] = prompt, _said(prompt, folded.get(language, ""))
    found: dict[str, Messages] = {}
    grams = lru_cache(2 * _LOOKS)(lambda pair_id: _grams(said[pair_id]))  # the next prompts are soon looked at again
    for rows in drawn:
        for n, (pair_id, prompt_id, group_id) in enumerate(rows):
            following = (rows[(n + k) % len(rows)] for k in range(1, len(rows)))
            others = (row[0] for row in following if row[1] != prompt_id and row[2] != group_id)
            apart = list(islice((other for other in others if said[other] != said[pair_id]), _LOOKS))
            unlike = (other for other in apart if _similarity(grams(pair_id), grams(other)) < _ALIKE)
            if (other := next(unlike, apart[0] if apart else None)) is not None:
                found[pair_id] = prompts[other]
    return found


def _said(prompt: Messages, folded: str) -> str:
    """What the user and the assistant say."""
    said = " ".join(message["content"] for message in prompt if message["role"] != "system")
    return comparable(said.removeprefix(folded))


def _grams(said: str) -> frozenset[str]:
    """Character 3-grams of a beginning, all numbers alike."""
    text = _NUMBER.sub("0", said[:_BEGINNING])
    return frozenset(text[i : i + 3] for i in range(max(1, len(text) - 2)))


def _similarity(one: frozenset[str], other: frozenset[str]) -> float:
    """Jaccard's."""
    return len(one & other) / len(one | other)


def relevance_columns(items: Sequence[Item]) -> dict[str, list[float | None]]:
    """`COLUMNS` of the items; null where it is not known."""
    values = ((*item.relevance, *item.null) for item in items)
    columns = zip(*values, strict=True) if items else ((),) * len(COLUMNS)
    return {
        name: [value if math.isfinite(value) else None for value in column]
        for name, column in zip(COLUMNS, columns, strict=True)
    }
