"""Grouping joins what shares a label; every group is laid side by side once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.conflict.groups import Slots, leaving_together, merge_groups


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
    layout = Slots.of(torch.tensor(labels, dtype=torch.int64), alone)
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


def frame(chosen: list[str], rejected: list[str] | None = None, language: list[str] | None = None, groups=None):
    n = len(chosen)
    return pl.DataFrame(
        {
            "chosen": chosen,
            "rejected": rejected or [f"r{i}" for i in range(n)],
            "language": language or ["en", "de"] * (n // 2) + ["en"] * (n % 2),
            "group_id": groups or [f"g{i}" for i in range(n)],
        }
    )


@pytest.mark.parametrize(
    ("n", "shared", "joins"),
    [(100, 20, True), (100, 21, False), (5000, 50, True), (5000, 51, False), (1000, 15, True)],
)
def test_an_answer_of_more_than_20_pairs_and_1_percent_of_all_joins_nobody(n, shared, joins) -> None:
    found = leaving_together(frame(["yes"] * shared + [f"c{i}" for i in range(n - shared)]), "answers")
    assert found.shared == (shared if joins else 0)
    assert found.common == (0 if joins else shared) and found.cut == 0
    assert any("so common" in note for note in found.notes()) != joins


def test_nobody_leaves_with_others_where_pairs_leave_alone() -> None:
    found = leaving_together(frame(["yes"] * 6), "pair")
    assert found.label_N is None and found.shared == found.largest == 0 and found.notes() == []


@pytest.mark.parametrize("n", [2, 3, 6, 12, 19])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("leave_out", ["answers", "group"])
def test_an_answer_that_all_share_does_not_join_them(n, side, leave_out) -> None:
    texts, other = ["no"] * n, [f"t{i}" for i in range(n)]
    found = leaving_together(frame(texts, other) if side == "chosen" else frame(other, texts), leave_out)
    assert found.shared == 0 and found.cut == n
    assert any("stays in the directions" in note for note in found.notes())


def test_what_joins_too_many_is_given_up_and_what_joins_few_is_not() -> None:
    """A refusal of two thirds is given up; twins that share a chosen answer still leave together."""
    chosen = ["twin", "twin", *(f"c{i}" for i in range(10))]
    found = leaving_together(frame(chosen, ["no"] * 8 + [f"r{i}" for i in range(4)]), "answers")
    assert found.label_N is not None and found.cut == 8
    assert found.label_N[0] == found.label_N[1] and found.shared == 2


def test_a_chain_of_answers_that_joins_everything_is_cut() -> None:
    """Pair i shares one answer with the pair before and one with the pair after it."""
    found = leaving_together(frame([f"a{i}" for i in range(12)], [f"a{i + 1}" for i in range(12)]), "answers")
    assert found.largest <= 6 and found.cut > 0


def test_a_group_may_not_take_a_pair_every_other_language() -> None:
    """One refusal in German only, which an English pair has too: all of German would leave with that pair."""
    language = ["en"] * 12 + ["de"] * 5
    found = leaving_together(
        frame([f"c{i}" for i in range(17)], [*(f"r{i}" for i in range(11)), *["nein"] * 6], language), "answers"
    )
    assert found.cut == 6 and found.shared == 0
    german = leaving_together(
        frame([f"c{i}" for i in range(17)], [*(f"r{i}" for i in range(12)), *["nein"] * 5], language), "answers"
    )
    assert german.cut == 0 and german.shared == 5  # the other languages stay


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 2)), min_size=2, max_size=30))
def test_after_cutting_every_pair_has_something_to_be_compared_with(rows) -> None:
    chosen, rejected = [f"c{a}" for a, _, _ in rows], [f"r{b}" for _, b, _ in rows]
    language = ["ende"[2 * (k % 2) : 2 * (k % 2) + 2] for _, _, k in rows]
    found = leaving_together(frame(chosen, rejected, language), "answers")
    labels = found.label_N.tolist()
    for i, label in enumerate(labels):
        stay = [language[j] for j in range(len(rows)) if labels[j] != label]
        assert 2 * (len(rows) - len(stay)) <= len(rows) or labels.count(label) == 1
        if len(set(language)) > 1:
            assert any(code != language[i] for code in stay)
