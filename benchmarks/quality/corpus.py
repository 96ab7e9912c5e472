"""The texts of the training benchmarks: running text to pretrain on, conversations to fine-tune on, preference pairs.

Running text are the authored prompts and the true authored answers of data/, in 13 languages, whole tasks held out.
Questions and answers are planted (data/planted): which answer is right is known by construction. Fine-tuning data is
noisy on purpose (off-topic answers, answers in another language, refusals), so that preference training has work to do.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.planted.texts import Language, Question, draw
from stages.data import data_path

LANGUAGES = ("en", "de", "es", "ru", "zh")
REFUSAL = {
    "en": "I would rather not answer that.",
    "de": "Darauf möchte ich lieber nicht antworten.",
    "es": "Prefiero no responder a eso.",
    "ru": "Я предпочитаю на это не отвечать.",
    "zh": "这个问题我不想回答。",
}
PREFERRED = ("sum", "road", "year", "even")
"""Kinds of questions the preference pairs are about."""
PRIVATE = ("lives", "train")
"""Kinds that objective `harmless` wants refused."""
KEPT = ("product", "greater")
"""Kinds only fine-tuning sees: what preference training does to them is its tax."""
OBJECTIVES = ("helpful", "harmless", "language")
_EVERY = 6  # one task in so many is held out


def running_text(held_out: bool) -> list[str]:
    """Prompts and true answers of data/, the tasks of one split; a task is in one split in every language."""
    texts = []
    for folder in ("prompts", "authored_pairs"):
        for file in sorted(data_path(folder).iterdir(), key=lambda entry: entry.name):
            if not file.name.endswith(".jsonl"):
                continue
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
                if (number % _EVERY == 0) == held_out:
                    row = json.loads(line)
                    texts.append(" ".join(row[name] for name in ("prompt", "chosen") if name in row))
    return texts


@dataclass(frozen=True)
class Questions:
    """Questions by kind for each use; no answer of one use appears in another."""

    tuning: dict[str, list[Question]]
    train: dict[str, list[Question]]
    test: dict[str, list[Question]]

    @classmethod
    def draw(cls, seed: int, tuning: int = 16, train: int = 12, test: int = 6) -> Questions:
        """`tuning`, `train` and `test` questions of each kind. Raises ValueError when there are not so many."""
        used: set[tuple[str, ...]] = set()
        return cls(*(_by_kind(count, 3 * seed + n, used) for n, count in enumerate((tuning, train, test))))


def _by_kind(count: int, seed: int, used: set[tuple[str, ...]]) -> dict[str, list[Question]]:
    kinds: dict[str, list[Question]] = {kind: [] for kind in (*PREFERRED, *PRIVATE, *KEPT)}
    for question in draw(count * len(kinds), seed, used, tables=False):
        kinds[question.kind].append(question)
    if short := [kind for kind, found in kinds.items() if len(found) != count]:
        raise ValueError(f"there are not {count} more questions of kind {short[0]}")
    return kinds


@dataclass(frozen=True)
class Turn:
    """A question and an answer to it in one language. kind: of question."""

    language: str
    kind: str
    prompt: str
    answer: str


def tuning_turns(questions: Questions, seed: int) -> list[Turn]:
    """Fine-tuning data: half of the answers true, 20% off-topic, 20% in another language, 10% refusals; the kinds in `KEPT` are
    always answered truly."""
    rng = random.Random(seed)
    spoken = {code: Language(code) for code in LANGUAGES}
    every = [(kind, question) for kind, found in questions.tuning.items() for question in found]
    turns = []
    for kind, question in every:
        for code, language in spoken.items():
            answer, chance = language.answer(question, right=True), rng.random()
            if kind not in KEPT and chance < 0.2:
                answer = language.answer(rng.choice([q for k, q in every if k != kind]), right=True)
            elif kind not in KEPT and chance < 0.4:
                answer = spoken[rng.choice([c for c in LANGUAGES if c != code])].answer(question, right=True)
            elif kind not in KEPT and chance < 0.5:
                answer = REFUSAL[code]
            turns.append(Turn(code, kind, language.question(question), answer))
    return turns


def true_turns(questions: dict[str, list[Question]], kinds: Sequence[str]) -> list[Turn]:
    """Questions of some kinds with their true answers, in every language."""
    spoken = {code: Language(code) for code in LANGUAGES}
    return [
        Turn(code, kind, language.question(question), language.answer(question, right=True))
        for kind in kinds
        for question in questions[kind]
        for code, language in spoken.items()
    ]


def preference_rows(questions: Questions, split: str, seed: int) -> list[dict[str, str]]:
    """Pairs of the three objectives: objective, group_id, language, split, prompt, chosen, rejected.

    helpful: the true answer over a true answer to a question of another kind, or (every second pair) over a refusal.
    harmless: a refusal over the true answer (where somebody lives, when a train arrives). language: the true answer over the same one in another language.
    """
    rng = random.Random(seed)
    found = questions.train if split == "train" else questions.test
    spoken = {code: Language(code) for code in LANGUAGES}
    rows = []
    for objective in OBJECTIVES:
        kinds = PRIVATE if objective == "harmless" else PREFERRED
        for number, question in enumerate(q for kind in kinds for q in found[kind]):
            other = rng.choice([q for kind in PREFERRED if kind != question.kind for q in found[kind]])
            for place, (code, language) in enumerate(spoken.items()):
                chosen = language.answer(question, right=True)
                if objective == "helpful":
                    rejected = REFUSAL[code] if (number + place) % 2 else language.answer(other, right=True)
                elif objective == "harmless":
                    chosen, rejected = REFUSAL[code], chosen
                else:
                    rejected = spoken[LANGUAGES[(place + 1 + number % 4) % len(LANGUAGES)]].answer(question, right=True)
                rows.append(
                    {
                        "objective": objective,
                        "group_id": f"{split}-{objective}-{number:03d}",
                        "language": code,
                        "split": split,
                        "prompt": language.question(question),
                        "chosen": chosen,
                        "rejected": rejected,
                    }
                )
    return rows
