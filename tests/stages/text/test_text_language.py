from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.languages import base_language
from stages.data import data_path
from stages.text.language import identify, same_language, unidentifiable

LANGUAGES = ["en", "de", "es", "fr", "ru", "zh", "ja", "ar", "hi", "sw", "it", "ko", "th"]


def shipped() -> list[tuple[str, str]]:
    texts = []
    for language in LANGUAGES:
        for line in data_path(f"authored_pairs/{language}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            texts += [(language, row["prompt"]), (language, row["chosen"])]
    return texts


def test_shipped_texts_are_identified_with_enough_confidence_to_stay() -> None:
    texts = shipped()
    found = identify([text for _, text in texts], LANGUAGES)
    assert [language for language, _ in found] == [language for language, _ in texts]
    assert min(confidence for _, confidence in found) >= 0.5


def test_a_language_outside_the_run_is_not_taken_for_its_nearest_relative() -> None:
    italian = [text for language, text in shipped() if language == "it"]
    found = identify(italian, ["es", "fr", "en"])
    assert sum(language == "it" for language, _ in found) >= 0.95 * len(italian)


def test_a_run_of_one_language_still_notices_another_script() -> None:
    assert identify(["Почему небо голубое? Объясни подробно."], ["en"])[0][0] == "ru"


@pytest.mark.parametrize("text", ["", "   ", "12 + 30 = ?", "🎉🎉", "—…!"])
def test_text_without_letters_is_und_with_zero_confidence(text: str) -> None:
    assert identify([text], LANGUAGES) == [("und", 0.0)]


def test_codes_come_out_as_base_languages() -> None:
    chinese = "请用一句话解释雨后为什么有时会出现彩虹。"
    assert identify([chinese], ["zh-Hans", "ja"])[0][0] == "zh"
    norwegian = "Hvorfor er himmelen blå når sola skinner, og hvorfor blir den rød om kvelden?"
    assert identify([norwegian], ["nb", "de"])[0][0] == "nb"
    assert identify([norwegian], ["de", "nn", "nb"])[0][0] == "nb"


def test_varieties_of_one_macrolanguage_compare_as_the_same() -> None:
    assert base_language("zh-Hant-TW") == "zh"
    assert same_language("arz", "ar") and same_language("yue", "zh-Hans") and same_language("tl", "fil")
    assert not same_language("es", "pt")


def test_languages_the_identifier_does_not_know_are_named() -> None:
    assert unidentifiable(["en", "ti", "zh-Hans", "nb", "fil"]) == ["ti"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=5))
def test_any_text_gets_a_code_and_a_probability_whatever_it_is_batched_with(texts: list[str]) -> None:
    found = identify(texts, ["en", "ar", "zh"])
    assert found == [identify([text], ["en", "ar", "zh"])[0] for text in texts]
    assert all(0.0 <= confidence <= 1.0 and base_language(code) == code for code, confidence in found)


def test_lone_surrogates_do_not_stop_it() -> None:
    assert identify(["hello there \ud83d how are you today"], ["en", "de"])[0][0] == "en"
