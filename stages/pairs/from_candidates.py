"""Self-rewarded pairs: the best against the worst judged answer of each prompt (docs/methods.md section 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from stages.contract import Context, Drop, Stopped
from stages.pairs.candidates import candidate_drops, collapse, load_candidates
from stages.pairs.finish import Draft
from stages.pairs.length_control import extremes, fit_cost
from stages.text.thoughts import Thoughts

SOURCE = "self-rewarding"
_CHUNK = 4096  # prompts whose texts are in memory together


class FromCandidates:
    """Drafts of pairs from candidates and judgements.

    Units: candidate (kept = usable for pairing) and prompt (prompts that have candidates; kept = a pair).
    drops grows while drafting.
    """

    def __init__(self, ctx: Context, thoughts: Thoughts) -> None:
        self._ctx, self._config = ctx, ctx.config
        light = load_candidates(ctx, thoughts)
        prompts = light.unique("prompt_id", keep="first", maintain_order=True)
        self._units = {"candidate": light["language"].to_list(), "prompt": prompts["language"].to_list()}
        self.drops: list[Drop] = candidate_drops(light)
        self._picked = self._pick(prompts, light.filter(pl.col("reason").is_null()))

    @property
    def stats(self) -> dict[str, float]:
        """Nothing is counted beyond the account."""
        return {}

    def units(self) -> dict[str, Iterator[str]]:
        """unit -> the language of every candidate or prompt that came in."""
        return {unit: iter(languages) for unit, languages in self._units.items()}

    @property
    def amount(self) -> int:
        """How many drafts there are."""
        return self._picked.height

    def drafts(self) -> Iterator[list[Draft]]:
        """Batches of drafts, in the order of the candidates table."""
        prompts = self._ctx.scan("prompts").select("prompt_id", "group_id", "split", "messages")
        texts = self._ctx.scan("candidates").select("text")
        for start in range(0, self._picked.height, _CHUNK):
            if self._ctx.stop():
                raise Stopped
            chunk = self._picked.slice(start, _CHUNK)
            rows = pl.concat([chunk["chosen_row"], chunk["rejected_row"]])
            first, last = int(rows.min()), int(rows.max())  # type: ignore[arg-type]
            text = texts.slice(first, last - first + 1).collect()["text"]
            joined = chunk.lazy().join(prompts, on="prompt_id", how="left", maintain_order="left").collect()
            yield [draft for row in joined.iter_rows(named=True) if (draft := self._draft(row, text, first))]

    def _draft(self, row: dict[str, Any], text: pl.Series, first: int) -> Draft | None:
        if row["messages"] is None:
            self.drops.append(
                Drop("prompt", row["prompt_id"], row["language"], "prompt_missing", "not in the prompts table", True)
            )
            return None
        return Draft(
            unit="prompt",
            row_id=row["prompt_id"],
            language=row["language"],
            split=row["split"],
            group_id=row["group_id"],
            prompt_id=row["prompt_id"],
            prompt=row["messages"],
            chosen=text[row["chosen_row"] - first],
            rejected=text[row["rejected_row"] - first],
            source=SOURCE,
            chosen_score=row["chosen_score"],
            rejected_score=row["rejected_score"],
            chosen_candidate_id=row["chosen_id"],
            rejected_candidate_id=row["rejected_id"],
        )

    def _pick(self, prompts: pl.DataFrame, usable: pl.DataFrame) -> pl.DataFrame:
        """One row a pair: prompt and the two candidates. Drops prompts: too_few_candidates, identical, tie."""
        distinct = collapse(usable)
        counts = (
            prompts.select("prompt_id", "language")
            .join(usable.group_by("prompt_id").len("usable"), on="prompt_id", how="left", maintain_order="left")
            .join(distinct.group_by("prompt_id").len("distinct"), on="prompt_id", how="left", maintain_order="left")
            .fill_null(0)
        )
        for row in counts.filter(pl.col("distinct") < 2).iter_rows(named=True):
            few = row["usable"] < 2
            detail = f"{row['usable']} usable" if few else f"{row['usable']} usable, all the same text"
            self._drop(row["prompt_id"], row["language"], "too_few_candidates" if few else "identical", detail)
        rest = counts.filter(pl.col("distinct") >= 2).with_row_index("prompt")
        distinct = distinct.join(rest.select("prompt_id", "prompt"), on="prompt_id", maintain_order="left")
        return self._best_and_worst(rest, distinct)

    def _best_and_worst(self, prompts: pl.DataFrame, distinct: pl.DataFrame) -> pl.DataFrame:
        if not prompts.height:
            return pl.DataFrame()
        distinct = distinct.sort("prompt", "index", "row").with_columns(slot=pl.int_range(pl.len()).over("prompt"))
        prompt, slot = distinct["prompt"].to_numpy(), distinct["slot"].to_numpy()
        shape = (prompts.height, int(slot.max()) + 1)
        score_PC, tokens_PC, place_PC = np.full(shape, np.nan), np.zeros(shape), np.zeros(shape, np.int64)
        score_PC[prompt, slot] = distinct["score"].to_numpy()
        tokens_PC[prompt, slot] = distinct["n_tokens"].to_numpy()
        place_PC[prompt, slot] = np.arange(distinct.height)
        choice = extremes(score_PC, tokens_PC, self._costs(prompts["language"].to_list(), score_PC, tokens_PC))
        pairs_P = choice.pairs(self._config.pairs.min_margin)
        for position in np.flatnonzero(~pairs_P):
            row = prompts.row(int(position), named=True)
            detail = f"gap {choice.gap_P[position]:.4g}, min_margin {self._config.pairs.min_margin}"
            self._drop(row["prompt_id"], row["language"], "tie", detail)
        rows = np.flatnonzero(pairs_P)
        sides = [prompts.select("prompt_id", "language")[rows]]
        for side, column_P in (("chosen", choice.best_P), ("rejected", choice.worst_P)):
            picked = distinct[place_PC[rows, column_P[rows]]]
            sides.append(
                picked.select(
                    pl.col("row").alias(f"{side}_row"),
                    pl.col("candidate_id").alias(f"{side}_id"),
                    pl.col("score").alias(f"{side}_score"),
                )
            )
        return pl.concat(sides, how="horizontal")

    def _costs(
        self, languages: Sequence[str], score_PC: NDArray[np.float64], tokens_PC: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Cost per token of each prompt: fitted per language, or 0."""
        cost_P = np.zeros(len(languages))
        if not self._config.pairs.length_control:
            return cost_P
        of_prompt = np.array(languages)
        for language in sorted(set(languages)):
            mine = of_prompt == language
            cost, excess = fit_cost(score_PC[mine], tokens_PC[mine], self._config.pairs.min_margin)
            cost_P[mine] = cost
            self._ctx.progress.note(
                f"length control {language}: {cost:.3g} points a token leave chosen answers {excess:+.1f} tokens longer"
            )
        return cost_P

    def _drop(self, prompt_id: str, language: str, reason: str, detail: str) -> None:
        self.drops.append(Drop("prompt", prompt_id, language, reason, detail))
