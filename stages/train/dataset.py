"""From the curated table to the rows TRL sees: the gradient stage's token ids and reference log-probabilities.

TRL would render and split conversations itself, keeping a template's trailing newline in the completion. We hand it the
ids of `stages/text/render.py`, so that training pushes on exactly the tokens the gradients were taken of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from schemas.errors import UserError
from schemas.ids import content_id
from stages.contract import Context
from stages.gradients.rows import Pair
from stages.text.render import Renderer

_IDS = pa.list_(pa.int32())
_ROWS = pa.schema(
    [
        ("prompt_ids", _IDS),
        ("chosen_ids", _IDS),
        ("rejected_ids", _IDS),
        ("ref_chosen_logps", pa.float32()),
        ("ref_rejected_logps", pa.float32()),
    ]
)
_BATCH = 1024


@dataclass(frozen=True)
class TrainingPairs:
    """The curated pairs in table order. rows: `_ROWS`; digest: content of ids and order; numbers: positions in curated."""

    rows: pa.Table
    languages: list[str]
    digest: str
    numbers: Sequence[int]

    def __len__(self) -> int:
        return self.rows.num_rows

    def take(self, rows: list[int]) -> TrainingPairs:
        """Some of the pairs, in the order given."""
        languages = [self.languages[row] for row in rows]
        numbers = [self.numbers[row] for row in rows]
        return TrainingPairs(self.rows.take(rows), languages, content_id(self.digest, rows), numbers)

    def pair(self, index: int) -> Pair:
        """Token ids of one pair."""
        row = self.rows.slice(index, 1).to_pylist()[0]
        return Pair(tuple(row["prompt_ids"]), tuple(row["chosen_ids"]), tuple(row["rejected_ids"]))

    def references(self) -> list[tuple[float, float]]:
        """(s_ref of chosen, s_ref of rejected) of every pair."""
        chosen, rejected = (self.rows[name].to_pylist() for name in ("ref_chosen_logps", "ref_rejected_logps"))
        return list(zip(chosen, rejected, strict=True))

    def with_references(self, references: list[tuple[float, float]]) -> TrainingPairs:
        """The same pairs with other reference log-probabilities."""
        rows = self.rows
        for position, name in enumerate(("ref_chosen_logps", "ref_rejected_logps")):
            values = pa.array([pair[position] for pair in references], pa.float32())
            rows = rows.set_column(rows.schema.get_field_index(name), _ROWS.field(name), values)
        return replace(self, rows=rows)

    def with_column(self, name: str, values: pa.Array) -> TrainingPairs:
        """The same pairs with another column: one value for each pair."""
        return replace(self, rows=self.rows.append_column(name, values))

    def dataset(self) -> Dataset:
        """As a `datasets.Dataset`. Raises UserError if the library lost a row."""
        dataset = Dataset(self.rows)
        if len(dataset) != len(self):
            raise UserError(f"{len(self)} curated pairs became {len(dataset)} training rows", where="curated")
        return dataset


def load_pairs(ctx: Context, renderer: Renderer) -> TrainingPairs:
    """Tokenise `curated` and check it against `gradients`.

    Raises UserError when curated is empty, a pair has no gradient row, its ids differ from those the gradient was taken
    of, or it is longer than text.max_length: TRL would otherwise truncate or drop it silently.
    """
    gradients, longest = _gradient_rows(ctx), ctx.config.text.max_length
    tables: list[pa.Table] = []
    languages: list[str] = []
    hashes: list[str] = []
    for batch in _curated_batches(ctx.inputs["curated"]):
        rows = [_training_row(row, gradients.get(row["pair_id"]), renderer, longest) for row in batch]
        tables.append(pa.Table.from_pylist(rows, schema=_ROWS))
        languages.extend(row["language"] for row in batch)
        hashes.extend(gradients[row["pair_id"]]["ids_hash"] for row in batch)
    if not languages:
        raise UserError(
            "there is nothing to train on: curated is empty",
            where=f"round {ctx.round}, curated",
            fix="`status` shows where pairs were dropped; loosen that rule, raise select.keep, or give more prompts.",
        )
    return TrainingPairs(pa.concat_tables(tables), languages, content_id(hashes), range(len(languages)))


def _training_row(
    row: dict[str, Any], gradient: dict[str, Any] | None, renderer: Renderer, max_length: int
) -> dict[str, Any]:
    where = f"curated, pair {row['pair_id']}"
    if gradient is None:
        raise UserError("a curated pair has no row in gradients", where=where, fix="Run again from stage gradients.")
    ids = renderer.pair_ids(row["prompt"], row["chosen"], row["rejected"])
    if ids.hash() != gradient["ids_hash"]:
        raise UserError(
            "a pair's token ids differ from those its gradient was taken of",
            where=where,
            fix="The tokenizer, its chat template or the text section changed: run again from stage gradients.",
        )
    longest = len(ids.prompt) + max(len(ids.chosen), len(ids.rejected))
    if longest > max_length:
        raise UserError(
            f"a curated pair has {longest} tokens", where=where, fix=f"text.max_length is {max_length}: raise it."
        )
    return {
        "prompt_ids": ids.prompt,
        "chosen_ids": ids.chosen,
        "rejected_ids": ids.rejected,
        "ref_chosen_logps": gradient["ref_logp_chosen"],
        "ref_rejected_logps": gradient["ref_logp_rejected"],
    }


def _curated_batches(files: list[Path]) -> Iterator[list[dict[str, Any]]]:
    columns = ["pair_id", "language", "prompt", "chosen", "rejected"]
    for file in files:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(_BATCH, columns=columns):
                yield batch.to_pylist()


def _gradient_rows(ctx: Context) -> dict[str, dict[str, Any]]:
    """What training needs of the gradients table, by pair_id (the sketches are not read)."""
    columns = ["pair_id", "ids_hash", "ref_logp_chosen", "ref_logp_rejected"]
    curated = ctx.scan("curated").select("pair_id")
    wanted = ctx.scan("gradients").select(columns).join(curated, on="pair_id", how="semi")
    return {row["pair_id"]: row for row in wanted.collect().iter_rows(named=True)}
