"""The tables: which methods, which columns, how a table is filled and printed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from benchmarks.quality import allo, congrad, omo, orthalign
from benchmarks.quality.methods import TOGETHER, Bench, Method
from benchmarks.quality.results import Cell, Results, Values, markdown
from benchmarks.quality.world import World
from schemas.ids import content_id

VERSION = 1
"""Raise it when a change of the benchmark's code changes figures: rows of another version count as missing."""
UNTOUCHED = "SFT, not trained"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Table:
    """A question. columns: name -> (values of a line, values of the untouched SFT model of the same seed) -> number."""

    title: str
    methods: Sequence[Method]
    columns: Mapping[str, Callable[[Values, Values], float]]


def _plain(name: str) -> Callable[[Values, Values], float]:
    return lambda values, start: values[name]


def _rise(name: str) -> Callable[[Values, Values], float]:
    return lambda values, start: values[name] - start[name]


def _mean(prefix: str, names: Sequence[str]) -> Callable[[Values, Values], float]:
    return lambda values, start: sum(values[f"{prefix}/{name}"] for name in names) / len(names)


_TAX = {"tax: running text": _rise("text"), "tax: other tasks": _rise("task")}


def _rewards(names: Sequence[str]) -> dict[str, Callable[[Values, Values], float]]:
    return {
        "accuracy": _mean("accuracy", names),
        "reward accuracy": _mean("reward", names),
        "answered": _plain("answered"),
    }


def _retention(length: str) -> Table:
    order = orthalign.SEQUENCES[length]
    columns: dict[str, Callable[[Values, Values], float]] = {}
    for name in order[:-1]:
        columns[f"{name}, when trained"] = lambda v, s, n=name: v.get(f"own/{n}", float("nan"))  # type: ignore[misc]
        columns[f"{name}, at the end"] = _plain(f"reward/{name}")
    columns[f"{order[-1]}, at the end"] = _plain(f"reward/{order[-1]}")
    columns["mean at the end"] = _mean("reward", order)
    columns |= {"answered": _plain("answered"), "refused (private)": _plain("refused")}
    return Table(f"OrthAlign: {' → '.join(order)}", orthalign.methods(order), columns | _TAX)


TABLES: dict[str, Table] = {
    "omo": Table("Online merging: reward and tax", omo.methods(), _rewards(TOGETHER) | _TAX),
    "orthalign-two": _retention("two"),
    "orthalign-three": _retention("three"),
    "congrad": Table(
        "Curation and optimizer",
        congrad.methods(),
        {"damaged, of what is trained on": lambda v, s: v.get("damaged", float("nan"))} | _rewards(TOGETHER) | _TAX,
    ),
    "allo": Table("ALLO: few weights, forgetting before learning", allo.methods(), _rewards(TOGETHER) | _TAX),
}


def cell(table: str, method: Method, world_key: str, seed: int) -> Cell:
    """The cell of a method. world_key: what its world depends on but the seed."""
    return Cell(table, method.name, seed, content_id(VERSION, table, method.name, dict(method.settings), world_key))


def world_key(size: object, model: str | None, base: str | None) -> str:
    """Hash of the sizes and of the models' names."""
    return content_id(asdict(size), model, base)  # type: ignore[call-overload]


def fill(name: str, results: Results, key: str, world: Callable[[], World], seed: int, only: str, say: Say) -> None:
    """Compute the missing cells of a table for a seed. only: part of the names of the methods that are run."""
    table = TABLES[name]
    wanted = [(m, cell(name, m, key, seed)) for m in table.methods if only in m.name]
    wanted = [(method, which) for method, which in wanted if results.read(which) is None]
    if not wanted:
        return
    here = world()
    from benchmarks.quality.measure import Measure

    bench = Bench(here, Measure(here), here.folder / "scratch" / name)
    for method, which in wanted:
        begun = time.process_time()
        try:
            values = method.run(bench, method.settings)
        except LookupError as error:
            say(f"{name}, {method.name}, seed {seed}: left out: {error}")
            continue
        results.write(which, values, time.process_time() - begun)
        say(f"{name}, {method.name}, seed {seed}: {time.process_time() - begun:.1f} s")
    shutil.rmtree(bench.scratch, ignore_errors=True)


def collected(name: str, results: Results, key: str, seeds: Sequence[int]) -> dict[str, list[Values | None]]:
    """What there is of a table: method -> values by seed."""
    return {m.name: [results.read(cell(name, m, key, seed)) for seed in seeds] for m in TABLES[name].methods}


def printed(name: str, results: Results, key: str, seeds: Sequence[int]) -> str:
    """A table as Markdown."""
    table, found = TABLES[name], collected(name, results, key, seeds)
    start = found[UNTOUCHED]
    paired = {
        method: [None if v is None or s is None else (v, s) for v, s in zip(values, start, strict=True)]
        for method, values in found.items()
    }
    columns = {title: (lambda pair, f=column: f(*pair)) for title, column in table.columns.items()}
    return f"### {table.title}\n\n" + markdown(paired, columns)
