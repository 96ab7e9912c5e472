"""Preference data in the layouts that are in use: the right pair comes out, said once; nothing is guessed in silence."""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import UserError
from stages.pairs.stage import Pairs
from tests.stages.text.test_text_thoughts import QWEN3

ASK = "Which planet of our solar system is the largest?"
GOOD, BAD = "The largest planet is Jupiter.", "The largest planet is Mercury."


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def read(run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path) -> Callable[..., Any]:
    """Run the pairs stage on rows written as JSONL."""

    def run(rows: list[dict[str, Any]], seen: tuple[str, ...] = ("en",), **source: Any) -> Any:
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        pairs = source.pop("pairs", {})
        return run_stage(Pairs(), config({"path": str(path), **source}, seen, **pairs), model=tiny_model)

    return run


def config(source: dict[str, Any], seen: tuple[str, ...] = ("en",), **pairs: Any) -> dict[str, Any]:
    text = {"thoughts": pairs.pop("thoughts", "strip"), "max_length": 1024}
    languages = {"seen": list(seen), **pairs.pop("languages", {})}
    pairs = {"sources": [source], "dev_fraction": 0, "test_fraction": 0, **pairs}
    return {"name": "t", "languages": languages, "model": {"policy": "tiny"}, "text": text, "pairs": pairs}


def texts(outcome: Any) -> list[tuple[list[str], str, str]]:
    return [
        (
            [message["content"] for message in pair["prompt"]],
            pair["chosen"][0]["content"],
            pair["rejected"][0]["content"],
        )
        for pair in outcome.rows("pairs")
    ]


ONE = [([ASK], GOOD, BAD)]


@pytest.mark.parametrize(
    "dress",
    [
        lambda turns: "".join(f"\n\n{'Human' if t['role'] == 'user' else 'Assistant'}: {t['content']}" for t in turns),
        lambda turns: "\n".join(f"{'User' if t['role'] == 'user' else 'Assistant'}: {t['content']}" for t in turns),
        lambda turns: "".join(
            f"### {'Human' if t['role'] == 'user' else 'Assistant'}: {t['content']}\n" for t in turns
        ),
        lambda turns: json.dumps(turns),
        lambda turns: repr(turns),
        lambda turns: turns,
        lambda turns: [{"from": "human" if t["role"] == "user" else "gpt", "value": t["content"]} for t in turns],
        lambda turns: [{"role": t["role"].upper(), "content": t["content"]} for t in turns],
        lambda turns: [{"role": t["role"], "content": [{"type": "text", "text": t["content"]}]} for t in turns],
        lambda turns: {"role": [t["role"] for t in turns], "content": [t["content"] for t in turns]},
        lambda turns: {"messages": turns},
    ],
    ids=["hh", "one-line", "hashes", "json", "python", "list", "sharegpt", "upper", "parts", "columns", "wrapped"],
)
def test_whole_conversations_are_read_in_every_form_and_said_once(read: Callable[..., Any], dress: Any) -> None:
    history = [user("Tell me about planets."), assistant("Sure.\n\nWhat about them?"), user(ASK)]
    rows = [
        {"chosen": dress([*history, assistant(f"{GOOD} {n}")]), "rejected": dress([*history, assistant(BAD)])}
        for n in range(3)
    ]
    outcome = read(rows, language="en")
    assert outcome.drops == []
    assert texts(outcome) == [([m["content"] for m in history], f"{GOOD} {n}", BAD) for n in range(3)]
    said = [note for note in outcome.notes if "column chosen" in note]
    assert len(said) == len(set(said)) and (said or dress(history) == history)


def test_a_prompt_that_ends_in_the_assistants_name_is_a_dialogue_too(read: Callable[..., Any]) -> None:
    row = {"prompt": f"\n\nHuman: {ASK}\n\nAssistant:", "chosen": GOOD, "rejected": BAD}
    assert texts(read([row], language="en")) == ONE


def test_one_message_is_read_as_a_list_and_json_in_csv_is_parsed(
    read: Callable[..., Any], run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path
) -> None:
    row: dict[str, Any] = {"prompt": user(ASK), "chosen": assistant(GOOD), "rejected": assistant(BAD)}
    assert texts(read([row], language="en")) == ONE
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["chosen", "rejected", "language"])
        writer.writerow([json.dumps([user(ASK), assistant(side)]) for side in (GOOD, BAD)] + ["en"])
    outcome = run_stage(Pairs(), config({"path": str(tmp_path / "a.csv")}), model=tiny_model)
    assert texts(outcome) == ONE
    assert f"{tmp_path}/a.csv: column chosen: JSON text read as messages" in outcome.notes


def test_a_text_that_only_looks_like_json_stays_text(read: Callable[..., Any]) -> None:
    plain = [{"prompt": f"{ASK} {n}", "chosen": GOOD, "rejected": BAD} for n in range(3)]
    odd = {"prompt": '[{"role": "user", "content": "x"}] What does this JSON mean?', "chosen": GOOD, "rejected": BAD}
    assert [found[0][0] for found in texts(read([*plain, odd], language="en"))][-1] == odd["prompt"]


def test_broken_json_among_json_is_dropped_and_not_learnt(read: Callable[..., Any]) -> None:
    row = {"prompt": ASK, "chosen": json.dumps([assistant(GOOD)]), "rejected": json.dumps([assistant(BAD)])}
    outcome = read([row, {**row, "chosen": row["chosen"][:-5]}], language="en")
    assert [(drop.reason, drop.text[:10]) for drop in outcome.drops] == [("not_text", ASK[:10])]


def test_pictures_and_tools_are_refused_by_name(read: Callable[..., Any]) -> None:
    parts = [{"type": "text", "text": ASK}, {"type": "image_url", "image_url": {"url": "x"}}]
    rows = [
        {"prompt": [{"role": "user", "content": parts}], "chosen": GOOD, "rejected": BAD},
        {"prompt": [user(ASK), {"role": "observation", "content": "1"}], "chosen": GOOD, "rejected": BAD},
        {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
    ]
    found = [(drop.reason, drop.detail) for drop in read(rows, language="en").drops]
    assert found == [("not_text", "prompt: content has a part of type 'image_url'"), ("tool_calls", "")]


@pytest.mark.parametrize(
    "rendered",
    [
        "<|im_start|>user\n{}<|im_end|>\n",
        "<s>[INST] {} [/INST]",
        "<s> [SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST] {} [/INST]",
        "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
        "<|start|>user<|message|>{}<|end|><|start|>assistant",
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
        "<｜begin▁of▁sentence｜><｜User｜>{}<｜Assistant｜>",
        "[gMASK]<sop><|user|>\n{}<|assistant|>",
        "{}<|eot_id|>",
        "{}</s>\n",
    ],
)
def test_texts_that_a_template_has_rendered_are_refused(read: Callable[..., Any], rendered: str) -> None:
    row = {"prompt": rendered.format(ASK), "chosen": GOOD, "rejected": BAD}
    with pytest.raises(UserError, match="column 'prompt' holds texts that a chat template has rendered"):
        read([row], language="en")


def test_marks_in_the_middle_of_texts_are_no_rendering(read: Callable[..., Any]) -> None:
    row = {
        "prompt": f"What does <|im_start|> mean? {ASK}",
        "chosen": f"F# has <| and |>. {GOOD}",
        "rejected": "<s>a</s>?",
    }
    assert read([row], language="en").drops == []


def test_alpacas_template_is_a_dialogue_with_its_preamble_and_input(read: Callable[..., Any]) -> None:
    head = f"Below is an instruction.\n\n### Instruction:\n{ASK}\n\n### Input:\nShort.\n\n### Response:\n"
    rows = [
        {"chosen": head + GOOD, "rejected": head + BAD},
        {"prompt": head, "chosen": f"{GOOD} Yes.", "rejected": BAD},
    ]
    for row, chosen in zip(rows, (GOOD, f"{GOOD} Yes."), strict=True):
        (found,) = texts(read([row], language="en"))
        assert found == (["Below is an instruction.", f"{ASK}\n\n### Input:\nShort."], chosen, BAD)


@pytest.mark.parametrize(
    "scores", ["[1. 4. 2.5]", "[1 4\n 2]", "[1.0, 4.0, nan]", "[np.float64(1.0), np.int64(4), None]"]
)
def test_lists_of_numbers_are_read_as_numpy_and_python_print_them(read: Callable[..., Any], scores: str) -> None:
    row = {"prompt": ASK, "answers": repr([BAD, GOOD, "Perhaps."]), "scores": scores}
    fields = {"completions": "answers", "completion_score": "scores"}
    assert texts(read([row], language="en", fields=fields)) == ONE


def test_a_system_column_comes_before_the_prompt(read: Callable[..., Any]) -> None:
    rows: list[dict[str, Any]] = [
        {"sys": "Be brief.", "prompt": ASK, "chosen": GOOD, "rejected": BAD},
        {"sys": None, "prompt": ASK, "chosen": f"{GOOD} Yes.", "rejected": BAD},
    ]
    found = texts(read(rows, language="en", fields={"system": "sys"}))
    assert [prompt for prompt, _, _ in found] == [["Be brief.", ASK], [ASK]]


@pytest.mark.parametrize(("many", "expected"), [("one", [BAD]), ("all", [BAD, "It is Venus.", "It is Mars."])])
def test_many_rejected_answers_give_one_pair_or_one_each(
    read: Callable[..., Any], many: str, expected: list[str]
) -> None:
    row = {"prompt": ASK, "chosen": GOOD, "rejected": [BAD, "It is Venus.", "It is Mars."]}
    outcome = read([row], language="en", many=many)
    assert [pair["rejected"][0]["content"] for pair in outcome.rows("pairs")] == expected
    assert outcome.tally("row", "en").rows_in == len(expected)
    assert any("1 rows have several rejected answers" in note for note in outcome.notes) == (many == "one")
    assert texts(read([{"prompt": ASK, "chosen": [GOOD], "rejected": [None, BAD]}], language="en")) == ONE


ULTRA = [
    {"model": "a", "response": "It is Venus.", "overall_score": 3.5, "annotations": {"x": {"Rating": "3"}}},
    {"model": "b", "response": GOOD, "overall_score": 9.0},
    {"model": "c", "response": BAD, "overall_score": "1,5"},
    {"model": "d", "response": "It is Mars.", "overall_score": "N/A"},
]


def test_scored_completions_give_best_against_worst(read: Callable[..., Any]) -> None:
    fields = {"prompt": "instruction", "completions": "completions"}
    outcome = read([{"instruction": ASK, "completions": ULTRA}], language="en", fields=fields)
    (pair,) = outcome.rows("pairs")
    assert texts(outcome) == ONE and (pair["chosen_score"], pair["rejected_score"]) == (9.0, 1.5)
    outcome = read([{"instruction": ASK, "completions": ULTRA}], language="en", fields=fields, many="all")
    assert [found[2] for found in texts(outcome)] == ["It is Venus.", BAD]
    written = [{"instruction": ASK, "completions": json.dumps(ULTRA)}]
    outcome = read(written, language="en", fields={"prompt": "instruction", "completions": "completions"})
    assert texts(outcome) == ONE and any(
        "column completions: JSON text read as lists" in note for note in outcome.notes
    )
    fields = {"prompt": "instruction", "completions": "completions"}
    lists = {"prompt": ASK, "answers": [BAD, GOOD], "scores": [1, 2]}
    fields = {"completions": "answers", "completion_score": "scores"}
    assert texts(read([lists], language="en", fields=fields)) == ONE


def test_completions_that_cannot_be_ranked_are_dropped_with_the_reason(read: Callable[..., Any]) -> None:
    tied = [{"response": GOOD, "overall_score": 2}, {"response": BAD, "overall_score": 2.0}]
    rows = [
        {"prompt": ASK, "completions": ULTRA},
        {"prompt": ASK, "completions": tied},
        {"prompt": ASK, "completions": tied[:1]},
        {"prompt": ASK, "completions": None},
        {"prompt": ASK, "completions": "x"},
    ]
    found = read(rows, language="en", fields={"completions": "completions"}).drops
    assert [drop.reason for drop in found] == ["tie", "too_few_candidates", "empty", "not_text"]


def test_ratings_are_read_as_people_write_them_and_never_drop_a_pair(read: Callable[..., Any]) -> None:
    scores = [
        ("7/10", "3/10"),
        ("1,5", "1"),
        ("\u22120.5", "\u22121"),
        ("85%", "20 %"),
        ("4/5", "3/10"),
        ("good", "bad"),
        ("1,000", 2),
        (True, 1),
    ]
    rows = [
        {"prompt": f"{ASK} {n}", "chosen": GOOD, "rejected": BAD, "c": c, "r": r} for n, (c, r) in enumerate(scores)
    ]
    outcome = read(rows, language="en", fields={"chosen_score": "c", "rejected_score": "r"})
    assert [(pair["chosen_score"], pair["rejected_score"]) for pair in outcome.rows("pairs")] == [
        (7.0, 3.0), (1.5, 1.0), (-0.5, -1.0), (85.0, 20.0), (None, None), (None, None), (None, 2.0), (None, 1.0)
    ]  # fmt: skip
    assert outcome.account.stats["unread_scores"] == 4
    assert any("4 scores cannot be read" in note for note in outcome.notes)


def test_pairs_rated_below_or_too_near_are_dropped_and_counted_aloud(read: Callable[..., Any]) -> None:
    rows = [
        {"prompt": f"{ASK} {n}", "chosen": GOOD, "rejected": BAD, "c": c, "r": 3} for n, c in enumerate((5, 3.05, 1, 3))
    ]
    fields = {"chosen_score": "c", "rejected_score": "r"}
    outcome = read(rows, language="en", fields=fields)
    assert [drop.reason for drop in outcome.drops] == ["tie", "rated_below", "tie"]
    assert any("1 pairs are dropped because the data rates chosen below rejected" in note for note in outcome.notes)
    outcome = read(rows, language="en", fields=fields, pairs={"min_margin": 0})
    assert [drop.reason for drop in outcome.drops] == ["rated_below"]


def test_ids_that_pandas_made_floats_are_one_group_and_nan_is_none(read: Callable[..., Any]) -> None:
    groups = [1, 1.0, "1", "1.0", float("nan"), float("nan"), "nan", None, ""]
    rows = [
        {"prompt": f"{ASK} {n}", "chosen": GOOD, "rejected": BAD, "group_id": group, "language": float("nan")}
        for n, group in enumerate(groups)
    ]
    outcome = read([*rows, {**rows[0], "chosen": float("nan")}], language="en")
    found = [pair["group_id"] for pair in outcome.rows("pairs")]
    assert found[:4] == ["1"] * 4 and len(set(found[4:])) == len(groups) - 4 and "nan" not in found
    assert [drop.reason for drop in outcome.drops] == ["empty"]


def test_a_missing_prompt_column_is_named_with_what_it_may_be_called(
    read: Callable[..., Any], run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path
) -> None:
    with pytest.raises(UserError, match=r"no column 'prompt'; the columns are 'question'.*Did you mean 'question'"):
        read([{"question": ASK, "chosen": GOOD, "rejected": BAD}], language="en")
    row = {"prompt": ASK, "chosen": GOOD, "rejected": BAD, "language": "en"}
    for name, table in (("1", row), ("2", {k: v for k, v in row.items() if k != "language"})):
        pq.write_table(pa.Table.from_pylist([table]), tmp_path / f"part-{name}.parquet")
    with pytest.raises(UserError, match=r"no column 'language'.*part-1.parquet has it.*part-2.parquet"):
        run_stage(Pairs(), config({"path": str(tmp_path / "part-*.parquet")}), model=tiny_model)


def test_rows_of_a_named_hub_split_go_where_the_config_says(read: Callable[..., Any]) -> None:
    rows = [
        {"prompt": f"{ASK} {n}", "chosen": GOOD, "rejected": BAD, "part": part}
        for n, part in enumerate(("train_prefs", "test_prefs", "dev", None))
    ]
    splits = {"train_prefs": "train", "test_prefs": "test"}
    outcome = read(rows, language="en", fields={"split": "part"}, splits=splits)
    assert [pair["split"] for pair in outcome.rows("pairs")] == ["train", "test", "dev", "train"]
    with pytest.raises(UserError, match=r"'train_prefs' is not a split .*`splits` says"):
        read(rows, language="en", fields={"split": "part"})


def test_when_every_row_goes_the_message_gives_reasons_examples_and_keys_of_imported_pairs(
    read: Callable[..., Any],
) -> None:
    rows = [{"prompt": ASK, "chosen": GOOD, "rejected": GOOD} for _ in range(3)] + [{"prompt": 3, "chosen": "a"}]
    with pytest.raises(UserError) as error:
        read([*rows, {"prompt": ASK, "chosen": GOOD, "rejected": None}], language="en")
    message = str(error.value)
    assert "no training pair in any language: row identical 3 (for example" in message and "pairs.jsonl:1" in message
    assert "pairs.sources" in message and "generate" not in message and "inspect runs/t dropped/pairs" in message


def test_a_row_of_many_megabytes_goes_before_it_is_looked_at(read: Callable[..., Any], monkeypatch: Any) -> None:
    looked: list[int] = []
    monkeypatch.setattr("stages.text.messages.clean", lambda text: looked.append(len(text)) or text.strip())
    rows = [
        {"prompt": ASK, "chosen": "word " * 3_500_000, "rejected": BAD},
        {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
    ]
    outcome = read(rows, language="en")
    assert [(drop.reason, drop.detail.split()[0]) for drop in outcome.drops] == [("too_long", "17,500,000")]
    assert max(looked) < 1000


def test_flores_codes_keep_every_language_and_one_that_is_empty_stops_the_run(read: Callable[..., Any]) -> None:
    codes = {"swh_Latn": "sw", "pes_Arab": "fa", "npi_Deva": "ne", "zsm_Latn": "ms", "arb_Arab": "ar", "cmn_Hani": "zh"}
    rows = [
        {"prompt": f"p {n} {code}", "chosen": f"good {n}", "rejected": f"bad {n}", "language": code}
        for code in codes
        for n in range(2)
    ]
    outcome = read(rows, tuple(codes.values()), pairs={"languages": {"identify": False}})
    assert [pair["language"] for pair in outcome.rows("pairs")] == [code for code in codes.values() for _ in range(2)]
    with pytest.raises(UserError, match=r"no training pair in lv \(lv: no row came in\)"):
        read(rows, (*codes.values(), "lv"), pairs={"languages": {"identify": False}})


def test_thoughts_of_imported_answers_under_a_template_that_knows_them(
    run_stage: Callable[..., Any], tmp_path: Path, tiny_model: Path, tiny_tokenizer: Any
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = QWEN3
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": "What is 2+2?", "chosen": "<think>\nTwo and two.\n</think>\n\nIt is 4.", "rejected": "<think>\nHm.\n</think>\n\nIt is 5."},
        {"prompt": "What is 3+3?", "chosen": "It is 6.", "rejected": "It is 7."},
        {"prompt": "What is 4+4?", "chosen": "<think>\nA long thought.\n</think>\n\nIt is 8.", "rejected": "It is 8."},
        {"prompt": "How do I close a <think> tag in HTML?", "chosen": "Write </think>.", "rejected": "No."},
    ]  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    expected = {
        "strip": ([("It is 4.", "It is 5."), ("It is 6.", "It is 7.")], ["identical", "broken_thought"]),
        "keep": (
            [(rows[0]["chosen"], rows[0]["rejected"]), ("It is 6.", "It is 7."), (rows[2]["chosen"], "It is 8.")],
            ["broken_thought"],
        ),
        "drop": ([("It is 6.", "It is 7.")], ["thought", "thought", "broken_thought"]),
    }
    for policy, (kept, reasons) in expected.items():
        cfg = config({"path": str(path), "language": "en"}, thoughts=policy)
        outcome = run_stage(Pairs(), cfg, model=tmp_path / "model")
        assert [(chosen, rejected) for _, chosen, rejected in texts(outcome)] == kept
        assert [drop.reason for drop in outcome.drops] == reasons


def pair(prompt: Any, chosen: Any = GOOD, rejected: Any = BAD) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


HISTORY = [user("Tell me about planets."), assistant("Sure. What about them?"), user(ASK)]


@pytest.mark.parametrize(
    "written",
    [
        "\ufeff" + json.dumps(HISTORY),
        json.dumps(HISTORY).replace('"', '\\"'),
        json.dumps(json.dumps(HISTORY)),
        "\n".join(map(json.dumps, HISTORY)),
        json.dumps(HISTORY)[:-1] + ",]",
    ],
    ids=["byte order mark", "escaped", "twice", "a line each", "comma"],
)
def test_json_in_a_text_is_read_as_it_is_met(read: Callable[..., Any], written: str) -> None:
    outcome = read([pair(written)], language="en")
    assert texts(outcome) == [([message["content"] for message in HISTORY], GOOD, BAD)]
    assert any("column prompt: " in note and "read as messages" in note for note in outcome.notes)


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (r'[{"role": "user", "content": "See \ud83d\ude00 and<TAB>http:\/\/x.org"}]', "See 😀 and\thttp://x.org"),
        (r'[{"role": "user", "content": "See \ud83d\ude00 and http:\/\/x.org",}]', "See 😀 and http://x.org"),
        (r"[{'role': 'user', 'content': 'See \ud83d\ude00'}]", "See 😀"),
    ],
)
def test_escapes_of_json_that_is_nearly_right_are_jsons(read: Callable[..., Any], written: str, text: str) -> None:
    ((prompt, _, _),) = texts(read([pair(written.replace("<TAB>", "\t"))], language="en"))
    assert prompt == [text]


@pytest.mark.parametrize(
    "twice",
    [
        '[{"role": "user", "content": "Hi?", "content": "No?"}]',
        "[{'role': 'user', 'content': 'Hi?', 'content': 'No?'}]",
        {"messages": '[{"role": "user", "content": "Hi?", "content": "No?"}]'},
    ],
)
def test_a_key_twice_in_a_text_is_not_guessed(read: Callable[..., Any], twice: Any) -> None:
    outcome = read([pair(twice), pair(json.dumps([user(ASK)]))], language="en")
    assert texts(outcome) == ONE and [drop.reason for drop in outcome.drops] == ["not_text"]
    answers = '[{"response": "a", "response": "b", "overall_score": 1}]'
    rows = [{"prompt": ASK, "completions": answers}, {"prompt": ASK, "completions": json.dumps(ULTRA)}]
    outcome = read(rows, language="en", fields={"completions": "completions"})
    assert [(drop.reason, drop.detail[:18]) for drop in outcome.drops] == [("not_text", "a key is there twi")]


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("[{{role=user, content={}}}]", "messages in a notation that is not read"),
        ("\n\nMensch: {}\n\nAssistent:", "dialogues whose turns are named or marked in a way that is not read"),
        ("Hi [/INST] Which? </s><s>[INST] {}", "texts that a chat template has rendered already"),
    ],
)
def test_forms_that_are_not_read_are_refused_for_half_a_column_and_else_counted(
    read: Callable[..., Any], form: str, said: str
) -> None:
    odd = pair(form.format(ASK))
    with pytest.raises(UserError, match=f"column 'prompt' holds {said}, for example"):
        read([odd, pair(ASK)], language="en")
    outcome = read([odd, pair(f"{ASK} 1"), pair(f"{ASK} 2")], language="en")
    assert texts(outcome)[0][0] == [odd["prompt"].strip()]
    assert any("taken as text, whatever they look like: column prompt: 1 " in note for note in outcome.notes)


def test_another_notation_among_json_is_counted(read: Callable[..., Any]) -> None:
    rows = [pair(json.dumps([user(ASK)])), pair("[{role=user, content=Hi?}]", f"{GOOD} Yes.")]
    notes = read(rows, language="en").notes
    assert any("prompt: 1 messages in a notation that is not read (first in row 2)" in note for note in notes)


@pytest.mark.parametrize(
    "literal",
    [
        json.dumps,
        lambda text: repr(text.encode()),
        lambda text: f"array([{text!r}], dtype=object)",
        lambda text: [text],
    ],
    ids=["json", "bytes", "array", "list"],
)
def test_a_text_written_as_a_literal_is_the_text(read: Callable[..., Any], literal: Any) -> None:
    asked = f'Write two lines:\n"{ASK}"'
    outcome = read([pair(literal(asked)), pair(literal(ASK), f"{GOOD} Yes.")], language="en")
    assert [prompt for prompt, _, _ in texts(outcome)] == [[asked], [ASK]]
    assert any("column prompt: " in note for note in outcome.notes)


def test_quotation_marks_that_people_put_around_texts_stay(read: Callable[..., Any]) -> None:
    outcome = read([pair(ASK, f'"{GOOD}"', f'"{BAD}"'), pair(ASK, '"He said "no"."', BAD)], language="en")
    assert texts(outcome)[0] == ([ASK], f'"{GOOD}"', f'"{BAD}"')
    assert any("column rejected: 50.0% of the texts are in quotation marks, and are taken" in n for n in outcome.notes)
    outcome = read([pair(f'"{ASK}"')], language="en")
    assert texts(outcome)[0][0] == [f'"{ASK}"']


def test_objects_of_one_text_are_refused_as_prompts_and_said_as_answers(read: Callable[..., Any]) -> None:
    for key in ("text", "prompt"):
        with pytest.raises(UserError, match=f"column 'prompt' holds objects with a text.*under the key '{key}'"):
            read([pair(json.dumps({key: ASK}))], language="en")
    with pytest.raises(UserError, match="column 'chosen' holds objects with a text"):
        read([pair(ASK, json.dumps({"chosen": GOOD}))], language="en")
    answers = [json.dumps({"text": side}) for side in (GOOD, BAD)]
    outcome = read([pair(ASK, *answers)], language="en")
    assert texts(outcome) == [([ASK], *answers)]
    assert any("column chosen: 100.0% of the texts are objects with one text" in note for note in outcome.notes)


def test_texts_that_begin_and_end_alike_are_said(read: Callable[..., Any]) -> None:
    outcome = read([pair(f"Frage: {ASK}\nAntwort:")], language="en")
    assert any("begun by 'Frage:' and ended by 'Antwort:', and are taken as text" in note for note in outcome.notes)


@pytest.mark.parametrize(
    "beside",
    [
        {"system": [{"type": "text", "text": "Be brief."}]},
        {"system": {"role": "system", "content": "Be brief."}},
        {"system": [{"role": "system", "content": "Be brief."}]},
        {"system_message": "Be brief."},
        {"instructions": "Be brief."},
        {"system": "", "system_prompt": "Be brief."},
    ],
)
def test_a_system_message_beside_messages_is_read_in_every_form(read: Callable[..., Any], beside: Any) -> None:
    assert texts(read([pair({"messages": [user(ASK)], **beside})], language="en")) == [(["Be brief.", ASK], GOOD, BAD)]
    columns = {"role": ["user"], "content": [ASK], **beside}
    assert texts(read([pair(columns)], language="en")) == [(["Be brief.", ASK], GOOD, BAD)]


def test_a_system_message_that_cannot_be_read_drops_the_row(read: Callable[..., Any]) -> None:
    rows = [pair({"messages": [user(ASK)], "system": [{"type": "image", "url": "x"}]}), pair(ASK)]
    assert [drop.detail for drop in read(rows, language="en").drops] == ["prompt: content has a part of type 'image'"]


def test_a_system_column_has_lists_of_one_text_as_the_prompt_has(read: Callable[..., Any]) -> None:
    row = {**{key: json.dumps([text]) for key, text in pair(ASK).items()}, "s": '["Be brief."]'}
    assert texts(read([row], language="en", fields={"system": "s"})) == [(["Be brief.", ASK], GOOD, BAD)]


def test_columns_of_messages_keep_what_stands_beside_role_and_content(read: Callable[..., Any]) -> None:
    columns: dict[str, Any] = {"role": [m["role"] for m in HISTORY], "content": [m["content"] for m in HISTORY]}
    called = {**columns, "tool_calls": [None, [{"name": "search"}], None]}
    thought = {"role": ["assistant"], "content": [GOOD], "reasoning_content": ["Hm."]}
    outcome = read([pair(called), pair(columns, thought)], language="en", pairs={"thoughts": "keep"})
    assert [drop.reason for drop in outcome.drops] == ["tool_calls"]
    assert texts(outcome)[0][1] == f"<think>\nHm.\n</think>\n\n{GOOD}"


@pytest.mark.parametrize(
    "marks", [("<|begin_of_thought|>", "<|end_of_thought|>"), ("<|START_THINKING|>", "<|END_THINKING|>")]
)
def test_a_thought_in_marks_like_a_templates_is_a_thought(read: Callable[..., Any], marks: tuple[str, str]) -> None:
    answers = [f"{marks[0]}Hm.{marks[1]}\n\n{side}" for side in (GOOD, BAD)]
    assert texts(read([pair(ASK, *answers)], language="en")) == ONE


def test_an_answer_that_is_a_list_beside_one_that_is_an_object_is_one_answer(read: Callable[..., Any]) -> None:
    answers = ('{"fruits": ["apple", "pear"]}', '["apple", "pear"]')
    outcome = read([pair(ASK, *answers)], language="en")
    assert texts(outcome) == [([ASK], *answers)]
    assert any("column rejected: lists of texts, as chosen has them too, are taken as text" in n for n in outcome.notes)


@pytest.mark.parametrize("nothing", ["[]", "null", "", [], [None], {"name": None, "arguments": None}])
def test_no_tool_calls_are_none_however_they_are_written(read: Callable[..., Any], nothing: Any) -> None:
    sides = [[{**message, "tool_calls": nothing}] for message in (user(ASK), assistant(GOOD), assistant(BAD))]
    assert texts(read([pair(*sides)], language="en")) == ONE
    sides[1][0]["tool_calls"] = '[{"name": "search"}]'
    assert [drop.reason for drop in read([pair(*sides), pair(ASK)], language="en").drops] == ["tool_calls"]


@pytest.mark.parametrize(
    "prompt",
    [
        [{"role": "user", "content": [{"type": None, "text": ASK}]}],
        [{"role": "user", "parts": [{"text": ASK}]}],
        json.dumps([{"role": "user", "parts": [{"text": ASK}]}]),
    ],
)
def test_parts_without_a_type_and_geminis_are_text(read: Callable[..., Any], prompt: Any) -> None:
    answer = [{"role": "model", "parts": [{"text": "Hm.", "thought": True}, {"text": GOOD}]}]
    assert texts(read([pair(prompt, answer)], language="en")) == ONE
    picture = [{"role": "user", "parts": [{"inlineData": {"data": "x"}}]}]
    assert [drop.reason for drop in read([pair(picture), pair(ASK)], language="en").drops] == ["not_text"]


@pytest.mark.parametrize("key", ["author", "from", "role", "speaker"])
def test_completions_that_say_who_wrote_them_are_no_messages(read: Callable[..., Any], key: str) -> None:
    answers = [{key: "Ann", "pm_score": 1, "text": BAD}, {key: "Ben", "pm_score": 3, "text": GOOD}]
    fields = {"completions": "answers", "completion_text": "text", "completion_score": "pm_score"}
    for cell in (answers, json.dumps(answers)):
        assert texts(read([{"prompt": ASK, "answers": cell}], language="en", fields=fields)) == ONE
