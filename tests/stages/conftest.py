"""Runs a TableStage as a worker would, on tables given in memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.config import RunConfig
from schemas.manifests import Tally
from schemas.tables import schema_of
from stages.contract import Account, Context, Drop, ModelRef, Rows

_TORCH = {"checks", "conflict", "engines", "evaluate", "generate", "gradients", "judge", "models", "sft", "train"}
"""Folders whose tests compute with torch; the others need not load it."""


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other. Reference mode sets threads and kernels for the whole process."""
    if request.path.relative_to(Path(__file__).parent).parts[0] not in _TORCH:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@dataclass
class Notes:
    """A Progress that remembers what it was told."""

    notes: list[str] = field(default_factory=list)
    done: int = 0

    def total(self, amount: int, unit: str) -> None:
        pass

    def advance(self, amount: int = 1, **rates: float) -> None:
        self.done += amount

    def note(self, message: str) -> None:
        self.notes.append(message)


@dataclass
class Outcome:
    """What a stage yielded: its tables joined, its account, its notes."""

    tables: dict[str, pa.Table]
    account: Account
    notes: list[str]

    def rows(self, table: str) -> list[dict[str, Any]]:
        return self.tables[table].to_pylist()

    @property
    def drops(self) -> list[Drop]:
        return self.account.drops

    def tally(self, unit: str, language: str) -> Tally:
        return next(t for t in self.account.tallies if (t.unit, t.language) == (unit, language))


@pytest.fixture
def run_stage(tmp_path: Path) -> Callable[..., Outcome]:
    """run_stage(stage, config, round=0, model=folder, **input tables) -> Outcome; checks schemas and the account."""

    def run(
        stage: Any, config: dict[str, Any], *, round: int = 0, model: Path | None = None, **inputs: pa.Table
    ) -> Outcome:
        paths = {}
        for name, table in inputs.items():
            paths[name] = [tmp_path / f"in-{name}.parquet"]
            pq.write_table(table, paths[name][0])
        progress = Notes()
        models = {} if model is None else {"policy": ModelRef(str(model), model, "digest")}
        ctx = Context(RunConfig.model_validate(config), round, paths, models, progress)
        pieces: dict[str, list[pa.Table]] = {}
        account = None
        for item in stage.run(ctx):
            assert account is None, "nothing may follow the account"
            if isinstance(item, Rows):
                assert item.data.schema.equals(schema_of(item.table)), item.table
                pieces.setdefault(item.table, []).append(item.data)
            else:
                account = item
        assert account is not None
        if account.refusal is not None:  # as a worker does
            raise account.refusal
        return Outcome({name: pa.concat_tables(parts) for name, parts in pieces.items()}, account, progress.notes)

    return run


@pytest.fixture
def fresh_seed() -> int:
    """Another seed at every run; pytest shows it when a test fails."""
    return random.SystemRandom().randrange(2**31)
