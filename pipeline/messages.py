"""What the driver and its workers say to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pipeline.commit import PreparedPart
from schemas.config import RunConfig
from schemas.errors import UserError
from schemas.manifests import FileRecord, ShardRange
from stages.contract import Left, Machine, ModelRef, Share
from stages.spec import StageSpec


@dataclass(frozen=True)
class Order:
    """To a worker: one stage of one round.

    shards: those that are left, by index; a worker is sent none of a stage that is cut into shards, but each as it asks for it. scratch:
    where unfinished files of this run go, and of no other run of the directory. outside: name -> SHA-256 of the files it reads outside
    the run directory. limits: config field -> the smaller value that memory allowed. visible_seconds: how long what other machines
    wrote may take to be seen. versions: what its machine must run; empty: it is the driver's. machines: others that the stage may use.
    left: of a stage that is cut into shards. share: the worker's.
    """

    spec: StageSpec
    round: int
    config: RunConfig
    root: Path
    scratch: Path
    fingerprint: str
    inputs: dict[str, list[FileRecord]]
    models: dict[str, ModelRef]
    shards: dict[int, ShardRange]
    outside: dict[str, str] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    visible_seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    machines: tuple[Machine, ...] = ()
    left: Left | None = None
    share: Share = field(default_factory=Share)


@dataclass(frozen=True)
class Assigned:
    """To a worker: the shard it asked for; None: there is none left. share: the worker's, now."""

    shard: ShardRange | None
    share: Share = field(default_factory=Share)


@dataclass(frozen=True)
class Leave:
    """To a worker: close what is loaded and end."""


@dataclass(frozen=True)
class Want:
    """To the driver: another shard, please."""


@dataclass(frozen=True)
class Offered:
    """To the driver: a part that is whole; it exists once the driver commits it."""

    part: PreparedPart


@dataclass(frozen=True)
class Total:
    """To the driver: the work of the stage, in units."""

    amount: int
    unit: str


@dataclass(frozen=True)
class Advanced:
    """To the driver: so many units more are done; rates to show."""

    amount: int
    rates: dict[str, float]


@dataclass(frozen=True)
class Noted:
    """To the driver: one line for people."""

    message: str


@dataclass(frozen=True)
class Limited:
    """To the driver: values that memory allowed, for whoever computes next."""

    limits: dict[str, int]


@dataclass(frozen=True)
class Done:
    """To the driver: the order is carried out, or the stage stopped at a safe point because it was asked to."""


@dataclass(frozen=True)
class Refused:
    """To the driver: something the user can correct."""

    error: UserError


@dataclass(frozen=True)
class Broke:
    """To the driver: a defect, with its traceback."""

    message: str
    trace: str


ToWorker = Order | Assigned | Leave
ToDriver = Want | Offered | Total | Advanced | Noted | Limited | Done | Refused | Broke
