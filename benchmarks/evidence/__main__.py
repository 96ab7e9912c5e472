"""Evidence: does curation do what it says, on real answers? Six resumable studies, a Parquet row per arm and seed.

    python -m benchmarks.evidence sketch   --work FOLDER --data answers.parquet [--threads 1]
    python -m benchmarks.evidence real     --work FOLDER --data answers.parquet [--seeds 10]
    python -m benchmarks.evidence trusted  --work FOLDER --data answers.parquet [--seeds 10]
    python -m benchmarks.evidence few      --work FOLDER --data answers.parquet [--seeds 10]
    python -m benchmarks.evidence predict  --work FOLDER --data answers.parquet [--steps 30]
    python -m benchmarks.evidence training --work FOLDER --data answers.parquet [--seeds 5] [--only "40% flips"]
    python -m benchmarks.evidence methods  --work FOLDER --data answers.parquet [--seeds 3] [--only AdamW]
    python -m benchmarks.evidence print

--data: Parquet with the columns id (equal for translations), language, prompt, model, answer. `sketch` makes an ordinary, resumable run per model; the
studies start from its gradients. --questions takes the first ones only, so that a study can begin before all are sketched. Rows go to benchmarks/evidence/rows
as they finish; what is there is not computed again. `print` writes the tables of docs/evidence.md, and what is not there prints as missing.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.evidence import page
from benchmarks.evidence.answers import CONTRASTS, Pool
from benchmarks.quality.results import Results

_FIXED = ("models", "languages", "pairs", "words", "split")
"""Options that the methods study has no use for."""


def say(line: str) -> None:
    """A line for people, at once."""
    print(line, file=sys.stderr, flush=True)


def main(given: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "study", choices=("sketch", "real", "trusted", "few", "predict", "training", "methods", "print")
    )
    parser.add_argument("--work", type=Path, help="folder of runs and models")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", type=Path, default=page.ROWS)
    parser.add_argument("--models", default=",".join(page.MODELS))
    parser.add_argument("--contrasts", default=",".join(CONTRASTS))
    parser.add_argument("--languages", default=",".join(Pool().languages))
    parser.add_argument("--pairs", type=int, default=Pool().count, help="in each language and contrast")
    parser.add_argument("--words", type=int, default=Pool().words)
    parser.add_argument("--questions", type=int, default=0, help="of these only the first; 0: all")
    parser.add_argument("--seeds", type=int, default=0, help="0: ten (training: five, methods: three)")
    parser.add_argument("--steps", type=int, default=30, help="predict: steps on random pairs")
    parser.add_argument(
        "--deciles", type=int, default=1, help="predict: languages with a step on every tenth of their pairs"
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], help="training, methods: those with one of these in their name"
    )
    parser.add_argument("--held-out", type=int, default=40, help="training: held-out pairs a language")
    parser.add_argument(
        "--split",
        type=int,
        default=0,
        help="training: so many held-out pairs in the trained and in the unseen languages",
    )
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args(given)
    results = Results(arguments.rows)
    if arguments.study == "print":
        page.write(results)
        return 0
    if arguments.work is None or arguments.data is None:
        parser.error(f"{arguments.study} needs --work and --data")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    pool = Pool(tuple(arguments.languages.split(",")), arguments.pairs, words=arguments.words)
    contrasts = tuple(arguments.contrasts.split(","))
    questions = arguments.questions or pool.count
    if arguments.study == "methods":
        fixed = [name for name in _FIXED if getattr(arguments, name) != parser.get_default(name)]
        if fixed:
            parser.error(f"the methods study has its own model and pairs: leave --{', --'.join(fixed)} out")
        from benchmarks.evidence import methods

        study = methods.Study(arguments.work.resolve() / "methods", methods.MODEL, methods.POOL, arguments.held_out)
        return study.fill(results, arguments.data, range(arguments.seeds or 3), arguments.only, say)
    for model in arguments.models.split(","):
        work = arguments.work.resolve() / model.rpartition(":")[2].replace("/", "--")
        if arguments.study == "sketch":
            from benchmarks.evidence.real import sketch

            if code := sketch(work, model, pool, contrasts, arguments.data, arguments.threads):
                return code
        elif arguments.study == "real":
            from benchmarks.evidence import real

            real.Study(work, model, pool, contrasts, questions).fill(results, arguments.seeds or 10, say)
        elif arguments.study == "trusted":
            from benchmarks.evidence import trusted

            trusted.Study(work, model, pool, questions).fill(results, arguments.seeds or 10, say)
        elif arguments.study == "few":
            from benchmarks.evidence import few

            few.Study(work, model, pool, questions).fill(results, arguments.seeds or 10, say)
        elif arguments.study == "predict":
            from benchmarks.evidence import predict

            predict.Setup(work, model, pool, questions).fill(
                results, arguments.data, arguments.steps, arguments.deciles, say
            )
        else:
            from benchmarks.evidence import training

            setup = training.Setup(
                work, work / "training", model, pool, questions, held_out=arguments.held_out, split=arguments.split
            )
            setup.fill(results, arguments.data, range(arguments.seeds or 5), arguments.only, say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
