"""Which languages of a run the identifier does not know, cannot tell apart, or mistakes for another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import combinations

from schemas.config.sources import LanguageConfig
from stages.checks.examples import shipped
from stages.checks.finding import Finding
from stages.text.language import identify, same_language, unidentifiable

_TOLERATED = 0.05
_LABEL = "Give such rows a language column or set the source's `language`; languages.identify: false takes all labels."


def language_findings(config: LanguageConfig) -> Iterator[Finding]:
    """Measured on the shipped prompts and authored pairs of the run's languages."""
    codes = config.codes
    if not config.identify:
        yield Finding("languages", "ok", "identification is off: every label is taken as it is")
        return
    unknown = unidentifiable(codes)
    if unknown:
        yield Finding(
            "languages",
            "warning",
            f"the identifier does not know {', '.join(unknown)}: nothing is dropped there",
            _LABEL,
        )
    for one, other in combinations([code for code in codes if code not in unknown], 2):
        if same_language(one, other):
            yield Finding("languages", "warning", f"{one} and {other} cannot be told apart by the identifier", _LABEL)
    checked = 0
    for code in codes:
        texts = [text for row in shipped("prompts", code) for text in [row["prompt"]]]
        texts += [row[side] for row in shipped("authored_pairs", code) for side in ("prompt", "chosen")]
        if code in unknown or not texts:
            continue
        checked += len(texts)
        found = identify(texts, codes)
        wrong = Counter(language for language, sure in found if not same_language(language, code))
        weak = sum(sure < config.min_confidence and same_language(language, code) for language, sure in found)
        if wrong.total() > _TOLERATED * len(texts):
            others = ", ".join(f"{language} ({count})" for language, count in wrong.most_common(3))
            yield Finding(
                "languages",
                "warning",
                f"{wrong.total()} of {len(texts)} texts in {code} are taken for {others}",
                _LABEL,
            )
        if weak > _TOLERATED * len(texts):
            yield Finding(
                "languages",
                "warning",
                f"{weak} of {len(texts)} texts in {code} get less than languages.min_confidence {config.min_confidence}",
                "Lower languages.min_confidence: such rows are dropped as low_confidence.",
            )
    unchecked = [code for code in codes if code not in unknown and not shipped("prompts", code)]
    more = f"; no texts to check {', '.join(unchecked)} with" if unchecked else ""
    yield Finding("languages", "ok", f"{checked} texts in {len(codes) - len(unchecked) - len(unknown)} languages{more}")
