"""Progress of a shard is what its passes cost, whichever there are."""

from __future__ import annotations

import pytest

from stages.gradients import stage
from stages.gradients.aggregate import Aggregate
from stages.gradients.stage import Gradients
from stages.gradients.work import Work
from tests.stages.gradients.one_sided_bench import config, table
from tests.stages.stage_context import context, shards

TWO_SIDED = {"method": "two_sided", "dim": 256, "seed": 5, "error_pairs": 0}


def test_every_pair_is_told_once_whatever_the_passes_did():
    work = Work(10, 40)
    told = [work.did(cost) for cost in (4, 15, 0, 19, 100)]
    assert told == [1, 3, 0, 5, 1] and work.finish() == 0
    left_out = Work(10, 40)
    assert left_out.did(20) + left_out.finish() == 10
    assert Work(3, 0).finish() == 3 and Work(0, 0).did(5) == 0


@pytest.mark.parametrize("kind", [Gradients, Aggregate])
def test_the_pass_that_measures_relevance_is_progress_too(tmp_path, models, monkeypatch, kind):
    """Foreseen and done agree to a tenth, so that the time left is right in the middle of a shard."""
    works: list[Work] = []

    class Seen(Work):
        def __init__(self, pairs: int, cost: int) -> None:
            super().__init__(pairs, cost)
            works.append(self)
            self.did_all = 0

        def did(self, cost: int) -> int:
            self.did_all += cost
            return super().did(cost)

    monkeypatch.setattr(stage, "Work", Seen)
    pairs = table(16, 4)
    sketch = TWO_SIDED if kind is Gradients else {"error_pairs": 0}
    for relevance in (False, True):
        conflict = {"relevance": {"sides": "none"}} if relevance else {}  # what the gate holds back is not summed
        null = {"relevance_null": 2} if relevance else {}
        folder = tmp_path / str(relevance)
        folder.mkdir()
        ctx = context(folder, config(conflict, sketch=sketch, relevance=relevance, **null), models, pairs=pairs)
        list(kind().run(ctx, shards(pairs, 8)))
        assert ctx.progress.done == pairs["split"].to_pylist().count("train")
    plain, more = works[:2], works[2:]
    assert all(work.did_all == work.cost for work in plain)
    for less, work in zip(plain, more, strict=True):
        assert work.cost > 1.2 * less.cost
        assert work.did_all == pytest.approx(work.cost, rel=0.2)
