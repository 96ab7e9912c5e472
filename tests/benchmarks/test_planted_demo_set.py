"""The demo's preference set is what its maker makes, and holds what it says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.planted.demo_set import LANGUAGES, PAIRS, PLANTED, rows, text
from pipeline.config_file import load_config
from stages.data import read_data


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_shipped_file_is_what_the_maker_makes(language: str) -> None:
    shipped = read_data(f"demo_pairs/{language}.jsonl")
    assert shipped == text(language)
    errors = Counter(json.loads(line)["label_error"] for line in shipped.splitlines())
    assert errors == Counter(PLANTED) | Counter({"": PAIRS - sum(PLANTED.values())})


def test_no_answer_is_chosen_in_one_group_and_rejected_in_another_unless_it_is_an_error() -> None:
    made = [row for language in LANGUAGES for row in rows()[language] if not row["label_error"]]
    chosen = {row["chosen"]: row["group_id"] for row in made}
    assert all(chosen.get(row["rejected"], row["group_id"]) == row["group_id"] for row in made)


def test_the_demo_curates_this_set_and_reads_its_errors() -> None:
    config = load_config(Path("package:configs/demo-curate.yaml"))
    assert config.languages.seen == list(LANGUAGES) and config.pairs.sources[0].fields.label_error == "label_error"
