"""Grouping joins what shares a label; gathering visits every group once within the row limit."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.conflict.groups import merge_groups, plan_passes


def test_sharing_any_label_joins_and_none_joins_nobody() -> None:
    texts = ["yes", "no", "yes", "x", None, None]
    tasks = [1, 1, 2, 3, None, 3]
    assert merge_groups(texts, tasks).tolist() == [0, 0, 0, 1, 2, 1]
    assert merge_groups([None, None]).tolist() == [0, 1]
    with pytest.raises(ValueError, match="one length"):
        merge_groups([1], [1, 2])


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=25))
def test_groups_are_the_connected_components(pairs) -> None:
    got = merge_groups([a for a, _ in pairs], [b for _, b in pairs]).tolist()
    reach = [{i} for i in range(len(pairs))]
    for _ in pairs:
        for i, (a, b) in enumerate(pairs):
            for j, (c, d) in enumerate(pairs):
                if a == c or b == d:
                    reach[i] |= reach[j]
    for i in range(len(pairs)):
        assert {j for j in range(len(pairs)) if got[j] == got[i]} == reach[i]


@given(st.lists(st.integers(0, 12), max_size=60), st.integers(1, 20))
def test_passes_cover_every_group_once_and_hold_few_rows(labels, capacity) -> None:
    sizes = {group: n for group, n in Counter(labels).items() if n > 1}
    passes = plan_passes(labels, capacity)
    covered = [group for chosen in passes for group in chosen]
    assert sorted(covered) == sorted(sizes)
    for chosen in passes:
        left, held, peak = dict(chosen), 0, 0
        for group in labels:
            if group in chosen:
                held += 1
                peak = max(peak, held)
                left[group] -= 1
                if left[group] == 0:
                    held -= chosen[group]
        assert peak <= max(capacity, *(chosen.values()))


def test_sorted_groups_need_one_pass() -> None:
    assert len(plan_passes([g for g in range(100) for _ in range(3)], 3)) == 1
    assert len(plan_passes(list(range(100)) * 2, 50)) == 4
    assert plan_passes(list(range(10)), 5) == []
