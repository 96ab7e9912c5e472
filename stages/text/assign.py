"""Which language of the run a row belongs to, and which split its translation group belongs to."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import langcodes

from schemas.config.sources import LanguageConfig
from schemas.errors import UserError
from schemas.ids import unit_interval
from schemas.languages import UNKNOWN, base_language, country_of, macrolanguage, says_none, standard, told_from_country
from stages.cells import cell_id, word
from stages.text.codes import counts_for, names_script, same_language, script_of, unusual_script
from stages.text.language import Guess, guess, unidentifiable
from stages.text.messages import BadRow, clean
from stages.text.scripts import fits, may_be_japanese, script_in

UNSEEN = "unseen"
_BY_SCRIPT = ("ku",)
"""Macrolanguages whose members the identifier takes for each other, and the script tells apart."""
_TITLE = 40
"""Characters that Japanese may do without kana for."""
_ASKS_IN_CHINESE = re.compile("[你您們们嗎吗麼么請请這这怎誰谁哪她它什很吧呢啊]|日[文語语]")
"""Signs of Chinese that Japanese written in Chinese characters alone has not, and Chinese names of Japanese."""
_SPLITS = ("train", "dev", "test")
_LONGEST = 2000  # characters looked at
_SAID = 3
"""Pairs of sources, at most, whose groups are said to meet."""
_BY_NAME, _BY_GROUP, _BY_HASH, _OF_UNSEEN = "name", "group", "hash", "unseen"
"""Why a row is not trained on."""
_Given = tuple[str, str]
"""The split of a translation group, and the source of the row that brought it."""


Label = tuple[str, ...]
"""The run's languages that a row's label can stand for; several only where the text's script decides between them."""

SURE = 0.7
"""The identifier's probability among all languages from which it is believed rather than a label. Of 5,000 prompts in 13
languages that are labelled right it says otherwise in 82, with this certainty in 66, of which all but 3 are tasks about a text
in another language; of those whose language is left out of the run, 97% are found with it."""
_LIKELY, _CERTAIN = 0.5, 0.9
"""The identifier's probability among all languages from which a text is taken for one outside the run against another text of its
row: where the run's languages have at most INSIDE of it, and where they have more. Of 41,742 rows of the Declaration of Human Rights
in a near relative of the run's language (58 runs; prompts cut at 30 to 120 characters) 1,285 are taken for that language instead of
6,917; of 29,907 in the run's own none is lost. With 0.8 instead of 0.9, 10 Indonesian ones are lost as Malay."""
_SEGMENT = re.compile(r"[\n\r\"“”„«»「」『』:：。！？!?]+|(?<=[.।]) ")
_LEAST = 12  # characters of a segment that is looked at
_SEGMENTS = 40
_CODE, _CODED = re.compile(r"[{}\[\]()<>=;_#|\\]"), 0.04
"""Characters of code without backticks, and their share from which an answer may be some."""


@dataclass(frozen=True)
class Spoken:
    """A text of a row (its prompt, its answer), and what the identifier says of it."""

    text: str
    guess: Guess


class RunLanguages:
    """The run's languages: matches codes to them and checks texts against them.

    notes: languages the identifier does not know; for those nothing is dropped. overruled: rows that keep a label which the
    identifier does not confirm. assumed: rows without a label that are in the run's one language because nothing says another.
    """

    def __init__(self, config: LanguageConfig) -> None:
        self.codes = config.codes
        self.overruled = self.assumed = 0
        self._config = config
        self._unidentifiable = set(unidentifiable(self.codes)) if config.identify else set(self.codes)
        self.notes = [
            f"the identifier does not know {code}: its texts are taken as labelled{_in_brackets(told_from_country(code))}"
            for code in self.codes
            if config.identify and code in self._unidentifiable
        ] + [
            f"the identifier does not know {code} in this script: rows without a label may be taken for another language"
            for code in self.codes
            if config.identify and unusual_script(code) and code not in self._unidentifiable
        ]

    def label(self, cell: Any, default: str | None) -> Label | None:
        """The run's language of a row's cell or, where the cell says nothing, of its source; None: to be identified.

        Raises BadRow as `match` does.
        """
        code = str(cell).strip() if cell == "nan" and "nan" in self.codes else word(cell)
        if code is not None and says_none(code) and code.casefold() not in map(str.casefold, self.codes):
            code = None
        wanted = code or default
        return None if wanted is None else self.match(wanted)

    def match(self, code: str) -> Label:
        """The run's language that a code or a language's name stands for: the same tag, else the only one it is a variety of.

        en-US stands for en, arz and arb_Arab for ar; zh-TW for zh but, being written in another script, not for zh-Hans. A
        code without a script stands for the language in any; in several, the text decides.

        Raises BadRow: invalid_language, language_not_in_run.
        """
        tag = standard(code)
        if tag is None:
            meant = country_of(code.strip())
            hint = f"; did you mean {meant}?" if meant else ""
            if code.strip().isdecimal():
                hint = ": it is the number of a class; write the names of the languages into the column"
            raise BadRow(
                "invalid_language", f"{code[:40]!r} is no BCP 47 code (en, de, zh-Hant) and no language's name{hint}"
            )
        same = next((language for language in self.codes if standard(language) == tag), None)
        if same is not None:
            return (same,)
        related = [language for language in self.codes if counts_for(tag, language) and _script_may_fit(tag, language)]
        own = [language for language in related if base_language(language) == base_language(tag)]
        related = sorted(own or related, key=lambda language: not _script_fits(tag, language))
        scripts = {script_of(language) for language in related}
        if len(related) > 1 and len(scripts) < len(related):
            parents = [language for language in related if langcodes.Language.get(language).territory is None]
            if len(parents) != 1:
                raise BadRow("language_not_in_run", f"{tag} stands for several of the run's: {', '.join(related)}")
            related = parents
        if not related:
            raise BadRow("language_not_in_run", tag + _in_brackets(self._meant(tag)))
        return tuple(related)

    def _meant(self, tag: str) -> str:
        """What to say of a code that is that of a country in which a language of the run is spoken."""
        meant = country_of(tag)
        return told_from_country(tag) if meant and any(counts_for(meant, language) for language in self.codes) else ""

    def guess(self, texts: Sequence[str]) -> list[Guess]:
        """As stages.text.language.guess; und everywhere when the config turns identification off."""
        return guess(texts, self.codes) if self._config.identify else [Guess(UNKNOWN, 0.0, 0.0)] * len(texts)

    def settle(self, label: Label | None, spoken: Sequence[Spoken]) -> str:
        """The row's language: its label unless what is spoken speaks against it, the identified one if it has no label.

        A label loses only where the identifier is sure (SURE) of another language in every text that it can judge, and no
        passage is in the label's: digits, code, romanised text, a translation task keep theirs. With min_confidence 0
        a label never loses.

        In a run of one language a row without a label is in it unless the identifier is as sure as min_confidence of another.

        Raises BadRow: wrong_language; low_confidence, language_not_in_run, no_language (rows without a label).
        """
        if label is None:
            return self._identified(spoken)
        language = self._written(label, spoken)
        if language in self._unidentifiable:
            return language
        verdicts = [self._verdict(language, part) for part in spoken]
        if not any(verdicts) and all(part.guess.code == UNKNOWN for part in spoken):
            return language
        if 1 not in verdicts:
            if -1 in verdicts and self._config.min_confidence > 0 and not self._in_passing(language, spoken):
                against = spoken[verdicts.index(-1)].guess
                meant = country_of(language)
                hint = told_from_country(language) if meant and same_language(against.code, meant) else ""
                raise BadRow("wrong_language", f"{against.code} {against.alone:.2f}{_in_brackets(hint)}")
            self.overruled += 1
        return language

    def chosen_strays(self, language: str, prompt: Spoken, chosen: Spoken, rejected: str) -> bool:
        """Whether the identifier is sure that chosen is in another language and rejected in the pair's own, which is then learnt as a
        fault. A task about a text in that other language is none, and neither is an answer with a passage in the pair's."""
        if language in self._unidentifiable or self._verdict(language, chosen) != -1:
            return False
        if len(chosen.text) < _LEAST or len(_CODE.findall(chosen.text)) > _CODED * len(chosen.text):
            return False
        said = chosen.guess.code
        (found,) = self.guess([rejected])
        at_home = same_language(found.code, language) and found.alone >= SURE
        return at_home and not (self._in_passing(language, [chosen]) or self._in_passing(said, [prompt]))

    def _verdict(self, language: str, part: Spoken) -> int:
        """1: the text is in the language, -1: it is in another one, 0: the identifier cannot say."""
        said = part.guess
        if said.code == UNKNOWN:
            return 0
        if same_language(said.code, language):
            return 1
        if said.alone < max(SURE, self._config.min_confidence):
            return 0
        script, wanted = script_in(part.text), script_of(language)
        romanised = script == "Latn" and wanted not in (None, "Latn")
        unknown = romanised or (unusual_script(language) and script == wanted)
        return 0 if unknown and said.code not in map(base_language, self.codes) else -1

    def _in_passing(self, language: str, spoken: Sequence[Spoken]) -> bool:
        """Whether some passage (a line, a sentence, a quotation) is in the language: a task about texts in another."""
        passages = [
            passage
            for part in spoken
            for passage in _SEGMENT.split(part.text[:_LONGEST])
            if len(passage.strip()) >= _LEAST or (passage and script_in(passage) not in ("Latn", "Cyrl", "Arab", None))
        ]
        found = self.guess(passages[:_SEGMENTS])
        return any(same_language(said.code, language) and said.alone > 0.1 for said in found)

    def _identified(self, spoken: Sequence[Spoken]) -> str:
        """The language of a row without a label: the prompt's where it can be told, else the answer's, else that of both."""
        if not self._config.identify:
            return self._only(spoken) or _unsaid("no_language", "languages.identify is off")
        least = self._config.min_confidence
        told = [part for part in spoken if part.guess.code != UNKNOWN and part.guess.confidence >= least]
        told = _japanese(told) or told
        inside = [part for part in told if part.guess.code in set(map(base_language, self.codes))]
        if not told and len(spoken) > 1:
            whole = "\n".join(part.text for part in spoken)
            joined = Spoken(whole, self.guess([whole])[0])
            told = [joined] if joined.guess.code != UNKNOWN and joined.guess.confidence >= least else []
        if not told:
            if (only := self._only(spoken)) is not None:
                return only
            said = spoken[0].guess
            if said.code == UNKNOWN:
                _unsaid("no_language", "nothing in the text says it")
            _unsaid("low_confidence", f"{said.code} {said.confidence:.2f} < {least}")
        part = (inside if told[0].guess.alone < SURE and inside else told)[0]
        return self._written(self.match(self._neighbour(part, told) or part.guess.code), [part], labelled=False)

    def _neighbour(self, part: Spoken, told: Sequence[Spoken]) -> str | None:
        """The language outside the run that another text of the row is in, if part may be in it too and is hardly in the run's (a
        Bulgarian prompt: ru 0.12). An answer in a language that the prompt cannot be in (a translation) says nothing against it."""
        if part.guess.alone >= SURE:
            return None
        inside = set(map(base_language, self.codes))
        for said in (other.guess for other in told if other is not part):
            strongest = max(said.outside, key=said.outside.__getitem__, default="")
            least = _CERTAIN if said.code in inside else _LIKELY
            if strongest in part.guess.outside and said.outside[strongest] >= least:
                return strongest
        return None

    def _only(self, spoken: Sequence[Spoken]) -> str | None:
        """The language of a run that has one, if nothing is in a script that it is not written in."""
        wanted = script_of(self.codes[0])
        found = {script_in(part.text) for part in spoken} - {None}
        if len(self.codes) > 1 or (wanted and not all(fits(script, wanted) for script in found if script)):
            return None
        self.assumed += 1
        return self.codes[0]

    def _written(self, label: Label, spoken: Sequence[Spoken], labelled: bool = True) -> str:
        """The one of the label's languages that is written as the text is; a language that is alone takes either Chinese. Without a label, of a
        macrolanguage whose members are written in scripts of their own, the run's that is written so (ckb and kmr)."""
        script = next((found for part in spoken if (found := script_in(part.text)) is not None), None)
        if script is None:
            return label[0]
        fitting = [language for language in label if (wanted := script_of(language)) is None or fits(script, wanted)]
        if fitting:
            return fitting[0]
        either = script in ("Hans", "Hant") and len(label) == 1
        wide = macrolanguage(label[0])
        if not labelled and wide in _BY_SCRIPT and wide not in map(base_language, label):
            for language in self.codes:
                if macrolanguage(language) == wide and fits(script, script_of(language) or script):
                    return language
            raise BadRow("language_not_in_run", f"{wide} in the script {script}")
        if either or not any(names_script(language) for language in label):
            return label[0]
        raise BadRow("language_not_in_run", f"{base_language(label[0])} in the script {script}")


def _japanese(told: Sequence[Spoken]) -> list[Spoken]:
    """The texts in Japanese of a row whose other texts are Chinese characters that Japanese has too (a title of kanji alone); else none."""
    found = [part for part in told if part.guess.code == "ja" and script_in(part.text) == "Jpan"]
    rest = [part for part in told if part not in found]
    alike = all(
        part.guess.code == "zh"
        and len(part.text) <= _TITLE
        and may_be_japanese(part.text)
        and not _ASKS_IN_CHINESE.search(part.text)
        for part in rest
    )
    return found if rest and alike else []


class Splitter:
    """Splits by hash of (seed, translation group): the same group is in the same split in every language and table.

    remember: some source may override the hash; what a group's first row got is then kept for the whole group.
    where: the section with `sources` and fractions, for messages.
    """

    def __init__(
        self,
        seed: int,
        unseen: Sequence[str],
        dev_fraction: float,
        test_fraction: float,
        remember: bool,
        where: str = "pairs",
    ) -> None:
        self._seed, self._unseen, self._where = seed, frozenset(unseen), where
        self._dev, self._test = dev_fraction, test_fraction
        self._groups: dict[str, _Given] | None = {} if remember else None
        self._given: dict[_Given, _Given] = {}  # one object for each, however many groups there are
        self._moved: Counter[str] = Counter()
        self._followed: Counter[tuple[str, str, str]] = Counter()
        self._first: dict[tuple[str, str, str], str] = {}
        self._held: dict[str, Counter[str]] = defaultdict(Counter)

    def split(
        self,
        language: str,
        group_id: str,
        override: Any,
        row_id: str,
        names: Mapping[str, str] | None = None,
        source: str = "",
    ) -> str:
        """train, dev or test; unseen for every row of an unseen language.

        override: the split that the row names, in the words of `names` if they are there. source: what the row is of, for messages.
        Raises UserError for another word.
        """
        override = word(override)
        if override is not None:
            override = (names or {}).get(override, override)
        if override is not None and override not in _SPLITS:
            raise UserError(
                f"{override[:40]!r} is not a split",
                where=f"row {row_id}",
                fix="The column named in fields.split holds train, dev or test, or nothing for the hash split; the source's "
                "`splits` says what other words mean, for example {validation: dev}.",
            )
        if language in self._unseen:
            self._held[language][_OF_UNSEEN] += 1
            return UNSEEN
        hashed = self._hashed(group_id)
        if self._groups is None:
            self._hold(language, hashed, _BY_HASH)
            return hashed
        own = (override or hashed, source)
        split, by = self._groups.setdefault(group_id, self._given.setdefault(own, own))
        moved = split != own[0]
        if moved and override is not None:
            self._moved[split] += 1
        elif moved and by != source:
            self._followed[source, split, by] += 1
            self._first.setdefault((source, split, by), row_id)
        self._hold(language, split, _BY_GROUP if moved else _BY_HASH if override is None else _BY_NAME)
        return split

    def notes(self) -> Iterator[str]:
        """What to say of rows that are in another split than their own, or than the hash gives, because of their translation group."""
        fix = (
            "where the ids only count the rows of each file, leave the column out "
            f"({self._where}.sources[].fields.group_id: null) or make them unique (docs/data.md)"
        )
        if self._moved:
            yield (
                f"{self._moved.total():,} rows are in the split of an earlier row of their translation group instead of their own "
                f"({', '.join(f'{count:,} in {split}' for split, count in self._moved.items())}); {fix}"
            )
        for (source, split, by), count in self._followed.most_common(_SAID):
            yield (
                f"{count:,} rows of {source} that name no split are in {split}, for their translation groups have rows of {by} there "
                f"(for example {self._first[source, split, by]}); {fix}"
            )

    def held_out(self, languages: Sequence[str]) -> str:
        """Why rows of these languages are not trained on, with counts; empty where none is held out."""
        counts: Counter[str] = Counter()
        for language in languages:
            counts.update(self._held[language])
        said = {
            _BY_NAME: "by a `split` of their own",
            _BY_GROUP: "with the rest of their translation group (`fields.group_id`)",
            _BY_HASH: f"by {self._where}.dev_fraction and test_fraction",
            _OF_UNSEEN: "in languages.unseen",
        }
        return ", ".join(f"{counts[why]:,} {words}" for why, words in said.items() if counts[why])

    def _hold(self, language: str, split: str, why: str) -> None:
        if split != "train":
            self._held[language][why] += 1

    def _hashed(self, group_id: str) -> str:
        position = unit_interval(self._seed, "split", group_id)
        if position < self._dev:
            return "dev"
        return "test" if position < self._dev + self._test else "train"


def assumed_said(count: int, language: str) -> str:
    """The note on rows whose language nothing says, in a run of one language."""
    return (
        f"{count:,} rows without a language are taken as {language}, the run's only one, for their texts are too short or have no words "
        "to tell it; those in another language are dropped"
    )


def group_of(cell: Any, default: str) -> str:
    """The translation group a row names, or `default`."""
    name = cell_id(cell)
    return (clean(name) if name is not None else "") or default


def _script_fits(tag: str, language: str) -> bool:
    """Whether a code that names a script, or a country that has one of its own, says the script of the run's language."""
    if not names_script(language) or not (names_script(tag) or langcodes.Language.get(tag).territory):
        return True
    return script_of(tag) == script_of(language)


def _script_may_fit(tag: str, language: str) -> bool:
    """Whether texts of the code can be in the script of the run's language: a country settles that for Chinese alone, whose scripts
    cannot always be told from the text; Serbian of Serbia is written in two."""
    return _script_fits(tag, language) or not (names_script(tag) or macrolanguage(tag) == "zh")


def _unsaid(reason: str, why: str) -> NoReturn:
    raise BadRow(reason, f"{why}; no column says it, nor the source's `language`")


def _in_brackets(hint: str) -> str:
    return f" ({hint})" if hint else ""
