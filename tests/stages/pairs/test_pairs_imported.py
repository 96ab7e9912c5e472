from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import UserError
from schemas.ids import content_id, unit_interval
from stages.data import data_path
from stages.pairs.read import read_pair
from stages.pairs.stage import Pairs
from stages.text.messages import BadRow

CODES = ["en", "de", "es", "fr", "ru", "zh", "ja", "ar", "hi", "sw", "it", "ko", "th"]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


ASK = "Which planet of our solar system is the largest?"
GOOD, BAD = "The largest planet is Jupiter.", "The largest planet is Mercury."


def config(
    sources: list[dict[str, Any]], seen: list[str], unseen: tuple[str, ...] = (), **pairs: Any
) -> dict[str, Any]:
    languages = {"seen": seen, "unseen": list(unseen), "identify": pairs.pop("identify", True)}
    text = {"max_length": pairs.pop("max_length", 1024)}
    pairs = {"sources": sources, "dev_fraction": 0.0, "test_fraction": 0.0, **pairs}
    return {"name": "t", "seed": 3, "languages": languages, "model": {"policy": "tiny"}, "text": text, "pairs": pairs}


def jsonl(path: Path, rows: list[dict[str, Any]], **source: Any) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"path": str(path), "language": "en", **source}


def test_shipped_pairs_in_thirteen_languages_are_all_taken(run_stage: Callable[..., Any], tiny_model: Path) -> None:
    source = {"path": "package:authored_pairs/{language}.jsonl"}
    cfg = config([source], CODES[:10], tuple(CODES[10:]), dev_fraction=0.2, test_fraction=0.2)
    outcome = run_stage(Pairs(), cfg, model=tiny_model)
    found = outcome.rows("pairs")
    shipped = [
        json.loads(line)
        for code in CODES
        for line in data_path(f"authored_pairs/{code}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert outcome.drops == [] and len(found) == len(shipped) == len({pair["pair_id"] for pair in found})
    for pair, row in zip(found, shipped, strict=True):
        assert pair["prompt"] == [user(row["prompt"])]
        assert (pair["chosen"], pair["rejected"]) == ([assistant(row["chosen"])], [assistant(row["rejected"])])
        assert (pair["group_id"], pair["language"]) == (row["group_id"], row["language"])
        position = unit_interval(3, "split", row["group_id"])
        hashed = "dev" if position < 0.2 else "test" if position < 0.4 else "train"
        assert pair["split"] == ("unseen" if row["language"] in CODES[10:] else hashed)
    assert sum(tally.kept for tally in outcome.account.tallies) == len(shipped)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
        {"prompt": [user(ASK)], "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]},
        {"prompt": ASK, "chosen": [user(ASK), assistant(GOOD)], "rejected": [user(ASK), assistant(BAD)]},
        {"chosen": [user(ASK), assistant(GOOD)], "rejected": [user(ASK), assistant(BAD)]},
    ],
)
def test_flat_and_conversational_data_give_the_same_pair(
    run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path, row: dict[str, Any]
) -> None:
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    source = {"path": str(tmp_path / "a.parquet"), "language": "en"}
    (pair,) = run_stage(Pairs(), config([source], ["en"]), model=tiny_model).rows("pairs")
    prompt_id = content_id("en", [user(ASK)])
    assert pair["prompt_id"] == pair["group_id"] == prompt_id
    assert pair["pair_id"] == content_id(prompt_id, [assistant(GOOD)], [assistant(BAD)])
    assert pair["prompt"] == [user(ASK)] and pair["source"] == str(tmp_path / "a.parquet")
    assert pair["chosen_candidate_id"] is None and pair["chosen_score"] is None and pair["round"] == 0


@pytest.mark.parametrize(
    "history",
    [[user("a")], [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c")]],
)
def test_whole_conversations_are_split_as_trl_splits_them(history: list[dict[str, str]]) -> None:
    trl = pytest.importorskip("trl")
    row = {"chosen": [*history, assistant("yes")], "rejected": [*history, assistant("no")]}
    oracle = trl.extract_prompt(dict(row))
    pair = read_pair(None, row["chosen"], row["rejected"])
    assert pair.prompt == oracle["prompt"]
    assert ([assistant(pair.chosen)], [assistant(pair.rejected)]) == (oracle["chosen"], oracle["rejected"])


SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [user("Hello."), assistant("Hello! Ask away.")]


@pytest.mark.parametrize(
    ("prompt", "shared", "expected"),
    [
        ([SYSTEM, user(ASK)], [user(ASK)], [SYSTEM, user(ASK)]),
        ([*EARLIER, user(f" {ASK.upper()}")], [user(ASK)], [*EARLIER, user(ASK.upper())]),
        (ASK, [SYSTEM, *EARLIER, user(ASK)], None),
        ([user(ASK)], [*EARLIER, user(ASK)], None),
        (EARLIER[:1], [*EARLIER, user(ASK)], None),
        ("Hello.", [*EARLIER, user(ASK)], None),
        (f"Human: Hello.\n\nHuman: {ASK}", [user(ASK)], None),
        ([SYSTEM, user(ASK)], [{**SYSTEM, "content": "Be kind."}, user(ASK)], None),
        ([user(ASK), assistant(GOOD)], [user(ASK)], None),
        ([SYSTEM, EARLIER[0]], [*EARLIER, user(ASK)], [SYSTEM, *EARLIER, user(ASK)]),
        ([SYSTEM, user("Hi?"), EARLIER[1], EARLIER[0]], [*EARLIER, user(ASK)], [SYSTEM, user("Hi?"), EARLIER[1], *EARLIER, user(ASK)]),
        ([*EARLIER, user(ASK), assistant(GOOD)], [user(ASK)], [*EARLIER, user(ASK)]),
        ([SYSTEM, user(f"Now: {ASK}")], [user(ASK)], [SYSTEM, user(ASK)]),
        ([SYSTEM], [user(ASK)], [SYSTEM, user(ASK)]),
        (True, [user(ASK)], None),
        (" ", [user(ASK)], None),
    ],
    ids=["system", "history", "text", "suffix", "prefix", "one", "inside", "systems", "answered", "system-first",
         "overlap", "answered-later", "system-decorated", "system-only", "unreadable", "empty"],
)  # fmt: skip
def test_a_prompt_beside_whole_conversations_is_taken_where_it_says_more(
    prompt: Any, shared: list[dict[str, str]], expected: list[dict[str, str]] | None
) -> None:
    pair = read_pair(prompt, [*shared, assistant(GOOD)], [*shared, assistant(BAD)])
    assert (pair.prompt, pair.chosen, pair.rejected) == (expected or shared, GOOD, BAD)


@pytest.mark.parametrize(
    ("prompt", "asked", "known"),
    [
        ("Hi", "What is this?", False),
        ("क", "काम कैसे करें?", False),
        ("Hi", "Hi, what is this?", True),
        ("What is this? Answer in short.", "What is this?", True),
        ("What is this", "hi", False),
        ("What is the capital of Fra", "What is the capital of France?", True),
        ("is the capital of France and of It", "What is the capital of France and of Italy?", False),
        ("曼谷有多大", "请问曼谷有多大？", True),
        ("กรุงเทพใหญ่แค่ไหน", "ถามหน่อยกรุงเทพใหญ่แค่ไหนครับ", True),
        ("어디", "서울은 어디?", True),
    ],
)
def test_a_prompt_belongs_to_a_turn_that_it_stands_in_as_words(prompt: str, asked: str, known: bool) -> None:
    sides = [user(asked), assistant(GOOD)], [user(asked), assistant(BAD)]
    if known:
        assert read_pair(prompt, *sides).prompt == [user(asked)]
        return
    with pytest.raises(BadRow, match="prompt_differs"):
        read_pair(prompt, *sides)


@pytest.mark.parametrize(
    "prompt",
    [
        "You write in rhymes.",
        [SYSTEM, user("Another question?")],
        [user("How many?"), assistant("planet")],
        [*EARLIER, user(f"So: {ASK}")],
    ],
)
def test_a_prompt_that_the_conversations_know_nothing_of_is_not_guessed_at(prompt: Any) -> None:
    with pytest.raises(BadRow, match="prompt_differs"):
        read_pair(prompt, [user(ASK), assistant(GOOD)], [user(ASK), assistant(BAD)])


def test_every_row_is_kept_or_dropped_with_its_reason(
    run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path
) -> None:
    base = {"prompt": ASK, "chosen": GOOD, "rejected": BAD, "language": "en"}
    rows = [
        base,
        {**base, "rejected": GOOD + "\u200b  "},
        {**base, "chosen": ""},
        {**base, "rejected": None},
        {**base, "prompt": None},
        {**base, "prompt": True},
        {**base, "prompt": [user(ASK), assistant("Hm.")]},
        {**base, "chosen": [assistant(GOOD), user("And?"), assistant("Saturn.")]},
        {**base, "chosen": [{"role": "tool", "content": GOOD}]},
        {**base, "language": "gibberish"},
        {**base, "language": "pt"},
        {**base, "language": "de"},
        {**base, "prompt": f" {ASK.upper()}"},
        {**base, "chosen": "Jupiter is. " * 400},
        {**base, "rejected": "It is Venus.", "s": "high"},
        {**base, "rejected": "It is Mars.", "s": 3},
    ]
    source = jsonl(tmp_path / "a.jsonl", rows, fields={"chosen_score": "s"})
    outcome = run_stage(Pairs(), config([source], ["en", "de"], on_empty_language="skip"), model=tiny_model)
    assert {drop.row_id.rsplit(":", 1)[1]: drop.reason for drop in outcome.drops} == {
        "2": "identical",
        "3": "empty",
        "4": "empty",
        "5": "no_prompt",
        "6": "not_text",
        "7": "no_user_turn",
        "8": "several_answers",
        "9": "tool_calls",
        "10": "invalid_language",
        "11": "language_not_in_run",
        "12": "wrong_language",
        "13": "duplicate",
        "14": "too_long",
    }
    kept = outcome.rows("pairs")
    assert [pair["rejected"][0]["content"] for pair in kept] == [BAD, "It is Venus.", "It is Mars."]
    assert outcome.account.stats["unread_scores"] == 1
    assert [pair["chosen_score"] for pair in kept] == [None, None, 3.0]
    assert sum(tally.rows_in for tally in outcome.account.tallies) == len(rows)
    assert Counter(drop.unit for drop in outcome.drops) == {"row": len(rows) - 3}


def test_control_marks_in_imported_text_are_neutralised(
    run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path
) -> None:
    row = {"prompt": f"What is <|im_end|>? {ASK}", "chosen": f"{GOOD}<|im_end|>\n<|im_start|>user\nhi", "rejected": BAD}
    outcome = run_stage(Pairs(), config([jsonl(tmp_path / "a.jsonl", [row])], ["en"]), model=tiny_model)
    (pair,) = outcome.rows("pairs")
    assert "<|im_" not in json.dumps([pair["prompt"], pair["chosen"]])
    assert outcome.account.stats["neutralised_marks"] == 3


def test_languages_come_from_the_text_when_nothing_names_them(
    run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path
) -> None:
    german = {
        "prompt": "Welcher Planet ist der größte?",
        "chosen": "Der größte ist Jupiter.",
        "rejected": "Es ist Mars.",
    }
    rows = [{"prompt": ASK, "chosen": GOOD, "rejected": BAD}, german]
    source = jsonl(tmp_path / "a.jsonl", rows, language=None)
    outcome = run_stage(Pairs(), config([source], ["en", "de"]), model=tiny_model)
    assert [pair["language"] for pair in outcome.rows("pairs")] == ["en", "de"]
    outcome_off = config([source], ["en", "de"], identify=False)
    with pytest.raises(UserError, match="no training pair in any language: row no_language 2"):
        run_stage(Pairs(), outcome_off, model=tiny_model)


@pytest.mark.parametrize("label", [None, ["en"], "['en']"])
def test_labels_in_a_list_of_one_and_rows_that_say_none(
    run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path, label: Any
) -> None:
    rows = [{"prompt": f"{n}*12=?", "chosen": f"{n * 12}", "rejected": "7", "language": label} for n in range(3)]
    outcome = run_stage(Pairs(), config([jsonl(tmp_path / "a.jsonl", rows, language=None)], ["en"]), model=tiny_model)
    assert len(outcome.rows("pairs")) == 3
    said = [note for note in outcome.notes if note.startswith("3 rows without a language are taken as en")]
    assert len(said) == (label is None)


LABEL_DE, ENGLISH_ANSWER = (
    "Die Hauptstadt heißt Paris und hat zwei Millionen Einwohner.",
    "Paris is the capital of the country.",
)


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "strays"),
    [
        ("Wie heißt die Hauptstadt von Frankreich?", ENGLISH_ANSWER, LABEL_DE, True),
        ("Wie heißt die Hauptstadt von Frankreich?", LABEL_DE, ENGLISH_ANSWER, False),
        ("Wie heißt die Hauptstadt von Frankreich?", "Paris", LABEL_DE, False),
        ("Wie gibt man das in Python aus?", "def capital(country):\n    return capitals[country]", LABEL_DE, False),
        ("Übersetze ins Englische: Die Hauptstadt heißt Paris.", ENGLISH_ANSWER, "It is called Paris, the capital.", False),
        ("Fasse zusammen: “Paris has been the capital of the country for a long time.”", ENGLISH_ANSWER, LABEL_DE, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("seen", "label"), [(["de"], "de"), (["de", "en"], "de"), (["de", "en", "fr"], None)])
def test_chosen_answers_in_another_language_than_their_pair_are_said(
    run_stage: Callable[..., Any],
    tmp_path: Path,
    tiny_model: Path,
    prompt: str,
    chosen: str,
    rejected: str,
    strays: bool,
    seen: list[str],
    label: str | None,
) -> None:
    rows = [{"prompt": f"{prompt} ({n})", "chosen": chosen, "rejected": rejected} for n in range(3)]
    source = jsonl(tmp_path / "a.jsonl", rows, language=label)
    cfg = config([source], seen, on_empty_language="skip")
    outcome = run_stage(Pairs(), cfg, model=tiny_model)
    said = [note for note in outcome.notes if "3 of 3 pairs in de have a chosen answer in another language" in note]
    assert bool(said) == strays and outcome.account.stats["off_language_chosen"] == 3 * strays


def test_a_missing_column_is_named(run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": ASK, "choosen": GOOD, "rejected": BAD}])
    with pytest.raises(UserError, match=r"no column 'chosen'.*Did you mean 'choosen'"):
        run_stage(Pairs(), config([source], ["en"]), model=tiny_model)


def test_read_pair_refuses_what_it_would_have_to_guess() -> None:
    for prompt, chosen, rejected, reason in (
        ("x", "a", [user("y"), assistant("b")], "prompt_differs"),
        ("x", [assistant("a"), assistant("b")], "c", "several_answers"),
        (None, [user("a"), assistant("b")], [user("c"), assistant("d")], "no_prompt"),
        (None, [user("a"), assistant("b")], [user("a"), assistant("b")], "identical"),
        (None, [assistant("a")], [assistant("b")], "no_prompt"),
        (None, [user("a"), assistant("b")], [user("a")], "empty"),
    ):
        with pytest.raises(BadRow) as bad:
            read_pair(prompt, chosen, rejected)
        assert bad.value.reason == reason


def test_a_local_source_may_say_which_split_all_its_rows_are_in(
    run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path
) -> None:
    def rows(word: str) -> list[dict[str, Any]]:
        return [{"prompt": f"{ASK} {word} {n}", "chosen": GOOD, "rejected": BAD} for n in range(12)]

    trusted = jsonl(tmp_path / "a.jsonl", rows("a"), split="dev")
    mapped = jsonl(tmp_path / "b.jsonl", rows("b"), split="checked", splits={"checked": "test", "dev": "train"})
    drawn = jsonl(tmp_path / "c.jsonl", rows("c"))
    found = run_stage(Pairs(), config([trusted, mapped, drawn], ["en"], dev_fraction=0.2), model=tiny_model).rows(
        "pairs"
    )
    splits = [pair["split"] for pair in found]
    assert splits[:12] == ["dev"] * 12 and splits[12:24] == ["test"] * 12
    assert set(splits[24:]) <= {"train", "dev"} and "train" in splits[24:]
    with pytest.raises(UserError, match=r"in any language: every row is held out, 12 \(12 by a `split` of their own\)"):
        run_stage(Pairs(), config([trusted], ["en"]), model=tiny_model)
    wrong = jsonl(tmp_path / "d.jsonl", rows("d"), split="checked")
    with pytest.raises(UserError, match="'checked' is not a split"):
        run_stage(Pairs(), config([wrong], ["en"]), model=tiny_model)


def test_no_two_pairs_are_one_once_thoughts_and_marks_are_gone(
    run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path
) -> None:
    answers = [
        f"<think>way 1</think>\n\n{GOOD}",
        f"<think>way 2</think>\n\n{GOOD}",
        f"{GOOD}<|im_end|>x",
        f"{GOOD}< |im_end|>x",
    ]
    rows = [{"prompt": ASK, "chosen": chosen, "rejected": BAD} for chosen in answers]
    outcome = run_stage(Pairs(), config([jsonl(tmp_path / "a.jsonl", rows)], ["en"]), model=tiny_model)
    found = outcome.rows("pairs")
    assert len(found) == len({pair["pair_id"] for pair in found}) == 2
    assert [drop.reason for drop in outcome.drops] == ["duplicate", "duplicate"]
    assert sum(tally.rows_in for tally in outcome.account.tallies) == 4


@pytest.mark.parametrize(
    "text", ["{{}, {1}, {2}, {1, 2}} is the power set.", "{{1}}", "{[1]: 2}", "[{}, {{}}]", "{{}, {1}, {2}, {1, 2}}"]
)
def test_what_looks_like_a_list_and_is_none_is_text(
    run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path, text: str
) -> None:
    rows = [{"prompt": ASK, "chosen": text, "rejected": BAD}]
    (pair,) = run_stage(Pairs(), config([jsonl(tmp_path / "a.jsonl", rows)], ["en"]), model=tiny_model).rows("pairs")
    assert pair["chosen"] == [assistant(text)]


def test_a_text_that_no_table_can_hold_is_mended_wherever_it_stands(
    run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path
) -> None:
    base = {"prompt": ASK, "chosen": GOOD, "rejected": BAD}
    rows = [
        base | {"kind": "fl\ud800ip"},
        base | {"chosen": [{"\ud800k": 1, "content": GOOD}]},
        base | {"chosen": [{"role": "assistant", "content": [{"type": "\ud800k"}]}]},
    ]
    source = jsonl(tmp_path / "a.jsonl", rows, fields={"label_error": "kind"})
    outcome = run_stage(Pairs(), config([source], ["en"]), model=tiny_model)
    ("".join(drop.detail for drop in outcome.drops)).encode()
    (kept,) = outcome.rows("pairs")
    assert kept["label_error"].startswith("fl") and len(outcome.drops) == 2


def test_rows_that_differ_in_their_system_message_alone_are_no_duplicates(
    run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path
) -> None:
    rows = [
        {"prompt": ASK, "chosen": GOOD, "rejected": BAD, "system": role} for role in ("a pirate", "a king", "a king")
    ]
    source = jsonl(tmp_path / "a.jsonl", rows, fields={"system": "system"})
    outcome = run_stage(Pairs(), config([source], ["en"]), model=tiny_model)
    assert len(outcome.rows("pairs")) == 2 and [drop.reason for drop in outcome.drops] == ["duplicate"]


def test_roles_that_the_lower_case_of_another_language_spelt_are_read(
    run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path
) -> None:
    said = "\n\nHuman: Merhaba\n\nAssıstant: "
    rows = [{"chosen": f"{said}Selam sana {n}", "rejected": f"{said}Git {n}"} for n in range(3)]
    source = jsonl(tmp_path / "a.jsonl", rows, language="tr")
    found = run_stage(Pairs(), config([source], ["tr"], identify=False), model=tiny_model).rows("pairs")
    assert [(row["prompt"], row["chosen"]) for row in found[:1]] == [([user("Merhaba")], [assistant("Selam sana 0")])]


def test_imported_pairs_with_a_refusal_leave_where_it_is_asked(
    run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path
) -> None:
    refusals = ["I can't help with that.", "<think>\nNo.\n</think>\nI'm sorry, but I can't."]
    rows = [
        {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
        {"prompt": ASK, "chosen": GOOD, "rejected": refusals[0]},
        {"prompt": ASK, "chosen": refusals[1], "rejected": BAD},
    ]
    source = jsonl(tmp_path / "pairs.jsonl", rows)
    outcome = run_stage(Pairs(), config([source], ["en"], drop_refusals=True), model=tiny_model)
    assert len(outcome.rows("pairs")) == 1
    assert [(drop.unit, drop.reason, drop.detail.split(":")[0]) for drop in outcome.drops] == [
        ("row", "refusal", "rejected"),
        ("row", "refusal", "chosen"),
    ]
    assert outcome.tally("row", "en").rows_in == 3
    assert len(run_stage(Pairs(), config([source], ["en"]), model=tiny_model).rows("pairs")) == 3


def test_the_share_of_the_policys_own_answers_is_said_where_the_data_names_writers(
    run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path
) -> None:
    rows = [
        {"prompt": f"{ASK} ({n})", "chosen": f"{GOOD} {n}", "rejected": f"{BAD} {n}", "by": chosen, "loser": rejected}
        for n, (chosen, rejected) in enumerate([("org/Tiny", "gpt-4"), ("TINY", None), (None, 3), ("x", "base")])
    ]
    fields = {"chosen_model": "by", "rejected_model": "loser"}

    def share(**source: Any) -> tuple[float | None, list[str]]:
        found = run_stage(Pairs(), config([jsonl(tmp_path / "a.jsonl", rows, **source)], ["en"]), model=tiny_model)
        assert len(found.rows("pairs")) == 4
        return found.account.stats.get("on_policy_share"), [note for note in found.notes if "imported answers" in note]

    assert share(fields=fields) == (0.4, ["40% of 5 imported answers were written by the policy (on_policy_share)"])
    assert share(fields=fields, on_policy=["meta/Base", "gpt-4"])[0] == 0.4
    nothing, (note,) = share()
    assert nothing is None and "not known" in note


def test_writers_of_several_answers_and_of_completions(
    run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path
) -> None:
    several = [{"prompt": ASK, "chosen": GOOD, "rejected": [BAD, f"{BAD}!"], "by": "tiny", "loser": ["tiny", "other"]}]
    source = jsonl(tmp_path / "a.jsonl", several, many="all", fields={"chosen_model": "by", "rejected_model": "loser"})
    found = run_stage(Pairs(), config([source], ["en"]), model=tiny_model)
    assert found.account.stats["on_policy_share"] == 0.75
    answers = [{"text": GOOD, "score": 5, "model": "tiny"}, {"text": BAD, "score": 1, "model": "gpt"}]
    keys = {"completions": "answers", "completion_text": "text", "completion_score": "score"}
    source = jsonl(
        tmp_path / "b.jsonl", [{"prompt": ASK, "answers": answers}], fields={**keys, "completion_model": "model"}
    )
    found = run_stage(Pairs(), config([source], ["en"]), model=tiny_model)
    assert found.account.stats["on_policy_share"] == 0.5


@pytest.mark.parametrize("nothing", ["NULL", "Null", "none", "NONE", "NA", "N/A", "#N/A", "\\N", "-", "undefined"])
def test_words_for_nothing_name_no_group_and_no_language(
    run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path, nothing: str
) -> None:
    row = {"rejected": BAD, "chosen": GOOD, "group_id": nothing, "language": nothing}
    rows = [{**row, "prompt": f"{ASK} {n}"} for n in range(2)]
    outcome = run_stage(Pairs(), config([jsonl(tmp_path / "a.jsonl", rows)], ["en"]), model=tiny_model)
    assert len({pair["group_id"] for pair in outcome.rows("pairs")}) == 2
    assert not any("none (NULL" in note for note in outcome.notes)


@pytest.mark.parametrize("answer", ["NULL", "\\N", "NA", "#NAME?", "[deleted]", "[removed]", "[]"])
def test_answers_that_may_say_that_there_is_none_are_counted(
    run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path, answer: str
) -> None:
    rows = [{"prompt": ASK, "chosen": GOOD, "rejected": answer}, {"prompt": ASK, "chosen": GOOD, "rejected": BAD}]
    outcome = run_stage(Pairs(), config([jsonl(tmp_path / "a.jsonl", rows)], ["en"], identify=False), model=tiny_model)
    assert len(outcome.rows("pairs")) == 2
    assert any(note.startswith("1 pairs have an answer that may only say") for note in outcome.notes)


def test_folders_that_name_a_language_are_said_once(
    run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path
) -> None:
    for code in ("de", "en"):
        (tmp_path / f"language={code}").mkdir()
        row = {"prompt": f"{ASK} {code}", "chosen": GOOD, "rejected": BAD}
        jsonl(tmp_path / f"language={code}" / "0.jsonl", [row])
    source = {"path": str(tmp_path / "language=*" / "*.jsonl")}
    said = run_stage(Pairs(), config([source], ["en"]), model=tiny_model).notes
    assert [note.partition(": ")[2] for note in said if "in the path" in note] == [
        "language=de in the path is not read: name a source for each `language`"
    ]
    said = run_stage(Pairs(), config([{**source, "language": "en"}], ["en"]), model=tiny_model).notes
    assert not any("in the path" in note for note in said)


def test_only_rows_that_are_kept_are_said_to_have_several_rejected_answers(
    run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path
) -> None:
    rows = [{"prompt": ASK, "chosen": GOOD, "rejected": [BAD, "Mars."]}, {"chosen": GOOD, "rejected": [BAD, "Mars."]}]
    outcome = run_stage(Pairs(), config([jsonl(tmp_path / "a.jsonl", rows)], ["en"]), model=tiny_model)
    assert [note[:6] for note in outcome.notes if "several rejected" in note] == ["1 rows"]


def test_pairs_that_are_there_both_ways_round_are_counted(
    run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path
) -> None:
    pairs = [(GOOD, BAD), (BAD, GOOD), ("JUPITER IS.", "Jupiter is."), ("Jupiter is.", "JUPITER IS.")]
    rows = [{"prompt": ASK, "chosen": chosen, "rejected": rejected} for chosen, rejected in [*pairs, pairs[0]]]
    outcome = run_stage(Pairs(), config([jsonl(tmp_path / "a.jsonl", rows)], ["en"]), model=tiny_model)
    assert len(outcome.rows("pairs")) == 4 and [drop.reason for drop in outcome.drops] == ["duplicate"]
    assert outcome.account.stats["opposite_pairs"] == 2
    (said,) = [note for note in outcome.notes if "both ways round" in note]
    assert said.startswith("2 pairs") and "a.jsonl:1 and " in said and "a.jsonl:2." in said


def test_a_file_that_is_listed_twice_gives_the_same_pairs(
    run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path
) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": ASK, "chosen": GOOD, "rejected": BAD}])
    outcome = run_stage(Pairs(), config([source, source], ["en"]), model=tiny_model)
    assert [(drop.reason, drop.detail.partition(",")[0]) for drop in outcome.drops] == [("duplicate", "the same pair")]


def test_answers_that_are_the_same_tokens_are_identical(
    run_stage: Callable[..., Any], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """A template that trims what is said trims the indentation that alone tells two answers apart."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | trim")
    tokenizer.save_pretrained(tmp_path / "model")
    code = "    y = 1\n    return y"
    rows = [{"prompt": ASK, "chosen": code, "rejected": rejected} for rejected in (code.lstrip(), BAD)]
    outcome = run_stage(Pairs(), config([jsonl(tmp_path / "a.jsonl", rows)], ["en"]), model=tmp_path / "model")
    assert [(drop.reason, drop.detail) for drop in outcome.drops] == [("identical", "the same tokens")]
    assert [pair["chosen"] for pair in outcome.rows("pairs")] == [[assistant(code)]]


def test_what_is_lost_or_broken_in_texts_is_said(
    run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path
) -> None:
    rows = [
        {"prompt": f"What is <|im_end|>? {ASK}", "chosen": f"{GOOD} caf\ufffd", "rejected": BAD},
        {"prompt": ASK, "chosen": f"{GOOD} caf\ud800", "rejected": f"{BAD} donâ€™t"},
        {"prompt": f"{ASK} Say so.", "chosen": f"{GOOD} donï¿½t", "rejected": BAD},
    ]
    outcome = run_stage(Pairs(), config([jsonl(tmp_path / "a.jsonl", rows)], ["en"]), model=tiny_model)
    assert outcome.account.stats["lost_characters"] == 3
    said = "\n".join(outcome.notes)
    assert "3 pairs hold U+FFFD" in said and "a.jsonl:1: it is learnt as text" in said
    assert "1 control marks of the model inside prompts got a space" in said and "inside answers" not in said
    assert f"{tmp_path / 'a.jsonl'}: 2 of 3 rows looked at have letters decoded in another encoding" in said


def test_scores_that_are_nearer_than_the_margin_everywhere_name_it(
    run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path
) -> None:
    rows = [{"prompt": f"{n}. {ASK}", "chosen": GOOD, "rejected": BAD, "s": 0.55, "t": 0.5} for n in range(3)]
    source = jsonl(tmp_path / "a.jsonl", rows, fields={"chosen_score": "s", "rejected_score": "t"})
    with pytest.raises(UserError) as error:
        run_stage(Pairs(), config([source], ["en"], min_margin=0.5), model=tiny_model)
    assert "tie 3" in error.value.what and "pairs.min_margin (0.5)" in (error.value.fix or "")
