"""Cells and columns of preference data as files from elsewhere have them: read right, or refused by what is wrong with them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas.config.sources import PairSource
from schemas.errors import UserError
from stages.pairs.read import RawPair, pair_batches, pairs_of
from stages.text.messages import BadRow

ASK = "Which planet of our solar system is the largest of all of them, and by how much does it exceed the others? " * 4
GOOD, BAD, WORSE = "The largest is Jupiter, isn't it?", 'They call it "Mercury".', "It would be the Moon."
COMPLETIONS = {"completions": "completions"}


def messages(answer: str) -> list[dict[str, str]]:
    """Content first, as the hub writes structures: the role comes after hundreds of characters."""
    return [{"content": ASK, "role": "user"}, {"content": answer, "role": "assistant"}]


def read(folder: Path, rows: list[dict[str, Any]], kind: str = "jsonl", **source: Any) -> tuple[list[Any], list[str]]:
    """(pairs and reasons, notes)"""
    path = folder / f"pairs.{kind}"
    if kind == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = PairSource.model_validate({"path": str(path), **source})
    batches = list(pair_batches(config, ["en"]))
    found = [pair for batch in batches for cells in batch.rows for pair in pairs_of(cells, config, 100_000)]
    return found, [note for batch in batches for note in batch.notes]


def answers(found: list[Any]) -> list[tuple[str, str]]:
    assert all(isinstance(pair, RawPair) and pair.prompt[-1]["content"] == ASK.strip() for pair in found), found
    return [(pair.chosen, pair.rejected) for pair in found]


@pytest.mark.parametrize(
    "write",
    [
        json.dumps,
        repr,
        lambda turns: str(np.array(turns)),
        lambda turns: repr(np.array(turns)),
        lambda turns: json.dumps(json.dumps(turns)),
        lambda turns: json.dumps({"messages": json.dumps(turns)}),
    ],
    ids=["json", "python", "numpy", "numpy-repr", "json-in-json", "wrapped"],
)
def test_messages_written_as_text_are_read_however_long_the_first_one_is(
    tmp_path: Path, write: Callable[[Any], str]
) -> None:
    rows = [{"prompt": ASK, "chosen": write(messages(GOOD)), "rejected": write(messages(BAD))}]
    found, notes = read(tmp_path, rows, "csv")
    assert answers(found) == [(GOOD, BAD)]
    assert all(any(f"column {side}: " in note for note in notes) for side in ("chosen", "rejected"))


def test_a_list_of_messages_each_written_as_json_is_a_conversation(tmp_path: Path) -> None:
    sides = {side: [json.dumps(m) for m in messages(text)] for side, text in (("chosen", GOOD), ("rejected", BAD))}
    found, notes = read(tmp_path, [sides])
    assert answers(found) == [(GOOD, BAD)]
    assert any("JSON texts in a list" in note for note in notes)


@pytest.mark.parametrize(
    "write", [json.dumps, repr, lambda texts: str(np.array(texts))], ids=["json", "python", "numpy"]
)
def test_several_rejected_answers_written_as_text_are_several(tmp_path: Path, write: Callable[[Any], str]) -> None:
    rows = [{"prompt": ASK, "chosen": GOOD, "rejected": write([BAD, WORSE])}]
    found, notes = read(tmp_path, rows, "csv", many="all")
    assert answers(found) == [(GOOD, BAD), (GOOD, WORSE)]
    assert "list of texts" in notes[0]


def test_answers_that_are_lists_on_both_sides_stay_text(tmp_path: Path) -> None:
    rows = [{"prompt": ASK, "chosen": '["red", "blue"]', "rejected": '["red"]'}]
    found, notes = read(tmp_path, rows, "csv")
    assert answers(found) == [('["red", "blue"]', '["red"]')]
    assert "taken as text" in notes[0]


@pytest.mark.parametrize("write", [json.dumps, repr], ids=["json", "python"])
def test_texts_each_in_a_list_of_its_own_are_those_texts(tmp_path: Path, write: Callable[[Any], str]) -> None:
    """As LMSYS' Kaggle CSV has them; a row of several turns is none."""
    rows = [{"prompt": write([ASK]), "chosen": write([GOOD]), "rejected": write([BAD])}] * 2
    rows += [{"prompt": write([ASK, "And?"]), "chosen": write([GOOD, "No."]), "rejected": write([BAD, WORSE])}]
    rows += [{"prompt": ASK, "chosen": GOOD, "rejected": write([None])}]
    found, notes = read(tmp_path, rows, "csv")
    assert answers(found[:2]) == [(GOOD, BAD)] * 2
    assert [bad.reason for bad in found[2:]] == ["several_answers", "empty"]
    assert {note.partition(":")[0] for note in notes} == {f"column {name}" for name in ("prompt", "chosen", "rejected")}


def test_answers_may_be_lists_where_prompts_are_none(tmp_path: Path) -> None:
    found, _ = read(tmp_path, [{"prompt": ASK, "chosen": '["red"]', "rejected": '["blue"]'}], "csv")
    assert answers(found) == [('["red"]', '["blue"]')]


def test_one_answer_in_a_list_against_several_is_that_answer(tmp_path: Path) -> None:
    """As pandas writes RewardBench 2 into a CSV, and JSON in cells."""
    for written in (str, json.dumps):
        row = {"prompt": ASK, "chosen": written([GOOD]), "rejected": written([BAD, WORSE])}
        for ending in ("csv", "jsonl"):
            found, _ = read(tmp_path, [row], ending)
            assert answers(found) == [(GOOD, BAD)]


@pytest.mark.parametrize(
    ("beside", "chosen", "rejected"),
    [
        ({"response_a": GOOD, "response_b": BAD}, "response_a", "response_b"),
        ({"response_A": GOOD, "response_B": BAD}, "B", "A"),
        ({"responses": [GOOD, BAD]}, 0, 1),
        ({"gpt-4": GOOD, "alpaca-7b": BAD}, "gpt-4", "alpaca-7b"),
    ],
)
def test_names_of_answers_are_no_answers(tmp_path: Path, beside: dict[str, Any], chosen: Any, rejected: Any) -> None:
    rows = [{"prompt": f"{ASK} {n}", **beside, "chosen": chosen, "rejected": rejected} for n in range(3)]
    with pytest.raises(UserError, match="hold names of answers"):
        read(tmp_path, rows)
    assert read(tmp_path, [{"prompt": ASK, "chosen": chosen, "rejected": rejected, "n": 1}])[0]


def test_a_prompt_that_is_json_of_another_kind_stays_text(tmp_path: Path) -> None:
    code = '[{"role": "admin", "id": 7}]'
    found, _ = read(tmp_path, [{"prompt": code, "chosen": GOOD, "rejected": BAD}])
    assert [pair.prompt[-1]["content"] for pair in found] == [code]


def test_a_minority_of_messages_written_as_text_is_said(tmp_path: Path) -> None:
    rows = [
        {"prompt": text, "chosen": GOOD, "rejected": BAD} for text in (json.dumps(messages(GOOD)[:1]), "a", "b", "c")
    ]
    _, notes = read(tmp_path, rows)
    assert "25.0% of the texts are messages written as JSON, and are taken as text" in notes[0]


@pytest.mark.parametrize(
    ("odd", "form"),
    [
        (json.dumps(messages(GOOD)[:1]), "messages written as JSON"),
        (f"Human: {ASK}\n\nAssistant: {GOOD}", "dialogues written as one text"),
        (f"<|im_start|>user\n{ASK}<|im_end|>", "rendered by a chat template"),
    ],
)
def test_texts_that_look_like_something_else_are_counted_at_the_end_of_the_file(
    tmp_path: Path, odd: str, form: str
) -> None:
    row = {"prompt": ASK, "chosen": GOOD, "rejected": BAD}
    found, notes = read(tmp_path, [row] * 1100 + [{**row, "prompt": odd}] * 2 + [row] * 3)
    assert len(found) == 1105 and len(notes) == 1
    assert notes[0].startswith("taken as text") and f"column prompt: 2 {form}" in notes[0]
    assert notes[0].endswith("(first in row 1,101)")
    _, notes = read(tmp_path, [row, {**row, "prompt": odd}, row])
    assert f"33.3% of the texts are {form}" in notes[0] and "first in row 2" in notes[1]


@pytest.mark.parametrize(
    "dress",
    [
        lambda answer: {"prompt": f"\n\nHuman: {ASK}\n\nAssistant:", "side": f"\n\nAssistant: {answer}"},
        lambda answer: {"prompt": f"User: {ASK}", "side": f"Assistant: {answer}\nA: is no turn"},
        lambda answer: {"side": f"USER: {ASK.strip()} ASSISTANT: {answer}"},
        lambda answer: {"side": f"A chat with an assistant. USER: {ASK.strip()} ASSISTANT: {answer}</s>"},
    ],
    ids=["dahoas", "named", "vicuna", "vicuna-system"],
)
def test_dialogues_written_as_text_are_read(tmp_path: Path, dress: Callable[[str], dict[str, str]]) -> None:
    both = {"chosen": dress(GOOD)["side"], "rejected": dress(BAD)["side"]}
    row = {"prompt": dress("")["prompt"], **both} if "prompt" in dress("") else both
    found, _ = read(tmp_path, [row])
    (chosen, rejected) = answers(found)[0]
    assert (chosen.partition("\n")[0], rejected.partition("\n")[0]) == (GOOD, BAD)
    assert "ssistant:" not in chosen + rejected


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ([{"type": "image"}, {"type": "text", "text": GOOD}], "part of type 'image'"),
        ([{"content_type": "text", "parts": [GOOD]}], "a part with the keys content_type, parts"),
    ],
)
def test_content_that_is_no_text_is_named(tmp_path: Path, answer: Any, says: str) -> None:
    sides = [[{"role": "user", "content": ASK}, {"role": "assistant", "content": c}] for c in (answer, BAD)]
    found, _ = read(tmp_path, [{"chosen": sides[0], "rejected": sides[1]}])
    assert isinstance(found[0], BadRow) and says in found[0].detail


def test_what_a_message_says_beside_its_content_is_said_to_be_left_out(tmp_path: Path) -> None:
    chosen = [{"role": "assistant", "content": GOOD, "reasoning_details": [{"text": "hm"}]}]
    _, notes = read(tmp_path, [{"prompt": ASK, "chosen": chosen, "rejected": BAD}])
    assert any("reasoning_details of messages is not read" in note for note in notes)


@pytest.mark.parametrize(
    ("row", "source", "says"),
    [
        ({"prompt": ASK, "chosen": ASK + GOOD, "rejected": ASK + BAD}, {}, "repeat the prompt"),
        (
            {"prompt": f"{ASK}\r\nBriefly.", "chosen": f"{ASK}\nBriefly. {GOOD}", "rejected": f"{ASK}\nBriefly. {BAD}"},
            {},
            "repeat the prompt",
        ),
        (
            {"chosen": f"Q: {ASK}\nA: {GOOD}", "rejected": f"Q: {ASK}\nA: {BAD}"},
            {},
            "no conversations in a form.*'Q: Which",
        ),
        (
            {"prompt": ASK, "completions": [{"response": GOOD, "score": 5}]},
            {"fields": COMPLETIONS},
            "has the key 'overall_score'; the keys are 'response', 'score'.*mean 'score'",
        ),
        (
            {"prompt": ASK, "completions": [{"text": GOOD, "overall_score": 5}]},
            {"fields": COMPLETIONS},
            "has the key 'response'.*completion_text",
        ),
        (
            {"prompt": ASK, "completions": [{"response": GOOD, "rank": 1}]},
            {"fields": {**COMPLETIONS, "completion_score": "rank"}},
            "less is better",
        ),
        ({"prompt": ASK, "completions": [GOOD, BAD]}, {"fields": COMPLETIONS}, "no column 'overall_score'"),
    ],
    ids=["repeated", "repeated-crlf", "unknown-form", "no-score", "no-text", "rank", "no-scores"],
)
def test_columns_that_mean_something_else_are_refused(
    tmp_path: Path, row: dict[str, Any], source: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        read(tmp_path, [row], **source)


@pytest.mark.parametrize(
    "name",
    [
        *("ranks", "avg_ranking", "Rank2", "modelPPL", "dpoLoss", "final-position", "perplexity", "cost", "penalty", "errors"),
        *("severity_level", "nll", "toxicity", "toxicity_score", "harmRating", "edit_distance", "WER", "order"),
        *("reward_rank", "ratings-ranking", "neg_log_likelihood", "hallucination_score", "unsafe_score", "Platz"),
        *("ter", "mqm", "badness", "downvotes", "lmtoxicity", "num_issues", "neg_logps"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("field", ["chosen_score", "rejected_score", "completion_score"])
def test_scores_of_which_less_is_better_are_refused_by_their_names(tmp_path: Path, name: str, field: str) -> None:
    row = {"prompt": ASK, "chosen": GOOD, "rejected": BAD, "completions": [{"response": GOOD, name: 1}], name: 1}
    fields = {**(COMPLETIONS if field == "completion_score" else {}), field: name}
    with pytest.raises(UserError, match=f"'{name}' is a rank or a loss"):
        read(tmp_path, [row], fields=fields)


@pytest.mark.parametrize(
    "name",
    [
        *("rank_score", "lossReward", "replacement", "glossary", "workplace", "Elo", "reorder", "harmless_score"),
        *(
            "neg_rank",
            "minus_rank",
            "-rank",
            "not_toxic",
            "less_toxic",
            "error_free",
            "low_risk",
            "first_place_votes",
            "positive_logprob",
        ),
        *("non_toxicity", "harm_reduction", "accost", "reward_minus_cost", "terror", "log_likelihood", "negativity"),
    ],
)
def test_names_that_only_hold_the_letters_of_rank_or_loss_are_scores(tmp_path: Path, name: str) -> None:
    row = {"prompt": ASK, "chosen": GOOD, "rejected": BAD, name: 7}
    found, _ = read(tmp_path, [row], fields={"chosen_score": name})
    assert answers(found) == [(GOOD, BAD)] and found[0].chosen_score == 7


@pytest.mark.parametrize("ask", ["水是什么？", "水はどこ？", "물은 뭐야?", "น้ำคืออะไร", ASK])
@pytest.mark.parametrize("listed", [False, True])
def test_a_repeated_prompt_is_seen_in_dense_scripts_in_messages_and_among_short_ones(
    tmp_path: Path, ask: str, listed: bool
) -> None:
    def row(ask: str) -> dict[str, Any]:
        texts = {"prompt": ask, "chosen": f"{ask} {GOOD}", "rejected": f"{ask}\n{BAD}"}
        if not listed:
            return texts
        return {n: [{"role": "user" if n == "prompt" else "assistant", "content": t}] for n, t in texts.items()}

    short = {"prompt": "Hi?", "chosen": GOOD, "rejected": BAD}
    with pytest.raises(UserError, match="repeat the prompt"):
        read(tmp_path, [*[row(ask)] * 3, *[short] * 4])
    read(tmp_path, [row(ask), *[short] * 6])  # one by chance proves nothing
    read(tmp_path, [row("Hi?"), row("水？"), short])


@pytest.mark.parametrize(
    ("completions", "kind"),
    [
        ({"response": [BAD, GOOD], "overall_score": ["2/10", "9/10"]}, "jsonl"),
        (str(np.array([{"response": BAD, "overall_score": 2}, {"response": GOOD, "overall_score": 9}])), "csv"),
    ],
    ids=["columns", "numpy"],
)
def test_scored_completions_in_other_shapes(tmp_path: Path, completions: Any, kind: str) -> None:
    found, _ = read(tmp_path, [{"prompt": ASK, "completions": completions}], kind, fields=COMPLETIONS)
    assert answers(found) == [(GOOD, BAD)]


def test_texts_and_their_scores_as_lists_in_csv(tmp_path: Path) -> None:
    rows = [{"prompt": ASK, "completions": json.dumps([BAD, GOOD]), "overall_score": "[2, 8.5]"}]
    found, _ = read(tmp_path, rows, "csv", fields=COMPLETIONS)
    assert answers(found) == [(GOOD, BAD)] and found[0].chosen_score == 8.5


def scored(*entries: tuple[str, Any]) -> dict[str, Any]:
    return {"prompt": ASK, "completions": [{"response": text, "overall_score": score} for text, score in entries]}


@pytest.mark.parametrize(("many", "unread"), [("one", [2]), ("all", [2, 0])])
def test_completions_left_out_for_their_scores_are_counted_once_a_row(
    tmp_path: Path, many: str, unread: list[int]
) -> None:
    row = scored((GOOD, "good"), (GOOD, 9), (WORSE, "?"), (BAD, 1), ("Hm.", None), ("So?", 3))
    found, _ = read(tmp_path, [row], fields=COMPLETIONS, many=many)
    assert [pair.unread for pair in found] == unread
    (bad,), _ = read(tmp_path, [scored((GOOD, "good"), (BAD, 1))], fields=COMPLETIONS)
    assert bad.detail == "1 answers with a score, 1 scores that cannot be read"


@pytest.mark.parametrize("many", ["one", "all"])
def test_a_worse_answer_that_says_the_same_as_the_best_is_passed_over(tmp_path: Path, many: str) -> None:
    row = scored((GOOD, 9), (BAD, 5), (f" {GOOD}\u200b", 1))
    found, _ = read(tmp_path, [row], fields=COMPLETIONS, many=many)
    assert answers(found) == [(GOOD, BAD)]
    (bad,), _ = read(tmp_path, [scored((GOOD, 9), (GOOD, 1))], fields=COMPLETIONS)
    assert bad.reason == "identical"


def test_the_first_rejected_answer_that_says_something_else_is_taken(tmp_path: Path) -> None:
    found, _ = read(tmp_path, [{"prompt": ASK, "chosen": GOOD, "rejected": [GOOD, BAD, WORSE]}])
    assert answers(found) == [(GOOD, BAD)]
    whole = {"chosen": messages(GOOD), "rejected": [messages(GOOD), messages(BAD)]}
    assert answers(read(tmp_path, [whole])[0]) == [(GOOD, BAD)]


@pytest.mark.parametrize(
    ("one", "other"),
    [("PARIS, OF COURSE.", "Paris, of course."), ("if x:\n    y = 1", "if x:\ny = 1"), ("One.\n\nTwo.", "One. Two.")],
)
def test_answers_that_differ_in_case_or_white_space_are_a_pair(tmp_path: Path, one: str, other: str) -> None:
    assert answers(read(tmp_path, [{"prompt": ASK, "chosen": one, "rejected": other}])[0]) == [(one, other)]
    assert answers(read(tmp_path, [{"prompt": ASK, "chosen": one, "rejected": [one, other]}])[0]) == [(one, other)]
    found, _ = read(tmp_path, [scored((one, 9), (other, 1))], fields=COMPLETIONS)
    assert answers(found) == [(one, other)]
    (bad,), _ = read(tmp_path, [{"prompt": ASK, "chosen": one, "rejected": f"{one}\u200f"}])
    assert (bad.reason, bad.detail) == ("identical", "but for characters that nobody sees")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"chosen": {"text": GOOD, "model": "x"}},
            "chosen: an object with the keys text, model instead of a text or a list",
        ),
        ({"chosen": [{"asker": ASK, "replier": GOOD}]}, "chosen: a message with the keys asker, replier"),
        ({"prompt": {"text": ASK}}, "prompt: an object with the keys text instead"),
        ({"rejected": [["hi", BAD]]}, "rejected: a list of str instead"),
        (
            {"chosen": [{"type": "text", "text": GOOD}, {"type": "image", "url": "x"}]},
            "chosen: content has a part of type 'image'",
        ),
    ],
)
def test_objects_that_are_no_messages_are_named_with_their_column(
    tmp_path: Path, row: dict[str, Any], says: str
) -> None:
    (bad,), _ = read(tmp_path, [{"prompt": ASK, "chosen": GOOD, "rejected": BAD, **row}])
    assert isinstance(bad, BadRow) and bad.detail.startswith(says)


def test_completions_that_are_no_list_are_named_with_their_keys(tmp_path: Path) -> None:
    row = {"prompt": ASK, "completions": {"gpt": {"response": GOOD}, "other": {"response": BAD}}}
    found, _ = read(tmp_path, [scored((GOOD, 2), (BAD, 1)), row], fields=COMPLETIONS)
    assert found[1].detail == "completions: an object with the keys gpt, other instead of a list of answers"


def test_content_in_parts_without_a_message_around_it_is_read(tmp_path: Path) -> None:
    chosen = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": GOOD}]
    found, notes = read(tmp_path, [{"prompt": ASK, "chosen": chosen, "rejected": [{"type": "text", "text": BAD}]}])
    assert answers(found) == [(f"<think>\nHm.\n</think>\n\n{GOOD}", BAD)]
    assert "column rejected: content in parts read as one text" in notes


def test_an_answer_that_a_dialogue_does_not_come_to_is_empty(tmp_path: Path) -> None:
    asked = f"\n\nHuman: {ASK}\n\nAssistant:"
    (bad,), _ = read(tmp_path, [{"chosen": f"{asked} {GOOD}", "rejected": asked}])
    assert (bad.reason, bad.detail) == ("empty", "rejected: no answer after the prompt")


def test_scores_out_of_different_numbers_rank_nothing(tmp_path: Path) -> None:
    scored = [{"response": GOOD, "overall_score": "9/10"}, {"response": BAD, "overall_score": "80%"}]
    found, _ = read(tmp_path, [{"prompt": ASK, "completions": scored}], fields=COMPLETIONS)
    assert isinstance(found[0], BadRow) and "different numbers" in found[0].detail


@pytest.mark.parametrize("word", ["nan", "NaN", "<NA>"])
def test_an_answer_that_only_says_that_there_is_none_is_missing(tmp_path: Path, word: str) -> None:
    found, _ = read(tmp_path, [{"prompt": ASK, "chosen": word, "rejected": BAD}])
    assert isinstance(found[0], BadRow) and found[0].reason == "empty"


@pytest.mark.parametrize("said", [{"role": "system", "content": "Be brief."}, {"text": "Be brief."}])
def test_a_system_column_may_hold_a_message(tmp_path: Path, said: dict[str, str]) -> None:
    row = {"system": [said], "prompt": ASK, "chosen": GOOD, "rejected": BAD}
    found, _ = read(tmp_path, [row], fields={"system": "system"})
    assert found[0].prompt[0] == {"role": "system", "content": "Be brief."}


@pytest.mark.timeout(60)  # minutes where every quote is tried as a beginning
@pytest.mark.parametrize("text", ["[{'role': '" + "\\'" * 150_000, '["' + '\\"' * 150_000, "[" + "array(" * 100_000])
def test_texts_that_only_begin_as_messages_are_looked_at_once(tmp_path: Path, text: str) -> None:
    found, _ = read(tmp_path, [{"prompt": ASK, "chosen": text, "rejected": BAD}])
    assert len(found) == 1


def part(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


@pytest.mark.parametrize("write", [json.dumps, repr], ids=["json", "python"])
@pytest.mark.parametrize(
    "dress",
    [
        lambda role, written: [{"role": role, "content": written}],
        lambda role, written: [{"from": role, "value": written}],
        lambda role, written: written,
    ],
    ids=["messages", "sharegpt", "bare"],
)
def test_content_in_parts_that_is_written_as_text_is_read(
    tmp_path: Path, write: Callable[[Any], str], dress: Callable[[str, str], Any]
) -> None:
    row = {
        "prompt": dress("user", write(part(ASK))),
        "chosen": dress("assistant", write(part(GOOD))),
        "rejected": dress("assistant", write([*part(BAD), *part("And so on.")])),
    }
    found, notes = read(tmp_path, [row])
    assert answers(found) == [(GOOD, f"{BAD}\nAnd so on.")]
    assert any("parts read as one text" in note for note in notes)
    found, _ = read(
        tmp_path, [row | {"rejected": dress("assistant", write([{"type": "image_url", "image_url": "x"}]))}]
    )
    assert [bad.reason for bad in found] == ["not_text"] and "image_url" in found[0].detail
    beside = write([{"type": "image"}, *part(BAD)])  # the picture is in another column
    found, _ = read(tmp_path, [row | {"rejected": dress("assistant", beside)}])
    assert [bad.reason for bad in found] == ["not_text"] and "'image'" in found[0].detail


def test_one_part_as_a_cell_is_its_text(tmp_path: Path) -> None:
    row = {
        "prompt": json.dumps(part(ASK)[0]),
        "chosen": json.dumps(part(GOOD)[0]),
        "rejected": json.dumps(part(BAD)[0]),
    }
    assert answers(read(tmp_path, [row])[0]) == [(GOOD, BAD)]


def test_objects_with_a_type_that_are_no_parts_stay_text(tmp_path: Path) -> None:
    asked = json.dumps([{"type": "string", "text": "x"}])
    found, notes = read(
        tmp_path, [{"prompt": ASK, "chosen": asked, "rejected": [{"role": "assistant", "content": asked + " "}]}]
    )
    assert [pair.reason for pair in found] == ["identical"]  # both are that text
    assert not any("parts" in note for note in notes)
    for answer in ('[{"type": "file", "name": "a.txt"}]', '{"type": "text", "text": "a"}'):
        turn = [{"role": "assistant", "content": answer}]
        (pair,), _ = read(
            tmp_path, [{"prompt": ASK, "chosen": turn, "rejected": [{"role": "assistant", "content": "No."}]}]
        )
        assert pair.chosen == answer


MARKED = f"{GOOD}<|eot_id|>"


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": messages(MARKED), "rejected": messages(f"{BAD}<|eot_id|>")},
        {"chosen": json.dumps(messages(f"{GOOD}</s>")), "rejected": json.dumps(messages(f"{BAD}</s>"))},
        {"prompt": [{"role": "user", "content": f"<s>[INST] {ASK} [/INST]"}], "chosen": GOOD, "rejected": BAD},
        {"prompt": ASK, "chosen": [MARKED], "rejected": [BAD]},
        {"prompt": ASK, "chosen": GOOD, "rejected": [f"{BAD}<|eot_id|>", f"{WORSE}<|eot_id|>"]},
        {"chosen": f"\n\nHuman: {ASK}\n\nAssistant: {GOOD}<eos>", "rejected": f"\n\nHuman: {ASK}\n\nAssistant: {BAD}<eos>"},
    ],
    ids=["messages", "json", "prompt", "lists of one", "several", "dialogue"],
)  # fmt: skip
def test_what_a_template_left_is_refused_in_messages_lists_and_dialogues_too(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="chat template has rendered already"):
        read(tmp_path, [row, row])
    clean = {"prompt": ASK, "chosen": GOOD, "rejected": BAD}
    _, notes = read(tmp_path, [row, *[clean] * 9])
    assert any(" rendered by a chat template" in note or "are taken as text" in note for note in notes), notes


SCORED = [{"response": GOOD, "score": 5}, {"response": BAD, "score": 1}]


@pytest.mark.parametrize(
    "dress",
    [
        lambda text: json.dumps([{"role": "assistant", "content": text}]),
        lambda text: [{"role": "assistant", "content": text}],
        lambda text: [{"from": "gpt", "value": text}],
        lambda text: {"role": "assistant", "content": text},
        lambda text: {"role": "model", "parts": [{"text": text}]},
        lambda text: [{"role": "assistant", "content": part(text)}],
        part,
        lambda text: json.dumps(part(text)),
        lambda text: [text],
    ],
    ids=["json", "messages", "sharegpt", "one", "gemini", "in parts", "parts", "parts as json", "list of one"],
)
@pytest.mark.parametrize("side_by_side", [False, True])
def test_answers_among_completions_may_have_any_form(tmp_path: Path, dress: Any, side_by_side: bool) -> None:
    scored: Any = [answer | {"response": dress(str(answer["response"]))} for answer in SCORED]
    if side_by_side:
        scored = {key: [answer[key] for answer in scored] for key in ("response", "score")}
    fields = {"completions": "c", "completion_text": "response", "completion_score": "score"}
    found, _ = read(tmp_path, [{"prompt": ASK, "c": scored}], fields=fields)
    assert answers(found) == [(GOOD, BAD)]


def test_completions_that_a_template_left_its_marks_on_are_refused(tmp_path: Path) -> None:
    fields = {"completions": "c", "completion_text": "response", "completion_score": "score"}
    rows = [{"prompt": ASK, "c": [answer | {"response": f"{answer['response']}<|eot_id|>"} for answer in SCORED]}]
    for given in (rows, [rows[0] | {"c": json.dumps(rows[0]["c"])}]):
        with pytest.raises(UserError, match=r"'c\.response' holds texts that a chat template has rendered already"):
            read(tmp_path, given, fields=fields)
    thought = [{"role": "assistant", "reasoning_content": "Think.", "content": GOOD}]
    found, _ = read(tmp_path, [{"prompt": ASK, "c": [{"response": thought, "score": 5}, SCORED[1]]}], fields=fields)
    assert found[0].chosen == f"<think>\nThink.\n</think>\n\n{GOOD}"
    picture = [{"role": "assistant", "content": [{"type": "image_url", "image_url": "x"}]}]
    scored = [*SCORED, {"response": picture, "score": 3}]
    assert answers(read(tmp_path, [{"prompt": ASK, "c": scored}], fields=fields)[0]) == [(GOOD, BAD)]


def test_a_dialogue_inside_a_message_is_counted(tmp_path: Path) -> None:
    asked = [
        {"role": "user", "content": f"\n\nHuman: {ASK}\n\nAssistant: Paris.\n\nHuman: Are you sure?\n\nAssistant:"}
    ]
    found, notes = read(tmp_path, [{"prompt": asked, "chosen": GOOD, "rejected": BAD}])
    assert isinstance(found[0], RawPair)
    assert any("column prompt: 1 dialogues written as one text" in note for note in notes), notes


def test_an_answer_that_is_nested_too_deep_is_dropped(tmp_path: Path) -> None:
    fields = {"completions": "c", "completion_text": "response", "completion_score": "score"}
    deep = json.loads("[" * 900 + "]" * 900)
    found, _ = read(tmp_path, [{"prompt": ASK, "c": [*SCORED, {"response": deep, "score": 9}]}], fields=fields)
    assert [bad.reason for bad in found] == ["not_text"]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (("4,125", "0,900", "0,500"), (4.125, 0.5)),
        (("4,125", "3,5", "0,500"), (4.125, 0.5)),
        (("4,125", "0.9", "0.5"), "'4,125' may be 4.125 or 4125"),
        (("4,125", "3,250", "1,500"), "0 answers with a score"),
        (("4,125/5", "3,5/5", "2,5/5"), (4.125, 2.5)),
        (("4,125 out of 5", "3.5/5", "2.5/5"), "'4,125' may be 4.125 or 4125"),
    ],
    ids=["three-digits", "one-digit", "points", "unsaid", "of-a-scale", "points-of-a-scale"],
)
def test_a_comma_is_read_as_the_others_of_the_row_are(tmp_path: Path, scores: tuple[str, ...], expected: Any) -> None:
    row = {
        "prompt": ASK,
        "completions": [
            {"response": text, "overall_score": score} for text, score in zip((GOOD, WORSE, BAD), scores, strict=True)
        ],
    }
    (found,), _ = read(tmp_path, [row], fields=COMPLETIONS)
    if isinstance(expected, str):
        assert isinstance(found, BadRow) and found.reason == "too_few_candidates" and expected in found.detail
    else:
        assert (found.chosen, found.rejected, found.chosen_score, found.rejected_score) == (GOOD, BAD, *expected)


def test_scores_beside_lists_of_one_answer_are_read_of_either_side(tmp_path: Path) -> None:
    row = {"prompt": ASK, "chosen": [GOOD], "rejected": [BAD], "s": [3.0], "t": [2.0]}
    (found,), _ = read(tmp_path, [row], fields={"chosen_score": "s", "rejected_score": "t"})
    assert (found.chosen_score, found.rejected_score) == (3.0, 2.0)


@pytest.mark.parametrize("whole", ["chosen", "rejected"])
def test_a_whole_conversation_beside_an_answer_alone_says_what_both_answer(tmp_path: Path, whole: str) -> None:
    asked = [{"role": "user", "content": ASK}]
    texts = {"chosen": GOOD, "rejected": BAD}
    row = {**texts, whole: [*asked, {"role": "assistant", "content": texts[whole]}]}
    (found,), _ = read(tmp_path, [row])
    assert (found.prompt, found.chosen, found.rejected) == ([{**asked[0], "content": ASK.strip()}], GOOD, BAD)
