"""Any prompt file gives prompts and reasons, or one clear error: never a traceback, a lost row or a changed text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzzing import CONVERSATION, LANGUAGE, TEXT, VALUE, cases, file_bytes, outcome_of, scribble
from hypothesis import given
from hypothesis import strategies as st

from pipeline.commit import drops_table
from schemas.errors import UserError
from stages.prompts.stage import Prompts
from stages.text.dialogue import looks_spoken
from stages.text.forms import written_conversation
from stages.text.messages import clean
from stages.text.written import written_texts

GOOD = [
    {"prompt": "Why does the moon look larger near the horizon than high in the sky?", "language": "en"},
    {"prompt": "Write a short polite note asking a neighbour to water my plants.", "language": "en"},
    {"prompt": "How many minutes are there between half past two and five o'clock?", "language": "en"},
    {"prompt": "Warum fallen die Blätter im Herbst von den Bäumen, und wozu dient das?", "language": "de"},
]
ROW = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.one_of(TEXT, TEXT, CONVERSATION, VALUE),
        "language": LANGUAGE,
        "group_id": st.one_of(st.sampled_from(["g1", "g2"]), VALUE),
        "system": st.one_of(TEXT, VALUE),
        "split": st.one_of(st.sampled_from([None, "", "train", "dev", "test"]), VALUE),
        "extra": VALUE,
    },
)
FIELDS = st.sampled_from(
    [{}, {}, {}, {"system": "system"}, {"split": "split"}, {"language": None}, {"prompt": "extra"}]
)


@st.composite
def prompt_files(draw: st.DrawFn) -> tuple[str, bytes, list[dict[str, Any]] | None, dict[str, Any], bool]:
    """(format, bytes, rows in it or None, fields, identify)"""
    kind = draw(st.sampled_from(["jsonl", "jsonl", "csv", "parquet"]))
    rows = draw(st.lists(ROW, max_size=6))
    rows += draw(st.sampled_from([[], rows[:1], rows[:1]])) + draw(st.sampled_from([GOOD, GOOD, GOOD, []]))
    data, written = file_bytes(kind, rows, draw(st.integers(0, 76)))
    if draw(st.integers(0, 4)) == 0:
        data, written = scribble(draw, data), None
    return kind, data, written, draw(FIELDS), draw(st.booleans())


@cases(150, 2000)
@given(prompt_files())
def test_any_prompt_file(tmp_path: Path, run_stage: Callable[..., Any], drawn: Any) -> None:
    kind, data, written, fields, identify = drawn
    path = tmp_path / f"prompts.{kind}"
    path.write_bytes(data)
    config = {
        "name": "t",
        "languages": {"seen": ["en"], "unseen": ["de"], "identify": identify},
        "model": {"policy": "none"},
        "prompts": {"sources": [{"path": str(path), "fields": fields}], "dev_fraction": 0.2, "test_fraction": 0.2},
    }
    found = outcome_of(f"prompts {kind}", lambda: run_stage(Prompts(), config))
    if isinstance(found, UserError):
        return
    rows, drops = found.rows("prompts"), found.drops
    tallies = found.account.tallies
    assert sum(tally.kept for tally in tallies) == len(rows)
    assert sum(tally.rows_in for tally in tallies) == len(rows) + len(drops)
    assert drops_table(drops).num_rows == len(drops)
    assert all(drop.reason and drop.row_id and len(drop.detail) < 1000 for drop in drops)
    places = Counter(row["source_row"] for row in rows) + Counter(int(d.row_id.rsplit(":", 1)[1]) for d in drops)
    assert set(places.values()) <= {1} and set(places) == set(range(1, len(places) + 1))
    if written is not None:
        assert len(places) == len(written)
    assert len({row["prompt_id"] for row in rows}) == len(rows)
    for row in rows:
        assert row["language"] in ("en", "de")
        assert row["split"] == "unseen" if row["language"] == "de" else row["split"] in ("train", "dev", "test")
        assert row["messages"][-1]["role"] == "user" and row["messages"][-1]["content"]
        assert all(message["content"] == clean(message["content"]) for message in row["messages"])
        cell = written[row["source_row"] - 1].get(fields.get("prompt", "prompt")) if written is not None else None
        plain = isinstance(cell, str) and not looks_spoken(cell)
        if plain and written_conversation(cell, print) is None and written_texts(cell, print) is None:
            assert row["messages"][-1]["content"] == clean(cell)
