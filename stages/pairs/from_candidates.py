"""Pairs of judged answers: of each prompt, by each criterion (docs/methods.md section 1, docs/judges.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from schemas.ids import seed_for
from stages.contract import Context, Drop, Stopped
from stages.pairs.candidates import candidate_drops, collapse, load_candidates
from stages.pairs.finish import Draft
from stages.pairs.length_control import fit_cost
from stages.pairs.scores import agreements, criterion_scores
from stages.pairs.strategies import STRATEGIES, Pick, Settings
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
        self._scores = criterion_scores(ctx)
        light = load_candidates(
            ctx, thoughts, pl.concat([scores.select("candidate_id") for scores in self._scores.values()])
        )
        prompts = light.unique("prompt_id", keep="first", maintain_order=True)
        self._prompts: list[str] = []
        self.drops: list[Drop] = candidate_drops(light)
        usable = light.filter(pl.col("reason").is_null())
        picked = [self._pick(criterion, prompts, usable) for criterion in self._scores]
        order = prompts.select("prompt_id").with_row_index("place")
        self._picked = (
            pl.concat(picked).join(order, on="prompt_id", maintain_order="left").sort("place", maintain_order=True)
        )
        self._candidates = light["language"].to_list()
        self._agreements = list(agreements(ctx))
        for criterion, one, other, share, n in self._agreements:
            about = f" on {criterion}" if criterion else ""
            ctx.progress.note(f"judges {one} and {other} agree{about} on {share:.0%} of {n:,} pairs of answers")

    @property
    def stats(self) -> dict[str, float]:
        """How often the judges of a panel agree; all answers are the policy's own."""
        return {"on_policy_share": 1.0} | {
            " ".join(filter(None, ["agreement", criterion, one, other])): share
            for criterion, one, other, share, _ in self._agreements
        }

    def units(self) -> dict[str, Iterator[str]]:
        """unit -> the language of every candidate or prompt that came in; a prompt once a criterion, with several pairs once a pair."""
        return {"candidate": iter(self._candidates), "prompt": iter(self._prompts)}

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
            criterion=row["criterion"],
        )

    def _pick(self, criterion: str, prompts: pl.DataFrame, usable: pl.DataFrame) -> pl.DataFrame:
        """One row a pair: prompt and the two candidates. Drops prompts: too_few_candidates, identical, tie, disagreement."""
        usable = usable.join(self._scores[criterion], on="candidate_id", maintain_order="left")
        judges = len(self._config.judge.section_of(criterion).panel) or 1
        distinct = collapse(usable, judges)
        counts = (
            prompts.select("prompt_id", "language")
            .join(usable.group_by("prompt_id").len("usable"), on="prompt_id", how="left", maintain_order="left")
            .join(distinct.group_by("prompt_id").len("distinct"), on="prompt_id", how="left", maintain_order="left")
            .fill_null(0)
        )
        for row in counts.filter(pl.col("distinct") < 2).iter_rows(named=True):
            few = row["usable"] < 2
            detail = f"{row['usable']} usable" if few else f"{row['usable']} usable, all the same text"
            self._drop(criterion, row, "too_few_candidates" if few else "identical", detail)
        rest = counts.filter(pl.col("distinct") >= 2).with_row_index("prompt")
        distinct = distinct.join(rest.select("prompt_id", "prompt"), on="prompt_id", maintain_order="left")
        return self._pairs(criterion, rest, distinct)

    def _pairs(self, criterion: str, prompts: pl.DataFrame, distinct: pl.DataFrame) -> pl.DataFrame:
        distinct = distinct.sort("prompt", "index", "row").with_columns(slot=pl.int_range(pl.len()).over("prompt"))
        prompt, slot = distinct["prompt"].to_numpy(), distinct["slot"].to_numpy()
        shape = (prompts.height, int(slot.max()) + 1 if len(slot) else 1)
        score_PC, tokens_PC, place_PC = np.full(shape, np.nan), np.zeros(shape), np.zeros(shape, np.int64)
        score_PC[prompt, slot] = distinct["score"].to_numpy()
        tokens_PC[prompt, slot] = distinct["n_tokens"].to_numpy()
        place_PC[prompt, slot] = np.arange(distinct.height)
        languages = prompts["language"].to_list()
        cost_P = self._costs(languages, score_PC, tokens_PC)
        picks = self._picks(criterion, prompts, languages, score_PC - cost_P[:, None] * tokens_PC)
        agree = self._config.judge.section_of(criterion).combine == "agree"
        by_judge = distinct["by_judge"].to_list() if agree else []
        kept: list[Pick] = []
        for pick, least in picks:
            row = prompts.row(pick.prompt, named=True)
            if not (pick.gap > 0 and pick.gap >= least):
                self._drop(criterion, row, "tie", f"gap {pick.gap:.4g}, min_margin {least:.4g}")
                continue
            sides = [place_PC[pick.prompt, column] for column in (pick.chosen, pick.rejected)]
            if agree and not all(c > r for c, r in zip(by_judge[sides[0]], by_judge[sides[1]], strict=True)):
                self._drop(criterion, row, "disagreement", "not every judge of the panel prefers chosen")
                continue
            self._prompts.append(row["language"])
            kept.append(pick)
        rows = np.array([pick.prompt for pick in kept], dtype=np.int64)
        columns = [prompts.select("prompt_id", "language")[rows].with_columns(criterion=pl.lit(criterion))]
        for side, places in (
            ("chosen", place_PC[rows, [pick.chosen for pick in kept]]),
            ("rejected", place_PC[rows, [pick.rejected for pick in kept]]),
        ):
            columns.append(
                distinct[places].select(
                    pl.col("row").alias(f"{side}_row"),
                    pl.col("candidate_id").alias(f"{side}_id"),
                    pl.col("score").alias(f"{side}_score"),
                )
            )
        return pl.concat(columns, how="horizontal")

    def _picks(
        self, criterion: str, prompts: pl.DataFrame, languages: Sequence[str], score_PC: NDArray[np.float64]
    ) -> list[tuple[Pick, float]]:
        """The strategy's picks, each with the least gap for its language."""
        config = self._config.pairs
        margin_P = np.full(len(languages), config.min_margin)
        if config.margin_in == "sd":
            of_prompt = np.array(languages)
            for language in set(languages):
                mine = of_prompt == language
                margin_P[mine] *= np.nanstd(score_PC[mine])
        seeds = [
            seed_for(self._config.seed, self._ctx.round, "pairs", criterion, prompt_id)
            for prompt_id in prompts["prompt_id"]
        ]
        settings = Settings(margin_P, seeds, config.sigmas, config.cap)
        picks = STRATEGIES[config.strategy](score_PC, settings)
        return [(pick, float(margin_P[pick.prompt])) for pick in picks]

    def _costs(
        self, languages: Sequence[str], score_PC: NDArray[np.float64], tokens_PC: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Cost per token of each prompt: fitted per language, or 0."""
        cost_P, pairs = np.zeros(len(languages)), self._config.pairs
        if not pairs.length_control:
            return cost_P
        of_prompt = np.array(languages)
        for language in sorted(set(languages)):
            mine = of_prompt == language
            found = fit_cost(score_PC[mine], tokens_PC[mine], pairs.min_margin, pairs.margin_in == "sd")
            cost_P[mine] = found.cost
            self._ctx.progress.note(
                f"length control {language}: {found.cost:.3g} points a token leave chosen answers {found.excess:+.1f} tokens"
                f" longer, and {found.pairs} of {found.before} pairs"
            )
        return cost_P

    def _drop(self, criterion: str, prompt: Mapping[str, Any], reason: str, detail: str) -> None:
        about = f"{criterion}: " if criterion else ""
        self._prompts.append(prompt["language"])
        self.drops.append(Drop("prompt", prompt["prompt_id"], prompt["language"], reason, f"{about}{detail}"))
