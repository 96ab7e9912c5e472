"""Codes and names as data sets write them, macrolanguages of ISO 639-3, scripts of texts."""

from __future__ import annotations

from unicodedata import normalize

import langcodes
import pytest

from schemas.config.sources import LanguageConfig
from schemas.languages import macrolanguage, standard
from stages.text.assign import SURE, RunLanguages, Spoken
from stages.text.codes import counts_for, same_language
from stages.text.messages import BadRow
from stages.text.scripts import script_in

EXCEPTIONS = {"acm": "ar", "pbt": "ps", "quy": "qu", "fuv": "ff"}
ARABIC = [
    "aao",
    "abh",
    "abv",
    "acm",
    "acq",
    "acw",
    "acx",
    "acy",
    "adf",
    "aeb",
    "aec",
    "afb",
    "apc",
    "apd",
    "arb",
    "arq",
    "ars",
    "ary",
    "arz",
    "auz",
    "avl",
    "ayh",
    "ayl",
    "ayn",
    "ayp",
    "pga",
    "shu",
    "ssh",
]


@pytest.mark.parametrize(
    ("written", "code"),
    [
        ("swh_Latn", "swh-Latn"), ("cmn_Hani", "cmn"), ("zho_Hant", "zh-Hant"), ("zh_TW", "zh-TW"), ("iw", "he"),
        ("English", "en"), ("german", "de"), ("Deutsch", "de"), ("Français", "fr"), ("日本語", "ja"), ("Kiswahili", "sw"),
        ("Simplified Chinese", "zh-Hans"), ("Chinese (Traditional)", "zh-Hant"), ("Brazilian Portuguese", "pt-BR"),
        ("Greek", "el"), ("Persian", "fa"), ("Norwegian Bokmål", "nb"), ("xx", None), ("gibberish", None), ("12", None),
        ("e" * 10_000, None), ("English (United States)", "en-US"), ("Serbian (Latin)", "sr-Latn"), ("Arabic (Egypt)", "ar-EG"),
        ("German (old)", None), ("Modern Greek", "el"), ("Greek, Modern (1453-)", "el"), ("Modern Greek (1453-)", "el"),
        ("Western Persian", "pes"), ("Eastern Panjabi", "pa"), ("Spanish; Castilian", "es"), ("Catalan; Valencian", "ca"),
        ("English; German", None), ("Chinese, Mandarin", "zh"), ("Levantine Arabic", "apc"), ("हिंदी", "hi"), ("Azeri", "az"),
        ("普通话", "zh"), ("中文（简体）", "zh-Hans"), ("中文（繁體）", "zh-Hant"), (";", None), (", ", None),
        ("\ufeffen", "en"), ("en\u200b", "en"), ("\u200fhe", "he"), ("ｅｎ", "en"), ("['en']", "en"), ('["de"]', "de"), ("[en]", None),
        ("Slovene", "sl"), ("Persian (Farsi)", "fa"), ("Norwegian (Bokmål)", "nb"), ("Chinese - Simplified", "zh-Hans"),
        ("Portuguese - Brazil", "pt-BR"), ("English, US", "en-US"), ("Frisian", "fy"), ("Hokkien", "nan"), ("Konkani", "kok"),
        ("Modern Hebrew", "he"), ("Hebrew (modern)", "he"), ("português do Brasil", "pt-BR"), ("Latin American Spanish", "es-419"),
        ("Arabic (Egyptian)", "arz"), ("Chinese (Cantonese)", "yue"), ("Swedish (sv)", "sv"), ("Portuguese (PT)", "pt-PT"),
        ("Serbo-Croatian", "sr-Latn"), ("sh", "sr-Latn"), ("en, de", None), ("en,de", None), ("English, German", None),
        ("Serbian, Croatian", None), ("Norwegian - Danish", None),
        ("serbian_latin", "sr-Latn"), ("Chinese-Simplified", "zh-Hans"), ("US English", "en-US"), ("Persian/Farsi", "fa"), ("en/de", None),
        ("nepali_(individual)", "ne"), ("Bokmal", "nb"), ("Yorùbá", "yo"), ("turkce", "tr"), ("Toba Batak", "bbc"), ("繁体中文", "zh-Hant"),
        ("new english", None), ("english latin american", None),
    ],
)  # fmt: skip
def test_codes_and_names_are_read_as_bcp_47(written: str, code: str | None) -> None:
    assert standard(written) == code


@pytest.mark.parametrize(
    ("name", "code"),
    [("Français", "fr"), ("Español", "es"), ("Português", "pt"), ("Čeština", "cs"), ("Türkçe", "tr"), ("Tiếng Việt", "vi"), ("한국어", "ko")],
)  # fmt: skip
def test_names_in_decomposed_letters_are_read(name: str, code: str) -> None:
    assert normalize("NFD", name) != name and standard(normalize("NFD", name)) == code


def test_all_of_arabic_and_what_langcodes_leaves_out_count_for_their_macrolanguage() -> None:
    assert {code: macrolanguage(code) for code in EXCEPTIONS} == EXCEPTIONS
    assert all(counts_for(code, "ar") for code in ARABIC)


def test_macrolanguages_agree_with_unicodes_aliases() -> None:
    """CLDR's list (langcodes' macro=True) is independent of the IANA registry's that is used here."""
    from langcodes.data_dicts import MACROLANGUAGES

    found = {code: over for code, over in MACROLANGUAGES.items() if len(code) == 3 and code != "prs"}
    assert len(found) > 20
    wrong = {code: macrolanguage(code) for code, over in found.items() if macrolanguage(code) != macrolanguage(over)}
    assert wrong == {}


FLORES = {
    "swh_Latn": "sw", "pes_Arab": "fa", "npi_Deva": "ne", "zsm_Latn": "ms", "arb_Arab": "ar", "nob_Latn": "no", "lvs_Latn": "lv",
    "ekk_Latn": "et", "khk_Cyrl": "mn", "azj_Latn": "az", "uzn_Latn": "uz", "plt_Latn": "mg", "als_Latn": "sq", "gaz_Latn": "om",
    "pbt_Arab": "ps", "ory_Orya": "or", "quy_Latn": "qu", "kmr_Latn": "ku", "ckb_Arab": "ku", "fuv_Latn": "ff", "acm_Arab": "ar",
    "cmn_Hani": "zh", "ydd_Hebr": "yi", "ayr_Latn": "ay", "dik_Latn": "din", "tgl_Latn": "fil",
}  # fmt: skip


def test_flores_codes_stand_for_the_runs_languages() -> None:
    run = RunLanguages(LanguageConfig(seen=list(dict.fromkeys(FLORES.values())), identify=False))
    assert {code: run.match(code) for code in FLORES} == {code: (language,) for code, language in FLORES.items()}


def test_near_languages_are_not_each_others_labels() -> None:
    for seen, code in ((["arz"], "ary"), (["nb"], "nn"), (["hr"], "sr"), (["id"], "ms"), (["pt"], "es")):
        with pytest.raises(BadRow, match="language_not_in_run"):
            RunLanguages(LanguageConfig(seen=seen, identify=False)).match(code)
    assert same_language("arz", "ary") and not same_language("pt", "es")


def settle(seen: list[str], label: str | None, *texts: str, **config: float) -> str:
    run = RunLanguages(LanguageConfig.model_validate({"seen": seen, **config}))
    guesses = run.guess(texts)
    said = [Spoken(text, found) for text, found in zip(texts, guesses, strict=True)]
    return run.settle(run.match(label) if label else None, said)


TRADITIONAL, SIMPLIFIED = "請問香港最高的山是哪一座？請用完整的句子回答。", "请问北京最高的山是哪一座？"


@pytest.mark.parametrize(
    ("seen", "label", "text", "language"),
    [
        (["zh-Hans", "zh-Hant"], None, TRADITIONAL, "zh-Hant"),
        (["zh-Hans", "zh-Hant"], "cmn_Hani", TRADITIONAL, "zh-Hant"),
        (["zh-Hans", "zh-Hant"], "zh", SIMPLIFIED, "zh-Hans"),
        (["zh-Hant", "en"], None, TRADITIONAL, "zh-Hant"),
        (["zh-Hant", "en"], None, SIMPLIFIED, "zh-Hant"),
        (["zh-Hant"], "zh", TRADITIONAL, "zh-Hant"),
        (["sr-Latn", "en"], None, "Koji je glavni grad Srbije i kada je osnovan? Objasni ukratko.", "sr-Latn"),
        (["sr-Latn", "sr-Cyrl"], "sr-RS", "Који је главни град Србије и када је основан?", "sr-Cyrl"),
        (["sr-Latn", "sr-Cyrl"], "sr-RS", "Koji je glavni grad Srbije i kada je osnovan? Objasni ukratko.", "sr-Latn"),
        (["sr-Latn", "sr-Cyrl"], "sr", "Који је главни град Србије и када је основан?", "sr-Cyrl"),
        (["uz-Cyrl", "en"], None, "Ўзбекистоннинг пойтахти қайси шаҳар ва у қачон ташкил топган?", "uz-Cyrl"),
        (
            ["pa-Arab", "en"],
            None,
            "مینوں پنجابی زبان بارے کجھ دسو تے ایہ وی دسو پئی ایہ کتھے بولی جاندی اے۔",
            "pa-Arab",
        ),
        (["pa-Arab", "pa-Guru"], None, "ਪੰਜਾਬ ਦੀ ਰਾਜਧਾਨੀ ਕੀ ਹੈ ਅਤੇ ਇਹ ਕਦੋਂ ਬਣੀ?", "pa-Guru"),
    ],
)
def test_the_script_is_looked_at(seen: list[str], label: str | None, text: str, language: str) -> None:
    assert settle(seen, label, text) == language


def test_a_text_in_a_script_the_run_does_not_have_is_not_taken_for_another() -> None:
    with pytest.raises(BadRow, match="language_not_in_run"):
        settle(["sr-Latn", "en"], None, "Који је главни град Србије и када је основан?")


ENGLISH, GERMAN = (
    "The weather today is really very nice and warm outside.",
    "Das Wetter ist heute wirklich schön und warm.",
)


@pytest.mark.parametrize(
    ("label", "texts"),
    [
        ("en", ["Generate a haiku poem."]),
        ("en", ["12 + 30 = ?"]),
        ("de", ["🎉🎉"]),
        ("de", ["https://example.org/watch?v=aXbYcZ"]),
        ("de", ["def f(x):\n    return x + 1"]),
        ("de", ["```python\nfor line in open(name): print(line)\n```"]),
        ("hi", ["mujhe bharat ke baare mein kuch batao aur yeh bhi batao ki yahan kaun si bhasha boli jaati hai"]),
        ("de", ["Übersetze das bitte ins Englische: Das Wetter ist schön.", ENGLISH]),
        ("en", [f"Translate this sentence into English, please: „{GERMAN} {GERMAN}“"]),
    ],
)
def test_a_label_is_believed_where_the_identifier_cannot_judge(label: str, texts: list[str]) -> None:
    assert settle(["en", "de", "hi"], label, *texts) == label


def test_a_label_in_a_script_the_identifier_has_not_seen_is_believed_and_said() -> None:
    assert settle(["kk-Arab", "en"], "kk", "قازاقستاننىڭ استاناسى قاي قالا؟") == "kk-Arab"
    assert settle(["az-Cyrl", "en"], "az", "Азәрбајҹанын пајтахты һансы шәһәрдир?") == "az-Cyrl"
    notes = RunLanguages(LanguageConfig(seen=["kk-Arab", "sr-Latn", "zh-Hant", "en"])).notes
    assert len(notes) == 1 and "does not know kk-Arab in this script" in notes[0]


def test_a_wrong_label_is_found_in_prompt_and_answer_and_never_with_confidence_zero() -> None:
    with pytest.raises(BadRow, match="wrong_language"):
        settle(["en", "de"], "de", ENGLISH, "It was even warmer yesterday, when we went to the lake.")
    assert settle(["en", "de"], "de", ENGLISH, min_confidence=0) == "de"
    assert settle(["en"], None, "123", min_confidence=0) == "en"
    with pytest.raises(BadRow, match="no_language"):
        settle(["en", "de"], None, "123", min_confidence=0)


@pytest.mark.parametrize("texts", [["12*12=?", "144"], ["Hi", "Hello!"], ["ok", "Sure."]])
def test_in_a_run_of_one_language_what_says_none_is_in_it(texts: list[str]) -> None:
    assert settle(["en"], None, *texts) == "en" == settle(["en"], None, *texts, identify=False)
    for seen, text in ((["en", "es"], texts), (["en"], ["Да", "Ок"]), (["en"], [GERMAN, "Morgen wird es regnen."])):
        with pytest.raises(BadRow) as bad:
            settle(seen, None, *text)
        if len(seen) > 1:
            assert "no column says it, nor the source's `language`" in bad.value.detail


def test_rows_without_a_label_take_the_prompts_language_and_short_ones_that_of_both() -> None:
    assert settle(["en", "de"], None, "Translate into German, please: The weather is nice.", GERMAN) == "en"
    assert settle(["en", "de"], None, "7 * 6", GERMAN) == "de"


@pytest.mark.parametrize(
    ("run", "prompt", "answer", "found"),
    [
        (
            "ru",
            "Какво е демокрация?",
            "Демокрацията е форма на управление, при която властта принадлежи на народа.",
            "bg",
        ),
        (
            "da",
            "Hva er hovedstaden i Norge?",
            "Hovedstaden i Norge er Oslo. Byen ligger innerst i Oslofjorden og har mange innbyggere.",
            "no",
        ),
        ("da", "Hvorfor er himmelen blå?", "Himmelen er blå fordi luften sprer det blå lyset mer enn det røde.", "no"),
        (
            "ca",
            "¿Qué es la inflación?",
            "La inflación es el aumento general de los precios durante un período de tiempo.",
            "es",
        ),
        ("hi", "नेपालको राजधानी कुन हो?", "नेपालको राजधानी काठमाडौं हो। यो सहर देशको सबैभन्दा ठूलो सहर हो।", "ne"),
        ("hi", "आकाश निळे का दिसते?", "हवेतील कण निळा प्रकाश जास्त विखुरतात म्हणून आकाश निळे दिसते.", "mr"),
    ],
)
def test_rows_without_a_label_in_a_near_relative_of_the_runs_language_are_none_of_it(
    run: str, prompt: str, answer: str, found: str
) -> None:
    languages = RunLanguages(LanguageConfig(seen=[run, "en"]))
    first, _ = languages.guess([prompt, answer])
    assert first.code == run and first.alone < SURE
    with pytest.raises(BadRow) as bad:
        settle([run, "en"], None, prompt, answer)
    assert (bad.value.reason, bad.value.detail) == ("language_not_in_run", found)


@pytest.mark.parametrize(
    ("run", "other", "prompt", "answer"),
    [
        (
            "de",
            "en",
            "Wer ist Larry Page?",
            "Larry Page is one of the founders of Google, which he led for some years.",
        ),
        ("de", "ar", "Wer ist Larry Page?", "```python\nprint(1)\n```"),
        (
            "de",
            "ar",
            "Wer ist Larry Page?",
            "Larry Page est un informaticien américain, l'un des fondateurs de Google.",
        ),
        ("en", "ar", "What is Atlantis?", GERMAN),
        ("hi", "ar", "भारत की राजधानी क्या है?", "दिल्ली"),
        (
            "hi",
            "ar",
            "भारत की राजधानी क्या है?",
            "La capitale de l'Inde est New Delhi, une ville de plusieurs millions d'habitants.",
        ),
    ],
)
def test_short_prompts_of_the_run_keep_their_rows_whatever_the_answer_is_in(
    run: str, other: str, prompt: str, answer: str
) -> None:
    languages = RunLanguages(LanguageConfig(seen=[run, other]))
    assert languages.guess([prompt])[0].alone < SURE
    assert settle([run, other], None, prompt, answer) == run


@pytest.mark.parametrize(
    ("text", "script"),
    [
        (TRADITIONAL, "Hant"),
        (SIMPLIFIED, "Hans"),
        ("你好", "Hani"),
        ("こんにちは世界", "Jpan"),
        ("안녕하세요", "Kore"),
        ("12 !", None),
    ],
)
def test_scripts_of_texts(text: str, script: str | None) -> None:
    assert script_in(text) == script


def test_every_individual_language_of_the_registry_counts_for_its_macrolanguage() -> None:
    from langcodes.registry_parser import parse_registry

    pairs = {
        entry["Subtag"]: entry["Macrolanguage"]
        for entry in parse_registry()
        if entry.get("Type") == "language" and entry.get("Macrolanguage", "sh") != "sh"  # deprecated: sr-Latn in CLDR
    }
    assert len(pairs) > 400
    assert [code for code, over in pairs.items() if not counts_for(code, langcodes.standardize_tag(over))] == []


@pytest.mark.parametrize("word", ["unknown", "Unknown", "und", "N/A", "-"])
def test_words_for_a_language_that_is_not_known_are_no_label(word: str) -> None:
    run = RunLanguages(LanguageConfig(seen=["en", "de"], identify=False))
    assert run.label(word, None) is None
    assert run.label(word, "German") == ("de",)


def test_a_class_number_is_called_one() -> None:
    with pytest.raises(BadRow) as bad:
        RunLanguages(LanguageConfig(seen=["en", "de"])).match("0")
    assert "number of a class" in bad.value.detail
