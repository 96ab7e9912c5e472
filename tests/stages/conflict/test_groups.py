"""Grouping joins what shares a label; every group is laid side by side once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.conflict.groups import Layout, merge_groups


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


def test_integer_arrays_are_labels_too_and_long_chains_join() -> None:
    assert merge_groups(np.array([5, -1, 5, -1]), [None, None, None, "a"]).tolist() == [0, 1, 0, 2]
    rng = np.random.default_rng(0)
    place = rng.permutation(3000)  # pair i shares a label with the next in a shuffled row of 3000
    assert not merge_groups(place // 2, (place + 1) // 2).any()


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), max_size=60), st.integers(1, 20), st.booleans())
def test_groups_lie_side_by_side_each_in_one_batch(labels, rows, alone) -> None:
    layout = Layout.of(torch.tensor(labels, dtype=torch.int64), alone)
    several = {label for label, n in Counter(labels).items() if n > 1 or alone}
    seen = []
    for start, index_gm in layout.batches(rows):
        assert layout.slot_N[index_gm].flatten().tolist() == list(range(start, start + index_gm.numel()))
        assert index_gm.numel() <= max(rows, index_gm.shape[1])
        for members in index_gm.tolist():
            assert sorted(members) == [i for i, label in enumerate(labels) if label == labels[members[0]]]
            seen.append(labels[members[0]])
    assert sorted(seen) == sorted(several)
    assert [slot < 0 for slot in layout.slot_N.tolist()] == [label not in several for label in labels]
