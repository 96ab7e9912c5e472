"""One training through the project's own train stage, from any model of a world on any pairs of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from benchmarks.quality.corpus import LANGUAGES
from benchmarks.quality.world import World
from schemas.config import RunConfig
from schemas.tables import TABLES
from stages.contract import Context, ModelRef, Rows, Silent
from stages.models.resolve import resolve
from stages.train.optimizers import Protected
from stages.train.stage import Train

_WEIGHTS = "model.safetensors"
Row = Mapping[str, str]
Average = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Trained:
    """The model a training left and what it logged: (step, name) -> value."""

    model: ModelRef
    metrics: dict[tuple[int, str], float]


def config_of(world: World, **sections: Any) -> RunConfig:
    """A config for stages that are called here directly. `sections` are merged into what is common."""
    common = {
        "name": "quality",
        "seed": world.seed,
        "languages": {"seen": list(LANGUAGES), "identify": False},
        "model": {"policy": world.sft.name, "dtype": world.dtype},
        "text": {"max_length": 512},
        "engine": {"kind": "transformers", "batch_size": 64},
        "prompts": {"sources": [{"path": "unused.jsonl"}]},
        "execution": {"deterministic": world.dtype == "float32"},
    }
    return RunConfig.model_validate(common | sections)


def context_of(
    world: World, config: RunConfig, policy: ModelRef, inputs: Mapping[str, list[Path]], folder: Path | None = None
) -> Context:
    """A context in which `policy` is also the reference."""
    models = {"policy": policy, "reference": policy, "initial": policy, "sft": world.sft}
    if world.base is not None:
        models["base"] = world.base
    return Context(config, 0, inputs, models, Silent(), folder)


def write_pairs(folder: Path, rows: Sequence[Row]) -> Path:
    """The rows as the pairs table; held-out rows are its dev split, by which the train stage judges objectives."""
    table = pa.Table.from_pylist([_pair(row) for row in rows], schema=TABLES["pairs"].schema)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pairs.parquet"
    pq.write_table(table, path)
    return path


def train(
    world: World,
    folder: Path,
    start: ModelRef,
    rows: Sequence[Row],
    *,
    loss: Mapping[str, Any] | None = None,
    hooks: AbstractContextManager[Any] | None = None,
    inputs: Mapping[str, list[Path]] | None = None,
    **settings: Any,
) -> Trained:
    """Train `start` on `rows` (those of the train split) with `settings` of the train section; `loss` of the loss section.

    inputs: tables that exist (curated, gradients) and take the place of those made of the rows. hooks: entered around the
    training. A folder that another call left is written anew.
    """
    shutil.rmtree(folder, ignore_errors=True)
    pairs = write_pairs(folder / "inputs", rows)
    config = config_of(world, loss=dict(loss or {}), train=_settings(world, settings))
    files = {"pairs": [pairs], "pairs:0": [pairs], **(inputs or _tables(world, folder / "inputs", rows))}
    ctx = context_of(world, config, start, files, folder)
    metrics: dict[tuple[int, str], float] = {}
    with hooks or nullcontext():
        for item in Train().run(ctx):
            if isinstance(item, Rows):
                metrics |= {(row["step"], row["name"]): row["value"] for row in item.data.to_pylist()}
    for name in ("checkpoints", "inputs", "logs", "adapter"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return Trained(model_in(world, folder), metrics)


def model_in(world: World, folder: Path) -> ModelRef:
    """The model a training left in `folder`."""
    return resolve(str(folder / "model"), cache=world.folder.parent / "cache")


def variant(world: World, folder: Path, like: ModelRef, weights: Mapping[str, torch.Tensor]) -> ModelRef:
    """A model with other weights, written to folder/model."""
    assert like.path is not None
    target = folder / "model"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(like.path, target)
    own = load_file(target / _WEIGHTS)
    save_file({n: weights[n].to(t.dtype).contiguous() for n, t in own.items()}, target / _WEIGHTS, {"format": "pt"})
    return model_in(world, folder)


def weights_of(model: ModelRef) -> dict[str, torch.Tensor]:
    """A model's weights in float32."""
    assert model.path is not None
    return {n: t.float() for file in sorted(model.path.glob("*.safetensors")) for n, t in load_file(file).items()}


@contextmanager
def averaged(decay: float, averages: Average) -> Iterator[None]:
    """Every AdamW step taken inside also updates `averages`, by parameter name: the bias-corrected exponential moving average
    of the weights after each step."""
    weight = 0.0

    def update(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal weight
        weight = decay * weight + (1 - decay)
        for name, parameter in named(optimizer):
            value = parameter.detach().float()
            averages.setdefault(name, value.clone()).lerp_(value, (1 - decay) / weight)

    handle = register_optimizer_step_post_hook(update)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def projected_gradients(protected: Protected) -> Iterator[None]:
    """What a gradient hook does: the GRADIENT is projected off the protected directions, before Adam and after clipping."""

    def project(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for name, parameter in named(optimizer):
            if parameter.grad is not None and protected.covers(name):
                protected.project_(name, parameter.grad)

    handle = register_optimizer_step_pre_hook(project)
    try:
        yield
    finally:
        handle.remove()


def extend(protected: Protected, before: ModelRef, after: ModelRef, q_max: int) -> Protected:
    """With the directions of what a training changed, as the train stage does it between objectives."""
    old, new = weights_of(before), weights_of(after)
    changes = {name: new[name] - weight for name, weight in old.items() if weight.ndim == 2}
    return protected.extended(changes, "left", 0.95, q_max)


def named(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters an optimizer steps, with their names."""
    for group in optimizer.param_groups:
        yield from zip(group.get("param_names", ()), group["params"], strict=True)


def _settings(world: World, given: Mapping[str, Any]) -> dict[str, Any]:
    merge = dict(given.get("merge", {}))
    if given.get("optimizer", "adamw") in ("ondare", "onties"):
        if world.base is None:
            raise LookupError("this method needs the pretrained model: give --base")
        merge["base"] = world.base.name
    common = {
        "method": "full",
        "learning_rate": world.size.learning_rate,
        "max_steps": world.size.steps,
        "batch_size": 8,
        "micro_batch_size": 8 if world.dtype == "float32" else 2,
        "save_steps": 1_000_000,
    }
    return common | dict(given) | ({"merge": merge} if merge else {})


def _pair(row: Row) -> dict[str, Any]:
    key = f"{row['group_id']}-{row['language']}"
    return {
        "pair_id": key,
        "round": 0,
        "prompt_id": key,
        "group_id": row["group_id"],
        "language": row["language"],
        "split": "train" if row["split"] == "train" else "dev",
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
        "source": row["objective"],
    }


def _tables(world: World, folder: Path, rows: Sequence[Row]) -> dict[str, list[Path]]:
    """curated (the rows of the train split) and gradients: no sketches, and no reference log-probabilities (NaN), which the
    train stage then computes itself."""
    renderer = world.renderer
    kept = [pair for pair in map(_pair, rows) if pair["split"] == "train"]
    curated = pa.Table.from_pylist(kept, schema=TABLES["curated"].schema)
    hashes = [renderer.pair_ids(*(pair[side] for side in ("prompt", "chosen", "rejected"))).hash() for pair in kept]
    unknown = pa.array([float("nan")] * len(kept), pa.float64())
    names = ["pair_id", "ids_hash", "ref_logp_chosen", "ref_logp_rejected"]
    gradients = pa.table([curated["pair_id"], pa.array(hashes), unknown, unknown], names=names)
    for name, table in (("curated", curated), ("gradients", gradients)):
        pq.write_table(table, folder / f"{name}.parquet")
    return {name: [folder / f"{name}.parquet"] for name in ("curated", "gradients")}
