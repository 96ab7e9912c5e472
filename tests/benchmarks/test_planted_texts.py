"""Planted pairs: the truth is true, the wrong answers are wrong in one place, and no text is on both sides."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

import pytest

from benchmarks.planted.texts import CONTRASTS, languages, make_pairs

COUNT = 100


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_every_language_has_its_pairs_and_no_answer_is_on_both_sides_of_two_questions(contrast: str) -> None:
    codes = languages()
    assert len(codes) >= 5
    rows = make_pairs(codes, COUNT, contrast)
    assert Counter(row["language"] for row in rows) == dict.fromkeys(codes, COUNT)
    groups: dict[str, set[str]] = {}
    for row in rows:
        assert row["chosen"] != row["rejected"]
        for side in ("prompt", "chosen", "rejected"):
            assert unicodedata.is_normalized("NFC", row[side])
            assert not re.search(r"[{}]|None", row[side])
        groups.setdefault(row["chosen"], set()).add(row["group_id"])
        groups.setdefault(row["rejected"], set()).add(row["group_id"])
    assert all(len(found) == 1 for found in groups.values())


def test_numbers_are_right_in_every_language_and_wrong_in_the_rejected_answer() -> None:
    for row in make_pairs(languages(), COUNT, "subtle"):
        asked = [int(n) for n in re.findall(r"\d+", row["prompt"])]
        right, wrong = ([int(n) for n in re.findall(r"\d+", row[side])][-1:] for side in ("chosen", "rejected"))
        if row["kind"] in ("sum", "road", "year"):
            truth = asked[-2] + asked[-1] if row["language"] != "ja" or row["kind"] != "road" else None
            if row["kind"] == "road":
                truth = sum(n for n in asked if n > 2)  # the first and the second road
                right, wrong = (
                    [int(n) for n in re.findall(r"\d+", row[side]) if int(n) > 2] for side in ("chosen", "rejected")
                )
            assert right == [truth] and wrong != [truth], row
        if row["kind"] == "product":
            assert right == [asked[0] * asked[1]] and wrong != right, row
        if row["kind"] == "train":
            minutes, trip = 60 * asked[0] + asked[1], asked[2]
            arrival = re.findall(r"(\d+):(\d+)", row["chosen"])[0]
            assert 60 * int(arrival[0]) + int(arrival[1]) == minutes + trip, row
            assert re.findall(r"(\d+):(\d+)", row["rejected"])[0] != arrival


def test_negations_are_true_and_both_answers_are_chosen_about_as_often() -> None:
    rows = [row for row in make_pairs(["en"], COUNT, "subtle") if row["error"] == "negation"]
    for row in rows:
        numbers = [int(n) for n in re.findall(r"\d+", row["prompt"])]
        truth = numbers[0] > numbers[1] if row["kind"] == "greater" else numbers[0] % 2 == 0
        assert row["chosen"].startswith("Yes" if truth else "No"), row
        assert row["rejected"].startswith("No" if truth else "Yes"), row
    share = sum(row["chosen"].startswith("Yes") for row in rows) / len(rows)
    assert 0.2 < share < 0.8


def test_translations_share_the_group_and_its_numbers() -> None:
    rows = make_pairs(["en", "ru", "zh", "ar"], 30, "subtle")
    by_group: dict[str, list[list[str]]] = {}
    for row in rows:
        if row["kind"] not in ("road", "symbol"):
            by_group.setdefault(row["group_id"], []).append(re.findall(r"\d+", row["chosen"]))
    assert all(len(found) == 4 and all(one == found[0] for one in found) for found in by_group.values())


def test_off_topic_answers_are_of_another_kind() -> None:
    english = {row["group_id"]: row for row in make_pairs(["en"], COUNT, "easy")}
    opening = {"road": "The second road", "year": "The library", "train": "The train", "product": "If you multiply"}
    for row in english.values():
        if row["kind"] in opening:
            assert row["chosen"].startswith(opening[row["kind"]])
            assert not row["rejected"].startswith(opening[row["kind"]])


def test_more_questions_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="different questions"):
        make_pairs(["en"], 5000, "subtle")
