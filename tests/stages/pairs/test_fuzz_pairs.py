"""Any preference file gives pairs and reasons, or one clear error: never a traceback, a lost row or a changed text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzzing import CONVERSATION, LANGUAGE, NUMBER, TEXT, VALUE, cases, file_bytes, outcome_of, scribble
from hypothesis import given
from hypothesis import strategies as st

from pipeline.commit import drops_table
from schemas.errors import UserError
from stages.pairs.stage import Pairs
from stages.text.dialogue import looks_spoken
from stages.text.forms import written_conversation
from stages.text.messages import clean, same_text
from stages.text.neutralise import Neutraliser, control_marks
from stages.text.written import written_texts

GOOD = [
    {"prompt": "What is water made of?", "chosen": "Of hydrogen and oxygen.", "rejected": "Of gold.", "language": "en"},
    {"prompt": "Woraus besteht Wasser?", "chosen": "Aus Sauerstoff.", "rejected": "Aus Gold.", "language": "de"},
]
SIDE = st.one_of(TEXT, TEXT, TEXT, CONVERSATION, st.lists(TEXT, max_size=3), VALUE)
ROW = st.fixed_dictionaries(
    {},
    optional={
        "prompt": SIDE,
        "chosen": SIDE,
        "rejected": SIDE,
        "language": LANGUAGE,
        "group_id": st.one_of(st.sampled_from(["g1", "g2"]), VALUE),
        "split": st.one_of(st.sampled_from([None, "", "train", "dev", "test"]), VALUE),
        "score": st.one_of(NUMBER, st.sampled_from(["7/10", "1,5", "85%", "good"]), VALUE),
        "answers": st.one_of(
            st.lists(st.fixed_dictionaries({}, optional={"response": SIDE, "overall_score": NUMBER}), max_size=4), SIDE
        ),
        "system": st.one_of(TEXT, VALUE),
    },
)
FIELDS = st.sampled_from(
    [
        {},
        {},
        {"chosen_score": "score", "rejected_score": "score"},
        {"split": "split"},
        {"language": None},
        {"system": "system"},
        {"completions": "answers"},
    ]
)


def is_plain(cell: Any) -> bool:
    return (
        isinstance(cell, str)
        and written_conversation(cell, print) is None
        and written_texts(cell, print) is None
        and not looks_spoken(cell)
        and "<think>" not in cell
    )


@st.composite
def pair_files(draw: st.DrawFn) -> tuple[str, bytes, list[dict[str, Any]] | None, dict[str, Any], bool]:
    """(format, bytes, rows in it or None, fields, identify)"""
    kind = draw(st.sampled_from(["jsonl", "jsonl", "csv", "parquet"]))
    rows = draw(st.lists(ROW, max_size=5))
    rows += draw(st.sampled_from([[], rows[:1]])) + draw(st.sampled_from([GOOD, GOOD, GOOD, []]))
    data, written = file_bytes(kind, rows, draw(st.integers(0, 76)))
    if draw(st.integers(0, 4)) == 0:
        data, written = scribble(draw, data), None
    return kind, data, written, draw(FIELDS), draw(st.booleans())


@cases(120, 1200)
@given(pair_files())
def test_any_preference_file(
    tmp_path: Path, run_stage: Callable[..., Any], tiny_model: Path, tiny_tokenizer: Any, drawn: Any
) -> None:
    kind, data, written, fields, identify = drawn
    path = tmp_path / f"pairs.{kind}"
    path.write_bytes(data)
    config = {
        "name": "t",
        "languages": {"seen": ["en", "de"], "identify": identify, **({"min_confidence": 0.0} if identify else {})},
        "model": {"policy": "tiny"},
        "text": {"max_length": 1024},
        "pairs": {"sources": [{"path": str(path), "fields": fields}], "on_empty_language": "skip"},
    }
    found = outcome_of(f"pairs {kind}", lambda: run_stage(Pairs(), config, model=tiny_model))
    if isinstance(found, UserError):
        return
    rows, drops, tallies = found.rows("pairs"), found.drops, found.account.tallies
    assert sum(tally.kept for tally in tallies) == len(rows)
    assert sum(tally.rows_in for tally in tallies) == len(rows) + len(drops)
    assert not sum(tally.failed for tally in tallies) == len(drops) > 0 or all(d.detail for d in drops)
    assert drops_table(drops).num_rows == len(drops)
    assert len({drop.row_id for drop in drops}) == len(drops)
    if written is not None and fields.get("completions") is None:
        assert len(rows) + len(drops) == len(written)
    assert max(Counter(row["pair_id"] for row in rows).values(), default=1) == 1
    neutralise = Neutraliser(tiny_tokenizer, *control_marks(tiny_tokenizer, tiny_tokenizer.chat_template))
    answers = {
        neutralise(clean(row[side]))[0] for row in written or [] for side in ("chosen", "rejected") if isinstance(row.get(side), str)
    }  # fmt: skip
    for row in rows:
        assert row["language"] in ("en", "de") and row["split"] in ("train", "dev", "test")
        assert row["prompt"][-1]["role"] == "user"
        sides = [row[side][-1]["content"] for side in ("chosen", "rejected")]
        assert not same_text(sides[0], sides[1])
        if written is not None and all(is_plain(r.get("chosen", "")) for r in written) and "completions" not in fields:
            assert sides[0] in answers
