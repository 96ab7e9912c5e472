"""One stage of a run: its order to the workers, what they report, and the manifest that says it is whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from pipeline.account import account_line, totals
from pipeline.commit import PreparedPart, commit, write_manifest
from pipeline.console import Display, StageBar
from pipeline.events import Events, Meter
from pipeline.executor import Executor, Reports
from pipeline.failures import Failures
from pipeline.fingerprint import content_of
from pipeline.lease import Lease
from pipeline.messages import Order
from pipeline.models import Models
from pipeline.parts import Parts
from pipeline.plan import Inputs, Planner, State
from pipeline.rundir import RunDir
from schemas.config import RunConfig
from schemas.errors import UserError
from schemas.manifests import StageManifest, StagePlan
from stages.contract import Left
from stages.schedule import Step
from stages.spec import StageSpec, config_value


def shard_work(spec: StageSpec, config: RunConfig, plan: StagePlan, root: Path, inputs: Inputs) -> dict[int, int]:
    """Rows that a ShardStage works on, by shard: not those that it passes by (`StageSpec.only`)."""
    if spec.only is None:
        return {shard.index: shard.stop - shard.start for shard in plan.shards}
    column, key = spec.only
    files = [root / record.path for record in inputs.records[spec.reads[0].rstrip("?")]]
    wanted = (
        pl.scan_parquet(files, glob=False).select(pl.col(column).is_in(config_value(config, key))).collect().to_series()
    )
    return {shard.index: int(wanted[shard.start : shard.stop].sum()) for shard in plan.shards}


@dataclass(frozen=True)
class StageRunner:
    """Carries out stages, one `run` each."""

    config: RunConfig
    rundir: RunDir
    models: Models
    planner: Planner
    events: Events
    display: Display
    lease: Lease

    def run(self, step: Step, state: State, executor: Executor) -> None:
        """What is left of the step's parts, then its manifest. Raises as `Executor.run`; UserError when too many rows fail."""
        plan = state.plan
        assert plan is not None
        parts = self.rundir.parts(step.spec, step.round, state.committed)
        failures = Failures(self.rundir, step.spec, step.round, self.config.execution.max_failed_fraction)
        for index in failures.worth_another_try(parts):
            parts.remove(self.rundir.part(step.spec, step.round, index))
        self.rundir.forget_parts(step.spec, step.round, but=parts)
        pending = {s.index: s for s in plan.shards if s.index not in parts}
        models = self.models.of(step)
        order = Order(
            spec=step.spec,
            round=step.round,
            config=self.config,
            root=self.rundir.root,
            scratch=self.rundir.temporary / self.lease.nonce,
            fingerprint=plan.fingerprint,
            inputs=state.inputs.records,
            models=models,
            shards=pending,
            outside={k.removeprefix("file "): v for k, v in plan.ingredients.items() if k.startswith("file ")},
            left=Left(min(pending), sum(s.stop - s.start for s in pending.values())) if pending else None,
        )
        self.events.add(
            "stage_started", stage=step.spec.name, round=step.round, parts=len(plan.shards), done=len(parts)
        )
        meter = Meter(self.events, step.spec.name, step.round)
        with self.display.stage(step.title) as bar:
            if step.spec.kind == "shard":
                work = shard_work(step.spec, self.config, plan, self.rundir.root, state.inputs)
                total, done = sum(work.values()), sum(work[index] for index in work if index not in pending)
                bar.total(total, "rows", done)
                meter.total(total, "rows", done)
            if pending:
                executor.run(order, self._key(step, models), self._reports(step, bar, meter, parts, failures))
        failures.check(parts, finished=True)
        missing = [s.index for s in plan.shards if s.index not in parts]
        if missing:
            raise UserError(
                f"Stage {step.title} ended without its parts {missing[:5]}", fix="Run the same command again."
            )
        manifest = self._finish(step, plan.fingerprint, parts, {role: m.name for role, m in models.items()})
        self.events.add(
            "stage_done",
            stage=step.spec.name,
            round=step.round,
            seconds=manifest.seconds,
            rows=totals(manifest.tallies),
            stats=manifest.stats,
        )
        self.display.say(f"✓ {step.title}: {account_line(manifest)}", "green")

    def _key(self, step: Step, models: Mapping[str, object]) -> str | None:
        """Stages that run the engine with the same model share worker processes."""
        if not step.spec.engines or step.spec.kind != "shard":
            return None
        gpus = step.spec.gpus_per_worker(self.config, 0)  # a worker keeps those it was given
        digests = sorted({m.digest for m in models.values()})  # type: ignore[attr-defined]
        return repr((config_value(self.config, step.spec.engines), gpus, self.config.text.max_length, digests))

    def _reports(self, step: Step, bar: StageBar, meter: Meter, parts: Parts, failures: Failures) -> Reports:
        def joined(place: str, log: Path) -> None:
            where = {"place": place, "log": log.name}
            self.events.add("worker_started", stage=step.spec.name, round=step.round, **where)

        def offered(prepared: PreparedPart, place: str) -> None:
            self.lease.check()  # on disk: a driver that was frozen and wakes must not undo another's commit
            commit(self.rundir, step.spec, prepared)
            part = prepared.manifest
            parts.add(part)
            self.events.add(
                "part_done",
                stage=step.spec.name,
                round=step.round,
                part=part.index,
                place=place,
                seconds=part.seconds,
                rows=totals(part.tallies),
                stats=part.stats,
            )
            failures.check(parts, finished=False)

        def started(index: int, place: str) -> None:
            self.events.add("part_started", stage=step.spec.name, round=step.round, part=index, place=place)

        def note(message: str) -> None:
            self.events.add("note", stage=step.spec.name, round=step.round, message=message)
            bar.say(message)

        def total(amount: int, unit: str) -> None:
            if step.spec.kind != "shard":
                bar.total(amount, unit)
                meter.total(amount, unit)

        def tick() -> None:
            self.lease.check_heartbeat()
            bar.tick()
            meter.tick()

        def advance(amount: int, rates: Mapping[str, float], place: str) -> None:
            bar.advance(amount, rates)
            meter.advance(amount, rates, place)

        return Reports(
            joined=joined,
            total=total,
            advance=advance,
            note=note,
            started=started,
            offered=offered,
            tick=tick,
        )

    def _finish(self, step: Step, fingerprint: str, parts: Parts, models: dict[str, str]) -> StageManifest:
        """Write the stage's manifest: the driver's word that every part is in."""
        records = [f for index in sorted(parts.files) for f in parts.files[index]]
        manifest = StageManifest(
            stage=step.spec.name,
            round=step.round,
            fingerprint=fingerprint,
            content=content_of(records),
            files=records,
            tallies=parts.tallies(),
            stats=parts.stats,
            seconds=round(parts.seconds, 3),
            models=models,
        )
        self.lease.check()
        self.rundir.sweep(step.spec, step.round, records)
        write_manifest(self.rundir.state(step.spec, step.round) / "_stage.json", manifest.model_dump())
        return manifest
