"""Log-probabilities of held-out and authored pairs under a model, and what they say about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa

from schemas.errors import UserError
from schemas.ids import content_id
from stages.contract import Context, ModelRef, Stopped
from stages.evaluate.heldout import HeldOutPair
from stages.evaluate.metrics import AFTER, BEFORE, CHANGE, Measurement
from stages.gradients.batching import TokenBudget
from stages.gradients.logprobs import check_head, logprobs_of_rows
from stages.gradients.rows import BatchRow
from stages.gradients.work import Work, forward_cost
from stages.models.device import device_of, dtype_of, free_memory
from stages.models.load import load_text_model

_SCHEMA = pa.schema([("row_id", pa.string()), ("chosen", pa.float64()), ("rejected", pa.float64())])
_CHUNK = 64

Scores = Mapping[str, tuple[float, float]]
"""row id -> (s(chosen), s(rejected)): log-probabilities summed over the answer's tokens."""


def identity(ctx: Context, model: ModelRef, pairs: Sequence[HeldOutPair]) -> str:
    """What the scores depend on."""
    rows = [(pair.row_id, pair.ids.hash()) for pair in pairs]
    return content_id("loglik", model.digest, str(dtype_of(ctx.config)), rows)


def score_pairs(ctx: Context, model: ModelRef, pairs: Sequence[HeldOutPair]) -> pa.Table:
    """Load the model, score every pair (progress: one a pair), free the model; pairs too long for the memory have no row.

    Raises Stopped when asked to stop.
    """
    if not pairs:
        return _SCHEMA.empty_table()
    config = ctx.config
    loaded = load_text_model(model, dtype_of(config), device_of(config), config.model.trust_remote_code)
    try:
        check_head(loaded)
    except ValueError as error:
        raise UserError(f"{model.name} cannot be scored: {error}", where="model") from error
    budget = TokenBudget.remembered(ctx, "evaluate.token_budget", config.evaluate.token_budget)
    out: list[dict[str, object]] = []
    for start in range(0, len(pairs), _CHUNK):
        if ctx.stop():
            raise Stopped
        chunk = pairs[start : start + _CHUNK]
        rows = [
            BatchRow(tuple(pair.ids.prompt), tuple(answer))
            for pair in chunk
            for answer in (pair.ids.chosen, pair.ids.rejected)
        ]
        work = Work(len(chunk), forward_cost(rows))

        def done(computed: list[int], work: Work = work, rows: list[BatchRow] = rows) -> None:
            ctx.progress.advance(work.did(forward_cost([rows[n] for n in computed])))

        misfits: list[int] = []
        found = iter(logprobs_of_rows(loaded, rows, budget, misfits=misfits, done=done))
        sums = [None if n in misfits else float(next(found).double().sum()) for n in range(len(rows))]
        for pair, chosen, rejected in zip(chunk, sums[0::2], sums[1::2], strict=True):
            if chosen is not None and rejected is not None:
                out.append({"row_id": pair.row_id, "chosen": chosen, "rejected": rejected})
        ctx.progress.advance(work.finish())
    del loaded
    free_memory()
    return pa.Table.from_pylist(out, schema=_SCHEMA)


def scores_of(table: pa.Table) -> Scores:
    """A table of `score_pairs` as a mapping."""
    return {row["row_id"]: (row["chosen"], row["rejected"]) for row in table.to_pylist()}


def measure(pairs: Sequence[HeldOutPair], before: Scores, after: Scores) -> Iterator[Measurement]:
    """The items of accuracy, implicit_reward_accuracy, logp_* and their changes (see stages.evaluate.metrics)."""
    for pair in pairs:
        lengths = len(pair.ids.chosen), len(pair.ids.rejected)
        means: dict[str, tuple[float, float]] = {}
        for model, scores in ((BEFORE, before), (AFTER, after)):
            chosen, rejected = scores[pair.row_id]
            means[model] = chosen / lengths[0], rejected / lengths[1]
            yield _item(pair, model, "accuracy", preference(*means[model]))
            yield _item(pair, model, "logp_chosen", means[model][0])
            yield _item(pair, model, "logp_rejected", means[model][1])
        rewards = [after[pair.row_id][side] - before[pair.row_id][side] for side in (0, 1)]
        yield _item(pair, AFTER, "implicit_reward_accuracy", preference(*rewards))
        yield _item(pair, CHANGE, "logp_chosen_change", means[AFTER][0] - means[BEFORE][0])
        yield _item(pair, CHANGE, "logp_rejected_change", means[AFTER][1] - means[BEFORE][1])
        yield _item(pair, CHANGE, "accuracy_change", preference(*means[AFTER]) - preference(*means[BEFORE]))


def preference(chosen: float, rejected: float) -> float:
    """1 if chosen is higher, 0 if rejected is, one half for a tie."""
    return 0.5 if chosen == rejected else float(chosen > rejected)


def _item(pair: HeldOutPair, model: str, metric: str, value: float) -> Measurement:
    return Measurement(model, pair.split, pair.language, metric, pair.group_id, value)
