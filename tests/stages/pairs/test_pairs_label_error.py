"""What the data says is wrong with its rows: carried beside the pairs, counted before any row can leave, and never what curation goes by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_pairs_imported import config, jsonl

from schemas.errors import UserError
from stages.pairs.imported import label_error
from stages.pairs.stage import Pairs


@pytest.mark.parametrize(
    ("cell", "kind"),
    [
        ("flip", "flip"), ("off  topic\n", "off_topic"), (" ", ""), ("", ""), (None, ""), (False, ""), (0, ""), ("none", ""),
        (True, "error"), (1, "error"), ("TRUE", "error"), ("OK", ""), ("x" * 999, "x" * 40), (7, "7"), (["a", "b"], "['a',_'b']"),
    ],
)  # fmt: skip
def test_a_cell_is_a_kind_in_a_word_or_nothing(cell: Any, kind: str) -> None:
    assert label_error(cell) == kind


def _rows(errors: list[Any]) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Question {n}?", "chosen": f"Answer {n}.", "rejected": f"Wrong {n}.", "wrong": error}
        for n, error in enumerate(errors)
    ]


def test_errors_are_counted_before_rows_are_dropped(
    tmp_path: Path, run_stage: Callable[..., Any], tiny_model: Path
) -> None:
    rows = _rows(["flip", "", "flip", None, "swap"])
    rows[2]["rejected"] = rows[2]["chosen"]  # identical: it never becomes a pair
    source = jsonl(tmp_path / "a.jsonl", rows, fields={"label_error": "wrong"})
    outcome = run_stage(Pairs(), config([source], ["en"], identify=False), model=tiny_model)
    assert [row["label_error"] for row in outcome.rows("pairs")] == ["flip", "", "", "swap"]
    counted = {name: n for name, n in outcome.account.stats.items() if name.startswith("label_error ")}
    assert counted == {"label_error flip": 2, "label_error swap": 1}


def test_without_the_column_nothing_is_said(tmp_path: Path, run_stage: Callable[..., Any], tiny_model: Path) -> None:
    outcome = run_stage(
        Pairs(), config([jsonl(tmp_path / "a.jsonl", _rows(["flip"]))], ["en"], identify=False), model=tiny_model
    )
    assert [row["label_error"] for row in outcome.rows("pairs")] == [None]
    assert not any(name.startswith("label_error ") for name in outcome.account.stats)


def test_explanations_in_place_of_kinds_are_refused(
    tmp_path: Path, run_stage: Callable[..., Any], tiny_model: Path
) -> None:
    source = jsonl(tmp_path / "a.jsonl", _rows([f"why {n}" for n in range(40)]), fields={"label_error": "wrong"})
    with pytest.raises(UserError, match=r"'wrong' says more than 30 different things"):
        run_stage(Pairs(), config([source], ["en"], identify=False), model=tiny_model)
