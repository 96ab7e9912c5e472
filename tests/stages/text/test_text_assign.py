from __future__ import annotations

from collections import Counter

import pytest

from schemas.config.sources import LanguageConfig
from schemas.errors import UserError
from stages.text.assign import RunLanguages, Splitter, Spoken, group_of
from stages.text.messages import BadRow


def languages(*seen: str, **config: object) -> RunLanguages:
    return RunLanguages(LanguageConfig.model_validate({"seen": list(seen), **config}))


@pytest.mark.parametrize(
    ("seen", "code", "language"),
    [
        (["en", "zh"], "en-US", "en"),
        (["en", "zh"], "zho", "zh"),
        (["en", "zh"], "zh_TW", "zh"),
        (["en", "zh"], "cmn", "zh"),
        (["zh-Hans", "zh-Hant"], "zh-CN", "zh-Hans"),
        (["zh-Hans", "zh-Hant"], "zh-TW", "zh-Hant"),
        (["pt-BR", "pt-PT"], "pt-PT", "pt-PT"),
        (["nb"], "no", "nb"),
        (["he"], "iw", "he"),
        (["en", "en-GB"], "en-US", "en"),
        (["en-GB", "en"], "en-AU", "en"),
        (["pt", "pt-BR"], "pt-PT", "pt"),
        (["es", "es-MX"], "es-419", "es"),
        (["sr-Latn"], "sr-RS", "sr-Latn"),
        (["ar", "arz"], "arb", "ar"),
    ],
)
def test_codes_stand_for_the_runs_language_they_are_a_variety_of(seen: list[str], code: str, language: str) -> None:
    assert languages(*seen).match(code) == (language,)


@pytest.mark.parametrize(
    ("seen", "code", "reason"),
    [
        (["en"], "Anglais", "invalid_language"),
        (["en"], "xx", "invalid_language"),
        (["en"], "de", "language_not_in_run"),
        (["zh-Hans"], "zh-TW", "language_not_in_run"),
        (["pt-BR", "pt-PT"], "pt", "language_not_in_run"),
    ],
)
def test_other_codes_are_bad_rows(seen: list[str], code: str, reason: str) -> None:
    with pytest.raises(BadRow) as bad:
        languages(*seen).match(code)
    assert bad.value.reason == reason


@pytest.mark.parametrize(
    ("seen", "code", "detail"),
    [
        (["pt-BR", "pt-PT"], "pt", "pt stands for several of the run's: pt-BR, pt-PT"),
        (["es-ES", "es-MX"], "es-419", "stands for several of the run's: es-ES, es-MX"),
        (["nb", "nn"], "no", "stands for several of the run's: nb, nn"),
        (["ko"], "kr", "kr (kr is Kanuri; Korean is ko)"),
        (["de"], "kr", "kr"),
        (["ja"], "jp", "did you mean ja?"),
        (["zh"], "cn", "did you mean zh?"),
    ],
)
def test_what_a_code_may_have_meant_is_said(seen: list[str], code: str, detail: str) -> None:
    with pytest.raises(BadRow) as bad:
        languages(*seen).match(code)
    assert bad.value.detail.endswith(detail)


def test_a_languages_code_that_is_a_countrys_too_is_explained() -> None:
    assert "(kr is Kanuri; Korean is ko)" in languages("kr", "en").notes[0]
    run = languages("se")
    swedish = Spoken(text := "Vad heter huvudstaden i Sverige, och hur många bor där?", run.guess([text])[0])
    with pytest.raises(BadRow, match=r"se is Northern Sami; Swedish is sv"):
        run.settle(("se",), [swedish])


def test_labels_come_from_the_cell_then_from_the_source() -> None:
    run = languages("en", "de")
    assert [run.label(cell, "de") for cell in ("en", " ", None, "und")] == [("en",), ("de",), ("de",), ("de",)]
    assert run.label(None, None) is None
    assert [
        run.label(cell, None) for cell in ("python", "C++", "R", "lua", "cobol", "jsx", "XML", "Nolang", "mixed")
    ] == [None] * 9


def identified(run: RunLanguages, *texts: str) -> str:
    return run.settle(None, [Spoken(text, found) for text, found in zip(texts, run.guess(texts), strict=True)])


@pytest.mark.parametrize("seen", [("ja",), ("ja", "zh"), ("en", "ja", "zh-Hans")])
def test_a_title_of_chinese_characters_is_in_the_language_of_its_japanese_answer(seen: tuple[str, ...]) -> None:
    run, answer = languages(*seen), "選挙の結果はこちらです。現職が当選しました。"
    for title in ("東京都知事選挙結果", "明治維新概要", "日本国憲法第九条全文", "夏目漱石略歴"):
        assert identified(run, title, answer) == "ja"
    for asked in (
        "请把这句话翻译成日语",
        "請翻譯這句話成日語",
        "用日文寫一首詩",
        "翻譯：今天天氣很好",
        "以日文介紹富士山",
    ):
        if len(seen) > 1:
            assert identified(run, asked, answer).startswith("zh")
        else:
            with pytest.raises(BadRow, match="language_not_in_run"):
                identified(run, asked, answer)


def test_kurdish_without_a_label_is_told_by_its_script() -> None:
    sorani = "کەی زانکۆی سەلاحەددین دامەزراوە و چەند قوتابی هەیە؟"
    kurmanji = "Zanîngeha Dihokê kengî hatiye damezrandin û çend xwendekar lê hene?"
    both = languages("kmr", "ckb")
    assert (identified(both, sorani), identified(both, kurmanji)) == ("ckb", "kmr")
    for one, other in (("ckb", kurmanji), ("kmr", sorani)):
        with pytest.raises(BadRow, match="language_not_in_run"):
            identified(languages(one, "en"), other)
    assert identified(languages("ku"), sorani) == "ku" == identified(languages("ku", "en"), kurmanji)


def test_split_shares_follow_the_fractions_and_ignore_the_language() -> None:
    splitter = Splitter(7, ["th"], 0.1, 0.2, remember=False)
    groups = [f"g{i}" for i in range(5000)]
    english = [splitter.split("en", group, None, "r") for group in groups]
    assert english == [splitter.split("sw", group, None, "r") for group in groups]
    shares = {split: count / 5000 for split, count in Counter(english).items()}
    assert shares == pytest.approx({"dev": 0.1, "test": 0.2, "train": 0.7}, abs=0.02)
    assert {splitter.split("th", group, None, "r") for group in groups} == {"unseen"}


def test_a_group_keeps_its_first_split_and_other_words_are_refused() -> None:
    splitter = Splitter(0, [], 0.0, 0.0, remember=True)
    assert [splitter.split("en", "g", own, "r") for own in ("test", "train", None)] == ["test"] * 3
    assert len(splitter_notes := list(splitter.notes())) == 1 and "1 rows are in the split" in splitter_notes[0]
    assert splitter.held_out(["en"]) == (
        "1 by a `split` of their own, 2 with the rest of their translation group (`fields.group_id`)"
    )
    with pytest.raises(UserError, match="'valid' is not a split"):
        splitter.split("en", "g", "valid", "file:3")


def test_rows_that_another_source_holds_out_through_their_group_are_said() -> None:
    splitter = Splitter(0, [], 0.0, 0.0, remember=True)
    for number in range(3):
        assert splitter.split("en", str(number), "test", f"test.jsonl:{number}", source="test.jsonl") == "test"
    found = [splitter.split("en", str(n), None, f"train.jsonl:{n}", source="train.jsonl") for n in range(6)]
    assert found == ["test"] * 3 + ["train"] * 3
    (note,) = splitter.notes()
    assert note.startswith("3 rows of train.jsonl that name no split are in test") and "fields.group_id: null" in note
    # in one source, a split named once is meant for the whole group
    splitter = Splitter(0, [], 0.0, 0.0, remember=True)
    assert [splitter.split(code, "g", own, "r", source="a") for code, own in (("en", "test"), ("de", None))] == [
        "test",
        "test",
    ]
    assert not list(splitter.notes())


def test_groups_default_to_the_row_itself() -> None:
    assert [group_of(cell, "own") for cell in (" g ", 7, "", None)] == ["g", "7", "own", "own"]
