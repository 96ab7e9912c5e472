"""The tasks of `evaluate.tasks`, looked up and their data loaded before hours are spent."""

from __future__ import annotations

from collections import Counter

from schemas.config import RunConfig
from schemas.languages import UNKNOWN
from stages.evaluate.benchmarks.measuring import described
from stages.evaluate.benchmarks.wanted import wanted_of

_NAMED = 5


def look(config: RunConfig) -> list[str]:
    """What is asked, in a line. Raises UserError for a task that there is not, or that cannot be run here."""
    if not config.evaluate.tasks:
        return []
    tasks = described(wanted_of(config)).tasks
    languages = Counter(task.language for task in tasks)
    unknown = languages.pop(UNKNOWN, 0)
    said = ", ".join(sorted(languages)) or "no language that is known"
    questions = sum(task.asked_of for task in tasks)
    note = f"benchmarks: {len(tasks)} tasks, {questions:,} questions, before and after; {said}"
    unsaid = f"; of {unknown} tasks the language is not known (evaluate.benchmarks.languages)" if unknown else ""
    kept = [task.name for task in tasks if task.keeps_none]
    if not kept:
        return [note + unsaid]
    which = "all tasks" if len(kept) == len(tasks) else ", ".join(kept[:_NAMED]) + (", …" if len(kept) > _NAMED else "")
    return [note + unsaid, f"evaluate.benchmarks.fewshot has no effect on {which}: their files say num_fewshot: 0"]
