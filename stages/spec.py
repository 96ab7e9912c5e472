"""A stage as the driver sees it: every fact about it, without importing what computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

from schemas.config import RunConfig
from schemas.config.sources import Source
from schemas.engines import ENGINES


@dataclass(frozen=True)
class Needs:
    """Packages that a stage needs with some config, and what to say when one is missing.

    what: of the error, with `{}` for the missing names; empty: "Stage NAME needs the packages …". where: the config key.
    """

    packages: tuple[str, ...]
    fix: str = 'Install them: pip install -e ".[cpu]" or ".[cuda]".'
    what: str = ""
    where: str = ""


@dataclass(frozen=True)
class StageSpec:
    """All that is true of a stage; nothing elsewhere asks for its name.

    reads: tables; `table:0` is round 0's; a trailing `?` marks one that may be absent.
        The first one is what a ShardStage's shards are cut from.
    writes: tables; dropped rows go to _dropped/<first of them>.
    sections: config sections whose semantic fields its result depends on (`seed` always counts).
    models: roles its result depends on; more_models: config key of others (a mapping by role).
    kept_rows: (units, table): what the account says was kept of these units are the rows of that table.
    version: bumped when the code's output changes.
    engines: config key of the inference engines it uses; neighbours with the same ones and the same models share worker processes.
    when: (config key, value): the stage is part of a run only if the key has the value.
    only: (column, config key of its values) of the rows of its first table that a ShardStage works on; it passes the others by. None: all.
    size: config key of the rows per shard of a ShardStage; `<name>.shard_size` if empty.
    expensive: hours of work: what is finished of it is never thrown away unless the user says so.
    keeps: which files in its folder are work that it goes on from before it commits anything (glob); empty: none.
    trains: role of the model that it trains further; the result is the `model/` in its folder. Empty: it trains none.
    sources: config key of the files it reads from outside the run directory.
    needs: packages, by config.
    sketches: sketches gradients of its `policy`.
    looks: MODULE:FUNCTION of (config) -> notes: what takes seconds to find out before any work. Each raises UserError.
    gpus: config key of the GPUs that one worker sees, 0 for all there are; empty: one.
    machines: config key of the machines that it spans, 0 for all there are; empty: one.
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
    engines: str = ""
    per_round: bool = True
    when: tuple[str, str | bool] | None = None
    only: tuple[str, str] | None = None
    size: str = ""
    expensive: bool = False
    keeps: str = ""
    trains: str = ""
    sources: str = ""
    needs: tuple[Callable[[RunConfig], Needs], ...] = ()
    sketches: bool = False
    gpus: str = ""
    machines: str = ""
    more_models: str = ""
    looks: tuple[str, ...] = ()

    def roles(self, config: RunConfig) -> tuple[str, ...]:
        """Roles of the models that its result depends on."""
        more = config_value(config, self.more_models) if self.more_models else ()
        return tuple(dict.fromkeys([*self.models, *more]))

    def is_part_of(self, config: RunConfig) -> bool:
        """Whether a run with this config has the stage at all."""
        return self.when is None or config_value(config, self.when[0]) == self.when[1]

    def sources_of(self, config: RunConfig) -> list[Source]:
        """What it reads from outside the run directory."""
        return list(config_value(config, self.sources)) if self.sources else []

    def gpus_per_worker(self, config: RunConfig, there: int) -> int:
        """GPUs that one worker sees of those that are there."""
        return (config_value(config, self.gpus) or there) if self.gpus else 1

    def spans(self, config: RunConfig, there: int) -> int:
        """Machines that it computes on together, of those that are there."""
        return (config_value(config, self.machines) or there) if self.machines else 1

    def holds_gpu(self, config: RunConfig) -> bool:
        """Whether its workers compute with a model of their own, so that one that has a GPU is of use."""
        engines = config_value(config, self.engines) if self.engines else []
        loads = any(ENGINES[engine.kind].has_weights or self.kind != "shard" for engine in engines)
        return loads or self.sketches or bool(self.trains)

    def shard_rows(self, config: RunConfig) -> int:
        """Rows of a shard of a ShardStage."""
        return int(config_value(config, self.size or f"{self.name}.shard_size"))


def config_value(config: RunConfig, key: str) -> Any:
    """The value of a dotted config key."""
    return reduce(getattr, key.split("."), config)
