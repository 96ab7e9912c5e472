"""Batches respect the budget, lose nothing, restore order, and shrink when memory runs out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.gradients.batching import TokenBudget, pack, spread
from stages.models.device import is_out_of_memory


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200), st.integers(1, 2))
def test_pack_covers_every_item_once_within_the_budget(lengths, budget, rows) -> None:
    batches = pack(lengths, budget, rows)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or rows * len(batch) * max(lengths[i] for i in batch) <= budget
    assert batches == pack(lengths, budget, rows)


def test_longest_first_and_oversized_alone() -> None:
    assert pack([3, 100, 2, 3], 12, 2) == [[1], [0, 3], [2]]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200))
def test_results_come_back_in_order(lengths, budget) -> None:
    assert TokenBudget(budget).run(lengths, lambda batch: [i * 10 for i in batch]) == [
        i * 10 for i in range(len(lengths))
    ]


def test_memory_failure_halves_and_is_remembered() -> None:
    lengths = [10] * 16
    seen: list[int] = []

    def compute(batch: list[int]) -> list[int]:
        seen.append(len(batch))
        if len(batch) > 3:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate")
        return batch

    budget = TokenBudget(160)
    assert budget.run(lengths, compute) == list(range(16))
    assert seen[:3] == [16, 8, 4]
    assert (budget.tokens, budget.backoffs) == (20, 3)
    seen.clear()
    budget.run(lengths, compute)
    assert max(seen) == 2


def test_a_single_item_that_does_not_fit_raises_with_its_size() -> None:
    def compute(batch: list[int]) -> list[int]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError) as caught:
        TokenBudget(100).run([30, 40], compute, rows_per_item=2)
    assert "2 x 40 tokens" in caught.value.__notes__[0]


def test_other_errors_pass_through() -> None:
    def compute(batch: list[int]) -> list[int]:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        TokenBudget(100).run([3, 4], compute)
    assert not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(ValueError, match="results for a batch"):
        TokenBudget(100).run([3], lambda batch: [])
    with pytest.raises(ValueError, match="at least 1"):
        pack([3], 0)


def test_long_and_short_batches_alternate_so_that_a_tenth_of_them_says_how_long_all_take() -> None:
    lengths = [1000 - 9 * n // 10 for n in range(1000)]
    batches = spread(pack(lengths, 4000))
    assert sorted(i for batch in batches for i in batch) == list(range(1000)) and batches[0] == [0, 1, 2, 3]
    costs = [sum(lengths[i] for i in batch) for batch in batches]
    done = done_items = 0
    for batch, cost in zip(batches, costs, strict=True):
        done, done_items = done + cost, done_items + len(batch)
        if done_items >= 100:
            assert done / done_items * 1000 == pytest.approx(sum(costs), rel=0.2)
