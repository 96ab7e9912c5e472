"""Does the conflict score find pairs that are known to be bad? Planted damage, every filter, one table.

    python benchmarks/planted_conflicts.py --work FOLDER [--model NAME] [--languages en,de,ru,zh,ar] [--pairs 100]
        [--contrast subtle,easy] [--damage flip,language,off_topic,conflict,null] [--seeds 8] [--second-model NAME]

Pairs with truth by construction (data/planted) are sketched ONCE by the pipeline's own pairs and gradients stages, in a
run under --work that is resumed like any other; --sketched uses what is committed so far. Damage is cheap then: a
flipped label is a negated sketch. Settings of the conflict stage are chosen on --seeds development seeds and shown, beside
the config's defaults and every baseline filter, on as many fresh ones. Writes Parquet tables and figures.md to --work.

Last, cause: one optimizer step on the best-scored half of a language's pairs against one on the worst-scored half
(--cause, languages that are stepped; none by default, it trains the model in float32: 2 GB a half billion parameters).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.planted import report, sketches, texts, trial
from benchmarks.planted.cause import Stepper, measure
from benchmarks.planted.damage import SOURCE, Damage, plant
from benchmarks.planted.scoring import configured, score
from stages.gradients.projections import SketchLayout
from stages.gradients.store import LAYOUT_KEY
from stages.models.resolve import resolve

DEMO_MODEL = "embedded:qwen2.5-coder-0.5b-instruct"


def layout_of(work: Path) -> SketchLayout:
    """The layout the run's sketches were made with."""
    file = next(iter(sketches.gradient_files(work)))
    return SketchLayout.from_json((pq.read_schema(file).metadata or {})[LAYOUT_KEY].decode())


def study(work: Path, contrasts: list[str], kinds: list[str], seeds: int, draws: int) -> str:
    """Choose, show, write; returns the Markdown."""
    found, layout, default = sketches.read(work, contrasts), layout_of(work), configured()
    one = next(iter(found.values()))
    questions = one.frame.height // len(one.languages)
    real = [kind for kind in kinds if kind != "null"]
    best, tried = trial.choose(found, layout, real, range(seeds), default, print)
    named = {"ours": default, "chosen": best} if best != default else {"ours": default}
    named["template out"] = default.changed(leave_out="kind")
    shown = trial.show(found, layout, kinds, range(1000, 1000 + seeds), named, draws, print)
    held = trial.held_back(found, real, range(1000, 1000 + seeds))
    related = trial.correlations(found, layout, default)
    for name, frame in (("tried", tried), ("shown", shown), ("held", held), ("correlations", related)):
        frame.write_parquet(work / f"{name}.parquet")
    parts = [
        f"{questions} questions in each of {len(one.languages)} languages ({', '.join(one.languages)}); "
        f"{seeds} development and {seeds} fresh seeds; {draws} bootstrap draws over questions.\n",
        f"ours: {default}\n" + (f"\nchosen: {best}\n" if best != default else ""),
        "### AUROC\n",
        report.overview(shown),
        "### Damaged share of the half that is kept\n",
        report.left(shown),
        "### What the relevance gate holds back\n",
        report.held_back(held),
        "### Ours by language\n",
        report.by_language(shown, "ours"),
        "### Settings on the development seeds\n",
        report.settings(tried),
        "### The score and what it should not be about\n",
        report.correlations(related),
    ]
    return "\n".join(parts)


def cause(work: Path, model: str, contrast: str, languages: list[str], kind: str = "flip") -> str:
    """Step on either half of a damaged set; returns the Markdown."""
    found = sketches.read(work, list(texts.CONTRASTS))
    damaged = plant(found, Damage(contrast, kind, 0.25, seed=1000))
    scores = score(damaged, configured(), layout_of(work))
    value_N = torch.from_numpy(scores["score"].to_numpy().copy())
    table = measure(Stepper(resolve(model)), damaged, found[contrast], value_N, languages, say=print)
    table.write_parquet(work / "cause.parquet")
    return f"### Cause: one step, {contrast} contrast, {kind} 25%\n\n" + report.cause(table)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs and tables")
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--second-model", help="the same again on another model, in --work/second")
    parser.add_argument("--languages", default="en,de,ru,zh,ar", help=f"of {','.join(texts.languages())}")
    parser.add_argument("--pairs", type=int, default=100, help="in each language and contrast")
    parser.add_argument("--contrast", default="subtle,easy")
    parser.add_argument("--damage", default=",".join(SOURCE))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--draws", type=int, default=200, help="bootstrap draws")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--sketched", action="store_true", help="make no sketches: use those committed so far")
    parser.add_argument("--cause", default="", help="languages that are stepped")
    arguments = parser.parse_args()
    languages, kinds = arguments.languages.split(","), arguments.damage.split(",")
    wanted = arguments.contrast.split(",") + (["language"] if "language" in kinds else [])
    contrasts = [contrast for contrast in texts.CONTRASTS if contrast in wanted]
    unknown = [
        *(set(languages) - set(texts.languages())),
        *(set(kinds) - set(SOURCE)),
        *(set(wanted) - set(texts.CONTRASTS)),
    ]
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    models = {arguments.model: arguments.work}
    if arguments.second_model:
        models[arguments.second_model] = arguments.work / "second"
    for model, work in models.items():
        if not arguments.sketched:
            pairs = {contrast: texts.make_pairs(languages, arguments.pairs, contrast) for contrast in contrasts}
            code = sketches.make(work, model, languages, pairs, 0, arguments.dtype)
            if code:
                return code
        parts = [study(work, contrasts, kinds, arguments.seeds, arguments.draws)]
        if arguments.cause:
            parts.append(cause(work, model, "subtle" if "subtle" in contrasts else "easy", arguments.cause.split(",")))
        (work / "figures.md").write_text("\n".join(parts), encoding="utf-8")
        print("\n".join(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
