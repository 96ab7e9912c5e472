from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import UserError
from schemas.ids import unit_interval
from stages.data import data_path
from stages.prompts import reading
from stages.prompts.stage import Prompts

ENGLISH = [
    "Why does the moon look larger near the horizon than high in the sky?",
    "Write a short polite note asking a neighbour to water my plants.",
    "How many minutes are there between half past two and five o'clock?",
    "Summarise the plot of Little Red Riding Hood in two sentences.",
]
GERMAN = [
    "Warum fallen die Blätter im Herbst von den Bäumen, und wozu dient das?",
    "Erkläre bitte in einem Satz, was ein Thermometer eigentlich misst.",
    "Welche Zutaten braucht man für einen einfachen Apfelkuchen?",
]


def config(
    sources: list[dict[str, Any]], seen: list[str], unseen: tuple[str, ...] = (), **prompts: Any
) -> dict[str, Any]:
    identify = prompts.pop("identify", True)
    return {
        "name": "t",
        "seed": prompts.pop("seed", 0),
        "languages": {"seen": seen, "unseen": list(unseen), "identify": identify},
        "model": {"policy": "none"},
        "prompts": {"sources": sources, "dev_fraction": 0.0, "test_fraction": 0.0, **prompts},
    }


def jsonl(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"path": str(path)}


def rows(texts: list[Any], language: str = "en", **columns: Any) -> list[dict[str, Any]]:
    return [{"prompt": text, "language": language, **columns} for text in texts]


def reasons(outcome: Any) -> dict[str, str]:
    return {drop.row_id.rsplit(":", 1)[1]: drop.reason for drop in outcome.drops}


def test_whole_conversations_as_prompts_are_told_what_they_are(run_stage: Callable[..., Any], tmp_path: Path) -> None:
    answered = [[{"from": "human", "value": text}, {"from": "gpt", "value": "So."}] for text in ENGLISH]
    for texts, fix in (
        (answered, "write each without its last answer"),
        (["1", "2", answered[0]], "Add prompts in this"),
    ):
        with pytest.raises(UserError, match=fix):
            run_stage(Prompts(), config([jsonl(tmp_path / "a.jsonl", rows(texts))], ["en"]))


def test_shipped_prompts_are_kept_in_source_order_but_for_translations_of_training(
    run_stage: Callable[..., Any],
) -> None:
    seen, unseen = ["en", "de", "es", "fr", "ru", "zh", "ja", "ar", "hi", "sw"], ("it", "ko", "th")
    source = {"path": "package:prompts/{language}.jsonl"}
    outcome = run_stage(Prompts(), config([source], seen, unseen, dev_fraction=0.1, test_fraction=0.2))
    shipped = [
        json.loads(line)
        for code in (*seen, *unseen)
        for line in data_path(f"prompts/{code}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    found = outcome.rows("prompts")
    trained = {row["group_id"] for row in found if row["split"] == "train"}
    assert {drop.reason for drop in outcome.drops} == {"translation_of_training"}
    assert len(found) + len(outcome.drops) == len(shipped)
    shipped = [row for row in shipped if row["language"] in seen or row["group_id"] not in trained]
    assert [row["messages"] for row in found] == [[{"role": "user", "content": row["prompt"]}] for row in shipped]
    assert [(row["group_id"], row["language"]) for row in found] == [(r["group_id"], r["language"]) for r in shipped]
    assert len({row["prompt_id"] for row in found}) == len(found)
    by_group: dict[str, set[str]] = {}
    for row in found:
        if row["language"] in unseen:
            assert row["split"] == "unseen"
        else:
            by_group.setdefault(row["group_id"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in by_group.values())
    assert {split for splits in by_group.values() for split in splits} == {"train", "dev", "test"}


def test_every_row_is_kept_or_dropped_with_its_reason(run_stage: Callable[..., Any], tmp_path: Path) -> None:
    user = {"role": "user", "content": ENGLISH[1]}
    assistant = {"role": "assistant", "content": "Dear neighbour, ..."}
    data = [
        *rows([ENGLISH[0], "", None, True, "a", "word " * 5000, GERMAN[0], "1 + 1 = ?"]),
        *rows(
            [[user, assistant], [assistant, user], [{**user, "tool_calls": [{}]}], [{"role": "tool", "content": "x"}]]
        ),
        *rows([[{"role": "human", "content": "x"}], [{"role": "user", "content": [{"type": "image"}]}], []]),
        *rows([ENGLISH[2]], "xx"),
        *rows([ENGLISH[2]], "pt"),
        *rows(["  " + ENGLISH[0].upper().replace(" ", "  ")]),
        *rows([ENGLISH[0].replace("larger", "larger ")[:-1] + " ?"]),
        *rows(GERMAN[:1], "de-AT"),
    ]
    outcome = run_stage(Prompts(), config([jsonl(tmp_path / "a.jsonl", data)], ["en", "de"]))
    assert reasons(outcome) == {
        "2": "empty",
        "3": "empty",
        "4": "not_text",
        "5": "too_short",
        "6": "too_long",
        "7": "wrong_language",
        "9": "no_user_turn",
        "11": "tool_calls",
        "12": "tool_calls",
        "13": "too_short",
        "14": "not_text",
        "15": "empty",
        "16": "invalid_language",
        "17": "language_not_in_run",
        "18": "duplicate",
        "19": "near_duplicate",
    }
    kept = outcome.rows("prompts")
    assert [(row["source_row"], row["language"]) for row in kept] == [(1, "en"), (8, "en"), (10, "en"), (20, "de")]
    assert all(drop.detail == f"of {tmp_path}/a.jsonl:1" for drop in outcome.drops if "duplicate" in drop.reason)
    assert sum(tally.rows_in for tally in outcome.account.tallies) == len(data)
    assert sum(tally.kept for tally in outcome.account.tallies) == len(kept)


def test_hostile_text_is_stored_as_clean_text(run_stage: Callable[..., Any], tmp_path: Path) -> None:
    text = "\ufeff\x00 Why\x07 is the cafe\u0301 closed\r\non Mondays\ud800, and who decided that?\x1b[31m \n"
    outcome = run_stage(Prompts(), config([jsonl(tmp_path / "a.jsonl", rows([text]))], ["en"]))
    content = outcome.rows("prompts")[0]["messages"][0]["content"]
    assert content == "Why is the café closed\non Mondays\ufffd, and who decided that?[31m"


def test_system_messages_are_taken_over_but_do_not_make_prompts_near_duplicates(
    run_stage: Callable[..., Any], tmp_path: Path
) -> None:
    source = jsonl(tmp_path / "a.jsonl", rows(ENGLISH, sys="You are a careful assistant. " * 40))
    source["fields"] = {"system": "sys"}
    outcome = run_stage(Prompts(), config([source], ["en"]))
    assert [row["messages"][0]["role"] for row in outcome.rows("prompts")] == ["system"] * len(ENGLISH)


def test_a_table_with_a_column_for_each_language_is_given_once_for_each(
    run_stage: Callable[..., Any], tmp_path: Path
) -> None:
    source = jsonl(
        tmp_path / "a.jsonl", [{"id": "7", "en": ENGLISH[0], "de": "Warum ist das Café montags geschlossen?"}]
    )
    with pytest.raises(
        UserError, match=r"give the source once for each, \{path: …, language: en, fields: \{prompt: en\}\}"
    ):
        run_stage(Prompts(), config([{**source, "fields": {"group_id": "id"}}], ["en", "de"]))
    each = [{**source, "language": code, "fields": {"prompt": code, "group_id": "id"}} for code in ("en", "de")]
    outcome = run_stage(Prompts(), config(each, ["en", "de"]))
    assert [(row["language"], row["group_id"]) for row in outcome.rows("prompts")] == [("en", "7"), ("de", "7")]


def test_the_same_text_in_two_languages_is_no_duplicate(run_stage: Callable[..., Any], tmp_path: Path) -> None:
    data = rows(ENGLISH[:1]) + rows(ENGLISH[:1], "de")
    outcome = run_stage(Prompts(), config([jsonl(tmp_path / "a.jsonl", data)], ["en", "de"], identify=False))
    assert [row["language"] for row in outcome.rows("prompts")] == ["en", "de"]


def test_threshold_one_drops_exact_duplicates_only(run_stage: Callable[..., Any], tmp_path: Path) -> None:
    data = rows([ENGLISH[0], ENGLISH[0] + " ", ENGLISH[0] + "?"])
    cfg = config([jsonl(tmp_path / "a.jsonl", data)], ["en"], near_duplicate_threshold=1)
    assert reasons(run_stage(Prompts(), cfg)) == {"2": "duplicate"}


def test_rows_without_a_language_take_the_sources_or_are_identified(
    run_stage: Callable[..., Any], tmp_path: Path
) -> None:
    source = jsonl(
        tmp_path / "a.jsonl",
        [
            {"prompt": ENGLISH[0]},
            {"prompt": GERMAN[0]},
            {"prompt": "Привет! Расскажи, пожалуйста, почему листья осенью опадают с деревьев?"},
        ],
    )
    outcome = run_stage(Prompts(), config([source], ["en", "de"]))
    assert [row["language"] for row in outcome.rows("prompts")] == ["en", "de"]
    assert reasons(outcome) == {"3": "language_not_in_run"}
    outcome = run_stage(Prompts(), config([{**source, "language": "en"}], ["en"]))
    assert reasons(outcome) == {"2": "wrong_language", "3": "wrong_language"}


def test_rows_whose_language_nothing_says_are_in_the_one_language_of_the_run(
    run_stage: Callable[..., Any], tmp_path: Path
) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": text} for text in ("12*12=?", "Hi", ENGLISH[0], GERMAN[0])])
    outcome = run_stage(Prompts(), config([source], ["en"]))
    assert len(outcome.rows("prompts")) == 3 and reasons(outcome) == {"4": "language_not_in_run"}
    assert [note for note in outcome.notes if note.startswith("2 rows without a language are taken as en")]


def test_a_language_the_identifier_does_not_know_is_taken_as_labelled(
    run_stage: Callable[..., Any], tmp_path: Path
) -> None:
    source = jsonl(tmp_path / "a.jsonl", rows(["ሰላም፣ ከመይ ኣለኻ? ሎሚ እንታይ ትገብር ኣለኻ?"], "ti"))
    outcome = run_stage(Prompts(), config([source], ["ti"]))
    assert len(outcome.rows("prompts")) == 1
    assert any("does not know ti" in note for note in outcome.notes)


def test_splits_follow_the_hash_of_seed_and_group(run_stage: Callable[..., Any], tmp_path: Path) -> None:
    data = [
        {"prompt": f"{i} {text}", "language": "en", "group_id": f"g{i}"} for i in range(100) for text in ENGLISH[:1]
    ]
    cfg = config(
        [jsonl(tmp_path / "a.jsonl", data)],
        ["en"],
        seed=5,
        dev_fraction=0.2,
        test_fraction=0.3,
        near_duplicate_threshold=1,
    )
    for row in run_stage(Prompts(), cfg).rows("prompts"):
        position = unit_interval(5, "split", row["group_id"])
        assert row["split"] == ("dev" if position < 0.2 else "test" if position < 0.5 else "train")


def test_a_split_column_overrides_the_hash_but_never_tears_a_group(
    run_stage: Callable[..., Any], tmp_path: Path
) -> None:
    data = [
        {**row, "group_id": group, "part": part}
        for row, group, part in zip(
            rows([*ENGLISH, *GERMAN], "en")[:4] + rows(GERMAN[:1], "de"),
            ["a", "b", "c", None, "a"],
            ["test", None, "dev", "train", "train"],
            strict=True,
        )
    ]
    source = jsonl(tmp_path / "a.jsonl", data) | {"fields": {"split": "part"}}
    with pytest.raises(UserError, match=r"in de \(de: every row is held out, 1 \(1 with the rest of their translation"):
        run_stage(Prompts(), config([source], ["en", "de"]))
    outcome = run_stage(Prompts(), config([source], ["en"], ("de",)))
    assert [row["split"] for row in outcome.rows("prompts")] == ["test", "train", "dev", "train", "unseen"]
    data[0]["part"] = "training"
    source = jsonl(tmp_path / "a.jsonl", data) | {"fields": {"split": "part"}}
    with pytest.raises(UserError, match=r"'training' is not a split \(row .*a\.jsonl:1\)"):
        run_stage(Prompts(), config([source], ["en"], ("de",)))


def test_a_seen_language_without_prompts_stops_the_run_with_the_reasons(
    run_stage: Callable[..., Any], tmp_path: Path
) -> None:
    source = jsonl(tmp_path / "a.jsonl", rows(ENGLISH) + rows(ENGLISH[:2], "de") + rows(ENGLISH[:1], "sw-x"))
    with pytest.raises(
        UserError, match=r"no training prompt in de \(de: row wrong_language 2 \(for example .*a.jsonl:5, en 1.00: 'Why"
    ):
        run_stage(Prompts(), config([source], ["en", "de"]))
    with pytest.raises(
        UserError, match=r"sw: no row came in; of unknown language: row language_not_in_run 2 .*row invalid_language 1 "
    ):
        run_stage(Prompts(), config([source], ["en", "sw"]))


def test_the_result_does_not_depend_on_batches(run_stage: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    rng = random.Random(0)
    words = " ".join(ENGLISH).split()
    data = rows([" ".join(rng.choices(words, k=rng.choice([3, 12]))) for _ in range(300)])
    data += [dict(row, prompt=row["prompt"] + "!") for row in data[::3]]
    cfg = config([jsonl(tmp_path / "a.jsonl", data)], ["en"], identify=False)
    one = run_stage(Prompts(), cfg)
    monkeypatch.setattr("stages.sources.BATCH_ROWS", 7)
    other = run_stage(Prompts(), cfg)
    assert one.tables["prompts"] == other.tables["prompts"] and one.drops == other.drops
    assert Counter(drop.reason for drop in one.drops)["near_duplicate"] > 50


def test_the_result_does_not_depend_on_how_many_processes_read(
    run_stage: Callable[..., Any], tmp_path: Path, monkeypatch: Any
) -> None:
    data = [
        row for n in range(40) for row in (*rows([f"{ENGLISH[n % 3]} {n}", "7", GERMAN[0]]), *rows(GERMAN[:1], "de"))
    ]
    cfg = config([jsonl(tmp_path / "a.jsonl", data)], ["en", "de"])
    monkeypatch.setattr("stages.sources.BATCH_ROWS", 16)
    monkeypatch.setattr(reading, "_FEW", 99)
    alone = run_stage(Prompts(), cfg)
    started: list[str] = []
    real = reading.start_child
    monkeypatch.setattr(reading, "_FEW", 2)
    monkeypatch.setattr(reading.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(reading, "start_child", lambda *given: started.append(given[2]) or real(*given))
    shared = run_stage(Prompts(), cfg)
    assert len(started) == 2
    assert shared.tables["prompts"] == alone.tables["prompts"]
    assert (shared.drops, shared.account.stats) == (alone.drops, alone.account.stats)


def test_an_unseen_row_leaves_when_its_group_is_trained_on_wherever_it_stands(
    run_stage: Callable[..., Any], tmp_path: Path
) -> None:
    data = [
        {"prompt": text, "language": language, "group_id": group, "part": part}
        for text, language, group, part in [
            (GERMAN[0], "de", "a", None),
            (GERMAN[1], "de", "b", None),
            (GERMAN[2], "de", None, None),
            (ENGLISH[0], "en", "a", "train"),
            (ENGLISH[1], "en", "b", "test"),
            (ENGLISH[2], "en", "c", "train"),
        ]
    ]
    source = jsonl(tmp_path / "a.jsonl", data) | {"fields": {"split": "part"}}
    outcome = run_stage(Prompts(), config([source], ["en"], ("de",)))
    assert [(row["source_row"], row["split"]) for row in outcome.rows("prompts")] == [
        (4, "train"),
        (5, "test"),
        (6, "train"),
        (2, "unseen"),
        (3, "unseen"),
    ]
    assert reasons(outcome) == {"1": "translation_of_training"}
    de = next(entry for entry in outcome.account.tallies if entry.language == "de")
    assert (de.rows_in, de.kept, de.dropped) == (3, 2, {"translation_of_training": 1})
