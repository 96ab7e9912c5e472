"""`export --what model | adapter`: what a round trained, as a folder with a completed card; pushed to the hub when asked.

The card is written by the stage that trains; what comes later completes it here: the licence as the config has it now, and the
evaluation of this very model as the hub's model-index.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import polars as pl

from pipeline.damage import no_longer
from pipeline.export import finished
from pipeline.export_folder import exporting
from pipeline.export_folder import push as send
from pipeline.fingerprint import content_of
from pipeline.inspect import table_files
from pipeline.models import model_files
from pipeline.rundir import RunDir
from pipeline.status import recorded_planner
from schemas.config import RunConfig
from schemas.errors import UserError
from stages.catalog import BY_NAME

What = Literal["model", "adapter"]


def export_model(config: RunConfig, out: Path, what: What, round_: int | None, push: str | None, private: bool) -> Path:
    """Write the trained model, or the adapter it was made with, to `out`; returns the folder.

    round_: default the last that was trained. Raises UserError if there is none, for pushing an adapter whose base is
    a folder of this machine, and as `exporting` and `push`.
    """
    train = BY_NAME["train"]
    states = recorded_planner(config, config.folder).states()
    made = finished(config, states, lambda spec: spec.name == train.name, round_, f"trained {what}")
    rundir, round_ = RunDir(config.folder), made.step.round
    source = rundir.artifacts(train, round_) / what
    if not source.is_dir():
        raise UserError(
            f"Round {round_} of this run left no {what}",
            where=str(config.folder),
            fix="An adapter is left by train.method: lora alone.",
        )
    own = source.relative_to(config.folder).as_posix() + "/"
    if bad := rundir.verify([f for f in made.manifest.files if f.path.startswith(own)] if made.manifest else []):
        raise no_longer(f"file of the {what}", config.folder / bad[0].path)
    if push and what == "adapter":
        _refuse_local_base(source)
    with exporting(out) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        card = (folder / "README.md").read_text(encoding="utf-8")
        (folder / "README.md").write_text(completed(card, config, round_), encoding="utf-8")
    if push:
        send(out, push, "model", private, replaced=["*.safetensors", "*.safetensors.index.json"])
    return out


def completed(card: str, config: RunConfig, round_: int) -> str:
    """The card with the licence of the config and what evaluation measured of this model."""
    from huggingface_hub import EvalResult, ModelCard

    found: Any = ModelCard(card, ignore_metadata_errors=True)
    found.data.license = config.card.model_license
    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type="held-out" if split != "benchmark" else "lm-evaluation-harness",
            dataset_name=f"{config.name}, {split}" if split != "benchmark" else metric.rpartition("/")[0] or metric,
            dataset_config=language
            if split != "benchmark"
            else metric.rpartition("/")[0] or metric,  # one entry for each
            dataset_split=split,
            metric_type=metric.rpartition("/")[2],
            metric_name=f"{metric.rpartition('/')[2]} ({n} items)",
            metric_value=round(value, 6),
        )
        for split, language, metric, value, n in _measured(config, round_)
        if not metric.endswith("_stderr")
    ]
    if results:
        found.data.model_name, found.data.eval_results = f"{config.name}, round {round_}", results
    return str(found)


def _measured(config: RunConfig, round_: int) -> list[tuple[str, str, str, float, int]]:
    """(split, language, metric, value, n) of the model after training; nothing if what was evaluated is another model."""
    rundir, evaluate = RunDir(config.folder), BY_NAME["evaluate"]
    trained, plan = rundir.stage(BY_NAME["train"], round_), rundir.plan(evaluate, round_)
    if trained is None or plan is None or rundir.stage(evaluate, round_) is None:
        return []
    if plan.ingredients.get("model trained") != content_of(model_files(trained)):
        return []
    rows = pl.scan_parquet(table_files(config.folder, "evaluation", round_), glob=False)
    after = rows.filter((pl.col("model") == "after") & pl.col("value").is_not_null())
    return (
        after.select("split", "language", "metric", "value", "n").sort("split", "language", "metric").collect().rows()
    )


def _refuse_local_base(adapter: Path) -> None:
    named = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    if Path(named).is_absolute():
        raise UserError(
            "The adapter's base model is a folder of this machine: nobody could load what is pushed",
            where=str(adapter / "adapter_config.json"),
            fix="Push the merged model (--what model), or train from a hub id.",
        )
