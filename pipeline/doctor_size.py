"""How much of everything a run will need: rows, disk, memory, time. Estimates, and said to be."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.rundir import KEPT
from schemas.config import RunConfig
from schemas.config.sources import Source
from stages.catalog import BY_NAME
from stages.checks.finding import Finding
from stages.text.words import duration

GB, GIB = 1e9, 2**30
_COUNT_SECONDS = 20.0
_BYTES_PER_TOKEN = 4
_ROW_BYTES = 300
"""Ids, scores and counts of a row, compressed; measured on the demo's tables."""


@dataclass(frozen=True)
class Sizes:
    """Row counts (upper bounds) and model size in bytes. memory: free bytes of the device; gpus: devices that there are, 0: the CPU; layers:
    (name, O, I) of what a sketch of the policy covers."""

    prompts: int
    candidates: int
    pairs: int
    curated: int
    weights: float
    memory: float
    gpus: int = 0
    layers: tuple[tuple[str, int, int], ...] = ()

    @classmethod
    def of(
        cls,
        config: RunConfig,
        rows: int,
        weights: float,
        memory: float,
        gpus: int = 0,
        layers: tuple[tuple[str, int, int], ...] = (),
    ) -> Sizes:
        """From the rows of the sources: every prompt is answered, every training prompt gives a pair."""
        candidates = 0 if config.imported else rows * config.generate.candidates
        source = config.pairs if config.imported else config.prompts
        pairs = round(rows * (1 - source.dev_fraction - source.test_fraction))
        return cls(rows, candidates, pairs, round(pairs * config.select.keep), weights, memory, gpus, layers)


def rows_of_sources(config: RunConfig) -> Iterator[tuple[str, str, int | None, bool]]:
    """(config key, source, rows, whether there are more) of every source; rows is None for a hub dataset.

    Raises UserError as reading the source in the run would.
    """
    yield from _rows("pairs.sources", list(config.pairs.sources), config)
    if not config.imported:
        yield from _rows("prompts.sources", list(config.prompts.sources), config)
    yield from _rows("sft.sources", list(config.sft.sources), config)
    yield from _rows("evaluate.authored", list(config.evaluate.authored), config)


def _rows(key: str, sources: list[Source], config: RunConfig) -> Iterator[tuple[str, str, int | None, bool]]:
    from stages.source_kinds import batches_of
    from stages.sources import is_hub

    languages = config.languages.codes
    for source in sources:
        if is_hub(source):
            yield key, source.path, None, False
            continue
        begun, count, more = time.monotonic(), 0, False
        for batch in batches_of(source, languages):
            count += len(batch.rows)
            if time.monotonic() - begun > _COUNT_SECONDS:
                more = True
                break
        yield key, source.path, count, more


def needs(config: RunConfig, sizes: Sizes) -> Iterator[Finding]:
    """Disk per table against the free space, and memory per stage against the device's."""
    per_pair, sums = _gradient_bytes(config, sizes)
    million = 1e6 * per_pair / GB
    disk = _disk(config, sizes)
    sft = _model_bytes(config.sft.method, sizes) if config.sft.on else 0.0
    total = sum(disk.values()) * config.rounds + sft
    free = shutil.disk_usage(_existing(config.folder)).free
    shown = ", ".join(f"{name} {_gb(size)}" for name, size in disk.items() if size)
    shown += f"; sft's model and checkpoints {_gb(sft)} once" if sft else ""
    kept, keep = _kept_bytes(config.folder), config.execution.keep_results
    aside = f"; _kept/ holds {_gb(kept)} made with other settings" if kept else ""
    aside += f"; changed settings keep up to {_gb(keep * total)} of what is there before them" if keep else ""
    what = (
        f"about {_gb(total)} for {config.rounds} round(s) ({shown}), {_gb(free)} free; {_sketch(config)} "
        f"{million:.1f} GB per million pairs{f' and sums of {_gb(sums)} once' if sums else ''}{aside}"
    )
    fix = "Free some space, choose another --run-dir, or lower gradients.sketch.dim."
    fix += " What is in _kept/ may be deleted." if kept else ""
    values: dict[str, float | str] = {"needed_bytes": total, "free_bytes": free, "gb_per_million_pairs": million}
    values |= {"kept_bytes": kept, "kept_bytes_at_most": max(kept, keep * total)}
    if sums:
        values["sums_bytes"] = sums
    state = "problem" if total > free else "warning" if total > 0.8 * free else "ok"
    yield Finding("disk", state, what, fix if state != "ok" else "", values)  # type: ignore[arg-type]
    if not sizes.memory or not sizes.weights:
        return
    memory = _memory(config, sizes)
    if config.train.orthalign.rank == "search":
        copy, main = _copy(config, sizes), psutil.virtual_memory().available
        if copy > main:
            what = f"train's rank search holds a copy of the weights, about {copy / GIB:.1f} GiB of main memory,"
            fix = "Use train.orthalign.rank: energy."
            yield Finding("memory", "problem", f"{what} {main / GIB:.1f} GiB are free", fix)
    for stage, (needed, least, fix) in memory.items():
        if needed > sizes.memory:
            what = f"{stage} needs about {needed / GIB:.1f} GiB, {sizes.memory / GIB:.1f} GiB are free"
            yield Finding("memory", "problem" if least > sizes.memory else "warning", what, fix)
    shown = ", ".join(f"{stage} {needed / GIB:.1f}" for stage, (needed, _, _) in memory.items())
    yield Finding("memory", "ok", f"GiB needed, about: {shown}; free: {sizes.memory / GIB:.1f}")


def _kept_bytes(folder: Path) -> float:
    """What a run keeps aside of results with other settings."""
    places = [*folder.glob(KEPT), *folder.glob(f"round-*/{KEPT}")]
    return float(sum(path.stat().st_size for place in places for path in place.rglob("*") if path.is_file()))


def _gradient_bytes(config: RunConfig, sizes: Sizes) -> tuple[float, float]:
    """(bytes per pair, bytes of the first pass's sums) of the gradients. What is not known of the model counts nothing."""
    sketch, languages = config.gradients.sketch, len(config.languages.seen)
    if sketch.method == "two_sided":
        return 2 * sketch.dim * (3 if sketch.both_sides else 1) + _ROW_BYTES, 0.0
    layers = [(rows, columns) for _, rows, columns in sizes.layers]
    if sketch.method == "exact":
        return 2.0 * sum(rows * columns for rows, columns in layers) * (3 if sketch.both_sides else 1) + _ROW_BYTES, 0.0
    blocks = len({number.group() for name, _, _ in sizes.layers if (number := re.search(r"\.\d+\.", name))})
    parts = math.ceil(sizes.pairs / config.gradients.aggregate_size)
    sums = 4.0 * sketch.rank * sum(min(shape) for shape in layers) * languages * parts
    return 8.0 * (languages + 1) * blocks + 2 * _ROW_BYTES, sums


def _sketch(config: RunConfig) -> str:
    sketch = config.gradients.sketch
    if sketch.method == "two_sided":
        return f"{'three ' if sketch.both_sides else ''}sketches of {sketch.dim} numbers take"
    return f"gradients with sketch.method {sketch.method} take"


def _disk(config: RunConfig, sizes: Sizes) -> dict[str, float]:
    """Bytes by table; text is counted as if every answer had full length."""
    answer = _BYTES_PER_TOKEN * config.generate.sampling.max_tokens
    texts = 2 * answer + _BYTES_PER_TOKEN * 200
    per_pair, sums = _gradient_bytes(config, sizes)
    model = _model_bytes(config.train.method, sizes)
    if _chained(config):  # the displacement and the start of every weight, in both checkpoints
        model += 2 * 4 * sizes.weights
    return {
        "candidates": sizes.candidates * (answer + _ROW_BYTES),
        "judgements": sizes.candidates * _ROW_BYTES,
        "pairs, curated and rejected": 2 * sizes.pairs * texts,
        "gradients": sizes.pairs * per_pair + sums,
        "sketches that wait for those they leave with": _waiting(config, sizes),
        "model and checkpoints": model,
        "copies between objectives": 3 * _copy(config, sizes),
    }


def _waiting(config: RunConfig, sizes: Sizes) -> float:
    """Bytes of sketches the conflict stage puts aside, at worst; with leave_out: answers only those that share one do."""
    if config.gradients.sketch.method == "one_sided" or config.conflict.leave_out != "group":
        return 0.0
    return _gradient_bytes(config, sizes)[0] * sizes.pairs / (3 if config.gradients.sketch.both_sides else 1)


def _model_bytes(method: str, sizes: Sizes) -> float:
    """A trained model and the checkpoints on the way to it."""
    return sizes.weights + (2 * 5 * sizes.weights if method == "full" else 0.2 * sizes.weights)


def _chained(config: RunConfig) -> bool:
    """Whether all weights are trained by an optimizer that holds them as start + displacement."""
    sequence = config.train.orthalign
    return config.train.method == "full" and (config.train.merges or bool(sequence.objectives))


def _copy(config: RunConfig, sizes: Sizes) -> float:
    """Bytes of one copy of the weights as an objective of a sequence holds them: bases are taken from the weights before and
    after it, which lie on disk beside those of the objective before."""
    if not config.train.orthalign.objectives:
        return 0.0
    return sizes.weights * (2 if config.train.method == "full" else 1)


def _on_a_device(config: RunConfig, sizes: Sizes) -> float:
    """How often the device holds what is trained: a share of it where processes cut it; main memory is that of all processes of a machine."""
    processes, nodes = config.train.processes or max(1, sizes.gpus), config.train.nodes or 1
    copies = config.train.copies(nodes, processes) if processes * nodes > 1 else 0
    held = copies / (processes * nodes) if copies else 1.0
    return held if sizes.gpus else held * processes


def _memory(config: RunConfig, sizes: Sizes) -> dict[str, tuple[float, float, str]]:
    """Stage -> (bytes, those of the weights alone, what to do when that is too much), of one device. Activations are a rough share of the
    weights."""
    weights, held = sizes.weights, _on_a_device(config, sizes)

    def training(method: str) -> float:
        return weights * (8 if method == "full" else 2)

    train = training(config.train.method)
    if _chained(config):
        train += weights * (4 if config.train.merges and config.train.merge.keep == "device" else 3)
    sums = 0.0
    if config.gradients.sketch.method == "one_sided":
        sums = (
            8.0 * len(config.languages.seen) * config.gradients.sketch.rank * sum(min(o, i) for _, o, i in sizes.layers)
        )
    initial = config.rounds > 1 and config.train.reference == "initial"
    models = 2.5 if config.model.reference is not None or initial else 1.5
    found = {
        "gradients": (
            models * weights + sums + GIB,
            weights,
            "Lower gradients.token_budget; the model must fit one worker.",
        ),
        "train": (
            train * held + GIB,
            weights * held,
            "Set train.method: lora and train.gradient_checkpointing: true, lower train.micro_batch_size; on several GPUs raise"
            " train.processes.",
        ),
    }
    if config.sft.on:
        fix = "Set sft.method: lora and sft.gradient_checkpointing: true, lower sft.micro_batch_size."
        found = {"sft": (training(config.sft.method) + GIB, weights, fix), **found}
    if config.engine.facts.has_weights and not config.imported:
        cache = config.engine.cpu_kv_cache_gib * GIB if config.engine.facts.reserves else GIB
        per_gpu = config.engine.tensor_parallel if config.engine.facts.parallel else 1
        fix = "Raise engine.tensor_parallel (vllm), lower text.max_length, or take a smaller model."
        found = {"generate": (weights / per_gpu + cache, weights / per_gpu, fix), **found}
    return found


def times(config: RunConfig, sizes: Sizes, measured: Callable[[str, str], float | None]) -> Iterator[Finding]:
    """Seconds per stage, from what the sample took here; nothing without a sample."""
    answer, judged = measured("generate", "seconds_per_answer"), measured("judge", "seconds_per_answer")
    pair = measured("batch_invariance", "seconds_per_pair")
    seconds: dict[str, float] = {}
    if answer is not None:
        seconds["generate"] = answer * sizes.candidates
    if judged is not None:
        seconds["judge"] = judged * sizes.candidates
    if pair is not None:
        steps = config.train.max_steps * config.train.batch_size
        trained = steps if steps > 0 else sizes.curated * config.train.epochs
        seconds["gradients"] = pair * sizes.pairs
        seconds["train"] = pair * trained
    if not seconds:
        yield Finding("time", "ok", "no estimate without a measured sample (leave out --quick)")
        return
    shown = ", ".join(f"{stage} {duration(value)}" for stage, value in seconds.items())
    what = (
        f"{shown} a round on one worker, for {sizes.prompts:,} {'pairs' if config.imported else 'prompts'} at full answer "
        "length; a small sample: large batches are faster"
    )
    yield Finding("time", "ok", what, values={**seconds})
    if workers := measured("cluster", "workers"):
        shared = {stage: value / workers for stage, value in seconds.items() if BY_NAME[stage].kind == "shard"}
        shown = ", ".join(f"{stage} {duration(value)}" for stage, value in shared.items())
        yield Finding(
            "time", "ok", f"{shown} a round on the cluster's {workers:.0f} workers, if each is as fast as this machine"
        )


def _gb(size: float) -> str:
    return f"{size / GB:.1f} GB" if size >= 0.1 * GB else f"{size / 1e6:.1f} MB"


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
