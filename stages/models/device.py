"""Where a run computes, and in which precision."""

from __future__ import annotations

import torch

from schemas.config import RunConfig
from schemas.errors import UserError

_MEMORY_MESSAGES = ("out of memory", "not enough memory", "can't allocate memory")


def device_of(config: RunConfig) -> torch.device:
    """Where the run computes. Raises UserError when CUDA is asked for and not there."""
    wanted = config.execution.device
    if config.execution.deterministic or wanted == "cpu":
        return torch.device("cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "There is no CUDA device", where="execution.device", fix="Set execution.device: cpu, or check the driver."
        )
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_of(config: RunConfig) -> torch.dtype:
    """model.dtype; auto is bfloat16."""
    return torch.bfloat16 if config.model.dtype == "auto" else getattr(torch, config.model.dtype)


def is_out_of_memory(error: BaseException) -> bool:
    """True for CUDA and CPU allocation failures; PyTorch raises a plain RuntimeError for the
    latter."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(m in str(error).lower() for m in _MEMORY_MESSAGES)
