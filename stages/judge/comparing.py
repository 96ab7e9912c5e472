"""Judges that compare two answers to a prompt, in both orders; the comparisons make a ranking."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import polars as pl

from stages.contract import Drop
from stages.engines.base import Completion, Request
from stages.engines.sharded import Results
from stages.judge.answer_tokens import all_ids
from stages.judge.bradley_terry import strengths
from stages.judge.method import Candidate, Method, Opened, Verdict, Vote, error_of
from stages.judge.pairwise import choice_tokens, pairwise_ids, probability_of_a
from stages.judge.rubric import Rubrics
from stages.text.messages import comparable
from stages.text.render import RenderError


class Pairwise(Method):
    """Every answer of a prompt against the others (or judge.opponents of them), A first and B first.

    An answer that wins in both orders beats the other; anything else, and equal texts, is a tie. Score: Bradley-Terry log strength
    within the prompt. A prompt whose candidates lie in two shards is compared in both of them.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._tokens = choice_tokens(self.renderer.tokenizer)
        self._rubrics = Rubrics(self.settings.rubric, self.ctx.progress.note)

    def open(self, index: int, candidates: Sequence[Candidate]) -> Opened:
        """See `Method.open`. Drop reasons: no_opponent, too_long_for_judge, low_mass; failed: cannot_render, engine_error."""
        of_prompt: dict[str, list[Candidate]] = defaultdict(list)
        for candidate in self._with_neighbours(candidates):
            of_prompt[candidate.prompt_id].append(candidate)
        mine = {candidate.id for candidate in candidates}
        rounds = {prompt: _Round(self, index, prompt, them) for prompt, them in of_prompt.items()}
        asked = {prompt: found.requests for prompt, found in rounds.items() if found.requests}

        def read(results: Results) -> dict[str, Verdict]:
            verdicts: dict[str, Verdict] = {}
            for prompt, found in rounds.items():
                completions = {completion.id: completion for completion in results.get(prompt, [])}
                verdicts |= {c.id: verdict for c, verdict in found.verdicts(completions) if c.id in mine}
            return verdicts

        counts = {prompt: sum(c.id in mine for c in of_prompt[prompt]) for prompt in asked}
        return Opened(asked, counts, len(candidates) - sum(counts.values()), read)

    def question(self, index: int, first: Candidate, second: Candidate) -> Request:
        """Which is better, `first` shown as A? Raises RenderError."""
        answers = self.said(first), self.said(second)
        rubric = self._rubrics.of(first.language)
        ids = pairwise_ids(self.renderer, rubric, first.messages, *answers, self._tokens)
        part = f"{first.id}>{second.id}"
        return self.request(index, first.prompt_id, part, ids, score_tokens=all_ids(self._tokens))

    def first_wins(self, completion: Completion) -> tuple[float | None, float]:
        """(probability that A is better, mass)"""
        return probability_of_a(completion.score_logprobs, self._tokens)

    def matches(self, count: int) -> list[tuple[int, int]]:
        """Who is compared with whom."""
        reach = self.settings.opponents or count
        return [(i, j) for i, j in combinations(range(count), 2) if min(j - i, count - (j - i)) <= reach]

    def _with_neighbours(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """And the candidates of the first and last prompt that other shards have, in the order of their index."""
        if not candidates:
            return []
        ends = {candidates[0].prompt_id: candidates[0], candidates[-1].prompt_id: candidates[-1]}
        table = self.ctx.scan("candidates").filter(pl.col("prompt_id").is_in(list(ends))).collect()
        known = {candidate.id for candidate in candidates}
        others = [
            Candidate(row["candidate_id"], row["prompt_id"], row["language"], ends[row["prompt_id"]].messages, row)
            for row in table.to_dicts()
            if row["candidate_id"] not in known
        ]
        return sorted([*candidates, *others], key=lambda candidate: candidate.row["index"])


class _Round:
    """The comparisons of one prompt."""

    def __init__(self, method: Pairwise, index: int, prompt: str, candidates: Sequence[Candidate]) -> None:
        self._method, self._candidates = method, candidates
        self._same: set[tuple[int, int]] = set()
        self._refused: dict[int, Drop] = {}
        self._asked: dict[tuple[int, int], tuple[Request, Request]] = {}
        for i, j in method.matches(len(candidates)):
            self._match(index, i, j)

    @property
    def requests(self) -> list[Request]:
        """Both orders of every comparison."""
        return [request for both in self._asked.values() for request in both]

    def verdicts(self, completions: Mapping[str, Completion]) -> list[tuple[Candidate, Verdict]]:
        """What the answers say of each candidate."""
        count = len(self._candidates)
        wins_NN, agreed_N, asked_N = np.zeros((count, count)), np.zeros(count), np.zeros(count)
        mass_N = np.zeros(count)
        problems = dict(self._refused)
        for i, j in self._same:
            wins_NN[i, j] = wins_NN[j, i] = 0.5
        for (i, j), both in self._asked.items():
            replies = [completions[request.id] for request in both]
            if (error := error_of(replies)) is not None:
                for n in (i, j):
                    problems.setdefault(n, self._candidates[n].dropped("engine_error", error, failed=True))
                continue
            (forward, mass), (backward, other) = map(self._method.first_wins, replies)
            least = self._method.settings.min_mass
            if forward is None or backward is None or min(mass, other) < least:
                detail = f"probability {min(mass, other):.3g} on A and B < {least}"
                for n in (i, j):
                    problems.setdefault(n, self._candidates[n].dropped("low_mass", detail))
                continue
            first, second = sign(forward), -sign(backward)
            win = 0.5 if first != second else (1 + first) / 2
            wins_NN[i, j], wins_NN[j, i] = win, 1 - win
            for n in (i, j):
                asked_N[n], agreed_N[n] = asked_N[n] + 1, agreed_N[n] + (first == second)
                mass_N[n] += (mass + other) / 2
        met_N = (wins_NN + wins_NN.T).sum(axis=1)
        scores_N = strengths(wins_NN)
        found: list[tuple[Candidate, Verdict]] = []
        for n, candidate in enumerate(self._candidates):
            if not met_N[n]:
                alone = candidate.dropped("no_opponent", f"{count} candidates of this prompt")
                found.append((candidate, problems.get(n, alone)))
                continue
            mean_mass = float(mass_N[n] / asked_N[n]) if asked_N[n] else None
            consistency = float(agreed_N[n] / asked_N[n]) if asked_N[n] else None
            found.append((candidate, [Vote(float(scores_N[n]), mean_mass, consistency)]))
        return found

    def _match(self, index: int, i: int, j: int) -> None:
        one, other = self._candidates[i], self._candidates[j]
        if comparable(self._method.said(one)) == comparable(self._method.said(other)):
            self._same.add((i, j))
            return
        try:
            both = self._method.question(index, one, other), self._method.question(index, other, one)
        except RenderError as error:
            for n, candidate in ((i, one), (j, other)):
                self._refused.setdefault(n, candidate.dropped("cannot_render", str(error), failed=True))
            return
        for request in both:
            if (long := self._method.too_long(one, request)) is not None:
                for n, candidate in ((i, one), (j, other)):
                    self._refused.setdefault(n, replace(long, row_id=candidate.id))
                return
        self._asked[i, j] = both


def sign(probability: float) -> int:
    """1: A is better; -1: B; 0: neither."""
    return (probability > 0.5) - (probability < 0.5)
