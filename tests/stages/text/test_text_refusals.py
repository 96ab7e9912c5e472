"""Refusals by the phrases they begin with."""

from __future__ import annotations

import json

import pytest

from stages.data import data_path, read_data
from stages.text.refusals import refusal, without_phrases

REFUSALS = [
    ("en", "I’m sorry, but I can’t assist with that request."),
    ("en", "**Sorry**, I can not ... As an AI developed by nobody in particular, I cannot take sides."),
    ("en", "Unfortunately, I can't share that."),
    ("en", "I am really sorry, but I cannot do this for you."),
    ("en", "I can not help you there."),
    ("nl", "Sorry, maar ik kan daar geen antwoord op geven."),
    ("zh-Hans", "对不起，但我不能这样做。"),
    ("de", "Es tut mir leid, aber ich kann dir dabei nicht helfen."),
    ("de", "Leider kann ich Ihnen bei dieser Anfrage nicht weiterhelfen."),
    ("fr", "Je suis désolé, mais je ne peux pas vous aider à fabriquer une arme."),
    ("es", "Lo siento, pero no puedo ayudarte con eso."),
    ("it", "Mi dispiace, ma non posso fornire istruzioni di questo tipo."),
    ("pt-BR", "Desculpe, mas não posso ajudar com isso."),
    ("nl", "Het spijt me, maar ik kan u hier niet bij helpen."),
    ("ru", "К сожалению, я не могу помочь вам с этим запросом."),
    ("tr", "Üzgünüm, bu konuda size yardımcı olamam."),
    ("ar", "عذرًا، لا يمكنني المساعدة في هذا الطلب."),
    ("arz", "آسف، لكن لا أستطيع تقديم هذه المعلومات."),
    ("hi", "क्षमा करें, मैं इस अनुरोध में आपकी मदद नहीं कर सकता।"),
    ("bn", "দুঃখিত, আমি এই বিষয়ে সাহায্য করতে পারি না।"),
    ("id", "Maaf, saya tidak dapat membantu permintaan itu."),
    ("vi", "Xin lỗi, tôi không thể giúp bạn việc này."),
    ("th", "ขออภัยค่ะ ดิฉันไม่สามารถให้ข้อมูลนี้ได้"),
    ("zh-Hans", "抱歉，我无法提供这方面的信息。"),
    ("zh-Hant", "對不起，我無法協助您完成這項要求。"),
    ("ja", "申し訳ありませんが、そのご依頼にはお応えできません。"),
    ("ko", "죄송하지만 그 요청은 도와드릴 수 없습니다."),
    ("sw", "Samahani, siwezi kukusaidia na ombi hilo."),
    ("sw", "I cannot assist with that."),  # models refuse in English in every language
    ("lo", "I'm unable to help with this."),
    ("xx", "I AM UNABLE TO DO THIS."),
]
ANSWERS = [
    ("en", "Gandhi cannot help you understand the theorem, but Euclid can."),
    ("en", "I can't help but smile: what a lovely poem."),
    ("en", "I'm sorry to hear that your cat is ill. Take it to a vet today."),
    ("en", "Here is the letter you asked for. " + "It is long. " * 20 + "I cannot help with that."),
    ("en", "Sorry, I can see why that is confusing: the second step needs the first one's result."),
    ("de", "Tut mir leid, aber ich kann deinen Ärger verstehen. Es war nicht fair."),
    ("zh-Hans", "抱歉，但我认为答案是四。"),
    ("nl", "Sorry, maar ik kan me voorstellen dat het lastig is."),
    ("de", "Ich kann das gut verstehen. Das würde nicht helfen."),
    ("fr", "Je ne peux que vous recommander ce livre."),
    ("es", "Puedo ayudarte con eso: primero mezcla la harina."),
    ("zh-Hans", "当然可以，我能帮助您。"),
    ("ja", "もちろんです。お手伝いします。"),
    ("ko", "물론입니다. 도와드릴 수 있습니다."),
    ("en", ""),
    ("th", "…"),
]


@pytest.mark.parametrize(("language", "text"), REFUSALS)
def test_a_refusal_is_found_by_its_beginning(language: str, text: str) -> None:
    assert refusal(text, language)


@pytest.mark.parametrize(("language", "text"), ANSWERS)
def test_an_answer_is_no_refusal(language: str, text: str) -> None:
    assert refusal(text, language) == ""


def test_the_examples_are_told_apart_in_every_language_that_has_a_list() -> None:
    """The lists were made with them in view: what this holds is that no list loses them. Hard ones: reported speech, apologies that refuse nothing."""
    rows = [line.split("\t") for line in read_data("refusals/examples.tsv").splitlines()]
    wrong = [(code, text) for code, refuses, text in rows if bool(refusal(text, code)) != (refuses == "1")]
    assert wrong == []
    assert without_phrases({code for code, _, _ in rows}) == [] and len({code for code, _, _ in rows}) == 19


@pytest.mark.parametrize(
    "text",
    [
        "The manual is clear. Nothing in it is broken. I cannot help with that.",
        "— I cannot help you, — said the fox.",
        "He said: “I won't do that”.",
        "If I can't answer, ask my colleague.",
        "Dear all: I cannot assist with the move.",
    ],
)
def test_what_somebody_else_says_or_comes_late_is_no_refusal(text: str) -> None:
    assert refusal(text, "en") == ""


@pytest.mark.parametrize(
    "text", ["\"I'm sorry, but I can't help with that.\"", "I'm afraid that I cannot help with that."]
)
def test_an_answer_in_quotation_marks_may_refuse(text: str) -> None:
    assert refusal(text, "en")


def test_no_answer_of_the_shipped_pairs_is_taken_for_a_refusal() -> None:
    files = sorted(data_path("authored_pairs").glob("*.jsonl"))
    rows = [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(files) > 10
    found = [
        (row["language"], text)
        for row in rows
        for text in (row["chosen"], row["rejected"])
        if refusal(text, row["language"])
    ]
    assert found == []


def test_a_language_without_a_list_is_named_and_varieties_have_their_languages() -> None:
    assert without_phrases(["en", "lo", "zh-Hant", "arz", "pt-BR", "am"]) == ["lo", "am"]


def test_long_answers_and_gaps_cost_nothing() -> None:
    assert refusal("ich kann " * 100_000, "de") == ""
    assert refusal("x" * 1_000_000 + "i cannot help with", "en") == ""
