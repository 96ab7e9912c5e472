"""Select stage: the share of training pairs that is kept, by conflict score or by a baseline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.config.curation import SelectConfig
from schemas.errors import UserError
from schemas.reasons import OFF_TOPIC
from schemas.tables import TABLES
from stages.contract import Account, Context, Drop, Rows, Stopped, TableStage, tally
from stages.select.filters import FILTERS, ranking

_BATCH = 4096
BELOW_CUT, NO_SCORE, CROWDED = "below_cut", "no_score", "crowded_cell"


class Select(TableStage):
    """TableStage: pairs, scores -> curated, rejected. Unit pair: the pairs of the train split.

    Reasons in rejected: no_score (no gradient, so no conflict score; or nothing that `select.by` could rank by, such
    as judge scores), off_topic (flag of the relevance gate in scores), below_cut, crowded_cell (ranked above some that are kept, but its cell has given its share).
    Pairs without a conflict score leave whatever the pairs are ranked by, so that rankings are compared on one pool.
    Raises UserError if no pair can be ranked.
    """

    def run(self, ctx: Context) -> Iterator[Rows | Account]:
        """Yield both tables in batches, in the order of the pairs table, then the account."""
        select = ctx.config.select
        ranked = rank(valued(read_pairs(ctx), select.by, (ctx.config.selection_seed, ctx.round)), select)
        for note in _notes(ranked, select):
            ctx.progress.note(note)
        for table in ("curated", "rejected"):
            yield Rows(table, TABLES[table].schema.empty_table())
        start = 0
        for path in ctx.inputs["pairs"]:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(_BATCH):
                    if ctx.stop():
                        raise Stopped
                    table = pa.table(batch)
                    train = table.filter(pc.equal(table["split"], "train"))
                    yield from _split(train, ranked[start : start + train.num_rows])
                    start += train.num_rows
                    ctx.progress.advance(batch.num_rows)
        drops = [
            Drop("pair", row["pair_id"], row["language"], row["reason"], row["detail"])
            for row in ranked.filter(pl.col("reason").is_not_null()).iter_rows(named=True)
        ]
        yield Account(tally("pair", ranked["language"], drops), drops)


def rank(pairs: pl.DataFrame, config: SelectConfig) -> pl.DataFrame:
    """Decide for every pair. pairs: pair_id, language, used (what it is ranked by, null: nothing), in any order; with `pool`, whether it counts
    for the share that is kept (else those do that are ranked), so that a ranking which knows less keeps no fewer; with `off_topic`, whether the
    relevance gate held it back; with `criterion`, every criterion has its own share.

    Adds reason (null: kept) and detail. Of the n pairs of a language that count, or of all with quota: global, the
    max(1, keep * n rounded half up) ranked ones with the largest `used` stay; ties go by pair_id. With a column `cell`, a cell gives
    at most max(1, share of that number rounded half up): its later pairs are passed over (crowded_cell) and the next in
    rank take their places, so that fewer stay only where the cells run out.
    """
    over: list[str | pl.Expr] = ["language"] if config.quota == "language" else [pl.lit(0)]
    if "criterion" in pairs.columns:
        over.append("criterion")  # scores of different criteria are on different scales
    capped = "cell" in pairs.columns
    counts = pl.col("pool") if "pool" in pairs.columns else pl.col("used").is_not_null()
    scored = (
        pairs.with_columns(pool=counts.sum().over(over))
        .filter(pl.col("used").is_not_null())
        .sort("used", "pair_id", descending=[True, False])
        .with_columns(place=pl.int_range(1, pl.len() + 1).over(over), n=pl.len().over(over))
        .with_columns(cut=_rounded(pl.col("pool") * config.keep))
        .with_columns(cap=_rounded(pl.col("cut") * config.diversity.share) if capped else pl.col("cut"))
        .with_columns(nth=pl.int_range(1, pl.len() + 1).over([*over, "cell"]) if capped else pl.lit(1))
        .with_columns(fits=pl.col("nth") <= pl.col("cap"))
        .with_columns(seat=pl.col("fits").cast(pl.Int64).cum_sum().over(over))
        .select("pair_id", "place", "n", "cut", "cap", "nth", "fits", "seat")
    )
    joined = pairs.join(scored, on="pair_id", how="left", maintain_order="left")
    crowded = ~pl.col("fits") & (pl.col("seat") < pl.col("cut"))
    off_topic = pl.col("off_topic") if "off_topic" in pairs.columns else pl.lit(False)
    below = ~(pl.col("fits") & (pl.col("seat") <= pl.col("cut")))
    return joined.with_columns(
        reason=pl.when(pl.col("place").is_null() & off_topic)
        .then(pl.lit(OFF_TOPIC))
        .when(pl.col("place").is_null())
        .then(pl.lit(NO_SCORE))
        .when(crowded)
        .then(pl.lit(CROWDED))
        .when(below)
        .then(pl.lit(BELOW_CUT)),
        detail=pl.when(pl.col("place").is_null())
        .then(pl.lit(""))
        .when(crowded)
        .then(pl.format("place {} of {}, number {} of its cell, {} kept of a cell", "place", "n", "nth", "cap"))
        .when(below)
        .then(pl.format("place {} of {}, {} kept", "place", "n", "cut"))
        .otherwise(pl.lit("")),
    ).drop("place", "n", "cut", "cap", "nth", "fits", "seat")


def _rounded(count: pl.Expr) -> pl.Expr:
    """Rounded half up, at least 1."""
    return (count.round(9) + 0.5).floor().cast(pl.Int64).clip(lower_bound=1)  # 50 * 0.29 is 14.499999999999998


def read_pairs(ctx: Context) -> pl.DataFrame:
    """Every training pair in table order, with all that `select` goes by: pair_id, language, score, `off_topic` (the relevance gate held it back), the filter's columns, and `cell` where
    cells are capped. Raises UserError where the cells' sketches are not stored."""
    by, diversity = ctx.config.select.by, ctx.config.select.diversity
    columns = ("pair_id", "language", "criterion", "chosen_score", "rejected_score")
    pairs = ctx.scan("pairs").filter(pl.col("split") == "train").select(columns)
    scores = ctx.scan("scores").select("pair_id", *{"score", "flags", *FILTERS[by].columns} - set(columns))
    off_topic = pl.col("flags").list.contains(OFF_TOPIC).fill_null(False)
    joined = pairs.join(scores, on="pair_id", how="left", maintain_order="left")
    frame = joined.with_columns(off_topic=off_topic).drop("flags").collect()
    if not diversity.cells:
        return frame
    if not ctx.inputs.get("gradients"):
        raise UserError("the cells need the gradient sketches", where="select.diversity.cells")
    from stages.select.diversity import cells

    found = cells(ctx.inputs["gradients"], diversity.cells, (ctx.config.seed, "select", ctx.round))
    return frame.join(found, on="pair_id", how="left", maintain_order="left")


def valued(frame: pl.DataFrame, by: str, seed: Sequence[object]) -> pl.DataFrame:
    """Of what `read_pairs` gives: pair_id, language, `cell` and `off_topic` if they are there, `pool` (it has a conflict score) and `used` (what it is ranked
    by, null: nothing). Raises UserError where no pair can be ranked."""
    has_score = pl.col("score").is_not_null() & pl.col("score").is_not_nan()
    frame = frame.with_columns(pool=has_score)
    pool = frame.filter("pool")  # what is ranked against the others is ranked against these
    used = pool.select("pair_id", used=ranking(pool, by, seed))
    frame = frame.join(used, on="pair_id", how="left", maintain_order="left")
    if frame["used"].null_count() == frame.height:
        why, fix = FILTERS[by].nothing
        if not frame["pool"].any():
            why, fix = "no training pair has a conflict score", "See the flags: python -m pipeline inspect RUN scores."
        raise UserError(f"no pair can be ranked: {why}", where=f"select.by: {by}", fix=fix)
    return frame.select("pair_id", "language", "used", "pool", *{"cell", "criterion", "off_topic"} & set(frame.columns))


def _notes(ranked: pl.DataFrame, config: SelectConfig) -> list[str]:
    """What could not be ranked; the languages of which nothing is kept; what crowded cells did; with a global quota, the languages that keep less
    than half of the share they would have kept of their own."""
    notes = []
    languages = (
        ranked.filter("pool")
        .group_by("language")
        .agg(n=pl.len(), ranked=pl.col("used").count(), kept=pl.col("reason").is_null().sum())
        .sort("language")
    )
    if unranked := int((ranked["pool"] & ranked["used"].is_null()).sum()):
        kept, pool = ranked["reason"].null_count(), pl.col("pool")
        full = rank(
            ranked.drop("used", "cell", "reason", "detail", strict=False).with_columns(used=pl.when(pool).then(0.0)),
            config,
        )
        wanted = full["reason"].null_count()
        filled = "as many are kept all the same" if kept == wanted else f"{kept} pairs are kept instead of {wanted}"
        notes.append(
            f"{config.by} cannot rank {unranked} of {int(ranked['pool'].sum())} pairs with a conflict score: {filled}"
        )
    if none := languages.filter(pl.col("ranked") == 0).select("language", "n").rows():
        each = ", ".join(f"{language} ({n} pairs)" for language, n in none)
        notes.append(f"nothing is kept of {each}: {config.by} cannot rank any of them")
    if config.diversity.cells:
        crowded, held = (ranked["reason"] == CROWDED).sum(), ranked["reason"].null_count()
        plain = rank(ranked.drop("cell", "reason", "detail", strict=False), config)["reason"].null_count()
        notes.append(f"{crowded} pairs gave way to lower ranked ones of less crowded cells")
        if held < plain:
            notes.append(
                f"the cells ran out: {held} pairs kept instead of {plain}; more cells or a larger share fill up"
            )
    if config.quota != "global":
        return notes
    starved = languages.filter((pl.col("ranked") > 0) & (pl.col("kept") < pl.col("n") * config.keep / 2))
    return notes + [
        f"the global quota starves {language}: {kept} of {n} pairs kept, {config.keep:.0%} would be {n * config.keep:.0f}"
        for language, n, kept in starved.select("language", "n", "kept").iter_rows()
    ]


def _split(pairs: pa.Table, decisions: pl.DataFrame) -> Iterator[Rows]:
    """The kept and the rejected of some training pairs; decisions: used and reason, row by row."""
    if pairs["pair_id"].to_pylist() != decisions["pair_id"].to_list():
        raise ValueError("the pairs table is not in the order it was ranked in")
    added = {"conflict_score": decisions["used"].to_arrow(), "reason": decisions["reason"].to_arrow()}
    rejected = decisions["reason"].is_not_null()
    for table, wanted in (("curated", ~rejected), ("rejected", rejected)):
        if not wanted.any():
            continue
        schema, mask = TABLES[table].schema, wanted.to_arrow()
        columns = [
            (added[name] if name in added else pairs[name]).filter(mask).cast(schema.field(name).type)
            for name in schema.names
        ]
        yield Rows(table, pa.table(columns, schema=schema))
