"""The GPUs that workers on this machine are given, and what is refused of them before any work."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from schemas.config import RunConfig
from schemas.errors import UserError
from stages.models.gpus import visible_gpus
from stages.spec import StageSpec


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
    """Raise UserError for GPUs that torch cannot use, where a stage would compute on them."""
    gpus = local_gpus(config)
    specs = [spec for spec in specs if spec.holds_gpu(config)]
    if not gpus or not specs:
        return
    if find_spec("torch"):
        from stages.models.device import refuse_unusable

        refuse_unusable()
