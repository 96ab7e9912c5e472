"""The stage contract: what a stage is given, what it gives back. Imports nothing heavy.

Three kinds of stages share one context:
- ShardStage: takes an iterator of shards, yields finished parts in any order, so that an engine stays fed.
- TableStage: reads whole tables (lazily), yields rows of named tables, then its account.
- ArtifactStage: a TableStage that also owns a folder it may checkpoint into; after a crash it finds
  the folder as it left it.

A stage is a subclass of one of them, made without arguments; its facts are its `stages.spec.StageSpec` in the catalog.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from schemas.config import RunConfig
from schemas.errors import UserError
from schemas.manifests import Tally

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa


class Stopped(Exception):
    """The stage was asked to stop and did, at a safe point: what it checkpointed is kept, nothing is committed."""


class MachineLost(UserError):
    """A machine that took part is gone: whoever has others may begin again with them, from the last checkpoint."""


@dataclass(frozen=True)
class ModelRef:
    """A model that is on this machine: the name the user gave, its folder, the hash of its content.

    For the `openai` engine there may be no folder: path is then None. A merged adapter keeps (its folder, the folder of
    its base) in `adapter`. hub: the hub id of the model, or of the one the run trained it from; revision: its commit there,
    only of a model that is the hub's own.
    """

    name: str
    path: Path | None
    digest: str
    adapter: tuple[Path, Path] | None = None
    hub: str = ""
    revision: str = ""


@dataclass(frozen=True)
class Machine:
    """Another machine that takes part in a training. address: where it waits to be told (`stages.train.host`); key: what it answers to."""

    name: str
    address: tuple[str, int]
    key: bytes = field(repr=False)


@dataclass(frozen=True)
class Share:
    """Which of how many workers this one is, that carry out an order together; from 0."""

    number: int = 0
    of: int = 1


@dataclass(frozen=True)
class Left:
    """What a run has still to do of a stage that is cut into shards: number of the first shard that is left, rows of them all."""

    first: int
    rows: int


class Progress(Protocol):
    """Where a stage says how far it is. Rates and time left are made from it."""

    def total(self, amount: int, unit: str) -> None:
        """Announce the work of this call, in `unit`s (ShardStages need not: the driver knows the rows)."""

    def advance(self, amount: int = 1, **rates: float) -> None:
        """`amount` units are done; `rates` are shown as they are, for example tokens_per_s=120."""

    def note(self, message: str) -> None:
        """One line for people: something they should know, never an error made small."""


@dataclass(frozen=True)
class Silent:
    """A Progress that shows nothing; notes go to `tell` if there is one."""

    tell: Callable[[str], None] | None = None

    def total(self, amount: int, unit: str) -> None:
        """Not shown."""

    def advance(self, amount: int = 1, **rates: float) -> None:
        """Not shown."""

    def note(self, message: str) -> None:
        """Told, or not shown."""
        if self.tell is not None:
            self.tell(message)


@dataclass
class Context:
    """What every stage is given.

    inputs: table name -> its Parquet files in order; `pairs:0` is round 0's when this is a later round.
    models: role -> model; roles: start (`model.policy`), initial (the policy of round 0: start, or what sft made of it),
        policy (start of this round), reference, judge, evaluation_judge, trained (after train); baseline and second_judge of the
        evaluation where there are such; sft, base when
        `train.optimizer` merges; token_reward when `train.allo` has a reward model.
    folder: the ArtifactStage's own folder.
    scratch: folder on the run's disk for files that end with the stage; None: the system's temporary folder.
    shared: lives as long as the worker process; loaded engines are kept in it by `shared_engine`.
    stop: true when the run was asked to stop; a stage then returns at its next safe point.
    unfinished: (shard) -> a file where a ShardStage may leave what it has of a shard; it outlives the process, and goes when the
        part is committed. None: nothing is left.
    limits: config field -> the smaller value that memory allowed; see `limit`.
    machines: others that a stage which spans several may use.
    left: of a ShardStage in a run; None: all of it. share: this worker's, which may change as workers come.
    """

    config: RunConfig
    round: int
    inputs: Mapping[str, list[Path]]
    models: Mapping[str, ModelRef]
    progress: Progress
    folder: Path | None = None
    scratch: Path | None = None
    shared: dict[str, Any] = field(default_factory=dict)
    stop: Callable[[], bool] = lambda: False
    limits: dict[str, int] = field(default_factory=dict)
    unfinished: Callable[[int], Path] | None = None
    machines: tuple[Machine, ...] = ()
    left: Left | None = None
    share: Callable[[], Share] = Share

    @property
    def own_folder(self) -> Path:
        """The folder of an ArtifactStage."""
        if self.folder is None:
            raise ValueError("only an ArtifactStage has a folder")
        return self.folder

    def scan(self, table: str) -> pl.LazyFrame:
        """The table as a lazy frame."""
        import polars as pl

        return pl.scan_parquet(self.inputs[table], glob=False)

    def limited(self, field: str, value: int) -> int:
        """The value of a config field, or the smaller one that memory allowed earlier in this run."""
        return min(value, self.limits.get(field, value))

    def limit(self, field: str, value: int, why: str) -> None:
        """Hold a config field to a smaller value for the rest of the run, and say so."""
        self.limits[field] = value
        self.progress.note(f"{why}: {field} is {value:,} from here on")


@dataclass(frozen=True)
class Shard:
    """A fixed range of the input table."""

    index: int
    rows: pa.Table


@dataclass(frozen=True)
class Drop:
    """An input row that was not kept. failed: an error, not a rule. text: how a row of a source begins, to know it by."""

    unit: str
    row_id: str
    language: str
    reason: str
    detail: str = ""
    failed: bool = False
    text: str = ""


@dataclass
class Part:
    """A finished shard: rows of the stage's tables, what was dropped, and the account of both.

    seconds_before: of work that processes which did not finish it put into it.
    """

    index: int
    tables: dict[str, pa.Table]
    tallies: list[Tally]
    drops: list[Drop] = field(default_factory=list)
    stats: dict[str, float] = field(default_factory=dict)
    seconds_before: float = 0.0


@dataclass(frozen=True)
class Rows:
    """Some rows of a table, in order."""

    table: str
    data: pa.Table


@dataclass
class Account:
    """The end of a TableStage or ArtifactStage. artifacts: files in the folder that are its result.

    refusal: why the run cannot go on with what the stage kept; its dropped rows can then be inspected, nothing else is there.
    """

    tallies: list[Tally]
    drops: list[Drop] = field(default_factory=list)
    stats: dict[str, float] = field(default_factory=dict)
    artifacts: list[Path] = field(default_factory=list)
    refusal: UserError | None = None


class ShardStage(ABC):
    """A stage whose input is cut into shards, each computed and committed by itself."""

    @abstractmethod
    def run(self, ctx: Context, shards: Iterator[Shard]) -> Iterator[Part]:
        """Yield every shard's part, in any order; pull further shards to stay fed."""


class TableStage(ABC):
    """A stage that reads whole tables and is committed as one."""

    @abstractmethod
    def run(self, ctx: Context) -> Iterator[Rows | Account]:
        """Yield rows, then exactly one Account."""


class ArtifactStage(TableStage):
    """A TableStage with a folder of its own, `ctx.own_folder`."""


def tally(unit: str, languages_in: Iterable[str], drops: Iterable[Drop]) -> list[Tally]:
    """Account one unit per language: in from `languages_in` (one entry a row), kept is what was not dropped."""
    rows_in = Counter(languages_in)
    dropped: dict[str, Counter[str]] = {}
    failed: Counter[str] = Counter()
    for drop in drops:
        if drop.unit != unit:
            continue
        if drop.failed:
            failed[drop.language] += 1
        else:
            dropped.setdefault(drop.language, Counter())[drop.reason] += 1
    languages = sorted(set(rows_in) | set(dropped) | set(failed))
    return [
        Tally(
            unit=unit,
            language=language,
            rows_in=rows_in[language],
            kept=rows_in[language] - sum(dropped.get(language, Counter()).values()) - failed[language],
            dropped=dict(dropped.get(language, {})),
            failed=failed[language],
        )
        for language in languages
    ]
