"""The preference set of `make demo-curate`: three languages, 80 pairs each, of which 20% are wrong on purpose.

    python -m benchmarks.planted.demo_set          writes data/demo_pairs/*.jsonl (they are in the repository already)

The pairs are the subtle contrast of `texts`: the true answer against the same sentence with one number, name, date or negation wrong. In each
language 8 labels are flipped, 4 chosen answers belong to another question, and 4 are the true answer in another language, preferred to the one
in the language of the question. `label_error` says which; curation never looks at it.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from benchmarks.planted.texts import make_pairs

LANGUAGES = ("en", "de", "zh")
PAIRS = 80
PLANTED = {"flip": 8, "off_topic": 4, "other_language": 4}
"""Kind of error -> pairs of each language that have it."""
FOLDER = Path(__file__).parents[2] / "data" / "demo_pairs"


def rows() -> dict[str, list[dict[str, str]]]:
    """language -> its rows: group_id, prompt, chosen, rejected, label_error."""
    made = {name: make_pairs(LANGUAGES, PAIRS, name) for name in ("subtle", "easy", "language")}
    rng = random.Random(0)
    found: dict[str, list[dict[str, str]]] = {}
    for place, language in enumerate(LANGUAGES):
        kinds = [kind for kind, count in PLANTED.items() for _ in range(count)]
        errors = dict(zip(rng.sample(range(PAIRS), len(kinds)), kinds, strict=True))
        found[language] = []
        for number in range(PAIRS):
            subtle, easy, other = (
                made[name][number * len(LANGUAGES) + place] for name in ("subtle", "easy", "language")
            )
            error = errors.get(number, "")
            chosen, rejected = {
                "": (subtle["chosen"], subtle["rejected"]),
                "flip": (subtle["rejected"], subtle["chosen"]),
                "off_topic": (easy["rejected"], easy["chosen"]),
                "other_language": (other["rejected"], other["chosen"]),
            }[error]
            row = {"group_id": subtle["group_id"], "prompt": subtle["prompt"], "chosen": chosen, "rejected": rejected}
            found[language].append(row | {"label_error": error})
    return found


def text(language: str) -> str:
    """The file of a language."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows()[language])


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for code in LANGUAGES:
        (FOLDER / f"{code}.jsonl").write_text(text(code), encoding="utf-8")
