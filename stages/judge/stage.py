"""Judge: scores of the candidates by every judge of the run (docs/judges.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import polars as pl
import pyarrow as pa

from schemas.config.judging import Judge as JudgeOf
from schemas.tables import TABLES
from stages.contract import Context, Drop, Part, Shard, ShardStage, tally
from stages.engines import Wanted, shared_engines
from stages.engines.base import Engine, Fleet, Request
from stages.engines.replies import Asked, Usage, asked, tell_cost
from stages.engines.sharded import OpenShard, Results, run_shards
from stages.judge.method import Candidate, Method, Opened, Verdict, under
from stages.judge.methods import CLASSES


class Judge(ShardStage):
    """candidates, prompts -> judgements.

    Unit `candidate`: kept = candidates with a score of at least one judge; otherwise the first judge's reason counts. Dropped:
    low_mass (too little probability on the possible replies), unparseable (additive: not one vote could be read), no_opponent
    (pairwise), no_english_prompt (implicit_reward), too_long_for_judge. Failed: cannot_render, engine_error. Unparseable votes of a
    kept candidate are rows with a null score.
    """

    def run(self, ctx: Context, shards: Iterator[Shard]) -> Iterator[Part]:
        """See ShardStage.run."""
        judging = _Judging(ctx)
        try:
            yield from run_shards(judging.engine, shards, judging.open, ctx.progress)
        finally:
            judging.tell()


class _Judging:
    """One call of the stage: its judges and their engines, all of them loaded."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        judges = ctx.config.judge.judges
        wanted = [CLASSES[judge.settings.method].wanted(ctx, judge) for judge in judges]
        once: dict[int, Engine] = {}
        engines = iter(
            [
                once.setdefault(id(engine), asked(engine, ctx))
                for engine in shared_engines(ctx, [one for of_judge in wanted for one in of_judge])
            ]
        )
        fleet: list[Engine] = []
        self.methods = [
            _made(ctx, judge, of_judge, engines, fleet) for judge, of_judge in zip(judges, wanted, strict=True)
        ]
        self._servers = [engine for engine in fleet if isinstance(engine, Asked)]
        self.engine = fleet[0] if len(fleet) == 1 else Fleet(fleet)

    def tell(self) -> None:
        """What servers were asked, for people."""
        for server in self._servers:
            self._ctx.progress.note(server.told())

    def open(self, shard: Shard) -> OpenShard:
        """The requests of a shard of candidates."""
        rows = shard.rows.to_pylist()
        wanted = list({row["prompt_id"] for row in rows})
        prompts = self._ctx.scan("prompts").filter(pl.col("prompt_id").is_in(wanted)).select("prompt_id", "messages")
        messages = {row["prompt_id"]: row["messages"] for row in prompts.collect().to_dicts()}
        candidates = [
            Candidate(row["candidate_id"], row["prompt_id"], row["language"], messages[row["prompt_id"]], row)
            for row in rows
        ]
        opened = [method.open(shard.index, candidates) for method in self.methods]
        questions: dict[Asked, list[Request]] = {}
        for method, one in zip(self.methods, opened, strict=True):
            if isinstance(method.engine, Asked):
                questions.setdefault(method.engine, []).extend(chain.from_iterable(one.requests.values()))
        tell_cost(self._ctx, "candidates", shard, questions)
        if len(opened) > 1:
            opened = [under(one, f"{number}/") for number, one in enumerate(opened)]
        read = sum(len(asked.prompt_ids) for one in opened for of_one in one.requests.values() for asked in of_one)
        first, *others = opened
        counts = first.counts | {about: 0 for other in others for about in other.counts}
        requests = {about: asked for one in opened for about, asked in one.requests.items()}
        return OpenShard(
            requests,
            first.settled,
            lambda results: self._part(shard.index, candidates, opened, results, float(read)),
            counts,
        )

    def _cost(self, opened: Sequence[Opened], results: Results) -> dict[str, float]:
        """What servers with a price take for a shard."""
        costs = [
            Usage.of(asked_of, results[about]).cost(tariff)
            for method, one in zip(self.methods, opened, strict=True)
            if isinstance(method.engine, Asked) and (tariff := method.engine.tariff).priced
            for about, asked_of in one.requests.items()
        ]
        return {"cost": sum(costs)} if costs else {}

    def _part(
        self, index: int, candidates: Sequence[Candidate], opened: Sequence[Opened], results: Results, read: float
    ) -> Part:
        found: list[dict[str, Verdict]] = [one.read(results) for one in opened]
        drops: list[Drop] = []
        judgements: list[dict[str, Any]] = []
        stats: Counter[str] = Counter()
        for candidate in candidates:
            verdicts = [verdict_of[candidate.id] for verdict_of in found]
            missing = [verdict for verdict in verdicts if isinstance(verdict, Drop)]
            if len(missing) == len(verdicts):
                drops.append(missing[0])
                continue
            for method, verdict in zip(self.methods, verdicts, strict=True):
                if isinstance(verdict, Drop):
                    stats[f"unjudged_{method.judge.key.strip('/')}_{verdict.reason}"] += 1
                else:
                    judgements += self._rows(candidate, method, verdict)
        stats["votes"] = len(judgements)
        stats["unparseable_votes"] = sum(row["score"] is None for row in judgements)
        masses = [row["mass"] for row in judgements if row["mass"] is not None]
        return Part(
            index=index,
            tables={"judgements": pa.Table.from_pylist(judgements, schema=TABLES["judgements"].schema)},
            tallies=tally("candidate", [candidate.language for candidate in candidates], drops),
            drops=drops,
            stats={
                **{name: float(count) for name, count in stats.items()},
                "mass_sum": sum(masses),
                "prompt_tokens": read,
            }
            | _usage(results)
            | self._cost(opened, results),
        )

    def _rows(self, candidate: Candidate, method: Method, verdict: Verdict) -> Iterator[dict[str, Any]]:
        judge = method.judge
        for number, vote in enumerate(verdict if isinstance(verdict, list) else []):
            yield {
                "candidate_id": candidate.id,
                "prompt_id": candidate.prompt_id,
                "language": candidate.language,
                "method": judge.settings.method,
                "judge_model": self._ctx.models[judge.role].name,
                "vote": number,
                "score": vote.score,
                "mass": vote.mass,
                "consistency": vote.consistency,
                "criterion": judge.criterion or None,
                "judge": judge.name or None,
            }


def _made(
    ctx: Context, judge: JudgeOf, wanted: Sequence[Wanted], engines: Iterator[Engine], fleet: list[Engine]
) -> Method:
    """The judge with the next of the engines, which join the fleet unless they are in it."""
    own = [next(engines) for _ in wanted]
    for engine in own:
        if not any(engine is other for other in fleet):
            fleet.append(engine)
    numbers = [next(n for n, other in enumerate(fleet) if other is engine) for engine in own]
    return CLASSES[judge.settings.method](ctx, judge, own, numbers)


def _usage(results: Mapping[str, Any]) -> dict[str, float]:
    """Tokens that were generated, which servers bill."""
    return {"generated_tokens": float(sum(c.n_tokens for completions in results.values() for c in completions))}
