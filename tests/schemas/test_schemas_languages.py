"""Languages in a config: what is refused says what may be meant."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from schemas.config.sources import LanguageConfig, PromptSource
from schemas.languages import country_of


@pytest.mark.parametrize(
    ("seen", "says"),
    [
        (["English"], r"'English' is not a BCP 47 language code .*; did you mean en \(English\)\?"),
        (["Deutsch"], r"did you mean de \(German\)\?"),
        (["englich"], r"did you mean en \(English\)\?"),
        (["jp"], r"did you mean ja \(Japanese\)\?"),
        (["en", "ua"], r"did you mean uk \(Ukrainian\)\?"),
        (["und"], "'und' is no one language's code"),
        (["mul"], "'mul' is no one language's code"),
        (["x-klingon"], "'x-klingon' is no one language's code"),
        (["en", "de", "eng"], "en, eng are one language, listed twice"),
        (["tl", "fil"], "tl, fil are one language, listed twice"),
    ],
)
def test_what_is_no_language_is_refused_with_what_may_be_meant(seen: list[str], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        LanguageConfig(seen=seen)


def test_a_sources_language_is_checked_with_the_config() -> None:
    with pytest.raises(ValidationError, match=r"'englich' .* no language's name; did you mean en \(English\)\?"):
        PromptSource(path="a.jsonl", language="englich")
    for word in ("German", "deu_Latn", "zh-TW", "nan", "de_AT.UTF-8"):
        assert PromptSource(path="a.jsonl", language=word).language == word


def test_codes_of_countries_mean_the_language_most_spoken_there() -> None:
    meant = {"kr": "ko", "se": "sv", "tw": "zh-Hant", "dk": "da", "jp": "ja", "cn": "zh", "cz": "cs", "gr": "el"}
    meant |= {"ua": "uk", "vn": "vi", "kz": "kk", "de": None, "uk": None, "xx": None, "deu": None}
    assert {code: country_of(code) for code in meant} == meant
