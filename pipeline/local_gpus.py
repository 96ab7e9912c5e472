"""The GPUs that workers on this machine are given, and what is refused of them before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec

from schemas.config import RunConfig
from schemas.engines import MOST_OF_A_GPU
from schemas.errors import UserError
from stages.models.compiler import refuse_without_compiler
from stages.models.gpus import are_parts, visible_gpus
from stages.spec import StageSpec, config_value


def local_gpus(config: RunConfig) -> list[str]:
    """Their ids; none where the run computes on the CPU. Raises UserError for `device: cuda` without one."""
    on_cpu = config.execution.device == "cpu" or config.execution.deterministic
    gpus = [] if on_cpu else visible_gpus()
    if config.execution.device == "cuda" and not gpus:
        raise UserError(
            "execution.device is cuda, but no GPU is visible", fix="Use execution.device: cpu, or check nvidia-smi."
        )
    return gpus


def refuse_gpus(config: RunConfig, specs: Sequence[StageSpec]) -> None:
    """Raise UserError for GPUs that torch cannot use, where a stage would compute on them, for fewer than a stage's workers take, and
    for a training that could not compile its kernels."""
    gpus = local_gpus(config)
    specs = [spec for spec in specs if spec.holds_gpu(config)]
    if not gpus or not specs:
        return
    if find_spec("torch"):
        from stages.models.device import refuse_unusable

        refuse_unusable()
    for spec in specs:
        _refuse_too_few(config, spec, gpus)
        if spec.trains:
            refuse_without_compiler(f"Stage {spec.name}")


def width(config: RunConfig, spec: StageSpec, gpus: Sequence[str]) -> int:
    """GPUs that a worker sees; CUDA shows it one part of those that MIG cuts."""
    return max(1, spec.gpus_per_worker(config, 1 if are_parts(gpus) else len(gpus)))


def _refuse_too_few(config: RunConfig, spec: StageSpec, gpus: Sequence[str]) -> None:
    each, there = width(config, spec, gpus), f"{len(gpus)} {'are' if len(gpus) > 1 else 'is'} visible"
    if are_parts(gpus) and each > 1:
        raise UserError(
            f"A worker of stage {spec.name} takes {each} GPUs, and MIG cuts those of this machine: a process can use one part",
            where=spec.gpus,
            fix="Set it to 1, or switch MIG off.",
        )
    if each > len(gpus):
        raise UserError(
            f"A worker of stage {spec.name} takes {each} GPUs and {there}",
            where=spec.gpus,
            fix="Lower it, or add GPUs.",
        )
    workers = config.execution.workers if spec.kind == "shard" else 1
    if each > 1 and workers * each > len(gpus):
        raise UserError(
            f"{workers} workers of stage {spec.name} take {each} GPUs each and {there}",
            where=f"execution.workers, {spec.gpus}",
            fix="Set execution.workers: 0, which starts as many as there is room for.",
        )
    engines = config_value(config, spec.engines) if spec.engines else []
    share = max((engine.gpu_memory_utilization for engine in engines if engine.facts.reserves), default=0.0)
    together = math.ceil(workers / len(gpus))
    if together > 1 and round(share * together, 6) > MOST_OF_A_GPU:
        raise UserError(
            f"{workers} workers of stage {spec.name} on {len(gpus)} GPU(s) are {together} on one, and each reserves {share:g} of it",
            where="execution.workers, engine.gpu_memory_utilization",
            fix=f"Set execution.workers: 0, one per GPU, or lower the share: at most {MOST_OF_A_GPU} together.",
        )
