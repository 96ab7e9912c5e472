"""Columns of data sets that say something, and that nothing reads unless the config or the user does something about it; and what to
do with preference data that has no chosen and rejected."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile

_OF_IT = "write chosen and rejected of it, docs/own-pairs.md"
_OF_THEM = "write chosen and rejected of them, docs/own-pairs.md."
_BETTER = f"it says which answer is better: {_OF_IT}"
_MAY_SAY = f"it may say which answer is better, and nothing else here does: if so, {_OF_IT}"
_RATES = (
    "it may say which answer is better: `fields.{}_score` reads one, and pairs that are the wrong way round are dropped"
)
_ASKED = "part of what is asked: put it into the prompt, docs/own-pairs.md"
_MAY_BE_ASKED = "it may be part of what is asked: if so, put it into the prompt, docs/own-pairs.md"
_LEFT_OUT = "no part of what is learnt"
_UNSEEN = "not seen: a question about it is learnt without it; leave such rows out of the data"
_SPOKEN = "`fields.language` reads one"
_SURE = "it may say how sure a preference is, or that there is none: leave such rows out of the data"
_KNOWN = {
    **dict.fromkeys(("input", "history", "context", "initial_reason_steps"), _ASKED),
    "split": "`fields.split` of prompts and pairs reads it",
    **dict.fromkeys(
        ("label", "labels", "better_response_id", "overall_preference", "preference", "choice", "chosen_is_better"),
        _BETTER,
    ),
    "preference_strength": f"its sign may say which answer is better, its size how sure that is: if so, {_OF_IT}",
    **dict.fromkeys(("tie", "status", "agreement", "margin", "score_diff"), _SURE),
    **dict.fromkeys(
        ("rejected_instruction", "rejected_prompt", "rejected_question"),
        "a pair has one prompt here: where both answers are the same, and only the prompts differ, it is dropped as identical",
    ),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _UNSEEN),
    "tools": _LEFT_OUT,
}
_SYSTEM = "`fields.system` reads one"
_BEGINNINGS = {"system": _SYSTEM, "winner": _BETTER}
_OF = "target|tgt|source|src|prompt|question|instruction|input|answer|response|output|text|row|user"
_NAMED = (
    (
        re.compile(
            rf"(?:(?:{_OF}) )?(?:languages?|lang|lng|locale)(?: (?:code|id|tag|name|iso|key))?"
            r"|(?:lang(?:uage)? )?iso(?: code)?(?: 639)?(?: [1-3])?(?: code)?"
        ),
        _SPOKEN,
    ),
    (
        re.compile(
            r"(?:(?:chat|conversation|conv|dialog(?:ue)?|message) )?history|(?:previous|prior|past) (?:turns?|messages?|dialog(?:ue)?)"
            r"|(?:source |reference |input |retrieved |supporting )?(?:context|document|doc|passage|article|paragraph|evidence|background|knowledge)s?"
            r"(?: (?:text|string|messages?))?|(?:answer )?(?:options|choices)|(?:answer )?(?:option|choice) (?:[a-j]|[0-9])|op[a-e]|[a-e]"
            r"|source text|premise|hypothesis|table|schema|facts?|story|(?:starter )?code|inputs|dialog(?:ue)?|few shot(?: examples)?|demonstrations"
        ),
        _MAY_BE_ASKED,
    ),
    (re.compile(r"sys(?: (?:prompt|message|msg|instruction))?|personas?"), _SYSTEM),
)
"""Names by their words, whichever way they are written: target_language, promptLang, ISO-639-1."""
_SCORE = re.compile(
    r"(?:(?:score|rating|reward)s?[ _-](chosen|rejected)|(chosen|rejected)[ _-](?:score|rating|reward)s?)"
)
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")
_SAYS_BETTER = re.compile(
    r"prefer\w*|prefs?|favou?r\w*|better|best|safer|superior|chosen|accepted|winn?\w*|won|votes?|voted|verdicts?|judge?ments?|flip\w*|swap\w*"
    r"|rank\w*|select\w*|pick(?:ed)?|labels?|gold|annotat\w*|decisions?|results?|outcomes?|compar\w*|conclusions?|likert|majority|consensus"
)
"""Words of a column that may say which of two answers is better; so does a column whose last word is `order`."""
_SAYS_WHAT_IT_IS = re.compile(
    r"prefer\w*|dispreferred|favou?red|better|best|safer?|chosen|accept\w*|winn?\w*|pos|positive|good|correct|right|true"
    r"|worse|worst|unsafe|reject\w*|los\w*|neg|negative|bad|incorrect|wrong|false"
)
"""Words of an answer's column that say it is the better, or the worse, of the two."""
_RATED = frozenset(("score", "scores", "rating", "ratings", "reward", "rewards", "votes", "upvotes", "helpfulness"))
_ANSWER = frozenset(
    (
        "response",
        "answer",
        "output",
        "completion",
        "reply",
        "candidate",
        "generation",
        "summary",
        "ref",
        "solution",
        "text",
        "chat",
    )
)
_ABOUT_THE_ROW = frozenset((
    "id", "ids", "uuid", "index", "idx", "hash", "number", "len", "length", "tokens", "model", "models", "source", "url", "date", "time", "timestamp",
    "license", "category", "categories", "topic", "domain", "task", "type", "split", "subset", "dataset", "language", "languages", "lang", "locale",
    "turn", "turns", "system", "tools", "metadata", "meta", "version", "name", "title", "tags", "prompt", "question", "instruction", "query", "input",
))  # fmt: skip
"""Words of a column that says something of the row, and not which of its answers is better."""
_ALONE = ("completion", "response", "answer", "output", "reply", "generation")
SIDES = frozenset(
    (("a", "b"), ("0", "1"), ("1", "2"), ("left", "right"), ("first", "second"), ("one", "two"), ("x", "y"))
)
_ROLES = ("role", "from", "speaker", "author")
_CONVERSATIONS = (
    *("conversation_id", "conv_id", "dialog_id", "dialogue_id", "thread_id", "message_tree_id", "session_id"),
    *("turn", "turn_id", "turn_index", "message_id"),
)
_LISTS = ("completions", "responses", "answers", "candidates", "outputs", "generations", "replies")
_FOLDER = re.compile(r"(?:^|/)((?:language|lang|locale|language_code|lang_code)=[^/]+)/", re.IGNORECASE)


def unread_columns(present: Sequence[str], wanted: Sequence[str], answers: Sequence[str] = ()) -> list[str]:
    """What to say of well-known columns that a file has and nothing reads, with what to do about each.

    answers: the columns that are read as chosen and rejected. Where neither's name says which it is (response_a, response_b), any
    column that may say so is named, and so are scores of the two; where none of these is there, all that may hold it.
    """
    found, told = [], False
    unsaid = bool(answers) and not any(_SAYS_WHAT_IT_IS.fullmatch(word) for name in answers for word in _words(name))
    scores = _scores(answers, [name for name in present if name not in wanted]) if unsaid else {}
    for name in present:
        begun = next((advice for start, advice in _BEGINNINGS.items() if name.lower().startswith(start)), None)
        if (rated := _SCORE.fullmatch(name.lower())) is not None:
            begun = f"`fields.{rated.group(1) or rated.group(2)}_score` reads one"
        if begun is None and unsaid and _may_say_better(name):
            begun = _MAY_SAY
        words = " ".join(_words(name))
        begun = begun or next((advice for pattern, advice in _NAMED if pattern.fullmatch(words)), None)
        advice = scores.get(name) or _KNOWN.get(name.lower(), begun)
        if advice is not None and name not in (*wanted, "language"):
            found.append(f"{name[:80]} ({advice})")
            told |= advice in (_MAY_SAY, _BETTER) or name in scores
    notes = [f"columns that are not read: {', '.join(found)}"] if found else []
    if unsaid and not told and (rest := _may_hold_it([name for name in present if name not in wanted])):
        both = " and ".join(map(repr, answers))
        notes.append(f"nothing that is read says which of {both} is better: where {_some(rest)} does, {_OF_IT}")
    return notes


def other_pairs(columns: Sequence[str]) -> str | None:
    """What to do with preference data of a known form that has no columns chosen and rejected, by the names of those it has; None:
    the form is not known."""
    named = {name.lower(): name for name in columns}
    if "preferred_output" in named and "non_preferred_output" in named:
        prompt = f"prompt: {named['input']}, " if "input" in named else ""
        return f"This is OpenAI's preference format: `fields: {{{prompt}chosen: preferred_output, rejected: non_preferred_output}}`."
    if (answers := _two_answers(columns)) is not None:
        rest = [name for name in columns if name not in answers]
        said = [
            n for n in rest if _may_say_better(n) or _KNOWN.get(n.lower()) == _BETTER or n in _scores(answers, rest)
        ]
        both = f"{answers[0]!r} and {answers[1]!r} are two answers"
        if said:
            return f"{both}, and {', '.join(map(repr, said))[:200]} may say which is better: {_OF_THEM}"
        always = f"`fields: {{chosen: {answers[0]}, rejected: {answers[1]}}}`"
        if may := _may_hold_it(rest):
            return f"{both}. Where {_some(may)} says which is better, {_OF_THEM} Only if one of the two always is: {always}."
        return f"{both}. Is one of them always the better? {always}. Else {_OF_THEM}"
    if (messages := a_message_a_row(columns)) is not None:
        return f"{messages}: {_OF_THEM}"
    if (several := next((named[name] for name in _LISTS if name in named), None)) is not None:
        return (
            f"If {several!r} is a list of answers with scores: `fields: {{completions: {several}, completion_text: …, completion_score: …}}`, "
            "docs/data.md."
        )
    single = [name for name in columns if _ANSWER.intersection(_words(name)) and not _may_say_better(name)]
    if len(single) != 1 or single[0].lower() not in _ALONE:
        return None
    if single[0].lower() == "output" and "label" not in named:
        return f"If 'output' is a list of two answers, the better one first: {_OF_THEM}"
    return (
        f"{single[0]!r} is one answer a row (unpaired data, as KTO's), and a pair is two answers to one prompt: put those of a prompt into"
        " one row, docs/own-pairs.md."
    )


def has_answers(columns: Sequence[str]) -> bool:
    """Whether columns hold two answers, or a list of them, by their names."""
    return _two_answers(columns) is not None or any(name.lower() in _LISTS for name in columns)


def a_message_a_row(columns: Sequence[str]) -> str | None:
    """What to say of a file whose rows are messages of conversations, by the names of its columns; None: they are not."""
    named = {name.lower(): name for name in columns}
    if (role := next((named[name] for name in _ROLES if name in named), None)) is None:
        return None
    if "parent_id" in named:
        return "These are messages of trees, as OpenAssistant's are"
    if (conversation := next((named[name] for name in _CONVERSATIONS if name in named), None)) is not None:
        return f"A row is one message of a conversation ({conversation!r}, {role!r})"
    return None


def _may_hold_it(names: Sequence[str]) -> list[str]:
    """The columns that may say which of two answers is better, whatever they are called."""
    return [name for name in names if not _ABOUT_THE_ROW.intersection(_words(name))]


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (", ..." if names[5:] else "")


def _two_answers(columns: Sequence[str]) -> tuple[str, str] | None:
    """Two columns that are answers by their names, and one as good as the other: response_a and response_b, human_ref_0 and human_ref_1."""
    words = {tuple(_words(name)): name for name in columns}
    for one in words:
        for at, word in enumerate(one):
            for mark in (other for mark, other in SIDES if mark == word and _ANSWER.intersection(one)):
                if (other := words.get((*one[:at], mark, *one[at + 1 :]))) is not None:
                    return words[one], other
    return None


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORDS.findall(name)]


def _may_say_better(name: str) -> bool:
    words = _words(name)
    return any(map(_SAYS_BETTER.fullmatch, words)) or words[-1:] == ["order"]


def _scores(answers: Sequence[str], unread: Sequence[str]) -> dict[str, str]:
    """Columns that rate the two answers, by their names: what differs in the answers' names differs in theirs."""
    one, other = map(_words, answers)
    begun = _shared(one, other)
    ended = _shared(one[begun:][::-1], other[begun:][::-1])
    mark, mark_of_other = (f" {' '.join(words[begun : len(words) - ended])} " for words in (one, other))
    named = {f" {' '.join(_words(name))} ": name for name in unread}
    found = {}
    for words, name in named.items():
        pair = named.get(words.replace(mark, mark_of_other))
        if mark.strip() and mark in words and pair is not None and _RATED.intersection(words.split()):
            found[name], found[pair] = (_RATES.format(side) for side in ("chosen", "rejected"))
    return found


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """How many words two names begin with alike."""
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False)))


def unread_folder(path: str) -> str | None:
    """What to say of a file in a folder that names its language, as Hive's do (language=de/0.parquet); None: it is in none."""
    found = _FOLDER.search(path)
    return found and f"{found.group(1)[:80]} in the path is not read: name a source for each `language`"
