"""Study 1: does the score find damage in preference pairs of real answers? AUROC and damaged share left, by damage, for every filter.

    python benchmarks/real_answers.py --work FOLDER --data answers.parquet [--models NAME,NAME] [--languages de,es,fr,ru] [--pairs 50]
        [--contrasts real,easy,language]
        [--words 40] [--strong gpt-4o-mini] [--weak gpt-3.5-turbo-0125] [--seeds 10] [--sketched]

--data: Parquet with id, language, prompt, model, answer. The pairs are sketched ONCE for each model by an ordinary, resumable run; damage is planted
as in benchmarks/planted_conflicts.py, and every seed's figures are a Parquet row (benchmarks/evidence/rows), committed as it finishes:
what is there is not computed again. docs/evidence.md shows what the rows say.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.evidence import answers
from benchmarks.planted import sketches

MODELS = "embedded:qwen2.5-coder-0.5b-instruct,embedded:gemma-3-270m"


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--languages", default="de,es,fr,ru")
    parser.add_argument("--pairs", type=int, default=50, help="in each language and contrast")
    parser.add_argument("--contrasts", default=",".join(answers.CONTRASTS))
    parser.add_argument("--strong", default="gpt-4o-mini")
    parser.add_argument("--weak", default="gpt-3.5-turbo-0125")
    parser.add_argument(
        "--words",
        type=int,
        default=40,
        help="both answers are cut to as many words as the shorter one has, at most this many",
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--sketched", action="store_true", help="make no sketches: use those committed so far")
    arguments = parser.parse_args()
    languages = arguments.languages.split(",")
    contrasts = arguments.contrasts.split(",")
    made = answers.make_pairs(
        answers.Answers.read(arguments.data),
        languages,
        arguments.pairs,
        arguments.strong,
        arguments.weak,
        arguments.words,
    )
    pairs = {contrast: made[contrast] for contrast in contrasts}
    for model in arguments.models.split(","):
        work = arguments.work / model.rpartition(":")[2].replace("/", "--")
        if not arguments.sketched:
            code = sketches.make(
                work,
                model,
                languages,
                pairs,
                0,
                threads=arguments.threads,
                asked=lambda text: [{"role": "user", "content": text}],
            )
            if code:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
