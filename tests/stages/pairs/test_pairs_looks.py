"""What is said of a source's first rows: damaged texts, and answers that begin with their prompt or a label; nothing of healthy data."""

from __future__ import annotations

from typing import Any

import pytest

from schemas.config.sources import PairSource
from stages.data import data_path
from stages.pairs.looks import Looks
from stages.pairs.read import pair_batches, pairs_of
from stages.text.misread import misread

ASK = "Which planet of our solar system is the largest number {}?"


def row(n: int, **cells: str) -> dict[str, Any]:
    return {"prompt": ASK.format(n), "chosen": f"It is Jupiter {n}.", "rejected": f"It is Mars {n}."} | cells


def notes(rows: list[dict[str, Any]]) -> list[str]:
    source, looks = PairSource(path="x"), Looks()
    for n, cells in enumerate(rows, start=1):
        looks.row(f"f:{n}", cells, list(pairs_of(cells, source, 10_000)))
    return list(looks.notes())


@pytest.mark.parametrize(
    ("dress", "beginning"),
    [
        (lambda r: {s: f"Q: {r['prompt']}\nA: {r[s]}" for s in ("chosen", "rejected")}, "'Q: Which planet"),
        (lambda r: {s: f"**{r['prompt']}**\n\n{r[s]}" for s in ("chosen", "rejected")}, r"'\*\*Which planet"),
        (lambda r: {"chosen": f"{r['prompt']} {r['chosen']}"}, "'Which planet"),
        (lambda r: {"rejected": f"{r['prompt']} {r['rejected']}"}, "'Which planet"),
        (lambda r: {"chosen": r["prompt"]}, "'Which planet"),
        (lambda r: {s: f"### Response:\n{r[s]}" for s in ("chosen", "rejected")}, "'### Response:"),
        (lambda r: {s: f"A: {r[s]}" for s in ("chosen", "rejected")}, "'A: It is Jupiter"),
        (lambda r: {s: f"**Antwort:** {r[s]}" for s in ("chosen", "rejected")}, r"'\*\*Antwort"),
        (lambda r: {s: f"<assistant>{r[s]}</assistant>" for s in ("chosen", "rejected")}, "'<assistant>It"),
        (lambda r: {s: f"答案：{r[s]}" for s in ("chosen", "rejected")}, "'答案：It"),
    ],
    ids=["q-a", "bold", "chosen", "rejected", "equal", "response", "a", "german", "tag", "chinese"],
)
def test_answers_that_begin_with_their_prompt_or_a_label_are_counted(dress: Any, beginning: str) -> None:
    rows = [row(n) for n in range(8)]
    (said,) = notes([one | dress(one) for one in rows[:5]] + rows[5:])
    assert said.startswith("in 5 of 8 rows looked at an answer begins with its prompt or with a label")
    assert beginning.replace("\\", "") in said and "in f:1:" in said
    assert notes([one | dress(one) for one in rows[:3]] + rows[3:]) == []


def test_answers_in_a_form_that_the_prompt_asks_for_are_not_said_to_have_a_label() -> None:
    asked = "Is water wet? Reply in the form 'Answer: yes or no'."
    assert notes([row(n, prompt=f"{n}. {asked}", chosen="Answer: yes", rejected="Answer: no") for n in range(9)]) == []
    steps = {"chosen": "Step 1: we add.", "rejected": "Step 1: we guess."}
    assert notes([row(n, **steps) for n in range(9)]) == []


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        ({"prompt": "I donâ€™t say fÃ¼r"}, "letters decoded in another encoding"),
        ({"chosen": "ÐŸÑ€Ð¸Ð²ÐµÑ‚"}, "letters decoded in another encoding"),
        ({"chosen": "ä½ å¥½ä¸–ç•Œ"}, "letters decoded in another encoding"),
        ({"chosen": "Iï¿½m lost"}, "letters decoded in another encoding"),
        ({"chosen": "Great ðŸ˜Š"}, "letters decoded in another encoding"),
        ({"chosen": "锟斤拷锟斤拷"}, "letters decoded in another encoding"),
        ({"chosen": "A row_x000D_\nand another_x000D_"}, "escapes of Excel"),
        ({"chosen": "First.<0x0A>Second."}, "what a tokenizer left"),
        ({"chosen": "the <unk> of it <pad> <pad>"}, "what a tokenizer left"),
        ({"chosen": "It is ⁇ then"}, "what a tokenizer left"),
        ({"chosen": "HelloĠworld,ĠhowĠareĠyou"}, "what a tokenizer left"),
        ({"chosen": "ĠtheĠ cat Ġthe Ġcat Ġsat down"}, "what a tokenizer left"),
        ({"chosen": "Hello.ĊĊHowĠare you"}, "what a tokenizer left"),
        ({"chosen": "▁Hello,▁world▁again"}, "what a tokenizer left"),
        ({"chosen": "It&#39;s &quot;fine&quot;"}, "entities of HTML"),
        ({"chosen": "<p>It is.</p>"}, "markup of HTML"),
        ({"rejected": "Hm. &amp;#x200B;"}, "entities of HTML"),
        ({"chosen": "\x1b[31mJupiter\x1b[0m"}, "escapes that colour a terminal"),
        ({"chosen": "It is.\\n\\n1. One\\n2. Two"}, "line breaks or letters written as"),
        ({"chosen": "a caf\\u00e9"}, "line breaks or letters written as"),
        ({"chosen": "\\u041f\\u0440\\u0438"}, "line breaks or letters written as"),
    ],
)
def test_damaged_texts_are_counted_once_a_kind_with_an_example(cells: dict[str, str], says: str) -> None:
    (said,) = notes([row(n) for n in range(8)] + [row(8, **cells), row(9, **cells)])
    assert says in said and said.startswith("2 of 10 rows looked at") and "in f:9: they would be learnt so" in said


@pytest.mark.parametrize(
    ("meant", "pages"),
    [
        ("Привет, как дела?", "cp1250 cp1251 cp1252 cp437 cp850"),
        ("C’est un café très agréable", "cp1250 cp1251 cp1252 cp1254 cp1256 mac_roman cp437 cp850"),
        ("Größe und Mädchen für alle", "cp1250 cp1251 cp1252 cp1254 mac_roman cp437 cp850"),
        ("你好世界，我们在这里吃饭", "cp1250 cp1251 cp1252 mac_roman cp437 cp850"),
        ("नमस्ते दुनिया", "cp1250 cp1251 cp1252 mac_roman cp437 cp850"),
        ("السلام عليكم", "cp1252 mac_roman cp437 cp850"),
        ("Nice 😊🤔", "cp1250 cp1251 cp1252 cp1254 mac_roman cp437 cp850"),
        ("lost \ufffd\ufffd", "cp1250 cp1251 cp1252 cp1254 mac_roman cp437 cp850 cp866 koi8_r gbk"),
    ],
)
def test_utf_8_that_was_read_in_another_encoding_is_found(meant: str, pages: str) -> None:
    """The oracle is Python's codecs; bytes that an encoding has no character for are lost, as they mostly are."""
    missed = [page for page in pages.split() if misread(meant.encode().decode(page, "ignore")) is None]
    assert missed == [] and misread(meant) is None


@pytest.mark.parametrize(
    "text",
    [
        "n√π, 2√x, sin√π and f√±1; ∫√∞, x√²; ΔxΔ² and pΓ±q",
        "┌──┐ │Name│ └─┴─┘ Start─┐ src├──main ─┼┤ │Значение│е│е│",
        "Ăştia sunt; ÄÖÜ®, CAFÉ®, „Ä“; СІРІ, УСІ РІДНІ, Срђан, срџба, Ђорђе, 220 В±10%, 25 В°C, Г§",
        "煎饼馃子和联通，李锟，斤两，拷贝；てとなにとはひとのはなし、ｱｲｳｴｵ",
        "Ακολουθούν ερωτήσεις, ΑΚΟΛΟΥΘΟΎΝ, α», «β…»",
        "ы ё лёд, зелёный©, Ещё одно; ответАвтор",
        "Ġorġ ta' Ġermanja, Ċentru, MAĠĠORANZA, FAĊĊATA, l-Ġgantija u Ġiljan",
        'The tokens `<unk>` and "<pad>" and `<0x0A>`; really?? ▁▂▃▄ a_x000G_ and _x1F600_',
        "« CAFÉ » : « déjà » à « 5 € » – « où ? » SÃO PAULO, “MANHÔ, naïve…",
        "Größe: „Ä“, Ünlü – ÅÄÖ, 2.5 Å² and 5 Å³; piñata; ÇA VA ? Œuvre",
        'print("one\\ntwo\\n") and $a \\neq b$, \\nabla \\nu, C:\\new, r"\\n"',
        'json.dumps writes "\\u00e9" for é',
        "```html\n&lt;p&gt;&quot;x&quot;\n```",
        "AT&T, R&D; a &lt; b in XML",
        "range [50m, 100m] and [31m",
        "Việt Nam, Привет, 你好, שלום, नमस्ते, Ολλανδία",
    ],
)
def test_healthy_texts_are_not_damaged(text: str) -> None:
    assert notes([row(n, chosen=text) for n in range(5)]) == []


def test_escaped_line_breaks_beside_real_ones_are_code() -> None:
    rows = [row(n, chosen="One.\nTwo.") for n in range(5)] + [row(n, chosen="Ends.\\nTwo") for n in range(5)]
    assert notes(rows) == []


@pytest.mark.parametrize("code", ["en", "de", "fr", "ru", "zh", "ja", "ar", "hi", "sw"])
def test_nothing_is_said_of_shipped_pairs(code: str) -> None:
    source, looks = PairSource(path=str(data_path(f"authored_pairs/{code}.jsonl"))), Looks()
    for batch in pair_batches(source, [code]):
        for n, cells in enumerate(batch.rows):
            looks.row(f"f:{n}", cells, list(pairs_of(cells, source, 10_000)))
    assert list(looks.notes()) == []


def test_a_prompt_that_says_more_than_the_conversations_is_said() -> None:
    def talk(n: int, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": ASK.format(n)}, {"role": "assistant", "content": answer}]

    rows = [row(n, chosen=talk(n, "Jupiter."), rejected=talk(n, "Mars.")) for n in range(8)]
    assert notes(rows) == []
    (said,) = notes(
        [one | {"prompt": f"Text: All planets are stones.\n\n{one['prompt']}"} for one in rows[:1]] + rows[1:]
    )
    assert said.startswith(
        "in 1 of 8 rows looked at the prompt says more than the conversations, for example 'Text: All planets"
    )


@pytest.mark.parametrize(
    "ending",
    ["\n\nHuman: And the smallest?\n\nAssistant: Mercury.", "\n\nUser:", "\n### Human\nMore", "\n\n**用户：** 还有"],
)
def test_answers_that_go_on_with_the_users_turn_are_said(ending: str) -> None:
    rows = [row(n) for n in range(8)]
    (said,) = notes([rows[0] | {"rejected": f"It is Mars.{ending}"}, *rows[1:]])
    assert said.startswith("in 1 of 8 rows looked at an answer goes on with the user's next turn") and "in f:1" in said
    assert notes([rows[0] | {"rejected": "The user: human\n\nHumans: many"}, *rows[1:]]) == []
